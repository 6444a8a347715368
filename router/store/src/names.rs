//! Adapters by content, and the names that point to them.

use std::path::{Path, PathBuf};

use sqlx::{Any, FromRow, Transaction};
use tandem_core::id::{AdapterDigest, AdapterRef, Digest};

use crate::changes::{self, Kind};
use crate::db;
use crate::folders::{Placement, TENSORS};
use crate::jobs::signed;
use crate::keys::DATABASE;
use crate::{Store, StoreError, now, unsigned};

/// With a database that others use too, an adapter without a name stays this long after it was last published: another
/// router may be about to name it.
const UNNAMED_GRACE_S: i64 = 600;

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
    pub tenant: String,
    /// Of the job that made it: JSON of the caller's.
    pub request: Option<String>,
}

/// All names of a data folder, for all bases, read beside the server that may have it open. Nothing is changed.
pub async fn names_in(data_dir: &Path) -> Result<Vec<NameRow>, StoreError> {
    let mut connection = db::look_into(&data_dir.join(DATABASE)).await?;
    let sql = format!("{NAMES} ORDER BY names.created_at, name");
    let rows: Vec<RawName> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .fetch_all(&mut connection)
        .await?;
    rows.into_iter().map(RawName::parse).collect()
}

const NAMES: &str =
    "SELECT name, digest, rank, source, job, step, names.created_at AS created_at, names.tenant AS tenant,
     jobs.request AS request FROM names JOIN adapters USING (digest) LEFT JOIN jobs ON jobs.id = names.job";

impl Store {
    /// Bring a PEFT folder into the store. It stays unnamed, and goes after a while, until a name is written. A row knows
    /// of its bytes before they are there: a kill leaves none that nobody knows. More than `limit_bytes` are not read.
    pub async fn publish_adapter(
        &self,
        source: &Path,
        placement: Placement,
        limit_bytes: u64,
    ) -> Result<AdapterDigest, StoreError> {
        self.check_room()?;
        let published = async {
            let staged = self
                .artifacts
                .stage_adapter(source, placement, limit_bytes)
                .await?;
            let digest = staged.digest;
            self.announce(digest, None).await?;
            self.artifacts.publish_adapter(staged).await?;
            // Whoever deleted it meanwhile, unnamed as it was, took the row.
            let bytes = self.artifacts.adapter_bytes(&digest).await?;
            self.announce(digest, bytes).await?;
            Ok(digest)
        };
        published.await.inspect_err(|error| self.note(error))
    }

    /// See that the store has an adapter that a job made.
    pub async fn keep_adapter(&self, adapter: &AdapterRef) -> Result<AdapterDigest, StoreError> {
        self.announce(adapter.digest, None).await?;
        let digest = self.artifacts.keep_adapter_patiently(adapter).await?;
        // It may have waited longer than an adapter without a name is left alone.
        let bytes = self.artifacts.adapter_bytes(&digest).await?;
        self.announce(digest, bytes).await?;
        Ok(digest)
    }

    /// Whether the bytes of an adapter are in the store.
    pub async fn has_adapter(&self, digest: AdapterDigest) -> Result<bool, StoreError> {
        self.artifacts.has_adapter(&digest).await
    }

    /// The local folder of an adapter; fetched when it is not here.
    pub async fn adapter_folder(&self, digest: AdapterDigest) -> Result<PathBuf, StoreError> {
        self.artifacts.adapter(digest).await
    }

    /// From here on nobody deletes the adapter for [`UNNAMED_GRACE_S`]; who is deleting it now ends before. `bytes`: once they
    /// are there.
    async fn announce(&self, digest: AdapterDigest, bytes: Option<u64>) -> Result<(), StoreError> {
        let sql = "INSERT INTO adapters (digest, rank, created_at, bytes) VALUES ($1, 0, $2, coalesce($3, 0))
                   ON CONFLICT (digest) DO UPDATE SET created_at = excluded.created_at, bytes = coalesce($3, adapters.bytes)";
        sqlx::query(sql)
            .bind(digest.to_string())
            .bind(now())
            .bind(bytes.map(signed))
            .execute(self.db.pool()?)
            .await?;
        Ok(())
    }

    /// How large those are that an older program published, as far as they are in the data folder.
    pub(crate) async fn measure_adapters(&self) -> Result<(), StoreError> {
        let unknown: Vec<String> = sqlx::query_scalar("SELECT digest FROM adapters WHERE bytes = 0")
            .fetch_all(self.db.pool()?)
            .await?;
        if unknown.is_empty() {
            return Ok(());
        }
        let mut tx = self.db.begin().await?;
        for hex in unknown {
            let Ok(digest) = hex.parse() else { continue };
            if let Ok(file) = self.artifacts.folders().adapter(&digest).join(TENSORS).metadata() {
                sqlx::query("UPDATE adapters SET bytes = $1 WHERE digest = $2")
                    .bind(signed(file.len()))
                    .bind(hex)
                    .execute(&mut *tx)
                    .await?;
            }
        }
        Ok(tx.commit().await?)
    }

    /// All names for one base model.
    pub async fn names(&self, base: Digest) -> Result<Vec<NameRow>, StoreError> {
        let sql = format!("{NAMES} WHERE names.base = $1 ORDER BY names.created_at, name");
        let rows: Vec<RawName> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(base.to_string())
            .fetch_all(self.db.pool()?)
            .await?;
        rows.into_iter().map(RawName::parse).collect()
    }

    /// Point a name of a tenant to an adapter if it points to `expected` now (`None`: if it is free). Returns whether it
    /// did, and when.
    pub async fn swap_name(
        &self,
        name: &NewName,
        tenant: &str,
        expected: Option<AdapterDigest>,
    ) -> Result<Option<NameRow>, StoreError> {
        let mut tx = self.db.begin().await?;
        // Whoever writes names takes this row first: what is read now stays so.
        changes::note(&mut tx, Kind::Names).await?;
        let current: Option<String> =
            sqlx::query_scalar("SELECT digest FROM names WHERE base = $1 AND name = $2")
                .bind(name.base.to_string())
                .bind(&name.name)
                .fetch_optional(&mut *tx)
                .await?;
        if current != expected.map(|digest| digest.to_string()) {
            return Ok(None);
        }
        let row = write(&mut tx, name, tenant).await?;
        tx.commit().await?;
        Ok(Some(row))
    }

    /// All at once. How many there were.
    pub async fn remove_names(
        &self,
        base: Digest,
        names: impl IntoIterator<Item = &str>,
    ) -> Result<u64, StoreError> {
        let names: Vec<&str> = names.into_iter().collect();
        self.on_reserve(|| self.remove_names_now(base, &names)).await
    }

    async fn remove_names_now(&self, base: Digest, names: &[&str]) -> Result<u64, StoreError> {
        let mut tx = self.db.begin().await?;
        changes::note(&mut tx, Kind::Names).await?;
        let mut removed = 0;
        for &name in names {
            removed += delete(&mut tx, &base, name).await?;
        }
        tx.commit().await?;
        Ok(removed)
    }

    /// Delete an adapter that no name (of any base) points to, and that nobody is about to name. The caller knows that
    /// nothing here reads it.
    pub async fn remove_adapter_if_unnamed(&self, digest: AdapterDigest) -> Result<bool, StoreError> {
        self.on_reserve(|| self.remove_adapter_if_unnamed_now(digest))
            .await
    }

    async fn remove_adapter_if_unnamed_now(&self, digest: AdapterDigest) -> Result<bool, StoreError> {
        let mut tx = self.db.begin().await?;
        let removed = sqlx::query(
            "DELETE FROM adapters WHERE digest = $1 AND created_at <= $2
             AND NOT EXISTS (SELECT 1 FROM names WHERE names.digest = $1)",
        )
        .bind(digest.to_string())
        .bind(self.unnamed_until())
        .execute(&mut *tx)
        .await?;
        if removed.rows_affected() == 0 {
            return Ok(false);
        }
        // The deleted row is locked until the bytes are gone: who publishes the same adapter now waits at `announce`.
        self.artifacts.remove_adapter(&digest).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Adapters without a name that somebody uses: they stay for [`UNNAMED_GRACE_S`] from now on.
    pub async fn keep_unnamed(
        &self,
        used: impl IntoIterator<Item = AdapterDigest>,
    ) -> Result<(), StoreError> {
        for digest in used {
            sqlx::query("UPDATE adapters SET created_at = $1 WHERE digest = $2")
                .bind(now())
                .bind(digest.to_string())
                .execute(self.db.pool()?)
                .await?;
        }
        Ok(())
    }

    /// Delete what lost its last name, or never had one: in any router, a while ago, when others use the database too;
    /// else this is for the start, before anything is published. Returns how many.
    pub async fn delete_unnamed_adapters(&self) -> Result<usize, StoreError> {
        let sql =
            "SELECT digest FROM adapters WHERE digest NOT IN (SELECT digest FROM names) AND created_at <= $1";
        let unnamed: Vec<String> = sqlx::query_scalar(sql)
            .bind(self.unnamed_until())
            .fetch_all(self.db.pool()?)
            .await?;
        let mut removed = 0;
        for hex in unnamed {
            let digest = hex
                .parse()
                .map_err(|error| StoreError::Damaged(format!("adapter {hex:?}: {error}")))?;
            removed += usize::from(self.remove_adapter_if_unnamed(digest).await?);
        }
        Ok(removed)
    }

    /// Adapters that were last published before this may go, if they have no name.
    fn unnamed_until(&self) -> i64 {
        match self.is_shared() {
            true => now() - UNNAMED_GRACE_S,
            false => i64::MAX,
        }
    }
}

/// What a name is about to lose is kept a while from now on: others may still be sending requests to it.
async fn lose(
    tx: &mut Transaction<'static, Any>,
    base: &Digest,
    name: &str,
    now: i64,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE adapters SET created_at = $1
         WHERE digest IN (SELECT digest FROM names WHERE base = $2 AND name = $3)",
    )
    .bind(now)
    .bind(base.to_string())
    .bind(name)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Remove a name that a job made, if it is still its own: whether it was. The caller has noted the change of names in the same transaction.
pub(crate) async fn remove_of_job(
    tx: &mut Transaction<'static, Any>,
    name: &str,
    job: &str,
) -> Result<bool, StoreError> {
    let sql = "UPDATE adapters SET created_at = $1
               WHERE digest IN (SELECT digest FROM names WHERE name = $2 AND job = $3)";
    sqlx::query(sql)
        .bind(now())
        .bind(name)
        .bind(job)
        .execute(&mut **tx)
        .await?;
    let removed = sqlx::query("DELETE FROM names WHERE name = $1 AND job = $2")
        .bind(name)
        .bind(job)
        .execute(&mut **tx)
        .await?;
    Ok(removed.rows_affected() > 0)
}

/// Remove a name if it is still this adapter's: whether it was. The caller has noted the change of names in the same transaction.
pub(crate) async fn remove_of_adapter(
    tx: &mut Transaction<'static, Any>,
    base: &Digest,
    name: &str,
    adapter: AdapterDigest,
) -> Result<bool, StoreError> {
    let sql = "SELECT 1 FROM names WHERE base = $1 AND name = $2 AND digest = $3";
    let is_its: Option<i64> = sqlx::query_scalar(sql)
        .bind(base.to_string())
        .bind(name)
        .bind(adapter.to_string())
        .fetch_optional(&mut **tx)
        .await?;
    if is_its.is_none() {
        return Ok(false);
    }
    delete(tx, base, name).await.map(|deleted| deleted > 0)
}

/// The rows that went.
async fn delete(tx: &mut Transaction<'static, Any>, base: &Digest, name: &str) -> Result<u64, StoreError> {
    lose(tx, base, name, now()).await?;
    let deleted = sqlx::query("DELETE FROM names WHERE base = $1 AND name = $2")
        .bind(base.to_string())
        .bind(name)
        .execute(&mut **tx)
        .await?;
    // What is gone is no job's model any more.
    sqlx::query("UPDATE jobs SET fine_tuned_model = NULL WHERE base = $1 AND fine_tuned_model = $2")
        .bind(base.to_string())
        .bind(name)
        .execute(&mut **tx)
        .await?;
    Ok(deleted.rows_affected())
}

/// Insert or replace. The caller has noted the change of names in the same transaction.
pub(crate) async fn write(
    tx: &mut Transaction<'static, Any>,
    name: &NewName,
    tenant: &str,
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
        Source::Job { job, step } => ("job", Some(job), step.map(signed)),
    };
    let created_at = now();
    lose(tx, base, name, created_at).await?;
    sqlx::query(
        "INSERT INTO adapters (digest, rank, created_at) VALUES ($1, $2, $3)
         ON CONFLICT (digest) DO UPDATE SET rank = excluded.rank, created_at = excluded.created_at",
    )
    .bind(digest.to_string())
    .bind(i64::from(*rank))
    .bind(created_at)
    .execute(&mut **tx)
    .await?;
    sqlx::query(
        "INSERT INTO names (base, name, digest, source, job, step, created_at, tenant)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
         ON CONFLICT (base, name) DO UPDATE SET digest = excluded.digest, source = excluded.source,
         job = excluded.job, step = excluded.step, created_at = excluded.created_at, tenant = excluded.tenant",
    )
    .bind(base.to_string())
    .bind(name)
    .bind(digest.to_string())
    .bind(kind)
    .bind(job)
    .bind(step)
    .bind(created_at)
    .bind(tenant)
    .execute(&mut **tx)
    .await?;
    let request = sqlx::query_scalar("SELECT request FROM jobs WHERE id = $1")
        .bind(job)
        .fetch_optional(&mut **tx)
        .await?;
    Ok(NameRow {
        name: name.clone(),
        digest: *digest,
        rank: *rank,
        source: source.clone(),
        created_at,
        tenant: tenant.to_owned(),
        request,
    })
}

#[derive(FromRow)]
struct RawName {
    name: String,
    digest: String,
    rank: i64,
    source: String,
    job: Option<String>,
    step: Option<i64>,
    created_at: i64,
    tenant: String,
    request: Option<String>,
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
            tenant,
            request,
        } = self;
        let digest = digest
            .parse()
            .map_err(|error| StoreError::Damaged(format!("name {name:?}: {error}")))?;
        let source = match (source.as_str(), job) {
            ("loaded", None) => Source::Loaded,
            ("flag", None) => Source::Flag,
            ("job", Some(job)) => Source::Job {
                job,
                step: step.map(unsigned),
            },
            (other, job) => {
                return Err(StoreError::Damaged(format!(
                    "name {name:?} has source {other:?} and job {job:?}"
                )));
            }
        };
        Ok(NameRow {
            name,
            digest,
            rank: u32::try_from(rank).unwrap_or(u32::MAX),
            source,
            created_at,
            tenant,
            request,
        })
    }
}
