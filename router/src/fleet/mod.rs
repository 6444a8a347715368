//! The replicas behind the router: made, watched, ejected when they are lost, made again. `tandem serve` is a fleet of
//! one replica in its own process; nothing else differs. Not here: what is asked of a replica, the wire (rpc).

mod affinity;
mod choice;
mod keep;
mod member;
mod place;
mod seat;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use tandem_core::TokenId;
use tandem_core::id::AdapterDigest;
use tandem_core::message::Fault;
use tandem_core::replica::{Command, ReplicaHandle, ReplicaInfo};
use tandem_core::stats::Stats;
use tandem_rpc::ModelFiles;
use tokio::sync::{mpsc, watch};

use choice::{Adapter, Need, View};
use keep::keep;
pub use member::{Made, Member};
use place::{Place, State};
pub use place::{Report, Standing};
pub use seat::{JobSeat, Seat};

/// What a replica may need to write a running job's state at the end.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// Cheap to clone.
#[derive(Clone)]
pub struct Fleet(Arc<Inner>);

struct Inner {
    places: Vec<Place>,
    /// Of the first member that came; the others must agree.
    facts: OnceLock<Facts>,
    /// A member came or left.
    changed: watch::Sender<()>,
    phase: watch::Sender<Phase>,
    /// What members counted that are gone.
    buried: Mutex<Stats>,
    /// Equal members take turns.
    turn: AtomicUsize,
    seat_patience: Duration,
}

/// What a router needs to know of its model.
pub struct Facts {
    pub info: ReplicaInfo,
    pub files: ModelFiles,
    pub model_name: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Runs,
    Stops,
}

/// What a request needs of a member.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    pub prompt: &'a [TokenId],
    pub adapter: Option<AdapterDigest>,
    pub max_tokens: u32,
    /// Sequences that go together.
    pub n: u32,
    /// The member that alone has what answers.
    pub at: Option<&'a mpsc::Sender<Command>>,
}

impl Fleet {
    /// Returns when the first member answers, however long that takes. `seat_patience`: what a request waits for a member
    /// while there is none.
    pub async fn open(members: Vec<Member>, seat_patience: Duration) -> Fleet {
        let fleet = Fleet(Arc::new(Inner {
            places: members.into_iter().map(Place::new).collect(),
            facts: OnceLock::new(),
            changed: watch::Sender::new(()),
            phase: watch::Sender::new(Phase::Runs),
            buried: Mutex::default(),
            turn: AtomicUsize::new(0),
            seat_patience,
        }));
        let mut changed = fleet.0.changed.subscribe();
        for place in 0..fleet.0.places.len() {
            tokio::spawn(keep(fleet.0.clone(), place));
        }
        while fleet.0.facts.get().is_none() {
            changed.changed().await.expect("the fleet holds the sender");
        }
        fleet
    }

    pub fn facts(&self) -> &Facts {
        self.0.facts.get().expect("set when the fleet was opened")
    }

    pub fn info(&self) -> &ReplicaInfo {
        &self.facts().info
    }

    /// Whether a request could be sent now.
    pub fn is_ready(&self) -> bool {
        self.usable().next().is_some()
    }

    /// All members' numbers together; what is counted never falls.
    pub fn stats(&self) -> Stats {
        let mut all = lock(&self.0.buried).clone();
        self.replicas()
            .for_each(|(_, replica)| all.add(&replica.stats.borrow()));
        all
    }

    /// Sequences that run at once, over all members that take requests.
    pub fn slots(&self) -> u32 {
        self.usable().map(|(_, replica)| replica.info.max_num_seqs).sum()
    }

    /// Sequences that wait for a place, as the members last said: not those whose clients do not read.
    pub fn waiting(&self) -> u32 {
        let waiting = |stats: &Stats| stats.waiting.saturating_sub(stats.parked);
        self.usable()
            .map(|(_, replica)| waiting(&replica.stats.borrow()))
            .sum()
    }

    pub fn reports(&self) -> Vec<Report> {
        self.0.places.iter().map(Place::report).collect()
    }

    /// The best member for a request. Waits for one when there is none.
    pub async fn seat(&self, ask: Ask<'_>) -> Result<Seat, Fault> {
        let (mut changed, mut phase) = (self.0.changed.subscribe(), self.0.phase.subscribe());
        let found = async {
            loop {
                changed.mark_unchanged();
                if *phase.borrow_and_update() == Phase::Stops {
                    return Err(Fault::ShuttingDown);
                }
                if ask.at.is_some_and(mpsc::Sender::is_closed) {
                    let why = "the replica that held what was to answer, in memory only";
                    return Err(Fault::ReplicaLost(why.to_owned()));
                }
                if let Some(seat) = self.best(ask) {
                    return Ok(seat);
                }
                tokio::select! {
                    _ = changed.changed() => {}
                    _ = phase.changed() => {}
                }
            }
        };
        let found = tokio::time::timeout(self.0.seat_patience, found).await;
        found.unwrap_or_else(|_| Err(Fault::ReplicaLost(self.why_none())))
    }

    /// The member of this seat refused a request because it stops: the next goes elsewhere.
    pub fn stops(&self, seat: &Seat) {
        let place = self
            .replicas()
            .find(|(_, replica)| replica.commands.same_channel(&seat.commands));
        if let Some((place, _)) = place {
            place.stops.store(true, Ordering::Release);
        }
    }

    fn best(
        &self,
        Ask {
            prompt,
            adapter,
            max_tokens,
            n,
            at,
        }: Ask<'_>,
    ) -> Option<Seat> {
        let need = Need {
            prompt_tokens: prompt.len() as u32,
            tokens: prompt.len() as u32 + max_tokens,
        };
        let usable: Vec<(&Place, ReplicaHandle)> = match at {
            None => self.usable().collect(),
            Some(at) => {
                let is_there = |replica: &ReplicaHandle| replica.commands.same_channel(at);
                self.replicas().filter(|(_, replica)| is_there(replica)).collect()
            }
        };
        // With one member there is nothing to choose, and nothing to remember.
        let chain = match usable.len() {
            0 | 1 => Vec::new(),
            _ => affinity::chain(prompt, adapter, self.info().block_size as usize),
        };
        let turn = self.0.turn.fetch_add(1, Ordering::Relaxed);
        let count = usable.len();
        let (_, (place, replica)) =
            usable
                .into_iter()
                .enumerate()
                .min_by_key(|(index, (place, replica))| {
                    let stats = replica.stats.borrow();
                    let block_size = replica.info.block_size;
                    let blocks_seen = match chain.is_empty() {
                        true => 0,
                        false => lock(&place.memory).seen(&chain) as u32,
                    };
                    let view = View {
                        // What the replica says is up to a tenth of a second old, and of all routers; ours is of now.
                        sequences: place
                            .live
                            .load(Ordering::Acquire)
                            .max(stats.running + stats.waiting),
                        slots: replica.info.max_num_seqs,
                        cached_tokens: blocks_seen * block_size,
                        free_tokens: replica
                            .info
                            .tokens_in(stats.kv_blocks_total.saturating_sub(stats.kv_blocks_used)),
                        adapter: match adapter.is_none_or(|digest| stats.resident_adapters.contains(&digest))
                        {
                            true => Adapter::Ready,
                            false => Adapter::Absent,
                        },
                    };
                    (choice::cost(&view, &need), (index + turn) % count)
                })?;
        if !chain.is_empty() {
            lock(&place.memory).remember(&chain);
        }
        Some(Seat::new(replica.commands, &place.live, n))
    }

    /// Where a new job disturbs least: a member with the fewest, and of those the emptiest. `None`: each has as many as it
    /// may.
    pub fn job_seat(&self) -> Option<JobSeat> {
        let busy = |place: &Place, replica: &ReplicaHandle| {
            let stats = replica.stats.borrow();
            // What the replica says is of all routers, and not of what was just sent there.
            let jobs = place.jobs.load(Ordering::Acquire).max(stats.training_jobs);
            let live = place.live.load(Ordering::Acquire);
            (jobs, live.max(stats.running + stats.waiting))
        };
        self.usable()
            .map(|(place, replica)| (busy(place, &replica), place, replica))
            .filter(|((jobs, _), _, replica)| *jobs < replica.info.max_training_jobs)
            .min_by_key(|(busy, ..)| *busy)
            .map(|(_, place, replica)| JobSeat::new(replica, &place.jobs))
    }

    /// Every member that takes what is new.
    pub fn takers(&self) -> Vec<ReplicaHandle> {
        self.usable().map(|(_, replica)| replica).collect()
    }

    /// Every member that lives, those that drain too.
    pub fn all(&self) -> Vec<ReplicaHandle> {
        self.replicas().map(|(_, replica)| replica).collect()
    }

    /// Sends `Stop` to every member and waits until they are gone. A backend elsewhere lives on; its session ends.
    pub async fn shutdown(&self) {
        self.0.phase.send_replace(Phase::Stops);
        for replica in self.all() {
            // One that is gone needs no Stop.
            let _ = replica.commands.send(Command::Stop).await;
            let mut stats = replica.stats;
            let gone = async { while stats.changed().await.is_ok() {} };
            if tokio::time::timeout(STOP_PATIENCE, gone).await.is_err() {
                tracing::warn!("a replica did not stop in {STOP_PATIENCE:?}");
            }
        }
    }

    fn replicas(&self) -> impl Iterator<Item = (&Place, ReplicaHandle)> {
        self.0
            .places
            .iter()
            .filter_map(|place| match &*read(&place.state) {
                State::Up(replica, _) if !replica.commands.is_closed() => Some((place, replica.clone())),
                State::Up(..) | State::Down(_) => None,
            })
    }

    fn usable(&self) -> impl Iterator<Item = (&Place, ReplicaHandle)> {
        self.replicas().filter(|(place, replica)| {
            !place.stops.load(Ordering::Acquire) && !replica.stats.borrow().draining
        })
    }

    fn why_none(&self) -> String {
        let why = |report: Report| match report.standing {
            Standing::Up => format!("{} has just come", report.name),
            Standing::Draining => format!("{} is shutting down", report.name),
            Standing::Down(why) => format!("{}: {why}", report.name),
        };
        let all: Vec<String> = self.reports().into_iter().map(why).collect();
        format!(
            "no replica answers after {:?} ({})",
            self.0.seat_patience,
            all.join("; ")
        )
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}
