//! Logits, losses and gradients against transformers and peft, float32.

use std::collections::BTreeMap;

use tandem_backend::lora::adapter::Adapter;
use tandem_backend::lora::params::AdapterParams;
use tandem_backend::model::Decoder;
use tandem_backend::model::full::{FullParams, FullShape};
use tandem_backend::train::objective::{self, Scores};
use tandem_backend::train::pass::{Advanced, Context, KEEP_BYTES, Pass, Trained};
use tandem_backend::train::slice;
use tandem_backend::weights::{Merge, merge};
use tandem_core::dataset::Example;
use tandem_kernels::weight::Precision;

use crate::fixture::{
    FAMILIES, Fixture, NAMES, Patch, Table, device, fixtures_folder, max_difference, relative_difference,
    trained_whole,
};
use crate::run::{Sequence, base, logprobs, packed};
use crate::training::tensors;

pub const LOGITS: f64 = 2e-5;
pub const LOSS: f64 = 1e-5;
pub const GRADIENT: f64 = 1e-4;

/// A model with its adapter in it says what peft says of the two; stacks of experts hold no matrix to merge into.
#[test]
fn merged_models_are_the_two_in_one() {
    let mut table = Table::default();
    let mut refused = vec![];
    for name in NAMES.into_iter().chain(FAMILIES) {
        let fixture = Fixture::open(name);
        for adapter_name in fixture.adapters() {
            let out = tempfile::tempdir().expect("a folder");
            match merge(&fixture.folder, &fixture.adapter_folder(adapter_name), out.path()) {
                Err(error) => refused.push(format!("{name}: {error}")),
                Ok(_) => {
                    let decoder = Decoder::load(out.path(), Precision::F32, device()).expect("it loads");
                    let logits = packed(&decoder, &[base(&fixture.tokens("long"))]).remove(0);
                    let what = format!("{adapter_name}.logits.long");
                    let difference = max_difference(&logits, fixture.tensor(&what));
                    // Sums are rounded to what the base is stored in: the eight bits of bfloat16.
                    let limit = if name == "bf16" { 0.2 } else { LOGITS };
                    table.add(name, &what, difference, limit);
                }
            }
        }
    }
    assert!(
        refused
            .iter()
            .all(|error| error.contains("inside another tensor")),
        "{refused:?}"
    );
    table.judge("merged models against peft");
}

/// Merged into a GGUF file, a model has the same numbers as merged into a folder, to the bit but for Gemma's norms, to which
/// one is added. What the format cannot say is refused.
#[test]
fn a_merged_gguf_is_the_merged_folder() {
    let mut table = Table::default();
    let (mut written, mut refused) = (vec![], vec![]);
    for name in NAMES.into_iter().chain(FAMILIES) {
        let fixture = Fixture::open(name);
        let Some(adapter_name) = fixture.adapters().into_iter().next() else {
            continue;
        };
        let adapter = fixture.adapter_folder(adapter_name);
        let model = tempfile::tempdir().expect("a folder");
        for file in fixture.folder.read_dir().expect("a folder").flatten() {
            if file.path().is_file() {
                std::fs::copy(file.path(), model.path().join(file.file_name())).expect("it is copied");
            }
        }
        // Where there is one, the configuration that a GGUF can say.
        let said = fixtures_folder().join(format!("gguf/{name}.json"));
        if said.exists() {
            std::fs::copy(said, model.path().join("config.json")).expect("it is copied");
        }
        // Of Llama 3's rope it has the factors alone, which are known for that model's own context.
        let config = model.path().join("config.json");
        let text = std::fs::read_to_string(&config).expect("a configuration");
        let own = "\"original_max_position_embeddings\": ";
        let text = text.replace(&format!("{own}32"), &format!("{own}8192"));
        std::fs::write(&config, text).expect("it is written");
        let Ok(mut merged) = Merge::open(model.path(), &adapter) else {
            continue;
        };
        let out = tempfile::tempdir().expect("a folder");
        let file = match merged.gguf("merged", vec![]) {
            Ok(file) => file,
            Err(error) => {
                refused.push(format!("{name}: {error}"));
                continue;
            }
        };
        merged.write(&[file], out.path()).expect("it is written");
        let folder = out.path().join("folder");
        merge(model.path(), &adapter, &folder).expect("it is merged");
        let logits = [out.path().join("merged.gguf"), folder].map(|model| {
            let decoder = Decoder::load(&model, Precision::F32, device()).expect("it loads");
            packed(&decoder, &[base(&fixture.tokens("long"))]).remove(0)
        });
        let limit = if name.starts_with("gemma") { 1e-5 } else { 0.0 };
        table.add(name, "logits.long", max_difference(&logits[0], &logits[1]), limit);
        written.push(name);
    }
    table.judge("merged GGUF files against merged folders");
    for name in [
        "gqa_tied",
        "llama3_rope",
        "head_dim",
        "sharded",
        "bf16",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "phi3",
    ] {
        assert!(written.contains(&name), "{name} is not written: {refused:#?}");
    }
    assert!(
        refused
            .iter()
            .all(|error| error.contains("no GGUF is written of this model: ")),
        "{refused:#?}"
    );
}

#[test]
fn logits_and_losses_are_transformers_and_pefts() {
    let mut table = Table::default();
    for name in NAMES.into_iter().chain(FAMILIES) {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(Precision::F32);
        for prompt in ["short", "long"] {
            let logits = packed(&decoder, &[base(&fixture.tokens(prompt))]).remove(0);
            let what = format!("logits.{prompt}");
            table.add(
                name,
                &what,
                max_difference(&logits, fixture.tensor(&what)),
                LOGITS,
            );
        }
        table.add(
            name,
            "loss",
            loss_difference(&fixture, &decoder, None, "loss"),
            LOSS,
        );
        for adapter_name in fixture.adapters() {
            let adapter = fixture.adapter(adapter_name, &decoder);
            let tokens = fixture.tokens("long");
            let logits = packed(
                &decoder,
                &[Sequence {
                    tokens: &tokens,
                    adapter: Some(&adapter),
                }],
            )
            .remove(0);
            let what = format!("{adapter_name}.logits.long");
            table.add(
                name,
                &what,
                max_difference(&logits, fixture.tensor(&what)),
                LOGITS,
            );
            let what = format!("{adapter_name}.loss");
            table.add(
                name,
                &what,
                loss_difference(&fixture, &decoder, Some(&adapter), &what),
                LOSS,
            );
        }
    }
    table.judge("float32 logits and losses against transformers and peft (max abs difference)");
}

/// As it is published: experts in four bits.
#[test]
fn gpt_oss_in_mxfp4_is_transformers() {
    let fixture = Fixture::open("gpt_oss_mxfp4");
    let decoder = fixture.decoder(Precision::F32);
    let logits = packed(&decoder, &[base(&fixture.tokens("long"))]).remove(0);
    let mut table = Table::default();
    let difference = max_difference(&logits, fixture.tensor("logits.long"));
    table.add("gpt_oss_mxfp4", "logits.long", difference, LOGITS);
    table.judge("experts in MXFP4 against transformers (max abs difference)");
}

/// The text part of a model that sees: it alone is taken, its adapters are read, and the start says so.
#[test]
fn a_text_part_is_transformers() {
    let fixture = Fixture::open("wrapped");
    let decoder = fixture.decoder(Precision::F32);
    assert!(
        decoder.spec.notes[0].contains("text part alone"),
        "{:?}",
        decoder.spec.notes
    );
    let (tokens, adapter) = (fixture.tokens("long"), fixture.adapter("all", &decoder));
    let mut table = Table::default();
    for (adapter, what) in [(None, "logits.long"), (Some(&adapter), "all.logits.long")] {
        let sequence = Sequence {
            tokens: &tokens,
            adapter,
        };
        let logits = packed(&decoder, &[sequence]).remove(0);
        table.add(
            "wrapped",
            what,
            max_difference(&logits, fixture.tensor(what)),
            LOGITS,
        );
    }
    table.judge("a text part against transformers and peft (max abs difference)");
}

/// Folders that a user changed, as transformers and peft take them.
#[test]
fn patched_folders_are_transformers_and_pefts() {
    let patches = fixtures_folder().join("patches.json");
    let patches: BTreeMap<String, Patch> =
        serde_json::from_slice(&std::fs::read(patches).expect("it is committed")).expect("patches");
    let expected = tensors(&fixtures_folder().join("patches.safetensors"));
    let mut table = Table::default();
    for (name, patch) in &patches {
        let (_, expected) = expected
            .iter()
            .find(|(other, _)| other == name)
            .expect("its logits");
        let fixture = patch.apply();
        let decoder = fixture.decoder(Precision::F32);
        let adapter = (patch.file != "config.json").then(|| fixture.adapter("all", &decoder));
        let tokens = fixture.tokens("long");
        let sequence = Sequence {
            tokens: &tokens,
            adapter: adapter.as_ref(),
        };
        let logits = packed(&decoder, &[sequence]).remove(0);
        table.add(
            &patch.fixture,
            name,
            max_difference(&logits.get(-1), expected),
            LOGITS,
        );
        let plain = match adapter {
            None => fixture.tensor("logits.long"),
            Some(_) => fixture.tensor("all.logits.long"),
        };
        let difference = max_difference(&plain.get(-1), expected);
        assert_eq!(difference > 1e-2, patch.changes, "{name}: {difference}");
    }
    table.judge("patched folders against transformers and peft (max abs difference)");
}

/// The loss of the serving forward over the fixture's weighted examples.
fn loss_difference(fixture: &Fixture, decoder: &Decoder, adapter: Option<&Adapter>, expected: &str) -> f64 {
    let examples = fixture.examples();
    let sequences: Vec<Sequence> = examples
        .iter()
        .map(|e| Sequence {
            tokens: &e.tokens,
            adapter,
        })
        .collect();
    let (mut sum, mut total) = (0.0, 0.0);
    for (Example { tokens, weights }, logits) in examples.iter().zip(packed(decoder, &sequences)) {
        for (logprob, &weight) in Vec::<f64>::try_from(logprobs(&logits, tokens))
            .expect("doubles")
            .iter()
            .zip(&weights[1..])
        {
            sum -= logprob * f64::from(weight);
            total += f64::from(weight);
        }
    }
    (sum / total - fixture.numbers[expected].as_f64().expect("a loss")).abs()
}

#[test]
fn gradients_of_a_and_b_are_pefts() {
    let mut table = Table::default();
    for name in NAMES.into_iter().chain(FAMILIES) {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(Precision::F32);
        for adapter_name in fixture.adapters() {
            let params = fixture.adapter_params(adapter_name, &decoder);
            let adapter = fixture.adapter(adapter_name, &decoder);
            let [grads, again] = [(), ()].map(|()| AdapterParams::zeros(params.shape.clone()));
            let trained = |gradient| Trained::Adapter {
                adapter: &adapter,
                gradient,
            };
            let loss = backward(&decoder, trained(&grads), &fixture.examples(), KEEP_BYTES);
            // Layers that run again give the same bits.
            backward(&decoder, trained(&again), &fixture.examples(), 0);
            assert!(again.flat.equal(&grads.flat), "{name}, {adapter_name}");
            let expected = fixture.numbers[format!("{adapter_name}.loss")]
                .as_f64()
                .expect("a loss");
            table.add(
                name,
                &format!("{adapter_name}.training loss"),
                (loss - expected).abs(),
                LOSS,
            );
            let (mut worst_a, mut worst_b) = (0.0_f64, 0.0_f64);
            for (_, linear) in grads.shape.iter() {
                for part in &linear.parts {
                    let expected = |which| {
                        fixture.tensor(&format!(
                            "{adapter_name}.grad.base_model.model.{}.{which}.weight",
                            part.path
                        ))
                    };
                    worst_a = worst_a.max(relative_difference(
                        &grads.part_a(linear, part),
                        expected("lora_A"),
                    ));
                    worst_b = worst_b.max(relative_difference(&grads.b(part), expected("lora_B")));
                }
            }
            table.add(name, &format!("{adapter_name}.gradients of A"), worst_a, GRADIENT);
            table.add(name, &format!("{adapter_name}.gradients of B"), worst_b, GRADIENT);
        }
    }
    table.judge("gradients against peft (relative to the largest of each tensor)");
}

#[test]
fn gradients_of_every_parameter_are_torchs() {
    let mut table = Table::default();
    for name in ["gqa_tied"].into_iter().chain(trained_whole()) {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(Precision::F32);
        let grads = FullParams::zeros(FullShape::new(&decoder.spec));
        let trained = Trained::Model { gradient: &grads };
        let loss = backward(&decoder, trained, &fixture.examples(), KEEP_BYTES);
        let expected = fixture.numbers["loss"].as_f64().expect("a loss");
        table.add(name, "loss", (loss - expected).abs(), LOSS);
        for (tensor, gradient) in grads.named() {
            let difference = relative_difference(&gradient, fixture.tensor(&format!("full.grad.{tensor}")));
            table.add(name, tensor.trim_start_matches("model."), difference, GRADIENT);
        }
    }
    table.judge("full gradients against torch autograd (relative to the largest of each tensor)");
}

/// The trainer's own passes over `examples` as one optimizer step: its mean loss; gradients are added.
pub fn backward(decoder: &Decoder, trained: Trained, examples: &[Example], keep_bytes: i64) -> f64 {
    let _no_grad = tch::no_grad_guard();
    let context = Context {
        decoder,
        learns: &[trained.into()],
        keep_bytes,
    };
    let mut slices = slice::slices(examples.iter(), decoder.device());
    objective::to_mean(&mut slices);
    let (mut scores, mut rows) = (Scores::default(), 0);
    for slice in slices {
        let rows_before = rows;
        rows += slice.tokens.len() as u64;
        let mut pass = Pass::enter(&[(&slice, rows_before)], &context);
        loop {
            pass = match pass.advance(&context) {
                Advanced::On(pass) => pass,
                Advanced::Through(found) => {
                    scores.add(&slice.labels, &found[0]);
                    break;
                }
                Advanced::Scored(_) => unreachable!("its weights are known"),
            };
        }
    }
    scores.loss()
}
