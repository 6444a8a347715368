//! One JSON array of dictionaries, read element by element.

use std::io::BufRead;

use super::{BadLine, MAX_ROW_BYTES, Place, Record, dictionary, too_long, unread, utf8};

pub fn rows(reader: impl BufRead) -> impl Iterator<Item = Result<Record, BadLine>> {
    let mut elements = Elements {
        reader,
        number: 0,
        at: At::Start,
    };
    std::iter::from_fn(move || {
        let place = Place::row(elements.number + 1);
        match elements.next(place) {
            Ok(None) => None,
            Ok(Some(bytes)) => {
                let row = utf8(place, &bytes).and_then(|text| dictionary(place, text));
                Some(row.map(|row| (place, row)))
            }
            Err(error) => Some(Err(error)),
        }
    })
}

struct Elements<R> {
    reader: R,
    number: u64,
    at: At,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Start,
    Element,
    End,
}

impl<R: BufRead> Elements<R> {
    /// The bytes of the next element; what lies between two is checked here, what lies in one by its parser.
    fn next(&mut self, place: Place) -> Result<Option<Vec<u8>>, BadLine> {
        let ends = || {
            place.bad(format!(
                "The JSON array ends in the middle, at {place}: the file is cut off."
            ))
        };
        match self.at {
            // The format was told by the bracket.
            At::Start => while self.byte(place)?.ok_or_else(ends)? != b'[' {},
            At::Element => {}
            At::End => return Ok(None),
        }
        self.at = At::Element;
        let mut element = Vec::new();
        let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
        loop {
            let byte = self.byte(place)?.ok_or_else(ends)?;
            match byte {
                _ if in_string => {
                    in_string = escaped || byte != b'"';
                    escaped = !escaped && byte == b'\\';
                }
                b'"' => in_string = true,
                b'{' | b'[' => depth += 1,
                b'}' | b']' if depth > 0 => depth -= 1,
                b',' | b']' if depth == 0 => return self.ended(place, element, byte),
                _ => {}
            }
            element.push(byte);
            if element.len() > MAX_ROW_BYTES {
                return Err(too_long(place));
            }
        }
    }

    fn ended(&mut self, place: Place, element: Vec<u8>, end: u8) -> Result<Option<Vec<u8>>, BadLine> {
        if end == b']' {
            self.at = At::End;
            while let Some(byte) = self.byte(place)? {
                if !byte.is_ascii_whitespace() {
                    return Err(place.bad(format!(
                        "Behind the JSON array, at {place}, more follows: the file must be one array, or JSONL."
                    )));
                }
            }
        }
        match element.trim_ascii().is_empty() {
            true if self.at == At::End && self.number == 0 => Ok(None),
            true => Err(place.bad(format!(
                "{place} is missing: there is a comma too many in the JSON array."
            ))),
            false => {
                self.number += 1;
                Ok(Some(element))
            }
        }
    }

    fn byte(&mut self, place: Place) -> Result<Option<u8>, BadLine> {
        let buffer = self.reader.fill_buf().map_err(|error| unread(place, &error))?;
        let byte = buffer.first().copied();
        self.reader.consume(usize::from(byte.is_some()));
        Ok(byte)
    }
}
