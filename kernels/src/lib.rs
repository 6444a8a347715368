//! Ops libtorch lacks or does slowly, each beside its plain reference. One file per op: shapes and source in the doc
//! comment, `op()` dispatches, `reference()` says the same in plain tch, a test that they agree over a grid.
//!
//! Not here: models, adapters as files, scheduling. Kernels see tensors and slices only.
//!
//! # The one precision rule
//! Activations are float32, always, everywhere: one dtype in every signature. A weight (and the KV cache) has a
//! [`weight::Precision`]; a multiply rounds its left side to the weight's precision and sums in float32. How a weight's
//! numbers are stored is its [`weight::Format`]: in the precision, or quantised.
//! Norms, softmax, rope, logits and loss stay in float32.
//!
//! # Batch invariance
//! On the CPU paths of this crate a row's result never depends on the other rows of the call, on their number, or on
//! the number of threads: every output element sums over its reduction in one fixed order.

pub mod activation;
pub mod adafactor;
pub mod adamw;
pub mod adamw8bit;
pub mod attention;
pub mod cap;
pub mod comm;
pub mod dropout;
mod error;
pub mod experts;
pub mod finite;
mod flat;
pub mod gpu;
pub mod host;
pub mod linear;
pub mod lion;
pub mod loss;
pub mod machine;
pub mod mapped;
pub mod matmul;
pub mod norm;
pub mod places;
pub mod pool;
pub mod rope;
pub mod sample;
pub mod sgd;
mod simd;
mod slice;
mod vector;
pub mod weight;

pub use error::KernelError;
