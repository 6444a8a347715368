//! A merged model on its way out: the served base with an adapter in it, computed while it is sent. Not here: the sums
//! (backend's `merge`), `tandem merge`.

use std::io::{self, Write};
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use tandem_backend::weights::{File, Merge};
use tandem_openapi::adapters::MergeAdapter;
use tandem_openapi::error::Errors;
use tandem_router::api::RouterError;
use tandem_text::tokenizer::gguf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::io::{ReaderStream, SyncIoBridge};
use tracing::warn;

use super::files::attachment;
use crate::app::App;
use crate::audit::Object;
use crate::error::{ApiError, invalid};
use crate::extract::{Json, Segment};
use crate::keys::Own;

/// Of what is sent, on its way from the thread that computes it.
const PIPE_BYTES: usize = 1 << 20;

/// What merging needs.
#[derive(Clone)]
pub struct Merges {
    /// Where the base's weights are; a router has none.
    base: Option<Arc<PathBuf>>,
    /// One at a time: it takes compute from answers.
    places: Arc<Semaphore>,
}

impl Merges {
    pub fn of(base: Option<PathBuf>) -> Merges {
        Merges {
            base: base.map(Arc::new),
            places: Arc::new(Semaphore::new(1)),
        }
    }
}

enum Merged {
    Folder(Vec<File>),
    Gguf(File),
}

/// The base model with an adapter in it, as `tandem merge` makes it: a folder in Hugging Face layout as a tar archive, or a
/// GGUF file. A name that holds `/` is percent-encoded. One is made at a time.
#[utoipa::path(
    post, path = "/v1/adapters/{name}/merge", tag = "adapters", params(("name" = String, Path)), request_body = MergeAdapter,
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), Errors)
)]
pub async fn merge(
    State(app): State<App>,
    Own(own): Own,
    Segment(name): Segment,
    Json(body): Json<MergeAdapter>,
) -> Result<(Extension<Object>, HeaderMap, Body), ApiError> {
    let is_gguf = match body.format.as_deref() {
        None | Some("safetensors") => false,
        Some("gguf") => true,
        Some(other) => {
            let message = format!("`format` is {other:?}; safetensors and gguf are written");
            return Err(invalid("format", message));
        }
    };
    let (card, adapter) = own.adapter_folder(&name).await?;
    let Some(base) = app.merges.base.clone() else {
        return Err(ApiError::CannotMerge(
            "a router holds no weights: download the adapter, and run `tandem merge` where the base is"
                .to_owned(),
        ));
    };
    let place = app.merges.places.clone().try_acquire_owned().map_err(|_| {
        RouterError::Conflict("Another model is being merged; ask again when it has been sent.".to_owned())
    })?;
    let file = name.replace('/', "--");
    let model = file.clone();
    let opened = tokio::task::spawn_blocking(move || open(&base, &adapter, &model, is_gguf)).await;
    let (merge, merged) = opened
        .map_err(|panic| ApiError::Internal(panic.to_string()))?
        .map_err(ApiError::CannotMerge)?;
    let mut headers = HeaderMap::new();
    let (kind, end) = match &merged {
        Merged::Folder(_) => ("application/x-tar", "tar"),
        Merged::Gguf(gguf) => {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(gguf.bytes));
            ("application/octet-stream", "gguf")
        }
    };
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_DISPOSITION, attachment(&format!("{file}.{end}")));
    let (reader, writer) = tokio::io::duplex(PIPE_BYTES);
    let writer = SyncIoBridge::new(writer);
    let made = card.created_at;
    tokio::task::spawn_blocking(move || {
        // A client that goes away is no fault.
        match send(&merge, &merged, writer, &file, made, place) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                warn!(%error, "a merged model breaks off");
            }
            _ => {}
        }
    });
    let body = Body::from_stream(ReaderStream::with_capacity(reader, PIPE_BYTES));
    Ok((Extension(Object(name)), headers, body))
}

/// All that can be wrong is found before the first byte is sent.
fn open(base: &FilePath, adapter: &FilePath, model: &str, is_gguf: bool) -> Result<(Merge, Merged), String> {
    let mut merge = Merge::open(base, adapter).map_err(|error| error.to_string())?;
    let merged = match is_gguf {
        false => Merged::Folder(merge.folder().map_err(|error| error.to_string())?),
        true => {
            let tokenizer = gguf::metadata(base, merge.vocab()).map_err(|error| error.to_string())?;
            Merged::Gguf(merge.gguf(model, tokenizer).map_err(|error| error.to_string())?)
        }
    };
    Ok((merge, merged))
}

/// `_place` is held as long as it is sent.
fn send(
    merge: &Merge,
    merged: &Merged,
    mut out: impl Write,
    top: &str,
    made: i64,
    _place: OwnedSemaphorePermit,
) -> io::Result<()> {
    match merged {
        Merged::Gguf(file) => {
            io::copy(&mut merge.read(file), &mut out)?;
            out.flush()
        }
        Merged::Folder(files) => {
            let mut archive = tar::Builder::new(out);
            for file in files {
                let mut header = tar::Header::new_gnu();
                header.set_size(file.bytes);
                header.set_mode(0o644);
                header.set_mtime(made.max(0) as u64);
                archive.append_data(&mut header, format!("{top}/{}", file.name), merge.read(file))?;
            }
            archive.into_inner()?.flush()
        }
    }
}
