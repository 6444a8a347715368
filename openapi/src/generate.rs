//! POST /generate, /generate_stream and / as text-generation-inference spells them, and GET /info.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::common::Strings;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"inputs": "Once upon a time", "parameters": {"max_new_tokens": 32}}))]
pub struct GenerateRequest {
    /// The prompt, as it is: no chat template is applied.
    pub inputs: String,
    pub parameters: Option<GenerateParameters>,
    /// Only of POST /: whether the answer comes as a stream.
    pub stream: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct GenerateParameters {
    /// The model or adapter that answers, by a name of GET /v1/models; without it, the base model.
    pub adapter_id: Option<String>,
    /// Only 1.
    pub best_of: Option<i64>,
    /// Without it, and without another field that only a draw needs (`temperature` other than 1, `top_k`, `top_p`,
    /// `typical_p`), the likeliest token is taken.
    pub do_sample: Option<bool>,
    pub temperature: Option<f64>,
    pub top_k: Option<i64>,
    pub top_p: Option<f64>,
    /// Only 1, which is off.
    pub typical_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    pub seed: Option<i64>,
    /// Default 1024, or all that fits the context.
    #[schema(minimum = 1)]
    pub max_new_tokens: Option<i64>,
    /// The text ends with the one that was written.
    pub stop: Option<Strings>,
    /// An older name of `stop`.
    pub stop_sequences: Option<Strings>,
    /// The inputs come back in front of the text.
    pub return_full_text: Option<bool>,
    /// Of the inputs' tokens only the last so many.
    #[schema(minimum = 1)]
    pub truncate: Option<i64>,
    /// Only false.
    pub watermark: Option<bool>,
    /// Tokens, and how it ended.
    pub details: Option<bool>,
    /// With `details`, the prompt's tokens, too. Not of a stream.
    pub decoder_input_details: Option<bool>,
    /// With `details`, so many alternatives of each token.
    #[schema(minimum = 0, maximum = 20)]
    pub top_n_tokens: Option<i64>,
    pub grammar: Option<GenerateGrammar>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct GenerateGrammar {
    /// `json` (the value is a JSON Schema), `json_schema` (an object with the `schema` in it) or `regex`
    #[serde(rename = "type")]
    pub kind: String,
    pub value: Value,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Generated {
    pub generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<GenerateDetails>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GenerateDetails {
    /// `length`, `eos_token` or `stop_sequence`
    pub finish_reason: &'static str,
    pub generated_tokens: u64,
    /// As it was sent.
    #[schema(required)]
    pub seed: Option<i64>,
    pub prefill: Vec<PrefillToken>,
    pub tokens: Vec<GenerateToken>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top_tokens: Vec<Vec<GenerateToken>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PrefillToken {
    pub id: u32,
    pub text: String,
    /// Null for the first.
    #[schema(required)]
    pub logprob: Option<f32>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GenerateToken {
    pub id: u32,
    /// In a stream what it adds to the text, so that the tokens' texts join to it.
    pub text: String,
    pub logprob: f32,
    /// It is no text.
    pub special: bool,
}

/// One event of a stream.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StreamedToken {
    pub index: u64,
    pub token: GenerateToken,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub top_tokens: Vec<GenerateToken>,
    /// All of it, with the last token.
    #[schema(required)]
    pub generated_text: Option<String>,
    /// With the last token.
    #[schema(required)]
    pub details: Option<StreamDetails>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct StreamDetails {
    /// `length`, `eos_token` or `stop_sequence`
    pub finish_reason: &'static str,
    pub generated_tokens: u64,
    #[schema(required)]
    pub seed: Option<i64>,
    pub input_length: u64,
}

/// What is served.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GenerateInfo {
    pub model_id: String,
    /// The digest of its weights.
    pub model_sha: String,
    /// `text-generation`
    pub model_pipeline_tag: &'static str,
    pub max_best_of: u32,
    pub max_stop_sequences: usize,
    pub max_input_tokens: u32,
    pub max_total_tokens: u32,
    pub max_client_batch_size: u32,
    /// `tandem`
    pub router: &'static str,
    pub version: &'static str,
}

/// The body of every error of these routes.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct GenerateError {
    pub error: String,
    /// `validation`, `generation` or `overloaded`
    pub error_type: &'static str,
}
