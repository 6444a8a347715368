//! A member and its numbers.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tandem_core::histogram::{Counted, Histogram};
use tandem_core::replica::ReplicaHandle;
use tandem_core::stats::Stats;

use super::affinity::Memory;
use super::member::{Make, Member};
use super::{lock, read};

pub(super) struct Place {
    pub name: String,
    pub make: Make,
    pub state: RwLock<State>,
    /// Sequences this router has there.
    pub live: Arc<AtomicU32>,
    /// Jobs this router has there.
    pub jobs: Arc<AtomicU32>,
    pub memory: Mutex<Memory>,
    /// A request was refused because it stops: known before its numbers say so. Its next life takes requests again.
    pub stops: AtomicBool,
    pub ejections: AtomicU64,
    pub past_hops: Mutex<Counted>,
}

#[expect(clippy::large_enum_variant, reason = "one a member, and mostly up")]
pub(super) enum State {
    Up(ReplicaHandle, Option<Arc<Histogram>>),
    /// Why.
    Down(String),
}

/// A member's numbers, for people and Prometheus.
#[derive(Clone, Debug)]
pub struct Report {
    pub name: String,
    pub standing: Standing,
    /// As the replica says; zeros when it is down.
    pub stats: Stats,
    /// Sequences of this router there.
    pub live: u32,
    pub ejections: u64,
    pub hops: Counted,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    Up,
    Draining,
    /// Why.
    Down(String),
}

impl Place {
    pub fn new(member: Member) -> Place {
        let Member { name, make } = member;
        Place {
            name,
            make,
            state: RwLock::new(State::Down("it has not answered yet".to_owned())),
            live: Arc::default(),
            jobs: Arc::default(),
            memory: Mutex::default(),
            ejections: AtomicU64::new(0),
            stops: AtomicBool::new(false),
            past_hops: Mutex::default(),
        }
    }

    pub fn report(&self) -> Report {
        let mut hops = lock(&self.past_hops).clone();
        let (standing, stats) = match &*read(&self.state) {
            State::Up(replica, hop) => {
                if let Some(hop) = hop {
                    hops.add(&hop.counted());
                }
                let stats = replica.stats.borrow().clone();
                let standing = match stats.draining {
                    true => Standing::Draining,
                    false => Standing::Up,
                };
                (standing, stats)
            }
            State::Down(why) => (Standing::Down(why.clone()), Stats::default()),
        };
        Report {
            name: self.name.clone(),
            standing,
            stats,
            live: self.live.load(Ordering::Acquire),
            ejections: self.ejections.load(Ordering::Relaxed),
            hops,
        }
    }

    pub fn set(&self, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }
}
