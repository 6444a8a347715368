//! POST /v1/embeddings.

use axum::Json as Answer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use tandem_openapi::embeddings::{Embedding, EmbeddingRequest, EmbeddingUsage, Embeddings};
use tandem_openapi::error::Errors;

use super::feed::{self, Admitted};
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
    let convert::embeddings::Embeddings { calls, shape } = convert::embeddings::calls(request)?;
    let Admitted {
        identity,
        prompts,
        mut feed,
    } = feed::admit(&app, client, calls, "input").await?;
    let gathered = feed::gather(&mut feed, 1).await?;
    let embedding = |(index, one): (usize, feed::Gathered)| {
        let vector = one
            .vector
            .ok_or_else(|| ApiError::Internal(format!("text {index} has no vector")))?;
        Ok(Embedding {
            object: "embedding",
            index: index as u32,
            embedding: shape.apply(vector)?,
        })
    };
    let data = gathered.into_iter().enumerate().map(embedding);
    let data = data.collect::<Result<Vec<Embedding>, ApiError>>()?;
    let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let mut response = Answer(Embeddings {
        object: "list",
        data,
        model,
        usage: EmbeddingUsage {
            prompt_tokens,
            total_tokens: prompt_tokens,
        },
    })
    .into_response();
    identity.write(response.headers_mut());
    Ok(response)
}
