//! One job at a time goes to the engine, and what the engine says of it goes to the store. A job that was running when
//! the process ended is started again and goes on from its last checkpoint. Not here: files (`prepare`), training.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tandem_core::id::{AdapterRef, JobId};
use tandem_core::job::{Hyper, JobEvent, JobSpec, Method, StepReport};
use tandem_core::replica::{Command, JOB_EVENT_QUEUE};
use tandem_store::{JobChange, JobRow, NewCheckpoint, NewEvent, Placement};
use tokio::sync::mpsc;

use crate::Router;
use crate::api::{JobError, Level, RouterError};
use crate::catalog::checkpoint_name;
use crate::jobs::{Made, QUEUED, RUNNING, event, metrics, record, result};

/// After the store failed: it may be a full disk, which passes. The job goes on from its checkpoint.
const RETRY: Duration = Duration::from_secs(5);

/// As long as the router and the engine live.
pub(crate) async fn run(router: Router) {
    match router
        .0
        .store
        .count_stranded_jobs(router.info().base_digest)
        .await
    {
        Ok(0) => {}
        Ok(jobs) => tracing::warn!(
            jobs,
            "unfinished jobs of another base model wait until it is served again"
        ),
        Err(error) => tracing::warn!(%error, "cannot count unfinished jobs"),
    }
    while router.ready() {
        match next(&router).await {
            Ok(true) => {}
            Ok(false) => router.0.desk.queued.notified().await,
            Err(error) if !router.ready() => tracing::info!(%error, "a job waits for the next start"),
            Err(error) => {
                tracing::error!(%error, "a job was interrupted; going on from its checkpoint");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Whether there was a job to run.
async fn next(router: &Router) -> Result<bool, RouterError> {
    let base = router.info().base_digest;
    // What ran before the restart first, then in order of creation.
    let row = match router.0.store.next_job(base, &[RUNNING]).await? {
        Some(row) => Some(row),
        None => router.0.store.next_job(base, &[QUEUED]).await?,
    };
    let Some(row) = row else { return Ok(false) };
    if row.cancel_requested {
        router.cancel_at_once(&row.id, &[QUEUED, RUNNING]).await?;
        return Ok(true);
    }
    let message = match row.status.as_str() {
        QUEUED => "Fine-tuning job started",
        _ => "Fine-tuning job goes on after a restart",
    };
    let started = JobChange {
        from: &[QUEUED, RUNNING],
        status: Some(RUNNING),
        events: vec![event(Level::Info, message.to_owned())],
        ..JobChange::default()
    };
    if router.change_job(&row.id, started).await? {
        Run::start(router, row).await?.follow().await?;
    }
    Ok(true)
}

/// A job in the engine.
struct Run<'a> {
    router: &'a Router,
    id: String,
    /// Its model's name, once it succeeds.
    model: String,
    rank: u32,
    events: mpsc::Receiver<JobEvent>,
    total_steps: u64,
    /// When this life of the job reported its first step, and which.
    pace: Option<(Instant, u64)>,
    /// Latest metrics, for checkpoints.
    latest: Map<String, Value>,
}

impl<'a> Run<'a> {
    async fn start(router: &'a Router, row: JobRow) -> Result<Run<'a>, RouterError> {
        let missing = || {
            RouterError::Store(tandem_store::StoreError::Damaged(format!(
                "{} has no hyper",
                row.id
            )))
        };
        let hyper: Hyper = record::from_json(row.hyper.as_deref().ok_or_else(missing)?)?;
        let rank = match &hyper.method {
            Method::Lora(lora) => lora.r,
            Method::Full => 0,
        };
        let spec = JobSpec {
            id: JobId(row.id.clone()),
            folder: router.0.store.job_folder(&row.id),
            base_model: router.config().served_model_name.clone(),
            hyper,
        };
        let (sender, events) = mpsc::channel(JOB_EVENT_QUEUE);
        router.command(Command::StartJob(Box::new(spec), sender)).await?;
        tracing::info!(job = row.id, "job started");
        // Who cancels writes the wish, then sends CancelJob; if that was before StartJob, the wish is here now.
        let asked = router
            .0
            .store
            .job(&row.id)
            .await?
            .is_some_and(|row| row.cancel_requested);
        if asked {
            router.command(Command::CancelJob(JobId(row.id.clone()))).await?;
        }
        let JobRow {
            id,
            model_name: model,
            ..
        } = row;
        Ok(Run {
            router,
            id,
            model,
            rank,
            events,
            total_steps: 0,
            pace: None,
            latest: Map::new(),
        })
    }

    async fn follow(mut self) -> Result<(), RouterError> {
        let mut events = Vec::with_capacity(JOB_EVENT_QUEUE);
        while self.events.recv_many(&mut events, JOB_EVENT_QUEUE).await > 0 {
            // What is only told goes in one transaction; what changes the job has its own.
            let mut told = Told::default();
            for event in events.drain(..) {
                match self.tell(event, &mut told) {
                    None => {}
                    Some(turn) => {
                        self.write(std::mem::take(&mut told)).await?;
                        if self.turn(turn).await?.is_break() {
                            return Ok(());
                        }
                    }
                }
            }
            self.write(told).await?;
        }
        match self.router.ready() {
            false => Ok(()), // stays `running` for the next start
            true => {
                let message = "The engine ended the job without saying why.".to_owned();
                self.fail(message).await
            }
        }
    }

    /// Events that only tell become records; others come back.
    fn tell(&mut self, event: JobEvent, told: &mut Told) -> Option<Turn> {
        match event {
            JobEvent::Started {
                total_steps,
                resumed_from,
                examples,
                epoch_tokens,
                epoch_label_tokens,
                trainable_parameters,
            } => {
                self.total_steps = total_steps;
                let from = resumed_from
                    .map(|step| format!(" from step {step}"))
                    .unwrap_or_default();
                let message = format!(
                    "Training{from}: {total_steps} steps over {examples} examples ({epoch_tokens} tokens, \
                     {epoch_label_tokens} with loss), {trainable_parameters} trainable parameters"
                );
                let data = json!({
                    "total_steps": total_steps, "resumed_from": resumed_from, "examples": examples,
                    "epoch_tokens": epoch_tokens, "epoch_label_tokens": epoch_label_tokens,
                    "trainable_parameters": trainable_parameters,
                });
                told.events.push(metrics(Level::Info, message, data));
            }
            JobEvent::Step(report) => self.step(report, told),
            JobEvent::Validated {
                step,
                loss,
                token_accuracy,
            } => {
                let data =
                    json!({ "step": step, "valid_loss": loss, "valid_mean_token_accuracy": token_accuracy });
                self.remember(&data);
                let total = self.total_steps;
                told.events.push(metrics(
                    Level::Info,
                    format!("Step {step}/{total}: validation loss={loss:.2}"),
                    data,
                ));
            }
            JobEvent::Checkpoint { step, adapter } => return Some(Turn::Checkpoint { step, adapter }),
            JobEvent::Finished {
                adapter,
                trained_tokens,
            } => {
                return Some(Turn::Finished {
                    adapter,
                    trained_tokens,
                });
            }
            JobEvent::Failed { message } => return Some(Turn::Failed { message }),
            JobEvent::Cancelled { step } => return Some(Turn::Cancelled { step }),
        }
        None
    }

    fn step(&mut self, report: StepReport, told: &mut Told) {
        let StepReport {
            step,
            epoch,
            loss,
            token_accuracy,
            grad_norm,
            learning_rate,
            trained_tokens,
            tokens_per_second,
        } = report;
        let (since, first) = *self.pace.get_or_insert_with(|| (Instant::now(), step));
        if step > first {
            let step_s = since.elapsed().as_secs_f64() / (step - first) as f64;
            let left_s = step_s * self.total_steps.saturating_sub(step) as f64;
            told.estimated_finish = Some(tandem_store::now().saturating_add(left_s as i64));
        }
        told.trained_tokens = Some(trained_tokens);
        let data = json!({
            "step": step, "train_loss": loss, "train_mean_token_accuracy": token_accuracy, "epoch": epoch,
            "grad_norm": grad_norm, "learning_rate": learning_rate, "trained_tokens": trained_tokens,
            "tokens_per_second": tokens_per_second, "total_steps": self.total_steps,
        });
        self.remember(&data);
        let message = format!("Step {step}/{}: training loss={loss:.2}", self.total_steps);
        told.events.push(metrics(Level::Info, message, data));
    }

    fn remember(&mut self, data: &Value) {
        let kept = [
            "step",
            "train_loss",
            "train_mean_token_accuracy",
            "valid_loss",
            "valid_mean_token_accuracy",
        ];
        for key in kept {
            if let Some(value) = data.get(key) {
                self.latest.insert(key.to_owned(), value.clone());
            }
        }
    }

    async fn write(&self, told: Told) -> Result<(), RouterError> {
        let Told {
            events,
            trained_tokens,
            estimated_finish,
        } = told;
        if events.is_empty() {
            return Ok(());
        }
        let change = JobChange {
            from: &[RUNNING],
            trained_tokens,
            estimated_finish,
            events,
            ..JobChange::default()
        };
        self.router.change_job(&self.id, change).await?;
        Ok(())
    }

    async fn turn(&mut self, turn: Turn) -> Result<ControlFlow<()>, RouterError> {
        match turn {
            Turn::Checkpoint { step, adapter } => {
                self.checkpoint(step, adapter).await?;
                return Ok(ControlFlow::Continue(()));
            }
            Turn::Finished {
                adapter,
                trained_tokens,
            } => self.finish(adapter, trained_tokens).await?,
            Turn::Failed { message } if !self.router.ready() => {
                tracing::info!(job = self.id, message, "the job waits for the next start");
            }
            Turn::Failed { message } => self.fail(message).await?,
            Turn::Cancelled { step } => {
                let cancelled = JobChange {
                    from: &[RUNNING],
                    status: Some("cancelled"),
                    ends: true,
                    events: vec![event(
                        Level::Info,
                        format!("The job was cancelled after step {step}."),
                    )],
                    ..JobChange::default()
                };
                self.router.change_job(&self.id, cancelled).await?;
                self.router.0.store.remove_job_folder(&self.id).await?;
            }
        }
        Ok(ControlFlow::Break(()))
    }

    async fn checkpoint(&mut self, step: u64, adapter: AdapterRef) -> Result<(), RouterError> {
        let _one_at_a_time = self.router.0.changes.lock().await;
        let made = self.publish(adapter).await?;
        let model = checkpoint_name(&self.model, step);
        self.latest.insert("step".to_owned(), step.into());
        let change = JobChange {
            from: &[RUNNING],
            events: vec![metrics(
                Level::Info,
                format!("Checkpoint created at step {step}: {model}"),
                json!({ "step": step, "model": model }),
            )],
            checkpoint: Some(NewCheckpoint {
                step,
                model: model.clone(),
                metrics: record::to_json(&self.latest),
            }),
            name: Some(self.router.job_name(&self.id, model, Some(step), made)),
            ..JobChange::default()
        };
        self.router.change_job(&self.id, change).await?;
        Ok(())
    }

    /// The name, the result file and the success are one transaction: a client that reads `succeeded` can use all.
    async fn finish(&mut self, adapter: AdapterRef, trained_tokens: u64) -> Result<(), RouterError> {
        let result_file = result::publish(self.router, &self.id).await?;
        let one_at_a_time = self.router.0.changes.lock().await;
        let made = self.publish(adapter).await?;
        let change = JobChange {
            from: &[RUNNING],
            status: Some("succeeded"),
            ends: true,
            trained_tokens: Some(trained_tokens),
            fine_tuned_model: Some(self.model.clone()),
            events: vec![
                event(
                    Level::Info,
                    format!("New fine-tuned model created: {}", self.model),
                ),
                event(Level::Info, "Fine tuning job successfully completed".to_owned()),
            ],
            name: Some(self.router.job_name(&self.id, self.model.clone(), None, made)),
            result_file: Some(result_file),
            ..JobChange::default()
        };
        self.router.change_job(&self.id, change).await?;
        drop(one_at_a_time);
        tracing::info!(job = self.id, model = self.model, trained_tokens, "job succeeded");
        Ok(self.router.0.store.remove_job_folder(&self.id).await?)
    }

    /// The caller holds `changes`, until the adapter has a name.
    async fn publish(&self, adapter: AdapterRef) -> Result<Made, RouterError> {
        let AdapterRef { digest: told, folder } = adapter;
        let digest = self
            .router
            .0
            .store
            .publish_adapter(&folder, Placement::Link)
            .await?;
        if digest != told {
            tracing::warn!(job = self.id, %told, %digest, "the engine's digest of an adapter is not its files'");
        }
        Ok(Made {
            digest,
            rank: self.rank,
        })
    }

    async fn fail(&self, message: String) -> Result<(), RouterError> {
        let error = JobError {
            code: "server_error".to_owned(),
            param: None,
            message,
        };
        self.router.fail_job(&self.id, error).await
    }
}

/// What is written together.
#[derive(Default)]
struct Told {
    events: Vec<NewEvent>,
    trained_tokens: Option<u64>,
    estimated_finish: Option<i64>,
}

/// An event that changes more than the record.
enum Turn {
    Checkpoint {
        step: u64,
        adapter: AdapterRef,
    },
    Finished {
        adapter: AdapterRef,
        trained_tokens: u64,
    },
    Failed {
        message: String,
    },
    Cancelled {
        step: u64,
    },
}
