//! Data parallel: ranks that train one job, each with a model of its own. A step's micro-batches are dealt out, gradients and
//! scores are summed, and every rank takes the same AdamW step, so numbers and moments stay whole and alike everywhere.
//! Nothing that is written says how many ranks there were: a run goes on under another number of them, or alone.
//!
//! Not here: ranks that divide one model (ranks), who starts them (ranks/team).

use tandem_kernels::comm::Comm;
use tch::{Device, Tensor};

use super::objective::Scores;
use crate::model::sum_over;

#[derive(Clone)]
pub struct Mates {
    comm: Comm,
    /// On which sums over ranks are taken.
    device: Device,
}

impl Mates {
    pub fn new(comm: Comm, device: Device) -> Mates {
        Mates { comm, device }
    }

    /// A rank alone.
    pub fn none() -> Mates {
        Mates::new(Comm::solo(), Device::Cpu)
    }

    pub fn are_there(&self) -> bool {
        self.comm.world() > 1
    }

    /// Whether the `i`-th of a step's micro-batches is this rank's, or the `i`-th slice of a validation.
    pub fn has(&self, i: usize) -> bool {
        i % self.comm.world() == self.comm.rank()
    }

    /// Sums the gradient over ranks, in place.
    ///
    /// # Panics
    /// When a rank was lost, as all that follow.
    pub fn sum(&self, gradient: &Tensor) {
        sum_over(&self.comm, self.device, gradient);
    }

    /// The scores of all ranks together.
    pub fn total(&self, scores: Scores) -> Scores {
        if !self.are_there() {
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
        match self.are_there() {
            true => self.gather(&[u8::from(is)]).iter().any(|said| said[0] != 0),
            false => is,
        }
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

    /// Returns when every rank is at its end.
    pub fn part(&self) {
        self.comm.meet();
    }
}
