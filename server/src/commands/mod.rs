//! The commands, one file each, and what those share that run until a signal. Not here: how anything works.

pub mod adapters;
pub mod backend;
pub mod backup;
pub mod download;
pub mod edge;
mod greeting;
pub mod keys;
pub mod merge;
pub mod quantize;
pub mod replica;
pub mod router;
pub mod serve;
mod waiting;

use std::time::Duration;

use anyhow::{Context, Result};
use tracing::{info, warn};

use crate::config::{Chosen, Given, Source};

/// The edge is light; more workers would take cores from the engine.
const TOKIO_WORKERS: usize = 2;
/// What threads at work on a file or a text may take to end, once nobody waits for them.
const BLOCKED_GRACE: Duration = Duration::from_secs(1);

/// What was given, where it differs from the defaults.
fn log(given: &Given) {
    for Chosen { name, value, source } in &given.options {
        let source = match source {
            Source::Flag => "flag",
            Source::Environment => "environment",
            Source::File => "file",
        };
        info!(option = name, value, source, "given");
    }
    for (name, why) in &given.harmless {
        info!(option = name, why, "not needed");
    }
    if !given.unread.is_empty() {
        let each = given
            .unread
            .iter()
            .map(|(name, instead)| format!("{name} ({instead})"));
        warn!(
            "variables of other servers are not read: {}",
            each.collect::<Vec<_>>().join("; ")
        );
    }
}

/// Runs `future` to its end. A thread that blocks then, at a large text or a template without an end, ends with the process.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(TOKIO_WORKERS)
        .thread_name("tandem-edge")
        .enable_all()
        .build()
        .context("the async runtime")?;
    let done = runtime.block_on(future);
    runtime.shutdown_timeout(BLOCKED_GRACE);
    done
}
