//! Adapters by content, and the names that point to them.

use std::path::{Path, PathBuf};

use sqlx::{FromRow, Sqlite, Transaction};
use tandem_core::id::{AdapterDigest, Digest};

use crate::artifacts::Placement;
use crate::{Store, StoreError, artifacts, blocking, db, now};

/// Where a name came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A client loaded it.
    Loaded,
    /// The command line names it: it lives as long as the flag is given.
    Flag,
    /// A job made it; `step` when it is a checkpoint.
    Job { job: String, step: Option<u64> },
}

/// A name to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewName {
    pub base: Digest,
    pub name: String,
    pub digest: AdapterDigest,
    pub rank: u32,
    pub source: Source,
}

/// A name as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameRow {
    pub name: String,
    pub digest: AdapterDigest,
    pub rank: u32,
    pub source: Source,
    pub created_at: i64,
}

impl Store {
    /// Bring a PEFT folder into the store. It stays unnamed, and a restart removes it, until a name is written.
    pub async fn publish_adapter(
        &self,
        source: &Path,
        placement: Placement,
    ) -> Result<AdapterDigest, StoreError> {
        let (folders, source) = (self.folders.clone(), source.to_owned());
        blocking(move || folders.publish_adapter(&source, placement)).await
    }

    pub fn adapter_folder(&self, digest: &AdapterDigest) -> PathBuf {
        self.folders.adapter(digest)
    }

    /// All names for one base model.
    pub async fn names(&self, base: Digest) -> Result<Vec<NameRow>, StoreError> {
        let sql = "SELECT name, digest, rank, source, job, step, names.created_at AS created_at
                   FROM names JOIN adapters USING (digest) WHERE base = ? ORDER BY names.created_at, name";
        let rows: Vec<RawName> = sqlx::query_as(sql)
            .bind(base.to_string())
            .fetch_all(&self.pool)
            .await?;
        rows.into_iter().map(RawName::parse).collect()
    }

    /// Point a name to an adapter if it points to `expected` now (`None`: if it is free). Returns whether it did, and
    /// when.
    pub async fn swap_name(
        &self,
        name: &NewName,
        expected: Option<AdapterDigest>,
    ) -> Result<Option<NameRow>, StoreError> {
        let mut tx = db::begin(&self.pool).await?;
        let current: Option<String> =
            sqlx::query_scalar("SELECT digest FROM names WHERE base = ? AND name = ?")
                .bind(name.base.to_string())
                .bind(&name.name)
                .fetch_optional(&mut *tx)
                .await?;
        if current != expected.map(|digest| digest.to_string()) {
            return Ok(None);
        }
        let row = write(&mut tx, name).await?;
        tx.commit().await?;
        Ok(Some(row))
    }

    /// Whether there was one.
    pub async fn remove_name(&self, base: Digest, name: &str) -> Result<bool, StoreError> {
        let query = sqlx::query("DELETE FROM names WHERE base = ? AND name = ?");
        Ok(query
            .bind(base.to_string())
            .bind(name)
            .execute(&self.pool)
            .await?
            .rows_affected()
            > 0)
    }

    /// Delete an adapter that no name (of any base) points to. The caller knows that nothing reads it.
    pub async fn remove_adapter_if_unnamed(&self, digest: AdapterDigest) -> Result<bool, StoreError> {
        let hex = digest.to_string();
        let mut tx = db::begin(&self.pool).await?;
        let named: i64 = sqlx::query_scalar("SELECT count(*) FROM names WHERE digest = ?")
            .bind(&hex)
            .fetch_one(&mut *tx)
            .await?;
        if named > 0 {
            return Ok(false);
        }
        sqlx::query("DELETE FROM adapters WHERE digest = ?")
            .bind(&hex)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        let path = self.folders.adapter(&digest);
        blocking(move || artifacts::remove(&path)).await?;
        Ok(true)
    }

    pub(crate) async fn remove_unnamed_adapter_rows(&self) -> Result<(), StoreError> {
        let sql = "DELETE FROM adapters WHERE digest NOT IN (SELECT digest FROM names)";
        sqlx::query(sql).execute(&self.pool).await?;
        Ok(())
    }
}

/// Insert or replace.
pub(crate) async fn write(
    tx: &mut Transaction<'static, Sqlite>,
    name: &NewName,
) -> Result<NameRow, StoreError> {
    let NewName {
        base,
        name,
        digest,
        rank,
        source,
    } = name;
    let (kind, job, step) = match source {
        Source::Loaded => ("loaded", None, None),
        Source::Flag => ("flag", None, None),
        Source::Job { job, step } => ("job", Some(job), step.map(|step| step as i64)),
    };
    let created_at = now();
    sqlx::query("INSERT INTO adapters (digest, rank, created_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING")
        .bind(digest.to_string())
        .bind(rank)
        .bind(created_at)
        .execute(&mut **tx)
        .await?;
    sqlx::query(
        "INSERT OR REPLACE INTO names (base, name, digest, source, job, step, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(base.to_string())
    .bind(name)
    .bind(digest.to_string())
    .bind(kind)
    .bind(job)
    .bind(step)
    .bind(created_at)
    .execute(&mut **tx)
    .await?;
    Ok(NameRow {
        name: name.clone(),
        digest: *digest,
        rank: *rank,
        source: source.clone(),
        created_at,
    })
}

#[derive(FromRow)]
struct RawName {
    name: String,
    digest: String,
    rank: u32,
    source: String,
    job: Option<String>,
    step: Option<u64>,
    created_at: i64,
}

impl RawName {
    fn parse(self) -> Result<NameRow, StoreError> {
        let RawName {
            name,
            digest,
            rank,
            source,
            job,
            step,
            created_at,
        } = self;
        let digest = digest
            .parse()
            .map_err(|error| StoreError::Damaged(format!("name {name:?}: {error}")))?;
        let source = match (source.as_str(), job) {
            ("loaded", None) => Source::Loaded,
            ("flag", None) => Source::Flag,
            ("job", Some(job)) => Source::Job { job, step },
            (other, job) => {
                return Err(StoreError::Damaged(format!(
                    "name {name:?} has source {other:?} and job {job:?}"
                )));
            }
        };
        Ok(NameRow {
            name,
            digest,
            rank,
            source,
            created_at,
        })
    }
}
