//! Files of saves: of states, in folders of their own. Not here: their rows.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{FOLDER, RECORD, SavePlace, SaveRecord};
use crate::artifacts::parts_of;
use crate::error::io_at;
use crate::folders::{self, sync_parent};
use crate::remote::Remote;
use crate::{Artifacts, Store, StoreError, blocking, ids};

impl Store {
    /// The file of a state, fetched when it is not here.
    pub async fn state_of(&self, record: &SaveRecord) -> Result<Option<PathBuf>, StoreError> {
        let Some(file) = record.file.as_deref() else {
            return Ok(None);
        };
        let path = record.place.path().join(file);
        let found = self.artifacts().file_below(&path).await?;
        match tokio::fs::try_exists(&found).await {
            Ok(false) => Err(StoreError::Damaged(format!("{} is gone", path.display()))),
            _ => Ok(Some(found)),
        }
    }

    /// A state's name in its save's folder, and its size.
    pub(super) async fn place_state(
        &self,
        place: &SavePlace,
        state: PathBuf,
    ) -> Result<(String, u64), StoreError> {
        let folders = self.artifacts().folders().clone();
        let folder = place.folder(&folders);
        blocking(move || {
            let name = format!("state-{}.safetensors", ids::random());
            let target = folder.join(&name);
            let publish = || {
                fs::create_dir_all(&folder).map_err(io_at("making", &folder))?;
                folders.publish_file(&state, &target)
            };
            // Who removes the save of before removes its folder, once.
            let size = publish().or_else(|error| match folder.exists() {
                true => Err(error),
                false => publish(),
            })?;
            sync_parent(&folder)?;
            Ok((name, size))
        })
        .await
    }

    pub(super) async fn push_state(
        &self,
        remote: &Remote,
        place: &SavePlace,
        state: &Path,
    ) -> Result<(String, u64), StoreError> {
        let path = self.below(state);
        if state.exists() {
            self.artifacts().keep_file_below(&path).await?;
        }
        let size = remote.size(&parts_of(&path)).await?;
        let size = size.ok_or_else(|| StoreError::Damaged(format!("{} was not kept", path.display())))?;
        let name = path.strip_prefix(place.path()).ok().and_then(Path::to_str);
        let name = name.ok_or_else(|| StoreError::Damaged(format!("{} is no state's", path.display())))?;
        Ok((name.to_owned(), size))
    }

    /// The file of a save that has no row any more, and its folder if nothing else is in it.
    pub async fn remove_state(&self, record: &SaveRecord) -> Result<(), StoreError> {
        let path = record.place.path();
        let file = record.file.as_ref().map(|file| path.join(file));
        if let (Some(remote), Some(file)) = (self.artifacts().remote(), &file) {
            remote.delete(&parts_of(file)).await?;
        }
        let (folder, file) = (
            self.artifacts().below(&path),
            file.map(|file| self.artifacts().below(&file)),
        );
        blocking(move || {
            if let Some(file) = file {
                folders::remove(&file)?;
                // In a cache it has a folder of its own.
                let _ = file.parent().map(fs::remove_dir);
            }
            // A save that comes meanwhile has its own there.
            let _ = fs::remove_dir(&folder);
            Ok(())
        })
        .await
    }

    /// What lies in a save's folder beside its file.
    pub(super) async fn remove_others(&self, record: &SaveRecord) -> Result<(), StoreError> {
        let path = record.place.path();
        let Some(remote) = self.artifacts().remote() else {
            let (folder, file) = (self.artifacts().below(&path), record.file.clone());
            return blocking(move || {
                for path in entries(&folder)? {
                    if path.file_name().and_then(|name| name.to_str()) != file.as_deref() {
                        folders::remove(&path)?;
                    }
                }
                Ok(())
            })
            .await;
        };
        for key in remote.list(&parts_of(&path)).await? {
            let key: Vec<&str> = key.iter().map(String::as_str).collect();
            if Some(key[parts_of(&path).len()..].join("/")) != record.file {
                remote.delete(&key).await?;
            }
        }
        let folder = self.artifacts().below(&path);
        blocking(move || folders::remove(&folder)).await
    }

    fn below(&self, path: &Path) -> PathBuf {
        let root = self.artifacts().folders().root();
        path.strip_prefix(root).unwrap_or(path).to_owned()
    }

    pub(super) async fn state_bytes(&self, path: &Path) -> Result<u64, StoreError> {
        let size = match self.artifacts().remote() {
            None => fs::metadata(self.artifacts().below(path))
                .ok()
                .map(|file| file.len()),
            Some(remote) => remote.size(&parts_of(path)).await?,
        };
        Ok(size.unwrap_or(0))
    }
}

/// Every file of every save, by its path in the data folder; fetched where they lie elsewhere.
pub(crate) async fn all_files(artifacts: &Artifacts) -> Result<Vec<(PathBuf, PathBuf)>, StoreError> {
    let mut files = vec![];
    if let Some(remote) = artifacts.remote() {
        for key in remote.list(&[FOLDER]).await? {
            let path: PathBuf = key.iter().collect();
            // An older program's record changes under its name: what is here of it is no copy of what is there.
            if path.ends_with(RECORD) {
                folders::remove(&artifacts.below(&path))?;
            }
            let found = artifacts.file_below(&path).await?;
            files.push((path, found));
        }
        return Ok(files);
    }
    let root = artifacts.folders().root();
    let found = files_below(&root.join(FOLDER))?.into_iter();
    files.extend(found.map(|path| (path.strip_prefix(root).unwrap_or(&path).to_owned(), path)));
    Ok(files)
}

pub(super) fn files_below(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let (mut files, mut open) = (vec![], vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        for path in entries(&folder)? {
            match path.is_dir() {
                true => open.push(path),
                false => files.push(path),
            }
        }
    }
    Ok(files)
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
