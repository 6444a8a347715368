//! /v1/fine-tunes, the API of 2021 to 2023, under both spellings of its path.

use axum::Extension;
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
use tandem_router::api::{Job, RouterError};
use tandem_router::{MetadataFilter, View};

use super::to_the_end;
use crate::app::App;
use crate::audit::Object;
use crate::convert::files::file;
use crate::convert::fine_tunes::{self as convert, Files, JobName};
use crate::error::ApiError;
use crate::extract::{JobSegment, Json, Pairs, Segment};
use crate::keys::Own;
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
    Own(own): Own,
    Json(body): Json<CreateFineTune>,
) -> Result<(Extension<Object>, Answer<FineTune>), ApiError> {
    let request = convert::request(body, &app.router.config().served_model_name)?;
    let maker = own.clone();
    let job = to_the_end(async move { maker.create_job(request).await }).await?;
    let made = Object(job.id.to_string());
    Ok((Extension(made), whole(&app, &own, job).await?))
}

/// All jobs, newest first.
#[utoipa::path(
    get, path = "/v1/fine-tunes", tag = "fine-tuning (legacy)",
    responses((status = 200, body = List<FineTune>), Errors)
)]
pub async fn list(State(app): State<App>, Own(own): Own) -> Result<Answer<List<FineTune>>, ApiError> {
    let page = own.clone().jobs(None, LIST_LIMIT, MetadataFilter::Any).await?;
    let mut data = Vec::with_capacity(page.data.len());
    for job in page.data {
        data.push(shape(&app, &own, job, None).await);
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
    Own(own): Own,
    JobSegment(job): JobSegment,
) -> Result<Answer<FineTune>, ApiError> {
    let job = job.found(own.clone().job(&job.id).await)?;
    whole(&app, &own, job).await
}

/// Forget what a job made: its model and its checkpoints. The job stays on record. Takes the model's name, too.
#[utoipa::path(
    delete, path = "/v1/fine-tunes/{id}", tag = "fine-tuning (legacy)", params(("id" = String, Path)),
    responses((status = 200, body = Deleted), Errors)
)]
pub async fn delete(Own(own): Own, Segment(name): Segment) -> Result<Answer<Deleted>, ApiError> {
    let job = JobName::new(name.clone());
    let (model, id) = (name.clone(), job.id.clone());
    let deleted = to_the_end(async move {
        match own.clone().model(&model) {
            Ok(_) => own.delete_model(&model).await,
            Err(_) => own.delete_models_of(&id).await,
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
    Own(own): Own,
    JobSegment(job): JobSegment,
) -> Result<Answer<FineTune>, ApiError> {
    let job = job.found(own.clone().cancel_job(&job.id).await)?;
    whole(&app, &own, job).await
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
pub async fn events(Own(own): Own, JobSegment(job): JobSegment, query: Pairs) -> Result<Response, ApiError> {
    if !query.flag("stream")? {
        let events = job.found(all_events(own, &job.id).await)?;
        return Ok(Answer(List::new(events)).into_response());
    }
    let records = job.found(own.follow_job(&job.id).await)?;
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

async fn all_events(own: View, id: &str) -> Result<Vec<FineTuneEvent>, RouterError> {
    let page = own.job_events(id, None, LIST_LIMIT).await?;
    Ok(page.data.into_iter().rev().map(convert::event).collect())
}

async fn whole(app: &App, own: &View, job: Job) -> Result<Answer<FineTune>, ApiError> {
    let events = all_events(own.clone(), job.id.as_str()).await?;
    Ok(Answer(shape(app, own, job, Some(events)).await))
}

async fn shape(app: &App, own: &View, job: Job, events: Option<Vec<FineTuneEvent>>) -> FineTune {
    let validation = job.request.validation_file.clone().unwrap_or_default();
    let files = Files {
        training: objects(own, &job.request.training_file.0).await,
        validation: objects(own, &validation.0).await,
        results: objects(own, &job.result_files).await,
    };
    convert::fine_tune(job, app.organization(), files, events)
}

/// A file that was deleted since is left out.
async fn objects(own: &View, ids: impl IntoIterator<Item = &String>) -> Vec<File> {
    let mut files = Vec::new();
    for id in ids {
        files.extend(own.clone().file(id).await.ok().map(file));
    }
    files
}
