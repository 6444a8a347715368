//! Counters of change: with a database that others write too, a reader looks at these every moment, and at the tables
//! when they moved. Noting a change also makes its writers take turns, in the order of [`Kind`].

use sqlx::{Any, Transaction};

use crate::{Store, StoreError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Jobs,
    Names,
    Keys,
}

/// How often jobs and names have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub jobs: i64,
    pub names: i64,
}

impl Store {
    pub async fn changes(&self) -> Result<Changes, StoreError> {
        let rows: Vec<(String, i64)> = sqlx::query_as("SELECT kind, n FROM changes")
            .fetch_all(self.db.pool()?)
            .await?;
        let count = |kind: &str| rows.iter().find(|row| row.0 == kind).map_or(0, |row| row.1);
        Ok(Changes {
            jobs: count("jobs"),
            names: count("names"),
        })
    }
}

/// In the transaction that makes the change. The row stays locked until it ends.
pub(crate) async fn note(tx: &mut Transaction<'static, Any>, kind: Kind) -> Result<(), StoreError> {
    let kind = match kind {
        Kind::Jobs => "jobs",
        Kind::Names => "names",
        Kind::Keys => "keys",
    };
    sqlx::query("UPDATE changes SET n = n + 1 WHERE kind = $1")
        .bind(kind)
        .execute(&mut **tx)
        .await?;
    Ok(())
}
