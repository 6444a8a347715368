//! /v1/fine-tunes, the API of 2021 to 2023, under both spellings of its path.

use axum::Json as Answer;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::stream::unfold;
use tandem_openapi::common::List;
use tandem_openapi::error::Errors;
use tandem_openapi::files::File;
use tandem_openapi::fine_tunes::{CreateFineTune, FineTune, FineTuneEvent};
use tandem_router::MetadataFilter;
use tandem_router::api::Job;

use super::to_the_end;
use crate::app::App;
use crate::convert::files::file;
use crate::convert::fine_tunes::{self as convert, Files, job_id};
use crate::error::ApiError;
use crate::extract::{Json, Pairs, Segment};
use crate::sse;

/// The legacy lists have no pages; this is where they end.
const LIST_LIMIT: u32 = 10_000;

/// The underscore spelling; the document has the official one.
pub fn second_spelling() -> Router<App> {
    Router::new()
        .route("/v1/fine_tunes", get(list).post(create))
        .route("/v1/fine_tunes/{id}", get(retrieve))
        .route("/v1/fine_tunes/{id}/cancel", post(cancel))
        .route("/v1/fine_tunes/{id}/events", get(events))
}

/// Train an adapter on a file.
#[utoipa::path(
    post, path = "/v1/fine-tunes", tag = "fine-tuning (legacy)", request_body = CreateFineTune,
    responses((status = 200, body = FineTune), Errors)
)]
pub async fn create(
    State(app): State<App>,
    Json(body): Json<CreateFineTune>,
) -> Result<Answer<FineTune>, ApiError> {
    let request = convert::request(body, &app.router.config().served_model_name)?;
    let router = app.router.clone();
    let job = to_the_end(async move { router.create_job(request).await }).await?;
    whole(&app, job).await
}

/// All jobs, newest first.
#[utoipa::path(
    get, path = "/v1/fine-tunes", tag = "fine-tuning (legacy)",
    responses((status = 200, body = List<FineTune>), Errors)
)]
pub async fn list(State(app): State<App>) -> Result<Answer<List<FineTune>>, ApiError> {
    let page = app.router.jobs(None, LIST_LIMIT, MetadataFilter::Any).await?;
    let mut data = Vec::with_capacity(page.data.len());
    for job in page.data {
        data.push(shape(&app, job, None).await);
    }
    Ok(Answer(List::new(data)))
}

/// One job, with its events.
#[utoipa::path(
    get, path = "/v1/fine-tunes/{id}", tag = "fine-tuning (legacy)", params(("id" = String, Path)),
    responses((status = 200, body = FineTune), Errors)
)]
pub async fn retrieve(State(app): State<App>, Segment(id): Segment) -> Result<Answer<FineTune>, ApiError> {
    let job = app.router.job(&job_id(&id)).await?;
    whole(&app, job).await
}

/// End a job that waits or runs.
#[utoipa::path(
    post, path = "/v1/fine-tunes/{id}/cancel", tag = "fine-tuning (legacy)", params(("id" = String, Path)),
    responses((status = 200, body = FineTune), Errors)
)]
pub async fn cancel(State(app): State<App>, Segment(id): Segment) -> Result<Answer<FineTune>, ApiError> {
    let job = app.router.cancel_job(&job_id(&id)).await?;
    whole(&app, job).await
}

/// What happened, oldest first; with `stream=true` as server-sent events until the job ends.
#[utoipa::path(
    get, path = "/v1/fine-tunes/{id}/events", tag = "fine-tuning (legacy)",
    params(("id" = String, Path), ("stream" = Option<bool>, Query)),
    responses(
        (status = 200, content((List<FineTuneEvent> = "application/json"), (String = "text/event-stream"))),
        Errors,
    )
)]
pub async fn events(
    State(app): State<App>,
    Segment(id): Segment,
    query: Pairs,
) -> Result<Response, ApiError> {
    let id = job_id(&id);
    if !query.flag("stream")? {
        return Ok(Answer(List::new(all_events(&app, &id).await?)).into_response());
    }
    let records = app.router.follow_job(&id).await?;
    let frames = unfold(Some(records), |records| async {
        let mut records = records?;
        let mut out = Vec::new();
        match records.recv().await {
            Some(record) => {
                sse::event(&mut out, &convert::event(record));
                Some((Bytes::from(out), Some(records)))
            }
            None => Some((Bytes::from_static(sse::DONE), None)),
        }
    });
    Ok(sse::response(frames))
}

async fn all_events(app: &App, id: &str) -> Result<Vec<FineTuneEvent>, ApiError> {
    let page = app.router.job_events(id, None, LIST_LIMIT).await?;
    Ok(page.data.into_iter().rev().map(convert::event).collect())
}

async fn whole(app: &App, job: Job) -> Result<Answer<FineTune>, ApiError> {
    let events = all_events(app, &job.id.0).await?;
    Ok(Answer(shape(app, job, Some(events)).await))
}

async fn shape(app: &App, job: Job, events: Option<Vec<FineTuneEvent>>) -> FineTune {
    let files = Files {
        training: objects(app, [&job.request.training_file]).await,
        validation: objects(app, &job.request.validation_file).await,
        results: objects(app, &job.result_files).await,
    };
    convert::fine_tune(job, app.organization(), files, events)
}

/// A file that was deleted since is left out.
async fn objects(app: &App, ids: impl IntoIterator<Item = &String>) -> Vec<File> {
    let mut files = Vec::new();
    for id in ids {
        files.extend(app.router.file(id).await.ok().map(file));
    }
    files
}
