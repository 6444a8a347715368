//! `tandem serve`: one replica and the API in one process.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tandem_router::Router;
use tandem_store::Store;
use tandem_text::Tokenizer;
use tracing::info;

use super::{log, replica, runtime};
use crate::app::{self, App};
use crate::cli::{EdgeOptions, ProcessOptions, Serve, StateOptions};
use crate::config::Chosen;
use crate::layers::ApiKey;
use crate::{convert, listen};

/// What the engine may need to write a running job's state at the end.
const ENGINE_STOP: Duration = Duration::from_secs(30);

pub fn run(options: Serve, chosen: &[Chosen]) -> Result<()> {
    log(chosen);
    let Serve {
        model,
        edge,
        state: StateOptions { data_dir },
        process: ProcessOptions {
            shutdown_grace,
            config: _,
        },
    } = options;
    let EdgeOptions {
        host,
        port,
        api_key,
        lora_modules,
        max_waiting,
    } = edge;
    let address = SocketAddr::new(host, port);
    let listener = listen::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let address = listener.local_addr().context("the socket has no address")?;
    std::fs::create_dir_all(&data_dir)
        .with_context(|| format!("cannot make --data-dir {}", data_dir.display()))?;
    let (folder, name) = replica::model(&model, &data_dir)?;

    let tokenizer = Tokenizer::from_folder(&folder).context("the model's tokenizer")?;
    let replica = tandem_backend::start(replica::engine_options(&model, &folder)?).context("the model")?;
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
        let store = Store::open(&data_dir).await.context("the data folder")?;
        let router = Router::open(store, tokenizer, replica, config).await?;
        let app = App::new(router).context("the metrics")?;
        let routes = app::routes(app.clone(), api_key.iter().map(|key| ApiKey::new(key)).next());
        // The one line on standard output: scripts and tests wait for it.
        println!("tandem is listening on http://{address}");
        listen::serve(listener, routes, app, Duration::from_secs(shutdown_grace)).await?;
        drop(tokio::time::timeout(ENGINE_STOP, commands.closed()).await);
        info!("stopped");
        Ok(())
    })
}
