//! The fine-tuning job as the engine's tenant: when it runs, what it tells, what a failure costs. Not here: training.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::Instant;

use tandem_core::id::JobId;
use tandem_core::job::{JobEvent, JobSpec};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tracing::{info, warn};

use super::Engine;
use super::clients::Delivery;
use crate::guard::{self, TorchFault};
use crate::pace::{Budget, Load};
use crate::ranks::Order;
use crate::train::{Desk, Inputs, Published, Quantum, TrainError, Trainer};

pub struct Job {
    trainer: Trainer,
    supervisor: Supervisor,
    /// Over all lives of the job, as last reported; unknown between going on from a state and the first step.
    trained_tokens: Option<u64>,
    /// Optimizer steps done when it last fell back to its state. Twice without a step in between is the end.
    fell_at: Option<u64>,
}

/// Who hears a job's events.
pub struct Supervisor {
    events: mpsc::Sender<JobEvent>,
    undelivered: VecDeque<JobEvent>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    GoesOn,
    Over,
}

impl Job {
    /// A job pauses while its supervisor does not read.
    pub fn can_go_on(&self) -> bool {
        let Supervisor { events, undelivered } = &self.supervisor;
        undelivered.is_empty() || events.is_closed() || events.capacity() > 0
    }
}

impl Supervisor {
    pub fn deliver(&mut self) -> Delivery {
        while let Some(event) = self.undelivered.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.undelivered.push_front(event);
                    return Delivery::Parked;
                }
                Err(TrySendError::Closed(_)) => {
                    self.undelivered.clear();
                    return Delivery::Left;
                }
            }
        }
        if self.events.is_closed() {
            Delivery::Left
        } else {
            Delivery::Done
        }
    }
}

impl Engine {
    pub(super) fn start_job(&mut self, spec: JobSpec, events: mpsc::Sender<JobEvent>) {
        let id = spec.id.clone();
        let started = match &self.job {
            Some(job) => Err(JobEvent::Refused {
                message: format!("{} is training; one job trains at a time", job.trainer.spec().id),
            }),
            None => self.trainer(spec).map_err(|message| JobEvent::Failed { message }),
        };
        match started {
            Ok(trainer) => {
                info!(job = %id, step = trainer.step(), "training begins");
                let supervisor = Supervisor {
                    events,
                    undelivered: VecDeque::new(),
                };
                self.job = Some(Job {
                    trainer,
                    supervisor,
                    trained_tokens: None,
                    fell_at: None,
                });
            }
            // The first word of an empty channel, unless nobody listens.
            Err(word) => drop(events.try_send(word)),
        }
    }

    /// Begins it here; the other ranks begin it with the same inputs, which they do not see.
    fn trainer(&mut self, spec: JobSpec) -> Result<Trainer, String> {
        let begin = || {
            let inputs = Inputs::read(&spec.folder)?;
            let trainer = Trainer::start_with(spec.clone(), &inputs, &self.decoder, Desk::Writes)?;
            Ok::<_, TrainError>((trainer, inputs))
        };
        let (trainer, inputs) = match guard::torch(begin) {
            Ok(started) => started.map_err(|error| error.to_string())?,
            Err(fault) => return Err(fault.to_string()),
        };
        self.ranks.order(|| Order::StartJob(Box::new(spec), inputs));
        Ok(trainer)
    }

    pub(super) fn cancel_job(&mut self, id: &JobId) {
        if let Some(job) = self.job.take_if(|job| job.trainer.spec().id == *id) {
            let step = job.trainer.step();
            self.part_with(job, Some(JobEvent::Cancelled { step }));
        }
    }

    /// As many quanta as the pace allows. Alone, one a turn: a turn costs microseconds and hears what was said.
    pub(super) fn train_within(&mut self) -> ControlFlow<()> {
        loop {
            let load = self.load();
            let Some(job) = &mut self.job else {
                return ControlFlow::Continue(());
            };
            match job.supervisor.deliver() {
                Delivery::Done => {}
                Delivery::Parked => return ControlFlow::Continue(()),
                Delivery::Left => {
                    warn!(job = %job.trainer.spec().id, "nobody supervises the job any more");
                    self.keep_job();
                    return ControlFlow::Continue(());
                }
            }
            let budget = self.pace.budget(load);
            if budget == Budget::Nothing {
                return ControlFlow::Continue(());
            }
            let began = Instant::now();
            let result = guard::torch(|| {
                self.ranks.order_adapters(self.bank.changes());
                self.ranks.order(|| Order::Quantum);
                self.ranks.send();
                job.trainer.quantum(Some(&self.decoder))
            });
            let took = began.elapsed();
            self.pace.trained(took, load);
            self.counters.train_seconds += took.as_secs_f64();
            let fate = match result {
                Ok(Ok(quantum)) => self.trained(quantum),
                Ok(Err(error)) => self.job_failed(error),
                Err(fault) if self.is_fatal(&fault) => return self.lose(fault),
                Err(fault) => self.job_fell(fault),
            };
            if fate == Fate::Over
                && let Some(job) = self.job.take()
            {
                self.part_with(job, None);
            }
            if load == Load::Idle || !self.inbox.is_empty() {
                return ControlFlow::Continue(());
            }
        }
    }

    fn trained(&mut self, quantum: Quantum) -> Fate {
        let Quantum {
            events,
            published,
            finished,
        } = quantum;
        if let Some(Published {
            version: Some(version),
            adapter,
        }) = published
        {
            self.bank.publish(version.digest, adapter);
        }
        let Some(job) = &mut self.job else {
            return Fate::Over;
        };
        for event in &events {
            match event {
                JobEvent::Started {
                    resumed_from: None, ..
                } => job.trained_tokens = Some(0),
                JobEvent::Step(report) => {
                    let before = job
                        .trained_tokens
                        .replace(report.trained_tokens)
                        .unwrap_or(report.trained_tokens);
                    self.counters.train_steps += 1;
                    self.counters.trained_tokens += report.trained_tokens.saturating_sub(before);
                }
                _ => {}
            }
        }
        job.supervisor.undelivered.extend(events);
        job.supervisor.deliver();
        if finished { Fate::Over } else { Fate::GoesOn }
    }

    fn job_failed(&mut self, error: TrainError) -> Fate {
        if let Some(job) = &mut self.job {
            warn!(job = %job.trainer.spec().id, step = job.trainer.step(), %error, "training failed");
            job.supervisor.undelivered.push_back(JobEvent::Failed {
                message: error.to_string(),
            });
        }
        Fate::Over
    }

    /// A quantum panicked: what it left is unknown, so the job goes on from its last state.
    fn job_fell(&mut self, fault: TorchFault) -> Fate {
        let Some(mut job) = self.job.take() else {
            return Fate::Over;
        };
        let (spec, step) = (job.trainer.spec().clone(), job.trainer.step());
        warn!(job = %spec.id, step, %fault, "a training quantum failed");
        let restored = match job.fell_at.is_none_or(|before| before < step) {
            true => self
                .trainer(spec)
                .map_err(|error| format!("{fault}; going back to the last state: {error}")),
            false => Err(fault.to_string()),
        };
        let fate = match restored {
            Ok(trainer) => {
                (job.trainer, job.trained_tokens, job.fell_at) = (trainer, None, Some(step));
                Fate::GoesOn
            }
            Err(why) => {
                let message = format!("step {step}: {why}");
                job.supervisor.undelivered.push_back(JobEvent::Failed { message });
                Fate::Over
            }
        };
        self.job = Some(job);
        fate
    }

    /// Writes the job's state, so that a later start goes on from here, and lets it go.
    pub(super) fn keep_job(&mut self) {
        let Some(job) = self.job.take() else { return };
        let (id, step) = (job.trainer.spec().id.clone(), job.trainer.step());
        let kept = match guard::torch(|| job.trainer.remember()) {
            Ok(Ok(())) => {
                info!(job = %id, step, "training stops; its state is written");
                Some(JobEvent::Kept { step })
            }
            Ok(Err(error)) => {
                warn!(job = %id, %error, "the job's state is not written");
                None
            }
            Err(fault) => {
                warn!(job = %id, %fault, "the job's state is not written");
                None
            }
        };
        self.part_with(job, kept);
    }

    /// The job is over; its last events reach its supervisor even when the channel is full now.
    fn part_with(&mut self, job: Job, last: Option<JobEvent>) {
        self.ranks.order(|| Order::EndJob);
        let Job { mut supervisor, .. } = job;
        supervisor.undelivered.extend(last);
        if supervisor.deliver() == Delivery::Parked {
            self.farewells.push(supervisor);
        }
    }
}
