//! A conversation as one text: the model's own Jinja template, rendered as transformers renders it. Serving and
//! training both come through here. Not here: Python's methods and filters (`python`), tokens (`tokenizer`).

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};

use crate::error::TextError;
use crate::python;

/// One turn. `weight` is for training only (0: no loss on this turn); templates do not see it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
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

/// `chat_template_kwargs`: more variables for the template (`enable_thinking`, ...).
pub type Kwargs = BTreeMap<String, serde_json::Value>;

/// Variables that are not for a client to set.
const RESERVED: [&str; 2] = ["messages", "add_generation_prompt"];
const NAME: &str = "chat_template";

/// A compiled template with the model's special tokens. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// `special_tokens`: `bos_token`, `eos_token`, ... as the template sees them.
    pub fn new<'a>(
        source: &str,
        special_tokens: impl IntoIterator<Item = (&'static str, &'a str)>,
    ) -> Result<ChatTemplate, TextError> {
        let mut environment = python::environment();
        let source = python::without_generation_tags(source);
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| TextError::BrokenTemplate(describe(&error)))?;
        let special_tokens = special_tokens
            .into_iter()
            .map(|(name, text)| (name, text.to_owned()))
            .collect();
        Ok(ChatTemplate {
            environment: Arc::new(environment),
            special_tokens,
        })
    }

    pub fn render(&self, messages: &[Message], ending: Ending, kwargs: &Kwargs) -> Result<String, TextError> {
        if let Some(name) = RESERVED.into_iter().find(|name| kwargs.contains_key(*name)) {
            return Err(TextError::Refused(format!(
                "chat_template_kwargs may not set {name}"
            )));
        }
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        context.extend([("tools", Value::from(())), ("documents", Value::from(()))]);
        context.extend(
            self.special_tokens
                .iter()
                .map(|(name, text)| (*name, Value::from(text.as_str()))),
        );
        context.extend(
            kwargs
                .iter()
                .map(|(name, value)| (name.as_str(), Value::from(Serde(value)))),
        );
        context.insert("messages", messages.iter().map(visible).collect());
        context.insert(
            "add_generation_prompt",
            Value::from(ending == Ending::GenerationPrompt),
        );
        let template = self.environment.get_template(NAME).expect("added by new");
        let refused = |error: Error| TextError::Refused(describe(&error));
        let text = template.render(Value::from_pairs(context)).map_err(refused)?;
        match ending {
            Ending::Closed | Ending::GenerationPrompt => Ok(text),
            Ending::OpenMessage => cut_after_content(text, messages),
        }
    }
}

fn visible(message: &Message) -> Value {
    let Message {
        role,
        content,
        weight: _,
        name,
    } = message;
    let pairs = [
        ("role", Some(role)),
        ("content", Some(content)),
        ("name", name.as_ref()),
    ];
    Value::from_pairs(
        pairs
            .into_iter()
            .filter_map(|(key, text)| Some((key, Value::from(text?.as_str())))),
    )
}

/// As transformers' `continue_final_message`: what the template wrote after the last content is cut off, and with it
/// trailing space that the template stripped.
fn cut_after_content(mut text: String, messages: &[Message]) -> Result<String, TextError> {
    let content = messages.last().map_or("", |message| message.content.as_str());
    if content.trim().is_empty() {
        return Err(TextError::Refused(
            "continue_final_message needs a last message with text to go on with".into(),
        ));
    }
    let hidden = || {
        TextError::Refused(
            "continue_final_message: the template does not write the last message as is".into(),
        )
    };
    let start = text.rfind(content.trim()).ok_or_else(hidden)?;
    let whole = content.trim_start();
    let length = if text[start..].starts_with(whole) {
        whole.len()
    } else {
        content.trim().len()
    };
    text.truncate(start + length);
    Ok(text)
}

/// The message of `raise_exception` alone, or what went wrong and on which line of the template.
fn describe(error: &Error) -> String {
    match (error.kind(), error.detail(), error.line()) {
        (ErrorKind::InvalidOperation, Some(detail), _) if detail.starts_with(python::RAISED) => {
            detail[python::RAISED.len()..].to_owned()
        }
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
