//! Names in memory, and who uses what: the live requests, and those who are about to name an adapter. A request pins
//! the adapter it began with by being live. Decides admission and when an adapter may go. Not here: files, SQL, the
//! engine.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dashmap::DashMap;
use tandem_core::id::{AdapterDigest, JobId, RequestId};
use tandem_core::replica::ReplicaInfo;
use tandem_store::{NameRow, Source};
use tokio::sync::Notify;

use crate::Config;
use crate::api::{AdapterSource, Client, ModelCard, ModelKind, RouterError};

/// After how long a refused client should come back. A sequence takes seconds; the clients add jitter.
const RETRY_AFTER_S: u32 = 1;

pub(crate) struct Catalog {
    base: ModelCard,
    /// More names of the base.
    other_names: Vec<String>,
    max_waiting: u32,
    names: RwLock<BTreeMap<String, NameRow>>,
    live: DashMap<RequestId, Option<AdapterDigest>>,
    /// Length of `live`, counted before the entries are made so that the limit is exact.
    admitted: AtomicU32,
    /// Live requests of each client that has some.
    clients: DashMap<Client, u32>,
    next_id: AtomicU64,
    unnamed: Mutex<Unnamed>,
    retiring: Notify,
    /// An adapter that was leaving is gone.
    gone: Notify,
}

/// Adapters in the store that no name may point to.
#[derive(Default)]
struct Unnamed {
    /// How many are about to name each.
    held: BTreeMap<AdapterDigest, u32>,
    /// Lost their last name, or never got one; go when nobody holds them and no live request pins them.
    retired: BTreeSet<AdapterDigest>,
    /// Being deleted.
    leaving: BTreeSet<AdapterDigest>,
}

/// As long as it lives nobody deletes the adapter, though no name points to it yet. If none does then, it retires.
pub(crate) struct Hold {
    pub digest: AdapterDigest,
    catalog: Arc<Catalog>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let names = self.catalog.read();
        let mut unnamed = self.catalog.unnamed();
        let held = unnamed.held.get_mut(&self.digest).expect("it is held by this");
        *held -= 1;
        if *held == 0 {
            unnamed.held.remove(&self.digest);
        }
        if !is_named(&names, self.digest) {
            unnamed.retired.insert(self.digest);
            self.catalog.retiring.notify_one();
        }
    }
}

/// An adapter that its owner deletes. Whoever wants to hold it waits until this is dropped.
pub(crate) struct Leaving {
    pub digest: AdapterDigest,
    catalog: Arc<Catalog>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.catalog.unnamed().leaving.remove(&self.digest);
        self.catalog.gone.notify_waiters();
    }
}

/// What asks to come in.
#[derive(Clone, Copy)]
pub(crate) struct Wish<'a> {
    pub model: &'a str,
    pub client: Client,
    pub n: u32,
    /// Sequences that the fleet runs at once.
    pub slots: u32,
    /// Sequences that wait, as the fleet last said.
    pub engine_waiting: u32,
}

/// Sequences if a wish were granted.
#[derive(Clone, Copy)]
struct Crowd {
    all: u32,
    /// Of the client that asks.
    own: u32,
    /// That have some, the one that asks included.
    clients: u32,
}

impl Crowd {
    /// A client alone may take every place. When others are there and somebody waits, each has its share, and who is
    /// within its share comes in although others have taken more than theirs: up to twice as many places.
    fn fits(self, slots: u32, max_waiting: u32) -> bool {
        let Crowd { all, own, clients } = self;
        let places = slots.saturating_add(max_waiting);
        let most = match clients {
            0 | 1 => places,
            _ => places.saturating_mul(2),
        };
        all <= slots || own <= places / clients.max(1) && all <= most
    }
}

/// `n` admitted sequences of one model; they end when this is dropped.
pub(crate) struct Lease {
    pub adapter: Option<AdapterDigest>,
    client: Client,
    ids: Range<u64>,
    catalog: Arc<Catalog>,
}

impl Lease {
    pub fn ids(&self) -> impl Iterator<Item = RequestId> + use<> {
        self.ids.clone().map(RequestId)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        for id in self.ids() {
            self.catalog.live.remove(&id);
        }
        let n = u32::try_from(self.ids.end - self.ids.start).expect("n was a u32");
        self.catalog.admitted.fetch_sub(n, Ordering::AcqRel);
        self.catalog.leave(self.client, n);
        if self
            .adapter
            .is_some_and(|digest| self.catalog.unnamed().retired.contains(&digest))
        {
            self.catalog.retiring.notify_one();
        }
    }
}

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
            names: RwLock::new(names.into_iter().map(|row| (row.name.clone(), row)).collect()),
            live: DashMap::new(),
            admitted: AtomicU32::new(0),
            clients: DashMap::new(),
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

    /// The base first, by each of its names, then adapters from the oldest on.
    pub fn cards(&self) -> Vec<ModelCard> {
        let names = self.read();
        let mut rows: Vec<&NameRow> = names.values().collect();
        rows.sort_by_key(|row| row.created_at);
        let others = self.other_names.iter().map(|name| self.base_card(name));
        [self.base.clone()]
            .into_iter()
            .chain(others)
            .chain(rows.into_iter().map(|row| self.card(row)))
            .collect()
    }

    pub fn find(&self, name: &str) -> Option<ModelCard> {
        match self.is_base(name) {
            true => Some(self.base_card(name)),
            false => self.row(name).map(|row| self.card(&row)),
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
            client,
            n,
            slots,
            engine_waiting,
        } = wish;
        // The names stay locked until the requests are live: an adapter cannot be retired in between.
        let names = self.read();
        let adapter = match self.is_base(model) {
            true => None,
            false => match lookup(&names, model) {
                Some(row) => Some(row.digest),
                None => return Err(RouterError::UnknownModel(model.to_owned())),
            },
        };
        let before = self.admitted.fetch_add(n, Ordering::AcqRel);
        let own = self.join(client, n);
        let crowd = Crowd {
            all: before + n,
            own,
            clients: u32::try_from(self.clients.len()).unwrap_or(u32::MAX),
        };
        if !crowd.fits(slots, self.max_waiting) || engine_waiting > self.max_waiting {
            self.leave(client, n);
            self.admitted.fetch_sub(n, Ordering::AcqRel);
            return Err(RouterError::Busy {
                waiting: before.saturating_sub(slots).max(engine_waiting),
                retry_after_s: RETRY_AFTER_S,
            });
        }
        let first = self.next_id.fetch_add(u64::from(n), Ordering::Relaxed);
        let ids = first..first + u64::from(n);
        for id in ids.clone() {
            self.live.insert(RequestId(id), adapter);
        }
        Ok(Lease {
            adapter,
            client,
            ids,
            catalog: self.clone(),
        })
    }

    /// Live requests of the client, these included.
    fn join(&self, client: Client, n: u32) -> u32 {
        let mut live = self.clients.entry(client).or_default();
        *live += n;
        *live
    }

    fn leave(&self, client: Client, n: u32) {
        self.clients.remove_if_mut(&client, |_, live| {
            *live -= n;
            *live == 0
        });
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

    /// For who is about to name an adapter, or to look whether it is in the store.
    pub async fn hold(self: &Arc<Catalog>, digest: AdapterDigest) -> Hold {
        loop {
            // Made before the look, so that it hears of an end right after it.
            let gone = self.gone.notified();
            {
                let mut unnamed = self.unnamed();
                if !unnamed.leaving.contains(&digest) {
                    *unnamed.held.entry(digest).or_default() += 1;
                    let catalog = self.clone();
                    return Hold { digest, catalog };
                }
            }
            gone.await;
        }
    }

    /// When an adapter may have become free to go.
    pub async fn retiring(&self) {
        self.retiring.notified().await;
    }

    /// Retired adapters that nothing pins, for the caller to delete.
    pub fn take_free(self: &Arc<Catalog>) -> Vec<Leaving> {
        // Also held by `admit` from name to live entry.
        let names = self.write();
        let pinned: BTreeSet<AdapterDigest> = self.live.iter().filter_map(|entry| *entry.value()).collect();
        let mut unnamed = self.unnamed();
        let Unnamed {
            held,
            retired,
            leaving,
        } = &mut *unnamed;
        retired.retain(|digest| !is_named(&names, *digest));
        let is_used = |digest: &AdapterDigest| pinned.contains(digest) || held.contains_key(digest);
        let free: Vec<AdapterDigest> = retired
            .iter()
            .copied()
            .filter(|digest| !is_used(digest))
            .collect();
        retired.retain(is_used);
        leaving.extend(&free);
        let leave = |digest| Leaving {
            digest,
            catalog: self.clone(),
        };
        free.into_iter().map(leave).collect()
    }

    fn retire_unnamed(&self, names: &BTreeMap<String, NameRow>, old: Option<NameRow>) {
        let Some(old) = old else { return };
        if !is_named(names, old.digest) {
            self.unnamed().retired.insert(old.digest);
            self.retiring.notify_one();
        }
    }

    fn card(&self, row: &NameRow) -> ModelCard {
        let NameRow {
            name,
            digest,
            rank,
            source,
            created_at,
        } = row.clone();
        let source = match source {
            Source::Loaded | Source::Flag => AdapterSource::Loaded,
            Source::Job { job, step } => AdapterSource::Job {
                job: JobId(job),
                step,
            },
        };
        let kind = ModelKind::Adapter {
            digest,
            parent: self.base.name.clone(),
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

    fn unnamed(&self) -> MutexGuard<'_, Unnamed> {
        self.unnamed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Name of the checkpoint of a job whose model is, or will be, `model`.
pub(crate) fn checkpoint_name(model: &str, step: u64) -> String {
    format!("{model}:ckpt-step-{step}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_shared_when_they_are_few() {
        // all, own, clients with 4 slots and 6 waiting places
        for (all, own, clients, fits) in [
            (10, 10, 1, true),
            (11, 11, 1, false),
            // Nobody waits: whoever comes, comes in.
            (4, 3, 2, true),
            // Over its share of 5 while another is there, and within it.
            (10, 6, 2, false),
            (10, 5, 2, true),
            // The other has taken all; this one is within its share.
            (11, 1, 2, true),
            (15, 5, 2, true),
            (20, 3, 3, true),
            (21, 3, 3, false),
        ] {
            assert_eq!(
                Crowd { all, own, clients }.fits(4, 6),
                fits,
                "{all} {own} {clients}"
            );
        }
    }
}
