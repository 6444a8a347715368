//! The result of a call, held until it is there.

use axum::response::Response;
use tandem_openapi::error::Errors;
use tandem_openapi::tinker::{FutureFailed, RetrieveFutureRequest};
use tandem_router::tinker::Retrieved;

use crate::convert;
use crate::error::ApiError;
use crate::extract::Json;
use crate::keys::Own;

/// The result of a call: of scores and samples protobuf, of others JSON. One that failed says why, with status 200. 408: it
/// is not there yet, ask again.
#[utoipa::path(
    post, path = "/api/v1/retrieve_future", tag = "tinker", request_body = RetrieveFutureRequest,
    responses((status = 200, body = FutureFailed), Errors)
)]
pub async fn retrieve(Own(own): Own, Json(body): Json<RetrieveFutureRequest>) -> Result<Response, ApiError> {
    match own.retrieve(&body.request_id).await? {
        Retrieved::Done(outcome) => Ok(convert::tinker::answer(&outcome)),
        Retrieved::NotYet => Err(ApiError::NotYet),
    }
}
