//! How much memory a protobuf message takes, known before it is read: a field of two bytes becomes a structure of hundreds. Not
//! here: what a message means.

use crate::json;

/// The fields of a message that take more than their bytes. Others are texts and single numbers.
pub type Shape = &'static [Field];

pub struct Field {
    pub number: usize,
    pub holds: Holds,
}

pub enum Holds {
    /// A structure of so many bytes, each time.
    Message(usize, Shape),
    /// Numbers, packed or one by one, that take so many times their bytes.
    Numbers(usize),
    /// A text that is read in its turn, in a list perhaps.
    Json,
}

/// Roughly and rather too much, `message` itself included. Of what is no such message the part before the damage counts: its reader
/// stops there too.
pub fn tree_bytes(message: &[u8], shape: Shape) -> usize {
    // A list that grows has up to twice the room it needs.
    const ROOM: usize = 2;
    let taken = |(number, value): (usize, Value)| {
        let Some(field) = shape.iter().find(|field| field.number == number) else {
            return 0;
        };
        match (&field.holds, value) {
            (Holds::Message(size, inner), Value::Bytes(bytes)) => {
                ROOM * size + tree_bytes(bytes, inner) - bytes.len()
            }
            (Holds::Numbers(times), Value::Bytes(bytes)) => ROOM * times * bytes.len(),
            (Holds::Json, Value::Bytes(bytes)) => ROOM * size_of::<Vec<u8>>() + json::tree_bytes(bytes),
            (Holds::Message(size, _) | Holds::Numbers(size), Value::Number) => ROOM * size,
            (Holds::Json, Value::Number) => 0,
        }
    };
    message.len() + fields(message).map(taken).sum::<usize>()
}

enum Value<'a> {
    Number,
    Bytes(&'a [u8]),
}

/// Number and value of each field, as far as it is a message.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = (usize, Value<'_>)> {
    std::iter::from_fn(move || {
        // Keys and whole numbers are written as lengths are.
        let key = prost::decode_length_delimiter(&mut rest).ok()?;
        let fixed = match key & 7 {
            0 => {
                prost::decode_length_delimiter(&mut rest).ok()?;
                0
            }
            // Groups, which a reader skips: what is in one counts as if it stood here.
            3 | 4 => 0,
            1 => 8,
            5 => 4,
            2 => {
                let len = prost::decode_length_delimiter(&mut rest).ok()?;
                let (value, after) = rest.split_at_checked(len)?;
                rest = after;
                return Some((key >> 3, Value::Bytes(value)));
            }
            _ => return None,
        };
        rest = rest.get(fixed..)?;
        Some((key >> 3, Value::Number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INNER: Shape = &[Field {
        number: 1,
        holds: Holds::Numbers(8),
    }];
    const OUTER: Shape = &[
        Field {
            number: 2,
            holds: Holds::Message(100, INNER),
        },
        Field {
            number: 3,
            holds: Holds::Json,
        },
    ];

    #[test]
    fn what_a_message_takes_is_known_before_it_is_read() {
        // Empty messages of two bytes, then one with a packed list of three numbers and one by itself.
        let empty = b"\x12\x00".repeat(1000);
        assert_eq!(tree_bytes(&empty, OUTER), 2000 + 1000 * 200);
        let lists = b"\x12\x07\x0a\x03\x01\x02\x03\x08\x05";
        assert_eq!(tree_bytes(lists, OUTER), 9 + 200 + 2 * 8 * 3 + 2 * 8);
        let text = b"\x1a\x05[1,2]";
        assert_eq!(tree_bytes(text, OUTER), 7 + 48 + json::tree_bytes(b"[1,2]"));
        // Texts and single numbers, fixed ones too, take their bytes.
        let plain = b"\x0a\x02ab\x20\x01\x2d\x00\x00\x00\x00\x31\x00\x00\x00\x00\x00\x00\x00\x00";
        assert_eq!(tree_bytes(plain, OUTER), plain.len());
        // What stands behind a group that is skipped counts.
        assert_eq!(tree_bytes(b"\x4b\x08\x01\x4c\x12\x00", OUTER), 6 + 200);
        // A length beyond the end.
        assert_eq!(tree_bytes(b"\x12\x00\x12\x7f\x00", OUTER), 5 + 200);
    }
}
