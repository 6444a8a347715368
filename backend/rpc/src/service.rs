//! The replica's side: sessions of routers over one `ReplicaHandle`, and how they end. Not here: one session's streams
//! (`session`), the socket's address (server).

mod door;
mod learners;
mod session;
mod source;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use tandem_core::id::{AdapterDigest, AdapterRef, RequestId};
use tandem_core::job::{JobEvent, JobSpec};
use tandem_core::learner::Saved;
use tandem_core::message::Fault;
use tandem_core::replica::ReplicaHandle;
use tandem_core::stats::Stats;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Response, Status, Streaming};

use crate::files::ModelFiles;
use crate::token::Token;
use crate::wire::replica_server::{Replica, ReplicaServer};
use crate::wire::{DescribeRequest, Description, File, Up};
use crate::{
    CONNECTION_WINDOW_BYTES, KEEP_ALIVE_PATIENCE, KEEP_ALIVE_PERIOD, MESSAGE_BYTES, STREAM_WINDOW_BYTES,
    UP_BYTES, codec,
};
pub use door::Acceptor;
use door::Caller;

/// Between two looks at the engine's numbers.
const STATS_PERIOD: Duration = Duration::from_millis(100);

/// Where this machine keeps what commands only name: adapters by digest, jobs by id.
pub trait Hooks: Send + Sync + 'static {
    /// The adapter with a folder of this machine. Ready at once when the folder is here.
    fn adapter(&self, digest: AdapterDigest) -> BoxFuture<'static, Result<AdapterRef, Fault>>;
    /// The file that a router names by its path below the data folder, on this machine.
    fn file(&self, path: &Path) -> BoxFuture<'static, Result<PathBuf, Fault>>;
    /// The folder that a router names by its path below the data folder, on this machine, to be written to.
    fn folder(&self, path: &Path) -> BoxFuture<'static, Result<PathBuf, Fault>>;
    /// Before it is told: what was written to such a folder must be where the router finds it.
    fn saved(&self, folder: &Path, saved: &Saved) -> BoxFuture<'static, Result<(), Fault>>;
    /// The job with its folder on this machine, datasets and last state in it.
    fn job(&self, spec: JobSpec) -> BoxFuture<'static, Result<JobSpec, String>>;
    /// Before an event leaves: what it names must be where other machines can find it. An error ends the session's
    /// interest in the job, which goes on from what was kept before.
    fn job_event(&self, spec: &JobSpec, event: JobEvent) -> BoxFuture<'static, Result<JobEvent, String>>;
}

/// One replica, served. Cheap to clone.
#[derive(Clone)]
pub struct Service(Arc<Shared>);

pub(crate) struct Shared {
    replica: ReplicaHandle,
    hooks: Box<dyn Hooks>,
    description: Description,
    /// Routers count their requests each from 0; the engine's ids are the service's. So it is with learners.
    next_request: AtomicU64,
    next_learner: AtomicU64,
    /// Requests that have not ended.
    open: AtomicUsize,
    closed_one: Notify,
    draining: AtomicBool,
    /// Taken by each job while it is fetched and trains.
    jobs: tokio::sync::Semaphore,
}

/// A request that has not ended.
pub(crate) struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
        self.0.closed_one.notify_waiters();
    }
}

impl Service {
    /// `model_name`: what routers call the base model unless they are told otherwise.
    pub fn new(replica: ReplicaHandle, hooks: impl Hooks, files: &ModelFiles, model_name: &str) -> Service {
        let file = |(name, content): (&str, &[u8])| File {
            name: name.to_owned(),
            content: content.to_owned(),
        };
        let mut info = replica.info.clone();
        // A path of this machine means nothing elsewhere.
        info.model_folder = model_name.into();
        Service(Arc::new(Shared {
            description: Description {
                model_name: model_name.to_owned(),
                info_json: codec::json(&info),
                files: files.iter().map(file).collect(),
            },
            replica,
            hooks: Box::new(hooks),
            next_request: AtomicU64::new(0),
            next_learner: AtomicU64::new(0),
            open: AtomicUsize::new(0),
            closed_one: Notify::new(),
            draining: AtomicBool::new(false),
            jobs: tokio::sync::Semaphore::new(info.max_training_jobs as usize),
        }))
    }

    /// From now on requests are refused as `ShuttingDown`, and routers are told to send none.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    /// Until no request is under way.
    pub async fn idle(&self) {
        loop {
            let closed = self.0.closed_one.notified();
            if self.open_requests() == 0 {
                return;
            }
            closed.await;
        }
    }

    pub fn open_requests(&self) -> usize {
        self.0.open.load(Ordering::Acquire)
    }

    pub fn stats(&self) -> Stats {
        self.0.stats()
    }
}

impl Shared {
    fn stats(&self) -> Stats {
        Stats {
            draining: self.draining.load(Ordering::Acquire),
            ..self.replica.stats.borrow().clone()
        }
    }

    fn next_learner(&self) -> u64 {
        self.next_learner.fetch_add(1, Ordering::Relaxed)
    }

    fn open(self: &Arc<Shared>) -> (RequestId, Open) {
        self.open.fetch_add(1, Ordering::AcqRel);
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        (RequestId(id), Open(self.clone()))
    }
}

#[tonic::async_trait]
impl Replica for Service {
    type SessionStream = session::Outgoing;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<Description>, Status> {
        Ok(Response::new(self.0.description.clone()))
    }

    async fn session(&self, request: Request<Streaming<Up>>) -> Result<Response<session::Outgoing>, Status> {
        let peer = request
            .extensions()
            .get::<Caller>()
            .map(|caller| caller.address.to_string())
            .unwrap_or_default();
        tracing::info!(peer, "a router came");
        let (notes, inbox) = mpsc::channel(session::NOTES);
        let links = session::Links::default();
        tokio::spawn(session::hear(
            self.0.clone(),
            request.into_inner(),
            links.clone(),
            notes,
            peer,
        ));
        Ok(Response::new(session::Outgoing::new(
            self.0.clone(),
            inbox,
            links,
        )))
    }
}

/// Serves until `until`, then until all sessions have ended; they do when the engine is gone. `pages` answer plain HTTP
/// on the same port, to everybody; who shows no `token` where there is one cannot do more. With `tls` nothing is plain.
pub async fn serve(
    listener: TcpListener,
    service: Service,
    token: Option<Token>,
    tls: Option<Acceptor>,
    pages: axum::Router,
    until: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let replica = ReplicaServer::new(service)
        .max_decoding_message_size(UP_BYTES)
        .max_encoding_message_size(MESSAGE_BYTES);
    let replica = InterceptedService::new(replica, move |request: Request<()>| {
        token.as_ref().map_or(Ok(()), |token| token.check(&request))?;
        if let Some(caller) = request.extensions().get::<Caller>() {
            caller.let_stay();
        }
        Ok(request)
    });
    tonic::transport::Server::builder()
        .accept_http1(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE_PERIOD))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_PATIENCE))
        .add_routes(Routes::from(pages).add_service(replica))
        .serve_with_incoming_shutdown(door::connections(listener, tls), until)
        .await
}
