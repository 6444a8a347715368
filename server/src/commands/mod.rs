//! The commands that run until a signal, one file each, and what they share. Not here: how anything works.

pub mod backend;
pub mod edge;
pub mod replica;
pub mod router;
pub mod serve;

use anyhow::{Context, Result};
use tokio::runtime::Runtime;
use tracing::info;

use crate::config::Chosen;

/// The edge is light; more workers would take cores from the engine.
const TOKIO_WORKERS: usize = 2;

fn log(chosen: &[Chosen]) {
    for Chosen { name, value, source } in chosen {
        info!("{name} = {value} ({source})");
    }
}

fn runtime() -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder
        .worker_threads(TOKIO_WORKERS)
        .thread_name("tandem-edge")
        .enable_all()
        .build()
        .context("the async runtime")
}
