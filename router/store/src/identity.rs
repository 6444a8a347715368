//! Whether the database belongs to the artifacts it is opened beside. A start removes what the database knows to be half
//! done, so a database that is new, older or another one would take everything for that. Both sides therefore keep the
//! same id and how often they were opened, and bytes that no row speaks of are an error. Not here: what is removed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::artifacts::Artifacts;
use crate::changes::{self, Kind};
use crate::folders::QUARANTINE;
use crate::{Store, StoreError, ids};

/// What to do with artifacts that the database does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strays {
    /// An error that says how to go on.
    #[default]
    Refuse,
    /// Go on with this database; what it does not know moves to the data folder's quarantine.
    Quarantine,
}

/// What a place of artifacts says of itself: `store.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub id: String,
    /// How often the store was opened: a database that counts fewer is older than the place.
    pub opens: i64,
}

/// The path of the database in a data folder. That it is missing where artifacts, or the last writes to it (its -wal),
/// are left is said before a new one is made, which would end them.
pub(crate) async fn database_file(artifacts: &Artifacts, strays: Strays) -> Result<PathBuf, StoreError> {
    let folders = artifacts.folders();
    let path = folders.database();
    if path.exists() {
        return Ok(path);
    }
    let journals = ["-wal", "-shm", "-journal"].map(|end| {
        let mut name = path.clone().into_os_string();
        name.push(end);
        PathBuf::from(name)
    });
    let journals: Vec<PathBuf> = journals.into_iter().filter(|journal| journal.exists()).collect();
    match strays {
        Strays::Quarantine => folders.quarantine(&journals)?,
        Strays::Refuse if journals.is_empty() && artifacts.is_bare().await? => {}
        Strays::Refuse => {
            return Err(StoreError::Apart {
                database: path.display().to_string(),
                how: format!("is missing, but there are artifacts in {}", artifacts.place()),
                quarantine: folders.root().join(QUARANTINE),
            });
        }
    }
    Ok(path)
}

impl Store {
    /// Sees that database and artifacts belong together and counts the start on both sides. What comes back says what a
    /// stray means from here on: after an older program, whose kills left some, they are no reason to refuse the start.
    pub(crate) async fn identify(&self, strays: Strays) -> Result<Strays, StoreError> {
        let mut tx = self.db.begin().await?;
        // Routers that start together take turns by this row.
        changes::note(&mut tx, Kind::Jobs).await?;
        let known: Option<(String, i64)> = sqlx::query_as("SELECT id, opens FROM store")
            .fetch_optional(&mut *tx)
            .await?;
        let known = known.map(|(id, opens)| Identity { id, opens });
        let rows: i64 = sqlx::query_scalar(
            "SELECT (SELECT count(*) FROM files) + (SELECT count(*) FROM adapters) + (SELECT count(*) FROM jobs)",
        )
        .fetch_one(&mut *tx)
        .await?;
        let found = self.artifacts.identity().await?;
        let apart = match (&known, &found) {
            (Some(known), Some(found)) if known.id != found.id => {
                (!self.artifacts.is_bare().await?).then_some("is not that of")
            }
            (Some(known), Some(found)) if known.opens < found.opens => Some("is older than"),
            (Some(_), None) if rows > 0 => Some("was used with other artifacts than"),
            (None, found) if rows == 0 || found.is_some() => {
                (!self.artifacts.is_bare().await?).then_some("has never been used with")
            }
            _ => None,
        };
        if let (Some(how), Strays::Refuse) = (apart, strays) {
            return Err(self.apart(format!("{how} the artifacts in {}", self.artifacts.place())));
        }
        let is_adopted = known.is_none() && rows > 0;
        let latest = [&known, &found]
            .into_iter()
            .flatten()
            .map(|side| side.opens)
            .max();
        let before = Identity {
            id: known.map_or_else(ids::random, |known| known.id),
            opens: latest.unwrap_or(0),
        };
        // A kill from here on leaves a place that says no more than the database.
        if found.as_ref() != Some(&before) {
            self.artifacts.identify(&before).await?;
        }
        let now = Identity {
            opens: before.opens + 1,
            ..before
        };
        sqlx::query("DELETE FROM store").execute(&mut *tx).await?;
        sqlx::query("INSERT INTO store (id, opens) VALUES ($1, $2)")
            .bind(&now.id)
            .bind(now.opens)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        self.artifacts.identify(&now).await?;
        Ok(match is_adopted {
            true => Strays::Quarantine,
            false => strays,
        })
    }

    /// `how` continues the sentence "the database ...".
    pub(crate) fn apart(&self, how: String) -> StoreError {
        StoreError::Apart {
            database: self.db.name.clone(),
            how,
            quarantine: self.artifacts.folders().root().join(QUARANTINE),
        }
    }
}
