//! Arguments as Python writes them, `(city='Paris', n=3)`, and between marks, `{city:<escape>Paris<escape>,n:3}`, as JSON,
//! character by character.

use super::call::Taken;
use super::json::{escape, quoted};
use super::value::{Kinds, Parameters};

/// Of a key, or of a word that is no string.
const MAX_WORD_BYTES: usize = 4096;

pub(super) struct Literal {
    /// Around strings. `None`: as Python quotes them.
    mark: Option<&'static str>,
    frames: Vec<Frame>,
    at: At,
}

/// An argument list, object or list that is open.
struct Frame {
    kind: FrameKind,
    close: char,
    n_items: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum FrameKind {
    /// Of a call.
    Arguments,
    Object,
    List,
}

enum At {
    /// Before the arguments.
    Before,
    /// Before an item, or the end.
    Item,
    Key(String),
    QuotedKey(Text, String),
    /// Behind a quoted key.
    Separator(String),
    Value(Kinds),
    Word(String, Kinds),
    /// `Some`: to be converted when it is whole.
    Quoted(Text, Option<(String, Kinds)>),
    Behind,
}

impl Literal {
    /// The arguments of a call.
    pub fn arguments(mark: Option<&'static str>) -> Literal {
        Literal {
            mark,
            frames: vec![],
            at: At::Before,
        }
    }

    pub fn take(&mut self, c: char, parameters: &Parameters, out: &mut String) -> Taken {
        match &mut self.at {
            At::Quoted(text, whole) => {
                let mut said = String::new();
                let taken = text.take(c, &mut said);
                match whole {
                    Some((whole, _)) => whole.push_str(&said),
                    None => escape(&said, out),
                }
                return match taken {
                    Taken::More | Taken::Failed => taken,
                    Taken::Done | Taken::Before => {
                        match whole {
                            Some((whole, kinds)) => out.push_str(&kinds.convert(whole)),
                            None => out.push('"'),
                        }
                        self.at = At::Behind;
                        match taken {
                            Taken::Done => Taken::More,
                            _ => self.take(c, parameters, out),
                        }
                    }
                };
            }
            At::QuotedKey(text, key) => {
                let taken = text.take(c, key);
                return match taken {
                    Taken::More | Taken::Failed => taken,
                    Taken::Done | Taken::Before => {
                        self.at = At::Separator(std::mem::take(key));
                        match taken {
                            Taken::Done => Taken::More,
                            _ => self.take(c, parameters, out),
                        }
                    }
                };
            }
            At::Key(key) => match c {
                '=' | ':' => {
                    let key = std::mem::take(key);
                    return self.separate(c, key.trim(), parameters, out);
                }
                c if ",()[]{}".contains(c) || key.len() > MAX_WORD_BYTES => return Taken::Failed,
                c => key.push(c),
            },
            At::Word(word, kinds) => {
                let is_python = self.mark.is_none();
                let ends = match is_python {
                    true => ",)]}:".contains(c) || c.is_whitespace(),
                    false => ",]}".contains(c),
                };
                if ends {
                    let json = word_to_json(word.trim(), *kinds);
                    out.push_str(&json);
                    self.at = At::Behind;
                    return self.take(c, parameters, out);
                }
                let is_prefix = matches!(word.to_ascii_lowercase().as_str(), "r" | "u" | "b" | "f");
                match c {
                    '\'' | '"' if is_python && is_prefix => {
                        let is_raw = word.eq_ignore_ascii_case("r");
                        out.push('"');
                        self.at = At::Quoted(Text::python(c, is_raw), None);
                    }
                    '(' | '=' if is_python => return Taken::Failed,
                    _ if word.len() > MAX_WORD_BYTES => return Taken::Failed,
                    c => word.push(c),
                }
            }
            _ if c.is_whitespace() => {}
            At::Before => {
                let (open, close) = match self.mark {
                    None => ('(', ')'),
                    Some(_) => ('{', '}'),
                };
                match c == open {
                    true => self.open(FrameKind::Arguments, close),
                    false => return Taken::Failed,
                }
            }
            At::Separator(key) => {
                let key = std::mem::take(key);
                return self.separate(c, &key, parameters, out);
            }
            At::Item => {
                let frame = self.frames.last().expect("an item stands in a frame");
                if c == frame.close {
                    return self.close(out);
                }
                let is_python_call = self.mark.is_none() && frame.kind == FrameKind::Arguments;
                match (frame.kind, self.quote(c)) {
                    (FrameKind::List, _) => {
                        self.begin_item(out);
                        self.at = At::Value(Kinds::default());
                        return self.take(c, parameters, out);
                    }
                    (_, Some(text)) if !is_python_call => self.at = At::QuotedKey(text, String::new()),
                    _ if !(c.is_alphanumeric() || c == '_' || !is_python_call) => return Taken::Failed,
                    _ => {
                        self.at = At::Key(String::new());
                        return self.take(c, parameters, out);
                    }
                }
            }
            At::Value(kinds) => {
                let kinds = *kinds;
                match (self.quote(c), c) {
                    (Some(text), _) => {
                        // Between marks everything is a text, so the schema says what was meant.
                        let whole = (self.mark.is_some() && !kinds.is_text()).then(|| (String::new(), kinds));
                        if whole.is_none() {
                            out.push('"');
                        }
                        self.at = At::Quoted(text, whole);
                    }
                    (None, '{') => self.open(FrameKind::Object, '}'),
                    (None, '[') => self.open(FrameKind::List, ']'),
                    (None, '(') if self.mark.is_none() => self.open(FrameKind::List, ')'),
                    (None, ',' | '}' | ']' | ')' | ':' | '=') => return Taken::Failed,
                    (None, c) => self.at = At::Word(c.to_string(), kinds),
                }
            }
            At::Behind => match self.frames.last() {
                Some(frame) if c == frame.close => return self.close(out),
                Some(_) if c == ',' => self.at = At::Item,
                _ => return Taken::Failed,
            },
        }
        Taken::More
    }

    /// The answer ended here.
    pub fn finish(&mut self, out: &mut String) {
        if let At::Word(word, _) = &self.at {
            out.push_str(word);
        }
    }

    fn quote(&self, c: char) -> Option<Text> {
        match self.mark {
            None => matches!(c, '\'' | '"').then(|| Text::python(c, false)),
            Some(mark) => mark.starts_with(c).then(|| Text::Marked {
                mark,
                held: c.to_string(),
                is_open: false,
            }),
        }
    }

    fn open(&mut self, kind: FrameKind, close: char) {
        self.frames.push(Frame {
            kind,
            close,
            n_items: 0,
        });
        self.at = At::Item;
    }

    /// What opens the frame is given out with its first item: what was taken for arguments may be none.
    fn begin_item(&mut self, out: &mut String) {
        let frame = self.frames.last_mut().expect("an item stands in a frame");
        out.push_str(match (frame.n_items, frame.kind) {
            (0, FrameKind::List) => "[",
            (0, _) => "{",
            _ => ", ",
        });
        frame.n_items += 1;
    }

    fn close(&mut self, out: &mut String) -> Taken {
        let frame = self.frames.pop().expect("what closes was open");
        out.push_str(match (frame.n_items, frame.kind) {
            (0, FrameKind::List) => "[]",
            (0, _) => "{}",
            (_, FrameKind::List) => "]",
            _ => "}",
        });
        self.at = At::Behind;
        match self.frames.is_empty() {
            true => Taken::Done,
            false => Taken::More,
        }
    }

    fn separate(&mut self, c: char, key: &str, parameters: &Parameters, out: &mut String) -> Taken {
        let kind = self.frames.last().expect("a key stands in a frame").kind;
        let separator = match (kind, self.mark) {
            (FrameKind::Arguments, None) => '=',
            _ => ':',
        };
        if c != separator {
            return Taken::Failed;
        }
        self.begin_item(out);
        out.push_str(&quoted(key));
        out.push_str(": ");
        self.at = At::Value(match kind {
            FrameKind::Arguments => parameters.kinds(key),
            _ => Kinds::default(),
        });
        Taken::More
    }
}

/// A string.
enum Text {
    Python {
        quote: char,
        is_raw: bool,
        is_triple: bool,
        /// Quotes that were read and may begin or end it.
        quotes: usize,
        is_open: bool,
        /// The first half of a character of two.
        half: Option<u32>,
        escape: String,
    },
    Marked {
        mark: &'static str,
        held: String,
        is_open: bool,
    },
}

impl Text {
    /// Behind its first quote.
    fn python(quote: char, is_raw: bool) -> Text {
        Text::Python {
            quote,
            is_raw,
            is_triple: false,
            quotes: 1,
            is_open: false,
            half: None,
            escape: String::new(),
        }
    }

    fn take(&mut self, c: char, out: &mut String) -> Taken {
        match self {
            Text::Marked { mark, held, is_open } => {
                held.push(c);
                if held.as_str() == *mark {
                    held.clear();
                    if *is_open {
                        return Taken::Done;
                    }
                    *is_open = true;
                } else if *is_open {
                    while !mark.starts_with(held.as_str()) {
                        out.push(held.remove(0));
                    }
                } else if !mark.starts_with(held.as_str()) {
                    return Taken::Failed;
                }
                Taken::More
            }
            Text::Python {
                quote,
                is_raw,
                is_triple,
                quotes,
                is_open,
                half,
                escape,
            } => {
                if !*is_open {
                    match (c == *quote, *quotes) {
                        (true, 1) => {
                            *quotes = 2;
                            return Taken::More;
                        }
                        (true, _) => (*is_open, *is_triple, *quotes) = (true, true, 0),
                        // Two quotes are the empty string.
                        (false, 2) => return Taken::Before,
                        (false, _) => (*is_open, *quotes) = (true, 0),
                    }
                    if c == *quote {
                        return Taken::More;
                    }
                }
                if !escape.is_empty() {
                    escape.push(c);
                    if let Some(code) = unescaped(escape) {
                        escape.clear();
                        code.put(half, out);
                    }
                    return Taken::More;
                }
                if c == *quote {
                    *quotes += 1;
                    return match *quotes == 3 || !*is_triple {
                        true => Taken::Done,
                        false => Taken::More,
                    };
                }
                out.extend(std::iter::repeat_n(*quote, std::mem::take(quotes)));
                match c == '\\' && !*is_raw {
                    true => escape.push(c),
                    false => Escaped::Text(c.to_string()).put(half, out),
                }
                Taken::More
            }
        }
    }
}

enum Escaped {
    Text(String),
    Code(u32),
}

impl Escaped {
    /// JSON's strings are valid here too, so a character may be written as two halves.
    fn put(self, half: &mut Option<u32>, out: &mut String) {
        let lone = |half: &mut Option<u32>, out: &mut String| {
            if half.take().is_some() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        };
        match self {
            Escaped::Text(text) => {
                lone(half, out);
                out.push_str(&text);
            }
            Escaped::Code(low @ 0xDC00..0xE000) => match half.take() {
                Some(high) => out.extend(char::from_u32(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))),
                None => out.push(char::REPLACEMENT_CHARACTER),
            },
            Escaped::Code(high @ 0xD800..0xDC00) => {
                lone(half, out);
                *half = Some(high);
            }
            Escaped::Code(code) => {
                lone(half, out);
                out.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
        }
    }
}

/// What an escape says. `None`: it goes on.
fn unescaped(escape: &str) -> Option<Escaped> {
    let mut rest = escape[1..].chars();
    let kind = rest.next()?;
    let text = |text: &str| Some(Escaped::Text(text.to_owned()));
    let digits = match kind {
        '\n' => return text(""),
        'n' => return text("\n"),
        't' => return text("\t"),
        'r' => return text("\r"),
        'b' => return text("\u{8}"),
        'f' => return text("\u{c}"),
        'a' => return text("\u{7}"),
        'v' => return text("\u{b}"),
        '0' => return text("\0"),
        '\\' | '\'' | '"' | '/' => return text(&kind.to_string()),
        'x' => 2,
        'u' => 4,
        'U' => 8,
        // Python keeps the backslash of an escape that it does not know.
        _ => return text(escape),
    };
    let rest = rest.as_str();
    match u32::from_str_radix(rest, 16) {
        _ if !rest.chars().all(|c| c.is_ascii_hexdigit()) => text(escape),
        _ if rest.len() < digits => None,
        Ok(code) => Some(Escaped::Code(code)),
        Err(_) => text(escape),
    }
}

/// A word of Python or JSON. What is none of theirs is a string.
fn word_to_json(word: &str, kinds: Kinds) -> String {
    match word {
        _ if kinds.string && kinds.is_text() => quoted(word),
        "True" | "true" => "true".to_owned(),
        "False" | "false" => "false".to_owned(),
        "None" | "null" => "null".to_owned(),
        _ => number(word).unwrap_or_else(|| quoted(word)),
    }
}

/// A number of Python as one of JSON.
fn number(word: &str) -> Option<String> {
    let is_json = |text: &str| serde_json::from_str::<serde_json::Number>(text).is_ok();
    if is_json(word) {
        return Some(word.to_owned());
    }
    let plain = word.replace('_', "");
    let (sign, digits) = match plain.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", plain.strip_prefix('+').unwrap_or(&plain)),
    };
    for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] {
        if let Some(digits) = digits.to_ascii_lowercase().strip_prefix(prefix) {
            return u64::from_str_radix(digits, radix)
                .ok()
                .map(|number| format!("{sign}{number}"));
        }
    }
    let whole = digits.trim_start_matches('0');
    let candidates = [
        whole.to_owned(),
        format!("0{whole}"),
        format!("{whole}0"),
        digits.replace(".e", ".0e"),
    ];
    let found = candidates.into_iter().find(|text| is_json(text));
    found
        .filter(|_| digits.starts_with(|c: char| c.is_ascii_digit() || c == '.'))
        .map(|text| format!("{sign}{text}"))
}

/// A whole value. `None`: it is none.
pub(super) fn python_to_json(text: &str) -> Option<String> {
    let mut literal = Literal {
        mark: None,
        frames: vec![],
        at: At::Value(Kinds::default()),
    };
    let (mut out, mut is_done) = (String::new(), false);
    for c in text.trim().chars() {
        if is_done {
            return None;
        }
        match literal.take(c, &Parameters::new(None), &mut out) {
            Taken::More => {}
            Taken::Done => is_done = true,
            Taken::Before | Taken::Failed => return None,
        }
    }
    is_done.then_some(out)
}
