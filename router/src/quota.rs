//! What a key may still train today: asked before a job or a call trains, and while it does. Not here: the count (store).

use std::fmt;

use tandem_store::Quota;

use crate::Router;
use crate::api::RouterError;

/// Of an error, and of a job that failed by it.
pub const EXCEEDED_QUOTA: &str = "exceeded_quota";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaExceeded {
    pub quota: Quota,
    /// Tokens that something would train; about as many.
    pub wanted: u64,
}

impl std::error::Error for QuotaExceeded {}

impl fmt::Display for QuotaExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let QuotaExceeded {
            quota:
                Quota {
                    limit,
                    trained,
                    renews_after_s,
                },
            wanted,
        } = self;
        write!(
            f,
            "this key may train {limit} tokens a day (UTC), of which {trained} are trained"
        )?;
        match wanted {
            0 => write!(f, "; try again in {renews_after_s} s"),
            wanted if wanted > limit => write!(
                f,
                ", and this would train about {wanted}: fewer examples, epochs or steps"
            ),
            wanted => write!(
                f,
                ", and this would train about {wanted}; try again in {renews_after_s} s"
            ),
        }
    }
}

impl Router {
    /// Whether the key may train `wanted` tokens more; with 0, any. `None`: nothing limits it.
    pub(crate) async fn check_quota(&self, key: Option<&str>, wanted: u64) -> Result<(), RouterError> {
        let Some(key) = key else { return Ok(()) };
        let Some(quota) = self.0.store.training_quota(key).await? else {
            return Ok(());
        };
        let left = quota.limit.saturating_sub(quota.trained);
        match left < wanted.max(1) {
            true => Err(QuotaExceeded { quota, wanted }.into()),
            false => Ok(()),
        }
    }
}
