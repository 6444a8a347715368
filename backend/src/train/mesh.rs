//! How the ranks of a run are placed: neighbours divide one model (tensor parallel), and groups of these train beside each other,
//! of which neighbours may share what they hold (hybrid sharding: shares within a machine, copies between machines).
//!
//! Not here: what ranks tell each other (mates), how a model is divided (family/shard) and shared (model/stored).

use serde::{Deserialize, Serialize};
use tandem_kernels::comm::Comm;
use tch::Device;

use super::mates::{Groups, Mates, Sharding};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// Ranks that divide each model.
    pub tensor_parallel: usize,
    pub sharding: Sharding,
    /// Models whose ranks share what they hold. `None`: all of them.
    pub sharers: Option<usize>,
}

impl Mesh {
    /// Ranks that each have a whole model, of their own.
    pub const PLAIN: Mesh = Mesh {
        tensor_parallel: 1,
        sharding: Sharding::None,
        sharers: None,
    };

    /// Models, each on its ranks, that train beside each other.
    pub fn models(&self, world: usize) -> usize {
        world / self.tensor_parallel
    }

    /// Whether so many ranks can be placed like this.
    pub fn check(&self, world: usize) -> Result<(), String> {
        let Mesh {
            tensor_parallel,
            sharers,
            ..
        } = *self;
        if tensor_parallel == 0 || !world.is_multiple_of(tensor_parallel) {
            return Err(format!(
                "{world} ranks cannot divide models in {tensor_parallel} parts: tensor_parallel_size must divide their number"
            ));
        }
        let models = self.models(world);
        match sharers {
            Some(sharers) if sharers == 0 || !models.is_multiple_of(sharers) => Err(format!(
                "{models} models cannot share in groups of {sharers}: sharding_group_size must divide their number"
            )),
            _ => Ok(()),
        }
    }

    /// This rank's place among `all`: with whom it divides its model, and beside whom it trains, all parameters or an adapter.
    /// Every rank calls, with what [`Mesh::check`] found well.
    ///
    /// # Panics
    /// When a rank was lost.
    pub fn place(&self, all: Comm, device: Device, trains_all: bool) -> (Comm, Mates) {
        let parts = self.tensor_parallel;
        let (model, beside) = match parts {
            1 => (Comm::solo(), all.clone()),
            _ => (all.split(all.rank() / parts), all.split(all.rank() % parts)),
        };
        let (sharers, twins) = match self.sharers.filter(|&sharers| sharers < beside.world()) {
            None => (beside.clone(), Comm::solo()),
            Some(sharers) => (
                beside.split(beside.rank() / sharers),
                beside.split(beside.rank() % sharers),
            ),
        };
        let groups = Groups {
            all,
            beside,
            sharers,
            twins,
        };
        (model, Mates::new(groups, device, self.sharding, trains_all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_placed_or_it_is_said_why_not() {
        let mesh = |tensor_parallel, sharers| Mesh {
            tensor_parallel,
            sharers,
            ..Mesh::PLAIN
        };
        for (mesh, world, why) in [
            (mesh(1, None), 7, ""),
            (mesh(2, Some(2)), 8, ""),
            (mesh(2, None), 3, "3 ranks cannot divide models in 2"),
            (mesh(0, None), 3, "3 ranks cannot divide models in 0"),
            (mesh(2, Some(3)), 8, "4 models cannot share in groups of 3"),
            (mesh(1, Some(0)), 8, "8 models cannot share in groups of 0"),
        ] {
            match mesh.check(world) {
                Ok(()) => assert_eq!(why, ""),
                Err(said) => assert!(!why.is_empty() && said.starts_with(why), "{said}"),
            }
        }
    }
}
