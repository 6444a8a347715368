//! Uploaded and result files. Training files are checked row by row before they exist.

use std::io;
use std::path::PathBuf;

use tandem_store::{FileRow, NewFile, StoreError, Tenant};
use tandem_text::dataset::{self, BadLine, Source};

use crate::Router;
use crate::api::{Client, FileInfo, Order, Page, RouterError, Upload};

pub(crate) const FINE_TUNE: &str = "fine-tune";
const MAX_FILENAME_BYTES: usize = 255;
const MAX_PURPOSE_BYTES: usize = 64;
const EXPIRES_AFTER_S: std::ops::RangeInclusive<u64> = 3600..=2_592_000;

impl Router {
    /// A fresh path to write an upload to, for [`Upload::staged`]. Remove it when the upload breaks off; what a kill
    /// leaves there goes at the next start.
    pub fn staging(&self) -> PathBuf {
        self.0.store.staging()
    }

    pub(crate) async fn create_file(&self, upload: Upload, client: &Client) -> Result<FileInfo, RouterError> {
        let staged = upload.staged.clone();
        let created = self.take_upload(upload, client).await;
        if created.is_err() {
            // That it is gone already is fine.
            let _ = tokio::fs::remove_file(&staged).await;
        }
        created
    }

    async fn take_upload(&self, upload: Upload, client: &Client) -> Result<FileInfo, RouterError> {
        let tenant = &client.tenant;
        let Upload {
            staged,
            bytes,
            sha256,
            filename,
            purpose,
            expires_after_seconds,
        } = upload;
        let filename = plain_name("file", &filename)?;
        check_purpose(&purpose)?;
        check_expiry(expires_after_seconds)?;
        if purpose == FINE_TUNE {
            self.check_training_file(staged.clone(), filename.clone(), tenant)
                .await?;
        }
        let file = NewFile {
            filename: &filename,
            purpose: &purpose,
            expires_after_s: expires_after_seconds,
            tenant,
            sha256,
        };
        let row = self
            .0
            .store
            .add_file(&staged, file, client.stored_bytes())
            .await?;
        tracing::info!(file = %row.id, bytes, purpose, "file stored");
        Ok(info(row))
    }

    pub(crate) async fn check_training_file(
        &self,
        staged: PathBuf,
        name: String,
        tenant: &Tenant,
    ) -> Result<(), RouterError> {
        let source = Source { path: staged, name };
        let turn = self.0.readers.wait(tenant).await;
        let checked = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            dataset::check(&source).map(drop)
        });
        match checked.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(bad)) => Err(match passing(&bad) {
                Some(error) => error.into(),
                // OpenAI sends neither a param nor a code with these.
                None => RouterError::Invalid {
                    param: None,
                    code: None,
                    message: bad.to_string(),
                },
            }),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    pub(crate) async fn files(
        &self,
        tenant: Option<&Tenant>,
        purpose: Option<&str>,
        after: Option<&str>,
        limit: u32,
        order: Order,
    ) -> Result<Page<FileInfo>, RouterError> {
        let rows = self.0.store.files(tenant, purpose, after, limit, order).await?;
        Ok(Page {
            data: rows.rows.into_iter().map(info).collect(),
            has_more: rows.has_more,
        })
    }

    pub(crate) async fn delete_file(&self, id: &str) -> Result<(), RouterError> {
        self.file_row(id).await?;
        match self.0.store.delete_file(id).await? {
            true => Ok(()),
            false => Err(RouterError::UnknownFile(id.to_owned())),
        }
    }

    pub(crate) async fn file_row(&self, id: &str) -> Result<FileRow, RouterError> {
        self.0
            .store
            .file(id)
            .await?
            .ok_or_else(|| RouterError::UnknownFile(id.to_owned()))
    }
}

pub(crate) fn check_purpose(purpose: &str) -> Result<(), RouterError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if purpose.is_empty() || purpose.len() > MAX_PURPOSE_BYTES || !purpose.bytes().all(plain) {
        let message = format!(
            "'{}' is not a purpose: 'fine-tune' is one",
            purpose.escape_debug()
        );
        return Err(RouterError::invalid("purpose", message));
    }
    Ok(())
}

pub(crate) fn check_expiry(seconds: Option<u64>) -> Result<(), RouterError> {
    match seconds.filter(|s| !EXPIRES_AFTER_S.contains(s)) {
        None => Ok(()),
        Some(s) => {
            let (low, high) = (EXPIRES_AFTER_S.start(), EXPIRES_AFTER_S.end());
            let message = format!("expires_after[seconds] must be between {low} and {high}, got {s}");
            Err(RouterError::invalid("expires_after", message))
        }
    }
}

/// Where nothing is wrong with the file, what was with the machine.
pub(crate) fn passing(bad: &BadLine) -> Option<StoreError> {
    let source = io::Error::from_raw_os_error(bad.passing?);
    let what = "reading an uploaded file".to_owned();
    Some(StoreError::Io { what, source })
}

/// The last component of what a client called its file: only a label, but others may save under it.
pub(crate) fn plain_name(param: &str, filename: &str) -> Result<String, RouterError> {
    let last = filename.rsplit(['/', '\\']).next().unwrap_or_default();
    let wrong = match last {
        "" | "." | ".." => "names no file".to_owned(),
        name if name.len() > MAX_FILENAME_BYTES => {
            format!(
                "has {} bytes, at most {MAX_FILENAME_BYTES} are allowed",
                name.len()
            )
        }
        name if name.chars().any(char::is_control) => "has a control character".to_owned(),
        name => return Ok(name.to_owned()),
    };
    let shown: String = filename.escape_debug().take(100).collect();
    Err(RouterError::invalid(
        param,
        format!("The filename '{shown}' {wrong}"),
    ))
}

pub(crate) fn info(row: FileRow) -> FileInfo {
    let FileRow {
        id,
        bytes,
        created_at,
        expires_at,
        filename,
        purpose,
        tenant: _,
        sha256: _,
    } = row;
    FileInfo {
        id,
        bytes,
        created_at,
        expires_at,
        filename,
        purpose,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_their_folders_and_tricks_are_refused() {
        let cases = [
            ("données été.jsonl", Some("données été.jsonl")),
            ("../../etc/passwd", Some("passwd")),
            ("C:\\data\\rows.jsonl", Some("rows.jsonl")),
            ("..", None),
            ("a/..", None),
            ("", None),
            ("rows/", None),
            ("a\u{0}b", None),
            ("a\nb", None),
        ];
        for (given, expected) in cases {
            assert_eq!(plain_name("file", given).ok().as_deref(), expected, "{given:?}");
        }
        assert!(plain_name("file", &"x".repeat(256)).is_err());
    }

    #[test]
    fn too_many_open_files_are_no_fault_of_a_file() {
        let bad = |passing| BadLine {
            line: 1,
            message: String::new(),
            passing,
        };
        assert!(passing(&bad(Some(24))).is_some_and(|error| error.away().is_some()));
        assert!(passing(&bad(None)).is_none());
    }
}
