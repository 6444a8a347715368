//! Files that come in parts: begun, filled, and completed into a file of the store, or cancelled. Not here: the parts' rows
//! (store), who may see them (`view`).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use md5::{Digest as _, Md5};
use tandem_core::id::{Digest, Hasher};
use tandem_store::{NewUpload, NoPart, PartRow, StoreError, UploadRow};

use crate::Router;
use crate::api::{Client, FileInfo, RouterError};
use crate::files::{self, FINE_TUNE};

/// OpenAI's limits.
const MAX_BYTES: u64 = 8 << 30;
pub const MAX_PART_BYTES: u64 = 64 << 20;
const MAX_PARTS: usize = 4096;
/// For how long parts may come.
const OPEN_S: u64 = 3600;
const COPY_BYTES: usize = 1 << 20;

/// What is to come.
#[derive(Clone, Debug)]
pub struct UploadRequest {
    pub filename: String,
    pub purpose: String,
    pub bytes: u64,
    pub expires_after_seconds: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct UploadInfo {
    pub id: String,
    pub created_at: i64,
    pub expires_at: i64,
    pub status: String,
    pub filename: String,
    pub purpose: String,
    pub bytes: u64,
    /// Once it is completed.
    pub file: Option<FileInfo>,
}

#[derive(Clone, Debug)]
pub struct PartInfo {
    pub id: String,
    pub created_at: i64,
    pub upload: String,
}

/// What may come of an upload, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct PartRoom {
    had: u64,
    announced: u64,
}

impl PartRoom {
    /// Whether a part may have so many bytes.
    pub fn check(self, bytes: u64) -> Result<(), RouterError> {
        match self.had.saturating_add(bytes) {
            all if all > self.announced => Err(too_large(all, self.announced)),
            _ => Ok(()),
        }
    }
}

impl Router {
    pub(crate) async fn create_upload(
        &self,
        request: UploadRequest,
        client: &Client,
    ) -> Result<UploadInfo, RouterError> {
        let UploadRequest {
            filename,
            purpose,
            bytes,
            expires_after_seconds,
        } = request;
        if !(1..=MAX_BYTES).contains(&bytes) {
            let message = format!("bytes must be between 1 and {MAX_BYTES}, got {bytes}");
            return Err(RouterError::invalid("bytes", message));
        }
        let filename = files::plain_name("filename", &filename)?;
        files::check_purpose(&purpose)?;
        files::check_expiry(expires_after_seconds)?;
        let row = self
            .0
            .store
            .insert_upload(NewUpload {
                filename: &filename,
                purpose: &purpose,
                bytes,
                open_s: OPEN_S,
                expires_after_s: expires_after_seconds,
                tenant: &client.tenant,
                limit: client.stored_bytes(),
            })
            .await?;
        Ok(info(row, None))
    }

    pub(crate) async fn upload_row(&self, id: &str) -> Result<UploadRow, RouterError> {
        let row = self.0.store.upload(id).await?;
        row.ok_or_else(|| unknown("upload", id))
    }

    /// The staged bytes are taken over.
    pub(crate) async fn add_part(
        &self,
        upload: &UploadRow,
        staged: &Path,
        sha256: Digest,
    ) -> Result<PartInfo, RouterError> {
        let bytes = tokio::fs::metadata(staged).await.map_err(failed(staged))?.len();
        self.room_for_part(upload).await?.check(bytes)?;
        let store = &self.0.store;
        // Others may have come since.
        match store.add_part(upload, staged, sha256, MAX_PARTS).await? {
            Ok(part) => Ok(PartInfo {
                id: part.id,
                created_at: part.created_at,
                upload: part.upload,
            }),
            Err(NoPart::Ended) => Err(ended(&self.upload_row(&upload.id).await?)),
            Err(NoPart::TooMany) => Err(too_many()),
            Err(NoPart::TooLarge { had }) => Err(too_large(had + bytes, upload.bytes)),
        }
    }

    /// Before a part is read: what others left of what was announced.
    pub(crate) async fn room_for_part(&self, upload: &UploadRow) -> Result<PartRoom, RouterError> {
        must_be_pending(upload)?;
        let parts = self.0.store.parts(&upload.id).await?;
        match parts.len() < MAX_PARTS {
            false => Err(too_many()),
            true => Ok(PartRoom {
                had: parts.iter().map(|part| part.bytes).sum(),
                announced: upload.bytes,
            }),
        }
    }

    /// `md5`: of the whole file, in hexadecimal digits.
    pub(crate) async fn complete_upload(
        &self,
        upload: &UploadRow,
        part_ids: &[String],
        md5: Option<&str>,
    ) -> Result<UploadInfo, RouterError> {
        must_be_pending(upload)?;
        let store = &self.0.store;
        let mut parts: HashMap<String, PartRow> = store
            .parts(&upload.id)
            .await?
            .into_iter()
            .map(|part| (part.id.clone(), part))
            .collect();
        let mut ordered = Vec::with_capacity(part_ids.len());
        for id in part_ids {
            let part = parts.remove(id).ok_or_else(|| {
                let message = format!("{id:?} is no part of this upload, or is named twice");
                RouterError::invalid("part_ids", message)
            })?;
            ordered.push(part);
        }
        let bytes: u64 = ordered.iter().map(|part| part.bytes).sum();
        if bytes != upload.bytes {
            let message = format!(
                "the parts that are named have {bytes} bytes together, the upload was announced with {}",
                upload.bytes
            );
            return Err(RouterError::invalid("part_ids", message));
        }
        let mut paths = Vec::with_capacity(ordered.len());
        for part in &ordered {
            paths.push(store.part_path(part).await?);
        }
        let staged = Staged(self.staging());
        let target = staged.0.clone();
        let joined = tokio::task::spawn_blocking(move || join(&paths, &target)).await;
        let joined = match joined {
            Ok(joined) => joined.map_err(failed(&staged.0))?,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        for (part, (bytes, sha256)) in ordered.iter().zip(&joined.parts) {
            part.check(*bytes, *sha256)?;
        }
        if let Some(md5) = md5.filter(|md5| !md5.eq_ignore_ascii_case(&joined.md5)) {
            let md5: String = md5.chars().take(64).collect();
            let message = format!(
                "the parts together have the MD5 {}, not {md5:?}: send them again",
                joined.md5
            );
            return Err(RouterError::invalid("md5", message));
        }
        if upload.purpose == FINE_TUNE {
            let tenant = upload.tenant.parse().unwrap_or_default();
            let (path, name) = (staged.0.clone(), upload.filename.clone());
            self.check_training_file(path, name, &tenant).await?;
        }
        match store.complete_upload(upload, &staged.0, joined.sha256).await? {
            Some(file) => {
                tracing::info!(file = %file.id, bytes, purpose = upload.purpose, "file stored");
                let row = UploadRow {
                    status: "completed".to_owned(),
                    ..upload.clone()
                };
                Ok(info(row, Some(files::info(file))))
            }
            None => Err(ended(&self.upload_row(&upload.id).await?)),
        }
    }

    pub(crate) async fn cancel_upload(&self, upload: &UploadRow) -> Result<UploadInfo, RouterError> {
        must_be_pending(upload)?;
        match self.0.store.end_upload(&upload.id, "cancelled").await? {
            true => Ok(info(self.upload_row(&upload.id).await?, None)),
            false => Err(ended(&self.upload_row(&upload.id).await?)),
        }
    }
}

struct Joined {
    /// Of each part, how many bytes it has and their digest.
    parts: Vec<(u64, Digest)>,
    /// Of the whole.
    md5: String,
    sha256: Digest,
}

/// All of them, one behind the other.
fn join(parts: &[PathBuf], target: &Path) -> io::Result<Joined> {
    let mut file = File::create(target)?;
    let (mut md5, mut whole) = (Md5::new(), Hasher::default());
    let mut read = vec![];
    let mut buffer = vec![0; COPY_BYTES];
    for part in parts {
        let mut input = File::open(part)?;
        let (mut bytes, mut of_part) = (0, Hasher::default());
        loop {
            let n = input.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            md5.update(&buffer[..n]);
            whole.update(&buffer[..n]);
            of_part.update(&buffer[..n]);
            file.write_all(&buffer[..n])?;
            bytes += n as u64;
        }
        read.push((bytes, of_part.finish()));
    }
    file.flush()?;
    Ok(Joined {
        parts: read,
        md5: md5.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
        sha256: whole.finish(),
    })
}

/// What is left of it goes when it is dropped.
struct Staged(PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // After a success it has moved away.
        drop(std::fs::remove_file(&self.0));
    }
}

fn must_be_pending(upload: &UploadRow) -> Result<(), RouterError> {
    match upload.status.as_str() {
        "pending" => Ok(()),
        _ => Err(ended(upload)),
    }
}

fn too_large(bytes: u64, announced: u64) -> RouterError {
    let message = format!("the parts have {bytes} bytes together, the upload was announced with {announced}");
    RouterError::invalid("data", message)
}

fn too_many() -> RouterError {
    let message = format!("an upload has at most {MAX_PARTS} parts: send larger ones");
    RouterError::invalid("data", message)
}

fn ended(upload: &UploadRow) -> RouterError {
    RouterError::invalid(
        "upload_id",
        format!("upload {} is {}: begin another", upload.id, upload.status),
    )
}

pub(crate) fn unknown(what: &'static str, id: &str) -> RouterError {
    RouterError::Unknown {
        what,
        id: id.to_owned(),
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> RouterError {
    let what = format!("reading and writing parts of {}", path.display());
    |source| RouterError::Store(StoreError::Io { what, source })
}

fn info(row: UploadRow, file: Option<FileInfo>) -> UploadInfo {
    let UploadRow {
        id,
        tenant: _,
        created_at,
        expires_at,
        status,
        filename,
        purpose,
        bytes,
        expires_after_s: _,
        file: _,
    } = row;
    UploadInfo {
        id,
        created_at,
        expires_at,
        status,
        filename,
        purpose,
        bytes,
        file,
    }
}
