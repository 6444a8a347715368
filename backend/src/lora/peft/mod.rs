//! PEFT folders: adapter_config.json, adapter_model.safetensors, README.md. Reading refuses by name what is not
//! supported; nothing is ignored silently. Source: peft 0.21 config.py, tuners/lora/config.py, utils/save_and_load.py.

mod config;
mod pattern;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::json;
use tandem_core::id::{AdapterDigest, AdapterHasher};
use tandem_core::job::{LM_HEAD, Lora, TABLES};
use tandem_core::lfs;
use tandem_kernels::finite;
use tandem_kernels::mapped::MappedFile;
use tch::{Kind, Tensor};

use super::params::{AdapterParams, AdapterShape};
use crate::family::DecoderSpec;
use crate::weights::{Checkpoint, EMBED_PATH, LoadError, kind, text_name, text_prefix};
use config::Config;

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

/// An adapter as it was read.
pub struct Loaded {
    pub params: AdapterParams,
    /// For the log: what of the folder has no effect.
    pub notes: Vec<String>,
}

/// Reads and checks a PEFT folder against the base it is to serve.
pub fn read(folder: &Path, spec: &DecoderSpec, max_rank: u32) -> Result<Loaded, PeftError> {
    let read = |file| std::fs::read(folder.join(file)).map_err(|error| PeftError::Read { file, error });
    read_bytes(&read(CONFIG)?, &read(TENSORS)?, spec, max_rank)
}

/// The same, of the two files' contents.
pub fn read_bytes(
    config: &[u8],
    tensors: &[u8],
    spec: &DecoderSpec,
    max_rank: u32,
) -> Result<Loaded, PeftError> {
    let (config, bytes) = (Config::of_bytes(config)?, tensors);
    if let Some(pointer) = lfs::pointer(bytes) {
        return Err(PeftError::Tensors(pointer));
    }
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| {
        PeftError::Tensors(format!(
            "not a whole safetensors file ({} bytes): {error}",
            bytes.len()
        ))
    })?;
    let stored = stored_names(&tensors)?;
    let mut unread = stored.clone();
    let mut notes = config.notes.clone();

    // Config and file must adapt the same modules: peft makes those that the config targets, and fills them by name.
    let mut fault = None;
    let mut without_tensors = vec![];
    let of_text = stored
        .values()
        .find_map(|name| text_prefix(name.strip_prefix(PREFIX)?));
    let shape = AdapterShape::build(spec, |path, _| {
        let names = [a_name(path), b_name(path)];
        let present = names.each_ref().map(|name| unread.remove(name).is_some());
        // The config speaks of modules as peft saw them.
        let module = of_text.map_or_else(
            || path.to_owned(),
            |(prefix, plain)| path.replacen(plain, prefix, 1),
        );
        let fail = match (present, config.targets.hit(&module)) {
            ([false, false], true) => {
                without_tensors.push(path.to_owned());
                return None;
            }
            ([false, false], false) => return None,
            ([true, false], _) => PeftError::Tensors(format!("{path} has lora_A but no lora_B")),
            ([false, true], _) => PeftError::Tensors(format!("{path} has lora_B but no lora_A")),
            ([true, true], false) => PeftError::Tensors(format!(
                "has tensors of {path}, which {CONFIG} does not target (target_modules, exclude_modules, \
                 layers_to_transform): peft would leave them out"
            )),
            ([true, true], true) if config.dora && unread.remove(&m_name(path)).is_none() => {
                PeftError::Tensors(format!(
                    "{path} has no lora_magnitude_vector, but use_dora is true"
                ))
            }
            ([true, true], true) => {
                let rank = config.rank(&module);
                if rank <= i64::from(max_rank) {
                    return Some((rank, config.scale(&module)));
                }
                PeftError::Config(format!(
                    "rank {rank} of {path} is above the server's --max-lora-rank {max_rank}"
                ))
            }
        };
        fault.get_or_insert(fail);
        None
    });
    if let Some(fault) = fault {
        return Err(fault);
    }
    notes.extend(tables(&tensors, &mut unread, spec)?);
    if of_text.is_some() {
        notes.extend(other_parts(&mut unread));
    }
    if let Some((name, _)) = unread.first_key_value() {
        let targets = targets(spec).join(", ");
        return Err(PeftError::Tensors(format!(
            "tensor `{name}` is not supported or not of this base model ({} layers; supported modules: {targets})",
            spec.attentions().count()
        )));
    }
    if shape.is_empty() {
        return Err(PeftError::Tensors("holds no LoRA tensor".to_owned()));
    }
    let shape = match config.dora {
        true => shape.with_magnitudes(),
        false => shape,
    };
    config.targets.check(&shape, &targets(spec), &mut notes)?;
    if let Some(path) = without_tensors.first() {
        notes.push(format!(
            "{} targeted modules have no tensors in {TENSORS} and stay as the base has them, {path} first",
            without_tensors.len()
        ));
    }

    let params = AdapterParams::zeros(shape);
    for (_, linear) in params.shape.iter() {
        for part in &linear.parts {
            let (a, b) = (a_name(&part.path), b_name(&part.path));
            copy(&tensors, &stored, &a, &mut params.part_a(linear, part))?;
            copy(&tensors, &stored, &b, &mut params.b(part))?;
            if let Some(mut magnitude) = params.magnitude(part) {
                copy(&tensors, &stored, &m_name(&part.path), &mut magnitude)?;
            }
        }
    }
    Ok(Loaded { params, notes })
}

/// What an adapter of this model may change.
fn targets(spec: &DecoderSpec) -> Vec<String> {
    let mut names = spec.lora_targets();
    names.extend(TABLES.map(str::to_owned));
    names
}

/// Of an adapter of a model of several parts: what adapts images and sound, which are not taken.
fn other_parts(unread: &mut BTreeMap<String, String>) -> Option<String> {
    const PARTS: [&str; 5] = [
        "vision_tower.",
        "vision_model.",
        "multi_modal_projector.",
        "audio_tower.",
        "embed_vision.",
    ];
    let is_other = |name: &str| {
        let path = name.strip_prefix(PREFIX).unwrap_or(name);
        let path = path.strip_prefix("model.").unwrap_or(path);
        PARTS.iter().any(|part| path.starts_with(part))
    };
    let all = unread.len();
    unread.retain(|name, _| !is_other(name));
    let left = all - unread.len();
    (left > 0).then(|| {
        format!("{TENSORS}: {left} tensors adapt parts for images or sound, which are not served: the text part's are read alone")
    })
}

/// peft puts the base's own tables beside an adapter of one of them (`save_embedding_layers`). They are as the base has them
/// ([`check_copies`]), or the config says that they were trained (`modules_to_save`), which is refused.
fn tables(
    tensors: &SafeTensors,
    unread: &mut BTreeMap<String, String>,
    spec: &DecoderSpec,
) -> Result<Option<String>, PeftError> {
    let found: Vec<(String, String)> = unread
        .iter()
        .filter_map(|(name, stored)| Some((stored.clone(), of_table(name)?)))
        .collect();
    unread.retain(|name, _| of_table(name).is_none());
    for (stored, _) in &found {
        let view = tensors.tensor(stored).expect("it is listed");
        let expected = [spec.vocab as usize, spec.hidden as usize];
        if view.shape() != expected {
            return Err(PeftError::Tensors(format!(
                "holds the base model's `{stored}` of shape {:?}, this base model's is {expected:?}: the vocabulary was changed \
                 before training",
                view.shape()
            )));
        }
    }
    let modules: Vec<String> = found.into_iter().map(|(_, module)| module).collect();
    Ok((!modules.is_empty()).then(|| {
        format!(
            "{TENSORS} holds a copy of the base model's {}, which is not read: the base's own is used",
            modules.join(" and ")
        )
    }))
}

/// Rows of a table that are compared at once.
const ROWS: i64 = 4096;
/// Numbers of a copy that was rounded to bfloat16, or to float16, lie so near, relatively.
const ROUNDED: f64 = 1.0 / 128.0;

/// Whether the tables of the base that the folder holds are those of the base in `base`, a folder or a GGUF file: peft would take the
/// folder's.
pub fn check_copies(folder: &Path, base: &Path, spec: &DecoderSpec) -> Result<(), PeftError> {
    let read = |error| PeftError::Read { file: TENSORS, error };
    let bytes = MappedFile::open(&folder.join(TENSORS)).map_err(read)?;
    let tensors =
        SafeTensors::deserialize(bytes.bytes()).map_err(|error| PeftError::Tensors(error.to_string()))?;
    let copies: Vec<(String, String)> = stored_names(&tensors)?
        .into_iter()
        .filter_map(|(name, stored)| Some((stored, of_table(&name)?)))
        .collect();
    if copies.is_empty() {
        return Ok(());
    }
    let unread =
        |error: LoadError| PeftError::Tensors(format!("cannot be held against the base model: {error}"));
    let checkpoint = Checkpoint::open(base).map_err(unread)?;
    for (stored, module) in copies {
        let view = tensors.tensor(&stored).expect("it is listed");
        let Some(kind) = kind(view.dtype()) else { continue };
        let shape = [spec.vocab, spec.hidden];
        let copy = Tensor::from_data_size(view.data(), &shape, kind);
        let name = format!("{module}.weight");
        for from in (0..spec.vocab).step_by(ROWS as usize) {
            let rows = from..(from + ROWS).min(spec.vocab);
            let n = rows.end - rows.start;
            let own = checkpoint
                .part(checkpoint.table_name(&name), &shape, rows, 0..spec.hidden)
                .map_err(unread)?
                .view([n, spec.hidden])
                .to_kind(Kind::Float);
            let copy = copy.narrow(0, from, n).to_kind(Kind::Float);
            let far = ((&copy - &own).abs() - own.abs() * ROUNDED)
                .max()
                .double_value(&[]);
            // NaN is no copy either.
            if far > 1e-6 || far.is_nan() {
                return Err(PeftError::Tensors(format!(
                    "holds `{stored}` as the base model's, and it is not: it was trained, or made for another base or vocabulary. Serve a \
                     base that has this table"
                )));
            }
        }
    }
    Ok(())
}

/// Of a tensor's name in the file: the table of the base that it is.
fn of_table(name: &str) -> Option<String> {
    let name = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let module = name.strip_suffix(".base_layer").unwrap_or(name);
    let is_table = [LM_HEAD, EMBED_PATH].contains(&module);
    is_table.then(|| module.to_owned())
}

/// The file's tensors by the names that peft gives them, and the names they have: where a training script saved the
/// model's own state, an adapter's name stands in between (`lora_A.default.weight`); of a model of several parts, the text
/// part's.
fn stored_names(tensors: &SafeTensors) -> Result<BTreeMap<String, String>, PeftError> {
    let mut names = BTreeMap::new();
    let mut adapters: BTreeMap<Option<String>, String> = BTreeMap::new();
    for stored in tensors.names() {
        let (name, adapter) = without_adapter(stored);
        let of_text = name.strip_prefix(PREFIX).and_then(text_name);
        let name = of_text.map_or(name, |path| format!("{PREFIX}{path}"));
        if name.contains(".lora_") {
            adapters.entry(adapter).or_insert_with(|| stored.to_owned());
        }
        names.insert(name, stored.to_owned());
    }
    match adapters.len() {
        0 | 1 => Ok(names),
        _ => {
            let examples: Vec<&str> = adapters.values().map(String::as_str).collect();
            Err(PeftError::Tensors(format!(
                "holds the tensors of several adapters ({}); one folder is one adapter",
                examples.join(", ")
            )))
        }
    }
}

fn without_adapter(stored: &str) -> (String, Option<String>) {
    for matrix in [".lora_A.", ".lora_B."] {
        if let Some((module, rest)) = stored.rsplit_once(matrix)
            && let Some(adapter) = rest.strip_suffix(".weight")
        {
            return (format!("{module}{matrix}weight"), Some(adapter.to_owned()));
        }
    }
    const MAGNITUDE: &str = ".lora_magnitude_vector";
    if let Some((module, rest)) = stored.rsplit_once(MAGNITUDE)
        && let Some(adapter) = rest
            .strip_prefix('.')
            .and_then(|rest| rest.strip_suffix(".weight"))
    {
        return (format!("{module}{MAGNITUDE}"), Some(adapter.to_owned()));
    }
    // Of an embedding they are parameters without a `.weight`.
    for matrix in [".lora_embedding_A", ".lora_embedding_B"] {
        if let Some((module, adapter)) = stored.rsplit_once(&format!("{matrix}.")) {
            return (format!("{module}{matrix}"), Some(adapter.to_owned()));
        }
    }
    (stored.to_owned(), None)
}

/// Writes a PEFT folder that `peft.PeftModel.from_pretrained` loads. The same numbers give the same bytes. Files are
/// synced; making the folder visible (rename) is the caller's.
pub fn write(folder: &Path, params: &AdapterParams, config: &PeftConfig) -> Result<(), PeftError> {
    let modules = Modules {
        targets: config.lora.target_modules.clone(),
        ranks: BTreeMap::new(),
        alphas: BTreeMap::new(),
    };
    write_as(folder, params, config, &modules)
}

/// The same of an adapter whose modules, ranks or scales are not those of [`PeftConfig::lora`]: each module stands there by its
/// whole path, however the adapter it comes from said which they are.
pub fn write_own(folder: &Path, params: &AdapterParams, config: &PeftConfig) -> Result<(), PeftError> {
    let lora = config.lora;
    let mut modules = Modules {
        targets: vec![],
        ranks: BTreeMap::new(),
        alphas: BTreeMap::new(),
    };
    for part in params.shape.iter().flat_map(|(_, linear)| &linear.parts) {
        let path = part.path.clone();
        modules.targets.push(path.clone());
        if part.rank() != i64::from(lora.r) {
            modules.ranks.insert(path.clone(), part.rank());
        }
        let divisor = match lora.use_rslora {
            true => (part.rank() as f64).sqrt(),
            false => part.rank() as f64,
        };
        if lora.alpha / divisor != part.scale {
            // What was divided, where it was a whole number.
            let alpha = part.scale * divisor;
            let whole = alpha.round();
            let is_whole = whole / divisor == part.scale;
            modules.alphas.insert(path, if is_whole { whole } else { alpha });
        }
    }
    write_as(folder, params, config, &modules)
}

/// As the config names them.
struct Modules {
    targets: Vec<String>,
    ranks: BTreeMap<String, i64>,
    alphas: BTreeMap<String, f64>,
}

fn write_as(
    folder: &Path,
    params: &AdapterParams,
    config: &PeftConfig,
    modules: &Modules,
) -> Result<(), PeftError> {
    let PeftConfig { base_model, lora } = config;
    let config = json!({
        "alpha_pattern": modules.alphas,
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
        "rank_pattern": modules.ranks,
        "target_modules": modules.targets,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    });
    let config = serde_json::to_vec_pretty(&config).expect("a literal serialises");
    let mut numbers: Vec<(String, Vec<i64>, Vec<u8>)> = vec![];
    for (_, linear) in params.shape.iter() {
        for part in &linear.parts {
            numbers.push(serialised(a_name(&part.path), &params.part_a(linear, part)));
            numbers.push(serialised(b_name(&part.path), &params.b(part)));
            let magnitude = params.magnitude(part);
            numbers.extend(magnitude.map(|magnitude| serialised(m_name(&part.path), &magnitude)));
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
    match path {
        EMBED_PATH => format!("{PREFIX}{path}.lora_embedding_A"),
        path => format!("{PREFIX}{path}.lora_A.weight"),
    }
}

fn b_name(path: &str) -> String {
    match path {
        EMBED_PATH => format!("{PREFIX}{path}.lora_embedding_B"),
        path => format!("{PREFIX}{path}.lora_B.weight"),
    }
}

/// DoRA's.
fn m_name(path: &str) -> String {
    format!("{PREFIX}{path}.lora_magnitude_vector")
}

/// `name` as peft has it; `stored` says under which it is in the file.
fn copy(
    tensors: &SafeTensors,
    stored: &BTreeMap<String, String>,
    name: &str,
    into: &mut Tensor,
) -> Result<(), PeftError> {
    let view = tensors
        .tensor(&stored[name])
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
    let read = Tensor::from_data_size(view.data(), &shape, kind);
    if !finite::all(&read) {
        let message = format!("tensor `{name}` holds numbers that are infinite or not a number (NaN)");
        return Err(PeftError::Tensors(message));
    }
    into.copy_(&read);
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
