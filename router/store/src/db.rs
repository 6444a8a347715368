//! Opening the database and bringing its tables up to date. Two databases speak one set of queries (`$1` placeholders;
//! text and 64-bit integers only); where their words differ, it is said here. Not here: the queries.

use std::cmp::Ordering;
use std::path::Path;
use std::sync::Once;
use std::time::{Duration, Instant};

use sqlx::any::AnyPoolOptions;
use sqlx::{Any, AnyConnection, AnyPool, Connection, Executor, Transaction};

use crate::error::{StoreError, is_corrupt};
use crate::health::{Health, PROBE_TIMEOUT, Part};

/// In order, forward only: the n-th brings version n - 1 to version n.
const SQLITE: &[&str] = &[
    include_str!("../migrations/sqlite/0001_first.sql"),
    include_str!("../migrations/sqlite/0002_leases.sql"),
    include_str!("../migrations/sqlite/0003_identity.sql"),
    include_str!("../migrations/sqlite/0004_tenants.sql"),
    include_str!("../migrations/sqlite/0005_responses.sql"),
    include_str!("../migrations/sqlite/0006_batches.sql"),
    include_str!("../migrations/sqlite/0007_sweeps.sql"),
    include_str!("../migrations/sqlite/0008_limits.sql"),
    include_str!("../migrations/sqlite/0009_training_quota.sql"),
    include_str!("../migrations/sqlite/0010_digests.sql"),
    include_str!("../migrations/sqlite/0011_stored.sql"),
    include_str!("../migrations/sqlite/0012_kept.sql"),
    include_str!("../migrations/sqlite/0013_deaths.sql"),
];
const POSTGRES: &[&str] = &[
    include_str!("../migrations/postgres/0001_first.sql"),
    include_str!("../migrations/postgres/0002_leases.sql"),
    include_str!("../migrations/postgres/0003_identity.sql"),
    include_str!("../migrations/postgres/0004_tenants.sql"),
    include_str!("../migrations/postgres/0005_responses.sql"),
    include_str!("../migrations/postgres/0006_batches.sql"),
    include_str!("../migrations/postgres/0007_sweeps.sql"),
    include_str!("../migrations/postgres/0008_limits.sql"),
    include_str!("../migrations/postgres/0009_training_quota.sql"),
    include_str!("../migrations/postgres/0010_digests.sql"),
    include_str!("../migrations/postgres/0011_stored.sql"),
    include_str!("../migrations/postgres/0012_kept.sql"),
    include_str!("../migrations/postgres/0013_deaths.sql"),
];
/// Readers go on while one writes (WAL); writers queue.
const SQLITE_CONNECTIONS: u32 = 4;
/// Of one router. A request holds one for as long as a query takes.
const POSTGRES_CONNECTIONS: u32 = 8;
/// What a request waits for a connection of the pool: for SQLite's writers before it, or for a Postgres that does not
/// answer.
const SQLITE_ACQUIRE: Duration = Duration::from_secs(10);
const POSTGRES_ACQUIRE: Duration = Duration::from_millis(1500);
/// What a start waits for a Postgres that is being started too, and how often it tries.
const START_PATIENCE: Duration = Duration::from_secs(60);
const START_RETRY: Duration = Duration::from_secs(1);
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
    /// Only for [`Database::pool`] and for tests.
    pub raw_pool: AnyPool,
    pub dialect: Dialect,
    /// A path, or a URL without its password.
    pub name: String,
    pub health: Health,
    /// One connection of its own for the probe of a database elsewhere: requests that wait for each other do not look like
    /// a database that is away.
    probe_pool: Option<AnyPool>,
}

impl Database {
    /// The file of a data folder, which only one process uses.
    pub async fn file(path: &Path) -> Result<Database, StoreError> {
        let url = format!("sqlite://{}?mode=rwc", percent_encoded(path));
        let shown = path.display().to_string();
        let is_large = std::fs::metadata(path).is_ok_and(|file| file.len() > READ_FIRST_BYTES);
        check_sqlite(&url, &shown, if is_large { HEAD } else { WHOLE }).await?;
        let database = Database::open(&url, Dialect::Sqlite, &shown).await?;
        if is_large {
            let health = database.health.clone();
            tokio::spawn(async move {
                match check_sqlite(&url, &shown, WHOLE).await {
                    Ok(()) => tracing::info!(database = shown, "read whole, and sound"),
                    Err(error) => health.gave_up(&error),
                }
            });
        }
        Ok(database)
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
        let began = Instant::now();
        loop {
            match Database::open(url, Dialect::Postgres, &shown).await {
                Err(error) if error.away().is_some() && began.elapsed() < START_PATIENCE => {
                    tracing::warn!(%error, "waiting for the database");
                    tokio::time::sleep(START_RETRY).await;
                }
                opened => return opened,
            }
        }
    }

    async fn open(url: &str, dialect: Dialect, shown: &str) -> Result<Database, StoreError> {
        install_drivers();
        let (setup, connections, acquire) = match dialect {
            Dialect::Sqlite => (SQLITE_SETUP, SQLITE_CONNECTIONS, SQLITE_ACQUIRE),
            Dialect::Postgres => (POSTGRES_SETUP, POSTGRES_CONNECTIONS, POSTGRES_ACQUIRE),
        };
        let raw_pool = AnyPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(acquire)
            .after_connect(move |connection, _| {
                Box::pin(async move { connection.execute(setup).await.map(drop) })
            })
            // Where the end of a transaction failed, as on a full disk, the connection believes itself within one for ever.
            .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
            .connect(url)
            .await
            .map_err(|source| StoreError::Connect {
                url: shown.to_owned(),
                source,
            })?;
        let probe_pool = match dialect {
            Dialect::Sqlite => None,
            Dialect::Postgres => {
                let one = AnyPoolOptions::new()
                    .max_connections(1)
                    .acquire_timeout(PROBE_TIMEOUT);
                Some(one.connect_lazy(url)?)
            }
        };
        let database = Database {
            raw_pool,
            dialect,
            name: shown.to_owned(),
            health: Health::new(Part::Database),
            probe_pool,
        };
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

    /// For a query; an error while the database is away.
    pub fn pool(&self) -> Result<&AnyPool, StoreError> {
        self.health.check()?;
        Ok(&self.raw_pool)
    }

    /// Ask it something small, when it is elsewhere.
    pub async fn probe(&self) {
        if let Some(pool) = &self.probe_pool {
            let asked = sqlx::query("SELECT 1").execute(pool);
            self.health.note(async { Ok(asked.await.map(|_| ())?) }).await;
        }
    }

    pub async fn close(&self) {
        self.raw_pool.close().await;
        if let Some(pool) = &self.probe_pool {
            pool.close().await;
        }
    }

    /// A writing transaction. In SQLite IMMEDIATE takes the write lock at the start: a transaction that reads first and
    /// then finds another writer could only fail, whatever its timeout.
    pub async fn begin(&self) -> Result<Transaction<'static, Any>, StoreError> {
        Ok(match self.dialect {
            Dialect::Sqlite => self.pool()?.begin_with("BEGIN IMMEDIATE").await?,
            Dialect::Postgres => self.pool()?.begin().await?,
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

fn install_drivers() {
    static DRIVERS: Once = Once::new();
    DRIVERS.call_once(|| {
        sqlx::any::install_drivers(&[sqlx::sqlite::any::DRIVER, sqlx::postgres::any::DRIVER])
            .expect("only this line installs drivers");
    });
}

/// A connection to a SQLite file of any version; `mode` as in its URL.
pub(crate) async fn connect(path: &Path, mode: &str) -> Result<AnyConnection, StoreError> {
    install_drivers();
    let url = format!("sqlite://{}?mode={mode}", percent_encoded(path));
    let connected = async {
        let mut connection = AnyConnection::connect(&url).await?;
        connection.execute("PRAGMA busy_timeout = 10000").await?;
        Ok(connection)
    };
    connected.await.map_err(|source| StoreError::Connect {
        url: path.display().to_string(),
        source,
    })
}

/// A connection that cannot write, to a SQLite file of this version.
pub(crate) async fn look_into(path: &Path) -> Result<AnyConnection, StoreError> {
    let mut connection = connect(path, "ro").await?;
    let found: i64 = sqlx::query_scalar("PRAGMA user_version")
        .fetch_one(&mut connection)
        .await?;
    let (database, known) = (path.display().to_string(), SQLITE.len() as i64);
    match found.cmp(&known) {
        Ordering::Equal => Ok(connection),
        Ordering::Less => Err(StoreError::Older {
            database,
            found,
            known,
        }),
        Ordering::Greater => Err(StoreError::Newer {
            database,
            found,
            known,
        }),
    }
}

/// A larger file is read whole behind the start, at about a second for 200 MB that are in memory; until then its head is known to be
/// sound.
const READ_FIRST_BYTES: u64 = if cfg!(test) { 1 << 20 } else { 128 << 20 };
const WHOLE: &str = "PRAGMA quick_check(1)";
const HEAD: &str = "SELECT iif(count(*) >= 0, 'ok', '') FROM sqlite_master";

/// Reads what `query` reads, with an error that says what is wrong with it. (A pool would try until its time is up.)
async fn check_sqlite(url: &str, shown: &str, query: &'static str) -> Result<(), StoreError> {
    install_drivers();
    let checked = async {
        let mut connection = AnyConnection::connect(url).await?;
        connection.execute(SQLITE_SETUP).await?;
        let found: String = sqlx::query_scalar(query).fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok::<String, sqlx::Error>(found)
    };
    let corrupt = |what: String| StoreError::Corrupt {
        path: shown.to_owned(),
        what,
    };
    match checked.await {
        Ok(found) if found == "ok" => Ok(()),
        Ok(found) => Err(corrupt(found)),
        Err(error) if is_corrupt(&error) => Err(corrupt(error.to_string())),
        Err(source) => Err(StoreError::Connect {
            url: shown.to_owned(),
            source,
        }),
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
