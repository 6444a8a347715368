//! The process before anything else runs: environment that libraries read when they are loaded, and the log.

use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use reqwest::Url;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use crate::config::LOG_VARIABLE;
use crate::gpu_environment;
use crate::otlp::{self, Sending};
use crate::values::LogFormat;

/// libgomp, oneDNN and glibc read these when they are loaded, before main. A value that is set stays.
const ENVIRONMENT: [(&str, &str); 7] = [
    // An OpenMP thread that spins takes the core from the one that works: 8 ms instead of 2 ms.
    ("OMP_WAIT_POLICY", "PASSIVE"),
    // oneDNN keeps a primitive of 0.7 MB for every row count it meets.
    ("LRU_CACHE_CAPACITY", "32"),
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32"),
    // Tensors of a step come and go: keep their memory instead of asking the kernel for zeroed pages each time.
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("MALLOC_TRIM_THRESHOLD_", "536870912"),
    ("MALLOC_ARENA_MAX", "4"),
    // The tokenizer would start a thread pool of its own.
    ("TOKENIZERS_PARALLELISM", "false"),
];

/// Starts this program again, once, with what is missing. Returns when nothing is.
pub fn set_environment() -> io::Result<()> {
    let mut missing: Vec<_> = ENVIRONMENT
        .into_iter()
        .chain(gpu_environment::wanted(Path::new("/")))
        .collect();
    missing.retain(|(name, _)| std::env::var_os(name).is_none());
    if missing.is_empty() {
        return Ok(());
    }
    let mut args = std::env::args_os();
    let mut command = Command::new(std::env::current_exe()?);
    command.arg0(args.next().as_deref().unwrap_or(OsStr::new("tandem")));
    Err(command.args(args).envs(missing).exec())
}

/// Refuses an environment in which the GPU runtime would fail later, and strangely, and kernels that do not exist. After `set_environment`.
pub fn check_environment() -> io::Result<()> {
    gpu_environment::check_visible(Path::new("/"), |name| std::env::var_os(name).is_some())
        .and_then(|()| {
            gpu_environment::check_libraries(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default())
        })
        .and_then(|()| tandem_backend::check_kernels())
        .map_err(io::Error::other)
}

/// Raises the limit on open files to what the system allows: 1,024, which is what most shells give, are few connections.
pub fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        tracing::warn!(%error, "the limit on open files stays where it is");
    }
}

/// How many files, sockets among them, this process may have open.
pub fn descriptors() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// To standard error, filtered by `TANDEM_LOG` (EnvFilter's syntax), `least` without it; and traces to their collector.
pub fn start_log(format: LogFormat, least: &str, traces: Option<Url>) -> Result<Option<Sending>> {
    let filter = match std::env::var(LOG_VARIABLE) {
        Ok(text) => EnvFilter::try_new(text).context("TANDEM_LOG")?,
        Err(_) => EnvFilter::new(least),
    };
    let log = fmt::layer().with_writer(io::stderr);
    let log = match format {
        LogFormat::Text => log
            .with_target(false)
            .with_ansi(io::stderr().is_terminal())
            .boxed(),
        LogFormat::Json => log.json().flatten_event(true).boxed(),
    };
    let (traces, sending) = traces
        .map(otlp::start)
        .transpose()
        .context("--otlp-traces-endpoint")?
        .unzip();
    tracing_subscriber::registry()
        .with(log.with_filter(filter))
        .with(traces.map(|traces| traces.with_filter(otlp::filter())))
        .init();
    Ok(sending)
}
