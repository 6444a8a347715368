//! What a client asks first, and that it lives.

use axum::Json as Answer;
use axum::extract::State;
use axum::http::StatusCode;
use tandem_openapi::error::Errors;
use tandem_openapi::tinker::{
    ClientConfig, ClientConfigRequest, ClientDynamicConfig, CreateSessionRequest, CreateSessionResponse,
    FinishSessionRequest, HealthStatus, ServerCapabilities, SessionHeartbeatRequest,
    SessionHeartbeatResponse, SessionIds, Sessions, SupportedModel, TelemetryRequest, TelemetryResponse,
};
use tandem_router::tinker::SessionView;
use tracing::debug;

use crate::app::App;
use crate::error::ApiError;
use crate::extract::{Json, Segment};
use crate::keys::Own;

/// Data of one forward_backward, and bytes: the SDK cuts what is larger.
const CHUNK_DATA: u32 = 1024;
const CHUNK_BYTES: u64 = 5_000_000;

/// How the SDK should behave towards this server.
#[utoipa::path(
    post, path = "/api/v1/client/config", tag = "tinker", request_body = ClientConfigRequest,
    responses((status = 200, body = ClientConfig), Errors)
)]
pub async fn config(State(app): State<App>, Json(body): Json<ClientConfigRequest>) -> Answer<ClientConfig> {
    let ClientConfigRequest {
        sdk_version,
        r#type: _,
    } = body;
    debug!(sdk_version, "a training client begins");
    Answer(ClientConfig {
        fwdbwd_max_chunk_len: CHUNK_DATA,
        fwdbwd_max_chunk_bytes_count: CHUNK_BYTES.min(app.router.config().tinker.call_bytes),
        proto_compress_fwdbwd: false,
    })
}

/// The same, asked again and again.
#[utoipa::path(
    post, path = "/api/v1/client/dynamic_config", tag = "tinker", request_body = ClientConfigRequest,
    responses((status = 200, body = ClientDynamicConfig), Errors)
)]
pub async fn dynamic_config(Json(_body): Json<ClientConfigRequest>) -> Answer<ClientDynamicConfig> {
    Answer(ClientDynamicConfig {})
}

/// Models that can be trained and sampled: the base, by each of its names.
#[utoipa::path(
    get, path = "/api/v1/get_server_capabilities", tag = "tinker",
    responses((status = 200, body = ServerCapabilities), Errors)
)]
pub async fn capabilities(State(app): State<App>) -> Answer<ServerCapabilities> {
    let config = app.router.config();
    let names = [&config.served_model_name]
        .into_iter()
        .chain(&config.other_model_names);
    let max_context_length = app.router.info().max_model_len;
    let model = |name: &String| SupportedModel {
        model_name: name.clone(),
        max_context_length,
        trainable: true,
        sampleable: true,
    };
    Answer(ServerCapabilities {
        supported_models: names.map(model).collect(),
    })
}

/// The server is well.
#[utoipa::path(
    get, path = "/api/v1/healthz", tag = "tinker", responses((status = 200, body = HealthStatus), Errors)
)]
pub async fn healthz(State(app): State<App>) -> Result<Answer<HealthStatus>, ApiError> {
    match app.router.ready() {
        true => Ok(Answer(HealthStatus { status: "ok" })),
        false => Err(ApiError::Stopping),
    }
}

/// What the SDK says of itself. Nothing is kept.
#[utoipa::path(
    post, path = "/api/v1/telemetry", tag = "tinker", request_body = TelemetryRequest,
    responses((status = 200, body = TelemetryResponse), Errors)
)]
pub async fn telemetry(Json(_body): Json<TelemetryRequest>) -> Answer<TelemetryResponse> {
    Answer(TelemetryResponse { status: "accepted" })
}

/// Begin a session: what it trains and does not save lives as long.
#[utoipa::path(
    post, path = "/api/v1/create_session", tag = "tinker", request_body = CreateSessionRequest,
    responses((status = 200, body = CreateSessionResponse), Errors)
)]
pub async fn create(
    Own(own): Own,
    Json(_body): Json<CreateSessionRequest>,
) -> Result<Answer<CreateSessionResponse>, ApiError> {
    let session_id = own.open_session()?;
    Ok(Answer(CreateSessionResponse { session_id }))
}

/// Its client lives. 410: the session has ended.
#[utoipa::path(
    post, path = "/api/v1/session_heartbeat", tag = "tinker", request_body = SessionHeartbeatRequest,
    responses((status = 200, body = SessionHeartbeatResponse), Errors)
)]
pub async fn heartbeat(
    Own(own): Own,
    Json(body): Json<SessionHeartbeatRequest>,
) -> Result<Answer<SessionHeartbeatResponse>, ApiError> {
    own.hear_session(&body.session_id)?;
    Ok(Answer(SessionHeartbeatResponse {}))
}

/// End it: its models and samplers go, what was saved stays.
#[utoipa::path(
    post, path = "/api/v1/sessions/{id}/finish", tag = "tinker", request_body = FinishSessionRequest,
    params(("id" = String, Path)), responses((status = 204), Errors)
)]
pub async fn finish(
    Own(own): Own,
    Segment(id): Segment,
    Json(_body): Json<FinishSessionRequest>,
) -> Result<StatusCode, ApiError> {
    own.finish_session(&id)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sessions that live.
#[utoipa::path(
    get, path = "/api/v1/sessions", tag = "tinker",
    params(("limit" = Option<u32>, Query), ("offset" = Option<u32>, Query), ("access_scope" = Option<String>, Query)),
    responses((status = 200, body = Sessions), Errors)
)]
pub async fn list(Own(own): Own) -> Answer<Sessions> {
    Answer(Sessions {
        sessions: own.sessions(),
    })
}

/// What a session has.
#[utoipa::path(
    get, path = "/api/v1/sessions/{id}", tag = "tinker", params(("id" = String, Path), ("access_scope" = Option<String>, Query)),
    responses((status = 200, body = SessionIds), Errors)
)]
pub async fn retrieve(Own(own): Own, Segment(id): Segment) -> Result<Answer<SessionIds>, ApiError> {
    let SessionView { models, samplers } = own.session(&id)?;
    Ok(Answer(SessionIds {
        training_run_ids: models,
        sampler_ids: samplers,
    }))
}
