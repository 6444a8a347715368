//! The words every other crate shares: ids, requests, events, jobs, the scheduler and the block pool.
//! Pure data and pure decisions. Not here: tensors, clocks, sockets, files, text.

pub mod bar;
pub mod blocks;
pub mod dataset;
pub mod gguf;
pub mod grammar;
pub mod histogram;
pub mod id;
pub mod job;
pub mod json;
pub mod learner;
pub mod lfs;
pub mod message;
pub mod pooling;
pub mod protobuf;
pub mod replica;
pub mod report;
pub mod rng;
pub mod sampling;
pub mod sched;
pub mod settings;
pub mod stats;
pub mod suggest;
pub mod thinking;
pub mod trace;
pub mod uses;

/// Position of a token in the model's vocabulary.
pub type TokenId = u32;
