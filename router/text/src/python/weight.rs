//! What a rendering may make: every value is weighed where it is made, before the memory is taken wherever one operation
//! can multiply, and all of them together have a limit. Nothing is given back, so the limit bounds time as well.

use std::fmt::{self, Write};

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::shown;

/// Bytes that one rendering may make of values and of text. A conversation of 4 MB, which is as much as is tokenized, is made
/// some twenty times over. Of this crate's tests, less: they use it up again and again.
pub const MAX_VALUE_BYTES: usize = if cfg!(test) { 16 << 20 } else { 256 << 20 };
/// Items of one list.
pub const MAX_ITEMS: usize = 1 << 20;
/// Lists in lists: who drops, compares or prints them calls itself as often.
pub const MAX_DEPTH: usize = 200;
/// What an item takes beside its text.
const ITEM_BYTES: usize = 32;
/// A byte that is looked at costs less than one that is made.
const READS_PER_BYTE: usize = 8;
const SHORT_PART_BYTES: usize = 32;

/// What is left of `MAX_VALUE_BYTES`.
struct Left(usize);

pub fn left(state: &mut State) -> usize {
    state.get_or_insert_extension(Left(MAX_VALUE_BYTES)).0
}

/// So many bytes are made.
pub fn spend(state: &mut State, bytes: usize) -> Result<(), Error> {
    let left = state.get_or_insert_extension(Left(MAX_VALUE_BYTES));
    left.0 = left.0.checked_sub(bytes).ok_or_else(too_much)?;
    Ok(())
}

/// So many bytes are about to be made; they are paid for when they are there.
pub fn room(state: &mut State, bytes: usize) -> Result<(), Error> {
    match bytes <= left(state) {
        true => Ok(()),
        false => Err(too_much()),
    }
}

/// A text is looked through.
pub fn read(state: &mut State, text: &str) -> Result<(), Error> {
    spend(state, text.len() / READS_PER_BYTE)
}

/// A text is searched for another: slower than it is read, and slowest for a long part that matches nearly everywhere.
pub fn searched(state: &mut State, text: &str, part: &str) -> Result<(), Error> {
    match part.len() {
        0..=SHORT_PART_BYTES => spend(state, text.len()),
        _ => spend(state, 4 * (text.len() + part.len())),
    }
}

/// A value that came out of an operation. A lazy list becomes one that holds its items: lazy lists of lazy lists would have no
/// end.
pub fn made(state: &mut State, value: Value) -> Result<Value, Error> {
    if value.kind() != ValueKind::Iterable {
        paid(state, &value)?;
        return Ok(value);
    }
    let n = items(&value)?;
    spend(state, n.saturating_mul(ITEM_BYTES))?;
    Ok(value.try_iter()?.collect())
}

/// A value that came out of a call.
pub fn paid(state: &mut State, value: &Value) -> Result<(), Error> {
    let bytes = match (value.as_bytes(), value.kind()) {
        (Some(bytes), _) => bytes.len(),
        (None, ValueKind::Seq | ValueKind::Map) => value.len().unwrap_or(0).saturating_mul(ITEM_BYTES),
        _ => 0,
    };
    spend(state, bytes.saturating_add(ITEM_BYTES))
}

/// A value that will be gone through whole, as often as it would be printed, or that was put together of others.
pub fn weigh(state: &mut State, value: &Value) -> Result<(), Error> {
    let mut left = left(state);
    let before = left;
    weigh_within(value, 0, &mut left)?;
    spend(state, before - left)
}

fn weigh_within(value: &Value, depth: usize, left: &mut usize) -> Result<(), Error> {
    let read = value.as_str().map_or(0, |text| text.len() / READS_PER_BYTE);
    *left = left.checked_sub(read + ITEM_BYTES).ok_or_else(too_much)?;
    if !is_container(value) {
        return Ok(());
    }
    if depth == MAX_DEPTH {
        return Err(too_deep());
    }
    if depth > 0 {
        no_namespace(value)?;
    }
    for item in value.try_iter()? {
        weigh_within(&item, depth + 1, left)?;
        if value.kind() == ValueKind::Map {
            weigh_within(&value.get_item(&item)?, depth + 1, left)?;
        }
    }
    Ok(())
}

/// A namespace in a namespace could hold itself: it would never be freed, and never be printed to its end.
pub fn no_namespace(value: &Value) -> Result<(), Error> {
    let is_one = |name: &str| name.ends_with("::Namespace");
    match value.as_object().is_some_and(|object| is_one(object.type_name())) {
        true => Err(invalid("a namespace cannot be kept in another value")),
        false => Ok(()),
    }
}

pub fn is_container(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map
    )
}

/// The length of something that a filter takes apart.
pub fn items(value: &Value) -> Result<usize, Error> {
    let n = match value.len() {
        Some(n) => n,
        None => value.try_iter()?.take(MAX_ITEMS + 1).count(),
    };
    match n <= MAX_ITEMS {
        true => Ok(n),
        false => Err(invalid(&format!(
            "a list of {n} items is longer than the {MAX_ITEMS} that are allowed"
        ))),
    }
}

/// Bytes that a value takes when it is joined to a text.
pub fn joined_bytes(state: &mut State, value: &Value) -> Result<usize, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.len());
    }
    let mut counted = Counted {
        bytes: 0,
        limit: left(state),
    };
    write!(counted, "{value}").map_err(|_| too_much())?;
    spend(state, counted.bytes / READS_PER_BYTE)?;
    Ok(counted.bytes)
}

/// `str(value)`, as long as there is room for it. It is not paid for.
pub fn text(state: &mut State, value: &Value) -> Result<String, Error> {
    let mut bounded = Bounded {
        text: String::new(),
        limit: left(state),
    };
    shown::write(value, &mut bounded).map_err(|_| too_much())?;
    Ok(bounded.text)
}

struct Counted {
    bytes: usize,
    limit: usize,
}

impl Write for Counted {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.bytes += text.len();
        if self.bytes <= self.limit {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

struct Bounded {
    text: String,
    limit: usize,
}

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.text.len() + text.len() > self.limit {
            return Err(fmt::Error);
        }
        self.text.push_str(text);
        Ok(())
    }
}

pub fn too_much() -> Error {
    invalid(&format!(
        "its values and its text take more than {MAX_VALUE_BYTES} bytes"
    ))
}

fn too_deep() -> Error {
    invalid(&format!("a value has more than {MAX_DEPTH} levels"))
}

pub fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}
