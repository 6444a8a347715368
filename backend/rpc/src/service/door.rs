//! Connections of routers, plain or behind TLS, as they come. Of strangers, who have not shown yet that they are routers, few are
//! kept: a new one takes the place of the oldest. Not here: certificates (server).

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{FutureExt, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// What a new connection is accepted with; asked for each, because certificates are renewed.
pub type Acceptor = Arc<dyn Fn() -> TlsAcceptor + Send + Sync>;

const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// Kept at once. Who asks for the pages alone is one as long as it stays.
const STRANGERS: usize = 64;
/// After the socket gave none: too many files are open, most likely.
const RETRY: Duration = Duration::from_millis(100);

pub struct Connection {
    stream: Transport,
    caller: Caller,
    /// Says that another takes its place. `None`: it was said.
    cut: Option<oneshot::Receiver<()>>,
}

enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Who is at the other end. Cheap to clone.
#[derive(Clone)]
pub struct Caller {
    pub address: SocketAddr,
    is_known: Arc<AtomicBool>,
}

impl Caller {
    /// It has shown what a router shows, and stays as long as it likes.
    pub fn let_stay(&self) {
        self.is_known.store(true, Ordering::Relaxed);
    }
}

/// The oldest first. Some may have gone, or be known by now.
#[derive(Default)]
struct Strangers(VecDeque<(Caller, oneshot::Sender<()>)>);

impl Strangers {
    /// One more. It hears when it has to go.
    fn enter(&mut self, caller: Caller) -> oneshot::Receiver<()> {
        let (cut, heard) = oneshot::channel();
        let all = &mut self.0;
        all.retain(|(caller, cut)| !cut.is_closed() && !caller.is_known.load(Ordering::Relaxed));
        while all.len() >= STRANGERS
            && let Some((caller, cut)) = all.pop_front()
        {
            tracing::debug!(peer = %caller.address, "a connection that showed no token gives way to another");
            // It may go at this moment.
            let _ = cut.send(());
        }
        all.push_back((caller, cut));
        heard
    }
}

/// Ends with its reader.
pub fn connections(
    listener: TcpListener,
    tls: Option<Acceptor>,
) -> impl Stream<Item = io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut strangers = Strangers::default();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "no connection could be accepted");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            // It is slower without, no more.
            let _ = stream.set_nodelay(true);
            let caller = Caller {
                address,
                is_known: Arc::default(),
            };
            let mut cut = strangers.enter(caller.clone());
            let (sender, tls) = (sender.clone(), tls.clone());
            tokio::spawn(async move {
                let stream = tokio::select! {
                    stream = shaken(stream, address, tls) => stream,
                    _ = &mut cut => return,
                };
                let Some(stream) = stream else { return };
                // A server that is gone takes none.
                let connection = Connection {
                    stream,
                    caller,
                    cut: Some(cut),
                };
                let _ = sender.send(Ok(connection)).await;
            });
        }
    });
    ReceiverStream::new(receiver)
}

async fn shaken(stream: TcpStream, peer: SocketAddr, tls: Option<Acceptor>) -> Option<Transport> {
    let Some(tls) = tls else {
        return Some(Transport::Plain(stream));
    };
    match tokio::time::timeout(HANDSHAKE_PATIENCE, tls().accept(stream)).await {
        Ok(Ok(stream)) => Some(Transport::Tls(Box::new(stream))),
        Ok(Err(error)) => {
            tracing::warn!(%peer, %error, "a TLS handshake failed");
            None
        }
        Err(_) => {
            tracing::warn!(%peer, "a TLS handshake took longer than {HANDSHAKE_PATIENCE:?}");
            None
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let connection = self.get_mut();
        if let Some(cut) = &mut connection.cut
            && let Poll::Ready(said) = cut.poll_unpin(cx)
        {
            connection.cut = None;
            // Who is known is not told any more.
            if said.is_ok() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
        }
        match &mut connection.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
