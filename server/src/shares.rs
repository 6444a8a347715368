//! Memory for the bodies of requests and of their answers, which tenants share: each takes as much as it leaves free. Not here: how
//! large one body may be.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::{Frame, SizeHint};
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
/// A whole answer of fewer bytes is left to the socket at once.
const SMALL_ANSWER_BYTES: u64 = 256 << 10;
/// Of a larger one: what is asked for when the socket has taken what was before.
const PIECE_BYTES: usize = 64 << 10;

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
                what: "bytes of requests and answers in memory",
                own: own as usize,
                places: BYTES,
                retry_after_s: RETRY_AFTER_S,
            })
        })
    }
}

/// Around routes: what a request's body takes is held until there is an answer, or its beginning; what a whole answer takes, until
/// its reader has taken it.
pub async fn hold(State(app): State<App>, request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    let Ok(Asker(client)) = Asker::from_request_parts(&mut parts, &app).await;
    let held = Arc::new(Held(app.shares.of(client.tenant)));
    parts.extensions.insert(held.clone());
    let response = next.run(Request::from_parts(parts, body)).await;
    match response.body().size_hint().exact() {
        Some(bytes) if bytes >= SMALL_ANSWER_BYTES => whole(response, held, bytes).await,
        _ => response,
    }
}

async fn whole(response: Response, held: Arc<Held>, bytes: u64) -> Response {
    if let Err(error) = held.reach(usize::try_from(bytes).unwrap_or(usize::MAX)) {
        return error.into_response();
    }
    let (parts, body) = response.into_parts();
    match axum::body::to_bytes(body, usize::MAX).await {
        Ok(rest) => Response::from_parts(parts, Body::new(Whole { rest, _held: held })),
        Err(error) => ApiError::Internal(format!("an answer was not made: {error}")).into_response(),
    }
}

/// An answer that is there, which leaves in pieces.
struct Whole {
    rest: Bytes,
    _held: Arc<Held>,
}

impl HttpBody for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = self.rest.len().min(PIECE_BYTES);
        let piece = self.rest.split_to(next);
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use tandem_router::shares::Shares;

    use super::*;

    #[tokio::test]
    async fn a_whole_answer_is_held_until_it_is_read() {
        let shares = Arc::new(Shares::default());
        let held = || Arc::new(Held(shares.of("a".parse().unwrap())));
        let bytes: Bytes = (0..1u32 << 20).map(|i| (i % 251) as u8).collect();
        let answer = async || whole(Response::new(Body::from(bytes.clone())), held(), 400 << 20).await;
        let (unread, refused) = (answer().await, answer().await);
        assert_eq!((unread.status().as_u16(), refused.status().as_u16()), (200, 429));
        assert_eq!(unread.body().size_hint().exact(), Some(1 << 20));
        let read = axum::body::to_bytes(unread.into_body(), usize::MAX)
            .await
            .unwrap();
        assert_eq!(read, bytes);
        assert_eq!(answer().await.status(), 200, "it has left");
    }

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
