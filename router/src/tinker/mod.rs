//! Tinker: clients that train and sample call by call. A session has models, which it trains, and samplers. Every call is
//! answered at once by the id of a future (`futures`); a model's calls are done strictly in the order of their numbers
//! (`model`, `worker`); samplers answer from the base, from a snapshot of a model, from what was saved or from any adapter that
//! has a name (`sampler`, `saves`).
//! Sessions, models and snapshots live in memory and in one replica: what a client wants to keep, it saves.
//! Not here: the wire (server), the arithmetic (backend).

mod futures;
mod limits;
mod model;
mod reach;
mod sampler;
mod saves;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tandem_core::TokenId;
use tandem_core::id::AdapterDigest;
use tandem_core::learner::{LearnerId, Scores, Stepped};
use tandem_core::message::Fault;
use tandem_core::replica::ReplicaHandle;
use tandem_store::{StoreError, ids};

use crate::api::{Client, RouterError};
use crate::shares::Shares;
use crate::{Router, View};

pub use limits::Limits;
pub use model::{Call, Learning, NewModel, SamplerKind, Shape};
pub use reach::Reach;
pub use sampler::{Ask, Sampled, SamplerInfo, Samples, Stop, Top};
pub use saves::{Keep, Kept, Path};

use futures::Futures;
use model::{Model, Snapshot};
use sampler::Sampler;

/// Samplers of all sessions, and those that one has.
const MAX_ALL_SAMPLERS: usize = 200_000;
const MAX_SAMPLERS: usize = 10_000;
/// A session whose heartbeat stays away so long has ended: its models and snapshots are let go.
const SESSION_PATIENCE: Duration = Duration::from_secs(300);
/// Who finds no place may ask again after this time.
const SHARE_PATIENCE_S: u32 = 30;
/// How often that is looked at.
const SWEEP_PERIOD: Duration = Duration::from_secs(5);
/// How long one question for a future is held.
const HOLD: Duration = Duration::from_secs(40);

/// What became of a call.
#[derive(Debug)]
pub enum Outcome {
    Created { model_id: String },
    Scored { scores: Scores, shapes: Vec<Shape> },
    Stepped(Stepped),
    Saved { path: String },
    Sampler { id: String },
    Loaded { path: String, model_id: String },
    Sampled(Samples),
    Failed(Failure),
}

/// Why it failed, and whose it is to change something.
#[derive(Clone, Debug)]
pub struct Failure {
    pub message: String,
    pub by: By,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    User,
    Server,
}

impl Outcome {
    /// How much memory it takes, roughly.
    fn bytes(&self) -> usize {
        let numbers = match self {
            Outcome::Scored { scores, shapes } => {
                scores.logprobs.iter().map(|row| row.len() + 6).sum::<usize>() + 4 * shapes.len()
            }
            Outcome::Sampled(samples) => {
                let tops = |tops: &[sampler::Top]| tops.iter().map(|top| 2 * top.len() + 6).sum::<usize>();
                let of = |sequence: &Sampled| 2 * sequence.tokens.len() + tops(&sequence.tops);
                samples.sequences.iter().map(of).sum::<usize>()
                    + samples.prompt_logprobs.as_ref().map_or(0, Vec::len)
                    + samples.prompt_tops.as_deref().map_or(0, tops)
            }
            Outcome::Failed(failure) => failure.message.len() / 4,
            Outcome::Created { .. }
            | Outcome::Stepped(_)
            | Outcome::Saved { .. }
            | Outcome::Sampler { .. }
            | Outcome::Loaded { .. } => 0,
        };
        4 * numbers
    }

    pub(crate) fn user_failed(message: impl Into<String>) -> Outcome {
        Outcome::Failed(Failure {
            message: message.into(),
            by: By::User,
        })
    }

    pub(crate) fn server_failed(message: impl Into<String>) -> Outcome {
        Outcome::Failed(Failure {
            message: message.into(),
            by: By::Server,
        })
    }

    fn of_fault(fault: Fault) -> Outcome {
        match fault {
            Fault::Refused(_) | Fault::Adapter(_) | Fault::Grammar(_) => {
                Outcome::user_failed(fault.to_string())
            }
            fault => Outcome::server_failed(fault.to_string()),
        }
    }

    fn of_error(error: RouterError) -> Outcome {
        match error {
            RouterError::Engine(fault) => Outcome::of_fault(fault),
            RouterError::Busy { .. } => Outcome::server_failed(error.to_string()),
            RouterError::Store(StoreError::OverLimit(exceeded)) => Outcome::user_failed(exceeded.to_string()),
            RouterError::Store(error) => {
                tracing::error!(%error, "a call of a training client failed");
                Outcome::server_failed("the server could not use its storage")
            }
            error => Outcome::user_failed(error.to_string()),
        }
    }
}

/// A question for a future, answered.
pub enum Retrieved {
    Done(Arc<Outcome>),
    /// Ask again.
    NotYet,
}

#[derive(Default)]
pub(crate) struct Tinker {
    sessions: Mutex<BTreeMap<String, Session>>,
    futures: Futures,
    /// Numbers in a replica's memory that something may sample from.
    snapshots: Mutex<HashMap<AdapterDigest, Snapshot>>,
    learners: AtomicU64,
    /// Numbers in the calls of all models that wait.
    waiting: Arc<Shares>,
}

struct Session {
    client: Client,
    heard: Instant,
    /// Where its models live.
    replica: Option<ReplicaHandle>,
    models: BTreeMap<u32, Arc<Model>>,
    samplers: BTreeMap<u64, Arc<Sampler>>,
}

/// What a session has.
pub struct SessionView {
    pub models: Vec<String>,
    pub samplers: Vec<String>,
}

impl Tinker {
    fn sessions(&self) -> MutexGuard<'_, BTreeMap<String, Session>> {
        lock(&self.sessions)
    }

    fn snapshots(&self) -> MutexGuard<'_, HashMap<AdapterDigest, Snapshot>> {
        lock(&self.snapshots)
    }

    fn next_learner(&self) -> LearnerId {
        LearnerId(self.learners.fetch_add(1, Ordering::Relaxed))
    }

    /// Whether another model or sampler may be made in a session, of whose tenant and of all there are as many as `count` finds.
    fn check_share(
        &self,
        session: &str,
        what: &'static str,
        places: usize,
        count: impl Fn(&Session) -> usize,
    ) -> Result<(), RouterError> {
        let sessions = self.sessions();
        let Some(tenant) = sessions.get(session).map(|session| &session.client.tenant) else {
            return Ok(());
        };
        let of_tenant = sessions
            .values()
            .filter(|session| session.client.tenant == *tenant);
        share(
            what,
            of_tenant.map(&count).sum(),
            sessions.values().map(&count).sum(),
            places,
        )
    }

    fn model(&self, client: &Client, id: &str) -> Option<Arc<Model>> {
        let (session, seq) = parse(id, "train")?;
        let sessions = self.sessions();
        let session = sessions.get(session)?;
        let seen = client.sees(session.client.tenant.as_str());
        session
            .models
            .get(&u32::try_from(seq).ok()?)
            .filter(|_| seen)
            .cloned()
    }

    fn sampler(&self, client: &Client, id: &str) -> Option<Arc<Sampler>> {
        let (session, seq) = parse(id, "sample")?;
        let sessions = self.sessions();
        let session = sessions.get(session)?;
        let seen = client.sees(session.client.tenant.as_str());
        session.samplers.get(&seq).filter(|_| seen).cloned()
    }
}

/// `{session}:{kind}:{number}`, as the SDK computes it, too.
fn parse<'a>(id: &'a str, kind: &str) -> Option<(&'a str, u64)> {
    let (rest, seq) = id.rsplit_once(':')?;
    let session = rest.strip_suffix(kind)?.strip_suffix(':')?;
    Some((session, seq.parse().ok()?))
}

impl View {
    pub fn open_session(&self) -> Result<String, RouterError> {
        let mut sessions = self.router.0.tinker.sessions();
        let most = self.router.config().tinker.sessions;
        let is_own = |session: &&Session| session.client.tenant == self.client.tenant;
        let own = sessions.values().filter(is_own).count();
        share("sessions of training clients", own, sessions.len(), most as usize)?;
        let id = ids::session();
        let session = Session {
            client: self.client.clone(),
            heard: Instant::now(),
            replica: None,
            models: BTreeMap::new(),
            samplers: BTreeMap::new(),
        };
        sessions.insert(id.clone(), session);
        Ok(id)
    }

    /// The base by the name that answers carry.
    pub fn base_name(&self) -> String {
        self.router.config().served_model_name.clone()
    }

    /// Its client lives.
    pub fn hear_session(&self, id: &str) -> Result<(), RouterError> {
        self.in_session(id, |session| session.heard = Instant::now())
    }

    pub fn finish_session(&self, id: &str) -> Result<(), RouterError> {
        self.in_session(id, |_| ())?;
        self.router.0.tinker.sessions().remove(id);
        Ok(())
    }

    pub fn session(&self, id: &str) -> Result<SessionView, RouterError> {
        self.in_session(id, |session| SessionView {
            models: session.models.values().map(|model| model.id.clone()).collect(),
            samplers: session
                .samplers
                .values()
                .map(|sampler| sampler.id.clone())
                .collect(),
        })
    }

    pub fn sessions(&self) -> Vec<String> {
        let sessions = self.router.0.tinker.sessions();
        let seen = sessions
            .iter()
            .filter(|(_, session)| self.client.sees(session.client.tenant.as_str()));
        seen.map(|(id, _)| id.clone()).collect()
    }

    fn in_session<T>(&self, id: &str, work: impl FnOnce(&mut Session) -> T) -> Result<T, RouterError> {
        let mut sessions = self.router.0.tinker.sessions();
        let seen = sessions
            .get_mut(id)
            .filter(|session| self.client.sees(session.client.tenant.as_str()));
        seen.map(work).ok_or_else(|| {
            RouterError::Gone(format!(
                "The session `{id}` has ended, or the server was started since: what was not saved is gone. Begin a new one; \
                 what was saved can be loaded."
            ))
        })
    }

    /// Held until it is done, for a while.
    pub async fn retrieve(&self, request_id: &str) -> Result<Retrieved, RouterError> {
        let future = self.router.0.tinker.futures.get(request_id);
        let future = future.filter(|future| self.client.sees(future.tenant.as_str()));
        let unknown = || RouterError::Unknown {
            what: "request (its result is kept for 30 minutes, or until newer ones of its tenant take the room)",
            id: request_id.to_owned(),
        };
        let future = future.ok_or_else(unknown)?;
        Ok(match future.outcome(HOLD).await {
            Some(outcome) => Retrieved::Done(outcome),
            None => Retrieved::NotYet,
        })
    }
}

impl Router {
    /// Where a session's models live: all in one replica, and new ones in another when that is gone.
    fn learners_replica(&self, session: &str) -> Result<ReplicaHandle, Fault> {
        let mut sessions = self.0.tinker.sessions();
        let lives = |replica: &ReplicaHandle| !replica.commands.is_closed();
        let taken: Vec<ReplicaHandle> = sessions
            .values()
            .filter_map(|session| session.replica.clone().filter(lives))
            .collect();
        let session = sessions.get_mut(session);
        let session = session.ok_or_else(|| Fault::Refused("its session has ended".to_owned()))?;
        if let Some(replica) = session.replica.clone().filter(lives) {
            return Ok(replica);
        }
        let sessions_of = |replica: &ReplicaHandle| {
            let is_here = |taken: &&ReplicaHandle| taken.commands.same_channel(&replica.commands);
            taken.iter().filter(is_here).count()
        };
        let emptiest = self.0.fleet.takers().into_iter().min_by_key(sessions_of);
        let emptiest = emptiest.ok_or_else(|| Fault::ReplicaLost("there is none now".to_owned()))?;
        session.replica = Some(emptiest.clone());
        Ok(emptiest)
    }
}

/// Ends sessions that are not heard of any more, forgets results that were fetched, removes saves that have expired.
pub(crate) async fn housekeeping(router: Router) {
    let mut sweeps = 0u64;
    loop {
        tokio::time::sleep(SWEEP_PERIOD).await;
        let tinker = &router.0.tinker;
        tinker.futures.sweep(router.config().tinker.kept_results as usize);
        for session in tinker.sessions().values() {
            for sampler in session.samplers.values() {
                sampler.forget(&tinker.futures);
            }
        }
        tinker.sessions().retain(|id, session| {
            let lives = session.heard.elapsed() < SESSION_PATIENCE;
            if !lives {
                tracing::info!(
                    session = id,
                    "a training client is not heard of any more: its session ends"
                );
            }
            lives
        });
        // A minute.
        if sweeps.is_multiple_of(12)
            && let Err(error) = saves::remove_expired(&router).await
        {
            tracing::warn!(%error, "saves that have expired are not removed");
        }
        sweeps += 1;
    }
}

/// A tenant takes as many places as it leaves free: one alone half of them, and there is always one for another.
fn share(what: &'static str, own: usize, all: usize, places: usize) -> Result<(), RouterError> {
    if own < places.saturating_sub(all) {
        return Ok(());
    }
    Err(RouterError::NoShare {
        what,
        own,
        places,
        retry_after_s: SHARE_PATIENCE_S,
    })
}

fn check_tokens(tokens: &[TokenId], vocab_size: u32) -> Result<(), String> {
    match tokens.iter().find(|&&token| token >= vocab_size) {
        None => Ok(()),
        Some(token) => Err(format!(
            "token {token} is not in the vocabulary of {vocab_size} tokens"
        )),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
