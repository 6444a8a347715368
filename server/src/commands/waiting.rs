//! What a router answers while no backend has told it which model it serves: that it lives, and that it waits. Not here: the
//! API.

use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router as Pages;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::edge::Door;
use crate::cli::EdgeOptions;
use crate::error::ApiError;
use crate::listen;

/// What the last answers may take.
const END: Duration = Duration::from_secs(1);

pub struct Waiting {
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
}

impl Waiting {
    /// Behind the door that the API is served by afterwards.
    pub fn begin(door: &Door, options: &EdgeOptions) -> Result<Waiting> {
        let listener = door.listener().try_clone().and_then(TcpListener::from_std);
        let listener = listener.context("the socket")?;
        let pages = Pages::new()
            .route("/health", get(async || "ok"))
            .fallback(async || ApiError::NoBackend);
        let (stop, stopping) = watch::channel(false);
        let limits = options.connections.limits();
        let server = tokio::spawn(listen::accept(
            listener,
            door.site(pages, options),
            limits,
            stopping,
        ));
        Ok(Waiting { stop, server })
    }

    pub async fn end(self) {
        self.stop.send_replace(true);
        let mut server = self.server;
        if tokio::time::timeout(END, &mut server).await.is_err() {
            server.abort();
        }
    }
}
