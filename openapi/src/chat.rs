//! POST /v1/chat/completions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::common::Strings;
use crate::completions::{PromptLogprob, PromptLogprobs};
use crate::structured::{ResponseFormat, StructuredOutputs};
use crate::tools::{
    FunctionCall, FunctionChoice, FunctionDelta, OfferedFunction, Tool, ToolCall, ToolCallDelta, ToolChoice,
};
use crate::usage::{StreamOptions, Usage};

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}))]
pub struct ChatRequest {
    pub model: String,
    pub messages: Vec<ChatMessage>,
    /// Tokens to generate at most; without it, all that fits the context.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<i64>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = 1)]
    pub max_tokens: Option<i64>,
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<i64>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub stop: Option<Strings>,
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    /// Token id (as a string) to bias, -100 to 100.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    pub logprobs: Option<bool>,
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<i64>,
    /// -1: a random one, as without it.
    pub seed: Option<i64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub min_tokens: Option<i64>,
    pub stop_token_ids: Option<Vec<i64>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    /// `none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`: for chat templates that read it, or that can turn
    /// thinking off.
    pub reasoning_effort: Option<String>,
    /// For chat templates that read them (retrieval).
    #[schema(value_type = Option<Vec<BTreeMap<String, serde_json::Value>>>)]
    pub documents: Option<Vec<serde_json::Map<String, serde_json::Value>>>,
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>)]
    pub chat_template_kwargs: Option<serde_json::Map<String, serde_json::Value>>,
    #[schema(minimum = 0, maximum = 20)]
    pub prompt_logprobs: Option<i64>,
    pub return_token_ids: Option<bool>,
    pub response_format: Option<ResponseFormat>,
    /// What the answer must be, in vLLM's words.
    pub structured_outputs: Option<StructuredOutputs>,
    /// An older name of `structured_outputs.json`; llama.cpp calls it `json_schema`.
    pub guided_json: Option<serde_json::Value>,
    pub guided_regex: Option<String>,
    pub guided_choice: Option<Vec<String>>,
    /// Lark or GBNF; llama.cpp calls it `grammar`.
    pub guided_grammar: Option<String>,
    /// Between the parts of a JSON text.
    pub guided_whitespace_pattern: Option<String>,
    pub json_schema: Option<serde_json::Value>,
    pub grammar: Option<String>,
    /// Functions that the model may call. The model's chat template must know tools.
    pub tools: Option<Vec<Tool>>,
    /// `auto` (default), `none`, `required`, or the function to call. Where the model must call, what it writes is bound to the
    /// functions' schemas.
    pub tool_choice: Option<ToolChoice>,
    /// Whether an answer may hold several calls (default true).
    pub parallel_tool_calls: Option<bool>,
    /// The older form of `tools`; the answer then has `function_call` in place of `tool_calls`.
    #[schema(value_type = Option<Vec<OfferedFunction>>)]
    pub functions: Option<Vec<serde_json::Map<String, serde_json::Value>>>,
    /// The older form of `tool_choice`.
    pub function_call: Option<FunctionChoice>,
    /// false: the model's reasoning is left out of the answer (and with it log-probabilities and token ids, which would show
    /// it).
    pub include_reasoning: Option<bool>,
    /// false: the model's reasoning stays in the content, as the model wrote it.
    pub separate_reasoning: Option<bool>,
    /// Tokens of reasoning at most: when they are used up, the end of reasoning is said for the model. Of models that reason.
    #[schema(minimum = 0)]
    pub thinking_token_budget: Option<i64>,
    /// What stands in the prefix cache with another salt is not found, and with this one only by who has it.
    pub cache_salt: Option<String>,
    /// Lower goes first (default 0). Below 0 only where the server says `--scheduling-policy priority`.
    pub priority: Option<i32>,
    /// Only `text` is built.
    pub modalities: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`, or the older `function`
    pub role: String,
    /// May be null beside `tool_calls` or `reasoning_content`.
    pub content: Option<ChatContent>,
    pub name: Option<String>,
    /// What the assistant thought before it answered; `reasoning` and `thinking` are other names of it.
    pub reasoning_content: Option<String>,
    pub reasoning: Option<String>,
    pub thinking: Option<String>,
    /// What the assistant called in an earlier turn.
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    pub tool_calls: Option<serde_json::Value>,
    /// Of a `tool` message: the call it answers.
    pub tool_call_id: Option<String>,
    /// The older form of `tool_calls`.
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>)]
    pub function_call: Option<serde_json::Value>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of content parts")]
pub enum ChatContent {
    Text(String),
    Parts(Vec<ChatPart>),
}

/// Only `text` parts are understood.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatPart {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// `chatcmpl-...`
    pub id: String,
    /// `chat.completion`
    pub object: &'static str,
    pub created: i64,
    pub model: String,
    /// Base and adapter that answered, by digest.
    pub system_fingerprint: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<BTreeMap<String, PromptLogprob>>>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: u32,
    pub message: AssistantMessage,
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length`, `tool_calls`, or `function_call` where `functions` were sent. A call of the one function that was named
    /// ends with `stop`, as OpenAI's do.
    pub finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// `assistant`
    pub role: &'static str,
    /// Null where there are only calls or reasoning.
    #[schema(required)]
    pub content: Option<String>,
    /// Always null: nothing here refuses.
    #[schema(required)]
    pub refusal: Option<String>,
    /// Always empty.
    pub annotations: Vec<serde_json::Value>,
    /// What the model thought before it answered. It stands here under two names: vLLM's older clients (and DeepSeek's) read
    /// `reasoning_content`, the newer ones `reasoning`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Where `functions` were sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function_call: Option<FunctionCall>,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<TokenLogprob>,
    /// Always null.
    #[schema(required)]
    pub refusal: Option<Vec<TokenLogprob>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TokenLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
    /// Best first; empty unless `top_logprobs` asked for them.
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// One server-sent event of a stream.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChunk {
    pub id: String,
    /// `chat.completion.chunk`
    pub object: &'static str,
    pub created: i64,
    pub model: String,
    pub system_fingerprint: String,
    pub choices: Vec<ChatChunkChoice>,
    /// Only when `stream_options` asked for it; null until the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChunkChoice {
    pub index: u32,
    pub delta: ChatDelta,
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// Null until the choice's last chunk.
    #[schema(required)]
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ChatDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// In the first chunk null where the answer may be calls or begin with reasoning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Option<String>>,
    /// Under two names, as in a whole answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function_call: Option<FunctionDelta>,
}
