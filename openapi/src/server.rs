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
    /// What does not answer now: `database`, `storage`. Requests that need it are refused with 503
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub away: Vec<String>,
}
