//! What clients that train call by call have saved: states to go on from, and which adapters they named. Each is a folder
//! with a record, which names the other file and is written last: a kill leaves the save of before, or the new one. They lie in
//! the shared place where there is one, else in the data folder.
//!
//! ```text
//! tinker/<run>/<kind>/<name>/save.json
//!                            state-<random>.safetensors, in the shared place <random>/state.safetensors
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tandem_core::id::{AdapterDigest, Digest};
use tandem_core::job::Lora;

use crate::artifacts::parts_of;
use crate::error::io_at;
use crate::folders::{self, Folders, sync_parent};
use crate::remote::Remote;
use crate::{Artifacts, Store, StoreError, blocking, ids, now};

pub(crate) const FOLDER: &str = "tinker";
const RECORD: &str = "save.json";

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

    fn folder(&self, folders: &Folders) -> PathBuf {
        let kind = match self.kind {
            SaveKind::State => "state",
            SaveKind::Adapter => "adapter",
        };
        folders
            .root()
            .join(FOLDER)
            .join(&self.run)
            .join(kind)
            .join(&self.name)
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
        record: SaveRecord,
        state: Option<PathBuf>,
    ) -> Result<SaveRecord, StoreError> {
        let kept = match self.artifacts().remote() {
            None => self.keep_here(record, state).await,
            Some(remote) => self.keep_there(remote, record, state).await,
        };
        kept.inspect_err(|error| self.note(error))
    }

    async fn keep_here(
        &self,
        mut record: SaveRecord,
        state: Option<PathBuf>,
    ) -> Result<SaveRecord, StoreError> {
        let folders = self.artifacts().folders().clone();
        blocking(move || {
            let folder = record.place.folder(&folders);
            fs::create_dir_all(&folder).map_err(io_at("making", &folder))?;
            if let Some(state) = state {
                let name = format!("state-{}.safetensors", ids::random());
                record.bytes += folders.publish_file(&state, &folder.join(&name))?;
                record.file = Some(name);
            }
            write(&folders, &record)?;
            for path in entries(&folder)? {
                let name = path.file_name().and_then(|name| name.to_str());
                if name != Some(RECORD) && name != record.file.as_deref() {
                    folders::remove(&path)?;
                }
            }
            Ok(record)
        })
        .await
    }

    async fn keep_there(
        &self,
        remote: &Remote,
        mut record: SaveRecord,
        state: Option<PathBuf>,
    ) -> Result<SaveRecord, StoreError> {
        let folder = record.place.folder(self.artifacts().folders());
        let below = self.below(&folder);
        if let Some(state) = state {
            let path = self.below(&state);
            if state.exists() {
                self.artifacts().keep_file_below(&path).await?;
            }
            let size = remote.size(&parts_of(&path)).await?;
            record.bytes +=
                size.ok_or_else(|| StoreError::Damaged(format!("{} was not kept", path.display())))?;
            let file = path.strip_prefix(&below).ok().and_then(Path::to_str);
            record.file = file.map(str::to_owned);
        }
        self.change_save(record.clone()).await?;
        for key in remote.list(&parts_of(&below)).await? {
            let key: Vec<&str> = key.iter().map(String::as_str).collect();
            let name = key[parts_of(&below).len()..].join("/");
            if name != RECORD && Some(name.as_str()) != record.file.as_deref() {
                remote.delete(&key).await?;
            }
        }
        blocking(move || folders::remove(&folder)).await?;
        Ok(record)
    }

    fn below(&self, path: &Path) -> PathBuf {
        let root = self.artifacts().folders().root();
        path.strip_prefix(root).unwrap_or(path).to_owned()
    }

    /// All of them, or those of one run; in the order of their making.
    pub async fn saves(&self, run: Option<&str>) -> Result<Vec<SaveRecord>, StoreError> {
        // Not a path, or there is none of it.
        if run.is_some_and(|run| SavePlace::new(run, SaveKind::State, "x").is_none()) {
            return Ok(vec![]);
        }
        let mut records = match self.artifacts().remote() {
            None => self.local_saves(run.map(str::to_owned)).await?,
            Some(remote) => {
                let mut records = vec![];
                let parts: Vec<&str> = [FOLDER].into_iter().chain(run).collect();
                for key in remote.list(&parts).await? {
                    let key: Vec<&str> = key.iter().map(String::as_str).collect();
                    if key.last() == Some(&RECORD)
                        && let Some(text) = remote.read(&key).await?
                    {
                        records.extend(readable(parsed(&text, &key.join("/")).map(Some))?);
                    }
                }
                records
            }
        };
        records.sort_by_key(|record| (record.created_at, record.place.clone()));
        Ok(records)
    }

    async fn local_saves(&self, run: Option<String>) -> Result<Vec<SaveRecord>, StoreError> {
        let root = self.artifacts().folders().root().join(FOLDER);
        blocking(move || {
            let runs = match run {
                Some(run) => vec![root.join(run)],
                None => entries(&root)?,
            };
            let mut records = vec![];
            for run in runs {
                for kind in entries(&run)? {
                    for place in entries(&kind)? {
                        records.extend(readable(read(&place))?);
                    }
                }
            }
            Ok(records)
        })
        .await
    }

    pub async fn save(&self, place: &SavePlace) -> Result<Option<SaveRecord>, StoreError> {
        let folder = place.folder(self.artifacts().folders());
        let record = match self.artifacts().remote() {
            None => readable(blocking(move || read(&folder)).await)?,
            Some(remote) => {
                let path = self.below(&folder).join(RECORD);
                let text = remote.read(&parts_of(&path)).await?;
                text.map(|text| parsed(&text, &path.display().to_string()))
                    .transpose()?
            }
        };
        Ok(record.filter(|record| !record.has_expired()))
    }

    /// The file of a state, fetched when it is not here.
    pub async fn state_of(&self, record: &SaveRecord) -> Result<Option<PathBuf>, StoreError> {
        let Some(file) = record.file.as_deref() else {
            return Ok(None);
        };
        let path = record.place.folder(self.artifacts().folders()).join(file);
        self.artifacts().file_below(&self.below(&path)).await.map(Some)
    }

    /// Another expiry, or another reach.
    pub async fn change_save(&self, record: SaveRecord) -> Result<(), StoreError> {
        let folders = self.artifacts().folders().clone();
        if let Some(remote) = self.artifacts().remote() {
            let path = self.below(&record.place.folder(&folders)).join(RECORD);
            let text = serde_json::to_string(&record).expect("plain data are JSON");
            return remote.mark(&parts_of(&path), &text).await;
        }
        let written = blocking(move || write(&folders, &record)).await;
        written.inspect_err(|error| self.note(error))
    }

    /// The record goes first.
    pub async fn remove_save(&self, place: &SavePlace) -> Result<(), StoreError> {
        let folder = place.folder(self.artifacts().folders());
        if let Some(remote) = self.artifacts().remote() {
            let below = self.below(&folder);
            remote.delete(&parts_of(&below.join(RECORD))).await?;
            remote.delete_all(&parts_of(&below)).await?;
        }
        blocking(move || {
            folders::remove(&folder.join(RECORD))?;
            folders::remove(&folder)
        })
        .await
    }
}

/// Every file of every save, by its path in the data folder; fetched where they lie elsewhere.
pub(crate) async fn all_files(artifacts: &Artifacts) -> Result<Vec<(PathBuf, PathBuf)>, StoreError> {
    let mut files = vec![];
    if let Some(remote) = artifacts.remote() {
        for key in remote.list(&[FOLDER]).await? {
            let path: PathBuf = key.iter().collect();
            // A record changes under its name: what is here of it is no copy of what is there.
            if key.last().is_some_and(|name| name == RECORD) {
                folders::remove(&artifacts.below(&path))?;
            }
            let found = artifacts.file_below(&path).await?;
            files.push((path, found));
        }
        return Ok(files);
    }
    let root = artifacts.folders().root();
    let mut open = vec![root.join(FOLDER)];
    while let Some(folder) = open.pop() {
        for path in entries(&folder)? {
            match path.is_dir() {
                true => open.push(path),
                false => files.push((path.strip_prefix(root).unwrap_or(&path).to_owned(), path)),
            }
        }
    }
    Ok(files)
}

fn write(folders: &Folders, record: &SaveRecord) -> Result<(), StoreError> {
    let staged = folders.staging();
    let text = serde_json::to_vec(record).expect("plain data are JSON");
    fs::write(&staged, text).map_err(io_at("writing", &staged))?;
    let folder = record.place.folder(folders);
    folders.publish_file(&staged, &folder.join(RECORD))?;
    sync_parent(&folder)
}

/// `None`: it was never finished.
fn read(folder: &Path) -> Result<Option<SaveRecord>, StoreError> {
    let path = folder.join(RECORD);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(io_at("reading", &path))?,
    };
    parsed(&text, &path.display().to_string()).map(Some)
}

fn parsed(text: &[u8], path: &str) -> Result<SaveRecord, StoreError> {
    serde_json::from_slice(text).map_err(|error| StoreError::Damaged(format!("{path}: {error}")))
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        read => Ok(read
            .map_err(io_at("reading", folder))?
            .flatten()
            .map(|entry| entry.path())
            .collect()),
    }
}

/// One that is damaged is as good as none: it stops nobody's others, and what is saved there takes its place.
fn readable(read: Result<Option<SaveRecord>, StoreError>) -> Result<Option<SaveRecord>, StoreError> {
    match read {
        Err(error @ StoreError::Damaged(_)) => {
            tracing::error!(%error, "a checkpoint of a training client is left out");
            Ok(None)
        }
        read => read,
    }
}
