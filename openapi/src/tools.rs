//! Tools of a chat: functions that a request offers, and the model's calls of them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Tool {
    /// Only `function` is built.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// The chat template gets it as it is written, but for `strict`.
    #[schema(value_type = Option<OfferedFunction>)]
    pub function: Option<Map<String, Value>>,
}

/// In the document only: the server reads the object as it is.
#[derive(ToSchema)]
#[schema(example = json!({"name": "get_weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}))]
pub struct OfferedFunction {
    /// Letters, digits, `_`, `-` and `.`
    #[schema(pattern = r"^[a-zA-Z0-9_.-]{1,128}$")]
    pub name: String,
    pub description: Option<String>,
    /// A JSON Schema of an object; without it the function has no parameters.
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Value>,
    /// A call of it is bound to the schema also where the model need not call.
    pub strict: Option<bool>,
    /// What the function returns: a JSON Schema, for chat templates that read it.
    #[schema(value_type = Option<Object>)]
    #[schema(rename = "return")]
    pub returns: Option<Value>,
}

/// `none`, `auto` or `required`, or one function, or those among which the model chooses.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected \"none\", \"auto\", \"required\" or an object that names a function"
)]
pub enum ToolChoice {
    Mode(String),
    Named(NamedChoice),
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct NamedChoice {
    /// `function` or `allowed_tools`
    #[serde(rename = "type")]
    pub kind: String,
    pub function: Option<FunctionName>,
    pub allowed_tools: Option<AllowedTools>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct FunctionName {
    pub name: String,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct AllowedTools {
    /// `auto` or `required`
    pub mode: String,
    pub tools: Vec<NamedTool>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct NamedTool {
    /// `function`
    #[serde(rename = "type")]
    pub kind: String,
    pub function: Option<FunctionName>,
}

/// `none`, `auto` or a function's name: the older form of `tool_choice`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected \"none\", \"auto\" or an object with the name of a function"
)]
pub enum FunctionChoice {
    Mode(String),
    Named(FunctionName),
}

/// A call that the model made.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ToolCall {
    /// `call_...`, or nine characters where the model's chat template wants them.
    pub id: String,
    /// `function`
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: FunctionCall,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FunctionCall {
    pub name: String,
    /// JSON, as the model wrote it. Only where a call is bound (`tool_choice` required or a name, `strict`) is it certain to be
    /// valid by the function's schema.
    pub arguments: String,
}

/// A part of a call: the first has id, type and name, those behind it more of the arguments.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ToolCallDelta {
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    pub function: FunctionDelta,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub arguments: String,
}
