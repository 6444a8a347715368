//! How alike texts are, by the cosine of their vectors: vLLM's score, and rerank as Cohere and Jina have it.

use axum::Json as Answer;
use axum::extract::State;
use tandem_openapi::embeddings::EmbeddingUsage;
use tandem_openapi::error::Errors;
use tandem_openapi::scores::{
    RerankDocument, RerankRequest, RerankResult, Reranked, Score, ScoreRequest, Scores,
};
use tandem_router::api::Client;

use super::embeddings::vectors;
use crate::app::{App, now};
use crate::convert::scores::{self, Compared, Ranking};
use crate::error::ApiError;
use crate::extract::Json;
use crate::id;
use crate::keys::Asker;

/// How alike pairs of texts are.
#[utoipa::path(
    post, path = "/v1/score", tag = "inference", request_body = ScoreRequest,
    responses((status = 200, body = Scores), Errors)
)]
pub async fn score(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<ScoreRequest>,
) -> Result<Answer<Scores>, ApiError> {
    let model = request.model.clone();
    let (cosines, usage) = compare(&app, client, scores::pairs(request)?, "text_2").await?;
    let score = |(index, score)| Score {
        index,
        object: "score",
        score,
    };
    Ok(Answer(Scores {
        id: id::fresh("score-"),
        object: "list",
        created: now(),
        model,
        data: (0..).zip(cosines).map(score).collect(),
        usage,
    }))
}

/// `/v1/score` under its other name.
#[utoipa::path(
    post, path = "/score", tag = "inference", request_body = ScoreRequest,
    responses((status = 200, body = Scores), Errors)
)]
pub async fn score_too(
    app: State<App>,
    asker: Asker,
    request: Json<ScoreRequest>,
) -> Result<Answer<Scores>, ApiError> {
    score(app, asker, request).await
}

/// Documents by how alike they are to a query.
#[utoipa::path(
    post, path = "/v1/rerank", tag = "inference", request_body = RerankRequest,
    responses((status = 200, body = Reranked), Errors)
)]
pub async fn rerank(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<RerankRequest>,
) -> Result<Answer<Reranked>, ApiError> {
    let model = request.model.clone();
    let Ranking {
        compared,
        documents,
        top_n,
        return_documents,
    } = scores::ranking(request)?;
    let (cosines, usage) = compare(&app, client, compared, "documents").await?;
    let result = |((index, relevance_score), text): ((u32, f64), String)| RerankResult {
        index,
        document: return_documents.then_some(RerankDocument { text }),
        relevance_score,
    };
    let mut results: Vec<RerankResult> = (0..).zip(cosines).zip(documents).map(result).collect();
    // Equals stay in their order.
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    results.truncate(top_n);
    Ok(Answer(Reranked {
        id: id::fresh("rerank-"),
        model,
        usage,
        results,
    }))
}

/// `/v1/rerank` under its other names.
#[utoipa::path(
    post, path = "/rerank", tag = "inference", request_body = RerankRequest,
    responses((status = 200, body = Reranked), Errors)
)]
pub async fn rerank_too(
    app: State<App>,
    asker: Asker,
    request: Json<RerankRequest>,
) -> Result<Answer<Reranked>, ApiError> {
    rerank(app, asker, request).await
}

/// `/v1/rerank` under Cohere's newer name.
#[utoipa::path(
    post, path = "/v2/rerank", tag = "inference", request_body = RerankRequest,
    responses((status = 200, body = Reranked), Errors)
)]
pub async fn rerank_v2(
    app: State<App>,
    asker: Asker,
    request: Json<RerankRequest>,
) -> Result<Answer<Reranked>, ApiError> {
    rerank(app, asker, request).await
}

async fn compare(
    app: &App,
    client: Client,
    compared: Compared,
    param: &'static str,
) -> Result<(Vec<f64>, EmbeddingUsage), ApiError> {
    let (texts, queries) = compared.parts();
    let (_, vectors, usage) = vectors(app, client, texts, param).await?;
    Ok((scores::cosines(&vectors, queries), usage))
}
