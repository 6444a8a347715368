//! One replica: model, cache, adapters and trainer on one engine thread that plans, runs, commits and tells.
//! Not here: text, HTTP, names, files of clients, SQL.

pub mod bank;
pub mod batch;
pub mod engine;
pub mod family;
mod grammars;
pub mod guard;
pub mod lora;
pub mod model;
pub mod pace;
mod pool;
pub mod ranks;
pub mod sample;
pub mod start;
mod thoughts;
pub mod train;
pub mod weights;
pub mod words;

/// For who starts ranks.
pub use tandem_kernels::comm::{CommError, MAX_WORLD, Meeting};
/// For the process's start.
pub use tandem_kernels::machine::check_kernels;
/// For its end in the middle of a step.
pub use tandem_kernels::machine::exit_at_once;
/// For the process's metrics.
pub use tandem_kernels::machine::{amd, nvidia};

pub use start::memory::size;
pub use start::{Dtype, ModelLen, Options, Quantization, start};
pub use weights::LoadError;
