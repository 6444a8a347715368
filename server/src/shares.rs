//! Memory for the bodies of requests, which tenants share: each takes as much as it leaves free, so one alone gets half and there
//! is always some for another. Not here: how large one body may be.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use tandem_router::api::RouterError;
use tandem_store::Tenant;

use crate::app::App;
use crate::error::ApiError;
use crate::keys::Asker;

/// Of all bodies that are being read, and of those whose requests are not answered yet.
const BYTES: usize = 1 << 30;
/// One body's at most.
pub const BODY_BYTES: usize = BYTES / 2;
const RETRY_AFTER_S: u32 = 1;

/// What is taken.
#[derive(Default)]
pub struct Shares(Mutex<HashMap<Tenant, usize>>);

/// What one request has taken. It is given back when it is dropped.
pub struct Share {
    shares: Arc<Shares>,
    tenant: Tenant,
    bytes: Mutex<usize>,
}

impl Shares {
    pub fn of(self: Arc<Shares>, tenant: Tenant) -> Share {
        Share {
            shares: self,
            tenant,
            bytes: Mutex::default(),
        }
    }
}

impl Share {
    /// So much memory, with what it had before.
    pub fn reach(&self, bytes: usize) -> Result<(), ApiError> {
        let mut had = lock(&self.bytes);
        let more = bytes.saturating_sub(*had);
        if more == 0 {
            return Ok(());
        }
        if bytes > BODY_BYTES {
            return Err(ApiError::TooDense {
                bytes,
                limit_bytes: BODY_BYTES,
            });
        }
        let mut taken = lock(&self.shares.0);
        let all: usize = taken.values().sum();
        let own = taken.get(&self.tenant).copied().unwrap_or(0);
        if own + more > BYTES.saturating_sub(all + more) {
            return Err(ApiError::Router(RouterError::NoShare {
                what: "bytes of request bodies in memory",
                own,
                places: BYTES,
                retry_after_s: RETRY_AFTER_S,
            }));
        }
        taken.insert(self.tenant.clone(), own + more);
        *had = bytes;
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = lock(&self.shares.0);
        let left = taken.get(&self.tenant).map_or(0, |own| own - *lock(&self.bytes));
        match left {
            0 => drop(taken.remove(&self.tenant)),
            _ => drop(taken.insert(self.tenant.clone(), left)),
        }
    }
}

/// Around routes: what a request's body takes is held until there is an answer, or its beginning.
pub async fn hold(State(app): State<App>, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    let Ok(Asker(client)) = Asker::from_request_parts(&mut parts, &app).await;
    let share = Arc::new(app.shares.clone().of(client.tenant));
    parts.extensions.insert(share.clone());
    let response = next.run(Request::from_parts(parts, body)).await;
    drop(share);
    response
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_takes_as_much_as_it_leaves_free() {
        let shares = Arc::new(Shares::default());
        let [one, two, other] =
            ["greedy", "greedy", "modest"].map(|tenant| shares.clone().of(tenant.parse().unwrap()));
        one.reach(BODY_BYTES - 1).unwrap();
        let refused = two.reach(4).unwrap_err();
        assert!(
            matches!(refused, ApiError::Router(RouterError::NoShare { .. })),
            "{refused}"
        );
        other.reach(BYTES / 8).unwrap();
        let refused = other.reach(BODY_BYTES + 1).unwrap_err();
        assert!(matches!(refused, ApiError::TooDense { .. }), "{refused}");
        drop(one);
        two.reach(BYTES / 4).unwrap();
        drop((two, other));
        assert!(lock(&shares.0).is_empty());
    }
}
