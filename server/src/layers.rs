//! What wraps every route: a request id, panics, the fallbacks. Not here: the routes, API keys.

use std::any::Any;

use axum::extract::{MatchedPath, Query, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::access_log::AccessLog;
use crate::app::App;
use crate::convert::refuse::QUERY;
use crate::error::ApiError;
use crate::fields::stray_in_query;
use crate::id;

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client's own request id at most; a longer one is replaced.
const REQUEST_ID_BYTES: usize = 128;

/// Names the exchange (the client's name, or a new one), and has a line written of it.
pub async fn request_id(State(log): State<AccessLog>, mut request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|id| id.len() <= REQUEST_ID_BYTES)
        .cloned();
    let id = given.unwrap_or_else(|| {
        HeaderValue::from_str(&id::fresh("req_")).expect("the id is made of letters, digits and _")
    });
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let name = String::from_utf8_lossy(id.as_bytes()).into_owned();
    let mut response = log.around(&name, request, next).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Around the routes of the document: names in the query that the document does not have there are treated as fields
/// of a body are.
pub async fn query(State(app): State<App>, path: MatchedPath, request: Request, next: Next) -> Response {
    if request.uri().query().is_none() {
        return next.run(request).await;
    }
    // axum's wildcard, and the second spelling of the API of 2021, are not the document's.
    let path = path
        .as_str()
        .replace("{*", "{")
        .replace("/fine_tunes", "/fine-tunes");
    let method = request.method().as_str().to_ascii_lowercase();
    // A query that is none is the extractor's to refuse.
    let pairs = Query::<Vec<(String, String)>>::try_from_uri(request.uri()).map(|Query(pairs)| pairs);
    let strays = pairs.unwrap_or_default().into_iter();
    let strays = strays.filter_map(|(name, value)| stray_in_query(&method, &path, &name, &value));
    match app.strays.judge_all(strays.collect(), &[QUERY]) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// A handler that panicked: the bug is logged, the client gets a 500, the server goes on.
pub fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("(no text)");
    ApiError::Internal(format!("a handler panicked: {text}")).into_response()
}

pub async fn unknown_url(method: Method, uri: Uri) -> ApiError {
    ApiError::UnknownUrl(method, uri.path().to_owned())
}

pub async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::WrongMethod(method, uri.path().to_owned())
}
