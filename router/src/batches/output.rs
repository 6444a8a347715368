//! Answers of a batch as lines of its files, and the files. Not here: which answers there are.

use std::path::{Path, PathBuf};

use serde_json::json;
use tandem_core::id::{Digest, Hasher};
use tandem_store::{BatchLine, FileRow, NewFile, Tenant, ids};
use tokio::io::{AsyncWriteExt, BufWriter};

use super::{LineAnswer, LineError, OUTPUT_PURPOSE};
use crate::Router;
use crate::api::RouterError;

/// Answers that are read from the store at once.
const PAGE: u32 = 256;

/// What a request was answered, good or bad.
pub(crate) fn answered(line: u64, custom_id: &str, answer: &LineAnswer) -> BatchLine {
    let LineAnswer {
        status,
        request_id,
        body,
        try_again: _,
    } = answer;
    // The body is JSON already, and stays as it was sent.
    let answer = format!(
        r#"{{"id":{},"custom_id":{},"response":{{"status_code":{status},"request_id":{},"body":{body}}},"error":null}}"#,
        json!(ids::batch_request()),
        json!(custom_id),
        json!(request_id),
    );
    BatchLine {
        line,
        ok: (200..300).contains(status),
        answer,
    }
}

/// A request that was not asked.
pub(crate) fn refused(line: u64, custom_id: Option<&str>, error: &LineError) -> BatchLine {
    let LineError {
        code,
        message,
        line: _,
        param,
    } = error;
    let answer = json!({
        "id": ids::batch_request(), "custom_id": custom_id, "response": null,
        "error": {"code": code, "message": message, "line": line, "param": param},
    });
    BatchLine {
        line,
        ok: false,
        answer: answer.to_string(),
    }
}

/// The files of a batch's answers and of its errors, durable; their rows come with the end of the batch.
pub(crate) struct Files {
    pub output: Option<FileRow>,
    pub error: Option<FileRow>,
}

impl Files {
    pub async fn publish(
        router: &Router,
        id: &str,
        tenant: &Tenant,
        expires_after_s: Option<u64>,
    ) -> Result<Files, RouterError> {
        let (mut output, mut error) = (Lines::new(router), Lines::new(router));
        let mut after = 0;
        loop {
            let lines = router.0.store.batch_lines(id, after, PAGE).await?;
            for BatchLine { line, ok, answer } in &lines {
                match ok {
                    true => output.push(answer).await?,
                    false => error.push(answer).await?,
                }
                after = *line;
            }
            if lines.len() < PAGE as usize {
                break;
            }
        }
        let publish = async |lines: Lines, kind: &str| {
            let Some((staged, sha256)) = lines.finish().await? else {
                return Ok(None);
            };
            let file = NewFile {
                filename: &format!("{id}_{kind}.jsonl"),
                purpose: OUTPUT_PURPOSE,
                expires_after_s,
                tenant,
                sha256,
            };
            let row = router.0.store.publish_file(&staged.0, file).await?;
            Ok::<_, RouterError>(Some(row))
        };
        Ok(Files {
            output: publish(output, "output").await?,
            error: publish(error, "error").await?,
        })
    }

    /// When no row was committed for them.
    pub async fn discard(self, router: &Router) -> Result<(), RouterError> {
        for row in [self.output, self.error].into_iter().flatten() {
            router.0.store.discard_file(&row).await?;
        }
        Ok(())
    }
}

/// A staged file that grows line by line; there is none without a line.
struct Lines {
    staged: Staged,
    file: Option<BufWriter<tokio::fs::File>>,
    hasher: Hasher,
}

/// What is left of it goes when it is dropped.
struct Staged(PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // After a success it has moved away.
        drop(std::fs::remove_file(&self.0));
    }
}

impl Lines {
    fn new(router: &Router) -> Lines {
        Lines {
            staged: Staged(router.staging()),
            file: None,
            hasher: Hasher::default(),
        }
    }

    async fn push(&mut self, line: &str) -> Result<(), RouterError> {
        let path = &self.staged.0;
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let file = tokio::fs::File::create(path).await.map_err(failed(path))?;
                none.insert(BufWriter::new(file))
            }
        };
        for bytes in [line.as_bytes(), b"\n"] {
            self.hasher.update(bytes);
            file.write_all(bytes).await.map_err(failed(path))?;
        }
        Ok(())
    }

    async fn finish(self) -> Result<Option<(Staged, Digest)>, RouterError> {
        let Some(mut file) = self.file else {
            return Ok(None);
        };
        file.flush().await.map_err(failed(&self.staged.0))?;
        Ok(Some((self.staged, self.hasher.finish())))
    }
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> RouterError {
    let what = format!("writing {}", path.display());
    |source| RouterError::Store(tandem_store::StoreError::Io { what, source })
}
