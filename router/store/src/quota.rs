//! What a key trained in a day (UTC), beside what it may: in the database, so that it holds for all routers of one and over
//! restarts. What trains tells as it goes: jobs with their steps, clients that train call by call with each call. Not here: what
//! happens when nothing is left (router).

use sqlx::{Any, Transaction};

use crate::jobs::signed;
use crate::{Store, StoreError, now, unsigned};

const DAY_S: i64 = 24 * 3600;

/// Of a key whose training is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Tokens in a day.
    pub limit: u64,
    /// Of this day.
    pub trained: u64,
    /// Until the next day.
    pub renews_after_s: u64,
}

impl Store {
    /// `None`: the key may train as much as it likes.
    pub async fn training_quota(&self, key: &str) -> Result<Option<Quota>, StoreError> {
        let now = now();
        let sql = "SELECT k.training_tokens_per_day, d.tokens FROM keys k LEFT JOIN training_days d ON d.key_id = k.id AND d.day = $2
                   WHERE k.id = $1";
        let found: Option<(Option<i64>, Option<i64>)> = sqlx::query_as(sql)
            .bind(key)
            .bind(now / DAY_S)
            .fetch_optional(self.db.pool()?)
            .await?;
        let quota = |limit, trained: Option<i64>| Quota {
            limit: unsigned(limit),
            trained: unsigned(trained.unwrap_or(0)),
            renews_after_s: (DAY_S - now % DAY_S).unsigned_abs(),
        };
        Ok(found.and_then(|(limit, trained)| Some(quota(limit?, trained))))
    }

    pub async fn add_trained(&self, key: &str, tokens: u64) -> Result<(), StoreError> {
        let mut tx = self.db.begin().await?;
        add(&mut tx, key, tokens).await?;
        Ok(tx.commit().await?)
    }
}

/// What a job's new count adds, and to whose day. A job that went back to an earlier state trains, and pays, again.
pub(crate) async fn newly_trained(
    tx: &mut Transaction<'static, Any>,
    job: &str,
    tokens: u64,
) -> Result<Option<(String, u64)>, StoreError> {
    let sql = "SELECT key_id, trained_tokens FROM jobs WHERE id = $1";
    let row: Option<(Option<String>, Option<i64>)> =
        sqlx::query_as(sql).bind(job).fetch_optional(&mut **tx).await?;
    Ok(row.and_then(|(key, before)| {
        let more = tokens.saturating_sub(unsigned(before.unwrap_or(0)));
        Some((key?, more)).filter(|_| more > 0)
    }))
}

pub(crate) async fn add(
    tx: &mut Transaction<'static, Any>,
    key: &str,
    tokens: u64,
) -> Result<(), StoreError> {
    let sql = "INSERT INTO training_days (key_id, day, tokens) VALUES ($1, $2, $3)
               ON CONFLICT (key_id, day) DO UPDATE SET tokens = training_days.tokens + excluded.tokens";
    sqlx::query(sql)
        .bind(key)
        .bind(now() / DAY_S)
        .bind(signed(tokens))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// A key that takes another's place goes on with its day.
pub(crate) async fn inherit(
    tx: &mut Transaction<'static, Any>,
    old: &str,
    new: &str,
) -> Result<(), StoreError> {
    let sql = "INSERT INTO training_days (key_id, day, tokens)
               SELECT $1, day, tokens FROM training_days WHERE key_id = $2 AND day = $3";
    sqlx::query(sql)
        .bind(new)
        .bind(old)
        .bind(now() / DAY_S)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
