//! The API in front of a fleet, whichever fleet it is: what `serve` and `router` share. Not here: routes, the fleet.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tandem_router::{Fleet, Router};
use tandem_store::{Places, Store};
use tandem_text::Tokenizer;
use tracing::info;

use crate::app::{self, App};
use crate::cli::{ArtifactOptions, EdgeOptions, ProcessOptions, StateOptions};
use crate::layers::ApiKeys;
use crate::{convert, listen};

/// A socket that is bound, so that a taken port is found before a model is loaded.
pub struct Door {
    listener: TcpListener,
    address: SocketAddr,
}

impl Door {
    pub fn open(address: SocketAddr) -> Result<Door> {
        let listener = listen::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        let address = listener.local_addr().context("the socket has no address")?;
        Ok(Door { listener, address })
    }
}

pub fn make_data_dir(data_dir: &Path) -> Result<()> {
    std::fs::create_dir_all(data_dir)
        .with_context(|| format!("cannot make --data-dir {}", data_dir.display()))
}

/// What `run` serves.
pub struct Edge {
    pub door: Door,
    pub fleet: Fleet,
    pub tokenizer: Tokenizer,
    /// Of the base model.
    pub name: String,
    pub options: EdgeOptions,
    pub state: StateOptions,
    pub process: ProcessOptions,
}

/// Until a signal, and the grace after it.
pub async fn run(edge: Edge) -> Result<()> {
    let Edge {
        door: Door { listener, address },
        fleet,
        tokenizer,
        name,
        options,
        state,
        process,
    } = edge;
    let EdgeOptions {
        host: _,
        port: _,
        api_key,
        lora_modules,
        max_waiting,
        replica_wait: _,
    } = options;
    let StateOptions {
        artifacts: ArtifactOptions {
            data_dir,
            artifact_url,
        },
        database_url,
    } = state;
    let places = Places {
        database_url,
        artifact_url,
        ..Places::local(data_dir)
    };
    let ProcessOptions {
        shutdown_grace,
        config: _,
    } = process;
    let config = tandem_router::Config {
        served_model_name: name,
        max_waiting,
        max_choices: convert::sampling::MAX_CHOICES,
        lora_modules,
        ..tandem_router::Config::default()
    };
    let store = Store::open(&places).await.context("the store")?;
    let router = Router::open(store, tokenizer, fleet, config).await?;
    let app = App::new(router).context("the metrics")?;
    let routes = app::routes(app.clone(), ApiKeys::new(api_key));
    // The one line on standard output: scripts and tests wait for it.
    println!("tandem is listening on http://{address}");
    listen::serve(listener, routes, app, Duration::from_secs(shutdown_grace)).await?;
    info!("stopped");
    Ok(())
}
