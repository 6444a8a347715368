//! The sampler against its processors written plainly, in double.

use super::*;
use tandem_core::sampling::RawSampling;
use tandem_core::sampling::Sampling;
use tandem_core::uses::Uses;
use tch::{Device, Kind};

fn view<'a>(sampling: &'a Sampling, prompt: &'a [TokenId], output: &'a [TokenId]) -> View<'a> {
    View {
        prompt,
        generated: output.len(),
        adapter: None,
        sampling,
        pooling: None,
        stop_tokens: &[2, 5],
        uses: sampling.has_penalties().then(|| {
            let mut uses = Uses::of(prompt);
            output.iter().for_each(|&token| uses.generated(token));
            // A few bytes, for as long as the tests run.
            &*Box::leak(Box::new(uses))
        }),
    }
}

fn noise(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64)
        .map(|i| 3.0 * rng::normal(seed, 9, i) as f32)
        .collect()
}

/// The processors, one after the other, in double.
fn reference(raw: &[f32], view: &View, output: &[TokenId]) -> Vec<f64> {
    let View {
        prompt,
        sampling,
        stop_tokens,
        ..
    } = view;
    let count =
        |tokens: &[TokenId], token: usize| tokens.iter().filter(|&&t| t as usize == token).count() as f64;
    let mut logits: Vec<f64> = raw.iter().map(|&logit| f64::from(logit)).collect();
    for (token, logit) in logits.iter_mut().enumerate() {
        *logit += sampling
            .logit_bias()
            .iter()
            .filter(|(t, _)| *t as usize == token)
            .map(|(_, b)| b)
            .sum::<f64>();
        if count(prompt, token) + count(output, token) > 0.0 {
            let penalty = sampling.repetition_penalty();
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
        let generated = count(output, token);
        *logit -= sampling.frequency_penalty() * generated;
        *logit -= if generated > 0.0 {
            sampling.presence_penalty()
        } else {
            0.0
        };
        if output.len() < sampling.min_tokens() as usize && stop_tokens.contains(&(token as TokenId)) {
            *logit = f64::NEG_INFINITY;
        }
    }
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut weights: Vec<f64> = logits
        .iter()
        .map(|l| ((l - max) / sampling.temperature()).exp())
        .collect();
    weights
        .iter_mut()
        .for_each(|w| *w = if *w < sampling.min_p() { 0.0 } else { *w });
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    if let Some(k) = sampling
        .top_k()
        .map(|k| k as usize)
        .filter(|&k| k < weights.len())
    {
        let least = weights[order[k - 1]];
        weights
            .iter_mut()
            .for_each(|w| *w = if *w < least { 0.0 } else { *w });
    }
    let (total, mut before) = (weights.iter().sum::<f64>(), 0.0);
    for &token in &order {
        let weight = weights[token];
        if before >= sampling.top_p() * total {
            weights[token] = 0.0;
        }
        before += weight;
    }
    let total = weights.iter().sum::<f64>();
    weights.iter().map(|weight| weight / total).collect()
}

#[test]
fn frequencies_are_the_probabilities() {
    let base = || RawSampling {
        temperature: Some(0.9),
        ..RawSampling::default()
    };
    let cases = [
        base(),
        RawSampling {
            temperature: Some(2.0),
            ..base()
        },
        RawSampling {
            top_k: Some(5),
            ..base()
        },
        RawSampling {
            top_p: Some(0.7),
            ..base()
        },
        RawSampling {
            min_p: Some(0.05),
            ..base()
        },
        RawSampling {
            top_k: Some(9),
            top_p: Some(0.8),
            min_p: Some(0.01),
            temperature: Some(1.5),
            ..base()
        },
        RawSampling {
            repetition_penalty: Some(1.5),
            ..base()
        },
        RawSampling {
            presence_penalty: Some(1.0),
            frequency_penalty: Some(0.4),
            ..base()
        },
        RawSampling {
            logit_bias: vec![(3, 5.0), (4, -100.0)],
            ..base()
        },
        RawSampling {
            min_tokens: Some(4),
            top_k: Some(1000),
            ..base()
        },
    ];
    for (case, raw) in cases.into_iter().enumerate() {
        let sampling = Sampling::new(raw, 1000).unwrap();
        let logits = noise(case as u64, 40);
        let output = [7, 7, 9];
        let view = view(&sampling, &[1, 9], &output);
        let expected = reference(&logits, &view, &output);
        let n = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..n {
            counts[choose(&logits, &view, None, seed).unwrap() as usize] += 1.0;
        }
        let (mut chi2, mut cells) = (0.0f64, 0.0f64);
        for (token, (&count, &p)) in counts.iter().zip(&expected).enumerate() {
            assert!(
                p > 0.0 || count == 0.0,
                "case {case}: token {token} is excluded, yet drawn"
            );
            let mean: f64 = p * n as f64;
            if mean >= 5.0 {
                chi2 += (count - mean) * (count - mean) / mean;
                cells += 1.0;
            }
        }
        // Mean cells - 1, variance twice that: 5 deviations above does not happen by chance.
        assert!(
            chi2 < cells + 5.0 * (2.0 * cells).sqrt(),
            "case {case}: chi2 {chi2} over {cells} cells"
        );
    }
}

#[test]
fn log_probabilities_are_of_raw_logits_and_equal_among_themselves() {
    let (rows, vocab) = (7, 5000);
    let logits = noise(3, rows * vocab);
    let tensor = Tensor::from_slice(&logits).view([rows as i64, vocab as i64]);
    let exact = tensor.to_kind(Kind::Double).log_softmax(-1, Kind::Double);
    let raw = RawSampling {
        temperature: Some(0.0),
        logprobs: Some(20),
        frequency_penalty: Some(0.5),
        ..RawSampling::default()
    };
    let sampling = Sampling::new(raw, vocab as u32).unwrap();
    let asks: Vec<Ask> = (0..rows)
        .map(|_| Ask {
            view: view(&sampling, &[1], &[]),
            seed: 0,
            mask: None,
            forced: None,
        })
        .collect();
    for (row, scored) in sample(&tensor, &asks).into_iter().enumerate() {
        let Scored { token, logprob, top } = scored.unwrap();
        let (values, tokens) = exact.get(row as i64).topk(20, -1, true, true);
        assert_eq!(
            top[0],
            (token, logprob),
            "the best alternative of a greedy token is itself, exactly"
        );
        for (i, (token, logprob)) in top.into_iter().enumerate() {
            assert_eq!(i64::from(token), tokens.int64_value(&[i as i64]));
            assert!((f64::from(logprob) - values.double_value(&[i as i64])).abs() < 1e-5);
        }
        let again = score(&tensor.narrow(0, row as i64, 1), &[(token, 0)]);
        assert_eq!(
            again[0],
            Ok(Scored {
                token,
                logprob,
                top: vec![]
            })
        );
    }
}

#[test]
fn ties_go_to_the_lowest_and_broken_rows_fail_alone() {
    let rows = [
        1.0,
        4.0,
        4.0,
        f32::NEG_INFINITY,
        1.0,
        f32::NAN,
        2.0,
        0.0,
        1.0,
        f32::INFINITY,
        2.0,
        0.0,
    ];
    let tensor = Tensor::from_slice(&rows).view([3, 4]).to_device(Device::Cpu);
    let sampling = Sampling::greedy();
    let asks: Vec<Ask> = (0..3)
        .map(|_| Ask {
            view: view(&sampling, &[1], &[]),
            seed: 0,
            mask: None,
            forced: None,
        })
        .collect();
    let sampled = sample(&tensor, &asks);
    assert_eq!(sampled[0].as_ref().unwrap().token, 1);
    assert_eq!(sampled[1..], [Err(NotFinite), Err(NotFinite)]);
}

#[test]
fn a_seed_and_a_place_decide() {
    let sampling = Sampling::new(RawSampling::default(), 1000).unwrap();
    let logits = vec![0.0; 1000];
    let at = |seed, output: &[TokenId]| choose(&logits, &view(&sampling, &[1], output), None, seed).unwrap();
    assert_eq!(at(5, &[1, 2]), at(5, &[3, 4]));
    assert!((0..20).any(|seed| at(seed, &[]) != at(seed, &[1])));
    assert!((0..20).any(|seed| at(seed, &[]) != at(seed + 1, &[])));
}
