//! Log-probabilities of raw logits, and the sums behind them. Not here: choosing.

use tandem_core::TokenId;
use tandem_core::message::Scored;

use super::NotFinite;

pub(super) fn scored(raw: &[f32], token: TokenId, n_top: u32) -> Result<Scored, NotFinite> {
    let max = maximum(raw)?;
    // ln(sum exp(logits)), in double: a vocabulary of small terms adds up.
    let normaliser = f64::from(max) + mass(raw, |logit| exp(logit - max)).ln();
    // The same expression for the token and for the alternatives: clients compare them for equality.
    let logprob = |token: TokenId| (f64::from(raw[token as usize]) - normaliser) as f32;
    let top = largest(raw, n_top as usize)
        .into_iter()
        .map(|token| (token, logprob(token)))
        .collect();
    Ok(Scored {
        token,
        logprob: logprob(token),
        top,
    })
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

/// Sum of `weight` over all values: short runs in float32, those in double.
pub(super) fn mass(values: &[f32], weight: impl Fn(f32) -> f32) -> f64 {
    let run = |run: &[f32]| {
        // Independent sums, so that the compiler vectorises them.
        let mut lanes = [0.0; 16];
        for values in run.chunks(lanes.len()) {
            lanes
                .iter_mut()
                .zip(values)
                .for_each(|(lane, &value)| *lane += weight(value));
        }
        f64::from(lanes.iter().sum::<f32>())
    };
    values.chunks(256).map(run).sum()
}

/// exp for `x <= 0`, relative error below 3e-7; 0 below -87. Free of branches and calls, so the compiler vectorises it
/// (libm's is 5 times slower over a vocabulary).
pub(super) fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let rounded = x.max(-87.0) * std::f32::consts::LOG2_E + MAGIC;
    let n = rounded - MAGIC;
    let r = (x.max(-87.0) - n * 0.693_359_4) + n * 2.121_944_4e-4; // ln 2 in two parts
    // Cephes expf
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exp() {
        for i in 0..200_000 {
            let x = -f64::from(i) * 5e-4;
            let (ours, exact) = (f64::from(exp(x as f32)), f64::from(x as f32).exp());
            assert!(
                (ours - exact).abs() <= 3e-7 * exact + 1e-37,
                "exp({x}) = {ours}, not {exact}"
            );
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, 0.0));
    }
}
