//! The socket and its end: accepts connections until a signal, gives running answers time, then stops the router.
//! Not here: routes, the engine.

use std::future::IntoFuture;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router as Routes;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::app::App;

/// Bound before the model is loaded, so that a taken port is found in milliseconds.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves until SIGTERM or SIGINT and `grace` after it; a second signal ends the grace.
pub async fn serve(
    listener: std::net::TcpListener,
    routes: Routes,
    app: App,
    grace: Duration,
) -> io::Result<()> {
    let mut signals = Signals::new()?;
    let listener = TcpListener::from_std(listener)?.tap_io(|stream| {
        // A chunk of a stream is small and must leave at once.
        if let Err(error) = stream.set_nodelay(true) {
            warn!(%error, "cannot set TCP_NODELAY");
        }
    });
    let (stop, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, routes).with_graceful_shutdown(async move { drop(stopped.await) });
    let watch = async {
        let name = signals.next().await;
        info!(
            signal = name,
            grace_s = grace.as_secs(),
            "stopping: no new connections, running answers end"
        );
        app.stop();
        // Nobody listens any more when the server has ended by itself.
        let _ = stop.send(());
        tokio::select! {
            () = tokio::time::sleep(grace) => warn!("the grace is over; answers that still run are cut"),
            name = signals.next() => warn!(signal = name, "a second signal; answers that still run are cut"),
        }
    };
    let outcome = tokio::select! {
        outcome = server.into_future() => outcome,
        () = watch => Ok(()),
    };
    app.router.shutdown().await;
    outcome
}

pub const SIGINT: &str = "SIGINT";

/// SIGTERM and SIGINT, from now on.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub fn new() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => SIGINT,
        }
    }
}
