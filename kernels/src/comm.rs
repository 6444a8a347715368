//! What the ranks of one replica say to each other: sums, gathered shards, one message a step. Ranks are threads of this
//! process ([`Comm::threads`]) or processes ([`Comm::join`]); one rank alone is [`Comm::solo`]. Not here: what is
//! sharded and how, who plans, how ranks are started.
//!
//! # Order of summation
//! On the CPU a sum is taken in rank order, element by element, in float32, whether ranks are threads or processes and
//! whatever the number of rows: the same bits on every rank, every time, beside any other rows. On a GPU the sum is
//! NCCL's (RCCL's): the same bits on every rank, its order a matter of size and topology.
//!
//! # A rank that is lost
//! A collective panics with a message that begins with [`LOST`], as torch's own ops panic: when a rank has left (its last
//! [`Comm`] was dropped, [`Comm::leave`] was called, its process died or fell silent), or when it kept the others waiting
//! for longer than [`Meeting::timeout`]. The group is of no use after that.

mod c10d;
mod meeting;
mod processes;
mod sum;
#[cfg(test)]
mod tests;
mod threads;
mod watch;

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

pub use meeting::{CommError, DEFAULT_PORT, DEFAULT_TIMEOUT, Meeting};

/// The beginning of the panic message of a collective that lost a rank.
pub const LOST: &str = "lost a rank";

/// Ranks a group may have: more is a typing error, and a rank is told in a byte.
pub const MAX_WORLD: usize = 64;

/// One rank's end of its replica's group. Every rank calls the same collectives in the same order.
#[derive(Clone)]
pub struct Comm {
    end: Arc<End>,
}

enum End {
    Solo,
    Thread(threads::Rank),
    Process(processes::Rank),
}

impl Comm {
    /// A group of one: collectives give back what they got, without a copy.
    pub fn solo() -> Comm {
        Comm::of(End::Solo)
    }

    /// The ends of `world` ranks that are threads of this process, in rank order. Tensors are on the CPU. A rank that
    /// idles in a collective sleeps, however long; there is no time-out, because a thread cannot vanish without
    /// dropping its `Comm`.
    pub fn threads(world: usize) -> Vec<Comm> {
        assert!((1..=MAX_WORLD).contains(&world), "a group of {world} ranks");
        match world {
            1 => vec![Comm::solo()],
            _ => threads::group(world)
                .map(|rank| Comm::of(End::Thread(rank)))
                .collect(),
        }
    }

    /// The end of this process, once all ranks of the meeting have come. Tensors are on `device`: the CPU (Gloo) or this
    /// rank's own GPU (NCCL, which is RCCL under ROCm). Returns within the time-out, either way.
    pub fn join(meeting: &Meeting, device: Device) -> Result<Comm, CommError> {
        match meeting.world {
            1 => Ok(Comm::solo()),
            _ => Ok(Comm::of(End::Process(processes::Rank::join(meeting, device)?))),
        }
    }

    fn of(end: End) -> Comm {
        Comm { end: Arc::new(end) }
    }

    pub fn rank(&self) -> usize {
        match &*self.end {
            End::Solo => 0,
            End::Thread(rank) => rank.rank(),
            End::Process(rank) => rank.rank(),
        }
    }

    pub fn world(&self) -> usize {
        match &*self.end {
            End::Solo => 1,
            End::Thread(rank) => rank.world(),
            End::Process(rank) => rank.world(),
        }
    }

    /// The group of the ranks that call it with the same `colour`, in rank order (MPI_Comm_split). Every rank calls. A process that is
    /// lost to one of its groups is lost to all; a thread's ends are dropped together.
    pub fn split(&self, colour: usize) -> Comm {
        let device = match &*self.end {
            End::Process(rank) => rank.device(),
            _ => Device::Cpu,
        };
        let colours = self.all_gather(&Tensor::from_slice(&[colour as i64]).to_device(device));
        let colours = Vec::<i64>::try_from(colours.view([-1])).expect("a colour of each rank");
        let has_it = |rank: &usize| colours[*rank] == colour as i64;
        let members: Vec<usize> = (0..self.world()).filter(has_it).collect();
        let part = match &*self.end {
            End::Solo => None,
            End::Thread(rank) => or_panic(rank.part(&members)).map(End::Thread),
            End::Process(rank) => or_panic(rank.part(&members)).map(End::Process),
        };
        part.map_or_else(Comm::solo, Comm::of)
    }

    /// Sums `x` over the ranks, in place. Any shape, the same on every rank; float32 or bfloat16 (which is summed in
    /// float32 and rounded once), contiguous.
    pub fn all_reduce(&self, x: &mut Tensor) {
        assert!(
            matches!(x.kind(), Kind::Float | Kind::BFloat16) && x.is_contiguous(),
            "a sum over ranks of {:?} {:?}, contiguous: {}",
            x.kind(),
            x.size(),
            x.is_contiguous()
        );
        match &*self.end {
            End::Solo => (),
            End::Thread(rank) => or_panic(rank.all_reduce(x)),
            End::Process(rank) => or_panic(rank.all_reduce(x)),
        }
    }

    /// Sums `x [world * n]` over the ranks and returns this rank's `[n]` of it: the bits that [`Comm::all_reduce`] makes. float32,
    /// contiguous. (Alone: `x` itself.)
    pub fn reduce_scatter(&self, x: &Tensor) -> Tensor {
        assert!(
            x.kind() == Kind::Float && x.is_contiguous() && x.numel().is_multiple_of(self.world()),
            "a sum over {} ranks in parts of {:?} {:?}",
            self.world(),
            x.kind(),
            x.size()
        );
        match &*self.end {
            End::Solo => x.shallow_clone(),
            End::Thread(rank) => or_panic(rank.reduce_scatter(x)),
            End::Process(rank) => or_panic(rank.reduce_scatter(x)),
        }
    }

    /// `[n, ...]` of each rank, of one shape and kind, to `[world, n, ...]` in rank order. (Alone: a view of `x`.)
    pub fn all_gather(&self, x: &Tensor) -> Tensor {
        if let End::Solo = *self.end {
            return x.unsqueeze(0);
        }
        let shape: Vec<i64> = std::iter::once(self.world() as i64).chain(x.size()).collect();
        let out = Tensor::empty(shape, (x.kind(), x.device()));
        self.all_gather_into(&out, x);
        out
    }

    /// [`Comm::all_gather`] into memory that is there: contiguous, of the world times as many elements of the kind of `x`.
    pub fn all_gather_into(&self, out: &Tensor, x: &Tensor) {
        assert!(
            out.is_contiguous() && out.kind() == x.kind() && out.numel() == self.world() * x.numel(),
            "{:?} {:?} of {} ranks into {:?} {:?}",
            x.kind(),
            x.size(),
            self.world(),
            out.kind(),
            out.size()
        );
        match &*self.end {
            End::Solo => out.shallow_clone().view([-1]).copy_(&x.reshape([-1])),
            End::Thread(rank) => or_panic(rank.all_gather(out, &x.contiguous())),
            End::Process(rank) => or_panic(rank.all_gather(out, &x.contiguous())),
        }
    }

    /// Whether any rank says so. `device`: where the ranks' tensors are.
    pub fn any(&self, is: bool, device: Device) -> bool {
        match self.world() {
            1 => is,
            _ => {
                let said = self.all_gather(&Tensor::from_slice(&[i64::from(is)]).to_device(device));
                said.max().int64_value(&[]) != 0
            }
        }
    }

    /// Rank 0's bytes to every rank; what the others pass is not looked at. A rank other than 0 may wait here for as
    /// long as rank 0 has nothing to say.
    pub fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8> {
        match &*self.end {
            End::Solo => bytes,
            End::Thread(rank) => or_panic(rank.broadcast(bytes)),
            End::Process(rank) => or_panic(rank.broadcast(bytes)),
        }
    }

    /// Returns when every rank is here. Waits without limit while all live: for what takes ranks differently long, such
    /// as loading weights.
    pub fn meet(&self) {
        match &*self.end {
            End::Solo => (),
            End::Thread(rank) => or_panic(rank.meet()),
            End::Process(rank) => or_panic(rank.meet()),
        }
    }

    /// Panics if a rank was lost. After reading a result back from a GPU: a collective there is only queued when its call
    /// returns, and one that was cut short leaves any numbers.
    pub fn check(&self) {
        match &*self.end {
            End::Solo => (),
            End::Thread(rank) => or_panic(rank.check()),
            End::Process(rank) => or_panic(rank.check()),
        }
    }

    /// Gives up the group: every rank that waits in a collective, or enters one later, panics with [`LOST`]. Also from
    /// another thread than the rank's own. Alone: nothing.
    pub fn leave(&self) {
        match &*self.end {
            End::Solo => (),
            End::Thread(rank) => rank.leave(),
            End::Process(rank) => rank.leave(),
        }
    }
}

/// Why a collective did not happen.
struct Lost(String);

fn or_panic<T>(result: Result<T, Lost>) -> T {
    result.unwrap_or_else(|Lost(reason)| panic!("{LOST}: {reason}"))
}
