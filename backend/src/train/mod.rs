//! A fine-tuning job as a tenant of the engine: it advances in quanta of a few milliseconds (a sublayer of one slice,
//! forward or backward), so that requests are served between them. The same steps train a LoRA adapter beside the
//! served base and, for `tandem train`, every parameter of a model of its own.
//!
//! With several ranks each runs the same quanta over its part of the model. An adapter's numbers, gradients and moments
//! are whole on every rank: a rank's backward fills what it is responsible for, one sum over ranks makes the gradient,
//! and the optimizer takes the same step everywhere. Files are rank 0's, and say nothing of ranks: a job may go on under another
//! number of them.
//!
//! A trainer touches no file after its start: what is to be kept leaves it as a [`Snapshot`], which somebody else writes.
//!
//! Not here: when to train (pace), jobs' queue and names (router).

pub mod batch;
mod best;
mod call;
pub mod data;
pub mod driven;
pub mod evaluation;
pub mod joint;
pub mod learner;
pub mod mates;
pub mod memory;
pub mod mesh;
pub mod noise;
pub mod objective;
pub mod optimizer;
pub mod pass;
pub mod profile;
mod references;
pub mod run;
pub mod snapshot;
pub mod state;
pub mod together;
pub mod turns;

use std::cell::RefCell;
use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tandem_core::dataset::{self, Example, Group};
use tandem_core::id::Digest;
use tandem_core::job::{Hyper, JobEvent, JobSpec, Method, Objective, Rows, SaveStrategy, StepReport, files};
use tandem_kernels::adamw::AdamW;
use tandem_kernels::loss::LogProbs;
use tandem_kernels::weight::Precision;
use tch::{Kind, Tensor};

use crate::family::DecoderSpec;
use crate::guard::TorchFault;
use crate::lora::adapter::Adapter;
use crate::lora::fit::{Fit, PackError};
use crate::lora::params::{AdapterParams, AdapterShape};
use crate::lora::peft;
use crate::model::{Decoder, Dropout, full};
use crate::weights::LoadError;
use batch::{Course, MicroBatch, Models, Place};
use best::{Best, Judged};
use data::{DataPlan, Slice};
use learner::{Learner, LoraView, Unusable, Update};
use mates::Mates;
use noise::Noise;
use objective::Scores;
use pass::{Advanced, KEEP_BYTES, Look, Pass};
use profile::Doing;
use references::References;
use snapshot::{AdapterCopy, Copying, Occasion, Snapshot};

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("cannot use {file} of the job: {error}")]
    File { file: String, error: std::io::Error },
    #[error("{0}")]
    Data(String),
    /// Examples that are not those that were written.
    #[error("{0}")]
    Damaged(String),
    /// A state of another run.
    #[error("cannot resume: {0}")]
    State(String),
    #[error("step {step}: the {what} is {value}; a lower learning rate may help")]
    Diverged {
        step: u64,
        what: &'static str,
        value: f64,
    },
    #[error(
        "step {step}: with a loss of {loss}, it made numbers that are infinite or not a number (NaN); a lower learning rate \
         may help"
    )]
    Overflowed { step: u64, loss: f64 },
    #[error(transparent)]
    Fault(TorchFault),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error(transparent)]
    Kernel(#[from] tandem_kernels::KernelError),
    #[error(transparent)]
    Peft(#[from] peft::PeftError),
}

impl TrainError {
    /// The disk is full, a quota used up, or too many files are open: another time it may not be so.
    pub fn is_no_room(&self) -> bool {
        use std::io::ErrorKind as K;
        let error = match self {
            TrainError::File { error, .. } => error,
            TrainError::Peft(peft::PeftError::Write { error, .. } | peft::PeftError::Read { error, .. }) => {
                error
            }
            _ => return false,
        };
        let is_crowded = matches!(error.raw_os_error(), Some(libc::ENFILE | libc::EMFILE));
        is_crowded || matches!(error.kind(), K::StorageFull | K::QuotaExceeded)
    }
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

/// What a job starts from: the contents of its folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    train: Vec<u8>,
    valid: Option<Vec<u8>>,
    /// The adapter that the job starts from: its configuration and its tensors.
    start: Option<(Vec<u8>, Vec<u8>)>,
    state: Option<Vec<u8>>,
    /// What was damaged.
    notes: Vec<String>,
}

impl Inputs {
    pub fn read(folder: &Path) -> Result<Inputs, TrainError> {
        let read = |file: &str| {
            std::fs::read(folder.join(file)).map_err(|error| TrainError::File {
                file: file.to_owned(),
                error,
            })
        };
        let read_if_there = |file: &str| folder.join(file).exists().then(|| read(file)).transpose();
        let state::Found { state, notes } = state::read(folder)?;
        Ok(Inputs {
            train: read(files::TRAIN)?,
            valid: read_if_there(files::VALID)?,
            start: read_if_there(files::START_CONFIG)?.zip(read_if_there(files::START_TENSORS)?),
            state,
            notes,
        })
    }

    /// Of the examples: a state goes on with those it was written for.
    fn data(&self) -> Digest {
        let mut hasher = Sha256::new();
        let start = self.start.iter().flat_map(|(config, tensors)| [config, tensors]);
        for part in [Some(&self.train), self.valid.as_ref()]
            .into_iter()
            .flatten()
            .chain(start)
        {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Digest(hasher.finalize().into())
    }
}

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

/// The first of `slices`, the last in the list, went forward and back.
fn through(slices: &mut Vec<(Slice, u64)>, scores: &mut Scores, found: &LogProbs) {
    let (slice, _) = slices.pop().expect("it was on its way");
    scores.add(&slice.labels, found);
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

/// What one step learns on its way through the layers.
struct Accumulation {
    work: Work,
    /// Tokens of the longest slice, of any rank.
    longest: usize,
    scores: Scores,
    /// That are trained.
    tokens: u64,
}

enum Work {
    /// Weights are known. `slices` are still to go, the next at the end, each with the tokens of the step before it.
    Slices {
        slices: Vec<(Slice, u64)>,
        /// The next is on its way.
        pass: Option<OnItsWay>,
    },
    /// Still to go, the next at the end.
    MicroBatches(Vec<MicroBatch>),
}

enum OnItsWay {
    Alone(Box<Pass>),
    /// In a pass with those of others ([`joint::Joint`]).
    WithOthers,
}

struct Validation {
    work: Looking,
    scores: Scores,
}

enum Looking {
    /// `round`: so many slices of the validation set each rank went through; `look` goes through the next.
    Slices {
        round: usize,
        look: Option<Look>,
    },
    MicroBatches(Vec<MicroBatch>),
}

impl Trainer {
    /// Reads the job's folder; goes on from its state when there is one.
    pub fn start(spec: JobSpec, base: &Decoder) -> Result<Trainer, TrainError> {
        let inputs = Inputs::read(&spec.folder)?;
        Trainer::start_with(spec, &inputs, base.fit())
    }

    /// From the contents of the job's folder, which other ranks do not see. Takes a while: data are parsed, numbers drawn.
    pub fn start_with(spec: JobSpec, inputs: &Inputs, fit: Fit) -> Result<Trainer, TrainError> {
        let Method::Lora(lora) = spec.hyper.method.clone() else {
            return Err(TrainError::Data(
                "full training changes the base; only `tandem train` does it".to_owned(),
            ));
        };
        let Some((config, tensors)) = &inputs.start else {
            let learner = Learner::lora(lora, fit, spec.hyper.seed)?;
            return Trainer::new(spec, inputs, learner, None);
        };
        let start = peft::read_bytes(config, tensors, &fit.spec, u32::MAX)?.params;
        if start.shape != AdapterShape::new(&fit.spec, &lora) {
            let message =
                "the adapter that the job starts from has other modules, ranks or scales than the job";
            return Err(TrainError::Data(message.to_owned()));
        }
        let reference = match spec.hyper.objective.has_reference() {
            true => Some(fit.pack(&start)?),
            false => None,
        };
        let learner = Learner::of_adapter(lora, fit, start)?;
        Trainer::new(spec, inputs, learner, reference)
    }

    /// Trains every parameter of the model in `model_folder` (drawn at random when it has no weights): numbers, gradient and
    /// moments are float32, passes multiply in `precision`. The ranks of `mates` may share them.
    pub fn start_full(
        spec: JobSpec,
        inputs: &Inputs,
        model_folder: &Path,
        precision: Precision,
        mates: &Mates,
    ) -> Result<Trainer, TrainError> {
        let (shared, keeps_whole) = mates.share_trained();
        let (decoder_spec, params) = full::read_or_init(
            model_folder,
            spec.hyper.seed,
            spec.hyper.frozen_layers as usize,
            shared,
        )?;
        let learner = Learner::full(decoder_spec, params, precision, keeps_whole)?;
        Trainer::new(spec, inputs, learner, None)
    }

    fn new(
        spec: JobSpec,
        inputs: &Inputs,
        learner: Learner,
        reference: Option<Adapter>,
    ) -> Result<Trainer, TrainError> {
        let (model, device) = (learner.spec(), learner.device());
        // It may come from another machine.
        spec.hyper.check().map_err(TrainError::Data)?;
        let objective = spec.hyper.objective;
        let train = groups(&inputs.train, files::TRAIN, model, &objective)?;
        let valid = match &inputs.valid {
            Some(bytes) => groups(bytes, files::VALID, model, &objective)?,
            None => vec![],
        };
        let learned = train.iter().flat_map(|group| &group.examples);
        let learned = learned.filter(|example| example.label_tokens() > 0);
        let Some(trial) = data::slices(learned.take(1), device).pop() else {
            return Err(TrainError::Data(format!(
                "none of {} examples has a token to learn",
                train.len()
            )));
        };
        let plan = DataPlan::new(train.iter().map(Group::tokens).collect(), &spec.hyper);
        let factors = |groups: &[Group]| match objective {
            Objective::RewardWeighted { beta } => {
                let rewards: Vec<f32> = groups.iter().map(|group| group.value).collect();
                Some(objective::factors(&rewards, beta))
            }
            _ => None,
        };
        let mut valid_slices = vec![];
        if objective::is_known(&objective) {
            valid_slices = data::slices(valid.iter().flat_map(|group| &group.examples), device);
            objective::by_reward(&mut valid_slices, factors(&valid).into_iter().flatten());
        }
        let rule = spec.hyper.optimizer;
        if learner.is_shared() && !rule.is_of_numbers() {
            let name = rule.name();
            return Err(TrainError::Data(format!(
                "optim {name} goes by whole tensors, of which each rank holds a part: sharding_strategy NO_SHARD, or adamw_torch"
            )));
        }
        let learner = learner.stepping_by(rule);
        let mut trainer = Trainer {
            factors: factors(&train),
            valid,
            valid_slices,
            reference,
            references: RefCell::default(),
            trial,
            learner,
            plan,
            step: 0,
            trained_tokens: 0,
            best: Best::new(spec.hyper.selection.clone()),
            stage: Stage::Announce {
                resumed_from: None,
                notes: inputs.notes.clone(),
                is_rest_due: false,
            },
            step_began: Instant::now(),
            mates: Mates::none(),
            train,
            data: inputs.data(),
            spec,
        };
        if let Some(bytes) = &inputs.state {
            let (progress, tensors) = state::parse(bytes)?;
            trainer.resume(progress, tensors, inputs.notes.clone())?;
        }
        Ok(trainer)
    }

    /// The same on each of several ranks, before the first quantum.
    pub fn beside(mut self, mates: Mates) -> Trainer {
        self.mates = mates;
        self
    }

    fn resume(
        &mut self,
        progress: state::Progress,
        tensors: state::Tensors,
        notes: Vec<String>,
    ) -> Result<(), TrainError> {
        let state::Progress {
            step,
            trained_tokens,
            hyper,
            data,
            is_rest_due,
            order,
            standing,
        } = progress;
        let state::Tensors { params, memory, best } = tensors;
        let other = match (hyper == self.spec.hyper, data == self.data) {
            (true, true) => None,
            (false, _) => Some("with other hyperparameters"),
            (true, false) => Some("for other examples"),
        };
        if let Some(other) = other {
            return Err(TrainError::State(format!("its state was written {other}")));
        }
        if order != state::ORDER && self.learner.as_lora().is_none() {
            let message =
                "its state has the model's parameters in the order of another version of this program";
            return Err(TrainError::State(message.to_owned()));
        }
        self.learner.resume(&params, &memory)?;
        let best = best.map(|numbers| self.learner.share_of(&numbers));
        self.best.resume(standing, best);
        self.step = step;
        self.plan.reach(step);
        self.trained_tokens = trained_tokens;
        self.stage = Stage::Announce {
            resumed_from: Some(step),
            notes,
            is_rest_due,
        };
        Ok(())
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
        match &self.stage {
            Stage::Accumulate(step) => match &step.work {
                Work::Slices { pass, .. } => matches!(pass, Some(OnItsWay::Alone(_))),
                Work::MicroBatches(left) => left.last().is_some_and(MicroBatch::holds_activations),
            },
            _ => false,
        }
    }

    /// Whether the next quantum is short: neither a pass nor a validation, nor on the way through one.
    pub fn is_brief(&self) -> bool {
        match &self.stage {
            Stage::Accumulate(step) => match &step.work {
                Work::Slices { slices, .. } => slices.is_empty(),
                Work::MicroBatches(left) => left.is_empty(),
            },
            Stage::Validate(_) => false,
            _ => true,
        }
    }

    /// What the next quantum is about.
    pub fn doing(&self) -> Doing {
        let whole = |what| Doing(what, None);
        match &self.stage {
            Stage::Accumulate(step) => match &step.work {
                Work::Slices {
                    pass: Some(OnItsWay::Alone(pass)),
                    ..
                } => pass.doing(),
                Work::Slices { .. } => whole("embedding"),
                Work::MicroBatches(_) => whole("preferences"),
            },
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
                Err(scores) => {
                    let scores = self.mates.total(scores);
                    quantum.events.push(JobEvent::Validated {
                        step: self.step,
                        loss: scores.loss(),
                        token_accuracy: scores.accuracy(),
                        metrics: scores.metrics(),
                    });
                    match self.best.judge(self.step, &scores, &self.learner)? {
                        Judged::Done => self.after_validation(),
                        Judged::Keeps(keeping) => Stage::KeepBest(keeping),
                    }
                }
            },
            Stage::KeepBest(keeping) => match keeping.advance() {
                Err(keeping) => Stage::KeepBest(keeping),
                Ok(kept) => {
                    self.best.keep(kept);
                    self.after_validation()
                }
            },
            Stage::Try { occasion, look } => {
                let (decoder, adapter) = self.learner.parts(base);
                let look = look.unwrap_or_else(|| Look::enter(&self.trial, decoder, adapter));
                match look.advance(&self.trial, decoder, adapter) {
                    Err(look) => Stage::Try {
                        occasion,
                        look: Some(look),
                    },
                    Ok(found) => {
                        let mut scores = Scores::default();
                        scores.add(&self.trial.labels, &found);
                        self.tried(occasion, &scores)?
                    }
                }
            }
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

    fn try_before(&self, occasion: Occasion) -> Stage {
        Stage::Try { occasion, look: None }
    }

    fn tried(&self, occasion: Occasion, scores: &Scores) -> Result<Stage, TrainError> {
        if !scores.loss().is_finite() {
            return Err(TrainError::Diverged {
                step: self.step,
                what: "loss of the adapter that it made",
                value: scores.loss(),
            });
        }
        Ok(match occasion {
            Occasion::End => Stage::Finish,
            Occasion::Checkpoint | Occasion::Stop => Stage::Save,
        })
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

    /// Takes the examples of the next optimizer step.
    fn begin(&mut self) -> Stage {
        self.step_began = Instant::now();
        self.learner.forget_gradient();
        let micro_batches = self.plan.step(self.step);
        let device = self.learner.device();
        let mut longest = 0;
        let (work, tokens) = if objective::is_known(&self.spec.hyper.objective) {
            let (mut slices, mut micro_batch_of) = (vec![], vec![]);
            for (i, micro_batch) in micro_batches.iter().enumerate() {
                let groups = micro_batch.iter().map(|&group| &self.train[group]);
                slices.extend(data::slices(groups.flat_map(|group| &group.examples), device));
                micro_batch_of.resize(slices.len(), i);
            }
            objective::to_mean(&mut slices);
            if let Some(factors) = &self.factors {
                let of_step = micro_batches.iter().flatten().map(|&group| factors[group]);
                objective::by_reward(&mut slices, of_step);
            }
            let mut tokens = 0;
            let rounds = self.mates.rounds(micro_batch_of.iter().copied());
            let placed = slices.into_iter().map(|slice| {
                let before = tokens;
                tokens += slice.tokens.len() as u64;
                longest = longest.max(slice.tokens.len());
                (slice, before)
            });
            let own = placed.zip(micro_batch_of).filter(|(_, i)| self.mates.has(*i));
            let mut slices: Vec<(Slice, u64)> = own.map(|(slice, _)| slice).collect();
            if self.mates.go_in_step() {
                slices.resize_with(rounds, || (Slice::idle(), tokens));
            }
            slices.reverse(); // taken from the end
            (Work::Slices { slices, pass: None }, tokens)
        } else {
            let mut tokens = 0;
            let n = micro_batches.len();
            let place = |micro_batch: &Vec<usize>| {
                let groups = micro_batch.iter().map(|&group| (group, &self.train[group]));
                let groups: Vec<(usize, &Group)> = groups.collect();
                let made = self.micro_batch(&groups, n, tokens);
                tokens += made.rows();
                made
            };
            let placed = micro_batches.iter().map(place).collect();
            (Work::MicroBatches(self.own(placed)), tokens)
        };
        Stage::Accumulate(Box::new(Accumulation {
            work,
            longest,
            scores: Scores::default(),
            tokens,
        }))
    }

    fn micro_batch(&self, groups: &[(usize, &Group)], micro_batches: usize, rows_before: u64) -> MicroBatch {
        let Hyper {
            objective,
            max_seq_length,
            ..
        } = self.spec.hyper;
        let place = Place {
            micro_batches,
            rows_before,
            max_seq_length: max_seq_length as usize,
        };
        MicroBatch::new(groups, objective, place, self.learner.device())
    }

    /// Those of this rank, the next at the end; where ranks go in step all go through the same passes.
    fn own(&self, all: Vec<MicroBatch>) -> Vec<MicroBatch> {
        let mut own = vec![];
        let mut all = all.into_iter();
        loop {
            let mut round: Vec<MicroBatch> = all.by_ref().take(self.mates.rows()).collect();
            if round.is_empty() {
                break;
            }
            if self.mates.go_in_step() {
                let course = round.iter().map(MicroBatch::course).reduce(Course::or);
                let course = course.expect("a round has one");
                let longest = round.iter().map(MicroBatch::longest).max().unwrap_or(0);
                round.resize_with(self.mates.rows(), || self.micro_batch(&[], 1, 0));
                let in_step = round.into_iter().map(|one| one.in_step(&course, longest));
                round = in_step.collect();
            }
            own.extend(round.into_iter().nth(self.mates.own(0)));
        }
        own.reverse();
        own
    }

    fn accumulate(&mut self, base: Option<&Decoder>, step: Accumulation) -> Stage {
        let Accumulation {
            work,
            longest,
            mut scores,
            tokens,
        } = step;
        let (decoder, adapter) = self.learner.parts(base);
        let work = match work {
            Work::Slices { mut slices, pass } => {
                let context = pass::Context {
                    decoder,
                    learns: &[self.learns()],
                    keep_bytes: match self.mates.go_in_step() {
                        // All ranks keep activations, or none: what runs again brings weights together again.
                        true => pass::all_or_nothing(longest, decoder),
                        false => KEEP_BYTES,
                    },
                };
                let pass = match (pass, slices.last()) {
                    (Some(OnItsWay::Alone(pass)), _) => match pass.advance(&context) {
                        Advanced::On(pass) => Some(pass),
                        Advanced::Through(found) => {
                            through(&mut slices, &mut scores, &found[0]);
                            None
                        }
                        Advanced::Scored(_) => unreachable!("its weights are known"),
                    },
                    (Some(OnItsWay::WithOthers), _) => unreachable!("its pass is advanced for all of it"),
                    (None, Some((slice, before))) => Some(Pass::enter(&[(slice, *before)], &context)),
                    (None, None) => return Stage::Optimize { scores, tokens },
                };
                Work::Slices {
                    slices,
                    pass: pass.map(|pass| OnItsWay::Alone(Box::new(pass))),
                }
            }
            Work::MicroBatches(mut micro_batches) => {
                let models = Models {
                    decoder,
                    adapter,
                    reference: self.reference.as_ref(),
                    references: &self.references,
                    dropout: self.dropout(),
                };
                let trained = Some(self.learner.trained());
                match micro_batches.pop() {
                    Some(now) => micro_batches.extend(now.advance(&models, trained, &mut scores)),
                    None => return Stage::Optimize { scores, tokens },
                }
                Work::MicroBatches(micro_batches)
            }
        };
        Stage::Accumulate(Box::new(Accumulation {
            work,
            longest,
            scores,
            tokens,
        }))
    }

    /// Who learns from its slices.
    fn learns(&self) -> pass::Learns<'_> {
        pass::Learns {
            trained: self.learner.trained(),
            dropout: self.dropout(),
            noise: self.noise(),
        }
    }

    /// A quantum of a validation further. Its scores when it is through.
    fn validate(&self, base: Option<&Decoder>, validation: Validation) -> Result<Validation, Scores> {
        let (decoder, adapter) = self.learner.parts(base);
        let Validation { work, mut scores } = validation;
        let work = match work {
            Looking::Slices { round, .. } if round == self.mates.rounds_of(self.valid_slices.len()) => {
                return Err(scores);
            }
            Looking::Slices { round, look } => {
                let idle;
                let slice = match self.valid_slices.get(self.mates.own(round)) {
                    Some(slice) => slice,
                    None => {
                        idle = Slice::idle();
                        &idle
                    }
                };
                let look = look.unwrap_or_else(|| Look::enter(slice, decoder, adapter));
                match look.advance(slice, decoder, adapter) {
                    Err(look) => Looking::Slices {
                        round,
                        look: Some(look),
                    },
                    Ok(found) => {
                        scores.add(&slice.labels, &found);
                        Looking::Slices {
                            round: round + 1,
                            look: None,
                        }
                    }
                }
            }
            Looking::MicroBatches(mut micro_batches) => {
                let models = Models {
                    decoder,
                    adapter,
                    reference: self.reference.as_ref(),
                    references: &self.references,
                    dropout: None,
                };
                match micro_batches.pop() {
                    Some(now) => micro_batches.extend(now.advance(&models, None, &mut scores)),
                    None => return Err(scores),
                }
                Looking::MicroBatches(micro_batches)
            }
        };
        Ok(Validation { work, scores })
    }

    fn begin_validation(&self) -> Stage {
        let work = if objective::is_known(&self.spec.hyper.objective) {
            Looking::Slices { round: 0, look: None }
        } else {
            // Numbered behind those that are trained.
            let groups: Vec<(usize, &Group)> = (self.train.len()..).zip(&self.valid).collect();
            let batch_size = self.spec.hyper.batch_size.max(1) as usize;
            // Each as heavy as its groups, so that the result is their mean.
            let micro_batches = groups.chunks(batch_size);
            let micro_batches =
                micro_batches.map(|groups| self.micro_batch(groups, 1, 0).weighing(groups.len()));
            Looking::MicroBatches(self.own(micro_batches.collect()))
        };
        Stage::Validate(Box::new(Validation {
            work,
            scores: Scores::default(),
        }))
    }

    fn dropout(&self) -> Option<Dropout> {
        match &self.spec.hyper.method {
            Method::Lora(lora) if lora.dropout > 0.0 => Some(Dropout {
                p: lora.dropout,
                seed: self.spec.hyper.seed,
                step: self.step,
                row0: 0,
            }),
            _ => None,
        }
    }

    fn noise(&self) -> Option<Noise> {
        let &Hyper {
            neftune_noise_alpha,
            seed,
            ..
        } = &self.spec.hyper;
        neftune_noise_alpha.map(|alpha| Noise {
            alpha,
            seed,
            step: self.step,
        })
    }

    fn optimize(
        &mut self,
        base: Option<&Decoder>,
        scores: &Scores,
        tokens: u64,
    ) -> Result<StepReport, TrainError> {
        let Hyper {
            learning_rate,
            lr_scheduler,
            warmup_steps,
            max_grad_norm,
            adam_beta1,
            adam_beta2,
            adam_epsilon,
            weight_decay,
            loraplus_lr_ratio,
            ..
        } = self.spec.hyper;
        let step = self.step + 1;
        let loss = scores.loss();
        let diverged = |what, value| TrainError::Diverged { step, what, value };
        if !loss.is_finite() {
            return Err(diverged("loss", loss));
        }
        let update = Update {
            learning_rate: learning_rate * lr_scheduler.factor(self.step, warmup_steps, self.plan.total()),
            adamw: AdamW {
                beta1: adam_beta1,
                beta2: adam_beta2,
                epsilon: adam_epsilon,
                weight_decay,
            },
            b_ratio: loraplus_lr_ratio.unwrap_or(1.0),
            max_grad_norm,
            step,
        };
        self.mates.sum(self.learner.gradient(), self.learner.is_shared());
        let grad_norm = self
            .learner
            .update(base, &update)
            .map_err(|unusable| match unusable {
                Unusable::GradNorm(norm) => diverged("gradient norm", norm),
                Unusable::Numbers => TrainError::Overflowed { step, loss },
            })?;
        self.step = step;
        self.trained_tokens += tokens;
        Ok(StepReport {
            step,
            epoch: self.plan.epoch(step),
            loss,
            token_accuracy: scores.accuracy(),
            metrics: scores.metrics(),
            grad_norm,
            learning_rate: update.learning_rate,
            trained_tokens: self.trained_tokens,
            tokens_per_second: tokens as f64 / self.step_began.elapsed().as_secs_f64().max(1e-9),
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

    /// What a clean stop keeps, so that no step is done twice: the state only.
    pub fn snapshot(&self) -> Snapshot {
        let is_rest_due = matches!(
            self.stage,
            Stage::Validate(_)
                | Stage::KeepBest(_)
                | Stage::Try {
                    occasion: Occasion::Checkpoint,
                    ..
                }
                | Stage::Save
                | Stage::Copy {
                    occasion: Occasion::Checkpoint,
                    ..
                }
                | Stage::Announce {
                    is_rest_due: true,
                    ..
                }
        );
        let mut numbers = self.numbers(Occasion::Stop);
        if !self.learner.is_shared() {
            numbers = numbers.iter().map(Tensor::copy).collect();
        }
        self.snapshot_of(Occasion::Stop, numbers, is_rest_due)
    }

    /// What rank 0 does with this rank's shares when the run ends, `finished` or to go on some other time.
    pub fn bring_shares(&self, finished: bool) {
        match (self.learner.is_shared(), finished) {
            (false, _) => {}
            (true, false) => drop(self.snapshot()),
            (true, true) => drop(self.full_weights(Kind::Float)),
        }
    }

    fn copy(&self, occasion: Occasion) -> Stage {
        let numbers = self.numbers(occasion);
        let copying = match self.learner.is_shared() {
            true => Copying::nothing(numbers),
            false => Copying::of(numbers),
        };
        Stage::Copy { occasion, copying }
    }

    /// What is copied: the trained numbers, and what the optimizer remembers of them where the job is to go on from them.
    fn numbers(&self, occasion: Occasion) -> Vec<Tensor> {
        let mut numbers = vec![self.learner.flat()];
        if occasion != Occasion::End {
            numbers.extend(self.learner.memory().into_iter().map(|(_, tensor)| tensor));
        }
        numbers
    }

    /// `copies` are of [`Trainer::numbers`].
    fn snapshot_of(&self, occasion: Occasion, copies: Vec<Tensor>, is_rest_due: bool) -> Snapshot {
        // Every rank brings its shares, of all of them.
        let whole = |share| self.learner.together(share);
        let copies: Vec<Option<Tensor>> = copies.into_iter().map(whole).collect();
        let best = match occasion {
            Occasion::End => None,
            _ => self.best.numbers().and_then(whole),
        };
        // None on a rank that only brought its shares.
        let mut copies = copies.into_iter().flatten();
        let params = copies.next();
        let name = match occasion {
            Occasion::Checkpoint => Some(format!("{}{}", files::CHECKPOINT, self.step)),
            Occasion::End => Some(files::ADAPTER.to_owned()),
            Occasion::Stop => None,
        };
        let of_lora = self.learner.as_lora().zip(name).zip(params.as_ref());
        let adapter = of_lora.map(|((of, name), params)| {
            let LoraView {
                lora,
                params: own,
                fit,
            } = of;
            AdapterCopy {
                name,
                params: AdapterParams {
                    flat: params.shallow_clone(),
                    shape: own.shape.clone(),
                },
                lora: lora.clone(),
                base_model: self.spec.base_model.clone(),
                fit: fit.clone(),
            }
        });
        let goes_on = params.filter(|_| occasion != Occasion::End);
        let state = goes_on.map(|params| {
            let names = self.learner.memory().into_iter().map(|(name, _)| name);
            let progress = state::Progress {
                step: self.step,
                trained_tokens: self.trained_tokens,
                hyper: self.spec.hyper.clone(),
                data: self.data,
                is_rest_due,
                order: state::ORDER,
                standing: self.best.standing(),
            };
            let tensors = state::Tensors {
                params,
                memory: names.zip(copies).collect(),
                best,
            };
            (progress, tensors)
        });
        Snapshot {
            job: self.spec.id.clone(),
            folder: self.spec.folder.clone(),
            occasion,
            adapter,
            state,
            best: self.best.standing().saved,
            step: self.step,
            trained_tokens: self.trained_tokens,
        }
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

fn groups(
    bytes: &[u8],
    file: &str,
    spec: &DecoderSpec,
    objective: &Objective,
) -> Result<Vec<Group>, TrainError> {
    let groups = dataset::decode(bytes).map_err(|error| TrainError::Damaged(format!("{file}: {error}")))?;
    let size = match objective.rows() {
        Rows::Pairs => 2,
        Rows::Examples | Rows::Judged | Rows::Rewarded => 1,
    };
    for (number, group) in groups.iter().enumerate() {
        if group.examples.len() != size {
            let (n, name) = (group.examples.len(), objective.name());
            return Err(TrainError::Data(format!(
                "{file}: row {number} has {n} sequences, {name} takes {size}"
            )));
        }
        let is_learned = |example: &Example| example.label_tokens() > 0;
        if *objective != Objective::Sft && !group.examples.iter().all(is_learned) {
            return Err(TrainError::Data(format!(
                "{file}: row {number} has a sequence without a token to learn"
            )));
        }
        for example in &group.examples {
            if let Some(token) = example
                .tokens
                .iter()
                .find(|&&token| i64::from(token) >= spec.vocab)
            {
                let vocab = spec.vocab;
                return Err(TrainError::Data(format!(
                    "{file}: example {number} has token {token}, the model has {vocab}"
                )));
            }
            if example.tokens.len() as i64 > spec.max_positions {
                let (n, most) = (example.tokens.len(), spec.max_positions);
                return Err(TrainError::Data(format!(
                    "{file}: example {number} has {n} tokens, the model takes {most}"
                )));
            }
        }
    }
    Ok(groups)
}
