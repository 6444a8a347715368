//! Log-probabilities of raw logits. Not here: choosing.

use tandem_core::TokenId;
use tandem_core::message::Scored;
use tandem_kernels::sample::Likelihood;

use super::NotFinite;
use super::mass::{ONE, exp, total};

/// Of a token of raw logits, with alternatives.
pub(super) fn scored(raw: &[f32], token: TokenId, n_top: u32) -> Result<Scored, NotFinite> {
    let maximum = maximum(raw)?;
    let top = largest(raw, n_top as usize).into_iter();
    let likelihood = Likelihood {
        logit: raw[token as usize],
        maximum,
        mass: total(raw, |logit| exp(logit - maximum)),
        top: top.map(|token| (token, raw[token as usize])).collect(),
    };
    Ok(of(token, likelihood))
}

/// From what a log-probability is made of.
pub(super) fn of(token: TokenId, likelihood: Likelihood) -> Scored {
    let Likelihood {
        logit,
        maximum,
        mass,
        top,
    } = likelihood;
    // ln(sum exp(logits)), in double: a vocabulary of small terms adds up.
    let normaliser = f64::from(maximum) + (mass as f64 / ONE).ln();
    // The same expression for the token and for the alternatives: clients compare them for equality.
    let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
    Scored {
        token,
        logprob: logprob(logit),
        top: top
            .into_iter()
            .map(|(token, logit)| (token, logprob(logit)))
            .collect(),
    }
}

/// Indices of the `n` largest, best first, the lower index first among equals. What a grammar forbids is none of them.
fn largest(raw: &[f32], n: usize) -> Vec<TokenId> {
    let mut top: Vec<(f32, TokenId)> = Vec::with_capacity(n + 1);
    let mut least = f32::NEG_INFINITY;
    for (token, &logit) in raw.iter().enumerate() {
        if n > 0 && (logit > least || top.len() < n) && logit > f32::NEG_INFINITY {
            let place = top.partition_point(|&(better, _)| better >= logit);
            top.insert(place, (logit, token as TokenId));
            top.truncate(n);
            if top.len() == n {
                least = top[n - 1].0;
            }
        }
    }
    top.into_iter().map(|(_, token)| token).collect()
}

pub(super) fn maximum(logits: &[f32]) -> Result<f32, NotFinite> {
    let widest =
        |(max, nan): (f32, bool), &logit: &f32| (if logit > max { logit } else { max }, nan | logit.is_nan());
    match logits.iter().fold((f32::NEG_INFINITY, false), widest) {
        (max, false) if max.is_finite() => Ok(max),
        _ => Err(NotFinite),
    }
}
