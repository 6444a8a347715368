//! What golden.rs does not ask of each family: a continuation through the cache, ten steps of training, two ranks.

use tandem_backend::model::Decoder;
use tandem_backend::train::{Inputs, Trainer};
use tandem_core::TokenId;
use tandem_core::job::{JobEvent, JobSpec};
use tandem_kernels::weight::Precision;

use crate::fixture::{FAMILIES, Fixture, Table, max_difference, numbers, token};
use crate::ranks::on_ranks;
use crate::run::{Pages, Sequence, base, packed, paged};
use crate::training::lora_job;

const LOSS: f64 = 1e-5;
/// Sums in another order, over ranks.
const RANKS: f64 = 1e-4;
const CHUNK: usize = 7;

#[test]
fn greedy_continuations_are_transformers() {
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(Precision::F32);
        let expected = fixture.numbers["greedy"].as_array().expect("tokens");
        let expected: Vec<TokenId> = expected.iter().map(token).collect();
        let mut tokens = fixture.tokens("long");
        let prompt = tokens.len();
        let mut pages = Pages::new(&decoder, 1, prompt + expected.len(), CHUNK);
        let mut done = 0;
        while tokens.len() < prompt + expected.len() {
            // The prompt in chunks, then a token at a time.
            let end = tokens.len().min(done + CHUNK);
            let part = base(&tokens[done..end]);
            let logits = pages.append(&decoder, &[(0, part)], done).remove(0);
            done = end;
            if done == tokens.len() {
                tokens.push(logits.get(-1).argmax(-1, false).int64_value(&[]) as TokenId);
            }
        }
        assert_eq!(tokens[prompt..], expected, "{name}");
    }
}

#[test]
fn ten_steps_of_every_family_are_pefts() {
    let mut table = Table::default();
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(Precision::F32);
        let run = &fixture.numbers["lora_training"];
        let losses = train(&lora_job(run).spec, &decoder);
        table.add(name, "losses", worst(&losses, &numbers(&run["losses"])), LOSS);
    }
    table.judge("ten LoRA steps against peft and torch.optim.AdamW");
}

#[test]
fn two_ranks_answer_and_train_as_transformers() {
    let mut table = Table::default();
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        let spec = fixture.decoder(Precision::F32).spec;
        let (tokens, run) = (fixture.tokens("long"), &fixture.numbers["lora_training"]);
        let job = lora_job(run);
        let rank = |decoder: Decoder| {
            let adapter = Fixture::open(name).adapter("all", &decoder);
            let sequences = [None, Some(&adapter)].map(|adapter| Sequence {
                tokens: &tokens,
                adapter,
            });
            let logits = [packed(&decoder, &sequences), paged(&decoder, &sequences, CHUNK)];
            (logits, train(&job.spec, &decoder))
        };
        let (logits, losses) = on_ranks(&fixture.folder, &spec, 2, rank).remove(0);
        for (way, logits) in ["packed", "paged"].into_iter().zip(&logits) {
            for (logits, expected) in logits.iter().zip(["logits.long", "all.logits.long"]) {
                let difference = max_difference(logits, fixture.tensor(expected));
                table.add(name, &format!("{way} {expected}"), difference, RANKS);
            }
        }
        table.add(name, "losses", worst(&losses, &numbers(&run["losses"])), RANKS);
    }
    table.judge("two ranks against transformers and peft");
}

/// The losses of a job on this rank; the first of them writes.
fn train(spec: &JobSpec, decoder: &Decoder) -> Vec<f64> {
    let inputs = Inputs::read(&spec.folder).expect("the job's folder");
    let mut trainer = Trainer::start_with(spec.clone(), &inputs, decoder.fit()).expect("it starts");
    let mut losses = vec![];
    loop {
        let mut quantum = trainer.quantum(Some(decoder)).expect("a quantum runs");
        if decoder.comm().rank() == 0 {
            quantum = quantum.write().expect("it is written");
        }
        losses.extend(quantum.events.into_iter().filter_map(|event| match event {
            JobEvent::Step(report) => Some(report.loss),
            _ => None,
        }));
        if quantum.finished {
            return losses;
        }
    }
}

fn worst(ours: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(ours.len(), expected.len());
    let differences = ours.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f64::max)
}
