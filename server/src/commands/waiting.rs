//! What a router answers while no backend has told it which model it serves: that it lives, and that it waits. Not here: the
//! API.

use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router as Pages;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::error::ApiError;

/// What the last answers may take.
const END: Duration = Duration::from_secs(1);

pub struct Waiting {
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Waiting {
    /// On the socket that the API is served on afterwards.
    pub fn begin(listener: &std::net::TcpListener) -> Result<Waiting> {
        let listener = listener.try_clone().and_then(TcpListener::from_std);
        let listener = listener.context("the socket")?;
        let pages = Pages::new()
            .route("/health", get(async || "ok"))
            .fallback(async || ApiError::NoBackend);
        let (stop, stopped) = oneshot::channel::<()>();
        let server = axum::serve(listener, pages).with_graceful_shutdown(async { drop(stopped.await) });
        let server = tokio::spawn(async {
            // Where it cannot listen, neither can the API, which says so.
            let _ = server.await;
        });
        Ok(Waiting { stop, server })
    }

    pub async fn end(self) {
        let _ = self.stop.send(());
        let mut server = self.server;
        if tokio::time::timeout(END, &mut server).await.is_err() {
            server.abort();
        }
    }
}
