//! What clients train over several ranks against one: each rank is told the same, to the bit, and what one is told.

use tandem_core::dataset::Example;

use crate::fixture::Table;
use crate::joint::{Client, Told, losses};
use crate::ranks::{WORLDS, models, prompt};

/// Of log-probabilities (of their size, where that is beyond 1), of the loss of a token, of the size of the gradient's norm.
const CLOSE: f64 = 1e-5;

#[test]
fn clients_on_ranks_are_told_what_one_rank_tells() {
    let mut table = Table::default();
    let rows: Vec<Example> = (0..4)
        .map(|i| Example {
            tokens: prompt(12 + 3 * i, i),
            weights: vec![],
        })
        .collect();
    for model in models() {
        let told = |world: usize, i: usize| {
            let ranks = model.on_ranks(world, |decoder| Client::new(i, &rows, &decoder).run(&decoder));
            assert!(
                ranks.iter().all(|rank| *rank == ranks[0]),
                "{}: {world} ranks are told different things",
                model.name
            );
            ranks.into_iter().next().expect("a rank")
        };
        for i in 0..losses().len() {
            let expected = told(1, i);
            for world in WORLDS {
                let ours = told(world, i);
                assert_eq!(ours.len(), expected.len());
                let (mut logprobs, mut loss, mut norms) = (0f64, 0f64, 0f64);
                for (ours, expected) in ours.iter().zip(&expected) {
                    let (ours, expected) = match (ours, expected) {
                        (Told::Learned(ours, stepped), Told::Learned(expected, before)) => {
                            let apart = (stepped.grad_norm - before.grad_norm).abs();
                            norms = norms.max(apart / before.grad_norm);
                            assert_eq!(stepped.step, before.step);
                            (ours, expected)
                        }
                        (Told::Scored(ours), Told::Scored(expected)) => (ours, expected),
                        // An adapter's digest is of every bit.
                        (Told::Saved(_), Told::Saved(_)) => continue,
                        (Told::Wrong(ours), Told::Wrong(expected)) => {
                            assert_eq!(ours, expected);
                            continue;
                        }
                        (ours, expected) => panic!("{ours:?}, one rank: {expected:?}"),
                    };
                    let both = ours
                        .logprobs
                        .iter()
                        .flatten()
                        .zip(expected.logprobs.iter().flatten());
                    let apart = |(a, b): (&f32, &f32)| f64::from((a - b).abs() / b.abs().max(1.0));
                    logprobs = both.map(apart).fold(logprobs, f64::max);
                    let n = expected.logprobs.iter().flatten().count() as f64;
                    loss = loss.max((ours.loss - expected.loss).abs() / n);
                }
                let what = |name: &str| format!("client {i} on {world} ranks: {name}");
                table.add(model.name, &what("log-probabilities"), logprobs, CLOSE);
                table.add(model.name, &what("loss of a token"), loss, CLOSE);
                table.add(model.name, &what("gradient norms"), norms, CLOSE);
            }
        }
    }
    table.judge("clients over ranks against one");
}
