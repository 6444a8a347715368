//! A frozen weight of which each rank holds an equal share, to be whole while it is multiplied with (fully sharded data
//! parallel, arXiv 2304.11277). Shares are of its bytes as the kernels lay them out, so that any format is shared alike and
//! nothing is packed anew.

use tch::{Device, Kind, Tensor};

use super::{Format, Store, Weight};
use crate::comm::Comm;
use crate::slice::{Pages, Plain, Stay};

pub struct Shard {
    comm: Comm,
    /// The weight without its numbers.
    frame: Weight,
    /// One of each of its buffers.
    shares: Vec<Share>,
}

struct Share {
    /// Of the buffer.
    shape: Vec<i64>,
    /// This rank's bytes, of one length on all ranks.
    own: Tensor,
    /// Bytes at the end that do not divide, fewer than there are ranks: all have them.
    rest: Tensor,
}

impl Shard {
    /// This rank's share of a weight that every rank has; the rest of it goes.
    pub fn new(weight: Weight, comm: Comm) -> Shard {
        let buffers = weight.store.buffers();
        let share = |buffer: &Tensor| {
            let bytes = flat_bytes(buffer);
            let (len, world) = (bytes.numel(), comm.world());
            let part = len / world;
            let copy = |first: usize, n: usize| bytes.narrow(0, first as i64, n as i64).copy();
            Share {
                shape: buffer.size(),
                own: copy(part * comm.rank(), part),
                rest: copy(part * world, len % world),
            }
        };
        let shares: Vec<Share> = buffers.iter().map(share).collect();
        let nothing: Vec<Vec<i64>> = shares.iter().map(|share| vec![0; share.shape.len()]).collect();
        Shard {
            frame: weight.sized(&nothing),
            comm,
            shares,
        }
    }

    /// The weight, of all ranks' shares. Every rank asks for the same weights in the same order.
    ///
    /// # Panics
    /// When a rank was lost.
    pub fn whole(&self) -> Weight {
        let shapes: Vec<Vec<i64>> = self.shares.iter().map(|share| share.shape.clone()).collect();
        let whole = self.frame.sized(&shapes);
        for (buffer, Share { own, rest, .. }) in whole.store.buffers().iter().zip(&self.shares) {
            let bytes = flat_bytes(buffer);
            let rest_bytes = rest.size()[0];
            let shared = bytes.size()[0] - rest_bytes;
            self.comm.all_gather_into(&bytes.narrow(0, 0, shared), own);
            bytes.narrow(0, shared, rest_bytes).copy_(rest);
        }
        // On the CPU a gather has failed itself; on a GPU it was only queued when its call returned.
        if self.frame.device != Device::Cpu {
            self.comm.check();
        }
        whole
    }

    pub fn n(&self) -> i64 {
        self.frame.n()
    }

    pub fn k(&self) -> i64 {
        self.frame.k()
    }

    /// Resident memory of this rank.
    pub fn bytes(&self) -> u64 {
        let bytes = |share: &Share| share.own.numel() + share.rest.numel();
        self.shares.iter().map(|share| bytes(share) as u64).sum()
    }

    pub fn format(&self) -> Format {
        self.frame.format()
    }
}

impl Weight {
    /// The same with buffers of these shapes, whose numbers mean nothing.
    fn sized(&self, shapes: &[Vec<i64>]) -> Weight {
        Weight {
            store: self.store.sized(shapes),
            ..*self
        }
    }
}

impl Store {
    /// The memory that it lies in.
    fn buffers(&self) -> Vec<Tensor> {
        match self {
            Store::F32(panels) => vec![pages(panels, Kind::Float)],
            Store::Bf16(panels) => vec![pages(panels, Kind::Int16)],
            Store::Plain(tensor) => vec![tensor.shallow_clone()],
            Store::Packed(packed) => packed.buffers(),
            Store::Held(held) => held.buffers(),
        }
    }

    fn sized(&self, shapes: &[Vec<i64>]) -> Store {
        match self {
            Store::F32(_) => Store::F32(room(&shapes[0])),
            Store::Bf16(_) => Store::Bf16(room(&shapes[0])),
            Store::Plain(tensor) => Store::Plain(Tensor::empty(
                shapes[0].as_slice(),
                (tensor.kind(), tensor.device()),
            )),
            Store::Packed(packed) => Store::Packed(packed.sized(shapes)),
            Store::Held(held) => Store::Held(held.sized(shapes)),
        }
    }
}

/// A view; it is not to outlive the pages.
pub(super) fn pages<T: Plain>(pages: &Pages<T>, kind: Kind) -> Tensor {
    assert_eq!(kind.elt_size_in_bytes(), size_of::<T>());
    // SAFETY: so many values of this size, which nobody else looks at while the views of this file are in use.
    unsafe {
        Tensor::from_blob(
            pages.as_ptr().cast(),
            &[pages.len() as i64],
            &[1],
            kind,
            Device::Cpu,
        )
    }
}

pub(super) fn room<T: Plain>(shape: &[i64]) -> Pages<T> {
    Pages::placed(shape[0] as usize, Stay::Short)
}

fn flat_bytes(x: &Tensor) -> Tensor {
    x.view([-1]).view_dtype(Kind::Uint8)
}

#[cfg(test)]
mod tests {
    use super::super::held::Held;
    use super::*;
    use crate::linear::{linear, linear_backward};
    use crate::weight::{Precision, Recipe};

    /// However it is stored, each rank keeps its part of the bytes, and what comes together multiplies to the same bits.
    #[test]
    fn shares_make_the_weight_that_they_are_of() {
        let (n, k) = (100, 130);
        let random = |rows| Tensor::randn([rows, if rows == n { k } else { n }], (Kind::Float, Device::Cpu));
        let (dense, dy) = (random(n), random(7));
        let x = Tensor::randn([7, k], (Kind::Float, Device::Cpu));
        let stored = |how: usize, precision: Precision| {
            let quantised = |recipe: Recipe| recipe.quantise(&dense).expect("a matrix");
            let weight = match how {
                0 | 1 => Weight::new(&dense, precision, Device::Cpu),
                2..5 => Weight::quantised(&quantised(Recipe::ALL[how - 2]), precision, Device::Cpu),
                _ => Weight::quantised(&quantised(Recipe::ALL[how - 5]), precision, Device::Cpu),
            };
            let mut weight = weight.expect("a matrix");
            match how {
                1 => weight.store = Store::Plain(dense.to_kind(precision.kind()).copy()),
                5.. => {
                    let held = Held::new(&quantised(Recipe::ALL[how - 5]), Device::Cpu);
                    weight.store = Store::Held(held.expect("a matrix"));
                }
                _ => {}
            }
            weight
        };
        for (how, precision) in (0..8).flat_map(|how| [(how, Precision::F32), (how, Precision::Bf16)]) {
            let expected = stored(how, precision);
            let (y, dx) = (linear(&x, &expected, None, &[]), linear_backward(&dy, &expected));
            let threads = Comm::threads(3).into_iter().map(|comm| {
                let weight = stored(how, precision);
                std::thread::spawn(move || {
                    let shard = Shard::new(weight, comm);
                    (
                        shard.whole(),
                        shard.bytes(),
                        shard.format(),
                        (shard.n(), shard.k()),
                    )
                })
            });
            for thread in threads.collect::<Vec<_>>() {
                let (whole, bytes, format, size) = thread.join().expect("it has its share");
                assert_eq!((format, size), (expected.format(), (n, k)));
                assert!(
                    bytes <= expected.bytes() / 3 + 3,
                    "{format}: {bytes} of {}",
                    expected.bytes()
                );
                assert!(linear(&x, &whole, None, &[]).equal(&y), "{format}");
                assert!(linear_backward(&dy, &whole).equal(&dx), "{format}");
            }
        }
    }
}
