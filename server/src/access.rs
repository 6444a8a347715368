//! Who may do what: the least role of each route, and what of it is written down. Around every route, so that none can be
//! forgotten; a route that the table does not have is for admins alone. Not here: whose a thing is (router's `View`).

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tandem_router::api::{Left, Meter, RouterError};
use tandem_store::Role;

use crate::audit::{Audit, Object, Record};
use crate::error::ApiError;
use crate::keys::{Grant, Ring, given_key};
use crate::layers::REQUEST_ID;
use crate::origins::{self, Guard};

/// The least that a route asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Least {
    /// Asked by supervisors, which hold no key, and pages that ask for one before they ask the server for anything.
    Nothing,
    A(Role),
}

impl Least {
    pub fn name(self) -> &'static str {
        match self {
            Least::Nothing => "none",
            Least::A(role) => role.name(),
        }
    }
}

/// A route, the least role, and for what changes something its name in the audit log.
type Row = (&'static str, &'static str, Least, Option<&'static str>);

const NOTHING: Least = Least::Nothing;
const INFER: Least = Least::A(Role::Infer);
const TRAIN: Least = Least::A(Role::Train);
const ADMIN: Least = Least::A(Role::Admin);

/// Of the two spellings of the API of 2021 the official one.
pub const TABLE: &[Row] = &[
    ("GET", "/", NOTHING, None),
    ("GET", "/ui/{part}", NOTHING, None),
    ("GET", "/docs", NOTHING, None),
    ("GET", "/health", NOTHING, None),
    ("GET", "/ready", NOTHING, None),
    ("GET", "/version", INFER, None),
    ("GET", "/openapi.json", INFER, None),
    ("GET", "/metrics", ADMIN, None),
    ("POST", "/v1/chat/completions", INFER, None),
    ("POST", "/v1/completions", INFER, None),
    ("POST", "/v1/messages", INFER, None),
    ("POST", "/v1/messages/count_tokens", INFER, None),
    ("POST", "/v1/embeddings", INFER, None),
    ("POST", "/v1/score", INFER, None),
    ("POST", "/score", INFER, None),
    ("POST", "/v1/rerank", INFER, None),
    ("POST", "/rerank", INFER, None),
    ("POST", "/v2/rerank", INFER, None),
    ("POST", "/v1/responses", INFER, None),
    ("POST", "/v1/responses/input_tokens", INFER, None),
    ("GET", "/v1/responses/{id}", INFER, None),
    ("DELETE", "/v1/responses/{id}", INFER, None),
    ("POST", "/v1/responses/{id}/cancel", INFER, None),
    ("GET", "/v1/responses/{id}/input_items", INFER, None),
    ("POST", "/", INFER, None),
    ("POST", "/generate", INFER, None),
    ("POST", "/generate_stream", INFER, None),
    ("GET", "/info", INFER, None),
    ("POST", "/tokenize", INFER, None),
    ("POST", "/detokenize", INFER, None),
    ("GET", "/tokenizer_info", INFER, None),
    ("GET", "/v1/models", INFER, None),
    ("GET", "/v1/models/{*id}", INFER, None),
    ("DELETE", "/v1/models/{*id}", TRAIN, Some("model.delete")),
    ("POST", "/v1/load_lora_adapter", ADMIN, Some("adapter.load")),
    ("POST", "/v1/unload_lora_adapter", ADMIN, Some("adapter.unload")),
    ("GET", "/v1/adapters/{name}/download", TRAIN, None),
    // What comes out has the base's weights in it.
    ("POST", "/v1/adapters/{name}/merge", ADMIN, Some("adapter.merge")),
    ("GET", "/v1/files", TRAIN, None),
    ("POST", "/v1/files", TRAIN, Some("file.create")),
    ("GET", "/v1/files/{id}", TRAIN, None),
    ("DELETE", "/v1/files/{id}", TRAIN, Some("file.delete")),
    ("GET", "/v1/files/{id}/content", TRAIN, None),
    ("POST", "/v1/uploads", TRAIN, Some("upload.create")),
    ("POST", "/v1/uploads/{id}/parts", TRAIN, Some("upload.part")),
    ("POST", "/v1/uploads/{id}/complete", TRAIN, Some("file.create")),
    ("POST", "/v1/uploads/{id}/cancel", TRAIN, Some("upload.cancel")),
    ("GET", "/v1/batches", TRAIN, None),
    ("POST", "/v1/batches", TRAIN, Some("batch.create")),
    ("GET", "/v1/batches/{id}", TRAIN, None),
    ("POST", "/v1/batches/{id}/cancel", TRAIN, Some("batch.cancel")),
    ("GET", "/v1/fine_tuning/jobs", TRAIN, None),
    ("POST", "/v1/fine_tuning/jobs", TRAIN, Some("job.create")),
    ("POST", "/v1/fine_tuning/preview", TRAIN, None),
    ("GET", "/v1/fine_tuning/jobs/{id}", TRAIN, None),
    (
        "POST",
        "/v1/fine_tuning/jobs/{id}/cancel",
        TRAIN,
        Some("job.cancel"),
    ),
    (
        "POST",
        "/v1/fine_tuning/jobs/{id}/pause",
        TRAIN,
        Some("job.pause"),
    ),
    (
        "POST",
        "/v1/fine_tuning/jobs/{id}/resume",
        TRAIN,
        Some("job.resume"),
    ),
    ("GET", "/v1/fine_tuning/jobs/{id}/events", TRAIN, None),
    ("GET", "/v1/fine_tuning/jobs/{id}/checkpoints", TRAIN, None),
    ("GET", "/v1/fine-tunes", TRAIN, None),
    ("POST", "/v1/fine-tunes", TRAIN, Some("job.create")),
    ("GET", "/v1/fine-tunes/{id}", TRAIN, None),
    ("DELETE", "/v1/fine-tunes/{id}", TRAIN, Some("model.delete")),
    ("POST", "/v1/fine-tunes/{id}/cancel", TRAIN, Some("job.cancel")),
    ("GET", "/v1/fine-tunes/{id}/events", TRAIN, None),
    // Tinker.
    ("POST", "/api/v1/client/config", INFER, None),
    ("POST", "/api/v1/client/dynamic_config", INFER, None),
    ("GET", "/api/v1/get_server_capabilities", INFER, None),
    ("GET", "/api/v1/healthz", INFER, None),
    ("POST", "/api/v1/telemetry", INFER, None),
    ("POST", "/api/v1/create_session", INFER, None),
    ("POST", "/api/v1/session_heartbeat", INFER, None),
    ("POST", "/api/v1/sessions/{id}/finish", INFER, None),
    ("GET", "/api/v1/sessions", INFER, None),
    ("GET", "/api/v1/sessions/{id}", INFER, None),
    ("POST", "/api/v1/retrieve_future", INFER, None),
    ("POST", "/api/v1/create_sampling_session", INFER, None),
    ("GET", "/api/v1/samplers/{id}", INFER, None),
    ("POST", "/api/v1/asample", INFER, None),
    ("POST", "/api/v1/create_model", TRAIN, Some("learner.create")),
    ("POST", "/api/v1/get_info", TRAIN, None),
    ("POST", "/api/v1/forward_backward", TRAIN, None),
    ("POST", "/api/v1/optim_step", TRAIN, None),
    ("POST", "/api/v1/save_weights", TRAIN, Some("learner.save")),
    (
        "POST",
        "/api/v1/save_weights_for_sampler",
        TRAIN,
        Some("learner.save"),
    ),
    ("POST", "/api/v1/load_weights", TRAIN, Some("learner.load")),
    ("GET", "/api/v1/training_runs", TRAIN, None),
    ("GET", "/api/v1/training_runs/{id}", TRAIN, None),
    ("GET", "/api/v1/checkpoints", TRAIN, None),
    ("GET", "/api/v1/training_runs/{id}/checkpoints", TRAIN, None),
    (
        "DELETE",
        "/api/v1/training_runs/{id}/checkpoints/{kind}/{name}",
        TRAIN,
        Some("checkpoint.delete"),
    ),
    (
        "POST",
        "/api/v1/training_runs/{id}/checkpoints/{kind}/{name}/publish",
        TRAIN,
        Some("checkpoint.publish"),
    ),
    (
        "DELETE",
        "/api/v1/training_runs/{id}/checkpoints/{kind}/{name}/publish",
        TRAIN,
        Some("checkpoint.unpublish"),
    ),
    (
        "PUT",
        "/api/v1/training_runs/{id}/checkpoints/{kind}/{name}/ttl",
        TRAIN,
        Some("checkpoint.expire"),
    ),
    ("POST", "/api/v1/weights_info", TRAIN, None),
    // The base model's files, as a hub has them.
    ("GET", "/api/models/{name}", INFER, None),
    ("GET", "/api/models/{organization}/{name}", INFER, None),
    ("GET", "/api/models/{name}/revision/{revision}", INFER, None),
    (
        "GET",
        "/api/models/{organization}/{name}/revision/{revision}",
        INFER,
        None,
    ),
    ("GET", "/api/models/{name}/tree/{revision}", INFER, None),
    (
        "GET",
        "/api/models/{organization}/{name}/tree/{revision}",
        INFER,
        None,
    ),
    ("GET", "/{name}/resolve/{revision}/{file}", INFER, None),
    (
        "GET",
        "/{organization}/{name}/resolve/{revision}/{file}",
        INFER,
        None,
    ),
];

/// What a request to a route needs, and what it is called when it changes something.
fn rule(method: &Method, path: Option<&str>) -> (Least, Option<&'static str>) {
    // No route: whoever may come in hears so.
    let Some(path) = path else { return (INFER, None) };
    let path = path.replace("/fine_tunes", "/fine-tunes");
    let method = match method {
        &Method::HEAD => "GET",
        other => other.as_str(),
    };
    let mut rows = TABLE.iter().filter(|(_, known, ..)| *known == path).peekable();
    // A wrong method on a route that is known is answered with that.
    let otherwise = match rows.peek() {
        Some(_) => INFER,
        None => ADMIN,
    };
    let row = rows.find(|(known, ..)| *known == method);
    row.map_or((otherwise, None), |&(_, _, least, action)| (least, action))
}

/// Of a route of the document.
pub fn least(method: &str, path: &str) -> Least {
    let method = method.to_ascii_uppercase();
    let mut rows = TABLE.iter();
    let row = rows.find(|(known, route, ..)| *known == method && *route == path);
    row.map_or(ADMIN, |&(_, _, least, _)| least)
}

/// In Markdown, as ARCHITECTURE.md has it.
#[cfg(test)]
fn table() -> String {
    let mut text = "| route | least role | audit |\n|---|---|---|\n".to_owned();
    for (method, path, least, action) in TABLE {
        let action = action.map_or_else(String::new, |action| format!("`{action}`"));
        text.push_str(&format!("| `{method} {path}` | {} | {action} |\n", least.name()));
    }
    text
}

#[derive(Clone)]
pub struct Gate {
    pub ring: Ring,
    /// For a server without keys.
    pub guard: Guard,
    pub audit: Audit,
}

pub async fn gate(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    let Gate { ring, guard, audit } = gate;
    let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let (least, action) = rule(request.method(), path);
    let is_counted = is_counted(request.method(), path, least);
    let mut record = action.map(|action| Record {
        action,
        path: request.uri().path().to_owned(),
        request_id: text(request.headers().get(&REQUEST_ID)),
        grant: None,
    });
    let response = if !ring.is_wanted() {
        origins::guard(State(guard), request, next).await
    } else {
        let (grant, mut refusal) = admitted(&ring, least, &request);
        if let Some(record) = &mut record {
            record.grant = grant.clone();
        }
        let meter = grant.as_ref().and_then(|grant| grant.meter.clone());
        let meter = meter.filter(|_| is_counted);
        if let Some(meter) = meter.as_ref().filter(|_| refusal.is_none()) {
            refusal = meter
                .admit()
                .err()
                .map(|used_up| RouterError::from(used_up).into());
        }
        let mut response = match refusal {
            None => {
                if let Some(grant) = grant {
                    request.extensions_mut().insert(grant);
                }
                next.run(request).await
            }
            Some(error) => error.into_response(),
        };
        if let Some(meter) = meter {
            say_what_is_left(&meter, response.headers_mut());
        }
        response
    };
    if let Some(record) = record {
        let object = response.extensions().get::<Object>();
        audit.note(&record, object, response.status());
    }
    response
}

/// Whether a request counts for its key's limits: it asks a model something, or has a tokenizer work for it. Of Tinker's
/// routes the others are about what was asked before.
fn is_counted(method: &Method, path: Option<&str>, least: Least) -> bool {
    let of_tinker = |path: &str| path.starts_with("/api/v1/") && path != "/api/v1/asample";
    method == Method::POST && least == INFER && path.is_some_and(|path| !of_tinker(path))
}

/// As OpenAI says it. A stream's tokens are counted as they come: what is left at its beginning is told.
fn say_what_is_left(meter: &Meter, headers: &mut HeaderMap) {
    for (what, left) in ["requests", "tokens"].into_iter().zip(meter.left()) {
        let Some(Left {
            limit,
            remaining,
            reset,
        }) = left
        else {
            continue;
        };
        let values = [
            ("limit", limit.to_string()),
            ("remaining", remaining.to_string()),
            ("reset", format!("{:.3}s", reset.as_secs_f64())),
        ];
        for (which, value) in values {
            let name = HeaderName::try_from(format!("x-ratelimit-{which}-{what}")).expect("a header's name");
            headers.insert(name, HeaderValue::try_from(value).expect("digits"));
        }
    }
}

/// By which key the request comes (`None`: by none that is known), and why it does not come in.
fn admitted(ring: &Ring, least: Least, request: &Request) -> (Option<Grant>, Option<ApiError>) {
    let Least::A(wanted) = least else {
        return (None, None);
    };
    let Some(given) = given_key(request.headers()) else {
        return (None, Some(ApiError::NoKey));
    };
    let Some(grant) = ring.find(given) else {
        return (None, Some(ApiError::WrongKey));
    };
    let role = grant.role;
    let refusal = (role < wanted).then_some(ApiError::Forbidden { role, wanted });
    (Some(grant), refusal)
}

fn text(value: Option<&HeaderValue>) -> String {
    let bytes = value.map(HeaderValue::as_bytes).unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn every_route_of_the_document_has_a_row() {
        let document: Value = serde_json::from_str(tandem_openapi::COMMITTED).expect("JSON");
        let mut routes = Vec::new();
        for (path, item) in document["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("operations") {
                let (method, path) = (
                    method.to_ascii_uppercase(),
                    path.replace("/v1/models/{id}", "/v1/models/{*id}"),
                );
                let (least, _) = rule(&method.parse().expect("a method"), Some(&path));
                assert_eq!(operation["x-least-role"], least.name(), "{method} {path}");
                routes.push((method, path));
            }
        }
        for (method, path, least, action) in TABLE {
            let is_documented = routes.iter().any(|(m, p)| m == method && p == path);
            let is_page = *method == "GET" && ["/", "/ui/{part}", "/docs", "/openapi.json"].contains(path);
            assert!(is_documented || is_page, "{method} {path} is no route");
            // What changes something is written down, and is more than asking a model. What was asked, and is kept for who asked,
            // is a part of asking.
            let asks = [
                "/v1/chat/completions",
                "/v1/completions",
                "/v1/messages",
                "/v1/messages/count_tokens",
                "/v1/embeddings",
                "/v1/score",
                "/score",
                "/v1/rerank",
                "/rerank",
                "/v2/rerank",
                "/v1/responses",
                "/v1/responses/input_tokens",
                "/v1/responses/{id}",
                "/v1/responses/{id}/cancel",
                "/",
                "/generate",
                "/generate_stream",
                "/tokenize",
                "/detokenize",
                // Sessions, and what lives in one of them alone.
                "/api/v1/client/config",
                "/api/v1/client/dynamic_config",
                "/api/v1/telemetry",
                "/api/v1/create_session",
                "/api/v1/session_heartbeat",
                "/api/v1/sessions/{id}/finish",
                "/api/v1/retrieve_future",
                "/api/v1/create_sampling_session",
                "/api/v1/asample",
                "/api/v1/get_info",
                "/api/v1/forward_backward",
                "/api/v1/optim_step",
                "/api/v1/weights_info",
                "/v1/fine_tuning/preview",
            ]
            .contains(path);
            assert_eq!(action.is_some(), *method != "GET" && !asks, "{method} {path}");
            assert!(
                action.is_none() || ![NOTHING, INFER].contains(least),
                "{method} {path}"
            );
        }
        assert_eq!(routes.len() + 4, TABLE.len());
    }

    #[test]
    fn what_the_table_does_not_have_is_closed() {
        for (method, path, expected) in [
            ("GET", Some("/v1/new"), ADMIN),
            ("GET", None, INFER),
            ("PUT", Some("/v1/files"), INFER),
            ("HEAD", Some("/v1/files"), TRAIN),
            ("POST", Some("/v1/fine_tunes"), TRAIN),
            ("DELETE", Some("/v1/fine_tunes/{id}"), TRAIN),
            ("GET", Some("/health"), NOTHING),
            ("POST", Some("/v1/load_lora_adapter"), ADMIN),
        ] {
            assert_eq!(
                rule(&method.parse().unwrap(), path).0,
                expected,
                "{method} {path:?}"
            );
        }
    }

    #[test]
    fn the_documents_have_the_table() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../ARCHITECTURE.md");
        let document = std::fs::read_to_string(root).expect("ARCHITECTURE.md");
        assert!(
            document.contains(&table()),
            "ARCHITECTURE.md wants this:\n{}",
            table()
        );
    }
}
