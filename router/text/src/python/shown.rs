//! Values as Python writes them: `str(value)`, which is what a template prints, and `repr(value)`, which is what stands
//! inside a printed list or dictionary.

use std::fmt::{self, Write};
use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, Value, ValueKind};
use serde_json::Value as Json;

use super::weight::MAX_DEPTH;

/// A value for a template. Floats that the template language would write in another way than Python wherever it joins
/// texts become `Float`s.
pub fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(bool) => Value::from(*bool),
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(items) => Value::from_pairs(items.iter().map(|(key, item)| (key.as_str(), value(item)))),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), ..) => Value::from(number),
            (None, Some(number), _) => Value::from(number),
            (None, None, number) => {
                let number = number.unwrap_or(f64::NAN);
                match Value::from(number).to_string() == float(number) {
                    true => Value::from(number),
                    false => Value::from_object(Float(number)),
                }
            }
        },
    }
}

/// A float that prints as in Python, but that no template can calculate with: 1e-7 and 1e16 stand in schemas, to be
/// shown.
#[derive(Debug)]
pub struct Float(f64);

impl Float {
    /// Of both kinds of floats.
    pub fn of(value: &Value) -> Option<f64> {
        match value.kind() {
            ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok(),
            _ => value.downcast_object_ref::<Float>().map(|float| float.0),
        }
    }
}

impl Object for Float {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn is_true(self: &Arc<Self>) -> bool {
        self.0 != 0.0
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&float(self.0))
    }
}

/// `str(value)`.
pub fn write(value: &Value, out: &mut dyn Write) -> fmt::Result {
    match is_own(value) {
        true => repr(value, 0, out),
        false => write!(out, "{value}"),
    }
}

/// Values that the template language would write in another way than Python.
pub fn is_own(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Number => !value.is_integer(),
        kind => matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map),
    }
}

/// `repr` of a float: the shortest digits that give it back, with an exponent below 1e-4 and from 1e16 on.
pub fn float(value: f64) -> String {
    if !value.is_finite() {
        let name = if value.is_nan() { "nan" } else { "inf" };
        return if value < 0.0 {
            format!("-{name}")
        } else {
            name.to_owned()
        };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("the format writes an exponent");
    let exponent: i32 = exponent.parse().expect("the format writes a number");
    match exponent {
        -4..16 => format!("{value:?}"),
        _ => format!(
            "{digits}e{}{:02}",
            if exponent < 0 { '-' } else { '+' },
            exponent.abs()
        ),
    }
}

fn repr(value: &Value, depth: usize, out: &mut dyn Write) -> fmt::Result {
    if depth > MAX_DEPTH {
        return Err(fmt::Error);
    }
    match (value.kind(), value.as_str()) {
        (_, Some(text)) => quoted(text, out),
        (ValueKind::Number, _) => match Float::of(value) {
            Some(number) => out.write_str(&float(number)),
            None => write!(out, "{value}"),
        },
        (ValueKind::Map, _) => {
            let pairs = value.try_iter().into_iter().flatten();
            let pairs = pairs.map(|key| (value.get_item(&key).unwrap_or_default(), Some(key)));
            listed(pairs.map(|(item, key)| (key, item)), ["{", "}"], depth, out)
        }
        (ValueKind::Seq | ValueKind::Iterable, _) => {
            let brackets = match (value.is_tuple(), value.len()) {
                (true, Some(1)) => ["(", ",)"],
                (true, _) => ["(", ")"],
                (false, _) => ["[", "]"],
            };
            let items = value.try_iter().into_iter().flatten().map(|item| (None, item));
            listed(items, brackets, depth, out)
        }
        (ValueKind::Undefined, _) => out.write_str("Undefined"),
        _ => write!(out, "{value}"),
    }
}

fn listed(
    items: impl Iterator<Item = (Option<Value>, Value)>,
    [open, close]: [&str; 2],
    depth: usize,
    out: &mut dyn Write,
) -> fmt::Result {
    out.write_str(open)?;
    for (i, (key, item)) in items.enumerate() {
        if i > 0 {
            out.write_str(", ")?;
        }
        if let Some(key) = key {
            repr(&key, depth + 1, out)?;
            out.write_str(": ")?;
        }
        repr(&item, depth + 1, out)?;
    }
    out.write_str(close)
}

fn quoted(text: &str, out: &mut dyn Write) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.write_char(quote)?;
    let is_plain = |c: char| matches!(c, ' '..='~') && c != '\\' && c != quote;
    let mut rest = text;
    while let Some(end) = rest.find(|c| !is_plain(c)) {
        let c = rest[end..].chars().next().expect("it was found");
        out.write_str(&rest[..end])?;
        rest = &rest[end + c.len_utf8()..];
        match c {
            '\n' => out.write_str("\\n"),
            '\r' => out.write_str("\\r"),
            '\t' => out.write_str("\\t"),
            '\\' => out.write_str("\\\\"),
            c if c == quote => write!(out, "\\{c}"),
            c if is_printable(c) => out.write_char(c),
            c => match u32::from(c) {
                code @ ..=0xFF => write!(out, "\\x{code:02x}"),
                code @ ..=0xFFFF => write!(out, "\\u{code:04x}"),
                code => write!(out, "\\U{code:08x}"),
            },
        }?;
    }
    out.write_str(rest)?;
    out.write_char(quote)
}

/// `str.isprintable`: neither a control, a format, a private or an unassigned character, nor a space other than " ".
/// Rust's `escape_debug` follows the same rule, except that it also escapes a combining mark at a text's beginning.
fn is_printable(c: char) -> bool {
    c == '"' || c == '\'' || format!("a{c}").escape_debug().count() == 2
}
