//! `tandem serve`: one replica and the API in one process. A fleet of one: a replica that is lost is started again.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use tandem_router::Fleet;

use super::edge::{self, Behind, Door, Edge};
use super::{block_on, log, replica};
use crate::cli::Serve;
use crate::config::Given;
use crate::ranks::{self, Followed};

pub fn run(options: Serve, given: &Given) -> Result<()> {
    log(given);
    let Serve {
        model,
        edge: options,
        state,
        process,
    } = options;
    let started = ranks::started()?;
    if let Followed::ToTheEnd = ranks::followed(&model, &started, &state.artifacts.data_dir)? {
        return Ok(());
    }
    let door = Door::open(SocketAddr::new(options.host, options.port), &options, &state)?;
    edge::make_data_dir(&state.artifacts.data_dir)?;
    let adapters = edge::adapters(&options)?;
    let (folder, names) = replica::model(&model, &state.artifacts.data_dir)?;
    let tokenizer = edge::tokenizer(&folder, &options)?;
    let engine = replica::engine_options(
        &model,
        &folder,
        &state.artifacts.data_dir,
        ranks::team(&model, started)?,
        &tokenizer,
    )?;
    let member = replica::member(engine, names[0].clone())?;
    block_on(async {
        edge::run(Edge {
            door,
            behind: Behind {
                fleet: Fleet::open(vec![member], Duration::from_secs(options.replica_wait)).await,
                tokenizer,
                base: Some(folder),
                names,
                adapters,
            },
            options,
            state,
            process,
        })
        .await
    })
}
