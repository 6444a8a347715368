//! What an answer must be: OpenAI's response_format, vLLM's structured_outputs.

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[schema(example = json!({"type": "json_schema", "json_schema": {"name": "person", "schema": {"type": "object"}}}))]
pub struct ResponseFormat {
    /// `text`, `json_object`, `json_schema` or `structural_tag`
    #[serde(rename = "type")]
    pub kind: String,
    /// Of the type `json_schema`.
    pub json_schema: Option<NamedSchema>,
    /// A JSON Schema without a name, of `json_object` or `json_schema`, as llama.cpp takes it.
    pub schema: Option<Value>,
    /// Of the type `structural_tag`: the format, or tags and the texts that begin them.
    #[schema(value_type = Option<std::collections::BTreeMap<String, Value>>)]
    pub format: Option<serde_json::Map<String, Value>>,
    #[schema(value_type = Option<Vec<std::collections::BTreeMap<String, Value>>>)]
    pub structures: Option<Vec<Value>>,
    pub triggers: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct NamedSchema {
    /// For the sender's own books, as the description.
    pub name: Option<String>,
    pub description: Option<String>,
    /// What cannot be honoured is refused, with its place.
    pub schema: Option<Value>,
    /// Every answer is bound to the schema, with and without it.
    pub strict: Option<bool>,
}

/// One of the kinds, and what JSON looks like.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct StructuredOutputs {
    /// A JSON Schema, or its text.
    pub json: Option<Value>,
    /// The whole answer matches.
    pub regex: Option<String>,
    pub choice: Option<Vec<String>>,
    /// Lark (llguidance's dialect) or GBNF (llama.cpp's).
    pub grammar: Option<String>,
    /// Any JSON object.
    pub json_object: Option<bool>,
    /// xgrammar's structural tag, or its text.
    pub structural_tag: Option<Value>,
    /// A regular expression of what may stand between the parts of a JSON text.
    pub whitespace_pattern: Option<String>,
    /// JSON without white space.
    pub disable_any_whitespace: Option<bool>,
    /// There is nothing to fall back to.
    pub disable_fallback: Option<bool>,
}
