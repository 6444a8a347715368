//! /v1/embeddings, as OpenAI spells it, and what vLLM and text-embeddings-inference add.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::completions::CompletionPrompt;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "input": ["Once upon a time", "The end"]}))]
pub struct EmbeddingRequest {
    pub model: String,
    pub input: CompletionPrompt,
    /// `float` (default) or `base64`: little-endian float32.
    pub encoding_format: Option<String>,
    /// The first so many numbers of each vector (default all).
    pub dimensions: Option<i64>,
    /// Which states of the text become its vector: `last` (default: that of the last token), `mean` (the average over all
    /// tokens) or `cls` (that of the first).
    pub pooling: Option<String>,
    /// Length 1 (default true). After `dimensions`.
    pub normalize: Option<bool>,
    /// BOS and the like (default true).
    pub add_special_tokens: Option<bool>,
    /// Lower goes first (default 0). Below 0 only where the server says `--scheduling-policy priority`.
    pub priority: Option<i32>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Embeddings {
    /// `list`
    pub object: &'static str,
    pub data: Vec<Embedding>,
    pub model: String,
    pub usage: EmbeddingUsage,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// `embedding`
    pub object: &'static str,
    pub index: u32,
    pub embedding: Vector,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    pub prompt_tokens: u64,
    pub total_tokens: u64,
}
