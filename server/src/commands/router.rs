//! `tandem router`: the API in front of backends. What it must know of the model it asks them.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tandem_router::Fleet;
use tandem_router::fleet::Member;
use tracing::info;

use super::edge::{self, Behind, Door, Edge};
use super::waiting::Waiting;
use super::{block_on, log, replica};
use crate::cli::Router;
use crate::config::Given;
use crate::exit::WrongSetting;
use crate::exposure;
use crate::listen::Signals;

pub fn run(options: Router, given: &Given) -> Result<()> {
    log(given);
    let Router {
        backend,
        token,
        backend_ssl,
        served_model_name,
        edge: options,
        state,
        process,
    } = options;
    let backends: Vec<&str> = backend
        .iter()
        .map(|url| url.trim())
        .filter(|url| !url.is_empty())
        .collect();
    ensure!(
        !backends.is_empty(),
        WrongSetting(
            "--backend is missing: the address of at least one `tandem backend`, such as http://127.0.0.1:8001"
                .to_owned()
        )
    );
    let backends = backends.into_iter().map(address).collect::<Result<Vec<_>>>()?;
    let tls = exposure::backend_tls(&backend_ssl, &backends)?;
    let token = exposure::token(&token)?;
    let door = Door::open(SocketAddr::new(options.host, options.port), &options, &state)?;
    edge::make_data_dir(&state.artifacts.data_dir)?;
    let adapters = edge::adapters(&options)?;
    let members: Vec<Member> = backends
        .into_iter()
        .map(|url| Member::remote(&url, token.clone(), tls.clone(), &state.artifacts.data_dir))
        .collect();
    block_on(async {
        let mut signals = Signals::new()?;
        let waiting = Waiting::begin(&door, &options)?;
        let fleet = tokio::select! {
            fleet = Fleet::open(members, Duration::from_secs(options.replica_wait)) => fleet,
            signal = signals.next() => {
                info!(signal, "stopped before a backend answered");
                return Ok(());
            }
        };
        waiting.end().await;
        drop(signals);
        let facts = fleet.facts();
        let folder = facts
            .files
            .materialise(&state.artifacts.data_dir)
            .context("the model's tokenizer")?;
        let tokenizer = edge::tokenizer(&folder, &options)?;
        let names = replica::names(served_model_name, || facts.model_name.clone());
        edge::run(Edge {
            door,
            behind: Behind {
                fleet,
                tokenizer,
                base: None,
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

/// Of a backend, with one name for TLS.
fn address(url: &str) -> Result<String> {
    let address = match url.strip_prefix("grpcs://") {
        Some(host) => format!("https://{host}"),
        None => url.to_owned(),
    };
    let host = address
        .strip_prefix("http://")
        .or(address.strip_prefix("https://"));
    ensure!(
        host.is_some_and(|host| !host.is_empty()),
        WrongSetting(format!(
            "--backend {url}: an address such as http://127.0.0.1:8001 is wanted, or https:// where it serves over TLS"
        ))
    );
    Ok(address)
}
