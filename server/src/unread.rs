//! What a request's body still holds when its answer is ready: it is read and dropped in the background, so that a
//! client that is still writing reads the answer and not a reset connection, and its next request finds the connection
//! as it should be. And a body that does not go on coming is given up. Not here: the limits of what is kept.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use futures::{Stream, StreamExt};
use tokio::runtime::Handle;
use tokio::time::{Sleep, sleep};

use crate::extract::announced_bytes;

/// Beyond this, or this time, the connection is closed instead.
const LIMIT_BYTES: u64 = 64 << 20;
const TIME: Duration = Duration::from_secs(5);

/// No piece of a body came for so long.
#[derive(Debug, thiserror::Error)]
#[error("no more of the body came for {} s", .0.as_secs())]
pub struct Stalled(pub Duration);

/// Around everything that may answer without reading, which is every route and every layer. `patience` is for each piece
/// of the body.
pub async fn drain(State(patience): State<Duration>, request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let announced = announced_bytes(request.headers());
    let request = request.map(|body| Body::from_stream(Unread::new(body, patience)));
    let mut response = next.run(request).await;
    let refused = response.status().is_client_error() || response.status().is_server_error();
    if refused && announced.is_some_and(|bytes| bytes > LIMIT_BYTES) {
        // The rest will not be read: the client must not send its next request here.
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// A body, until it has been read to its end.
struct Unread {
    body: Option<BodyDataStream>,
    patience: Duration,
    /// While a piece is waited for.
    limit: Option<Pin<Box<Sleep>>>,
}

impl Unread {
    fn new(body: Body, patience: Duration) -> Unread {
        Unread {
            body: Some(body.into_data_stream()),
            patience,
            limit: None,
        }
    }
}

impl Stream for Unread {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else {
            return Poll::Ready(None);
        };
        let news = body.poll_next_unpin(context);
        match &news {
            Poll::Pending => {
                let patience = this.patience;
                let limit = this.limit.get_or_insert_with(|| Box::pin(sleep(patience)));
                ready!(limit.as_mut().poll(context));
                // What is left does not come: nobody waits for it.
                this.body = None;
                return Poll::Ready(Some(Err(axum::Error::new(Stalled(patience)))));
            }
            Poll::Ready(None | Some(Err(_))) => this.body = None,
            Poll::Ready(Some(Ok(_))) => {}
        }
        this.limit = None;
        news
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        // Without a runtime the process is ending, and the connection with it.
        if let (Some(body), Ok(runtime)) = (self.body.take(), Handle::try_current()) {
            runtime.spawn(tokio::time::timeout(TIME, rest(body)));
        }
    }
}

async fn rest(mut body: BodyDataStream) {
    let mut left = LIMIT_BYTES;
    while let Some(Ok(chunk)) = body.next().await {
        match left.checked_sub(chunk.len() as u64) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}
