//! Why the store could not do it.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{} is in use by another server: each needs a data folder of its own", .0.display())]
    Locked(PathBuf),
    #[error(
        "{} has tables of version {found}, this program knows versions up to {known}: use a newer program or another \
         data folder", path.display()
    )]
    Newer { path: PathBuf, found: i64, known: i64 },
    /// A folder that should hold an adapter does not. `missing`: there is nothing at the path.
    #[error("{message}")]
    Adapter { missing: bool, message: String },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("database: {0}")]
    Sql(#[from] sqlx::Error),
    /// The tables hold what this program never writes.
    #[error("damaged database: {0}")]
    Damaged(String),
}

/// For `map_err`: what was done to which path.
pub(crate) fn io_at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let what = format!("{doing} {}", path.display());
    move |source| StoreError::Io { what, source }
}
