//! A model that a client trains: its calls in the order of their numbers, one after the other, whatever the order in which
//! they come. A number that came is answered by one future, however often it is sent. Not here: samplers, files' names.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use tandem_core::job::Lora;
use tandem_core::learner::{Adam, Batch, MAX_LEARNERS, Moments, Pass};
use tandem_core::replica::ReplicaHandle;
use tandem_core::trace::TraceContext;
use tandem_store::{ids, now};
use tokio::sync::mpsc;

use super::futures::Promise;
use super::reach::Reach;
use super::saves::Keep;
use super::worker::{Origin, Worker};
use super::{Outcome, Session, lock};
use crate::View;
use crate::api::RouterError;
use crate::shares::{Share, as_much_as_it_leaves};

/// Numbers in the calls of one model that may wait.
const MAX_QUEUED_NUMBERS: usize = 64 << 20;
/// In those of all models, which tenants share: a gigabyte.
const MAX_WAITING_NUMBERS: u64 = 256 << 20;
/// Numbers of calls that are remembered, so that one that is sent again counts once.
const MAX_KNOWN: usize = 4096;

/// What a client asks of a model, with a number.
#[derive(Debug)]
pub enum Call {
    Accumulate { batch: Batch, shapes: Vec<Shape> },
    Step(Adam),
    Save(Keep),
    SaveForSampler(Keep),
    Sampler { seq: u64, kind: SamplerKind },
    Load { path: String, moments: Moments },
}

/// Targets of a datum: one for each token, or so many.
pub type Shape = Option<usize>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerKind {
    /// Never changes.
    Snapshot,
    /// Follows later ones of its kind.
    Inflight,
}

/// What a model begins with.
#[derive(Clone, Debug)]
pub struct NewModel {
    pub base_model: String,
    pub reach: Reach,
    pub seed: Option<u64>,
    pub user_metadata: Option<BTreeMap<String, serde_json::Value>>,
}

/// A model, for who asks what it is.
#[derive(Clone, Debug)]
pub struct Learning {
    pub id: String,
    pub base_model: String,
    pub lora: Lora,
    pub user_metadata: Option<BTreeMap<String, serde_json::Value>>,
    pub last_request_at: i64,
}

pub(super) struct Model {
    pub id: String,
    creation: String,
    order: Mutex<Order>,
}

struct Order {
    about: Learning,
    /// The number that is due.
    next: u32,
    /// Those that came before their turn.
    early: BTreeMap<u32, Work>,
    /// The futures of numbers that came.
    known: BTreeMap<u32, String>,
    queued_calls: usize,
    queued_numbers: usize,
    works: mpsc::UnboundedSender<Work>,
}

pub(super) struct Work {
    /// While it waits and is done.
    pub taken: Share,
    pub promise: Promise,
    pub call: Result<Call, String>,
    /// Of the request that brought it, where that is traced.
    pub trace: Option<TraceContext>,
}

/// In a replica's memory.
pub(super) struct Snapshot {
    pub replica: ReplicaHandle,
    pub used: Instant,
}

impl Call {
    /// By Tinker's word.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Call::Accumulate { batch, .. } => match batch.pass {
                Pass::Forward => "forward",
                Pass::ForwardBackward => "forward_backward",
            },
            Call::Step(_) => "optim_step",
            Call::Save(_) => "save_weights",
            Call::SaveForSampler(_) | Call::Sampler { .. } => "save_weights_for_sampler",
            Call::Load { .. } => "load_weights",
        }
    }

    fn numbers(&self) -> usize {
        match self {
            Call::Accumulate { batch, .. } => batch.data.iter().map(|datum| 4 * datum.targets.len()).sum(),
            _ => 0,
        }
    }
}

impl View {
    /// The future of a new model.
    pub fn create_model(&self, session: &str, seq: u32, new: NewModel) -> Result<String, RouterError> {
        let router = &self.router;
        if !router.0.catalog.is_base(&new.base_model) {
            let (asked, served) = (&new.base_model, &router.config().served_model_name);
            return Err(RouterError::invalid(
                "base_model",
                format!("base_model {asked:?} is not served here: it must be {served:?}"),
            ));
        }
        let most = router.info().max_lora_rank;
        let rank = new.reach.rank;
        if rank == 0 || rank > most {
            return Err(RouterError::invalid(
                "lora_config.rank",
                format!("lora_config.rank must be between 1 and {most} (--max-lora-rank), got {rank}"),
            ));
        }
        let about = |id: String| Learning {
            id,
            base_model: new.base_model.clone(),
            lora: new.reach.lora(&router.info().lora_targets),
            user_metadata: new.user_metadata.clone(),
            last_request_at: now(),
        };
        let seed = new.seed.unwrap_or_else(ids::seed);
        self.begin_model(session, seq, about, Origin::New { seed })
    }

    /// The future of a new model that begins with what was kept: a checkpoint, or an adapter that has a name.
    pub async fn load_model(
        &self,
        session: &str,
        seq: u32,
        path: &str,
        moments: Moments,
        user_metadata: Option<BTreeMap<String, serde_json::Value>>,
    ) -> Result<String, RouterError> {
        let kept = self.router.kept_numbers(&self.client, path, moments).await?;
        let lora = kept.lora.clone();
        let about = |id: String| Learning {
            id,
            base_model: self.router.config().served_model_name.clone(),
            lora,
            user_metadata,
            last_request_at: now(),
        };
        let origin = Origin::Kept {
            path: path.to_owned(),
            kept: Box::new(kept),
        };
        self.begin_model(session, seq, about, origin)
    }

    fn begin_model(
        &self,
        session_id: &str,
        seq: u32,
        about: impl FnOnce(String) -> Learning,
        origin: Origin,
    ) -> Result<String, RouterError> {
        let router = &self.router;
        let places = MAX_LEARNERS * router.0.fleet.takers().len().max(1);
        let count = |session: &Session| session.models.len();
        let has_share = router
            .0
            .tinker
            .check_share(session_id, "models of training clients", places, count);
        self.in_session(session_id, |session| {
            if let Some(model) = session.models.get(&seq) {
                return Ok(model.creation.clone());
            }
            let most = router.config().tinker.models;
            if session.models.len() >= most as usize {
                return Err(RouterError::invalid(
                    "model_seq_id",
                    format!(
                        "a session trains at most {most} models (--tinker-max-models); begin another session"
                    ),
                ));
            }
            has_share?;
            let creation = ids::future();
            let promise = router.0.tinker.futures.promise(&creation, &session.client.tenant);
            let (works, inbox) = mpsc::unbounded_channel();
            let about = about(format!("{session_id}:train:{seq}"));
            let model = Arc::new(Model {
                id: about.id.clone(),
                creation: creation.clone(),
                order: Mutex::new(Order {
                    about: about.clone(),
                    next: 1,
                    early: BTreeMap::new(),
                    known: BTreeMap::new(),
                    queued_calls: 0,
                    queued_numbers: 0,
                    works,
                }),
            });
            let learner = router.0.tinker.next_learner();
            let client = session.client.clone();
            let worker = Worker::new(router.clone(), client, session_id.to_owned(), about, learner);
            tokio::spawn(worker.run(origin, promise, inbox, Arc::downgrade(&model)));
            session.models.insert(seq, model);
            Ok(creation)
        })?
    }

    pub fn learning(&self, model_id: &str) -> Result<Learning, RouterError> {
        let model = self.seen_model(model_id)?;
        let about = model.order().about.clone();
        Ok(about)
    }

    /// Models that are in memory.
    pub fn learnings(&self) -> Vec<Learning> {
        let sessions = self.router.0.tinker.sessions();
        let seen = sessions
            .values()
            .filter(|session| self.client.sees(session.client.tenant.as_str()));
        seen.flat_map(|session| session.models.values())
            .map(|model| model.order().about.clone())
            .collect()
    }

    fn seen_model(&self, id: &str) -> Result<Arc<Model>, RouterError> {
        let model = self.router.0.tinker.model(&self.client, id);
        model.ok_or_else(|| RouterError::Unknown {
            what: "training model (one that is not saved lives as long as its session and the server)",
            id: id.to_owned(),
        })
    }

    /// The future of call number `seq`. A call that is wrong takes its number and fails in its turn, so that those behind
    /// it are done.
    pub fn submit(
        &self,
        model_id: &str,
        seq: u32,
        call: Result<Call, String>,
    ) -> Result<String, RouterError> {
        let model = self.seen_model(model_id)?;
        let tinker = &self.router.0.tinker;
        let mut order = model.order();
        if let Some(known) = order.known.get(&seq) {
            return Ok(known.clone());
        }
        let numbers = call.as_ref().map_or(0, Call::numbers);
        let is_full = order.queued_calls >= self.router.config().tinker.queued_calls as usize
            || order.queued_numbers + numbers > MAX_QUEUED_NUMBERS && order.queued_calls > 0;
        // What all others wait for is always taken, as far as its model goes.
        let is_due = seq <= order.next;
        let tenant = &self.client.tenant;
        let taken = tinker.waiting.of(tenant.clone());
        let numbers_of_call = numbers as u64;
        // A call alone may be as large as a call may be.
        let most = |others| most_waiting(others, is_due).max(numbers_of_call);
        if is_full && !is_due || taken.reach(numbers_of_call, most).is_err() {
            return Err(RouterError::Busy {
                waiting: order.queued_calls as u32,
                retry_after_s: 1,
            });
        }
        let id = ids::future();
        let promise = tinker.futures.promise(&id, tenant);
        if seq < order.next {
            promise.keep(Outcome::user_failed(format!(
                "seq_id {seq} was done long ago: {} is the next",
                order.next
            )));
            return Ok(id);
        }
        order.about.last_request_at = now();
        order.known.insert(seq, id.clone());
        if order.known.len() > MAX_KNOWN {
            order.known.pop_first();
        }
        order.queued_calls += 1;
        order.queued_numbers += numbers;
        let trace = self.client.trace;
        let work = Work {
            taken,
            promise,
            call,
            trace,
        };
        order.early.insert(seq, work);
        while let Some(work) = {
            let next = order.next;
            order.early.remove(&next)
        } {
            order.next += 1;
            // A worker that is gone fails what it is sent by dropping it.
            let _ = order.works.send(work);
        }
        Ok(id)
    }
}

/// Numbers of a tenant: half as many for calls that came before their turn, so that the one that all others wait for is taken.
fn most_waiting(others: u64, is_due: bool) -> u64 {
    let due = as_much_as_it_leaves(MAX_WAITING_NUMBERS, others);
    if is_due { due } else { due / 2 }
}

impl Model {
    fn order(&self) -> MutexGuard<'_, Order> {
        lock(&self.order)
    }

    /// It waits no longer.
    pub fn took(&self, call: &Result<Call, String>) {
        let mut order = self.order();
        order.queued_calls -= 1;
        order.queued_numbers -= call.as_ref().map_or(0, Call::numbers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shares::Shares;

    #[test]
    fn early_calls_leave_room_for_those_that_are_due_and_for_other_tenants() {
        let waiting = Arc::new(Shares::default());
        let call = MAX_WAITING_NUMBERS / 32;
        let taken = |tenant: &str, is_due| {
            let share = waiting.of(tenant.parse().unwrap());
            let most = |others| most_waiting(others, is_due);
            share.reach(call, most).ok().map(|()| share)
        };
        let all = |tenant, is_due| -> Vec<Share> { (0..100).map_while(|_| taken(tenant, is_due)).collect() };
        let early = all("greedy", false);
        let due = all("greedy", true);
        let theirs = all("modest", true);
        assert_eq!([early.len(), due.len(), theirs.len()], [8, 8, 8]);
    }
}
