//! What must survive a restart: metadata in a database, artifacts as files. By default SQLite and a folder, of one
//! process; Postgres and a bucket (or a shared folder) when several routers work on the same jobs. Rows come out as plain
//! structs and all SQL stays in here. Not here: what a status means, names' rules, engines.
//!
//! ```text
//! <data_dir>/lock             held while a server uses the folder
//!            store.json       which database belongs to these artifacts
//!            tandem.db        SQLite, WAL, synchronous=FULL (not with Postgres)
//!            files/<id>       uploaded and result files
//!            adapters/<digest>/   immutable PEFT folders
//!            jobs/<id>/       datasets of a job that has not ended, and a folder for each of its lives
//!            tinker/<run>/       states that clients which train call by call have saved
//!            staging/         being written; emptied at start
//!            reserve          room for the database, given to it when the disk is full
//!            quarantine/      what no row spoke of at a start that was told to go on
//! ```
//! With an artifact store elsewhere (`remote`), files, adapters and jobs here are its cache: all of it may be lost.
//! Bytes are published (fsync, rename, fsync of the folder) before the row that names them is committed, and a row is
//! deleted before its bytes; a row of another kind (`loose_files`, an adapter without a name) knows of them before they are
//! there and until they are gone. So a kill leaves only what the database knows to be half done, which the next start
//! removes, and bytes that no row speaks of show that the database is not theirs: they are never removed.

mod artifacts;
mod backup;
mod batches;
mod changes;
mod db;
mod error;
mod files;
mod folders;
mod health;
mod identity;
pub mod ids;
mod jobs;
mod keys;
mod lease;
mod leftovers;
mod names;
mod quota;
mod remote;
mod responses;
mod room;
mod saves;
mod storage;
#[cfg(test)]
mod tests;
mod uploads;

pub use artifacts::Artifacts;
pub use backup::{Summary, backup, restore};
pub use batches::{BatchChange, BatchEnd, BatchLine, BatchRow, NewBatch, Tally};
pub use changes::Changes;
pub use error::StoreError;
pub use files::{FileRow, NewFile, Order};
pub use folders::Placement;
pub use health::{PROBE_PERIOD, Part};
pub use identity::Strays;
pub use jobs::{
    Asked, Changed, CheckpointRow, EventRow, JobChange, JobRow, MetadataFilter, NewCheckpoint, NewEvent,
    NewJob,
};
pub use keys::{
    KeyRow, Keys, Limits, NewKey, NotARole, NotATenant, PREFIX as KEY_PREFIX, Role, Tenant, hash as key_hash,
};
pub use lease::{LEASE, Lease, Renewal};
pub use names::{NameRow, NewName, Source, names_in};
pub use quota::Quota;
pub use remote::use_ring;
pub use responses::{Keep, ResponseRow};
pub use saves::{SaveKind, SavePlace, SaveRecord};
pub use storage::{Storage, StorageExceeded};
pub use uploads::{NewUpload, NoPart, PartRow, UploadRow};

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use db::{Database, Dialect};
use folders::{Folders, Tenancy};
use leftovers::{Known, Leftovers};
use room::Room;

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
    pub strays: Strays,
}

impl Places {
    /// All in one folder, for one process.
    pub fn local(data_dir: impl Into<PathBuf>) -> Places {
        Places {
            data_dir: data_dir.into(),
            database_url: None,
            artifact_url: None,
            lease: LEASE,
            strays: Strays::default(),
        }
    }
}

/// How often, and after how long, what is to be written on a full disk is tried again.
const RESERVE_TRIES: u32 = 10;
const RESERVE_RETRY: Duration = Duration::from_millis(100);

/// One open store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    db: Database,
    artifacts: Artifacts,
    room: Room,
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
            strays,
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
        let room = Room::of(folders.root());
        blocking({
            let room = room.clone();
            move || room.look()
        })
        .await;
        let artifacts = Artifacts::over(artifact_url.as_deref(), folders)?;
        let db = match database_url {
            None => Database::file(&identity::database_file(&artifacts, *strays).await?).await?,
            Some(url) => Database::server(url).await?,
        };
        let store = Store {
            db,
            artifacts,
            room,
            owner: ids::random(),
            lease_time: *lease,
            _lock: lock,
        };
        let strays = store.identify(*strays).await?;
        store.clear_up(strays).await?;
        store.measure_adapters().await?;
        store.take_in_saves().await?;
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
            Part::Room => self.room.why().is_some(),
        };
        Part::ALL.into_iter().filter(away).collect()
    }

    /// Before something large is written: an error while the disk is full.
    pub fn check_room(&self) -> Result<(), StoreError> {
        self.room.check()
    }

    /// Where an error says that the disk is full, what was kept for the database is given to it.
    pub fn note(&self, error: &StoreError) {
        self.room.note(error);
    }

    /// Whether there is room again, or still.
    pub async fn look_for_room(&self) {
        let room = self.room.clone();
        blocking(move || room.look()).await;
    }

    /// For what ends something or makes room: it is written on a full disk, too, in what was kept for it.
    pub(crate) async fn on_reserve<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        attempt: impl Fn() -> F,
    ) -> Result<T, StoreError> {
        // Somebody else may be filling what was given free, and give it back when it is not enough.
        for _ in 0..RESERVE_TRIES {
            match attempt().await {
                Err(error) if self.room.note(&error) => tokio::time::sleep(RESERVE_RETRY).await,
                done => return done,
            }
        }
        attempt().await
    }

    pub fn artifacts(&self) -> &Artifacts {
        &self.artifacts
    }

    /// A fresh path in the staging folder.
    pub fn staging(&self) -> PathBuf {
        self.artifacts.folders().staging()
    }

    /// What a killed process left half done goes; what no row speaks of is refused, or moved aside.
    async fn clear_up(&self, strays: Strays) -> Result<(), StoreError> {
        let folders = self.artifacts.folders().clone();
        let is_cached = self.artifacts.is_cached();
        // A folder that began as a store of its own holds what lies nowhere else.
        let is_cache = is_cached && folders.is_cache();
        let known = Known {
            files: self
                .ids("SELECT id FROM files UNION SELECT file FROM upload_parts")
                .await?,
            loose_files: self.ids("SELECT id FROM loose_files").await?,
            adapters: self.ids("SELECT digest FROM adapters").await?,
            jobs: self.ids("SELECT id FROM jobs WHERE finished_at IS NULL").await?,
            ended_jobs: self
                .ids("SELECT id FROM jobs WHERE finished_at IS NOT NULL")
                .await?,
            is_cache,
        };
        let leftovers = blocking({
            let folders = folders.clone();
            move || folders.leftovers(&known)
        })
        .await?;
        if !leftovers.strays.is_empty() && strays == Strays::Refuse {
            let root = folders.root();
            let shown = Leftovers::shown(&leftovers.strays, root);
            let n = leftovers.strays.len();
            let how = format!("knows nothing of {n} artifacts in {} ({shown})", root.display());
            return Err(self.apart(how));
        }
        if !is_cached && !leftovers.missing.is_empty() {
            let root = folders.root();
            tracing::error!(
                missing = leftovers.missing.len(),
                "files and adapters that the database names are not in {}: {}; what needs them fails. Is a volume not mounted, or a copy \
                 in part?",
                root.display(),
                Leftovers::shown(&leftovers.missing, root)
            );
        }
        blocking(move || {
            folders.quarantine(&leftovers.strays)?;
            leftovers.remove_half_done()?;
            match is_cached && !is_cache {
                true => folders.become_cache(),
                false => Ok(()),
            }
        })
        .await?;
        if !self.is_shared() {
            self.clear_leases().await?;
            self.delete_unnamed_adapters().await?;
            self.delete_loose_files().await?;
        }
        Ok(())
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
