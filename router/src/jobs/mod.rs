//! Jobs as clients see them: create, list, pause, cancel, read along. A job's state is its row; every change is one
//! transaction (`Store::change_job`), and whoever made it wakes the readers. Whoever works on a job holds its lease
//! (`keeper`), so any number of routers may share the rows.
//!
//! ```text
//! validating_files --prepare--> queued --supervisor--> running --engine--> succeeded
//!                 \------------------\-------------------\---------------> failed, cancelled
//!                                      queued <-> paused <- running
//! ```
//!
//! A sweep is a job of its own (`sweeping`, then an end) whose trials are jobs like any other (`sweep`).

mod change;
mod check;
mod control;
mod create;
pub mod hyper;
mod inputs;
pub(crate) mod keeper;
mod name;
pub(crate) mod prepare;
pub mod preview;
mod read;
pub(crate) mod record;
mod result;
mod signals;
pub(crate) mod supervisor;
mod sweep;

pub(crate) use signals::Signals;

use crate::api::JobStatus;
use change::{Made, event, metrics};

/// How often in a row who works on a job or a batch may vanish before it was further than ever: what takes all memory ends its
/// server each time that it is begun. More often than a replica, because a server is killed for other reasons, too.
pub(crate) const MAX_DEATHS: u64 = 10;

const QUEUED: &str = "queued";
const RUNNING: &str = "running";
const PAUSED: &str = "paused";
const SWEEPING: &str = "sweeping";
const VALIDATING: &str = "validating_files";

impl JobStatus {
    pub fn ended(self) -> bool {
        match self {
            JobStatus::Succeeded | JobStatus::Failed | JobStatus::Cancelled => true,
            JobStatus::ValidatingFiles
            | JobStatus::Queued
            | JobStatus::Sweeping
            | JobStatus::Running
            | JobStatus::Paused => false,
        }
    }
}
