//! Draws from weights cut by top_k and top_p, without sorting a vocabulary: both keep the heaviest tokens, and those
//! above a cut that is lowered until they suffice are few.

use tandem_core::TokenId;

use super::logprob::mass;

/// Weights relative to the heaviest (1). Almost always the first or second holds all that is asked for.
const CUTS: [f32; 5] = [1.0 / 16.0, 1.0 / 256.0, 1.0 / 8192.0, 1.0 / 1_048_576.0, 0.0];
/// Tokens whose mass is summed before a draw looks for its place among them.
const RUN: usize = 256;

/// The token at `uniform` (in `[0, 1)`) of the kept mass. The heaviest weight is 1; a weight of 0 is never drawn.
pub(super) fn draw(weights: &[f32], top_k: Option<usize>, top_p: f64, uniform: f64) -> TokenId {
    if top_k.is_none() && top_p >= 1.0 {
        return draw_from_all(weights, uniform);
    }
    let kept = kept(weights, top_k, top_p);
    let total = sum(&kept);
    pick(kept, uniform * total).expect("the heaviest token is kept")
}

fn draw_from_all(weights: &[f32], uniform: f64) -> TokenId {
    let runs: Vec<f64> = weights
        .chunks(RUN)
        .map(|run| mass(run, |weight| weight))
        .collect();
    let mut rest = uniform * runs.iter().sum::<f64>();
    let mut last_run = 0;
    for (i, &run) in runs.iter().enumerate().filter(|(_, run)| **run > 0.0) {
        last_run = i;
        if rest < run {
            break;
        }
        rest -= run;
    }
    let first = last_run * RUN;
    let run = weights[first..].iter().take(RUN).enumerate();
    let run = run.map(|(i, &weight)| (weight, (first + i) as TokenId)).collect();
    pick(run, rest).expect("a run with mass has a token")
}

/// The token `rest` falls on; the last one with weight when rounding leaves it beyond.
fn pick(tokens: Vec<(f32, TokenId)>, mut rest: f64) -> Option<TokenId> {
    let mut last = None;
    for (weight, token) in tokens.into_iter().filter(|&(weight, _)| weight > 0.0) {
        last = Some(token);
        if rest < f64::from(weight) {
            break;
        }
        rest -= f64::from(weight);
    }
    last
}

/// The `top_k` heaviest (and what weighs as much as the last of them), then the fewest of these that hold `top_p` of
/// their mass. Heaviest first, the lower id first among equals.
fn kept(weights: &[f32], top_k: Option<usize>, top_p: f64) -> Vec<(f32, TokenId)> {
    let wanted = match top_k {
        Some(_) => f64::INFINITY,
        None => top_p * mass(weights, |weight| weight),
    };
    let mut heavy: Vec<(f32, TokenId)> = vec![];
    for cut in CUTS {
        let above = weights
            .iter()
            .enumerate()
            .filter(|(_, weight)| **weight >= cut && **weight > 0.0);
        heavy = above.map(|(token, &weight)| (weight, token as TokenId)).collect();
        let enough = match top_k {
            Some(k) => heavy.len() >= k,
            None => sum(&heavy) >= wanted,
        };
        if enough {
            break;
        }
    }
    heavy.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if let Some(&(least, _)) = top_k.and_then(|k| heavy.get(k - 1)) {
        heavy.truncate(heavy.partition_point(|&(weight, _)| weight >= least));
    }
    if top_p < 1.0 {
        let wanted = match top_k {
            Some(_) => top_p * sum(&heavy),
            None => wanted,
        };
        let mut before = 0.0;
        let n = heavy.iter().take_while(|&&(weight, _)| {
            let keep = before < wanted;
            before += f64::from(weight);
            keep
        });
        let n = n.count();
        heavy.truncate(n.max(1));
    }
    heavy
}

fn sum(tokens: &[(f32, TokenId)]) -> f64 {
    tokens.iter().map(|&(weight, _)| f64::from(weight)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept() {
        // Descending, flat, and with ties; far below the first cuts too.
        let steep: Vec<f32> = (0..1000).map(|i| 0.5f32.powi(i)).collect();
        let flat = vec![1.0; 600];
        let ties = vec![0.5, 1.0, 0.5, 0.5, 0.25];
        let cases: [(&[f32], Option<usize>, f64, usize); 10] = [
            (&steep, Some(3), 1.0, 3),
            (&steep, Some(30), 1.0, 30),
            (&steep, None, 0.5, 1),
            (&steep, None, 0.76, 3),
            (&steep, None, 0.999_999_9, 24),
            (&flat, None, 0.5, 300),
            (&flat, Some(5), 1.0, 600),
            (&ties, Some(2), 1.0, 4),
            (&ties, Some(4), 0.5, 2),
            (&ties, None, 1e-9, 1),
        ];
        for (weights, top_k, top_p, expected) in cases {
            let kept = kept(weights, top_k, top_p);
            assert_eq!(
                kept.len(),
                expected,
                "top_k {top_k:?} top_p {top_p} of {} weights",
                weights.len()
            );
            assert!(kept.is_sorted_by(|a, b| a.0 > b.0 || (a.0 == b.0 && a.1 < b.1)));
        }
    }

    #[test]
    fn a_draw_is_its_place_in_the_mass() {
        let mut weights = vec![0.0; 1000];
        (weights[3], weights[255], weights[256], weights[999]) = (1.0, 0.5, 0.25, 0.25);
        for (uniform, token) in [
            (0.0, 3),
            (0.499, 3),
            (0.5, 255),
            (0.749, 255),
            (0.75, 256),
            (0.875, 999),
            (1.0, 999),
        ] {
            assert_eq!(draw(&weights, None, 1.0, uniform), token);
            assert_eq!(draw(&weights, Some(900), 1.0, uniform), token);
        }
    }
}
