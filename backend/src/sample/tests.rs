//! The sampler against its processors written plainly, in double.

use super::*;
use tandem_core::grammar::{Compiler, Grammar, Vocabulary};
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

fn ask<'a>(view: View<'a>, seed: u64) -> Ask<'a> {
    Ask {
        view,
        seed,
        mask: None,
        forced: None,
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
            counts[choose(&logits, &ask(view, seed)).unwrap() as usize] += 1.0;
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
    let asks: Vec<Ask> = (0..rows).map(|_| ask(view(&sampling, &[1], &[]), 0)).collect();
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
    let asks: Vec<Ask> = (0..3).map(|_| ask(view(&sampling, &[1], &[]), 0)).collect();
    let sampled = sample(&tensor, &asks);
    assert_eq!(sampled[0].as_ref().unwrap().token, 1);
    assert_eq!(sampled[1..], [Err(NotFinite), Err(NotFinite)]);
}

#[test]
fn a_seed_and_a_place_decide() {
    let sampling = Sampling::new(RawSampling::default(), 1000).unwrap();
    let logits = vec![0.0; 1000];
    let at = |seed, output: &[TokenId]| choose(&logits, &ask(view(&sampling, &[1], output), seed)).unwrap();
    assert_eq!(at(5, &[1, 2]), at(5, &[3, 4]));
    assert!((0..20).any(|seed| at(seed, &[]) != at(seed, &[1])));
    assert!((0..20).any(|seed| at(seed, &[]) != at(seed + 1, &[])));
}

/// A row's options: tokens, log-probabilities and failures of a device are the host's, to the last bit.
#[test]
fn a_device_chooses_what_the_host_chooses() {
    let base = || RawSampling {
        temperature: Some(0.8),
        ..RawSampling::default()
    };
    let options = [
        base(),
        RawSampling {
            temperature: Some(0.0),
            frequency_penalty: Some(1.5),
            logprobs: Some(20),
            ..base()
        },
        RawSampling {
            top_k: Some(20),
            top_p: Some(0.8),
            logprobs: Some(0),
            ..base()
        },
        RawSampling {
            top_p: Some(0.95),
            min_p: Some(0.001),
            temperature: Some(1.7),
            ..base()
        },
        RawSampling {
            // As much as is next to nothing.
            top_p: Some(1e-300),
            ..base()
        },
        RawSampling {
            top_k: Some(1_000_000),
            repetition_penalty: Some(1.3),
            presence_penalty: Some(-0.5),
            frequency_penalty: Some(0.1),
            logit_bias: vec![(1, 7.0), (7, -100.0), (7, 90.0), (999, 3.3)],
            min_tokens: Some(9),
            logprobs: Some(5),
            ..base()
        },
    ];
    let vocabulary = |n: usize| Vocabulary {
        tokens: (0..n)
            .map(|i| format!("{}{i}", ["a", "b"][i % 2]).into_bytes())
            .collect(),
        special: vec![false; n],
        ends: vec![],
    };
    for n_tokens in [1000, 4100] {
        let options: Vec<Sampling> = options
            .iter()
            .map(|raw| Sampling::new(raw.clone(), n_tokens as u32).unwrap())
            .collect();
        // Fewer tokens than the model has.
        let compiler = Compiler::new(&vocabulary(n_tokens - 70)).unwrap();
        let grammar = Grammar::lark("start: /a[0-9]+/");
        let mask = compiler.compile(&grammar).unwrap().mask(&[]).unwrap();
        let asks: Vec<Ask> = (0..options.len() * 12)
            .map(|i| Ask {
                mask: (i % 3 == 1).then_some(&mask),
                forced: (i % 8 == 5).then_some([4, 5][i / 8 % 2]),
                ..ask(view(&options[i / 12], &[1, 9, 1], &[7, 7, 9]), i as u64)
            })
            .collect();
        let mut logits = noise(n_tokens as u64, asks.len() * n_tokens);
        // Ties, and broken rows.
        logits[..5 * n_tokens].iter_mut().for_each(|x| *x = x.round());
        for (row, broken) in [(7, f32::NAN), (15, f32::INFINITY), (31, f32::NAN)] {
            logits[row * n_tokens + 600] = broken;
        }
        let logits = Tensor::from_slice(&logits).view([asks.len() as i64, n_tokens as i64]);
        let targets: Vec<(TokenId, u32)> = (0..asks.len())
            .map(|row| (row as TokenId * 11, row as u32 % 21))
            .collect();
        let (sampled, scored) = (sample(&logits, &asks), score(&logits, &targets));
        assert_eq!(sampled.iter().filter(|row| row.is_err()).count(), 3);
        for lanes in gpu::Lanes::ALL {
            let (there, heard) = gpu::emulated(lanes, || gpu::counted(|| sample(&logits.copy(), &asks)));
            assert_eq!(there, sampled, "{lanes}, {n_tokens} tokens");
            assert_eq!((heard.get(gpu::COPY), heard.get(gpu::WAIT)), (Some(&1), Some(&1)));
            let there = gpu::emulated(lanes, || score(&logits.copy(), &targets));
            assert_eq!(there, scored, "{lanes}, {n_tokens} tokens");
        }
    }
}
