//! What people see: a page to chat and fine-tune, a page that renders the API document, and the document. Nothing is
//! fetched from elsewhere.

use axum::body::Bytes;
use axum::extract::State;
use axum::http::header;
use axum::response::{Html, IntoResponse};

use crate::app::App;

pub async fn index() -> Html<&'static str> {
    Html(include_str!("../ui/index.html"))
}

pub async fn docs() -> Html<&'static str> {
    Html(include_str!("../ui/docs.html"))
}

pub async fn openapi(State(app): State<App>) -> impl IntoResponse {
    let document: Bytes = app.document.clone();
    ([(header::CONTENT_TYPE, "application/json")], document)
}
