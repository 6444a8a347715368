//! Processors of single logits: logit_bias, penalties, min_tokens. Not here: what looks at all of them (nucleus).

use tandem_core::TokenId;
use tandem_core::sampling::Sampling;
use tandem_core::sched::View;

/// What reads or writes single logits, on a copy; `None` when nothing of it was asked.
pub(super) fn process(raw: &[f32], view: &View) -> Option<Vec<f32>> {
    let View {
        prompt,
        output,
        sampling,
        stop_tokens,
        adapter: _,
    } = view;
    let too_short = output.len() < sampling.min_tokens() as usize && !stop_tokens.is_empty();
    if sampling.logit_bias().is_empty() && !has_penalties(sampling) && !too_short {
        return None;
    }
    let mut logits = raw.to_vec();
    for &(token, bias) in sampling.logit_bias() {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias as f32;
        }
    }
    if has_penalties(sampling) {
        penalise(&mut logits, prompt, output, sampling);
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

fn has_penalties(sampling: &Sampling) -> bool {
    let additive = sampling.presence_penalty() != 0.0 || sampling.frequency_penalty() != 0.0;
    additive || sampling.repetition_penalty() != 1.0
}

/// Repetition over prompt and output; frequency and presence over the output only.
fn penalise(logits: &mut [f32], prompt: &[TokenId], output: &[TokenId], sampling: &Sampling) {
    let repetition = sampling.repetition_penalty() as f32;
    let mut seen: Vec<TokenId> = [prompt, output].concat();
    seen.sort_unstable();
    seen.dedup();
    for &token in &seen {
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 {
            *logit / repetition
        } else {
            *logit * repetition
        };
    }
    let mut generated = output.to_vec();
    generated.sort_unstable();
    for same in generated.chunk_by(|a, b| a == b) {
        let penalty = sampling.frequency_penalty() * same.len() as f64 + sampling.presence_penalty();
        logits[same[0] as usize] -= penalty as f32;
    }
}
