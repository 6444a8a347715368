//! What older programs kept of saves: a record in each save's folder, which becomes a row. Not here: new ones.

use std::fs;
use std::path::{Path, PathBuf};

use super::files::files_below;
use super::{FOLDER, RECORD, SaveRecord, Taken, insert};
use crate::artifacts::parts_of;
use crate::error::io_at;
use crate::{Store, StoreError, folders};

impl Store {
    /// Of a store of before there were rows: what its records say.
    pub(crate) async fn take_in_saves(&self) -> Result<(), StoreError> {
        let (artifacts, is_record) = (self.artifacts(), |path: &Path| path.ends_with(RECORD));
        let mut found: Vec<(PathBuf, SaveRecord)> = vec![];
        let mut take = |path: PathBuf, text: &[u8]| match serde_json::from_slice(text) {
            Ok(record) => found.push((path, record)),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "a checkpoint of a training client is left out");
            }
        };
        match artifacts.remote() {
            None => {
                let root = artifacts.folders().root();
                for path in files_below(&root.join(FOLDER))? {
                    if is_record(&path) {
                        let text = fs::read(&path).map_err(io_at("reading", &path))?;
                        take(path.strip_prefix(root).unwrap_or(&path).to_owned(), &text);
                    }
                }
            }
            Some(remote) => {
                for key in remote.list(&[FOLDER]).await? {
                    let path: PathBuf = key.iter().collect();
                    if is_record(&path)
                        && let Some(text) = remote.read(&parts_of(&path)).await?
                    {
                        take(path, &text);
                    }
                }
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        let mut sizes = vec![];
        for (_, record) in &found {
            sizes.push(match &record.file {
                None => 0,
                Some(file) => self.state_bytes(&record.place.path().join(file)).await?,
            });
        }
        let mut tx = self.db.begin().await?;
        for ((_, record), bytes) in found.iter().zip(sizes) {
            insert(&mut tx, record, bytes, Taken::Stays).await?;
        }
        tx.commit().await?;
        for (path, _) in &found {
            match artifacts.remote() {
                None => folders::remove(&artifacts.below(path))?,
                Some(remote) => remote.delete(&parts_of(path)).await?,
            }
        }
        tracing::info!(
            saves = found.len(),
            "checkpoints of training clients are in the database now"
        );
        Ok(())
    }
}
