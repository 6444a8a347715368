//! Rows of others' shapes as the shapes that are read here: instructions by a template, columns by other names,
//! conversations as ShareGPT has them. Not here: what a shape means (the parent), how rows lie in a file (`records`).

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::template::Template;
use super::{Seam, keys};

/// What a job says of its columns.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Columns {
    pub template: Option<Template>,
    /// From the name that is wanted to the file's; to nothing, where the column is left out.
    pub names: BTreeMap<String, String>,
}

/// Of Stanford's alpaca. `text` of its data set is prompt and output once more.
const ALPACA: [&str; 2] = ["instruction", "output"];

/// What belongs to messages.
const OF_CHAT: [&str; 5] = ["messages", "tools", "functions", "label", "reward"];

impl Columns {
    /// Is it said which columns are read? Others are then left alone.
    pub fn are_chosen(&self) -> bool {
        self.template.is_some() || !self.names.is_empty()
    }

    /// Errors continue the sentence "Line 7".
    pub fn shaped(&self, mut row: Map<String, Value>) -> Result<(Map<String, Value>, Seam), String> {
        for (left_out, _) in self.names.iter().filter(|(_, name)| name.is_empty()) {
            row.remove(left_out);
        }
        if let Some(template) = &self.template {
            let is_read = |name: &str| template.reads(name, &self.names);
            keys::check_rest(&row, is_read).map_err(|problem| format!(": {problem}"))?;
            let (prompt, completion) = template.fill(&row, &self.names)?;
            return Ok((completion_row(prompt, completion), Seam::Apart));
        }
        let mut renamed = Vec::with_capacity(self.names.len());
        for (wanted, name) in self.names.iter().filter(|(_, name)| !name.is_empty()) {
            let value = row.remove(name).ok_or_else(|| {
                let has: Vec<&str> = row.keys().take(8).map(String::as_str).collect();
                format!(
                    " has no column {name}, which is to be {wanted}, but [{}].",
                    super::excerpt(&has.join(", "))
                )
            })?;
            renamed.push((wanted.clone(), value));
        }
        row.extend(renamed);
        let has = |key: &str| row.get(key).is_some_and(|value| !value.is_null());
        if ALPACA.iter().all(|key| has(key))
            && !["messages", "prompt", "completion"].iter().any(|key| has(key))
        {
            return Ok((instruction(row)?, Seam::Apart));
        }
        if has("conversations") && !has("messages") {
            let conversation = row.remove("conversations").expect("it was there");
            row.insert("messages".to_owned(), conversation);
        }
        if row.get("messages").is_some_and(Value::is_array) {
            opened(&mut row);
        }
        if self.are_chosen() {
            keys::check_row(&row).map_err(|problem| format!(": {problem}"))?;
            let is_named = |wanted| self.names.contains_key(wanted);
            row.retain(|name, _| match name.as_str() {
                // Of one shape, where the row could be of two.
                name if is_named("text") => name == "text",
                name if is_named("messages") => OF_CHAT.contains(&name),
                name => keys::is_read(name),
            });
        }
        Ok((row, Seam::Together))
    }
}

fn instruction(mut row: Map<String, Value>) -> Result<Map<String, Value>, String> {
    keys::check_row(&row).map_err(|problem| format!(": {problem}"))?;
    let template = Template::new("alpaca").expect("it is one of the names");
    let (prompt, completion) = template.fill(&row, &BTreeMap::new())?;
    for read in ["instruction", "input", "output", "text"] {
        row.remove(read);
    }
    row.extend(completion_row(prompt, completion));
    Ok(row)
}

fn completion_row(prompt: String, completion: String) -> Map<String, Value> {
    Map::from_iter([
        ("prompt".to_owned(), prompt.into()),
        ("completion".to_owned(), completion.into()),
    ])
}

/// A system prompt that stands beside the messages becomes the first of them.
fn opened(row: &mut Map<String, Value>) {
    for name in ["system", "system_prompt"] {
        let Some(Value::String(text)) = row.get(name).filter(|text| *text != "") else {
            continue;
        };
        let opening = json!({"role": "system", "content": text});
        if let Some(Value::Array(messages)) = row.get_mut("messages")
            && messages
                .first()
                .is_none_or(|first| first["role"] != "system" && first["from"] != "system")
        {
            messages.insert(0, opening);
            row.remove(name);
            return;
        }
    }
}

/// ShareGPT's `from` and `value` as `role` and `content`.
pub fn modern(message: &mut Map<String, Value>) {
    if message.contains_key("role") || message.contains_key("content") {
        return;
    }
    let Some(Value::String(from)) = message.get("from") else {
        return;
    };
    let role = match from.as_str() {
        "human" | "user" => "user",
        "gpt" | "chatgpt" | "assistant" | "model" | "bot" => "assistant",
        "tool" | "observation" | "tool_response" => "tool",
        other => other,
    };
    let role = Value::from(role);
    message.remove("from");
    message.insert("role".to_owned(), role);
    if let Some(value) = message.remove("value") {
        message.insert("content".to_owned(), value);
    }
}
