//! Different ways to the same numbers: packed and paged, whole and in chunks, mixed and alone, adapter and merged weights.

use tandem_backend::lora::peft::{self, PeftConfig};
use tandem_backend::model::Decoder;
use tandem_backend::model::full::{FullParams, FullShape};
use tandem_backend::weights::Checkpoint;
use tandem_core::job::Lora;
use tandem_kernels::machine;
use tandem_kernels::weight::Precision;
use tch::{Kind, Tensor};

use crate::fixture::{FAMILIES, Fixture, NAMES, Table, max_difference, trained_whole};
use crate::run::{Sequence, base, logprobs, packed, paged};
use crate::training::tensors;

const CLOSE: f64 = 1e-4;
/// Where a sum in another order is rounded to bfloat16.
const CLOSE_BF16: f64 = 1e-1;
const PRECISIONS: [(Precision, f64); 2] = [(Precision::F32, CLOSE), (Precision::Bf16, CLOSE_BF16)];

/// What the kernels promise bit for bit where they have their own code (AVX2 or more, multiples of 16 in the head
/// dimension); elsewhere ATen computes, and only nearly the same comes out.
fn limit(decoder: &Decoder, close: f64) -> f64 {
    let own_kernels = machine::features().avx2 && decoder.spec.head_dim() % 16 == 0;
    if own_kernels { 0.0 } else { close }
}

#[test]
fn paged_is_packed_and_chunked_is_whole() {
    let mut table = Table::default();
    for name in NAMES.into_iter().chain(FAMILIES) {
        let fixture = Fixture::open(name);
        for (precision, close) in PRECISIONS {
            let decoder = fixture.decoder(precision);
            let (long, short) = (fixture.tokens("long"), fixture.tokens("short"));
            let sequences = [base(&long), base(&short)];
            let side_by_side = packed(&decoder, &sequences);
            let whole = paged(&decoder, &sequences, usize::MAX >> 1);
            let row = |logits: &[Tensor]| logprobs(&logits[0], &long);
            let what = |what: &str| format!("{what} {precision:?}");
            table.add(
                name,
                &what("paged - packed"),
                max_difference(&row(&whole), &row(&side_by_side)),
                close,
            );
            for chunk in [1, 7, 32] {
                let chunked = paged(&decoder, &sequences, chunk);
                for (chunked, whole) in chunked.iter().zip(&whole) {
                    let what = what(&format!("chunks of {chunk:2} - whole"));
                    table.add(
                        name,
                        &what,
                        max_difference(chunked, whole),
                        limit(&decoder, close),
                    );
                }
            }
        }
    }
    table.judge("one sequence, several ways (log-probabilities; logits for chunks)");
}

#[test]
fn mixed_adapters_answer_as_each_alone() {
    let mut table = Table::default();
    for name in ["gqa_tied", "biases", "sharded"] {
        let fixture = Fixture::open(name);
        for (precision, close) in PRECISIONS {
            let decoder = fixture.decoder(precision);
            let adapters = ["all", "some"].map(|name| fixture.adapter(name, &decoder));
            let tokens = fixture.tokens("long");
            let sequences: Vec<Sequence> = [
                None,
                None,
                Some(&adapters[0]),
                Some(&adapters[1]),
                Some(&adapters[1]),
            ]
            .into_iter()
            .enumerate()
            .map(|(i, adapter)| Sequence {
                tokens: &tokens[i..tokens.len() - 3 * i],
                adapter,
            })
            .collect();
            for (way, run) in [
                ("packed", packed as fn(&Decoder, &[Sequence]) -> Vec<Tensor>),
                ("paged", |decoder, sequences| paged(decoder, sequences, 9)),
            ] {
                let mixed = run(&decoder, &sequences);
                for (i, (sequence, mixed)) in sequences.iter().zip(&mixed).enumerate() {
                    let alone = run(&decoder, &[*sequence]).remove(0);
                    let what = format!("{way} sequence {i} {precision:?}");
                    table.add(name, &what, max_difference(mixed, &alone), limit(&decoder, close));
                }
                let adapted = Sequence {
                    adapter: Some(&adapters[0]),
                    ..sequences[0]
                };
                let effect = max_difference(&run(&decoder, &[adapted])[0], &mixed[0]);
                assert!(
                    effect > 0.1,
                    "{name}: the adapter changes logits by {effect} only"
                );
            }
        }
    }
    table.judge("mixed batches against each alone (logits)");
}

#[test]
fn merged_weights_answer_as_the_adapter() {
    let mut table = Table::default();
    for name in NAMES.into_iter().chain(trained_whole()) {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(Precision::F32);
        let checkpoint = Checkpoint::open(&fixture.folder).expect("the fixture opens");
        for adapter_name in fixture.adapters() {
            let adapter = fixture.adapter_params(adapter_name, &decoder);
            let merged =
                FullParams::read(FullShape::new(&decoder.spec), &checkpoint).expect("it has every parameter");
            for (weight, mut view) in merged.named() {
                let parts = adapter
                    .shape
                    .iter()
                    .flat_map(|(_, linear)| linear.parts.iter().map(move |part| (linear, part)));
                for (linear, part) in parts.filter(|(_, part)| weight == format!("{}.weight", part.path)) {
                    let delta = adapter.b(part).matmul(&adapter.part_a(linear, part)) * part.scale;
                    view.copy_(&(view.shallow_clone() + delta));
                }
            }
            let merged =
                Decoder::from_params(decoder.spec.clone(), &merged, Precision::F32, true).expect("it builds");
            let packed_adapter = fixture.adapter(adapter_name, &decoder);
            let tokens = fixture.tokens("long");
            let ours = packed(
                &decoder,
                &[Sequence {
                    tokens: &tokens,
                    adapter: Some(&packed_adapter),
                }],
            )
            .remove(0);
            let expected = packed(&merged, &[base(&tokens)]).remove(0);
            table.add(
                name,
                adapter_name,
                max_difference(&logprobs(&ours, &tokens), &logprobs(&expected, &tokens)),
                CLOSE,
            );
        }
    }
    table.judge("adapter against weights it is merged into (log-probabilities)");
}

#[test]
fn a_peft_folder_comes_back_as_it_was() {
    for name in NAMES.into_iter().chain(FAMILIES) {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(Precision::F32);
        let params = fixture.adapter_params("all", &decoder);
        let folders = [
            tempfile::tempdir().expect("a folder"),
            tempfile::tempdir().expect("a folder"),
        ];
        let mut target_modules: Vec<String> = vec![];
        for part in params.shape.iter().flat_map(|(_, linear)| &linear.parts) {
            let name = part
                .path
                .rsplit('.')
                .next()
                .expect("a path has an end")
                .to_owned();
            if !target_modules.contains(&name) {
                target_modules.push(name);
            }
        }
        let lora = Lora {
            r: 4,
            alpha: 8.0,
            dropout: 0.0,
            target_modules,
            use_rslora: false,
            use_dora: false,
        };
        for folder in &folders {
            let config = PeftConfig {
                base_model: "fixture",
                lora: &lora,
            };
            peft::write(folder.path(), &params, &config).expect("it is written");
        }
        let back = peft::read(folders[0].path(), &decoder.spec, 4)
            .expect("what we write we read")
            .params;
        assert_eq!((&back.flat, &back.shape), (&params.flat, &params.shape), "{name}");
        // Tensor for tensor what peft wrote, under the same names.
        let sorted = |folder: &std::path::Path| {
            let mut tensors = tensors(&folder.join(peft::TENSORS));
            tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
            tensors
        };
        let (ours, pefts) = (sorted(folders[0].path()), sorted(&fixture.adapter_folder("all")));
        assert_eq!(ours.len(), pefts.len(), "{name}");
        for ((our_name, ours), (name, pefts)) in ours.iter().zip(&pefts) {
            assert_eq!((our_name, ours.kind(), ours), (name, Kind::Float, pefts));
        }
        let digests = [0, 1].map(|i| peft::digest(folders[i].path()).expect("a digest"));
        assert_eq!(digests[0], digests[1], "the same numbers make the same bytes");
    }
}
