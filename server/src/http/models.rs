//! /v1/models. Names hold `:` and `/`, so a name is the rest of the path.

use axum::Json;
use tandem_openapi::common::{Deleted, List};
use tandem_openapi::error::Errors;
use tandem_openapi::models::Model;

use super::to_the_end;
use crate::convert;
use crate::error::ApiError;
use crate::extract::{Pairs, Segment};
use crate::keys::Own;

/// The base model and the adapters. Checkpoints of jobs can be named as well; a job lists its own.
#[utoipa::path(
    get, path = "/v1/models", tag = "models",
    params(("include_checkpoints" = Option<bool>, Query, description = "List the checkpoints of all jobs, too")),
    responses((status = 200, body = List<Model>), Errors)
)]
pub async fn list(Own(own): Own, query: Pairs) -> Result<Json<List<Model>>, ApiError> {
    let with_checkpoints = query.flag("include_checkpoints")?;
    let models = own.models().into_iter().map(convert::models::model);
    let models = models.filter(|model| with_checkpoints || model.step_number.is_none());
    Ok(Json(List::new(models.collect())))
}

/// One model. The id may hold `/`, plain or percent-encoded.
#[utoipa::path(
    get, path = "/v1/models/{*id}", tag = "models", params(("id" = String, Path)),
    responses((status = 200, body = Model), Errors)
)]
pub async fn retrieve(Own(own): Own, Segment(id): Segment) -> Result<Json<Model>, ApiError> {
    Ok(Json(convert::models::model(own.model(&id)?)))
}

/// Forget a fine-tuned model. Requests that run keep what they started with.
#[utoipa::path(
    delete, path = "/v1/models/{*id}", tag = "models", params(("id" = String, Path)),
    responses((status = 200, body = Deleted), Errors)
)]
pub async fn delete(Own(own): Own, Segment(id): Segment) -> Result<Json<Deleted>, ApiError> {
    let name = id.clone();
    to_the_end(async move { own.delete_model(&name).await }).await?;
    Ok(Json(Deleted {
        id,
        object: "model",
        deleted: true,
    }))
}
