//! Chooses tokens from logits. Not here: which rows are sampled (core), how logits come about (model).
//!
//! Processors run in vLLM's order: the grammar's mask, logit_bias, repetition, frequency and presence penalties, min_tokens, temperature,
//! min_p, top_k, top_p. What ends reasoning that used up its budget is taken whatever they say. Log-probabilities are of the raw logits, before all but the mask. A draw depends on the request's
//! seed and the token's place in its output only: batching, preemption and restarts do not change a seeded answer.
//!
//! Where the logits are on a device with kernels of ours they stay there (device); else they are read on the host. Both
//! choose the same tokens: what a draw sums up are integers (mass).

mod device;
mod logprob;
mod mass;
mod nucleus;
mod process;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use logprob::{maximum, scored};
use mass::{LIGHTEST, exp};
use nucleus::draw;
use process::edits;
use tandem_core::grammar::Mask;
use tandem_core::message::Scored;
use tandem_core::sched::View;
use tandem_core::{TokenId, rng};
use tandem_kernels::{gpu, host, pool};
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

impl Ask<'_> {
    /// One that its grammar does not take yet, within a character, waits for the next place.
    fn forced(&self) -> Option<TokenId> {
        self.forced
            .filter(|&token| self.mask.is_none_or(|mask| mask.allows(token)))
    }
}

/// The next token of each row of `logits [S, V]`, which may be overwritten.
pub fn sample(logits: &Tensor, asks: &[Ask]) -> Vec<Result<Scored, NotFinite>> {
    if let Some(gpu) = gpu::of(logits) {
        return device::sample(gpu, logits, asks);
    }
    over_rows(logits, |row, logits| {
        let ask = &asks[row];
        let masked = ask.mask.map(|mask| mask.apply(logits));
        let logits = masked.as_deref().unwrap_or(logits);
        let token = match ask.forced() {
            Some(token) => maximum(logits).map(|_| token)?,
            None => choose(logits, ask)?,
        };
        match ask.view.sampling.logprobs() {
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
    if let Some(gpu) = gpu::of(logits) {
        return device::score(gpu, logits, targets);
    }
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

/// How a token is drawn, in the numbers that are reckoned with.
struct Draw {
    /// Of the temperature; none: the most likely token is taken.
    inverse: Option<f32>,
    /// What weighs less, beside the heaviest, is never drawn.
    least: f32,
    top_k: Option<u32>,
    /// In units of 2^-64.
    top_p: Option<u64>,
    /// Random.
    bits: u64,
}

impl Draw {
    fn of(ask: &Ask) -> Draw {
        let View {
            sampling, generated, ..
        } = ask.view;
        let temperature = sampling.temperature();
        let top_p = sampling.top_p();
        Draw {
            inverse: (temperature >= GREEDY_BELOW).then_some((1.0 / temperature) as f32),
            least: LIGHTEST.max(sampling.min_p() as f32),
            top_k: sampling.top_k(),
            top_p: (top_p < 1.0).then_some(((top_p * 2f64.powi(64)) as u64).max(1)),
            bits: rng::bits(ask.seed, DRAWS, generated as u64),
        }
    }
}

fn choose(raw: &[f32], ask: &Ask) -> Result<TokenId, NotFinite> {
    let edits = edits(&ask.view, ask.mask, raw.len());
    let edited = (!edits.is_empty()).then(|| {
        let mut logits = raw.to_vec();
        for edit in &edits {
            let logit = &mut logits[edit.token as usize];
            *logit = edit.apply(*logit);
        }
        logits
    });
    let logits = edited.as_deref().unwrap_or(raw);
    let max = maximum(logits)?;
    let Draw {
        inverse,
        least,
        top_k,
        top_p,
        bits,
    } = Draw::of(ask);
    let Some(inverse) = inverse else {
        let first = logits.iter().position(|&logit| logit == max);
        return Ok(first.expect("the maximum is one of them") as TokenId);
    };
    // Relative to the most likely token: exp((logit - max) / T), 1 for it.
    let weight = |&logit: &f32| {
        let weight = exp((logit - max) * inverse);
        if weight < least { 0.0 } else { weight }
    };
    let weights: Vec<f32> = logits.iter().map(weight).collect();
    let top_k = top_k.map(|k| k as usize).filter(|&k| k < weights.len());
    Ok(draw(&weights, top_k, top_p, bits))
}
