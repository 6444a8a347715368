//! How alike texts are: pairs of them (vLLM's score), or documents to a query (Cohere's and Jina's rerank).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::common::Strings;
use crate::embeddings::EmbeddingUsage;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "text_1": "When does the bakery open?", "text_2": ["It opens at eight", "Felix lives here"]}))]
pub struct ScoreRequest {
    pub model: String,
    /// One text for each of `text_2`, or one for all of them.
    pub text_1: Strings,
    pub text_2: Strings,
    /// What a text's vector is: `last` (default), `mean` or `cls`.
    pub pooling: Option<String>,
    /// Lower goes first (default 0). Below 0 only where the server says `--scheduling-policy priority`.
    pub priority: Option<i32>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Scores {
    /// `score-...`
    pub id: String,
    /// `list`
    pub object: &'static str,
    pub created: i64,
    pub model: String,
    pub data: Vec<Score>,
    pub usage: EmbeddingUsage,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Score {
    /// Of `text_2`.
    pub index: u32,
    /// `score`
    pub object: &'static str,
    /// The cosine between the two vectors.
    pub score: f64,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"model": "tandem-demo", "query": "When does the bakery open?", "documents": ["It opens at eight", "Felix lives here"]}))]
pub struct RerankRequest {
    pub model: String,
    pub query: String,
    pub documents: Vec<Document>,
    /// So many of the best; without it, or with 0, all.
    #[schema(minimum = 0)]
    pub top_n: Option<i64>,
    /// Whether results have their documents (default true).
    pub return_documents: Option<bool>,
    /// What a text's vector is: `last` (default), `mean` or `cls`.
    pub pooling: Option<String>,
    /// Lower goes first (default 0). Below 0 only where the server says `--scheduling-policy priority`.
    pub priority: Option<i32>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string, or an object with text")]
pub enum Document {
    Plain(String),
    Text { text: String },
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Reranked {
    /// `rerank-...`
    pub id: String,
    pub model: String,
    pub usage: EmbeddingUsage,
    /// The best first.
    pub results: Vec<RerankResult>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RerankResult {
    /// Of `documents`.
    pub index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<RerankDocument>,
    /// The cosine between its vector and the query's.
    pub relevance_score: f64,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RerankDocument {
    pub text: String,
}
