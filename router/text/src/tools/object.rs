//! A call as a JSON object: its name, and its arguments cut out as they are written.

use super::call::Taken;
use super::json::{JsonText, JsonValue};

/// Objects in objects that are looked into: `{"type": "function", "function": {...}}`.
const MAX_DEPTH: usize = 4;

/// The arguments: JSON, or a string that holds JSON, as OpenAI writes them. Instead of null there are none.
#[derive(Default)]
pub(super) enum Arguments {
    #[default]
    Before,
    Json(JsonValue),
    Literal(JsonValue, String),
    Text(JsonText),
}

impl Arguments {
    pub fn take(&mut self, c: char, out: &mut String) -> Taken {
        match self {
            Arguments::Before => match c {
                c if c.is_whitespace() => Taken::More,
                '"' => {
                    *self = Arguments::Text(JsonText::default());
                    Taken::More
                }
                '{' | '[' => {
                    *self = Arguments::Json(JsonValue::default());
                    self.take(c, out)
                }
                _ => {
                    *self = Arguments::Literal(JsonValue::default(), String::new());
                    self.take(c, out)
                }
            },
            Arguments::Json(value) => value.take(c, out),
            Arguments::Text(text) => text.take(c, out),
            Arguments::Literal(value, text) => {
                let taken = value.take(c, text);
                if taken == Taken::Before {
                    out.push_str(if text == "null" { "{}" } else { text });
                }
                taken
            }
        }
    }
}

pub(super) struct Object {
    names: &'static [&'static str],
    arguments: &'static [&'static str],
    at: At,
    depth: usize,
}

enum At {
    Before,
    /// Before a key, or the end.
    Key,
    InKey(JsonText, String),
    Colon(String),
    Name(Option<JsonText>, String),
    Arguments(Arguments),
    /// `function`: the name, or an object with both.
    Function,
    Other(JsonValue),
    /// Behind a value.
    Behind,
}

impl Object {
    pub fn new(names: &'static [&'static str], arguments: &'static [&'static str]) -> Object {
        Object {
            names,
            arguments,
            at: At::Before,
            depth: 0,
        }
    }

    pub fn take(&mut self, c: char, name: &mut Option<String>, out: &mut String) -> Taken {
        match &mut self.at {
            At::InKey(text, key) => match text.take(c, key) {
                Taken::Done => self.at = At::Colon(std::mem::take(key)),
                Taken::More => {}
                _ => return Taken::Failed,
            },
            At::Name(Some(text), said) => match text.take(c, said) {
                Taken::Done => {
                    *name = Some(std::mem::take(said));
                    self.at = At::Behind;
                }
                Taken::More => {}
                _ => return Taken::Failed,
            },
            At::Arguments(arguments) => {
                let taken = arguments.take(c, out);
                return self.behind_value(taken, c, name, out);
            }
            At::Other(value) => {
                let taken = value.take(c, &mut String::new());
                return self.behind_value(taken, c, name, out);
            }
            _ if c.is_whitespace() => {}
            At::Before | At::Function if c == '{' && self.depth < MAX_DEPTH => {
                self.depth += 1;
                self.at = At::Key;
            }
            At::Key if c == '"' => self.at = At::InKey(JsonText::default(), String::new()),
            At::Colon(key) if c == ':' => {
                let key = key.as_str();
                self.at = if self.names.contains(&key) && name.is_none() {
                    At::Name(None, String::new())
                } else if self.arguments.contains(&key) {
                    At::Arguments(Arguments::default())
                } else if key == "function" && name.is_none() {
                    At::Function
                } else {
                    At::Other(JsonValue::default())
                };
            }
            At::Name(text @ None, _) if c == '"' => *text = Some(JsonText::default()),
            At::Function if c == '"' => self.at = At::Name(Some(JsonText::default()), String::new()),
            At::Behind if c == ',' => self.at = At::Key,
            At::Behind | At::Key if c == '}' => {
                self.depth -= 1;
                self.at = At::Behind;
                if self.depth == 0 {
                    return Taken::Done;
                }
            }
            _ => return Taken::Failed,
        }
        Taken::More
    }

    fn behind_value(&mut self, taken: Taken, c: char, name: &mut Option<String>, out: &mut String) -> Taken {
        match taken {
            Taken::More | Taken::Failed => taken,
            Taken::Done => {
                self.at = At::Behind;
                Taken::More
            }
            Taken::Before => {
                self.at = At::Behind;
                self.take(c, name, out)
            }
        }
    }
}
