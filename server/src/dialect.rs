//! How an error is said where the API is not OpenAI's: the same errors, with the same status, in the shape that the clients of
//! that API read, whatever found the error (a route, an extractor, the gate, a panic). Not here: what the errors are.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use serde_json::{Value, json};
use tandem_openapi::error::ErrorObject;
use tandem_openapi::generate::GenerateError;
use tandem_openapi::messages::{AnthropicError, AnthropicErrorObject};

use crate::error::ApiError;
use crate::layers::REQUEST_ID;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    OpenAi,
    Anthropic,
    /// text-generation-inference's.
    Generate,
}

/// Anthropic's name of the header.
const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

impl Dialect {
    pub fn of(method: &Method, path: &str) -> Dialect {
        match path {
            "/v1/messages" => Dialect::Anthropic,
            path if path.starts_with("/v1/messages/") => Dialect::Anthropic,
            "/generate" | "/generate_stream" | "/info" => Dialect::Generate,
            "/" if method == Method::POST => Dialect::Generate,
            _ => Dialect::OpenAi,
        }
    }

    fn body(self, status: StatusCode, error: &ErrorObject, request_id: &str) -> Value {
        match self {
            Dialect::OpenAi => json!({"error": error}),
            Dialect::Anthropic => json!(AnthropicError {
                kind: "error",
                error: AnthropicErrorObject {
                    kind: anthropic_kind(status),
                    message: error.message.clone(),
                },
                request_id: request_id.to_owned(),
            }),
            Dialect::Generate => json!(GenerateError {
                error: error.message.clone(),
                error_type: match status.as_u16() {
                    429 | 503 => "overloaded",
                    400..500 => "validation",
                    _ => "generation",
                },
            }),
        }
    }

    /// What a stream says when it cannot go on.
    pub fn last_words(self, error: &ApiError, request_id: &str) -> Value {
        self.body(error.status(), &error.body().error, request_id)
    }
}

fn anthropic_kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    }
}

/// Around everything that may fail, but within the layer that gives the request its id.
pub async fn translate(request: Request, next: Next) -> Response {
    let dialect = Dialect::of(request.method(), request.uri().path());
    if dialect == Dialect::OpenAi {
        return next.run(request).await;
    }
    let id = request.headers().get(&REQUEST_ID).cloned();
    let mut response = next.run(request).await;
    if let (Dialect::Anthropic, Some(id)) = (dialect, &id) {
        response.headers_mut().insert(ANTHROPIC_REQUEST_ID, id.clone());
    }
    let Some(error) = response.extensions_mut().remove::<ErrorObject>() else {
        return response;
    };
    let id = id.as_ref().map_or(&b""[..], HeaderValue::as_bytes);
    let body = dialect.body(response.status(), &error, &String::from_utf8_lossy(id));
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, Body::from(body.to_string()))
}
