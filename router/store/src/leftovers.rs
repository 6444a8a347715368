//! What a start does with the bytes in a data folder: what the database names stays, what it knows to be half done goes,
//! and what it has never heard of is moved aside, never removed. Blocking. Not here: what the database knows.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use tandem_core::id::AdapterDigest;

use crate::error::io_at;
use crate::folders::{Folders, QUARANTINE, is_held, remove};
use crate::{StoreError, now};

/// What a database says of what may lie in a data folder.
pub(crate) struct Known {
    pub files: HashSet<String>,
    /// On their way in or out.
    pub loose_files: HashSet<String>,
    pub adapters: HashSet<String>,
    pub jobs: HashSet<String>,
    pub ended_jobs: HashSet<String>,
    /// All that lies there lies elsewhere, too.
    pub is_cache: bool,
}

enum Fate {
    Stays,
    Goes,
    /// Nobody knows it.
    Stray,
}

impl Known {
    fn fate(&self, kind: &str, name: &str) -> Fate {
        let (stays, goes, is_ours) = match kind {
            "files" => (
                self.files.contains(name),
                self.loose_files.contains(name),
                name.starts_with("file-"),
            ),
            "adapters" => (
                self.adapters.contains(name),
                false,
                name.parse::<AdapterDigest>().is_ok(),
            ),
            // States lie elsewhere where this is a cache, and what lies here may be of an earlier life.
            _ => (
                self.jobs.contains(name) && !self.is_cache,
                self.ended_jobs.contains(name),
                name.starts_with("ftjob-"),
            ),
        };
        match (stays, goes || self.is_cache) {
            (true, _) => Fate::Stays,
            _ if !is_ours => Fate::Stays,
            (false, true) => Fate::Goes,
            (false, false) => Fate::Stray,
        }
    }
}

/// Paths below the data folder.
pub(crate) struct Leftovers {
    half_done: Vec<PathBuf>,
    pub strays: Vec<PathBuf>,
    /// What the database names and is not there.
    pub missing: Vec<PathBuf>,
}

impl Folders {
    pub fn leftovers(&self, known: &Known) -> Result<Leftovers, StoreError> {
        let mut leftovers = Leftovers {
            half_done: vec![],
            strays: vec![],
            missing: vec![],
        };
        for path in self.entries("staging")? {
            // That of a process which works beside this one.
            if !is_held(&path) {
                leftovers.half_done.push(path);
            }
        }
        for kind in Folders::KINDS {
            for path in self.entries(kind)? {
                let name = path
                    .file_name()
                    .and_then(|name| name.to_str())
                    .unwrap_or_default();
                match known.fate(kind, name) {
                    Fate::Stays => {}
                    Fate::Goes => leftovers.half_done.push(path),
                    Fate::Stray => leftovers.strays.push(path),
                }
            }
        }
        // In a cache nothing needs to be.
        if !known.is_cache {
            for (kind, names) in [("files", &known.files), ("adapters", &known.adapters)] {
                let paths = names.iter().map(|name| self.root().join(kind).join(name));
                leftovers.missing.extend(paths.filter(|path| !path.exists()));
            }
            leftovers.missing.sort();
        }
        Ok(leftovers)
    }

    /// What there is of a kind.
    pub fn entries(&self, kind: &str) -> Result<Vec<PathBuf>, StoreError> {
        let folder = self.root().join(kind);
        let failed = || io_at("reading", &folder);
        let entries = fs::read_dir(&folder).map_err(failed())?;
        let paths = entries.map(|entry| Ok(entry.map_err(failed())?.path()));
        paths.collect()
    }

    /// Move what no row speaks of to the quarantine, where nothing looks and nothing is removed.
    pub fn quarantine(&self, strays: &[PathBuf]) -> Result<(), StoreError> {
        if strays.is_empty() {
            return Ok(());
        }
        let quarantine = self.root().join(QUARANTINE);
        let first = now();
        // Two starts within a second have folders of their own.
        let target = (first..)
            .map(|n| quarantine.join(n.to_string()))
            .find(|target| !target.exists())
            .expect("there are numbers enough");
        for stray in strays {
            let target = target.join(stray.strip_prefix(self.root()).unwrap_or(stray));
            let parent = target.parent().expect("it is below the quarantine");
            fs::create_dir_all(parent).map_err(io_at("making", parent))?;
            fs::rename(stray, &target).map_err(io_at("moving aside", stray))?;
        }
        tracing::warn!(
            moved = strays.len(),
            to = %target.display(),
            "artifacts were moved aside"
        );
        Ok(())
    }
}

impl Leftovers {
    /// For an error: the first, and how many more.
    pub fn shown(paths: &[PathBuf], root: &Path) -> String {
        let shown = |path: &PathBuf| path.strip_prefix(root).unwrap_or(path).display().to_string();
        let first: Vec<String> = paths.iter().take(3).map(shown).collect();
        let more = match paths.len() - first.len() {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        format!("{}{more}", first.join(", "))
    }

    pub fn remove_half_done(&self) -> Result<(), StoreError> {
        self.half_done.iter().try_for_each(|path| {
            tracing::info!(path = %path.display(), "removing what was half done");
            remove(path)
        })
    }
}
