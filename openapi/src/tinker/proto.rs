//! The bodies of Tinker that are protobuf, by the numbers of `tinker_public.proto`. Fields of bytes are arrays of
//! little-endian numbers.

use std::collections::BTreeMap;

use prost::{Message, Oneof};

pub const MEDIA_TYPE: &str = "application/x-protobuf";

/// Of [`Tensor::dtype`].
pub const FLOAT32: i32 = 1;
pub const INT64: i32 = 2;

#[derive(Clone, PartialEq, Message)]
pub struct ForwardBackwardRequest {
    #[prost(string, tag = "1")]
    pub model_id: String,
    #[prost(int32, tag = "2")]
    pub seq_id: i32,
    #[prost(message, repeated, tag = "3")]
    pub data: Vec<Datum>,
    #[prost(string, tag = "4")]
    pub loss_fn: String,
    #[prost(btree_map = "string, double", tag = "5")]
    pub loss_fn_config: BTreeMap<String, f64>,
    #[prost(bool, tag = "6")]
    pub forward_only: bool,
    /// Counts where there are both.
    #[prost(btree_map = "string, message", tag = "7")]
    pub loss_fn_config_v2: BTreeMap<String, LossConfigValue>,
}

impl ForwardBackwardRequest {
    /// How much memory one takes beside its bytes, roughly and rather too much, before it is read: a message of two bytes becomes one
    /// of hundreds. What is no such message is not looked at further, its reader says why.
    pub fn tree_bytes(body: &[u8]) -> usize {
        const DATUM: usize = 64;
        const CHUNK: usize = 64;
        // A map of one has a node of eleven places.
        const INPUT: usize = 2048;
        const SETTING: usize = 256;
        let of_datum = |datum| {
            let sizes = nested(datum).map(|(tag, _)| match tag {
                1 => CHUNK,
                2 => INPUT,
                _ => 0,
            });
            DATUM + sizes.sum::<usize>()
        };
        let sizes = nested(body).map(|(tag, value)| match tag {
            3 => of_datum(value),
            5 | 7 => SETTING,
            _ => 0,
        });
        sizes.sum()
    }
}

/// The fields of a message that have a length, as far as it is one: number and value.
fn nested(mut rest: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    std::iter::from_fn(move || {
        loop {
            // Keys and whole numbers are written as lengths are.
            let key = prost::decode_length_delimiter(&mut rest).ok()?;
            let bytes = match key & 7 {
                0 => {
                    prost::decode_length_delimiter(&mut rest).ok()?;
                    continue;
                }
                1 => 8,
                2 => prost::decode_length_delimiter(&mut rest).ok()?,
                5 => 4,
                _ => return None,
            };
            let (value, after) = rest.split_at_checked(bytes)?;
            rest = after;
            if key & 7 == 2 {
                return Some((key >> 3, value));
            }
        }
    })
}

#[derive(Clone, PartialEq, Message)]
pub struct LossConfigValue {
    #[prost(oneof = "ConfigValue", tags = "1, 2")]
    pub value: Option<ConfigValue>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum ConfigValue {
    #[prost(double, tag = "1")]
    Number(f64),
    #[prost(string, tag = "2")]
    Text(String),
}

/// Spans (3 and 4) say where tokens came from, and change nothing.
#[derive(Clone, PartialEq, Message)]
pub struct Datum {
    #[prost(message, repeated, tag = "1")]
    pub model_input: Vec<Chunk>,
    #[prost(btree_map = "string, message", tag = "2")]
    pub loss_fn_inputs: BTreeMap<String, Tensor>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Chunk {
    #[prost(oneof = "Piece", tags = "1, 2, 3")]
    pub chunk: Option<Piece>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Piece {
    #[prost(message, tag = "1")]
    Text(EncodedText),
    #[prost(message, tag = "2")]
    Image(Opaque),
    #[prost(message, tag = "3")]
    Sound(Opaque),
}

#[derive(Clone, PartialEq, Message)]
pub struct EncodedText {
    /// int32
    #[prost(bytes = "vec", tag = "1")]
    pub tokens: Vec<u8>,
}

/// What is not read.
#[derive(Clone, PartialEq, Message)]
pub struct Opaque {}

#[derive(Clone, PartialEq, Message)]
pub struct Tensor {
    #[prost(oneof = "Encoding", tags = "1, 2")]
    pub encoding: Option<Encoding>,
    #[prost(int32, tag = "3")]
    pub dtype: i32,
    #[prost(int64, repeated, tag = "4")]
    pub shape: Vec<i64>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Encoding {
    #[prost(bytes, tag = "1")]
    Dense(Vec<u8>),
    #[prost(message, tag = "2")]
    Csr(SparseCsr),
}

#[derive(Clone, PartialEq, Message)]
pub struct SparseCsr {
    #[prost(bytes = "vec", tag = "1")]
    pub values: Vec<u8>,
    /// int64
    #[prost(bytes = "vec", tag = "2")]
    pub crow_indices: Vec<u8>,
    /// int64
    #[prost(bytes = "vec", tag = "3")]
    pub col_indices: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ForwardBackwardOutput {
    /// `ArrayRecord`
    #[prost(string, tag = "1")]
    pub loss_fn_output_type: String,
    #[prost(message, repeated, tag = "2")]
    pub loss_fn_outputs: Vec<ArrayRecord>,
    /// Each key ends with how chunks are put together: `name:sum`, `name:max`.
    #[prost(btree_map = "string, double", tag = "3")]
    pub metrics: BTreeMap<String, f64>,
}

/// Data of one shape behind their first dimension.
#[derive(Clone, PartialEq, Message)]
pub struct ArrayRecord {
    #[prost(btree_map = "string, message", tag = "2")]
    pub fields: BTreeMap<String, BatchedTensor>,
    #[prost(int64, tag = "3")]
    pub num_datums: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct BatchedTensor {
    #[prost(bytes = "vec", tag = "1")]
    pub data: Vec<u8>,
    /// int64, in bytes, one more than there are data.
    #[prost(bytes = "vec", tag = "2")]
    pub offsets: Vec<u8>,
    #[prost(int32, tag = "3")]
    pub dtype: i32,
    #[prost(int64, repeated, tag = "4")]
    pub trailing_shape: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SampleResponse {
    #[prost(message, repeated, tag = "1")]
    pub sequences: Vec<SampledSequence>,
    /// float32, NaN where there is none.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub prompt_logprobs: Option<Vec<u8>>,
    #[prost(message, optional, tag = "3")]
    pub topk_prompt_logprobs: Option<TopkLogprobs>,
    #[prost(int32, tag = "4")]
    pub prompt_cache_hit_tokens: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct SampledSequence {
    /// 0: a stop token or string; 1: `max_tokens`.
    #[prost(int32, tag = "1")]
    pub stop_reason: i32,
    /// int32
    #[prost(bytes = "vec", tag = "2")]
    pub tokens: Vec<u8>,
    /// float32
    #[prost(bytes = "vec", optional, tag = "3")]
    pub logprobs: Option<Vec<u8>>,
    #[prost(message, optional, tag = "4")]
    pub topk_sampled_logprobs: Option<TopkLogprobs>,
}

/// `[length, k]`, an empty cell is 0 with -99999.
#[derive(Clone, PartialEq, Message)]
pub struct TopkLogprobs {
    /// int32
    #[prost(bytes = "vec", tag = "1")]
    pub token_ids: Vec<u8>,
    /// float32
    #[prost(bytes = "vec", tag = "2")]
    pub logprobs: Vec<u8>,
    #[prost(uint32, tag = "3")]
    pub k: u32,
    #[prost(uint32, tag = "4")]
    pub length: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_takes_is_known_before_it_is_read() {
        let input = |n: u8| (format!("target{n}"), Tensor::default());
        let datum = Datum {
            model_input: vec![Chunk::default(); 3],
            loss_fn_inputs: (0..2).map(input).collect(),
        };
        let request = ForwardBackwardRequest {
            model_id: "m".to_owned(),
            seq_id: 300,
            data: vec![datum; 200],
            loss_fn_config: [("a".to_owned(), 1.0)].into(),
            ..ForwardBackwardRequest::default()
        };
        let body = request.encode_to_vec();
        let taken = 200 * (64 + 3 * 64 + 2 * 2048) + 256;
        assert_eq!(ForwardBackwardRequest::tree_bytes(&body), taken);
        // Two bytes each, and a datum that ends too early.
        let small = [b"\x1a\x02\x12\x00".repeat(1000), b"\x1a\x05\x12\x00".to_vec()].concat();
        assert_eq!(ForwardBackwardRequest::tree_bytes(&small), 1000 * (64 + 2048));
    }
}
