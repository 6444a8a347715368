//! Batches of requests, and the answers of their lines until the batch ends and they are files. Whoever works on a batch
//! holds its lease (`lease`), and every write of its names that. Requests and errors are JSON of the caller's, the status
//! names are the caller's. Not here: what a line is.

use std::collections::HashSet;

use sqlx::any::AnyRow;
use sqlx::{Any, FromRow, Row, Transaction};
use tandem_core::id::Digest;

use crate::db::Dialect;
use crate::files::{self, FileRow};
use crate::jobs::{signed, three};
use crate::lease::Lease;
use crate::{Rows, Store, StoreError, Tenant, ids, now, unsigned};

macro_rules! columns {
    () => {
        "id, tenant, created_at, expires_at, request, status, in_progress_at, finalizing_at, cancelling_at, finished_at, \
         total, completed, failed, errors, output_file, error_file, key_id, deaths, at_line"
    };
}

/// A batch to insert.
pub struct NewBatch {
    pub base: Digest,
    pub tenant: Tenant,
    pub status: &'static str,
    pub expires_after_s: u64,
    pub request: String,
    /// The key that makes it, where what it stores is limited.
    pub key_id: Option<String>,
}

/// Requests of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub total: u64,
    /// Answered.
    pub completed: u64,
    /// Refused, or not answered.
    pub failed: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct BatchRow {
    pub id: String,
    pub tenant: String,
    pub created_at: i64,
    pub expires_at: i64,
    pub request: String,
    pub status: String,
    pub in_progress_at: Option<i64>,
    pub finalizing_at: Option<i64>,
    pub cancelling_at: Option<i64>,
    pub finished_at: Option<i64>,
    pub tally: Tally,
    pub errors: Option<String>,
    pub output_file: Option<String>,
    pub error_file: Option<String>,
    /// The key that made it, where what it stores is limited.
    pub key_id: Option<String>,
    /// How often in a row whoever worked on it went without a word before another line was kept.
    pub deaths: u64,
    /// The line that was asked then, where it was by itself.
    pub at_line: Option<u64>,
}

impl<'r> FromRow<'r, AnyRow> for BatchRow {
    fn from_row(row: &'r AnyRow) -> Result<BatchRow, sqlx::Error> {
        let count = |name: &str| row.try_get::<i64, _>(name).map(unsigned);
        Ok(BatchRow {
            id: row.try_get("id")?,
            tenant: row.try_get("tenant")?,
            created_at: row.try_get("created_at")?,
            expires_at: row.try_get("expires_at")?,
            request: row.try_get("request")?,
            status: row.try_get("status")?,
            in_progress_at: row.try_get("in_progress_at")?,
            finalizing_at: row.try_get("finalizing_at")?,
            cancelling_at: row.try_get("cancelling_at")?,
            finished_at: row.try_get("finished_at")?,
            tally: Tally {
                total: count("total")?,
                completed: count("completed")?,
                failed: count("failed")?,
            },
            errors: row.try_get("errors")?,
            output_file: row.try_get("output_file")?,
            error_file: row.try_get("error_file")?,
            key_id: row.try_get("key_id")?,
            deaths: count("deaths")?,
            at_line: row.try_get::<Option<i64>, _>("at_line")?.map(unsigned),
        })
    }
}

/// The answer of one line of the input, as it will stand in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchLine {
    /// From 1.
    pub line: u64,
    /// It goes to the output, else to the errors.
    pub ok: bool,
    pub answer: String,
}

/// A step in a batch's life that its holder takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchChange {
    /// Its file was read, and has so many requests.
    Begins { total: u64 },
    /// All lines are there; their files are written.
    Finalizes,
}

/// How a batch ends.
pub struct BatchEnd {
    pub status: &'static str,
    pub errors: Option<String>,
    /// From [`Store::publish_file`].
    pub output: Option<FileRow>,
    pub error: Option<FileRow>,
}

impl Store {
    pub async fn insert_batch(&self, batch: NewBatch) -> Result<BatchRow, StoreError> {
        let NewBatch {
            base,
            tenant,
            status,
            expires_after_s,
            request,
            key_id,
        } = batch;
        self.check_room()?;
        let (id, created_at) = (ids::batch(), now());
        let inserted = sqlx::query(
            "INSERT INTO batches (id, tenant, base, created_at, expires_at, request, status, key_id)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&id)
        .bind(tenant.as_str())
        .bind(base.to_string())
        .bind(created_at)
        .bind(created_at.saturating_add_unsigned(expires_after_s))
        .bind(request)
        .bind(status)
        .bind(key_id)
        .execute(self.db.pool()?)
        .await;
        inserted
            .map_err(StoreError::from)
            .inspect_err(|error| self.note(error))?;
        let made = self.batch(&id).await?;
        made.ok_or_else(|| StoreError::Damaged(format!("{id} was written and is not there")))
    }

    pub async fn batch(&self, id: &str) -> Result<Option<BatchRow>, StoreError> {
        if id.contains('\0') {
            // Postgres would not take it for a text.
            return Ok(None);
        }
        Ok(
            sqlx::query_as(concat!("SELECT ", columns!(), " FROM batches WHERE id = $1"))
                .bind(id)
                .fetch_optional(self.db.pool()?)
                .await?,
        )
    }

    /// Newest first, those before the batch `after`; of one tenant, or of all.
    pub async fn batches(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Rows<BatchRow>, StoreError> {
        let sql = concat!(
            "SELECT ",
            columns!(),
            " FROM batches WHERE ($1 IS NULL OR seq < (SELECT seq FROM batches WHERE id = $1))
             AND ($2 IS NULL OR tenant = $2) ORDER BY seq DESC LIMIT $3"
        );
        let query = sqlx::query_as(sql)
            .bind(after)
            .bind(tenant.map(Tenant::as_str))
            .bind(i64::from(limit) + 1);
        Ok(Rows::cut(query.fetch_all(self.db.pool()?).await?, limit))
    }

    /// Claim a batch that has not ended and that nobody holds: one for `base`, or one whose time is over. The oldest of the tenant of
    /// whose batches the fewest are held; where `is_crowded`, of a tenant of whom none is.
    pub async fn claim_batch(
        &self,
        base: Digest,
        is_crowded: bool,
    ) -> Result<Option<(BatchRow, Lease)>, StoreError> {
        let lock = match self.db.dialect {
            Dialect::Sqlite => "",
            // Routers that claim at the same moment take different ones.
            Dialect::Postgres => " FOR UPDATE OF batches SKIP LOCKED",
        };
        let which = match is_crowded {
            true => " AND batches_held IS NULL",
            false => "",
        };
        let candidate = format!(
            "WITH held AS (SELECT tenant AS of_tenant, count(*) AS batches_held FROM batches
                 WHERE finished_at IS NULL AND lease_until > $3 GROUP BY tenant)
             SELECT id FROM batches LEFT JOIN held ON of_tenant = tenant
             WHERE finished_at IS NULL AND (base = $1 OR expires_at <= $2) AND (lease_until IS NULL OR lease_until <= $3){which}
             ORDER BY coalesce(batches_held, 0), seq LIMIT 1{lock}"
        );
        let mut tx = self.db.begin().await?;
        let now_ms = self.db.clock_ms(&mut tx).await?;
        // Safe: nothing of a caller's was put into the text.
        let id: Option<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(candidate))
            .bind(base.to_string())
            .bind(now())
            .bind(now_ms)
            .fetch_optional(&mut *tx)
            .await?;
        let Some(id) = id else { return Ok(None) };
        sqlx::query(
            "UPDATE batches SET deaths = CASE WHEN lease_until IS NOT NULL THEN deaths + 1 ELSE deaths END,
             lease_owner = $1, lease_until = $2, lease_epoch = lease_epoch + 1 WHERE id = $3",
        )
        .bind(&self.owner)
        .bind(self.until(now_ms))
        .bind(&id)
        .execute(&mut *tx)
        .await?;
        let epoch: i64 = sqlx::query_scalar("SELECT lease_epoch FROM batches WHERE id = $1")
            .bind(&id)
            .fetch_one(&mut *tx)
            .await?;
        let row = sqlx::query_as(concat!("SELECT ", columns!(), " FROM batches WHERE id = $1"))
            .bind(&id)
            .fetch_one(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Some((row, Lease::of(epoch))))
    }

    /// Which line is asked by itself: where nobody keeps its answer, it is known who was at work. False: the batch is another's.
    pub async fn ask_batch_line(&self, id: &str, lease: Lease, line: u64) -> Result<bool, StoreError> {
        let sql = "UPDATE batches SET at_line = $1 WHERE id = $2 AND lease_epoch = $3";
        let marked = sqlx::query(sql)
            .bind(signed(line))
            .bind(id)
            .bind(signed(lease.epoch()))
            .execute(self.db.pool()?)
            .await?;
        Ok(marked.rows_affected() == 1)
    }

    /// How many have not ended and are nobody's.
    pub async fn queued_batches(&self) -> Result<u64, StoreError> {
        let mut tx = self.db.begin().await?;
        let now_ms = self.db.clock_ms(&mut tx).await?;
        let queued: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM batches WHERE finished_at IS NULL AND (lease_until IS NULL OR lease_until <= $1)",
        )
        .bind(now_ms)
        .fetch_one(&mut *tx)
        .await?;
        Ok(unsigned(queued))
    }

    /// Delete the rows of batches that ended so many seconds ago or more, and whose files of answers are gone: as long as there
    /// is one, its batch says what it is. Returns how many.
    pub async fn delete_old_batches(&self, age_s: i64) -> Result<u64, StoreError> {
        let deleted = sqlx::query(
            "DELETE FROM batches WHERE finished_at <= $1
             AND NOT EXISTS (SELECT 1 FROM files WHERE files.id IN (batches.output_file, batches.error_file))",
        )
        .bind(now().saturating_sub(age_s))
        .execute(self.db.pool()?)
        .await?;
        Ok(deleted.rows_affected())
    }

    /// Whether it was one of `from`, and is cancelled from now on. Whoever works on it ends it.
    pub async fn cancel_batch(
        &self,
        id: &str,
        from: &[&str],
        status: &'static str,
    ) -> Result<bool, StoreError> {
        let [from_1, from_2, from_3] = three(from);
        self.on_reserve(async || {
            let changed = sqlx::query(
                "UPDATE batches SET status = $1, cancelling_at = $2 WHERE id = $3 AND status IN ($4, $5, $6)",
            )
            .bind(status)
            .bind(now())
            .bind(id)
            .bind(from_1)
            .bind(from_2)
            .bind(from_3)
            .execute(self.db.pool()?)
            .await?;
            Ok(changed.rows_affected() > 0)
        })
        .await
    }

    /// Whether it is the holder's still, and was in one of `from`.
    pub async fn change_batch(
        &self,
        id: &str,
        lease: Lease,
        from: &[&str],
        status: &'static str,
        change: BatchChange,
    ) -> Result<bool, StoreError> {
        let (total, begins) = match change {
            BatchChange::Begins { total } => (Some(signed(total)), true),
            BatchChange::Finalizes => (None, false),
        };
        let [from_1, from_2, from_3] = three(from);
        let changed = sqlx::query(
            "UPDATE batches SET status = $1, total = coalesce($2, total),
             in_progress_at = CASE WHEN $3 THEN $4 ELSE in_progress_at END,
             finalizing_at = CASE WHEN $3 THEN finalizing_at ELSE $4 END
             WHERE id = $5 AND lease_epoch = $6 AND status IN ($7, $8, $9)",
        )
        .bind(status)
        .bind(total)
        .bind(begins)
        .bind(now())
        .bind(id)
        .bind(signed(lease.epoch()))
        .bind(from_1)
        .bind(from_2)
        .bind(from_3)
        .execute(self.db.pool()?)
        .await?;
        Ok(changed.rows_affected() > 0)
    }

    /// Keep answers; of a line that has one already, the first counts. `false`: the batch is no longer the holder's.
    pub async fn keep_batch_lines(
        &self,
        id: &str,
        lease: Lease,
        lines: &[BatchLine],
    ) -> Result<bool, StoreError> {
        let kept = self.write_batch_lines(id, lease, lines).await;
        kept.inspect_err(|error| self.note(error))
    }

    async fn write_batch_lines(
        &self,
        id: &str,
        lease: Lease,
        lines: &[BatchLine],
    ) -> Result<bool, StoreError> {
        self.check_room()?;
        let mut tx = self.db.begin().await?;
        let (mut completed, mut failed, mut bytes) = (0, 0, 0);
        for BatchLine { line, ok, answer } in lines {
            let inserted = sqlx::query(
                "INSERT INTO batch_lines (batch, line, ok, answer) VALUES ($1, $2, $3, $4)
                 ON CONFLICT (batch, line) DO NOTHING",
            )
            .bind(id)
            .bind(signed(*line))
            .bind(i64::from(*ok))
            .bind(answer)
            .execute(&mut *tx)
            .await?;
            let rows = signed(inserted.rows_affected());
            *(if *ok { &mut completed } else { &mut failed }) += rows;
            bytes += rows * signed(answer.len() as u64);
        }
        let changed = sqlx::query(
            "UPDATE batches SET completed = completed + $1, failed = failed + $2, answer_bytes = answer_bytes + $5,
             deaths = 0, at_line = NULL
             WHERE id = $3 AND lease_epoch = $4 AND finished_at IS NULL",
        )
        .bind(completed)
        .bind(failed)
        .bind(id)
        .bind(signed(lease.epoch()))
        .bind(bytes)
        .execute(&mut *tx)
        .await?;
        if changed.rows_affected() == 0 {
            return Ok(false);
        }
        tx.commit().await?;
        Ok(true)
    }

    /// The lines that have an answer.
    pub async fn answered_batch_lines(&self, id: &str) -> Result<HashSet<u64>, StoreError> {
        let lines: Vec<i64> = sqlx::query_scalar("SELECT line FROM batch_lines WHERE batch = $1")
            .bind(id)
            .fetch_all(self.db.pool()?)
            .await?;
        Ok(lines.into_iter().map(unsigned).collect())
    }

    /// Answers behind the line `after`, in the order of lines.
    pub async fn batch_lines(&self, id: &str, after: u64, limit: u32) -> Result<Vec<BatchLine>, StoreError> {
        let sql =
            "SELECT line, ok, answer FROM batch_lines WHERE batch = $1 AND line > $2 ORDER BY line LIMIT $3";
        let rows: Vec<(i64, i64, String)> = sqlx::query_as(sql)
            .bind(id)
            .bind(signed(after))
            .bind(i64::from(limit))
            .fetch_all(self.db.pool()?)
            .await?;
        let line = |(line, ok, answer)| BatchLine {
            line: unsigned(line),
            ok: ok != 0,
            answer,
        };
        Ok(rows.into_iter().map(line).collect())
    }

    /// The end of a batch, its files and the end of its lines at once. `false`: it is no longer the holder's.
    pub async fn end_batch(&self, id: &str, lease: Lease, end: BatchEnd) -> Result<bool, StoreError> {
        self.on_reserve(|| self.end_batch_now(id, lease, &end)).await
    }

    async fn end_batch_now(&self, id: &str, lease: Lease, end: &BatchEnd) -> Result<bool, StoreError> {
        let BatchEnd {
            status,
            errors,
            output,
            error,
        } = end;
        let name = |file: &Option<FileRow>| file.as_ref().map(|file| file.id.clone());
        let mut tx = self.db.begin().await?;
        let changed = sqlx::query(
            "UPDATE batches SET status = $1, finished_at = $2, errors = $3, output_file = $4, error_file = $5,
             lease_until = NULL WHERE id = $6 AND lease_epoch = $7 AND finished_at IS NULL",
        )
        .bind(*status)
        .bind(now())
        .bind(errors)
        .bind(name(output))
        .bind(name(error))
        .bind(id)
        .bind(signed(lease.epoch()))
        .execute(&mut *tx)
        .await?;
        if changed.rows_affected() == 0 {
            return Ok(false);
        }
        for file in [output, error].into_iter().flatten() {
            files::insert(&mut tx, file).await?;
        }
        forget_lines(&mut tx, id).await?;
        tx.commit().await?;
        Ok(true)
    }
}

async fn forget_lines(tx: &mut Transaction<'static, Any>, batch: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM batch_lines WHERE batch = $1")
        .bind(batch)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
