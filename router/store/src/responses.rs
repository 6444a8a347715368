//! Responses that clients may name later: texts of JSON that nobody here reads. What a tenant keeps has a limit in bytes,
//! beyond which its oldest go, and an age. Not here: what is in them.

use sqlx::FromRow;

use crate::jobs::signed;
use crate::{Store, StoreError, now};

/// Of one conversation, in responses: whoever goes on longer sends the messages itself.
const MAX_DEPTH: i64 = 10_000;

#[derive(Clone, Debug, PartialEq, FromRow)]
pub struct ResponseRow {
    pub id: String,
    pub tenant: String,
    pub created_at: i64,
    /// The one that it goes on with.
    pub previous: Option<String>,
    /// Its items.
    pub input: String,
    /// As it was answered.
    pub response: String,
}

impl ResponseRow {
    fn bytes(&self) -> u64 {
        (self.input.len() + self.response.len()) as u64
    }
}

/// What is kept of responses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Of each tenant.
    pub bytes: u64,
    pub age_s: u64,
}

impl Keep {
    /// What was made before is gone.
    fn since(self) -> i64 {
        now().saturating_sub_unsigned(self.age_s)
    }
}

impl Store {
    /// Whether it is kept: one that is larger than all that may be is not.
    pub async fn keep_response(&self, row: &ResponseRow, keep: Keep) -> Result<bool, StoreError> {
        if row.bytes() > keep.bytes {
            return Ok(false);
        }
        let written = self.write_response(row, keep).await;
        written.inspect_err(|error| self.note(error)).map(|()| true)
    }

    async fn write_response(&self, row: &ResponseRow, keep: Keep) -> Result<(), StoreError> {
        self.check_room()?;
        let ResponseRow {
            id,
            tenant,
            created_at,
            previous,
            input,
            response,
        } = row;
        let mut tx = self.db.begin().await?;
        sqlx::query(
            "INSERT INTO responses (id, tenant, created_at, bytes, previous, input, response)
             VALUES ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(id)
        .bind(tenant)
        .bind(*created_at)
        .bind(signed(row.bytes()))
        .bind(previous)
        .bind(input)
        .bind(response)
        .execute(&mut *tx)
        .await?;
        let used: i64 =
            sqlx::query_scalar("SELECT CAST(SUM(bytes) AS BIGINT) FROM responses WHERE tenant = $1")
                .bind(tenant)
                .fetch_one(&mut *tx)
                .await?;
        if used > signed(keep.bytes) {
            sqlx::query(
                "DELETE FROM responses WHERE seq IN (SELECT seq FROM (SELECT seq, SUM(bytes) OVER (ORDER BY seq DESC) AS used
                 FROM responses WHERE tenant = $1) AS from_the_newest WHERE used > $2)",
            )
            .bind(tenant)
            .bind(signed(keep.bytes))
            .execute(&mut *tx)
            .await?;
        }
        Ok(tx.commit().await?)
    }

    pub async fn response(&self, id: &str, keep: Keep) -> Result<Option<ResponseRow>, StoreError> {
        if id.contains('\0') {
            // Postgres would not take it for a text.
            return Ok(None);
        }
        let sql = "SELECT id, tenant, created_at, previous, input, response FROM responses
                   WHERE id = $1 AND created_at >= $2";
        Ok(sqlx::query_as(sql)
            .bind(id)
            .bind(keep.since())
            .fetch_optional(self.db.pool()?)
            .await?)
    }

    /// The response and those that it goes on with, the oldest first, of `bytes` together at most. Where the first of them
    /// goes on with another, that one is gone, or too much.
    pub async fn conversation(
        &self,
        id: &str,
        bytes: u64,
        keep: Keep,
    ) -> Result<Vec<ResponseRow>, StoreError> {
        if id.contains('\0') {
            return Ok(Vec::new());
        }
        let sql = "WITH RECURSIVE chain (id, previous, used, depth) AS (
                       SELECT id, previous, bytes, 0 FROM responses WHERE id = $1 AND created_at >= $2
                       UNION ALL
                       SELECT r.id, r.previous, chain.used + r.bytes, chain.depth + 1 FROM chain
                       JOIN responses AS r ON r.id = chain.previous
                       WHERE r.created_at >= $2 AND chain.used + r.bytes <= $3 AND chain.depth < $4)
                   SELECT r.id, r.tenant, r.created_at, r.previous, r.input, r.response FROM chain
                   JOIN responses AS r ON r.id = chain.id ORDER BY chain.depth DESC";
        Ok(sqlx::query_as(sql)
            .bind(id)
            .bind(keep.since())
            .bind(signed(bytes))
            .bind(MAX_DEPTH)
            .fetch_all(self.db.pool()?)
            .await?)
    }

    /// Whether there was one.
    pub async fn delete_response(&self, id: &str) -> Result<bool, StoreError> {
        self.on_reserve(async || {
            let deleted = sqlx::query("DELETE FROM responses WHERE id = $1")
                .bind(id)
                .execute(self.db.pool()?)
                .await?;
            Ok(deleted.rows_affected() > 0)
        })
        .await
    }

    /// Those that are too old. Returns how many.
    pub async fn delete_expired_responses(&self, keep: Keep) -> Result<u64, StoreError> {
        let deleted = sqlx::query("DELETE FROM responses WHERE created_at < $1")
            .bind(keep.since())
            .execute(self.db.pool()?)
            .await?;
        Ok(deleted.rows_affected())
    }
}
