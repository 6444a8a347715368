//! Where a matrix of the decoder lies: here, or in equal shares on ranks that train beside each other, each with rows of its
//! own (fully sharded data parallel, ZeRO-3). A shared one is whole only while it is multiplied with, so all ranks go through
//! the same matrices in the same order. Not here: ranks that divide a matrix and never make it whole (family/shard).

use std::ops::Deref;

use tandem_kernels::comm::Comm;
use tandem_kernels::weight::{Format, Precision, Shard, Weight};
use tch::{Device, Tensor};

pub(super) enum Stored {
    Here(Weight),
    /// Frozen.
    Shared(Shard),
    /// In training.
    Trained(TrainedShare),
}

/// A matrix in training, of whose numbers each rank has its own.
pub(super) struct TrainedShare {
    pub n: i64,
    pub k: i64,
    pub precision: Precision,
    /// Float32, a view of what the optimizer changes.
    pub share: Tensor,
    pub comm: Comm,
}

/// A matrix to multiply with.
pub(super) enum Whole<'a> {
    Here(&'a Weight),
    Gathered(Box<Weight>),
}

impl Deref for Whole<'_> {
    type Target = Weight;

    fn deref(&self) -> &Weight {
        match self {
            Whole::Here(weight) => weight,
            Whole::Gathered(weight) => weight,
        }
    }
}

impl Stored {
    /// # Panics
    /// When a rank was lost.
    pub fn whole(&self) -> Whole<'_> {
        match self {
            Stored::Here(weight) => Whole::Here(weight),
            Stored::Shared(shard) => Whole::Gathered(Box::new(shard.whole())),
            Stored::Trained(trained) => Whole::Gathered(Box::new(trained.whole())),
        }
    }

    /// Output features.
    pub fn n(&self) -> i64 {
        match self {
            Stored::Here(weight) => weight.n(),
            Stored::Shared(shard) => shard.n(),
            Stored::Trained(trained) => trained.n,
        }
    }

    /// Of this rank's memory. (What is in training has its share beside the optimizer.)
    pub fn bytes(&self) -> u64 {
        match self {
            Stored::Here(weight) => weight.bytes(),
            Stored::Shared(shard) => shard.bytes(),
            Stored::Trained(_) => 0,
        }
    }

    pub fn format(&self) -> Format {
        match self {
            Stored::Here(weight) => weight.format(),
            Stored::Shared(shard) => shard.format(),
            Stored::Trained(trained) => match trained.precision {
                Precision::F32 => Format::F32,
                Precision::Bf16 => Format::Bf16,
            },
        }
    }
}

impl TrainedShare {
    fn whole(&self) -> Weight {
        let TrainedShare {
            n,
            k,
            precision,
            ref share,
            ref comm,
        } = *self;
        let numbers = comm.all_gather(share).view([-1]).narrow(0, 0, n * k);
        Weight::passing(&numbers.view([n, k]), precision, Device::Cpu).expect("a matrix of float32")
    }
}
