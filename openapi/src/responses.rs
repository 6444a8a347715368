//! /v1/responses, as OpenAI's API spells it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::chat::TokenLogprob;
use crate::common::Strings;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "input": "Hello!", "max_output_tokens": 64}))]
pub struct ResponsesRequest {
    pub model: String,
    pub input: ResponsesInput,
    /// A word before the input, of the role system. It does not go over to the next response.
    pub instructions: Option<String>,
    /// Goes on with that response: its input and output stand before this input.
    pub previous_response_id: Option<String>,
    /// Whether the response is kept, so that it can be named later (default true, `--response-store-bytes` and
    /// `--response-store-days` say how many and how long).
    pub store: Option<bool>,
    /// Tokens to generate at most; without it, all that fits the context.
    #[schema(minimum = 1)]
    pub max_output_tokens: Option<i64>,
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub stream: Option<bool>,
    /// Functions that the model may call; the model's chat template must know tools. Other tools are refused.
    pub tools: Option<Vec<ResponsesTool>>,
    /// `auto` (default), `none`, `required`, or the function to call
    pub tool_choice: Option<ResponsesToolChoice>,
    pub parallel_tool_calls: Option<bool>,
    pub text: Option<ResponsesText>,
    pub reasoning: Option<ResponsesReasoning>,
    /// `message.output_text.logprobs` adds log-probabilities; the others that OpenAI has add what no answer here has.
    pub include: Option<Vec<String>>,
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<i64>,
    pub metadata: Option<BTreeMap<String, String>>,
    /// Only `disabled`: what does not fit the context is refused.
    pub truncation: Option<String>,
    /// Only false.
    pub background: Option<bool>,
    /// For the sender's own books, as the next two.
    pub user: Option<String>,
    pub safety_identifier: Option<String>,
    pub prompt_cache_key: Option<String>,
    /// Not OpenAI's: as in chat, as those below.
    pub stop: Option<Strings>,
    pub top_k: Option<i64>,
    pub seed: Option<i64>,
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// What of a request the prompt is made of.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "input": "Hello!"}))]
pub struct InputTokensRequest {
    pub model: String,
    pub input: ResponsesInput,
    pub instructions: Option<String>,
    pub previous_response_id: Option<String>,
    pub tools: Option<Vec<ResponsesTool>>,
    pub tool_choice: Option<ResponsesToolChoice>,
    pub parallel_tool_calls: Option<bool>,
    pub text: Option<ResponsesText>,
    pub reasoning: Option<ResponsesReasoning>,
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct InputTokens {
    /// `response.input_tokens`
    pub object: &'static str,
    pub input_tokens: usize,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of input items")]
pub enum ResponsesInput {
    Text(String),
    Items(Vec<InputItem>),
}

/// Of the types `message` (which it is without a type), `function_call`, `function_call_output` and `reasoning`; the others
/// are refused.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct InputItem {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// As an earlier response named it; a new item gets a new one.
    pub id: Option<String>,
    /// Of a message: `user`, `assistant`, `system` or `developer`
    pub role: Option<String>,
    /// Of a message, or of reasoning
    pub content: Option<ItemContent>,
    /// Of a call, and of its output
    pub call_id: Option<String>,
    pub name: Option<String>,
    /// Of a call: a text of JSON
    pub arguments: Option<String>,
    /// Of a call's output
    pub output: Option<ItemContent>,
    /// Of reasoning
    pub summary: Option<Vec<ItemPart>>,
    /// Nothing here encrypts: the reasoning's text is its content.
    pub encrypted_content: Option<String>,
    /// As an earlier response said it.
    pub status: Option<String>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of content parts")]
pub enum ItemContent {
    Text(String),
    Parts(Vec<ItemPart>),
}

/// Of a type with text: `input_text`, `output_text`, `refusal`, `reasoning_text`, `summary_text`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ItemPart {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
    pub refusal: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ResponsesTool {
    /// Only `function` is built.
    #[serde(rename = "type")]
    pub kind: String,
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// A JSON Schema of an object
    #[schema(value_type = Option<BTreeMap<String, Value>>)]
    pub parameters: Option<Map<String, Value>>,
    pub strict: Option<bool>,
}

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected \"none\", \"auto\", \"required\" or an object that names a function"
)]
pub enum ResponsesToolChoice {
    Mode(String),
    Named(ResponsesNamedChoice),
}

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ResponsesNamedChoice {
    /// `function` or `allowed_tools`
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Of `allowed_tools`: `auto` or `required`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<ResponsesNamedTool>>,
}

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ResponsesNamedTool {
    /// `function`
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
pub struct ResponsesText {
    pub format: Option<ResponsesFormat>,
}

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ResponsesFormat {
    /// `text`, `json_object` or `json_schema`
    #[serde(rename = "type")]
    pub kind: String,
    /// Of `json_schema`, for the sender's own books, as the description
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Every answer is bound to it, `strict` or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
pub struct ResponsesReasoning {
    /// `none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`: for chat templates that read it
    pub effort: Option<String>,
    /// Only `auto`: what there is of summaries, which is nothing. The reasoning itself is in the output.
    pub summary: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ResponsesResponse {
    /// `resp_...`
    pub id: String,
    /// `response`
    pub object: &'static str,
    pub created_at: i64,
    #[schema(required)]
    pub completed_at: Option<i64>,
    /// `in_progress`, `completed`, `incomplete` or `failed`
    pub status: &'static str,
    pub background: bool,
    #[schema(required)]
    pub error: Option<ResponsesFailure>,
    #[schema(required)]
    pub incomplete_details: Option<IncompleteDetails>,
    #[schema(required)]
    pub instructions: Option<String>,
    #[schema(required)]
    pub max_output_tokens: Option<i64>,
    pub model: String,
    pub output: Vec<OutputItem>,
    pub parallel_tool_calls: bool,
    #[schema(required)]
    pub previous_response_id: Option<String>,
    pub reasoning: ResponsesReasoning,
    /// `default`
    pub service_tier: &'static str,
    /// Whether it can be named later.
    pub store: bool,
    /// Null: the model's own, as for `top_p`.
    #[schema(required)]
    pub temperature: Option<f64>,
    #[schema(required)]
    pub top_p: Option<f64>,
    pub text: ResponsesText,
    pub tool_choice: ResponsesToolChoice,
    pub tools: Vec<ResponsesTool>,
    pub top_logprobs: i64,
    /// `disabled`
    pub truncation: &'static str,
    /// Null until it has ended.
    #[schema(required)]
    pub usage: Option<ResponsesUsage>,
    #[schema(required)]
    pub user: Option<String>,
    #[schema(required)]
    pub safety_identifier: Option<String>,
    #[schema(required)]
    pub prompt_cache_key: Option<String>,
    pub metadata: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ResponsesFailure {
    /// `server_error`
    pub code: &'static str,
    pub message: String,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct IncompleteDetails {
    /// `max_output_tokens`
    pub reason: &'static str,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    /// What the model thought before it answered.
    Reasoning {
        id: String,
        /// Always empty: nothing here makes summaries.
        summary: Vec<Value>,
        content: Vec<OutputPart>,
        /// Always null.
        #[schema(required)]
        encrypted_content: Option<String>,
        status: &'static str,
    },
    Message {
        id: String,
        /// `assistant`
        role: &'static str,
        content: Vec<OutputPart>,
        status: &'static str,
    },
    FunctionCall {
        id: String,
        /// What the output names.
        call_id: String,
        name: String,
        /// JSON, as the model wrote it. Only where a call is bound is it certain to be valid.
        arguments: String,
        status: &'static str,
    },
}

impl OutputItem {
    /// As it begins.
    pub fn without_content(mut self) -> OutputItem {
        match &mut self {
            OutputItem::Reasoning { content, .. } | OutputItem::Message { content, .. } => content.clear(),
            OutputItem::FunctionCall { .. } => {}
        }
        self
    }
}

#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputPart {
    OutputText {
        text: String,
        /// Always empty.
        annotations: Vec<Value>,
        /// Empty unless `include` asked for them.
        logprobs: Vec<TokenLogprob>,
    },
    ReasoningText {
        text: String,
    },
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct ResponsesUsage {
    pub input_tokens: u64,
    pub input_tokens_details: InputTokensDetails,
    pub output_tokens: u64,
    pub output_tokens_details: OutputTokensDetails,
    pub total_tokens: u64,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct InputTokensDetails {
    /// Tokens whose keys and values were found in the prefix cache.
    pub cached_tokens: u64,
    /// Always 0: what is kept in the cache costs nothing.
    pub cache_write_tokens: u64,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct OutputTokensDetails {
    /// Tokens between the marks of reasoning; the marks' own are not counted.
    pub reasoning_tokens: u64,
}

/// An item of a kept response's input, as its client sent it, with an id.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(value_type = BTreeMap<String, Value>)]
#[serde(transparent)]
pub struct KeptItem(pub Value);
