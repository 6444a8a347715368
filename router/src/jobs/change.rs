//! A change of a job is one transaction. Whoever made it wakes the readers, and the names that came with it are served.

use tandem_core::id::AdapterDigest;
use tandem_store::{Asked, JobChange, Lease, NewEvent, NewName, Source};

use crate::Router;
use crate::api::{JobError, Level, RouterError};
use crate::jobs::{PAUSED, QUEUED, RUNNING, VALIDATING, record};

/// An adapter of a job, in the store.
#[derive(Clone, Copy)]
pub(super) struct Made {
    pub(super) digest: AdapterDigest,
    pub(super) rank: u32,
}

impl Router {
    /// Apply a change, wake readers, serve a new name. Whether the job was in one of `change.from`.
    pub(super) async fn change_job(&self, id: &str, change: JobChange) -> Result<bool, RouterError> {
        let changed = self.0.store.change_job(id, change).await?;
        let Some(changed) = changed else { return Ok(false) };
        self.0.catalog.remove(&changed.dropped);
        self.serve(changed.name);
        self.0.signals.wake_readers();
        Ok(true)
    }

    /// Whether the job is paused now: it was in one of `from`, and a pause is what is asked of it.
    pub(super) async fn pause_at_once(
        &self,
        id: &str,
        from: &'static [&'static str],
        holder: Option<Lease>,
    ) -> Result<bool, RouterError> {
        let paused = JobChange {
            from,
            holder,
            asked: Some(Asked::Pause),
            lets_go: true,
            status: Some(PAUSED),
            events: vec![event(Level::Info, "The job was paused.".to_owned())],
            ..JobChange::default()
        };
        self.change_job(id, paused).await
    }

    pub(super) async fn cancel_at_once(
        &self,
        id: &str,
        from: &'static [&'static str],
        holder: Option<Lease>,
    ) -> Result<bool, RouterError> {
        let cancelled = JobChange {
            from,
            holder,
            status: Some("cancelled"),
            ends: true,
            events: vec![event(Level::Info, "The job was cancelled.".to_owned())],
            ..JobChange::default()
        };
        let cancelled = self.change_job(id, cancelled).await?;
        if cancelled {
            self.0.store.remove_job_folder(id).await?;
        }
        Ok(cancelled)
    }

    pub(super) async fn fail_job(&self, id: &str, holder: Lease, error: JobError) -> Result<(), RouterError> {
        let failed = JobChange {
            from: &[VALIDATING, QUEUED, RUNNING],
            holder: Some(holder),
            status: Some("failed"),
            ends: true,
            events: vec![event(Level::Error, error.message.clone())],
            error: Some(record::to_json(&error)),
            ..JobChange::default()
        };
        if self.change_job(id, failed).await? {
            tracing::warn!(job = id, code = error.code, message = error.message, "job failed");
            self.0.store.remove_job_folder(id).await?;
        }
        Ok(())
    }

    /// After a holder's write was refused: the job was cancelled, or is another router's now.
    pub(super) async fn clear_if_ended(&self, id: &str) -> Result<(), RouterError> {
        match self.job(id).await?.status.ended() {
            true => Ok(self.0.store.remove_job_folder(id).await?),
            false => Ok(()),
        }
    }

    pub(super) fn job_name(&self, job: &str, name: String, step: Option<u64>, made: Made) -> NewName {
        let Made { digest, rank } = made;
        let source = Source::Job {
            job: job.to_owned(),
            step,
        };
        NewName {
            base: self.info().base_digest,
            name,
            digest,
            rank,
            source,
        }
    }
}

pub(super) fn event(level: Level, message: String) -> NewEvent {
    metrics(level, message, serde_json::Value::Null)
}

pub(super) fn metrics(level: Level, message: String, data: serde_json::Value) -> NewEvent {
    NewEvent {
        level: record::level_name(level),
        message,
        data: data.to_string(),
    }
}

impl JobError {
    pub(super) fn of_server(message: String) -> JobError {
        JobError {
            code: "server_error".to_owned(),
            param: None,
            message,
        }
    }
}
