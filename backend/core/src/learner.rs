//! A model that a client trains call by call: what an engine is asked, and what it answers. Tokens and numbers only.
//! Not here: sessions, names and the order of calls (router), the arithmetic (backend).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::TokenId;
use crate::id::{AdapterDigest, AdapterRef};
use crate::job::Lora;
use crate::message::Fault;
use crate::replica::ReplicaInfo;
use crate::trace::TraceContext;

/// One learner of a replica. Unique for the life of the router that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LearnerId(pub u64);

/// Learners of a replica at most.
pub const MAX_LEARNERS: usize = 256;

/// Where an answer goes. Dropped when the replica is lost.
pub type Reply<T> = oneshot::Sender<Result<T, Fault>>;

/// What is asked of a learner. An engine does it in the order it comes.
pub enum Learn {
    Create(Box<NewLearner>, Reply<()>),
    /// Add gradients to those since the last step, or only score.
    Accumulate(Box<Batch>, Reply<Scores>),
    /// Use the gradients, and begin again with none.
    Step(Adam, Reply<Stepped>),
    /// Begin again with no gradients.
    Clear(Reply<()>),
    /// The numbers as they are now, to sample from: resident until `Command::UnloadAdapter`, in no file.
    Snapshot(Reply<AdapterDigest>),
    /// The same in files.
    Save(Save, Reply<Saved>),
    /// Take on numbers of the same shape.
    Load(Source, Reply<()>),
    Drop,
}

impl Learn {
    /// Says why it is not done.
    pub fn refuse(self, fault: Fault) {
        // Whoever asked may be gone.
        match self {
            Learn::Create(_, reply) | Learn::Load(_, reply) | Learn::Clear(reply) => {
                drop(reply.send(Err(fault)))
            }
            Learn::Accumulate(_, reply) => drop(reply.send(Err(fault))),
            Learn::Step(_, reply) => drop(reply.send(Err(fault))),
            Learn::Snapshot(reply) => drop(reply.send(Err(fault))),
            Learn::Save(_, reply) => drop(reply.send(Err(fault))),
            Learn::Drop => {}
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewLearner {
    pub lora: Lora,
    /// Of the first numbers.
    pub seed: u64,
    /// Whose it is: tenants share the time.
    #[serde(default)]
    pub tenant: String,
    /// The numbers to begin with instead.
    pub from: Option<Source>,
}

impl NewLearner {
    /// What whoever takes one in asks, however it came.
    pub fn check(&self, replica: &ReplicaInfo) -> Result<(), String> {
        let (rank, most) = (self.lora.r, replica.max_lora_rank);
        if !(1..=most).contains(&rank) {
            return Err(format!("a rank must be between 1 and {most}, got {rank}"));
        }
        let alpha = self.lora.alpha;
        if !(alpha as f32).is_finite() {
            return Err(format!("alpha must be a number that float32 holds, got {alpha}"));
        }
        Ok(())
    }
}

/// Numbers that were kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Source {
    /// A state that [`Learn::Save`] wrote.
    State { file: PathBuf, moments: Moments },
    /// A PEFT folder, which has no moments: the optimizer is a new one.
    Adapter(AdapterRef),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Moments {
    /// As they were, with the number of steps.
    Restored,
    /// As of a new optimizer.
    Fresh,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Save {
    /// Empty, and the caller's to remove when this fails.
    pub folder: PathBuf,
    pub what: Saving,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Saving {
    /// A state to go on from.
    State,
    /// A PEFT folder, for adapter_config.json's `base_model_name_or_path`: [`crate::job::base_model`].
    Adapter { base_model: String },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// Of a PEFT folder.
    pub adapter: Option<AdapterRef>,
}

/// Name of the state's file in the folder of a [`Saving::State`], and of the PEFT folder in that of a [`Saving::Adapter`].
pub const STATE: &str = "state.safetensors";
pub const ADAPTER: &str = "adapter";

/// What one call learns from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    pub loss: Loss,
    pub data: Vec<Datum>,
    pub pass: Pass,
    /// Of the call, where it is traced.
    #[serde(skip)]
    pub trace: Option<TraceContext>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pass {
    Forward,
    ForwardBackward,
}

/// A sequence, and what is predicted after each of its tokens. Row i of `targets` follows `tokens[..=i]`: who made them has
/// shifted. Checked by [`Batch::check`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Datum {
    pub tokens: Vec<TokenId>,
    /// Targets of each token: a `[tokens, columns]` matrix by rows.
    pub columns: usize,
    pub targets: Vec<TokenId>,
    /// Of each target; empty: 1.
    pub weights: Vec<f32>,
    /// Of each token, where the loss is one of policy gradients: log-probabilities under who sampled, and advantages.
    pub sampled: Vec<f32>,
    pub advantages: Vec<f32>,
    /// Tokens that count in a sequence's ratio (GSPO); empty: all.
    pub ratio_mask: Vec<f32>,
}

/// A loss is a sum over tokens and sequences, never a mean. With p the log-probability of a target, q that under who
/// sampled, A the advantage and r = exp(p - q):
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Loss {
    /// -w p
    CrossEntropy,
    /// -r A
    ImportanceSampling,
    /// -min(r A, clip(r) A) (arXiv 1707.06347)
    Ppo(Clip),
    /// -sg(clip(r)) p A (arXiv 2506.13585)
    Cispo(Clip),
    /// -(p A - beta/2 (p - q)^2) (arXiv 2405.19107)
    Dro { beta: f64 },
    /// PPO's with the ratio of the whole sequence, exp(mean of p - q) (arXiv 2507.18071)
    Gspo(Clip),
}

/// Bounds of a ratio.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Clip {
    pub low: f64,
    pub high: f64,
}

impl Clip {
    pub fn of(self, ratio: f64) -> f64 {
        // Not clamp, which panics where the bounds are crossed.
        ratio.max(self.low).min(self.high)
    }
}

impl Loss {
    /// Names of the wire.
    pub const NAMES: [&str; 6] = [
        "cross_entropy",
        "importance_sampling",
        "ppo",
        "cispo",
        "dro",
        "gspo",
    ];

    pub fn name(self) -> &'static str {
        let [cross_entropy, importance_sampling, ppo, cispo, dro, gspo] = Loss::NAMES;
        match self {
            Loss::CrossEntropy => cross_entropy,
            Loss::ImportanceSampling => importance_sampling,
            Loss::Ppo(_) => ppo,
            Loss::Cispo(_) => cispo,
            Loss::Dro { .. } => dro,
            Loss::Gspo(_) => gspo,
        }
    }

    /// Whether it compares with who sampled.
    pub fn is_of_policy(self) -> bool {
        self != Loss::CrossEntropy
    }
}

impl Batch {
    /// Whether a model with these sizes can be asked this; who takes a batch in does so.
    pub fn check(&self, vocab_size: u32, max_model_len: u32) -> Result<(), Fault> {
        let wrong = |n: usize, why: String| Err(Fault::Refused(format!("datum {n}: {why}")));
        if self.data.is_empty() {
            return Err(Fault::Refused("there is no datum to learn from".to_owned()));
        }
        for (n, datum) in self.data.iter().enumerate() {
            let Datum {
                tokens,
                columns,
                targets,
                weights,
                sampled,
                advantages,
                ratio_mask,
            } = datum;
            let len = tokens.len();
            if len == 0 {
                return wrong(n, "model_input has no token".to_owned());
            }
            if len > max_model_len as usize {
                let why = format!("model_input has {len} tokens, the model takes {max_model_len}");
                return wrong(n, why);
            }
            if *columns == 0 || targets.len() != len * columns {
                let why = format!(
                    "target_tokens has {} numbers; for {len} tokens of model_input it must have as many, or a whole multiple",
                    targets.len()
                );
                return wrong(n, why);
            }
            let known = tokens.iter().chain(targets).find(|&&token| token >= vocab_size);
            if let Some(token) = known {
                return wrong(
                    n,
                    format!("token {token} is not in the vocabulary of {vocab_size}"),
                );
            }
            if self.loss.is_of_policy() && *columns != 1 {
                let why = format!(
                    "{} takes one target for each token, got {columns}",
                    self.loss.name()
                );
                return wrong(n, why);
            }
            let of_tokens = if self.loss.is_of_policy() { len } else { 0 };
            let lengths = [
                ("weights", weights.len(), targets.len(), true),
                ("logprobs", sampled.len(), of_tokens, false),
                ("advantages", advantages.len(), of_tokens, false),
                ("sequence_ratio_mask", ratio_mask.len(), of_tokens, true),
            ];
            for (name, got, wanted, optional) in lengths {
                if got != wanted && !(optional && got == 0) {
                    return wrong(n, format!("{name} must have {wanted} numbers, got {got}"));
                }
            }
            for (name, numbers) in [
                ("weights", weights),
                ("logprobs", sampled),
                ("advantages", advantages),
                ("sequence_ratio_mask", ratio_mask),
            ] {
                if let Some(number) = numbers.iter().find(|number| !number.is_finite()) {
                    return wrong(n, format!("{name} has {number}"));
                }
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// The loss.
    pub loss: f64,
    /// Of each datum, shaped as its targets.
    pub logprobs: Vec<Vec<f32>>,
}

/// One step of AdamW, in torch's meaning.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adam {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// Of the global norm; 0: no clipping.
    pub grad_clip_norm: f64,
}

impl Adam {
    pub fn check(&self) -> Result<(), Fault> {
        // NaN is in no range.
        let ranges = [
            ("learning_rate", self.learning_rate, 0.0..=1e3),
            ("beta1", self.beta1, 0.0..=1.0 - f64::EPSILON),
            ("beta2", self.beta2, 0.0..=1.0 - f64::EPSILON),
            ("eps", self.epsilon, 0.0..=f64::from(f32::MAX)),
            ("weight_decay", self.weight_decay, 0.0..=1e3),
            ("grad_clip_norm", self.grad_clip_norm, 0.0..=f64::MAX),
        ];
        match ranges
            .into_iter()
            .find(|(_, value, range)| !range.contains(value))
        {
            None => Ok(()),
            Some((name, value, range)) => Err(Fault::Refused(format!(
                "{name} must be between {:e} and {:e}, got {value}",
                range.start(),
                range.end()
            ))),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stepped {
    /// Steps done.
    pub step: u64,
    /// Before clipping.
    pub grad_norm: f64,
}
