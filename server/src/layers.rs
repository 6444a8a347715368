//! What wraps every route: a request id, the API key, panics, the fallbacks. Not here: the routes.

use std::any::Any;
use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tandem_router::api::Client;
use tracing::{debug, warn};

use crate::error::ApiError;
use crate::extract::drain;
use crate::id;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client's own request id at most; a longer one is replaced.
const REQUEST_ID_BYTES: usize = 128;
/// Asked by supervisors, which hold no key.
const OPEN_PATHS: [&str; 2] = ["/health", "/ready"];

/// Names the exchange (the client's name, or a new one) and logs it.
pub async fn request_id(mut request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(&REQUEST_ID)
        .filter(|id| id.len() <= REQUEST_ID_BYTES)
        .cloned();
    let id = given.unwrap_or_else(|| {
        HeaderValue::from_str(&id::fresh("req_")).expect("the id is made of letters, digits and _")
    });
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let start = Instant::now();
    let mut response = next.run(request).await;
    let (status, ms) = (response.status().as_u16(), start.elapsed().as_millis() as u64);
    match response.status().is_server_error() {
        true => warn!(%method, path, status, ms, request_id = ?id, "answered"),
        false => debug!(%method, path, status, ms, request_id = ?id, "answered"),
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The keys that open every route.
#[derive(Clone)]
pub struct ApiKeys(Arc<[String]>);

impl ApiKeys {
    /// An empty key is none: that is how an environment says that a variable is not set. `None`: every route is open.
    pub fn new(keys: Vec<String>) -> Option<ApiKeys> {
        let keys: Arc<[String]> = keys.into_iter().filter(|key| !key.is_empty()).collect();
        (!keys.is_empty()).then_some(ApiKeys(keys))
    }

    /// Looks at all of them, whichever fits.
    fn fit(&self, given: &[u8]) -> bool {
        self.0
            .iter()
            .fold(false, |fits, key| fits | same(given, key.as_bytes()))
    }
}

/// Who asks, by the key it shows, whether one is wanted or not.
pub struct Asker(pub Client);

impl<S: Sync> FromRequestParts<S> for Asker {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Asker, Infallible> {
        // Keys of one process's hash maps: a client cannot choose to look like another.
        static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        let client = given_key(&parts.headers).map(|key| KEYS.hash_one(key));
        Ok(Asker(Client(client.unwrap_or_default())))
    }
}

/// Outermost, so that no route can be forgotten.
pub async fn auth(State(keys): State<ApiKeys>, request: Request, next: Next) -> Response {
    if OPEN_PATHS.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let refusal = match given_key(request.headers()) {
        None => ApiError::NoKey,
        Some(given) if !keys.fit(given) => ApiError::WrongKey,
        Some(_) => return next.run(request).await,
    };
    drain(request.into_body().into_data_stream());
    refusal.into_response()
}

/// OpenAI's clients send a bearer token, Anthropic's older ones `x-api-key`.
fn given_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    bearer.or_else(|| headers.get("x-api-key").map(HeaderValue::as_bytes))
}

/// Takes as long for a wrong key as for the right one; only the length can be learnt.
fn same(given: &[u8], key: &[u8]) -> bool {
    let difference = given.iter().zip(key).fold(0, |bits, (a, b)| bits | (a ^ b));
    std::hint::black_box(difference) == 0 && given.len() == key.len()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_opens() {
        for (given, expected) in [
            ("sekret", true),
            ("sekre", false),
            ("sekrets", false),
            ("", false),
            ("tekret", false),
        ] {
            assert_eq!(same(given.as_bytes(), b"sekret"), expected, "{given:?}");
        }
        let keys = ApiKeys::new(vec!["one".to_owned(), String::new(), "two".to_owned()]).expect("two keys");
        for (given, expected) in [("one", true), ("two", true), ("three", false), ("", false)] {
            assert_eq!(keys.fit(given.as_bytes()), expected, "{given:?}");
        }
        assert!(ApiKeys::new(vec![String::new()]).is_none());
        let headers = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
        };
        for (headers, expected) in [
            (headers("authorization", "Bearer k"), Some("k")),
            (headers("authorization", "bearer  k "), Some("k")),
            (headers("authorization", "Basic k"), None),
            (headers("x-api-key", "k"), Some("k")),
            (HeaderMap::new(), None),
        ] {
            assert_eq!(given_key(&headers), expected.map(str::as_bytes));
        }
    }
}
