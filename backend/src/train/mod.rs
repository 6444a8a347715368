//! A fine-tuning job as a tenant of the engine: it advances in quanta of a few milliseconds (a sublayer of one slice,
//! forward or backward), so that requests are served between them. The same steps train a LoRA adapter beside the
//! served base and, for `tandem train`, every parameter of a model of its own.
//!
//! With several ranks each runs the same quanta over its part of the model. An adapter's numbers, gradients and moments
//! are whole on every rank: a rank's backward fills what it is responsible for, one sum over ranks makes the gradient,
//! and the optimizer takes the same step everywhere. Files are rank 0's, and say nothing of ranks: a job may go on under another
//! number of them.
//!
//! A trainer touches no file after its start: what is to be kept leaves it as a [`Snapshot`], which somebody else writes.
//!
//! Not here: when to train (pace), jobs' queue and names (router).

mod best;
mod call;
pub mod driven;
mod error;
pub mod evaluation;
mod inputs;
pub mod joint;
pub mod learner;
pub mod mates;
pub mod memory;
pub mod mesh;
pub mod micro_batch;
pub mod noise;
pub mod objective;
pub mod optimizer;
pub mod pass;
pub mod plan;
pub mod profile;
mod references;
pub mod run;
pub mod slice;
pub mod snapshot;
pub mod state;
pub mod together;
mod trainer;
pub mod turns;

pub use error::TrainError;
pub use inputs::Inputs;
pub use trainer::{Quantum, Trainer};
