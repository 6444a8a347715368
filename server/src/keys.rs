//! API keys: what may be one, and whether a request shows one that fits. Not here: where keys are read from.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock};

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tandem_router::api::Client;

use crate::connection::ConnectionId;
use crate::error::ApiError;

/// Asked by supervisors, which hold no key, and pages that ask for one before they ask the server for anything.
const KEYLESS_PATHS: [&str; 4] = ["/health", "/ready", "/", "/docs"];

/// Why a text cannot be a key. It never shows the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    #[error(
        "is empty: give a key, or leave the option (or the variable TANDEM_API_KEY) away to serve everybody without one"
    )]
    Empty,
    #[error("holds a control character, which no HTTP header can carry")]
    Control,
}

/// The keys that open every route.
#[derive(Clone)]
pub struct ApiKeys(Arc<[String]>);

impl ApiKeys {
    /// Space around a key goes, and the newline with which files and secrets end. No keys at all: every route is open.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<Option<ApiKeys>, BadKey> {
        let keys = keys.into_iter().map(|key| match key.trim() {
            "" => Err(BadKey::Empty),
            key if key.chars().any(char::is_control) => Err(BadKey::Control),
            key => Ok(key.to_owned()),
        });
        let keys: Arc<[String]> = keys.collect::<Result<_, _>>()?;
        Ok((!keys.is_empty()).then_some(ApiKeys(keys)))
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
        let connection = parts.extensions.get().copied().unwrap_or(ConnectionId(0));
        Ok(Asker(Client {
            key: client.unwrap_or_default(),
            connection: connection.0,
        }))
    }
}

/// Around every route, so that none can be forgotten.
pub async fn auth(State(keys): State<ApiKeys>, request: Request, next: Next) -> Response {
    if KEYLESS_PATHS.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    match given_key(request.headers()) {
        None => ApiError::NoKey.into_response(),
        Some(given) if !keys.fit(given) => ApiError::WrongKey.into_response(),
        Some(_) => next.run(request).await,
    }
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

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;

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

    #[test]
    fn keys_are_trimmed_and_never_empty() {
        for (keys, given, expected) in [
            (&["one", "two"][..], "two", Ok(true)),
            (&["one", "two"], "three", Ok(false)),
            // As a secret's file ends.
            (&["one\n"], "one", Ok(true)),
            (&[" one\r\n"], "one", Ok(true)),
            (&[""], "", Err(BadKey::Empty)),
            (&["\n"], "", Err(BadKey::Empty)),
            (&["one", " "], "one", Err(BadKey::Empty)),
            (&["one\ntwo"], "one", Err(BadKey::Control)),
        ] {
            let fits =
                ApiKeys::new(keys.iter().copied()).map(|keys| keys.expect("keys").fit(given.as_bytes()));
            assert_eq!(fits, expected, "{keys:?}");
        }
        assert!(ApiKeys::new([]).expect("no keys are no mistake").is_none());
    }
}
