//! The methods of Python's `str`. Positions and widths count characters, as Python does.

use std::ops::Range;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Value, from_args};
use minijinja::{Error, ErrorKind, State};

use super::weight::{self, invalid};

/// `"x".center(n)` and the like make texts of this many characters at most.
const MAX_PADDED_CHARS: usize = 1 << 20;
/// A piece of a text that was taken apart, beside its letters.
const PIECE_BYTES: usize = 64;

/// Methods that look for what they are given.
const SEARCHES: [&str; 10] = [
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "replace",
    "find",
    "rfind",
    "index",
    "rindex",
    "count",
];

pub fn call(state: &mut State, text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    weight::read(state, text)?;
    for arg in args {
        weight::weigh(state, arg)?;
        if let (Some(part), true) = (arg.as_str(), SEARCHES.contains(&method)) {
            weight::searched(state, text, part)?;
        }
    }
    Ok(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let cut = |c: char| chars.map_or(is_space(c), |chars| chars.contains(c));
            Value::from(match method {
                "strip" => text.trim_matches(cut),
                "lstrip" => text.trim_start_matches(cut),
                _ => text.trim_end_matches(cut),
            })
        }
        "startswith" | "endswith" => {
            let (wanted, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let Some(range) = bytes(text, start, end) else {
                return Ok(Value::from(false));
            };
            let text = &text[range];
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
            let rest = match method {
                "removeprefix" => text.strip_prefix(part),
                _ => text.strip_suffix(part),
            };
            Value::from(rest.unwrap_or(text))
        }
        "split" | "rsplit" => {
            let (separator, maxsplit, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = separator.or(kwargs.get("sep")?);
            let maxsplit = maxsplit.or(kwargs.get("maxsplit")?).unwrap_or(-1);
            kwargs.assert_all_used()?;
            self::pieces(state, text, separator)?;
            let pieces = usize::try_from(maxsplit).map_or(usize::MAX, |splits| splits.saturating_add(1));
            split(text, separator, pieces, method == "rsplit")?
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (found, last) = match method {
                "partition" => (text.split_once(separator), false),
                _ => (text.rsplit_once(separator), true),
            };
            let parts = match (found, last) {
                (Some((head, tail)), _) => [head, separator, tail],
                (None, false) => [text, "", ""],
                (None, true) => ["", "", text],
            };
            Value::from(minijinja::value::Tuple::from(parts.map(Value::from)))
        }
        "splitlines" => {
            let (keepends, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keepends = keepends.or(kwargs.get("keepends")?).unwrap_or(false);
            kwargs.assert_all_used()?;
            pieces(state, text, None)?;
            lines(text, keepends)
        }
        "replace" => {
            let (from, to, count, kwargs): (&str, &str, Option<i64>, Kwargs) = from_args(args)?;
            let count = count.or(kwargs.get("count")?);
            kwargs.assert_all_used()?;
            Value::from(replace(state, text, from, to, count)?)
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (part, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let range = bytes(text, start, end);
            let inside = range.clone().map(|range| &text[range]);
            if method == "count" {
                return Ok(Value::from(inside.map_or(0, |text| text.matches(part).count())));
            }
            let found = inside.and_then(|text| match method {
                "find" | "index" => text.find(part),
                _ => text.rfind(part),
            });
            match (found, range) {
                (Some(found), Some(range)) => Value::from(text[..range.start + found].chars().count()),
                _ if method.ends_with("index") => return Err(invalid("substring not found")),
                _ => Value::from(-1),
            }
        }
        "join" => {
            let (parts,): (&Value,) = from_args(args)?;
            Value::from(join(state, text, parts)?)
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            let (room, fill) = (room(text, width)?, fill.unwrap_or(' '));
            let (left, right) = match method {
                "ljust" => (0, room),
                "rjust" => (room, 0),
                // CPython rounds so: an odd rest goes to the left where the width is odd, too.
                _ => {
                    let left = room / 2 + (room & usize::try_from(width).unwrap_or(0) & 1);
                    (left, room - left)
                }
            };
            let pad = |n: usize| String::from(fill).repeat(n);
            Value::from(pad(left) + text + &pad(right))
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let zeros = "0".repeat(room(text, width)?);
            let digits = text.trim_start_matches(['+', '-']);
            let sign = if text.len() - digits.len() == 1 {
                &text[..1]
            } else {
                ""
            };
            Value::from(format!("{sign}{zeros}{}", &text[sign.len()..]))
        }
        "format" => {
            formatted(state, text, args)?;
            Value::from(format(FormatStyle::StrFormat, text, args)?)
        }
        _ => {
            let () = from_args(args).map_err(|error| match is_known(method) {
                true => error,
                false => Error::from(ErrorKind::UnknownMethod),
            })?;
            return plain(text, method);
        }
    })
}

/// `str.replace`; a negative count, like none, means all.
pub fn replace(
    state: &mut State,
    text: &str,
    from: &str,
    to: &str,
    count: Option<i64>,
) -> Result<String, Error> {
    let count = count
        .and_then(|count| usize::try_from(count).ok())
        .unwrap_or(usize::MAX);
    let found = text.matches(from).take(count).count();
    weight::room(state, found.saturating_mul(to.len()).saturating_add(text.len()))?;
    Ok(text.replacen(from, to, found))
}

pub fn join(state: &mut State, text: &str, parts: &Value) -> Result<String, Error> {
    let mut joined = String::new();
    for (i, part) in parts.try_iter()?.enumerate() {
        let bytes = weight::joined_bytes(state, &part)?;
        weight::room(
            state,
            joined.len().saturating_add(bytes).saturating_add(text.len()),
        )?;
        if i > 0 {
            joined.push_str(text);
        }
        match part.as_str() {
            Some(part) => joined.push_str(part),
            None => joined.push_str(&part.to_string()),
        }
    }
    Ok(joined)
}

/// Room for the pieces of a text that is taken apart. A piece takes more than its letters.
pub fn pieces(state: &mut State, text: &str, separator: Option<&str>) -> Result<(), Error> {
    let n = match separator {
        Some(separator) => text.matches(separator).count(),
        None => text.matches(is_space).count(),
    };
    weight::room(state, n.saturating_mul(PIECE_BYTES).saturating_add(text.len()))
}

/// Room for what `'{:9}'.format(...)` or `'%9s'|format(...)` will write: each place at most its width and all that is given.
pub fn formatted(state: &mut State, text: &str, args: &[Value]) -> Result<(), Error> {
    let mut given = 0_usize;
    for arg in args {
        given = given.saturating_add(weight::joined_bytes(state, arg)?);
    }
    let numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty());
    let widths = numbers.map(|digits| digits.parse().unwrap_or(usize::MAX));
    // A width may be given as well.
    let widths = widths.chain(
        args.iter()
            .filter_map(Value::as_usize)
            .filter(|_| text.contains('*')),
    );
    let widest = widths.max().unwrap_or(0);
    if widest > MAX_PADDED_CHARS {
        return Err(too_wide(widest));
    }
    let places = text.matches(['{', '%']).count();
    weight::room(
        state,
        given
            .saturating_add(4 * widest)
            .saturating_mul(places)
            .saturating_add(text.len()),
    )
}

fn is_known(method: &str) -> bool {
    plain("", method).is_ok()
}

/// Methods without arguments.
fn plain(text: &str, method: &str) -> Result<Value, Error> {
    let every = |test: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(test));
    let has = |test: fn(char) -> bool| text.chars().any(test);
    Ok(match method {
        "upper" => Value::from(text.to_uppercase()),
        "lower" | "casefold" => Value::from(text.to_lowercase()),
        "title" => Value::from(title(text)),
        "capitalize" => Value::from(capitalize(text)),
        "isdigit" | "isdecimal" | "isnumeric" => every(char::is_numeric),
        "isalpha" => every(char::is_alphabetic),
        "isalnum" => every(char::is_alphanumeric),
        "isspace" => every(is_space),
        "isascii" => Value::from(text.is_ascii()),
        "isupper" => Value::from(has(char::is_uppercase) && !has(char::is_lowercase)),
        "islower" => Value::from(has(char::is_lowercase) && !has(char::is_uppercase)),
        "istitle" => Value::from(has(char::is_alphabetic) && text == title(text)),
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    })
}

/// Python counts the information separators as white space, Unicode's property does not.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// The bytes of `text[start:end]`, negative positions counted from the end; `None` where it starts behind the end, in
/// which case Python does not even find the empty text.
fn bytes(text: &str, start: Option<i64>, end: Option<i64>) -> Option<Range<usize>> {
    let chars = text.chars().count() as i64;
    let place = |position: i64| match position < 0 {
        true => (position + chars).max(0),
        false => position,
    };
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(chars)).min(chars));
    let byte = |position: i64| {
        let found = text.char_indices().nth(position as usize);
        found.map_or(text.len(), |(byte, _)| byte)
    };
    (start <= end).then(|| byte(start)..byte(end))
}

fn room(text: &str, width: i64) -> Result<usize, Error> {
    let width = usize::try_from(width).unwrap_or(0);
    match width <= MAX_PADDED_CHARS {
        true => Ok(width.saturating_sub(text.chars().count())),
        false => Err(too_wide(width)),
    }
}

fn too_wide(width: usize) -> Error {
    invalid(&format!(
        "a width of {width} is more than the {MAX_PADDED_CHARS} characters that are allowed"
    ))
}

fn split(text: &str, separator: Option<&str>, pieces: usize, from_right: bool) -> Result<Value, Error> {
    let mut parts: Vec<&str> = match (separator, from_right) {
        (Some(""), _) => return Err(invalid("empty separator")),
        (Some(separator), false) => text.splitn(pieces, separator).collect(),
        (Some(separator), true) => text.rsplitn(pieces, separator).collect(),
        // On runs of white space: never an empty piece; what `maxsplit` leaves keeps its far end.
        (None, _) => {
            fn begin(rest: &str, from_right: bool) -> &str {
                match from_right {
                    true => rest.trim_end_matches(is_space),
                    false => rest.trim_start_matches(is_space),
                }
            }
            let (mut parts, mut rest) = (Vec::new(), begin(text, from_right));
            while !rest.is_empty() && parts.len() + 1 < pieces {
                let cut = match from_right {
                    false => rest.split_once(is_space),
                    true => rest.rsplit_once(is_space).map(|(head, tail)| (tail, head)),
                };
                let (part, next) = cut.unwrap_or((rest, ""));
                parts.push(part);
                rest = begin(next, from_right);
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

fn lines(text: &str, keepends: bool) -> Value {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let line = rest.find(ends).unwrap_or(rest.len());
        let end = match rest[line..].chars().next() {
            Some('\r') if rest[line + 1..].starts_with('\n') => line + 2,
            Some(c) => line + c.len_utf8(),
            None => line,
        };
        lines.push(&rest[..if keepends { end } else { line }]);
        rest = &rest[end..];
    }
    lines.into_iter().collect()
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
