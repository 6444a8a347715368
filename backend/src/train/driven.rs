//! A learner that a client drives call by call: batches are scored and add gradients a quantum at a time, as a job's do, and
//! between calls its numbers are stepped, packed to answer, or copied to be kept. What one call computes depends on its own
//! data alone: how they are cut into slices, and the numbers that are trained, never on who else is served or trained.
//! Not here: when it runs (engine), what a loss is (objective).

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tandem_core::id::AdapterRef;
use tandem_core::job::Lora;
use tandem_core::learner::{self, Adam, Batch, Datum, Loss, NewLearner, Saved, Saving, Scores, Stepped};
use tandem_core::message::Fault;
use tandem_kernels::adamw::AdamW;
use tch::{Device, Tensor};

use super::TrainError;
use super::data::Slice;
use super::learner::{Learner, LoraView, Unusable, Update};
use super::objective::policy;
use super::pass::{Advanced, Context, KEEP_BYTES, Look, Pass};
use super::state::{self, Tensors};
use crate::lora::adapter::Adapter;
use crate::lora::fit::Fit;
use crate::lora::params::{AdapterParams, AdapterShape};
use crate::lora::peft::{self, PeftConfig};
use crate::model::Decoder;

/// Of the activations that a pass keeps: several learners may each hold one beside a job's.
const LEARNER_KEEP_BYTES: i64 = KEEP_BYTES / 4;

pub struct Driven {
    learner: Learner,
    /// Optimizer steps of its numbers.
    steps: u64,
    call: Option<Accumulation>,
}

/// A batch on its way.
struct Accumulation {
    loss: Loss,
    pass: learner::Pass,
    data: Vec<Datum>,
    cuts: VecDeque<Cut>,
    at: Option<At>,
    scores: Scores,
}

/// Neighbouring data that go through the layers together. Labels stand in the order of the data's targets.
struct Cut {
    slice: Slice,
    data: Range<usize>,
}

enum At {
    Scores(Look, Cut),
    Learns(Pass, Range<usize>),
}

/// What [`Driven::advance`] came to.
pub enum Progress {
    On,
    Done(Scores),
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
    /// Takes a while: numbers are drawn, or read from a file.
    pub fn make(new: &NewLearner, fit: Fit) -> Result<Driven, TrainError> {
        let mut made = Driven {
            learner: Learner::lora(new.lora.clone(), fit, new.seed)?,
            steps: 0,
            call: None,
        };
        if let Some(source) = &new.from {
            made.take(&new.lora, source)?;
        }
        made.learner.forget_gradient();
        Ok(made)
    }

    fn take(&mut self, lora: &Lora, source: &learner::Source) -> Result<(), TrainError> {
        match source {
            learner::Source::State { file, moments } => {
                let (record, tensors): (Record, Tensors) = state::read_file(file)?;
                if record.lora != *lora {
                    return Err(TrainError::State("its state is of another adapter".to_owned()));
                }
                match moments {
                    learner::Moments::Restored => {
                        self.steps = record.steps;
                        self.learner.resume(&tensors.params, &tensors.memory)
                    }
                    learner::Moments::Fresh => self.take_numbers(&tensors.params),
                }
            }
            learner::Source::Adapter(AdapterRef { folder, .. }) => {
                let spec = self.learner.spec();
                let there = peft::read(folder, spec, u32::MAX)?.params;
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
        let Batch {
            loss,
            data,
            pass,
            trace: _,
        } = batch;
        let cuts = cuts(&data, self.learner.device());
        self.call = Some(Accumulation {
            loss,
            pass,
            scores: Scores {
                loss: 0.0,
                logprobs: vec![vec![]; data.len()],
            },
            cuts,
            data,
            at: None,
        });
    }

    /// One quantum of the call that [`Driven::begin`] took in.
    pub fn advance(&mut self, base: &Decoder) -> Result<Progress, Fault> {
        let mut call = self.call.take().expect("a call was begun");
        let (decoder, adapter) = self.learner.parts(Some(base));
        let context = Context {
            decoder,
            learns: &[self.learner.trained().into()],
            keep_bytes: LEARNER_KEEP_BYTES,
        };
        let at = match (call.at.take(), call.pass) {
            (None, pass) => match (call.cuts.pop_front(), pass) {
                (None, _) => return Ok(Progress::Done(call.scores)),
                (Some(cut), learner::Pass::Forward) => {
                    At::Scores(Look::enter(&cut.slice, decoder, adapter), cut)
                }
                (Some(Cut { mut slice, data }), learner::Pass::ForwardBackward) => {
                    let pass = match call.loss {
                        // Its weights are known: the loss and its gradient are one product of the head.
                        Loss::CrossEntropy => {
                            let weights = call.data[data.clone()].iter().flat_map(|datum| {
                                let n = datum.targets.len();
                                (0..n).map(|i| datum.weights.get(i).copied().unwrap_or(1.0))
                            });
                            for (label, weight) in slice.labels.iter_mut().zip(weights) {
                                label.2 = weight;
                            }
                            Pass::enter(&[(&slice, 0)], &context)
                        }
                        _ => Pass::enter_to_be_weighed((&slice, 0), &context),
                    };
                    At::Learns(pass, data)
                }
            },
            (Some(At::Scores(look, cut)), _) => match look.advance(&cut.slice, decoder, adapter) {
                Err(look) => At::Scores(look, cut),
                Ok(found) => {
                    call.weigh(cut.data, &found.log_probs)?;
                    return Ok(self.go_on(call));
                }
            },
            (Some(At::Learns(pass, data)), _) => match pass.advance(&context) {
                Advanced::On(pass) => At::Learns(pass, data),
                Advanced::Scored(scored) => {
                    let log_probs = scored.found().log_probs.clone();
                    let dlogp = call.weigh(data.clone(), &log_probs)?;
                    At::Learns(scored.weighed(&dlogp), data)
                }
                Advanced::Through(found) => {
                    if call.loss == Loss::CrossEntropy {
                        call.weigh(data, &found[0].log_probs)?;
                    }
                    return Ok(self.go_on(call));
                }
            },
        };
        call.at = Some(at);
        Ok(self.go_on(call))
    }

    fn go_on(&mut self, call: Accumulation) -> Progress {
        self.call = Some(call);
        Progress::On
    }

    /// What was begun is given up; gradients that it added stay until they are cleared.
    pub fn give_up(&mut self) {
        self.call = None;
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

    pub fn copy(&self, save: learner::Save) -> Copy {
        let LoraView { lora, params, .. } = self.adapter();
        let learner::Save { folder, what } = save;
        Copy {
            folder,
            lora: lora.clone(),
            steps: self.steps,
            params: AdapterParams {
                flat: params.flat.copy(),
                shape: params.shape.clone(),
            },
            what: match what {
                Saving::State => Copied::State {
                    memory: self
                        .learner
                        .memory()
                        .into_iter()
                        .map(|(name, tensor)| (name, tensor.copy()))
                        .collect(),
                },
                Saving::Adapter { base_model } => Copied::Adapter { base_model },
            },
        }
    }
}

impl Accumulation {
    /// Log-probabilities of all targets of `data`: kept, and their loss with its derivatives.
    fn weigh(&mut self, data: Range<usize>, log_probs: &[f32]) -> Result<Vec<f32>, Fault> {
        let mut dlogp = Vec::with_capacity(log_probs.len());
        let mut rest = log_probs;
        for n in data {
            let datum = &self.data[n];
            let (of_datum, behind) = rest.split_at(datum.targets.len());
            rest = behind;
            let weighed = policy::weigh(self.loss, datum, of_datum);
            if !weighed.loss.is_finite() || weighed.dlogp.iter().any(|number| !number.is_finite()) {
                return Err(Fault::Refused(format!(
                    "datum {n}: its {} is {}: log-probabilities of the model or of who sampled are out of range",
                    self.loss.name(),
                    weighed.loss
                )));
            }
            self.scores.loss += weighed.loss;
            self.scores.logprobs[n] = of_datum.to_vec();
            dlogp.extend(weighed.dlogp);
        }
        Ok(dlogp)
    }
}

/// The data as slices, in order.
fn cuts(data: &[Datum], device: Device) -> VecDeque<Cut> {
    let mut cuts: VecDeque<Cut> = VecDeque::new();
    for (n, datum) in data.iter().enumerate() {
        let fits = |cut: &Cut| cut.slice.has_room(datum.tokens.len(), device);
        if !cuts.back().is_some_and(fits) {
            cuts.push_back(Cut {
                slice: Slice::default(),
                data: n..n,
            });
        }
        let cut = cuts.back_mut().expect("there is one now");
        let label = |(i, &target): (usize, &u32)| ((i / datum.columns) as i64, target, 0.0);
        cut.slice
            .push(&datum.tokens, datum.targets.iter().enumerate().map(label));
        cut.data.end = n + 1;
    }
    cuts
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
