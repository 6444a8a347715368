//! A golden fixture: a tiny checkpoint and what transformers and peft computed from it. And the table of differences.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tandem_backend::lora::adapter::Adapter;
use tandem_backend::lora::params::AdapterParams;
use tandem_backend::lora::peft;
use tandem_backend::model::Decoder;
use tandem_core::TokenId;
use tandem_core::dataset::Example;
use tandem_kernels::weight::Precision;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

pub const NAMES: [&str; 7] = [
    "gqa_tied",
    "llama3_rope",
    "biases",
    "head_dim",
    "linear_rope",
    "sharded",
    "bf16",
];

/// Of tests/numerics/families.py: each family, and each kind of rope that Llama's fixtures lack.
pub const FAMILIES: [&str; 22] = [
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "longrope",
    "olmo2",
    "olmo3",
    "granite",
    "glm",
    "glm4",
    "cohere2",
    "starcoder2",
    "smollm3",
    "yarn",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
];

/// The families of which every parameter can be trained: not where all experts stand in one tensor.
pub fn trained_whole() -> impl Iterator<Item = &'static str> {
    FAMILIES.into_iter().filter(|name| *name != "gpt_oss")
}

pub struct Fixture {
    pub name: &'static str,
    pub folder: PathBuf,
    pub numbers: Value,
    tensors: HashMap<String, Tensor>,
    /// Where it was copied to.
    _place: Option<TempDir>,
}

/// Some fields of one file of a fixture, changed.
#[derive(Deserialize)]
pub struct Patch {
    pub fixture: String,
    pub file: String,
    /// Null: left out; "null": null.
    patch: Map<String, Value>,
    /// Whether it changes answers.
    pub changes: bool,
}

impl Patch {
    pub fn apply(&self) -> Fixture {
        let name = NAMES
            .into_iter()
            .chain(FAMILIES)
            .find(|name| *name == self.fixture)
            .expect("a fixture");
        let place = tempfile::tempdir().expect("a folder");
        let fixture = Fixture::open(name);
        copy(&fixture.folder, place.path());
        let file = place.path().join(&self.file);
        let text = std::fs::read(&file).expect("a file of the fixture");
        let mut fields: Map<String, Value> = serde_json::from_slice(&text).expect("JSON");
        for (field, value) in &self.patch {
            match value {
                Value::Null => fields.remove(field),
                Value::String(word) if word == "null" => fields.insert(field.clone(), Value::Null),
                value => fields.insert(field.clone(), value.clone()),
            };
        }
        std::fs::write(&file, Value::Object(fields).to_string()).expect("it is written");
        Fixture {
            folder: place.path().to_owned(),
            _place: Some(place),
            ..fixture
        }
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => {
                std::fs::create_dir(&target).expect("it is made");
                copy(&entry.path(), &target);
            }
            false => drop(std::fs::copy(entry.path(), &target).expect("it is copied")),
        }
    }
}

/// Where the product computes: TANDEM_TEST_DEVICE (scripts/gpu-check), else the CPU.
pub fn device() -> Device {
    let word = std::env::var("TANDEM_TEST_DEVICE");
    tandem_backend::words::device(word.as_deref().unwrap_or("cpu")).expect("TANDEM_TEST_DEVICE is a device")
}

/// TANDEM_TEST_FIXTURES: where they are on a machine this was not built on (scripts/gpu-prove).
pub fn fixtures_folder() -> PathBuf {
    match std::env::var_os("TANDEM_TEST_FIXTURES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("numerics/fixtures"),
    }
}

impl Fixture {
    pub fn open(name: &'static str) -> Fixture {
        let folder = fixtures_folder().join(name);
        let numbers = std::fs::read(folder.join("expected.json")).expect("the fixture is committed");
        let tensors =
            Tensor::read_safetensors(folder.join("expected.safetensors")).expect("the fixture is committed");
        Fixture {
            name,
            numbers: serde_json::from_slice(&numbers).expect("the fixture is JSON"),
            tensors: tensors.into_iter().collect(),
            folder,
            _place: None,
        }
    }

    pub fn decoder(&self, precision: Precision) -> Decoder {
        Decoder::load(&self.folder, precision, device()).expect("the fixture loads")
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }

    pub fn tokens(&self, prompt: &str) -> Vec<TokenId> {
        self.numbers["prompts"][prompt]
            .as_array()
            .expect("a prompt")
            .iter()
            .map(token)
            .collect()
    }

    pub fn examples(&self) -> Vec<Example> {
        examples(&self.numbers["examples"])
    }

    /// Names of the PEFT adapters the fixture has.
    pub fn adapters(&self) -> Vec<&'static str> {
        ["all", "some"]
            .into_iter()
            .filter(|name| self.adapter_folder(name).exists())
            .collect()
    }

    pub fn adapter_folder(&self, name: &str) -> PathBuf {
        self.folder.join(format!("adapter-{name}"))
    }

    pub fn adapter_params(&self, name: &str, decoder: &Decoder) -> AdapterParams {
        let read = peft::read(&self.adapter_folder(name), &decoder.spec, 64);
        read.expect("peft's adapter is read").params
    }

    pub fn adapter(&self, name: &str, decoder: &Decoder) -> Adapter {
        let params = self.adapter_params(name, decoder);
        Adapter::new(&params, decoder.layout(), decoder.precision(), decoder.device())
            .expect("an adapter that was read packs")
    }
}

pub fn examples(value: &Value) -> Vec<Example> {
    let example = |example: &Value| Example {
        tokens: example["tokens"]
            .as_array()
            .expect("tokens")
            .iter()
            .map(token)
            .collect(),
        weights: numbers(&example["weights"])
            .into_iter()
            .map(|weight| weight as f32)
            .collect(),
    };
    value.as_array().expect("examples").iter().map(example).collect()
}

pub fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .expect("a list")
        .iter()
        .map(|number| number.as_f64().expect("a number"))
        .collect()
}

pub fn token(value: &Value) -> TokenId {
    value
        .as_u64()
        .and_then(|id| TokenId::try_from(id).ok())
        .expect("a token id")
}

/// Largest absolute difference; infinite when a shape differs or a number is not finite.
pub fn max_difference(ours: &Tensor, expected: &Tensor) -> f64 {
    if ours.size() != expected.size() {
        return f64::INFINITY;
    }
    let difference = (ours.to_kind(Kind::Double) - expected.to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[]);
    if difference.is_finite() {
        difference
    } else {
        f64::INFINITY
    }
}

/// [`max_difference`] relative to the largest expected number.
pub fn relative_difference(ours: &Tensor, expected: &Tensor) -> f64 {
    max_difference(ours, expected) / expected.abs().max().double_value(&[])
}

/// Differences and their limits: printed whole, then judged, so that one failure does not hide the others.
#[derive(Default)]
pub struct Table {
    rows: Vec<(String, String, f64, f64)>,
}

impl Table {
    pub fn add(&mut self, fixture: &str, what: &str, difference: f64, limit: f64) {
        self.rows
            .push((fixture.to_owned(), what.to_owned(), difference, limit));
    }

    /// With limits so many times as far.
    pub fn loosened(mut self, times: f64) -> Table {
        self.rows.iter_mut().for_each(|(.., limit)| *limit *= times);
        self
    }

    pub fn judge(self, title: &str) {
        let mut text = format!("\n{title}\n");
        for (fixture, what, difference, limit) in &self.rows {
            let mark = if difference <= limit { "" } else { "  <-- too far" };
            text += &format!("  {fixture:12} {what:26} {difference:9.2e}  limit {limit:.0e}{mark}\n");
        }
        println!("{text}");
        assert!(
            !self.rows.is_empty()
                && self
                    .rows
                    .iter()
                    .all(|(_, _, difference, limit)| difference <= limit),
            "{text}"
        );
    }
}
