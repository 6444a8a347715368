//! Why the store could not do it.

use std::io;
use std::path::{Path, PathBuf};

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
    /// The tables hold what this program never writes, or the artifact store lacks what they name.
    #[error("damaged store: {0}")]
    Damaged(String),
}

/// For `map_err`: what was done to which path.
pub(crate) fn io_at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let what = format!("{doing} {}", path.display());
    move |source| StoreError::Io { what, source }
}
