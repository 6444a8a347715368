//! What must survive a restart: metadata in a database, artifacts as files. By default SQLite and a folder, of one
//! process; Postgres and a bucket (or a shared folder) when several routers work on the same jobs. Rows come out as plain
//! structs and all SQL stays in here. Not here: what a status means, names' rules, engines.
//!
//! ```text
//! <data_dir>/lock             held while a server uses the folder
//!            tandem.db        SQLite, WAL, synchronous=FULL (not with Postgres)
//!            files/<id>       uploaded and result files
//!            adapters/<digest>/   immutable PEFT folders
//!            jobs/<id>/       datasets of a job that has not ended, and a folder for each of its lives
//!            staging/         being written; emptied at start
//! ```
//! With an artifact store elsewhere (`remote`), files, adapters and jobs here are its cache: all of it may be lost.
//! Bytes are published (fsync, rename, fsync of the folder) before the row that names them is committed, and a row is
//! deleted before its bytes: a kill leaves at most bytes without a row, which the next start removes. Of a place that
//! others share only rows say what may go: adapters without a name, a while after they were last published.

mod artifacts;
mod changes;
mod db;
mod error;
mod files;
mod folders;
mod health;
pub mod ids;
mod jobs;
mod lease;
mod names;
mod remote;
#[cfg(test)]
mod tests;

pub use artifacts::Artifacts;
pub use changes::Changes;
pub use error::StoreError;
pub use files::{FileRow, Order};
pub use folders::Placement;
pub use health::{PROBE_PERIOD, Part};
pub use jobs::{
    Changed, CheckpointRow, EventRow, JobChange, JobRow, MetadataFilter, NewCheckpoint, NewEvent, NewJob,
};
pub use lease::{LEASE, Lease, Renewal};
pub use names::{NameRow, NewName, Source};
pub use remote::use_ring;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use db::{Database, Dialect};
use folders::{Folders, Tenancy};

/// Where a server keeps what must survive.
#[derive(Clone, Debug)]
pub struct Places {
    pub data_dir: PathBuf,
    /// `postgres://...`; `None`: SQLite in the data folder.
    pub database_url: Option<String>,
    /// `s3://bucket/prefix`, `file:///folder` or a folder; `None`: the data folder.
    pub artifact_url: Option<String>,
    /// How long a holder of a job that died keeps others waiting: [`LEASE`].
    pub lease: Duration,
}

impl Places {
    /// All in one folder, for one process.
    pub fn local(data_dir: impl Into<PathBuf>) -> Places {
        Places {
            data_dir: data_dir.into(),
            database_url: None,
            artifact_url: None,
            lease: LEASE,
        }
    }
}

/// One open store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    db: Database,
    artifacts: Artifacts,
    /// This process, among those that hold leases.
    owner: String,
    lease_time: Duration,
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
    /// Open or make it, bring its tables up to date, and clear away what a killed process left half done.
    pub async fn open(places: &Places) -> Result<Store, StoreError> {
        let Places {
            data_dir,
            database_url,
            artifact_url,
            lease,
        } = places;
        if let (Some(url), None) = (database_url, artifact_url) {
            return Err(StoreError::Url {
                url: db::without_password(url),
                why: "a database that several routers use needs an artifact store that they all see (--artifact-url)"
                    .to_owned(),
            });
        }
        let folders = Folders::make(data_dir, Tenancy::Owner)?;
        let lock = Arc::new(folders.lock()?);
        let db = match database_url {
            None => Database::file(&folders.database()).await?,
            Some(url) => Database::server(url).await?,
        };
        let store = Store {
            db,
            artifacts: Artifacts::over(artifact_url.as_deref(), folders)?,
            owner: ids::random(),
            lease_time: *lease,
            _lock: lock,
        };
        store.sweep().await?;
        Ok(store)
    }

    /// Wait for open queries and close the database.
    pub async fn close(&self) {
        self.db.close().await;
    }

    /// Whether others write to the database too.
    pub fn is_shared(&self) -> bool {
        self.db.dialect == Dialect::Postgres
    }

    /// Whether a part is elsewhere, and may be away while this process is well.
    pub fn is_remote(&self) -> bool {
        self.is_shared() || self.artifacts.is_cached()
    }

    /// Ask the parts that are elsewhere whether they answer; [`Store::away`] then says so.
    pub async fn probe(&self) {
        futures::future::join(self.db.probe(), self.artifacts.probe()).await;
    }

    /// The parts that did not answer the last probe.
    pub fn away(&self) -> Vec<Part> {
        let away = |&part: &Part| match part {
            Part::Database => self.db.health.why().is_some(),
            Part::Storage => self.artifacts.is_away(),
        };
        Part::ALL.into_iter().filter(away).collect()
    }

    pub fn artifacts(&self) -> &Artifacts {
        &self.artifacts
    }

    /// A fresh path in the staging folder.
    pub fn staging(&self) -> PathBuf {
        self.artifacts.folders().staging()
    }

    /// The data folder is ours alone. What it holds and no row names goes; a cache keeps what is still named, except for
    /// jobs, whose states are elsewhere.
    async fn sweep(&self) -> Result<(), StoreError> {
        if !self.is_shared() {
            self.clear_leases().await?;
            self.delete_unnamed_adapters().await?;
        }
        let files = self.ids("SELECT id FROM files").await?;
        let adapters = self.ids("SELECT digest FROM adapters").await?;
        let jobs = match self.artifacts.is_cached() {
            true => std::collections::HashSet::new(),
            false => self.ids("SELECT id FROM jobs WHERE finished_at IS NULL").await?,
        };
        let folders = self.artifacts.folders().clone();
        blocking(move || folders.sweep(&files, &adapters, &jobs)).await
    }

    async fn ids(&self, sql: &'static str) -> Result<std::collections::HashSet<String>, StoreError> {
        Ok(sqlx::query_scalar(sql)
            .fetch_all(self.db.pool()?)
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

/// A number that was unsigned when it was written.
pub(crate) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
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
