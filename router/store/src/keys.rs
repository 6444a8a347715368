//! API keys: whose they are and what they open. Of a key itself only its SHA-256 is kept: it is 256 random bits, which
//! nobody finds by trying, so a hash that is slow on purpose (as for passwords) would only slow down every request. Rows
//! are never deleted: where there was a key, nobody comes in without one. Not here: how a request shows a key (server).

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use sqlx::FromRow;
use tandem_core::id::Digest;

use crate::changes::{self, Kind};
use crate::db::Database;
use crate::jobs::signed;
use crate::{Places, Store, StoreError, ids, now, quota, storage, unsigned};

/// Before the random part, so that people and scanners for leaked secrets know one when they see it.
pub const PREFIX: &str = "sk-tandem-";
const MAX_NAME_CHARS: usize = 200;

/// Whose a thing is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tenant(Arc<str>);

impl Tenant {
    /// Of keys that a server was started with, of servers without keys, and of what was there before there were tenants.
    pub const DEFAULT: &str = "default";

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Tenant {
    fn default() -> Tenant {
        Tenant(Tenant::DEFAULT.into())
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no tenant: letters, digits, `-`, `_` and `.` make one, 64 at most")]
pub struct NotATenant(String);

impl FromStr for Tenant {
    type Err = NotATenant;

    fn from_str(text: &str) -> Result<Tenant, NotATenant> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        match (1..=64).contains(&text.len()) && text.chars().all(is_plain) {
            true => Ok(Tenant(text.into())),
            false => Err(NotATenant(text.chars().take(64).collect())),
        }
    }
}

/// What a key opens: each what those before it open, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Ask models.
    Infer,
    /// Files, jobs, and models that are made of them.
    Train,
    /// Everything, of every tenant.
    Admin,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Infer, Role::Train, Role::Admin];

    pub fn name(self) -> &'static str {
        match self {
            Role::Infer => "infer",
            Role::Train => "train",
            Role::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no role: infer, train and admin are")]
pub struct NotARole(String);

impl FromStr for Role {
    type Err = NotARole;

    fn from_str(text: &str) -> Result<Role, NotARole> {
        let found = Role::ALL.into_iter().find(|role| role.name() == text);
        found.ok_or_else(|| NotARole(text.to_owned()))
    }
}

/// What a key may ask in a minute and train in a day, and what its tenant may store by it. `None`: as much as it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub requests_per_minute: Option<u32>,
    /// Of prompts and of answers.
    pub tokens_per_minute: Option<u32>,
    pub training_tokens_per_day: Option<u64>,
    /// All that the tenant has, whichever key brought it.
    pub stored_bytes: Option<u64>,
}

/// A key, without what opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    pub id: String,
    /// Of the key's bytes.
    pub hash: Digest,
    pub name: String,
    pub tenant: Tenant,
    pub role: Role,
    pub limits: Limits,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub revoked_at: Option<i64>,
}

impl KeyRow {
    pub fn opens(&self, now: i64) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|end| now < end)
    }
}

/// A key to make.
#[derive(Clone, Debug)]
pub struct NewKey {
    pub name: String,
    pub tenant: Tenant,
    pub role: Role,
    pub limits: Limits,
    pub expires_after_s: Option<u64>,
}

/// The keys of a database, whichever process opened it.
#[derive(Clone)]
pub struct Keys(Database);

/// How a key is looked up.
pub fn hash(key: &[u8]) -> Digest {
    Digest(Sha256::digest(key).into())
}

impl Store {
    pub fn keys(&self) -> Keys {
        Keys(self.db.clone())
    }
}

impl Keys {
    /// Of a server that may be running. A data folder that has no database yet gets one.
    pub async fn open(places: &Places) -> Result<Keys, StoreError> {
        let db = match &places.database_url {
            Some(url) => Database::server(url).await?,
            None => {
                let folder = &places.data_dir;
                std::fs::create_dir_all(folder).map_err(crate::error::io_at("making", folder))?;
                Database::file(&folder.join(DATABASE)).await?
            }
        };
        Ok(Keys(db))
    }

    /// Whether keys may lie in a data folder: it has a database.
    pub fn may_lie_in(data_dir: &Path) -> bool {
        data_dir.join(DATABASE).exists()
    }

    /// Grows with every change.
    pub async fn changes(&self) -> Result<i64, StoreError> {
        let sql = "SELECT n FROM changes WHERE kind = 'keys'";
        Ok(sqlx::query_scalar(sql).fetch_one(self.0.pool()?).await?)
    }

    /// From the oldest on, with those that were revoked.
    pub async fn list(&self) -> Result<Vec<KeyRow>, StoreError> {
        let sql = "SELECT id, hash, name, tenant, role, requests_per_minute, tokens_per_minute, training_tokens_per_day, stored_bytes,
                   created_at, expires_at, revoked_at FROM keys ORDER BY created_at, id";
        let rows: Vec<RawKey> = sqlx::query_as(sql).fetch_all(self.0.pool()?).await?;
        rows.into_iter().map(RawKey::parse).collect()
    }

    /// Bytes that a tenant has.
    pub async fn stored(&self, tenant: &Tenant) -> Result<u64, StoreError> {
        storage::stored(self.0.pool()?, tenant).await
    }

    /// What the key is comes back beside its row, this once.
    pub async fn create(&self, key: NewKey) -> Result<(KeyRow, String), StoreError> {
        let (row, secret) = fresh(key)?;
        let mut tx = self.0.begin().await?;
        insert(&mut tx, &row).await?;
        changes::note(&mut tx, Kind::Keys).await?;
        tx.commit().await?;
        Ok((row, secret))
    }

    /// Whether there was such a key that was not revoked before.
    pub async fn revoke(&self, id: &str) -> Result<bool, StoreError> {
        let mut tx = self.0.begin().await?;
        let revoked = sqlx::query("UPDATE keys SET revoked_at = $1 WHERE id = $2 AND revoked_at IS NULL")
            .bind(now())
            .bind(id)
            .execute(&mut *tx)
            .await?;
        changes::note(&mut tx, Kind::Keys).await?;
        tx.commit().await?;
        Ok(revoked.rows_affected() > 0)
    }

    /// Another key with the same name, tenant, role and limits, which has trained today what the old one did. The old one opens for
    /// `overlap_s` more. `None`: there is none that opens.
    pub async fn rotate(&self, id: &str, overlap_s: u64) -> Result<Option<(KeyRow, String)>, StoreError> {
        let now = now();
        let old = self
            .list()
            .await?
            .into_iter()
            .find(|row| row.id == id && row.opens(now));
        let Some(old) = old else { return Ok(None) };
        let (row, secret) = fresh(NewKey {
            name: old.name,
            tenant: old.tenant,
            role: old.role,
            limits: old.limits,
            expires_after_s: old.expires_at.map(|end| (end - now).unsigned_abs()),
        })?;
        let mut tx = self.0.begin().await?;
        // Who revoked it meanwhile has no successor of it.
        let ends = match overlap_s {
            0 => "UPDATE keys SET revoked_at = $1 WHERE id = $2 AND revoked_at IS NULL",
            _ => {
                "UPDATE keys SET expires_at = CASE WHEN expires_at < $1 THEN expires_at ELSE $1 END
                 WHERE id = $2 AND revoked_at IS NULL"
            }
        };
        let ended = sqlx::query(ends)
            .bind(now.saturating_add_unsigned(overlap_s))
            .bind(id)
            .execute(&mut *tx)
            .await?;
        if ended.rows_affected() == 0 {
            return Ok(None);
        }
        insert(&mut tx, &row).await?;
        quota::inherit(&mut tx, id, &row.id).await?;
        changes::note(&mut tx, Kind::Keys).await?;
        tx.commit().await?;
        Ok(Some((row, secret)))
    }

    pub async fn close(&self) {
        self.0.close().await;
    }
}

pub(crate) const DATABASE: &str = "tandem.db";

fn fresh(key: NewKey) -> Result<(KeyRow, String), StoreError> {
    let NewKey {
        name,
        tenant,
        role,
        limits,
        expires_after_s,
    } = key;
    if name.chars().count() > MAX_NAME_CHARS || name.chars().any(char::is_control) {
        let message = format!(
            "a key's name has at most {MAX_NAME_CHARS} characters, none of which controls a terminal"
        );
        return Err(StoreError::Key(message));
    }
    let secret = format!("{PREFIX}{}", Digest(ids::secret()));
    let created_at = now();
    let row = KeyRow {
        id: ids::key(),
        hash: hash(secret.as_bytes()),
        name,
        tenant,
        role,
        limits,
        created_at,
        expires_at: expires_after_s.map(|s| created_at.saturating_add_unsigned(s)),
        revoked_at: None,
    };
    Ok((row, secret))
}

async fn insert(tx: &mut sqlx::Transaction<'static, sqlx::Any>, row: &KeyRow) -> Result<(), StoreError> {
    let KeyRow {
        id,
        hash,
        name,
        tenant,
        role,
        limits,
        created_at,
        expires_at,
        revoked_at,
    } = row;
    let Limits {
        requests_per_minute,
        tokens_per_minute,
        training_tokens_per_day,
        stored_bytes,
    } = limits;
    sqlx::query(
        "INSERT INTO keys (id, hash, name, tenant, role, requests_per_minute, tokens_per_minute, training_tokens_per_day,
         stored_bytes, created_at, expires_at, revoked_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    )
    .bind(id)
    .bind(hash.to_string())
    .bind(name)
    .bind(tenant.as_str())
    .bind(role.name())
    .bind(requests_per_minute.map(i64::from))
    .bind(tokens_per_minute.map(i64::from))
    .bind(training_tokens_per_day.map(signed))
    .bind(stored_bytes.map(signed))
    .bind(*created_at)
    .bind(*expires_at)
    .bind(*revoked_at)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

#[derive(FromRow)]
struct RawKey {
    id: String,
    hash: String,
    name: String,
    tenant: String,
    role: String,
    requests_per_minute: Option<i64>,
    tokens_per_minute: Option<i64>,
    training_tokens_per_day: Option<i64>,
    stored_bytes: Option<i64>,
    created_at: i64,
    expires_at: Option<i64>,
    revoked_at: Option<i64>,
}

impl RawKey {
    fn parse(self) -> Result<KeyRow, StoreError> {
        let RawKey {
            id,
            hash,
            name,
            tenant,
            role,
            requests_per_minute,
            tokens_per_minute,
            training_tokens_per_day,
            stored_bytes,
            created_at,
            expires_at,
            revoked_at,
        } = self;
        let damaged = |why: String| StoreError::Damaged(format!("key {id}: {why}"));
        let limit = |limit: Option<i64>| {
            let number = limit.map(u32::try_from).transpose();
            number.map_err(|error| damaged(format!("a limit a minute: {error}")))
        };
        Ok(KeyRow {
            hash: hash.parse().map_err(|error| damaged(format!("{error}")))?,
            tenant: tenant.parse().map_err(|error| damaged(format!("{error}")))?,
            role: role.parse().map_err(|error| damaged(format!("{error}")))?,
            limits: Limits {
                requests_per_minute: limit(requests_per_minute)?,
                tokens_per_minute: limit(tokens_per_minute)?,
                training_tokens_per_day: training_tokens_per_day.map(unsigned),
                stored_bytes: stored_bytes.map(unsigned),
            },
            id,
            name,
            created_at,
            expires_at,
            revoked_at,
        })
    }
}
