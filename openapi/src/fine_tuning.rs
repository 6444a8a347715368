//! The fine-tuning API of today: /v1/fine_tuning/jobs. Settings that OpenAI's API lacks come back in the job's
//! `hyperparameters`, too. Not here: which settings there are (the server knows their table).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::common::{AutoInteger, AutoNumber, FileIds, Unknown};

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "training_file": "file-abc123", "lora_r": 16}))]
pub struct CreateJob {
    pub model: String,
    /// Of purpose `fine-tune`.
    #[serde(alias = "training_files")]
    pub training_file: FileIds,
    #[serde(alias = "validation_files")]
    pub validation_file: Option<FileIds>,
    /// 1 to 64 characters of the made model's name; spaces become hyphens.
    pub suffix: Option<String>,
    /// At most 16 keys of 64 characters, values of 512.
    pub metadata: Option<BTreeMap<String, String>>,
    #[serde(default, deserialize_with = "method_or_word")]
    pub method: Option<Method>,
    /// The older place of `method.supervised.hyperparameters`.
    #[schema(value_type = Option<TrainingSettings>)]
    pub hyperparameters: Option<Unknown>,
    /// Settings may also stand at the top: clients reach it by `extra_body`.
    #[serde(flatten)]
    #[schema(value_type = TrainingSettings)]
    pub settings: Unknown,
}

/// OpenAI's `supervised` and `dpo`, and the other objectives in the same form. `reinforcement` is not built.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Method {
    /// `supervised`, `dpo`, `kto`, `orpo`, `cpo`, `simpo` or `reward_weighted`
    #[serde(rename = "type")]
    pub kind: String,
    pub supervised: Option<MethodSettings>,
    pub dpo: Option<MethodSettings>,
    pub kto: Option<MethodSettings>,
    pub orpo: Option<MethodSettings>,
    pub cpo: Option<MethodSettings>,
    pub simpo: Option<MethodSettings>,
    pub reward_weighted: Option<MethodSettings>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub unknown: Unknown,
}

/// `tandem train` says with one word what is trained; a job trains LoRA.
fn method_or_word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Method>, D::Error> {
    struct OrWord;
    impl<'de> Visitor<'de> for OrWord {
        type Value = Option<Method>;

        fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
            formatter.write_str("a dictionary with type, such as {\"type\": \"supervised\"}")
        }

        fn visit_unit<E>(self) -> Result<Option<Method>, E> {
            Ok(None)
        }

        fn visit_str<E>(self, word: &str) -> Result<Option<Method>, E> {
            Ok((word != "lora").then(|| Method::of(word.to_owned())))
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<Method>, A::Error> {
            Method::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }
    deserializer.deserialize_any(OrWord)
}

impl Method {
    fn of(kind: String) -> Method {
        Method {
            kind,
            supervised: None,
            dpo: None,
            kto: None,
            orpo: None,
            cpo: None,
            simpo: None,
            reward_weighted: None,
            unknown: Unknown::default(),
        }
    }
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct MethodSettings {
    #[schema(value_type = Option<TrainingSettings>)]
    pub hyperparameters: Option<Unknown>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub unknown: Unknown,
}

/// Settings of a run, each absent, null, `"auto"`, a value or, for a sweep, a list of values. Every other key is refused. (The server writes the
/// properties of this schema from the table by which it reads them.)
#[derive(ToSchema)]
pub struct TrainingSettings {}

/// Every key is present; null where there is no value (yet).
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Job {
    /// `ftjob-...`
    pub id: String,
    /// `fine_tuning.job`
    pub object: &'static str,
    pub created_at: i64,
    #[schema(required)]
    pub finished_at: Option<i64>,
    #[schema(required)]
    pub estimated_finish: Option<i64>,
    pub model: String,
    #[schema(required)]
    pub fine_tuned_model: Option<String>,
    pub organization_id: String,
    pub result_files: Vec<String>,
    /// `validating_files`, `queued`, `running`, `succeeded`, `failed` or `cancelled`
    pub status: &'static str,
    pub training_file: FileIds,
    #[schema(required)]
    pub validation_file: Option<FileIds>,
    #[schema(required)]
    pub trained_tokens: Option<u64>,
    #[schema(required)]
    pub error: Option<JobError>,
    pub seed: u64,
    pub hyperparameters: ChosenHyperparameters,
    pub method: ChosenMethod,
    pub integrations: Vec<serde_json::Value>,
    #[schema(required)]
    pub metadata: Option<BTreeMap<String, String>>,
    #[schema(required)]
    pub user_provided_suffix: Option<String>,
    /// Of a sweep: its trials, as they stood when something was decided last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trials: Vec<Trial>,
    /// Of a trial: the job that is its sweep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sweep: Option<String>,
}

/// A combination of settings, which is a job of its own.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Trial {
    /// From 1.
    pub number: usize,
    /// `ftjob-...`, with events and checkpoints
    pub job: String,
    /// In which it differs from the others.
    #[schema(value_type = BTreeMap<String, serde_json::Value>)]
    pub hyperparameters: serde_json::Map<String, serde_json::Value>,
    /// `queued`, `running`, `stopped` (it lost at a rung), `succeeded`, `failed` or `cancelled`
    pub status: &'static str,
    /// Rungs at which it was compared.
    pub rung: u32,
    pub step: u64,
    #[schema(required)]
    pub total_steps: Option<u64>,
    /// By which it was compared last.
    #[schema(required)]
    pub metric_value: Option<f64>,
    #[schema(required)]
    pub train_loss: Option<f64>,
    #[schema(required)]
    pub valid_loss: Option<f64>,
    /// What it made, usable as `model`.
    #[schema(required)]
    pub fine_tuned_model: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobError {
    pub code: String,
    pub message: String,
    #[schema(required)]
    pub param: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChosenMethod {
    /// `supervised`, `dpo`, `kto`, `orpo`, `cpo`, `simpo` or `reward_weighted`
    #[serde(rename = "type")]
    pub kind: String,
    /// Under the name of its type.
    #[serde(flatten)]
    pub of_type: BTreeMap<String, ChosenMethodSettings>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChosenMethodSettings {
    pub hyperparameters: MethodHyperparameters,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MethodHyperparameters {
    #[serde(flatten)]
    pub common: CommonHyperparameters,
    /// Of the methods that read it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
}

/// OpenAI's three. `auto` until the training file has been read.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CommonHyperparameters {
    pub n_epochs: AutoNumber,
    pub batch_size: AutoInteger,
    pub learning_rate_multiplier: AutoNumber,
}

/// OpenAI's three and, once they are chosen, all numbers of the run.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChosenHyperparameters {
    #[serde(flatten)]
    pub common: CommonHyperparameters,
    #[serde(flatten)]
    pub run: Option<RunHyperparameters>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RunHyperparameters {
    pub learning_rate: f64,
    pub lr_scheduler_type: String,
    #[serde(flatten)]
    pub schedule: RunSchedule,
    pub warmup_steps: u64,
    #[serde(flatten)]
    pub optimizer: RunOptimizer,
    pub weight_decay: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    pub max_grad_norm: f64,
    #[schema(required)]
    pub loraplus_lr_ratio: Option<f64>,
    #[schema(required)]
    pub neftune_noise_alpha: Option<f64>,
    pub max_seq_length: u32,
    pub packing: bool,
    pub prompt_loss_weight: f64,
    #[schema(required)]
    pub max_steps: Option<u64>,
    #[schema(required)]
    pub max_steps_per_epoch: Option<u64>,
    pub gradient_accumulation_steps: u32,
    pub shuffle: bool,
    #[serde(flatten)]
    pub saving: RunSaving,
    #[serde(flatten)]
    pub data: RunData,
    #[serde(flatten)]
    pub objective: RunObjective,
    #[serde(flatten)]
    pub lora: Option<RunLora>,
}

/// When checkpoints are made, which of them stay, and what validations decide.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RunSaving {
    pub save_strategy: String,
    pub save_steps: u64,
    #[schema(required)]
    pub save_total_limit: Option<u32>,
    pub eval_steps: u64,
    pub load_best_model_at_end: bool,
    pub metric_for_best_model: String,
    pub greater_is_better: bool,
    #[schema(required)]
    pub early_stopping_patience: Option<u32>,
    pub early_stopping_threshold: f64,
}

/// What some schedules are made of; null in the others.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct RunSchedule {
    #[schema(required)]
    pub num_cycles: Option<f64>,
    #[schema(required)]
    pub power: Option<f64>,
    #[schema(required)]
    pub lr_end: Option<f64>,
    #[schema(required)]
    pub gamma: Option<f64>,
}

/// What makes a step of a gradient; what others do not have is null.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RunOptimizer {
    pub optim: String,
    #[schema(required)]
    pub momentum: Option<f64>,
    #[schema(required)]
    pub nesterov: Option<bool>,
    #[schema(required)]
    pub scale_parameter: Option<bool>,
}

/// How the rows were read, as it was asked.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RunData {
    pub train_on_input: bool,
    pub packing_strategy: String,
    #[schema(required)]
    pub template: Option<String>,
    #[schema(required)]
    pub column_map: Option<BTreeMap<String, String>>,
    pub dataset_text_field: String,
    #[schema(required)]
    pub dataset_format: Option<String>,
    pub sample_by: String,
    pub split: String,
}

/// What is minimised, and the numbers that it reads.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct RunObjective {
    pub objective: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_type: Option<String>,
    #[serde(flatten)]
    pub numbers: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RunLora {
    pub lora_r: u32,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub lora_target_modules: Vec<String>,
    pub use_rslora: bool,
    pub use_dora: bool,
}

/// What a job of this body would train.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobPreview {
    /// `fine_tuning.preview`
    pub object: &'static str,
    pub model: String,
    /// How the rows lie in the file.
    pub format: String,
    pub statistics: PreviewStatistics,
    pub hyperparameters: ChosenHyperparameters,
    /// The first rows.
    pub data: Vec<PreviewRow>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PreviewStatistics {
    /// false: of the first rows alone.
    pub whole_file: bool,
    pub rows: u64,
    /// Rows with nothing to learn within `max_seq_length`.
    pub dropped: u64,
    /// Rows that are longer than `max_seq_length`.
    pub cut: u64,
    /// Rows whose prompt by itself, as a request sends it, is not token for token what they begin with.
    pub merged: u64,
    pub examples: u64,
    pub tokens: u64,
    pub trained_tokens: u64,
    /// Tokens of the longest row.
    pub longest: u64,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PreviewRow {
    /// One, or of a pair two: the preferred answer is the first.
    pub examples: Vec<PreviewExample>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PreviewExample {
    pub text: String,
    pub tokens: Vec<u32>,
    /// The loss weight of each token; the first is never predicted.
    pub loss_mask: Vec<f32>,
    /// The text, in pieces of one loss weight.
    pub pieces: Vec<PreviewPiece>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PreviewPiece {
    pub text: String,
    /// 0: only read, not learned.
    pub weight: f32,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobEvent {
    /// `ftevent-...`
    pub id: String,
    /// `fine_tuning.job.event`
    pub object: &'static str,
    pub created_at: i64,
    /// `info`, `warn` or `error`
    pub level: &'static str,
    pub message: String,
    /// `message` or `metrics`
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Of a metrics event: step, train_loss, learning_rate, ...
    #[schema(value_type = BTreeMap<String, serde_json::Value>)]
    pub data: serde_json::Value,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Checkpoint {
    /// `ftckpt_...`
    pub id: String,
    /// `fine_tuning.job.checkpoint`
    pub object: &'static str,
    pub created_at: i64,
    /// Usable as `model`.
    pub fine_tuned_model_checkpoint: String,
    pub fine_tuning_job_id: String,
    pub step_number: u64,
    #[schema(value_type = BTreeMap<String, serde_json::Value>)]
    pub metrics: serde_json::Value,
}
