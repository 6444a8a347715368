//! PEFT folders: adapter_config.json, adapter_model.safetensors, README.md. Reading refuses by name what is not
//! supported; nothing is ignored silently. Source: peft 0.19 config.py, tuners/lora/config.py, utils/save_and_load.py.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use tandem_core::id::{AdapterDigest, AdapterHasher};
use tandem_core::job::Lora;
use tch::{Kind, Tensor};

use super::params::{AdapterParams, AdapterShape};
use crate::family::DecoderSpec;
use crate::weights::kind;

pub const CONFIG: &str = "adapter_config.json";
pub const TENSORS: &str = "adapter_model.safetensors";
/// What PEFT puts before a module's path in the base model.
const PREFIX: &str = "base_model.model.";

#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    #[error("cannot read {file} of the adapter: {error}")]
    Read {
        file: &'static str,
        error: std::io::Error,
    },
    #[error("cannot write {file} of the adapter: {error}")]
    Write {
        file: &'static str,
        error: std::io::Error,
    },
    #[error("adapter_config.json: {0}")]
    Config(String),
    #[error("adapter_model.safetensors: {0}")]
    Tensors(String),
}

/// What goes into adapter_config.json beside the shape.
pub struct PeftConfig<'a> {
    pub base_model: &'a str,
    pub lora: &'a Lora,
}

/// Reads and checks a PEFT folder against the base it is to serve.
pub fn read(folder: &Path, spec: &DecoderSpec, max_rank: u32) -> Result<AdapterParams, PeftError> {
    let config = Config::read(folder)?;
    let bytes =
        std::fs::read(folder.join(TENSORS)).map_err(|error| PeftError::Read { file: TENSORS, error })?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| {
        PeftError::Tensors(format!(
            "not a whole safetensors file ({} bytes): {error}",
            bytes.len()
        ))
    })?;
    let mut unread: BTreeSet<String> = tensors.names().into_iter().map(str::to_owned).collect();

    // The file says which modules are adapted; the config says with what rank and scale.
    let mut fault = None;
    let mut targets_seen = BTreeSet::new();
    let shape = AdapterShape::build(spec, |path, name| {
        let names = [a_name(path), b_name(path)];
        let present = names.each_ref().map(|name| unread.remove(name));
        match present {
            [false, false] => return None,
            [true, true] => {}
            _ => {
                let (there, missing) = if present[0] {
                    ("lora_A", "lora_B")
                } else {
                    ("lora_B", "lora_A")
                };
                fault.get_or_insert(PeftError::Tensors(format!("{path} has {there} but no {missing}")));
                return None;
            }
        }
        targets_seen.insert(name.to_owned());
        let rank = config.rank(path);
        if rank > i64::from(max_rank) {
            let message = format!("rank {rank} of {path} is above the server's --max-lora-rank {max_rank}");
            fault.get_or_insert(PeftError::Config(message));
        }
        Some((rank, config.scale(path)))
    });
    if let Some(fault) = fault {
        return Err(fault);
    }
    if let Some(name) = unread.first() {
        let targets = spec.lora_targets().join(", ");
        return Err(PeftError::Tensors(format!(
            "tensor `{name}` is not supported or not of this base model ({} layers; supported modules: {targets})",
            spec.attentions().count()
        )));
    }
    if shape.is_empty() {
        return Err(PeftError::Tensors("holds no LoRA tensor".to_owned()));
    }
    config.check_targets(&targets_seen, &spec.lora_targets())?;

    let params = AdapterParams::zeros(shape);
    for (_, linear) in params.shape.iter() {
        for part in &linear.parts {
            copy(&tensors, &a_name(&part.path), &mut params.part_a(linear, part))?;
            copy(&tensors, &b_name(&part.path), &mut params.b(part))?;
        }
    }
    match params.flat.isfinite().all().int64_value(&[]) {
        1 => Ok(params),
        _ => Err(PeftError::Tensors(
            "holds numbers that are infinite or not a number".to_owned(),
        )),
    }
}

/// Writes a PEFT folder that `peft.PeftModel.from_pretrained` loads. The same numbers give the same bytes. Files are
/// synced; making the folder visible (rename) is the caller's.
pub fn write(folder: &Path, params: &AdapterParams, config: &PeftConfig) -> Result<(), PeftError> {
    let PeftConfig { base_model, lora } = config;
    let config = json!({
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": {},
        "target_modules": lora.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": lora.use_rslora,
    });
    let config = serde_json::to_vec_pretty(&config).expect("a literal serialises");
    let mut numbers: Vec<(String, Vec<i64>, Vec<u8>)> = vec![];
    for (_, linear) in params.shape.iter() {
        for part in &linear.parts {
            numbers.push(serialised(a_name(&part.path), &params.part_a(linear, part)));
            numbers.push(serialised(b_name(&part.path), &params.b(part)));
        }
    }
    let views = numbers.iter().map(|(name, shape, bytes)| {
        let shape = shape.iter().map(|&n| n as usize).collect();
        let view = TensorView::new(safetensors::Dtype::F32, shape, bytes).expect("bytes are the shape's");
        (name.clone(), view)
    });
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    let tensors = safetensors::serialize(views, metadata).expect("float32 views serialise");
    let readme = format!(
        "---\nbase_model: {base_model}\nlibrary_name: peft\n---\n\nA LoRA adapter (r {}, alpha {}) trained by Tandem.\n",
        lora.r, lora.alpha
    );
    put(folder, CONFIG, &config)?;
    put(folder, TENSORS, &tensors)?;
    put(folder, "README.md", readme.as_bytes())
}

/// The identity of a PEFT folder: its config and tensors, byte by byte.
pub fn digest(folder: &Path) -> Result<AdapterDigest, PeftError> {
    let read = |file| std::fs::read(folder.join(file)).map_err(|error| PeftError::Read { file, error });
    let (config, tensors) = (read(CONFIG)?, read(TENSORS)?);
    let mut hasher = AdapterHasher::new(config.len() as u64, tensors.len() as u64);
    hasher.update(&config);
    hasher.update(&tensors);
    Ok(hasher.finish())
}

fn a_name(path: &str) -> String {
    format!("{PREFIX}{path}.lora_A.weight")
}

fn b_name(path: &str) -> String {
    format!("{PREFIX}{path}.lora_B.weight")
}

fn copy(tensors: &SafeTensors, name: &str, into: &mut Tensor) -> Result<(), PeftError> {
    let view = tensors
        .tensor(name)
        .expect("the shape was built from the names in the file");
    let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
    if shape != into.size() {
        let expected = into.size();
        let message = format!(
            "tensor `{name}` has shape {shape:?}; the config and the base model make it {expected:?}"
        );
        return Err(PeftError::Tensors(message));
    }
    let Some(kind) = kind(view.dtype()) else {
        let message = format!(
            "tensor `{name}` is {:?}; BF16, F16 and F32 are supported",
            view.dtype()
        );
        return Err(PeftError::Tensors(message));
    };
    into.copy_(&Tensor::from_data_size(view.data(), &shape, kind));
    Ok(())
}

fn serialised(name: String, tensor: &Tensor) -> (String, Vec<i64>, Vec<u8>) {
    let numbers =
        Vec::<f32>::try_from(tensor.to_kind(Kind::Float).contiguous().view(-1)).expect("a float32 tensor");
    (
        name,
        tensor.size(),
        numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    )
}

fn put(folder: &Path, file: &'static str, bytes: &[u8]) -> Result<(), PeftError> {
    let written = std::fs::File::create(folder.join(file)).and_then(|mut f| {
        f.write_all(bytes)?;
        f.sync_all()
    });
    written.map_err(|error| PeftError::Write { file, error })
}

struct Config {
    r: i64,
    alpha: f64,
    rslora: bool,
    rank_pattern: BTreeMap<String, f64>,
    alpha_pattern: BTreeMap<String, f64>,
    /// `None` when target_modules is a pattern: the file alone decides.
    targets: Option<Vec<String>>,
}

/// Fields that change nothing about what a trained adapter computes.
const HARMLESS: [&str; 18] = [
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

impl Config {
    fn read(folder: &Path) -> Result<Config, PeftError> {
        let bytes =
            std::fs::read(folder.join(CONFIG)).map_err(|error| PeftError::Read { file: CONFIG, error })?;
        let fields: Map<String, Value> = serde_json::from_slice(&bytes)
            .map_err(|error| PeftError::Config(format!("not a JSON object: {error}")))?;
        let mut config = Config {
            r: 0,
            alpha: 0.0,
            rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            targets: None,
        };
        let wrong =
            |field: &str, value: &Value, why: &str| PeftError::Config(format!("`{field}` is {value}: {why}"));
        for (field, value) in &fields {
            match (field.as_str(), value) {
                ("peft_type", Value::String(kind)) if kind == "LORA" => {}
                ("r", _) => {
                    let rank = value.as_i64().filter(|&r| r > 0 && r <= 1 << 16);
                    config.r =
                        rank.ok_or_else(|| wrong(field, value, "a positive whole number is needed"))?;
                }
                ("lora_alpha", _) => {
                    config.alpha = value
                        .as_f64()
                        .ok_or_else(|| wrong(field, value, "a number is needed"))?;
                }
                ("use_rslora", Value::Bool(flag)) => config.rslora = *flag,
                ("rank_pattern", Value::Object(map)) => config.rank_pattern = pattern(field, map)?,
                ("alpha_pattern", Value::Object(map)) => config.alpha_pattern = pattern(field, map)?,
                ("target_modules", Value::Array(names)) => {
                    let names = names
                        .iter()
                        .map(|name| name.as_str().map(str::to_owned))
                        .collect::<Option<_>>();
                    config.targets =
                        Some(names.ok_or_else(|| wrong(field, value, "module names are needed"))?);
                }
                ("target_modules", Value::String(_)) => {}
                ("bias", Value::String(bias)) if bias == "none" => {}
                ("init_lora_weights", Value::Bool(_)) => {}
                ("init_lora_weights", Value::String(init))
                    if ["gaussian", "eva", "orthogonal"].contains(&init.as_str()) => {}
                (name, _) if HARMLESS.contains(&name) => {}
                (_, Value::Null | Value::Bool(false)) => {}
                (_, Value::Array(items)) if items.is_empty() => {}
                (_, Value::Object(items)) if items.is_empty() => {}
                _ => return Err(wrong(field, value, "not supported")),
            }
        }
        for needed in ["peft_type", "r", "lora_alpha", "target_modules"] {
            if !fields.contains_key(needed) {
                return Err(PeftError::Config(format!("`{needed}` is missing")));
            }
        }
        Ok(config)
    }

    fn rank(&self, path: &str) -> i64 {
        find(&self.rank_pattern, path).map_or(self.r, |rank| rank as i64)
    }

    fn scale(&self, path: &str) -> f64 {
        let alpha = find(&self.alpha_pattern, path).unwrap_or(self.alpha);
        let rank = self.rank(path) as f64;
        if self.rslora {
            alpha / rank.sqrt()
        } else {
            alpha / rank
        }
    }

    /// A target that no tensor belongs to means that config and file are not of one adapter.
    fn check_targets(&self, seen: &BTreeSet<String>, supported: &[String]) -> Result<(), PeftError> {
        for target in self.targets.iter().flatten() {
            let name = target.rsplit('.').next().unwrap_or(target);
            if !supported.iter().any(|module| module == name) {
                let message = format!(
                    "target module `{target}` is not supported; {} are",
                    supported.join(", ")
                );
                return Err(PeftError::Config(message));
            }
            if !seen.contains(name) {
                return Err(PeftError::Config(format!(
                    "target module `{target}` has no tensors in {TENSORS}"
                )));
            }
        }
        Ok(())
    }
}

/// rank_pattern and alpha_pattern: module names or path endings. PEFT also takes regular expressions; those are
/// refused rather than guessed at.
fn pattern(field: &str, map: &Map<String, Value>) -> Result<BTreeMap<String, f64>, PeftError> {
    let entry = |(key, value): (&String, &Value)| {
        if key.contains(['*', '+', '?', '(', ')', '[', ']', '{', '}', '|', '^', '$', '\\']) {
            return Err(PeftError::Config(format!(
                "`{field}`: the regular expression {key:?} is not supported"
            )));
        }
        match value
            .as_f64()
            .filter(|&number| number > 0.0 && (field != "rank_pattern" || number.fract() == 0.0))
        {
            Some(number) => Ok((key.clone(), number)),
            None => Err(PeftError::Config(format!(
                "`{field}`: {key} is {value}; a positive number is needed"
            ))),
        }
    };
    map.iter().map(entry).collect()
}

/// As PEFT's get_pattern_key: the key is the path or its ending after a dot.
fn find(pattern: &BTreeMap<String, f64>, path: &str) -> Option<f64> {
    let matches = |key: &str| path == key || path.strip_suffix(key).is_some_and(|head| head.ends_with('.'));
    pattern
        .iter()
        .find(|(key, _)| matches(key))
        .map(|(_, &number)| number)
}
