//! POST /v1/completions.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

use crate::common::Strings;
use crate::structured::{ResponseFormat, StructuredOutputs};
use crate::usage::{StreamOptions, Usage};

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "prompt": "Once upon a time", "max_tokens": 32}))]
pub struct CompletionRequest {
    pub model: String,
    pub prompt: CompletionPrompt,
    /// Default 16. 0 only with `echo`: the prompt is scored, nothing is generated.
    #[schema(minimum = 0)]
    pub max_tokens: Option<i64>,
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<i64>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// Log-probability of each token, with this many alternatives.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<i64>,
    /// The prompt comes back in front of the text.
    pub echo: Option<bool>,
    pub stop: Option<Strings>,
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    /// Token id (as a string) to bias, -100 to 100.
    pub logit_bias: Option<BTreeMap<String, f64>>,
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
    /// BOS and the like in front of text prompts (default true).
    pub add_special_tokens: Option<bool>,
    #[schema(minimum = 0, maximum = 20)]
    pub prompt_logprobs: Option<i64>,
    pub return_token_ids: Option<bool>,
    /// As many as `n`.
    pub best_of: Option<i64>,
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
    /// What stands in the prefix cache with another salt is not found, and with this one only by who has it.
    pub cache_salt: Option<String>,
    /// Lower goes first (default 0). Below 0 only where the server says `--scheduling-policy priority`.
    pub priority: Option<i32>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string, an array of strings, an array of token ids, or an array of arrays of token ids"
)]
pub enum CompletionPrompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<i64>),
    ManyTokens(Vec<Vec<i64>>),
}

impl Default for CompletionPrompt {
    fn default() -> CompletionPrompt {
        CompletionPrompt::Text(String::new())
    }
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Completion {
    /// `cmpl-...`
    pub id: String,
    /// `text_completion`
    pub object: &'static str,
    pub created: i64,
    pub model: String,
    /// Base and adapter that answered, by digest.
    pub system_fingerprint: String,
    /// `n` for each prompt: `index = prompt * n + k`.
    pub choices: Vec<CompletionChoice>,
    /// Absent from the chunks of a stream that did not ask for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    pub index: u32,
    pub text: String,
    #[schema(required)]
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null until the last chunk of a stream.
    #[schema(required)]
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<BTreeMap<String, PromptLogprob>>>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// Four lists of one length. With `echo` the prompt's tokens come first, and the very first has no log-probability.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<Option<f32>>,
    /// The most likely tokens and the one that stands there; null when `logprobs` is 0.
    #[schema(required)]
    pub top_logprobs: Option<Vec<Option<TopLogprobs>>>,
    /// Characters of the text before the token.
    pub text_offset: Vec<u64>,
}

/// Token text to log-probability, best first.
#[derive(Clone, Debug, Default, PartialEq, ToSchema)]
#[schema(value_type = BTreeMap<String, f32>)]
pub struct TopLogprobs(pub Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

/// vLLM's shape: one entry per prompt token, null for the first, else token id to what is known of it.
pub type PromptLogprobs = Vec<Option<BTreeMap<String, PromptLogprob>>>;

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct PromptLogprob {
    pub logprob: f32,
    /// 1 is the most likely; null when it is below the alternatives that were asked.
    #[schema(required)]
    pub rank: Option<u32>,
    pub decoded_token: String,
}
