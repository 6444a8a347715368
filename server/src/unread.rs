//! What a request's body still holds when its answer is ready: it is read and dropped in the background, so that a
//! client that is still writing reads the answer and not a reset connection, and its next request finds the connection
//! as it should be. Not here: the limits of what is kept.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use futures::{Stream, StreamExt};
use tokio::runtime::Handle;

use crate::extract::announced_bytes;

/// Beyond this, or this time, the connection is closed instead.
const LIMIT_BYTES: u64 = 64 << 20;
const TIME: Duration = Duration::from_secs(5);

/// Around everything that may answer without reading, which is every route and every layer.
pub async fn drain(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let announced = announced_bytes(request.headers());
    let request = request.map(|body| Body::from_stream(Unread(Some(body.into_data_stream()))));
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
struct Unread(Option<BodyDataStream>);

impl Stream for Unread {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(body) = &mut self.0 else {
            return Poll::Ready(None);
        };
        let news = body.poll_next_unpin(context);
        if matches!(news, Poll::Ready(None | Some(Err(_)))) {
            self.0 = None;
        }
        news
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        // Without a runtime the process is ending, and the connection with it.
        if let (Some(body), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
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
