//! POST /v1/embeddings.

use axum::Json as Answer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use tandem_openapi::embeddings::{Embedding, EmbeddingRequest, EmbeddingUsage, Embeddings, Vector};
use tandem_openapi::error::Errors;
use tandem_router::api::Client;

use super::feed::{self, Admitted, Identity};
use crate::app::App;
use crate::convert;
use crate::error::ApiError;
use crate::extract::Json;
use crate::keys::Asker;

/// Texts to vectors.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "inference", request_body = EmbeddingRequest,
    responses((status = 200, body = Embeddings), Errors)
)]
pub async fn create(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<EmbeddingRequest>,
) -> Result<Response, ApiError> {
    let model = request.model.clone();
    let calls = convert::embeddings::calls(request)?;
    let (identity, vectors, usage) = vectors(&app, client, calls, "input").await?;
    let embedding = |(index, embedding)| Embedding {
        object: "embedding",
        index,
        embedding,
    };
    let mut response = Answer(Embeddings {
        object: "list",
        data: (0..).zip(vectors).map(embedding).collect(),
        model,
        usage,
    })
    .into_response();
    identity.write(response.headers_mut());
    Ok(response)
}

/// A vector of each text, in order. `param`: the field that the texts came in.
pub(super) async fn vectors(
    app: &App,
    client: Client,
    texts: convert::embeddings::Embeddings,
    param: &'static str,
) -> Result<(Identity, Vec<Vector>, EmbeddingUsage), ApiError> {
    let convert::embeddings::Embeddings { calls, shape } = texts;
    let Admitted {
        identity,
        prompts,
        mut feed,
    } = feed::admit(app, client, calls, param).await?;
    let gathered = feed::gather(&mut feed, 1).await?;
    let vector = |(index, one): (usize, feed::Gathered)| {
        let vector = one
            .vector
            .ok_or_else(|| ApiError::Internal(format!("text {index} has no vector")))?;
        shape.apply(vector)
    };
    let vectors = gathered.into_iter().enumerate().map(vector);
    let vectors = vectors.collect::<Result<Vec<Vector>, ApiError>>()?;
    let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let usage = EmbeddingUsage {
        prompt_tokens,
        total_tokens: prompt_tokens,
    };
    Ok((identity, vectors, usage))
}
