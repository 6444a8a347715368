//! Follows a layout through a text, character by character. Not here: where in an answer calls begin (`reader`).

use std::sync::Arc;

use super::literal::Literal;
use super::object::{Arguments, Object};
use super::reader::Deltas;
use super::tagged::Tagged;
use super::value::Parameters;
use super::{Layout, Piece, Separator, Tool};

const MAX_NAME_BYTES: usize = 256;

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
    /// Behind a call: the separator, the end, and what was read of either.
    Behind(Option<Fixed>, Fixed, String),
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
    Id { has_begun: bool },
    Arguments(Arguments),
    Object(Object),
    Tagged(Tagged),
    Literal(Literal),
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

    pub fn take(&mut self, c: char, delta: &mut Deltas) -> Taken {
        self.pending.push(c);
        self.step(c, delta)
    }

    fn step(&mut self, c: char, delta: &mut Deltas) -> Taken {
        loop {
            let taken = match &mut self.at {
                At::Begin(text) => text.take(c),
                At::Piece(_, part) => {
                    let name = self.call.name.as_deref();
                    let tool = name.and_then(|name| self.tools.iter().find(|tool| tool.name == name));
                    let mut out = String::new();
                    let taken = part.take(c, &Parameters::new(tool), &mut self.call.name, &mut out);
                    match self.argue(&out, delta) {
                        true => taken,
                        false => Taken::Failed,
                    }
                }
                At::Behind(separator, end, read) => {
                    let ended = end.take(c);
                    let is_blank = separator.as_ref().is_some_and(Fixed::is_empty);
                    let separated = match separator {
                        Some(text) if !is_blank => text.take(c),
                        _ => Taken::Failed,
                    };
                    read.push(c);
                    match (separated, ended) {
                        (Taken::Done | Taken::Before, _) => separated,
                        (_, Taken::Done) => return Taken::Done,
                        (Taken::More, _) | (_, Taken::More) => return Taken::More,
                        (_, Taken::Before) => return Taken::Before,
                        // It was not the end, so it begins the next call.
                        _ if is_blank => {
                            let read = std::mem::take(read);
                            self.go_on(delta);
                            return read.chars().fold(Taken::More, |taken, c| match taken {
                                Taken::Failed => taken,
                                _ => self.step(c, delta),
                            });
                        }
                        _ => return Taken::Failed,
                    }
                }
            };
            if matches!(taken, Taken::More | Taken::Failed) {
                return taken;
            }
            if !self.go_on(delta) {
                return Taken::Failed;
            }
            if let At::Behind(separator, end, _) = &self.at {
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
    pub fn finish(&mut self, delta: &mut Deltas) {
        if let At::Piece(_, part) = &mut self.at
            && self.call.has_begun
        {
            let mut out = String::new();
            part.finish(&mut out);
            self.argue(&out, delta);
        }
        if self.call.has_begun || matches!(self.at, At::Behind(..)) {
            self.pending.clear();
        }
    }

    /// To the next part. `false`: the call is none.
    fn go_on(&mut self, delta: &mut Deltas) -> bool {
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
        let separator = match self.layout.separator {
            Separator::Within(text) => Some(Fixed::new(text)),
            Separator::Between(_) => None,
        };
        self.at = At::Behind(separator, Fixed::new(self.layout.end), String::new());
        true
    }

    /// Gives arguments out, and before the first of them the name. `false`: there is no such tool.
    fn argue(&mut self, text: &str, delta: &mut Deltas) -> bool {
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
            Piece::Id(_) => Part::Id { has_begun: false },
            Piece::Arguments => Part::Arguments(Arguments::default()),
            Piece::Object { name, arguments } => Part::Object(Object::new(name, arguments)),
            Piece::Tagged {
                open,
                middle,
                close,
                end,
            } => Part::Tagged(Tagged::new(open, middle, close, end)),
            Piece::Python => Part::Literal(Literal::arguments(None)),
            Piece::Marked(mark) => Part::Literal(Literal::arguments(Some(mark))),
        }
    }

    /// `out`: what it adds to the arguments.
    fn take(
        &mut self,
        c: char,
        parameters: &Parameters,
        name: &mut Option<String>,
        out: &mut String,
    ) -> Taken {
        match self {
            Part::Text(text) => text.take(c),
            Part::Name(said) => match c {
                _ if said.len() > MAX_NAME_BYTES => Taken::Failed,
                c if is_named(c) => {
                    said.push(c);
                    Taken::More
                }
                c if c.is_whitespace() && said.is_empty() => Taken::More,
                _ if said.is_empty() => Taken::Failed,
                _ => {
                    *name = Some(std::mem::take(said));
                    Taken::Before
                }
            },
            Part::Id { has_begun } => match c {
                c if is_named(c) => {
                    *has_begun = true;
                    Taken::More
                }
                _ if *has_begun => Taken::Before,
                _ => Taken::Failed,
            },
            // Anything but an object is no call where nothing else says that it is one.
            Part::Arguments(Arguments::Before) if c != '{' && !c.is_whitespace() => Taken::Failed,
            Part::Arguments(arguments) => arguments.take(c, out),
            Part::Object(object) => object.take(c, name, out),
            Part::Tagged(tagged) => tagged.take(c, parameters, out),
            Part::Literal(literal) => literal.take(c, parameters, out),
        }
    }

    /// What is held back, at the end of the answer.
    fn finish(&mut self, out: &mut String) {
        match self {
            Part::Tagged(tagged) => tagged.finish(out),
            Part::Literal(literal) => literal.finish(out),
            Part::Text(_) | Part::Name(_) | Part::Id { .. } | Part::Arguments(_) | Part::Object(_) => {}
        }
    }
}

fn is_named(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '/')
}

/// A text that is expected. White space before it and where it has some may be any or none.
pub(super) struct Fixed {
    /// `None`: something else came.
    rest: Option<&'static str>,
    has_begun: bool,
}

impl Fixed {
    pub fn new(text: &'static str) -> Fixed {
        Fixed {
            rest: Some(text.trim()),
            has_begun: false,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.rest == Some("")
    }

    pub fn take(&mut self, c: char) -> Taken {
        let Some(text) = self.rest else {
            return Taken::Failed;
        };
        let rest = text.trim_start();
        if rest.is_empty() {
            return Taken::Before;
        }
        if c.is_whitespace() && (!self.has_begun || rest.len() < text.len()) {
            return Taken::More;
        }
        self.has_begun = true;
        self.rest = rest.strip_prefix(c);
        match self.rest {
            None => Taken::Failed,
            Some("") => Taken::Done,
            Some(_) => Taken::More,
        }
    }
}
