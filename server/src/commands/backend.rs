//! `tandem backend`: one replica for routers, over gRPC; /health, /ready and /metrics on the same port. It ends by a
//! signal, after what runs has ended, or with its engine: whoever started it starts it again.

mod hooks;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::Router as Pages;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tandem_core::replica::{Command, ReplicaHandle};
use tandem_rpc::{Acceptor, Service};
use tandem_store::Artifacts;
use tandem_text::Tokenizer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::greeting::{Door, Greeting};
use super::{block_on, edge, log, replica};
use crate::cli::{ArtifactOptions, Backend, ProcessOptions};
use crate::config::Given;
use crate::exposure;
use crate::listen::{self, Signals};
use crate::metrics::Metrics;
use crate::ranks::{self, Followed};
use crate::tls::{self, Tls};
use hooks::Kept;

/// What the engine may need to write a running job's state at the end.
const ENGINE_STOP: Duration = Duration::from_secs(30);
/// What the last messages may need to reach their routers.
const GOODBYE: Duration = Duration::from_secs(5);

pub fn run(options: Backend, given: &Given) -> Result<()> {
    log(given);
    let Backend {
        listen: address,
        token,
        ssl,
        model,
        artifacts: ArtifactOptions {
            data_dir,
            artifact_url,
        },
        process:
            ProcessOptions {
                shutdown_grace,
                log_format: _,
                otlp_traces_endpoint: _,
                config: _,
            },
    } = options;
    let token = exposure::token(&token)?;
    let files = tls::Files::given(&ssl)?;
    let knows_routers = files.as_ref().is_some_and(tls::Files::know_clients);
    exposure::check_backend(address, token.is_some() || knows_routers)?;
    let started = ranks::started()?;
    if let Followed::ToTheEnd = ranks::followed(&model, &started, &data_dir)? {
        return Ok(());
    }
    let tls = files.map(Tls::open).transpose()?;
    let is_secure = tls.is_some();
    let acceptor = tls.map(|tls| -> Acceptor { Arc::new(move || tls.acceptor()) });
    let listener = listen::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let address = listener.local_addr().context("the socket has no address")?;
    edge::make_data_dir(&data_dir)?;
    let artifacts = Artifacts::open(artifact_url.as_deref(), &data_dir).context("the artifact store")?;
    let (folder, names) = replica::model(&model, &data_dir)?;
    let (name, others) = names.split_first().expect("a model has a name");
    if !others.is_empty() {
        info!(
            name,
            others = others.join(", "),
            "a backend has one name; routers serve it by the others, too, if they are told them"
        );
    }
    let files = replica::files(&folder)?;
    let tokenizer = Tokenizer::open(&folder).context("the model's tokenizer")?;
    let team = ranks::team(&model, started)?;
    let engine = replica::engine_options(&model, &folder, &data_dir, team, &tokenizer)?;
    let replica =
        tandem_backend::start(engine).with_context(|| format!("the model in {}", folder.display()))?;
    let metrics = Metrics::new(name, replica.info.max_loras).context("the metrics")?;
    let service = Service::new(replica.clone(), Kept(artifacts), &files, name);
    block_on(async {
        let signals = Signals::new()?;
        let listener = TcpListener::from_std(listener)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let pages = pages(service.clone(), metrics);
        let server = tandem_rpc::serve(listener, service.clone(), token, acceptor, pages, async {
            drop(stopped.await)
        });
        let mut server = tokio::spawn(server);
        let greeting = Greeting {
            address,
            names: &names,
            replica: &replica.info,
            door: Door::Grpc { is_secure },
        };
        greeting.say();
        let end = until_the_end(signals, &service, replica, Duration::from_secs(shutdown_grace));
        let end = tokio::select! {
            end = end => end,
            ended = &mut server => {
                ended??;
                bail!("the server ended by itself");
            }
        };
        // All sessions end now that the engine is gone; their last messages go out first.
        let _ = stop.send(());
        match tokio::time::timeout(GOODBYE, server).await {
            Ok(ended) => ended??,
            Err(_) => warn!("a router did not read its last messages in {GOODBYE:?}"),
        }
        info!("stopped");
        end
    })
}

/// Returns when the engine has ended: by a signal and in order, or by itself, which is an error.
async fn until_the_end(
    mut signals: Signals,
    service: &Service,
    replica: ReplicaHandle,
    grace: Duration,
) -> Result<()> {
    let signal = tokio::select! {
        signal = signals.next() => signal,
        () = replica.commands.closed() => bail!("the engine ended"),
    };
    let open = service.open_requests();
    info!(
        signal,
        grace_s = grace.as_secs(),
        open,
        "stopping: no new requests, running ones end"
    );
    service.drain();
    tokio::select! {
        () = service.idle() => {}
        () = tokio::time::sleep(grace) => warn!(open = service.open_requests(), "the grace is over; what still runs is cut"),
        signal = signals.next() => warn!(signal, "a second signal; what still runs is cut"),
    }
    // An engine that is gone needs no Stop.
    let _ = replica.commands.send(Command::Stop).await;
    let mut stats = replica.stats;
    let gone = async { while stats.changed().await.is_ok() {} };
    if tokio::time::timeout(ENGINE_STOP, gone).await.is_err() {
        warn!("the engine did not stop in {ENGINE_STOP:?}");
    }
    Ok(())
}

struct Numbers {
    service: Service,
    metrics: Metrics,
}

fn pages(service: Service, metrics: Metrics) -> Pages {
    Pages::new()
        .route("/health", get(async || "ok"))
        .route("/ready", get(ready))
        .route("/version", get(async || env!("CARGO_PKG_VERSION")))
        .route("/metrics", get(numbers))
        .with_state(Arc::new(Numbers { service, metrics }))
}

/// Routers are told over their sessions; this is for whoever starts and stops backends.
async fn ready(State(numbers): State<Arc<Numbers>>) -> (StatusCode, &'static str) {
    match numbers.service.is_draining() {
        true => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        false => (StatusCode::OK, "ready"),
    }
}

async fn numbers(State(numbers): State<Arc<Numbers>>) -> impl IntoResponse {
    let Numbers { service, metrics } = &*numbers;
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, metrics.text(&service.stats()))
}
