//! How the ranks of a replica come together: threads of this process, processes that rank 0 starts, or processes that
//! somebody else started (torchrun, Slurm, Kubernetes). And how they part. Not here: what they do together.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_kernels::comm::{Comm, Meeting};
use tandem_kernels::pool;
use tch::{Cuda, Device};
use tracing::{error, info, warn};

use super::Errand;
use super::follow::Follower;
use super::load::{self, Copy, Place, Ready};
use crate::family;
use crate::guard::{self, TorchFault};
use crate::start::set_threads;
use crate::train::{TrainError, run};
use crate::weights::LoadError;
use crate::words::device_name;

/// How long rank 0 waits for ranks that somebody else starts; one attempt to meet takes a minute of it.
const MEETING_PATIENCE: Duration = Duration::from_secs(600);
/// What a rank may need to end by itself, before its process is killed.
const GOODBYE: Duration = Duration::from_secs(2);
const GOODBYE_LOOK: Duration = Duration::from_millis(5);

/// Who computes a replica.
#[derive(Clone, Debug)]
pub enum Team {
    /// So many threads of this process, on the CPU. 1: the engine's thread alone.
    Threads(usize),
    /// Processes on this machine: `program rank` becomes one ([`follow_parent`]).
    Processes { world: usize, program: PathBuf },
    /// Somebody starts all of them; this is rank 0. The others call [`follow_meeting`].
    Meeting { meeting: Meeting, local_world: usize },
}

impl Team {
    pub fn world(&self) -> usize {
        match self {
            Team::Threads(world) | Team::Processes { world, .. } => *world,
            Team::Meeting { meeting, .. } => meeting.world,
        }
    }
}

/// Rank 0, met with the others.
pub struct Assembled {
    pub comm: Comm,
    /// Of this rank.
    pub device: Device,
    /// Ranks that share this machine's memory.
    pub local_world: usize,
    /// To be dropped after every [`Comm`] of this rank: it waits for their end.
    pub followers: Followers,
}

/// The ranks that this process started.
#[derive(Default)]
pub struct Followers {
    threads: Vec<JoinHandle<()>>,
    children: Vec<Child>,
}

impl Drop for Followers {
    fn drop(&mut self) {
        for thread in self.threads.drain(..) {
            // It reports its own end.
            let _ = thread.join();
        }
        let until = Instant::now() + GOODBYE;
        for child in &mut self.children {
            // Without a parent's hand on its standard input a rank ends.
            drop(child.stdin.take());
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
                std::thread::sleep(GOODBYE_LOOK);
            }
            // An error means that it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Gathers the team around this thread, which is rank 0, and gives it its share of the compute threads.
pub fn gather(team: &Team, device: Device, threads: Option<usize>) -> Result<Assembled, LoadError> {
    let mut followers = Followers::default();
    match team {
        Team::Threads(0 | 1) => {
            set_threads(device, threads);
            Ok(Assembled {
                comm: Comm::solo(),
                device,
                local_world: 1,
                followers,
            })
        }
        Team::Threads(_) if device != Device::Cpu => Err(LoadError::Option(format!(
            "ranks on {device:?} are processes, not threads"
        ))),
        Team::Threads(world) => {
            set_threads(device, threads);
            let mut comms = Comm::threads(*world).into_iter();
            let comm = comms.next().expect("a group has a rank 0");
            pool::take_share(0, *world);
            for comm in comms {
                let builder = std::thread::Builder::new().name(format!("tandem-rank-{}", comm.rank()));
                let spawned = builder.spawn(move || thread_rank(comm));
                let spawned = spawned.map_err(|error| cannot_start("a rank's thread", &error))?;
                followers.threads.push(spawned);
            }
            Ok(Assembled {
                comm,
                device,
                local_world: *world,
                followers,
            })
        }
        Team::Processes { world, program } => {
            let meeting = Meeting {
                rank: 0,
                world: *world,
                local_rank: 0,
                master_addr: Ipv4Addr::LOCALHOST.to_string(),
                master_port: free_port()?,
                timeout: tandem_kernels::comm::DEFAULT_TIMEOUT,
            };
            let device = of_rank(device, &meeting, *world)?;
            for rank in 1..*world {
                followers
                    .children
                    .push(spawn(program, &meeting, rank, device, threads)?);
            }
            let threads = share_of_threads(device, threads, 0, *world);
            info!(
                ranks = world,
                threads,
                port = meeting.master_port,
                "ranks are processes"
            );
            Ok(Assembled {
                comm: join(&meeting, device, Duration::ZERO)?,
                device,
                local_world: *world,
                followers,
            })
        }
        Team::Meeting { meeting, local_world } => {
            let device = of_rank(device, meeting, *local_world)?;
            share_of_threads(device, threads, meeting.local_rank, *local_world);
            let Meeting {
                world,
                master_addr,
                master_port,
                ..
            } = meeting;
            info!(ranks = world, at = %master_addr, port = master_port, "waiting for the other ranks");
            Ok(Assembled {
                comm: join(meeting, device, MEETING_PATIENCE)?,
                device,
                local_world: *local_world,
                followers,
            })
        }
    }
}

/// A rank whose parent is rank 0: until the replica ends. It knows from rank 0 what to load.
pub fn follow_parent(meeting: &Meeting, device: Device, threads: Option<usize>) -> Result<(), LoadError> {
    let device = of_rank(device, meeting, meeting.world)?;
    share_of_threads(device, threads, meeting.local_rank, meeting.world);
    let place = Place {
        device,
        local_world: meeting.world,
        digests: None,
    };
    live(
        join(meeting, device, Duration::ZERO)?,
        &place,
        Copy::SameAsRank0,
        None,
    )
}

/// A rank that somebody started beside rank 0, with the same options: until the replica ends in order. When a rank is
/// lost it meets the others again.
pub fn follow_meeting(
    meeting: &Meeting,
    local_world: usize,
    device: Device,
    threads: Option<usize>,
    model_folder: &Path,
) -> Result<(), LoadError> {
    let device = of_rank(device, meeting, local_world)?;
    share_of_threads(device, threads, meeting.local_rank, local_world);
    let place = Place {
        device,
        local_world,
        digests: None,
    };
    // One rank of each machine but rank 0's hashes the machine's copy. (Rank 0 is the first of its own.)
    let copy = match meeting.local_rank {
        0 => Copy::Own,
        _ => Copy::SameAsRank0,
    };
    loop {
        info!(rank = meeting.rank, ranks = meeting.world, at = %meeting.master_addr, "looking for rank 0");
        let comm = match join(meeting, device, MEETING_PATIENCE) {
            Ok(comm) => comm,
            Err(error) => {
                warn!(%error, "trying again");
                continue;
            }
        };
        match live(comm, &place, copy, Some(model_folder)) {
            Err(LoadError::Lost(why)) => warn!(why, "the replica is over; meeting again"),
            end => return end,
        }
    }
}

/// A rank that somebody started beside rank 0 to train with it: until the run ends, or stops because some rank `stops`.
pub fn train_meeting(
    meeting: &Meeting,
    local_world: usize,
    device: Device,
    model_folder: &Path,
    stops: &dyn Fn() -> bool,
) -> Result<(), TrainError> {
    let device = of_rank(device, meeting, local_world)?;
    share_of_threads(device, None, meeting.local_rank, local_world);
    info!(rank = meeting.rank, ranks = meeting.world, at = %meeting.master_addr, "looking for rank 0");
    let comm = join(meeting, device, MEETING_PATIENCE)?;
    match guard::torch(|| Errand::heard(&comm)).map_err(TrainError::Fault)? {
        Errand::Train(order) => run::follow(*order, device, Some(model_folder), comm, stops),
        Errand::Nothing => guard::torch(|| comm.meet()).map_err(TrainError::Fault),
        Errand::Serve(_) => {
            let message = "rank 0 serves, this rank was started to train";
            Err(LoadError::Option(message.to_owned()).into())
        }
    }
}

/// One life of a rank that is not rank 0.
fn live(comm: Comm, place: &Place, copy: Copy, own_folder: Option<&Path>) -> Result<(), LoadError> {
    let rank = comm.rank();
    let lost = |fault: TorchFault| LoadError::Lost(format!("rank {rank}: {fault}"));
    let plan = match guard::torch(|| Errand::heard(&comm)).map_err(lost)? {
        Errand::Serve(plan) => plan,
        Errand::Train(order) => {
            let ended = run::follow(*order, place.device, own_folder, comm, &|| false);
            return ended.map_err(|error| LoadError::Lost(format!("rank {rank}: {error}")));
        }
        Errand::Nothing => return guard::torch(|| comm.meet()).map_err(lost),
    };
    let loaded = guard::torch(|| -> Result<Ready, LoadError> {
        let folder = load::folder(&plan, own_folder);
        let (spec, checkpoint) = family::open(folder)?;
        load::load(&plan, spec, &checkpoint, place, copy, comm)
    });
    let Ready { decoder, cache, .. } = loaded.map_err(|fault| LoadError::Lost(fault.message))??;
    Follower::new(decoder, cache).follow().map_err(lost)
}

fn thread_rank(comm: Comm) {
    let (rank, world) = (comm.rank(), comm.world());
    pool::take_share(rank, world);
    let place = Place {
        device: Device::Cpu,
        local_world: world,
        digests: None,
    };
    if let Err(error) = live(comm, &place, Copy::SameAsRank0, None) {
        error!(rank, %error, "a rank ends");
    }
}

/// Tries again, for as long as there is patience.
fn join(meeting: &Meeting, device: Device, patience: Duration) -> Result<Comm, LoadError> {
    let until = Instant::now() + patience;
    loop {
        match Comm::join(meeting, device) {
            Ok(comm) => return Ok(comm),
            Err(error) if Instant::now() < until => warn!(%error, "trying again"),
            Err(error) => return Err(LoadError::Lost(error.to_string())),
        }
    }
}

/// On GPUs each rank of a machine has its own.
fn of_rank(device: Device, meeting: &Meeting, local_world: usize) -> Result<Device, LoadError> {
    let Device::Cuda(_) = device else {
        return Ok(device);
    };
    let gpus = Cuda::device_count().max(0) as usize;
    match local_world.max(meeting.local_rank + 1) <= gpus {
        true => Ok(Device::Cuda(meeting.local_rank)),
        false => Err(LoadError::Option(format!(
            "{local_world} ranks on this machine (local rank {}) need a GPU each; libtorch sees {gpus}",
            meeting.local_rank
        ))),
    }
}

/// Processes of one machine compute at the same time, so they divide its compute threads.
fn share_of_threads(device: Device, threads: Option<usize>, local_rank: usize, local_world: usize) -> usize {
    let all = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let share = ((all + local_rank) / local_world).max(1);
    set_threads(device, Some(share));
    share
}

fn spawn(
    program: &Path,
    meeting: &Meeting,
    rank: usize,
    device: Device,
    threads: Option<usize>,
) -> Result<Child, LoadError> {
    // On a GPU each rank finds its own.
    let device = match device {
        Device::Cuda(_) => "cuda".to_owned(),
        other => device_name(other),
    };
    let threads = threads.map(|threads| format!("--threads={threads}"));
    let child = Command::new(program)
        .args(["rank", "--device", &device])
        .args(threads)
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("WORLD_SIZE", meeting.world.to_string())
        .env("MASTER_ADDR", &meeting.master_addr)
        .env("MASTER_PORT", meeting.master_port.to_string())
        .env_remove("TORCHELASTIC_USE_AGENT_STORE")
        // A key that ends this process in a terminal is not meant for it.
        .process_group(0)
        // Closes when this process ends, however it ends.
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn();
    child.map_err(|error| cannot_start(&format!("{} rank", program.display()), &error))
}

/// One that was free a moment ago.
fn free_port() -> Result<u16, LoadError> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|error| cannot_start("the ranks' meeting", &error))
}

fn cannot_start(what: &str, error: &std::io::Error) -> LoadError {
    LoadError::Option(format!("cannot start {what}: {error}"))
}
