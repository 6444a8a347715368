//! /v1/batches, and the answers to their lines: each is asked as if it came over HTTP, by the same routes.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{self, Body};
use axum::http::{Method, Request, header};
use axum::response::Response;
use axum::{Extension, Json as Answer};
use tandem_openapi::batches::{Batch, CreateBatch};
use tandem_openapi::common::CursorList;
use tandem_openapi::error::Errors;
use tandem_router::batches::{Answers, Line, LineAnswer};
use tower::ServiceExt;

use super::to_the_end;
use crate::app::{self, App};
use crate::audit::Object;
use crate::convert::batches;
use crate::error::ApiError;
use crate::extract::{Json, Pairs, Segment};
use crate::id;
use crate::keys::Own;

const LIST_LIMIT: u32 = 100;
/// Where an answer says that it may be asked again, and not when.
const PAUSE: Duration = Duration::from_secs(1);

/// Ask what a file of requests asks, behind everybody who waits for an answer.
#[utoipa::path(
    post, path = "/v1/batches", tag = "batches", request_body = CreateBatch,
    responses((status = 200, body = Batch), Errors)
)]
pub async fn create(
    Own(own): Own,
    Json(body): Json<CreateBatch>,
) -> Result<(Extension<Object>, Answer<Batch>), ApiError> {
    let request = batches::request(body)?;
    let batch = to_the_end(async move { own.create_batch(request).await }).await?;
    Ok((Extension(Object(batch.id.clone())), Answer(batches::batch(batch))))
}

/// Batches, newest first.
#[utoipa::path(
    get, path = "/v1/batches", tag = "batches",
    params(
        ("after" = Option<String>, Query, description = "The last id of the page before"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 100),
    ),
    responses((status = 200, body = CursorList<Batch>), Errors)
)]
pub async fn list(Own(own): Own, query: Pairs) -> Result<Answer<CursorList<Batch>>, ApiError> {
    let limit = query.integer("limit", 1..=LIST_LIMIT, 20)?;
    let page = own.batches(query.text("after"), limit).await?;
    let data: Vec<Batch> = page.data.into_iter().map(batches::batch).collect();
    Ok(Answer(CursorList {
        object: "list",
        first_id: data.first().map(|batch| batch.id.clone()),
        last_id: data.last().map(|batch| batch.id.clone()),
        data,
        has_more: page.has_more,
    }))
}

/// One batch.
#[utoipa::path(
    get, path = "/v1/batches/{id}", tag = "batches", params(("id" = String, Path)),
    responses((status = 200, body = Batch), Errors)
)]
pub async fn retrieve(Own(own): Own, Segment(id): Segment) -> Result<Answer<Batch>, ApiError> {
    Ok(Answer(batches::batch(own.batch(&id).await?)))
}

/// End a batch with the answers that there are. It is `cancelling` until they are a file.
#[utoipa::path(
    post, path = "/v1/batches/{id}/cancel", tag = "batches", params(("id" = String, Path)),
    responses((status = 200, body = Batch), Errors)
)]
pub async fn cancel(Own(own): Own, Segment(id): Segment) -> Result<Answer<Batch>, ApiError> {
    Ok(Answer(batches::batch(own.cancel_batch(&id).await?)))
}

/// For the router, which runs batches.
pub fn answers(app: App) -> Answers {
    let routes = app::inner(app);
    Arc::new(move |line| {
        let routes = routes.clone();
        Box::pin(async move {
            let Line {
                client,
                endpoint,
                body,
            } = line;
            let mut request = Request::new(Body::from(body));
            *request.method_mut() = Method::POST;
            *request.uri_mut() = endpoint.path().parse().expect("the paths are URIs");
            let json = header::HeaderValue::from_static("application/json");
            request.headers_mut().insert(header::CONTENT_TYPE, json);
            request.extensions_mut().insert(client);
            let response = routes.oneshot(request).await;
            read(response.unwrap_or_else(|never| match never {})).await
        })
    })
}

async fn read(response: Response) -> LineAnswer {
    let status = response.status();
    let seconds = response.headers().get(header::RETRY_AFTER);
    let seconds = seconds.and_then(|seconds| seconds.to_str().ok()?.parse().ok());
    // A busy server, one that lacks a part, and one whose disk is full.
    let may_pass = matches!(status.as_u16(), 429 | 503 | 507);
    let body = body::to_bytes(response.into_body(), usize::MAX).await;
    let body = body.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    LineAnswer {
        status: status.as_u16(),
        request_id: id::fresh("req_"),
        try_again: match (&body, may_pass) {
            (Ok(_), false) => None,
            _ => Some(seconds.map_or(PAUSE, Duration::from_secs)),
        },
        body: body.unwrap_or_default(),
    }
}
