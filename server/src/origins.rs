//! Which web pages may use this server. A browser lets a page read answers of another origin only where that origin is
//! granted (CORS), but sends much without asking: so a server without a key, which whoever reaches it may command, also
//! looks at where a request comes from. Not here: keys.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer, ExposeHeaders};

use crate::error::ApiError;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// Supervisors ask under any name.
const PROBED_PATHS: [&str; 2] = ["/health", "/ready"];
/// Ends of names that nobody can register.
const PRIVATE: [&str; 4] = [".localhost", ".local", ".internal", ".home.arpa"];
/// For how long a browser may remember what a preflight said.
const MAX_AGE: Duration = Duration::from_secs(600);

#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no origin: give a scheme and a host such as https://example.com, a JSON list of them, or [\"*\"]"
)]
pub struct BadOrigin(String);

/// Pages that may use the server beside its own, and those of this machine (localhost).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origins {
    any: bool,
    listed: Arc<[String]>,
}

impl Origins {
    /// Each a JSON list (as vLLM), or origins separated by commas.
    pub fn parse(texts: &[String]) -> Result<Origins, BadOrigin> {
        let mut all = Vec::new();
        for text in texts {
            let text = text.trim();
            match text.starts_with('[') {
                true => all.extend(
                    serde_json::from_str::<Vec<String>>(text).map_err(|_| BadOrigin(text.to_owned()))?,
                ),
                false => all.extend(text.split(',').map(|one| one.trim().to_owned())),
            }
        }
        let any = all.iter().any(|one| one == "*");
        let listed = all.into_iter().filter(|one| one != "*").map(|one| {
            let origin = one.trim_end_matches('/').to_ascii_lowercase();
            match origin.split_once("://") {
                Some((scheme, host)) if !scheme.is_empty() && !host.is_empty() && !host.contains('/') => {
                    Ok(origin)
                }
                _ => Err(BadOrigin(one)),
            }
        });
        let listed = listed.collect::<Result<_, _>>()?;
        Ok(Origins { any, listed })
    }

    /// May this page use the server that it calls `host`?
    fn allow(&self, origin: &str, host: Option<&str>) -> bool {
        let origin = origin.to_ascii_lowercase();
        let Some((_, place)) = origin.split_once("://") else {
            // "null": a file, or a frame that hides where it is from.
            return self.any;
        };
        let same = host.is_some_and(|host| host.eq_ignore_ascii_case(place));
        self.any || same || is_loopback(name(place)) || self.listed.contains(&origin)
    }

    /// Is this a name of the server, if only its own machine reaches it? A name that somebody else can make point to
    /// this machine has a dot; what is reserved for private use cannot.
    fn know(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        let name = name(&host);
        self.any
            || !name.contains('.')
            || name.parse::<IpAddr>().is_ok()
            || PRIVATE.iter().any(|suffix| name.ends_with(suffix))
            || self
                .listed
                .iter()
                .any(|origin| origin.split_once("://").is_some_and(|(_, place)| place == host))
    }

    /// Answers preflights, and lets the pages that are granted read answers.
    pub fn cors(&self) -> CorsLayer {
        let origins = self.clone();
        CorsLayer::new()
            .allow_origin(AllowOrigin::predicate(move |origin, request| {
                let origin = origin.to_str().ok();
                origin.is_some_and(|origin| origins.allow(origin, host(&request.headers)))
            }))
            .allow_methods(AllowMethods::mirror_request())
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(ExposeHeaders::any())
            .max_age(MAX_AGE)
    }
}

/// The host without its port, an IPv6 address without its brackets.
fn name(host: &str) -> &str {
    match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or(host),
    }
}

fn is_loopback(name: &str) -> bool {
    let address = name.parse::<IpAddr>();
    name == "localhost" || name.ends_with(".localhost") || address.is_ok_and(|address| address.is_loopback())
}

fn host(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::HOST)?.to_str().ok()
}

/// For a server without a key.
#[derive(Clone)]
pub struct Guard {
    pub origins: Origins,
    /// The server listens on a loopback address: no other machine reaches it, but a page whose name was made to point
    /// here does (DNS rebinding), and looks like the server's own.
    pub is_local: bool,
}

/// Refuses what a page of elsewhere sends. A request that is no browser's says nothing of a page.
pub async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let Guard { origins, is_local } = guard;
    if PROBED_PATHS.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let headers = request.headers();
    let host = host(headers);
    if let Some(host) = host.filter(|host| is_local && !origins.know(host)) {
        return ApiError::UnknownHost(host.to_owned()).into_response();
    }
    // What only reads is safe: a page cannot see the answer.
    let safe = [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
    match foreign(headers).filter(|origin| !safe && !origins.allow(origin, host)) {
        None => next.run(request).await,
        Some(origin) => ApiError::ForeignPage(origin.to_owned()).into_response(),
    }
}

/// The origin of a page, unless the browser says itself that it is the server's own: a proxy may have changed the host.
fn foreign(headers: &HeaderMap) -> Option<&str> {
    let text = |value: &HeaderValue| matches!(value.as_bytes(), b"same-origin" | b"none");
    let origin = headers.get(header::ORIGIN)?;
    match headers.get(SEC_FETCH_SITE).is_some_and(text) {
        true => None,
        false => Some(origin.to_str().unwrap_or("(not ASCII)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_pages_local_pages_and_listed_pages_are_allowed() {
        let listed =
            Origins::parse(&["[\"https://chat.example.com/\", \"tauri://app\"]".to_owned()]).unwrap();
        let none = Origins::parse(&[]).unwrap();
        let any = Origins::parse(&["*".to_owned()]).unwrap();
        for (origins, origin, host, expected) in [
            (&none, "http://gpu.lan:8000", Some("gpu.lan:8000"), true),
            (&none, "http://gpu.lan:8000", Some("gpu.lan:9000"), false),
            (&none, "https://gpu.lan", Some("GPU.lan"), true),
            (&none, "http://localhost:3000", Some("127.0.0.1:8000"), true),
            (&none, "http://[::1]:3000", Some("127.0.0.1:8000"), true),
            (&none, "https://evil.example", Some("127.0.0.1:8000"), false),
            (
                &none,
                "https://localhost.evil.example",
                Some("localhost:8000"),
                false,
            ),
            (&none, "null", Some("localhost:8000"), false),
            (&none, "http://localhost:3000", None, true),
            (&listed, "https://chat.example.com", Some("localhost:8000"), true),
            (&listed, "http://chat.example.com", Some("localhost:8000"), false),
            (&listed, "tauri://app", Some("localhost:8000"), true),
            (&any, "null", Some("localhost:8000"), true),
            (&any, "https://evil.example", None, true),
        ] {
            assert_eq!(
                origins.allow(origin, host),
                expected,
                "{origin} {host:?} {origins:?}"
            );
        }
    }

    #[test]
    fn a_name_that_others_can_make_is_not_known() {
        let listed = Origins::parse(&["https://chat.example.com".to_owned()]).unwrap();
        for (host, expected) in [
            ("localhost:8000", true),
            ("127.0.0.1:8000", true),
            ("[::1]:8000", true),
            ("10.0.0.7", true),
            ("tandem", true),
            ("host.docker.internal:8000", true),
            ("evil.example:8000", false),
            ("127.0.0.1.evil.example", false),
            ("chat.example.com", true),
        ] {
            assert_eq!(listed.know(host), expected, "{host}");
        }
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        for text in [
            "example.com",
            "https://example.com/path",
            "[1]",
            "https://",
            "",
            "a,b",
        ] {
            assert!(Origins::parse(&[text.to_owned()]).is_err(), "{text:?}");
        }
        let two = Origins::parse(&["https://a.example, https://b.example:3000".to_owned()]).unwrap();
        assert_eq!(&*two.listed, ["https://a.example", "https://b.example:3000"]);
    }
}
