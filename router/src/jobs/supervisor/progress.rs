//! What a replica says of a job, as the records that clients read. An event that changes the job comes back as a [`Turn`].

use std::time::Instant;

use serde_json::{Map, Value, json};
use tandem_core::id::{AdapterRef, JobId};
use tandem_core::job::{self, JobEvent, StepReport};
use tandem_store::NewEvent;

use crate::api::Level;
use crate::jobs::{event, metrics};

/// How far a job is in this life.
pub(super) struct Progress {
    job: JobId,
    /// It ran before a restart.
    is_restart: bool,
    /// Of the base.
    parameters: u64,
    total_steps: u64,
    /// The last step that was reported in this life.
    step: Option<u64>,
    /// When this life of the job reported its first step, and which.
    pace: Option<(Instant, u64)>,
    /// Latest metrics, for checkpoints.
    latest: Map<String, Value>,
}

/// What is written together.
#[derive(Default)]
pub(super) struct Told {
    pub events: Vec<NewEvent>,
    pub trained_tokens: Option<u64>,
    pub kept_bytes: Option<u64>,
    pub estimated_finish: Option<i64>,
    /// The replica found its disk full.
    pub no_room: bool,
    /// The replica trains it.
    pub is_started: bool,
}

/// An event that changes more than the record.
pub(super) enum Turn {
    Checkpoint {
        step: u64,
        adapter: AdapterRef,
        best: Option<u64>,
    },
    Finished {
        adapter: AdapterRef,
        trained_tokens: u64,
    },
    Failed {
        message: String,
    },
    Damaged {
        message: String,
    },
    Kept {
        step: u64,
    },
    Refused {
        message: String,
    },
    Cancelled {
        step: u64,
    },
}

impl Progress {
    /// `parameters`: of the base.
    pub fn new(job: JobId, is_restart: bool, parameters: u64) -> Progress {
        Progress {
            job,
            is_restart,
            parameters,
            total_steps: 0,
            step: None,
            pace: None,
            latest: Map::new(),
        }
    }

    pub fn has_stepped(&self) -> bool {
        self.step.is_some()
    }

    /// What a checkpoint of `step` keeps of the metrics.
    pub fn metrics_at(&mut self, step: u64) -> &Map<String, Value> {
        self.latest.insert("step".to_owned(), step.into());
        &self.latest
    }

    /// Events that only tell become records; others come back.
    pub fn tell(&mut self, said: JobEvent, told: &mut Told) -> Option<Turn> {
        match said {
            JobEvent::Started {
                total_steps,
                resumed_from,
                notes,
                examples,
                epoch_tokens,
                epoch_label_tokens,
                trainable_parameters,
            } => {
                for note in notes {
                    tracing::warn!(job = %self.job, "{note}");
                    told.events.push(event(Level::Warn, note));
                }
                self.total_steps = total_steps;
                let message = match self.is_restart {
                    false => "Fine-tuning job started",
                    true => "Fine-tuning job goes on after a restart",
                };
                told.is_started = true;
                told.kept_bytes = Some(job::kept_bytes(trainable_parameters));
                told.events.push(event(Level::Info, message.to_owned()));
                let from = resumed_from
                    .map(|step| format!(" from step {step}"))
                    .unwrap_or_default();
                let all = self.parameters + trainable_parameters;
                let share = 100.0 * trainable_parameters as f64 / all as f64;
                let message = format!(
                    "Training{from}: {total_steps} steps over {examples} examples ({epoch_tokens} tokens, \
                     {epoch_label_tokens} with loss); trainable params: {trainable_parameters} || all params: {all} || \
                     trainable%: {share:.4}"
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
                metrics: of_objective,
            } => {
                let mut data =
                    json!({ "step": step, "valid_loss": loss, "valid_mean_token_accuracy": token_accuracy });
                for (name, value) in of_objective {
                    data[format!("valid_{name}")] = value.into();
                }
                self.remember(&data);
                let total = self.total_steps;
                told.events.push(metrics(
                    Level::Info,
                    format!("Step {step}/{total}: validation loss={loss:.2}"),
                    data,
                ));
            }
            JobEvent::NoRoom { message } => {
                let message = format!("The job waits until it can write: {message}");
                tracing::warn!(job = %self.job, "{message}");
                told.events.push(event(Level::Warn, message));
                told.no_room = true;
            }
            JobEvent::Checkpoint { step, adapter, best } => {
                return Some(Turn::Checkpoint { step, adapter, best });
            }
            JobEvent::StoppedEarly { step, waited } => {
                let total = self.total_steps;
                let message = format!(
                    "Step {step}/{total}: training ends early, {waited} validations in a row were not better than the best"
                );
                told.events.push(event(Level::Info, message));
            }
            JobEvent::BestLoaded { step, metric, value } => {
                let message =
                    format!("The model of step {step} is the result: its {metric} of {value} is the best");
                told.events.push(event(Level::Info, message));
            }
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
            JobEvent::Damaged { message } => return Some(Turn::Damaged { message }),
            JobEvent::Kept { step } => return Some(Turn::Kept { step }),
            JobEvent::Refused { message } => return Some(Turn::Refused { message }),
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
            metrics: of_objective,
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
        self.step = Some(step);
        // A validation is of its own step.
        self.latest.remove("valid_loss");
        self.latest.remove("valid_mean_token_accuracy");
        told.trained_tokens = Some(trained_tokens);
        let mut data = json!({
            "step": step, "train_loss": loss, "train_mean_token_accuracy": token_accuracy, "epoch": epoch,
            "grad_norm": grad_norm, "learning_rate": learning_rate, "trained_tokens": trained_tokens,
            "tokens_per_second": tokens_per_second, "total_steps": self.total_steps,
        });
        for (name, value) in of_objective {
            data[name] = value.into();
        }
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
}
