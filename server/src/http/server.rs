//! The server about itself: is it well, which version, its numbers.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use tandem_openapi::error::Errors;
use tandem_openapi::server::{Health, Version};
use tandem_router::Part;

use crate::app::App;
use crate::error::ApiError;

/// The process answers and its engine lives.
#[utoipa::path(get, path = "/health", tag = "server", security(()), responses((status = 200, body = Health), Errors))]
pub async fn health(State(app): State<App>) -> Result<Json<Health>, ApiError> {
    match app.router.ready() {
        true => Ok(Json(Health {
            status: "ok",
            away: Vec::new(),
        })),
        false => Err(ApiError::Stopping),
    }
}

/// Requests may be sent here: not while the server stops.
#[utoipa::path(get, path = "/ready", tag = "server", security(()), responses((status = 200, body = Health), Errors))]
pub async fn ready(State(app): State<App>) -> Result<Json<Health>, ApiError> {
    if !app.router.ready() || app.is_stopping() {
        return Err(ApiError::Stopping);
    }
    let parts = app.router.away();
    let tasks = app.router.down().into_iter().map(str::to_owned);
    let away: Vec<String> = parts.iter().map(Part::to_string).chain(tasks).collect();
    let status = if away.is_empty() { "ready" } else { "degraded" };
    Ok(Json(Health { status, away }))
}

/// The version of this server.
#[utoipa::path(get, path = "/version", tag = "server", responses((status = 200, body = Version), Errors))]
pub async fn version() -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION"),
    })
}

/// Numbers for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "server",
    responses((status = 200, body = String, content_type = "text/plain"), Errors)
)]
pub async fn metrics(State(app): State<App>) -> impl IntoResponse {
    let text = app.metrics.text_of(&app.router);
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
}
