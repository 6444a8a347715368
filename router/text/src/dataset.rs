//! Training files: JSONL lines to rows, with errors that name the line. Not here: rows to tokens (`label`), the binary
//! form the engine reads (`tandem_core::dataset`), where files come from.

mod keys;
mod sample;

use std::io::{BufRead, Read};

use serde_json::{Map, Value, json};

use crate::chat::{BadTool, Content, Message, REASONING, calls_of, modernise, parse_tools};
pub use crate::label::{Options, group, suits};
pub use sample::Sample;

/// Bytes of one line at most: about four million tokens, more than any context.
pub const MAX_LINE_BYTES: usize = 16 << 20;
const HINT_CHARS: usize = 20;
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// One example to learn.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// Loss on the assistant's turns, their calls included, those with `weight` 0 excepted. `tools` are as the template gets
    /// them.
    Chat {
        messages: Vec<Message>,
        tools: Vec<Value>,
    },
    /// Loss on the completion (and on the prompt, by `prompt_loss_weight`).
    Completion { prompt: String, completion: String },
    /// Loss on every token.
    Text { text: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Completion,
    Text,
    Pair,
    Judged,
    Rewarded,
}

impl Kind {
    pub fn shape(self) -> &'static str {
        match self {
            Kind::Chat => r#"{"messages": [...]}"#,
            Kind::Completion => r#"{"prompt": ..., "completion": ...}"#,
            Kind::Text => r#"{"text": ...}"#,
            Kind::Pair => r#"{"prompt": ..., "chosen": ..., "rejected": ...}"#,
            Kind::Judged => r#"{"prompt": ..., "completion": ..., "label": ...}"#,
            Kind::Rewarded => r#"{"prompt": ..., "completion": ..., "reward": ...}"#,
        }
    }
}

impl Row {
    pub fn kind(&self) -> Kind {
        match self {
            Row::Chat { .. } => Kind::Chat,
            Row::Completion { .. } => Kind::Completion,
            Row::Text { .. } => Kind::Text,
        }
    }
}

/// The first thing wrong with a file. The message names the line too.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BadLine {
    pub line: u64,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub rows: u64,
    pub kind: Kind,
}

/// The whole file, one line in memory at a time.
pub fn check_jsonl(reader: impl BufRead) -> Result<Summary, BadLine> {
    let mut summary: Option<Summary> = None;
    for row in read_rows(reader) {
        let (_, row) = row?;
        summary
            .get_or_insert(Summary {
                rows: 0,
                kind: row.kind(),
            })
            .rows += 1;
    }
    summary.ok_or_else(|| BadLine {
        line: 1,
        message: "The file is empty: it has no training example.".to_owned(),
    })
}

/// Rows of one kind with their line numbers, until the end or the first error. An empty file has none.
pub fn read_rows<R: BufRead>(reader: R) -> Rows<R> {
    Rows {
        reader,
        line: 0,
        blank: None,
        kind: None,
        ended: false,
    }
}

pub struct Rows<R> {
    reader: R,
    line: u64,
    /// A blank line that is an error if anything follows.
    blank: Option<u64>,
    kind: Option<(Kind, u64)>,
    ended: bool,
}

impl<R: BufRead> Iterator for Rows<R> {
    type Item = Result<(u64, Sample), BadLine>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let row = self.read().transpose();
        self.ended = !matches!(row, Some(Ok(_)));
        row
    }
}

impl<R: BufRead> Rows<R> {
    fn read(&mut self) -> Result<Option<(u64, Sample)>, BadLine> {
        loop {
            self.line += 1;
            let line = self.line;
            let mut bytes = Vec::new();
            let limit = MAX_LINE_BYTES as u64 + 1;
            let read = self.reader.by_ref().take(limit).read_until(b'\n', &mut bytes);
            match read.map_err(|error| bad(line, format!("Line {line} cannot be read: {error}")))? {
                0 => return Ok(None),
                n if n > MAX_LINE_BYTES => {
                    return Err(bad(
                        line,
                        format!("Line {line} is longer than {MAX_LINE_BYTES} bytes."),
                    ));
                }
                _ => {}
            }
            // Some editors of Windows begin a file with a byte order mark.
            let bytes = if line == 1 {
                bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes)
            } else {
                &bytes
            };
            let text = std::str::from_utf8(bytes).map_err(|error| {
                bad(
                    line,
                    format!(
                        "Line {line} is not UTF-8 text: invalid byte at column {}.",
                        error.valid_up_to() + 1
                    ),
                )
            })?;
            if text.trim().is_empty() {
                self.blank = self.blank.or(Some(line));
                continue;
            }
            if let Some(blank) = self.blank {
                return Err(bad(
                    blank,
                    format!("Line {blank} is blank, but more lines follow."),
                ));
            }
            let row = parse_line(line, text)?;
            let (kind, first) = *self.kind.get_or_insert((row.kind(), line));
            if kind != row.kind() {
                let (here, before) = (row.kind().shape(), kind.shape());
                let message = format!(
                    "Invalid file format. Line {line} has the shape {here}, line {first} the shape {before}: all lines \
                     of a file must have one shape."
                );
                return Err(bad(line, message));
            }
            return Ok(Some((line, row)));
        }
    }
}

pub fn parse_line(line: u64, text: &str) -> Result<Sample, BadLine> {
    let no_dictionary = |detail: String| {
        let start: String = text.trim().chars().take(HINT_CHARS).collect();
        let start: String = start
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let message = format!(
            "Expected file to have JSONL format, where every line is a JSON dictionary. Line {line} is not a dictionary \
             (HINT: line starts with: \"{start}...\").{detail}"
        );
        bad(line, message)
    };
    let object = match serde_json::from_str(text) {
        Ok(Value::Object(object)) => {
            if let Some(name) = tandem_core::json::twice(text.as_bytes()) {
                let message =
                    format!("Line {line}: {name:?} is there twice in one object: which of them is meant?");
                return Err(bad(line, message));
            }
            object
        }
        Ok(Value::Array(_)) => {
            return Err(no_dictionary(
                " It is a JSON array: write its elements one a line.".to_owned(),
            ));
        }
        Ok(_) => return Err(no_dictionary(String::new())),
        Err(error) => {
            let hint = match text.trim() {
                "{" | "[" => {
                    " The file looks like JSON spread over lines: write each example on one line.".to_owned()
                }
                _ => format!(" Error: line contains invalid json: {error} of this line."),
            };
            return Err(no_dictionary(hint));
        }
    };
    sample::sample(object).map_err(|problem| bad(line, format!("Invalid file format. Line {line}{problem}")))
}

fn bad(line: u64, message: String) -> BadLine {
    BadLine { line, message }
}

/// Errors continue the sentence "Line 7".
fn row(mut object: Map<String, Value>) -> Result<Row, String> {
    let named = |problem: String| format!(": {problem}");
    keys::check_row(&object).map_err(named)?;
    let is_chat = object.contains_key("messages");
    let is_list = object.get("completion").is_some_and(Value::is_array);
    let tools = tools_of(&mut object)?;
    if !tools.is_empty() && !is_chat && !is_list {
        return Err(": tools go with messages.".to_owned());
    }
    let has = |key: &str| object.contains_key(key);
    let row = match (is_chat, has("prompt") || has("completion"), has("text")) {
        (true, false, false) => {
            let messages = object.remove("messages").expect("it was there");
            Ok(Row::Chat {
                messages: messages_of(messages)?,
                tools,
            })
        }
        (false, true, false) if object.get("completion").is_some_and(Value::is_array) => {
            match (object.remove("prompt"), object.remove("completion")) {
                (Some(Value::Array(prompt)), Some(Value::Array(answer))) => {
                    sample::answered(prompt, answer, tools)
                }
                (prompt, _) => Err(format!(
                    ": prompt must be a list of messages like completion, got {}.",
                    prompt.as_ref().map_or("nothing", type_name)
                )),
            }
        }
        (false, true, false) => {
            let prompt = text_field(&mut object, "prompt")?;
            let completion = text_field(&mut object, "completion")?;
            match completion.is_empty() {
                true => Err(" has an empty completion: there is nothing to learn.".to_owned()),
                false => Ok(Row::Completion { prompt, completion }),
            }
        }
        (false, false, true) => match text_field(&mut object, "text")? {
            text if text.is_empty() => Err(" has an empty text: there is nothing to learn.".to_owned()),
            text => Ok(Row::Text { text }),
        },
        (false, false, false) => {
            let keys: Vec<&str> = object.keys().take(8).map(String::as_str).collect();
            let shapes = [Kind::Chat, Kind::Completion, Kind::Text]
                .map(Kind::shape)
                .join(" or ");
            Err(format!(
                " has the keys [{}]; expected {shapes}.",
                excerpt(&keys.join(", "))
            ))
        }
        _ => Err(
            " mixes shapes: only one of messages, prompt with completion, and text is allowed.".to_owned(),
        ),
    }?;
    keys::rest_of_row(&object).map_err(named)?;
    Ok(row)
}

/// `tools`, or `functions` of the older form.
fn tools_of(row: &mut Map<String, Value>) -> Result<Vec<Value>, String> {
    let mut listed = |key: &str| match row.remove(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(format!(": {key} must be an array, got {}.", type_name(&other))),
    };
    let (tools, functions) = (listed("tools")?, listed("functions")?);
    let (key, tools) = match (tools.is_empty(), functions.is_empty()) {
        (_, true) => ("tools", tools),
        (true, false) => {
            let tool = |function| json!({"type": "function", "function": function});
            ("functions", functions.into_iter().map(tool).collect())
        }
        (false, false) => {
            return Err(": functions are the older form of tools: only one of them is allowed.".to_owned());
        }
    };
    let offers =
        parse_tools(tools).map_err(|BadTool { place, problem }| format!(": {key}{place}{problem}."))?;
    Ok(offers.into_iter().map(|offer| offer.given).collect())
}

fn messages_of(messages: Value) -> Result<Vec<Message>, String> {
    let Value::Array(messages) = messages else {
        return Err(format!(
            ": messages must be an array, got {}.",
            type_name(&messages)
        ));
    };
    let numbered = messages.into_iter().enumerate();
    let mut messages = numbered
        .map(|(i, message)| message_of(message).map_err(|problem| format!(", message {}: {problem}", i + 1)))
        .collect::<Result<Vec<_>, _>>()?;
    modernise(&mut messages);
    match messages
        .iter()
        .any(|message| message.role == "assistant" && message.weight != Some(0.0))
    {
        true => Ok(messages),
        false => {
            Err(": messages must hold at least one from the assistant whose weight is not 0.".to_owned())
        }
    }
}

fn message_of(message: Value) -> Result<Message, String> {
    let Value::Object(mut message) = message else {
        return Err(format!(
            "a message must be a dictionary, got {}.",
            type_name(&message)
        ));
    };
    keys::check_message(&message)?;
    let role = match message.remove("role") {
        None => return Err("Discriminator 'role' is missing in value.".to_owned()),
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role,
        Some(role) => {
            return Err(format!(
                "role must be one of {}, got {}.",
                ROLES.join(", "),
                excerpt(&role.to_string())
            ));
        }
    };
    let mut fields = Map::new();
    let calls = calls_of(
        &role,
        message.remove("tool_calls"),
        message.remove("function_call"),
    );
    let calls = calls.map_err(|(field, problem)| format!("{field}{problem}."))?;
    fields.extend(calls.map(|(field, calls)| (field.to_owned(), calls)));
    for name in ["name", "tool_call_id"].into_iter().chain(REASONING) {
        let of = match name {
            "name" => role.as_str(),
            "tool_call_id" => "tool",
            _ => "assistant",
        };
        match message.remove(name) {
            None | Some(Value::Null) => {}
            Some(_) if of != role => return Err(format!("{name} is for {of} messages, not for {role}.")),
            Some(text @ Value::String(_)) => drop(fields.insert(name.to_owned(), text)),
            Some(other) => return Err(format!("{name} must be a string, got {}.", type_name(&other))),
        }
    }
    let speaks = role == "assistant" && fields.keys().any(|name| name != "name");
    let content = match message.remove("content") {
        Some(Value::String(text)) => Some(Content::Text(text)),
        Some(Value::Array(parts)) => Some(Content::Parts(
            parts.into_iter().map(text_part).collect::<Result<_, _>>()?,
        )),
        None | Some(Value::Null) if speaks => None,
        None => return Err("content is missing.".to_owned()),
        Some(other) => {
            return Err(format!(
                "content must be a string or an array of text parts, got {}.",
                type_name(&other)
            ));
        }
    };
    let weight = match message.remove("weight") {
        None | Some(Value::Null) => None,
        // Other turns are never learned: 0 asks for nothing else.
        Some(weight) if role != "assistant" && weight.as_f64() == Some(0.0) => None,
        Some(_) if role != "assistant" => {
            return Err(format!("weight is for assistant messages, not for {role}."));
        }
        Some(weight) => match weight.as_f64() {
            Some(weight) if weight == 0.0 || weight == 1.0 => Some(weight as f32),
            _ => {
                return Err(format!(
                    "weight must be 0 or 1, got {}.",
                    excerpt(&weight.to_string())
                ));
            }
        },
    };
    let is_learned = role == "assistant" && weight != Some(0.0);
    keys::rest_of_message(message, is_learned)?;
    Ok(Message {
        role,
        content,
        weight,
        fields,
    })
}

fn text_part(part: Value) -> Result<String, String> {
    let Value::Object(mut part) = part else {
        return Err(format!(
            "a content part must be a dictionary, got {}.",
            type_name(&part)
        ));
    };
    let kind = part.remove("type");
    match (kind.as_ref().and_then(Value::as_str), part.remove("text")) {
        (Some("text"), Some(Value::String(text))) => {
            keys::rest_of_part(&part).map_err(|problem| format!("in a text part, {problem}"))?;
            Ok(text)
        }
        (Some("text"), other) => Err(format!(
            "a text part needs a string \"text\", got {}.",
            type_name(&other.unwrap_or_default())
        )),
        (Some(other), _) => Err(format!(
            "content parts of type {} are not supported, only text.",
            excerpt(other)
        )),
        (None, _) => Err("a content part needs a \"type\".".to_owned()),
    }
}

fn text_field(object: &mut Map<String, Value>, key: &str) -> Result<String, String> {
    match object.remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!(": {key} must be a string, got {}.", type_name(&other))),
        None => Err(format!(": {key} is missing.")),
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "a dictionary",
    }
}

/// Error texts must not carry whole files.
fn excerpt(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
