//! /v1/fine_tuning/jobs.

use std::collections::BTreeMap;

use axum::Extension;
use axum::Json as Answer;
use axum::extract::State;
use tandem_openapi::common::{CursorList, PageList};
use tandem_openapi::error::Errors;
use tandem_openapi::fine_tuning::{Checkpoint, CreateJob, Job, JobEvent, JobPreview};
use tandem_router::MetadataFilter;

use super::to_the_end;
use crate::app::App;
use crate::audit::Object;
use crate::convert::{fine_tuning, jobs};
use crate::error::ApiError;
use crate::extract::{JobSegment, Json, Pairs};
use crate::keys::Own;

const LIST_LIMIT: u32 = 100;
const EVENTS_LIMIT: u32 = 1000;
const PREVIEW_LIMIT: u32 = 100;

/// Train an adapter on a file. It answers requests as soon as it is made.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs", tag = "fine-tuning", request_body = CreateJob,
    responses((status = 200, body = Job), Errors)
)]
pub async fn create(
    State(app): State<App>,
    Own(own): Own,
    Json(body): Json<CreateJob>,
) -> Result<(Extension<Object>, Answer<Job>), ApiError> {
    let request = fine_tuning::request(body)?;
    let job = to_the_end(async move { own.create_job(request).await }).await?;
    let made = Object(job.id.to_string());
    Ok((Extension(made), Answer(jobs::job(job, app.organization()))))
}

/// What a job of this body would train: the first rows as the model would read them, and statistics. Nothing is kept.
#[utoipa::path(
    post, path = "/v1/fine_tuning/preview", tag = "fine-tuning", request_body = CreateJob,
    params(("rows" = Option<u32>, Query, minimum = 1, maximum = 100, description = "How many are shown, 3 unless given")),
    responses((status = 200, body = JobPreview), Errors)
)]
pub async fn preview(
    Own(own): Own,
    query: Pairs,
    Json(body): Json<CreateJob>,
) -> Result<Answer<JobPreview>, ApiError> {
    let rows = query.integer("rows", 1..=PREVIEW_LIMIT, 3)?;
    let request = fine_tuning::request(body)?;
    let preview = own.preview_job(request.clone(), rows as usize).await?;
    Ok(Answer(jobs::preview(preview, &request)))
}

/// Jobs, newest first. `metadata[key]=value` picks some.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs", tag = "fine-tuning",
    params(
        ("after" = Option<String>, Query), ("limit" = Option<u32>, Query, minimum = 1, maximum = 100),
        ("metadata" = Option<String>, Query, description = "null: only jobs without metadata"),
    ),
    responses((status = 200, body = PageList<Job>), Errors)
)]
pub async fn list(
    State(app): State<App>,
    Own(own): Own,
    query: Pairs,
) -> Result<Answer<PageList<Job>>, ApiError> {
    let limit = query.integer("limit", 1..=LIST_LIMIT, 20)?;
    let pairs: BTreeMap<String, String> = query.map("metadata").into_iter().collect();
    let filter = match query.text("metadata") {
        Some("null") => MetadataFilter::None,
        _ if pairs.is_empty() => MetadataFilter::Any,
        _ => MetadataFilter::Pairs(pairs),
    };
    let page = own.jobs(query.text("after"), limit, filter).await?;
    let data = page
        .data
        .into_iter()
        .map(|job| jobs::job(job, app.organization()))
        .collect();
    Ok(Answer(PageList {
        object: "list",
        data,
        has_more: page.has_more,
    }))
}

/// One job.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{id}", tag = "fine-tuning", params(("id" = String, Path)),
    responses((status = 200, body = Job), Errors)
)]
pub async fn retrieve(
    State(app): State<App>,
    Own(own): Own,
    JobSegment(job): JobSegment,
) -> Result<Answer<Job>, ApiError> {
    let found = job.found(own.job(&job.id).await)?;
    Ok(Answer(jobs::job(found, app.organization())))
}

/// End a job that waits or runs.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{id}/cancel", tag = "fine-tuning", params(("id" = String, Path)),
    responses((status = 200, body = Job), Errors)
)]
pub async fn cancel(
    State(app): State<App>,
    Own(own): Own,
    JobSegment(job): JobSegment,
) -> Result<Answer<Job>, ApiError> {
    let cancelled = job.found(own.cancel_job(&job.id).await)?;
    Ok(Answer(jobs::job(cancelled, app.organization())))
}

/// Let a job rest: what it has learned is kept, and nobody trains it until it is resumed.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{id}/pause", tag = "fine-tuning", params(("id" = String, Path)),
    responses((status = 200, body = Job), Errors)
)]
pub async fn pause(
    State(app): State<App>,
    Own(own): Own,
    JobSegment(job): JobSegment,
) -> Result<Answer<Job>, ApiError> {
    let paused = job.found(own.pause_job(&job.id).await)?;
    Ok(Answer(jobs::job(paused, app.organization())))
}

/// A paused job waits for its turn again and goes on from where it was.
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{id}/resume", tag = "fine-tuning", params(("id" = String, Path)),
    responses((status = 200, body = Job), Errors)
)]
pub async fn resume(
    State(app): State<App>,
    Own(own): Own,
    JobSegment(job): JobSegment,
) -> Result<Answer<Job>, ApiError> {
    let resumed = job.found(own.resume_job(&job.id).await)?;
    Ok(Answer(jobs::job(resumed, app.organization())))
}

/// What happened in a job, newest first.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{id}/events", tag = "fine-tuning",
    params(
        ("id" = String, Path), ("after" = Option<String>, Query),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000),
    ),
    responses((status = 200, body = PageList<JobEvent>), Errors)
)]
pub async fn events(
    Own(own): Own,
    JobSegment(job): JobSegment,
    query: Pairs,
) -> Result<Answer<PageList<JobEvent>>, ApiError> {
    let limit = query.integer("limit", 1..=EVENTS_LIMIT, 20)?;
    let page = own.job_events(&job.id, query.text("after"), limit).await;
    let page = job.found(page)?;
    let data = page.data.into_iter().map(jobs::event).collect();
    Ok(Answer(PageList {
        object: "list",
        data,
        has_more: page.has_more,
    }))
}

/// The adapters a job has saved on its way, newest first; each can be asked as a model.
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{id}/checkpoints", tag = "fine-tuning",
    params(
        ("id" = String, Path), ("after" = Option<String>, Query),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 100),
    ),
    responses((status = 200, body = CursorList<Checkpoint>), Errors)
)]
pub async fn checkpoints(
    Own(own): Own,
    JobSegment(job): JobSegment,
    query: Pairs,
) -> Result<Answer<CursorList<Checkpoint>>, ApiError> {
    let limit = query.integer("limit", 1..=LIST_LIMIT, 10)?;
    let page = own.checkpoints(&job.id, query.text("after"), limit).await;
    let page = job.found(page)?;
    let data: Vec<Checkpoint> = page
        .data
        .into_iter()
        .map(|one| jobs::checkpoint(one, &job.id))
        .collect();
    Ok(Answer(CursorList {
        object: "list",
        first_id: data.first().map(|one| one.id.clone()),
        last_id: data.last().map(|one| one.id.clone()),
        data,
        has_more: page.has_more,
    }))
}
