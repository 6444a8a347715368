//! /v1/files. An upload is written to disk part by part; no file is ever whole in memory.

use std::path::PathBuf;

use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures::{StreamExt, stream};
use tandem_core::id::{Digest, Hasher};
use tandem_openapi::common::{CursorList, Deleted};
use tandem_openapi::error::Errors;
use tandem_openapi::files::{File, UploadForm};
use tandem_router::api::{RouterError, Upload};
use tandem_store::StoreError;
use tokio::io::AsyncWriteExt;
use tracing::error;

use crate::app::App;
use crate::audit::Object;
use crate::convert::files;
use crate::error::{ApiError, invalid, unreadable};
use crate::extract::{FILE_LIMIT_BYTES, Pairs, Segment, announced_bytes, must_be};
use crate::fields::stray_field;
use crate::keys::Own;

/// Boundaries, headers and the small fields of a form.
const FORM_OVERHEAD_BYTES: u64 = 1 << 20;
/// A form's text field.
const FIELD_LIMIT_BYTES: usize = 4096;
const LIST_LIMIT: u32 = 10_000;

/// Upload a file. A `fine-tune` file is checked line by line before the answer.
#[utoipa::path(
    post, path = "/v1/files", tag = "files",
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 200, body = File), Errors)
)]
pub async fn create(
    State(app): State<App>,
    Own(own): Own,
    request: Request,
) -> Result<(Extension<Object>, Json<File>), ApiError> {
    let limit_bytes = FILE_LIMIT_BYTES;
    let announced = announced_bytes(request.headers());
    let mut form = form(&app, request, "file", limit_bytes).await?;
    let incoming = own.incoming().await?;
    // What surely comes of it, before it does.
    incoming.reach(announced.unwrap_or(0).saturating_sub(FORM_OVERHEAD_BYTES))?;
    let within = |bytes| match bytes > limit_bytes {
        true => Err(ApiError::TooLarge { limit_bytes }),
        false => Ok(incoming.reach(bytes)?),
    };
    let staged = Staged(app.router.staging());
    let Form {
        file,
        purpose,
        expires_after_seconds,
    } = read(&app, &mut form, &staged, within).await?;
    let (filename, Written { bytes, sha256 }) = file.ok_or_else(|| files::missing("file"))?;
    let purpose = files::purpose(purpose)?;
    let upload = Upload {
        staged: staged.0.clone(),
        bytes,
        sha256,
        filename,
        purpose,
        expires_after_seconds,
    };
    let info = own.create_file(upload).await?;
    app.metrics.uploaded(bytes);
    Ok((Extension(Object(info.id.clone())), Json(files::file(info))))
}

/// A form with a file of at most `limit_bytes` in its field `param`, where there is room for it.
pub(super) async fn form(
    app: &App,
    request: Request,
    param: &'static str,
    limit_bytes: u64,
) -> Result<Multipart, ApiError> {
    if announced_bytes(request.headers()).is_some_and(|bytes| bytes > limit_bytes + FORM_OVERHEAD_BYTES) {
        return Err(ApiError::TooLarge { limit_bytes });
    }
    must_be("multipart/form-data", request.headers())?;
    app.router.check_room()?;
    Multipart::from_request(request, &()).await.map_err(|rejection| {
        invalid(
            param,
            format!("the body must be multipart/form-data: {}", rejection.body_text()),
        )
    })
}

/// An upload's file on its way; what is left of it goes when the upload ends, however it ends.
pub(super) struct Staged(pub PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // After a success the file has moved away, and there is nothing to remove.
        drop(std::fs::remove_file(&self.0));
    }
}

#[derive(Default)]
struct Form {
    /// Its name and what came of it.
    file: Option<(String, Written)>,
    purpose: Option<String>,
    expires_after_seconds: Option<u64>,
}

/// Fields come in any order; `purpose` before `file` in openai-python.
async fn read(
    app: &App,
    form: &mut Multipart,
    staged: &Staged,
    within: impl Fn(u64) -> Result<(), ApiError>,
) -> Result<Form, ApiError> {
    let mut read = Form::default();
    while let Some(field) = form.next_field().await.map_err(broken)? {
        match field.name().unwrap_or_default() {
            "file" if read.file.is_some() => return Err(invalid("file", "the form has two files")),
            "file" => {
                let name = files::filename(field.file_name());
                read.file = Some((name, write(app, field, staged, &within).await?));
            }
            "purpose" => read.purpose = Some(text(field, "purpose").await?),
            "expires_after[anchor]" => {
                let anchor = text(field, "expires_after[anchor]").await?;
                if anchor != "created_at" {
                    return Err(invalid(
                        "expires_after[anchor]",
                        "expires_after[anchor] must be \"created_at\"",
                    ));
                }
            }
            "expires_after[seconds]" => {
                let seconds = text(field, "expires_after[seconds]").await?;
                read.expires_after_seconds = Some(files::expiry_seconds(&seconds)?);
            }
            other => app
                .strays
                .judge_all(stray_field("UploadForm", other).into_iter().collect(), &[])?,
        }
    }
    Ok(read)
}

/// Bytes of an upload, as they came.
pub(super) struct Written {
    pub bytes: u64,
    pub sha256: Digest,
}

/// `within`: whether so many bytes are taken.
pub(super) async fn write(
    app: &App,
    mut field: Field<'_>,
    staged: &Staged,
    within: impl Fn(u64) -> Result<(), ApiError>,
) -> Result<Written, ApiError> {
    let failed = |source: std::io::Error| {
        let what = "writing an upload".to_owned();
        let error = RouterError::Store(StoreError::Io { what, source });
        app.router.note(&error);
        ApiError::Router(error)
    };
    let mut file = tokio::fs::File::create(&staged.0).await.map_err(failed)?;
    let (mut bytes, mut hasher) = (0, Hasher::default());
    while let Some(chunk) = field.chunk().await.map_err(broken)? {
        bytes += chunk.len() as u64;
        within(bytes)?;
        hasher.update(&chunk);
        file.write_all(&chunk).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    Ok(Written {
        bytes,
        sha256: hasher.finish(),
    })
}

async fn text(mut field: Field<'_>, param: &'static str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(broken)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > FIELD_LIMIT_BYTES {
            return Err(invalid(
                param,
                format!("{param} is longer than {FIELD_LIMIT_BYTES} bytes"),
            ));
        }
    }
    String::from_utf8(bytes).map_err(|_| invalid(param, format!("{param} is not UTF-8")))
}

pub(super) fn broken(error: MultipartError) -> ApiError {
    match unreadable(&error) {
        ApiError::Body(_) => ApiError::Body(error.body_text()),
        slow => slow,
    }
}

/// Files, newest first unless asked otherwise.
#[utoipa::path(
    get, path = "/v1/files", tag = "files",
    params(
        ("purpose" = Option<String>, Query), ("after" = Option<String>, Query, description = "The last id of the page before"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 10000), ("order" = Option<String>, Query, description = "asc or desc"),
    ),
    responses((status = 200, body = CursorList<File>), Errors)
)]
pub async fn list(Own(own): Own, query: Pairs) -> Result<Json<CursorList<File>>, ApiError> {
    let limit = query.integer("limit", 1..=LIST_LIMIT, LIST_LIMIT)?;
    let order = query.order()?;
    let page = own
        .files(query.text("purpose"), query.text("after"), limit, order)
        .await?;
    let data: Vec<File> = page.data.into_iter().map(files::file).collect();
    Ok(Json(CursorList {
        object: "list",
        first_id: data.first().map(|file| file.id.clone()),
        last_id: data.last().map(|file| file.id.clone()),
        data,
        has_more: page.has_more,
    }))
}

/// One file's description.
#[utoipa::path(
    get, path = "/v1/files/{id}", tag = "files", params(("id" = String, Path)),
    responses((status = 200, body = File), Errors)
)]
pub async fn retrieve(Own(own): Own, Segment(id): Segment) -> Result<Json<File>, ApiError> {
    Ok(Json(files::file(own.file(&id).await?)))
}

/// Delete a file.
#[utoipa::path(
    delete, path = "/v1/files/{id}", tag = "files", params(("id" = String, Path)),
    responses((status = 200, body = Deleted), Errors)
)]
pub async fn delete(Own(own): Own, Segment(id): Segment) -> Result<Json<Deleted>, ApiError> {
    own.delete_file(&id).await?;
    Ok(Json(Deleted {
        id,
        object: "file",
        deleted: true,
    }))
}

/// A file's bytes, as they were uploaded. Of a file that a disk has damaged since, the last ones do not come.
#[utoipa::path(
    get, path = "/v1/files/{id}/content", tag = "files", params(("id" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), Errors)
)]
pub async fn content(Own(own): Own, Segment(id): Segment) -> Result<Response, ApiError> {
    let mut content = own.file_content(&id).await?;
    let info = content.info();
    let first = content.next().await?;
    let rest = stream::try_unfold(content, async |mut content| {
        let chunk = content
            .next()
            .await
            .inspect_err(|error| error!(%error, "a download was cut"))?;
        Ok::<_, RouterError>(chunk.map(|chunk| (chunk, content)))
    });
    let chunks = stream::iter(first.map(Ok)).chain(rest);
    let mut headers = HeaderMap::new();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(info.bytes));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers.insert(header::CONTENT_DISPOSITION, attachment(&info.filename));
    Ok((headers, Body::from_stream(chunks)).into_response())
}

/// RFC 6266: any name, percent-encoded.
pub fn attachment(filename: &str) -> HeaderValue {
    let mut text = String::from("attachment; filename*=UTF-8''");
    for byte in filename.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' => text.push(char::from(byte)),
            other => text.push_str(&format!("%{other:02X}")),
        }
    }
    HeaderValue::from_str(&text).expect("letters, digits and percent signs")
}
