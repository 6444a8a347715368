//! Chooses tokens from logits. Not here: which rows are sampled (core), how logits come about (model).
//!
//! Processors run in vLLM's order: the grammar's mask, logit_bias, repetition, frequency and presence penalties, min_tokens, temperature,
//! min_p, top_k, top_p. What ends reasoning that used up its budget is taken whatever they say. Log-probabilities are of the raw logits, before all but the mask. A draw depends on the request's
//! seed and the token's place in its output only: batching, preemption and restarts do not change a seeded answer.

mod logprob;
mod nucleus;
mod process;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use logprob::{exp, maximum, scored};
use nucleus::draw;
use process::process;
use tandem_core::grammar::Mask;
use tandem_core::message::Scored;
use tandem_core::sched::View;
use tandem_core::{TokenId, rng};
use tandem_kernels::{host, pool};
use tch::Tensor;

/// Below it vLLM, too, takes the most likely token.
const GREEDY_BELOW: f64 = 1e-5;
/// Stream of [`rng`] that tokens are drawn from.
const DRAWS: u64 = 0;

/// One row to sample.
pub struct Ask<'a> {
    pub view: View<'a>,
    /// The request's own, or one drawn for it.
    pub seed: u64,
    /// Tokens that its grammar allows.
    pub mask: Option<&'a Mask>,
    /// What it says, as soon as its grammar allows it: the end of reasoning whose budget is used up.
    pub forced: Option<TokenId>,
}

/// A row with a NaN, or without a finite maximum: its adapter or the model is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model's logits are not finite")]
pub struct NotFinite;

/// The next token of each row of `logits [S, V]`.
pub fn sample(logits: &Tensor, asks: &[Ask]) -> Vec<Result<Scored, NotFinite>> {
    over_rows(logits, |row, logits| {
        let Ask {
            view,
            seed,
            mask,
            forced,
        } = &asks[row];
        let masked = mask.map(|mask| mask.apply(logits));
        let logits = masked.as_deref().unwrap_or(logits);
        // One that its grammar does not take yet, within a character, waits for the next place.
        let forced = forced.filter(|&token| mask.is_none_or(|mask| mask.allows(token)));
        let token = match forced {
            Some(token) => maximum(logits).map(|_| token)?,
            None => choose(logits, view, *mask, *seed)?,
        };
        match view.sampling.logprobs() {
            Some(n_top) => scored(logits, token, n_top),
            None => Ok(Scored {
                token,
                logprob: 0.0,
                top: vec![],
            }),
        }
    })
}

/// Log-probabilities of given tokens, one for each row of `logits [S, V]`: `(token, alternatives wanted)`.
pub fn score(logits: &Tensor, targets: &[(TokenId, u32)]) -> Vec<Result<Scored, NotFinite>> {
    over_rows(logits, |row, logits| {
        scored(logits, targets[row].0, targets[row].1)
    })
}

fn over_rows<T: Send + Sync>(logits: &Tensor, of_row: impl Fn(usize, &[f32]) -> T + Sync) -> Vec<T> {
    host::with_rows(logits, |rows| {
        let results: Vec<OnceLock<T>> = rows.iter().map(|_| OnceLock::new()).collect();
        pool::for_each(rows.len(), |row| {
            let _ = results[row].set(of_row(row, rows[row]));
        });
        results
            .into_iter()
            .map(|result| result.into_inner().expect("every row had its task"))
            .collect()
    })
}

fn choose(raw: &[f32], view: &View, mask: Option<&Mask>, seed: u64) -> Result<TokenId, NotFinite> {
    let View {
        sampling, generated, ..
    } = view;
    let processed = process(raw, view, mask);
    let logits = processed.as_deref().unwrap_or(raw);
    let max = maximum(logits)?;
    if sampling.temperature() < GREEDY_BELOW {
        let first = logits.iter().position(|&logit| logit == max);
        return Ok(first.expect("the maximum is one of them") as TokenId);
    }
    // Relative to the most likely token: exp((logit - max) / T), 1 for it.
    let inverse = (1.0 / sampling.temperature()) as f32;
    let min_p = sampling.min_p() as f32;
    let weight = |&logit: &f32| exp((logit - max) * inverse);
    let weights: Vec<f32> = match min_p > 0.0 {
        true => logits
            .iter()
            .map(weight)
            .map(|weight| if weight < min_p { 0.0 } else { weight })
            .collect(),
        false => logits.iter().map(weight).collect(),
    };
    let top_k = sampling
        .top_k()
        .map(|k| k as usize)
        .filter(|&k| k < weights.len());
    Ok(draw(
        &weights,
        top_k,
        sampling.top_p(),
        rng::uniform(seed, DRAWS, *generated as u64),
    ))
}
