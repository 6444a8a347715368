//! The router's side: a URL becomes a `ReplicaHandle` whose commands travel. The session is one task that reads; what is
//! sent is read off the command channel by the connection itself. Not here: who is asked again when it breaks (router).

mod outgoing;
mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_core::histogram::Histogram;
use tandem_core::message::Fault;
use tandem_core::replica::{COMMAND_QUEUE, ReplicaHandle, ReplicaInfo};
use tandem_core::stats::Stats;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tonic::transport::Endpoint;
use tonic::{Request, Status, Streaming};

use crate::codec::{self, Damaged};
use crate::files::ModelFiles;
use crate::tls::ClientTls;
use crate::token::Token;
use crate::wire::replica_client::ReplicaClient;
use crate::wire::up::Say;
use crate::wire::{DescribeRequest, Description, Down, Up};
use crate::{
    CONNECTION_WINDOW_BYTES, KEEP_ALIVE_PATIENCE, KEEP_ALIVE_PERIOD, MESSAGE_BYTES, STREAM_WINDOW_BYTES,
};
use outgoing::Outgoing;
use table::Table;

const CONNECT_PATIENCE: Duration = Duration::from_secs(3);
/// For the description and the session's first word; a tokenizer has megabytes.
const OPEN_PATIENCE: Duration = Duration::from_secs(20);
/// Between two measurements of the hop.
const PING_PERIOD: Duration = Duration::from_millis(100);
/// An engine that has work says something after each turn. One that does not for so long hangs, though its machine answers pings:
/// a device that never returns, most likely. Long, because a turn of a large model on a small machine takes minutes.
const TURN_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 600 });

/// A replica elsewhere, and what is known of it. The session ends with `Command::Stop`, with the last handle, or with
/// the connection; the handle's channels close then.
pub struct Remote {
    pub replica: ReplicaHandle,
    pub files: ModelFiles,
    /// What the backend calls the base model.
    pub model_name: String,
    /// Half the time from a probe to its answer over the session, through the same queues that events take.
    pub hop: Arc<Histogram>,
}

/// The whole chain of causes is in the message.
#[derive(Debug, thiserror::Error)]
#[error("{url}: {message}")]
pub struct ConnectError {
    pub url: String,
    pub message: String,
}

/// Opens a session with the backend at `url` (`http://host:port`, or `https://host:port` with `tls`), showing it the token.
/// `root`: the data folder here, which may be another path there.
pub async fn connect(
    url: &str,
    token: Option<&Token>,
    tls: Option<&ClientTls>,
    root: &Path,
) -> Result<Remote, ConnectError> {
    let opened = open(url, token.cloned(), tls, root.to_owned());
    let opened = tokio::time::timeout(CONNECT_PATIENCE + OPEN_PATIENCE, opened).await;
    let opened = opened.unwrap_or_else(|_| Err(format!("no session after {OPEN_PATIENCE:?}")));
    opened.map_err(|message| ConnectError {
        url: url.to_owned(),
        message,
    })
}

async fn open(
    url: &str,
    token: Option<Token>,
    tls: Option<&ClientTls>,
    root: PathBuf,
) -> Result<Remote, String> {
    let mut endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| chain(&error))?;
    if let Some(tls) = tls.filter(|_| url.starts_with("https://")) {
        endpoint = endpoint.tls_config(tls.config()).map_err(|error| chain(&error))?;
    }
    let channel = endpoint
        .connect_timeout(CONNECT_PATIENCE)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE_PERIOD)
        .keep_alive_timeout(KEEP_ALIVE_PATIENCE)
        .keep_alive_while_idle(true)
        .connect()
        .await
        .map_err(|error| chain(&error))?;
    let show = move |mut request: Request<()>| {
        if let Some(token) = &token {
            token.show(&mut request);
        }
        Ok(request)
    };
    let mut client = ReplicaClient::with_interceptor(channel, show)
        .max_decoding_message_size(MESSAGE_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);
    let description = client.describe(DescribeRequest {}).await.map_err(said)?;
    let Description {
        model_name,
        info_json,
        files,
    } = description.into_inner();
    let info: ReplicaInfo = codec::from_json(&info_json).map_err(|error| error.to_string())?;
    let files = ModelFiles::received(files.into_iter().map(|file| (file.name, file.content)));

    let (commands, inbox) = mpsc::channel(COMMAND_QUEUE);
    let (control, wishes) = mpsc::unbounded_channel();
    let table = Arc::new(Table::new(info.hidden_size));
    let outgoing = Outgoing::new(inbox, wishes, table.clone(), root);
    let mut inbound = client.session(outgoing).await.map_err(said)?.into_inner();
    // The first word is the replica's numbers: nobody chooses by numbers that were never said.
    let first = inbound.message().await.map_err(said)?;
    let first = first
        .and_then(|down| down.stats_json)
        .ok_or("the backend ended the session")?;
    let first: Stats = codec::from_json(&first).map_err(|error| error.to_string())?;
    let (publish, stats) = watch::channel(first);
    let hop = Arc::new(Histogram::default());
    let session = Session {
        table,
        control,
        stats: publish,
        hop: hop.clone(),
        ping: None,
        pings: 0,
        heard: Instant::now(),
    };
    tokio::spawn(session.run(inbound, url.to_owned()));
    Ok(Remote {
        replica: ReplicaHandle {
            info,
            commands,
            stats,
        },
        files,
        model_name,
        hop,
    })
}

struct Session {
    table: Arc<Table>,
    /// The only strong sender: when the session ends, the outgoing stream does.
    control: mpsc::UnboundedSender<Up>,
    stats: watch::Sender<Stats>,
    hop: Arc<Histogram>,
    /// Under way.
    ping: Option<(u64, Instant)>,
    pings: u64,
    /// When the engine last said something, or had nothing to say.
    heard: Instant,
}

impl Session {
    async fn run(mut self, mut inbound: Streaming<Down>, url: String) {
        let mut probe = tokio::time::interval(PING_PERIOD);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut check = tokio::time::interval(TURN_PATIENCE / 10);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let why = loop {
            tokio::select! {
                biased;
                message = inbound.message() => match message {
                    Ok(Some(down)) => match self.take(down) {
                        Ok(()) => {}
                        Err(error) => break error.to_string(),
                    },
                    Ok(None) => break "the backend ended the session".to_owned(),
                    Err(status) => break said(status),
                },
                _ = check.tick() => if self.hangs() {
                    break format!("its engine has taken no turn for {TURN_PATIENCE:?}");
                },
                _ = probe.tick(), if self.ping.is_none() => self.probe(),
            }
        };
        tracing::info!(%url, why, "a session with a backend is over");
        self.table.close(&Fault::ReplicaLost(why));
    }

    fn take(&mut self, down: Down) -> Result<(), Damaged> {
        let now = Instant::now();
        let Down {
            events,
            job_events,
            adapters,
            closed,
            stats_json,
            pong,
            learned,
        } = down;
        if !events.is_empty() || stats_json.is_some() {
            self.heard = now;
        }
        // Before what closes streams.
        self.table.learned(learned)?;
        self.table
            .deliver(events, job_events, adapters, closed, &self.control)?;
        if let Some(stats) = stats_json {
            self.stats.send_replace(codec::from_json(&stats)?);
        }
        if let Some((number, sent)) = self.ping
            && pong.contains(&number)
        {
            self.hop.observe((now - sent) / 2);
            self.ping = None;
        }
        Ok(())
    }

    fn hangs(&mut self) -> bool {
        if !self.table.awaits_events() {
            self.heard = Instant::now();
        }
        self.heard.elapsed() > TURN_PATIENCE
    }

    fn probe(&mut self) {
        self.pings += 1;
        self.ping = Some((self.pings, Instant::now()));
        table::send(&self.control, Say::Ping(self.pings));
    }
}

fn said(status: Status) -> String {
    match std::error::Error::source(&status) {
        Some(source) => format!("{}: {}", status.message(), chain(source)),
        None => status.message().to_owned(),
    }
}

/// An error and what caused it: gRPC's own text is "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
