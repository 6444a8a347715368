//! The fine-tuning API of 2021 to 2023: /v1/fine-tunes, spelt /v1/fine_tunes by some.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::common::{FileIds, Unknown, plain_or_null};
use crate::files::File;
use crate::fine_tuning::TrainingSettings;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "training_file": "file-abc123"}))]
pub struct CreateFineTune {
    pub training_file: FileIds,
    pub validation_file: Option<FileIds>,
    /// Default: the base model that is served.
    pub model: Option<String>,
    /// 1 to 40 characters of the made model's name; spaces become hyphens.
    pub suffix: Option<String>,
    // As in `fine_tuning::CreateJob`.
    #[serde(flatten)]
    #[schema(value_type = TrainingSettings)]
    pub settings: Unknown,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FineTune {
    /// `ft-...`
    pub id: String,
    /// `fine-tune`
    pub object: &'static str,
    pub created_at: i64,
    pub updated_at: i64,
    pub model: String,
    #[schema(required)]
    pub fine_tuned_model: Option<String>,
    pub organization_id: String,
    /// `pending`, `running`, `succeeded`, `cancelled` or `failed`
    pub status: &'static str,
    pub hyperparams: HyperParams,
    pub training_files: Vec<File>,
    pub validation_files: Vec<File>,
    pub result_files: Vec<File>,
    /// Not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<Vec<FineTuneEvent>>,
}

/// Null until chosen.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HyperParams {
    #[schema(required)]
    #[serde(serialize_with = "plain_or_null")]
    pub n_epochs: Option<f64>,
    #[schema(required)]
    pub batch_size: Option<u32>,
    #[schema(required)]
    pub learning_rate_multiplier: Option<f64>,
    pub prompt_loss_weight: f64,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FineTuneEvent {
    /// `fine-tune-event`
    pub object: &'static str,
    pub created_at: i64,
    /// `info`, `warn` or `error`
    pub level: &'static str,
    pub message: String,
}
