//! Processors of single logits: logit_bias, penalties, min_tokens. Not here: what looks at all of them (nucleus).

use tandem_core::grammar::Mask;
use tandem_core::sched::View;
use tandem_kernels::sample::Edit;

/// What a request changes of single logits of a vocabulary of `n_tokens`, by token.
pub(super) fn edits(view: &View, mask: Option<&Mask>, n_tokens: usize) -> Vec<Edit> {
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
    let mut edits: Vec<Edit> = vec![];
    if let Some(uses) = uses {
        // Repetition over prompt and output; frequency and presence over the output only.
        let repetition = sampling.repetition_penalty() as f32;
        edits.extend(uses.iter().map(|(token, generated)| {
            let penalty = match generated {
                0 => 0.0,
                n => sampling.frequency_penalty() * f64::from(n) + sampling.presence_penalty(),
            };
            Edit {
                repetition,
                penalty: penalty as f32,
                ..Edit::of(token)
            }
        }));
    }
    edits.extend(sampling.logit_bias().iter().map(|&(token, bias)| Edit {
        bias: bias as f32,
        ..Edit::of(token)
    }));
    if too_short {
        edits.extend(stop_tokens.iter().map(|&token| Edit {
            bias: f32::NEG_INFINITY,
            ..Edit::of(token)
        }));
    }
    edits.retain(|edit| (edit.token as usize) < n_tokens);
    edits.sort_by_key(|edit| edit.token);
    edits.dedup_by(|next, edit| {
        let same = next.token == edit.token;
        if same {
            edit.bias += next.bias;
            edit.repetition *= next.repetition;
            edit.penalty += next.penalty;
        }
        same
    });
    edits
}
