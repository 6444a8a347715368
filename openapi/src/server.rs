//! What the server says about itself.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Version {
    pub version: &'static str,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`; of `/ready`: `ready`, or `degraded` while something is away
    pub status: &'static str,
    /// What does not answer now: `database`, `storage`; requests that need it are refused with 503. `room`: the disk is
    /// full, and what is large is refused with 507. Tasks of the server that failed and are about to be begun again
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub away: Vec<String>,
}
