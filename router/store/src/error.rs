//! Why the store could not do it.

use std::io;
use std::path::{Path, PathBuf};

use crate::health::Part;
use crate::storage::StorageExceeded;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{} is in use by another server: each needs a data folder of its own", .0.display())]
    Locked(PathBuf),
    #[error(
        "{database} has tables of version {found}, this program knows versions up to {known}: use a newer program or \
         another database"
    )]
    Newer {
        /// A path, or a URL without its password.
        database: String,
        found: i64,
        known: i64,
    },
    /// For who only looks.
    #[error(
        "{database} has tables of version {found}, this program reads version {known}: a server of this version, started once, \
         brings them up to date"
    )]
    Older {
        database: String,
        found: i64,
        known: i64,
    },
    /// Of database and artifacts one is not the other's. `how` continues the sentence "the database ...".
    #[error(
        "the database {database} {how}. Nothing was changed. Put back the database that belongs to them, together with its \
         -wal file (`tandem restore` brings a backup back), or use another --data-dir. To go on with this one, start once \
         with --quarantine-strays: what it does not know is then moved to {}", quarantine.display()
    )]
    Apart {
        database: String,
        how: String,
        quarantine: PathBuf,
    },
    #[error(
        "the database {path} is corrupt: {what}. Nothing was changed. `tandem restore` brings a backup back; without one, \
         `sqlite3 {path} .recover | sqlite3 recovered.db` saves what can be read"
    )]
    Corrupt { path: String, what: String },
    /// What cannot be a key.
    #[error("{0}")]
    Key(String),
    /// Why there is no copy of a store, or no store of a copy.
    #[error("{0}")]
    Backup(String),
    /// `--database-url` or `--artifact-url` is not one.
    #[error("{url}: {why}")]
    Url { url: String, why: String },
    #[error("cannot connect to {url}: {source}")]
    Connect { url: String, source: sqlx::Error },
    /// A folder that should hold an adapter does not. `missing`: there is nothing at the path.
    #[error("{message}")]
    Adapter { missing: bool, message: String },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{what}: {source}")]
    Remote {
        what: String,
        source: object_store::Error,
    },
    #[error("database: {0}")]
    Sql(#[from] sqlx::Error),
    /// The disk was found full, and there is no room yet.
    #[error("there is no room on the disk: {0}")]
    Full(String),
    /// The last probe got no answer, so nothing was tried.
    #[error("the {part} does not answer: {why}")]
    Away { part: Part, why: String },
    /// The tables hold what this program never writes, or the artifact store lacks what they name.
    #[error("damaged store: {0}")]
    Damaged(String),
    /// A tenant would have more than its key lets it.
    #[error(transparent)]
    OverLimit(#[from] StorageExceeded),
    /// A disk changed what was uploaded.
    #[error(
        "{what} is damaged: it has {got}, but was written with {expected}. Delete it and upload it again, or bring a backup \
         back (`tandem restore`)"
    )]
    Altered {
        what: String,
        expected: String,
        got: String,
    },
}

impl StoreError {
    /// The part that cannot be used now and may be later: nothing is wrong with what was asked.
    pub fn away(&self) -> Option<Part> {
        match self {
            StoreError::Away { part, .. } => Some(*part),
            StoreError::Full(_) => Some(Part::Room),
            StoreError::Sql(error) | StoreError::Connect { source: error, .. } => match sql_full(error) {
                true => Some(Part::Room),
                false => sql_away(error).then_some(Part::Database),
            },
            StoreError::Remote { source, .. } => match remote_full(source) {
                true => Some(Part::Room),
                false => remote_away(source).then_some(Part::Storage),
            },
            StoreError::Io { source, .. } => match io_full(source) {
                true => Some(Part::Room),
                false => disk_away(source).then_some(Part::Storage),
            },
            StoreError::Locked(_)
            | StoreError::Newer { .. }
            | StoreError::Older { .. }
            | StoreError::Apart { .. }
            | StoreError::Corrupt { .. }
            | StoreError::Key(_)
            | StoreError::Backup(_)
            | StoreError::Url { .. }
            | StoreError::Adapter { .. }
            | StoreError::Damaged(_)
            | StoreError::OverLimit(_)
            | StoreError::Altered { .. } => None,
        }
    }
}

/// The disk, or what is left of a quota.
fn io_full(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::StorageFull | K::QuotaExceeded)
}

/// SQLite's "database or disk is full", Postgres' "disk full".
fn sql_full(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => io_full(error),
        sqlx::Error::Database(error) => error.code().is_some_and(|code| code_is_full(&code)),
        _ => false,
    }
}

fn code_is_full(code: &str) -> bool {
    match code.parse::<u32>() {
        Ok(number) if code.len() < 5 => number & 0xff == 13,
        _ => code == "53100",
    }
}

/// Of a folder an error of the system; of servers that speak S3, which have no code of their own for it, MinIO's, Ceph's
/// and the status 507.
fn remote_full(error: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(io_full) {
            return true;
        }
        cause = error.source();
    }
    let text = error.to_string();
    [
        "507 Insufficient Storage",
        "XMinioStorageFull",
        "XMinioAdminBucketQuotaExceeded",
        "<Code>QuotaExceeded</Code>",
    ]
    .iter()
    .any(|said| text.contains(said))
}

fn sql_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => {
            true
        }
        // A connection that broke in the middle of an answer.
        sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| code_is_away(&code)),
        _ => false,
    }
}

/// SQLite's "malformed" and "not a database".
pub(crate) fn is_corrupt(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    let kind = code.and_then(|code| code.parse::<u32>().ok());
    kind.is_some_and(|kind| matches!(kind & 0xff, 11 | 26))
}

/// Postgres' codes have five characters: connections (08), resources (53), the operator (57P), the system (58).
/// SQLite's are numbers, the kind in the lowest byte: busy, locked, read-only, I/O, cannot open.
fn code_is_away(code: &str) -> bool {
    match code.parse::<u32>() {
        Ok(number) if code.len() < 5 => matches!(number & 0xff, 5 | 6 | 8 | 10 | 14),
        _ => ["08", "53", "57P", "58"]
            .iter()
            .any(|class| code.starts_with(class)),
    }
}

/// Whatever is not an answer: about the object itself, or about the keys. (Another try with the same keys is refused, too.)
fn remote_away(error: &object_store::Error) -> bool {
    use object_store::Error as E;
    !matches!(
        error,
        E::NotFound { .. }
            | E::InvalidPath { .. }
            | E::AlreadyExists { .. }
            | E::Precondition { .. }
            | E::NotModified { .. }
            | E::NotImplemented { .. }
            | E::NotSupported { .. }
            | E::PermissionDenied { .. }
            | E::Unauthenticated { .. }
    )
}

/// Of the data folder: a disk that was made read-only, or that nothing can be opened on now.
fn disk_away(error: &io::Error) -> bool {
    let is_crowded = matches!(error.raw_os_error(), Some(ENFILE | EMFILE));
    is_crowded || error.kind() == io::ErrorKind::ReadOnlyFilesystem
}

/// The system has, or this process has, as many open files as it may.
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

/// For `map_err`: what was done to which path.
pub(crate) fn io_at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let what = format!("{doing} {}", path.display());
    move |source| StoreError::Io { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_told_from_what_does_not() {
        for (code, away) in [
            ("57P01", true),
            ("57P03", true),
            ("08006", true),
            ("53300", true),
            ("58030", true),
            // Unique violation, undefined table, syntax, a query that was cancelled.
            ("23505", false),
            ("42P01", false),
            ("42601", false),
            ("57014", false),
            // SQLite: busy, busy snapshot, constraint, unique constraint, corrupt.
            ("5", true),
            ("517", true),
            ("19", false),
            ("2067", false),
            ("11", false),
        ] {
            assert_eq!(code_is_away(code), away, "{code}");
        }
        for (code, full) in [
            ("13", true),
            ("53100", true),
            ("10", false),
            ("53200", false),
            ("13000", false),
        ] {
            assert_eq!(code_is_full(code), full, "{code}");
        }
        let at_x = |error| io_at("writing", Path::new("/data/x"))(error).away();
        assert_eq!(at_x(io::ErrorKind::StorageFull.into()), Some(Part::Room));
        assert_eq!(at_x(io::ErrorKind::QuotaExceeded.into()), Some(Part::Room));
        assert_eq!(
            at_x(io::ErrorKind::ReadOnlyFilesystem.into()),
            Some(Part::Storage)
        );
        assert_eq!(at_x(io::Error::from_raw_os_error(EMFILE)), Some(Part::Storage));
        let remote = |source: Box<dyn std::error::Error + Send + Sync>| {
            let what = "writing x".to_owned();
            let source = object_store::Error::Generic { store: "S3", source };
            StoreError::Remote { what, source }.away()
        };
        let inner = object_store::Error::Generic {
            store: "LocalFileSystem",
            source: Box::new(io::Error::from(io::ErrorKind::StorageFull)),
        };
        assert_eq!(remote(Box::new(inner)), Some(Part::Room));
        assert_eq!(
            remote("<Error><Code>XMinioStorageFull</Code>".into()),
            Some(Part::Room)
        );
        assert_eq!(remote("connection refused".into()), Some(Part::Storage));
        let missing = io_at("opening", Path::new("/data/x"))(io::ErrorKind::NotFound.into());
        assert_eq!(missing.away(), None);
        assert_eq!(StoreError::Sql(sqlx::Error::RowNotFound).away(), None);
        assert_eq!(
            StoreError::Sql(sqlx::Error::PoolTimedOut).away(),
            Some(Part::Database)
        );
    }
}
