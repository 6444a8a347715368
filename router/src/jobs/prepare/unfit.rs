//! Why a job is not prepared.

use std::io;

use tandem_store::{StorageExceeded, StoreError};

use crate::api::{JobError, RouterError};
use crate::storage::STORAGE_LIMIT;

pub(super) enum Unfit {
    /// The job fails by this.
    Job(JobError),
    Router(RouterError),
    /// Nobody waits for it.
    GivenUp,
}

/// A full disk passes; whatever else a disk says does not.
pub(super) fn unwritten(source: io::Error) -> Unfit {
    let what = "writing the datasets of a job".to_owned();
    let error = StoreError::Io { what, source };
    match error.away() {
        Some(_) => Unfit::Router(error.into()),
        None => Unfit::Job(JobError::of_server(format!(
            "The datasets cannot be written: {error}"
        ))),
    }
}

pub(super) fn too_much(param: &str, exceeded: StorageExceeded) -> JobError {
    JobError {
        code: STORAGE_LIMIT.to_owned(),
        param: Some(param.to_owned()),
        message: format!("The job was not prepared: {exceeded}."),
    }
}

pub(super) fn invalid(param: &str, message: String) -> JobError {
    JobError {
        code: format!("invalid_{param}"),
        param: Some(param.to_owned()),
        message,
    }
}
