//! What an answer must be: a JSON Schema or a grammar in the lark dialect of llguidance, by whose state the tokens that
//! may come next are masked. Everything else that clients write (regular expressions, choices, GBNF, structural tags) is
//! turned into one of these two where it is taken in. Not here: which field asked (server), when a mask is needed (backend).

mod compiler;
mod format;
mod gbnf;
mod place;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::Digest as _;

use crate::id::Digest;

pub use compiler::{Compiler, Guide, GuideError, Mask, Next, STACK_BYTES, Vocabulary};
pub use format::{Field, Format, Tag};

/// Of a grammar's text. (The largest schemas in use, as FHIR's, have some megabytes; those of requests kilobytes.)
pub const MAX_BYTES: usize = 512 << 10;

/// As it travels: a text and how it is read. The digest is of both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Raw", into = "Raw")]
pub struct Grammar(Arc<Text>);

#[derive(Debug, PartialEq, Eq)]
struct Text {
    kind: Kind,
    text: String,
    digest: Digest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    JsonSchema,
    Lark,
}

#[derive(Serialize, Deserialize)]
struct Raw {
    kind: Kind,
    text: String,
}

/// Between the parts of a JSON text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whitespace {
    /// A space, or a new line and its indentation. Any more would be JSON too, but small models do not find an end of it.
    Usual,
    None,
    /// A regular expression.
    Pattern(String),
}

impl Whitespace {
    fn options(&self) -> Value {
        match self {
            Whitespace::Usual => json!({"whitespace_pattern": r"( |\r?\n[ \t]{0,40})"}),
            Whitespace::None => json!({"whitespace_flexible": false}),
            Whitespace::Pattern(pattern) => json!({"whitespace_pattern": pattern}),
        }
    }
}

/// A client's grammar cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadGrammar(pub String);

impl Grammar {
    /// Text that is valid by the schema.
    pub fn json_schema(schema: &Value, whitespace: &Whitespace) -> Result<Grammar, BadGrammar> {
        with_options(schema, whitespace).map(|schema| Grammar::new(Kind::JsonSchema, schema.to_string()))
    }

    pub fn json_object(whitespace: &Whitespace) -> Grammar {
        let schema = with_options(&json!({"type": "object"}), whitespace);
        Grammar::new(
            Kind::JsonSchema,
            schema.expect("an object is a schema").to_string(),
        )
    }

    pub fn lark(text: impl Into<String>) -> Grammar {
        Grammar::new(Kind::Lark, text.into())
    }

    /// The whole answer matches, so anchors at its ends say nothing and are left out (they are no part of the dialect).
    pub fn regex(pattern: &str) -> Grammar {
        Grammar::lark(format!("start: {}", lark_regex(pattern)))
    }

    pub fn choice(choices: &[String]) -> Result<Grammar, BadGrammar> {
        if choices.is_empty() {
            return Err(BadGrammar("there is nothing to choose from".to_owned()));
        }
        let choices: Vec<String> = choices.iter().map(|choice| lark_text(choice)).collect();
        // One terminal, so that a choice may begin with another one.
        Ok(Grammar::lark(format!(
            "start: CHOICE\nCHOICE: {}",
            choices.join(" | ")
        )))
    }

    /// Lark, or GBNF, which llama.cpp and xgrammar read: its rules are told by `::=`.
    pub fn lark_or_gbnf(text: &str) -> Result<Grammar, BadGrammar> {
        match gbnf::is_gbnf(text) {
            true => gbnf::to_lark(text).map(Grammar::lark),
            false => Ok(Grammar::lark(text)),
        }
    }

    /// Text of which parts are bound. `special`: tokens that are not made of characters, and how texts name them.
    pub fn format(format: &Format, special: &[(String, u32)]) -> Result<Grammar, BadGrammar> {
        format::to_lark(format, special).map(Grammar::lark)
    }

    fn new(kind: Kind, text: String) -> Grammar {
        let mut sha = sha2::Sha256::new();
        sha.update([kind as u8]);
        sha.update(text.as_bytes());
        let digest = Digest(sha.finalize().into());
        Grammar(Arc::new(Text { kind, text, digest }))
    }

    /// As a part of another one.
    pub fn as_format(&self) -> Format {
        Format::Lark(match self.kind() {
            Kind::Lark => self.text().to_owned(),
            Kind::JsonSchema => format!("start: %json {}", self.text()),
        })
    }

    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    pub fn text(&self) -> &str {
        &self.0.text
    }

    pub fn digest(&self) -> Digest {
        self.0.digest
    }
}

impl From<Raw> for Grammar {
    fn from(Raw { kind, text }: Raw) -> Grammar {
        Grammar::new(kind, text)
    }
}

impl From<Grammar> for Raw {
    fn from(grammar: Grammar) -> Raw {
        Raw {
            kind: grammar.kind(),
            text: grammar.text().to_owned(),
        }
    }
}

/// The key by which llguidance reads options; a client's own is no keyword of JSON Schema, and goes.
const OPTIONS: &str = "x-guidance";

fn with_options(schema: &Value, whitespace: &Whitespace) -> Result<Value, BadGrammar> {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => json!({}),
        Value::Bool(false) => return Err(BadGrammar("nothing is valid by the schema false".to_owned())),
        _ => {
            return Err(BadGrammar("a JSON Schema is an object, true or false".to_owned()));
        }
    };
    schema[OPTIONS] = whitespace.options();
    Ok(schema)
}

/// A text as lark quotes it.
fn lark_text(text: &str) -> String {
    Value::from(text).to_string()
}

fn lark_regex(pattern: &str) -> String {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let pattern = match pattern.strip_suffix('$') {
        // An escaped dollar is one to write.
        Some(rest) if rest.chars().rev().take_while(|&c| c == '\\').count() % 2 == 0 => rest,
        _ => pattern,
    };
    format!("/{}/", llguidance::regex_to_lark(pattern, ""))
}

#[cfg(test)]
mod tests;
