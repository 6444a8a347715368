//! Files that come in parts. A part's bytes lie where files lie, and its row knows of them; when the upload is completed
//! they become one file, and when it is cancelled or its time is over they go. Not here: what a file must be.

use std::path::{Path, PathBuf};

use sqlx::{Any, FromRow, Transaction};
use tandem_core::id::Digest;

use crate::files::{self, FileRow, NewFile};
use crate::jobs::signed;
use crate::{Store, StoreError, Tenant, ids, now, unsigned};

pub const PENDING: &str = "pending";

/// An upload to begin.
pub struct NewUpload<'a> {
    pub filename: &'a str,
    pub purpose: &'a str,
    pub bytes: u64,
    /// For how long parts may come.
    pub open_s: u64,
    /// Of the file that it becomes.
    pub expires_after_s: Option<u64>,
    pub tenant: &'a Tenant,
    /// What the tenant may have with all that is to come.
    pub limit: Option<u64>,
}

/// Why a part was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPart {
    /// The upload takes no more.
    Ended,
    /// Others came meanwhile, and have so many bytes.
    TooLarge { had: u64 },
    /// There are as many as may be.
    TooMany,
}

#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct UploadRow {
    pub id: String,
    pub tenant: String,
    pub created_at: i64,
    pub expires_at: i64,
    /// `pending`, `completed`, `cancelled` or `expired`.
    pub status: String,
    pub filename: String,
    pub purpose: String,
    #[sqlx(try_from = "i64")]
    pub bytes: u64,
    pub expires_after_s: Option<i64>,
    pub file: Option<String>,
}

#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct PartRow {
    pub id: String,
    pub upload: String,
    /// Under which its bytes lie.
    pub file: String,
    pub created_at: i64,
    #[sqlx(try_from = "i64")]
    pub bytes: u64,
    /// As of a file.
    pub sha256: Option<String>,
}

impl PartRow {
    /// Whether what was read of it is what was written.
    pub fn check(&self, bytes: u64, sha256: Digest) -> Result<(), StoreError> {
        let what = format!("part {} of upload {}", self.id, self.upload);
        files::must_be(&what, (self.bytes, self.sha256.as_deref()), (bytes, sha256))
    }
}

impl Store {
    pub async fn insert_upload(&self, upload: NewUpload<'_>) -> Result<UploadRow, StoreError> {
        let NewUpload {
            filename,
            purpose,
            bytes,
            open_s,
            expires_after_s,
            tenant,
            limit,
        } = upload;
        self.check_room()?;
        let created_at = now();
        let row = UploadRow {
            id: ids::upload(),
            tenant: tenant.to_string(),
            created_at,
            expires_at: created_at.saturating_add_unsigned(open_s),
            status: PENDING.to_owned(),
            filename: filename.to_owned(),
            purpose: purpose.to_owned(),
            bytes,
            expires_after_s: expires_after_s.map(signed),
            file: None,
        };
        let mut tx = self.db.begin().await?;
        self.check_stored(&mut tx, tenant, limit, bytes).await?;
        sqlx::query(
            "INSERT INTO uploads (id, tenant, created_at, expires_at, status, filename, purpose, bytes, expires_after_s)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        )
        .bind(&row.id)
        .bind(&row.tenant)
        .bind(row.created_at)
        .bind(row.expires_at)
        .bind(&row.status)
        .bind(&row.filename)
        .bind(&row.purpose)
        .bind(signed(row.bytes))
        .bind(row.expires_after_s)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(row)
    }

    /// One whose time is over is expired, whether or not its parts have gone yet.
    pub async fn upload(&self, id: &str) -> Result<Option<UploadRow>, StoreError> {
        if id.contains('\0') {
            // Postgres would not take it for a text.
            return Ok(None);
        }
        let sql = "SELECT id, tenant, created_at, expires_at,
                   CASE WHEN status = 'pending' AND expires_at <= $2 THEN 'expired' ELSE status END AS status,
                   filename, purpose, bytes, expires_after_s, file FROM uploads WHERE id = $1";
        Ok(sqlx::query_as(sql)
            .bind(id)
            .bind(now())
            .fetch_optional(self.db.pool()?)
            .await?)
    }

    /// Take a staged part in, of which there are `max_parts` at most, with no more bytes together than were announced.
    pub async fn add_part(
        &self,
        upload: &UploadRow,
        staged: &Path,
        sha256: Digest,
        max_parts: usize,
    ) -> Result<Result<PartRow, NoPart>, StoreError> {
        self.db.health.check()?;
        self.check_room()?;
        let noted = |error: &StoreError| self.note(error);
        let (file, bytes) = self.publish_bytes(staged).await.inspect_err(noted)?;
        let part = PartRow {
            id: ids::part(),
            upload: upload.id.clone(),
            file,
            created_at: now(),
            bytes,
            sha256: Some(sha256.to_string()),
        };
        match self.insert_part(&part, upload.bytes, max_parts).await {
            Ok(Ok(())) => Ok(Ok(part)),
            Ok(Err(refused)) => {
                self.remove_loose_file(&part.file).await?;
                Ok(Err(refused))
            }
            Err(error) => {
                self.note(&error);
                if let Err(left) = self.remove_loose_file(&part.file).await {
                    tracing::warn!(part = %part.id, error = %left, "bytes without a row were left");
                }
                Err(error)
            }
        }
    }

    async fn insert_part(
        &self,
        part: &PartRow,
        announced_bytes: u64,
        max_parts: usize,
    ) -> Result<Result<(), NoPart>, StoreError> {
        let mut tx = self.db.begin().await?;
        // The row stays locked, so that no part comes behind an end, or beside another.
        if !still_pending(&mut tx, &part.upload).await? {
            return Ok(Err(NoPart::Ended));
        }
        let sql =
            "SELECT count(*), CAST(coalesce(SUM(bytes), 0) AS BIGINT) FROM upload_parts WHERE upload = $1";
        let (parts, had): (i64, i64) = sqlx::query_as(sql).bind(&part.upload).fetch_one(&mut *tx).await?;
        let had = unsigned(had);
        if unsigned(parts) >= max_parts as u64 {
            return Ok(Err(NoPart::TooMany));
        }
        if had.saturating_add(part.bytes) > announced_bytes {
            return Ok(Err(NoPart::TooLarge { had }));
        }
        sqlx::query(
            "INSERT INTO upload_parts (id, upload, file, created_at, bytes, sha256) VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(&part.id)
        .bind(&part.upload)
        .bind(&part.file)
        .bind(part.created_at)
        .bind(signed(part.bytes))
        .bind(&part.sha256)
        .execute(&mut *tx)
        .await?;
        files::unloosen(&mut tx, &part.file).await?;
        tx.commit().await?;
        Ok(Ok(()))
    }

    pub async fn parts(&self, upload: &str) -> Result<Vec<PartRow>, StoreError> {
        let sql = "SELECT id, upload, file, created_at, bytes, sha256 FROM upload_parts WHERE upload = $1";
        Ok(sqlx::query_as(sql)
            .bind(upload)
            .fetch_all(self.db.pool()?)
            .await?)
    }

    /// Where the bytes of a part lie; they are fetched when they are not here.
    pub async fn part_path(&self, part: &PartRow) -> Result<PathBuf, StoreError> {
        self.artifacts.file(&part.file).await
    }

    /// The staged file is what the parts are together: it becomes a file, and the upload is completed. `None`: it was not
    /// pending any more.
    pub async fn complete_upload(
        &self,
        upload: &UploadRow,
        staged: &Path,
        sha256: Digest,
    ) -> Result<Option<FileRow>, StoreError> {
        let tenant: Tenant = upload
            .tenant
            .parse()
            .map_err(|error| StoreError::Damaged(format!("the tenant of {}: {error}", upload.id)))?;
        let file = NewFile {
            filename: &upload.filename,
            purpose: &upload.purpose,
            expires_after_s: upload.expires_after_s.map(unsigned),
            tenant: &tenant,
            sha256,
        };
        let noted = |error: &StoreError| self.note(error);
        let row = self.publish_file(staged, file).await.inspect_err(noted)?;
        let ended = self.end_upload_now(&upload.id, "completed", Some(&row)).await;
        match ended.inspect_err(noted)? {
            Some(loose) => {
                self.remove_loose(loose).await;
                Ok(Some(row))
            }
            None => {
                self.discard_file(&row).await?;
                Ok(None)
            }
        }
    }

    /// Whether it was pending. Its parts go.
    pub async fn end_upload(&self, id: &str, status: &'static str) -> Result<bool, StoreError> {
        let loose = self.on_reserve(|| self.end_upload_now(id, status, None)).await?;
        let Some(loose) = loose else { return Ok(false) };
        self.remove_loose(loose).await;
        Ok(true)
    }

    /// The ids under which bytes lie that no row but those of loose files names now.
    async fn end_upload_now(
        &self,
        id: &str,
        status: &'static str,
        file: Option<&FileRow>,
    ) -> Result<Option<Vec<String>>, StoreError> {
        let mut tx = self.db.begin().await?;
        let changed =
            sqlx::query("UPDATE uploads SET status = $1, file = $2 WHERE id = $3 AND status = 'pending'")
                .bind(status)
                .bind(file.map(|file| file.id.as_str()))
                .bind(id)
                .execute(&mut *tx)
                .await?;
        if changed.rows_affected() == 0 {
            return Ok(None);
        }
        if let Some(file) = file {
            files::insert(&mut tx, file).await?;
        }
        let loose: Vec<String> = sqlx::query_scalar("SELECT file FROM upload_parts WHERE upload = $1")
            .bind(id)
            .fetch_all(&mut *tx)
            .await?;
        for file in &loose {
            files::loosen(&mut tx, file).await?;
        }
        sqlx::query("DELETE FROM upload_parts WHERE upload = $1")
            .bind(id)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Some(loose))
    }

    /// What cannot be removed now goes at the next start, or by who tidies up.
    async fn remove_loose(&self, files: Vec<String>) {
        for file in files {
            if let Err(error) = self.remove_loose_file(&file).await {
                tracing::warn!(file, %error, "a part of an upload was left");
            }
        }
    }

    /// End uploads whose time is over. Returns how many.
    pub async fn expire_uploads(&self) -> Result<usize, StoreError> {
        let sql = "SELECT id FROM uploads WHERE status = 'pending' AND expires_at <= $1";
        let over: Vec<String> = sqlx::query_scalar(sql)
            .bind(now())
            .fetch_all(self.db.pool()?)
            .await?;
        for id in &over {
            self.end_upload(id, "expired").await?;
        }
        Ok(over.len())
    }
}

async fn still_pending(tx: &mut Transaction<'static, Any>, upload: &str) -> Result<bool, StoreError> {
    let locked = sqlx::query(
        "UPDATE uploads SET status = status WHERE id = $1 AND status = 'pending' AND expires_at > $2",
    )
    .bind(upload)
    .bind(now())
    .execute(&mut **tx)
    .await?;
    Ok(locked.rows_affected() > 0)
}
