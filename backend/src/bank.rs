//! Adapters resident beside the base: at most `max_loras`, the least recently used leaves first, never one that a
//! running request holds. Folders are read, checked and packed by a thread of their own; the engine never waits for a
//! disk. Not here: what a name means (router), which requests wait (engine).

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll};

use tandem_core::id::{AdapterDigest, AdapterRef, JobId};
use tandem_core::message::Fault;
use tandem_core::replica::AdapterInfo;
use tandem_kernels::pool;
use tokio::sync::mpsc;
use tracing::warn;

use crate::guard;
use crate::lora::adapter::Adapter;
use crate::lora::fit::Fit;
use crate::lora::params::AdapterParams;
use crate::lora::peft;

/// Requests for resident adapters that may come in while an adapter waits for a slot. Then one resident yields its own:
/// else a busy one would keep it for ever.
const OVERTAKEN: u64 = 64;

pub struct AdapterBank {
    max_loras: usize,
    slots: HashMap<AdapterDigest, Slot>,
    /// Snapshots of what clients train: in no file, so they take no slot that another could need. Who made them lets them
    /// go.
    kept: HashMap<AdapterDigest, Resident>,
    /// Asked for, no slot yet.
    queue: VecDeque<Queued>,
    /// Grows with each use: the order of last uses.
    uses: u64,
    loads: u64,
    to_load: mpsc::UnboundedSender<AdapterRef>,
    loaded: mpsc::UnboundedReceiver<FromDisk>,
    followed: Followed,
}

/// Does anybody hold the same adapters beside this bank?
enum Followed {
    Alone,
    /// Other ranks, who have not heard of these yet.
    ByRanks(Vec<Change>),
}

/// What other ranks must know to hold the same adapters, in order.
pub enum Change {
    /// Read from disk, here.
    Loaded(AdapterDigest, AdapterParams),
    /// Made by a job, here: they have its numbers.
    Published(AdapterDigest, JobId),
    Left(AdapterDigest),
}

struct Queued {
    adapter: AdapterRef,
    /// [`AdapterBank::uses`] when it was asked for.
    since: u64,
}

enum Slot {
    Loading,
    Resident(Resident),
}

struct Resident {
    adapter: Arc<Adapter>,
    /// Running requests that use it.
    pins: usize,
    last_use: u64,
    fate: Fate,
}

#[derive(PartialEq, Eq)]
enum Fate {
    Stay,
    /// Unloaded by its owner; goes with its last pin.
    Leave,
    /// Another waits for its slot: goes with its last pin, and who asks for it meanwhile waits behind the other.
    Yield,
}

/// A finished load. `Ok`: resident until something else needs the slot, so pin it at once.
pub type Loaded = (AdapterDigest, Result<Arc<Adapter>, Fault>);

type FromDisk = (AdapterDigest, Result<(AdapterParams, Arc<Adapter>), Fault>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// Held for the caller until [`AdapterBank::unpin`].
    Held,
    /// On its way: comes out of [`AdapterBank::poll_loaded`].
    Awaited,
}

impl AdapterBank {
    /// `base`: the model's folder or file.
    pub fn new(max_loras: usize, max_rank: u32, fit: Fit, base: PathBuf) -> AdapterBank {
        let (to_load, orders) = mpsc::unbounded_channel();
        let (results, loaded) = mpsc::unbounded_channel();
        let followed = match fit.layout.world() {
            1 => Followed::Alone,
            _ => Followed::ByRanks(vec![]),
        };
        let loader = std::thread::Builder::new().name("tandem-adapters".to_owned());
        loader
            .spawn(move || load_all(orders, results, &fit, &base, max_rank))
            .expect("the system starts a thread");
        AdapterBank {
            max_loras,
            slots: HashMap::new(),
            kept: HashMap::new(),
            queue: VecDeque::new(),
            uses: 0,
            loads: 0,
            to_load,
            loaded,
            followed,
        }
    }

    /// What changed since the last call, for the other ranks.
    pub fn changes(&mut self) -> Vec<Change> {
        match &mut self.followed {
            Followed::Alone => vec![],
            Followed::ByRanks(changes) => std::mem::take(changes),
        }
    }

    fn changed(&mut self, change: Change) {
        if let Followed::ByRanks(changes) = &mut self.followed {
            changes.push(change);
        }
    }

    /// Holds a resident adapter; begins to load one that is not.
    pub fn pin(&mut self, adapter: &AdapterRef) -> Pin {
        if self.is_kept(adapter.digest) {
            self.hold(adapter.digest);
            return Pin::Held;
        }
        self.yield_a_slot();
        match self.slots.get(&adapter.digest) {
            Some(Slot::Resident(resident)) if resident.fate != Fate::Yield => {
                self.hold(adapter.digest);
                return Pin::Held;
            }
            Some(Slot::Loading) => {}
            _ if self.is_queued(adapter.digest) => {}
            _ => self.queue.push_back(Queued {
                adapter: adapter.clone(),
                since: self.uses,
            }),
        }
        self.begin_loads();
        Pin::Awaited
    }

    /// Holds an adapter that is resident: for those who waited for it.
    pub fn hold(&mut self, digest: AdapterDigest) {
        self.uses += 1;
        let uses = self.uses;
        let Some(resident) = self.resident(digest) else {
            panic!("adapter {} is not resident", digest.short());
        };
        resident.pins += 1;
        resident.last_use = uses;
    }

    pub fn unpin(&mut self, digest: AdapterDigest) {
        let Some(resident) = self.resident(digest) else {
            return;
        };
        resident.pins = resident.pins.checked_sub(1).expect("each pin is given back once");
        if resident.pins == 0 && resident.fate != Fate::Stay {
            self.leave(digest);
        }
        self.begin_loads();
    }

    /// A pinned adapter.
    pub fn get(&self, digest: AdapterDigest) -> &Adapter {
        match (self.kept.get(&digest), self.slots.get(&digest)) {
            (Some(resident), _) | (None, Some(Slot::Resident(resident))) => &resident.adapter,
            _ => panic!("adapter {} is planned but not resident", digest.short()),
        }
    }

    /// Facts of an adapter, if it is resident.
    pub fn info(&self, digest: AdapterDigest) -> Option<AdapterInfo> {
        match self.slots.get(&digest)? {
            Slot::Resident(resident) => {
                let Resident { adapter, .. } = resident;
                Some(AdapterInfo {
                    digest,
                    rank: adapter.rank() as u32,
                    bytes: adapter.bytes(),
                })
            }
            Slot::Loading => None,
        }
    }

    /// Takes in an adapter that was made here. Without a free slot, or when others wait for one, it stays on disk, as any
    /// other.
    pub fn publish(&mut self, digest: AdapterDigest, adapter: Arc<Adapter>, job: &JobId) {
        if self.queue.is_empty() && !self.slots.contains_key(&digest) && self.free_a_slot() {
            self.seat(digest, adapter);
            self.changed(Change::Published(digest, job.clone()));
        }
    }

    /// Keeps an adapter that is in no file until it is forgotten.
    pub fn keep(&mut self, digest: AdapterDigest, adapter: Arc<Adapter>) {
        let resident = Resident {
            adapter,
            pins: 0,
            last_use: self.uses,
            fate: Fate::Stay,
        };
        self.kept.insert(digest, resident);
    }

    /// Whether it is kept, and nobody has said that it is to be forgotten.
    pub fn is_kept(&self, digest: AdapterDigest) -> bool {
        self.kept
            .get(&digest)
            .is_some_and(|resident| resident.fate == Fate::Stay)
    }

    fn resident(&mut self, digest: AdapterDigest) -> Option<&mut Resident> {
        match (self.kept.get_mut(&digest), self.slots.get_mut(&digest)) {
            (Some(resident), _) | (None, Some(Slot::Resident(resident))) => Some(resident),
            _ => None,
        }
    }

    /// Forgets an adapter as soon as nobody uses it.
    pub fn forget(&mut self, digest: AdapterDigest) {
        if let Some(resident) = self.resident(digest) {
            resident.fate = Fate::Leave;
            if resident.pins == 0 {
                self.leave(digest);
                self.begin_loads();
            }
        }
    }

    /// Nobody waits for this adapter any more.
    pub fn dequeue(&mut self, digest: AdapterDigest) {
        self.queue.retain(|queued| queued.adapter.digest != digest);
    }

    /// The next finished load. Wakes the context's task when there is none yet. When those who waited hold it, call
    /// [`AdapterBank::begin_loads`]: if nobody does, the slot is the next one's.
    pub fn poll_loaded(&mut self, context: &mut Context) -> Poll<Loaded> {
        let Poll::Ready(Some((digest, result))) = self.loaded.poll_recv(context) else {
            return Poll::Pending;
        };
        let result = match result {
            Ok((params, adapter)) => {
                self.loads += 1;
                self.seat(digest, Arc::clone(&adapter));
                self.changed(Change::Loaded(digest, params));
                Ok(adapter)
            }
            Err(fault) => {
                self.slots.remove(&digest);
                Err(fault)
            }
        };
        Poll::Ready((digest, result))
    }

    /// In the order of their digests.
    pub fn residents(&self) -> Vec<AdapterDigest> {
        let resident =
            |(digest, slot): (&AdapterDigest, &Slot)| matches!(slot, Slot::Resident(_)).then_some(*digest);
        let mut digests: Vec<AdapterDigest> = self.slots.iter().filter_map(resident).collect();
        digests.sort_unstable();
        digests
    }

    pub fn bytes(&self) -> u64 {
        let bytes = |slot: &Slot| match slot {
            Slot::Resident(resident) => resident.adapter.bytes(),
            Slot::Loading => 0,
        };
        let kept = self.kept.values().map(|resident| resident.adapter.bytes());
        self.slots.values().map(bytes).chain(kept).sum()
    }

    pub fn loads(&self) -> u64 {
        self.loads
    }

    fn seat(&mut self, digest: AdapterDigest, adapter: Arc<Adapter>) {
        let resident = Resident {
            adapter,
            pins: 0,
            last_use: self.uses,
            fate: Fate::Stay,
        };
        self.slots.insert(digest, Slot::Resident(resident));
    }

    /// Gives queued adapters slots, first come, first served.
    pub fn begin_loads(&mut self) {
        while !self.queue.is_empty() && self.free_a_slot() {
            let Queued { adapter, .. } = self.queue.pop_front().expect("the queue is not empty");
            self.slots.insert(adapter.digest, Slot::Loading);
            self.to_load
                .send(adapter)
                .expect("the loader lives as long as its orders can come");
        }
    }

    fn is_queued(&self, digest: AdapterDigest) -> bool {
        self.queue.iter().any(|queued| queued.adapter.digest == digest)
    }

    /// When the first of the queue was overtaken too often, the least recently used takes no more requests.
    fn yield_a_slot(&mut self) {
        let overtaken = |first: &Queued| self.uses >= first.since + OVERTAKEN;
        if !self.queue.front().is_some_and(overtaken) {
            return;
        }
        let residents = || {
            self.slots.iter().filter_map(|(digest, slot)| match slot {
                Slot::Resident(resident) => Some((resident, *digest)),
                Slot::Loading => None,
            })
        };
        if residents().any(|(resident, _)| resident.fate != Fate::Stay) {
            return;
        }
        let first = residents().min_by_key(|(resident, _)| resident.last_use);
        if let Some((_, digest)) = first
            && let Some(Slot::Resident(resident)) = self.slots.get_mut(&digest)
        {
            resident.fate = Fate::Yield;
        }
    }

    fn free_a_slot(&mut self) -> bool {
        if self.slots.len() < self.max_loras {
            return true;
        }
        let idle = self.slots.iter().filter_map(|(digest, slot)| match slot {
            Slot::Resident(resident) if resident.pins == 0 => Some((resident.last_use, *digest)),
            _ => None,
        });
        let Some((_, digest)) = idle.min() else {
            return false;
        };
        self.leave(digest);
        true
    }

    fn leave(&mut self, digest: AdapterDigest) {
        if self.kept.remove(&digest).is_none() {
            self.slots.remove(&digest);
        }
        self.changed(Change::Left(digest));
    }
}

fn load_all(
    mut orders: mpsc::UnboundedReceiver<AdapterRef>,
    results: mpsc::UnboundedSender<FromDisk>,
    fit: &Fit,
    base: &Path,
    max_rank: u32,
) {
    pool::stand_aside();
    while let Some(adapter) = orders.blocking_recv() {
        let loaded = guard::torch(|| load(&adapter, fit, base, max_rank))
            .unwrap_or_else(|fault| Err(fault.to_string()));
        // (Whoever asked knows it by another name than the folder's, which is a digest.)
        let loaded = loaded.map_err(Fault::Adapter);
        if results.send((adapter.digest, loaded)).is_err() {
            return;
        }
    }
}

fn load(
    adapter: &AdapterRef,
    fit: &Fit,
    base: &Path,
    max_rank: u32,
) -> Result<(AdapterParams, Arc<Adapter>), String> {
    // Before anything is made of it: KV is found by this digest, and answers are said to come from it.
    let digest = peft::digest(&adapter.folder).map_err(|error| error.to_string())?;
    if digest != adapter.digest {
        return Err(format!(
            "its content is {}, {} was asked",
            digest.short(),
            adapter.digest.short()
        ));
    }
    let peft::Loaded { params, notes } =
        peft::read(&adapter.folder, &fit.spec, max_rank).map_err(|error| error.to_string())?;
    peft::check_copies(&adapter.folder, base, &fit.spec).map_err(|error| error.to_string())?;
    for note in notes {
        warn!(adapter = %digest.short(), "{note}");
    }
    let packed = fit.pack(&params).map_err(|error| error.to_string())?;
    Ok((params, Arc::new(packed)))
}
