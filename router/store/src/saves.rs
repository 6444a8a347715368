//! What clients that train call by call have saved: states to go on from, and which adapters they named. Each is a row, which
//! holds all that is known of it, and a state has a file in a folder of the save's own. The file is written before the row that
//! names it: a kill leaves the save of before, or the new one. Files lie in the shared place where there is one, else in the
//! data folder.
//!
//! ```text
//! tinker/<run>/<kind>/<name>/state-<random>.safetensors, in the shared place <random>/state.safetensors
//! ```

mod files;
mod older;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sqlx::{Any, AnyConnection, Executor, Transaction};
use tandem_core::id::{AdapterDigest, Digest};
use tandem_core::job::Lora;

use crate::changes::{self, Kind};
use crate::error::io_at;
use crate::folders::Folders;
use crate::jobs::signed;
use crate::{Store, StoreError, Tenant, blocking, ids, names, now};
pub(crate) use files::all_files;

pub(crate) const FOLDER: &str = "tinker";
/// Where older programs kept what is a row now.
const RECORD: &str = "save.json";

const OF_ALL: &str = "SELECT record FROM saves ORDER BY created_at, run, kind, name";
/// A statement of its own: with one for both, SQLite would read everybody's.
pub(crate) const OF_TENANT: &str =
    "SELECT record FROM saves WHERE tenant = $1 ORDER BY created_at, run, kind, name";
const OF_RUN: &str = "SELECT record FROM saves WHERE run = $1 AND ($2 IS NULL OR tenant = $2)
                      ORDER BY created_at, run, kind, name";

/// Where a save lies. The run is a model's id, the name its client's; both are made of letters, digits and `-_.:`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SavePlace {
    pub run: String,
    pub kind: SaveKind,
    pub name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveKind {
    /// Numbers, moments and step.
    State,
    /// A name of an adapter.
    Adapter,
}

impl SavePlace {
    /// `None`: some part of it could be a path, or is too long.
    pub fn new(run: &str, kind: SaveKind, name: &str) -> Option<SavePlace> {
        let is_plain = |text: &str| {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
            (1..=100).contains(&text.len()) && !text.starts_with('.') && text.chars().all(is_plain)
        };
        (is_plain(run) && is_plain(name)).then(|| SavePlace {
            run: run.to_owned(),
            kind,
            name: name.to_owned(),
        })
    }

    /// Below the data folder.
    fn path(&self) -> PathBuf {
        let SavePlace { run, kind, name } = self;
        Path::new(FOLDER).join(run).join(kind.name()).join(name)
    }

    fn folder(&self, folders: &Folders) -> PathBuf {
        folders.root().join(self.path())
    }
}

impl SaveKind {
    fn name(self) -> &'static str {
        match self {
            SaveKind::State => "state",
            SaveKind::Adapter => "adapter",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SaveRecord {
    pub place: SavePlace,
    pub base: Digest,
    pub tenant: String,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub bytes: u64,
    pub rank: u32,
    pub train_attn: bool,
    pub train_mlp: bool,
    #[serde(default)]
    pub train_unembed: bool,
    /// `None`: as a training client makes one of that rank and reach.
    #[serde(default)]
    pub lora: Option<Lora>,
    /// Its owner lets everybody see it.
    #[serde(default)]
    pub public: bool,
    pub user_metadata: Option<BTreeMap<String, serde_json::Value>>,
    /// Of a state: its file, beside the record.
    pub file: Option<String>,
    /// Under the save's path as its name. `None`: a state of an older version.
    pub adapter: Option<AdapterDigest>,
}

impl SaveRecord {
    pub fn has_expired(&self) -> bool {
        self.expires_at.is_some_and(|end| end <= now())
    }
}

impl Store {
    /// A fresh, empty folder for who writes what is then kept at `place`.
    pub async fn save_folder(&self, place: &SavePlace) -> Result<PathBuf, StoreError> {
        self.check_room()?;
        let (folders, is_cached) = (self.artifacts().folders().clone(), self.artifacts().is_cached());
        // Its path is where others find what was written there.
        let folder = place.folder(&folders).join(ids::random());
        blocking(move || {
            if !is_cached {
                return folders.staging_folder();
            }
            fs::create_dir_all(&folder).map_err(io_at("making", &folder))?;
            Ok(folder)
        })
        .await
    }

    /// Keeps a save, in the place of one that was there. `state`: a durable file in a [`Store::save_folder`], of here or of who
    /// shares the artifacts.
    pub async fn keep_save(
        &self,
        mut record: SaveRecord,
        state: Option<PathBuf>,
    ) -> Result<SaveRecord, StoreError> {
        let kept = async {
            let mut bytes = 0;
            if let Some(state) = state {
                let (name, size) = match self.artifacts().remote() {
                    None => self.place_state(&record.place, state).await?,
                    Some(remote) => self.push_state(remote, &record.place, &state).await?,
                };
                record.file = Some(name);
                bytes = size;
            }
            record.bytes += bytes;
            self.write_save(&record, bytes).await?;
            self.remove_others(&record).await?;
            Ok(record)
        };
        kept.await.inspect_err(|error| self.note(error))
    }

    async fn write_save(&self, record: &SaveRecord, bytes: u64) -> Result<(), StoreError> {
        let mut tx = self.db.begin().await?;
        insert(&mut tx, record, bytes, Taken::IsReplaced).await?;
        Ok(tx.commit().await?)
    }

    /// In the order of their making: of a run or of all, those of one tenant.
    pub async fn saves(
        &self,
        tenant: Option<&Tenant>,
        run: Option<&str>,
    ) -> Result<Vec<SaveRecord>, StoreError> {
        if run.is_some_and(|run| run.contains('\0')) {
            // Postgres would not take it for a text.
            return Ok(vec![]);
        }
        let tenant = tenant.map(Tenant::as_str);
        let query = match (run, tenant) {
            (Some(run), _) => sqlx::query_scalar(OF_RUN).bind(run).bind(tenant),
            (None, Some(tenant)) => sqlx::query_scalar(OF_TENANT).bind(tenant),
            (None, None) => sqlx::query_scalar(OF_ALL),
        };
        let rows: Vec<String> = query.fetch_all(self.db.pool()?).await?;
        Ok(rows.iter().filter_map(|text| readable(text)).collect())
    }

    /// Whose time is over.
    pub async fn expired_saves(&self) -> Result<Vec<SaveRecord>, StoreError> {
        let rows: Vec<String> = sqlx::query_scalar("SELECT record FROM saves WHERE expires_at <= $1")
            .bind(now())
            .fetch_all(self.db.pool()?)
            .await?;
        Ok(rows.iter().filter_map(|text| readable(text)).collect())
    }

    pub async fn save(&self, place: &SavePlace) -> Result<Option<SaveRecord>, StoreError> {
        let there = read(self.db.pool()?, place).await?;
        Ok(there
            .map(|(_, record)| record)
            .filter(|record| !record.has_expired()))
    }

    /// Another expiry, or another reach, of whatever is there now. Whether anything is.
    pub async fn change_save(
        &self,
        place: &SavePlace,
        change: impl Fn(&mut SaveRecord),
    ) -> Result<bool, StoreError> {
        let SavePlace { run, kind, name } = place;
        // What is saved meanwhile is read anew.
        let sql = "UPDATE saves SET record = $1, expires_at = $2
                   WHERE run = $3 AND kind = $4 AND name = $5 AND record = $6";
        let changed = async {
            loop {
                let Some((text, mut record)) = read(self.db.pool()?, place).await? else {
                    return Ok(false);
                };
                change(&mut record);
                let updated = sqlx::query(sql)
                    .bind(text_of(&record))
                    .bind(record.expires_at)
                    .bind(run)
                    .bind(kind.name())
                    .bind(name)
                    .bind(text)
                    .execute(self.db.pool()?)
                    .await?;
                if updated.rows_affected() > 0 {
                    return Ok(true);
                }
            }
        };
        changed.await.inspect_err(|error| self.note(error))
    }

    /// Whether it was there as given: what has been saved in its place meanwhile stays. `model` is the name of its adapter, which
    /// goes with it, unless it is another adapter's by now. Its file is left to [`Store::remove_state`].
    pub async fn remove_save(&self, record: &SaveRecord, model: &str) -> Result<bool, StoreError> {
        self.on_reserve(|| self.remove_save_now(record, model)).await
    }

    async fn remove_save_now(&self, record: &SaveRecord, model: &str) -> Result<bool, StoreError> {
        let SavePlace { run, kind, name } = &record.place;
        let mut tx = self.db.begin().await?;
        // Whoever writes names takes this row first.
        changes::note(&mut tx, Kind::Names).await?;
        let text = match read(&mut *tx, &record.place).await? {
            Some((text, there)) if there == *record => text,
            _ => return Ok(false),
        };
        let sql = "DELETE FROM saves WHERE run = $1 AND kind = $2 AND name = $3 AND record = $4";
        let deleted = sqlx::query(sql)
            .bind(run)
            .bind(kind.name())
            .bind(name)
            .bind(text)
            .execute(&mut *tx)
            .await?;
        if deleted.rows_affected() == 0 {
            return Ok(false);
        }
        if let Some(adapter) = record.adapter {
            names::remove_of_adapter(&mut tx, &record.base, model, adapter).await?;
        }
        tx.commit().await?;
        Ok(true)
    }
}

/// What is there, readable, with its text.
async fn read<'e>(
    at: impl Executor<'e, Database = Any>,
    place: &SavePlace,
) -> Result<Option<(String, SaveRecord)>, StoreError> {
    let SavePlace { run, kind, name } = place;
    let sql = "SELECT record FROM saves WHERE run = $1 AND kind = $2 AND name = $3";
    let text: Option<String> = sqlx::query_scalar(sql)
        .bind(run)
        .bind(kind.name())
        .bind(name)
        .fetch_optional(at)
        .await?;
    Ok(text.and_then(|text| {
        let record = readable(&text)?;
        Some((text, record))
    }))
}

/// What becomes of a save that has the place.
enum Taken {
    IsReplaced,
    Stays,
}

/// `bytes`: of its file.
async fn insert(
    tx: &mut Transaction<'static, Any>,
    record: &SaveRecord,
    bytes: u64,
    taken: Taken,
) -> Result<(), StoreError> {
    let SavePlace { run, kind, name } = &record.place;
    let sql = match taken {
        Taken::IsReplaced => {
            "INSERT INTO saves (run, kind, name, tenant, created_at, expires_at, bytes, record)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
             ON CONFLICT (run, kind, name) DO UPDATE SET tenant = excluded.tenant, created_at = excluded.created_at,
             expires_at = excluded.expires_at, bytes = excluded.bytes, record = excluded.record"
        }
        Taken::Stays => {
            "INSERT INTO saves (run, kind, name, tenant, created_at, expires_at, bytes, record)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (run, kind, name) DO NOTHING"
        }
    };
    sqlx::query(sql)
        .bind(run)
        .bind(kind.name())
        .bind(name)
        .bind(&record.tenant)
        .bind(record.created_at)
        .bind(record.expires_at)
        .bind(signed(bytes))
        .bind(text_of(record))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

fn text_of(record: &SaveRecord) -> String {
    serde_json::to_string(record).expect("plain data are JSON")
}

/// The files that rows of saves name, by their paths in the data folder.
pub(crate) async fn named_files(connection: &mut AnyConnection) -> Result<Vec<PathBuf>, StoreError> {
    let sql = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'saves'";
    let tables: i64 = sqlx::query_scalar(sql).fetch_one(&mut *connection).await?;
    if tables == 0 {
        // An older program wrote it.
        return Ok(vec![]);
    }
    let rows: Vec<String> = sqlx::query_scalar("SELECT record FROM saves")
        .fetch_all(&mut *connection)
        .await?;
    let file = |record: SaveRecord| Some(record.place.path().join(record.file?));
    Ok(rows.iter().filter_map(|text| file(readable(text)?)).collect())
}

/// One that is damaged is as good as none: it stops nobody's others, and what is saved there takes its place.
fn readable(text: &str) -> Option<SaveRecord> {
    match serde_json::from_str(text) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::error!(%error, text, "a checkpoint of a training client is left out");
            None
        }
    }
}
