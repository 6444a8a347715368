//! Bytes by name: uploaded files, adapters by digest, the states of jobs. A local folder, and beside it the place that
//! other processes share when there is one; then the folder is its cache. All a backend process needs of the store.
//! Not here: rows, names, who may write.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use object_store::aws::AmazonS3Builder;
use tandem_core::id::{AdapterDigest, AdapterRef, JobId};
use tandem_core::job::{Life, Saved, files};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::blocking;
use crate::error::StoreError;
use crate::folders::{self, CONFIG, Folders, IDENTITY, Placement, README, StagedAdapter, TENSORS, Tenancy};
use crate::identity::Identity;
use crate::remote::Remote;

/// Written last, deleted first.
const COMPLETE: &str = "complete";
/// What a job waits for an artifact store that is away, and how often it tries: a request is refused at once, but a job
/// would lose work.
const JOB_PATIENCE: Duration = Duration::from_secs(30 * 60);
const JOB_RETRY: Duration = Duration::from_secs(1);

/// Cheap to clone.
#[derive(Clone)]
pub struct Artifacts {
    folders: Arc<Folders>,
    /// `None`: the folder is all there is, and nothing is copied.
    remote: Option<Arc<Remote>>,
    downloads: Arc<Downloads>,
    /// Adapters of the cache whose bytes this process has fetched or looked at.
    sound: Arc<std::sync::Mutex<HashSet<AdapterDigest>>>,
}

/// A hundred requests for a new adapter fetch it once, and who wants another thing does not wait for them.
#[derive(Default)]
struct Downloads {
    /// By the local path of what is fetched.
    underway: std::sync::Mutex<HashMap<PathBuf, Weak<Mutex<()>>>>,
}

impl Downloads {
    /// Held by the one who fetches `target` now.
    async fn turn(&self, target: &Path) -> OwnedMutexGuard<()> {
        let turn = {
            let mut underway = self.underway.lock().unwrap_or_else(PoisonError::into_inner);
            underway.retain(|_, turn| turn.strong_count() > 0);
            let known = underway.get(target).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let turn = Arc::default();
                underway.insert(target.to_owned(), Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }
}

impl Artifacts {
    /// For a process without a database: a backend. `url` is `s3://bucket/prefix`, a folder or its `file://` URL, or
    /// `None` for `data_dir` itself, which the router's process may own at the same time.
    pub fn open(url: Option<&str>, data_dir: &Path) -> Result<Artifacts, StoreError> {
        Artifacts::over(url, Folders::make(data_dir, Tenancy::Guest)?)
    }

    pub(crate) fn over(url: Option<&str>, folders: Folders) -> Result<Artifacts, StoreError> {
        let remote = match url {
            None => None,
            Some(url) if url.starts_with("s3://") || url.starts_with("s3a://") => {
                // The usual AWS_* variables, AWS_ENDPOINT_URL and AWS_ALLOW_HTTP among them.
                Some(Remote::bucket(url, AmazonS3Builder::from_env())?)
            }
            Some(url) => {
                let path = Path::new(url.strip_prefix("file://").unwrap_or(url));
                if url.contains("://") && !(url.starts_with("file://") && path.is_absolute()) {
                    return Err(StoreError::Url {
                        url: url.to_owned(),
                        why: "artifacts live at s3://bucket/prefix, at file:///folder or in a folder"
                            .to_owned(),
                    });
                }
                std::fs::create_dir_all(path).map_err(crate::error::io_at("making", path))?;
                let path = std::fs::canonicalize(path).map_err(crate::error::io_at("finding", path))?;
                // The data folder itself: no second copy.
                (path != folders.root())
                    .then(|| Remote::folder(&path))
                    .transpose()?
            }
        };
        if remote.is_some() && !folders.identity().exists() && folders.is_bare()? {
            folders.become_cache()?;
        }
        Ok(Artifacts::with_remote(folders, remote))
    }

    pub(crate) fn with_remote(folders: Folders, remote: Option<Remote>) -> Artifacts {
        Artifacts {
            folders: Arc::new(folders),
            remote: remote.map(Arc::new),
            downloads: Arc::default(),
            sound: Arc::default(),
        }
    }

    /// A path below the folder.
    pub fn below(&self, path: &Path) -> PathBuf {
        self.folders.root().join(path)
    }

    /// The file at a path below the folder; fetched when it is not here.
    pub async fn file_below(&self, path: &Path) -> Result<PathBuf, StoreError> {
        let target = self.below(path);
        let Some(remote) = &self.remote else {
            return Ok(target);
        };
        let _turn = self.downloads.turn(&target).await;
        if let Some(folder) = target.parent() {
            let made = tokio::fs::create_dir_all(folder).await;
            made.map_err(crate::error::io_at("making", folder))?;
        }
        match self.fetch(remote, &parts_of(path), &target).await? {
            true => Ok(target),
            false => Err(StoreError::Damaged(format!(
                "the artifact store has no {}",
                path.display()
            ))),
        }
    }

    /// See that the shared store has the file that was written at a path below the folder.
    pub async fn keep_file_below(&self, path: &Path) -> Result<(), StoreError> {
        if let Some(remote) = &self.remote {
            let here = self.below(path);
            remote.put(&here, &parts_of(path)).await?;
            // Whoever wants it fetches it.
            let removed = tokio::fs::remove_file(&here).await;
            removed.map_err(crate::error::io_at("removing", &here))?;
        }
        Ok(())
    }

    pub(crate) fn remote(&self) -> Option<&Remote> {
        self.remote.as_deref()
    }

    /// Whether other processes see the same artifacts by another way than this folder.
    pub fn is_cached(&self) -> bool {
        self.remote.is_some()
    }

    /// Where they lie, for messages.
    pub(crate) fn place(&self) -> String {
        match &self.remote {
            None => self.folders.root().display().to_string(),
            Some(remote) => remote.url().to_owned(),
        }
    }

    /// What the place says of itself.
    pub(crate) async fn identity(&self) -> Result<Option<Identity>, StoreError> {
        let text = match &self.remote {
            Some(remote) => remote.read(&[IDENTITY]).await?,
            None => match tokio::fs::read(self.folders.identity()).await {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                read => Some(read.map_err(crate::error::io_at("reading", &self.folders.identity()))?),
            },
        };
        let parse = |text: Vec<u8>| {
            serde_json::from_slice(&text)
                .map_err(|error| StoreError::Damaged(format!("{IDENTITY} in {}: {error}", self.place())))
        };
        text.map(parse).transpose()
    }

    pub(crate) async fn identify(&self, identity: &Identity) -> Result<(), StoreError> {
        let text = serde_json::to_string(identity).expect("plain data are JSON");
        if let Some(remote) = &self.remote {
            return remote.mark(&[IDENTITY], &text).await;
        }
        let (staged, folders) = (self.folders.staging(), self.folders.clone());
        blocking(move || {
            std::fs::write(&staged, text).map_err(crate::error::io_at("writing", &staged))?;
            folders.publish_file(&staged, &folders.identity()).map(drop)
        })
        .await
    }

    /// Whether the place holds no artifact.
    pub(crate) async fn is_bare(&self) -> Result<bool, StoreError> {
        match &self.remote {
            None => self.folders.is_bare(),
            Some(remote) => {
                for kind in Folders::KINDS {
                    if remote.has_any(&[kind]).await? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
        }
    }

    /// Ask the shared place whether it answers, when there is one.
    pub(crate) async fn probe(&self) {
        if let Some(remote) = &self.remote {
            remote.probe().await;
        }
    }

    pub(crate) fn is_away(&self) -> bool {
        self.remote.as_ref().is_some_and(|remote| remote.is_away())
    }

    pub(crate) fn folders(&self) -> &Arc<Folders> {
        &self.folders
    }

    /// The local folder of an adapter; fetched and checked against its digest when it is not here. What the cache has from
    /// an earlier run is looked at once, and fetched again when it is damaged.
    pub async fn adapter(&self, digest: AdapterDigest) -> Result<PathBuf, StoreError> {
        let target = self.folders.adapter(&digest);
        let Some(remote) = &self.remote else {
            return Ok(target);
        };
        if target.exists() && self.is_sound(&digest) {
            return Ok(target);
        }
        let _turn = self.downloads.turn(&target).await;
        if target.exists() && (self.is_sound(&digest) || self.look_at(&target, digest).await?) {
            return Ok(target);
        }
        let folders = self.folders.clone();
        let staged = blocking(move || folders.staging_folder()).await?;
        let fetched = self.fetch_adapter(remote, digest, &staged).await;
        // Gone already when it was renamed.
        let _ = tokio::fs::remove_dir_all(&staged).await;
        if fetched.is_ok() {
            self.note_sound(digest);
        }
        fetched
    }

    fn is_sound(&self, digest: &AdapterDigest) -> bool {
        let sound = self.sound.lock().unwrap_or_else(PoisonError::into_inner);
        sound.contains(digest)
    }

    fn note_sound(&self, digest: AdapterDigest) {
        let mut sound = self.sound.lock().unwrap_or_else(PoisonError::into_inner);
        sound.insert(digest);
    }

    /// Whether a cached adapter has the bytes that its name says. If not, it goes.
    async fn look_at(&self, folder: &Path, digest: AdapterDigest) -> Result<bool, StoreError> {
        let path = folder.to_owned();
        let got = blocking(move || Ok::<_, StoreError>(folders::digest(&path))).await?;
        if got.as_ref().is_ok_and(|got| *got == digest) {
            self.note_sound(digest);
            return Ok(true);
        }
        let got = got.map_or_else(|error| error.to_string(), |got| got.to_string());
        tracing::warn!(adapter = %digest, got, "the cached adapter is damaged: it is fetched again");
        let path = folder.to_owned();
        blocking(move || folders::remove(&path)).await?;
        Ok(false)
    }

    async fn fetch_adapter(
        &self,
        remote: &Remote,
        digest: AdapterDigest,
        staged: &Path,
    ) -> Result<PathBuf, StoreError> {
        let hex = digest.to_string();
        let key = |name| ["adapters", &hex, name];
        let mut found = remote.has(&key(COMPLETE)).await?;
        for name in [CONFIG, TENSORS] {
            found = found && remote.get(&key(name), &staged.join(name)).await?;
        }
        if !found {
            return Err(StoreError::Adapter {
                missing: true,
                message: format!("No adapter {hex} found in the artifact store"),
            });
        }
        remote.get(&key(README), &staged.join(README)).await?;
        let (folders, staged) = (self.folders.clone(), staged.to_owned());
        blocking(move || {
            let got = folders::digest(&staged)?;
            if got != digest {
                return Err(StoreError::Adapter {
                    missing: false,
                    message: format!("the artifact store's adapter {digest} is damaged: its digest is {got}"),
                });
            }
            folders.place_adapter(&staged, &digest)
        })
        .await
    }

    /// Read a PEFT folder, for [`Artifacts::publish_adapter`].
    pub(crate) async fn stage_adapter(
        &self,
        source: &Path,
        placement: Placement,
        limit_bytes: u64,
    ) -> Result<StagedAdapter, StoreError> {
        let (folders, source) = (self.folders.clone(), source.to_owned());
        blocking(move || folders.stage_adapter(&source, placement, limit_bytes)).await
    }

    /// Bring a PEFT folder into the store. The same adapter twice is one.
    pub(crate) async fn publish_adapter(&self, staged: StagedAdapter) -> Result<AdapterDigest, StoreError> {
        let digest = staged.digest;
        let folders = self.folders.clone();
        let folder = blocking(move || folders.place_adapter(staged.folder(), &digest)).await?;
        if let Some(remote) = &self.remote {
            let hex = digest.to_string();
            if !remote.has(&["adapters", &hex, COMPLETE]).await? {
                for name in [CONFIG, TENSORS, README] {
                    if name != README || folder.join(name).exists() {
                        remote.put(&folder.join(name), &["adapters", &hex, name]).await?;
                    }
                }
                remote.mark(&["adapters", &hex, COMPLETE], "complete\n").await?;
            }
        }
        Ok(digest)
    }

    /// See that the shared store has an adapter that a replica made. Where the folder is all there is, its owner finds it
    /// in the job's folder and writes its row first.
    pub async fn keep_adapter(&self, adapter: &AdapterRef) -> Result<AdapterDigest, StoreError> {
        match &self.remote {
            None => Ok(adapter.digest),
            Some(_) => self.keep_adapter_patiently(adapter).await,
        }
    }

    pub(crate) async fn keep_adapter_patiently(
        &self,
        adapter: &AdapterRef,
    ) -> Result<AdapterDigest, StoreError> {
        patiently(|| self.keep_adapter_now(adapter)).await
    }

    async fn keep_adapter_now(&self, adapter: &AdapterRef) -> Result<AdapterDigest, StoreError> {
        match self.has_adapter(&adapter.digest).await? {
            true => Ok(adapter.digest),
            false => {
                let staged = self
                    .stage_adapter(&adapter.folder, Placement::Link, u64::MAX)
                    .await?;
                self.publish_adapter(staged).await
            }
        }
    }

    pub(crate) async fn has_adapter(&self, digest: &AdapterDigest) -> Result<bool, StoreError> {
        match &self.remote {
            None => Ok(self.folders.adapter(digest).exists()),
            Some(remote) => remote.has(&["adapters", &digest.to_string(), COMPLETE]).await,
        }
    }

    /// Of its numbers. `None`: it is not there.
    pub(crate) async fn adapter_bytes(&self, digest: &AdapterDigest) -> Result<Option<u64>, StoreError> {
        let here = tokio::fs::metadata(self.folders.adapter(digest).join(TENSORS)).await;
        match (here, &self.remote) {
            (Ok(file), _) => Ok(Some(file.len())),
            (Err(_), None) => Ok(None),
            (Err(_), Some(remote)) => remote.size(&["adapters", &digest.to_string(), TENSORS]).await,
        }
    }

    pub(crate) async fn remove_adapter(&self, digest: &AdapterDigest) -> Result<(), StoreError> {
        if let Some(remote) = &self.remote {
            let hex = digest.to_string();
            remote.delete(&["adapters", &hex, COMPLETE]).await?;
            remote.delete_all(&["adapters", &hex]).await?;
        }
        let path = self.folders.adapter(digest);
        blocking(move || folders::remove(&path)).await
    }

    /// Make a staged file durable under `id`, and only then let others see it. Returns its size.
    pub(crate) async fn publish_file(&self, staged: &Path, id: &str) -> Result<u64, StoreError> {
        if let Some(remote) = &self.remote {
            remote.put(staged, &["files", id]).await?;
        }
        let (folders, staged, target) = (self.folders.clone(), staged.to_owned(), self.folders.file(id));
        blocking(move || folders.publish_file(&staged, &target)).await
    }

    /// A file that a job made.
    pub(crate) async fn publish_result(&self, content: &[u8], id: &str) -> Result<u64, StoreError> {
        patiently(|| async {
            let staged = self.folders.staging();
            let written = tokio::fs::write(&staged, content).await;
            written.map_err(crate::error::io_at("writing", &staged))?;
            self.publish_file(&staged, id).await
        })
        .await
    }

    /// The local path of a file; fetched when it is not here.
    pub(crate) async fn file(&self, id: &str) -> Result<PathBuf, StoreError> {
        let target = self.folders.file(id);
        let Some(remote) = &self.remote else {
            return Ok(target);
        };
        if target.exists() {
            return Ok(target);
        }
        let _turn = self.downloads.turn(&target).await;
        match self.fetch(remote, &["files", id], &target).await? {
            true => Ok(target),
            false => Err(StoreError::Damaged(format!(
                "the artifact store has no bytes of {id}"
            ))),
        }
    }

    pub(crate) async fn remove_file(&self, id: &str) -> Result<(), StoreError> {
        if let Some(remote) = &self.remote {
            remote.delete(&["files", id]).await?;
        }
        let path = self.folders.file(id);
        blocking(move || folders::remove(&path)).await
    }

    /// The folder in which a life of a job runs: its datasets, and the state it goes on from.
    pub async fn pull_job(&self, id: &JobId, life: Life) -> Result<PathBuf, StoreError> {
        patiently(|| self.pull_job_now(id, life)).await
    }

    async fn pull_job_now(&self, id: &JobId, life: Life) -> Result<PathBuf, StoreError> {
        let Life { epoch, saved } = life;
        if let Some(remote) = &self.remote {
            let (job, folder) = (
                self.folders.job(id.as_str()),
                self.folders.life(id.as_str(), epoch),
            );
            tokio::fs::create_dir_all(&folder)
                .await
                .map_err(crate::error::io_at("making", &folder))?;
            let (folders, job_id) = (self.folders.clone(), id.as_str().to_owned());
            blocking(move || folders.drop_damaged_datasets(&job_id)).await?;
            if !self
                .fetch(
                    remote,
                    &["jobs", id.as_str(), files::TRAIN],
                    &job.join(files::TRAIN),
                )
                .await?
            {
                return Err(StoreError::Damaged(format!(
                    "the artifact store has no datasets of {id}"
                )));
            }
            for name in files::INPUTS.into_iter().filter(|&name| name != files::TRAIN) {
                self.fetch(remote, &["jobs", id.as_str(), name], &job.join(name))
                    .await?;
            }
            if let Some(Saved { epoch, step }) = saved {
                let (epoch, step) = (epoch.to_string(), step.to_string());
                let key = ["jobs", id.as_str(), &epoch, &step, files::STATE];
                if !self.fetch(remote, &key, &folder.join(files::STATE)).await? {
                    // Its numbers are a function of seed and step: the job only takes longer.
                    tracing::warn!(job = %id, epoch, step, "the artifact store lost a state; the job begins again");
                }
            }
        }
        let (folders, id) = (self.folders.clone(), id.to_string());
        blocking(move || folders.begin_life(&id, epoch)).await
    }

    /// Keep the state that a life of a job wrote after optimizer step `step`. It counts once a row names it; that it is
    /// kept already is fine.
    pub async fn push_job(&self, id: &JobId, epoch: u64, step: u64) -> Result<(), StoreError> {
        let Some(remote) = &self.remote else { return Ok(()) };
        let state = self.folders.life(id.as_str(), epoch).join(files::STATE);
        let (epoch, step) = (epoch.to_string(), step.to_string());
        let key = ["jobs", id.as_str(), &epoch, &step, files::STATE];
        patiently(|| async {
            if !remote.has(&key).await? {
                remote.put(&state, &key).await?;
            }
            Ok(())
        })
        .await
    }

    /// A later state is kept: nobody goes on from this one.
    pub async fn drop_state(&self, id: &JobId, saved: Saved) -> Result<(), StoreError> {
        let Some(remote) = &self.remote else { return Ok(()) };
        let (epoch, step) = (saved.epoch.to_string(), saved.step.to_string());
        let key = ["jobs", id.as_str(), &epoch, &step, files::STATE];
        patiently(|| remote.delete(&key)).await
    }

    /// Where the router writes the datasets of a job, for [`Artifacts::push_datasets`].
    pub(crate) fn job_folder(&self, id: &str) -> PathBuf {
        self.folders.job(id)
    }

    /// The files from which a job that has not ended goes on, by their names in its folder: datasets and the last states.
    pub(crate) async fn job_files(
        &self,
        id: &str,
        saved: Option<(u64, u64)>,
    ) -> Result<Vec<(PathBuf, PathBuf)>, StoreError> {
        let job = self.folders.job(id);
        let Some(remote) = &self.remote else {
            let folders = self.folders.clone();
            let id = id.to_owned();
            return blocking(move || folders.job_files(&id)).await;
        };
        let mut found = vec![];
        for name in files::INPUTS {
            if self.fetch(remote, &["jobs", id, name], &job.join(name)).await? {
                found.push((name.into(), job.join(name)));
            }
        }
        if let Some((epoch, step)) = saved {
            let path = self.folders.staging();
            let (life, epoch, step) = (folders::life_name(epoch), epoch.to_string(), step.to_string());
            if remote
                .get(&["jobs", id, &epoch, &step, files::STATE], &path)
                .await?
            {
                found.push((Path::new(&life).join(files::STATE), path));
            }
        }
        Ok(found)
    }

    /// Let other processes see the datasets in the job's folder.
    pub(crate) async fn push_datasets(&self, id: &str) -> Result<(), StoreError> {
        let Some(remote) = &self.remote else { return Ok(()) };
        for name in files::INPUTS {
            let path = self.folders.job(id).join(name);
            if path.exists() {
                let key = ["jobs", id, name];
                patiently(|| remote.put(&path, &key)).await?;
            }
        }
        Ok(())
    }

    /// A process that ran a job needs its folder no more. With a folder that is shared this is the router's to do.
    pub async fn forget_job(&self, id: &JobId) -> Result<(), StoreError> {
        match &self.remote {
            None => Ok(()),
            Some(_) => self.remove_job_folder(id.as_str()).await,
        }
    }

    /// The job has ended: nobody goes on from its states.
    pub(crate) async fn remove_job(&self, id: &str) -> Result<(), StoreError> {
        if let Some(remote) = &self.remote {
            match remote.delete_all(&["jobs", id]).await {
                // Whoever ended the job does not wait for this.
                Err(error) if error.away().is_some() => {
                    let (remote, id) = (remote.clone(), id.to_owned());
                    tokio::spawn(async move {
                        let key = ["jobs", id.as_str()];
                        if let Err(error) = patiently(|| remote.delete_all(&key)).await {
                            tracing::warn!(job = id, %error, "states of an ended job were left");
                        }
                    });
                }
                done => done?,
            }
        }
        self.remove_job_folder(id).await
    }

    async fn remove_job_folder(&self, id: &str) -> Result<(), StoreError> {
        let path = self.folders.job(id);
        blocking(move || folders::remove(&path)).await
    }

    /// Download into a cache path, by way of staging. `false`: there is no such object. What is there stays.
    async fn fetch(&self, remote: &Remote, key: &[&str], target: &Path) -> Result<bool, StoreError> {
        if target.exists() {
            return Ok(true);
        }
        let staged = self.folders.staging();
        let fetched = remote.get(key, &staged).await;
        if !matches!(fetched, Ok(true)) {
            let _ = tokio::fs::remove_file(&staged).await;
            return fetched;
        }
        let (folders, target) = (self.folders.clone(), target.to_owned());
        blocking(move || folders.publish_file(&staged, &target)).await?;
        Ok(true)
    }
}

/// A path below the folder is a key of the shared store, too.
pub(crate) fn parts_of(path: &Path) -> Vec<&str> {
    path.iter().filter_map(|part| part.to_str()).collect()
}

/// For what a job needs: while the artifact store is away, try again.
async fn patiently<T, F: Future<Output = Result<T, StoreError>>>(
    attempt: impl Fn() -> F,
) -> Result<T, StoreError> {
    let began = Instant::now();
    let mut told = false;
    loop {
        match attempt().await {
            Err(error) if error.away().is_some() && began.elapsed() < JOB_PATIENCE => {
                // Once per wait.
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "a job waits for the artifact store");
                }
                tokio::time::sleep(JOB_RETRY).await;
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn only_the_same_download_waits() {
        let downloads = Downloads::default();
        let (one, other) = (Path::new("adapters/one"), Path::new("adapters/other"));
        let first = downloads.turn(one).await;
        assert!(downloads.turn(other).now_or_never().is_some());
        assert!(downloads.turn(one).now_or_never().is_none());
        drop(first);
        assert!(downloads.turn(one).now_or_never().is_some());
        drop(downloads.turn(other).await);
        let known = downloads.underway.lock().unwrap().len();
        assert_eq!(known, 1, "what is over is forgotten");
    }
}
