//! Adapters of the output layer and of the embedding, tied to each other and not: against peft's, which made
//! tests/numerics/fixtures/head.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tandem_backend::lora::params::AdapterParams;
use tandem_backend::lora::peft;
use tandem_backend::model::Decoder;
use tandem_backend::train::Trainer;
use tandem_backend::train::pass::{KEEP_BYTES, Trained};
use tandem_backend::weights::{Merge, merge};
use tandem_core::dataset::Example;
use tandem_core::job::{Hyper, LM_HEAD, Lora, Method, files};
use tandem_kernels::weight::Precision;
use tch::Tensor;

use crate::fixture::{
    Fixture, Table, device, examples, fixtures_folder, max_difference, relative_difference,
};
use crate::golden::{GRADIENT, LOGITS, LOSS, backward};
use crate::run::{Sequence, base, packed, paged};
use crate::training::{ADAPTER, Job, compare_steps, finish, hyper, lora_job, quantum, tensors};

/// Each with the fixture that it is beside.
const CASES: [(&str, &str); 10] = [
    ("gqa_tied", "gqa_tied"),
    ("head_dim", "head_dim"),
    ("sharded", "sharded"),
    ("gemma2", "gemma2"),
    ("granite", "granite"),
    ("embed_tied", "gqa_tied"),
    ("embed_untied", "head_dim"),
    ("embed_scaled", "gemma2"),
    ("embed_multiplied", "granite"),
    ("both", "gqa_tied"),
];

/// What peft computed: numbers by fixture, and tensors.
fn expected() -> (Value, HashMap<String, Tensor>) {
    let folder = fixtures_folder().join("head");
    let numbers = fs::read(folder.join("expected.json")).expect("it is committed");
    let tensors = tensors(&folder.join("expected.safetensors"));
    (
        serde_json::from_slice(&numbers).expect("JSON"),
        tensors.into_iter().collect(),
    )
}

/// Alone and beside others, whole and in pages, and merged into the base, whose head is its own then.
#[test]
fn adapted_tables_answer_as_in_peft() {
    let (_, expected) = expected();
    let mut table = Table::default();
    for (name, fixture) in CASES {
        let fixture = Fixture::open(fixture);
        let folder = fixtures_folder().join("head").join(name);
        let decoder = fixture.decoder(Precision::F32);
        let read = peft::read(&folder, &decoder.spec, 64).expect("peft's adapter is read");
        assert!(
            read.notes.len() == 1 && read.notes[0].contains("a copy of the base model's"),
            "{:?}",
            read.notes
        );
        let adapter = decoder.fit().pack(&read.params).expect("it packs");
        let plain = fixture.adapter("all", &decoder);
        let tokens = fixture.tokens("long");
        let by = |adapter| Sequence {
            tokens: &tokens,
            adapter: Some(adapter),
        };
        let alone = packed(&decoder, &[by(&plain), base(&tokens)]);
        let mixed = packed(&decoder, &[by(&plain), by(&adapter), base(&tokens)]);
        let pages = paged(&decoder, &[base(&tokens), by(&adapter)], 7).remove(1);
        assert_eq!(
            (&mixed[0], &mixed[2]),
            (&alone[0], &alone[1]),
            "{name}: others pay nothing"
        );

        let place = tempfile::tempdir().expect("a folder");
        let merged = place.path().join("merged");
        merge(&fixture.folder, &folder, &merged).expect("it is merged");
        let merged = Decoder::load(&merged, Precision::F32, device()).expect("it loads");
        let merged = packed(&merged, &[base(&tokens)]).remove(0);
        let expected = &expected[&format!("{name}.logits.long")];
        for (what, logits) in [("packed", &mixed[1]), ("paged", &pages), ("merged", &merged)] {
            table.add(name, what, max_difference(logits, expected), LOGITS);
        }
    }
    table.judge("logits of adapted heads against peft");
}

/// As safetensors' `save_model` writes a tied table: under the head's name, and the other one is said beside it.
fn saved_with_an_alias(fixture: &Fixture, to: &Path) {
    const EMBED: &str = "model.embed_tokens.weight";
    fs::create_dir(to).expect("it is made");
    fs::copy(fixture.folder.join("config.json"), to.join("config.json")).expect("it is copied");
    let bytes = fs::read(fixture.folder.join("model.safetensors")).expect("it is there");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let mut head: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
    head[LM_HEAD.to_owned() + ".weight"] = head[EMBED].take();
    head.as_object_mut().expect("a dictionary").remove(EMBED);
    head["__metadata__"] = serde_json::json!({"format": "pt", EMBED: "lm_head.weight"});
    let mut head = head.to_string().into_bytes();
    head.resize(head.len().next_multiple_of(8), b' ');
    let file = [
        &(head.len() as u64).to_le_bytes(),
        head.as_slice(),
        &bytes[8 + length..],
    ]
    .concat();
    fs::write(to.join("model.safetensors"), file).expect("it is written");
}

/// One file or several, and a tied table under either name, or both for one: the merged model has both, and says so. As a GGUF
/// file, too.
#[test]
fn a_tied_head_is_its_own_when_it_is_merged() {
    for (name, base_name, has_alias) in [
        ("gqa_tied", "model.embed_tokens.weight", false),
        ("bf16", "lm_head.weight", false),
        ("gqa_tied", "lm_head.weight", true),
    ] {
        let fixture = Fixture::open(name);
        let decoder = fixture.decoder(Precision::F32);
        let lora = head_only(4, 0.0);
        let shape = tandem_backend::lora::params::AdapterShape::new(&decoder.spec, &lora);
        let params = AdapterParams::init(shape, 3);
        for (_, linear) in params.shape.iter() {
            for part in &linear.parts {
                let _ = params.b(part).fill_(0.125);
            }
        }
        let place = tempfile::tempdir().expect("a folder");
        let [adapter, merged, aliased] = ["adapter", "merged", "aliased"].map(|name| place.path().join(name));
        let base_folder = match has_alias {
            true => &aliased,
            false => &fixture.folder,
        };
        if has_alias {
            saved_with_an_alias(&fixture, &aliased);
        }
        fs::create_dir(&adapter).expect("it is made");
        let config = peft::PeftConfig {
            base_model: name,
            lora: &lora,
        };
        peft::write(&adapter, &params, &config).expect("it is written");
        merge(base_folder, &adapter, &merged).expect("it is merged");
        let config: Value =
            serde_json::from_slice(&fs::read(merged.join("config.json")).expect("it is there"))
                .expect("JSON");
        assert_eq!(config["tie_word_embeddings"], false);
        let stored: HashMap<String, Tensor> =
            tensors(&merged.join("model.safetensors")).into_iter().collect();
        let before: HashMap<String, Tensor> = tensors(&base_folder.join("model.safetensors"))
            .into_iter()
            .collect();
        assert_eq!(stored.len(), before.len() + 1);
        assert_eq!(stored["model.embed_tokens.weight"], before[base_name], "{name}");
        assert!(max_difference(&stored["lm_head.weight"], &before[base_name]) > 0.01);
        let mut as_gguf = Merge::open(base_folder, &adapter).expect("it opens");
        let file = as_gguf.gguf("merged", vec![]).expect("it is planned");
        as_gguf.write(&[file], place.path()).expect("it is written");
        let tokens = fixture.tokens("long");
        let logits = [place.path().join("merged.gguf"), merged].map(|model| {
            let decoder = Decoder::load(&model, Precision::F32, device()).expect("it loads");
            packed(&decoder, &[base(&tokens)]).remove(0)
        });
        assert_eq!(logits[0], logits[1], "{name}");
    }
}

#[test]
fn gradients_of_adapted_tables_are_pefts() {
    let (numbers, expected) = expected();
    let mut table = Table::default();
    for (name, fixture) in CASES {
        let fixture = Fixture::open(fixture);
        let decoder = fixture.decoder(Precision::F32);
        let folder = fixtures_folder().join("head").join(name);
        let params = peft::read(&folder, &decoder.spec, 64).expect("it is read").params;
        let adapter = decoder.fit().pack(&params).expect("it packs");
        let gradient = AdapterParams::zeros(params.shape.clone());
        let trained = Trained::Adapter {
            adapter: &adapter,
            gradient: &gradient,
        };
        let loss = backward(&decoder, trained, &fixture.examples(), KEEP_BYTES);
        let wanted = numbers[name]["loss"].as_f64().expect("a loss");
        table.add(name, "training loss", (loss - wanted).abs(), LOSS);
        for (_, linear) in gradient.shape.iter() {
            for part in &linear.parts {
                for (which, ours) in [("A", gradient.part_a(linear, part)), ("B", gradient.b(part))] {
                    let tensor = match linear.is_embedding() {
                        true => format!("lora_embedding_{which}"),
                        false => format!("lora_{which}.weight"),
                    };
                    let wanted = &expected[&format!("{name}.grad.base_model.model.{}.{tensor}", part.path)];
                    let what = format!("{} {which}", part.path.trim_start_matches("model.layers."));
                    table.add(name, &what, relative_difference(&ours, wanted), GRADIENT);
                }
            }
        }
    }
    table.judge("gradients of adapted heads against peft (relative to the largest of each tensor)");
}

#[test]
fn ten_steps_of_adapted_tables_are_pefts() {
    let (numbers, expected) = expected();
    let decoder = Fixture::open("gqa_tied").decoder(Precision::F32);
    for (name, b) in [
        ("gqa_tied", "lm_head.lora_B"),
        ("embed_tied", "embed_tokens.lora_embedding_B"),
    ] {
        let run = &numbers[name]["training"];
        let job = lora_job(run);
        let mut trainer = Trainer::start(job.spec.clone(), &decoder).expect("the job starts");
        let reports = finish(&mut trainer, Some(&decoder));
        let mut table = compare_steps(name, run, &job, &reports);
        let trained = tensors(&job.spec.folder.join(files::ADAPTER).join(peft::TENSORS));
        assert!(trained.iter().any(|(name, _)| name.contains(b)));
        for (of, ours) in trained {
            let wanted = &expected[&format!("{name}.final.{of}")];
            table.add(&of, "", max_difference(&ours, wanted), ADAPTER);
        }
        table.judge(&format!(
            "ten steps of an adapter of a table and layers against peft: {name}"
        ));
    }
}

/// Cut anywhere, with dropout before the head.
#[test]
fn a_job_of_the_head_goes_on_to_the_same_bytes() {
    let fixture = Fixture::open("gqa_tied");
    let decoder = fixture.decoder(Precision::Bf16);
    let rows: Vec<Example> = examples(&fixture.numbers["lora_training"]["examples"]);
    let job = || {
        let hyper = Hyper {
            save_steps: 1,
            n_epochs: 2.0,
            ..hyper(Method::Lora(head_only(3, 0.3)))
        };
        Job::new(&rows, hyper)
    };
    let adapter =
        |job: &Job| fs::read(job.spec.folder.join(files::ADAPTER).join(peft::TENSORS)).expect("it is there");
    let whole = job();
    let mut trainer = Trainer::start(whole.spec.clone(), &decoder).expect("it starts");
    let steps = finish(&mut trainer, Some(&decoder)).len() as u64;
    let cut = job();
    for stop in 1..steps {
        let mut trainer = Trainer::start(cut.spec.clone(), &decoder).expect("it starts");
        while trainer.step() < stop {
            quantum(&mut trainer, Some(&decoder));
        }
        // Some of the next step is lost.
        (0..stop).for_each(|_| drop(quantum(&mut trainer, Some(&decoder))));
    }
    let mut trainer = Trainer::start(cut.spec.clone(), &decoder).expect("it starts");
    finish(&mut trainer, Some(&decoder));
    assert!(adapter(&whole) == adapter(&cut));
}

fn head_only(r: u32, dropout: f64) -> Lora {
    Lora {
        r,
        alpha: 8.0,
        dropout,
        target_modules: vec![LM_HEAD.to_owned()],
        use_rslora: false,
        use_dora: false,
    }
}
