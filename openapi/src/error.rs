//! The error body, the same for every route and status, but for the routes of other APIs than OpenAI's.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::openapi::{ContentBuilder, Ref, RefOr, Response, ResponseBuilder};
use utoipa::{IntoResponses, ToSchema};

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorResponse {
    pub error: ErrorObject,
}

/// All four keys are always present.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorObject {
    pub message: String,
    /// `invalid_request_error`, `authentication_error`, `rate_limit_error`, `server_error`
    #[serde(rename = "type")]
    pub kind: String,
    /// The request's field that is wrong.
    #[schema(required)]
    pub param: Option<String>,
    #[schema(required)]
    pub code: Option<String>,
}

/// What any route may answer instead of what was asked; named in each route's `responses`.
pub struct Errors;

const STATUSES: [(&str, &str); 12] = [
    ("400", "The request is wrong; `param` names the field"),
    ("401", "No API key, or a wrong one"),
    ("403", "A web page of another origin (`--allowed-origins`)"),
    ("404", "No such model, file, job or route"),
    ("405", "The route exists, not with this method"),
    (
        "409",
        "The state forbids it; a retry cannot help (`x-should-retry: false`)",
    ),
    ("410", "It was there, and is over"),
    ("413", "The body is larger than the route's limit"),
    ("415", "The body's `Content-Type` is not the route's"),
    (
        "429",
        "Too many requests wait; `Retry-After` says when to come back",
    ),
    ("500", "The server failed"),
    ("503", "The server is starting or stopping"),
];

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        all_with("ErrorResponse")
    }
}

/// The same in Anthropic's shape.
pub struct AnthropicErrors;

impl IntoResponses for AnthropicErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        all_with("AnthropicError")
    }
}

/// The same in text-generation-inference's.
pub struct GenerateErrors;

impl IntoResponses for GenerateErrors {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        all_with("GenerateError")
    }
}

fn all_with(schema: &str) -> BTreeMap<String, RefOr<Response>> {
    let response = |description: &str| {
        let body = ContentBuilder::new()
            .schema(Some(Ref::from_schema_name(schema)))
            .build();
        ResponseBuilder::new()
            .description(description)
            .content("application/json", body)
            .build()
    };
    STATUSES
        .iter()
        .map(|(status, text)| ((*status).to_owned(), RefOr::T(response(text))))
        .collect()
}
