//! Training files: their rows as examples, with errors that name the place. Not here: rows to tokens (`label`), the binary
//! form the engine reads (`tandem_core::dataset`), where files come from.

mod columns;
mod keys;
mod records;
mod sample;
mod shown;
mod split;
mod template;
mod tokens;

use std::ops::Range;

use serde_json::{Map, Value, json};
use tandem_core::settings::Settings;

use crate::chat::{BadTool, Content, Message, REASONING, calls_of, modernise, parse_tools};
pub use crate::label::{Options, group, suits};
use columns::Columns;
pub use records::{Format, Place, SampleBy, Source};
use records::{Record, Records};
pub use sample::Sample;
pub use shown::{Piece, Shown};
use split::Split;
use template::Template;
pub use tokens::{MERGED, Statistics, Unfit, tokenise};

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
    /// Loss on what answers the first `n_prompt` of the messages.
    Answer {
        messages: Vec<Message>,
        n_prompt: usize,
        tools: Vec<Value>,
    },
    /// Loss on the completion (and on the prompt, by `prompt_loss_weight`).
    Completion {
        prompt: String,
        completion: String,
        seam: Seam,
    },
    /// Loss on every token.
    Text { text: String },
}

/// How a prompt's text and what follows it become tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seam {
    /// As one text, of which a token may lie in both; as TRL does.
    Together,
    /// Each by itself, where they do not meet between two tokens of one text; as torchtune and llama-recipes do with the prompts
    /// of their templates.
    Apart,
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
            Row::Chat { .. } | Row::Answer { .. } => Kind::Chat,
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
    /// The system's number of an error that another time may not be there: nothing is wrong with the file.
    pub passing: Option<i32>,
}

/// How the rows of a job's files are read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    format: Option<Format>,
    sample_by: SampleBy,
    split: Option<Split>,
    columns: Columns,
}

impl Reading {
    /// Errors are a setting and what is wrong with it.
    pub fn new(settings: &Settings) -> Result<Reading, (&'static str, String)> {
        let template = settings.template.as_deref().map(Template::new).transpose();
        let split = settings.split.as_deref().map_or(Ok(None), Split::new);
        let mut names = settings.column_map.clone().unwrap_or_default();
        if let Some(column) = &settings.dataset_text_field {
            if let Some(other) = names
                .insert("text".to_owned(), column.clone())
                .filter(|other| other != column)
            {
                let message =
                    format!("column_map says that text is {other}, dataset_text_field that it is {column}");
                return Err(("dataset_text_field", message));
            }
            if settings.template.is_some() {
                let message = "dataset_text_field is the column of plain text, and template makes prompts of columns: leave \
                               one of them out";
                return Err(("dataset_text_field", message.to_owned()));
            }
        }
        Ok(Reading {
            format: settings.dataset_format.as_deref().and_then(Format::named),
            sample_by: settings
                .sample_by
                .as_deref()
                .and_then(SampleBy::named)
                .unwrap_or_default(),
            split: split.map_err(|message| ("split", message))?,
            columns: Columns {
                template: template.map_err(|message| ("template", message))?,
                names,
            },
        })
    }

    /// The same for a file of validation, of which all is read.
    pub fn whole(&self) -> Reading {
        Reading {
            split: None,
            ..self.clone()
        }
    }
}

/// What an upload can be checked for before a job says how it is to be read: that all of it are rows, and that a row of a
/// known shape is right. Columns of other names wait for a job's `template` or `column_map`. Returns the number of rows.
pub fn check(source: &Source) -> Result<u64, BadLine> {
    let mut rows = Rows::open(vec![source.clone()], &Reading::default())?;
    let mut n = 0;
    while let Some(record) = rows.record().transpose() {
        let (place, record) = record?;
        let is_table = is_table(&record) || is_of_two(&record);
        match rows.sample(place, record) {
            Err((_, Fault::Shape)) if is_table => {}
            Err((bad, _)) => return Err(bad),
            Ok(_) => {}
        }
        n += 1;
    }
    match n {
        0 => Err(Place::line(1).bad("The file is empty: it has no training example.".to_owned())),
        n => Ok(n),
    }
}

/// Columns that a template could make a prompt and an answer of.
fn is_table(row: &Map<String, Value>) -> bool {
    let is_flat = |value: &Value| !value.is_array() && !value.is_object();
    row.values().all(is_flat) && row.values().filter(|value| value.is_string()).count() > 1
}

/// Messages and text of one row: a job says which it reads.
fn is_of_two(row: &Map<String, Value>) -> bool {
    row.contains_key("messages") && (row.contains_key("prompt") || row.contains_key("text"))
}

/// Whether a row is no row of a known shape, or one with a fault in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Shape,
    Value,
}

/// What is wrong with a row; continues the sentence "Line 7".
#[derive(Debug)]
struct Problem {
    text: String,
    fault: Fault,
}

impl Problem {
    fn shape(text: String) -> Problem {
        Problem {
            text,
            fault: Fault::Shape,
        }
    }
}

impl Problem {
    /// In columns that a template may yet read, it is one of their shape.
    fn of_key(problem: &str, is_known: bool) -> Problem {
        let text = format!(": {problem}");
        let fault = if is_known { Fault::Value } else { Fault::Shape };
        Problem { text, fault }
    }
}

impl From<String> for Problem {
    fn from(text: String) -> Problem {
        Problem {
            text,
            fault: Fault::Value,
        }
    }
}

/// Rows of one kind with their places, until the end or the first error. An empty file has none.
pub struct Rows {
    sources: std::vec::IntoIter<Source>,
    /// Of more than one file, errors name which.
    names_files: bool,
    now: Option<(String, Records)>,
    /// Of each file so far.
    formats: Vec<Format>,
    format: Option<Format>,
    sample_by: SampleBy,
    columns: Columns,
    range: Range<u64>,
    read: u64,
    kind: Option<(Kind, String)>,
    ended: bool,
}

impl Rows {
    /// Of all files, one after the other.
    pub fn open(sources: Vec<Source>, reading: &Reading) -> Result<Rows, BadLine> {
        let Reading {
            format,
            sample_by,
            split,
            columns,
        } = reading;
        let mut rows = Rows {
            names_files: sources.len() > 1,
            sources: sources.clone().into_iter(),
            now: None,
            formats: vec![],
            format: *format,
            sample_by: *sample_by,
            columns: columns.clone(),
            range: 0..u64::MAX,
            read: 0,
            kind: None,
            ended: false,
        };
        if let Some(split) = split {
            let mut n = u64::MAX;
            if split.needs_count() {
                n = 0;
                while rows.record()?.is_some() {
                    n += 1;
                }
                (rows.sources, rows.read, rows.formats) = (sources.into_iter(), 0, vec![]);
            }
            rows.range = split.range(n);
        }
        Ok(rows)
    }

    /// How the files lie that were read so far.
    pub fn formats(&self) -> String {
        let mut formats = self.formats.clone();
        formats.dedup();
        let formats: Vec<String> = formats.iter().map(Format::to_string).collect();
        formats.join(", ")
    }

    /// The next one that the split has.
    fn record(&mut self) -> Result<Option<Record>, BadLine> {
        while self.read < self.range.end {
            let Some((name, records)) = &mut self.now else {
                let Some(source) = self.sources.next() else {
                    return Ok(None);
                };
                let records = Records::open(&source, self.format, self.sample_by)
                    .map_err(|bad| named(self.names_files, &source.name, bad))?;
                self.formats.push(records.format);
                self.now = Some((source.name, records));
                continue;
            };
            match records.next() {
                None => self.now = None,
                Some(Err(bad)) => return Err(named(self.names_files, name, bad)),
                Some(Ok(record)) => {
                    self.read += 1;
                    if self.read > self.range.start {
                        return Ok(Some(record));
                    }
                }
            }
        }
        Ok(None)
    }

    fn sample(&mut self, place: Place, row: Map<String, Value>) -> Result<Sample, (BadLine, Fault)> {
        let name = self.now.as_ref().map_or("", |(name, _)| name);
        let bad = |message: String, fault| (named(self.names_files, name, place.bad(message)), fault);
        let shaped = self.columns.shaped(row).map_err(Problem::from);
        let sample = shaped
            .and_then(|(row, seam)| sample::sample(row, seam))
            .map_err(|Problem { text, fault }| bad(format!("Invalid file format. {place}{text}"), fault))?;
        let here = match self.names_files {
            true => format!("{place} of {name}"),
            false => place.to_string(),
        };
        let (kind, first) = self.kind.get_or_insert_with(|| (sample.kind(), here));
        if *kind != sample.kind() {
            let (here, before) = (sample.kind().shape(), kind.shape());
            let message = format!(
                "Invalid file format. {place} has the shape {here}, {} the shape {before}: all lines of a file must have one \
                 shape.",
                first.to_lowercase()
            );
            return Err(bad(message, Fault::Value));
        }
        Ok(sample)
    }
}

impl Iterator for Rows {
    type Item = Result<(Place, Sample), BadLine>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.record().transpose().map(|record| {
            let (place, row) = record?;
            let sample = self.sample(place, row).map_err(|(bad, _)| bad)?;
            Ok((place, sample))
        });
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

fn named(names_files: bool, name: &str, bad: BadLine) -> BadLine {
    match names_files {
        true => BadLine {
            message: format!("{name}: {}", bad.message),
            ..bad
        },
        false => bad,
    }
}

/// One line of JSON.
#[cfg(test)]
pub(crate) fn parse_line(line: u64, text: &str) -> Result<Sample, BadLine> {
    let (place, row) = records::of_line(line, text)?;
    let mut rows = Rows::open(vec![], &Reading::default())?;
    rows.sample(place, row).map_err(|(bad, _)| bad)
}

fn row(mut object: Map<String, Value>, seam: Seam) -> Result<Row, Problem> {
    let shapes = ["messages", "prompt", "completion", "text"];
    let is_known = shapes.iter().any(|key| object.contains_key(*key));
    keys::check_row(&object).map_err(|problem| Problem::of_key(&problem, is_known))?;
    let is_chat = object.contains_key("messages");
    // Others' data sets have the first turn a second time.
    if let (Some(messages), Some(prompt)) = (object.get("messages"), object.get("prompt"))
        && is_said(messages, prompt)
    {
        object.remove("prompt");
    }
    let is_list = object.get("completion").is_some_and(Value::is_array);
    let tools = tools_of(&mut object)?;
    if !tools.is_empty() && !is_chat && !is_list {
        return Err(": tools go with messages.".to_owned().into());
    }
    let has = |key: &str| object.contains_key(key);
    let row = match (is_chat, has("prompt") || has("completion"), has("text")) {
        (true, false, false) => {
            let messages = object.remove("messages").expect("it was there");
            Row::Chat {
                messages: messages_of(messages)?,
                tools,
            }
        }
        (false, true, false) if is_list => match (object.remove("prompt"), object.remove("completion")) {
            (Some(Value::Array(prompt)), Some(Value::Array(answer))) => {
                sample::answered(prompt, answer, tools)?
            }
            (prompt, _) => {
                return Err(Problem::from(format!(
                    ": prompt must be a list of messages like completion, got {}.",
                    prompt.as_ref().map_or("nothing", type_name)
                )));
            }
        },
        (false, true, false) => {
            if let Some(missing) = ["prompt", "completion"].into_iter().find(|key| !has(key)) {
                return Err(Problem::shape(format!(": {missing} is missing.")));
            }
            let prompt = text_field(&mut object, "prompt")?;
            let completion = text_field(&mut object, "completion")?;
            if completion.is_empty() {
                return Err(Problem::from(
                    " has an empty completion: there is nothing to learn.".to_owned(),
                ));
            }
            Row::Completion {
                prompt,
                completion,
                seam,
            }
        }
        // An empty one has nothing to learn, or its end alone: paragraphs of a book are rows, too.
        (false, false, true) => Row::Text {
            text: text_field(&mut object, "text")?,
        },
        (false, false, false) => {
            let keys: Vec<&str> = object.keys().take(8).map(String::as_str).collect();
            let shapes = [Kind::Chat, Kind::Completion, Kind::Text]
                .map(Kind::shape)
                .join(" or ");
            return Err(Problem::shape(format!(
                " has the keys [{}]; expected {shapes}, {{\"conversations\": [...]}} or {{\"instruction\": ..., \"output\": ...}}. \
                 Other columns are read by the settings template and column_map.",
                excerpt(&keys.join(", "))
            )));
        }
        _ => {
            return Err(Problem::shape(
                " mixes shapes: only one of messages, prompt with completion, and text is allowed. column_map={messages: messages} \
                 reads the first alone, dataset_text_field=text the last."
                    .to_owned(),
            ));
        }
    };
    keys::rest_of_row(&object).map_err(|problem| Problem::shape(format!(": {problem}")))?;
    Ok(row)
}

/// Whether a message has this content.
fn is_said(messages: &Value, content: &Value) -> bool {
    let says = |message: &Value| message["content"] == *content || message["value"] == *content;
    content.is_string()
        && messages
            .as_array()
            .is_some_and(|messages| messages.iter().any(says))
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
    columns::modern(&mut message);
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
