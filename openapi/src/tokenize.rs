//! Token ids to text and back, as vLLM and lm-eval spell it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::chat::ChatMessage;
use crate::tools::Tool;

/// Either `prompt` or `messages`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "prompt": "Once upon a time"}))]
pub struct TokenizeRequest {
    pub model: Option<String>,
    pub prompt: Option<String>,
    pub messages: Option<Vec<ChatMessage>>,
    /// Only with `prompt`: BOS and the like (default true).
    pub add_special_tokens: Option<bool>,
    /// Only with `messages` (default true).
    pub add_generation_prompt: Option<bool>,
    /// Only with `messages` (default false).
    pub continue_final_message: Option<bool>,
    /// Only with `messages`: definitions of functions, for chat templates that write them into the prompt.
    pub tools: Option<Vec<Tool>>,
    /// Only with `messages`: for chat templates that read them (retrieval).
    #[schema(value_type = Option<Vec<std::collections::BTreeMap<String, serde_json::Value>>>)]
    pub documents: Option<Vec<serde_json::Map<String, serde_json::Value>>>,
    /// Only with `messages`.
    pub reasoning_effort: Option<String>,
    /// Only with `messages`.
    #[schema(value_type = Option<std::collections::BTreeMap<String, serde_json::Value>>)]
    pub chat_template_kwargs: Option<serde_json::Map<String, serde_json::Value>>,
    pub return_token_strs: Option<bool>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenizeResponse {
    pub count: usize,
    pub max_model_len: u32,
    pub tokens: Vec<u32>,
    #[schema(required)]
    pub token_strs: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "tokens": [3, 4, 5]}))]
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<i64>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DetokenizeResponse {
    pub prompt: String,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenizerInfo {
    #[schema(required)]
    pub bos_token: Option<String>,
    #[schema(required)]
    pub eos_token: Option<String>,
    #[schema(required)]
    pub chat_template: Option<String>,
    pub vocab_size: usize,
}
