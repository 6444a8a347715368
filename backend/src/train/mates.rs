//! Data parallel: ranks that train one job, each with a model of its own. A step's micro-batches are dealt out, gradients and
//! scores are summed, and every rank takes the same AdamW step, so numbers and moments stay whole and alike everywhere.
//! Nothing that is written says how many ranks there were: a run goes on under another number of them, or alone.
//!
//! Ranks may share what they hold ([`Sharding`]), in groups if there are several. They go in step then: each pass of one is a pass of
//! all, and who has no slice left goes through an idle one.
//!
//! Where several ranks divide a model (tensor parallel), those with the same part of it are mates: they train on other rows.
//!
//! Not here: who is whose mate (mesh), ranks that divide one model (ranks), who starts them (ranks/team), how shares lie
//! (model/stored, model/full).

use serde::{Deserialize, Serialize};
use tandem_kernels::comm::Comm;
use tch::{Device, Tensor};

use super::objective::Scores;
use crate::model::sum_over;

#[derive(Clone)]
pub struct Mates {
    /// Everyone who trains the job.
    all: Comm,
    /// Those who train on other rows.
    comm: Comm,
    /// Of these, who share what they hold.
    sharers: Comm,
    /// And who hold the same share.
    twins: Comm,
    /// On which sums over ranks are taken.
    device: Device,
    sharding: Sharding,
    goes_in_step: bool,
}

/// What ranks hold in shares, each an equal part, and bring together while it is needed. What is learned is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sharding {
    /// Nothing: every rank has all of it.
    #[default]
    None,
    /// What is trained, its gradient and moments (ZeRO-2, SHARD_GRAD_OP); but for an adapter, which is small.
    Gradients,
    /// The parameters too, frozen or trained (ZeRO-3, FULL_SHARD).
    Parameters,
}

/// The groups of one rank.
pub struct Groups {
    pub all: Comm,
    pub beside: Comm,
    pub sharers: Comm,
    pub twins: Comm,
}

impl Mates {
    /// The ranks share what `sharding` says of a run that trains all parameters (`trains_all`), or an adapter beside frozen ones.
    pub fn new(groups: Groups, device: Device, sharding: Sharding, trains_all: bool) -> Mates {
        let shares = match sharding {
            Sharding::None => false,
            Sharding::Gradients => trains_all,
            Sharding::Parameters => true,
        };
        Mates {
            goes_in_step: shares && groups.sharers.world() > 1,
            all: groups.all,
            comm: groups.beside,
            sharers: groups.sharers,
            twins: groups.twins,
            device,
            sharding,
        }
    }

    /// Who shares frozen parameters, if the ranks do.
    pub fn share_frozen(&self) -> Option<Comm> {
        let shares = self.goes_in_step && self.sharding == Sharding::Parameters;
        shares.then(|| self.sharers.clone())
    }

    /// Who shares parameters in training, and whether each rank has them whole for its passes.
    pub fn share_trained(&self) -> (Comm, bool) {
        match self.goes_in_step {
            true => (self.sharers.clone(), self.sharding != Sharding::Parameters),
            false => (Comm::solo(), true),
        }
    }

    pub fn why_nothing_is_shared(&self) -> &'static str {
        match self.sharers.world() > 1 {
            false => "no two ranks have the same to hold (data_parallel_size, sharding_group_size)",
            true => "of an adapter gradient and moments are small; FULL_SHARD shares the base",
        }
    }

    /// Whether ranks bring shares together in their passes: all go through as many, at the same time.
    pub fn go_in_step(&self) -> bool {
        self.goes_in_step
    }

    /// Of the things that have these numbers ([`Mates::has`]), the most that are one rank's.
    pub fn rounds(&self, numbers: impl Iterator<Item = usize>) -> usize {
        let mut of_ranks = vec![0; self.comm.world()];
        numbers.for_each(|i| of_ranks[i % self.comm.world()] += 1);
        of_ranks.into_iter().max().unwrap_or(0)
    }

    /// Rounds of `n` things that are dealt out in order: those of the rank that has most, or this rank's own where it need
    /// not wait for others.
    pub fn rounds_of(&self, n: usize) -> usize {
        let first = match self.goes_in_step {
            true => 0,
            false => self.comm.rank(),
        };
        n.saturating_sub(first).div_ceil(self.comm.world())
    }

    /// The number of the `round`-th that this rank has.
    pub fn own(&self, round: usize) -> usize {
        round * self.comm.world() + self.comm.rank()
    }

    /// A rank alone.
    pub fn none() -> Mates {
        let groups = Groups {
            all: Comm::solo(),
            beside: Comm::solo(),
            sharers: Comm::solo(),
            twins: Comm::solo(),
        };
        Mates::new(groups, Device::Cpu, Sharding::None, false)
    }

    pub fn are_there(&self) -> bool {
        self.all.world() > 1
    }

    /// Whether the `i`-th of a step's micro-batches is this rank's, or the `i`-th slice of a validation.
    pub fn has(&self, i: usize) -> bool {
        i % self.comm.world() == self.comm.rank()
    }

    /// Sums the gradient over ranks, in place: one that `is_shared` was summed over those who share it as it was made.
    ///
    /// # Panics
    /// When a rank was lost, as all that follow.
    pub fn sum(&self, gradient: &Tensor, is_shared: bool) {
        let comm = match is_shared {
            true => &self.twins,
            false => &self.comm,
        };
        sum_over(comm, self.device, gradient);
    }

    /// The scores of all ranks together.
    pub fn total(&self, scores: Scores) -> Scores {
        if self.comm.world() == 1 {
            return scores;
        }
        let bytes = postcard::to_allocvec(&scores).expect("plain data serialises");
        let mut total = Scores::default();
        for bytes in self.gather(&bytes) {
            total.merge(&postcard::from_bytes(&bytes).expect("the ranks are of one version"));
        }
        total
    }

    /// Whether any rank says so.
    pub fn any(&self, is: bool) -> bool {
        self.all.any(is, self.device)
    }

    /// Every rank's bytes, in rank order.
    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let all = |x: Tensor| {
            self.comm
                .all_gather(&x.to_device(self.device))
                .to_device(Device::Cpu)
        };
        let lengths = all(Tensor::from_slice(&[bytes.len() as i64]));
        let lengths = Vec::<i64>::try_from(lengths.view([-1])).expect("a length of each rank");
        let longest = lengths.iter().max().expect("a group has a rank");
        let mut padded = bytes.to_vec();
        padded.resize(*longest as usize, 0);
        let all =
            Vec::<u8>::try_from(all(Tensor::from_slice(&padded)).view([-1])).expect("bytes of each rank");
        let parts = all.chunks((*longest as usize).max(1)).zip(&lengths);
        parts
            .map(|(part, &length)| part[..length as usize].to_vec())
            .collect()
    }

    /// Ranks that train on rows of their own.
    pub fn rows(&self) -> usize {
        self.comm.world()
    }

    /// Returns when every rank is at its end.
    pub fn part(&self) {
        self.all.meet();
    }
}
