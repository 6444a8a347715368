//! A GPU's path, emulated: the same answers as the CPU's, the same bits however rows are put together, and few launches.

use std::ops::Range;

use tandem_backend::lora::adapter::Adapter;
use tandem_backend::lora::params::AdapterParams;
use tandem_backend::model::Decoder;
use tandem_backend::train::Trainer;
use tandem_backend::train::pass::{KEEP_BYTES, Trained};
use tandem_kernels::gpu::{COPY, Lanes, Launches, WAIT, counted, emulated};
use tandem_kernels::weight::Precision;

use crate::fixture::{FAMILIES, Fixture, NAMES, Table, max_difference};
use crate::golden::backward;
use crate::run::{Pages, Sequence, base, logprobs, packed, paged};
use crate::training::{finish, lora_job};

/// Of a layer of a plain model in bfloat16, with adapters or without: norm, qkv, rope of q and k, the pages' write,
/// attention and its merge, output, norm, gate and up, activation, down.
const MOST_LAUNCHES: usize = 12;

/// Families whose gradients are looked at: plain with experts, soft caps and windows, sinks.
const TRAINED: [&str; 3] = ["mixtral", "gemma2", "gpt_oss"];

#[test]
fn answers_are_the_cpus() {
    let mut table = Table::default();
    let names: Vec<&str> = NAMES.into_iter().chain(FAMILIES).collect();
    for (i, name) in names.into_iter().enumerate() {
        let lanes = Lanes::ALL[i % Lanes::ALL.len()];
        let fixture = Fixture::open(name);
        for (precision, close) in [(Precision::F32, 1e-4), (Precision::Bf16, 1e-1)] {
            let (long, short) = (fixture.tokens("long"), fixture.tokens("short"));
            let sequences = [base(&long), base(&short)];
            let want = packed(&fixture.decoder(precision), &sequences);
            emulated(lanes, || {
                let decoder = fixture.decoder(precision);
                let whole = paged(&decoder, &sequences, usize::MAX >> 1);
                for (trained, served) in packed(&decoder, &sequences).iter().zip(&whole) {
                    let off = max_difference(trained, served);
                    table.add(name, &format!("{lanes}: packed - paged, {precision:?}"), off, 0.0);
                }
                for ((got, want), tokens) in whole.iter().zip(&want).zip([&long, &short]) {
                    let off = max_difference(&logprobs(got, tokens), &logprobs(want, tokens));
                    table.add(name, &format!("{lanes} - CPU, {precision:?}"), off, close);
                }
                for (chunked, whole) in paged(&decoder, &sequences, 7).iter().zip(&whole) {
                    let off = max_difference(chunked, whole);
                    table.add(
                        name,
                        &format!("{lanes}: chunks of 7 - whole, {precision:?}"),
                        off,
                        0.0,
                    );
                }
            });
        }
    }
    table.judge("an emulated GPU (log-probabilities; logits for chunks)");
}

#[test]
fn gradients_are_the_cpus() {
    let mut table = Table::default();
    for (name, lanes) in TRAINED.into_iter().zip(Lanes::ALL) {
        let fixture = Fixture::open(name);
        for (precision, close) in [(Precision::F32, 1e-4), (Precision::Bf16, 1e-1)] {
            let gradients = || {
                let decoder = fixture.decoder(precision);
                let adapter_name = fixture.adapters()[0];
                let adapter = fixture.adapter(adapter_name, &decoder);
                let gradient =
                    AdapterParams::zeros(fixture.adapter_params(adapter_name, &decoder).shape.clone());
                let trained = Trained::Adapter {
                    adapter: &adapter,
                    gradient: &gradient,
                };
                let loss = backward(&decoder, trained, &fixture.examples(), KEEP_BYTES);
                (loss, gradient.flat.copy())
            };
            let (want_loss, want) = gradients();
            let ((loss, got), launches) = counted(|| emulated(lanes, gradients));
            println!("{name}: {} launches of ours", launches.values().sum::<usize>());
            table.add(
                name,
                &format!("{lanes} - CPU, loss, {precision:?}"),
                (loss - want_loss).abs(),
                close,
            );
            let off = (&got - &want).norm().double_value(&[]) / want.norm().double_value(&[]);
            table.add(
                name,
                &format!("{lanes} - CPU, gradients, {precision:?}"),
                off,
                close,
            );
            let ours = launches
                .keys()
                .filter(|kernel| kernel.starts_with("attention_back_"))
                .count();
            assert_eq!(ours, 2, "{launches:#?}");
        }
    }
    table.judge("training on an emulated GPU (gradients by their norm)");
}

#[test]
fn a_layer_is_few_launches_whatever_the_batch() {
    let fixture = Fixture::open("gqa_tied");
    let tokens = fixture.tokens("long");
    emulated(Lanes::Cdna, || {
        let decoder = fixture.decoder(Precision::Bf16);
        let adapters: Vec<Adapter> = (0..8).map(|_| fixture.adapter("all", &decoder)).collect();
        let layers = decoder.n_sublayers() / 2;
        for streams in [1, 8, 64] {
            for n_adapters in [0, 1, 8] {
                let sequences: Vec<Sequence> = (0..streams)
                    .map(|i| Sequence {
                        tokens: &tokens[..9],
                        // Neighbours share an adapter, as in a plan.
                        adapter: adapters[..n_adapters].get(i * n_adapters / streams),
                    })
                    .collect();
                let launches = decode_step(&decoder, &sequences);
                let queued = launches.iter().filter(|(name, _)| *name != COPY);
                let all: usize = queued.map(|(_, n)| n).sum();
                println!(
                    "{streams} streams, {n_adapters} adapters: {all} launches of {layers} layers and the head"
                );
                let adapter_launches = if n_adapters == 0 { 0 } else { 8 };
                let most = layers * (MOST_LAUNCHES + adapter_launches) + 8;
                assert!(all <= most, "{all} launches, {most} allowed: {launches:#?}");
            }
        }
    });
}

/// Of a chunk of a prompt in bfloat16, which is longer than what our products for few rows take.
#[test]
fn launches_of_a_prompt() {
    let fixture = Fixture::open("gqa_tied");
    let tokens: Vec<u32> = fixture.tokens("long").into_iter().cycle().take(40).collect();
    emulated(Lanes::Nvidia, || {
        let decoder = fixture.decoder(Precision::Bf16);
        let layers = decoder.n_sublayers() / 2;
        let mut pages = Pages::new(&decoder, 1, tokens.len(), tokens.len());
        let (_, launches) = counted(|| pages.append(&decoder, &[(0, base(&tokens))], 0));
        say("prefill", layers, &launches);
        let all: usize = launches.values().sum();
        assert!(all <= layers * MOST_LAUNCHES + 8, "{all} launches: {launches:#?}");
    });
}

/// Of an optimizer step of LoRA on all linears, in bfloat16.
#[test]
fn launches_of_a_training_step() {
    /// Of a layer, forward, back and what is the adapter's; the rest (loss, clipping, AdamW) shared out.
    const MOST: usize = 400;
    let fixture = Fixture::open("gqa_tied");
    let job = lora_job(&fixture.numbers["lora_training"]);
    emulated(Lanes::Nvidia, || {
        let decoder = fixture.decoder(Precision::Bf16);
        let layers = decoder.n_sublayers() / 2;
        let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("the job starts");
        let (reports, mut launches) = counted(|| finish(&mut trainer, Some(&decoder)));
        launches.values_mut().for_each(|n| *n = n.div_ceil(reports.len()));
        say("training step", layers, &launches);
        let all: usize = launches.values().sum();
        assert!(all <= layers * MOST, "{all} launches: {launches:#?}");
    });
}

/// For scripts/gpu-kernels estimate.
fn say(what: &str, layers: usize, launches: &Launches) {
    println!("{what} of {layers} layers: {}", serde_json::json!(launches));
}

#[test]
fn a_decode_step_is_told_in_one_copy() {
    for name in NAMES.into_iter().chain(FAMILIES) {
        let fixture = Fixture::open(name);
        let tokens = fixture.tokens("long");
        let sequences: Vec<Sequence> = [&tokens[..9], &tokens[1..10], &tokens[2..11]].map(base).into();
        emulated(Lanes::Nvidia, || {
            let launches = decode_step(&fixture.decoder(Precision::Bf16), &sequences);
            assert_eq!(launches.get(COPY), Some(&1), "{name}: {launches:#?}");
            assert_eq!(launches.get(WAIT), None, "{name}: {launches:#?}");
        });
    }
}

/// What the last token of each sequence queues.
fn decode_step(decoder: &Decoder, sequences: &[Sequence]) -> Launches {
    let last = sequences[0].tokens.len() - 1;
    let mut pages = Pages::new(decoder, sequences.len(), last + 1, last);
    let part = |range: Range<usize>| -> Vec<(usize, Sequence)> {
        sequences
            .iter()
            .enumerate()
            .map(|(i, sequence)| {
                (
                    i,
                    Sequence {
                        tokens: &sequence.tokens[range.clone()],
                        ..*sequence
                    },
                )
            })
            .collect()
    };
    pages.append(decoder, &part(0..last), 0);
    counted(|| pages.append(decoder, &part(last..last + 1), last)).1
}
