//! A dense checkpoint written anew in few bits, by conventions that others read: compressed-tensors (`pack-quantized`) for
//! int8 and int4, bitsandbytes for nf4. Linears only; embedding, head and norms stay as they are. Reading it is `quantised`.

use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tandem_kernels::weight::{Grid, Quantised, Recipe};
use tch::{Kind, Tensor};

use super::{LoadError, WEIGHTS};
use crate::family::{self, Cut, LinearId, ParamId, Source};

/// What was written.
pub struct Exported {
    pub bytes: u64,
    pub quantised: usize,
    /// Linears that the convention cannot hold.
    pub dense: Vec<String>,
}

/// Writes the model in `from` to the new folder `to`.
pub fn quantize(from: &Path, to: &Path, format: &str) -> Result<Exported, LoadError> {
    let recipe = Recipe::ALL.into_iter().find(|recipe| recipe.name() == format);
    let recipe =
        recipe.ok_or_else(|| LoadError::Option(format!("--format {format:?} is not int8, int4 or nf4")))?;
    if !from.is_dir() {
        return Err(LoadError::Folder(format!(
            "{} is no folder of safetensors: only such a one is written anew",
            from.display()
        )));
    }
    let (spec, checkpoint) = family::open(from)?;
    if let Some(kind) = checkpoint.quantization() {
        return Err(LoadError::Folder(format!(
            "{} is quantised already ({kind}): take the checkpoint it was made from",
            from.display()
        )));
    }
    let params = spec.params();
    let shared = params
        .iter()
        .flat_map(|param| &param.tensors)
        .find(|source| source.among.is_some());
    if let Some(Source { name, .. }) = shared {
        return Err(LoadError::Folder(format!(
            "`{name}` holds all experts in one tensor, which no convention of {format} has: serve with --quantization {format}"
        )));
    }
    begin(to)?;
    // Routers of experts stay as they are, as at a start.
    let routers: Vec<LinearId> = spec
        .linears()
        .filter(|(_, linear)| linear.cut == Cut::Whole)
        .map(|(id, _)| id)
        .collect();
    let is_router = |id: ParamId| matches!(id, ParamId::Linear(id) if routers.contains(&id));
    let mut file = File {
        tensors: vec![],
        dtype: checkpoint.main_kind(),
    };
    let mut exported = Exported {
        bytes: 0,
        quantised: 0,
        dense: vec![],
    };
    for param in params {
        for Source { name, rows, .. } in &param.tensors {
            let shape = [&[*rows], &param.shape[1..]].concat();
            let stored = checkpoint.stored_name(name, spec.head);
            let tensor = checkpoint.tensor(stored, &shape)?;
            let module = name.strip_suffix(".weight");
            match (param.id, module) {
                (id @ ParamId::Linear(_), Some(module)) if !is_router(id) && file.holds(recipe, &tensor) => {
                    file.quantised(module, recipe, &tensor)?;
                    exported.quantised += 1;
                }
                (id @ ParamId::Linear(_), _) if !is_router(id) => {
                    exported.dense.push(name.clone());
                    file.add(name.clone(), &tensor)?;
                }
                _ => file.add(stored.to_owned(), &tensor)?,
            }
        }
    }
    let routers = spec.linears().filter(|(id, _)| routers.contains(id));
    let routers = routers.flat_map(|(_, linear)| linear.parts.iter().map(|part| part.path.as_str()));
    let skipped: Vec<&str> = (exported.dense.iter())
        .filter_map(|name| name.strip_suffix(".weight"))
        .chain(["lm_head"])
        .chain(routers)
        .collect();
    copy_others(from, to, Some(&configuration(recipe, file.dtype, &skipped)))?;
    let bytes = file.serialise();
    exported.bytes = bytes.len() as u64;
    std::fs::write(to.join(WEIGHTS), bytes).map_err(|error| cannot(&to.join(WEIGHTS), error))?;
    Ok(exported)
}

pub(super) fn cannot(path: &Path, error: std::io::Error) -> LoadError {
    LoadError::Read {
        file: path.display().to_string(),
        error,
    }
}

/// A folder of our own: nothing that is there is overwritten.
pub(super) fn begin(to: &Path) -> Result<(), LoadError> {
    std::fs::create_dir_all(to).map_err(|error| cannot(to, error))?;
    let mut entries = to.read_dir().map_err(|error| cannot(to, error))?;
    match entries.next() {
        None => Ok(()),
        Some(_) => Err(LoadError::Folder(format!(
            "{} is not empty: name a folder that is new",
            to.display()
        ))),
    }
}

/// All files of a model's folder that are no weights: names and paths.
pub(super) fn others(folder: &Path) -> Result<Vec<(String, PathBuf)>, LoadError> {
    let mut others = vec![];
    for entry in folder
        .read_dir()
        .map_err(|error| cannot(folder, error))?
        .flatten()
    {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let is_weight = [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json"]
            .iter()
            .any(|end| name.ends_with(end));
        if !is_weight && path.is_file() {
            others.push((name, path));
        }
    }
    others.sort();
    Ok(others)
}

/// All that is no weight; config.json with what is quantised, if something is.
fn copy_others(from: &Path, to: &Path, quantization: Option<&Value>) -> Result<(), LoadError> {
    for (name, path) in others(from)? {
        let Some(quantization) = quantization.filter(|_| name == "config.json") else {
            std::fs::copy(&path, to.join(&name)).map_err(|error| cannot(&path, error))?;
            continue;
        };
        let text = std::fs::read(&path).map_err(|error| cannot(&path, error))?;
        let mut config: Value = serde_json::from_slice(&text).map_err(|error| LoadError::Config {
            file: name.clone(),
            message: format!("is not JSON: {error}"),
        })?;
        config["quantization_config"] = quantization.clone();
        let text = serde_json::to_string_pretty(&config).expect("JSON");
        std::fs::write(to.join(&name), text + "\n").map_err(|error| cannot(&to.join(&name), error))?;
    }
    Ok(())
}

fn configuration(recipe: Recipe, dtype: Kind, skipped: &[&str]) -> Value {
    let (bits, strategy, group) = match recipe {
        Recipe::Nf4 => {
            return json!({
                "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
                "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false,
                "bnb_4bit_compute_dtype": name(dtype), "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": skipped,
            });
        }
        Recipe::Int8 => (8, "channel", None),
        Recipe::Int4 => (4, "group", Some(recipe.group(usize::MAX))),
    };
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": skipped, "kv_cache_scheme": null,
        "config_groups": { "group_0": {
            "targets": ["Linear"], "input_activations": null, "output_activations": null, "format": "pack-quantized",
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": true, "strategy": strategy, "group_size": group,
                "dynamic": false, "observer": "minmax",
            },
        } },
    })
}

/// A safetensors file in the making.
struct File {
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    /// What the checkpoint is mostly stored in, and scales of compressed-tensors, too.
    dtype: Kind,
}

impl File {
    /// bitsandbytes' blocks run on over the ends of rows, groups here end with them.
    fn holds(&self, recipe: Recipe, tensor: &Tensor) -> bool {
        let k = tensor.size()[1];
        match recipe {
            Recipe::Nf4 => k % recipe.group(k as usize) as i64 == 0,
            Recipe::Int8 | Recipe::Int4 => true,
        }
    }

    fn quantised(&mut self, module: &str, recipe: Recipe, tensor: &Tensor) -> Result<(), LoadError> {
        let quantised = recipe.quantise(tensor)?;
        let (n, k) = (quantised.n(), quantised.k());
        if recipe == Recipe::Nf4 {
            let state = json!({ "quant_type": "nf4", "blocksize": quantised.group, "dtype": name(self.dtype), "shape": [n, k] });
            let state = Tensor::from_slice(state.to_string().as_bytes());
            let pairs = quantised.codes.view([-1, 2]);
            // The first of two is in the high half.
            let bytes = pairs.select(1, 0) * 16_i64 + pairs.select(1, 1);
            let name = format!("{module}.weight");
            self.add(format!("{name}.quant_state.bitsandbytes__nf4"), &state)?;
            self.add(
                format!("{name}.quant_map"),
                &Tensor::from_slice(Grid::Nf4.levels()),
            )?;
            self.add(format!("{name}.absmax"), &quantised.scales.view([-1]))?;
            return self.add(name, &bytes.view([-1, 1]));
        }
        let Quantised { codes, scales, .. } = with_scales_of(quantised, tensor, self.dtype)?;
        // Unsigned, the lowest bits of a 32-bit number first; rows end with zeros.
        let bits = recipe.grid().bits() as i64;
        let codes = match recipe {
            Recipe::Int8 => codes.bitwise_xor(0x80),
            _ => codes,
        };
        let per_word = 32 / bits;
        let codes = codes
            .f_constant_pad_nd([0, (per_word - k % per_word) % per_word])
            .map_err(kernel)?;
        let bytes = match bits {
            4 => {
                let pairs = codes.view([n, -1, 2]);
                pairs.select(2, 0) + pairs.select(2, 1) * 16_i64
            }
            _ => codes,
        };
        self.add_as(
            format!("{module}.weight_packed"),
            Dtype::I32,
            &[n, bytes.size()[1] / 4],
            &bytes,
        )?;
        self.add(format!("{module}.weight_scale"), &scales.to_kind(self.dtype))?;
        self.add(format!("{module}.weight_shape"), &Tensor::from_slice(&[n, k]))
    }

    fn add(&mut self, name: String, tensor: &Tensor) -> Result<(), LoadError> {
        let dtype = match tensor.kind() {
            Kind::BFloat16 => Dtype::BF16,
            Kind::Half => Dtype::F16,
            Kind::Uint8 => Dtype::U8,
            Kind::Int64 => Dtype::I64,
            _ => Dtype::F32,
        };
        self.add_as(name, dtype, &tensor.size(), tensor)
    }

    /// The tensor's bytes as numbers of another kind.
    fn add_as(
        &mut self,
        name: String,
        dtype: Dtype,
        shape: &[i64],
        tensor: &Tensor,
    ) -> Result<(), LoadError> {
        let tensor = tensor.f_contiguous().map_err(kernel)?;
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor
            .f_copy_data_u8(&mut bytes, tensor.numel())
            .map_err(kernel)?;
        self.tensors.push((
            name,
            dtype,
            shape.iter().map(|&size| size as usize).collect(),
            bytes,
        ));
        Ok(())
    }

    fn serialise(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            (name, view.expect("bytes are the shape's"))
        });
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        safetensors::serialize(views, metadata).expect("plain views serialise")
    }
}

/// Integers anew under their scales as `dtype` rounds them, so that rounding scales costs nothing. Where it rounds none they stay:
/// a number in the middle of two codes would go to either.
fn with_scales_of(quantised: Quantised, tensor: &Tensor, dtype: Kind) -> Result<Quantised, LoadError> {
    let scales = quantised.scales.to_kind(dtype).to_kind(Kind::Float);
    if scales.equal(&quantised.scales) {
        return Ok(quantised);
    }
    let spread = scales
        .f_repeat_interleave_self_int(quantised.group, 1, None)
        .map_err(kernel)?;
    let spread = spread.narrow(1, 0, quantised.k());
    let levels = (tensor.to_kind(Kind::Float) / spread).round();
    let codes = match quantised.grid {
        Grid::Int8 => levels.clamp(-127, 127).to_kind(Kind::Int8).to_kind(Kind::Uint8),
        _ => (levels.clamp(-8, 7) + 8.0).to_kind(Kind::Uint8),
    };
    Ok(Quantised {
        codes,
        scales,
        ..quantised
    })
}

fn name(dtype: Kind) -> &'static str {
    match dtype {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

fn kernel(error: tch::TchError) -> LoadError {
    LoadError::Kernel(error.into())
}
