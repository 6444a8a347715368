//! Connections of routers, plain or behind TLS, as they come. A handshake has a time, and others come in meanwhile. Not here:
//! certificates (server).

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// What a new connection is accepted with; asked for each, because certificates are renewed.
pub type Acceptor = Arc<dyn Fn() -> TlsAcceptor + Send + Sync>;

const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// Under way at once.
const HANDSHAKES: usize = 64;
/// After the socket gave none: too many files are open, most likely.
const RETRY: Duration = Duration::from_millis(100);

pub enum Connection {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Ends with its reader.
pub fn connections(
    listener: TcpListener,
    tls: Option<Acceptor>,
) -> impl Stream<Item = io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let place = places.clone().acquire_owned().await.expect("it is never closed");
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "no connection could be accepted");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            };
            // It is slower without, no more.
            let _ = stream.set_nodelay(true);
            let (sender, tls) = (sender.clone(), tls.clone());
            tokio::spawn(async move {
                let connection = shaken(stream, peer, tls).await;
                drop(place);
                if let Some(connection) = connection {
                    // A server that is gone takes none.
                    let _ = sender.send(Ok(connection)).await;
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

async fn shaken(stream: TcpStream, peer: SocketAddr, tls: Option<Acceptor>) -> Option<Connection> {
    let Some(tls) = tls else {
        return Some(Connection::Plain(stream));
    };
    match tokio::time::timeout(HANDSHAKE_PATIENCE, tls().accept(stream)).await {
        Ok(Ok(stream)) => Some(Connection::Tls(Box::new(stream))),
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
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        match self {
            Connection::Plain(stream) => stream.connect_info(),
            Connection::Tls(stream) => stream.get_ref().0.connect_info(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Connection::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Connection::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Connection::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Connection::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
