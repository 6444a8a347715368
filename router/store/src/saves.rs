//! What clients that train call by call have saved: states to go on from, and which adapters they named. Each is a folder
//! with a record, which names the other file and is written last: a kill leaves the save of before, or the new one. Of one
//! machine: other routers do not see them.
//!
//! ```text
//! <data_dir>/tinker/<run>/<kind>/<name>/save.json
//!                                       state-<random>.safetensors
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tandem_core::id::{AdapterDigest, Digest};
use tandem_core::job::Lora;

use crate::error::io_at;
use crate::folders::{self, Folders, sync_parent};
use crate::{Store, StoreError, blocking, ids, now};

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
    /// A fresh, empty folder, for who writes what is then kept.
    pub async fn staging_folder(&self) -> Result<PathBuf, StoreError> {
        let folders = self.artifacts().folders().clone();
        blocking(move || folders.staging_folder()).await
    }

    /// Keeps a save, in the place of one that was there. `state`: a durable file that is taken over.
    pub async fn keep_save(
        &self,
        mut record: SaveRecord,
        state: Option<PathBuf>,
    ) -> Result<SaveRecord, StoreError> {
        self.check_room()?;
        let folders = self.artifacts().folders().clone();
        let kept = blocking(move || {
            let folder = record.place.folder(&folders);
            fs::create_dir_all(&folder).map_err(io_at("making", &folder))?;
            if let Some(state) = state {
                let name = format!("state-{}.safetensors", ids::random());
                record.bytes += folders.publish_file(&state, &folder.join(&name))?;
                record.file = Some(name);
            }
            write(&folders, &record)?;
            for entry in fs::read_dir(&folder)
                .map_err(io_at("reading", &folder))?
                .flatten()
            {
                let name = entry.file_name();
                let is_of_record =
                    name == RECORD || Some(name.to_string_lossy().as_ref()) == record.file.as_deref();
                if !is_of_record {
                    folders::remove(&entry.path())?;
                }
            }
            Ok(record)
        });
        kept.await.inspect_err(|error| self.note(error))
    }

    /// All of them, or those of one run; in the order of their making.
    pub async fn saves(&self, run: Option<&str>) -> Result<Vec<SaveRecord>, StoreError> {
        let folders = self.artifacts().folders().clone();
        let run = run.map(str::to_owned);
        blocking(move || {
            let root = folders.root().join(FOLDER);
            let runs = match run {
                // Not a path, or there is none of it.
                Some(run) if SavePlace::new(&run, SaveKind::State, "x").is_none() => vec![],
                Some(run) => vec![root.join(run)],
                None => entries(&root)?,
            };
            let mut records = vec![];
            for run in runs {
                for kind in entries(&run)? {
                    for place in entries(&kind)? {
                        records.extend(read(&place)?);
                    }
                }
            }
            records.sort_by_key(|record| (record.created_at, record.place.clone()));
            Ok(records)
        })
        .await
    }

    pub async fn save(&self, place: &SavePlace) -> Result<Option<SaveRecord>, StoreError> {
        let folder = place.folder(self.artifacts().folders());
        let record = blocking(move || read(&folder)).await?;
        Ok(record.filter(|record| !record.has_expired()))
    }

    /// The file of a state.
    pub fn state_of(&self, record: &SaveRecord) -> Option<PathBuf> {
        let file = record.file.as_deref()?;
        Some(record.place.folder(self.artifacts().folders()).join(file))
    }

    /// Another expiry, or another reach.
    pub async fn change_save(&self, record: SaveRecord) -> Result<(), StoreError> {
        let folders = self.artifacts().folders().clone();
        blocking(move || write(&folders, &record)).await
    }

    /// The record goes first.
    pub async fn remove_save(&self, place: &SavePlace) -> Result<(), StoreError> {
        let folder = place.folder(self.artifacts().folders());
        blocking(move || {
            folders::remove(&folder.join(RECORD))?;
            folders::remove(&folder)
        })
        .await
    }
}

/// Every file of every save, by its path in the data folder.
pub(crate) fn all_files(folders: &Folders) -> Result<Vec<(PathBuf, PathBuf)>, StoreError> {
    let root = folders.root();
    let mut open = vec![root.join(FOLDER)];
    let mut files = vec![];
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
    let record = serde_json::from_slice(&text);
    record
        .map(Some)
        .map_err(|error| StoreError::Damaged(format!("{}: {error}", path.display())))
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
