//! Requests for scores to texts whose vectors are compared, and vectors to scores.

use tandem_openapi::completions::CompletionPrompt;
use tandem_openapi::embeddings::{EmbeddingRequest, Vector};
use tandem_openapi::scores::{Document, RerankRequest, ScoreRequest};

use super::embeddings::{self, Embeddings};
use super::natural;
use crate::error::{ApiError, invalid};

/// Texts to be made vectors, those of the queries first.
pub struct Compared {
    pub embeddings: Embeddings,
    /// One for all others, or as many.
    queries: usize,
}

pub fn pairs(request: ScoreRequest) -> Result<Compared, ApiError> {
    let ScoreRequest {
        model,
        text_1,
        text_2,
        pooling,
        priority,
    } = request;
    let (queries, texts) = (text_1.into_vec(), text_2.into_vec());
    if queries.len() != 1 && queries.len() != texts.len() {
        let message = format!(
            "text_1 must be one text, or as many as text_2 has: got {} and {}",
            queries.len(),
            texts.len()
        );
        return Err(invalid("text_1", message));
    }
    compared(model, queries, texts, pooling, priority, "text_2")
}

/// How to rank, beside what.
pub struct Ranking {
    pub compared: Compared,
    /// As they were sent.
    pub documents: Vec<String>,
    pub top_n: usize,
    pub return_documents: bool,
}

pub fn ranking(request: RerankRequest) -> Result<Ranking, ApiError> {
    let RerankRequest {
        model,
        query,
        documents,
        top_n,
        return_documents,
        pooling,
        priority,
    } = request;
    let text = |document| match document {
        Document::Plain(text) | Document::Text { text } => text,
    };
    let documents: Vec<String> = documents.into_iter().map(text).collect();
    let top_n = match top_n.map(|n| natural("top_n", n, 0, u32::MAX)).transpose()? {
        None | Some(0) => documents.len(),
        Some(n) => n as usize,
    };
    Ok(Ranking {
        compared: compared(
            model,
            vec![query],
            documents.clone(),
            pooling,
            priority,
            "documents",
        )?,
        documents,
        top_n,
        return_documents: return_documents.unwrap_or(true),
    })
}

fn compared(
    model: String,
    queries: Vec<String>,
    texts: Vec<String>,
    pooling: Option<String>,
    priority: Option<i32>,
    param: &'static str,
) -> Result<Compared, ApiError> {
    if texts.is_empty() {
        return Err(invalid(
            param,
            format!("{param} is an empty list; at least one text is needed"),
        ));
    }
    let n = queries.len();
    let request = EmbeddingRequest {
        model,
        input: CompletionPrompt::Texts(queries.into_iter().chain(texts).collect()),
        encoding_format: None,
        dimensions: None,
        pooling,
        normalize: Some(true),
        add_special_tokens: None,
        priority,
    };
    let embeddings = embeddings::calls(request).map_err(|error| error.in_words(&[("input", param)]))?;
    Ok(Compared {
        embeddings,
        queries: n,
    })
}

/// The cosine of each text and its query, from all vectors in the order of the calls.
pub fn cosines(vectors: &[Vector], queries: usize) -> Vec<f64> {
    let numbers = |vector: &'_ Vector| match vector {
        Vector::Float(numbers) => numbers.clone(),
        // What was asked above is numbers.
        Vector::Base64(_) => vec![],
    };
    let (asked, texts) = vectors.split_at(queries);
    let cosine = |(i, text): (usize, &Vector)| {
        let query = numbers(&asked[i % queries]);
        let products = query.iter().zip(numbers(text));
        products.map(|(&a, b)| f64::from(a) * f64::from(b)).sum()
    };
    texts.iter().enumerate().map(cosine).collect()
}

impl Compared {
    pub fn parts(self) -> (Embeddings, usize) {
        (self.embeddings, self.queries)
    }
}
