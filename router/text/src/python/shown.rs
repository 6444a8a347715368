//! Values as Python writes them: `str(value)`, which is what a template prints, and `repr(value)`, which is what stands
//! inside a printed list or dictionary.

use std::fmt::{self, Write};
use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, Value, ValueKind};
use serde_json::Value as Json;

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
pub fn text(value: &Value) -> String {
    let mut out = String::new();
    match is_own(value) {
        true => repr(value, &mut out),
        false => write!(out, "{value}").expect("a String takes everything"),
    }
    out
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

fn repr(value: &Value, out: &mut String) {
    match (value.kind(), value.as_str()) {
        (_, Some(text)) => quoted(text, out),
        (ValueKind::Number, _) => match Float::of(value) {
            Some(number) => out.push_str(&float(number)),
            None => write!(out, "{value}").expect("a String takes everything"),
        },
        (ValueKind::Map, _) => {
            let pairs = value.try_iter().into_iter().flatten();
            let pairs = pairs.map(|key| (value.get_item(&key).unwrap_or_default(), Some(key)));
            listed(pairs.map(|(item, key)| (key, item)), ["{", "}"], out);
        }
        (ValueKind::Seq | ValueKind::Iterable, _) => {
            let brackets = match (value.is_tuple(), value.len()) {
                (true, Some(1)) => ["(", ",)"],
                (true, _) => ["(", ")"],
                (false, _) => ["[", "]"],
            };
            listed(
                value.try_iter().into_iter().flatten().map(|item| (None, item)),
                brackets,
                out,
            );
        }
        (ValueKind::Undefined, _) => out.push_str("Undefined"),
        _ => write!(out, "{value}").expect("a String takes everything"),
    }
}

fn listed(items: impl Iterator<Item = (Option<Value>, Value)>, [open, close]: [&str; 2], out: &mut String) {
    out.push_str(open);
    for (i, (key, item)) in items.enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        if let Some(key) = key {
            repr(&key, out);
            out.push_str(": ");
        }
        repr(&item, out);
    }
    out.push_str(close);
}

fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => match u32::from(c) {
                code @ ..=0xFF => write!(out, "\\x{code:02x}"),
                code @ ..=0xFFFF => write!(out, "\\u{code:04x}"),
                code => write!(out, "\\U{code:08x}"),
            }
            .expect("a String takes everything"),
        }
    }
    out.push(quote);
}

/// `str.isprintable`: neither a control, a format, a private or an unassigned character, nor a space other than " ".
/// Rust's `escape_debug` follows the same rule, except that it also escapes a combining mark at a text's beginning.
fn is_printable(c: char) -> bool {
    c == '"' || c == '\'' || format!("a{c}").escape_debug().count() == 2
}
