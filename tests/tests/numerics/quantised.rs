//! Checkpoints in few bits (tests/numerics/make_quantised.py): their matrices against what the schemes' own packages read,
//! the decoder over them against one over the same numbers dense, on ranks, and in training; and what cannot be read.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tandem_backend::family::{Source, read_spec};
use tandem_backend::model::{Decoder, WeightOptions};
use tandem_backend::train::Trainer;
use tandem_backend::weights::{Checkpoint, Matrix, quantize};
use tandem_core::TokenId;
use tandem_core::dataset::Example;
use tandem_core::job::{LM_HEAD, Lora, Method};
use tandem_kernels::weight::{Precision, Recipe};
use tch::{Device, Kind, Tensor};

use crate::fixture::{Table, fixtures_folder, max_difference};
use crate::ranks::on_ranks;
use crate::run::{base, packed};
use crate::training::{Job, finish, hyper, tensors};

/// Rounding of the outsiders' own results: to float32, or to bfloat16, relative to the largest number.
const F32: f64 = 1e-6;
const BF16: f64 = 1.0 / 256.0;

/// Folder, how its linears are kept, and how its judge rounds.
const FOLDERS: [(&str, &str, f64); 16] = [
    ("awq", "int4 in groups of 32 with offsets", F32),
    ("bnb-fp4", "float32", F32),
    ("bnb-int8", "int8 by rows", F32),
    ("bnb-nf4", "nf4 in groups of 64", F32),
    ("bnb-nf4-double", "nf4 in groups of 64", F32),
    ("ct-fp8", "fp8 by rows", BF16),
    ("ct-int4", "int4 in groups of 32", BF16),
    ("ct-int4-asymmetric", "int4 in groups of 32 with offsets", BF16),
    ("ct-int8", "int8 by rows", BF16),
    ("fp8-blocks", "fp8 by rows", F32),
    ("fp8-rows", "fp8 by rows", F32),
    ("gptq", "int4 in groups of 32", F32),
    ("gptq-8", "int8 in groups of 32", F32),
    ("gptq-asymmetric", "int4 in groups of 32 with offsets", F32),
    ("gptq-desc-act", "float32", F32),
    ("gptq-v2", "int4 in groups of 32 with offsets", F32),
];

fn folder(name: &str) -> PathBuf {
    fixtures_folder().join("quantised").join(name)
}

fn tokens(seed: usize) -> Vec<TokenId> {
    (0..30)
        .map(|i| ((i * i * 7 + i * 3 + seed) % 64) as TokenId)
        .collect()
}

#[test]
fn matrices_are_what_their_packages_read() {
    let mut table = Table::default();
    for (name, _, rounding) in FOLDERS.into_iter().chain([("mxfp4", "", F32)]) {
        let checkpoint = Checkpoint::open(&folder(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(checkpoint.notes().is_empty(), "{name}: {:?}", checkpoint.notes());
        for (parameter, expected) in tensors(&folder(name).join("expected.safetensors")) {
            let size = expected.size();
            let matrix = checkpoint.matrix(&parameter, &size, 0..size[0], 0..size[1]);
            let ours = matrix.unwrap_or_else(|error| panic!("{name}: {error}")).dense();
            let largest = expected.abs().max().double_value(&[]);
            let short = parameter.trim_start_matches("model.layers.0.").to_owned();
            table.add(name, &short, max_difference(&ours, &expected) / largest, rounding);
        }
    }
    table.judge("quantised matrices against their packages, relative to the largest number");
}

/// The folder's numbers in float32, without its quantization_config.
fn dense_copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().expect("a folder");
    let text = std::fs::read(from.join("config.json")).expect("a config");
    let mut config: Value = serde_json::from_slice(&text).expect("JSON");
    config
        .as_object_mut()
        .expect("fields")
        .remove("quantization_config");
    std::fs::write(to.path().join("config.json"), config.to_string()).expect("it is written");
    let (spec, checkpoint) = (
        read_spec(to.path()).expect("a spec"),
        Checkpoint::open(from).expect("it opens"),
    );
    let mut numbers = vec![];
    for param in spec.params() {
        for Source { name, rows, .. } in &param.tensors {
            let shape = [&[*rows], &param.shape[1..]].concat();
            let columns = shape.get(1).copied().unwrap_or(1);
            let matrix = checkpoint
                .matrix(name, &shape, 0..*rows, 0..columns)
                .expect("it is read");
            numbers.push((name.clone(), matrix.dense().to_kind(Kind::Float).contiguous()));
        }
    }
    Tensor::write_safetensors(&numbers, to.path().join("model.safetensors")).expect("it is written");
    to
}

/// Kept in its bits or not, a decoder computes what one over the same numbers computes; on two ranks, too; and LoRA learns
/// the same on it.
#[test]
fn decoders_are_those_of_the_dense_numbers() {
    let mut table = Table::default();
    for (name, kept, _) in FOLDERS {
        let dense = dense_copy(&folder(name));
        let decoders = [&folder(name), dense.path()]
            .map(|folder| Decoder::load(folder, Precision::F32, Device::Cpu).expect("it loads"));
        let formats: Vec<String> = decoders[0]
            .formats()
            .iter()
            .map(|(format, _)| format.to_string())
            .collect();
        assert!(
            formats.contains(&kept.to_owned()),
            "{name} is kept in {formats:?}"
        );
        let logits = |decoder: &Decoder| packed(decoder, &[base(&tokens(1))]).remove(0);
        let [ours, expected] = decoders.each_ref().map(logits);
        table.add(name, "logits", max_difference(&ours, &expected), 1e-4);
        let spec = read_spec(&folder(name)).expect("a spec");
        for ranks in on_ranks(&folder(name), &spec, 2, |decoder| logits(&decoder)) {
            table.add(
                name,
                "logits of two ranks",
                max_difference(&ranks, &expected),
                1e-4,
            );
        }
        let [ours, expected] = decoders.each_ref().map(ten_steps);
        for (ours, expected) in ours.iter().zip(&expected) {
            table.add(name, "loss of LoRA", (ours - expected).abs(), 1e-4);
        }
        assert!(ours[9] < ours[0], "{name}: {ours:?}");
    }
    table.judge("decoders over quantised checkpoints against the same numbers dense, in float32");
}

fn ten_steps(decoder: &Decoder) -> Vec<f64> {
    let lora = Lora {
        r: 4,
        alpha: 8.0,
        dropout: 0.0,
        target_modules: [decoder.spec.lora_targets(), vec![LM_HEAD.to_owned()]].concat(),
        use_rslora: false,
        use_dora: false,
    };
    let example = |seed: usize| Example {
        tokens: tokens(seed % 2),
        weights: vec![1.0; tokens(0).len()],
    };
    let job = Job::new(
        &(0..20).map(example).collect::<Vec<_>>(),
        hyper(Method::Lora(lora)),
    );
    let mut trainer = Trainer::start(job.spec.clone(), decoder).expect("the job starts");
    finish(&mut trainer, Some(decoder))
        .iter()
        .map(|step| step.loss)
        .collect()
}

/// What is made at the start: near the numbers it was made of, the same on two ranks, and another format for linears only.
#[test]
fn recipes_are_near_the_numbers_and_the_same_on_ranks() {
    let mut table = Table::default();
    let dense = dense_copy(&folder("bnb-fp4"));
    let expected = Decoder::load(dense.path(), Precision::F32, Device::Cpu).expect("it loads");
    let logits = |decoder: &Decoder| packed(decoder, &[base(&tokens(1))]).remove(0);
    let expected = logits(&expected);
    for (recipe, near) in [(Recipe::Int8, 0.05), (Recipe::Int4, 0.6), (Recipe::Nf4, 0.6)] {
        let options = WeightOptions {
            recipe: Some(recipe),
            ..WeightOptions::new(Precision::F32, Device::Cpu)
        };
        let decoder = Decoder::open(dense.path(), options).expect("it loads");
        let formats: Vec<String> = decoder
            .formats()
            .iter()
            .map(|(format, _)| format.to_string())
            .collect();
        // Embedding and head stay; rows shorter than a group are one.
        let of_recipe = |format: &String| format.starts_with(recipe.name());
        assert!(formats.contains(&"float32".to_owned()), "{formats:?}");
        assert!(
            formats.len() > 1
                && formats
                    .iter()
                    .all(|format| format == "float32" || of_recipe(format)),
            "{formats:?}"
        );
        // Of the largest logit.
        let off = max_difference(&logits(&decoder), &expected) / expected.abs().max().double_value(&[]);
        table.add(recipe.name(), "against the numbers", off, near);
        assert!(off > 1e-5, "{recipe:?} does something");
        // The parts of ranks, cut from whole rows, are the same codes.
        for width in [32, 48] {
            let matrix = |numbers: Tensor| Matrix::Dense(numbers).quantise(recipe).expect("it is quantised");
            let numbers = Tensor::randn([8, 96], (Kind::Float, Device::Cpu));
            let part = matrix(numbers.shallow_clone()).columns(width..96).dense();
            assert!(
                part.equal(&matrix(numbers).dense().narrow(1, width, 96 - width)),
                "{recipe:?}"
            );
        }
    }
    table.judge("logits of weights quantised at the start, in float32");
}

/// A folder that is written in few bits is read as what the recipe makes; the scales of integers are those of the
/// checkpoint's own dtype, here float32.
#[test]
fn what_is_written_is_what_is_read() {
    let mut table = Table::default();
    let dense = dense_copy(&folder("bnb-int8"));
    for (recipe, kept) in [
        (Recipe::Int8, "int8 by rows"),
        (Recipe::Int4, "int4 in groups of 32"),
        (Recipe::Nf4, "nf4 in groups of 64"),
    ] {
        let to = tempfile::tempdir().expect("a folder");
        let made = quantize(dense.path(), to.path(), recipe.name()).expect("it is written");
        assert_eq!((made.quantised, made.dense.len()), (7, 0), "{recipe:?}");
        let again = quantize(dense.path(), to.path(), recipe.name())
            .err()
            .expect("it is there");
        assert!(again.to_string().contains("is not empty"), "{again}");
        let decoder = Decoder::load(to.path(), Precision::F32, Device::Cpu).expect("it loads");
        let formats: Vec<String> = decoder
            .formats()
            .iter()
            .map(|(format, _)| format.to_string())
            .collect();
        assert!(
            formats.contains(&kept.to_owned()),
            "{recipe:?} is kept in {formats:?}"
        );
        let (from, to) = (Checkpoint::open(dense.path()), Checkpoint::open(to.path()));
        let (from, to) = (from.expect("it opens"), to.expect("it opens"));
        for (parameter, n, k) in [("self_attn.k_proj", 32, 64), ("mlp.down_proj", 64, 128)] {
            let parameter = format!("model.layers.0.{parameter}.weight");
            let read = |checkpoint: &Checkpoint| {
                checkpoint
                    .matrix(&parameter, &[n, k], 0..n, 0..k)
                    .expect("it is read")
            };
            let expected = read(&from).quantise(recipe).expect("it is quantised").dense();
            table.add(
                recipe.name(),
                &parameter,
                max_difference(&read(&to).dense(), &expected),
                1e-6,
            );
        }
    }
    table.judge("folders written in few bits, read again");
}

/// The same model with an MLP of 112, which groups of 32 do not divide.
fn narrowed(from: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let config = std::fs::read(from.join("config.json")).expect("it is there");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    config["intermediate_size"] = 112.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("it is written");
    let cut = |(name, tensor): (String, Tensor)| {
        let tensor = match name.rsplit('.').nth(1) {
            Some("gate_proj" | "up_proj") => tensor.narrow(0, 0, 112),
            Some("down_proj") => tensor.narrow(1, 0, 112),
            _ => tensor,
        };
        (name, tensor.contiguous())
    };
    let tensors: Vec<(String, Tensor)> = tensors(&from.join("model.safetensors"))
        .into_iter()
        .map(cut)
        .collect();
    Tensor::write_safetensors(&tensors, folder.path().join("model.safetensors")).expect("it is written");
    folder
}

#[test]
fn a_last_group_may_be_shorter() {
    let dense = dense_copy(&folder("bnb-int8"));
    let dense = narrowed(dense.path());
    let to = tempfile::tempdir().expect("a folder");
    quantize(dense.path(), to.path(), "int4").expect("it is written");
    let parameter = "model.layers.0.mlp.down_proj.weight";
    let read = |folder: &Path| {
        let checkpoint = Checkpoint::open(folder).expect("it opens");
        checkpoint
            .matrix(parameter, &[64, 112], 0..64, 0..112)
            .expect("it is read")
    };
    let expected = read(dense.path())
        .quantise(Recipe::Int4)
        .expect("it is quantised")
        .dense();
    assert!(max_difference(&read(to.path()).dense(), &expected) <= 1e-6);
}

type Patch = fn(&mut Value);

/// The folder with another `quantization_config`.
fn patched(name: &str, patch: Patch) -> tempfile::TempDir {
    let to = tempfile::tempdir().expect("a folder");
    let text = std::fs::read(folder(name).join("config.json")).expect("a config");
    let mut config: Value = serde_json::from_slice(&text).expect("JSON");
    patch(&mut config["quantization_config"]);
    std::fs::write(to.path().join("config.json"), config.to_string()).expect("it is written");
    let weights = folder(name).join("model.safetensors");
    std::fs::copy(weights, to.path().join("model.safetensors")).expect("copied");
    to
}

#[test]
fn fields_that_nobody_reads_are_named_and_both_names_of_a_format_count() {
    let to = patched("gptq", |config| config["moon"] = json!(1));
    let checkpoint = Checkpoint::open(to.path()).expect("it opens");
    let note = "config.json: `quantization_config`: not known here and not honoured: `moon`";
    assert_eq!(checkpoint.notes(), [note]);
    // As transformers 5 spells what GPTQModel calls `checkpoint_format`.
    let to = patched("gptq-v2", |config| {
        let fields = config.as_object_mut().expect("an object");
        let version = fields.remove("checkpoint_format").expect("it is said");
        fields.insert("format".to_owned(), version);
    });
    let read = |folder: &Path| {
        let name = "model.layers.0.self_attn.q_proj.weight";
        let checkpoint = Checkpoint::open(folder).expect("it opens");
        let matrix = checkpoint.matrix(name, &[64, 64], 0..64, 0..64);
        matrix.expect("it is read").dense()
    };
    assert!(read(to.path()).equal(&read(&folder("gptq-v2"))));
}

/// Each wrong folder has a message that names what is wrong.
#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let cases: [(&str, Patch, &str); 8] = [
        (
            "gptq",
            |config| config["quant_method"] = json!("aqlm"),
            "quantised by aqlm are not read; gptq,",
        ),
        (
            "gptq",
            |config| config["checkpoint_format"] = json!("marlin"),
            "GPTQ's format marlin is not read",
        ),
        (
            "awq",
            |config| config["version"] = json!("gemv"),
            "`version` gemv is not read",
        ),
        ("awq", |config| config["bits"] = json!(3), "`bits` 3 are not read"),
        (
            "ct-int4",
            |config| config["format"] = json!("marlin-24"),
            "`format` marlin-24 is not read",
        ),
        (
            "ct-int8",
            |config| config["sparsity_config"] = json!({"format": "sparse-24-bitmask"}),
            "sparse weights",
        ),
        (
            "ct-int8",
            |config| config["transform_config"] = json!({"config_groups": {"a": {}}}),
            "transformed weights",
        ),
        ("gptq", |config| *config = json!("gptq"), "an object is needed"),
    ];
    for (name, patch, expected) in cases {
        let to = patched(name, patch);
        let loaded = Decoder::load(to.path(), Precision::F32, Device::Cpu);
        let message = loaded.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(
            message.contains(expected),
            "{name}: {message:?} instead of {expected:?}"
        );
    }
}
