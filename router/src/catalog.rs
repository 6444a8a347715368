//! Names in memory, and who uses what: the live requests, and those who are about to name an adapter. A request pins
//! the adapter it began with by being live. Decides admission and when an adapter may go. Not here: files, SQL, the
//! engine.

mod crowd;
mod lease;
mod unnamed;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dashmap::DashMap;
use tandem_core::id::{AdapterDigest, RequestId};
use tandem_core::replica::ReplicaInfo;
use tandem_store::{NameRow, Source};
use tokio::sync::{Notify, oneshot};

use crate::Config;
use crate::api::{AdapterSource, Client, JobRequest, ModelCard, ModelKind, RouterError, Work};
use crowd::{Crowd, Part};
pub(crate) use lease::Lease;
pub(crate) use unnamed::Hold;
use unnamed::Unnamed;

/// After how long a refused client should come back. A sequence takes seconds; the clients add jitter.
const RETRY_AFTER_S: u32 = 1;

pub(crate) struct Catalog {
    base: ModelCard,
    /// More names of the base.
    other_names: Vec<String>,
    max_waiting: u32,
    /// Calls that may be parked.
    max_parked: usize,
    names: RwLock<BTreeMap<String, NameRow>>,
    live: DashMap<RequestId, Option<AdapterDigest>>,
    /// Sequences that hold places: those of `live` that are not parked, counted before the entries are made so that the
    /// limit is exact.
    admitted: AtomicU32,
    /// Sequences of batches, which hold none.
    batched: AtomicU32,
    /// Those of each key that has some, by its connections.
    clients: Mutex<Clients>,
    /// Who reads nothing, from the longest on, and how each is told to give up.
    parked: Mutex<BTreeMap<u64, oneshot::Sender<()>>>,
    parkings: AtomicU64,
    next_id: AtomicU64,
    unnamed: Mutex<Unnamed>,
    retiring: Notify,
    /// An adapter that was leaving is gone.
    gone: Notify,
}

/// What asks to come in.
#[derive(Clone, Copy)]
pub(crate) struct Wish<'a> {
    pub model: &'a str,
    /// What answers in the base's place: an adapter without a name, or with one that the client does not see.
    pub nameless: Option<AdapterDigest>,
    pub client: &'a Client,
    pub n: u32,
    /// Sequences of the same request that came in before.
    pub earlier: u32,
    /// Sequences that the fleet runs at once.
    pub slots: u32,
    /// Sequences that wait, as the fleet last said.
    pub engine_waiting: u32,
}

/// Sequences that are live: of each key, and there of each connection.
type Clients = HashMap<u64, HashMap<u64, u32>>;

impl Catalog {
    pub fn new(config: &Config, info: &ReplicaInfo, names: Vec<NameRow>) -> Catalog {
        let base = ModelCard {
            name: config.served_model_name.clone(),
            created_at: tandem_store::now(),
            kind: ModelKind::Base,
            max_model_len: info.max_model_len,
        };
        Catalog {
            base,
            other_names: config.other_model_names.clone(),
            max_waiting: config.max_waiting,
            // A request may have as many prompts, all of which are parked while the last of them are let in.
            max_parked: config.max_waiting.max(2 * config.max_choices) as usize,
            names: RwLock::new(names.into_iter().map(|row| (row.name.clone(), row)).collect()),
            live: DashMap::new(),
            admitted: AtomicU32::new(0),
            batched: AtomicU32::new(0),
            clients: Mutex::default(),
            parked: Mutex::default(),
            parkings: AtomicU64::new(0),
            next_id: AtomicU64::new(0),
            unnamed: Mutex::default(),
            retiring: Notify::new(),
            gone: Notify::new(),
        }
    }

    pub fn is_base(&self, name: &str) -> bool {
        name == self.base.name || self.other_names.iter().any(|other| other == name)
    }

    /// The base by `name`, one of its own.
    fn base_card(&self, name: &str) -> ModelCard {
        ModelCard {
            name: name.to_owned(),
            ..self.base.clone()
        }
    }

    /// The base first, by each of its names, then the client's adapters from the oldest on.
    pub fn cards(&self, client: &Client) -> Vec<ModelCard> {
        let names = self.read();
        let mut rows: Vec<&NameRow> = names.values().filter(|row| is_seen(row, client)).collect();
        rows.sort_by_key(|row| row.created_at);
        let others = self.other_names.iter().map(|name| self.base_card(name));
        [self.base.clone()]
            .into_iter()
            .chain(others)
            .chain(rows.into_iter().map(|row| self.card(row)))
            .collect()
    }

    pub fn find(&self, client: &Client, name: &str) -> Option<ModelCard> {
        match self.is_base(name) {
            true => Some(self.base_card(name)),
            false => {
                let row = self.row(name).filter(|row| is_seen(row, client));
                row.map(|row| self.card(&row))
            }
        }
    }

    /// The name's own row, or for `<model>@step-<n>` that checkpoint's.
    pub fn row(&self, name: &str) -> Option<NameRow> {
        lookup(&self.read(), name).cloned()
    }

    /// Names that came from `source`.
    pub fn names_from(&self, source: &Source) -> Vec<String> {
        self.read()
            .values()
            .filter(|row| row.source == *source)
            .map(|row| row.name.clone())
            .collect()
    }

    /// What a job made: its model, and its checkpoints.
    pub fn names_of_job(&self, id: &str) -> Vec<String> {
        self.read()
            .values()
            .filter(|row| matches!(&row.source, Source::Job { job, .. } if job == id))
            .map(|row| row.name.clone())
            .collect()
    }

    /// Take sequences in, or say why not.
    pub fn admit(self: &Arc<Catalog>, wish: Wish<'_>) -> Result<Lease, RouterError> {
        let Wish {
            model,
            nameless,
            client,
            n,
            earlier,
            slots,
            engine_waiting,
        } = wish;
        // The names stay locked until the requests are live: an adapter cannot be retired in between.
        let names = self.read();
        let adapter = match self.is_base(model) {
            true => nameless,
            false => match lookup(&names, model) {
                Some(row) if is_seen(row, client) => Some(row.digest),
                _ => return Err(RouterError::UnknownModel(model.to_owned())),
            },
        };
        if let Some(crowd) = self.join(client, n) {
            // Some of the request's earlier sequences may have ended or be parked.
            let request = (earlier + n).min(crowd.connection.own);
            let crowd = Crowd { request, ..crowd };
            // Of other routers.
            let own = crowd.all + self.batched.load(Ordering::Acquire);
            let elsewhere = engine_waiting.saturating_sub(own);
            if !crowd.fits(slots, self.max_waiting) || elsewhere > self.max_waiting {
                self.leave(client, n);
                return Err(RouterError::Busy {
                    waiting: (crowd.all - n).saturating_sub(slots).max(engine_waiting),
                    retry_after_s: RETRY_AFTER_S,
                });
            }
        }
        let first = self.next_id.fetch_add(u64::from(n), Ordering::Relaxed);
        let ids = first..first + u64::from(n);
        for id in ids.clone() {
            self.live.insert(RequestId(id), adapter);
        }
        Ok(Lease {
            adapter,
            client: client.clone(),
            ids,
            catalog: self.clone(),
        })
    }

    /// Who is there once these sequences are. `None`: they are of a batch, and take no place from anybody.
    fn join(&self, client: &Client, n: u32) -> Option<Crowd> {
        let &Client {
            key,
            connection,
            work,
            ..
        } = client;
        if work == Work::Batch {
            self.batched.fetch_add(n, Ordering::AcqRel);
            return None;
        }
        let all = self.admitted.fetch_add(n, Ordering::AcqRel) + n;
        let mut clients = self.clients();
        let connections = clients.entry(key).or_default();
        *connections.entry(connection).or_default() += n;
        let part = |own: u32, of: usize| Part {
            own,
            of: u32::try_from(of).unwrap_or(u32::MAX),
        };
        let (own, of) = (connections[&connection], connections.len());
        let of_key = connections.values().sum();
        Some(Crowd {
            all,
            key: part(of_key, clients.len()),
            connection: part(own, of),
            request: n,
        })
    }

    fn leave(&self, client: &Client, n: u32) {
        let &Client {
            key,
            connection,
            work,
            ..
        } = client;
        if work == Work::Batch {
            self.batched.fetch_sub(n, Ordering::AcqRel);
            return;
        }
        self.admitted.fetch_sub(n, Ordering::AcqRel);
        let mut clients = self.clients();
        let connections = clients.get_mut(&key).expect("its sequences are counted");
        let own = connections
            .get_mut(&connection)
            .expect("its sequences are counted");
        *own -= n;
        if *own == 0 {
            connections.remove(&connection);
        }
        if connections.is_empty() {
            clients.remove(&key);
        }
    }

    /// Put a name in its place. An adapter that lost its last name by it retires.
    pub fn insert(&self, row: NameRow) {
        let mut names = self.write();
        self.unnamed().retired.remove(&row.digest);
        let old = names.insert(row.name.clone(), row);
        self.retire_unnamed(&names, old);
    }

    /// All names as the store has them now. What lost its last name retires.
    pub fn replace(&self, rows: Vec<NameRow>) {
        let mut names = self.write();
        let old = std::mem::replace(
            &mut *names,
            rows.into_iter().map(|row| (row.name.clone(), row)).collect(),
        );
        for row in old.into_values() {
            self.retire_unnamed(&names, Some(row));
        }
    }

    pub fn remove(&self, gone: &[String]) {
        let mut names = self.write();
        for name in gone {
            let old = names.remove(name);
            self.retire_unnamed(&names, old);
        }
    }

    fn card(&self, row: &NameRow) -> ModelCard {
        let NameRow {
            name,
            digest,
            rank,
            source,
            created_at,
            tenant: _,
            request,
        } = row.clone();
        let start =
            request.and_then(|request| serde_json::from_str::<JobRequest>(&request).ok()?.start_name());
        let source = match source {
            Source::Loaded | Source::Flag => AdapterSource::Loaded,
            Source::Job { job, step } => AdapterSource::Job { job, step },
        };
        let kind = ModelKind::Adapter {
            digest,
            parent: start.unwrap_or_else(|| self.base.name.clone()),
            source,
            rank,
        };
        ModelCard {
            name,
            created_at,
            kind,
            max_model_len: self.base.max_model_len,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, NameRow>> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<String, NameRow>> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn parked(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<()>>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unnamed(&self) -> MutexGuard<'_, Unnamed> {
        self.unnamed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Name of the checkpoint of a job whose model is, or will be, `model`.
pub(crate) fn checkpoint_name(model: &str, step: u64) -> String {
    format!("{model}:ckpt-step-{step}")
}

/// What the command line names is served to everybody, as the base is.
fn is_seen(row: &NameRow, client: &Client) -> bool {
    row.source == Source::Flag || client.sees(&row.tenant)
}

fn is_named(names: &BTreeMap<String, NameRow>, digest: AdapterDigest) -> bool {
    names.values().any(|row| row.digest == digest)
}

fn lookup<'a>(names: &'a BTreeMap<String, NameRow>, name: &str) -> Option<&'a NameRow> {
    names.get(name).or_else(|| {
        let (model, step) = name.rsplit_once("@step-")?;
        names.get(&checkpoint_name(model, step.parse().ok()?))
    })
}
