//! Uploaded and result files: a row and the bytes it names.

use std::path::{Path, PathBuf};

use sqlx::{Any, FromRow, Transaction};
use tandem_core::id::Digest;

use crate::jobs::signed;
use crate::{Rows, Store, StoreError, Tenant, blocking, folders, ids, now};

/// In a place that others share, bytes without a row stay this long: an upload to it takes a while.
const LOOSE_GRACE_S: i64 = 24 * 3600;

#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct FileRow {
    pub id: String,
    #[sqlx(try_from = "i64")]
    pub bytes: u64,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub filename: String,
    pub purpose: String,
    pub tenant: String,
    /// Of its bytes, in hexadecimal digits. `None`: they came before there were digests, and were not read since.
    pub sha256: Option<String>,
}

/// A file to take in.
#[derive(Clone, Copy, Debug)]
pub struct NewFile<'a> {
    pub filename: &'a str,
    pub purpose: &'a str,
    pub expires_after_s: Option<u64>,
    pub tenant: &'a Tenant,
    /// Made while its bytes were written.
    pub sha256: Digest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Newest,
    Oldest,
}

fn published(id: String, bytes: u64, file: NewFile<'_>) -> FileRow {
    let NewFile {
        filename,
        purpose,
        expires_after_s,
        tenant,
        sha256,
    } = file;
    let created_at = now();
    FileRow {
        id,
        bytes,
        created_at,
        expires_at: expires_after_s.map(|s| created_at.saturating_add_unsigned(s)),
        filename: filename.to_owned(),
        purpose: purpose.to_owned(),
        tenant: tenant.to_string(),
        sha256: Some(sha256.to_string()),
    }
}

impl Store {
    /// Take a staged file in. It exists for others from the moment this returns. `limit`: what its tenant may have with it.
    pub async fn add_file(
        &self,
        staged: &Path,
        file: NewFile<'_>,
        limit: Option<u64>,
    ) -> Result<FileRow, StoreError> {
        // Before the long part: an upload that no row can name is in vain.
        self.db.health.check()?;
        self.check_room()?;
        let row = self
            .publish_file(staged, file)
            .await
            .inspect_err(|error| self.note(error))?;
        let written = async {
            let mut tx = self.db.begin().await?;
            self.check_stored(&mut tx, file.tenant, limit, row.bytes).await?;
            insert(&mut tx, &row).await?;
            Ok(tx.commit().await?)
        };
        match written.await {
            Ok(()) => Ok(row),
            Err(error) => {
                self.note(&error);
                // Nobody names these bytes. When they cannot be taken back either, they only take room.
                if let Err(left) = self.discard_file(&row).await {
                    tracing::warn!(file = %row.id, error = %left, "bytes without a row were left");
                }
                Err(error)
            }
        }
    }

    /// The first half of [`Store::add_file`]: durable bytes, and the row for them that a later transaction commits
    /// (see [`crate::JobChange::result_file`]).
    pub async fn publish_file(&self, staged: &Path, file: NewFile<'_>) -> Result<FileRow, StoreError> {
        let (id, bytes) = self.publish_bytes(staged).await?;
        Ok(published(id, bytes, file))
    }

    /// Durable bytes under a new id, of which only a row of loose files knows.
    pub(crate) async fn publish_bytes(&self, staged: &Path) -> Result<(String, u64), StoreError> {
        let id = ids::file();
        self.expect_file(&id).await?;
        let bytes = self.artifacts.publish_file(staged, &id).await?;
        Ok((id, bytes))
    }

    /// The same for what a job made: while the artifact store is away, it waits as the job does.
    pub async fn publish_result(&self, content: &[u8], file: NewFile<'_>) -> Result<FileRow, StoreError> {
        let id = ids::file();
        self.expect_file(&id).await?;
        let bytes = self.artifacts.publish_result(content, &id).await?;
        Ok(published(id, bytes, file))
    }

    /// Take back what [`Store::publish_file`] did, when no row was committed for it.
    pub async fn discard_file(&self, row: &FileRow) -> Result<(), StoreError> {
        self.remove_loose_file(&row.id).await
    }

    /// A start, or who tidies up, now knows of bytes that no row names yet.
    async fn expect_file(&self, id: &str) -> Result<(), StoreError> {
        let mut tx = self.db.begin().await?;
        loosen(&mut tx, id).await?;
        Ok(tx.commit().await?)
    }

    pub(crate) async fn remove_loose_file(&self, id: &str) -> Result<(), StoreError> {
        self.artifacts.remove_file(id).await?;
        sqlx::query("DELETE FROM loose_files WHERE id = $1")
            .bind(id)
            .execute(self.db.pool()?)
            .await?;
        Ok(())
    }

    /// Remove what a kill left of files on their way in or out: of this process's own folder at its start, of a place
    /// that others share once none of them can be at it any more. Returns how many.
    pub async fn delete_loose_files(&self) -> Result<usize, StoreError> {
        let until = match self.is_shared() {
            true => now() - LOOSE_GRACE_S,
            false => i64::MAX,
        };
        let loose: Vec<String> = sqlx::query_scalar("SELECT id FROM loose_files WHERE created_at <= $1")
            .bind(until)
            .fetch_all(self.db.pool()?)
            .await?;
        for id in &loose {
            self.remove_loose_file(id).await?;
        }
        Ok(loose.len())
    }

    /// `None`: there is none, or it has expired.
    pub async fn file(&self, id: &str) -> Result<Option<FileRow>, StoreError> {
        if id.contains('\0') {
            // Postgres would not take it for a text.
            return Ok(None);
        }
        let sql =
            "SELECT id, bytes, created_at, expires_at, filename, purpose, tenant, sha256 FROM files WHERE id = $1
                   AND (expires_at IS NULL OR expires_at > $2)";
        Ok(sqlx::query_as(sql)
            .bind(id)
            .bind(now())
            .fetch_optional(self.db.pool()?)
            .await?)
    }

    /// Where the bytes of a file lie; they are fetched when they are not here.
    pub async fn file_path(&self, row: &FileRow) -> Result<PathBuf, StoreError> {
        self.artifacts.file(&row.id).await
    }

    /// The same, once they were read whole and are those that were written.
    pub async fn sound_file(&self, row: &FileRow) -> Result<PathBuf, StoreError> {
        let look = async || {
            let path = self.file_path(row).await?;
            let (bytes, sha256) = blocking({
                let (path, most) = (path.clone(), row.bytes);
                move || folders::file_digest(&path, most)
            })
            .await?;
            self.check_file(row, bytes, sha256).await?;
            Ok(path)
        };
        match look().await {
            // Of a cache, it was removed.
            Err(StoreError::Altered { .. }) if self.artifacts.is_cached() => look().await,
            looked => looked,
        }
    }

    /// Whether what was read of a file, all of it, is what was written. A row without a digest gets this one. A damaged copy in
    /// a cache goes, so that it is fetched again.
    pub async fn check_file(&self, row: &FileRow, bytes: u64, sha256: Digest) -> Result<(), StoreError> {
        if row.sha256.is_none() && bytes == row.bytes {
            sqlx::query("UPDATE files SET sha256 = $1 WHERE id = $2 AND sha256 IS NULL")
                .bind(sha256.to_string())
                .bind(&row.id)
                .execute(self.db.pool()?)
                .await?;
            return Ok(());
        }
        let expected = (row.bytes, row.sha256.as_deref());
        let same = must_be(&format!("file {}", row.id), expected, (bytes, sha256));
        if let Err(error) = &same {
            tracing::error!(%error, "a file is not served");
            if self.artifacts.is_cached() {
                let path = self.artifacts.folders().file(&row.id);
                blocking(move || folders::remove(&path)).await?;
            }
        }
        same
    }

    /// A page of the files that have not expired, those after the file `after` in this order; of one tenant, or of all.
    pub async fn files(
        &self,
        tenant: Option<&Tenant>,
        purpose: Option<&str>,
        after: Option<&str>,
        limit: u32,
        order: Order,
    ) -> Result<Rows<FileRow>, StoreError> {
        let sql = match order {
            Order::Newest => {
                "SELECT id, bytes, created_at, expires_at, filename, purpose, tenant, sha256 FROM files WHERE ($1 IS NULL OR purpose = $1) AND (expires_at IS NULL OR expires_at > $2)
                 AND ($3 IS NULL OR seq < (SELECT seq FROM files WHERE id = $3))
                 AND ($5 IS NULL OR tenant = $5) ORDER BY seq DESC LIMIT $4"
            }
            Order::Oldest => {
                "SELECT id, bytes, created_at, expires_at, filename, purpose, tenant, sha256 FROM files WHERE ($1 IS NULL OR purpose = $1) AND (expires_at IS NULL OR expires_at > $2)
                 AND ($3 IS NULL OR seq > (SELECT seq FROM files WHERE id = $3))
                 AND ($5 IS NULL OR tenant = $5) ORDER BY seq LIMIT $4"
            }
        };
        let query = sqlx::query_as(sql)
            .bind(purpose)
            .bind(now())
            .bind(after)
            .bind(i64::from(limit) + 1)
            .bind(tenant.map(Tenant::as_str));
        Ok(Rows::cut(query.fetch_all(self.db.pool()?).await?, limit))
    }

    /// Whether there was one. The row goes first: nobody is pointed to missing bytes.
    pub async fn delete_file(&self, id: &str) -> Result<bool, StoreError> {
        match self.on_reserve(|| self.unlist_file(id)).await? {
            true => self
                .on_reserve(|| self.remove_loose_file(id))
                .await
                .map(|()| true),
            false => Ok(false),
        }
    }

    /// From here on the next start, or who tidies up, removes its bytes.
    async fn unlist_file(&self, id: &str) -> Result<bool, StoreError> {
        let mut tx = self.db.begin().await?;
        let deleted = sqlx::query("DELETE FROM files WHERE id = $1")
            .bind(id)
            .execute(&mut *tx)
            .await?;
        if deleted.rows_affected() == 0 {
            return Ok(false);
        }
        loosen(&mut tx, id).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Delete what has expired. Returns how many.
    pub async fn delete_expired_files(&self) -> Result<usize, StoreError> {
        let expired: Vec<String> = sqlx::query_scalar("SELECT id FROM files WHERE expires_at <= $1")
            .bind(now())
            .fetch_all(self.db.pool()?)
            .await?;
        for id in &expired {
            self.delete_file(id).await?;
        }
        Ok(expired.len())
    }
}

impl<T> Rows<T> {
    /// From `limit + 1` rows or fewer.
    pub(crate) fn cut(mut rows: Vec<T>, limit: u32) -> Rows<T> {
        let has_more = rows.len() > limit as usize;
        rows.truncate(limit as usize);
        Rows { rows, has_more }
    }
}

/// Whether bytes that were read are those that were written, by their number and digest.
pub(crate) fn must_be(
    what: &str,
    expected: (u64, Option<&str>),
    got: (u64, Digest),
) -> Result<(), StoreError> {
    let (bytes, sha256) = got;
    let sha256 = sha256.to_string();
    if bytes == expected.0 && expected.1.is_none_or(|expected| expected == sha256) {
        return Ok(());
    }
    let described = |bytes, sha256| format!("{bytes} bytes with the SHA-256 {sha256}");
    Err(StoreError::Altered {
        what: what.to_owned(),
        expected: described(expected.0, expected.1.unwrap_or("unknown")),
        got: described(bytes, &sha256),
    })
}

pub(crate) async fn loosen(tx: &mut Transaction<'static, Any>, id: &str) -> Result<(), StoreError> {
    sqlx::query("INSERT INTO loose_files (id, created_at) VALUES ($1, $2)")
        .bind(id)
        .bind(now())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The row of a file whose bytes are there: they are loose no longer.
pub(crate) async fn insert(tx: &mut Transaction<'static, Any>, row: &FileRow) -> Result<(), StoreError> {
    let FileRow {
        id,
        bytes,
        created_at,
        expires_at,
        filename,
        purpose,
        tenant,
        sha256,
    } = row;
    sqlx::query(
        "INSERT INTO files (id, bytes, created_at, expires_at, filename, purpose, tenant, sha256)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(id)
    .bind(signed(*bytes))
    .bind(*created_at)
    .bind(*expires_at)
    .bind(filename)
    .bind(purpose)
    .bind(tenant)
    .bind(sha256)
    .execute(&mut **tx)
    .await?;
    unloosen(tx, id).await
}

/// Another row knows of the bytes now.
pub(crate) async fn unloosen(tx: &mut Transaction<'static, Any>, id: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM loose_files WHERE id = $1")
        .bind(id)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
