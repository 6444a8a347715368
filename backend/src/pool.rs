//! Prompts that become vectors: sums of hidden states, step by step, as far as each step computes a prompt.

use tandem_core::id::RequestId;
use tandem_core::pooling::Pooling;
use tandem_core::sched::{Row, StepPlan};
use tch::{Kind, Tensor};

use crate::sample::NotFinite;

/// What a step adds to one prompt's pool.
pub struct Share {
    pub id: RequestId,
    pub tokens: usize,
    /// `[H]`, in doubles, so that chunks of a prompt add up to what the whole gives.
    pub sum: Result<Vec<f64>, NotFinite>,
}

/// The shares of rows that are pooled. `hidden [T, H]` is a step's; `norm` is the final one.
pub fn shares(
    plan: &StepPlan,
    hidden: &Tensor,
    is_pooled: impl Fn(&Row) -> bool,
    norm: impl Fn(&Tensor) -> Tensor,
) -> Vec<Share> {
    let has_share = |row: &&Row| !row.wanted.is_empty() && is_pooled(row);
    let share = |row: &Row| {
        let first = row.tokens.start + row.wanted.start - row.start();
        let tokens = row.wanted.len();
        let states = norm(&hidden.narrow(0, first as i64, tokens as i64)); // [tokens, H]
        let sum = states.sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
        let sum = Vec::<f64>::try_from(sum).expect("a sum over rows is a vector");
        Share {
            id: row.id,
            tokens,
            sum: match sum.iter().all(|x| x.is_finite()) {
                true => Ok(sum),
                false => Err(NotFinite),
            },
        }
    };
    plan.rows.iter().filter(has_share).map(share).collect()
}

/// The average so far.
pub struct Pool {
    sum: Vec<f64>,
    missing: usize,
    tokens: usize,
}

impl Pool {
    pub fn new(pooling: Pooling, prompt_tokens: usize) -> Pool {
        let tokens = pooling.positions(prompt_tokens).len();
        Pool {
            sum: vec![],
            missing: tokens,
            tokens,
        }
    }

    pub fn add(&mut self, sum: Vec<f64>, tokens: usize) {
        self.missing -= tokens;
        match self.sum.is_empty() {
            true => self.sum = sum,
            false => self.sum.iter_mut().zip(sum).for_each(|(all, new)| *all += new),
        }
    }

    /// `[H]`, once every token is in it.
    pub fn whole(&self) -> Option<Vec<f32>> {
        let mean = |sum: &f64| (sum / self.tokens as f64) as f32;
        (self.missing == 0).then(|| self.sum.iter().map(mean).collect())
    }
}
