//! A job, quantum by quantum.

mod accumulation;
mod member;
mod saving;
mod start;
mod step;
mod trial;
mod validation;

use std::cell::RefCell;
use std::time::Instant;

use tandem_core::dataset::Group;
use tandem_core::id::Digest;
use tandem_core::job::{Hyper, JobEvent, JobSpec, SaveStrategy};
use tch::Kind;

use super::TrainError;
use super::best::{self, Best, Judged};
use super::learner::Learner;
use super::mates::Mates;
use super::objective::Scores;
use super::pass::Look;
use super::plan::DataPlan;
use super::profile::Doing;
use super::references::References;
use super::slice::Slice;
use super::snapshot::{Copying, Occasion, Snapshot};
use crate::lora::adapter::Adapter;
use crate::model::Decoder;
use accumulation::Accumulation;
use validation::Validation;

pub struct Trainer {
    spec: JobSpec,
    learner: Learner,
    train: Vec<Group>,
    /// Of each group, where rewards weigh it.
    factors: Option<Vec<f64>>,
    /// Of the bytes that `train` and `valid` were read from.
    data: Digest,
    valid: Vec<Group>,
    /// Of `valid`, where weights are known. Cut once: validation never changes.
    valid_slices: Vec<Slice>,
    /// What the job started from, where its objective compares with that. `None`: the base.
    reference: Option<Adapter>,
    references: RefCell<References>,
    /// An example that an adapter is tried on before it is published.
    trial: Slice,
    plan: DataPlan,
    /// Optimizer steps done.
    step: u64,
    trained_tokens: u64,
    best: Best,
    stage: Stage,
    step_began: Instant,
    mates: Mates,
}

/// Where in a step the next quantum goes on.
enum Stage {
    Announce {
        resumed_from: Option<u64>,
        notes: Vec<String>,
        /// The validation and the checkpoint of the last step come first.
        is_rest_due: bool,
    },
    Begin,
    Accumulate(Box<Accumulation>),
    Optimize {
        scores: Scores,
        tokens: u64,
    },
    Validate(Box<Validation>),
    /// The numbers of the best model so far are kept.
    KeepBest(best::Keeping),
    /// The adapter is tried before it is published: finite numbers may still multiply to infinities.
    Try {
        occasion: Occasion,
        look: Option<Look>,
    },
    Save,
    Finish,
    /// A checkpoint or the result on its way into a snapshot.
    Copy {
        occasion: Occasion,
        copying: Copying,
    },
}

/// What one quantum did.
#[derive(Default)]
pub struct Quantum {
    pub events: Vec<JobEvent>,
    /// To be written; its event comes after `events`.
    pub snapshot: Option<Snapshot>,
    /// The last quantum of the run.
    pub finished: bool,
}

impl Quantum {
    /// Writes the snapshot here and now: for who serves nobody meanwhile.
    pub fn write(mut self) -> Result<Quantum, TrainError> {
        if let Some(snapshot) = self.snapshot.take() {
            self.events.extend(snapshot.write()?.event);
        }
        Ok(self)
    }
}

impl Trainer {
    /// Advances by one quantum. `base` is the decoder that serves (full training has its own and ignores it).
    pub fn quantum(&mut self, base: Option<&Decoder>) -> Result<Quantum, TrainError> {
        let _no_grad = tch::no_grad_guard();
        let mut quantum = Quantum::default();
        self.stage = match std::mem::replace(&mut self.stage, Stage::Begin) {
            Stage::Announce {
                resumed_from,
                notes,
                is_rest_due,
            } => {
                self.learner.begin(base);
                quantum.events.push(self.started(resumed_from, notes));
                match is_rest_due {
                    true => self.after_step(),
                    false => Stage::Begin,
                }
            }
            Stage::Begin if self.is_over() => self.conclude(&mut quantum.events),
            Stage::Begin => self.begin(),
            Stage::Accumulate(step) => self.accumulate(base, *step),
            Stage::Optimize { scores, tokens } => {
                let scores = self.mates.total(scores);
                quantum
                    .events
                    .push(JobEvent::Step(self.optimize(base, &scores, tokens)?));
                self.after_step()
            }
            Stage::Validate(validation) => match self.validate(base, *validation) {
                Ok(validation) => Stage::Validate(Box::new(validation)),
                Err(scores) => self.validated(scores, &mut quantum.events)?,
            },
            Stage::KeepBest(keeping) => match keeping.advance() {
                Err(keeping) => Stage::KeepBest(keeping),
                Ok(kept) => {
                    self.best.keep(kept);
                    self.after_validation()
                }
            },
            Stage::Try { occasion, look } => self.try_out(base, occasion, look)?,
            Stage::Save => self.copy(Occasion::Checkpoint),
            Stage::Finish => match self.learner.as_lora() {
                Some(_) => self.copy(Occasion::End),
                // Its weights are the caller's to take.
                None => {
                    quantum.finished = true;
                    Stage::Finish
                }
            },
            Stage::Copy { occasion, copying } => match copying.advance() {
                Err(copying) => Stage::Copy { occasion, copying },
                Ok(copies) => {
                    if occasion == Occasion::Checkpoint {
                        self.best.has_checkpoint(self.step);
                    }
                    quantum.snapshot = Some(self.snapshot_of(occasion, copies, false));
                    quantum.finished = occasion == Occasion::End;
                    Stage::Begin
                }
            },
        };
        Ok(quantum)
    }

    fn started(&self, resumed_from: Option<u64>, notes: Vec<String>) -> JobEvent {
        let labels = self.train.iter().map(Group::label_tokens).sum::<usize>();
        JobEvent::Started {
            total_steps: self.plan.total(),
            resumed_from,
            notes,
            examples: self.train.len() as u64,
            epoch_tokens: self.train.iter().map(|group| group.tokens() as u64).sum(),
            epoch_label_tokens: labels as u64,
            trainable_parameters: self.learner.len(),
        }
    }

    fn validated(&mut self, scores: Scores, events: &mut Vec<JobEvent>) -> Result<Stage, TrainError> {
        let scores = self.mates.total(scores);
        events.push(JobEvent::Validated {
            step: self.step,
            loss: scores.loss(),
            token_accuracy: scores.accuracy(),
            metrics: scores.metrics(),
        });
        Ok(match self.best.judge(self.step, &scores, &self.learner)? {
            Judged::Done => self.after_validation(),
            Judged::Keeps(keeping) => Stage::KeepBest(keeping),
        })
    }

    fn validates(&self) -> bool {
        let due = match self.spec.hyper.eval_steps {
            0 => self.plan.ends_epoch(self.step),
            every => self.step.is_multiple_of(every) || self.step == self.plan.total(),
        };
        due && !self.valid.is_empty()
    }

    fn after_step(&self) -> Stage {
        match self.validates() {
            true => self.begin_validation(),
            false => self.after_validation(),
        }
    }

    fn after_validation(&self) -> Stage {
        let Hyper {
            save_strategy,
            save_steps: every,
            ..
        } = self.spec.hyper;
        let is_due = match save_strategy {
            SaveStrategy::Steps => every > 0 && self.step.is_multiple_of(every),
            SaveStrategy::Epoch => self.plan.ends_epoch(self.step),
            SaveStrategy::Best => self.best.is_at(self.step),
        };
        // The last step's adapter is the job's result: no checkpoint of it beside.
        match is_due && !self.is_over() {
            true => self.try_before(Occasion::Checkpoint),
            false => Stage::Begin,
        }
    }

    /// Through, or no better model is waited for any more.
    fn is_over(&self) -> bool {
        self.step >= self.plan.total() || self.best.ends()
    }

    /// The result is what is there now, or the best before it.
    fn conclude(&mut self, events: &mut Vec<JobEvent>) -> Stage {
        if self.step < self.plan.total() {
            events.push(self.best.stopped(self.step));
        }
        events.extend(self.best.load(&mut self.learner));
        self.try_before(Occasion::End)
    }

    pub fn spec(&self) -> &JobSpec {
        &self.spec
    }

    pub fn step(&self) -> u64 {
        self.step
    }

    /// Of the run, unless it ends early.
    pub fn total_steps(&self) -> u64 {
        self.plan.total()
    }

    /// Nothing of a step would be done twice if the job went on from a state of now.
    pub fn is_between_steps(&self) -> bool {
        !matches!(self.stage, Stage::Accumulate(_) | Stage::Optimize { .. })
    }

    /// Whether a slice is on its way, whose activations wait for its backward.
    pub fn holds_activations(&self) -> bool {
        matches!(&self.stage, Stage::Accumulate(step) if step.holds_activations())
    }

    /// Whether the next quantum is short: neither a pass nor a validation, nor on the way through one.
    pub fn is_brief(&self) -> bool {
        match &self.stage {
            Stage::Accumulate(step) => step.is_done(),
            Stage::Validate(_) => false,
            _ => true,
        }
    }

    /// What the next quantum is about.
    pub fn doing(&self) -> Doing {
        let whole = |what| Doing(what, None);
        match &self.stage {
            Stage::Accumulate(step) => step.doing(),
            Stage::Announce { .. } | Stage::Begin => whole("batch"),
            Stage::Optimize { .. } => whole("optimizer"),
            Stage::Validate(_) | Stage::Try { .. } => whole("validation"),
            Stage::KeepBest(_) | Stage::Save | Stage::Finish | Stage::Copy { .. } => whole("saving"),
        }
    }

    /// Whether the next quantum begins to copy what is then to be written: the moment to wait while something is.
    pub fn is_about_to_save(&self) -> bool {
        matches!(self.stage, Stage::Save | Stage::Finish)
    }

    /// Of a model that is trained itself, those that are not trained.
    pub fn frozen_parameters(&self) -> u64 {
        self.learner.frozen()
    }

    /// What the model's own notes say.
    pub fn notes<'a>(&'a self, base: Option<&'a Decoder>) -> &'a [String] {
        &self.learner.parts(base).0.spec.notes
    }

    /// The bytes of the trained model's model.safetensors, after full training: rank 0's, where ranks share it.
    pub fn full_weights(&self, kind: Kind) -> Option<Vec<u8>> {
        self.learner.full_weights(kind)
    }
}
