//! The folders: staging, publishing by rename, the lock, and clearing up after a kill. Blocking; no database.

use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tandem_core::id::{AdapterDigest, AdapterHasher};

use crate::error::{StoreError, io_at};
use crate::ids;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const README: &str = "README.md";
/// Real ones are about a kilobyte; a larger "config" is a wrong or hostile file.
const CONFIG_BYTES: u64 = 1 << 20;
const COPY_BUFFER_BYTES: usize = 1 << 20;

/// How an adapter's files come into the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// From a folder its owner may change later.
    Copy,
    /// From a folder of ours that is never written in place: a hard link where the file system can.
    Link,
}

pub(crate) struct Folders {
    root: PathBuf,
}

impl Folders {
    pub fn make(root: &Path) -> Result<Folders, StoreError> {
        fs::create_dir_all(root).map_err(io_at("making", root))?;
        // Absolute, because the engine reads adapters and datasets by these paths.
        let root = fs::canonicalize(root).map_err(io_at("finding", root))?;
        let folders = Folders { root };
        for kind in ["files", "adapters", "jobs", "staging"] {
            let folder = folders.root.join(kind);
            fs::create_dir_all(&folder).map_err(io_at("making", &folder))?;
        }
        Ok(folders)
    }

    pub fn lock(&self) -> Result<File, StoreError> {
        let path = self.root.join("lock");
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(io_at("opening", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(StoreError::Locked(self.root.clone())),
            Err(TryLockError::Error(source)) => Err(io_at("locking", &path)(source)),
        }
    }

    pub fn database(&self) -> PathBuf {
        self.root.join("tandem.db")
    }

    pub fn file(&self, id: &str) -> PathBuf {
        self.root.join("files").join(id)
    }

    pub fn adapter(&self, digest: &AdapterDigest) -> PathBuf {
        self.root.join("adapters").join(digest.to_string())
    }

    pub fn job(&self, id: &str) -> PathBuf {
        self.root.join("jobs").join(id)
    }

    pub fn staging(&self) -> PathBuf {
        self.root.join("staging").join(ids::random())
    }

    /// Make a staged file durable and give it its final name. Returns its size.
    pub fn publish_file(&self, staged: &Path, id: &str) -> Result<u64, StoreError> {
        let target = self.file(id);
        let file = File::open(staged).map_err(io_at("opening", staged))?;
        file.sync_all().map_err(io_at("writing", staged))?;
        let bytes = file.metadata().map_err(io_at("reading", staged))?.len();
        fs::rename(staged, &target).map_err(io_at("publishing", &target))?;
        sync_parent(&target)?;
        Ok(bytes)
    }

    /// Read an adapter from `source` into the store. The same adapter twice is one folder.
    pub fn publish_adapter(&self, source: &Path, placement: Placement) -> Result<AdapterDigest, StoreError> {
        let staged = self.staging();
        fs::create_dir(&staged).map_err(io_at("making", &staged))?;
        let published = stage_adapter(source, &staged, placement).and_then(|digest| {
            let target = self.adapter(&digest);
            if !target.exists() {
                File::open(&staged)
                    .and_then(|folder| folder.sync_all())
                    .map_err(io_at("writing", &staged))?;
                fs::rename(&staged, &target).map_err(io_at("publishing", &target))?;
                sync_parent(&target)?;
            }
            Ok(digest)
        });
        // Gone already when it was renamed.
        let _ = fs::remove_dir_all(&staged);
        published
    }

    /// Remove what no row names: leftovers of a killed process.
    pub fn sweep(
        &self,
        files: &HashSet<String>,
        adapters: &HashSet<String>,
        jobs: &HashSet<String>,
    ) -> Result<(), StoreError> {
        let none = HashSet::new();
        for (kind, known) in [
            ("staging", &none),
            ("files", files),
            ("adapters", adapters),
            ("jobs", jobs),
        ] {
            let folder = self.root.join(kind);
            for entry in fs::read_dir(&folder).map_err(io_at("reading", &folder))? {
                let entry = entry.map_err(io_at("reading", &folder))?;
                if entry
                    .file_name()
                    .to_str()
                    .is_some_and(|name| known.contains(name))
                {
                    continue;
                }
                let path = entry.path();
                tracing::info!(path = %path.display(), "removing a leftover");
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Remove a file or a folder; that it is gone already is fine.
pub(crate) fn remove(path: &Path) -> Result<(), StoreError> {
    let done = match fs::symlink_metadata(path) {
        Ok(kind) if kind.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_at("removing", path)(error)),
        _ => Ok(()),
    }
}

fn sync_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().expect("every artifact lies in a folder");
    File::open(parent)
        .and_then(|folder| folder.sync_all())
        .map_err(io_at("writing", parent))
}

fn stage_adapter(source: &Path, staged: &Path, placement: Placement) -> Result<AdapterDigest, StoreError> {
    let missing = |message| StoreError::Adapter {
        missing: true,
        message,
    };
    if !source.is_dir() {
        return Err(missing(format!(
            "No adapter found for {}: it is not a folder",
            source.display()
        )));
    }
    let length = |name: &str| match fs::metadata(source.join(name)) {
        Ok(found) if found.is_file() => Ok(found.len()),
        Ok(_) => Err(missing(format!(
            "No adapter found for {}: {name} is not a file",
            source.display()
        ))),
        Err(error) => Err(missing(format!(
            "No adapter found for {}: {name}: {error}",
            source.display()
        ))),
    };
    let config_len = length(CONFIG)?;
    if config_len > CONFIG_BYTES {
        let message = format!("{CONFIG} has {config_len} bytes, at most {CONFIG_BYTES} are read");
        return Err(StoreError::Adapter {
            missing: false,
            message,
        });
    }
    let tensors_len = length(TENSORS)?;
    let mut hasher = AdapterHasher::new(config_len, tensors_len);
    for (name, len) in [(CONFIG, config_len), (TENSORS, tensors_len)] {
        place(&source.join(name), &staged.join(name), placement, len, |bytes| {
            hasher.update(bytes)
        })?;
    }
    if let Ok(len @ 0..=CONFIG_BYTES) = length(README) {
        place(&source.join(README), &staged.join(README), placement, len, |_| ())?;
    }
    Ok(hasher.finish())
}

/// Bring one file of `len` bytes from `source` to `target`, durable, and show its bytes on the way.
fn place(
    source: &Path,
    target: &Path,
    placement: Placement,
    len: u64,
    mut seen: impl FnMut(&[u8]),
) -> Result<(), StoreError> {
    let linked = placement == Placement::Link && fs::hard_link(source, target).is_ok();
    let mut input = File::open(source).map_err(io_at("opening", source))?;
    let mut output = match linked {
        true => None,
        false => Some(File::create_new(target).map_err(io_at("making", target))?),
    };
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    let mut left = len;
    loop {
        let n = input.read(&mut buffer).map_err(io_at("reading", source))?;
        if n as u64 > left || n == 0 && left > 0 {
            let message = format!("{} changed while it was read", source.display());
            return Err(StoreError::Adapter {
                missing: false,
                message,
            });
        }
        if n == 0 {
            break;
        }
        left -= n as u64;
        seen(&buffer[..n]);
        if let Some(output) = &mut output {
            output.write_all(&buffer[..n]).map_err(io_at("writing", target))?;
        }
    }
    // A linked file is synced too: its writer may not have.
    output
        .unwrap_or(input)
        .sync_all()
        .map_err(io_at("writing", target))
}
