//! Jobs, their events and checkpoints. A job changes only by [`Store::change_job`]: one transaction for its state, what
//! it says and what it makes. Requests, numbers and errors are JSON of the caller's; the status names are the caller's.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sqlx::{FromRow, Sqlite, Transaction};
use tandem_core::id::Digest;

use crate::files::{self, FileRow};
use crate::names::{self, NameRow, NewName};
use crate::{Rows, Store, StoreError, artifacts, blocking, db, ids, now};

/// A job to insert.
pub struct NewJob {
    /// From [`ids::job`].
    pub id: String,
    pub base: Digest,
    pub status: String,
    pub request: String,
    pub metadata: BTreeMap<String, String>,
    /// The first that no other job has becomes the job's.
    pub model_names: Vec<String>,
    pub events: Vec<NewEvent>,
}

#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct JobRow {
    pub seq: i64,
    pub id: String,
    pub created_at: i64,
    pub updated_at: i64,
    pub finished_at: Option<i64>,
    pub estimated_finish: Option<i64>,
    pub status: String,
    pub cancel_requested: bool,
    pub request: String,
    pub hyper: Option<String>,
    pub model_name: String,
    pub fine_tuned_model: Option<String>,
    pub trained_tokens: Option<u64>,
    /// JSON list of file ids.
    pub result_files: String,
    pub error: Option<String>,
}

/// What happens to a job at once. `None` leaves what is there.
#[derive(Default)]
pub struct JobChange {
    /// The change happens only if the job is in one of these.
    pub from: &'static [&'static str],
    pub status: Option<&'static str>,
    /// The new status is an end.
    pub ends: bool,
    pub hyper: Option<String>,
    pub trained_tokens: Option<u64>,
    pub estimated_finish: Option<i64>,
    pub fine_tuned_model: Option<String>,
    pub error: Option<String>,
    pub events: Vec<NewEvent>,
    pub checkpoint: Option<NewCheckpoint>,
    pub name: Option<NewName>,
    /// From [`Store::publish_file`].
    pub result_file: Option<FileRow>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    pub level: &'static str,
    pub message: String,
    /// JSON.
    pub data: String,
}

#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct EventRow {
    pub seq: i64,
    pub id: String,
    pub created_at: i64,
    pub level: String,
    pub message: String,
    pub data: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NewCheckpoint {
    pub step: u64,
    pub model: String,
    /// JSON.
    pub metrics: String,
}

#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct CheckpointRow {
    pub id: String,
    pub created_at: i64,
    pub step: u64,
    pub model: String,
    pub metrics: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetadataFilter {
    Any,
    /// Jobs without metadata.
    None,
    /// Jobs that have all these pairs.
    Pairs(BTreeMap<String, String>),
}

impl Store {
    pub async fn insert_job(&self, job: NewJob) -> Result<JobRow, StoreError> {
        let NewJob {
            id,
            base,
            status,
            request,
            metadata,
            model_names,
            events,
        } = job;
        let mut tx = db::begin(&self.pool).await?;
        let mut free = None;
        for name in model_names {
            let taken: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM jobs WHERE model_name = ?)")
                .bind(&name)
                .fetch_one(&mut *tx)
                .await?;
            if !taken {
                free = Some(name);
                break;
            }
        }
        let name = free.ok_or_else(|| StoreError::Damaged(format!("every model name for {id} is taken")))?;
        sqlx::query(
            "INSERT INTO jobs (id, base, created_at, updated_at, status, request, metadata, model_name)
             VALUES (?1, ?2, ?3, ?3, ?4, ?5, ?6, ?7)",
        )
        .bind(&id)
        .bind(base.to_string())
        .bind(now())
        .bind(status)
        .bind(request)
        .bind(as_json(&metadata))
        .bind(name)
        .execute(&mut *tx)
        .await?;
        insert_events(&mut tx, &id, &events).await?;
        let row = sqlx::query_as("SELECT * FROM jobs WHERE id = ?")
            .bind(&id)
            .fetch_one(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(row)
    }

    /// All of `change`, or nothing and `None` when the job is not in one of `change.from`. The name, if there is one in
    /// the change, comes back as written.
    pub async fn change_job(&self, id: &str, change: JobChange) -> Result<Option<Changed>, StoreError> {
        let JobChange {
            from,
            status,
            ends,
            hyper,
            trained_tokens,
            estimated_finish,
            fine_tuned_model,
            error,
            events,
            checkpoint,
            name,
            result_file,
        } = change;
        let mut tx = db::begin(&self.pool).await?;
        let changed = sqlx::query(
            "UPDATE jobs SET updated_at = ?1, status = coalesce(?2, status),
             finished_at = CASE WHEN ?3 THEN ?1 ELSE finished_at END,
             estimated_finish = CASE WHEN ?3 THEN NULL ELSE coalesce(?4, estimated_finish) END,
             hyper = coalesce(?5, hyper), trained_tokens = coalesce(?6, trained_tokens),
             fine_tuned_model = coalesce(?7, fine_tuned_model), error = coalesce(?8, error),
             result_files = CASE WHEN ?9 IS NULL THEN result_files ELSE json_insert(result_files, '$[#]', ?9) END
             WHERE id = ?10 AND status IN (SELECT value FROM json_each(?11))",
        )
        .bind(now())
        .bind(status)
        .bind(ends)
        .bind(estimated_finish)
        .bind(hyper)
        .bind(trained_tokens.map(|tokens| tokens as i64))
        .bind(fine_tuned_model)
        .bind(error)
        .bind(result_file.as_ref().map(|file| &file.id))
        .bind(id)
        .bind(as_json(&from))
        .execute(&mut *tx)
        .await?;
        if changed.rows_affected() == 0 {
            return Ok(None);
        }
        insert_events(&mut tx, id, &events).await?;
        if let Some(NewCheckpoint { step, model, metrics }) = checkpoint {
            // A job that goes on from an earlier step makes later checkpoints again.
            sqlx::query(
                "INSERT INTO checkpoints (id, job, created_at, step, model, metrics) VALUES (?, ?, ?, ?, ?, ?)
                 ON CONFLICT (job, step) DO UPDATE SET created_at = excluded.created_at, metrics = excluded.metrics",
            )
            .bind(ids::checkpoint())
            .bind(id)
            .bind(now())
            .bind(step as i64)
            .bind(model)
            .bind(metrics)
            .execute(&mut *tx)
            .await?;
        }
        let name = match &name {
            Some(name) => Some(names::write(&mut tx, name).await?),
            None => None,
        };
        if let Some(file) = &result_file {
            files::insert(&mut tx, file).await?;
        }
        tx.commit().await?;
        Ok(Some(Changed { name }))
    }

    /// Remember, across restarts, that a running job is to be cancelled.
    pub async fn request_cancel(&self, id: &str) -> Result<(), StoreError> {
        sqlx::query("UPDATE jobs SET cancel_requested = 1 WHERE id = ?")
            .bind(id)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    pub async fn job(&self, id: &str) -> Result<Option<JobRow>, StoreError> {
        Ok(sqlx::query_as("SELECT * FROM jobs WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.pool)
            .await?)
    }

    /// The oldest job for `base` in one of `statuses`.
    pub async fn next_job(&self, base: Digest, statuses: &[&str]) -> Result<Option<JobRow>, StoreError> {
        let sql = "SELECT * FROM jobs WHERE status IN (SELECT value FROM json_each(?)) AND base = ?
                   ORDER BY seq LIMIT 1";
        let query = sqlx::query_as(sql)
            .bind(as_json(&statuses))
            .bind(base.to_string());
        Ok(query.fetch_optional(&self.pool).await?)
    }

    /// Jobs that have not ended and wait for another base than `base`.
    pub async fn count_stranded_jobs(&self, base: Digest) -> Result<u64, StoreError> {
        let sql = "SELECT count(*) FROM jobs WHERE finished_at IS NULL AND base <> ?";
        Ok(sqlx::query_scalar(sql)
            .bind(base.to_string())
            .fetch_one(&self.pool)
            .await?)
    }

    /// Newest first, those made before the job `after`.
    pub async fn jobs(
        &self,
        after: Option<&str>,
        limit: u32,
        metadata: &MetadataFilter,
    ) -> Result<Rows<JobRow>, StoreError> {
        let pairs = match metadata {
            MetadataFilter::Any | MetadataFilter::None => BTreeMap::new(),
            MetadataFilter::Pairs(pairs) => pairs.clone(),
        };
        let sql = "SELECT * FROM jobs
                   WHERE (?1 IS NULL OR seq < (SELECT seq FROM jobs WHERE id = ?1)) AND (NOT ?2 OR metadata = '{}')
                   AND NOT EXISTS (SELECT 1 FROM json_each(?3) AS asked WHERE NOT EXISTS (
                       SELECT 1 FROM json_each(jobs.metadata) AS had
                       WHERE had.key = asked.key AND had.value = asked.value))
                   ORDER BY seq DESC LIMIT ?4";
        let query = sqlx::query_as(sql)
            .bind(after)
            .bind(*metadata == MetadataFilter::None)
            .bind(as_json(&pairs))
            .bind(i64::from(limit) + 1);
        Ok(Rows::cut(query.fetch_all(&self.pool).await?, limit))
    }

    /// Newest first, those before the event `after`.
    pub async fn job_events(
        &self,
        job: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Rows<EventRow>, StoreError> {
        let sql = "SELECT seq, id, created_at, level, message, data FROM job_events
                   WHERE job = ?1 AND (?2 IS NULL OR seq < (SELECT seq FROM job_events WHERE id = ?2))
                   ORDER BY seq DESC LIMIT ?3";
        let query = sqlx::query_as(sql)
            .bind(job)
            .bind(after)
            .bind(i64::from(limit) + 1);
        Ok(Rows::cut(query.fetch_all(&self.pool).await?, limit))
    }

    /// Oldest first, those after the event numbered `seq` (0: from the first).
    pub async fn job_events_since(
        &self,
        job: &str,
        seq: i64,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let sql = "SELECT seq, id, created_at, level, message, data FROM job_events
                   WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?";
        Ok(sqlx::query_as(sql)
            .bind(job)
            .bind(seq)
            .bind(limit)
            .fetch_all(&self.pool)
            .await?)
    }

    /// Newest first, those before the checkpoint `after`.
    pub async fn checkpoints(
        &self,
        job: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Rows<CheckpointRow>, StoreError> {
        let sql = "SELECT id, created_at, step, model, metrics FROM checkpoints
                   WHERE job = ?1 AND (?2 IS NULL OR step < (SELECT step FROM checkpoints WHERE id = ?2))
                   ORDER BY step DESC LIMIT ?3";
        let query = sqlx::query_as(sql)
            .bind(job)
            .bind(after)
            .bind(i64::from(limit) + 1);
        Ok(Rows::cut(query.fetch_all(&self.pool).await?, limit))
    }

    /// Where datasets and state of a job lie.
    pub fn job_folder(&self, id: &str) -> PathBuf {
        self.folders.job(id)
    }

    /// An ended job needs its folder no more.
    pub async fn remove_job_folder(&self, id: &str) -> Result<(), StoreError> {
        let path = self.folders.job(id);
        blocking(move || artifacts::remove(&path)).await
    }
}

/// A change that happened.
#[derive(Debug)]
pub struct Changed {
    pub name: Option<NameRow>,
}

async fn insert_events(
    tx: &mut Transaction<'static, Sqlite>,
    job: &str,
    events: &[NewEvent],
) -> Result<(), StoreError> {
    for NewEvent { level, message, data } in events {
        let sql =
            "INSERT INTO job_events (id, job, created_at, level, message, data) VALUES (?, ?, ?, ?, ?, ?)";
        let query = sqlx::query(sql)
            .bind(ids::event())
            .bind(job)
            .bind(now())
            .bind(level)
            .bind(message)
            .bind(data);
        query.execute(&mut **tx).await?;
    }
    Ok(())
}

fn as_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("strings, and lists and maps of them, are JSON")
}
