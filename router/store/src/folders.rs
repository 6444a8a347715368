//! The folders of one data folder: staging, publishing by rename, the lock. Blocking; no database, no network. What a
//! kill left in them: `leftovers`.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tandem_core::dataset;
use tandem_core::id::{AdapterDigest, AdapterHasher, Digest, Hasher};
use tandem_core::job::files;

use crate::error::{StoreError, io_at};
use crate::ids;

pub(crate) const CONFIG: &str = "adapter_config.json";
pub(crate) const TENSORS: &str = "adapter_model.safetensors";
pub(crate) const README: &str = "README.md";
pub(crate) const ADAPTER_FILES: [&str; 3] = [CONFIG, TENSORS, README];
/// What PEFT wrote instead of [`TENSORS`] before 2024, and on request.
const PICKLED: &str = "adapter_model.bin";
/// Prefix of the folder of one life of a job, inside the job's.
const LIFE: &str = "life-";
/// A staging folder with this file in it belongs to a living process as long as the file is locked.
const HELD: &str = "lock";
/// Where artifacts go that no database knows.
pub(crate) const QUARANTINE: &str = "quarantine";
/// What the place of a store says of itself.
pub(crate) const IDENTITY: &str = "store.json";
/// A file in a data folder whose artifacts all lie elsewhere, too.
const CACHE: &str = "cache";
/// Real ones are about a kilobyte; a larger "config" is a wrong or hostile file.
const CONFIG_BYTES: u64 = 1 << 20;
const COPY_BUFFER_BYTES: usize = 1 << 20;
/// What a life goes on from: the one before counts when the last is damaged or gone.
const STATES: [&str; 2] = [files::STATE, files::EARLIER_STATE];

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
    staging: PathBuf,
    /// Of `staging`, when it is not the one that the owner of the whole folder empties at its start.
    _held: Option<File>,
}

/// What a process is to a data folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tenancy {
    /// It holds the lock of the folder, or will.
    Owner,
    /// It works beside the owner, with a staging folder of its own.
    Guest,
}

impl Folders {
    /// Folders of artifacts.
    pub const KINDS: [&str; 3] = ["files", "adapters", "jobs"];

    pub fn make(root: &Path, tenancy: Tenancy) -> Result<Folders, StoreError> {
        fs::create_dir_all(root).map_err(io_at("making", root))?;
        // Absolute, because the engine reads adapters and datasets by these paths.
        let root = fs::canonicalize(root).map_err(io_at("finding", root))?;
        let mut staging = root.join("staging");
        if staging.is_symlink() {
            let why = "it is a link, and what lies in it is removed at each start: make it a folder";
            return Err(io_at("using", &staging)(io::Error::other(why)));
        }
        if tenancy == Tenancy::Guest {
            staging.push(ids::random());
        }
        for folder in [
            &root.join("files"),
            &root.join("adapters"),
            &root.join("jobs"),
            &staging,
        ] {
            fs::create_dir_all(folder).map_err(io_at("making", folder))?;
        }
        let held = match tenancy {
            Tenancy::Owner => None,
            Tenancy::Guest => {
                let path = staging.join(HELD);
                let file = File::create(&path).map_err(io_at("making", &path))?;
                file.lock().map_err(io_at("locking", &path))?;
                Some(file)
            }
        };
        Ok(Folders {
            root,
            staging,
            _held: held,
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
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

    pub fn identity(&self) -> PathBuf {
        self.root.join(IDENTITY)
    }

    /// Whether there is no artifact.
    pub fn is_bare(&self) -> Result<bool, StoreError> {
        let mut n = 0;
        for kind in Folders::KINDS {
            n += self.entries(kind)?.len();
        }
        Ok(n == 0)
    }

    /// Whether it was begun as the cache of a place elsewhere: then all of it lies there, too.
    pub fn is_cache(&self) -> bool {
        self.root.join(CACHE).exists()
    }

    /// From here on it is a cache.
    pub fn become_cache(&self) -> Result<(), StoreError> {
        let path = self.root.join(CACHE);
        fs::write(
            &path,
            "The artifacts here are copies of those that --artifact-url names.\n",
        )
        .map_err(io_at("writing", &path))
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
        self.staging.join(ids::random())
    }

    /// The folder of one life of a job.
    pub fn life(&self, id: &str, epoch: u64) -> PathBuf {
        self.job(id).join(life_name(epoch))
    }

    /// The folders of a job's lives, the latest first.
    fn lives(&self, id: &str) -> Result<Vec<(u64, PathBuf)>, StoreError> {
        let job = self.job(id);
        let mut lives = vec![];
        for entry in fs::read_dir(&job).map_err(io_at("reading", &job))? {
            let entry = entry.map_err(io_at("reading", &job))?;
            let name = entry.file_name();
            let epoch = name
                .to_str()
                .and_then(|name| name.strip_prefix(LIFE)?.parse().ok());
            lives.extend(epoch.map(|epoch| (epoch, entry.path())));
        }
        lives.sort_by_key(|&(epoch, _)| std::cmp::Reverse(epoch));
        Ok(lives)
    }

    /// What a job goes on from, by its name in the job's folder. None when the folder is gone.
    pub fn job_files(&self, id: &str) -> Result<Vec<(PathBuf, PathBuf)>, StoreError> {
        let job = self.job(id);
        if !job.exists() {
            return Ok(vec![]);
        }
        let mut names: Vec<PathBuf> = files::INPUTS.map(PathBuf::from).into();
        let mut lives = self.lives(id)?.into_iter();
        if let Some((epoch, _)) = lives.find(|(_, life)| has_state(life)) {
            let life = PathBuf::from(life_name(epoch));
            names.extend(STATES.map(|name| life.join(name)));
        }
        let found = names.into_iter().map(|name| (job.join(&name), name));
        Ok(found
            .filter(|(path, _)| path.exists())
            .map(|(path, name)| (name, path))
            .collect())
    }

    /// Remove datasets that are not as they were written: of a cache, they are fetched again.
    pub fn drop_damaged_datasets(&self, id: &str) -> Result<(), StoreError> {
        for name in [files::TRAIN, files::VALID] {
            let path = self.job(id).join(name);
            let bytes = match fs::read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                read => read.map_err(io_at("reading", &path))?,
            };
            if let Err(error) = dataset::check(&bytes) {
                tracing::warn!(path = %path.display(), %error, "fetching it again");
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Of this process.
    pub fn own_staging(&self) -> &Path {
        &self.staging
    }

    /// Make the folder of a life: the datasets that lie in the job's folder, and the newest state of an earlier life.
    /// What is there stays: the same life begun again.
    pub fn begin_life(&self, id: &str, epoch: u64) -> Result<PathBuf, StoreError> {
        let (job, life) = (self.job(id), self.life(id, epoch));
        fs::create_dir_all(&life).map_err(io_at("making", &life))?;
        for name in files::INPUTS {
            link(&job.join(name), &life.join(name))?;
        }
        let mut lives = self.lives(id)?.into_iter();
        let earlier = lives.find(|(earlier, folder)| *earlier < epoch && has_state(folder));
        if let Some((_, earlier)) = earlier {
            for name in STATES {
                link(&earlier.join(name), &life.join(name))?;
            }
        }
        Ok(life)
    }

    /// Make a staged file durable and give it its final name. Returns its size.
    pub fn publish_file(&self, staged: &Path, target: &Path) -> Result<u64, StoreError> {
        let file = File::open(staged).map_err(io_at("opening", staged))?;
        file.sync_all().map_err(io_at("writing", staged))?;
        let bytes = file.metadata().map_err(io_at("reading", staged))?.len();
        fs::rename(staged, target).map_err(io_at("publishing", target))?;
        sync_parent(target)?;
        Ok(bytes)
    }

    /// A fresh staging folder.
    pub fn staging_folder(&self) -> Result<PathBuf, StoreError> {
        let staged = self.staging();
        fs::create_dir(&staged).map_err(io_at("making", &staged))?;
        Ok(staged)
    }

    /// Give a staged adapter its final place. That it is there already is as good, unless a disk has damaged it since.
    pub fn place_adapter(&self, staged: &Path, digest: &AdapterDigest) -> Result<PathBuf, StoreError> {
        let target = self.adapter(digest);
        if target.exists() && !self::digest(&target).is_ok_and(|got| got == *digest) {
            tracing::warn!(adapter = %digest, "the stored adapter was damaged: this copy takes its place");
            remove(&target)?;
        }
        if !target.exists() {
            File::open(staged)
                .and_then(|folder| folder.sync_all())
                .map_err(io_at("writing", staged))?;
            match fs::rename(staged, &target) {
                // Somebody else was faster.
                Err(_) if target.exists() => {}
                renamed => renamed.map_err(io_at("publishing", &target))?,
            }
            sync_parent(&target)?;
        }
        Ok(target)
    }

    /// Read an adapter from `source` into a staging folder, which is gone when what comes back is dropped.
    pub fn stage_adapter(
        &self,
        source: &Path,
        placement: Placement,
        limit_bytes: u64,
    ) -> Result<StagedAdapter, StoreError> {
        let folder = Staged(self.staging_folder()?);
        let digest = stage_adapter(source, &folder.0, placement, limit_bytes)?;
        Ok(StagedAdapter { digest, folder })
    }
}

/// An adapter on its way into the store.
pub(crate) struct StagedAdapter {
    pub digest: AdapterDigest,
    folder: Staged,
}

impl StagedAdapter {
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }
}

struct Staged(PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // Gone already when it was renamed.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Between the two, a kill leaves the earlier one alone.
fn has_state(life: &Path) -> bool {
    STATES.iter().any(|name| life.join(name).exists())
}

/// Of the folder of a life, inside the job's.
pub(crate) fn life_name(epoch: u64) -> String {
    format!("{LIFE}{epoch}")
}

/// Between two tries to remove a folder that somebody still writes into, and how many there are.
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);
const REMOVAL_TRIES: u32 = 100;

/// Remove a file or a folder; that it is gone already is fine. Who prepares a job that was cancelled may not have heard of
/// it: what is written meanwhile goes as well.
pub(crate) fn remove(path: &Path) -> Result<(), StoreError> {
    let try_it = || match fs::symlink_metadata(path)?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    let mut done = try_it();
    for _ in 1..REMOVAL_TRIES {
        let is_written = |error: &io::Error| error.kind() == io::ErrorKind::DirectoryNotEmpty;
        if !done.as_ref().is_err_and(is_written) {
            break;
        }
        std::thread::sleep(REMOVAL_PAUSE);
        done = try_it();
    }
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_at("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Whether this is the staging folder of a process that lives.
pub(crate) fn is_held(folder: &Path) -> bool {
    File::open(folder.join(HELD)).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
}

/// The same file under another name, or a copy where the file system cannot link. A missing source, and a target that
/// is there, are fine.
fn link(source: &Path, target: &Path) -> Result<(), StoreError> {
    if target.exists() || !source.exists() {
        return Ok(());
    }
    if fs::hard_link(source, target).is_err() {
        let partial = target.with_extension("partial");
        fs::copy(source, &partial)
            .and_then(|_| File::open(&partial)?.sync_all())
            .and_then(|()| fs::rename(&partial, target))
            .map_err(io_at("copying", source))?;
    }
    Ok(())
}

/// How many bytes a file has, and their digest. One that has more than `most` is not read to its end.
pub(crate) fn file_digest(path: &Path, most: u64) -> Result<(u64, Digest), StoreError> {
    let mut file = File::open(path).map_err(io_at("opening", path))?;
    let (mut hasher, mut bytes) = (Hasher::default(), 0);
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    loop {
        match file.read(&mut buffer).map_err(io_at("reading", path))? {
            n if n == 0 || bytes > most => return Ok((bytes, hasher.finish())),
            n => {
                hasher.update(&buffer[..n]);
                bytes += n as u64;
            }
        }
    }
}

/// The digest of the adapter in `folder`.
pub(crate) fn digest(folder: &Path) -> Result<AdapterDigest, StoreError> {
    let length = |name: &str| {
        let path = folder.join(name);
        fs::metadata(&path)
            .map(|found| found.len())
            .map_err(io_at("reading", &path))
    };
    let mut hasher = AdapterHasher::new(length(CONFIG)?, length(TENSORS)?);
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    for name in [CONFIG, TENSORS] {
        let path = folder.join(name);
        let mut file = File::open(&path).map_err(io_at("opening", &path))?;
        loop {
            match file.read(&mut buffer).map_err(io_at("reading", &path))? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
        }
    }
    Ok(hasher.finish())
}

pub(crate) fn sync_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().expect("every artifact lies in a folder");
    File::open(parent)
        .and_then(|folder| folder.sync_all())
        .map_err(io_at("writing", parent))
}

/// What a folder is that lacks what an adapter has, and what to do.
fn no_adapter(source: &Path) -> Option<String> {
    let has = |name: &str| source.join(name).exists();
    if !source.is_dir() {
        return Some("it is not a folder".to_owned());
    }
    if has(CONFIG) && !has(TENSORS) && has(PICKLED) {
        return Some(format!(
            "{PICKLED} is a pickle, which is not read because it may run any code; in Python, \
             safetensors.torch.save_file(torch.load(\"{PICKLED}\", weights_only=True), \"{TENSORS}\") converts it"
        ));
    }
    if has(CONFIG) {
        return None;
    }
    // PEFT saves an adapter that is not called "default" in a folder of its own.
    let mut inner = source
        .read_dir()
        .ok()?
        .flatten()
        .filter(|entry| entry.path().join(CONFIG).exists());
    match inner.next() {
        Some(entry) => Some(format!("{} inside it is one", entry.file_name().display())),
        None if has("config.json") => {
            Some("it is a whole model's folder (--model), not an adapter's".to_owned())
        }
        None => None,
    }
}

fn stage_adapter(
    source: &Path,
    staged: &Path,
    placement: Placement,
    limit_bytes: u64,
) -> Result<AdapterDigest, StoreError> {
    let missing = |message| StoreError::Adapter {
        missing: true,
        message,
    };
    if let Some(why) = no_adapter(source) {
        return Err(missing(format!(
            "No adapter found for {}: {why}",
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
    if tensors_len > limit_bytes {
        let message =
            format!("{TENSORS} has {tensors_len} bytes, an adapter of this model has at most {limit_bytes}");
        return Err(StoreError::Adapter {
            missing: false,
            message,
        });
    }
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
