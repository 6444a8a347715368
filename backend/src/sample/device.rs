//! Rows that are sampled where they are, on a device with kernels of ours: the same tokens and log-probabilities as on
//! the host.

use tandem_core::TokenId;
use tandem_core::message::Scored;
use tandem_kernels::gpu::Gpu;
use tandem_kernels::sample::{self, Chosen};
use tch::Tensor;

use super::process::edits;
use super::{Ask, Draw, NotFinite, logprob};

/// As [`super::sample`].
pub(super) fn sample(gpu: Gpu, logits: &Tensor, asks: &[Ask]) -> Vec<Result<Scored, NotFinite>> {
    let n_tokens = logits.size()[1] as usize;
    let rows: Vec<sample::Ask> = asks
        .iter()
        .map(|ask| {
            let given = ask.forced();
            let edits = match given {
                Some(_) => vec![],
                None => edits(&ask.view, ask.mask, n_tokens),
            };
            let Draw {
                inverse,
                least,
                top_k,
                top_p,
                bits,
            } = Draw::of(ask);
            sample::Ask {
                given,
                n_top: ask.view.sampling.logprobs(),
                draw: bits,
                inverse: inverse.unwrap_or(0.0),
                least,
                top_k,
                top_p,
                edits,
                mask: ask.mask.map(|mask| mask.words()),
            }
        })
        .collect();
    read(sample::sample(gpu, logits, &rows))
}

/// As [`super::score`].
pub(super) fn score(gpu: Gpu, logits: &Tensor, targets: &[(TokenId, u32)]) -> Vec<Result<Scored, NotFinite>> {
    let rows: Vec<sample::Ask> = targets
        .iter()
        .map(|&(token, n_top)| sample::Ask {
            given: Some(token),
            n_top: Some(n_top),
            draw: 0,
            inverse: 0.0,
            least: 0.0,
            top_k: None,
            top_p: None,
            edits: vec![],
            mask: None,
        })
        .collect();
    read(sample::sample(gpu, logits, &rows))
}

fn read(chosen: Vec<Option<Chosen>>) -> Vec<Result<Scored, NotFinite>> {
    let read = |chosen: Option<Chosen>| {
        let Chosen { token, likelihood } = chosen.ok_or(NotFinite)?;
        Ok(match likelihood {
            Some(likelihood) => logprob::of(token, likelihood),
            None => Scored {
                token,
                logprob: 0.0,
                top: vec![],
            },
        })
    };
    chosen.into_iter().map(read).collect()
}
