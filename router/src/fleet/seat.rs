//! What this router has at each member, counted as long as it is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tandem_core::replica::{Command, ReplicaHandle};
use tokio::sync::mpsc;

/// Sequences' place at a member, counted until it is dropped.
pub struct Seat {
    pub commands: mpsc::Sender<Command>,
    live: Arc<AtomicU32>,
    n: u32,
}

impl Seat {
    pub(super) fn new(commands: mpsc::Sender<Command>, live: &Arc<AtomicU32>, n: u32) -> Seat {
        live.fetch_add(n, Ordering::AcqRel);
        Seat {
            commands,
            live: live.clone(),
            n,
        }
    }

    /// Another seat at the same member, for `n` of these sequences that go on alone.
    pub fn split(&mut self, n: u32) -> Seat {
        self.n -= n;
        Seat {
            commands: self.commands.clone(),
            live: self.live.clone(),
            n,
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.live.fetch_sub(self.n, Ordering::AcqRel);
    }
}

/// A job's place at a member, counted until it is dropped.
pub struct JobSeat {
    pub replica: ReplicaHandle,
    jobs: Arc<AtomicU32>,
}

impl JobSeat {
    pub(super) fn new(replica: ReplicaHandle, jobs: &Arc<AtomicU32>) -> JobSeat {
        jobs.fetch_add(1, Ordering::AcqRel);
        JobSeat {
            replica,
            jobs: jobs.clone(),
        }
    }
}

impl Drop for JobSeat {
    fn drop(&mut self) {
        self.jobs.fetch_sub(1, Ordering::AcqRel);
    }
}
