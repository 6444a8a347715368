//! Where downloaded files lie. The cache is the one of huggingface_hub (its guide "Understand caching"): `blobs/` named by
//! their etags, `snapshots/COMMIT/` of links to them, `refs/REVISION` with a commit, locks beside it all. A folder of the
//! caller's has plain files, and huggingface_hub's notes on them. Not here: how files come.

use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::client::Facts;
use super::{HubError, Kind, RepoName};

/// A repository's folder in the cache.
pub struct Repository {
    root: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub fn new(cache: &Path, kind: Kind, name: &RepoName) -> Repository {
        let folder = format!("{}--{}", kind.plural(), name.as_str().replace('/', "--"));
        Repository {
            root: cache.join(&folder),
            locks: cache.join(".locks").join(folder),
        }
    }

    /// The folder of a branch, a tag or a commit. The error says what is not there.
    pub fn snapshot(&self, revision: &str) -> Result<PathBuf, String> {
        let reference = self.root.join("refs").join(revision);
        let commit = match fs::read_to_string(&reference) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => revision.to_owned(),
        };
        let folder = self.root.join("snapshots").join(&commit);
        match folder.is_dir() {
            true => Ok(folder),
            false if reference.exists() => Err(format!("{} is not there", folder.display())),
            false => Err(format!(
                "the cache has no {} of it in {}",
                revision,
                self.root.display()
            )),
        }
    }

    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        make_parent(&path)?;
        let fresh = path.with_extension(format!("{}.fresh", std::process::id()));
        fs::write(&fresh, commit)
            .and_then(|()| fs::rename(&fresh, &path))
            .map_err(disk(&path))
    }
}

/// Of a snapshot, by their paths in it.
pub fn files(folder: &Path) -> Vec<String> {
    let mut files = vec![];
    let mut folders = vec![PathBuf::new()];
    while let Some(within) = folders.pop() {
        for entry in fs::read_dir(folder.join(&within)).into_iter().flatten().flatten() {
            let path = within.join(entry.file_name());
            match folder.join(&path).is_dir() {
                true => folders.push(path),
                false => files.extend(path.to_str().map(str::to_owned)),
            }
        }
    }
    files
}

pub enum Target<'a> {
    Cache(&'a Repository),
    Folder(&'a Path),
}

impl Target<'_> {
    pub fn folder(&self, commit: &str) -> PathBuf {
        match self {
            Target::Cache(repository) => repository.root.join("snapshots").join(commit),
            Target::Folder(folder) => folder.to_path_buf(),
        }
    }

    /// Nothing is left to do for this file, or only a link.
    pub fn has(&self, commit: &str, file: &str, facts: &Facts) -> Result<bool, HubError> {
        match self {
            Target::Cache(repository) => {
                let blob = repository.root.join("blobs").join(&facts.etag);
                let is_there = blob.exists();
                if is_there {
                    link(&blob, &self.folder(commit).join(file))?;
                }
                Ok(is_there)
            }
            Target::Folder(folder) => {
                let noted = fs::read_to_string(self.note(file)).unwrap_or_default();
                let same_size = fs::metadata(folder.join(file))
                    .is_ok_and(|found| facts.size.is_none_or(|size| size == found.len()));
                Ok(same_size && noted.lines().nth(1) == Some(&facts.etag))
            }
        }
    }

    /// Where the file grows until it is whole; made by whoever holds its lock.
    pub fn part(&self, file: &str, facts: &Facts) -> Result<PathBuf, HubError> {
        let path = match self {
            Target::Cache(repository) => {
                let blobs = repository.root.join("blobs");
                blobs.join(format!("{}.incomplete", facts.etag))
            }
            Target::Folder(_) => self
                .note(file)
                .with_extension(format!("{}.incomplete", facts.etag)),
        };
        make_parent(&path)?;
        Ok(path)
    }

    /// Held while a file is fetched, by one process at a time.
    pub async fn lock(&self, file: &str, facts: &Facts) -> Result<File, HubError> {
        const PERIOD: Duration = Duration::from_millis(200);
        let path = match self {
            Target::Cache(repository) => repository.locks.join(format!("{}.lock", facts.etag)),
            Target::Folder(_) => self.note(file).with_extension("lock"),
        };
        make_parent(&path)?;
        let open = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let lock = open.map_err(disk(&path))?;
        let mut waits = false;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(fs::TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut waits, true) {
                        tracing::info!(file, "another process is downloading it: waiting");
                    }
                    tokio::time::sleep(PERIOD).await;
                }
                Err(fs::TryLockError::Error(error)) => return Err(disk(&path)(error)),
            }
        }
    }

    /// A whole `part` becomes the file.
    pub fn place(&self, commit: &str, file: &str, facts: &Facts, part: &Path) -> Result<(), HubError> {
        match self {
            Target::Cache(repository) => {
                let blob = repository.root.join("blobs").join(&facts.etag);
                fs::rename(part, &blob).map_err(disk(&blob))?;
                link(&blob, &self.folder(commit).join(file))
            }
            Target::Folder(folder) => {
                let path = folder.join(file);
                make_parent(&path)?;
                fs::rename(part, &path).map_err(disk(&path))?;
                let now = SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap_or_default();
                let note = self.note(file);
                let text = format!("{commit}\n{}\n{:.3}\n", facts.etag, now.as_secs_f64());
                fs::write(&note, text).map_err(disk(&note))
            }
        }
    }

    /// huggingface_hub's own, of a file in a folder of the caller's.
    fn note(&self, file: &str) -> PathBuf {
        let name = format!(".cache/huggingface/download/{file}.metadata");
        match self {
            Target::Cache(repository) => repository.root.join(name),
            Target::Folder(folder) => folder.join(name),
        }
    }
}

/// `snapshots/COMMIT/config.json` -> `../../blobs/ETAG`
fn link(blob: &Path, path: &Path) -> Result<(), HubError> {
    make_parent(path)?;
    let root = blob
        .parent()
        .and_then(Path::parent)
        .expect("a blob lies in blobs/ of a repository");
    let depth = path
        .strip_prefix(root)
        .expect("a snapshot lies in its repository")
        .components()
        .filter(|part| matches!(part, Component::Normal(_)))
        .count();
    let up: PathBuf = std::iter::repeat_n("..", depth - 1).collect();
    let target = up.join(blob.strip_prefix(root).expect("the same repository"));
    if fs::read_link(path).is_ok_and(|known| known == target) {
        return Ok(());
    }
    let fresh = path.with_extension(format!("{}.fresh", std::process::id()));
    // Another process that makes the same link is no error.
    let _ = fs::remove_file(&fresh);
    std::os::unix::fs::symlink(&target, &fresh)
        .and_then(|()| fs::rename(&fresh, path))
        .map_err(disk(path))
}

fn make_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().expect("it lies in a folder");
    fs::create_dir_all(parent).map_err(disk(parent))
}

pub fn disk(path: &Path) -> impl Fn(std::io::Error) -> HubError + '_ {
    move |error| HubError::Disk {
        path: path.to_owned(),
        error,
    }
}
