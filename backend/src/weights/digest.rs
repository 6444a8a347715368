//! The identity of a checkpoint: SHA-256 over config.json and the SHA-256 of each weight file. Hashing takes seconds for
//! large files, so the digests of files are kept by path, size and time of change; and a file of the hub's cache is named by
//! its own. Not here: which files a checkpoint has.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tandem_core::id::Digest;
use tandem_kernels::mapped::MappedFile;
use tracing::warn;

use super::{CONFIG, Checkpoint, LoadError, gguf};

/// Files hashed at once. Disks and cores are shared with the loading itself.
const AT_ONCE: usize = 4;

/// Digests of files that were hashed before, by path.
#[derive(Default, Serialize, Deserialize)]
struct Known(BTreeMap<String, Stamped>);

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamped {
    stamp: Stamp,
    sha256: String,
}

/// What changes when a file does.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    /// Since 1970.
    changed_ns: String,
}

impl Checkpoint {
    /// `known`: the file in which digests are kept; nothing is, without one.
    pub fn digest(&self, known: Option<&Path>) -> Result<Digest, LoadError> {
        let read = |file: &str| {
            fs::read(self.path.join(file)).map_err(|error| LoadError::Read {
                file: file.to_owned(),
                error,
            })
        };
        // A GGUF has none beside it.
        let mut parts = match gguf::is_gguf(&self.path) {
            true => vec![],
            false => vec![read(CONFIG)?],
        };
        parts.extend(
            self.file_digests(known)
                .into_iter()
                .map(|digest| digest.0.to_vec()),
        );
        let mut hasher = Sha256::new();
        for part in parts {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Ok(Digest(hasher.finalize().into()))
    }

    /// In the order of the files.
    fn file_digests(&self, known: Option<&Path>) -> Vec<Digest> {
        let mut kept: Known = known
            .and_then(|path| fs::read(path).ok())
            .and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default();
        let folder = match gguf::is_gguf(&self.path) {
            true => self.path.parent().unwrap_or(Path::new("")),
            false => &self.path,
        };
        let about: Vec<(String, Option<Stamp>)> = self
            .files
            .iter()
            .map(|(name, _)| folder.join(name))
            .map(|path| (path.display().to_string(), stamp(&path)))
            .collect();
        let mut digests: Vec<Option<Digest>> = about
            .iter()
            .map(|(path, stamp)| {
                let fresh = kept
                    .0
                    .get(path)
                    .filter(|kept| Some(&kept.stamp) == stamp.as_ref());
                fresh
                    .and_then(|kept| kept.sha256.parse().ok())
                    .or_else(|| named(Path::new(path)))
            })
            .collect();
        let missing: Vec<usize> = (0..digests.len()).filter(|&i| digests[i].is_none()).collect();
        for some in missing.chunks(AT_ONCE) {
            std::thread::scope(|scope| {
                let hashing: Vec<_> = some
                    .iter()
                    .map(|&i| (i, scope.spawn(move || sha256(&self.files[i].1))))
                    .collect();
                for (i, hashing) in hashing {
                    digests[i] = Some(hashing.join().expect("hashing does not panic"));
                }
            });
        }
        let digests: Vec<Digest> = digests
            .into_iter()
            .map(|digest| digest.expect("each is known now"))
            .collect();
        if let (Some(file), false) = (known, missing.is_empty()) {
            for i in missing {
                // A file that changed meanwhile is hashed again next time.
                let (path, before) = &about[i];
                if let (Some(stamp), true) = (before.clone(), stamp(Path::new(path)) == *before) {
                    let sha256 = digests[i].to_string();
                    kept.0.insert(path.clone(), Stamped { stamp, sha256 });
                }
            }
            // Only time is lost without it.
            if let Err(error) = keep(&kept, file) {
                warn!(file = %file.display(), %error, "the digests of the weights are not kept");
            }
        }
        digests
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let about = fs::metadata(path).ok()?;
    let changed = about.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(Stamp {
        bytes: about.len(),
        changed_ns: changed.as_nanos().to_string(),
    })
}

/// `snapshots/COMMIT/model.safetensors` is a link to `blobs/SHA256`, which whoever downloaded it has checked.
fn named(path: &Path) -> Option<Digest> {
    let blob = fs::read_link(path).ok()?;
    let is_blob = blob.parent()?.file_name()? == "blobs";
    blob.file_name()?.to_str().filter(|_| is_blob)?.parse().ok()
}

fn sha256(file: &MappedFile) -> Digest {
    Digest(Sha256::digest(file.bytes()).into())
}

fn keep(known: &Known, path: &Path) -> std::io::Result<()> {
    let fresh = path.with_extension(format!("{}.fresh", std::process::id()));
    fs::write(&fresh, serde_json::to_vec_pretty(known)?)?;
    fs::rename(fresh, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use safetensors::tensor::TensorView;
    use safetensors::{Dtype, serialize_to_file};

    use super::*;

    fn write(path: &Path, number: f32) {
        let bytes = number.to_le_bytes();
        let view = TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
        serialize_to_file([("a", view)], None, path).unwrap();
    }

    #[test]
    fn a_file_is_hashed_once_until_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let weights = folder.path().join("model.safetensors");
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        let kept = folder.path().join("weights.json");
        let digest = |known: Option<&Path>| Checkpoint::open(folder.path()).unwrap().digest(known).unwrap();
        write(&weights, 1.0);
        let first = digest(None);
        assert_eq!(digest(Some(&kept)), first);
        // What is kept is believed: that is how one sees that nothing was hashed.
        let real = fs::read_to_string(&kept).unwrap();
        let file = sha256(&MappedFile::open(&weights).unwrap()).to_string();
        fs::write(&kept, real.replace(&file, &"0".repeat(64))).unwrap();
        assert_ne!(digest(Some(&kept)), first);
        fs::remove_file(&weights).unwrap();
        write(&weights, 2.0);
        assert_eq!(digest(Some(&kept)), digest(None));
        assert_ne!(digest(None), first);
        // The hub's cache names a file by its digest.
        let blob = folder.path().join("blobs").join(&file);
        fs::create_dir(blob.parent().unwrap()).unwrap();
        fs::rename(&weights, &blob).unwrap();
        symlink(Path::new("blobs").join(&file), &weights).unwrap();
        assert_eq!(digest(None), first);
    }
}
