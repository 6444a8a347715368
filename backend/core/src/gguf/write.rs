//! Writes the head of a GGUF file, version 3. The tensors' bytes come behind it, each at its offset.

use super::head::{ARRAY, BOOL, DEFAULT_ALIGNMENT, FLOAT32, INT32, INT64, MAGIC, STRING, UINT32, UINT64};
use super::{TensorInfo, Value};

const VERSION: u32 = 3;

/// Where the next tensor may begin, `bytes` behind the first one's beginning.
pub fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(DEFAULT_ALIGNMENT as u64)
}

/// From the magic number to where the tensors' bytes begin. Whole numbers are written as readers expect sizes and ids, in
/// 32 bits without a sign where they fit; lists of them in 32 bits with one.
pub fn head(values: &[(String, Value)], tensors: &[TensorInfo]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((values.len() as u64).to_le_bytes());
    for (key, value) in values {
        text(&mut out, key);
        add_value(&mut out, value);
    }
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            out.extend((*size as u64).to_le_bytes());
        }
        out.extend(tensor.type_id.to_le_bytes());
        out.extend(tensor.offset.to_le_bytes());
    }
    out.resize(aligned(out.len() as u64) as usize, 0);
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn add_value(out: &mut Vec<u8>, value: &Value) {
    let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let list = |out: &mut Vec<u8>, of: u32, length: usize| {
        kind(out, ARRAY);
        kind(out, of);
        out.extend((length as u64).to_le_bytes());
    };
    match value {
        Value::Whole(n) => match (u32::try_from(*n), u64::try_from(*n)) {
            (Ok(n), _) => {
                kind(out, UINT32);
                out.extend(n.to_le_bytes());
            }
            (Err(_), Ok(n)) => {
                kind(out, UINT64);
                out.extend(n.to_le_bytes());
            }
            (Err(_), Err(_)) => {
                kind(out, INT64);
                out.extend((*n as i64).to_le_bytes());
            }
        },
        Value::Float(x) => {
            kind(out, FLOAT32);
            out.extend((*x as f32).to_le_bytes());
        }
        Value::Flag(flag) => {
            kind(out, BOOL);
            out.push(u8::from(*flag));
        }
        Value::Text(words) => {
            kind(out, STRING);
            text(out, words);
        }
        Value::Wholes(wholes) => match wholes
            .iter()
            .map(|&n| i32::try_from(n))
            .collect::<Result<Vec<_>, _>>()
        {
            Ok(small) => {
                list(out, INT32, small.len());
                small.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
            Err(_) => {
                list(out, INT64, wholes.len());
                wholes.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
        },
        Value::Floats(floats) => {
            list(out, FLOAT32, floats.len());
            floats.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
        Value::Flags(flags) => {
            list(out, BOOL, flags.len());
            out.extend(flags.iter().map(|&flag| u8::from(flag)));
        }
        Value::Texts(texts) => {
            list(out, STRING, texts.len());
            texts.iter().for_each(|words| text(out, words));
        }
    }
}
