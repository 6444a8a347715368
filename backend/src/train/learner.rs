//! The numbers that are trained, with their gradient and what the optimizer remembers: an adapter beside the served base, or every
//! parameter of a decoder of its own. A fine-tune job has one ([`super::Trainer`]); so may a client that drives training
//! call by call:
//!
//! ```text
//! let mut learner = Learner::lora(lora, decoder.fit(), seed)?;        // or Learner::resume on numbers kept before
//! learner.forget_gradient();
//! for each call { .. passes with `learner.trained()` add to its gradient .. }
//! let grad_norm = learner.update(base, &Update { .. })?;              // sums over ranks, clips, steps, repacks
//! learner.forget_gradient();                                          // the update leaves it as it was
//! ```
//!
//! Not here: what the gradient is of (pass, objective), files (snapshot, state).

use tandem_core::job::{self, Lora};
use tandem_kernels::adamw::{self, AdamW};
use tandem_kernels::finite;
use tandem_kernels::weight::Precision;
use tch::{Device, Kind, Tensor};

use super::TrainError;
use super::optimizer::{Optimizer, Parameter, Role, Step};
use super::pass::Trained;
use crate::family::{DecoderSpec, ParamId};
use crate::lora::adapter::Adapter;
use crate::lora::fit::Fit;
use crate::lora::params::{AdapterParams, AdapterShape};
use crate::model::Decoder;
use crate::model::full::{self, FullParams, FullShape};

pub struct Learner {
    subject: Subject,
    optimizer: Optimizer,
}

/// What is trained.
enum Subject {
    /// The base is the served decoder, handed in with each call.
    Lora {
        lora: Lora,
        params: AdapterParams,
        gradient: AdapterParams,
        /// What the forward reads.
        adapter: Adapter,
        fit: Box<Fit>,
    },
    /// A decoder of its own.
    Full {
        params: FullParams,
        gradient: FullParams,
        decoder: Box<Decoder>,
    },
}

/// One optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    pub learning_rate: f64,
    /// Norms and biases of a model do not decay, whatever it says; an adapter decays whole. Other optimizers take from it what
    /// they have, too.
    pub adamw: AdamW,
    /// Of an adapter's B over its A.
    pub b_ratio: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    /// The updates of this learner with this one, from 1: for the corrections of the moments.
    pub step: u64,
}

/// Why an update was not what it should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unusable {
    /// Nothing was changed.
    GradNorm(f64),
    /// The numbers are infinite or NaN now.
    Numbers,
}

/// An adapter as a learner has it, and what is needed to write and pack it elsewhere.
pub struct LoraView<'a> {
    pub lora: &'a Lora,
    pub params: &'a AdapterParams,
    pub fit: &'a Fit,
}

impl Learner {
    /// A new adapter: A drawn by `seed`, B zero.
    pub fn lora(lora: Lora, fit: Fit, seed: u64) -> Result<Learner, TrainError> {
        let shape = AdapterShape::new(&fit.spec, &lora);
        if shape.is_empty() {
            let message = format!(
                "no module to train: {:?} are asked, {:?} exist",
                lora.target_modules,
                fit.spec.lora_targets()
            );
            return Err(TrainError::Data(message));
        }
        let params = AdapterParams::init(shape, seed);
        Learner::of_adapter(lora, fit, params)
    }

    /// An adapter that is there. `lora` says its shape.
    pub fn of_adapter(lora: Lora, fit: Fit, params: AdapterParams) -> Result<Learner, TrainError> {
        let adapter = fit.pack(&params)?;
        Ok(Learner::new(Subject::Lora {
            lora,
            gradient: AdapterParams::zeros(params.shape.clone()),
            params,
            adapter,
            fit: Box::new(fit),
        }))
    }

    /// Every parameter of a model. They are float32, and multiplied in `precision`. Ranks may share them; `keeps_whole`:
    /// [`Decoder::from_params`].
    pub fn full(
        spec: DecoderSpec,
        params: FullParams,
        precision: Precision,
        keeps_whole: bool,
    ) -> Result<Learner, TrainError> {
        let decoder = Box::new(Decoder::from_params(spec, &params, precision, keeps_whole)?);
        Ok(Learner::new(Subject::Full {
            gradient: FullParams::zeros(params.shape.clone()),
            params,
            decoder,
        }))
    }

    fn new(subject: Subject) -> Learner {
        Learner {
            optimizer: Optimizer::new(job::Optimizer::AdamW, subject.parameters()),
            subject,
        }
    }

    /// Before the first update; without it AdamW steps.
    pub fn stepping_by(self, rule: job::Optimizer) -> Learner {
        Learner {
            optimizer: Optimizer::new(rule, self.subject.parameters()),
            ..self
        }
    }

    /// Goes on with numbers that were kept, all of them `[P]`, and with what the optimizer remembered of them.
    pub fn resume(&mut self, params: &Tensor, memory: &[(String, Tensor)]) -> Result<(), TrainError> {
        if params.numel() as u64 != self.len() {
            let (there, here) = (params.numel(), self.len());
            return Err(TrainError::State(format!(
                "its state has {there} numbers, this model makes it {here}"
            )));
        }
        let memory = memory.iter();
        let memory: Vec<(String, Tensor)> = memory
            .map(|(name, tensor)| (name.clone(), self.share_of(tensor)))
            .collect();
        self.optimizer.resume(&memory).map_err(TrainError::State)?;
        self.load(&self.share_of(params));
        Ok(())
    }

    /// Of all numbers `[P]`, or what is shaped like them, what is this rank's.
    pub fn share_of(&self, whole: &Tensor) -> Tensor {
        match self.whole_model() {
            None => whole.shallow_clone(),
            Some(shape) => shape.share_of(whole),
        }
    }

    /// All ranks' shares together, `[P]`: where ranks share, on rank 0 alone, and all bring theirs.
    pub fn together(&self, share: Tensor) -> Option<Tensor> {
        match self.whole_model() {
            None => Some(share),
            Some(shape) => shape.together(share),
        }
    }

    /// Whether ranks share the numbers, their gradient and moments.
    pub fn is_shared(&self) -> bool {
        self.whole_model().is_some_and(FullShape::is_shared)
    }

    /// How the parameters lie, where all are trained; ranks share these alone.
    fn whole_model(&self) -> Option<&FullShape> {
        match &self.subject {
            Subject::Lora { .. } => None,
            Subject::Full { params, .. } => Some(&params.shape),
        }
    }

    /// The optimizer is as before its first update.
    pub fn forget_updates(&mut self) {
        self.optimizer.forget();
    }

    /// Takes other numbers, shaped as [`Learner::flat`]. What the optimizer remembers stays.
    pub fn load(&mut self, params: &Tensor) {
        self.flat().copy_(params);
        self.repack();
    }

    /// DoRA begins as the base: magnitudes that nobody has set are the norms of its rows.
    pub fn begin(&mut self, base: Option<&Decoder>) {
        let (Subject::Lora { params, adapter, .. }, Some(base)) = (&mut self.subject, base) else {
            return;
        };
        let Some(range) = params.shape.magnitudes() else {
            return;
        };
        let magnitudes = params.flat.narrow(0, range.start, range.end - range.start);
        if magnitudes.abs().max().double_value(&[]) > 0.0 {
            return;
        }
        for (id, linear) in params.shape.iter() {
            let norms = Tensor::from_slice(&base.row_norms(id));
            for part in &linear.parts {
                if let Some(mut magnitude) = params.magnitude(part) {
                    magnitude.copy_(&norms.narrow(0, part.columns.start, part.width()));
                }
            }
        }
        adapter.update(params);
    }

    /// Numbers that are trained.
    pub fn len(&self) -> u64 {
        match self.whole_model() {
            None => self.gradient().numel() as u64,
            Some(shape) => shape.total() as u64,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Of a model that is trained itself, numbers that are not.
    pub fn frozen(&self) -> u64 {
        self.whole_model().map_or(0, |shape| shape.frozen() as u64)
    }

    /// The numbers, `[P]` float32 on the CPU, shared storage; this rank's where ranks share them.
    pub fn flat(&self) -> Tensor {
        match &self.subject {
            Subject::Lora { params, .. } => params.flat.shallow_clone(),
            Subject::Full { params, .. } => params.flat.shallow_clone(),
        }
    }

    /// What the optimizer remembers, by name, shared storage.
    pub fn memory(&self) -> Vec<(String, Tensor)> {
        self.optimizer.memory()
    }

    /// Where the passes run.
    pub fn device(&self) -> Device {
        match &self.subject {
            Subject::Lora { fit, .. } => fit.device,
            Subject::Full { decoder, .. } => decoder.device(),
        }
    }

    pub fn spec(&self) -> &DecoderSpec {
        match &self.subject {
            Subject::Lora { fit, .. } => &fit.spec,
            Subject::Full { decoder, .. } => &decoder.spec,
        }
    }

    /// `None` where every parameter is trained.
    pub fn as_lora(&self) -> Option<LoraView<'_>> {
        match &self.subject {
            Subject::Lora {
                lora, params, fit, ..
            } => Some(LoraView { lora, params, fit }),
            Subject::Full { .. } => None,
        }
    }

    /// What runs: the decoder, and the adapter as it is now. `base`: the decoder that serves, which an adapter needs.
    pub fn parts<'a>(&'a self, base: Option<&'a Decoder>) -> (&'a Decoder, Option<&'a Adapter>) {
        parts(&self.subject, base)
    }

    /// For a pass: what is trained, and where its gradient adds up.
    pub fn trained(&self) -> Trained<'_> {
        match &self.subject {
            Subject::Lora {
                adapter, gradient, ..
            } => Trained::Adapter { adapter, gradient },
            Subject::Full { gradient, .. } => Trained::Model { gradient },
        }
    }

    /// `[P]` float32, as the numbers.
    pub fn gradient(&self) -> &Tensor {
        self.subject.gradient()
    }

    pub fn forget_gradient(&mut self) {
        let _ = self.gradient().shallow_clone().zero_();
    }

    /// Sums the gradient over ranks, clips it, takes a step, and has the forward read the new numbers. The norm of
    /// the gradient before clipping.
    pub fn update(&mut self, base: Option<&Decoder>, update: &Update) -> Result<f64, Unusable> {
        let &Update {
            learning_rate,
            adamw,
            b_ratio,
            max_grad_norm,
            step,
        } = update;
        if let Some(base) = base {
            base.sum_over_ranks(self.gradient());
        }
        let own = adamw::global_norm(self.gradient());
        let norm = self.whole_model().map_or(own, |shape| shape.norm_over_ranks(own));
        if !norm.is_finite() {
            return Err(Unusable::GradNorm(norm));
        }
        if max_grad_norm > 0.0 && norm > max_grad_norm {
            // torch.nn.utils.clip_grad_norm_
            adamw::scale(self.gradient(), max_grad_norm / (norm + 1e-6));
        }
        let step = Step {
            learning_rate,
            adamw,
            b_ratio,
            number: step,
        };
        self.optimizer.step(&self.flat(), self.gradient(), &step);
        self.repack();
        let own = finite::all(&self.flat());
        let is_finite = self.whole_model().map_or(own, |shape| shape.on_all_ranks(own));
        match is_finite {
            true => Ok(norm),
            false => Err(Unusable::Numbers),
        }
    }

    /// The forward reads packed copies: bring them up to date.
    fn repack(&mut self) {
        match &mut self.subject {
            Subject::Lora { params, adapter, .. } => adapter.update(params),
            Subject::Full { params, decoder, .. } => decoder.update_full(params),
        }
    }

    /// The bytes of the trained model's model.safetensors, where every parameter is trained; on rank 0 where ranks share them.
    pub fn full_weights(&self, kind: Kind) -> Option<Vec<u8>> {
        match &self.subject {
            Subject::Full { params, .. } => params.serialise(kind),
            Subject::Lora { .. } => None,
        }
    }
}

impl Subject {
    /// As they are in torch.
    fn parameters(&self) -> Vec<Parameter> {
        match self {
            Subject::Lora { params, .. } => {
                let parameters = params.shape.parameters();
                parameters
                    .map(|(range, columns, is_a)| Parameter {
                        range,
                        columns,
                        // As peft's create_loraplus_optimizer: magnitudes learn like B.
                        role: if is_a { Role::Plain } else { Role::B },
                    })
                    .collect()
            }
            Subject::Full { params, .. } => params
                .shape
                .parameters()
                .into_iter()
                .map(|(id, range, columns)| Parameter {
                    range,
                    columns,
                    role: match id {
                        ParamId::Embed => Role::Embedding,
                        id if full::decays(id) => Role::Plain,
                        _ => Role::Undecayed,
                    },
                })
                .collect(),
        }
    }

    fn gradient(&self) -> &Tensor {
        match self {
            Subject::Lora { gradient, .. } => &gradient.flat,
            Subject::Full { gradient, .. } => &gradient.flat,
        }
    }
}

fn parts<'a>(subject: &'a Subject, base: Option<&'a Decoder>) -> (&'a Decoder, Option<&'a Adapter>) {
    match subject {
        Subject::Lora { adapter, .. } => (base.expect("LoRA trains beside a base"), Some(adapter)),
        Subject::Full { decoder, .. } => (decoder, None),
    }
}
