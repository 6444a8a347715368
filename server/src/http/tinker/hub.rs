//! The hub's routes for reading a repository, as far as `AutoTokenizer.from_pretrained` asks them: with `HF_ENDPOINT` at
//! this server a client without internet has the base model's tokenizer. Only the files that a replica sends, no weights.

use axum::Json as Answer;
// (utoipa's macro would look inside what is named Path.)
use axum::extract::{Path as Parts, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use tandem_core::id::Digest;
use tandem_openapi::error::Errors;
use tandem_openapi::tinker::{HubFile, HubRepository, HubSibling};
use tandem_router::api::RouterError;

use crate::app::App;
use crate::error::ApiError;

const COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
/// Hexadecimal digits of a commit's name.
const COMMIT_DIGITS: usize = 40;

/// The base model as a repository, by a name without an organization.
#[utoipa::path(
    get, path = "/api/models/{name}", tag = "hub", params(("name" = String, Path), ("expand" = Option<String>, Query), ("blobs" = Option<bool>, Query)),
    responses((status = 200, body = HubRepository), Errors)
)]
pub async fn model(State(app): State<App>, Parts(name): Parts<String>) -> Response {
    repository(&app, &name)
}

/// The same, of an organization.
#[utoipa::path(
    get, path = "/api/models/{organization}/{name}", tag = "hub",
    params(("organization" = String, Path), ("name" = String, Path), ("expand" = Option<String>, Query), ("blobs" = Option<bool>, Query)),
    responses((status = 200, body = HubRepository), Errors)
)]
pub async fn model_of(
    State(app): State<App>,
    Parts((organization, name)): Parts<(String, String)>,
) -> Response {
    repository(&app, &format!("{organization}/{name}"))
}

/// The same at a revision, of which there is one.
#[utoipa::path(
    get, path = "/api/models/{name}/revision/{revision}", tag = "hub",
    params(("name" = String, Path), ("revision" = String, Path), ("expand" = Option<String>, Query), ("blobs" = Option<bool>, Query)),
    responses((status = 200, body = HubRepository), Errors)
)]
pub async fn revision(State(app): State<App>, Parts((name, _revision)): Parts<(String, String)>) -> Response {
    repository(&app, &name)
}

/// The same, of an organization.
#[utoipa::path(
    get, path = "/api/models/{organization}/{name}/revision/{revision}", tag = "hub",
    params(
        ("organization" = String, Path), ("name" = String, Path), ("revision" = String, Path),
        ("expand" = Option<String>, Query), ("blobs" = Option<bool>, Query)
    ),
    responses((status = 200, body = HubRepository), Errors)
)]
pub async fn revision_of(
    State(app): State<App>,
    Parts((organization, name, _revision)): Parts<(String, String, String)>,
) -> Response {
    repository(&app, &format!("{organization}/{name}"))
}

/// Its files.
#[utoipa::path(
    get, path = "/api/models/{name}/tree/{revision}", tag = "hub",
    params(
        ("name" = String, Path), ("revision" = String, Path), ("recursive" = Option<bool>, Query),
        ("expand" = Option<bool>, Query), ("limit" = Option<u32>, Query)
    ),
    responses((status = 200, body = [HubFile]), Errors)
)]
pub async fn tree(State(app): State<App>, Parts((name, _revision)): Parts<(String, String)>) -> Response {
    files(&app, &name)
}

/// The same, of an organization.
#[utoipa::path(
    get, path = "/api/models/{organization}/{name}/tree/{revision}", tag = "hub",
    params(
        ("organization" = String, Path), ("name" = String, Path), ("revision" = String, Path),
        ("recursive" = Option<bool>, Query), ("expand" = Option<bool>, Query), ("limit" = Option<u32>, Query)
    ),
    responses((status = 200, body = [HubFile]), Errors)
)]
pub async fn tree_of(
    State(app): State<App>,
    Parts((organization, name, _revision)): Parts<(String, String, String)>,
) -> Response {
    files(&app, &format!("{organization}/{name}"))
}

/// One file.
#[utoipa::path(
    get, path = "/{name}/resolve/{revision}/{file}", tag = "hub",
    params(("name" = String, Path), ("revision" = String, Path), ("file" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), Errors)
)]
pub async fn file(
    State(app): State<App>,
    Parts((name, _revision, file)): Parts<(String, String, String)>,
) -> Response {
    content(&app, &name, &file)
}

/// The same, of an organization.
#[utoipa::path(
    get, path = "/{organization}/{name}/resolve/{revision}/{file}", tag = "hub",
    params(("organization" = String, Path), ("name" = String, Path), ("revision" = String, Path), ("file" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), Errors)
)]
pub async fn file_of(
    State(app): State<App>,
    Parts((organization, name, _revision, file)): Parts<(String, String, String, String)>,
) -> Response {
    content(&app, &format!("{organization}/{name}"), &file)
}

fn repository(app: &App, name: &str) -> Response {
    if !is_served(app, name) {
        return unknown("RepoNotFound", "repository", name);
    }
    let sibling = |(name, _revision): (&str, &[u8])| HubSibling {
        rfilename: name.to_owned(),
    };
    let siblings = app.router.fleet().facts().files.iter().map(sibling).collect();
    Answer(HubRepository {
        id: name.to_owned(),
        model_id: name.to_owned(),
        sha: commit(app),
        private: false,
        gated: false,
        disabled: false,
        downloads: 0,
        likes: 0,
        tags: vec![],
        siblings,
    })
    .into_response()
}

fn files(app: &App, name: &str) -> Response {
    if !is_served(app, name) {
        return unknown("RepoNotFound", "repository", name);
    }
    let file = |(name, content): (&str, &[u8])| HubFile {
        r#type: "file",
        path: name.to_owned(),
        size: content.len() as u64,
        oid: Digest::of(content).to_string()[..COMMIT_DIGITS].to_owned(),
    };
    let files: Vec<HubFile> = app.router.fleet().facts().files.iter().map(file).collect();
    Answer(files).into_response()
}

fn content(app: &App, name: &str, file: &str) -> Response {
    if !is_served(app, name) {
        return unknown("RepoNotFound", "repository", name);
    }
    let Some(content) = app.router.fleet().facts().files.content(file) else {
        return unknown("EntryNotFound", "file", file);
    };
    let text = |text: String| HeaderValue::try_from(text).expect("hexadecimal digits");
    let headers = [
        (header::ETAG, text(format!("\"{}\"", Digest::of(content)))),
        (COMMIT, text(commit(app))),
        (header::CONTENT_LENGTH, HeaderValue::from(content.len())),
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        ),
    ];
    (headers, content.to_vec()).into_response()
}

fn is_served(app: &App, name: &str) -> bool {
    let config = app.router.config();
    name == config.served_model_name || config.other_model_names.iter().any(|other| other == name)
}

fn commit(app: &App) -> String {
    app.router.info().base_digest.to_string()[..COMMIT_DIGITS].to_owned()
}

fn unknown(code: &'static str, what: &'static str, id: &str) -> Response {
    let id = id.to_owned();
    let mut response = ApiError::Router(RouterError::Unknown { what, id }).into_response();
    response
        .headers_mut()
        .insert(ERROR_CODE, HeaderValue::from_static(code));
    response
}
