//! What people see: a page to chat and fine-tune, a page that renders the API document, and the document. Nothing is
//! fetched from elsewhere.

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{Method, Uri, header};
use axum::response::{Html, IntoResponse};

use crate::app::App;
use crate::error::ApiError;

const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! parts {
    ($($name:literal: $kind:expr,)*) => {
        /// What the first page is made of: name, type, contents.
        const PARTS: &[(&str, &str, &str)] = &[$(($name, $kind, include_str!(concat!("../ui/", $name))),)*];
    };
}

parts! {
    "style.css": "text/css; charset=utf-8",
    "main.js": SCRIPT,
    "dom.js": SCRIPT,
    "api.js": SCRIPT,
    "markdown.js": SCRIPT,
    "talk.js": SCRIPT,
    "tune.js": SCRIPT,
    "jobs.js": SCRIPT,
    "chart.js": SCRIPT,
    "adapters.js": SCRIPT,
    "server.js": SCRIPT,
}

/// Whatever a model writes there: the page runs its own scripts alone, and asks nobody but its server.
const OWN_ALONE: &str =
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'";

pub async fn index() -> impl IntoResponse {
    (
        [(header::CONTENT_SECURITY_POLICY, OWN_ALONE)],
        Html(include_str!("../ui/index.html")),
    )
}

pub async fn part(Path(name): Path<String>, method: Method, uri: Uri) -> Result<impl IntoResponse, ApiError> {
    let part = PARTS.iter().find(|(known, ..)| *known == name);
    let (_, kind, text) = part.ok_or_else(|| ApiError::UnknownUrl(method, uri.path().to_owned()))?;
    // A newer server has newer parts: a browser asks again each time it opens the page.
    Ok((
        [(header::CONTENT_TYPE, *kind), (header::CACHE_CONTROL, "no-cache")],
        *text,
    ))
}

pub async fn docs() -> Html<&'static str> {
    Html(include_str!("../ui/docs.html"))
}

pub async fn openapi(State(app): State<App>) -> impl IntoResponse {
    let document: Bytes = app.document.clone();
    ([(header::CONTENT_TYPE, "application/json")], document)
}
