//! A copy of a whole store, taken while a server uses it, and a store made of such a copy. The copy is a data folder of its
//! own (SQLite and files, with what a bucket holds) and a list of its files with their digests. Not here: copies of
//! Postgres.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use sqlx::{AnyConnection, Connection};
use tandem_core::id::{AdapterDigest, Digest};

use crate::artifacts::Artifacts;
use crate::error::io_at;
use crate::folders::{self, Folders, IDENTITY, Tenancy};
use crate::identity::Identity;
use crate::saves;
use crate::{Places, StoreError, blocking, db, files, unsigned};

const MANIFEST: &str = "backup.json";
const DATABASE: &str = "tandem.db";
/// Something that a snapshot of the database names may be deleted before it is copied; then there is another snapshot.
const ROUNDS: usize = 20;
const COPY_BUFFER_BYTES: usize = 1 << 20;

/// Written last: a folder without it is no whole copy.
#[derive(Serialize, Deserialize)]
struct Manifest {
    /// Of the format.
    version: u32,
    created_at: i64,
    files: BTreeMap<PathBuf, Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    sha256: Digest,
}

/// What a copy holds.
#[derive(Debug)]
pub struct Summary {
    pub files: usize,
    pub bytes: u64,
}

impl Manifest {
    const VERSION: u32 = 1;

    fn summary(&self) -> Summary {
        Summary {
            files: self.files.len(),
            bytes: self.files.values().map(|entry| entry.bytes).sum(),
        }
    }
}

/// What one snapshot of the database names.
struct Named {
    identity: Option<Identity>,
    /// Id, size and digest.
    files: Vec<(String, i64, Option<String>)>,
    adapters: Vec<String>,
    /// Those that have not ended, each with its last state's life and step.
    jobs: Vec<(String, Option<i64>, Option<i64>)>,
    /// Files of what training clients saved.
    saves: Vec<PathBuf>,
}

/// Copies the store at `places` to the folder `target`, which must be new or empty. A server may be using it.
pub async fn backup(places: &Places, target: &Path) -> Result<Summary, StoreError> {
    if let Some(url) = &places.database_url {
        return Err(StoreError::Backup(format!(
            "{} is copied by Postgres' own tools: pg_dump it first, then copy the artifact store (a bucket's versions keep \
             what is deleted meanwhile)",
            db::without_password(url)
        )));
    }
    let source = places.data_dir.join(DATABASE);
    if !source.exists() {
        let message = format!(
            "{} is not there: --data-dir names the folder of a server",
            source.display()
        );
        return Err(StoreError::Backup(message));
    }
    must_be_empty(target)?;
    fs::create_dir_all(target).map_err(io_at("making", target))?;
    let artifacts = Artifacts::open(places.artifact_url.as_deref(), &places.data_dir)?;
    let copied = copy(&artifacts, &source, target).await;
    // Its own staging folder.
    let _ = fs::remove_dir_all(artifacts.folders().own_staging());
    let files = copied?;
    let manifest = Manifest {
        version: Manifest::VERSION,
        created_at: crate::now(),
        files,
    };
    let text = serde_json::to_vec_pretty(&manifest).expect("plain data are JSON");
    write(&target.join(MANIFEST), &text)?;
    Ok(manifest.summary())
}

/// Makes the folder `data_dir`, which must be new or empty, what `source` is a copy of.
pub fn restore(source: &Path, data_dir: &Path) -> Result<Summary, StoreError> {
    let path = source.join(MANIFEST);
    let manifest = fs::read(&path).map_err(|error| {
        let message = format!("{} is no whole backup: {MANIFEST}: {error}", source.display());
        StoreError::Backup(message)
    })?;
    let manifest: Manifest = serde_json::from_slice(&manifest)
        .map_err(|error| StoreError::Backup(format!("{} is damaged: {error}", path.display())))?;
    if manifest.version > Manifest::VERSION {
        let message = format!(
            "{} has version {}, this program knows {}: use a newer one",
            path.display(),
            manifest.version,
            Manifest::VERSION
        );
        return Err(StoreError::Backup(message));
    }
    must_be_empty(data_dir)?;
    let folders = Folders::make(data_dir, Tenancy::Owner)?;
    let _lock = folders.lock()?;
    let restored = bring_back(source, &manifest, folders.root());
    if restored.is_err() {
        // All that is there now was made here: it was empty.
        for entry in fs::read_dir(folders.root())
            .map_err(io_at("reading", folders.root()))?
            .flatten()
        {
            folders::remove(&entry.path())?;
        }
    }
    restored.map(|()| manifest.summary())
}

/// The database comes last: without it a start says that it is missing.
fn bring_back(source: &Path, manifest: &Manifest, root: &Path) -> Result<(), StoreError> {
    let (database, others): (Vec<_>, Vec<_>) =
        manifest.files.iter().partition(|(path, _)| **path == *DATABASE);
    for (path, expected) in others.into_iter().chain(database) {
        let is_below = path
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        let got = match is_below {
            true => copy_file(&source.join(path), &root.join(path))?,
            false => None,
        };
        if got.is_none_or(|got| got.bytes != expected.bytes || got.sha256 != expected.sha256) {
            let shown = source.join(path);
            return Err(StoreError::Backup(format!(
                "{} is missing or damaged: its digest is not the one in {MANIFEST}",
                shown.display()
            )));
        }
    }
    Ok(())
}

fn must_be_empty(folder: &Path) -> Result<(), StoreError> {
    match fs::read_dir(folder) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(StoreError::Backup(format!(
                "{} is not empty: name a new folder, nothing is overwritten",
                folder.display()
            ))),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_at("reading", folder)(error)),
    }
}

/// Snapshots and copies until all that the last snapshot names is there.
async fn copy(
    artifacts: &Artifacts,
    source: &Path,
    target: &Path,
) -> Result<BTreeMap<PathBuf, Entry>, StoreError> {
    let mut copied: BTreeMap<PathBuf, Entry> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let database = target.join(DATABASE);
        folders::remove(&database)?;
        let named = snapshot(source, &database).await?;
        let mut wanted: Vec<PathBuf> = vec![];
        let mut is_whole = true;
        for (id, bytes, sha256) in &named.files {
            let path = Path::new("files").join(id);
            is_whole &= fetch(&path, artifacts.file(id).await, target, &mut copied).await?;
            if let Some(entry) = copied.get(&path) {
                let expected = (unsigned(*bytes), sha256.as_deref());
                files::must_be(&format!("file {id}"), expected, (entry.bytes, entry.sha256))?;
            }
            wanted.push(path);
        }
        for hex in &named.adapters {
            let digest: AdapterDigest = hex
                .parse()
                .map_err(|error| StoreError::Damaged(format!("adapter {hex:?}: {error}")))?;
            let folder = match artifacts.adapter(digest).await {
                Err(StoreError::Adapter { missing: true, .. }) => {
                    is_whole = false;
                    continue;
                }
                found => found?,
            };
            let paths = folders::ADAPTER_FILES.map(|name| (name, Path::new("adapters").join(hex).join(name)));
            let is_new = !copied.contains_key(&paths[1].1);
            for (name, path) in paths {
                let there = fetch(&path, Ok(folder.join(name)), target, &mut copied).await?;
                is_whole &= there || name == folders::README;
                if there {
                    wanted.push(path);
                }
            }
            if is_new && copied.contains_key(&Path::new("adapters").join(hex).join(folders::TENSORS)) {
                let copy = target.join("adapters").join(hex);
                let got = blocking(move || folders::digest(&copy)).await?;
                if got != digest {
                    let message = format!("adapter {digest} has other bytes: their digest is {got}");
                    return Err(StoreError::Damaged(message));
                }
            }
        }
        for (id, epoch, step) in &named.jobs {
            let saved = epoch
                .zip(*step)
                .map(|(epoch, step)| (unsigned(epoch), unsigned(step)));
            for (name, found) in artifacts.job_files(id, saved).await? {
                let path = Path::new("jobs").join(id).join(name);
                is_whole &= fetch(&path, Ok(found), target, &mut copied).await?;
                wanted.push(path);
            }
        }
        for (path, found) in saves::all_files(artifacts).await? {
            // One that is overwritten meanwhile is found again by its new name.
            is_whole &= fetch(&path, Ok(found), target, &mut copied).await?;
            wanted.push(path);
        }
        is_whole &= named.saves.iter().all(|path| copied.contains_key(path));
        if !is_whole {
            continue;
        }
        // Of earlier rounds.
        let gone: Vec<PathBuf> = copied
            .keys()
            .filter(|path| !wanted.contains(path))
            .cloned()
            .collect();
        for path in gone {
            folders::remove(&target.join(&path))?;
            copied.remove(&path);
        }
        if let Some(identity) = &named.identity {
            let text = serde_json::to_vec(identity).expect("plain data are JSON");
            write(&target.join(IDENTITY), &text)?;
            copied.insert(IDENTITY.into(), entry_of(&target.join(IDENTITY))?);
        }
        copied.insert(DATABASE.into(), entry_of(&database)?);
        return Ok(copied);
    }
    Err(StoreError::Backup(format!(
        "what the database names went before it was copied, {ROUNDS} times in a row: try again when less is deleted"
    )))
}

/// The database as it is at one moment, in a file of its own, and what it names.
async fn snapshot(source: &Path, target: &Path) -> Result<Named, StoreError> {
    let mut connection = db::connect(source, "rw").await?;
    // Text in a statement of SQLite's is quoted by doubling its quotes.
    let quoted = target.display().to_string().replace('\'', "''");
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("VACUUM INTO '{quoted}'")))
        .execute(&mut connection)
        .await?;
    connection.close().await?;
    let mut copy = db::connect(target, "rw").await?;
    let named = Named {
        identity: identity(&mut copy).await?,
        files: named_files(&mut copy).await?,
        adapters: sqlx::query_scalar("SELECT DISTINCT digest FROM names")
            .fetch_all(&mut copy)
            .await?,
        jobs: sqlx::query_as("SELECT id, state_epoch, state_step FROM jobs WHERE finished_at IS NULL")
            .fetch_all(&mut copy)
            .await?,
        saves: saves::named_files(&mut copy).await?,
    };
    copy.close().await?;
    Ok(named)
}

async fn named_files(
    connection: &mut AnyConnection,
) -> Result<Vec<(String, i64, Option<String>)>, StoreError> {
    let sql = "SELECT count(*) FROM pragma_table_info('files') WHERE name = 'sha256'";
    let digests: i64 = sqlx::query_scalar(sql).fetch_one(&mut *connection).await?;
    let sql = match digests {
        // An older program wrote it.
        0 => "SELECT id, bytes, NULL FROM files",
        _ => "SELECT id, bytes, sha256 FROM files",
    };
    Ok(sqlx::query_as(sql).fetch_all(connection).await?)
}

/// `None`: an older program wrote it.
async fn identity(connection: &mut AnyConnection) -> Result<Option<Identity>, StoreError> {
    let tables: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlite_master WHERE name = 'store'")
        .fetch_one(&mut *connection)
        .await?;
    if tables == 0 {
        return Ok(None);
    }
    let row: Option<(String, i64)> = sqlx::query_as("SELECT id, opens FROM store")
        .fetch_optional(connection)
        .await?;
    Ok(row.map(|(id, opens)| Identity { id, opens }))
}

/// Copies what is not there yet. `false`: it is gone.
async fn fetch(
    path: &Path,
    found: Result<PathBuf, StoreError>,
    target: &Path,
    copied: &mut BTreeMap<PathBuf, Entry>,
) -> Result<bool, StoreError> {
    if copied.contains_key(path) {
        return Ok(true);
    }
    let found = match found {
        // The shared place has no such object any more.
        Err(StoreError::Damaged(_)) => return Ok(false),
        found => found?,
    };
    let target = target.join(path);
    let entry = blocking(move || copy_file(&found, &target)).await?;
    let there = entry.is_some();
    copied.extend(entry.map(|entry| (path.to_owned(), entry)));
    Ok(there)
}

/// `None`: there is none.
fn copy_file(source: &Path, target: &Path) -> Result<Option<Entry>, StoreError> {
    let mut input = match File::open(source) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io_at("opening", source))?,
    };
    let parent = target.parent().expect("it lies in a folder");
    fs::create_dir_all(parent).map_err(io_at("making", parent))?;
    let mut output = File::create(target).map_err(io_at("making", target))?;
    let entry = pour(source, &mut input, |bytes| {
        output.write_all(bytes).map_err(io_at("writing", target))
    })?;
    output.sync_all().map_err(io_at("writing", target))?;
    Ok(Some(entry))
}

fn entry_of(path: &Path) -> Result<Entry, StoreError> {
    let mut input = File::open(path).map_err(io_at("opening", path))?;
    pour(path, &mut input, |_| Ok(()))
}

fn pour(
    source: &Path,
    input: &mut File,
    mut output: impl FnMut(&[u8]) -> Result<(), StoreError>,
) -> Result<Entry, StoreError> {
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    let (mut hasher, mut bytes) = (Sha256::new(), 0);
    loop {
        match input.read(&mut buffer).map_err(io_at("reading", source))? {
            0 => break,
            n => {
                hasher.update(&buffer[..n]);
                output(&buffer[..n])?;
                bytes += n as u64;
            }
        }
    }
    Ok(Entry {
        bytes,
        sha256: Digest(hasher.finalize().into()),
    })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    File::create(path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .map_err(io_at("writing", path))
}
