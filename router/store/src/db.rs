//! Opening the database and bringing its tables up to date. Two databases speak one set of queries (`$1` placeholders;
//! text and 64-bit integers only); where their words differ, it is said here. Not here: the queries.

use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use sqlx::any::AnyPoolOptions;
use sqlx::{Any, AnyPool, Executor, Transaction};

use crate::error::StoreError;

/// In order, forward only: the n-th brings version n - 1 to version n.
const SQLITE: &[&str] = &[
    include_str!("../migrations/sqlite/0001_first.sql"),
    include_str!("../migrations/sqlite/0002_leases.sql"),
];
const POSTGRES: &[&str] = &[
    include_str!("../migrations/postgres/0001_first.sql"),
    include_str!("../migrations/postgres/0002_leases.sql"),
];
/// Readers go on while one writes (WAL); writers queue.
const SQLITE_CONNECTIONS: u32 = 4;
/// Of one router. A request holds one for as long as a query takes.
const POSTGRES_CONNECTIONS: u32 = 8;
/// What a request waits for a connection of the pool, or for a database that does not answer.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// In WAL mode only FULL makes a commit outlive a power cut: an answered request is never lost.
const SQLITE_SETUP: &str = "PRAGMA busy_timeout = 10000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
                            PRAGMA foreign_keys = ON";
/// A router that falls asleep within a transaction must not hold its locks against the others.
const POSTGRES_SETUP: &str = "SET idle_in_transaction_session_timeout = '10s'";
/// The advisory lock under which routers that start together migrate one after the other: "tandem" in ASCII.
const MIGRATION_LOCK: i64 = 0x7461_6e64_656d;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Sqlite,
    Postgres,
}

#[derive(Clone)]
pub(crate) struct Database {
    pub pool: AnyPool,
    pub dialect: Dialect,
}

impl Database {
    /// The file of a data folder, which only one process uses.
    pub async fn file(path: &Path) -> Result<Database, StoreError> {
        let url = format!("sqlite://{}?mode=rwc", percent_encoded(path));
        Database::open(&url, Dialect::Sqlite, &path.display().to_string()).await
    }

    /// `postgres://user:password@host/database`, which several routers may use.
    pub async fn server(url: &str) -> Result<Database, StoreError> {
        let shown = without_password(url);
        if !(url.starts_with("postgres://") || url.starts_with("postgresql://")) {
            return Err(StoreError::Url {
                url: shown,
                why: "the database is postgres://user:password@host/database, or SQLite without this option"
                    .to_owned(),
            });
        }
        Database::open(url, Dialect::Postgres, &shown).await
    }

    async fn open(url: &str, dialect: Dialect, shown: &str) -> Result<Database, StoreError> {
        static DRIVERS: Once = Once::new();
        DRIVERS.call_once(|| {
            sqlx::any::install_drivers(&[sqlx::sqlite::any::DRIVER, sqlx::postgres::any::DRIVER])
                .expect("only this line installs drivers");
        });
        let options = match dialect {
            Dialect::Sqlite => AnyPoolOptions::new()
                .max_connections(SQLITE_CONNECTIONS)
                .after_connect(|connection, _| {
                    Box::pin(async move { connection.execute(SQLITE_SETUP).await.map(drop) })
                }),
            Dialect::Postgres => AnyPoolOptions::new()
                .max_connections(POSTGRES_CONNECTIONS)
                .after_connect(|connection, _| {
                    Box::pin(async move { connection.execute(POSTGRES_SETUP).await.map(drop) })
                }),
        };
        let pool = options
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect(url)
            .await
            .map_err(|source| StoreError::Connect {
                url: shown.to_owned(),
                source,
            })?;
        let database = Database { pool, dialect };
        database.migrate(shown).await?;
        Ok(database)
    }

    async fn migrate(&self, shown: &str) -> Result<(), StoreError> {
        let migrations = match self.dialect {
            Dialect::Sqlite => SQLITE,
            Dialect::Postgres => POSTGRES,
        };
        let mut tx = self.begin().await?;
        let found: i64 = match self.dialect {
            Dialect::Sqlite => {
                sqlx::query_scalar("PRAGMA user_version")
                    .fetch_one(&mut *tx)
                    .await?
            }
            Dialect::Postgres => {
                sqlx::query("SELECT pg_advisory_xact_lock($1)")
                    .bind(MIGRATION_LOCK)
                    .execute(&mut *tx)
                    .await?;
                sqlx::raw_sql("CREATE TABLE IF NOT EXISTS tandem_schema (version BIGINT NOT NULL)")
                    .execute(&mut *tx)
                    .await?;
                let version: Option<i64> = sqlx::query_scalar("SELECT version FROM tandem_schema")
                    .fetch_optional(&mut *tx)
                    .await?;
                version.unwrap_or(0)
            }
        };
        let known = migrations.len();
        let applied = usize::try_from(found)
            .ok()
            .filter(|&n| n <= known)
            .ok_or_else(|| StoreError::Newer {
                database: shown.to_owned(),
                found,
                known: known as i64,
            })?;
        if applied == known {
            return Ok(());
        }
        for &migration in &migrations[applied..] {
            sqlx::raw_sql(migration).execute(&mut *tx).await?;
        }
        let remember = match self.dialect {
            Dialect::Sqlite => format!("PRAGMA user_version = {known}"),
            Dialect::Postgres => {
                format!("DELETE FROM tandem_schema; INSERT INTO tandem_schema (version) VALUES ({known})")
            }
        };
        sqlx::raw_sql(sqlx::AssertSqlSafe(remember))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        tracing::info!(
            database = shown,
            from = applied,
            to = known,
            "tables brought up to date"
        );
        Ok(())
    }

    /// A writing transaction. In SQLite IMMEDIATE takes the write lock at the start: a transaction that reads first and
    /// then finds another writer could only fail, whatever its timeout.
    pub async fn begin(&self) -> Result<Transaction<'static, Any>, StoreError> {
        Ok(match self.dialect {
            Dialect::Sqlite => self.pool.begin_with("BEGIN IMMEDIATE").await?,
            Dialect::Postgres => self.pool.begin().await?,
        })
    }

    /// Milliseconds since 1970 by the database's clock: the one that all holders of leases share.
    pub async fn clock_ms(&self, tx: &mut Transaction<'static, Any>) -> Result<i64, StoreError> {
        let sql = match self.dialect {
            Dialect::Sqlite => "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
            Dialect::Postgres => "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)",
        };
        Ok(sqlx::query_scalar(sql).fetch_one(&mut **tx).await?)
    }
}

/// For SQLite's URL, which ends at `?` and decodes `%`.
fn percent_encoded(path: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut url = String::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'-' | b'_' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => url.push(char::from(byte)),
            _ => write!(url, "%{byte:02X}").expect("a String takes all"),
        }
    }
    url
}

/// A URL as it may be shown.
pub(crate) fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    // What follows `?` may hold a password too.
    let rest = rest.split('?').next().unwrap_or_default();
    match rest.rsplit_once('@') {
        Some((user, place)) => {
            let user = user.split(':').next().unwrap_or_default();
            format!("{scheme}://{user}@{place}")
        }
        None => format!("{scheme}://{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        for (url, shown) in [
            ("postgres://u:secret@h:5432/d", "postgres://u@h:5432/d"),
            ("postgres://u:p@ss@h/d?password=x", "postgres://u@h/d"),
            ("postgres://h/d", "postgres://h/d"),
            ("nonsense", "nonsense"),
        ] {
            assert_eq!(without_password(url), shown);
        }
    }
}
