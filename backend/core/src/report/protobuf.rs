//! As much of protobuf as files of reports want (protobuf.dev/programming-guides/encoding).

/// A message that is written field by field.
#[derive(Default)]
pub struct Message(pub Vec<u8>);

impl Message {
    /// Bytes, a text, or a message.
    pub fn bytes(mut self, field: u32, bytes: &[u8]) -> Message {
        self.tag(field, 2);
        varint(bytes.len() as u64, &mut self.0);
        self.0.extend(bytes);
        self
    }

    pub fn message(self, field: u32, message: Message) -> Message {
        self.bytes(field, &message.0)
    }

    pub fn integer(mut self, field: u32, number: u64) -> Message {
        self.tag(field, 0);
        varint(number, &mut self.0);
        self
    }

    pub fn float(mut self, field: u32, number: f32) -> Message {
        self.tag(field, 5);
        self.0.extend(number.to_le_bytes());
        self
    }

    pub fn double(mut self, field: u32, number: f64) -> Message {
        self.tag(field, 1);
        self.0.extend(number.to_le_bytes());
        self
    }

    fn tag(&mut self, field: u32, kind: u32) {
        varint(u64::from(field << 3 | kind), &mut self.0);
    }
}

fn varint(mut number: u64, to: &mut Vec<u8>) {
    while number >= 1 << 7 {
        to.push(number as u8 | 1 << 7);
        number >>= 7;
    }
    to.push(number as u8);
}
