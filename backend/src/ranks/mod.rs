//! A replica of several ranks: every rank runs the same decoder, cache, adapters and trainer over its part of the model.
//! Rank 0 alone plans, samples, looks at a clock, touches files and speaks to clients; before each thing that all must
//! do it says so in one message, and the others do it in the same order. With one rank there is no message.
//!
//! Not here: what is divided and how (family/shard), sums over ranks (model), how a message travels (kernels::comm).

mod follow;
mod load;
mod team;

use serde::{Deserialize, Serialize};
use tandem_core::TokenId;
use tandem_core::id::{AdapterDigest, JobId};
use tandem_core::job::JobSpec;
use tandem_core::learner::{Adam, Batch, LearnerId, NewLearner};
use tandem_core::sched::GroupPlan;
use tandem_kernels::comm::Comm;

pub use load::{Plan, Ready, lead};
pub(crate) use load::{is_rank_0s, weights};
pub use team::{Assembled, Followers, Team, follow_meeting, follow_parent, gather, train_meeting};

use crate::bank::Change;
use crate::batch::{Step, StepRow};
use crate::lora::params::{AdapterParams, AdapterShape};
use crate::train::joint::Who;
use crate::train::{Inputs, driven, run};

/// What the ranks have come for: the first thing that rank 0 says.
#[derive(Serialize, Deserialize)]
pub enum Errand {
    /// To be one replica, of which each has a part.
    Serve(Plan),
    /// To train one job, each with a model of its own.
    Train(Box<run::Order>),
    /// It is done already.
    Nothing,
}

impl Errand {
    /// # Panics
    /// When a rank was lost, as [`Errand::heard`].
    pub fn announce(&self, comm: &Comm) {
        if comm.world() > 1 {
            comm.broadcast(encode(self));
        }
    }

    fn heard(comm: &Comm) -> Errand {
        decode(&comm.broadcast(vec![]))
    }
}

/// What rank 0 has every rank of a replica do.
#[derive(Serialize, Deserialize)]
pub enum Order {
    Step(StepOrder),
    /// An adapter joins: its numbers, whole.
    Admit {
        digest: AdapterDigest,
        shape: AdapterShape,
        numbers: Vec<f32>,
    },
    /// The adapter that the job packed last joins under this digest.
    Publish(AdapterDigest, JobId),
    Evict(AdapterDigest),
    StartJob(Box<JobSpec>, Inputs),
    /// The next quantum of one, or of several together.
    Quantum(Vec<Who>),
    EndJob(JobId),
    /// A learner is there, or begins anew with other numbers.
    MakeLearner(LearnerId, Box<NewLearner>, driven::Inputs),
    Learner(LearnerId, LearnerOrder),
    /// The replica ends in order.
    Stop,
}

/// What rank 0 has every rank do with a learner, beside the quanta of its calls.
#[derive(Serialize, Deserialize)]
pub enum LearnerOrder {
    Begin(Box<Batch>),
    Step(Adam),
    Clear,
    /// Its numbers as they are now join under this digest.
    Snapshot(AdapterDigest),
    Drop,
}

/// One forward, and which of its rows go through the head.
#[derive(Serialize, Deserialize)]
pub struct StepOrder {
    tokens: Vec<TokenId>,
    positions: Vec<i64>,
    groups: Vec<GroupPlan>,
    rows: Vec<StepRow>,
    /// Flat indices of hidden rows; each entry is one call of the head.
    heads: Vec<Vec<i64>>,
}

impl StepOrder {
    fn new(step: &Step, heads: &[Vec<i64>]) -> StepOrder {
        let Step {
            tokens,
            positions,
            groups,
            rows,
        } = step;
        StepOrder {
            tokens: tokens.to_vec(),
            positions: positions.to_vec(),
            groups: groups.to_vec(),
            rows: rows.clone(),
            heads: heads.to_vec(),
        }
    }

    fn step(&self) -> Step<'_> {
        let StepOrder {
            tokens,
            positions,
            groups,
            rows,
            heads: _,
        } = self;
        Step {
            tokens,
            positions,
            groups,
            rows: rows.clone(),
        }
    }
}

/// Rank 0's voice. Orders wait until something has to be done together, and travel as one message.
pub struct Ranks {
    comm: Comm,
    waiting: Vec<Order>,
}

impl Ranks {
    pub fn new(comm: Comm) -> Ranks {
        Ranks {
            comm,
            waiting: vec![],
        }
    }

    pub fn are_many(&self) -> bool {
        self.comm.world() > 1
    }

    /// Makes the order only where somebody would hear it.
    pub fn order(&mut self, order: impl FnOnce() -> Order) {
        if self.are_many() {
            self.waiting.push(order());
        }
    }

    pub fn order_step(&mut self, step: &Step, heads: &[Vec<i64>]) {
        self.order(|| Order::Step(StepOrder::new(step, heads)));
    }

    pub fn order_adapters(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.order(|| match change {
                Change::Loaded(digest, AdapterParams { flat, shape }) => Order::Admit {
                    digest,
                    shape,
                    numbers: Vec::try_from(flat).expect("a flat float32 tensor"),
                },
                Change::Published(digest, job) => Order::Publish(digest, job),
                Change::Left(digest) => Order::Evict(digest),
            });
        }
    }

    /// Says all that waits.
    ///
    /// # Panics
    /// When a rank was lost, like the collectives of what was ordered.
    pub fn send(&mut self) {
        if !self.waiting.is_empty() {
            self.comm.broadcast(encode(&std::mem::take(&mut self.waiting)));
        }
    }

    /// # Panics
    /// When a rank was lost.
    pub fn check(&self) {
        self.comm.check();
    }

    /// The replica ends in order: returns when all have heard it.
    ///
    /// # Panics
    /// When a rank was lost.
    pub fn part(&mut self) {
        self.order(|| Order::Stop);
        self.send();
        if self.are_many() {
            self.comm.meet();
        }
    }

    /// The replica is over, not in order: whoever waits for this rank hears it.
    pub fn leave(&self) {
        self.comm.leave();
    }
}

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_allocvec(message).expect("plain data serialises")
}

/// # Panics
/// When the bytes are not of this version of the program.
fn decode<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> T {
    postcard::from_bytes(bytes).unwrap_or_else(|error| {
        panic!(
            "rank 0 said {} bytes that this version does not understand: {error}",
            bytes.len()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_core::id::Digest;
    use tandem_core::sched::RowTable;

    #[test]
    fn a_step_comes_back_and_is_compact() {
        let rows: Vec<StepRow> = (0..8)
            .map(|i| StepRow {
                adapter: (i % 2 == 0).then_some(Digest([i as u8; 32])),
                tokens: i..i + 1,
                kv_len: 100 + i,
            })
            .collect();
        let tokens: Vec<u32> = (0..8).collect();
        let positions: Vec<i64> = (0..8).map(|i| 99 + i).collect();
        let table = |i: usize| RowTable {
            first: 3,
            blocks: 4 * i..4 * i + 4,
        };
        let groups = [GroupPlan {
            slots: positions.clone(),
            blocks: (0..32).collect(),
            tables: (0..8).map(table).collect(),
        }];
        let step = Step {
            tokens: &tokens,
            positions: &positions,
            groups: &groups,
            rows: rows.clone(),
        };
        let heads = vec![(0..8).collect::<Vec<i64>>()];
        let bytes = encode(&vec![Order::Step(StepOrder::new(&step, &heads))]);
        assert!(bytes.len() < 400, "{} bytes", bytes.len());
        let orders: Vec<Order> = decode(&bytes);
        let [Order::Step(order)] = &orders[..] else {
            panic!("another order came back")
        };
        assert_eq!((&order.step().rows, &order.heads), (&rows, &heads));
        assert_eq!(
            (order.step().tokens, order.step().groups),
            (&tokens[..], &groups[..])
        );
    }
}
