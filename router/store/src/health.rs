//! Whether what the store keeps elsewhere answers. It is asked twice a second, so that a caller who needs a part that is
//! away hears so at once, instead of after a time-out of its own. Not here: what is done without that part.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::error::StoreError;

/// How often the parts are asked.
pub const PROBE_PERIOD: Duration = Duration::from_millis(500);
/// A part that takes longer to answer something small is away.
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// What the store is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Files, jobs and names: `--database-url`.
    Database,
    /// Bytes: `--artifact-url`.
    Storage,
    /// Space for either.
    Room,
}

impl Part {
    pub const ALL: [Part; 3] = [Part::Database, Part::Storage, Part::Room];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Database => "database",
            Part::Storage => "storage",
            Part::Room => "room",
        })
    }
}

/// What the last probe of a part found. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Health {
    part: Part,
    /// Why it is away; `None` while it answers, and before it was asked.
    away: Arc<RwLock<Option<String>>>,
}

impl Health {
    pub fn new(part: Part) -> Health {
        Health {
            part,
            away: Arc::default(),
        }
    }

    /// For everything that needs the part: an error while it is away.
    pub fn check(&self) -> Result<(), StoreError> {
        match self.why() {
            None => Ok(()),
            Some(why) => Err(StoreError::Away { part: self.part, why }),
        }
    }

    pub fn why(&self) -> Option<String> {
        self.away.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// It is away for as long as this process lives: only a person can mend it.
    pub fn gave_up(&self, error: &StoreError) {
        tracing::error!(part = %self.part, %error, "nothing more is read or written");
        *self.away.write().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }

    /// Writes down what a probe found, and logs it when it is news.
    pub async fn note(&self, probe: impl Future<Output = Result<(), StoreError>>) {
        let found = match tokio::time::timeout(PROBE_TIMEOUT, probe).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {PROBE_TIMEOUT:?}")),
        };
        let before = std::mem::replace(
            &mut *self.away.write().unwrap_or_else(PoisonError::into_inner),
            found.clone(),
        );
        match (before, found) {
            (None, Some(why)) => {
                tracing::error!(part = %self.part, why, "does not answer; what needs it is refused until it does")
            }
            (Some(_), None) => tracing::info!(part = %self.part, "answers again"),
            _ => {}
        }
    }
}
