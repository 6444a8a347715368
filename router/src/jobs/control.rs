//! Cancel, pause, resume. What is wanted of a job is written to its row first, so that whoever works on it, here or in
//! another router, finds it there; where nobody does, it happens at once.

use std::time::Duration;

use tandem_store::{Asked, JobChange, NewEvent};
use tokio::sync::watch;

use crate::Router;
use crate::api::{Job, JobStatus, Level, RouterError};
use crate::jobs::{PAUSED, QUEUED, SWEEPING, VALIDATING, event, record};

/// A cancel or a pause is answered between two quanta of the engine, seconds at most; the request stands if that takes
/// longer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

impl Router {
    pub(crate) async fn cancel_job(&self, id: &str) -> Result<Job, RouterError> {
        let mut changed = self.0.signals.watch();
        let job = self.job(id).await?;
        if job.status.ended() {
            return Err(already_ended(&job));
        }
        // Before it is looked at again: whoever starts it from here on sees this.
        self.0.store.ask(id, Asked::Cancel).await?;
        let ended = match job.is_sweep() {
            false => {
                let from = &[VALIDATING, QUEUED, PAUSED];
                self.cancel_at_once(id, from, None).await?
            }
            true => {
                self.wake_sweep(id, vec![]).await?;
                false
            }
        };
        // Its keeper, here or in another router, stops who prepares it, or tells the replica.
        self.0.signals.wake_keepers();
        if ended {
            return self.job(id).await;
        }
        match self.settled(id, JobStatus::Cancelled, &mut changed).await? {
            job if job.status.ended() && job.status != JobStatus::Cancelled => Err(already_ended(&job)),
            job => Ok(job),
        }
    }

    pub(crate) async fn pause_job(&self, id: &str) -> Result<Job, RouterError> {
        let mut changed = self.0.signals.watch();
        let job = self.job(id).await?;
        is_no_trial(&job)?;
        match job.status {
            JobStatus::Paused => return Ok(job),
            status if status.ended() => return Err(already_ended(&job)),
            _ => {}
        }
        if self.let_rest(id).await? {
            return self.job(id).await;
        }
        match self.settled(id, JobStatus::Paused, &mut changed).await? {
            job if job.status.ended() => Err(already_ended(&job)),
            job => Ok(job),
        }
    }

    /// Asks for a pause. Whether the job rests already.
    pub(super) async fn let_rest(&self, id: &str) -> Result<bool, RouterError> {
        self.0.store.ask(id, Asked::Pause).await?;
        let paused = self.pause_at_once(id, &[QUEUED], None).await?;
        self.0.signals.wake_keepers();
        Ok(paused)
    }

    pub(crate) async fn resume_job(&self, id: &str) -> Result<Job, RouterError> {
        let before = self.job(id).await?;
        is_no_trial(&before)?;
        let row = self.0.store.job(id).await?;
        let key = row.as_ref().and_then(|row| row.key_id.as_deref());
        self.check_quota(key, 0).await?;
        self.check_storage_by(key).await?;
        let was = row.map(|row| row.asked);
        let resumed = match before.is_sweep() {
            false => self.let_go_on(id).await?,
            true => {
                self.0.store.ask(id, Asked::Nothing).await?;
                let resumed = event(Level::Info, "Fine-tuning job resumed".to_owned());
                self.wake_sweep(id, vec![resumed]).await?
            }
        };
        let job = self.job(id).await?;
        match resumed || was == Some(Asked::Pause) && !job.status.ended() {
            true => Ok(job),
            false if job.status.ended() => Err(already_ended(&job)),
            false => {
                let state = record::status_name(job.status);
                Err(RouterError::Conflict(format!(
                    "Job {id} is not paused: it is {state}."
                )))
            }
        }
    }

    /// Withdraws a pause. Whether the job rested.
    pub(super) async fn let_go_on(&self, id: &str) -> Result<bool, RouterError> {
        // A pause that has not happened yet does not happen any more.
        self.0.store.ask(id, Asked::Nothing).await?;
        let resumed = JobChange {
            from: &[PAUSED],
            status: Some(QUEUED),
            events: vec![event(
                Level::Info,
                "Fine-tuning job resumed, moving job to queued state".to_owned(),
            )],
            ..JobChange::default()
        };
        let resumed = self.change_job(id, resumed).await?;
        if resumed {
            self.0.signals.wake_supervisor();
        }
        Ok(resumed)
    }

    /// A sweep that rests is looked after again. Whether it rested.
    async fn wake_sweep(&self, id: &str, events: Vec<NewEvent>) -> Result<bool, RouterError> {
        let woken = JobChange {
            from: &[PAUSED],
            status: Some(SWEEPING),
            events,
            ..JobChange::default()
        };
        let woken = self.change_job(id, woken).await?;
        self.0.signals.wake_keepers();
        self.0.signals.wake_supervisor();
        Ok(woken)
    }

    /// The job once it is `wanted` or has ended, or as it is after [`ANSWER_WAIT`].
    async fn settled(
        &self,
        id: &str,
        wanted: JobStatus,
        changed: &mut watch::Receiver<()>,
    ) -> Result<Job, RouterError> {
        let settled = async {
            loop {
                let job = self.job(id).await?;
                if job.status == wanted || job.status.ended() || changed.changed().await.is_err() {
                    return Ok::<Job, RouterError>(job);
                }
            }
        };
        match tokio::time::timeout(ANSWER_WAIT, settled).await {
            Ok(job) => job,
            Err(_) => self.job(id).await,
        }
    }
}

/// What a trial does is its sweep's to say.
fn is_no_trial(job: &Job) -> Result<(), RouterError> {
    match &job.parent {
        None => Ok(()),
        Some(sweep) => {
            let message = format!("Job {} is a trial of {sweep}: pause and resume that one.", job.id);
            Err(RouterError::Conflict(message))
        }
    }
}

fn already_ended(job: &Job) -> RouterError {
    let state = record::status_name(job.status);
    RouterError::Conflict(format!("Job {} has already ended: it is {state}.", job.id))
}

impl Job {
    fn is_sweep(&self) -> bool {
        !self.request.trials.is_empty()
    }
}
