//! Draws from weights cut by top_k and top_p, without sorting a vocabulary: both keep the heaviest tokens, and those
//! above a cut that is lowered until they suffice are few.

use tandem_core::TokenId;

use super::mass::{mass, part, total};

/// Weights relative to the heaviest (1). Almost always the first or second holds all that is asked for.
const CUTS: [f32; 5] = [1.0 / 16.0, 1.0 / 256.0, 1.0 / 8192.0, 1.0 / 1_048_576.0, 0.0];
/// Tokens whose mass is summed before a draw looks for its place among them.
const RUN: usize = 256;

/// The token that `bits`, as a fraction of 2^64, fall on in the kept mass, tokens in the order of their ids; `top_p` is such a
/// fraction too. The heaviest weight is 1; a weight of 0 is never drawn.
pub(super) fn draw(weights: &[f32], top_k: Option<usize>, top_p: Option<u64>, bits: u64) -> TokenId {
    if top_k.is_none() && top_p.is_none() {
        return draw_from_all(weights, bits);
    }
    let kept = kept(weights, top_k, top_p);
    pick(&kept, part(bits, sum(&kept)))
}

fn draw_from_all(weights: &[f32], bits: u64) -> TokenId {
    let runs: Vec<u64> = weights
        .chunks(RUN)
        .map(|run| total(run, |weight| weight))
        .collect();
    let mut rest = part(bits, runs.iter().sum());
    let mut first = 0;
    for run in runs {
        if rest < run {
            break;
        }
        rest -= run;
        first += RUN;
    }
    let run = weights[first..].iter().take(RUN).enumerate();
    let run: Vec<(f32, TokenId)> = run.map(|(i, &weight)| (weight, (first + i) as TokenId)).collect();
    pick(&run, rest)
}

/// The token `rest`, below their mass, falls on.
fn pick(tokens: &[(f32, TokenId)], mut rest: u64) -> TokenId {
    for &(weight, token) in tokens {
        let mass = mass(weight);
        if rest < mass {
            return token;
        }
        rest -= mass;
    }
    unreachable!("{rest} beyond the mass of {} tokens", tokens.len())
}

/// The `top_k` heaviest (and what weighs as much as the last of them), then the fewest of these that hold `top_p` of
/// their mass, the lower id first among equals. In the order of their ids.
fn kept(weights: &[f32], top_k: Option<usize>, top_p: Option<u64>) -> Vec<(f32, TokenId)> {
    let part_of = |all: u64| top_p.map(|top_p| part(top_p, all));
    let wanted = match top_k {
        Some(_) => None,
        None => part_of(total(weights, |weight| weight)),
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
            None => wanted.is_none_or(|wanted| sum(&heavy) >= wanted),
        };
        if enough {
            break;
        }
    }
    let mut sorted = heavy.clone();
    sorted.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if let Some(&(least, _)) = top_k.and_then(|k| sorted.get(k - 1)) {
        sorted.truncate(sorted.partition_point(|&(weight, _)| weight >= least));
    }
    if let Some(wanted) = wanted.or_else(|| part_of(sum(&sorted))) {
        let mut before = 0;
        let n = sorted.iter().take_while(|&&(weight, _)| {
            let keep = before < wanted;
            before += mass(weight);
            keep
        });
        let n = n.count();
        sorted.truncate(n.max(1));
    }
    let &(least, last) = sorted.last().expect("the heaviest token is kept");
    heavy.retain(|&(weight, token)| weight > least || (weight == least && token <= last));
    heavy
}

fn sum(tokens: &[(f32, TokenId)]) -> u64 {
    tokens.iter().map(|&(weight, _)| mass(weight)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fraction(p: f64) -> Option<u64> {
        (p < 1.0).then_some((p * 2f64.powi(64)) as u64)
    }

    #[test]
    fn what_is_kept() {
        // Descending, flat, and with ties; far below the first cuts too.
        let steep: Vec<f32> = (0..40).map(|i| 0.5f32.powi(i)).collect();
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
            let kept = kept(weights, top_k, fraction(top_p));
            assert_eq!(
                kept.len(),
                expected,
                "top_k {top_k:?} top_p {top_p} of {} weights",
                weights.len()
            );
            assert!(kept.is_sorted_by(|a, b| a.1 < b.1));
            // Nothing that was left out weighs more, nor as much and has a lower id.
            let least = kept.iter().map(|&(weight, _)| weight).fold(1.0, f32::min);
            let last = kept.iter().rfind(|&&(weight, _)| weight == least).unwrap().1;
            for (token, &weight) in weights.iter().enumerate() {
                let token = token as TokenId;
                let is_kept = kept.iter().any(|&(_, kept)| kept == token);
                assert_eq!(is_kept, weight > least || (weight == least && token <= last));
            }
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
            let bits = fraction(uniform).unwrap_or(u64::MAX);
            assert_eq!(draw(&weights, None, None, bits), token);
            assert_eq!(draw(&weights, Some(900), None, bits), token);
        }
    }
}
