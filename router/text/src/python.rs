//! What chat templates expect of Jinja2 on Python, in the form transformers gives it: whitespace rules, methods of
//! strings and dictionaries, `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`. Not here: messages.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Marks the error of a template that refused on purpose.
pub const RAISED: &str = "raised: ";

pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("only whitespace is configured"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(call_method);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("{RAISED}{message}"),
        ))
    });
    environment.add_function("strftime_now", |format: &str| -> Result<String, Error> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(format, since.as_secs())
    });
    environment
}

/// transformers' `{% generation %}` marks assistant text for training masks and renders as nothing.
pub fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|length| open + length + 2) else {
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

fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => call_str_method(text, method, args),
        (None, ValueKind::Map) => match method {
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
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        },
        (None, ValueKind::Seq) if method == "count" => {
            let (wanted,): (&Value,) = from_args(args)?;
            Ok(Value::from(
                value.try_iter()?.filter(|item| item == wanted).count(),
            ))
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn call_str_method(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let strip = |args: &[Value]| -> Result<(bool, String), Error> {
        let (chars,): (Option<String>,) = from_args(args)?;
        Ok((chars.is_none(), chars.unwrap_or_default()))
    };
    let every = |test: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(test));
    // Python counts characters.
    let position = |byte: Option<usize>| byte.map_or(-1, |byte| text[..byte].chars().count() as i64);
    Ok(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (spaces, chars) = strip(args)?;
            let cut = |c: char| {
                if spaces {
                    c.is_whitespace()
                } else {
                    chars.contains(c)
                }
            };
            Value::from(match method {
                "strip" => text.trim_matches(cut),
                "lstrip" => text.trim_start_matches(cut),
                _ => text.trim_end_matches(cut),
            })
        }
        "startswith" | "endswith" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let matches = |part: &str| match method {
                "startswith" => text.starts_with(part),
                _ => text.ends_with(part),
            };
            Value::from(match wanted.as_str() {
                Some(part) => matches(part),
                None => wanted.try_iter()?.any(|part| part.as_str().is_some_and(matches)), // a tuple of choices
            })
        }
        "removeprefix" | "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            let rest = if method == "removeprefix" {
                text.strip_prefix(part)
            } else {
                text.strip_suffix(part)
            };
            Value::from(rest.unwrap_or(text))
        }
        "split" | "rsplit" => {
            let (separator, maxsplit, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let maxsplit = maxsplit.or(kwargs.get("maxsplit")?).unwrap_or(-1);
            kwargs.assert_all_used()?;
            let pieces = usize::try_from(maxsplit).map_or(usize::MAX, |splits| splits.saturating_add(1));
            split(text, separator, pieces, method == "rsplit")?
        }
        "splitlines" => {
            let () = from_args(args)?;
            text.lines().collect()
        }
        "replace" => {
            let (from, to, count): (&str, &str, Option<i64>) = from_args(args)?;
            Value::from(match count.and_then(|count| usize::try_from(count).ok()) {
                Some(count) => text.replacen(from, to, count),
                None => text.replace(from, to),
            })
        }
        "find" | "rfind" | "index" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if method == "rfind" {
                text.rfind(part)
            } else {
                text.find(part)
            };
            if method == "index" && found.is_none() {
                return Err(Error::new(ErrorKind::InvalidOperation, "substring not found"));
            }
            Value::from(position(found))
        }
        "count" => {
            let (part,): (&str,) = from_args(args)?;
            Value::from(text.matches(part).count())
        }
        "join" => {
            let (parts,): (&Value,) = from_args(args)?;
            let parts: Vec<String> = parts.try_iter()?.map(|part| part.to_string()).collect();
            Value::from(parts.join(text))
        }
        "upper" | "lower" | "title" | "capitalize" | "isdigit" | "isalpha" | "isalnum" | "isspace"
        | "isupper" | "islower" => {
            let () = from_args(args)?;
            match method {
                "upper" => Value::from(text.to_uppercase()),
                "lower" => Value::from(text.to_lowercase()),
                "title" => Value::from(title(text)),
                "capitalize" => Value::from(capitalize(text)),
                "isdigit" => every(|c| c.is_ascii_digit()),
                "isalpha" => every(char::is_alphabetic),
                "isalnum" => every(char::is_alphanumeric),
                "isspace" => every(char::is_whitespace),
                "isupper" => Value::from(text.chars().any(char::is_uppercase) && text == text.to_uppercase()),
                _ => Value::from(text.chars().any(char::is_lowercase) && text == text.to_lowercase()),
            }
        }
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    })
}

fn split(text: &str, separator: Option<&str>, pieces: usize, from_right: bool) -> Result<Value, Error> {
    let mut parts: Vec<&str> = match (separator, from_right) {
        (Some(""), _) => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        (Some(separator), false) => text.splitn(pieces, separator).collect(),
        (Some(separator), true) => text.rsplitn(pieces, separator).collect(),
        // On runs of white space: never an empty piece; what `maxsplit` leaves keeps its far end.
        (None, _) => {
            let begin = |rest| {
                if from_right {
                    str::trim_end(rest)
                } else {
                    str::trim_start(rest)
                }
            };
            let (mut parts, mut rest) = (Vec::new(), begin(text));
            while !rest.is_empty() && parts.len() + 1 < pieces {
                let cut = match from_right {
                    false => rest.split_once(char::is_whitespace),
                    true => rest
                        .rsplit_once(char::is_whitespace)
                        .map(|(head, tail)| (tail, head)),
                };
                let (part, next) = cut.unwrap_or((rest, ""));
                parts.push(part);
                rest = begin(next);
            }
            parts.extend(Some(rest).filter(|rest| !rest.is_empty()));
            parts
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().collect())
}

fn capitalize(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or(String::new(), |first| {
        first
            .to_uppercase()
            .chain(chars.flat_map(char::to_lowercase))
            .collect()
    })
}

fn title(text: &str) -> String {
    text.split_inclusive(|c: char| !c.is_alphabetic())
        .map(capitalize)
        .collect()
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`, as transformers replaces Jinja's own filter, which would
/// escape for HTML.
fn to_json(value: &Value, indent: Option<usize>, kwargs: Kwargs) -> Result<String, Error> {
    let indent = indent.or(kwargs.get("indent")?);
    // Many templates name these with the values that are the rule here anyway.
    for option in ["ensure_ascii", "sort_keys"] {
        if kwargs.get::<Option<bool>>(option)? == Some(true) {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson: {option} is not supported"),
            ));
        }
    }
    kwargs.assert_all_used()?;
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut json = Vec::new();
    match indent.map(|indent| " ".repeat(indent)) {
        Some(indent) => {
            let style = PrettyFormatter::with_indent(indent.as_bytes());
            value
                .serialize(&mut Serializer::with_formatter(&mut json, style))
                .map_err(failed)?;
        }
        None => value
            .serialize(&mut Serializer::with_formatter(&mut json, Spaced))
            .map_err(failed)?,
    }
    Ok(String::from_utf8(json).expect("serde_json writes UTF-8"))
}

/// Python's default separators, `", "` and `": "`.
struct Spaced;

impl Spaced {
    fn separate<W: ?Sized + std::io::Write>(writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
}

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        Spaced::separate(writer, first)
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        Spaced::separate(writer, first)
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The formats that templates use, in UTC: a server's local time is an accident of its container.
fn strftime(format: &str, unix_seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (year, month, day) = civil_from_days(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let code: String = match chars.next() {
            Some('-') => chars.next().map_or("-".to_owned(), |code| format!("-{code}")),
            other => other.map(String::from).unwrap_or_default(),
        };
        text.push_str(&match code.as_str() {
            "Y" => year.to_string(),
            "y" => format!("{:02}", year % 100),
            "m" => format!("{month:02}"),
            "-m" => month.to_string(),
            "B" => month_name.to_owned(),
            "b" => month_name[..3].to_owned(),
            "d" => format!("{day:02}"),
            "-d" => day.to_string(),
            "A" => day_name.to_owned(),
            "a" => day_name[..3].to_owned(),
            "H" => format!("{hour:02}"),
            "M" => format!("{minute:02}"),
            "S" => format!("{second:02}"),
            "%" => "%".to_owned(),
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: %{code} is unknown"),
                ));
            }
        });
    }
    Ok(text)
}

/// Days since 1970-01-01 to (year, month, day), for days not before it; howardhinnant.github.io/date_algorithms.html.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since 0000-03-01, so that the leap day ends a year
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests;
