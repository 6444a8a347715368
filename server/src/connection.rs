//! One connection: how long its client may take to begin a request and to take in an answer, and which connection a
//! request came by. Not here: the socket that accepts (listen), how long a request's body may take (unread).

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::Router as Routes;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::Uri;
use axum::http::uri::PathAndQuery;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Sleep, sleep};
use tower::ServiceExt;

use crate::tls::Tls;

/// Requests that one HTTP/2 connection may have under way.
const MAX_STREAMS: u32 = 256;
/// What a connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// How long is waited for a client.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Between two requests.
    pub idle: Duration,
    /// For the first request of a connection, and for the next piece of a body.
    pub read: Duration,
    /// For it to take the next piece of an answer.
    pub write: Duration,
}

/// Which connection a request came by; each has another number.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConnectionId(pub u64);

/// What connections are served by.
#[derive(Clone)]
pub struct Site {
    pub routes: Routes,
    pub root: RootPath,
    pub tls: Option<Tls>,
    pub patience: Patience,
}

/// Where a proxy shows the server; requests have it before their path, or the proxy has cut it off.
#[derive(Clone, Debug)]
pub struct RootPath(Arc<str>);

impl RootPath {
    /// `None`: it is no path.
    pub fn new(text: &str) -> Option<RootPath> {
        let root = text.trim_end_matches('/');
        let is_path = (root.is_empty() || root.starts_with('/')) && text.parse::<PathAndQuery>().is_ok();
        (is_path && !root.contains('?')).then(|| RootPath(root.into()))
    }

    /// The path that the routes know.
    fn cut(&self, uri: &mut Uri) {
        let given = uri.path_and_query().map_or("", PathAndQuery::as_str);
        let rest = match given.strip_prefix(&*self.0) {
            Some(rest) if !self.0.is_empty() => rest,
            _ => return,
        };
        let rest = match rest.chars().next() {
            Some('/') => rest.to_owned(),
            None | Some('?') => format!("/{rest}"),
            // Another path that begins alike.
            Some(_) => return,
        };
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = rest.parse().ok();
        if let Ok(cut) = Uri::from_parts(parts) {
            *uri = cut;
        }
    }
}

/// A connection that was accepted, from its handshake to its end.
pub async fn begin(stream: TcpStream, id: ConnectionId, site: Site, stopping: watch::Receiver<bool>) {
    let stream = Impatient::new(stream, site.patience.write);
    let Some(tls) = &site.tls else {
        return serve(stream, id, site, stopping).await;
    };
    let shaken = tls.acceptor().accept(stream);
    match tokio::time::timeout(site.patience.read, shaken).await {
        Ok(Ok(stream)) => serve(stream, id, site, stopping).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

/// Until the client leaves, is too slow, or `stopping` and its requests have ended.
async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    id: ConnectionId,
    site: Site,
    mut stopping: watch::Receiver<bool>,
) {
    let Site {
        routes,
        root,
        tls: _,
        patience,
    } = site;
    let exchanges = Exchanges::default();
    let begun = exchanges.clone();
    let service = tower::service_fn(move |request: hyper::Request<Incoming>| {
        let exchange = begun.begin();
        let mut request = request.map(Body::new);
        root.cut(request.uri_mut());
        request.extensions_mut().insert(id);
        let answer = routes.clone().oneshot(request);
        async move {
            let answer = answer.await.unwrap_or_else(|never: Infallible| match never {});
            Ok::<_, Infallible>(answer.map(|body| Answer::new(body, exchange, patience.write)))
        }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    // `Exchanges` measures from the first byte to the last, in both versions alike.
    builder.http1().header_read_timeout(None);
    builder.http2().max_concurrent_streams(MAX_STREAMS);
    let mut connection =
        pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)));
    let mut stops = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(error, "a connection broke");
                }
                return;
            }
            () = exchanges.silence(patience) => break,
            Ok(_) = stopping.wait_for(|stops| *stops), if !stops => {
                stops = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
    connection.as_mut().graceful_shutdown();
    // It ends here in any case, by being dropped.
    drop(tokio::time::timeout(GOODBYE, connection).await);
}

/// Counts the requests of a connection that are under way: from the end of their head to the end of their answer.
#[derive(Clone, Default)]
struct Exchanges(watch::Sender<usize>);

struct Exchange(Exchanges);

impl Exchanges {
    fn begin(&self) -> Exchange {
        self.0.send_modify(|open| *open += 1);
        Exchange(self.clone())
    }

    /// When no request has been under way for as long as is waited for one.
    async fn silence(&self, patience: Patience) {
        let mut open = self.0.subscribe();
        let mut wait = patience.read.min(patience.idle);
        loop {
            let none = *open.borrow_and_update() == 0;
            tokio::select! {
                () = sleep(wait), if none => return,
                // The sender is `self`.
                _ = open.changed() => wait = patience.idle,
            }
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.0.0.send_modify(|open| *open -= 1);
    }
}

/// The body of an answer. What its client does not take in is dropped, and with it whatever makes it: over HTTP/2 a client
/// can keep one stream closed while its connection is well.
struct Answer {
    held: Arc<Mutex<Held>>,
    watch: Option<AbortHandle>,
}

struct Held {
    /// `None`: it was given up.
    body: Option<(Body, Exchange)>,
    /// Since when the client has not come for more. `None`: it waits for us.
    taken: Option<Instant>,
}

impl Answer {
    fn new(body: Body, exchange: Exchange, patience: Duration) -> Answer {
        let has_more = !body.is_end_stream();
        let held = Arc::new(Mutex::new(Held {
            body: Some((body, exchange)),
            taken: Some(Instant::now()),
        }));
        let watched = Arc::downgrade(&held);
        let watch = has_more.then(|| tokio::spawn(give_up(watched, patience)).abort_handle());
        Answer { held, watch }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn give_up(held: Weak<Mutex<Held>>, patience: Duration) {
    let mut wait = patience;
    loop {
        sleep(wait).await;
        let Some(held) = held.upgrade() else { return };
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        let since = held.taken.map_or(Duration::ZERO, |taken| taken.elapsed());
        if since >= patience {
            tracing::info!(
                seconds = patience.as_secs(),
                "an answer that its client did not take in was given up (--write-timeout)"
            );
            let body = held.body.take();
            drop(held);
            return drop(body);
        }
        wait = patience - since;
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut held = self.lock();
        let Some((body, _)) = &mut held.body else {
            return Poll::Ready(Some(Err(axum::Error::new(io::Error::from(
                io::ErrorKind::TimedOut,
            )))));
        };
        let frame = Pin::new(body).poll_frame(context);
        held.taken = frame.is_ready().then(Instant::now);
        frame
    }

    fn is_end_stream(&self) -> bool {
        let held = self.lock();
        held.body.as_ref().is_some_and(|(body, _)| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let held = self.lock();
        held.body
            .as_ref()
            .map_or_else(SizeHint::default, |(body, _)| body.size_hint())
    }
}

/// A socket whose writes fail when its client takes nothing in for as long as is waited for it.
struct Impatient {
    stream: TcpStream,
    patience: Duration,
    /// While a write waits.
    limit: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: TcpStream, patience: Duration) -> Impatient {
        Impatient {
            stream,
            patience,
            limit: None,
        }
    }

    fn within<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(done) = write(Pin::new(&mut self.stream), context) {
            self.limit = None;
            return Poll::Ready(done);
        }
        let limit = self.limit.get_or_insert_with(|| Box::pin(sleep(self.patience)));
        ready!(limit.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.within(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.within(context, |stream, context| {
            stream.poll_write_vectored(context, pieces)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.within(context, |stream, context| stream.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.within(context, |stream, context| stream.poll_shutdown(context))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_cut_off_whole_or_not_at_all() {
        for (root, given, expected) in [
            ("/llm", "/llm/v1/models?limit=1", "/v1/models?limit=1"),
            ("/llm/", "/llm/v1/models", "/v1/models"),
            ("/llm", "/llm", "/"),
            ("/llm", "/llm?x=1", "/?x=1"),
            ("/llm", "/llms/v1", "/llms/v1"),
            ("/llm", "/v1/models", "/v1/models"),
            ("/", "/v1/models", "/v1/models"),
            ("/a/b", "http://h:1/a/b/c", "http://h:1/c"),
        ] {
            let mut uri: Uri = given.parse().expect("a URI");
            RootPath::new(root).expect("a path").cut(&mut uri);
            assert_eq!(uri.to_string(), expected, "{root} {given}");
        }
        for wrong in ["llm", "/a?b", "/a b", "http://x/y"] {
            assert!(RootPath::new(wrong).is_none(), "{wrong}");
        }
    }
}
