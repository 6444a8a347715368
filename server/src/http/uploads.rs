//! /v1/uploads: files that come in parts.

use axum::extract::{Request, State};
use axum::{Extension, Json as Answer};
use tandem_openapi::error::Errors;
use tandem_openapi::uploads::{CompleteUpload, CreateUpload, PartForm, Upload, UploadPart};
use tandem_router::uploads::MAX_PART_BYTES;

use super::files::{Staged, Written, broken, form, write};
use super::to_the_end;
use crate::app::App;
use crate::audit::Object;
use crate::convert::{files, uploads};
use crate::error::{ApiError, invalid};
use crate::extract::{Json, Segment};
use crate::fields::stray_field;
use crate::keys::Own;

/// Begin a file that comes in parts, within an hour.
#[utoipa::path(
    post, path = "/v1/uploads", tag = "files", request_body = CreateUpload,
    responses((status = 200, body = Upload), Errors)
)]
pub async fn create(Own(own): Own, Json(body): Json<CreateUpload>) -> Result<Answer<Upload>, ApiError> {
    let request = uploads::request(body)?;
    Ok(Answer(uploads::upload(own.create_upload(request).await?)))
}

/// Add a part. Parts may come beside each other, in any order.
#[utoipa::path(
    post, path = "/v1/uploads/{id}/parts", tag = "files", params(("id" = String, Path)),
    request_body(content = PartForm, content_type = "multipart/form-data"),
    responses((status = 200, body = UploadPart), Errors)
)]
pub async fn part(
    State(app): State<App>,
    Own(own): Own,
    Segment(id): Segment,
    request: Request,
) -> Result<Answer<UploadPart>, ApiError> {
    let limit_bytes = MAX_PART_BYTES;
    let mut form = form(&app, request, "data", limit_bytes).await?;
    let room = own.room_for_part(&id).await?;
    let within = |bytes| match bytes > limit_bytes {
        true => Err(ApiError::TooLarge { limit_bytes }),
        false => Ok(room.check(bytes)?),
    };
    let staged = Staged(app.router.staging());
    let mut written = None;
    while let Some(field) = form.next_field().await.map_err(broken)? {
        match field.name().unwrap_or_default() {
            "data" if written.is_some() => return Err(invalid("data", "the form has two parts")),
            "data" => {
                written = Some(write(&app, field, &staged, within).await?);
            }
            other => app
                .strays
                .judge_all(stray_field("PartForm", other).into_iter().collect(), &[])?,
        }
    }
    let Written { bytes, sha256 } = written.ok_or_else(|| files::missing("data"))?;
    let part = to_the_end(async move {
        // With it what is left of a part that was refused.
        let staged = staged;
        own.add_part(&id, &staged.0, sha256).await
    })
    .await?;
    app.metrics.uploaded(bytes);
    Ok(Answer(uploads::part(part)))
}

/// Make a file of the parts. A `fine-tune` file is checked line by line before the answer.
#[utoipa::path(
    post, path = "/v1/uploads/{id}/complete", tag = "files", params(("id" = String, Path)),
    request_body = CompleteUpload, responses((status = 200, body = Upload), Errors)
)]
pub async fn complete(
    Own(own): Own,
    Segment(id): Segment,
    Json(body): Json<CompleteUpload>,
) -> Result<(Extension<Object>, Answer<Upload>), ApiError> {
    let CompleteUpload { part_ids, md5 } = body;
    let done = to_the_end(async move { own.complete_upload(&id, &part_ids, md5.as_deref()).await }).await?;
    let file = done.file.as_ref().map(|file| file.id.clone()).unwrap_or_default();
    Ok((Extension(Object(file)), Answer(uploads::upload(done))))
}

/// Take no more parts; those that came go.
#[utoipa::path(
    post, path = "/v1/uploads/{id}/cancel", tag = "files", params(("id" = String, Path)),
    responses((status = 200, body = Upload), Errors)
)]
pub async fn cancel(Own(own): Own, Segment(id): Segment) -> Result<Answer<Upload>, ApiError> {
    let cancelled = to_the_end(async move { own.cancel_upload(&id).await }).await?;
    Ok(Answer(uploads::upload(cancelled)))
}
