//! Adapters at run time: vLLM's two routes, whose success is plain text, and the way out.

use std::io;
use std::path::Path;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use serde_json::Value;
use tandem_openapi::adapters::{LoadLoraAdapter, UnloadLoraAdapter};
use tandem_openapi::error::Errors;
use tandem_router::LoadMode;
use tandem_router::View;
use tandem_router::api::{AdapterSource, Checkpoint, Job, ModelKind, RouterError};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use super::files::attachment;
use super::to_the_end;
use crate::app::App;
use crate::audit::Object;
use crate::convert::card::{self, Origin};
use crate::error::ApiError;
use crate::extract::{Json, Segment};
use crate::hub::{self, Content, Found};
use crate::keys::Own;

/// Serve a PEFT folder of the server's machine, or an adapter's name on the hub, under a name.
#[utoipa::path(
    post, path = "/v1/load_lora_adapter", tag = "adapters", request_body = LoadLoraAdapter,
    responses((status = 200, body = String, content_type = "text/plain"), Errors)
)]
pub async fn load(
    State(app): State<App>,
    Own(own): Own,
    Json(body): Json<LoadLoraAdapter>,
) -> Result<(Extension<Object>, String), ApiError> {
    let LoadLoraAdapter {
        lora_name,
        lora_path,
        load_inplace,
    } = body;
    let mode = match load_inplace {
        Some(true) => LoadMode::Replace,
        _ => LoadMode::New,
    };
    let (roots, name) = (app.lora_roots.clone(), lora_name.clone());
    to_the_end(async move {
        let find = move || match hub::find(Path::new(&lora_path), None, Content::Adapter)? {
            Found {
                folder,
                name: Some(_),
            } => Ok(folder),
            Found { folder, name: None } => roots.resolve(&folder),
        };
        let found = tokio::task::spawn_blocking(find).await;
        let folder = found.map_err(|panic| ApiError::Internal(panic.to_string()))??;
        Ok::<_, ApiError>(own.load_adapter(&name, &folder, mode).await?)
    })
    .await?;
    let said = format!("Success: LoRA adapter '{lora_name}' added successfully.");
    Ok((Extension(Object(lora_name)), said))
}

/// Forget a name. Requests that run keep what they started with.
#[utoipa::path(
    post, path = "/v1/unload_lora_adapter", tag = "adapters", request_body = UnloadLoraAdapter,
    responses((status = 200, body = String, content_type = "text/plain"), Errors)
)]
pub async fn unload(
    Own(own): Own,
    Json(body): Json<UnloadLoraAdapter>,
) -> Result<(Extension<Object>, String), ApiError> {
    let UnloadLoraAdapter { lora_name } = body;
    let name = lora_name.clone();
    to_the_end(async move { own.unload_adapter(&name).await }).await?;
    let said = format!("Success: LoRA adapter '{lora_name}' removed successfully.");
    Ok((Extension(Object(lora_name)), said))
}

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// Checkpoints that are looked at in one go.
const PAGE: u32 = 100;

/// An adapter's PEFT folder as a tar archive, with a model card of what is on record of it. A name that holds `/` is
/// percent-encoded.
#[utoipa::path(
    get, path = "/v1/adapters/{name}/download", tag = "adapters", params(("name" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/x-tar"), Errors)
)]
pub async fn download(Own(own): Own, Segment(name): Segment) -> Result<Response, ApiError> {
    let (card, folder) = own.clone().adapter_folder(&name).await?;
    let origin = match &card.kind {
        ModelKind::Adapter {
            source: AdapterSource::Job { job, step },
            ..
        } => match own.clone().job(job).await {
            Ok(job) => {
                let mut training_files = vec![];
                for id in &job.request.training_file.0 {
                    training_files.push(own.clone().file(id).await.ok());
                }
                let checkpoint = checkpoint(own, &job, *step).await?;
                Some(Origin {
                    job,
                    training_files,
                    checkpoint,
                })
            }
            Err(RouterError::UnknownJob(_)) => None,
            Err(error) => return Err(error.into()),
        },
        _ => None,
    };
    // What is open can be read to its end, whoever deletes the adapter meanwhile.
    let open = move || {
        let config = std::fs::read(folder.join(CONFIG))?;
        Ok((config, std::fs::File::open(folder.join(TENSORS))?))
    };
    let opened = tokio::task::spawn_blocking(open).await;
    let opened: io::Result<_> = opened.map_err(|panic| ApiError::Internal(panic.to_string()))?;
    let (config, tensors) =
        opened.map_err(|error| ApiError::Internal(format!("cannot open adapter {name}: {error}")))?;
    let readme = card::readme(
        &card,
        &serde_json::from_slice(&config).unwrap_or(Value::Null),
        origin.as_ref(),
    );
    let file = name.replace('/', "--");
    let archive = Archive {
        top: &file,
        made: card.created_at,
    };
    let bytes = tensors.metadata().map(|metadata| metadata.len());
    let bytes = bytes.map_err(|error| ApiError::Internal(format!("cannot read adapter {name}: {error}")))?;
    let (head, tail) = archive
        .around(&readme, &config, bytes)
        .map_err(|error| ApiError::Internal(format!("cannot archive adapter {name}: {error}")))?;
    // Read as it is sent: nobody waits for a client that does not read.
    let tensors = ReaderStream::new(tokio::fs::File::from_std(tensors).take(bytes));
    let ends = |bytes: Vec<u8>| stream::once(async { io::Result::Ok(Bytes::from(bytes)) });
    let length = head.len() as u64 + bytes + tail.len() as u64;
    let body = Body::from_stream(ends(head).chain(tensors).chain(ends(tail)));
    let mut headers = HeaderMap::new();
    let kind = HeaderValue::from_static("application/x-tar");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CONTENT_DISPOSITION, attachment(&format!("{file}.tar")));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    Ok((headers, body).into_response())
}

/// That of `step`, or a job's last.
async fn checkpoint(own: View, job: &Job, step: Option<u64>) -> Result<Option<Checkpoint>, RouterError> {
    let mut after = None;
    loop {
        // Newest first.
        let page = own
            .clone()
            .checkpoints(job.id.as_str(), after.as_deref(), PAGE)
            .await?;
        let last = page.data.last().map(|checkpoint| checkpoint.id.clone());
        let is_it = |checkpoint: &Checkpoint| step.is_none_or(|step| step == checkpoint.step);
        let found = page.data.into_iter().find(is_it);
        if found.is_some() || !page.has_more {
            return Ok(found);
        }
        after = last;
    }
}

/// The folder `top`, made at `made` (Unix seconds).
struct Archive<'a> {
    top: &'a str,
    made: i64,
}

impl Archive<'_> {
    /// What stands before so many bytes of tensors, and behind them.
    fn around(&self, readme: &str, config: &[u8], tensors_bytes: u64) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let mut archive = tar::Builder::new(vec![]);
        // Of the tensors the head alone.
        for (name, bytes, content) in [
            ("README.md", readme.len() as u64, readme.as_bytes()),
            (CONFIG, config.len() as u64, config),
            (TENSORS, tensors_bytes, &[]),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes);
            header.set_mode(0o644);
            header.set_mtime(self.made.max(0) as u64);
            archive.append_data(&mut header, format!("{}/{name}", self.top), content)?;
        }
        let head = archive.get_ref().clone();
        // Whole blocks, and two empty ones.
        let filled = (tensors_bytes % TAR_BLOCK) as usize;
        let padding = (TAR_BLOCK as usize - filled) % TAR_BLOCK as usize;
        Ok((head, vec![0; padding + 2 * TAR_BLOCK as usize]))
    }
}

const TAR_BLOCK: u64 = 512;
