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
