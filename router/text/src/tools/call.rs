//! Follows a layout through a text, character by character. Not here: where in an answer calls begin (`reader`).

use std::sync::Arc;

use super::json::{JsonText, JsonValue};
use super::reader::Delta;
use super::{Layout, Piece, Tool};

/// What became of a character.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Taken {
    More,
    /// It was the last.
    Done,
    /// The one before it was the last.
    Before,
    /// It does not belong here.
    Failed,
}

/// Calls by one layout.
pub(super) struct Calls {
    layout: &'static Layout,
    tools: Arc<[Tool]>,
    at: At,
    call: Call,
    /// What was read and is not given out.
    pending: String,
}

enum At {
    Begin(Fixed),
    Piece(usize, Part),
    /// Behind a call: the separator, the end.
    Behind(Option<Fixed>, Fixed),
}

/// The call that is read.
#[derive(Default)]
struct Call {
    index: usize,
    name: Option<String>,
    /// Arguments that came before the name did.
    early: String,
    /// Its name was given out.
    has_begun: bool,
}

/// What a piece has read so far.
enum Part {
    Text(Fixed),
    Name(String),
    Arguments(Arguments),
    Object(Object),
}

impl Calls {
    /// Behind the opening. `index`: of the first call.
    pub fn new(layout: &'static Layout, tools: Arc<[Tool]>, index: usize) -> Calls {
        Calls {
            layout,
            tools,
            at: At::Begin(Fixed::new(layout.begin)),
            call: Call {
                index,
                ..Call::default()
            },
            pending: String::new(),
        }
    }

    /// Calls of the answer that were given out.
    pub fn n_calls(&self) -> usize {
        self.call.index + usize::from(self.call.has_begun)
    }

    pub fn take(&mut self, c: char, delta: &mut Delta) -> Taken {
        self.pending.push(c);
        loop {
            let taken = match &mut self.at {
                At::Begin(text) => text.take(c),
                At::Piece(_, part) => {
                    let mut out = String::new();
                    let taken = part.take(c, &mut self.call, &mut out);
                    match self.argue(&out, delta) {
                        true => taken,
                        false => Taken::Failed,
                    }
                }
                At::Behind(separator, end) => {
                    let ended = end.take(c);
                    match separator.as_mut().map_or(Taken::Failed, |text| text.take(c)) {
                        Taken::Failed => {
                            *separator = None;
                            return ended;
                        }
                        taken => taken,
                    }
                }
            };
            if matches!(taken, Taken::More | Taken::Failed) {
                return taken;
            }
            if !self.go_on(delta) {
                return Taken::Failed;
            }
            if let At::Behind(separator, end) = &self.at {
                self.pending.clear();
                if taken == Taken::Before {
                    self.pending.push(c);
                }
                if separator.is_none() && end.is_empty() {
                    return taken;
                }
            }
            if taken == Taken::Done {
                return Taken::More;
            }
        }
    }

    /// What was read and is not given out.
    pub fn into_pending(self) -> String {
        self.pending
    }

    /// The answer ended here. What no call came of is left pending.
    pub fn finish(&mut self) {
        if self.call.has_begun || matches!(self.at, At::Behind(..)) {
            self.pending.clear();
        }
    }

    /// What ends these calls, should they not go on as they ought to.
    pub fn end(&self) -> &'static str {
        self.layout.end.trim()
    }

    /// To the next part. `false`: the call is none.
    fn go_on(&mut self, delta: &mut Delta) -> bool {
        let next = match self.at {
            At::Begin(_) | At::Behind(..) => 0,
            At::Piece(i, _) => i + 1,
        };
        if let Some(piece) = self.layout.call.get(next) {
            self.at = At::Piece(next, Part::new(piece));
            return true;
        }
        let is_known = self.call.has_begun || self.argue("{}", delta);
        // Without a name nothing begins.
        if !is_known || !self.call.has_begun {
            return false;
        }
        self.call = Call {
            index: self.call.index + 1,
            ..Call::default()
        };
        let separator = self.layout.separator.map(Fixed::new);
        self.at = At::Behind(separator, Fixed::new(self.layout.end));
        true
    }

    /// Gives arguments out, and before the first of them the name. `false`: there is no such tool.
    fn argue(&mut self, text: &str, delta: &mut Delta) -> bool {
        let call = &mut self.call;
        if call.has_begun {
            delta.argue(call.index, text);
            if !text.is_empty() {
                self.pending.clear();
            }
            return true;
        }
        call.early.push_str(text);
        let Some(name) = call.name.clone().filter(|_| !call.early.is_empty()) else {
            return true;
        };
        if self.layout.open.is_empty() && !self.tools.iter().any(|tool| tool.name == name) {
            return false;
        }
        call.has_begun = true;
        delta.begin(call.index, name);
        delta.argue(call.index, &std::mem::take(&mut call.early));
        self.pending.clear();
        true
    }
}

impl Part {
    fn new(piece: &'static Piece) -> Part {
        match piece {
            Piece::Text(text) => Part::Text(Fixed::new(text)),
            Piece::Name => Part::Name(String::new()),
            Piece::Arguments => Part::Arguments(Arguments::default()),
            Piece::Object { name, arguments } => Part::Object(Object {
                name,
                arguments,
                at: InObject::Before,
            }),
        }
    }

    /// `out`: what it adds to the arguments.
    fn take(&mut self, c: char, call: &mut Call, out: &mut String) -> Taken {
        match self {
            Part::Text(text) => text.take(c),
            Part::Name(name) => match c {
                c if c.is_alphanumeric() || "_-./".contains(c) => {
                    name.push(c);
                    Taken::More
                }
                c if c.is_whitespace() && name.is_empty() => Taken::More,
                _ if name.is_empty() => Taken::Failed,
                _ => {
                    call.name = Some(std::mem::take(name));
                    Taken::Before
                }
            },
            Part::Arguments(arguments) => arguments.take(c, out),
            Part::Object(object) => object.take(c, call, out),
        }
    }
}

/// A text that is expected. White space before it and where it has some may be any or none.
struct Fixed {
    rest: &'static str,
    has_begun: bool,
}

impl Fixed {
    fn new(text: &'static str) -> Fixed {
        Fixed {
            rest: text.trim(),
            has_begun: false,
        }
    }

    fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn take(&mut self, c: char) -> Taken {
        let rest = self.rest.trim_start();
        if rest.is_empty() {
            return Taken::Before;
        }
        if c.is_whitespace() && (!self.has_begun || rest.len() < self.rest.len()) {
            return Taken::More;
        }
        match rest.strip_prefix(c) {
            None => Taken::Failed,
            Some(rest) => {
                self.has_begun = true;
                self.rest = rest;
                match rest.is_empty() {
                    true => Taken::Done,
                    false => Taken::More,
                }
            }
        }
    }
}

/// The arguments as JSON, or as a string that holds JSON, as OpenAI writes them. Instead of null there are none.
#[derive(Default)]
enum Arguments {
    #[default]
    Before,
    Json(JsonValue),
    Literal(JsonValue, String),
    Text(JsonText),
}

impl Arguments {
    fn take(&mut self, c: char, out: &mut String) -> Taken {
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

/// A JSON object with the name and the arguments of a call.
struct Object {
    name: &'static [&'static str],
    arguments: &'static [&'static str],
    at: InObject,
}

enum InObject {
    Before,
    /// Before a key, or the end.
    Key,
    InKey(JsonText, String),
    Colon(String),
    Name(Option<JsonText>, String),
    Arguments(Arguments),
    Other(JsonValue),
    /// Behind a value.
    Behind,
}

impl Object {
    fn take(&mut self, c: char, call: &mut Call, out: &mut String) -> Taken {
        match &mut self.at {
            InObject::InKey(text, key) => match text.take(c, key) {
                Taken::Done => self.at = InObject::Colon(std::mem::take(key)),
                Taken::More => {}
                _ => return Taken::Failed,
            },
            InObject::Name(Some(text), name) => match text.take(c, name) {
                Taken::Done => {
                    call.name = Some(std::mem::take(name));
                    self.at = InObject::Behind;
                }
                Taken::More => {}
                _ => return Taken::Failed,
            },
            InObject::Arguments(arguments) => {
                let taken = arguments.take(c, out);
                return self.after(taken, c, call, out);
            }
            InObject::Other(value) => {
                let taken = value.take(c, &mut String::new());
                return self.after(taken, c, call, out);
            }
            _ if c.is_whitespace() => {}
            InObject::Before if c == '{' => self.at = InObject::Key,
            InObject::Key if c == '"' => self.at = InObject::InKey(JsonText::default(), String::new()),
            InObject::Colon(key) if c == ':' => {
                let key = key.as_str();
                self.at = if self.name.contains(&key) && call.name.is_none() {
                    InObject::Name(None, String::new())
                } else if self.arguments.contains(&key) {
                    InObject::Arguments(Arguments::default())
                } else {
                    InObject::Other(JsonValue::default())
                };
            }
            InObject::Name(text @ None, _) if c == '"' => *text = Some(JsonText::default()),
            InObject::Behind if c == ',' => self.at = InObject::Key,
            InObject::Behind | InObject::Key if c == '}' => return Taken::Done,
            _ => return Taken::Failed,
        }
        Taken::More
    }

    fn after(&mut self, taken: Taken, c: char, call: &mut Call, out: &mut String) -> Taken {
        match taken {
            Taken::More | Taken::Failed => taken,
            Taken::Done => {
                self.at = InObject::Behind;
                Taken::More
            }
            Taken::Before => {
                self.at = InObject::Behind;
                self.take(c, call, out)
            }
        }
    }
}
