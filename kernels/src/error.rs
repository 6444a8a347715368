//! What can go wrong before a kernel runs: shapes and devices. Kernels themselves do not fail.

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("{0}")]
    Shape(String),
    #[error("{0}")]
    Device(String),
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}
