//! Models: the base, and every adapter a request may name.

use serde::Serialize;
use utoipa::ToSchema;

/// OpenAI's model object, with vLLM's and our own additions.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Model {
    pub id: String,
    /// `model`
    pub object: &'static str,
    pub created: i64,
    pub owned_by: String,
    /// What the name stands for: the base's own name, or the adapter's digest.
    pub root: String,
    /// The base model of an adapter.
    #[schema(required)]
    pub parent: Option<String>,
    pub max_model_len: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<u32>,
    /// The job that trained it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fine_tuning_job_id: Option<String>,
    /// The optimizer step, when it is a checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_number: Option<u64>,
    /// Always empty.
    pub permission: Vec<serde_json::Value>,
}
