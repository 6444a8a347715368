//! A row a line, of JSON or of plain text.

use std::io::{BufRead, Read};

use serde_json::{Map, Value};

use super::{BadLine, MAX_ROW_BYTES, Place, Record, SampleBy, of_line, too_long, unread, utf8, without_mark};

/// JSON. A blank line is an error if anything follows.
pub fn rows(reader: impl BufRead) -> impl Iterator<Item = Result<Record, BadLine>> {
    let mut blank = None;
    lines(reader).filter_map(move |line| {
        let (line, text) = match line {
            Ok(line) => line,
            Err(error) => return Some(Err(error)),
        };
        if text.trim().is_empty() {
            blank = blank.or(Some(line));
            return None;
        }
        Some(match blank {
            Some(blank) => {
                Err(Place::line(blank).bad(format!("Line {blank} is blank, but more lines follow.")))
            }
            None => of_line(line, &text),
        })
    })
}

/// Plain text: `{"text": ...}` of each line, paragraph (blank lines part them) or of all. What is blank is no row.
pub fn texts(reader: impl BufRead, sample_by: SampleBy) -> impl Iterator<Item = Result<Record, BadLine>> {
    let mut lines = lines(reader).fuse();
    std::iter::from_fn(move || {
        let (mut first, mut text) = (None, String::new());
        loop {
            let (line, piece) = match lines.next() {
                Some(Ok(line)) => line,
                Some(Err(error)) => return Some(Err(error)),
                None => break,
            };
            let is_blank = piece.trim().is_empty();
            match (sample_by, first) {
                (SampleBy::Line | SampleBy::Paragraph, None) if is_blank => continue,
                (SampleBy::Paragraph, Some(_)) if is_blank => break,
                _ => {}
            }
            let begun = *first.get_or_insert(line);
            text.push_str(&piece);
            if text.len() > MAX_ROW_BYTES {
                return Some(Err(too_long(Place::line(begun))));
            }
            if sample_by == SampleBy::Line {
                break;
            }
        }
        let text = match sample_by {
            SampleBy::Document => &*text,
            _ => text.trim_end_matches(['\n', '\r']),
        };
        let place = Place::line(first.filter(|_| !text.trim().is_empty())?);
        Some(Ok((
            place,
            Map::from_iter([("text".to_owned(), Value::from(text))]),
        )))
    })
}

/// Each with its number from 1 and its end.
fn lines(mut reader: impl BufRead) -> impl Iterator<Item = Result<(u64, String), BadLine>> {
    let mut number = 0;
    std::iter::from_fn(move || {
        number += 1;
        let place = Place::line(number);
        let mut bytes = Vec::new();
        let limit = MAX_ROW_BYTES as u64 + 1;
        match reader.by_ref().take(limit).read_until(b'\n', &mut bytes) {
            Err(error) => return Some(Err(unread(place, &error))),
            Ok(0) => return None,
            Ok(n) if n > MAX_ROW_BYTES => return Some(Err(too_long(place))),
            Ok(_) => {}
        }
        let bytes = if number == 1 { without_mark(&bytes) } else { &bytes };
        Some(utf8(place, bytes).map(|text| (number, text.to_owned())))
    })
}
