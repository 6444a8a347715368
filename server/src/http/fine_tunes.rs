//! /v1/fine-tunes, the API of 2021 to 2023, under both spellings of its path.

use axum::Json as Answer;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::stream::unfold;
use tandem_openapi::common::{Deleted, List};
use tandem_openapi::error::Errors;
use tandem_openapi::files::File;
use tandem_openapi::fine_tunes::{CreateFineTune, FineTune, FineTuneEvent};
use tandem_router::MetadataFilter;
use tandem_router::api::{Job, RouterError};

use super::to_the_end;
use crate::app::App;
use crate::convert::files::file;
use crate::convert::fine_tunes::{self as convert, Files, JobName};
use crate::error::ApiError;
use crate::extract::{JobSegment, Json, Pairs, Segment};
use crate::sse;

/// The legacy lists have no pages; this is where they end.
const LIST_LIMIT: u32 = 10_000;

/// The underscore spelling; the document has the official one.
pub fn second_spelling() -> Router<App> {
    Router::new()
        .route("/v1/fine_tunes", get(list).post(create))
        .route("/v1/fine_tunes/{id}", get(retrieve).delete(delete))
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
pub async fn retrieve(
    State(app): State<App>,
    JobSegment(job): JobSegment,
) -> Result<Answer<FineTune>, ApiError> {
    let job = job.found(app.router.job(&job.id).await)?;
    whole(&app, job).await
}

/// Forget what a job made: its model and its checkpoints. The job stays on record. Takes the model's name, too.
#[utoipa::path(
    delete, path = "/v1/fine-tunes/{id}", tag = "fine-tuning (legacy)", params(("id" = String, Path)),
    responses((status = 200, body = Deleted), Errors)
)]
pub async fn delete(State(app): State<App>, Segment(name): Segment) -> Result<Answer<Deleted>, ApiError> {
    let (router, job) = (app.router.clone(), JobName::new(name.clone()));
    let (model, id) = (name.clone(), job.id.clone());
    let deleted = to_the_end(async move {
        match router.model(&model) {
            Ok(_) => router.delete_model(&model).await,
            Err(_) => router.delete_models_of(&id).await,
        }
    });
    job.found(deleted.await)?;
    Ok(Answer(Deleted {
        id: name,
        object: "fine-tune",
        deleted: true,
    }))
}

/// End a job that waits or runs.
#[utoipa::path(
    post, path = "/v1/fine-tunes/{id}/cancel", tag = "fine-tuning (legacy)", params(("id" = String, Path)),
    responses((status = 200, body = FineTune), Errors)
)]
pub async fn cancel(
    State(app): State<App>,
    JobSegment(job): JobSegment,
) -> Result<Answer<FineTune>, ApiError> {
    let job = job.found(app.router.cancel_job(&job.id).await)?;
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
    JobSegment(job): JobSegment,
    query: Pairs,
) -> Result<Response, ApiError> {
    if !query.flag("stream")? {
        let events = job.found(all_events(&app, &job.id).await)?;
        return Ok(Answer(List::new(events)).into_response());
    }
    let records = job.found(app.router.follow_job(&job.id).await)?;
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

async fn all_events(app: &App, id: &str) -> Result<Vec<FineTuneEvent>, RouterError> {
    let page = app.router.job_events(id, None, LIST_LIMIT).await?;
    Ok(page.data.into_iter().rev().map(convert::event).collect())
}

async fn whole(app: &App, job: Job) -> Result<Answer<FineTune>, ApiError> {
    let events = all_events(app, job.id.as_str()).await?;
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
