//! JSON character by character: where a value ends, and what a string says. It is not judged whether all of it is JSON: what
//! a model wrote within a value is passed on. Not here: which value is what (`call`).

use super::call::Taken;

/// A value, passed on as it was written, but for control characters in strings: JSON wants them escaped.
#[derive(Debug, Default)]
pub(super) struct JsonValue {
    /// What closes the arrays and objects that are open.
    closing: Vec<char>,
    within: Within,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Within {
    #[default]
    Nothing,
    Structure,
    Literal,
    Text,
    Escape,
}

impl JsonValue {
    pub fn take(&mut self, c: char, out: &mut String) -> Taken {
        match self.within {
            Within::Escape => {
                self.within = Within::Text;
                out.push(c);
            }
            Within::Text => match c {
                '"' => {
                    out.push(c);
                    self.within = Within::Structure;
                    if self.closing.is_empty() {
                        return Taken::Done;
                    }
                }
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
                c => {
                    if c == '\\' {
                        self.within = Within::Escape;
                    }
                    out.push(c);
                }
            },
            Within::Literal if !is_literal(c) => {
                self.within = Within::Structure;
                return match self.closing.is_empty() {
                    true => Taken::Before,
                    false => self.take(c, out),
                };
            }
            Within::Literal => out.push(c),
            Within::Nothing if c.is_whitespace() => {}
            Within::Nothing | Within::Structure => {
                self.within = Within::Structure;
                match c {
                    '{' => self.closing.push('}'),
                    '[' => self.closing.push(']'),
                    '"' => self.within = Within::Text,
                    '}' | ']' => {
                        if self.closing.last() != Some(&c) {
                            return Taken::Failed;
                        }
                        self.closing.pop();
                        if self.closing.is_empty() {
                            out.push(c);
                            return Taken::Done;
                        }
                    }
                    c if is_literal(c) => self.within = Within::Literal,
                    ',' | ':' if !self.closing.is_empty() => {}
                    c if c.is_whitespace() => {}
                    _ => return Taken::Failed,
                }
                out.push(c);
            }
        }
        Taken::More
    }
}

/// A text as JSON's string.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A text as the inside of JSON's string.
pub(super) fn escape(text: &str, out: &mut String) {
    let quoted = quoted(text);
    out.push_str(&quoted[1..quoted.len() - 1]);
}

/// Where one of the marks may begin at the end of the text; the text's length if none may.
pub(super) fn beginning(text: &str, marks: &[&str]) -> usize {
    let longest = marks.iter().map(|mark| mark.len()).max().unwrap_or(0);
    let begins = |&(at, _): &(usize, char)| {
        let rest = &text[at..];
        rest.len() < longest && marks.iter().any(|mark| mark.starts_with(rest))
    };
    text.char_indices().find(begins).map_or(text.len(), |(at, _)| at)
}

fn is_literal(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '-' | '+' | '.')
}

/// The inside of a string, unescaped.
#[derive(Debug, Default)]
pub(super) struct JsonText {
    /// An escape that is not complete.
    escape: String,
    /// The first half of a character of two.
    half: Option<u32>,
}

impl JsonText {
    /// A character behind the opening quotation mark. `Done` is the closing one.
    pub fn take(&mut self, c: char, out: &mut String) -> Taken {
        if self.escape.is_empty() {
            match c {
                '"' => {
                    self.end(out);
                    return Taken::Done;
                }
                '\\' => self.escape.push(c),
                c => {
                    self.end(out);
                    out.push(c);
                }
            }
            return Taken::More;
        }
        self.escape.push(c);
        let code = match self.escape[1..].strip_prefix('u') {
            None => u32::from(match c {
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                'b' => '\u{8}',
                'f' => '\u{c}',
                c => c,
            }),
            Some(digits) if digits.len() < 4 => return Taken::More,
            Some(digits) => match u32::from_str_radix(digits, 16) {
                Ok(code) => code,
                Err(_) => return Taken::Failed,
            },
        };
        self.escape.clear();
        match (self.half.take(), code) {
            (Some(high), 0xDC00..0xE000) => {
                let code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00);
                out.extend(char::from_u32(code));
            }
            (lone, code) => {
                self.half = lone;
                self.end(out);
                match code {
                    0xD800..0xDC00 => self.half = Some(code),
                    code => out.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)),
                }
            }
        }
        Taken::More
    }

    fn end(&mut self, out: &mut String) {
        if self.half.take().is_some() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}
