//! Who may work on a job or a batch. A holder claims it for a while, renews that, and lets go; when it dies, its time runs out and
//! another claims the job. Each claim has a higher number (the epoch), and every write of a holder names its own: a
//! holder that slept through its time writes nothing. Times are the database's clock's. Not here: what is done with a job.

use std::time::Duration;

use tandem_core::id::Digest;

use crate::db::Dialect;
use crate::jobs::{Asked, JobRow, columns, signed, three};
use crate::{Store, StoreError, unsigned};

/// How long a holder that died keeps others waiting.
pub const LEASE: Duration = Duration::from_secs(15);
/// A holder renews this often within its time: two failures in a row cost nothing.
const RENEWALS_PER_LEASE: u32 = 3;

/// The right to write to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    epoch: u64,
}

impl Lease {
    pub(crate) fn of(epoch: i64) -> Lease {
        Lease {
            epoch: unsigned(epoch),
        }
    }

    /// Which claim of the job this is, from 1; also the number of the job's life.
    pub fn epoch(self) -> u64 {
        self.epoch
    }
}

/// What a renewal finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    Held {
        asked: Asked,
    },
    /// Another claimed it meanwhile, or it has ended.
    Lost,
}

impl Store {
    /// Claim a job for `base` in one of `statuses` (at most three) that nobody holds, or that this process
    /// holds from an earlier try; but none of `except`, on which it works. The oldest of the tenant of whose jobs the fewest are held.
    pub async fn claim_job(
        &self,
        base: Digest,
        statuses: &[&str],
        except: &[String],
    ) -> Result<Option<(JobRow, Lease)>, StoreError> {
        let others: String = (0..except.len())
            .map(|i| format!(" AND id <> ${}", 7 + i))
            .collect();
        let lock = match self.db.dialect {
            Dialect::Sqlite => "",
            // Routers that claim at the same moment take different jobs.
            Dialect::Postgres => " FOR UPDATE OF jobs SKIP LOCKED",
        };
        let candidate = format!(
            "WITH held AS (SELECT tenant AS of_tenant, count(*) AS jobs_held FROM jobs
                 WHERE base = $1 AND finished_at IS NULL AND lease_until > $5 AND status <> 'sweeping' GROUP BY tenant)
             SELECT id FROM jobs LEFT JOIN held ON of_tenant = tenant WHERE base = $1 AND status IN ($2, $3, $4)
             AND (lease_until IS NULL OR lease_until <= $5 OR lease_owner = $6){others}
             ORDER BY coalesce(jobs_held, 0), seq LIMIT 1{lock}"
        );
        let [status_1, status_2, status_3] = three(statuses);
        let mut tx = self.db.begin().await?;
        let now_ms = self.db.clock_ms(&mut tx).await?;
        // Safe: only numbers were put into the text.
        let mut query = sqlx::query_scalar(sqlx::AssertSqlSafe(candidate))
            .bind(base.to_string())
            .bind(status_1)
            .bind(status_2)
            .bind(status_3)
            .bind(now_ms)
            .bind(&self.owner);
        for id in except {
            query = query.bind(id);
        }
        let id: Option<String> = query.fetch_optional(&mut *tx).await?;
        let Some(id) = id else { return Ok(None) };
        // Whoever lets go of it says so.
        let sql = "UPDATE jobs SET deaths = CASE WHEN lease_until IS NOT NULL AND lease_owner <> $1 THEN deaths + 1 ELSE deaths END,
                   lease_owner = $1, lease_until = $2, lease_epoch = lease_epoch + 1 WHERE id = $3";
        sqlx::query(sql)
            .bind(&self.owner)
            .bind(self.until(now_ms))
            .bind(&id)
            .execute(&mut *tx)
            .await?;
        let epoch: i64 = sqlx::query_scalar("SELECT lease_epoch FROM jobs WHERE id = $1")
            .bind(&id)
            .fetch_one(&mut *tx)
            .await?;
        let row = sqlx::query_as(concat!("SELECT ", columns!(), " FROM jobs WHERE id = $1"))
            .bind(&id)
            .fetch_one(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Some((row, Lease::of(epoch))))
    }

    /// Of each tenant with jobs for `base` that wait or are trained: how many wait, and how many are trained.
    pub async fn jobs_of_tenants(&self, base: Digest) -> Result<Vec<(String, u64, u64)>, StoreError> {
        let sql = "SELECT tenant, sum(CASE WHEN status = 'queued' THEN 1 ELSE 0 END), sum(CASE WHEN status = 'running' THEN 1 ELSE 0 END)
                   FROM jobs WHERE base = $1 AND status IN ('queued', 'running') GROUP BY tenant ORDER BY tenant";
        let rows: Vec<(String, i64, i64)> = sqlx::query_as(sql)
            .bind(base.to_string())
            .fetch_all(self.db.pool()?)
            .await?;
        let counted = |(tenant, waiting, trained)| (tenant, unsigned(waiting), unsigned(trained));
        Ok(rows.into_iter().map(counted).collect())
    }

    /// Hold on to a job, unless it was let go. Also tells what somebody asked of it meanwhile.
    pub async fn renew_lease(&self, id: &str, lease: Lease) -> Result<Renewal, StoreError> {
        let renew = "UPDATE jobs SET lease_until = $1
                     WHERE id = $2 AND lease_epoch = $3 AND lease_until IS NOT NULL AND finished_at IS NULL";
        let asked = "SELECT cancel_requested FROM jobs WHERE id = $1";
        self.renew(renew, asked, id, lease).await
    }

    /// The same for a batch.
    pub async fn renew_batch(&self, id: &str, lease: Lease) -> Result<Renewal, StoreError> {
        let renew = "UPDATE batches SET lease_until = $1
                     WHERE id = $2 AND lease_epoch = $3 AND lease_until IS NOT NULL AND finished_at IS NULL";
        // The code of `Asked::Cancel`, or 0.
        let asked = "SELECT CAST(CASE WHEN cancelling_at IS NULL THEN 0 ELSE 1 END AS BIGINT) FROM batches WHERE id = $1";
        self.renew(renew, asked, id, lease).await
    }

    async fn renew(
        &self,
        renew: &'static str,
        asked: &'static str,
        id: &str,
        lease: Lease,
    ) -> Result<Renewal, StoreError> {
        let mut tx = self.db.begin().await?;
        let now_ms = self.db.clock_ms(&mut tx).await?;
        let renewed = sqlx::query(renew)
            .bind(self.until(now_ms))
            .bind(id)
            .bind(signed(lease.epoch))
            .execute(&mut *tx)
            .await?;
        if renewed.rows_affected() == 0 {
            return Ok(Renewal::Lost);
        }
        let asked: i64 = sqlx::query_scalar(asked).bind(id).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Ok(Renewal::Held {
            asked: Asked::of_code(asked),
        })
    }

    /// Let go of a job: another may claim it at once.
    pub async fn release_lease(&self, id: &str, lease: Lease) -> Result<(), StoreError> {
        let sql = "UPDATE jobs SET lease_until = NULL WHERE id = $1 AND lease_epoch = $2";
        self.release(sql, id, lease).await
    }

    pub async fn release_batch(&self, id: &str, lease: Lease) -> Result<(), StoreError> {
        let sql = "UPDATE batches SET lease_until = NULL WHERE id = $1 AND lease_epoch = $2";
        self.release(sql, id, lease).await
    }

    async fn release(&self, sql: &'static str, id: &str, lease: Lease) -> Result<(), StoreError> {
        sqlx::query(sql)
            .bind(id)
            .bind(signed(lease.epoch))
            .execute(self.db.pool()?)
            .await?;
        Ok(())
    }

    /// How long a lease lasts after it was claimed or renewed.
    pub fn lease_time(&self) -> Duration {
        self.lease_time
    }

    /// How often a holder renews.
    pub fn renewal_period(&self) -> Duration {
        self.lease_time / RENEWALS_PER_LEASE
    }

    /// Of a data folder whose lock is ours: whoever held something is dead.
    pub(crate) async fn clear_leases(&self) -> Result<(), StoreError> {
        for sql in [
            "UPDATE jobs SET lease_until = NULL, deaths = deaths + 1 WHERE lease_until IS NOT NULL",
            "UPDATE batches SET lease_until = NULL, deaths = deaths + 1 WHERE lease_until IS NOT NULL",
        ] {
            sqlx::query(sql).execute(self.db.pool()?).await?;
        }
        Ok(())
    }

    pub(crate) fn until(&self, now_ms: i64) -> i64 {
        now_ms.saturating_add(i64::try_from(self.lease_time.as_millis()).unwrap_or(i64::MAX))
    }
}
