//! What must survive a restart: metadata in SQLite, artifacts in folders beside it. Rows come out as plain structs and
//! all SQL stays in here, which is the seam for Postgres and S3. Not here: what a status means, names' rules, engines.
//!
//! ```text
//! <data_dir>/lock             held while a server uses the folder
//!            tandem.db        SQLite, WAL, synchronous=FULL
//!            files/<id>       uploaded and result files
//!            adapters/<digest>/   immutable PEFT folders
//!            jobs/<id>/       datasets and state of a job that has not ended
//!            staging/         being written; emptied at start
//! ```
//! Bytes are published (fsync, rename, fsync of the folder) before the row that names them is committed, and a row is
//! deleted before its bytes: a kill leaves at most bytes without a row, which the next start removes.

mod artifacts;
mod db;
mod error;
mod files;
pub mod ids;
mod jobs;
mod names;
#[cfg(test)]
mod tests;

pub use artifacts::Placement;
pub use error::StoreError;
pub use files::{FileRow, Order};
pub use jobs::{
    Changed, CheckpointRow, EventRow, JobChange, JobRow, MetadataFilter, NewCheckpoint, NewEvent, NewJob,
};
pub use names::{NameRow, NewName, Source};

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use artifacts::Folders;
use sqlx::SqlitePool;

/// One open data folder. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: SqlitePool,
    folders: Arc<Folders>,
    /// Released by the system when the last clone goes, however the process ends.
    _lock: Arc<File>,
}

/// Rows of one page, and whether others follow.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows<T> {
    pub rows: Vec<T>,
    pub has_more: bool,
}

impl Store {
    /// Open or make `data_dir`, bring its tables up to date, and clear away what a killed process left half done.
    pub async fn open(data_dir: &Path) -> Result<Store, StoreError> {
        let folders = Arc::new(Folders::make(data_dir)?);
        let lock = Arc::new(folders.lock()?);
        let pool = db::open(&folders.database()).await?;
        let store = Store {
            pool,
            folders,
            _lock: lock,
        };
        store.sweep().await?;
        Ok(store)
    }

    /// Wait for open queries and close the database.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// A fresh path in the staging folder.
    pub fn staging(&self) -> PathBuf {
        self.folders.staging()
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        self.remove_unnamed_adapter_rows().await?;
        let files = self.ids("SELECT id FROM files").await?;
        let adapters = self.ids("SELECT digest FROM adapters").await?;
        let jobs = self.ids("SELECT id FROM jobs WHERE finished_at IS NULL").await?;
        let folders = self.folders.clone();
        blocking(move || folders.sweep(&files, &adapters, &jobs)).await
    }

    async fn ids(&self, sql: &'static str) -> Result<std::collections::HashSet<String>, StoreError> {
        Ok(sqlx::query_scalar(sql)
            .fetch_all(&self.pool)
            .await?
            .into_iter()
            .collect())
    }
}

/// Seconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).expect("the year is below 292 billion")
}

/// Run file work off the async threads; a panic in it goes on in the caller.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => panic!("the runtime ended under file work: {error}"),
        },
    }
}
