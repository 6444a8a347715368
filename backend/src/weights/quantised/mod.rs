//! Checkpoints whose linears are stored in few bits: which scheme, said by config.json's `quantization_config`; which tensors
//! make one matrix; and what they stand for. One file per scheme. Not here: formats of their own files (GGUF), and how a
//! matrix is multiplied.

mod awq;
mod bits;
mod bitsandbytes;
mod compressed_tensors;
mod fields;
mod fp8;
mod gptq;
mod mxfp4;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};
use tandem_kernels::finite;
use tandem_kernels::weight::Quantised;
use tch::{Kind, Tensor};

use super::{Checkpoint, LoadError, Matrix};

/// What `quant_method` may be, as vLLM's `--quantization` names it.
pub const QUANTIZATIONS: [&str; 7] = [
    "gptq",
    "awq",
    "compressed-tensors",
    "fp8",
    "fbgemm_fp8",
    "bitsandbytes",
    "mxfp4",
];

/// One way of storing quantised matrices.
struct Scheme {
    /// What follows a module's path in the names of the tensors that make its weight. The first, when it is there beside
    /// another one, says that the module is quantised.
    parts: &'static [&'static str],
    /// What follows the path in the parameter's own name.
    parameter: &'static str,
    /// The whole matrix of a module, `[N, K]`.
    read: fn(&Module) -> Result<Matrix, LoadError>,
}

fn scheme(method: &str) -> Option<Scheme> {
    Some(match method {
        "gptq" => gptq::SCHEME,
        "awq" => awq::SCHEME,
        "compressed-tensors" => compressed_tensors::SCHEME,
        "fp8" | "fbgemm_fp8" => fp8::SCHEME,
        "bitsandbytes" => bitsandbytes::SCHEME,
        "mxfp4" => mxfp4::SCHEME,
        _ => return None,
    })
}

/// What goes with quantised activations and caches, which there are none of here.
const NOT_OF_WEIGHTS: [&str; 7] = [
    ".input_scale",
    ".input_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_cache_scale",
    ".output_scale",
];

/// The quantised matrices of a checkpoint.
pub(super) struct QuantisedTensors {
    kind: &'static str,
    config: Map<String, Value>,
    scheme: Scheme,
    /// Parameter -> the module's path.
    modules: BTreeMap<String, String>,
    /// Tensors that are parts of those.
    parts: BTreeSet<String>,
}

impl QuantisedTensors {
    /// Which of a checkpoint's tensors are quantised; `None` where config.json says nothing of it.
    pub fn find(folder: &Path, names: &[&str]) -> Result<Option<QuantisedTensors>, LoadError> {
        let Some(config) = quantization_config(folder)? else {
            return Ok(None);
        };
        let method = config.get("quant_method").and_then(Value::as_str);
        // llm-compressor's first files have none.
        let method = method.unwrap_or(match config.contains_key("config_groups") {
            true => "compressed-tensors",
            false => "without a `quant_method`",
        });
        let known = QUANTIZATIONS.iter().find(|kind| **kind == method);
        let (Some(&kind), Some(scheme)) = (known, scheme(method)) else {
            return Err(wrong(&format!(
                "weights quantised by {method} are not read; {} are, and a checkpoint in bfloat16, float16 or float32 can be \
                 quantised here (--quantization int8, int4 or nf4)",
                QUANTIZATIONS.join(", ")
            )));
        };
        let mut found = QuantisedTensors {
            kind,
            config,
            scheme,
            modules: BTreeMap::new(),
            parts: BTreeSet::new(),
        };
        found.claim(names);
        Ok(Some(found))
    }

    fn claim(&mut self, names: &[&str]) {
        let Scheme { parts, parameter, .. } = self.scheme;
        let (first, others) = parts.split_first().expect("a scheme has parts");
        let all: BTreeSet<&str> = names.iter().copied().collect();
        for name in names {
            if NOT_OF_WEIGHTS.iter().any(|suffix| name.ends_with(suffix)) {
                self.parts.insert((*name).to_owned());
            }
            let Some(module) = name.strip_suffix(first) else {
                continue;
            };
            let there: Vec<String> = others
                .iter()
                .map(|suffix| format!("{module}{suffix}"))
                .filter(|part| all.contains(part.as_str()))
                .collect();
            if there.is_empty() {
                continue;
            }
            self.modules
                .insert(format!("{module}{parameter}"), module.to_owned());
            self.parts.extend(there);
            self.parts.insert((*name).to_owned());
        }
    }

    /// For the log: fields of `quantization_config` that nobody reads and of which it is not known that nothing is lost.
    pub fn note(&self) -> Option<String> {
        let unknown = fields::unknown(&self.config);
        let names: Vec<String> = unknown.iter().map(|field| format!("`{field}`")).collect();
        let note = format!(
            "config.json: `quantization_config`: not known here and not honoured: {}",
            names.join(", ")
        );
        (!names.is_empty()).then_some(note)
    }

    /// As `--quantization` names it.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// Is this tensor only a part of what a parameter is made of?
    pub fn is_part(&self, name: &str) -> bool {
        self.parts.contains(name)
    }

    /// The parameters that are quantised.
    pub fn parameters(&self) -> impl Iterator<Item = &str> {
        self.modules.keys().map(String::as_str)
    }

    /// The names of the tensors that make a parameter.
    pub fn parts_of(&self, parameter: &str) -> Option<impl Iterator<Item = String>> {
        let module = self.modules.get(parameter)?;
        Some(
            self.scheme
                .parts
                .iter()
                .map(move |suffix| format!("{module}{suffix}")),
        )
    }

    /// A whole matrix whose shape is to be `[.., K]`, rows of all but the last dimension; `None` where it is not quantised.
    pub fn read(
        &self,
        checkpoint: &Checkpoint,
        parameter: &str,
        shape: &[i64],
    ) -> Option<Result<Matrix, LoadError>> {
        let module = Module {
            checkpoint,
            path: self.modules.get(parameter)?,
            config: &self.config,
            n: shape[..shape.len() - 1].iter().product(),
            k: shape[shape.len() - 1],
        };
        let read = (self.scheme.read)(&module);
        Some(read.and_then(|matrix| module.checked(matrix)))
    }
}

/// config.json's field of this name, or of the name that compressed-tensors had first.
fn quantization_config(folder: &Path) -> Result<Option<Map<String, Value>>, LoadError> {
    let path = folder.join("config.json");
    // A folder without one is refused by whoever reads the model's shape.
    let Ok(bytes) = std::fs::read(path) else {
        return Ok(None);
    };
    let config: Value = serde_json::from_slice(&bytes).map_err(|error| LoadError::Config {
        file: "config.json".to_owned(),
        message: format!("is not JSON: {error}"),
    })?;
    let of = |config: &Value| {
        let mut fields = ["quantization_config", "compression_config"].into_iter();
        fields.find_map(|field| config.get(field).filter(|value| !value.is_null()).cloned())
    };
    match of(&config).or_else(|| of(config.get("text_config")?)) {
        None => Ok(None),
        Some(Value::Object(fields)) if fields.is_empty() => Ok(None),
        Some(Value::Object(fields)) => Ok(Some(fields)),
        Some(_) => Err(wrong("an object is needed")),
    }
}

fn wrong(why: &str) -> LoadError {
    LoadError::Config {
        file: "config.json".to_owned(),
        message: format!("`quantization_config`: {why}"),
    }
}

/// A quantised module of a checkpoint: its tensors, by what follows its path in their names.
struct Module<'a> {
    checkpoint: &'a Checkpoint,
    path: &'a str,
    config: &'a Map<String, Value>,
    /// Rows and columns the model makes it.
    n: i64,
    k: i64,
}

impl Module<'_> {
    fn has(&self, suffix: &str) -> bool {
        self.checkpoint
            .tensors
            .contains_key(&format!("{}{suffix}", self.path))
    }

    /// A tensor of numbers of any dtype, in float32.
    fn floats(&self, suffix: &str) -> Result<Tensor, LoadError> {
        let floats = self.tensor(suffix)?.to_kind(Kind::Float);
        match finite::all(&floats) {
            true => Ok(floats),
            false => Err(self.wrong(
                suffix,
                "holds numbers that are infinite or not a number: the file is damaged",
            )),
        }
    }

    /// A tensor as it is stored; of 8-bit floats their bytes.
    fn tensor(&self, suffix: &str) -> Result<Tensor, LoadError> {
        let name = format!("{}{suffix}", self.path);
        match self.checkpoint.stored(&name) {
            Some(stored) => stored,
            None => Err(LoadError::Weights {
                file: self.checkpoint.file_names(),
                message: format!(
                    "tensor `{name}` is missing, without which `{}` cannot be read",
                    self.path
                ),
            }),
        }
    }

    /// The bytes of a tensor's numbers, `[.., bytes of one]` uint8.
    fn bytes(&self, suffix: &str) -> Result<Tensor, LoadError> {
        let tensor = self.tensor(suffix)?;
        let width = tensor.kind().elt_size_in_bytes();
        let mut shape = tensor.size();
        shape.push(width as i64);
        let mut bytes = vec![0; tensor.numel() * width];
        tensor
            .f_copy_data_u8(&mut bytes, tensor.numel())
            .map_err(kernel)?;
        Tensor::f_from_data_size(&bytes, &shape, Kind::Uint8).map_err(kernel)
    }

    /// Codes of `bits` bits, packed from the lowest of 32-bit numbers on, along a new last dimension.
    fn codes(&self, suffix: &str, bits: i64) -> Result<Tensor, LoadError> {
        let bytes = self.bytes(suffix)?;
        match bytes.size().last() {
            Some(4) => Ok(bits::unpack(&bytes, bits)),
            _ => Err(self.wrong(suffix, "is to hold packed numbers of 32 bits")),
        }
    }

    fn wrong(&self, suffix: &str, what: &str) -> LoadError {
        let name = format!("{}{suffix}", self.path);
        let file = match self.checkpoint.tensors.contains_key(&name) {
            true => self.checkpoint.file_of(&name).to_owned(),
            false => self.checkpoint.file_names(),
        };
        LoadError::Weights {
            file,
            message: format!("tensor `{name}` {what}"),
        }
    }

    /// That a tensor has the shape that the model and its other tensors make it.
    fn expect(&self, suffix: &str, tensor: &Tensor, shape: &[i64]) -> Result<(), LoadError> {
        match tensor.size() == shape {
            true => Ok(()),
            false => {
                let what = format!(
                    "has shape {:?}, a matrix of [{}, {}] makes it {shape:?}",
                    tensor.size(),
                    self.n,
                    self.k
                );
                Err(self.wrong(suffix, &what))
            }
        }
    }

    fn checked(&self, matrix: Matrix) -> Result<Matrix, LoadError> {
        let size = match &matrix {
            Matrix::Dense(numbers) => numbers.size(),
            Matrix::Quantised(quantised) => {
                quantised.check()?;
                quantised.codes.size()
            }
        };
        match size == [self.n, self.k] {
            true => Ok(matrix),
            false => {
                let what = format!(
                    "stands for a matrix of {size:?}, config.json makes it [{}, {}]",
                    self.n, self.k
                );
                Err(self.wrong("", &what))
            }
        }
    }
}

/// Integers `(code - zero) * scale` in the grid whose code `middle` is zero. `zeros` and `scales`: `[N, groups]`.
fn with_zeros(quantised: Quantised, zeros: &Tensor, middle: i64) -> Quantised {
    let offsets = (middle - zeros.to_kind(Kind::Float)) * &quantised.scales;
    let any = bool::try_from(offsets.ne(0.0).any()).unwrap_or(true);
    Quantised {
        offsets: any.then_some(offsets),
        ..quantised
    }
}

/// Groups along K: of a size that is declared, of which the last one may be shorter, else of equal ones.
fn group(module: &Module, suffix: &str, groups: i64) -> Result<i64, LoadError> {
    let k = module.k;
    let of_kinds = module.config.get("config_groups").and_then(Value::as_object);
    let of_kinds = of_kinds.into_iter().flat_map(|groups| groups.values());
    let declared = of_kinds
        .filter_map(|kind| kind.get("weights")?.get("group_size"))
        .chain(module.config.get("group_size"))
        .filter_map(Value::as_i64)
        .find(|&group| group > 0 && (k + group - 1) / group == groups);
    match (groups, declared) {
        (1, _) => Ok(k),
        (_, Some(group)) => Ok(group),
        _ if groups > 1 && k % groups == 0 => Ok(k / groups),
        _ => Err(module.wrong(
            suffix,
            &format!("has {groups} groups, which do not divide {k} inputs"),
        )),
    }
}

/// A matrix whose inputs are in groups by an index (`desc_act`) has no groups along K: its numbers, unless the index is in
/// order. `index` `[K]`.
fn by_index(quantised: Quantised, index: &Tensor) -> Result<Matrix, LoadError> {
    let k = quantised.k();
    let index = index.to_kind(Kind::Int64);
    let in_order = Tensor::arange(k, (Kind::Int64, tch::Device::Cpu))
        .f_div_scalar_mode(quantised.group, "floor")
        .map_err(kernel)?;
    if index.equal(&in_order) {
        return Ok(Matrix::Quantised(quantised));
    }
    let spread = |numbers: &Tensor| numbers.f_index_select(1, &index).map_err(kernel);
    let by_column = Quantised {
        group: 1,
        scales: spread(&quantised.scales)?,
        offsets: quantised.offsets.as_ref().map(spread).transpose()?,
        ..quantised
    };
    Ok(Matrix::Dense(by_column.dense()))
}

fn kernel(error: tch::TchError) -> LoadError {
    LoadError::Kernel(error.into())
}
