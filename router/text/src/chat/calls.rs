//! Tool calls of earlier turns, as clients write them and as templates read them. What a template reads is asked by example
//! when it is loaded: some index arguments or write them as JSON, some print a text; some raise an error over a content that
//! is null, or over an id that has not nine characters. Not here: calls of the answer (`tools`).

use serde_json::{Map, Value as Json, json};

use super::{Kwargs, Message};
use crate::python;

/// How a template wants the calls of earlier turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CallStyle {
    arguments: Arguments,
    content: NoContent,
    ids: CallIds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arguments {
    /// As transformers' users give them.
    Object,
    /// As OpenAI's clients do: the template prints them.
    Text,
}

/// Of a message that has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoContent {
    Absent,
    Null,
    Empty,
}

/// Which ids of calls a template takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallIds {
    Any,
    /// Mistral's raise an error over any others.
    NineCharacters,
}

impl Default for CallStyle {
    fn default() -> CallStyle {
        CallStyle {
            arguments: Arguments::Object,
            content: NoContent::Absent,
            ids: CallIds::Any,
        }
    }
}

const KEY: &str = "probe-7b61";
const VALUE: &str = "probe-c4f0";
const LONG_ID: &str = "call_0123456789abcdefghijklmn";
const NINE: usize = 9;
const TOOL_CALLS: &str = "tool_calls";
/// The older form, of one call.
const FUNCTION_CALL: &str = "function_call";

impl CallStyle {
    /// `render` is the template. The first style by whose rules it writes a call as it is.
    pub fn asked(render: impl Fn(&[Json], &Kwargs) -> Option<String>) -> Option<CallStyle> {
        let tool = json!({"type": "function", "function": {"name": "probe_tool", "description": "d",
            "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "d"}}, "required": [KEY]}}});
        let tools = Kwargs::from([("tools".to_owned(), json!([tool]))]);
        for ids in [CallIds::Any, CallIds::NineCharacters] {
            // transformers leaves out what is null.
            for content in [NoContent::Absent, NoContent::Null, NoContent::Empty] {
                for arguments in [Arguments::Object, Arguments::Text] {
                    let style = CallStyle {
                        arguments,
                        content,
                        ids,
                    };
                    let messages = style.example();
                    let mut texts = [&Kwargs::new(), &tools]
                        .map(|kwargs| render(&messages, kwargs))
                        .into_iter();
                    if texts.any(|text| text.is_some_and(|text| style.is_shown(&text))) {
                        return Some(style);
                    }
                }
            }
        }
        None
    }

    pub fn ids(self) -> CallIds {
        self.ids
    }

    fn example(self) -> Vec<Json> {
        let arguments = json!({KEY: VALUE});
        let id = self.id(LONG_ID);
        let call = json!([{"type": "function", "id": id, "function": {"name": "probe_tool", "arguments": arguments}}]);
        let mut caller = Map::from_iter([("role".to_owned(), json!("assistant"))]);
        self.write(&mut caller, Some(&call), true);
        vec![
            json!({"role": "user", "content": "x"}),
            Json::Object(caller),
            json!({"role": "tool", "name": "probe_tool", "tool_call_id": id, "content": "y"}),
        ]
    }

    fn is_shown(self, text: &str) -> bool {
        let is_whole = match self.arguments {
            Arguments::Object => {
                [KEY, VALUE].iter().all(|part| text.contains(part)) && !text.contains(&format!("'{KEY}':"))
            }
            Arguments::Text => text.contains(&python::dumped(&json!({KEY: VALUE}))),
        };
        is_whole && text.contains("probe_tool") && !text.contains("None")
    }

    /// Writes what a message says beside its role; `is_silent`: it has no content.
    pub fn write(self, message: &mut Map<String, Json>, calls: Option<&Json>, is_silent: bool) {
        let content = match self.content {
            NoContent::Null => Some(Json::Null),
            NoContent::Absent => None,
            NoContent::Empty => Some(json!("")),
        };
        message.extend(
            content
                .filter(|_| is_silent && calls.is_some())
                .map(|content| ("content".to_owned(), content)),
        );
        let Some(list) = calls.and_then(Json::as_array) else {
            return;
        };
        let call = |call: &Json| {
            let mut call = call.clone();
            if let Some(id) = call.get_mut("id") {
                *id = json!(self.id(id.as_str().unwrap_or_default()));
            }
            if let Some(given) = call
                .get_mut("function")
                .and_then(|function| function.get_mut("arguments"))
            {
                let arguments = match self.arguments {
                    Arguments::Object => arguments_of(given).unwrap_or_default(),
                    Arguments::Text if given.is_string() => return call,
                    Arguments::Text => json!(python::dumped(given)),
                };
                *given = arguments;
            }
            call
        };
        message.insert("tool_calls".to_owned(), list.iter().map(call).collect());
    }

    /// An id that the template takes: of a longer one the end, as vLLM does for Mistral's.
    pub fn id(self, id: &str) -> String {
        match (self.ids, id.char_indices().nth_back(NINE - 1)) {
            (CallIds::NineCharacters, Some((start, _))) => id[start..].to_owned(),
            _ => id.to_owned(),
        }
    }
}

/// A dictionary, or a text of one; nothing is the empty one.
fn arguments_of(given: &Json) -> Result<Json, String> {
    let parsed = match given {
        Json::Null => json!({}),
        Json::String(text) if text.trim().is_empty() => json!({}),
        Json::String(text) => serde_json::from_str(text).map_err(|error| format!(" is not JSON: {error}"))?,
        other => other.clone(),
    };
    match parsed.is_object() {
        true => Ok(parsed),
        false => Err(" must be a JSON object".to_owned()),
    }
}

/// What a message calls, and the field that says it. An error is the field, and how the sentence that begins with it goes on.
pub fn calls_of(
    role: &str,
    tool_calls: Option<Json>,
    function_call: Option<Json>,
) -> Result<Option<(&'static str, Json)>, (&'static str, String)> {
    let is_given = |value: &Json| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty());
    let (field, calls) = match (tool_calls.filter(is_given), function_call.filter(is_given)) {
        (None, None) => return Ok(None),
        (Some(calls), None) => (TOOL_CALLS, calls),
        (None, Some(function)) => (FUNCTION_CALL, json!([{"function": function}])),
        (Some(_), Some(_)) => {
            return Err((
                FUNCTION_CALL,
                " is the older form of tool_calls: one of them is allowed".to_owned(),
            ));
        }
    };
    if role != "assistant" {
        return Err((field, format!(" is for assistant messages, not for {role}")));
    }
    match (field, parse_tool_calls(calls)) {
        (FUNCTION_CALL, Ok(mut calls)) => Ok(Some((field, calls[0]["function"].take()))),
        (FUNCTION_CALL, Err(problem)) => Err((field, problem.replacen("[0].function", "", 1))),
        (_, Ok(calls)) => Ok(Some((field, calls))),
        (_, Err(problem)) => Err((field, problem)),
    }
}

/// Arguments may be JSON text or a dictionary. Errors continue the sentence "tool_calls".
pub(super) fn parse_tool_calls(mut calls: Json) -> Result<Json, String> {
    let Some(list) = calls.as_array_mut() else {
        return Err(" must be an array".to_owned());
    };
    for (i, call) in list.iter_mut().enumerate() {
        if call.get("type").is_some_and(|kind| kind != "function") {
            return Err(format!("[{i}].type must be \"function\""));
        }
        if call.get("id").is_some_and(|id| !id.is_string()) {
            return Err(format!("[{i}].id must be a text"));
        }
        let function = call.get_mut("function").and_then(Json::as_object_mut);
        let Some(function) = function.filter(|function| function.get("name").is_some_and(Json::is_string))
        else {
            return Err(format!("[{i}].function.name is missing"));
        };
        let arguments = function.entry("arguments").or_insert(Json::Null);
        let parsed =
            arguments_of(arguments).map_err(|problem| format!("[{i}].function.arguments{problem}"))?;
        if arguments.as_str().is_none_or(|text| text.trim().is_empty()) {
            *arguments = parsed;
        }
    }
    Ok(calls)
}

/// The older form, `function_call` answered by a message of the role `function`, becomes calls answered by `tool`.
pub fn modernise(messages: &mut [Message]) {
    let mut last_id = String::new();
    for (i, message) in messages.iter_mut().enumerate() {
        if let Some(function) = message.fields.remove(FUNCTION_CALL) {
            last_id = format!("call{i:05}");
            let call = json!([{"id": last_id, "type": "function", "function": function}]);
            message.fields.insert(TOOL_CALLS.to_owned(), call);
        }
        if message.role == "function" {
            message.role = "tool".to_owned();
            message.fields.insert("tool_call_id".to_owned(), json!(last_id));
        }
    }
}
