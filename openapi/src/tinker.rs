//! Tinker (thinkingmachines.ai): the client drives the trainer call by call. As its Python SDK 0.38 sends and reads it; what
//! is protobuf there is in `proto`. The SDK's own fields that change nothing here (`type`) are listed, so that they are
//! known.

pub mod proto;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

type Metadata = BTreeMap<String, Value>;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"sdk_version": "0.38.0"}))]
pub struct ClientConfigRequest {
    pub sdk_version: Option<String>,
    pub r#type: Option<String>,
}

/// What is left away is as the SDK has it by itself.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ClientConfig {
    pub fwdbwd_max_chunk_len: u32,
    pub fwdbwd_max_chunk_bytes_count: u64,
    pub proto_compress_fwdbwd: bool,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ClientDynamicConfig {}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ServerCapabilities {
    pub supported_models: Vec<SupportedModel>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SupportedModel {
    pub model_name: String,
    pub max_context_length: u32,
    pub trainable: bool,
    pub sampleable: bool,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HealthStatus {
    pub status: &'static str,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"}))]
pub struct CreateSessionRequest {
    pub tags: Option<Vec<String>>,
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub user_metadata: Option<Metadata>,
    pub sdk_version: Option<String>,
    pub project_id: Option<String>,
    pub display_name: Option<String>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CreateSessionResponse {
    pub session_id: String,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"session_id": "tnk-1"}))]
pub struct SessionHeartbeatRequest {
    pub session_id: String,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SessionHeartbeatResponse {}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"reason": {"type": "success"}}))]
pub struct FinishSessionRequest {
    pub reason: Option<FinishReason>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct FinishReason {
    pub r#type: Option<String>,
    pub detail: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SessionIds {
    pub training_run_ids: Vec<String>,
    pub sampler_ids: Vec<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Sessions {
    pub sessions: Vec<String>,
}

/// Ask retrieve_future for what comes of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct UntypedFuture {
    pub request_id: String,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"request_id": "req-1"}))]
pub struct RetrieveFutureRequest {
    pub request_id: String,
    pub allow_metadata_only: Option<bool>,
    pub r#type: Option<String>,
}

/// A future that failed.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FutureFailed {
    pub error: String,
    /// `user` or `server`.
    pub category: &'static str,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"session_id": "tnk-1", "model_seq_id": 0, "base_model": "tandem-demo", "lora_config": {"rank": 8}}))]
pub struct CreateModelRequest {
    pub session_id: String,
    pub model_seq_id: u32,
    pub base_model: String,
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub user_metadata: Option<Metadata>,
    pub lora_config: Option<LoraConfig>,
    pub optimizer_config: Option<OptimizerConfig>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct LoraConfig {
    pub rank: u32,
    pub seed: Option<i64>,
    pub train_unembed: Option<bool>,
    pub train_mlp: Option<bool>,
    pub train_attn: Option<bool>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct OptimizerConfig {
    /// `adamw`
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CreateModelResponse {
    pub model_id: String,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model_id": "tnk-1:train:0"}))]
pub struct GetInfoRequest {
    pub model_id: String,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GetInfoResponse {
    pub model_id: String,
    pub model_data: ModelData,
    pub is_lora: bool,
    pub lora_rank: u32,
    pub model_name: String,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelData {
    #[schema(required)]
    pub arch: Option<String>,
    pub model_name: String,
    pub tokenizer_id: String,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model_id": "tnk-1:train:0", "seq_id": 2, "adam_params": {"learning_rate": 0.0001}}))]
pub struct OptimStepRequest {
    pub model_id: String,
    pub seq_id: u32,
    pub adam_params: Option<AdamParams>,
    /// Of another optimizer: refused.
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub optimizer_params: Option<Metadata>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct AdamParams {
    pub learning_rate: Option<f64>,
    pub beta1: Option<f64>,
    pub beta2: Option<f64>,
    pub eps: Option<f64>,
    pub weight_decay: Option<f64>,
    pub grad_clip_norm: Option<f64>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct OptimStepResponse {
    pub metrics: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model_id": "tnk-1:train:0", "seq_id": 3, "path": "step-1"}))]
pub struct SaveWeightsRequest {
    pub model_id: String,
    pub seq_id: u32,
    pub path: Option<String>,
    pub overwrite: Option<bool>,
    pub ttl_seconds: Option<i64>,
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub user_metadata: Option<Metadata>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SaveWeightsResponse {
    pub path: String,
}

/// With `path` a checkpoint, without it a sampler of this session.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model_id": "tnk-1:train:0", "seq_id": 4, "sampling_session_seq_id": 0}))]
pub struct SaveWeightsForSamplerRequest {
    pub model_id: String,
    pub seq_id: u32,
    pub path: Option<String>,
    pub sampling_session_seq_id: Option<u64>,
    /// `snapshot` or `inflight`.
    pub kind: Option<String>,
    pub overwrite: Option<bool>,
    pub ttl_seconds: Option<i64>,
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub user_metadata: Option<Metadata>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SaveWeightsForSamplerResponse {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling_session_id: Option<String>,
}

/// With `session_id` and `model_seq_id` a new model, with `model_id` and `seq_id` into one that is there.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"session_id": "tnk-1", "model_seq_id": 1, "path": "tinker://tnk-1:train:0/weights/step-1", "optimizer": true}))]
pub struct LoadWeightsRequest {
    pub model_id: Option<String>,
    pub seq_id: Option<u32>,
    pub session_id: Option<String>,
    pub model_seq_id: Option<u32>,
    pub base_model: Option<String>,
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub user_metadata: Option<Metadata>,
    pub path: String,
    pub optimizer: bool,
    pub optimizer_config: Option<OptimizerConfig>,
    pub weights_access_token: Option<String>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LoadWeightsResponse {
    pub path: String,
    pub model_id: String,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"session_id": "tnk-1", "sampling_session_seq_id": 0, "base_model": "tandem-demo"}))]
pub struct CreateSamplingSessionRequest {
    pub session_id: String,
    pub sampling_session_seq_id: u64,
    pub base_model: Option<String>,
    pub model_path: Option<String>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CreateSamplingSessionResponse {
    pub sampling_session_id: String,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Sampler {
    pub sampler_id: String,
    pub base_model: String,
    #[schema(required)]
    pub model_path: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({
    "sampling_session_id": "tnk-1:sample:0", "seq_id": 0, "num_samples": 2,
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3, 4, 5]}]}, "sampling_params": {"max_tokens": 8}
}))]
pub struct SampleRequest {
    pub sampling_session_id: Option<String>,
    pub seq_id: Option<u64>,
    pub base_model: Option<String>,
    pub model_path: Option<String>,
    pub num_samples: Option<u32>,
    pub prompt: ModelInput,
    pub sampling_params: SamplingParams,
    pub prompt_logprobs: Option<bool>,
    pub topk_prompt_logprobs: Option<u32>,
    pub topk_sample_logprobs: Option<u32>,
    pub prompt_logprobs_last_n: Option<u32>,
    /// Not supported.
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub target_prompt_logprobs: Option<Metadata>,
    /// Not supported above 0.
    pub prompt_alt_tokens_k: Option<u32>,
    /// Not supported.
    pub record_stability_info: Option<bool>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ModelInput {
    pub chunks: Vec<InputChunk>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct InputChunk {
    /// `encoded_text`; others are refused.
    pub r#type: String,
    pub tokens: Option<Vec<i64>>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct SamplingParams {
    pub max_tokens: Option<i64>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub temperature: Option<f64>,
    pub top_k: Option<i64>,
    pub top_p: Option<f64>,
    pub r#type: Option<String>,
}

/// Absent: the model's own end. Nothing: not even that.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Stop {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<i64>),
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct SamplePromise {
    pub request_id: String,
    /// One for each sample.
    pub sample_sequence_ids: Vec<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"events": []}))]
pub struct TelemetryRequest {
    #[schema(value_type = Option<Vec<BTreeMap<String, Value>>>)]
    pub events: Option<Vec<Metadata>>,
    pub platform: Option<String>,
    pub sdk_version: Option<String>,
    pub session_id: Option<String>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TelemetryResponse {
    pub status: &'static str,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TrainingRun {
    pub training_run_id: String,
    pub base_model: String,
    pub model_owner: String,
    pub is_lora: bool,
    pub corrupted: bool,
    pub lora_rank: u32,
    /// ISO 8601
    pub last_request_time: String,
    #[schema(required)]
    pub last_checkpoint: Option<Checkpoint>,
    #[schema(required)]
    pub last_sampler_checkpoint: Option<Checkpoint>,
    #[schema(required, value_type = Option<BTreeMap<String, Value>>)]
    pub user_metadata: Option<Metadata>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TrainingRuns {
    pub training_runs: Vec<TrainingRun>,
    pub cursor: Cursor,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Cursor {
    pub offset: u32,
    pub limit: u32,
    pub total_count: u32,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Checkpoint {
    /// `weights/NAME`
    pub checkpoint_id: String,
    /// `training` or `sampler`.
    pub checkpoint_type: &'static str,
    /// ISO 8601
    pub time: String,
    pub tinker_path: String,
    pub size_bytes: u64,
    pub public: bool,
    #[schema(required, value_type = Option<BTreeMap<String, Value>>)]
    pub user_metadata: Option<Metadata>,
    #[schema(required)]
    pub expires_at: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Checkpoints {
    pub checkpoints: Vec<Checkpoint>,
    pub cursor: Cursor,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"ttl_seconds": 86400}))]
pub struct TtlRequest {
    /// From now; null: for ever.
    pub ttl_seconds: Option<i64>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"tinker_path": "tinker://tnk-1:train:0/weights/step-1"}))]
pub struct WeightsInfoRequest {
    pub tinker_path: String,
    pub weights_access_token: Option<String>,
    pub r#type: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct WeightsInfoResponse {
    pub base_model: String,
    pub is_lora: bool,
    pub lora_rank: u32,
    pub train_unembed: bool,
    pub train_mlp: bool,
    pub train_attn: bool,
}

/// A repository of the hub, as far as a tokenizer's download reads it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HubRepository {
    pub id: String,
    #[serde(rename = "modelId")]
    pub model_id: String,
    pub sha: String,
    pub private: bool,
    pub gated: bool,
    pub disabled: bool,
    pub downloads: u32,
    pub likes: u32,
    pub tags: Vec<String>,
    pub siblings: Vec<HubSibling>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HubSibling {
    pub rfilename: String,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct HubFile {
    pub r#type: &'static str,
    pub path: String,
    pub size: u64,
    pub oid: String,
}
