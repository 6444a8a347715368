//! `tojson` as transformers sets it in place of Jinja's own, which would escape for HTML: `json.dumps` with its options.

use std::fmt::Write;

use minijinja::Error;
use minijinja::value::{Kwargs, Value, ValueKind};

use super::shown::{self, Float};
use super::weight;

/// Bytes that one `tojson` writes at most, and levels it goes down: an indent of a billion, or a list in a list in a
/// list, ends with an error.
const MAX_JSON_BYTES: usize = 64 << 20;
const MAX_JSON_DEPTH: usize = 256;

pub fn to_json(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    separators: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let indent = indent
        .or(kwargs.get("indent")?)
        .filter(|indent| !indent.is_none());
    let separators = separators
        .or(kwargs.get("separators")?)
        .filter(|pair| !pair.is_none());
    let ensure_ascii = ensure_ascii.or(kwargs.get("ensure_ascii")?).unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let indent = indent.map(|indent| match (indent.as_str(), indent.as_i64()) {
        (Some(text), _) => Ok(text.to_owned()),
        (None, Some(n)) if n <= MAX_JSON_BYTES as i64 => Ok(" ".repeat(usize::try_from(n).unwrap_or(0))),
        (None, Some(_)) => Err(too_large()),
        (None, None) => Err(invalid("tojson: indent must be a number or a string".to_owned())),
    });
    let indent = indent.transpose()?;
    let [between, colon] = match separators {
        Some(pair) => {
            let pair: Vec<String> = pair.try_iter()?.map(|text| text.to_string()).collect();
            <[String; 2]>::try_from(pair)
                .map_err(|_| invalid("tojson: separators must be two strings".to_owned()))?
        }
        None if indent.is_some() => [",", ": "].map(str::to_owned),
        None => [", ", ": "].map(str::to_owned),
    };
    let mut writer = Writer {
        out: String::new(),
        indent,
        between,
        colon,
        ensure_ascii,
        sort_keys,
    };
    writer.value(value, 0)?;
    Ok(writer.out)
}

/// `json.dumps` without options, of a value from JSON.
pub fn dumped(value: &serde_json::Value) -> String {
    let mut writer = Writer {
        out: String::new(),
        indent: None,
        between: ", ".to_owned(),
        colon: ": ".to_owned(),
        ensure_ascii: false,
        sort_keys: false,
    };
    match writer.value(&shown::value(value), 0) {
        Ok(()) => writer.out,
        // Too deep or too long for a template.
        Err(_) => value.to_string(),
    }
}

struct Writer {
    out: String,
    indent: Option<String>,
    between: String,
    colon: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_JSON_DEPTH {
            return Err(invalid(format!(
                "tojson: the value has more than {MAX_JSON_DEPTH} levels"
            )));
        }
        if let Some(number) = Float::of(value) {
            self.out.push_str(&float(number));
            return Ok(());
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.items(value.try_iter()?.map(|item| (None, item)), ["[", "]"], depth)?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                let pairs = keys
                    .into_iter()
                    .map(|key| (Some(key.clone()), value.get_item(&key).unwrap_or_default()));
                self.items(pairs, ["{", "}"], depth)?;
            }
            kind => {
                return Err(invalid(format!(
                    "tojson: a value of type {kind} is not JSON serializable"
                )));
            }
        }
        match self.out.len() > MAX_JSON_BYTES {
            true => Err(too_large()),
            false => Ok(()),
        }
    }

    fn items(
        &mut self,
        items: impl Iterator<Item = (Option<Value>, Value)>,
        [open, close]: [&str; 2],
        depth: usize,
    ) -> Result<(), Error> {
        self.out.push_str(open);
        let mut is_empty = true;
        for (key, item) in items {
            if !is_empty {
                let between = self.between.clone();
                self.out.push_str(&between);
            }
            is_empty = false;
            self.new_line(depth + 1)?;
            if let Some(key) = key {
                match key.kind() {
                    ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                    // Other keys are strings in JSON.
                    ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                        self.out.push('"');
                        self.value(&key, depth + 1)?;
                        self.out.push('"');
                    }
                    kind => return Err(invalid(format!("tojson: a key cannot be of type {kind}"))),
                }
                let colon = self.colon.clone();
                self.out.push_str(&colon);
            }
            self.value(&item, depth + 1)?;
        }
        if !is_empty {
            self.new_line(depth)?;
        }
        self.out.push_str(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        if indent.len().saturating_mul(depth) > MAX_JSON_BYTES {
            return Err(too_large());
        }
        self.out.push('\n');
        (0..depth).for_each(|_| self.out.push_str(indent));
        Ok(())
    }

    fn string(&mut self, text: &str) {
        let out = &mut self.out;
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").expect("a String takes everything");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Python also writes what is no JSON.
fn float(number: f64) -> String {
    match number {
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        number if number.is_nan() => "NaN".to_owned(),
        number => shown::float(number),
    }
}

fn too_large() -> Error {
    invalid(format!(
        "tojson: the text would have more than {MAX_JSON_BYTES} bytes"
    ))
}

fn invalid(message: String) -> Error {
    weight::invalid(&message)
}
