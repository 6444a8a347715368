//! A learner that a client drives call by call: batches are scored and add gradients a quantum at a time, as a job's do, and
//! between calls its numbers are stepped, packed to answer, or copied to be kept. What one call computes depends on its own
//! data alone: how they are cut into slices, and the numbers that are trained, never on who else is served or trained.
//! Not here: when it runs (engine), a batch on its way (call).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_core::id::AdapterRef;
use tandem_core::job::Lora;
use tandem_core::learner::{
    self, Adam, Batch, Moments, NewLearner, Save, Saved, Saving, Scores, Source, Stepped,
};
use tandem_core::message::Fault;
use tandem_kernels::adamw::AdamW;
use tandem_kernels::loss::LogProbs;
use tch::Tensor;

use super::TrainError;
use super::call::{self, Call};
use super::joint::{Member, Next};
use super::learner::{Learner, LoraView, Unusable, Update};
use super::pass::Learns;
use super::snapshot::Copying;
use super::state::{self, Tensors};
use crate::lora::adapter::Adapter;
use crate::lora::fit::Fit;
use crate::lora::params::{AdapterParams, AdapterShape};
use crate::lora::peft::{self, PeftConfig};
use crate::model::Decoder;

/// What a learner begins with, from the files that it names.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Inputs {
    Nothing,
    State(Vec<u8>, Moments),
    /// Configuration and tensors.
    Adapter(Vec<u8>, Vec<u8>),
}

impl Inputs {
    pub fn read(new: &NewLearner) -> Result<Inputs, TrainError> {
        Ok(match &new.from {
            None => Inputs::Nothing,
            Some(Source::State { file, moments }) => Inputs::State(state::read_file(file)?, *moments),
            Some(Source::Adapter(AdapterRef { folder, .. })) => {
                let read = |name: &str| {
                    std::fs::read(folder.join(name)).map_err(|error| TrainError::File {
                        file: name.to_owned(),
                        error,
                    })
                };
                Inputs::Adapter(read(peft::CONFIG)?, read(peft::TENSORS)?)
            }
        })
    }
}

pub struct Driven {
    learner: Learner,
    /// Optimizer steps of its numbers.
    steps: u64,
    work: Option<Work>,
}

/// What is on its way.
enum Work {
    Call(Box<Call>),
    Save(Save, Copying),
}

/// What [`Driven::advance`] came to.
pub enum Progress {
    On,
    Scored(Scores),
    Copied(Box<Copy>),
}

/// What is kept of a learner, beside the tensors.
#[derive(Serialize, Deserialize)]
struct Record {
    lora: Lora,
    steps: u64,
}

/// Numbers on their way into a file, as a value: any thread can write them while the learner goes on.
pub struct Copy {
    folder: PathBuf,
    lora: Lora,
    steps: u64,
    params: AdapterParams,
    what: Copied,
}

enum Copied {
    State { memory: Vec<(String, Tensor)> },
    Adapter { base_model: String },
}

impl Driven {
    /// Takes a while: numbers are drawn, or parsed. On every rank from the same.
    pub fn make(new: &NewLearner, inputs: &Inputs, fit: Fit) -> Result<Driven, TrainError> {
        let mut made = Driven {
            learner: Learner::lora(new.lora.clone(), fit, new.seed)?,
            steps: 0,
            work: None,
        };
        made.take(&new.lora, inputs)?;
        made.learner.forget_gradient();
        Ok(made)
    }

    fn take(&mut self, lora: &Lora, inputs: &Inputs) -> Result<(), TrainError> {
        match inputs {
            Inputs::Nothing => Ok(()),
            Inputs::State(bytes, moments) => {
                let (record, tensors): (Record, Tensors) = state::parse(bytes)?;
                if record.lora != *lora {
                    return Err(TrainError::State("its state is of another adapter".to_owned()));
                }
                match moments {
                    Moments::Restored => {
                        self.steps = record.steps;
                        self.learner.resume(&tensors.params, &tensors.memory)
                    }
                    Moments::Fresh => self.take_numbers(&tensors.params),
                }
            }
            Inputs::Adapter(config, tensors) => {
                let spec = self.learner.spec();
                let there = peft::read_bytes(config, tensors, spec, u32::MAX)?.params;
                if there.shape != AdapterShape::new(spec, lora) {
                    let message =
                        "the adapter has other modules, ranks or scales than the model that is to take it on";
                    return Err(TrainError::State(message.to_owned()));
                }
                self.take_numbers(&there.flat)
            }
        }
    }

    /// With an optimizer that has done nothing.
    fn take_numbers(&mut self, params: &Tensor) -> Result<(), TrainError> {
        let memory = self.learner.memory();
        self.learner.resume(params, &memory)?;
        self.learner.forget_updates();
        Ok(())
    }

    pub fn lora(&self) -> &Lora {
        self.adapter().lora
    }

    fn adapter(&self) -> LoraView<'_> {
        self.learner.as_lora().expect("it was made as an adapter")
    }

    /// Takes a call in; [`Driven::advance`] does it.
    pub fn begin(&mut self, batch: Batch) {
        let call = Call::new(batch, self.learner.device());
        self.work = Some(Work::Call(Box::new(call)));
    }

    /// Takes in that the numbers are to be kept as they are now; [`Driven::advance`] copies them.
    pub fn begin_save(&mut self, save: Save) {
        let mut numbers = vec![self.learner.flat()];
        if save.what == Saving::State {
            numbers.extend(self.learner.memory().into_iter().map(|(_, tensor)| tensor));
        }
        self.work = Some(Work::Save(save, Copying::of(numbers)));
    }

    /// One quantum of what was begun.
    pub fn advance(&mut self, base: &Decoder) -> Result<Progress, Fault> {
        match self.work.take().expect("something was begun") {
            Work::Call(mut call) => match call.advance(&self.learner, base)? {
                call::Progress::Done(scores) => return Ok(Progress::Scored(scores)),
                call::Progress::On => self.work = Some(Work::Call(call)),
            },
            Work::Save(save, copying) => match copying.advance() {
                Ok(copies) => return Ok(Progress::Copied(Box::new(self.copy(save, copies)))),
                Err(copying) => self.work = Some(Work::Save(save, copying)),
            },
        }
        Ok(Progress::On)
    }

    /// Whether it is in the midst of a call, which every rank computes.
    pub fn computes(&self) -> bool {
        self.call().is_some()
    }

    fn call(&self) -> Option<&Call> {
        match &self.work {
            Some(Work::Call(call)) => Some(call),
            Some(Work::Save(..)) | None => None,
        }
    }

    /// In a pass that others share.
    fn lent(&mut self) -> &mut Call {
        match &mut self.work {
            Some(Work::Call(call)) => call,
            Some(Work::Save(..)) | None => unreachable!("a call gives slices"),
        }
    }

    /// Whether a slice is on its way, whose activations wait for its backward.
    pub fn holds_activations(&self) -> bool {
        self.call().is_some_and(Call::holds_activations)
    }

    /// Whether the next quantum is short.
    pub fn is_brief(&self) -> bool {
        self.call().is_none_or(Call::is_over)
    }

    /// What was begun is given up; gradients that it added stay until they are cleared.
    pub fn give_up(&mut self) {
        self.work = None;
    }

    pub fn clear(&mut self) {
        self.learner.forget_gradient();
    }

    /// Uses and clears the gradients.
    pub fn step(&mut self, base: &Decoder, adam: &Adam) -> Result<Stepped, Fault> {
        adam.check()?;
        let &Adam {
            learning_rate,
            beta1,
            beta2,
            epsilon,
            weight_decay,
            grad_clip_norm,
        } = adam;
        let update = Update {
            b_ratio: 1.0,
            learning_rate,
            adamw: AdamW {
                beta1,
                beta2,
                epsilon,
                weight_decay,
            },
            max_grad_norm: grad_clip_norm,
            step: self.steps + 1,
        };
        let updated = self.learner.update(Some(base), &update);
        self.learner.forget_gradient();
        let refused = |why: String| Fault::Refused(why);
        match updated {
            Ok(grad_norm) => {
                self.steps += 1;
                Ok(Stepped {
                    step: self.steps,
                    grad_norm,
                })
            }
            Err(Unusable::GradNorm(norm)) => Err(refused(format!(
                "no step was made: the norm of the gradients is {norm}; they are cleared"
            ))),
            Err(Unusable::Numbers) => Err(refused(format!(
                "the step at learning rate {learning_rate} made numbers that are infinite or not a number (NaN): this model \
                 is lost, load what was saved before"
            ))),
        }
    }

    /// The numbers as they are now, in the form that answers.
    pub fn packed(&self) -> Result<Arc<Adapter>, Fault> {
        let LoraView { params, fit, .. } = self.adapter();
        let packed = fit.pack(params);
        packed
            .map(Arc::new)
            .map_err(|error| Fault::Refused(error.to_string()))
    }

    /// `copies`: of the numbers, and of what the optimizer remembers of them.
    fn copy(&self, save: Save, copies: Vec<Tensor>) -> Copy {
        let LoraView { lora, params, .. } = self.adapter();
        let Save { folder, what } = save;
        let mut copies = copies.into_iter();
        Copy {
            folder,
            lora: lora.clone(),
            steps: self.steps,
            params: AdapterParams {
                flat: copies.next().expect("the numbers are copied first"),
                shape: params.shape.clone(),
            },
            what: match what {
                Saving::State => {
                    let names = self.learner.memory().into_iter().map(|(name, _)| name);
                    Copied::State {
                        memory: names.zip(copies).collect(),
                    }
                }
                Saving::Adapter { base_model } => Copied::Adapter { base_model },
            },
        }
    }
}

impl Member for Driven {
    fn next_slice(&self) -> Option<Next<'_>> {
        self.call()?.next_slice()
    }

    fn lend(&mut self) {
        self.lent().lend();
    }

    fn learns(&self) -> Learns<'_> {
        self.learner.trained().into()
    }

    fn weigh(&mut self, log_probs: &[f32]) -> Vec<f32> {
        self.lent().weigh_beside(log_probs)
    }

    fn take_back(&mut self, found: &LogProbs) {
        self.lent().take_back(found);
    }

    fn slice_rows(&self) -> usize {
        self.call().map_or(0, Call::slice_rows)
    }
}

impl Copy {
    pub fn write(&self) -> Result<Saved, TrainError> {
        let Copy {
            folder,
            lora,
            steps,
            params,
            what,
        } = self;
        match what {
            Copied::State { memory } => {
                let record = Record {
                    lora: lora.clone(),
                    steps: *steps,
                };
                let tensors = Tensors {
                    params: params.flat.shallow_clone(),
                    memory: memory
                        .iter()
                        .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
                        .collect(),
                    best: None,
                };
                state::replace(folder, learner::STATE, &state::bytes(&record, &tensors))?;
                Ok(Saved { adapter: None })
            }
            Copied::Adapter { base_model } => {
                let config = PeftConfig { base_model, lora };
                state::replace_folder(folder, learner::ADAPTER, |folder: &Path| {
                    Ok(peft::write(folder, params, &config)?)
                })?;
                let folder = folder.join(learner::ADAPTER);
                let digest = peft::digest(&folder)?;
                let adapter = Some(AdapterRef { digest, folder });
                Ok(Saved { adapter })
            }
        }
    }
}
