//! Memory for the bodies of requests, which tenants share: each takes as much as it leaves free. Not here: how large one body
//! may be.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use tandem_router::api::RouterError;
use tandem_router::shares::{Share, as_much_as_it_leaves};

use crate::app::App;
use crate::error::ApiError;
use crate::keys::Asker;

/// Of all bodies that are being read, and of those whose requests are not answered yet.
const BYTES: usize = 1 << 30;
/// One body's at most.
pub const BODY_BYTES: usize = BYTES / 2;
const RETRY_AFTER_S: u32 = 1;

/// What one request has taken.
pub struct Held(Share);

impl Held {
    /// So much memory, with what it had before.
    pub fn reach(&self, bytes: usize) -> Result<(), ApiError> {
        if bytes > BODY_BYTES {
            return Err(ApiError::TooDense {
                bytes,
                limit_bytes: BODY_BYTES,
            });
        }
        let most = |others| as_much_as_it_leaves(BYTES as u64, others);
        self.0.reach(bytes as u64, most).map_err(|own| {
            ApiError::Router(RouterError::NoShare {
                what: "bytes of request bodies in memory",
                own: own as usize,
                places: BYTES,
                retry_after_s: RETRY_AFTER_S,
            })
        })
    }
}

/// Around routes: what a request's body takes is held until there is an answer, or its beginning.
pub async fn hold(State(app): State<App>, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    let Ok(Asker(client)) = Asker::from_request_parts(&mut parts, &app).await;
    let held = Arc::new(Held(app.shares.of(client.tenant)));
    parts.extensions.insert(held.clone());
    let response = next.run(Request::from_parts(parts, body)).await;
    drop(held);
    response
}

#[cfg(test)]
mod tests {
    use tandem_router::shares::Shares;

    use super::*;

    #[test]
    fn a_body_is_within_what_one_may_be_and_what_its_tenant_may_have() {
        let shares = Arc::new(Shares::default());
        let [one, two] = ["a", "a"].map(|tenant| Held(shares.of(tenant.parse().unwrap())));
        one.reach(BODY_BYTES - 1).unwrap();
        let refused = two.reach(4).unwrap_err();
        assert!(
            matches!(refused, ApiError::Router(RouterError::NoShare { .. })),
            "{refused}"
        );
        let refused = two.reach(BODY_BYTES + 1).unwrap_err();
        assert!(matches!(refused, ApiError::TooDense { .. }), "{refused}");
    }
}
