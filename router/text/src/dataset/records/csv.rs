//! CSV as RFC 4180 has it: a header, fields with commas (or tabs, or semicolons, whichever the header has most of), quotes
//! around what holds one of them, a quote in quotes doubled. An empty field is null.

use std::collections::HashSet;
use std::io::BufRead;

use serde_json::{Map, Value};

use super::{BadLine, MAX_ROW_BYTES, Place, Record, not_too_dense, too_long, unread, utf8, without_mark};

/// Columns of lists, written as JSON.
const LISTS: [&str; 6] = [
    "messages",
    "conversations",
    "tools",
    "functions",
    "preferred_output",
    "non_preferred_output",
];
/// Columns of texts, or of messages as JSON.
const EITHER: [&str; 5] = ["prompt", "completion", "chosen", "rejected", "input"];
/// Columns that hold a number, or true or false.
const SCALAR: [&str; 3] = ["label", "reward", "weight"];

pub fn rows(reader: impl BufRead) -> Result<impl Iterator<Item = Result<Record, BadLine>>, BadLine> {
    let mut table = Table {
        reader,
        separator: b',',
        line: 1,
        number: 0,
    };
    let header = table.header()?;
    Ok(std::iter::from_fn(move || table.row(&header).transpose()))
}

struct Table<R> {
    reader: R,
    separator: u8,
    /// Where the reader stands.
    line: u64,
    number: u64,
}

impl<R: BufRead> Table<R> {
    fn header(&mut self) -> Result<Vec<String>, BadLine> {
        let place = Place::line(1);
        let buffer = self.reader.fill_buf().map_err(|error| unread(place, &error))?;
        let first = buffer.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let count = |separator: u8| first.iter().filter(|&&byte| byte == separator).count();
        self.separator = *b";\t,"
            .iter()
            .max_by_key(|&&separator| count(separator))
            .expect("there are three");
        let Some(fields) = self.fields(place)? else {
            return Ok(vec![]);
        };
        let names: Vec<String> = fields
            .into_iter()
            .map(|(name, _)| name.trim().to_owned())
            .collect();
        let mut seen = HashSet::new();
        match names
            .iter()
            .find(|name| name.is_empty() || !seen.insert(name.as_str()))
        {
            Some(name) => Err(place.bad(format!(
                "Line 1 must be the header of the CSV file, a name for each column: {name:?} is {}.",
                if name.is_empty() { "no name" } else { "there twice" }
            ))),
            None => Ok(names),
        }
    }

    fn row(&mut self, header: &[String]) -> Result<Option<Record>, BadLine> {
        let place = Place::row(self.number + 1);
        let fields = loop {
            match self.fields(place)? {
                None => return Ok(None),
                // A blank line, mostly the last.
                Some(fields) if fields.len() == 1 && fields[0].0.is_empty() && header.len() > 1 => {}
                Some(fields) => break fields,
            }
        };
        self.number += 1;
        if fields.len() != header.len() {
            let (got, wanted) = (fields.len(), header.len());
            return Err(place.bad(format!(
                "{place} (before line {}) has {got} fields, the header {wanted}: put quotes around what holds separators or line \
                 ends.",
                self.line
            )));
        }
        let mut row = Map::new();
        for (name, (text, is_quoted)) in header.iter().zip(fields) {
            row.insert(name.clone(), value(place, name, text, is_quoted)?);
        }
        Ok(Some((place, row)))
    }

    /// Of the next record, each with whether it stood in quotes.
    fn fields(&mut self, place: Place) -> Result<Option<Vec<(String, bool)>>, BadLine> {
        let began = self.line;
        let (mut fields, mut field) = (vec![], Vec::new());
        let (mut quoted, mut open, mut bytes) = (false, false, 0);
        loop {
            let Some(byte) = self.byte(place)? else {
                if open {
                    return Err(place.bad(format!(
                        "{place}: a quote of the record of line {began} is never closed."
                    )));
                }
                if bytes == 0 {
                    return Ok(None);
                }
                fields.push(self.field(place, &field, quoted)?);
                return Ok(Some(fields));
            };
            bytes += 1;
            if bytes > MAX_ROW_BYTES {
                return Err(too_long(place));
            }
            match byte {
                b'"' if open => match self.peek(place)? {
                    Some(b'"') => {
                        self.byte(place)?;
                        field.push(b'"');
                    }
                    Some(after) if after != self.separator && after != b'\n' && after != b'\r' => {
                        return Err(place.bad(format!(
                            "{place}, line {}: behind a closing quote comes {:?}; a quote in a quoted field is doubled.",
                            self.line,
                            char::from(after)
                        )));
                    }
                    _ => open = false,
                },
                _ if open => field.push(byte),
                b'"' if field.is_empty() && !quoted => (quoted, open) = (true, true),
                b'\n' => {
                    fields.push(self.field(place, &field, quoted)?);
                    return Ok(Some(fields));
                }
                b'\r' if self.peek(place)?.is_none_or(|after| after == b'\n') => {}
                _ if byte == self.separator => {
                    fields.push(self.field(place, &field, quoted)?);
                    field.clear();
                    quoted = false;
                }
                _ => field.push(byte),
            }
        }
    }

    fn field(&self, place: Place, field: &[u8], quoted: bool) -> Result<(String, bool), BadLine> {
        let field = if self.number == 0 {
            without_mark(field)
        } else {
            field
        };
        Ok((utf8(place, field)?.to_owned(), quoted))
    }

    fn peek(&mut self, place: Place) -> Result<Option<u8>, BadLine> {
        let buffer = self.reader.fill_buf().map_err(|error| unread(place, &error))?;
        Ok(buffer.first().copied())
    }

    fn byte(&mut self, place: Place) -> Result<Option<u8>, BadLine> {
        let byte = self.peek(place)?;
        self.reader.consume(usize::from(byte.is_some()));
        self.line += u64::from(byte == Some(b'\n'));
        Ok(byte)
    }
}

fn value(place: Place, name: &str, text: String, is_quoted: bool) -> Result<Value, BadLine> {
    let json = |text: &str| {
        serde_json::from_str(text)
            .map_err(|error| place.bad(format!("{place}: the column {name} holds no JSON: {error}.")))
    };
    if SCALAR.iter().chain(&LISTS).chain(&EITHER).any(|&one| one == name) {
        not_too_dense(place, &text)?;
    }
    match text.trim() {
        "" if !is_quoted => Ok(Value::Null),
        // As Python prints them.
        "True" if SCALAR.contains(&name) => Ok(true.into()),
        "False" if SCALAR.contains(&name) => Ok(false.into()),
        scalar if SCALAR.contains(&name) => json(scalar),
        list if LISTS.contains(&name) => json(list),
        either if EITHER.contains(&name) => match serde_json::from_str(either) {
            Ok(messages) if are_messages(&messages) => Ok(messages),
            _ => Ok(text.into()),
        },
        _ => Ok(text.into()),
    }
}

/// Such a list, or the `input` of OpenAI's preferences: other JSON in a text is text.
fn are_messages(value: &Value) -> bool {
    let is_message = |value: &Value| value.get("role").is_some_and(Value::is_string);
    match value {
        Value::Array(messages) => !messages.is_empty() && messages.iter().all(is_message),
        _ => value.get("messages").is_some_and(are_messages),
    }
}
