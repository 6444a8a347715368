//! Room on the data folder's disk. A file keeps some of it while there is enough; when something finds the disk full, that
//! file goes, so that the database can still write down what is deleted, cancelled or over. What is large waits or is
//! refused until the file could be made again. Not here: what waits.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use crate::StoreError;
use crate::error::io_at;
use crate::health::Part;

/// What is kept for the database: some thousands of its rows, and a checkpoint of its log.
const RESERVE_BYTES: usize = 8 << 20;
/// The disk is full until this much more than the reserve fits, or it would be full again at once.
const SLACK_BYTES: usize = 8 << 20;
const BLOCK_BYTES: usize = 1 << 20;

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Room {
    reserve: PathBuf,
    /// Why there is no room, since somebody found none.
    full: Arc<RwLock<Option<String>>>,
}

impl Room {
    pub fn of(data_dir: &Path) -> Room {
        Room {
            reserve: data_dir.join("reserve"),
            full: Arc::default(),
        }
    }

    pub fn why(&self) -> Option<String> {
        self.full.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Before something large is written.
    pub fn check(&self) -> Result<(), StoreError> {
        match self.why() {
            None => Ok(()),
            Some(why) => Err(StoreError::Full(why)),
        }
    }

    /// Give the reserve to the database where an error says that the disk is full. Whether it does.
    pub fn note(&self, error: &StoreError) -> bool {
        if error.away() != Some(Part::Room) {
            return false;
        }
        if !matches!(error, StoreError::Full(_)) {
            // That it is gone already is fine.
            let _ = fs::remove_file(&self.reserve);
            self.fill(error);
        }
        true
    }

    /// Make the reserve, when it is not there: what shows that there is room again. Blocking.
    pub fn look(&self) {
        let is_there = fs::metadata(&self.reserve).is_ok_and(|found| found.len() == RESERVE_BYTES as u64);
        if is_there && self.why().is_none() {
            return;
        }
        match self.make() {
            Ok(()) => {
                if self.set(None).is_some() {
                    tracing::info!("there is room on the disk again");
                }
            }
            Err(error) => {
                let _ = fs::remove_file(&self.reserve);
                let error = io_at("keeping room with", &self.reserve)(error);
                // What is no lack of room shows where it matters.
                if error.away() != Some(Part::Room) {
                    tracing::warn!(%error, "no room is kept for the database");
                    self.set(None);
                } else {
                    self.fill(&error);
                }
            }
        }
    }

    fn make(&self) -> io::Result<()> {
        let mut file = File::create(&self.reserve)?;
        let block = vec![0; BLOCK_BYTES];
        for _ in 0..(RESERVE_BYTES + SLACK_BYTES) / BLOCK_BYTES {
            file.write_all(&block)?;
        }
        file.sync_all()?;
        file.set_len(RESERVE_BYTES as u64)?;
        file.sync_all()
    }

    /// The disk is full, by this error; said once.
    fn fill(&self, error: &StoreError) {
        if self.set(Some(error.to_string())).is_none() {
            tracing::error!(%error, "there is no room on the disk; what is large is refused until there is");
        }
    }

    fn set(&self, full: Option<String>) -> Option<String> {
        std::mem::replace(
            &mut *self.full.write().unwrap_or_else(PoisonError::into_inner),
            full,
        )
    }
}
