//! Processors of single logits: logit_bias, penalties, min_tokens. Not here: what looks at all of them (nucleus).

use tandem_core::grammar::Mask;
use tandem_core::sampling::Sampling;
use tandem_core::sched::View;
use tandem_core::uses::Uses;

/// What reads or writes single logits, on a copy; `None` when nothing of it was asked.
pub(super) fn process(raw: &[f32], view: &View, mask: Option<&Mask>) -> Option<Vec<f32>> {
    let View {
        prompt: _,
        generated,
        pooling: _,
        sampling,
        stop_tokens,
        uses,
        adapter: _,
    } = view;
    let too_short = *generated < sampling.min_tokens() as usize
        && !stop_tokens.is_empty()
        // A text that is whole by its grammar ends.
        && mask.is_none_or(|mask| mask.allows_beside(stop_tokens));
    if sampling.logit_bias().is_empty() && uses.is_none() && !too_short {
        return None;
    }
    let mut logits = raw.to_vec();
    for &(token, bias) in sampling.logit_bias() {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias as f32;
        }
    }
    if let Some(uses) = uses {
        penalise(&mut logits, uses, sampling);
    }
    if too_short {
        for &token in *stop_tokens {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    Some(logits)
}

/// Repetition over prompt and output; frequency and presence over the output only.
fn penalise(logits: &mut [f32], uses: &Uses, sampling: &Sampling) {
    let repetition = sampling.repetition_penalty() as f32;
    for (token, generated) in uses.iter() {
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 {
            *logit / repetition
        } else {
            *logit * repetition
        };
        if generated > 0 {
            let penalty = sampling.frequency_penalty() * f64::from(generated) + sampling.presence_penalty();
            *logit -= penalty as f32;
        }
    }
}
