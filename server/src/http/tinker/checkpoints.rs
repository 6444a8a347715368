//! What was saved, and by which runs.

use axum::Json as Answer;
use axum::extract::Path as Parts;
use axum::http::StatusCode;
use tandem_openapi::error::Errors;
use tandem_openapi::tinker::{
    Checkpoint, Checkpoints, Cursor, TrainingRun, TrainingRuns, TtlRequest, WeightsInfoRequest,
    WeightsInfoResponse,
};
use tandem_router::View;
use tandem_router::api::RouterError;
use tandem_router::tinker::{Kept, Path};

use super::super::to_the_end;
use crate::convert::tinker::{checkpoint, training_runs};
use crate::error::ApiError;
use crate::extract::{Json, Pairs, Segment};
use crate::keys::Own;

/// Items of one page.
const PAGE: u32 = 20;
const MAX_PAGE: u32 = 1000;

/// Runs that live or have saved something, the newest first.
#[utoipa::path(
    get, path = "/api/v1/training_runs", tag = "tinker",
    params(("limit" = Option<u32>, Query), ("offset" = Option<u32>, Query), ("access_scope" = Option<String>, Query)),
    responses((status = 200, body = TrainingRuns), Errors)
)]
pub async fn runs(Own(own): Own, query: Pairs) -> Result<Answer<TrainingRuns>, ApiError> {
    let (training_runs, cursor) = page(runs_of(&own, None).await?, &query)?;
    Ok(Answer(TrainingRuns {
        training_runs,
        cursor,
    }))
}

/// One of them.
#[utoipa::path(
    get, path = "/api/v1/training_runs/{id}", tag = "tinker",
    params(("id" = String, Path), ("access_scope" = Option<String>, Query)),
    responses((status = 200, body = TrainingRun), Errors)
)]
pub async fn run(Own(own): Own, Segment(id): Segment) -> Result<Answer<TrainingRun>, ApiError> {
    let mut runs = runs_of(&own, Some(&id)).await?.into_iter();
    let run = runs.find(|run| run.training_run_id == id);
    let unknown = RouterError::Unknown {
        what: "training run",
        id,
    };
    Ok(Answer(run.ok_or(unknown)?))
}

async fn runs_of(own: &View, run: Option<&str>) -> Result<Vec<TrainingRun>, ApiError> {
    let saves = own.saves(run).await?;
    Ok(training_runs(own.learnings(), saves, own.base_name()))
}

/// What was saved by anybody of the key's tenant, the newest first.
#[utoipa::path(
    get, path = "/api/v1/checkpoints", tag = "tinker",
    params(("limit" = Option<u32>, Query), ("offset" = Option<u32>, Query), ("access_scope" = Option<String>, Query)),
    responses((status = 200, body = Checkpoints), Errors)
)]
pub async fn all(Own(own): Own, query: Pairs) -> Result<Answer<Checkpoints>, ApiError> {
    listed(own.saves(None).await?, &query)
}

/// What a run saved, the newest first.
#[utoipa::path(
    get, path = "/api/v1/training_runs/{id}/checkpoints", tag = "tinker",
    params(("id" = String, Path), ("limit" = Option<u32>, Query), ("offset" = Option<u32>, Query)),
    responses((status = 200, body = Checkpoints), Errors)
)]
pub async fn of_run(
    Own(own): Own,
    Segment(id): Segment,
    query: Pairs,
) -> Result<Answer<Checkpoints>, ApiError> {
    listed(own.saves(Some(&id)).await?, &query)
}

fn listed(mut saves: Vec<Kept>, query: &Pairs) -> Result<Answer<Checkpoints>, ApiError> {
    saves.reverse();
    let checkpoints: Vec<Checkpoint> = saves.into_iter().map(checkpoint).collect();
    let (checkpoints, cursor) = match query.text("limit") {
        // The SDK's list of one run has no pages.
        None => {
            let total_count = checkpoints.len() as u32;
            let cursor = Cursor {
                offset: 0,
                limit: total_count,
                total_count,
            };
            (checkpoints, cursor)
        }
        Some(_) => page(checkpoints, query)?,
    };
    Ok(Answer(Checkpoints { checkpoints, cursor }))
}

fn page<T>(all: Vec<T>, query: &Pairs) -> Result<(Vec<T>, Cursor), ApiError> {
    let limit = query.integer("limit", 0..=MAX_PAGE, PAGE)?;
    let offset = query.integer("offset", 0..=u32::MAX, 0)?;
    let cursor = Cursor {
        offset,
        limit,
        total_count: all.len() as u32,
    };
    let of_page = all.into_iter().skip(offset as usize).take(limit as usize);
    Ok((of_page.collect(), cursor))
}

type Place = Parts<(String, String, String)>;

fn path(Parts((run, kind, name)): Place) -> Result<Path, ApiError> {
    Ok(Path::new(&run, &kind, &name)?)
}

/// Remove what was saved, and the model's name that it is.
#[utoipa::path(
    delete, path = "/api/v1/training_runs/{id}/checkpoints/{kind}/{name}", tag = "tinker",
    params(("id" = String, Path), ("kind" = String, Path), ("name" = String, Path)),
    responses((status = 204), Errors)
)]
pub async fn delete(Own(own): Own, place: Place) -> Result<StatusCode, ApiError> {
    let path = path(place)?;
    to_the_end(async move { own.delete_save(&path).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Let other tenants load and sample it.
#[utoipa::path(
    post, path = "/api/v1/training_runs/{id}/checkpoints/{kind}/{name}/publish", tag = "tinker",
    params(("id" = String, Path), ("kind" = String, Path), ("name" = String, Path)),
    responses((status = 204), Errors)
)]
pub async fn publish(Own(own): Own, place: Place) -> Result<StatusCode, ApiError> {
    own.publish_save(&path(place)?, true).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// No longer.
#[utoipa::path(
    delete, path = "/api/v1/training_runs/{id}/checkpoints/{kind}/{name}/publish", tag = "tinker",
    params(("id" = String, Path), ("kind" = String, Path), ("name" = String, Path)),
    responses((status = 204), Errors)
)]
pub async fn unpublish(Own(own): Own, place: Place) -> Result<StatusCode, ApiError> {
    own.publish_save(&path(place)?, false).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// When it goes by itself.
#[utoipa::path(
    put, path = "/api/v1/training_runs/{id}/checkpoints/{kind}/{name}/ttl", tag = "tinker", request_body = TtlRequest,
    params(("id" = String, Path), ("kind" = String, Path), ("name" = String, Path)),
    responses((status = 204), Errors)
)]
pub async fn ttl(Own(own): Own, place: Place, Json(body): Json<TtlRequest>) -> Result<StatusCode, ApiError> {
    own.expire_save(&path(place)?, body.ttl_seconds).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What was saved, or an adapter by its name, is of which shape.
#[utoipa::path(
    post, path = "/api/v1/weights_info", tag = "tinker", request_body = WeightsInfoRequest,
    responses((status = 200, body = WeightsInfoResponse), Errors)
)]
pub async fn info(
    Own(own): Own,
    Json(body): Json<WeightsInfoRequest>,
) -> Result<Answer<WeightsInfoResponse>, ApiError> {
    let reach = own.reach_of(&body.tinker_path).await?;
    Ok(Answer(WeightsInfoResponse {
        base_model: own.base_name(),
        is_lora: true,
        lora_rank: reach.rank,
        train_unembed: reach.train_unembed,
        train_mlp: reach.train_mlp,
        train_attn: reach.train_attn,
    }))
}
