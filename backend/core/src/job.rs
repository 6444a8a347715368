//! A fine-tuning job as the engine sees it: tokens and numbers. Files' text, names and queues are the router's.

mod objective;
mod optimizer;
pub mod selection;
mod start;
pub mod sweep;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::id::{AdapterRef, JobId};
use crate::replica::ReplicaInfo;
use crate::settings::{Kind, MOST_EPOCHS, setting};

pub use objective::{CpoLoss, DpoLoss, Objective, Rows};
pub use optimizer::Optimizer;
use selection::Selection;

/// The output layer among the modules that an adapter may target: adapted where it is named, and not by `all-linear`, as in PEFT.
pub const LM_HEAD: &str = "lm_head";
/// The embedding among them, likewise.
pub const EMBED_TOKENS: &str = "embed_tokens";
/// What is adapted only where it is named.
pub const TABLES: [&str; 2] = [LM_HEAD, EMBED_TOKENS];
/// Of a run, by epochs and data: far beyond any, and safe to add and multiply.
const MOST_STEPS: u64 = 1 << 48;
/// Of a base's name at most.
const MOST_NAME_BYTES: usize = 4096;

/// File names inside a job's folder. The router writes the datasets, the engine the rest.
pub mod files {
    /// Training examples, [`crate::dataset`] bytes.
    pub const TRAIN: &str = "train.tokens";
    /// Validation examples; absent when there is no validation file.
    pub const VALID: &str = "valid.tokens";
    /// The adapter that the job starts from, where it is not a new one: the two files of its PEFT folder.
    pub const START_CONFIG: &str = "start.adapter_config.json";
    pub const START_TENSORS: &str = "start.adapter_model.safetensors";
    /// What the router writes.
    pub const INPUTS: [&str; 4] = [TRAIN, VALID, START_CONFIG, START_TENSORS];
    /// Step, cursor, moments and adapter of the last checkpoint, with a digest of them; replaced atomically.
    pub const STATE: &str = "state.safetensors";
    /// The state before that one: where a job goes on when the last is damaged or gone.
    pub const EARLIER_STATE: &str = "state.earlier.safetensors";
    /// Prefix of checkpoint PEFT folders: `checkpoint-<step>`.
    pub const CHECKPOINT: &str = "checkpoint-";
    /// The finished PEFT folder.
    pub const ADAPTER: &str = "adapter";
}

/// Train one adapter. If `folder` holds a state of this job, it goes on from there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    pub id: JobId,
    /// Whose it is: jobs of one share the time of one.
    #[serde(default)]
    pub tenant: String,
    pub folder: PathBuf,
    /// For adapter_config.json's `base_model_name_or_path`: see [`base_model`].
    pub base_model: String,
    pub hyper: Hyper,
    pub life: Life,
}

impl JobSpec {
    /// What whoever takes a job in asks, however it came.
    pub fn check(&self, replica: &ReplicaInfo) -> Result<(), String> {
        if self.base_model.len() > MOST_NAME_BYTES {
            let bytes = self.base_model.len();
            return Err(format!(
                "a base's name of {bytes} bytes: at most {MOST_NAME_BYTES} are allowed"
            ));
        }
        self.hyper.check()?;
        self.hyper.fits(replica)
    }
}

/// What peft can find a base by: the name on the hub where the folder lies in the hub's cache
/// (`models--org--name/snapshots/revision`), else the folder. Not the name it is served by, which nobody else knows.
pub fn base_model(folder: &Path) -> String {
    let name = |folder: &Path| Some(folder.file_name()?.to_str()?.to_owned());
    let cached = || {
        let snapshots = folder.parent()?;
        let repository = name(snapshots.parent()?)?;
        let path = repository.strip_prefix("models--")?.replace("--", "/");
        (name(snapshots)? == "snapshots").then_some(path)
    };
    cached().unwrap_or_else(|| folder.display().to_string())
}

/// One stay of a job on a replica. A job that is started again lives in a folder and under keys of its own, so that a
/// replica that slept through the change of hands cannot write into its successor's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Counts the lives of the job. 0: it has only one (`tandem train`).
    pub epoch: u64,
    /// The state to go on from, as the store names it. `None`: the newest that lies beside the job, if there is one.
    pub saved: Option<Saved>,
}

/// A state that the life `epoch` wrote after optimizer step `step`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub epoch: u64,
    pub step: u64,
}

/// Every number of a run, chosen. Names are TRL's and PEFT's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hyper {
    /// Passes over the data, when `max_steps` does not say how long the run is. Of half a pass half the steps, rounded up.
    pub n_epochs: f64,
    /// Optimizer steps of the run, whatever `n_epochs` says.
    pub max_steps: Option<u64>,
    /// Optimizer steps of an epoch at most: the rest of its rows is left out.
    #[serde(default)]
    pub max_steps_per_epoch: Option<u64>,
    /// Examples of one micro-batch.
    pub batch_size: u32,
    /// Micro-batches of one optimizer step.
    pub gradient_accumulation_steps: u32,
    pub learning_rate: f64,
    pub lr_scheduler: Schedule,
    /// Optimizer steps of linear warm-up; `Schedule::Constant` has none.
    pub warmup_steps: u64,
    #[serde(default)]
    pub optimizer: Optimizer,
    pub weight_decay: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    /// Of the learning rate of B over A's (LoRA+, arXiv 2402.12354). `None`: they learn alike.
    #[serde(default)]
    pub loraplus_lr_ratio: Option<f64>,
    /// Of the noise on embeddings in training (NEFTune, arXiv 2310.05914). `None`: there is none.
    #[serde(default)]
    pub neftune_noise_alpha: Option<f64>,
    pub seed: u64,
    /// Tokens of one example at most; longer ones are cut.
    pub max_seq_length: u32,
    /// Several short examples share one row of `max_seq_length`; attention stays within each. (Rows are never padded
    /// here, so packing only changes how many examples a micro-batch holds.)
    pub packing: bool,
    /// Every epoch has a drawn order of its own, else that of the data.
    #[serde(default = "yes")]
    pub shuffle: bool,
    #[serde(default)]
    pub save_strategy: SaveStrategy,
    /// Optimizer steps between checkpoints of [`SaveStrategy::Steps`]; 0: only at the end.
    pub save_steps: u64,
    /// Optimizer steps between validations; 0: at each epoch's end.
    pub eval_steps: u64,
    /// How its models are compared; `None`: they are not.
    #[serde(default)]
    pub selection: Option<Selection>,
    #[serde(default)]
    pub objective: Objective,
    /// The first layers, which [`Method::Full`] leaves as they are.
    #[serde(default)]
    pub frozen_layers: u32,
    pub method: Method,
}

fn yes() -> bool {
    true
}

/// Steps of so many epochs that have `epoch_steps` each, at least one; transformers' rounding.
pub fn steps_of(n_epochs: f64, epoch_steps: u64) -> u64 {
    ((n_epochs * epoch_steps as f64).ceil() as u64).max(1)
}

/// When checkpoints are made, transformers' names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveStrategy {
    #[default]
    Steps,
    /// At each epoch's end.
    Epoch,
    /// After each validation that is the best so far.
    Best,
}

impl SaveStrategy {
    pub fn name(self) -> &'static str {
        match self {
            SaveStrategy::Steps => "steps",
            SaveStrategy::Epoch => "epoch",
            SaveStrategy::Best => "best",
        }
    }
}

impl Hyper {
    /// Whether a run with these numbers means anything. Who trains asks, wherever they come from: what a user may choose
    /// is narrower, and the router's to say.
    pub fn check(&self) -> Result<(), String> {
        let Hyper {
            n_epochs,
            max_steps,
            batch_size,
            gradient_accumulation_steps,
            warmup_steps,
            max_seq_length,
            save_steps,
            eval_steps,
            learning_rate,
            weight_decay,
            adam_beta1,
            adam_beta2,
            adam_epsilon,
            max_grad_norm,
            loraplus_lr_ratio,
            neftune_noise_alpha,
            optimizer,
            selection,
            objective,
            frozen_layers,
            method,
            ..
        } = self;
        objective.check()?;
        optimizer.check()?;
        selection.as_ref().map_or(Ok(()), Selection::check)?;
        if loraplus_lr_ratio.is_some() && *method == Method::Full {
            return Err("loraplus_lr_ratio is of an adapter's B: full training has none".to_owned());
        }
        if *frozen_layers > 0 && *method != Method::Full {
            return Err(
                "freeze_layers is of full training: an adapter leaves every layer as it is".to_owned(),
            );
        }
        if neftune_noise_alpha.is_some() && *objective != Objective::Sft {
            let name = objective.name();
            return Err(format!(
                "neftune_noise_alpha is of supervised training, not of {name}"
            ));
        }
        if objective.has_reference() && *method == Method::Full {
            let name = objective.name();
            return Err(format!(
                "{name} compares with the model as it was, of which full training keeps no copy: train LoRA, or an objective \
                 without a reference (orpo, cpo, simpo)"
            ));
        }
        if let Method::Lora(lora) = method
            && lora.use_dora
            && let Some(table) = TABLES
                .iter()
                .find(|table| lora.target_modules.iter().any(|name| name == *table))
        {
            return Err(format!(
                "use_dora is not of {table}, a table of the vocabulary: leave {table} out of lora_target_modules, or use_dora out"
            ));
        }
        let (r, alpha, dropout) = match method {
            Method::Lora(Lora {
                r, alpha, dropout, ..
            }) => (*r, *alpha, *dropout),
            Method::Full => (1, 1.0, 0.0),
        };
        let asked = |name: &str| match setting(name).map(|setting| setting.kind) {
            Some(Kind::Integer { low, high, .. }) => low.unsigned_abs()..=high.unsigned_abs(),
            _ => unreachable!("{name} is a setting that is an integer"),
        };
        let most_epochs = match max_steps {
            // As many as the steps need.
            Some(_) => MOST_STEPS as f64,
            None => MOST_EPOCHS,
        };
        // NaN is none.
        if !(*n_epochs > 0.0 && *n_epochs <= most_epochs) {
            return Err(format!(
                "n_epochs must be above 0 and at most {most_epochs}, got {n_epochs}"
            ));
        }
        let whole = [
            ("max_steps", max_steps.unwrap_or(1), asked("max_steps")),
            ("batch_size", u64::from(*batch_size), asked("batch_size")),
            (
                "gradient_accumulation_steps",
                u64::from(*gradient_accumulation_steps),
                asked("gradient_accumulation_steps"),
            ),
            (
                "max_seq_length",
                u64::from(*max_seq_length),
                asked("max_seq_length"),
            ),
            ("lora_r", u64::from(r), asked("lora_r")),
            // Chosen as parts of the run, whose length is that of the data.
            ("warmup_steps", *warmup_steps, 0..=MOST_STEPS),
            ("save_steps", *save_steps, 0..=MOST_STEPS),
            ("eval_steps", *eval_steps, 0..=MOST_STEPS),
        ];
        if let Some((name, value, range)) = whole.into_iter().find(|(_, value, range)| !range.contains(value))
        {
            let (low, high) = (range.start(), range.end());
            return Err(format!("{name} must be between {low} and {high}, got {value}"));
        }
        // NaN is in no range.
        let ranges = [
            ("learning_rate", *learning_rate, 0.0..=1e3),
            ("weight_decay", *weight_decay, 0.0..=1e3),
            ("adam_beta1", *adam_beta1, 0.0..=1.0 - f64::EPSILON),
            ("adam_beta2", *adam_beta2, 0.0..=1.0 - f64::EPSILON),
            ("adam_epsilon", *adam_epsilon, f64::MIN_POSITIVE..=1.0),
            ("max_grad_norm", *max_grad_norm, 0.0..=f64::MAX),
            (
                "loraplus_lr_ratio",
                loraplus_lr_ratio.unwrap_or(1.0),
                f64::MIN_POSITIVE..=1e4,
            ),
            (
                "neftune_noise_alpha",
                neftune_noise_alpha.unwrap_or(0.0),
                0.0..=1e4,
            ),
            ("lora_alpha", alpha, f64::MIN_POSITIVE..=1e6),
            ("lora_dropout", dropout, 0.0..=1.0 - f64::EPSILON),
        ];
        match ranges
            .into_iter()
            .find(|(_, value, range)| !range.contains(value))
        {
            None => Ok(()),
            Some((name, value, range)) => Err(format!(
                "{name} must be between {:e} and {:e}, got {value}",
                range.start(),
                range.end()
            )),
        }
    }

    /// Whether this replica can train so.
    pub fn fits(&self, replica: &ReplicaInfo) -> Result<(), String> {
        if self.max_seq_length > replica.max_model_len {
            let (asked, most) = (self.max_seq_length, replica.max_model_len);
            return Err(format!(
                "max_seq_length must be at most {most}, the context length, got {asked}"
            ));
        }
        let Method::Lora(lora) = &self.method else {
            return Err("a replica that serves trains adapters only, not every parameter".to_owned());
        };
        lora.fits_ranks(replica.tensor_parallel_size)?;
        let Lora {
            r, target_modules, ..
        } = lora;
        if *r > replica.max_lora_rank {
            let most = replica.max_lora_rank;
            return Err(format!(
                "lora_r must be at most {most} (--max-lora-rank), got {r}"
            ));
        }
        let known = &replica.lora_targets;
        let is_known = |module: &String| TABLES.contains(&module.as_str()) || known.contains(module);
        match target_modules.iter().find(|module| !is_known(module)) {
            Some(module) => {
                let shown: String = module.chars().take(80).collect();
                Err(format!(
                    "lora_target_modules has {shown:?}, which is none of {}, {}",
                    known.join(", "),
                    TABLES.join(", ")
                ))
            }
            None => {
                let is_known_before = |(i, module)| target_modules[..i].contains(module);
                match target_modules.iter().enumerate().any(is_known_before) {
                    true => Err("lora_target_modules names a module twice".to_owned()),
                    false => Ok(()),
                }
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Method {
    Lora(Lora),
    /// Every parameter, float32. Only `tandem train`: a served base is never changed.
    Full,
}

/// PEFT's LoraConfig, the part that is supported.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lora {
    pub r: u32,
    pub alpha: f64,
    pub dropout: f64,
    /// Module names: of the replica's `lora_targets`, and [`TABLES`].
    pub target_modules: Vec<String>,
    /// Scale alpha / sqrt(r) (arXiv 2312.03732) instead of alpha / r.
    pub use_rslora: bool,
    /// Magnitudes of outputs are learned apart from directions (arXiv 2402.09353).
    #[serde(default)]
    pub use_dora: bool,
}

/// What a job or a learner that trains so many numbers keeps, in bytes at most: its state (the numbers and two moments) and an
/// adapter, all in float32, and what the two files say of their tensors.
pub fn kept_bytes(numbers: u64) -> u64 {
    const HEADERS: u64 = 128 << 10;
    numbers.saturating_mul(4 * (3 + 1)).saturating_add(HEADERS)
}

impl Lora {
    /// The numbers of an adapter at most. `sizes`: [`ReplicaInfo::lora_sizes`](crate::replica::ReplicaInfo::lora_sizes).
    pub fn numbers(&self, sizes: &BTreeMap<String, u64>) -> u64 {
        // A magnitude for each output, of which there are fewer than a rank's numbers.
        let ranks = u64::from(self.r) + u64::from(self.use_dora);
        let sizes = self.target_modules.iter().filter_map(|name| sizes.get(name));
        sizes.fold(0, |sum, size| size.saturating_mul(ranks).saturating_add(sum))
    }

    /// Whether ranks that divide a model train it.
    pub fn fits_ranks(&self, tensor_parallel_size: u32) -> Result<(), String> {
        match self.use_dora && tensor_parallel_size > 1 {
            true => Err(format!(
                "use_dora: its norms are of whole rows, and {tensor_parallel_size} ranks divide them: leave use_dora out, or take \
                 a tensor parallel size of 1"
            )),
            false => Ok(()),
        }
    }

    pub fn scale(&self) -> f64 {
        match self.use_rslora {
            true => self.alpha / f64::from(self.r).sqrt(),
            false => self.alpha / f64::from(self.r),
        }
    }
}

/// Course of the learning rate, transformers' names.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Never warms up.
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine,
    /// Falls from the peak to zero so often.
    CosineWithRestarts {
        num_cycles: f64,
    },
    /// From the peak to `end`, a part of it.
    Polynomial {
        power: f64,
        end: f64,
    },
    /// Inverse to the root of the step, and 1 where the warm-up ends.
    InverseSqrt,
    /// torch's StepLR: times `gamma` every so many steps.
    Step {
        gamma: f64,
        every: u64,
    },
}

/// Of a schedule by `InverseSqrt` that does not warm up.
const INVERSE_SQRT_STEPS: u64 = 10_000;

impl Schedule {
    /// As they are written everywhere.
    pub const NAMES: [&str; 8] = [
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "step",
    ];

    pub fn name(self) -> &'static str {
        let [
            constant,
            constant_with_warmup,
            linear,
            cosine,
            restarts,
            polynomial,
            inverse_sqrt,
            step,
        ] = Schedule::NAMES;
        match self {
            Schedule::Constant => constant,
            Schedule::ConstantWithWarmup => constant_with_warmup,
            Schedule::Linear => linear,
            Schedule::Cosine => cosine,
            Schedule::CosineWithRestarts { .. } => restarts,
            Schedule::Polynomial { .. } => polynomial,
            Schedule::InverseSqrt => inverse_sqrt,
            Schedule::Step { .. } => step,
        }
    }

    /// What else it is made of, by the settings' names. A rate at the end is a part of the peak here.
    pub fn numbers(self) -> Vec<(&'static str, f64)> {
        match self {
            Schedule::Constant
            | Schedule::ConstantWithWarmup
            | Schedule::Linear
            | Schedule::Cosine
            | Schedule::InverseSqrt => vec![],
            Schedule::CosineWithRestarts { num_cycles } => vec![("num_cycles", num_cycles)],
            Schedule::Polynomial { power, end } => vec![("power", power), ("lr_end", end)],
            Schedule::Step { gamma, every: _ } => vec![("gamma", gamma)],
        }
    }

    /// Factor on the learning rate of optimizer step `step` (0-based) out of `total`, as transformers' get_scheduler.
    pub fn factor(self, step: u64, warmup_steps: u64, total: u64) -> f64 {
        if self == Schedule::Constant {
            return 1.0;
        }
        if step < warmup_steps {
            return step as f64 / warmup_steps.max(1) as f64;
        }
        let cosine = |part: f64| (0.5 * (1.0 + (std::f64::consts::PI * part).cos())).max(0.0);
        let progress = (step - warmup_steps) as f64 / total.saturating_sub(warmup_steps).max(1) as f64;
        match self {
            Schedule::Constant | Schedule::ConstantWithWarmup => 1.0,
            Schedule::Linear => (1.0 - progress).max(0.0),
            Schedule::Cosine => cosine(progress),
            Schedule::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            Schedule::CosineWithRestarts { num_cycles } => cosine((num_cycles * progress) % 1.0),
            Schedule::Polynomial { end, .. } if step > total => end,
            Schedule::Polynomial { power, end } => (1.0 - end) * (1.0 - progress).powf(power) + end,
            Schedule::InverseSqrt => {
                let timescale = if warmup_steps > 0 {
                    warmup_steps
                } else {
                    INVERSE_SQRT_STEPS
                };
                let since = (step - warmup_steps + timescale) as f64;
                (timescale as f64 / since).sqrt()
            }
            Schedule::Step { gamma, every } => gamma.powf((step / every.max(1)) as f64),
        }
    }
}

/// What a job tells its supervisor. Ends with `Finished`, `Failed`, `Damaged`, `Refused` or `Cancelled`; a channel that closes
/// without one of them means that the replica went or stopped: the job goes on elsewhere from its last state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum JobEvent {
    Started {
        total_steps: u64,
        /// The step of the state it goes on from.
        resumed_from: Option<u64>,
        /// What of the job's folder was damaged, and what is done without it.
        #[serde(default)]
        notes: Vec<String>,
        examples: u64,
        /// Tokens of one epoch, and those of them with loss.
        epoch_tokens: u64,
        epoch_label_tokens: u64,
        trainable_parameters: u64,
    },
    Step(StepReport),
    Validated {
        step: u64,
        loss: f64,
        token_accuracy: f64,
        /// As [`StepReport::metrics`].
        #[serde(default)]
        metrics: BTreeMap<String, f64>,
    },
    /// The adapter after `step` is on disk and resident.
    Checkpoint {
        step: u64,
        adapter: AdapterRef,
        /// The step of the best checkpoint so far, where models are compared.
        #[serde(default)]
        best: Option<u64>,
    },
    /// The run ends before its last step: so many validations in a row were not better.
    StoppedEarly {
        step: u64,
        waited: u32,
    },
    /// The model after `step`, which is the best by its validation, becomes the result.
    BestLoaded {
        step: u64,
        metric: String,
        value: f64,
    },
    /// There is no room on the disk for what the job is to keep. It is written as soon as there is, and told then.
    NoRoom {
        message: String,
    },
    Finished {
        adapter: AdapterRef,
        trained_tokens: u64,
    },
    Failed {
        message: String,
    },
    /// The examples in the job's folder are not those that were written: they must be prepared again.
    Damaged {
        message: String,
    },
    /// The replica stops, or the job pauses. The state after `step` is written: it goes on from there some other time.
    Kept {
        step: u64,
    },
    /// The job was not begun, because the replica trains as many as it may, or has no room for it: later, or elsewhere.
    Refused {
        message: String,
    },
    Cancelled {
        step: u64,
    },
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// 1-based.
    pub step: u64,
    pub epoch: f64,
    /// Mean over the step's label tokens, in nats; of preferences, over its rows.
    pub loss: f64,
    pub token_accuracy: f64,
    /// What else the objective reports, under TRL's names: `rewards/chosen`, `rewards/margins`, ...
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// Before clipping.
    pub grad_norm: f64,
    pub learning_rate: f64,
    /// Tokens since the job began, over all its lives.
    pub trained_tokens: u64,
    pub tokens_per_second: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_those_of_transformers() {
        // Factors at steps 0, 1, 2, 6, 10 of 10, with 2 of warm-up.
        let cases = [
            (Schedule::Constant, [1.0, 1.0, 1.0, 1.0, 1.0]),
            (Schedule::ConstantWithWarmup, [0.0, 0.5, 1.0, 1.0, 1.0]),
            (Schedule::Linear, [0.0, 0.5, 1.0, 0.5, 0.0]),
            (Schedule::Cosine, [0.0, 0.5, 1.0, 0.5, 0.0]),
        ];
        for (schedule, expected) in cases {
            for (step, expected) in [0, 1, 2, 6, 10].into_iter().zip(expected) {
                let factor = schedule.factor(step, 2, 10);
                assert!(
                    (factor - expected).abs() < 1e-12,
                    "{schedule:?} at {step}: {factor}"
                );
            }
            let name = serde_json::to_value(schedule).expect("an enum of words");
            assert_eq!(name, schedule.name());
        }
        // By get_scheduler of transformers 5.23 with 2 of 10 steps to warm up, and torch's StepLR, at steps 0 to 9.
        let restarts = Schedule::CosineWithRestarts { num_cycles: 2.0 };
        let polynomial = Schedule::Polynomial { power: 2.0, end: 0.1 };
        let falls = Schedule::Step {
            gamma: 0.85,
            every: 3,
        };
        #[rustfmt::skip]
        let cases = [
            (restarts, 2, [0.0, 0.5, 1.0, 0.853553391, 0.5, 0.146446609, 1.0, 0.853553391, 0.5, 0.146446609]),
            (polynomial, 2, [0.0, 0.5, 1.0, 0.7890625, 0.60625, 0.4515625, 0.325, 0.2265625, 0.15625, 0.1140625]),
            (Schedule::InverseSqrt, 2, [0.0, 0.5, 1.0, 0.816496581, std::f64::consts::FRAC_1_SQRT_2, 0.632455532, 0.577350269, 0.534522484, 0.5, 0.471404521]),
            (Schedule::InverseSqrt, 0, [1.0, 0.999950004, 0.999900015, 0.999850034, 0.99980006, 0.999750094, 0.999700135, 0.999650184, 0.99960024, 0.999550304]),
            (falls, 0, [1.0, 1.0, 1.0, 0.85, 0.85, 0.85, 0.7225, 0.7225, 0.7225, 0.614125]),
        ];
        for (schedule, warmup_steps, expected) in cases {
            for (step, expected) in (0..).zip(expected) {
                let factor = schedule.factor(step, warmup_steps, 10);
                assert!(
                    (factor - expected).abs() < 1e-8,
                    "{schedule:?} at {step}: {factor}"
                );
            }
            assert!(Schedule::NAMES.contains(&schedule.name()));
        }
    }

    fn hyper(lora: Lora) -> Hyper {
        Hyper {
            n_epochs: 1.0,
            max_steps: None,
            max_steps_per_epoch: None,
            batch_size: 1,
            gradient_accumulation_steps: 1,
            learning_rate: 1e-4,
            lr_scheduler: Schedule::Linear,
            warmup_steps: 0,
            optimizer: Optimizer::AdamW,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            loraplus_lr_ratio: None,
            neftune_noise_alpha: None,
            seed: 0,
            max_seq_length: 64,
            packing: false,
            shuffle: true,
            save_strategy: SaveStrategy::Steps,
            save_steps: 0,
            eval_steps: 0,
            selection: None,
            objective: Objective::default(),
            frozen_layers: 0,
            method: Method::Lora(lora),
        }
    }

    #[test]
    fn numbers_that_mean_no_run_are_refused_by_name() {
        let lora = || Lora {
            r: 4,
            alpha: 8.0,
            dropout: 0.1,
            target_modules: vec![],
            use_rslora: false,
            use_dora: false,
        };
        let base = || hyper(lora());
        assert_eq!(base().check(), Ok(()));
        let cases = [
            (
                "n_epochs",
                Hyper {
                    n_epochs: 0.0,
                    ..base()
                },
            ),
            (
                "batch_size",
                Hyper {
                    batch_size: 0,
                    ..base()
                },
            ),
            (
                "learning_rate",
                Hyper {
                    learning_rate: f64::NAN,
                    ..base()
                },
            ),
            (
                "learning_rate",
                Hyper {
                    learning_rate: -1.0,
                    ..base()
                },
            ),
            (
                "weight_decay",
                Hyper {
                    weight_decay: f64::INFINITY,
                    ..base()
                },
            ),
            (
                "adam_beta2",
                Hyper {
                    adam_beta2: 1.0,
                    ..base()
                },
            ),
            (
                "adam_epsilon",
                Hyper {
                    adam_epsilon: 0.0,
                    ..base()
                },
            ),
            (
                "max_grad_norm",
                Hyper {
                    max_grad_norm: -1.0,
                    ..base()
                },
            ),
            (
                "loraplus_lr_ratio",
                Hyper {
                    loraplus_lr_ratio: Some(0.0),
                    ..base()
                },
            ),
            (
                "neftune_noise_alpha",
                Hyper {
                    neftune_noise_alpha: Some(f64::NAN),
                    ..base()
                },
            ),
            ("lora_r", hyper(Lora { r: 0, ..lora() })),
            ("lora_alpha", hyper(Lora { alpha: 0.0, ..lora() })),
            // Infinite as a float32, which is what multiplies.
            (
                "lora_alpha",
                hyper(Lora {
                    alpha: 1e39,
                    ..lora()
                }),
            ),
            (
                "lora_dropout",
                hyper(Lora {
                    dropout: 1.0,
                    ..lora()
                }),
            ),
        ];
        for (name, hyper) in cases {
            let why = hyper.check().unwrap_err();
            assert!(why.starts_with(name), "{why}");
        }
    }

    #[test]
    fn a_base_is_named_so_that_others_find_it() {
        for (folder, expected) in [
            (
                "/cache/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de3",
                "meta-llama/Llama-3.2-1B",
            ),
            ("/cache/hub/models--gpt2/snapshots/607a30d", "gpt2"),
            ("/srv/models/story", "/srv/models/story"),
            ("/srv/models--a--b/other/story", "/srv/models--a--b/other/story"),
            ("/story", "/story"),
        ] {
            assert_eq!(base_model(Path::new(folder)), expected);
        }
    }
}
