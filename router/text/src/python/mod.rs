//! What chat templates expect of Jinja2 on Python, in the form transformers gives it: whitespace rules, methods of
//! strings, lists and dictionaries, filters and tests where the template language differs, `raise_exception`,
//! `strftime_now`, `{% generation %}`. Not here: messages.

mod filters;
mod json;
mod shown;
mod slice;
mod strings;
mod time;
mod weighed;
mod weight;

use minijinja::filters as own;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, escape_formatter, functions};

pub use json::dumped;
use shown::Float;
pub use shown::value;
pub use weighed::render;

/// Steps that one rendering may take, an operator or a call being up to four: a second. A conversation of a thousand
/// turns takes some hundred thousand.
pub const MAX_STEPS: u64 = 10_000_000;
/// How deep macros, loops and blocks may call one another; one macro in another counts four.
pub const MAX_RECURSION: usize = 400;
/// Marks the error of a template that refused on purpose.
pub const RAISED: &str = "raised: ";

pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_unknown_method_callback(call_method);
    environment.set_formatter(|out, state, value| {
        let text = match (value.as_str(), shown::is_own(value)) {
            (Some(text), _) => {
                weight::spend(state, text.len())?;
                return Ok(out.write_str(text)?);
            }
            (None, true) => weight::text(state, value)?,
            (None, false) => return escape_formatter(out, state, value),
        };
        weight::spend(state, text.len())?;
        Ok(out.write_str(&text)?)
    });
    environment.add_filter("string", |state: &mut State, value: &Value| {
        Ok::<Value, Error>(match value.kind() {
            ValueKind::String => value.clone(),
            _ => {
                let text = Value::from(weight::text(state, value)?);
                weight::paid(state, &text)?;
                text
            }
        })
    });
    for name in ["length", "count"] {
        environment.add_filter(name, length);
    }
    for name in ["default", "d"] {
        environment.add_filter(name, default);
    }
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool) || Float::of(value).is_some()
    });
    environment.add_test("float", |value: &Value| Float::of(value).is_some());
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    environment.add_test("sequence", is_sequence);
    environment.add_test("callable", |value: &Value| {
        value.kind() == ValueKind::Plain && Float::of(value).is_none()
    });
    for (name, function) in [
        ("dict", Value::from_function(functions::dict)),
        ("namespace", Value::from_function(functions::namespace)),
    ] {
        environment.add_function(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let made = function.call(state, &args.into_values())?;
            weight::weigh(state, &made)?;
            Ok::<Value, Error>(made)
        });
    }
    environment.add_function(
        "raise_exception",
        |state: &mut State, message: &Value| -> Result<Value, Error> {
            let message = weight::text(state, message)?;
            Err(weight::invalid(&format!("{RAISED}{message}")))
        },
    );
    environment.add_function("strftime_now", time::strftime_now);
    filters::add_to(&mut environment);
    weighed::add_to(&mut environment);
    environment
}

fn syntax() -> SyntaxConfig {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    syntax.expect("only whitespace is configured")
}

/// The text that is compiled: every end of line is a newline.
pub fn source(text: &str) -> Result<String, Error> {
    let text = without_generation_tags(&text.replace("\r\n", "\n").replace('\r', "\n"));
    weighed::without_constant_factors(&text)
}

fn items(value: &Value) -> Result<Value, Error> {
    match value.is_undefined() {
        true => Ok(Value::from(Vec::<Value>::new())),
        false => own::items(value),
    }
}

/// transformers' `{% generation %}` marks assistant text for training masks and renders as nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open + 2..].find("%}").map(|length| open + length + 4) else {
            break;
        };
        let tag = &rest[open..close];
        out.push_str(&rest[..open]);
        out.push_str(&match tag[2..tag.len() - 2]
            .trim_matches(|c: char| c.is_whitespace() || "+-".contains(c))
        {
            "generation" => tag.replacen("generation", "if true", 1),
            "endgeneration" => tag.replacen("endgeneration", "endif", 1),
            _ => tag.to_owned(),
        });
        rest = &rest[close..];
    }
    out + rest
}

/// `len` of an undefined value is 0, of none an error.
fn length(value: &Value) -> Result<usize, Error> {
    match value.is_undefined() {
        true => Ok(0),
        false => own::length(value),
    }
}

fn default(
    value: &Value,
    other: Option<Value>,
    boolean: Option<bool>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let other = other.or(kwargs.get("default_value")?);
    let boolean = boolean.or(kwargs.get("boolean")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    match value.is_undefined() || (boolean && !value.is_true()) {
        true => Ok(other.unwrap_or_else(|| Value::from(""))),
        false => Ok(value.clone()),
    }
}

/// Python asks for a length and for items by key, which strings and dictionaries have, too. A slice of a list is lazy
/// here, but knows its length.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Iterable => value.len().is_some(),
        kind => matches!(
            kind,
            ValueKind::Undefined | ValueKind::String | ValueKind::Bytes | ValueKind::Seq | ValueKind::Map
        ),
    }
}

fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => strings::call(state, text, method, args),
        (None, ValueKind::Map) => call_dict_method(state, value, method, args),
        (None, ValueKind::Seq | ValueKind::Iterable) => call_list_method(state, value, method, args),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// Methods that would change a value are refused, as by transformers' sandbox.
fn call_dict_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "items" => {
            let () = from_args(args)?;
            state.apply_filter("items", std::slice::from_ref(value))
        }
        "keys" => {
            let () = from_args(args)?;
            Ok(value.try_iter()?.collect())
        }
        "values" => {
            let () = from_args(args)?;
            let values = value.try_iter()?.map(|key| value.get_item(&key));
            values.collect::<Result<Value, Error>>()
        }
        "get" => {
            let (key, default): (&Value, Option<&Value>) = from_args(args)?;
            let found = value.get_item(key)?;
            let default = || default.cloned().unwrap_or(Value::from(()));
            Ok(if found.is_undefined() { default() } else { found })
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(value.clone())
        }
        _ => Err(unknown_or_unsafe(
            method,
            &["clear", "pop", "popitem", "setdefault", "update"],
        )),
    }
}

fn call_list_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    for arg in args {
        weight::weigh(state, arg)?;
    }
    match method {
        "count" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.filter(|item| item == wanted).count();
            Ok(Value::from(found))
        }
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.position(|item| item == *wanted);
            found
                .map(Value::from)
                .ok_or_else(|| weight::invalid("index: the value is not in the list"))
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(value.clone())
        }
        _ => Err(unknown_or_unsafe(
            method,
            &[
                "append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort",
            ],
        )),
    }
}

fn unknown_or_unsafe(method: &str, changes: &[&str]) -> Error {
    match changes.contains(&method) {
        true => Error::new(
            ErrorKind::InvalidOperation,
            format!("{method} would change its value, which a chat template may not"),
        ),
        false => Error::from(ErrorKind::UnknownMethod),
    }
}

#[cfg(test)]
mod tests;
