//! POST /v1/messages and /v1/messages/count_tokens, as Anthropic's API spells them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "max_tokens": 64, "messages": [{"role": "user", "content": "Hello!"}]}))]
pub struct MessagesRequest {
    pub model: String,
    /// Turns of the user and the assistant. Those of one role that follow each other are one turn; where the last is the
    /// assistant's, the answer goes on with it.
    pub messages: Vec<InputMessage>,
    /// Tokens to generate at most.
    #[schema(minimum = 1)]
    pub max_tokens: i64,
    pub system: Option<TextOrBlocks>,
    pub stop_sequences: Option<Vec<String>>,
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub stream: Option<bool>,
    /// Functions that the model may call. The model's chat template must know tools.
    pub tools: Option<Vec<AnthropicTool>>,
    pub tool_choice: Option<AnthropicToolChoice>,
    pub thinking: Option<Thinking>,
    pub output_config: Option<OutputConfig>,
    /// Not Anthropic's: the same seed draws the same answer.
    pub seed: Option<i64>,
    /// Not Anthropic's: variables of the model's chat template.
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// What of a request the prompt is made of.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "messages": [{"role": "user", "content": "Hello!"}]}))]
pub struct CountTokensRequest {
    pub model: String,
    pub messages: Vec<InputMessage>,
    pub system: Option<TextOrBlocks>,
    pub tools: Option<Vec<AnthropicTool>>,
    pub tool_choice: Option<AnthropicToolChoice>,
    pub thinking: Option<Thinking>,
    pub output_config: Option<OutputConfig>,
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokensCount {
    pub input_tokens: usize,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct InputMessage {
    /// `user` or `assistant`, or `system` for a word in between
    pub role: String,
    pub content: TextOrBlocks,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of content blocks")]
pub enum TextOrBlocks {
    Text(String),
    Blocks(Vec<InputBlock>),
}

/// Of the types `text`, `thinking`, `tool_use` and `tool_result`; the others are refused.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct InputBlock {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
    pub thinking: Option<String>,
    /// Of `thinking`: it is not looked at.
    pub signature: Option<String>,
    /// Of `tool_use`: what the result names.
    pub id: Option<String>,
    pub name: Option<String>,
    /// Of `tool_use`: the arguments.
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub input: Option<Map<String, Value>>,
    /// Of `tool_result`: the call it answers.
    pub tool_use_id: Option<String>,
    /// Of `tool_result`
    pub content: Option<TextOrTexts>,
    /// Of `tool_result`: the text that the model is shown begins with `Error`, for chat templates have no other place for it.
    pub is_error: Option<bool>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of text blocks")]
pub enum TextOrTexts {
    Text(String),
    Blocks(Vec<TextBlock>),
}

/// Only `text` is understood.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct TextBlock {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct AnthropicTool {
    /// `custom`, which it is without it: tools that Anthropic's own servers or models define are refused.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub name: String,
    pub description: Option<String>,
    /// A JSON Schema of an object
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub input_schema: Option<Map<String, Value>>,
    pub strict: Option<bool>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct AnthropicToolChoice {
    /// `auto`, `any`, `tool` or `none`. Where the model must call, what it writes is bound to the tools' schemas.
    #[serde(rename = "type")]
    pub kind: String,
    /// Of `tool`
    pub name: Option<String>,
    pub disable_parallel_tool_use: Option<bool>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Thinking {
    /// `enabled`, `disabled`, or `adaptive`: as the model does by itself
    #[serde(rename = "type")]
    pub kind: String,
    /// Of `enabled`: tokens of thinking at most, fewer than `max_tokens`. When they are used up, the end of thinking is said for the
    /// model.
    #[schema(minimum = 1)]
    pub budget_tokens: Option<i64>,
    /// `omitted`: the answer has no thinking; anything else shows it whole, for nothing here makes summaries.
    pub display: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct OutputConfig {
    /// `low`, `medium`, `high`, `xhigh` or `max`: for chat templates that read it
    pub effort: Option<String>,
    pub format: Option<OutputFormat>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct OutputFormat {
    /// `json_schema`
    #[serde(rename = "type")]
    pub kind: String,
    /// Every answer is bound to it.
    pub schema: Option<Value>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct MessagesResponse {
    /// `msg_...`
    pub id: String,
    /// `message`
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `assistant`
    pub role: &'static str,
    pub model: String,
    pub content: Vec<ContentBlock>,
    /// `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`; null where a stream begins
    #[schema(required)]
    pub stop_reason: Option<&'static str>,
    #[schema(required)]
    pub stop_sequence: Option<String>,
    pub usage: MessagesUsage,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentBlock {
    Text {
        text: String,
    },
    /// What the model thought before it answered.
    Thinking {
        thinking: String,
        /// Always empty: thinking comes back as it is.
        signature: &'static str,
    },
    ToolUse {
        id: String,
        name: String,
        /// The arguments. What is no JSON object (the model was cut short, or wrote something else) stands in it as
        /// `INVALID_JSON`.
        #[schema(value_type = BTreeMap<String, Value>)]
        input: Map<String, Value>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
pub struct MessagesUsage {
    /// Tokens of the prompt that were not found in the prefix cache.
    pub input_tokens: u64,
    /// Always 0: what is kept in the cache costs nothing.
    pub cache_creation_input_tokens: u64,
    /// Those that were found. A stream knows at its end.
    pub cache_read_input_tokens: u64,
    pub output_tokens: u64,
}

/// The body of every error of these routes.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AnthropicError {
    /// `error`
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub error: AnthropicErrorObject,
    pub request_id: String,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AnthropicErrorObject {
    /// `invalid_request_error`, `authentication_error`, `permission_error`, `not_found_error`, `request_too_large`,
    /// `rate_limit_error`, `overloaded_error` or `api_error`
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub message: String,
}
