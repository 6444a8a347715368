//! A life of a job in a replica: from the command that starts it to what the replica says last.

mod publish;

use std::ops::ControlFlow;

use serde_json::json;
use tandem_core::id::JobId;
use tandem_core::job::{Hyper, JobEvent, JobSpec, Life, Method, Saved, base_model};
use tandem_core::replica::{Command, JOB_EVENT_QUEUE};
use tandem_store::{Asked, JobChange, JobRow, Lease, Storage, StoreError};
use tokio::sync::{mpsc, watch};

use super::HERE;
use super::fairness::give_up;
use super::progress::{Progress, Told, Turn};
use crate::Router;
use crate::api::{JobError, JobRequest, Level, RouterError};
use crate::fleet::JobSeat;
use crate::jobs::keeper::Keeper;
use crate::jobs::{PAUSED, QUEUED, RUNNING, VALIDATING, event, metrics, record};

/// How a life of a job ended.
pub(super) enum End {
    /// The replica said how, and it is written.
    Told,
    /// The replica trains as many as it may, or has no room for this one.
    Refused { message: String },
    /// The lease is another's.
    Lost,
    /// The replica went without a word. `stepped`: it had made a step.
    Silent { stepped: bool },
}

/// A job in a replica.
pub(super) struct Run<'a> {
    router: &'a Router,
    id: JobId,
    lease: Lease,
    keeper: Keeper,
    /// Whether it is to be kept, for another tenant's.
    to_give_up: watch::Receiver<bool>,
    seat: JobSeat,
    /// The key that made it, where what it trains or stores is limited.
    key_id: Option<String>,
    /// Who rests where nothing is left to train: the job, or the sweep whose trial it is.
    rests: String,
    /// Its model's name, once it succeeds.
    model: String,
    /// Checkpoints that are kept; `None`: all.
    save_total_limit: Option<u32>,
    rank: u32,
    events: mpsc::Receiver<JobEvent>,
    progress: Progress,
    /// The last state that the store names.
    saved: Option<Saved>,
}

impl<'a> Run<'a> {
    /// `None`: the replica went.
    pub(super) async fn start(
        router: &'a Router,
        row: JobRow,
        lease: Lease,
        seat: JobSeat,
        to_give_up: watch::Receiver<bool>,
    ) -> Result<Option<Run<'a>>, RouterError> {
        let missing = || RouterError::Store(StoreError::Damaged(format!("{} has no hyper", row.id)));
        let hyper: Hyper = record::from_json(row.hyper.as_deref().ok_or_else(missing)?)?;
        let rank = match &hyper.method {
            Method::Lora(lora) => lora.r,
            Method::Full => 0,
        };
        let is_restart = row.status == RUNNING;
        let request: JobRequest = record::from_json(&row.request)?;
        let id = record::job_id(row.id)?;
        let commands = seat.replica.commands.clone();
        let life = Life {
            epoch: lease.epoch(),
            saved: row.saved,
        };
        // From here on: fetching a state may take longer than a lease.
        let keeper = Keeper::new(router, id.as_str(), lease, Some(commands.clone()));
        let spec = JobSpec {
            id: id.clone(),
            folder: router.0.store.artifacts().pull_job(&id, life).await?,
            tenant: row.tenant,
            base_model: base_model(&router.info().model_folder),
            hyper,
            life,
        };
        let (sender, events) = mpsc::channel(JOB_EVENT_QUEUE);
        let start = Command::StartJob(Box::new(spec), sender);
        if commands.send(start).await.is_err() {
            return Ok(None);
        }
        tracing::info!(job = %id, epoch = life.epoch, "job started");
        Ok(Some(Run {
            router,
            rests: row.parent.unwrap_or_else(|| id.as_str().to_owned()),
            progress: Progress::new(id.clone(), is_restart, router.info().parameters),
            id,
            lease,
            keeper,
            to_give_up,
            seat,
            key_id: row.key_id,
            model: row.model_name,
            save_total_limit: request.settings.save_total_limit,
            rank,
            events,
            saved: row.saved,
        }))
    }

    /// What ends this also lets go of the replica: a closed channel stops the job there.
    pub(super) async fn follow(mut self) -> Result<End, RouterError> {
        let mut events = Vec::with_capacity(JOB_EVENT_QUEUE);
        loop {
            let heard = tokio::select! {
                biased;
                () = self.keeper.lost() => return Ok(End::Lost),
                () = give_up(&mut self.to_give_up) => {
                    // One that has not begun is told again. A replica that is gone trains nothing.
                    let pause = Command::PauseJob(self.id.clone());
                    let _ = self.seat.replica.commands.send(pause).await;
                    continue;
                }
                heard = self.events.recv_many(&mut events, JOB_EVENT_QUEUE) => heard,
            };
            if heard == 0 {
                // It may have been paused before there was anything to keep.
                let lease = Some(self.lease);
                return Ok(
                    match self.router.pause_at_once(self.id.as_str(), HERE, lease).await? {
                        true => End::Told,
                        false => self.silence(),
                    },
                );
            }
            // What is only told goes in one transaction; what changes the job has its own.
            let mut told = Told::default();
            for event in events.drain(..) {
                match self.progress.tell(event, &mut told) {
                    None => {}
                    Some(turn) => {
                        if self.write(std::mem::take(&mut told)).await?.is_break() {
                            return Ok(End::Lost);
                        }
                        if let ControlFlow::Break(end) = self.turn(turn).await? {
                            return Ok(end);
                        }
                    }
                }
            }
            if self.write(told).await?.is_break() {
                return Ok(End::Lost);
            }
        }
    }

    /// The state that a replica wrote before it stopped is what the next life begins with.
    async fn wait_from(&mut self, step: u64) -> Result<End, RouterError> {
        let epoch = self.lease.epoch();
        self.router
            .0
            .store
            .artifacts()
            .push_job(&self.id, epoch, step)
            .await?;
        let kept = || JobChange {
            from: HERE,
            saved: Some(Saved { epoch, step }),
            ..JobChange::default()
        };
        let paused = JobChange {
            asked: Some(Asked::Pause),
            status: Some(PAUSED),
            lets_go: true,
            events: vec![metrics(
                Level::Info,
                format!("The job was paused after step {step}."),
                json!({ "step": step }),
            )],
            ..kept()
        };
        if self.change(paused).await?.is_continue() {
            return Ok(End::Told);
        }
        if *self.to_give_up.borrow() {
            let waits = JobChange {
                asked: Some(Asked::Nothing),
                status: Some(QUEUED),
                lets_go: true,
                events: vec![metrics(
                    Level::Info,
                    format!(
                        "The job gave its place to another tenant's after step {step}, and waits for the next."
                    ),
                    json!({ "step": step }),
                )],
                ..kept()
            };
            if self.change(waits).await?.is_continue() {
                return Ok(End::Told);
            }
        }
        Ok(match self.change(kept()).await? {
            ControlFlow::Continue(()) => self.silence(),
            ControlFlow::Break(()) => End::Lost,
        })
    }

    fn silence(&self) -> End {
        End::Silent {
            stepped: self.progress.has_stepped(),
        }
    }

    /// A change by the holder. `Break`: the job is no longer ours to change.
    pub(super) async fn change(&self, change: JobChange) -> Result<ControlFlow<()>, RouterError> {
        let change = JobChange {
            holder: Some(self.lease),
            ..change
        };
        Ok(match self.router.change_job(self.id.as_str(), change).await? {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        })
    }

    async fn write(&mut self, told: Told) -> Result<ControlFlow<()>, RouterError> {
        let Told {
            events,
            trained_tokens,
            estimated_finish,
            no_room,
            is_started,
            kept_bytes,
        } = told;
        let trains = trained_tokens.is_some();
        if no_room {
            // It may be the disk of this data folder.
            self.router.0.store.look_for_room().await;
        }
        if events.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        let change = JobChange {
            from: HERE,
            status: is_started.then_some(RUNNING),
            trained_tokens,
            kept_bytes,
            estimated_finish,
            events,
            ..JobChange::default()
        };
        let changed = self.change(change).await?;
        if changed.is_continue() && trains {
            self.rest_if_used_up().await?;
        }
        Ok(changed)
    }

    /// Its steps are counted; where none is left today, the job is paused, and may be resumed tomorrow.
    async fn rest_if_used_up(&mut self) -> Result<(), RouterError> {
        let checked = self.router.check_quota(self.key_id.as_deref(), 0).await;
        self.rest_if_exceeded(checked).await
    }

    /// Its checkpoints are stored; where its next one has no room, or its state, the job is paused.
    async fn rest_if_full(&mut self) -> Result<(), RouterError> {
        let storage = self.router.storage_by(self.key_id.as_deref()).await?;
        let checked = storage.map_or(Ok(()), Storage::holds);
        let checked = checked.map_err(|exceeded| StoreError::from(exceeded).into());
        self.rest_if_exceeded(checked).await
    }

    async fn rest_if_exceeded(&mut self, checked: Result<(), RouterError>) -> Result<(), RouterError> {
        let exceeded = match checked {
            Err(error @ (RouterError::Quota(_) | RouterError::Store(StoreError::OverLimit(_)))) => error,
            checked => return checked,
        };
        // Once.
        self.key_id = None;
        let message = format!("The job is paused: {exceeded}, then resume it");
        tracing::warn!(job = %self.id, "{message}");
        let told = JobChange {
            from: HERE,
            events: vec![event(Level::Warn, message)],
            ..JobChange::default()
        };
        if self.change(told).await?.is_continue() {
            self.router.let_rest(&self.rests).await?;
        }
        Ok(())
    }

    async fn turn(&mut self, turn: Turn) -> Result<ControlFlow<End>, RouterError> {
        let done = match turn {
            Turn::Checkpoint { step, adapter, best } => {
                return Ok(match self.checkpoint(step, adapter, best).await? {
                    ControlFlow::Continue(()) => {
                        self.rest_if_full().await?;
                        ControlFlow::Continue(())
                    }
                    ControlFlow::Break(()) => ControlFlow::Break(End::Lost),
                });
            }
            Turn::Finished {
                adapter,
                trained_tokens,
            } => self.finish(adapter, trained_tokens).await?,
            Turn::Failed { message } if self.router.stopping() => {
                tracing::info!(job = %self.id, message, "the job waits for the next start");
                return Ok(ControlFlow::Break(self.silence()));
            }
            Turn::Failed { message } => {
                self.router
                    .fail_job(self.id.as_str(), self.lease, JobError::of_server(message))
                    .await?;
                ControlFlow::Continue(())
            }
            Turn::Damaged { message } => self.prepare_again(message).await?,
            Turn::Kept { step } => return Ok(ControlFlow::Break(self.wait_from(step).await?)),
            Turn::Refused { message } => {
                tracing::info!(job = %self.id, message, "the job waits for a replica");
                return Ok(ControlFlow::Break(End::Refused { message }));
            }
            Turn::Cancelled { step } => self.cancelled(step).await?,
        };
        Ok(ControlFlow::Break(match done {
            ControlFlow::Continue(()) => End::Told,
            ControlFlow::Break(()) => End::Lost,
        }))
    }

    async fn prepare_again(&self, message: String) -> Result<ControlFlow<()>, RouterError> {
        tracing::warn!(job = %self.id, message, "the job's examples are prepared again");
        let again = JobChange {
            from: HERE,
            status: Some(VALIDATING),
            lets_go: true,
            events: vec![event(
                Level::Warn,
                format!("{message}: the examples are prepared again from the job's files"),
            )],
            ..JobChange::default()
        };
        let done = self.change(again).await?;
        self.router.0.signals.wake_preparer();
        Ok(done)
    }

    async fn cancelled(&self, step: u64) -> Result<ControlFlow<()>, RouterError> {
        let cancelled = JobChange {
            from: HERE,
            status: Some("cancelled"),
            ends: true,
            events: vec![event(
                Level::Info,
                format!("The job was cancelled after step {step}."),
            )],
            ..JobChange::default()
        };
        let done = self.change(cancelled).await?;
        if done.is_continue() {
            self.router.0.store.remove_job_folder(self.id.as_str()).await?;
        }
        Ok(done)
    }
}
