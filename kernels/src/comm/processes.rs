//! Ranks that are processes, of one machine or of several: collectives by c10d, made to sum in rank order on the CPU, and
//! a watch over who is alive. Not here: how the processes are started.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::c10d::{Failure, Group, Invitation, Limit, StoreSide};
use super::sum::{self, Element};
use super::watch::{Place, Watch};
use super::{CommError, Lost, Meeting};

/// Messages up to this long, their length included, take one collective; what is longer takes another.
const MESSAGE_BYTES: usize = 4096;
const LENGTH_BYTES: usize = 8;
/// Up to this size everyone gets everyone's tensor and sums all of it: one collective instead of two. Beyond, each rank
/// sums its own part and hands it on, which moves less.
const GATHERED_BYTES: usize = 256 << 10;
/// Between two attempts at a name that is not known yet (a pod's, while its group starts).
const NAME_PAUSE: std::time::Duration = std::time::Duration::from_millis(500);

/// One rank's end.
pub(super) struct Rank {
    rank: usize,
    world: usize,
    device: Device,
    /// Held during a collective: clones of a `Comm` take turns.
    turn: Mutex<()>,
    /// Splits so far.
    splits: AtomicUsize,
    /// The address that the others reach us by.
    own_address: String,
    // The watch ends before the group it would give up. It is of all ranks that met, also in a part of them.
    watch: Arc<Watch>,
    group: Arc<Group>,
}

impl Rank {
    pub fn join(meeting: &Meeting, device: Device) -> Result<Rank, CommError> {
        let Meeting {
            rank,
            world,
            local_rank: _,
            ref master_addr,
            master_port,
            timeout,
        } = *meeting;
        let deadline = Instant::now() + timeout;
        let master = resolve(meeting, deadline)?;
        let own_address = own_address(master, master_port).map_err(|error| meeting.failed(error))?;
        let own_address = own_address.to_string();
        let (store, prefix) = agent_store().unwrap_or_else(|| match rank {
            0 => (StoreSide::Serves, "tandem".to_owned()),
            _ => (StoreSide::Asks, "tandem".to_owned()),
        });
        let failed = |Failure(why): Failure| meeting.failed(why);
        let group = Group::join(&Invitation {
            host: master_addr,
            port: master_port,
            store,
            prefix: &prefix,
            rank,
            world,
            own_address: &own_address,
            device,
            limit: timeout,
        })
        .map_err(failed)?;
        let group = Arc::new(group);
        let place = Place {
            rank,
            world,
            master,
            deadline,
        };
        let watch = Watch::start(&place, group.clone()).map_err(failed)?;
        Ok(Rank {
            rank,
            world,
            device,
            turn: Mutex::default(),
            splits: AtomicUsize::default(),
            own_address,
            watch: Arc::new(watch),
            group,
        })
    }

    /// This rank's end in a group of `members`, of which it is one. Every rank calls, each of a part with the same members. Who is
    /// lost to one group is lost to all. `None`: it is the only one.
    pub fn part(&self, members: &[usize]) -> Result<Option<Rank>, Lost> {
        let split = self.splits.fetch_add(1, Relaxed);
        if members.len() == 1 {
            return Ok(None);
        }
        let (rank, world) = (
            members.iter().position(|&member| member == self.rank),
            members.len(),
        );
        let rank = rank.expect("a rank is a member of its part");
        let prefix = format!("part/{split}/{}", members[0]);
        let group = self.group.part(&prefix, rank, world, &self.own_address);
        let group = Arc::new(group.map_err(|failure| self.lost(failure))?);
        self.watch.also_over(group.clone());
        Ok(Some(Rank {
            rank,
            world,
            device: self.device,
            turn: Mutex::default(),
            splits: AtomicUsize::default(),
            own_address: self.own_address.clone(),
            watch: self.watch.clone(),
            group,
        }))
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world(&self) -> usize {
        self.world
    }

    pub fn all_reduce(&self, x: &mut Tensor) -> Result<(), Lost> {
        self.check_device(x);
        let _turn = self.turn();
        match (self.device, x.kind()) {
            (Device::Cpu, Kind::Float) => self.reduce::<f32>(x),
            (Device::Cpu, _) => self.reduce::<bf16>(x),
            _ => self.group.all_reduce(x),
        }
        .map_err(|failure| self.lost(failure))
    }

    /// In rank order, as ranks that are threads do it: the same bits.
    fn reduce<T: Element>(&self, x: &mut Tensor) -> Result<(), Failure> {
        let (world, kind, elements) = (self.world, x.kind(), x.numel());
        let element_bytes = kind.elt_size_in_bytes();
        let small = elements * element_bytes <= GATHERED_BYTES;
        if world == 2 && !small {
            // Two summands have one order only, so Gloo's is ours; a gather is a third of its time where it is small.
            return self.group.all_reduce(x);
        }
        if small {
            let shape: Vec<i64> = std::iter::once(world as i64).chain(x.size()).collect();
            let parts = Tensor::empty(shape, (kind, Device::Cpu));
            self.group.all_gather(&mut bytes(&parts), &bytes(x))?;
            // SAFETY: `parts` holds the elements of each rank's tensor.
            unsafe { sum_rows::<T>(&parts, world, x) };
            return Ok(());
        }
        let part = elements.div_ceil(world);
        let mine = Tensor::zeros([(part * world) as i64], (kind, Device::Cpu));
        mine.narrow(0, 0, elements as i64).copy_(&x.view([-1]));
        let sums = self.sum_of_parts::<T>(&mine)?;
        let all = mine;
        self.group.all_gather(&mut bytes(&all), &bytes(&sums))?;
        x.view([-1]).copy_(&all.narrow(0, 0, elements as i64));
        Ok(())
    }

    /// This rank's part of the sum of `x [world * n]`, which is of `T`s and contiguous.
    fn sum_of_parts<T: Element>(&self, x: &Tensor) -> Result<Tensor, Failure> {
        let parts = x.empty_like();
        self.group.all_to_all(&mut bytes(&parts), &bytes(x))?;
        let part = (x.numel() / self.world) as i64;
        let mut sums = Tensor::empty([part], (x.kind(), Device::Cpu));
        // SAFETY: `parts` holds this rank's part, of `part` elements, of each rank's tensor.
        unsafe { sum_rows::<T>(&parts, self.world, &mut sums) };
        Ok(sums)
    }

    /// `x [world * n]`: contiguous float32. On a GPU all of the sum is made: NCCL's own reduce-scatter would move half as much.
    pub fn reduce_scatter(&self, x: &Tensor) -> Result<Tensor, Lost> {
        self.check_device(x);
        let _turn = self.turn();
        let sums = match self.device {
            Device::Cpu => self.sum_of_parts::<f32>(x),
            _ => {
                let mut sum = x.copy();
                let part = (x.numel() / self.world) as i64;
                let own = |sum: &Tensor| sum.view([-1]).narrow(0, self.rank as i64 * part, part).copy();
                self.group.all_reduce(&mut sum).map(|()| own(&sum))
            }
        };
        sums.map_err(|failure| self.lost(failure))
    }

    /// Both contiguous, `out` the world times as large.
    pub fn all_gather(&self, out: &Tensor, x: &Tensor) -> Result<(), Lost> {
        self.check_device(x);
        let _turn = self.turn();
        let gathered = match self.device {
            Device::Cpu => self.group.all_gather(&mut bytes(out), &bytes(x)),
            _ => self.group.all_gather(&mut out.view([-1]), &x.view([-1])),
        };
        gathered.map_err(|failure| self.lost(failure))
    }

    pub fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>, Lost> {
        let _turn = self.turn();
        match self.rank {
            0 => self.say(&message).map(|()| message),
            _ => self.hear(),
        }
        .map_err(|failure| self.lost(failure))
    }

    fn say(&self, message: &[u8]) -> Result<(), Failure> {
        let mut first = [0; MESSAGE_BYTES];
        let (length, begin) = first.split_at_mut(LENGTH_BYTES);
        length.copy_from_slice(&(message.len() as u64).to_le_bytes());
        let (fits, rest) = message.split_at(message.len().min(begin.len()));
        begin[..fits.len()].copy_from_slice(fits);
        self.group
            .broadcast(&mut Tensor::from_slice(&first), Limit::Timeout)?;
        if rest.is_empty() {
            return Ok(());
        }
        self.group
            .broadcast(&mut Tensor::from_slice(rest), Limit::Timeout)
    }

    fn hear(&self) -> Result<Vec<u8>, Failure> {
        let mut first = Tensor::zeros([MESSAGE_BYTES as i64], (Kind::Uint8, Device::Cpu));
        self.group.broadcast(&mut first, Limit::Life)?;
        let first = byte_vec(&first);
        let (length, begin) = first
            .split_first_chunk::<LENGTH_BYTES>()
            .expect("a longer tensor");
        let (length, mut message) = (u64::from_le_bytes(*length) as usize, begin.to_vec());
        if length > message.len() {
            let rest = (length - message.len()) as i64;
            let mut rest = Tensor::zeros([rest], (Kind::Uint8, Device::Cpu));
            self.group.broadcast(&mut rest, Limit::Timeout)?;
            message.extend(byte_vec(&rest));
        }
        message.truncate(length);
        Ok(message)
    }

    pub fn meet(&self) -> Result<(), Lost> {
        let _turn = self.turn();
        self.group.meet().map_err(|failure| self.lost(failure))
    }

    pub fn check(&self) -> Result<(), Lost> {
        self.group.check().map_err(|failure| self.lost(failure))
    }

    pub fn leave(&self) {
        self.watch.leave();
    }

    /// A collective that failed here is no use to the others, who may be waiting for this rank.
    fn lost(&self, Failure(why): Failure) -> Lost {
        self.watch.leave();
        Lost(why)
    }

    fn check_device(&self, x: &Tensor) {
        assert_eq!(x.device(), self.device, "the device of a tensor and of its rank");
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        // It guards no data.
        self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The same memory.
fn bytes(x: &Tensor) -> Tensor {
    x.view([-1]).view_dtype(Kind::Uint8)
}

fn byte_vec(x: &Tensor) -> Vec<u8> {
    Vec::try_from(x).expect("a vector of bytes")
}

/// The sums over the first dimension of `parts [world, ...]`, in rank order, into `sums [...]`; both contiguous, on the
/// CPU.
///
/// # Safety
/// Elements are of type `T`; `parts` has the world times as many as `sums`, and lies elsewhere.
unsafe fn sum_rows<T: Element>(parts: &Tensor, world: usize, sums: &mut Tensor) {
    let elements = sums.numel();
    assert_eq!(parts.numel(), world * elements);
    let rows: Vec<*const T> = (0..world)
        .map(|rank| (parts.data_ptr() as *const T).wrapping_add(rank * elements))
        .collect();
    let target = sums.data_ptr() as *mut T;
    // SAFETY: `rows` are inside `parts`, which nobody writes; `target` has as many elements (the caller's contract).
    unsafe {
        sum::in_rank_order(&rows, elements, |offset, block| {
            std::ptr::copy_nonoverlapping(block.as_ptr(), target.add(offset), block.len());
        });
    }
}

/// torchrun's own store, which its agent serves at MASTER_ADDR:MASTER_PORT; the prefix tells a restart from the attempt
/// before.
fn agent_store() -> Option<(StoreSide, String)> {
    let agent = std::env::var("TORCHELASTIC_USE_AGENT_STORE").is_ok_and(|value| value == "True");
    agent.then(|| {
        let attempt = std::env::var("TORCHELASTIC_RESTART_COUNT").unwrap_or_default();
        (StoreSide::Asks, format!("tandem/{attempt}"))
    })
}

/// Asks again until the deadline: the name of a pod is known only once it runs.
fn resolve(meeting: &Meeting, deadline: Instant) -> Result<IpAddr, CommError> {
    loop {
        let found = (meeting.master_addr.as_str(), meeting.master_port).to_socket_addrs();
        let error = match found {
            Ok(addresses) => {
                let addresses: Vec<IpAddr> = addresses.map(|address| address.ip()).collect();
                // All ranks must choose the same family.
                let v4 = addresses.iter().find(|address| address.is_ipv4());
                if let Some(address) = v4.or(addresses.first()) {
                    return Ok(*address);
                }
                "the name has no address".to_owned()
            }
            Err(error) => error.to_string(),
        };
        if Instant::now() + NAME_PAUSE > deadline {
            return Err(meeting.failed(error));
        }
        std::thread::sleep(NAME_PAUSE);
    }
}

/// The address we would be seen under by rank 0: nothing is sent, the system only chooses a route.
fn own_address(master: IpAddr, port: u16) -> std::io::Result<IpAddr> {
    let any: IpAddr = match master {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((master, port))?;
    Ok(socket.local_addr()?.ip())
}
