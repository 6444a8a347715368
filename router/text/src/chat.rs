//! A conversation as one text: the model's own Jinja template, rendered as transformers renders it. Serving and
//! training both come through here. Not here: Python's methods and filters (`python`), tokens (`tokenizer`).

mod calls;
mod offers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value as Json, json};

use crate::error::TextError;
use crate::python;
use calls::CallStyle;
pub use calls::{CallIds, calls_of, modernise};
pub use offers::{BadTool, parse_tools};

/// One turn. `weight` is for training only (0: no loss on this turn); templates do not see it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    pub role: String,
    /// `None` beside tool calls, or beside reasoning.
    pub content: Option<Content>,
    pub weight: Option<f32>,
    /// All that the template may read besides, under the names it came with: `name`, `reasoning_content`, `tool_calls`.
    pub fields: Map<String, Json>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Text(String),
    /// Text parts. A template that reads parts gets them as a list; others get them as lines.
    Parts(Vec<String>),
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message {
            role: role.into(),
            content: Some(Content::Text(content.into())),
            ..Message::default()
        }
    }

    /// What was thought before the content, under whichever name.
    pub fn reasoning(&self) -> Option<&str> {
        REASONING
            .into_iter()
            .find_map(|name| self.fields.get(name)?.as_str())
    }

    /// Bytes of the content.
    pub fn content_bytes(&self) -> usize {
        match &self.content {
            None => 0,
            Some(Content::Text(text)) => text.len(),
            Some(Content::Parts(parts)) => parts.iter().map(String::len).sum(),
        }
    }
}

/// How the rendered text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// After the last message.
    Closed,
    /// With the header of an assistant turn (`add_generation_prompt`).
    GenerationPrompt,
    /// Inside the last message, which the model goes on with (`continue_final_message`).
    OpenMessage,
}

/// Variables for the template beside the messages: `tools`, `documents`, and what `chat_template_kwargs` says
/// (`enable_thinking`, ...).
pub type Kwargs = BTreeMap<String, Json>;

/// Variables that are not for a client to set.
const RESERVED: [&str; 2] = ["messages", "add_generation_prompt"];
/// Names of a message's reasoning. Templates differ in which they read, clients in which they send.
pub const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
const EFFORT: &str = "reasoning_effort";
const ENABLE_THINKING: &str = "enable_thinking";
const TOOLS: &str = "tools";
const NAME: &str = "chat_template";

/// A compiled template with the model's special tokens. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special_tokens: Arc<BTreeMap<String, String>>,
    /// Variables that the template asks for. It may set some of them itself, where they are not given.
    variables: Arc<BTreeSet<String>>,
    /// Roles whose content the template reads as a string, as a list of one part, and as one of several.
    reads_text: Arc<BTreeSet<&'static str>>,
    reads_part: Arc<BTreeSet<&'static str>>,
    reads_parts: Arc<BTreeSet<&'static str>>,
    /// The template knows OpenAI's newer name of the system role.
    knows_developer: bool,
    /// `None`: it wrote none, however they were given.
    calls: Option<CallStyle>,
}

impl ChatTemplate {
    /// `special_tokens`: `bos_token`, `eos_token`, ... as the template sees them.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<ChatTemplate, TextError> {
        let mut environment = python::environment();
        let broken = |error: Error| TextError::BrokenTemplate(describe(&error));
        let compiled = python::source(source).map_err(broken)?;
        environment.add_template_owned(NAME, compiled).map_err(broken)?;
        let template = environment.get_template(NAME).expect("just added");
        let asked = |name: &String| {
            let globals = environment.globals().map(|(name, _)| name);
            let given = globals
                .chain(RESERVED)
                .chain(special_tokens.keys().map(String::as_str));
            !given.into_iter().any(|given| given == name)
        };
        let variables = template
            .undeclared_variables(false)
            .into_iter()
            .filter(asked)
            .collect();
        let mut template = ChatTemplate {
            environment: Arc::new(environment),
            special_tokens: Arc::new(special_tokens),
            variables: Arc::new(variables),
            reads_text: Arc::default(),
            reads_part: Arc::default(),
            reads_parts: Arc::default(),
            knows_developer: source.contains("developer"),
            calls: None,
        };
        let probe = PROBE.join("\n");
        let roles = |content: Json| {
            let all = ["system", "user", "assistant", "tool"].into_iter();
            Arc::new(all.filter(|role| template.shows(role, &content)).collect())
        };
        let (text, one) = (roles(json!(probe)), roles(json!([part(&probe)])));
        let several = roles(json!(PROBE.map(part)));
        (template.reads_text, template.reads_part, template.reads_parts) = (text, one, several);
        if source.contains("tool_calls") {
            let render =
                |messages: &[Json], kwargs: &Kwargs| template.render_visible(messages, false, kwargs).ok();
            template.calls = CallStyle::asked(render);
        }
        Ok(template)
    }

    /// Which ids the calls of an answer must have, so that they can come back as history.
    pub fn call_ids(&self) -> CallIds {
        self.calls.unwrap_or_default().ids()
    }

    /// Whether the template writes tools into the prompt.
    pub fn reads_tools(&self) -> bool {
        self.variables.contains(TOOLS)
    }

    /// Whether it has a variable that turns thinking on and off.
    pub fn switches_thinking(&self) -> bool {
        self.variables.contains(ENABLE_THINKING)
    }

    pub fn render(&self, messages: &[Message], ending: Ending, kwargs: &Kwargs) -> Result<String, TextError> {
        if let Some(name) = RESERVED.into_iter().find(|name| kwargs.contains_key(*name)) {
            return Err(TextError::Refused(format!(
                "chat_template_kwargs may not set {name}"
            )));
        }
        let kwargs = &self.readable(kwargs)?;
        let visible: Vec<Json> = messages.iter().map(|message| self.visible(message)).collect();
        let text = match ending {
            Ending::Closed => self.render_visible(&visible, false, kwargs),
            Ending::GenerationPrompt => self.render_visible(&visible, true, kwargs),
            Ending::OpenMessage => self.render_open(visible, kwargs),
        };
        let text = match text {
            Err(TextError::Refused(why)) if self.calls.is_none() && messages.iter().any(has_calls) => {
                return Err(TextError::Refused(format!("{NO_CALLS} (its own error: {why})")));
            }
            text => text?,
        };
        for message in messages {
            shows_calls(message, &text)?;
        }
        Ok(text)
    }

    /// The last text is marked at its end, and the rendering cut at the mark: the text itself may stand anywhere else,
    /// in the template's own words too.
    fn render_open(&self, mut messages: Vec<Json>, kwargs: &Kwargs) -> Result<String, TextError> {
        let given = json!(messages).to_string();
        let mark = (0..)
            .map(|n| format!("TheModelGoesOnHere{n}"))
            .find(|mark| !given.contains(mark));
        let mark = mark.expect("a text does not hold every number");
        let unmarked = messages.clone();
        let is_blank = put_mark(messages.last_mut(), &mark)?;
        let text = cut(&self.render_visible(&messages, false, kwargs)?, &mark, is_blank)?;
        // Without text a template may leave the whole turn out, or refuse it. With text the prompt must be how the closed
        // conversation begins, or the mark made the template write something else.
        match is_blank
            || self
                .render_visible(&unmarked, false, kwargs)?
                .starts_with(text.trim_end())
        {
            true => Ok(text),
            false => Err(not_as_it_is()),
        }
    }

    /// The variables, all of which the template reads. One that it does not read would change nothing, silently: it is
    /// refused unless it says no.
    fn readable(&self, kwargs: &Kwargs) -> Result<Kwargs, TextError> {
        let mut kwargs = kwargs.clone();
        // Where thinking is on or off, some effort is on.
        let effort = kwargs
            .get(EFFORT)
            .and_then(Json::as_str)
            .map(|effort| effort != "none");
        if let Some(thinks) = effort.filter(|_| self.variables.contains(ENABLE_THINKING)) {
            kwargs.entry(ENABLE_THINKING.to_owned()).or_insert(json!(thinks));
            kwargs.retain(|name, _| name != EFFORT || self.variables.contains(EFFORT));
        }
        let says_no = |value: &Json| match value {
            Json::Array(list) => list.is_empty(),
            value => value.is_null() || value == false || value == "none",
        };
        let unread = |(name, value): &(&String, &Json)| !self.variables.contains(*name) && !says_no(value);
        match kwargs.iter().find(unread) {
            None => Ok(kwargs),
            Some((name, _)) if name == TOOLS => Err(TextError::NoTools),
            Some((name, _)) => {
                let reads: Vec<&str> = self.variables.iter().map(String::as_str).collect();
                Err(TextError::UnreadVariable {
                    name: name.clone(),
                    reads: match reads.is_empty() {
                        true => "only the messages".to_owned(),
                        false => reads.join(", "),
                    },
                })
            }
        }
    }

    fn render_visible(&self, messages: &[Json], prompts: bool, kwargs: &Kwargs) -> Result<String, TextError> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        context.extend([("tools", Value::from(())), ("documents", Value::from(()))]);
        let special_tokens = self.special_tokens.iter();
        context.extend(special_tokens.map(|(name, text)| (name.as_str(), Value::from(text.as_str()))));
        let kwargs = kwargs.iter();
        context.extend(kwargs.map(|(name, value)| (name.as_str(), python::value(value))));
        context.insert("messages", messages.iter().map(python::value).collect());
        context.insert("add_generation_prompt", Value::from(prompts));
        python::render(&self.environment, NAME, Value::from_pairs(context))
            .map_err(|error| TextError::Refused(describe(&error)))
    }

    /// A message as the template sees it.
    fn visible(&self, message: &Message) -> Json {
        let Message {
            role,
            content,
            weight: _,
            fields,
        } = message;
        let role = match role.as_str() {
            "developer" if !self.knows_developer => "system",
            role => role,
        };
        let reads =
            |roles: &BTreeSet<&str>| roles.contains(if role == "developer" { "system" } else { role });
        let is_silent = content.is_none();
        let content = content.as_ref().map(|content| {
            let text = match content {
                Content::Parts(parts) if reads(&self.reads_parts) => {
                    return parts.iter().map(|text| part(text)).collect();
                }
                Content::Parts(parts) => &parts.join("\n"),
                Content::Text(text) => text,
            };
            match reads(&self.reads_text) || !reads(&self.reads_part) {
                true => json!(text),
                false => json!([part(text)]),
            }
        });
        let mut visible = Map::new();
        visible.insert("role".to_owned(), json!(role));
        visible.extend(content.map(|content| ("content".to_owned(), content)));
        // An absent field and one that is null are the same to clients, not to templates.
        let style = self.calls.unwrap_or_default();
        let given = fields
            .iter()
            .filter(|(name, value)| !value.is_null() && *name != "tool_calls");
        visible.extend(given.map(|(name, value)| (name.clone(), value.clone())));
        if let Some(Json::String(id)) = visible.get_mut("tool_call_id") {
            *id = style.id(id);
        }
        style.write(&mut visible, fields.get("tool_calls"), is_silent);
        if let Some(reasoning) = REASONING.into_iter().find_map(|name| visible.get(name)).cloned() {
            for name in REASONING {
                visible.entry(name).or_insert(reasoning.clone());
            }
        }
        Json::Object(visible)
    }

    /// Asked by example: which content a template reads is written in no file, and roles differ.
    fn shows(&self, role: &str, content: &Json) -> bool {
        let message = |role: &str, content: &Json| json!({"role": role, "content": content});
        let (user, probe) = (message("user", &json!("x")), message(role, content));
        let call = json!({"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {}}});
        let messages = match role {
            "system" => vec![probe, user],
            "assistant" => vec![user.clone(), probe, user],
            "tool" => {
                let calls = json!({"role": "assistant", "content": "", "tool_calls": [call]});
                let result =
                    json!({"role": "tool", "name": "f", "tool_call_id": "call00000", "content": content});
                vec![user, calls, result]
            }
            _ => vec![probe],
        };
        let text = self.render_visible(&messages, false, &Kwargs::new());
        // A list that was printed whole, as Python or as JSON, was not read.
        text.is_ok_and(|text| {
            PROBE.iter().all(|part| text.contains(part))
                && !PRINTED.iter().any(|printed| text.contains(printed))
        })
    }
}

/// Words that no template writes.
const PROBE: [&str; 2] = ["probe-7b61", "probe-c4f0"];
const PRINTED: [&str; 2] = ["\"type\": \"text\"", "'type': 'text'"];

fn part(text: &str) -> Json {
    json!({"type": "text", "text": text})
}

const NO_CALLS: &str = "this model's template does not write tool calls: start the server with --chat-template FILE, one \
                        that does";

fn has_calls(message: &Message) -> bool {
    message.fields.contains_key("tool_calls")
}

/// A template without tools would leave calls out of the prompt, and the model would not know what it asked for.
fn shows_calls(message: &Message, text: &str) -> Result<(), TextError> {
    let calls = message.fields.get("tool_calls").and_then(Json::as_array);
    let mut names = calls
        .into_iter()
        .flatten()
        .filter_map(|call| call["function"]["name"].as_str());
    match names.find(|name| !text.contains(name)) {
        None => Ok(()),
        Some(name) => {
            let why = format!("it leaves the tool call {name:?} out of the prompt: {NO_CALLS}");
            Err(TextError::Refused(why))
        }
    }
}

/// Writes the mark behind the text that the model goes on with, and says whether that text is blank. The space behind
/// the mark tells whether the template strips what it writes.
fn put_mark(message: Option<&mut Json>, mark: &str) -> Result<bool, TextError> {
    let nothing = || {
        TextError::Refused("continue_final_message needs a last message with content to go on with".into())
    };
    let extend = |text: &mut Json| {
        let Json::String(text) = text else {
            return Err(nothing());
        };
        let is_blank = text.trim().is_empty();
        text.push_str(mark);
        text.push(' ');
        Ok(is_blank)
    };
    let message = message.and_then(Json::as_object_mut).ok_or_else(nothing)?;
    match message.get_mut("content") {
        Some(Json::Array(parts)) => {
            let last = parts.last_mut().and_then(|part| part.get_mut("text"));
            extend(last.ok_or_else(nothing)?)
        }
        Some(content) => extend(content),
        None => {
            let mut is_blank = Err(nothing());
            for name in REASONING {
                if let Some(text) = message.get_mut(name) {
                    is_blank = extend(text);
                }
            }
            is_blank
        }
    }
}

/// What stands before the mark.
fn cut(marked: &str, mark: &str, is_blank: bool) -> Result<String, TextError> {
    let at = marked.rfind(mark).ok_or_else(not_as_it_is)?;
    let (before, after) = (&marked[..at], &marked[at + mark.len()..]);
    // A template that strips took the space behind the mark, and would have taken the content's own. Before blank
    // content the space is the template's.
    let strips = !after.starts_with(' ') && !is_blank;
    Ok(if strips { before.trim_end() } else { before }.to_owned())
}

fn not_as_it_is() -> TextError {
    let message = "continue_final_message: the template does not write the last message as it is, so there is no place \
                   to go on from";
    TextError::Refused(message.to_owned())
}

/// The message of `raise_exception` alone, or what went wrong and on which line of the template.
fn describe(error: &Error) -> String {
    match (error.kind(), error.detail(), error.line()) {
        (ErrorKind::InvalidOperation, Some(detail), _) if detail.starts_with(python::RAISED) => {
            detail[python::RAISED.len()..].to_owned()
        }
        (ErrorKind::OutOfFuel, ..) => format!("it takes more than {} steps", python::MAX_STEPS),
        (kind, detail, line) => {
            let detail = detail.map(|detail| format!(": {detail}")).unwrap_or_default();
            let line = line
                .map(|line| format!(" (line {line} of the template)"))
                .unwrap_or_default();
            format!("{kind}{detail}{line}")
        }
    }
}

#[cfg(test)]
mod tests;
