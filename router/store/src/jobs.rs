//! Jobs, their events and checkpoints. A job changes only by [`Store::change_job`]: one transaction for its state, what
//! it says and what it makes. Requests, numbers and errors are JSON of the caller's; the status names are the caller's.
//! Who may work on a job: `lease`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sqlx::any::AnyRow;
use sqlx::{Any, FromRow, Row, Transaction};
use tandem_core::id::Digest;
use tandem_core::job::Saved;

use crate::changes::{self, Kind};
use crate::db::Dialect;
use crate::files::{self, FileRow};
use crate::lease::Lease;
use crate::names::{self, NameRow, NewName};
use crate::quota;
use crate::{Rows, Store, StoreError, Tenant, ids, now, storage, unsigned};

/// By name: a newer program may have added others meanwhile.
macro_rules! columns {
    () => {
        "seq, id, created_at, updated_at, finished_at, estimated_finish, status, cancel_requested, request, hyper, \
         model_name, fine_tuned_model, trained_tokens, result_files, error, state_epoch, state_step, tenant, parent, trials, \
         key_id, deaths"
    };
}
pub(crate) use columns;

/// A job to insert.
pub struct NewJob {
    /// From [`ids::job`].
    pub id: String,
    pub base: Digest,
    pub tenant: Tenant,
    /// The key that makes it, where what it trains or stores is limited.
    pub key_id: Option<String>,
    /// What it may store beside its datasets while it trains: it has so much room from now on, or it is not taken.
    pub kept_bytes: u64,
    pub status: String,
    pub request: String,
    pub metadata: BTreeMap<String, String>,
    /// The first that no other job has becomes the job's. Of a trial: what stands behind its sweep's.
    pub model_names: Vec<String>,
    pub events: Vec<NewEvent>,
}

/// What somebody asked of a job that has not ended, and whoever works on it is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Asked {
    #[default]
    Nothing,
    /// Final: nothing else is asked after it.
    Cancel,
    Pause,
}

impl Asked {
    fn code(self) -> i64 {
        match self {
            Asked::Nothing => 0,
            Asked::Cancel => 1,
            Asked::Pause => 2,
        }
    }

    /// Of the column `cancel_requested`.
    pub(crate) fn of_code(code: i64) -> Asked {
        match code {
            0 => Asked::Nothing,
            2 => Asked::Pause,
            _ => Asked::Cancel,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct JobRow {
    pub seq: i64,
    pub id: String,
    pub tenant: String,
    /// The key that made it, where what it trains or stores is limited.
    pub key_id: Option<String>,
    pub created_at: i64,
    pub updated_at: i64,
    pub finished_at: Option<i64>,
    pub estimated_finish: Option<i64>,
    pub status: String,
    pub asked: Asked,
    pub request: String,
    pub hyper: Option<String>,
    pub model_name: String,
    pub fine_tuned_model: Option<String>,
    pub trained_tokens: Option<u64>,
    /// JSON list of file ids.
    pub result_files: String,
    pub error: Option<String>,
    /// The last state that was kept.
    pub saved: Option<Saved>,
    /// The sweep whose trial it is.
    pub parent: Option<String>,
    /// Of a sweep: what became of its trials, JSON of the caller's.
    pub trials: Option<String>,
    /// How often in a row whoever worked on it went without a word before it was further than ever before.
    pub deaths: u64,
}

impl<'r> FromRow<'r, AnyRow> for JobRow {
    fn from_row(row: &'r AnyRow) -> Result<JobRow, sqlx::Error> {
        let state_epoch: Option<i64> = row.try_get("state_epoch")?;
        let state_step: Option<i64> = row.try_get("state_step")?;
        let trained_tokens: Option<i64> = row.try_get("trained_tokens")?;
        Ok(JobRow {
            seq: row.try_get("seq")?,
            id: row.try_get("id")?,
            tenant: row.try_get("tenant")?,
            key_id: row.try_get("key_id")?,
            created_at: row.try_get("created_at")?,
            updated_at: row.try_get("updated_at")?,
            finished_at: row.try_get("finished_at")?,
            estimated_finish: row.try_get("estimated_finish")?,
            status: row.try_get("status")?,
            asked: Asked::of_code(row.try_get("cancel_requested")?),
            request: row.try_get("request")?,
            hyper: row.try_get("hyper")?,
            model_name: row.try_get("model_name")?,
            fine_tuned_model: row.try_get("fine_tuned_model")?,
            trained_tokens: trained_tokens.map(unsigned),
            result_files: row.try_get("result_files")?,
            error: row.try_get("error")?,
            saved: state_epoch.zip(state_step).map(|(epoch, step)| Saved {
                epoch: unsigned(epoch),
                step: unsigned(step),
            }),
            parent: row.try_get("parent")?,
            trials: row.try_get("trials")?,
            deaths: row.try_get("deaths").map(unsigned)?,
        })
    }
}

/// What happens to a job at once. `None` leaves what is there.
#[derive(Default)]
pub struct JobChange {
    /// The change happens only if the job is in one of these.
    pub from: &'static [&'static str],
    /// The change is the holder's: it happens only while this lease is the job's.
    pub holder: Option<Lease>,
    /// The change happens only while this is asked of the job.
    pub asked: Option<Asked>,
    /// The holder lets go: others may claim the job, and nobody knows when it ends. An end does so by itself.
    pub lets_go: bool,
    pub status: Option<&'static str>,
    /// The new status is an end.
    pub ends: bool,
    pub hyper: Option<String>,
    pub trained_tokens: Option<u64>,
    /// As of [`NewJob`]: what it is, once that is known.
    pub kept_bytes: Option<u64>,
    pub estimated_finish: Option<i64>,
    pub fine_tuned_model: Option<String>,
    pub error: Option<String>,
    pub trials: Option<String>,
    pub events: Vec<NewEvent>,
    pub checkpoint: Option<NewCheckpoint>,
    /// Checkpoints that go, by their models' names.
    pub drops: Vec<String>,
    /// From [`crate::Artifacts::push_job`].
    pub saved: Option<Saved>,
    pub name: Option<NewName>,
    /// From [`Store::publish_result`].
    pub result_files: Vec<FileRow>,
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
    #[sqlx(try_from = "i64")]
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
        self.insert_sweep(job, vec![], None).await
    }

    /// A job with its trials: all of them or none.
    /// `records`: what is known of the trials before anybody looked after them.
    pub async fn insert_sweep(
        &self,
        job: NewJob,
        trials: Vec<NewJob>,
        records: Option<String>,
    ) -> Result<JobRow, StoreError> {
        let mut tx = self.db.begin().await?;
        if let Some(key) = &job.key_id
            && let Some((tenant, limit)) = storage::limit_of(&mut *tx, key).await?
        {
            let kept = trials.iter().map(|trial| trial.kept_bytes);
            let wanted = kept.fold(job.kept_bytes, u64::saturating_add);
            self.check_stored(&mut tx, &tenant, Some(limit), wanted).await?;
        }
        let name = insert(&mut tx, &job, None).await?;
        for trial in &trials {
            let sweep = Sweep {
                id: &job.id,
                name: &name,
            };
            insert(&mut tx, trial, Some(sweep)).await?;
        }
        if let Some(records) = records {
            sqlx::query("UPDATE jobs SET trials = $1 WHERE id = $2")
                .bind(records)
                .bind(&job.id)
                .execute(&mut *tx)
                .await?;
        }
        let row = sqlx::query_as(concat!("SELECT ", columns!(), " FROM jobs WHERE id = $1"))
            .bind(&job.id)
            .fetch_one(&mut *tx)
            .await?;
        changes::note(&mut tx, Kind::Jobs).await?;
        tx.commit().await?;
        Ok(row)
    }

    /// In their order.
    pub async fn trials(&self, sweep: &str) -> Result<Vec<JobRow>, StoreError> {
        let sql = concat!("SELECT ", columns!(), " FROM jobs WHERE parent = $1 ORDER BY seq");
        Ok(sqlx::query_as(sql).bind(sweep).fetch_all(self.db.pool()?).await?)
    }

    /// All of `change`, or nothing and `None` when the job is not in one of `change.from` or not its holder's any more.
    /// The name, if there is one in the change, comes back as written.
    pub async fn change_job(&self, id: &str, change: JobChange) -> Result<Option<Changed>, StoreError> {
        self.on_reserve(|| self.change_job_now(id, &change)).await
    }

    async fn change_job_now(&self, id: &str, change: &JobChange) -> Result<Option<Changed>, StoreError> {
        let JobChange {
            from,
            holder,
            asked,
            lets_go,
            status,
            ends,
            hyper,
            trained_tokens,
            kept_bytes,
            estimated_finish,
            fine_tuned_model,
            error,
            trials,
            events,
            checkpoint,
            drops,
            saved,
            name,
            result_files,
        } = change;
        let (status, ends, lets_go, saved, holder) = (*status, *ends, *lets_go, *saved, *holder);
        let mut tx = self.db.begin().await?;
        let [from_1, from_2, from_3] = three(from);
        let trained = match trained_tokens {
            Some(tokens) => quota::newly_trained(&mut tx, id, *tokens).await?,
            None => None,
        };
        let changed = sqlx::query(
            "UPDATE jobs SET updated_at = $1, status = coalesce($2, status),
             finished_at = CASE WHEN $3 THEN $1 ELSE finished_at END,
             estimated_finish = CASE WHEN $9 THEN NULL ELSE coalesce($4, estimated_finish) END,
             hyper = coalesce($5, hyper), trained_tokens = coalesce($6, trained_tokens),
             fine_tuned_model = coalesce($7, fine_tuned_model), error = coalesce($8, error),
             lease_until = CASE WHEN $9 THEN NULL ELSE lease_until END,
             state_epoch = coalesce($10, state_epoch), state_step = coalesce($11, state_step),
             trials = coalesce($18, trials), kept_bytes = coalesce($19, kept_bytes),
             deaths = CASE WHEN $6 > most_trained THEN 0 ELSE deaths END,
             most_trained = CASE WHEN $6 > most_trained THEN $6 ELSE most_trained END
             WHERE id = $12 AND status IN ($13, $14, $15) AND ($16 IS NULL OR lease_epoch = $16)
             AND ($17 IS NULL OR cancel_requested = $17)",
        )
        .bind(now())
        .bind(status)
        .bind(ends)
        .bind(*estimated_finish)
        .bind(hyper.as_deref())
        .bind(trained_tokens.map(signed))
        .bind(fine_tuned_model.as_deref())
        .bind(error.as_deref())
        .bind(ends || lets_go)
        .bind(saved.map(|saved| signed(saved.epoch)))
        .bind(saved.map(|saved| signed(saved.step)))
        .bind(id)
        .bind(from_1)
        .bind(from_2)
        .bind(from_3)
        .bind(holder.map(|lease| signed(lease.epoch())))
        .bind(asked.map(Asked::code))
        .bind(trials.as_deref())
        .bind(kept_bytes.map(signed))
        .execute(&mut *tx)
        .await?;
        if changed.rows_affected() == 0 {
            return Ok(None);
        }
        if let Some((key, tokens)) = trained {
            quota::add(&mut tx, &key, tokens).await?;
        }
        // What a job makes is its tenant's.
        let tenant: String = sqlx::query_scalar("SELECT tenant FROM jobs WHERE id = $1")
            .bind(id)
            .fetch_one(&mut *tx)
            .await?;
        insert_events(&mut tx, id, events).await?;
        if let Some(NewCheckpoint { step, model, metrics }) = checkpoint {
            // A job that goes on from an earlier step makes later checkpoints again.
            sqlx::query(
                "INSERT INTO checkpoints (id, job, created_at, step, model, metrics) VALUES ($1, $2, $3, $4, $5, $6)
                 ON CONFLICT (job, step) DO UPDATE SET created_at = excluded.created_at, metrics = excluded.metrics",
            )
            .bind(ids::checkpoint())
            .bind(id)
            .bind(now())
            .bind(signed(*step))
            .bind(model)
            .bind(metrics)
            .execute(&mut *tx)
            .await?;
        }
        for file in result_files {
            let file = FileRow {
                tenant: tenant.clone(),
                ..file.clone()
            };
            files::insert(&mut tx, &file).await?;
            // The row is this transaction's since the update above.
            let sql = "SELECT result_files FROM jobs WHERE id = $1";
            let list: String = sqlx::query_scalar(sql).bind(id).fetch_one(&mut *tx).await?;
            let mut list: Vec<String> = serde_json::from_str(&list)
                .map_err(|error| StoreError::Damaged(format!("result files of {id}: {error}")))?;
            list.push(file.id.clone());
            sqlx::query("UPDATE jobs SET result_files = $1 WHERE id = $2")
                .bind(as_json(&list))
                .bind(id)
                .execute(&mut *tx)
                .await?;
        }
        changes::note(&mut tx, Kind::Jobs).await?;
        if name.is_some() || !drops.is_empty() {
            changes::note(&mut tx, Kind::Names).await?;
        }
        let mut dropped = vec![];
        for model in drops {
            sqlx::query("DELETE FROM checkpoints WHERE job = $1 AND model = $2")
                .bind(id)
                .bind(model)
                .execute(&mut *tx)
                .await?;
            if names::remove_of_job(&mut tx, model, id).await? {
                dropped.push(model.clone());
            }
        }
        let name = match name {
            Some(name) => Some(names::write(&mut tx, name, &tenant).await?),
            None => None,
        };
        tx.commit().await?;
        Ok(Some(Changed { name, dropped }))
    }

    /// Remember, across restarts, what is to become of a job. Who asked for its end asks for nothing else any more.
    pub async fn ask(&self, id: &str, asked: Asked) -> Result<(), StoreError> {
        self.on_reserve(|| self.ask_now(id, asked)).await
    }

    async fn ask_now(&self, id: &str, asked: Asked) -> Result<(), StoreError> {
        let mut tx = self.db.begin().await?;
        // Who lets it go on knows what it did.
        let sql = "UPDATE jobs SET cancel_requested = $1, deaths = CASE WHEN $1 = $4 THEN 0 ELSE deaths END
                   WHERE id = $2 AND cancel_requested <> $3";
        sqlx::query(sql)
            .bind(asked.code())
            .bind(id)
            .bind(Asked::Cancel.code())
            .bind(Asked::Nothing.code())
            .execute(&mut *tx)
            .await?;
        changes::note(&mut tx, Kind::Jobs).await?;
        Ok(tx.commit().await?)
    }

    pub async fn job(&self, id: &str) -> Result<Option<JobRow>, StoreError> {
        let sql = concat!("SELECT ", columns!(), " FROM jobs WHERE id = $1");
        Ok(sqlx::query_as(sql)
            .bind(id)
            .fetch_optional(self.db.pool()?)
            .await?)
    }

    /// Jobs that have not ended and wait for another base than `base`.
    pub async fn count_stranded_jobs(&self, base: Digest) -> Result<u64, StoreError> {
        let sql = "SELECT count(*) FROM jobs WHERE finished_at IS NULL AND base <> $1";
        let count: i64 = sqlx::query_scalar(sql)
            .bind(base.to_string())
            .fetch_one(self.db.pool()?)
            .await?;
        Ok(unsigned(count))
    }

    /// Newest first, those made before the job `after`; of one tenant, or of all. Trials are their sweep's.
    pub async fn jobs(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&str>,
        limit: u32,
        metadata: &MetadataFilter,
    ) -> Result<Rows<JobRow>, StoreError> {
        let mut sql = concat!(
            "SELECT ",
            columns!(),
            " FROM jobs WHERE ($1 IS NULL OR seq < (SELECT seq FROM jobs WHERE id = $1)) AND ($3 IS NULL OR tenant = $3)
             AND parent IS NULL"
        )
        .to_owned();
        let mut pairs = vec![];
        match metadata {
            MetadataFilter::Any => {}
            MetadataFilter::None => sql.push_str(" AND metadata = '{}'"),
            MetadataFilter::Pairs(asked) => {
                for (i, pair) in asked.iter().enumerate() {
                    let (key, value) = (4 + 2 * i, 5 + 2 * i);
                    sql.push_str(&match self.db.dialect {
                        Dialect::Sqlite => format!(
                            " AND EXISTS (SELECT 1 FROM json_each(jobs.metadata) AS had
                             WHERE had.key = ${key} AND had.value = ${value})"
                        ),
                        Dialect::Postgres => format!(" AND CAST(metadata AS jsonb) ->> ${key} = ${value}"),
                    });
                    pairs.push(pair);
                }
            }
        }
        sql.push_str(" ORDER BY seq DESC LIMIT $2");
        // Safe: only numbers were put into the text.
        let mut query = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(after)
            .bind(i64::from(limit) + 1)
            .bind(tenant.map(Tenant::as_str));
        for (key, value) in pairs {
            query = query.bind(key).bind(value);
        }
        Ok(Rows::cut(query.fetch_all(self.db.pool()?).await?, limit))
    }

    /// Newest first, those before the event `after`.
    pub async fn job_events(
        &self,
        job: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Rows<EventRow>, StoreError> {
        let sql = "SELECT seq, id, created_at, level, message, data FROM job_events
                   WHERE job = $1 AND ($2 IS NULL OR seq < (SELECT seq FROM job_events WHERE id = $2))
                   ORDER BY seq DESC LIMIT $3";
        let query = sqlx::query_as(sql)
            .bind(job)
            .bind(after)
            .bind(i64::from(limit) + 1);
        Ok(Rows::cut(query.fetch_all(self.db.pool()?).await?, limit))
    }

    /// Oldest first, those after the event numbered `seq` (0: from the first).
    pub async fn job_events_since(
        &self,
        job: &str,
        seq: i64,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let sql = "SELECT seq, id, created_at, level, message, data FROM job_events
                   WHERE job = $1 AND seq > $2 ORDER BY seq LIMIT $3";
        Ok(sqlx::query_as(sql)
            .bind(job)
            .bind(seq)
            .bind(i64::from(limit))
            .fetch_all(self.db.pool()?)
            .await?)
    }

    /// In no order.
    pub async fn all_checkpoints(&self, job: &str) -> Result<Vec<CheckpointRow>, StoreError> {
        let sql = "SELECT id, created_at, step, model, metrics FROM checkpoints WHERE job = $1";
        Ok(sqlx::query_as(sql).bind(job).fetch_all(self.db.pool()?).await?)
    }

    /// Those of the latest steps first, from behind the checkpoint `after`; of a sweep those of its trials.
    pub async fn checkpoints(
        &self,
        job: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Rows<CheckpointRow>, StoreError> {
        let sql = "SELECT id, created_at, step, model, metrics FROM checkpoints
                   WHERE job IN (SELECT jobs.id FROM jobs WHERE jobs.id = $1 OR jobs.parent = $1)
                   AND ($2 IS NULL OR (step, id) < (SELECT step, id FROM checkpoints WHERE id = $2))
                   ORDER BY step DESC, id DESC LIMIT $3";
        let query = sqlx::query_as(sql)
            .bind(job)
            .bind(after)
            .bind(i64::from(limit) + 1);
        Ok(Rows::cut(query.fetch_all(self.db.pool()?).await?, limit))
    }

    /// Where the datasets of a job are written, before [`Store::publish_datasets`].
    pub fn job_folder(&self, id: &str) -> PathBuf {
        self.artifacts.job_folder(id)
    }

    /// Whoever runs the job may be elsewhere. `bytes`: of the datasets.
    pub async fn publish_datasets(&self, id: &str, bytes: u64) -> Result<(), StoreError> {
        sqlx::query("UPDATE jobs SET data_bytes = $1 WHERE id = $2")
            .bind(signed(bytes))
            .bind(id)
            .execute(self.db.pool()?)
            .await?;
        self.artifacts.push_datasets(id).await
    }

    /// An ended job needs its datasets and states no more.
    pub async fn remove_job_folder(&self, id: &str) -> Result<(), StoreError> {
        self.artifacts.remove_job(id).await
    }
}

/// A change that happened.
#[derive(Debug)]
pub struct Changed {
    pub name: Option<NameRow>,
    /// Names that are gone.
    pub dropped: Vec<String>,
}

/// Of whom a job is a trial.
struct Sweep<'a> {
    id: &'a str,
    name: &'a str,
}

/// The name that its model will have.
async fn insert(
    tx: &mut Transaction<'static, Any>,
    job: &NewJob,
    sweep: Option<Sweep<'_>>,
) -> Result<String, StoreError> {
    let NewJob {
        id,
        base,
        tenant,
        key_id,
        kept_bytes,
        status,
        request,
        metadata,
        model_names,
        events,
    } = job;
    for name in model_names {
        let name = match &sweep {
            Some(sweep) => format!("{}{name}", sweep.name),
            None => name.clone(),
        };
        let inserted = sqlx::query(
            "INSERT INTO jobs (id, base, created_at, updated_at, status, request, metadata, model_name, tenant, parent,
             key_id, kept_bytes) VALUES ($1, $2, $3, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT (model_name) DO NOTHING",
        )
        .bind(id)
        .bind(base.to_string())
        .bind(now())
        .bind(status)
        .bind(request)
        .bind(as_json(metadata))
        .bind(&name)
        .bind(tenant.as_str())
        .bind(sweep.as_ref().map(|sweep| sweep.id))
        .bind(key_id.as_deref())
        .bind(signed(*kept_bytes))
        .execute(&mut **tx)
        .await?;
        if inserted.rows_affected() > 0 {
            insert_events(tx, id, events).await?;
            return Ok(name);
        }
    }
    Err(StoreError::Damaged(format!("every model name for {id} is taken")))
}

async fn insert_events(
    tx: &mut Transaction<'static, Any>,
    job: &str,
    events: &[NewEvent],
) -> Result<(), StoreError> {
    for NewEvent { level, message, data } in events {
        let sql = "INSERT INTO job_events (id, job, created_at, level, message, data) VALUES ($1, $2, $3, $4, $5, $6)";
        let query = sqlx::query(sql)
            .bind(ids::event())
            .bind(job)
            .bind(now())
            .bind(*level)
            .bind(message)
            .bind(data);
        query.execute(&mut **tx).await?;
    }
    Ok(())
}

fn as_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("strings, and lists and maps of them, are JSON")
}

/// One to three statuses for `IN (.., .., ..)`.
pub(crate) fn three<'a>(statuses: &[&'a str]) -> [&'a str; 3] {
    let at = |i: usize| statuses[i.min(statuses.len() - 1)];
    [at(0), at(1), at(2)]
}

/// Databases have no unsigned numbers; ours are far from the border.
pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
