//! The rows of a file as dictionaries, however they lie in it: lines of JSON, one JSON array, CSV, Parquet, plain text.
//! One row is in memory at a time. Not here: what a row means (the parent).

mod array;
mod csv;
mod lines;
mod pages;
mod parquet;
mod unpacked;

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tandem_core::{json, lfs};

use super::{BadLine, HINT_CHARS};

/// Bytes of one row at most: about four million tokens, more than any context.
pub const MAX_ROW_BYTES: usize = 16 << 20;
/// That a row's values may take in memory: of text hardly more than its bytes, of empty lists a hundred times as many.
const MAX_ROW_TREE_BYTES: usize = 256 << 20;
/// EMFILE and ENFILE.
const TOO_MANY_FILES: [i32; 2] = [24, 23];
/// A file's beginning, by which its format is known.
const SNIFFED_BYTES: u64 = 4096;

/// How rows lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Jsonl,
    Json,
    Csv,
    Parquet,
    Text,
}

impl Format {
    /// By the name in `dataset_format`.
    pub fn named(name: &str) -> Option<Format> {
        Some(match name {
            "jsonl" => Format::Jsonl,
            "json" => Format::Json,
            "csv" => Format::Csv,
            "parquet" => Format::Parquet,
            "text" => Format::Text,
            _ => return None,
        })
    }

    fn words(self) -> &'static str {
        match self {
            Format::Jsonl => "JSONL",
            Format::Json => "a JSON array",
            Format::Csv => "CSV",
            Format::Parquet => "Parquet",
            Format::Text => "plain text",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

/// What a row of plain text is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SampleBy {
    #[default]
    Line,
    Paragraph,
    Document,
}

impl SampleBy {
    pub fn named(name: &str) -> Option<SampleBy> {
        Some(match name {
            "line" => SampleBy::Line,
            "paragraph" => SampleBy::Paragraph,
            "document" => SampleBy::Document,
            _ => return None,
        })
    }
}

/// A file, and what its owner calls it: the end of the name says what content leaves open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub path: PathBuf,
    pub name: String,
}

impl From<&Path> for Source {
    fn from(path: &Path) -> Source {
        Source {
            path: path.to_owned(),
            name: path.display().to_string(),
        }
    }
}

/// Where a row stands. Rows of CSV are counted without the header; a row of a table has no line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// From 1.
    pub number: u64,
    is_line: bool,
}

impl Place {
    pub fn line(number: u64) -> Place {
        Place {
            number,
            is_line: true,
        }
    }

    fn row(number: u64) -> Place {
        Place {
            number,
            is_line: false,
        }
    }

    pub fn bad(self, message: String) -> BadLine {
        BadLine {
            line: self.number,
            message,
            passing: None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.is_line { "Line" } else { "Row" }, self.number)
    }
}

pub type Record = (Place, Map<String, Value>);

/// The rows of one file, until the end or the first error.
pub struct Records {
    pub format: Format,
    rows: Box<dyn Iterator<Item = Result<Record, BadLine>>>,
    ended: bool,
}

impl Records {
    /// `asked`: the format that its owner says it has.
    pub fn open(source: &Source, asked: Option<Format>, sample_by: SampleBy) -> Result<Records, BadLine> {
        let unreadable = |error: io::Error| BadLine {
            passing: error.raw_os_error().filter(|n| TOO_MANY_FILES.contains(n)),
            ..whole(format!("The file cannot be read: {error}"))
        };
        let mut file = File::open(&source.path).map_err(unreadable)?;
        let mut beginning = Vec::new();
        file.by_ref()
            .take(SNIFFED_BYTES)
            .read_to_end(&mut beginning)
            .map_err(unreadable)?;
        let format = format(&beginning, &source.name, asked)?;
        io::Seek::rewind(&mut file).map_err(unreadable)?;
        let rows: Box<dyn Iterator<Item = _>> = match format {
            Format::Jsonl => Box::new(lines::rows(BufReader::new(file))),
            Format::Json => Box::new(array::rows(BufReader::new(file))),
            Format::Csv => Box::new(csv::rows(BufReader::new(file))?),
            Format::Parquet => Box::new(parquet::rows(file)?),
            Format::Text => Box::new(lines::texts(BufReader::new(file), sample_by)),
        };
        Ok(Records {
            format,
            rows,
            ended: false,
        })
    }
}

impl Iterator for Records {
    type Item = Result<Record, BadLine>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let row = self.rows.next();
        self.ended = !matches!(row, Some(Ok(_)));
        row
    }
}

/// Content decides where it can: dictionaries and arrays of JSON are hardly anything else. What is no JSON is CSV or
/// plain text only where that is said, because any text could be either.
fn format(beginning: &[u8], name: &str, asked: Option<Format>) -> Result<Format, BadLine> {
    let ends = |ends: &[&str]| ends.iter().any(|end| name.to_ascii_lowercase().ends_with(end));
    let others = [
        (&b"\x1f\x8b"[..], "is compressed (gzip): gunzip it"),
        (
            b"PK\x03\x04",
            "is a zip archive or a spreadsheet: unpack it, or save it as CSV",
        ),
        (
            b"ARROW1",
            "is an Arrow file, which is not read: datasets' Dataset.to_json(\"rows.jsonl\") writes what is",
        ),
        (b"\x28\xb5\x2f\xfd", "is compressed (zstd): unzstd it"),
    ];
    if let Some((_, says)) = others.iter().find(|(magic, _)| beginning.starts_with(magic)) {
        return Err(whole(format!("The file {says}.")));
    }
    if let Some(says) = lfs::pointer(beginning) {
        return Err(whole(format!("The file cannot be trained: {says}")));
    }
    if beginning.starts_with(b"\xff\xfe") || beginning.starts_with(b"\xfe\xff") {
        return Err(whole(
            "Line 1 is not UTF-8 text but UTF-16: save it as UTF-8.".to_owned(),
        ));
    }
    if beginning.starts_with(parquet::MAGIC) {
        return match asked {
            None | Some(Format::Parquet) => Ok(Format::Parquet),
            Some(asked) => Err(contradicted(asked, Format::Parquet)),
        };
    }
    if asked == Some(Format::Parquet) {
        return Err(whole(
            "dataset_format says Parquet, but the file does not begin as one: leave dataset_format out."
                .to_owned(),
        ));
    }
    let first = without_mark(beginning)
        .iter()
        .find(|byte| !byte.is_ascii_whitespace());
    let seen = match first {
        Some(b'{') => Some(Format::Jsonl),
        Some(b'[') => Some(Format::Json),
        _ => None,
    };
    let found = match (asked, seen) {
        // Any text is plain text; a header of CSV may begin with a brace.
        (Some(asked @ (Format::Text | Format::Csv)), _) => asked,
        (Some(asked), Some(seen)) if asked != seen => return Err(contradicted(asked, seen)),
        (Some(asked), _) => asked,
        (None, Some(seen)) => seen,
        (None, None) if ends(&[".csv", ".tsv"]) => Format::Csv,
        (None, None) if ends(&[".txt", ".text", ".md"]) => Format::Text,
        // What is wrong with it is said of its first line.
        (None, None) => Format::Jsonl,
    };
    Ok(found)
}

fn contradicted(asked: Format, seen: Format) -> BadLine {
    whole(format!(
        "dataset_format says {asked}, but the file is {seen}: leave dataset_format out."
    ))
}

fn whole(message: String) -> BadLine {
    Place::line(1).bad(message)
}

/// Some editors of Windows begin a file with a byte order mark.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes)
}

/// The dictionary that a text is.
fn dictionary(place: Place, text: &str) -> Result<Map<String, Value>, BadLine> {
    let no_dictionary = |detail: String| {
        let start: String = text.trim().chars().take(HINT_CHARS).collect();
        let start: String = start
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let what = match place.is_line {
            true => "Expected file to have JSONL format, where every line is a JSON dictionary. ",
            false => "Expected a JSON array of dictionaries. ",
        };
        let here = if place.is_line { "line" } else { "row" };
        let message =
            format!("{what}{place} is not a dictionary (HINT: {here} starts with: \"{start}...\").{detail}");
        place.bad(message)
    };
    not_too_dense(place, text)?;
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => match json::twice(text.as_bytes()) {
            Some(name) => Err(place.bad(format!(
                "{place}: {name:?} is there twice in one object: which of them is meant?"
            ))),
            None => Ok(object),
        },
        Ok(Value::Array(_)) => Err(no_dictionary(
            " It is a JSON array: write its elements one a line.".to_owned(),
        )),
        Ok(_) => Err(no_dictionary(String::new())),
        Err(error) => Err(no_dictionary(match text.trim() {
            "{" => " The file looks like JSON spread over lines: write each example on one line.".to_owned(),
            _ => format!(" Error: line contains invalid json: {error} of this line."),
        })),
    }
}

fn utf8(place: Place, bytes: &[u8]) -> Result<&str, BadLine> {
    std::str::from_utf8(bytes).map_err(|error| {
        place.bad(format!(
            "{place} is not UTF-8 text: invalid byte at column {}.",
            error.valid_up_to() + 1
        ))
    })
}

/// Before values are made of it.
fn not_too_dense(place: Place, json_text: &str) -> Result<(), BadLine> {
    match json::tree_bytes(json_text.as_bytes()) {
        0..=MAX_ROW_TREE_BYTES => Ok(()),
        bytes => Err(place.bad(format!(
            "{place} has so many values that they take {bytes} bytes, at most {MAX_ROW_TREE_BYTES} are taken."
        ))),
    }
}

fn too_long(place: Place) -> BadLine {
    place.bad(format!("{place} is longer than {MAX_ROW_BYTES} bytes."))
}

fn unread(place: Place, error: &io::Error) -> BadLine {
    place.bad(format!("{place} cannot be read: {error}"))
}

pub(super) fn of_line(line: u64, text: &str) -> Result<Record, BadLine> {
    let place = Place::line(line);
    Ok((place, dictionary(place, text)?))
}
