//! Arguments one by one between texts, `<parameter=city>\nParis\n</parameter>`, as JSON, character by character. Strings stand
//! there as they are, so the schema says which are strings.

use super::call::{Fixed, Taken};
use super::json::{beginning, escape, quoted};
use super::value::{Kinds, Parameters};

const MAX_KEY_BYTES: usize = 1024;

pub(super) struct Tagged {
    open: &'static str,
    /// A key ends with the first `>` of it.
    middle: &'static str,
    close: &'static str,
    end: &'static str,
    n_arguments: usize,
    at: At,
}

enum At {
    /// Before an argument, or the end.
    Between(String),
    Key(String),
    Middle(Fixed, String),
    Value(Value),
}

struct Value {
    key: String,
    kinds: Kinds,
    /// Something was read of it.
    has_begun: bool,
    /// The beginning, `"key": "`, was given out.
    is_given: bool,
    /// What is not text is converted when it is whole.
    whole: String,
    /// Where it may end.
    tail: String,
}

impl Tagged {
    pub fn new(open: &'static str, middle: &'static str, close: &'static str, end: &'static str) -> Tagged {
        Tagged {
            open,
            middle,
            close,
            end,
            n_arguments: 0,
            at: At::Between(String::new()),
        }
    }

    pub fn take(&mut self, c: char, parameters: &Parameters, out: &mut String) -> Taken {
        match &mut self.at {
            At::Between(text) => {
                if text.is_empty() && c.is_whitespace() {
                    return Taken::More;
                }
                text.push(c);
                if text == self.open.trim() {
                    self.at = At::Key(String::new());
                } else if text == self.end.trim() {
                    return self.done(out);
                } else if !self.open.trim().starts_with(text.as_str())
                    && !self.end.trim().starts_with(text.as_str())
                {
                    return Taken::Failed;
                }
            }
            At::Key(key) => {
                let (end, rest) = self.middle.split_at(self.middle.find('>').map_or(0, |at| at + 1));
                key.push(c);
                if let Some(key) = key.strip_suffix(end) {
                    let key = key.trim().to_owned();
                    self.at = match rest.trim().is_empty() {
                        true => At::Value(Value::new(key, parameters)),
                        false => At::Middle(Fixed::new(rest), key),
                    };
                } else if key.len() > MAX_KEY_BYTES {
                    return Taken::Failed;
                }
            }
            At::Middle(text, key) => match text.take(c) {
                Taken::Done | Taken::Before => {
                    let key = std::mem::take(key);
                    self.at = At::Value(Value::new(key, parameters));
                }
                taken => return taken,
            },
            At::Value(_) => return self.take_value(c, out),
        }
        Taken::More
    }

    /// The answer ended here: what there is of a value.
    pub fn finish(&mut self, out: &mut String) {
        if let At::Value(value) = &self.at
            && !value.whole.trim().is_empty()
        {
            let begin = begin(self.n_arguments, &value.key);
            out.push_str(&begin);
            out.push_str(value.whole.trim());
        }
    }

    fn take_value(&mut self, c: char, out: &mut String) -> Taken {
        let At::Value(value) = &mut self.at else {
            return Taken::Failed;
        };
        let is_first = !std::mem::replace(&mut value.has_begun, true);
        if is_first && c == '\n' && self.middle.ends_with('\n') {
            return Taken::More; // the format's
        }
        value.tail.push(c);
        // A model that forgets to close an argument goes on with the next, or ends.
        let stops = [self.close.trim(), self.open.trim(), self.end.trim()];
        let stop = stops.into_iter().find(|stop| value.tail.ends_with(stop));
        let mut free = match stop {
            Some(stop) => value.tail.len() - stop.len(),
            None => beginning(&value.tail, &stops),
        };
        let is_line = self.close.starts_with('\n') && value.tail[..free].ends_with('\n');
        if is_line {
            free -= 1; // the format's, if the value ends behind it
        }
        let tail = value.tail.split_off(free);
        let said = std::mem::replace(&mut value.tail, tail);
        match value.kinds.is_text() {
            false => value.whole.push_str(&said),
            true => {
                if !value.is_given && (stop.is_some() || !said.is_empty()) {
                    value.is_given = true;
                    out.push_str(&begin(self.n_arguments, &value.key));
                    out.push('"');
                }
                escape(&said, out);
            }
        }
        let Some(stop) = stop else {
            return Taken::More;
        };
        match value.kinds.is_text() {
            true => out.push('"'),
            false => {
                out.push_str(&begin(self.n_arguments, &value.key));
                out.push_str(&value.kinds.convert(&value.whole));
            }
        }
        self.n_arguments += 1;
        if stop == self.close.trim() {
            self.at = At::Between(String::new());
        } else if stop == self.open.trim() {
            self.at = At::Key(String::new());
        } else {
            return self.done(out);
        }
        Taken::More
    }

    fn done(&mut self, out: &mut String) -> Taken {
        out.push_str(match self.n_arguments {
            0 => "{}",
            _ => "}",
        });
        Taken::Done
    }
}

impl Value {
    fn new(key: String, parameters: &Parameters) -> Value {
        Value {
            kinds: parameters.kinds(&key),
            key,
            has_begun: false,
            is_given: false,
            whole: String::new(),
            tail: String::new(),
        }
    }
}

/// What stands before a value.
fn begin(n_arguments: usize, key: &str) -> String {
    let before = if n_arguments == 0 { "{" } else { ", " };
    format!("{before}{}: ", quoted(key))
}
