//! A stored file's bytes on their way out, checked as they go: the last of them are given out once the digest of all is right,
//! so whoever has a whole file has the one that was written. A file of one chunk is checked before its first byte.

use tandem_core::id::Hasher;
use tandem_store::{FileRow, Store, StoreError};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::Router;
use crate::api::{FileInfo, RouterError};
use crate::files;

const CHUNK_BYTES: usize = 1 << 20;

pub struct Content {
    store: Store,
    row: FileRow,
    file: File,
    /// Of what was read so far.
    hasher: Hasher,
    bytes: u64,
    is_over: bool,
}

impl Router {
    pub(crate) async fn file_content(&self, id: &str) -> Result<Content, RouterError> {
        let row = self.file_row(id).await?;
        let store = self.0.store.clone();
        let path = store.file_path(&row).await?;
        let mut file = File::open(&path).await.map_err(failed(id))?;
        file.set_max_buf_size(CHUNK_BYTES);
        Ok(Content {
            store,
            row,
            file,
            hasher: Hasher::default(),
            bytes: 0,
            is_over: false,
        })
    }
}

impl Content {
    pub fn info(&self) -> FileInfo {
        files::info(self.row.clone())
    }

    /// `None`: that was all.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, RouterError> {
        if self.is_over {
            return Ok(None);
        }
        let mut chunk = vec![];
        let mut reader = (&mut self.file).take(CHUNK_BYTES as u64);
        reader
            .read_to_end(&mut chunk)
            .await
            .map_err(failed(&self.row.id))?;
        self.hasher.update(&chunk);
        self.bytes += chunk.len() as u64;
        if chunk.len() < CHUNK_BYTES || self.bytes >= self.row.bytes {
            self.is_over = true;
            let sha256 = std::mem::take(&mut self.hasher).finish();
            self.store.check_file(&self.row, self.bytes, sha256).await?;
        }
        Ok(Some(chunk))
    }
}

fn failed(id: &str) -> impl FnOnce(std::io::Error) -> RouterError {
    let what = format!("reading file {id}");
    |source| RouterError::Store(StoreError::Io { what, source })
}
