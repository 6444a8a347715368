//! The binary `tandem`: which command, and the wiring of `serve`. Not here: how anything works.

mod app;
mod cli;
mod config;
mod convert;
mod demo;
mod doctor;
mod error;
mod extract;
mod health;
mod http;
mod id;
mod layers;
mod listen;
mod metrics;
mod process;
mod sse;
mod train;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use tandem_router::Router;
use tandem_store::{Places, Store};
use tandem_text::Tokenizer;
use tokio::runtime::Runtime;
use tracing::info;

use crate::app::App;
use crate::cli::{Command, Serve};
use crate::config::{Chosen, ConfigError, Parsed};
use crate::layers::ApiKey;

/// The edge is light; more workers would take cores from the engine.
const TOKIO_WORKERS: usize = 2;
/// What the engine may need to write a running job's state at the end.
const ENGINE_STOP: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let outcome =
        process::set_environment().context("cannot start again with the environment libtorch needs");
    match outcome.and_then(|()| run()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tandem: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let variables = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
    let Parsed { cli, chosen } = match config::parse(std::env::args_os(), variables) {
        Err(ConfigError::Usage(usage)) => usage.exit(),
        parsed => parsed?,
    };
    process::start_log().context("TANDEM_LOG")?;
    match cli.command {
        Command::Serve(options) => serve(*options, &chosen)?,
        Command::Train(train) => train::run(&train.settings)?,
        Command::Doctor => print!("{}", doctor::report()),
        Command::Openapi => print!("{}", app::document()),
        Command::Health(health) => {
            let line =
                health::ask(&health).with_context(|| format!("nobody answers on port {}", health.port))?;
            println!("{line}");
            return Ok(if health::is_well(&line) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn serve(options: Serve, chosen: &[Chosen]) -> Result<()> {
    for Chosen { name, value, source } in chosen {
        info!("{name} = {value} ({source})");
    }
    let address = SocketAddr::new(options.host, options.port);
    let listener = listen::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let address = listener.local_addr().context("the socket has no address")?;
    let data_dir = &options.data_dir;
    std::fs::create_dir_all(data_dir)
        .with_context(|| format!("cannot make --data-dir {}", data_dir.display()))?;
    let (folder, name) = model(&options)?;

    let tokenizer = Tokenizer::from_folder(&folder).context("the model's tokenizer")?;
    let replica = tandem_backend::start(engine_options(&options, &folder)?).context("the model")?;
    let Serve {
        lora_modules,
        max_waiting,
        api_key,
        shutdown_grace,
        ..
    } = options.clone();
    let config = tandem_router::Config {
        served_model_name: name,
        max_waiting,
        max_choices: convert::sampling::MAX_CHOICES,
        lora_modules,
        ..tandem_router::Config::default()
    };
    let runtime = runtime()?;
    let commands = replica.commands.clone();
    runtime.block_on(async {
        let store = Store::open(&places(&options)).await.context("the store")?;
        let router = Router::open(store, tokenizer, replica, config).await?;
        let app = App::new(router).context("the metrics")?;
        let routes = app::routes(app.clone(), api_key.as_deref().map(ApiKey::new));
        // The one line on standard output: scripts and tests wait for it.
        println!("tandem is listening on http://{address}");
        listen::serve(listener, routes, app, Duration::from_secs(shutdown_grace)).await?;
        drop(tokio::time::timeout(ENGINE_STOP, commands.closed()).await);
        info!("stopped");
        Ok(())
    })
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

fn places(options: &Serve) -> Places {
    Places {
        database_url: options.database_url.clone(),
        artifact_url: options.artifact_url.clone(),
        ..Places::local(&options.data_dir)
    }
}

/// The base model's folder and name.
fn model(options: &Serve) -> Result<(PathBuf, String)> {
    let (folder, own_name) = match &options.model {
        Some(folder) => {
            let whole = folder
                .canonicalize()
                .with_context(|| format!("--model {}", folder.display()))?;
            let name = whole
                .file_name()
                .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
            (whole, name)
        }
        None => (
            demo::materialise(&options.data_dir).context("cannot write the demo model")?,
            demo::NAME.to_owned(),
        ),
    };
    Ok((folder, options.served_model_name.clone().unwrap_or(own_name)))
}

/// What was not asked is the backend's to choose.
fn engine_options(options: &Serve, folder: &Path) -> Result<tandem_backend::Options> {
    let mut engine = tandem_backend::Options::new(folder.to_owned());
    engine.device = tandem_backend::words::device(&options.device)?;
    engine.dtype = options.dtype.parse()?;
    engine.max_model_len = options.max_model_len;
    engine.kv_cache_bytes = options.kv_cache_memory_bytes;
    engine.threads = options.threads.map(|threads| threads as usize);
    engine.max_num_seqs = options.max_num_seqs.unwrap_or(engine.max_num_seqs);
    engine.max_num_batched_tokens = options
        .max_num_batched_tokens
        .unwrap_or(engine.max_num_batched_tokens);
    engine.max_loras = options.max_loras.unwrap_or(engine.max_loras);
    engine.max_lora_rank = options.max_lora_rank.unwrap_or(engine.max_lora_rank);
    Ok(engine)
}
