//! The replicas behind the router: made, watched, ejected when they are lost, made again. `tandem serve` is a fleet of
//! one replica in its own process; nothing else differs. Not here: what is asked of a replica, the wire (rpc).

mod affinity;
mod choice;

use std::future::Future;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tandem_core::TokenId;
use tandem_core::histogram::{Counted, Histogram};
use tandem_core::id::AdapterDigest;
use tandem_core::message::Fault;
use tandem_core::replica::{Command, ReplicaHandle, ReplicaInfo};
use tandem_core::stats::Stats;
use tandem_rpc::{ClientTls, ModelFiles, Token};
use tokio::sync::{mpsc, watch};

use affinity::Memory;
use choice::{Adapter, Need, View};

/// Between two tries to make a lost member again: the first, doubled up to the last.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// A member that lived as long begins again at the first.
const STABLE: Duration = Duration::from_secs(10);
/// What a replica may need to write a running job's state at the end.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// A place in the fleet and how it is filled.
pub struct Member {
    name: String,
    make: Make,
}

type Make = Box<dyn Fn() -> BoxFuture<'static, Result<Made, String>> + Send + Sync>;

/// A replica that answers, and what must be alike in all of a fleet.
pub struct Made {
    pub replica: ReplicaHandle,
    pub files: ModelFiles,
    /// What it calls the base model.
    pub model_name: String,
    /// Time from the replica to the router; a replica of this process has none.
    pub hop: Option<Arc<Histogram>>,
}

impl Member {
    /// `make` is called again, with a pause, whenever the replica it made is gone.
    pub fn new<F>(name: impl Into<String>, make: impl Fn() -> F + Send + Sync + 'static) -> Member
    where
        F: Future<Output = Result<Made, String>> + Send + 'static,
    {
        Member {
            name: name.into(),
            make: Box::new(move || Box::pin(make())),
        }
    }

    /// The backend at `url`, which is shown the token; one at `https://` by `tls`.
    pub fn remote(url: &str, token: Option<Token>, tls: Option<ClientTls>, data_dir: &Path) -> Member {
        let (address, data_dir) = (url.to_owned(), data_dir.to_owned());
        Member::new(url, move || {
            let (address, token, tls, data_dir) =
                (address.clone(), token.clone(), tls.clone(), data_dir.clone());
            async move {
                let remote = tandem_rpc::connect(&address, token.as_ref(), tls.as_ref(), &data_dir).await;
                let tandem_rpc::Remote {
                    replica,
                    files,
                    model_name,
                    hop,
                } = remote.map_err(|error| error.message)?;
                Ok(Made {
                    replica,
                    files,
                    model_name,
                    hop: Some(hop),
                })
            }
        })
    }
}

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

struct Place {
    name: String,
    make: Make,
    state: RwLock<State>,
    /// Sequences this router has there.
    live: Arc<AtomicU32>,
    /// Jobs this router has there.
    jobs: Arc<AtomicU32>,
    memory: Mutex<Memory>,
    /// A request was refused because it stops: known before its numbers say so. Its next life takes requests again.
    stops: AtomicBool,
    ejections: AtomicU64,
    past_hops: Mutex<Counted>,
}

#[expect(clippy::large_enum_variant, reason = "one a member, and mostly up")]
enum State {
    Up(ReplicaHandle, Option<Arc<Histogram>>),
    /// Why.
    Down(String),
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

/// Sequences' place at a member, counted until it is dropped.
pub struct Seat {
    pub commands: mpsc::Sender<Command>,
    live: Arc<AtomicU32>,
    n: u32,
}

impl Seat {
    fn new(commands: mpsc::Sender<Command>, live: &Arc<AtomicU32>, n: u32) -> Seat {
        live.fetch_add(n, Ordering::AcqRel);
        Seat {
            commands,
            live: live.clone(),
            n,
        }
    }

    /// Another seat at the same member, for `n` of these sequences that go on alone.
    pub fn split(&mut self, n: u32) -> Seat {
        self.n -= n;
        Seat {
            commands: self.commands.clone(),
            live: self.live.clone(),
            n,
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.live.fetch_sub(self.n, Ordering::AcqRel);
    }
}

/// A job's place at a member, counted until it is dropped.
pub struct JobSeat {
    pub replica: ReplicaHandle,
    jobs: Arc<AtomicU32>,
}

impl JobSeat {
    fn new(replica: ReplicaHandle, jobs: &Arc<AtomicU32>) -> JobSeat {
        jobs.fetch_add(1, Ordering::AcqRel);
        JobSeat {
            replica,
            jobs: jobs.clone(),
        }
    }
}

impl Drop for JobSeat {
    fn drop(&mut self) {
        self.jobs.fetch_sub(1, Ordering::AcqRel);
    }
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

impl Fleet {
    /// Returns when the first member answers, however long that takes. `seat_patience`: what a request waits for a member
    /// while there is none.
    pub async fn open(members: Vec<Member>, seat_patience: Duration) -> Fleet {
        let place = |Member { name, make }| Place {
            name,
            make,
            state: RwLock::new(State::Down("it has not answered yet".to_owned())),
            live: Arc::default(),
            jobs: Arc::default(),
            memory: Mutex::default(),
            ejections: AtomicU64::new(0),
            stops: AtomicBool::new(false),
            past_hops: Mutex::default(),
        };
        let fleet = Fleet(Arc::new(Inner {
            places: members.into_iter().map(place).collect(),
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
                        free_tokens: u64::from(stats.kv_blocks_total.saturating_sub(stats.kv_blocks_used))
                            * u64::from(block_size),
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

impl Place {
    fn report(&self) -> Report {
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

    fn set(&self, state: State) {
        *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

/// Makes a member, watches it, ejects it when it is gone, and makes it again, as long as the fleet runs.
async fn keep(fleet: Arc<Inner>, index: usize) {
    let place = &fleet.places[index];
    let mut phase = fleet.phase.subscribe();
    let mut pause = FIRST_RETRY;
    while *phase.borrow() == Phase::Runs {
        let made = (place.make)().await;
        match made.and_then(|made| fleet.agree(made)) {
            Ok(Made { replica, hop, .. }) => {
                let came = Instant::now();
                tracing::info!(
                    replica = place.name,
                    device = replica.info.device,
                    "a replica is up"
                );
                let handle = replica.clone();
                place.stops.store(false, Ordering::Release);
                place.set(State::Up(replica, hop));
                fleet.changed.send_replace(());
                handle.commands.closed().await;
                fleet.eject(place);
                if came.elapsed() > STABLE {
                    pause = FIRST_RETRY;
                }
            }
            Err(why) => {
                // Said once; it is tried for as long as it takes.
                let known = matches!(&*read(&place.state), State::Down(before) if *before == why);
                if !known {
                    tracing::warn!(replica = place.name, why, "a replica cannot be had");
                    place.set(State::Down(why));
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = phase.changed() => {}
        }
        pause = (pause * 2).min(LAST_RETRY);
    }
}

impl Inner {
    /// Replicas of one fleet answer the same; whoever differs is not let in.
    fn agree(&self, made: Made) -> Result<Made, String> {
        let first = self.facts.get_or_init(|| Facts {
            info: made.replica.info.clone(),
            files: made.files.clone(),
            model_name: made.model_name.clone(),
        });
        let (ours, its) = (&first.info, &made.replica.info);
        let differ = |what: &str, ours: String, its: String| match ours == its {
            true => Ok(()),
            false => Err(format!("its {what} is {its}, the fleet's is {ours}")),
        };
        differ(
            "base model",
            ours.base_digest.to_string(),
            its.base_digest.to_string(),
        )?;
        differ(
            "vocabulary",
            ours.vocab_size.to_string(),
            its.vocab_size.to_string(),
        )?;
        let text = |files: &ModelFiles| files.text_digest().to_string();
        differ(
            "tokenizer and chat template",
            text(&first.files),
            text(&made.files),
        )?;
        differ("dtype", ours.dtype.clone(), its.dtype.clone())?;
        differ(
            "max_model_len",
            ours.max_model_len.to_string(),
            its.max_model_len.to_string(),
        )?;
        differ(
            "max_lora_rank",
            ours.max_lora_rank.to_string(),
            its.max_lora_rank.to_string(),
        )?;
        differ(
            "list of LoRA targets",
            ours.lora_targets.join(" "),
            its.lora_targets.join(" "),
        )?;
        Ok(made)
    }

    fn eject(&self, place: &Place) {
        let down = State::Down("it was lost and has not come back".to_owned());
        let before = {
            let mut state = place.state.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *state, down)
        };
        let State::Up(replica, hop) = before else { return };
        let last = replica.stats.borrow().clone();
        lock(&self.buried).add_counters(&last);
        if let Some(hop) = hop {
            lock(&place.past_hops).add(&hop.counted());
        }
        // Whatever comes back begins with an empty cache.
        *lock(&place.memory) = Memory::default();
        place.ejections.fetch_add(1, Ordering::Relaxed);
        self.changed.send_replace(());
        match (*self.phase.borrow(), last.draining) {
            (Phase::Stops, _) => {}
            (Phase::Runs, true) => tracing::info!(replica = place.name, "a replica has drained and left"),
            (Phase::Runs, false) => tracing::warn!(replica = place.name, "a replica is lost"),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}
