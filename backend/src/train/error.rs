//! Why training ends before its time. Not here: what becomes of the job (`run`).

use crate::guard::TorchFault;
use crate::lora::fit::PackError;
use crate::lora::peft;
use crate::weights::LoadError;

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("cannot use {file} of the job: {error}")]
    File { file: String, error: std::io::Error },
    #[error("{0}")]
    Data(String),
    /// Examples that are not those that were written.
    #[error("{0}")]
    Damaged(String),
    /// A state of another run.
    #[error("cannot resume: {0}")]
    State(String),
    #[error("step {step}: the {what} is {value}; a lower learning rate may help")]
    Diverged {
        step: u64,
        what: &'static str,
        value: f64,
    },
    #[error(
        "step {step}: with a loss of {loss}, it made numbers that are infinite or not a number (NaN); a lower learning rate \
         may help"
    )]
    Overflowed { step: u64, loss: f64 },
    #[error(transparent)]
    Fault(TorchFault),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error(transparent)]
    Kernel(#[from] tandem_kernels::KernelError),
    #[error(transparent)]
    Peft(#[from] peft::PeftError),
}

impl TrainError {
    /// The disk is full, a quota used up, or too many files are open: another time it may not be so.
    pub fn is_no_room(&self) -> bool {
        use std::io::ErrorKind as K;
        let error = match self {
            TrainError::File { error, .. } => error,
            TrainError::Peft(peft::PeftError::Write { error, .. } | peft::PeftError::Read { error, .. }) => {
                error
            }
            _ => return false,
        };
        let is_crowded = matches!(error.raw_os_error(), Some(libc::ENFILE | libc::EMFILE));
        is_crowded || matches!(error.kind(), K::StorageFull | K::QuotaExceeded)
    }
}
