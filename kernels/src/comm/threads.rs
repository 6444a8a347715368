//! Ranks that are threads of one process: collectives over each other's tensors, where they lie. No copy stands between;
//! a rank sums (or copies) its own columns of everyone's tensor.
//!
//! A collective is two meetings. At the first every rank has said where its tensor lies; then each works on its columns;
//! at the second all are done and the tensors are their owners' again. A rank may be given up only before the first is
//! complete: it withdraws then and nobody touches its tensor. Between the two nothing waits and nothing fails.

use std::collections::HashMap;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::sum::{self, Element};
use super::{Lost, MAX_WORLD};

/// How long a rank that waits looks without pause; a look costs less than offering the core. Short, because the rank that
/// is waited for may need this very core (with a foreign program on the other one, 60 us here made a sum of 130 us).
/// Nothing where ranks outnumber cores.
const SPIN: Duration = Duration::from_micros(10);
/// After that, how long it offers its core between looks before it sleeps (waking costs several microseconds).
const YIELD: Duration = Duration::from_micros(400);
/// Columns are divided at multiples of this many elements, so that no two ranks write one cache line.
const GRAIN: usize = 32;

/// One rank's end.
pub(super) struct Rank {
    rank: usize,
    group: Arc<Group>,
}

pub(super) fn group(world: usize) -> impl Iterator<Item = Rank> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let group = Arc::new(Group {
        world,
        spin: if world <= cores { SPIN } else { Duration::ZERO },
        brought: (0..world).map(|_| Slot::default()).collect(),
        message: Mutex::default(),
        parts: Mutex::default(),
        arrivals: CacheLine(AtomicU64::new(0)),
        done: CacheLine(AtomicU64::new(0)),
        sleepers: AtomicUsize::new(0),
        bed: Mutex::new(()),
        morning: Condvar::new(),
    });
    (0..world).map(move |rank| Rank {
        rank,
        group: group.clone(),
    })
}

struct Group {
    world: usize,
    spin: Duration,
    brought: Box<[Slot]>,
    /// Of the broadcast under way; rank 0 writes it before it arrives.
    message: Mutex<Arc<[u8]>>,
    /// Of a split under way: the end of each rank in its part.
    parts: Mutex<HashMap<usize, Rank>>,
    /// [`Arrivals`], packed.
    arrivals: CacheLine<AtomicU64>,
    /// Ranks that were done with their part, over all rounds.
    done: CacheLine<AtomicU64>,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    morning: Condvar,
}

#[repr(align(128))]
struct CacheLine<T>(T);

/// The first meeting of each round. One word, so that "all are here" and "one has left" exclude each other.
#[derive(Clone, Copy)]
struct Arrivals {
    /// Complete rounds.
    round: u64,
    /// The rank that gave up the group. A round that was not complete then never will be.
    left: Option<usize>,
    here: usize,
}

impl Arrivals {
    fn unpack(word: u64) -> Arrivals {
        Arrivals {
            round: word >> 16,
            left: ((word >> 8) as usize & 0xff).checked_sub(1),
            here: word as usize & 0xff,
        }
    }

    fn pack(self) -> u64 {
        self.round << 16 | (self.left.map_or(0, |rank| rank + 1) << 8) as u64 | self.here as u64
    }
}

const _: () = assert!(MAX_WORLD < 0xff);

/// What a rank brings to a round. Written before it arrives, read between the meetings.
#[derive(Default)]
#[repr(align(128))]
struct Slot {
    data: AtomicPtr<u8>,
    /// [`Deed`], packed.
    deed: AtomicU64,
}

/// What a rank means to do: all must mean the same.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deed {
    Reduce { elements: usize, kind: Kind },
    ReduceScatter { elements: usize },
    Gather { bytes: usize },
    Broadcast,
    Meet,
}

impl Deed {
    fn pack(self) -> u64 {
        let (number, size) = match self {
            Deed::Reduce {
                elements,
                kind: Kind::BFloat16,
            } => (1, elements),
            Deed::Reduce { elements, .. } => (2, elements),
            Deed::Gather { bytes } => (3, bytes),
            Deed::Broadcast => (4, 0),
            Deed::Meet => (5, 0),
            Deed::ReduceScatter { elements } => (6, elements),
        };
        (size as u64) << 4 | number
    }
}

impl Rank {
    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world(&self) -> usize {
        self.group.world
    }

    pub fn all_reduce(&self, x: &mut Tensor) -> Result<(), Lost> {
        match x.kind() {
            Kind::Float => self.reduce::<f32>(x),
            _ => self.reduce::<bf16>(x),
        }
    }

    fn reduce<T: Element>(&self, x: &mut Tensor) -> Result<(), Lost> {
        let (kind, elements) = (x.kind(), x.numel());
        self.together(cpu_data(x), Deed::Reduce { elements, kind }, |brought| {
            let (begin, end) = self.columns(elements);
            let parts = brought.map(|data| data.cast::<T>().wrapping_add(begin));
            let (targets, parts) = (&parts, parts.map(|part| part.cast_const()));
            // SAFETY: between the meetings every rank lends its tensor, of this many elements (all said the same deed),
            // and these columns of all of them are this rank's alone.
            unsafe {
                sum::in_rank_order(&parts[..self.group.world], end - begin, |offset, sums| {
                    for target in &targets[..self.group.world] {
                        std::ptr::copy_nonoverlapping(sums.as_ptr(), target.add(offset), sums.len());
                    }
                });
            }
        })
    }

    /// `x [world * n]`: contiguous float32.
    pub fn reduce_scatter(&self, x: &Tensor) -> Result<Tensor, Lost> {
        let (elements, world) = (x.numel(), self.group.world);
        let part = elements / world;
        let out = Tensor::empty([part as i64], (Kind::Float, Device::Cpu));
        let target = cpu_data(&out).cast::<f32>();
        self.together(cpu_data(x), Deed::ReduceScatter { elements }, |brought| {
            let parts = brought.map(|data| data.cast::<f32>().wrapping_add(part * self.rank).cast_const());
            // SAFETY: between the meetings every rank lends its tensor, of this many elements, and nobody writes to it; `out`
            // is new.
            unsafe {
                sum::in_rank_order(&parts[..world], part, |offset, sums| {
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), target.add(offset), sums.len());
                });
            }
        })?;
        Ok(out)
    }

    /// Both contiguous, `out` the world times as large.
    pub fn all_gather(&self, out: &Tensor, x: &Tensor) -> Result<(), Lost> {
        let bytes = x.numel() * x.kind().elt_size_in_bytes();
        let target = cpu_data(out);
        self.together(cpu_data(x), Deed::Gather { bytes }, |brought| {
            for (rank, part) in brought[..self.group.world].iter().enumerate() {
                // SAFETY: between the meetings every rank lends its tensor, of this many bytes; `out` has room for all.
                unsafe { std::ptr::copy_nonoverlapping(part.cast_const(), target.add(rank * bytes), bytes) }
            }
        })
    }

    pub fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, Lost> {
        if self.rank == 0 {
            *self.message() = bytes.as_slice().into();
        }
        let message = self.together(std::ptr::null_mut(), Deed::Broadcast, |_| self.message().clone())?;
        Ok(match self.rank {
            0 => bytes,
            _ => message.to_vec(),
        })
    }

    fn message(&self) -> MutexGuard<'_, Arc<[u8]>> {
        let message = self.group.message.lock();
        message.expect("nothing panics while it holds this lock")
    }

    pub fn meet(&self) -> Result<(), Lost> {
        self.together(std::ptr::null_mut(), Deed::Meet, |_| ())
    }

    /// This rank's end in a group of `members`, of which it is one. Every rank calls, each of a part with the same members. Between
    /// two calls all meet. `None`: it is the only one.
    pub fn part(&self, members: &[usize]) -> Result<Option<Rank>, Lost> {
        let parts = || {
            let parts = self.group.parts.lock();
            parts.expect("nothing panics while it holds this lock")
        };
        if members.len() > 1 && members.first() == Some(&self.rank) {
            parts().extend(members.iter().copied().zip(group(members.len())));
        }
        self.meet()?;
        Ok(parts().remove(&self.rank))
    }

    pub fn check(&self) -> Result<(), Lost> {
        match Arrivals::unpack(self.group.arrivals.0.load(SeqCst)).left {
            Some(rank) => Err(self.group.lost(rank)),
            None => Ok(()),
        }
    }

    pub fn leave(&self) {
        let left = |word| {
            let now = Arrivals::unpack(word);
            let left = Some(now.left.unwrap_or(self.rank));
            Some(Arrivals { left, ..now }.pack())
        };
        let update = self.group.arrivals.0.fetch_update(SeqCst, SeqCst, left);
        update.expect("the closure always has a value");
        self.group.wake();
    }

    /// A round: brings `data`, and does `work` with what all brought (in rank order, the first `world` of the array).
    fn together<T>(
        &self,
        data: *mut u8,
        deed: Deed,
        work: impl FnOnce(&[*mut u8; MAX_WORLD]) -> T,
    ) -> Result<T, Lost> {
        let group = &*self.group;
        let slot = &group.brought[self.rank];
        slot.data.store(data, Release);
        slot.deed.store(deed.pack(), Release);
        let round = group.arrive()?;
        // Counted even if `work` panics: the others must not wait for ever.
        let done = Done { group, round };
        let mut brought = [std::ptr::null_mut(); MAX_WORLD];
        let mut same = true;
        for (data, slot) in brought.iter_mut().zip(&group.brought) {
            *data = slot.data.load(Acquire);
            same &= slot.deed.load(Acquire) == deed.pack();
        }
        // All see the same deeds, so all stop here or none.
        assert!(same, "the ranks of a group do not mean the same collective");
        let result = work(&brought);
        drop(done);
        Ok(result)
    }

    /// This rank's part of `0..n`.
    fn columns(&self, n: usize) -> (usize, usize) {
        let border = |rank: usize| (n * rank / self.group.world).next_multiple_of(GRAIN).min(n);
        let end = match self.rank + 1 == self.group.world {
            true => n,
            false => border(self.rank + 1),
        };
        (border(self.rank), end)
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.leave();
    }
}

fn cpu_data(x: &Tensor) -> *mut u8 {
    assert_eq!(
        x.device(),
        Device::Cpu,
        "ranks that are threads compute on the CPU"
    );
    x.data_ptr().cast()
}

/// The second meeting: dropped, it waits until all are done with the round.
struct Done<'a> {
    group: &'a Group,
    round: u64,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        let Done { group, round } = *self;
        let all = round * group.world as u64;
        // A faster rank cannot be a round ahead: the next first meeting needs this one.
        match group.done.0.fetch_add(1, SeqCst) + 1 == all {
            true => group.wake(),
            false => group.until(|| (group.done.0.load(SeqCst) >= all).then_some(())),
        }
    }
}

impl Group {
    /// The first meeting. Returns the number of the round it completes, from 1.
    fn arrive(&self) -> Result<u64, Lost> {
        let mut word = self.arrivals.0.load(SeqCst);
        let round = loop {
            let now = Arrivals::unpack(word);
            if let Some(rank) = now.left {
                return Err(self.lost(rank));
            }
            let last = now.here + 1 == self.world;
            let next = match last {
                true => Arrivals {
                    round: now.round + 1,
                    here: 0,
                    ..now
                },
                false => Arrivals {
                    here: now.here + 1,
                    ..now
                },
            };
            match self
                .arrivals
                .0
                .compare_exchange_weak(word, next.pack(), SeqCst, SeqCst)
            {
                Err(changed) => word = changed,
                Ok(_) if last => {
                    self.wake();
                    return Ok(next.round);
                }
                Ok(_) => break next.round,
            }
        };
        self.until(|| {
            let now = Arrivals::unpack(self.arrivals.0.load(SeqCst));
            match (now.round > round, now.left) {
                // Complete before anyone left.
                (true, _) => Some(Ok(round + 1)),
                (false, Some(rank)) => Some(Err(self.lost(rank))),
                (false, None) => None,
            }
        })
    }

    fn lost(&self, rank: usize) -> Lost {
        Lost(format!("rank {rank} of {} left the group", self.world))
    }

    fn until<T>(&self, look: impl Fn() -> Option<T>) -> T {
        let begun = Instant::now();
        let mut looks = 0u32;
        loop {
            if let Some(seen) = look() {
                return seen;
            }
            looks += 1;
            if looks.is_multiple_of(64) || self.spin.is_zero() {
                let waited = begun.elapsed();
                if waited > self.spin + YIELD {
                    break;
                }
                if waited > self.spin {
                    std::thread::yield_now();
                }
            }
            std::hint::spin_loop();
        }
        let mut bed = self.bed.lock().expect("nothing panics while it holds this lock");
        // Either `wake` sees this sleeper, or the look below sees what was changed before it (SeqCst).
        self.sleepers.fetch_add(1, SeqCst);
        let seen = loop {
            if let Some(seen) = look() {
                break seen;
            }
            bed = self
                .morning
                .wait(bed)
                .expect("nothing panics while it holds this lock");
        };
        self.sleepers.fetch_sub(1, SeqCst);
        seen
    }

    /// After every change that someone may wait for.
    fn wake(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            drop(self.bed.lock().expect("nothing panics while it holds this lock"));
            self.morning.notify_all();
        }
    }
}
