//! What a tenant stores, beside what a key lets it: counted from the rows that know of bytes, so that it holds for all routers
//! of one database and over restarts. A job that has not ended has room for its state and an adapter from its first moment. Responses are not
//! counted, which have a limit of their own. Not here: what comes in and is not stored yet (router).

use std::fmt;

use sqlx::{Any, Executor, Transaction};

use crate::db::Dialect;
use crate::{Store, StoreError, Tenant, unsigned};

/// Of a tenant, by a key whose storage is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage {
    /// Bytes.
    pub limit: u64,
    pub stored: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageExceeded {
    pub storage: Storage,
    /// What something would add; 0: anything.
    pub wanted: u64,
}

impl std::error::Error for StorageExceeded {}

impl fmt::Display for StorageExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StorageExceeded {
            storage: Storage { limit, stored },
            wanted,
        } = self;
        write!(
            f,
            "this key lets its tenant store {limit} bytes, {stored} are stored"
        )?;
        if *wanted > 0 {
            write!(f, ", and this would add {wanted}")?;
        }
        f.write_str(": delete files, models or checkpoints, or cancel uploads")
    }
}

impl Storage {
    pub fn left(self) -> u64 {
        self.limit.saturating_sub(self.stored)
    }

    /// Whether there is no more than may be.
    pub fn holds(self) -> Result<(), StorageExceeded> {
        match self.stored <= self.limit {
            true => Ok(()),
            false => Err(StorageExceeded {
                storage: self,
                wanted: 0,
            }),
        }
    }

    /// Whether so many bytes may come; with 0, any.
    pub fn check(self, wanted: u64) -> Result<(), StorageExceeded> {
        match wanted.max(1) <= self.left() {
            true => Ok(()),
            false => Err(StorageExceeded {
                storage: self,
                wanted,
            }),
        }
    }
}

impl Store {
    /// Of a tenant whose key has this limit.
    pub async fn storage(&self, tenant: &Tenant, limit: u64) -> Result<Storage, StoreError> {
        let stored = stored(self.db.pool()?, tenant).await?;
        Ok(Storage { limit, stored })
    }

    /// The same by the id of a key. `None`: it lets its tenant store as much as it likes.
    pub async fn storage_by(&self, key: &str) -> Result<Option<Storage>, StoreError> {
        match limit_of(self.db.pool()?, key).await? {
            None => Ok(None),
            Some((tenant, limit)) => self.storage(&tenant, limit).await.map(Some),
        }
    }

    /// Whether so many bytes more are within the limit, until the transaction ends: nobody adds others of the tenant meanwhile.
    pub(crate) async fn check_stored(
        &self,
        tx: &mut Transaction<'static, Any>,
        tenant: &Tenant,
        limit: Option<u64>,
        wanted: u64,
    ) -> Result<(), StoreError> {
        let Some(limit) = limit else { return Ok(()) };
        // In SQLite, transactions that write wait for each other anyway.
        if self.db.dialect == Dialect::Postgres {
            sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))")
                .bind(tenant.as_str())
                .execute(&mut **tx)
                .await?;
        }
        let stored = stored(&mut **tx, tenant).await?;
        Ok(Storage { limit, stored }.check(wanted)?)
    }
}

/// Whose it is, and what it lets them store, where that is limited.
pub(crate) async fn limit_of<'e>(
    at: impl Executor<'e, Database = Any>,
    key: &str,
) -> Result<Option<(Tenant, u64)>, StoreError> {
    let sql = "SELECT tenant, stored_bytes FROM keys WHERE id = $1";
    let found: Option<(String, Option<i64>)> = sqlx::query_as(sql).bind(key).fetch_optional(at).await?;
    let Some((tenant, Some(limit))) = found else {
        return Ok(None);
    };
    let tenant = tenant
        .parse()
        .map_err(|error| StoreError::Damaged(format!("key {key}: {error}")))?;
    Ok(Some((tenant, unsigned(limit))))
}

/// Bytes of a tenant: an upload that is not completed has what it announced, an adapter of several names counts once.
pub(crate) async fn stored<'e>(
    at: impl Executor<'e, Database = Any>,
    tenant: &Tenant,
) -> Result<u64, StoreError> {
    let sql = "SELECT CAST(
        (SELECT coalesce(SUM(bytes), 0) FROM files WHERE tenant = $1)
        + (SELECT coalesce(SUM(bytes), 0) FROM uploads WHERE tenant = $1 AND status = 'pending')
        + (SELECT coalesce(SUM(answer_bytes), 0) FROM batches WHERE tenant = $1 AND finished_at IS NULL)
        + (SELECT coalesce(SUM(data_bytes + kept_bytes), 0) FROM jobs WHERE tenant = $1 AND finished_at IS NULL)
        + (SELECT coalesce(SUM(bytes), 0) FROM adapters
           WHERE digest IN (SELECT digest FROM names WHERE tenant = $1 AND source <> 'flag'))
        + (SELECT coalesce(SUM(bytes), 0) FROM saves WHERE tenant = $1)
        AS BIGINT)";
    let bytes: i64 = sqlx::query_scalar(sql)
        .bind(tenant.as_str())
        .fetch_one(at)
        .await?;
    Ok(unsigned(bytes))
}
