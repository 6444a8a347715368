//! What a checkpoint's config.json means, as data. One file per family answers with a [`DecoderSpec`]; the decoder
//! (model/) reads nothing else. What is not understood is an error that names the field, never a default.

mod llama;
pub mod shard;
mod spec;

use std::path::Path;

use serde_json::{Map, Value};
use tandem_kernels::activation::Activation;
use tandem_kernels::rope::{RopeScaling, RopeSpec};

use tch::Kind;

pub use spec::{
    AttnSpec, Bias, Body, Cut, DecoderSpec, Head, LinearId, LinearSpec, MlpSpec, NormSpec, Param, ParamId,
    Part, Sublayer,
};

use crate::weights::LoadError;

/// Reads `folder`/config.json (and generation_config.json when there is one).
pub fn read_spec(folder: &Path) -> Result<DecoderSpec, LoadError> {
    let config = Config::read(folder, "config.json")?;
    let generation = match folder.join("generation_config.json").exists() {
        true => Some(Config::read(folder, "generation_config.json")?),
        false => None,
    };
    let architecture = match config.get("architectures") {
        Some(Value::Array(names)) if names.len() == 1 => names[0].as_str().unwrap_or_default().to_owned(),
        _ => return Err(config.wrong("architectures", "one architecture name is needed")),
    };
    if config.get("quantization_config").is_some() {
        return Err(config.wrong("quantization_config", "quantised checkpoints are not supported"));
    }
    let mut spec = match architecture.as_str() {
        "LlamaForCausalLM" => llama::spec(&config)?,
        _ => {
            return Err(config.wrong(
                "architectures",
                &format!("{architecture} is not supported; LlamaForCausalLM is"),
            ));
        }
    };
    spec.eos_tokens = match generation.as_ref().and_then(|g| g.get("eos_token_id").map(|_| g)) {
        Some(generation) => generation.token_ids("eos_token_id")?,
        None => config.token_ids("eos_token_id")?,
    };
    Ok(spec)
}

/// The dtype config.json says the checkpoint is stored in.
pub fn declared_kind(folder: &Path) -> Result<Kind, LoadError> {
    let config = Config::read(folder, "config.json")?;
    match config
        .get("dtype")
        .or(config.get("torch_dtype"))
        .and_then(Value::as_str)
    {
        Some("bfloat16") => Ok(Kind::BFloat16),
        Some("float16") => Ok(Kind::Half),
        Some("float32") | None => Ok(Kind::Float),
        Some(_) => Err(config.wrong("torch_dtype", "bfloat16, float16 and float32 are supported")),
    }
}

/// A JSON object with errors that name the file and the field.
struct Config {
    file: &'static str,
    fields: Map<String, Value>,
}

impl Config {
    fn read(folder: &Path, file: &'static str) -> Result<Config, LoadError> {
        let path = folder.join(file);
        let bytes = std::fs::read(&path).map_err(|error| LoadError::Read {
            file: file.to_owned(),
            error,
        })?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => Ok(Config { file, fields }),
            Ok(_) => Err(LoadError::Config {
                file: file.to_owned(),
                message: "is not a JSON object".to_owned(),
            }),
            Err(error) => Err(LoadError::Config {
                file: file.to_owned(),
                message: format!("is not JSON: {error}"),
            }),
        }
    }

    /// `None` for an absent field and for null.
    fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn wrong(&self, field: &str, why: &str) -> LoadError {
        let value = self
            .get(field)
            .map(|value| format!(" (it is {value})"))
            .unwrap_or_default();
        LoadError::Config {
            file: self.file.to_owned(),
            message: format!("`{field}`: {why}{value}"),
        }
    }

    /// A positive integer below 2^31.
    fn size(&self, field: &str) -> Result<i64, LoadError> {
        self.size_or_none(field)?
            .ok_or_else(|| self.wrong(field, "is missing"))
    }

    fn size_or_none(&self, field: &str) -> Result<Option<i64>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_i64().filter(|&n| n > 0 && n < 1 << 31) {
                Some(n) => Ok(Some(n)),
                None => Err(self.wrong(field, "a whole number from 1 to 2147483647 is needed")),
            },
        }
    }

    fn number(&self, field: &str) -> Result<Option<f64>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
                Some(x) => Ok(Some(x)),
                None => Err(self.wrong(field, "a number is needed")),
            },
        }
    }

    fn flag(&self, field: &str) -> Result<bool, LoadError> {
        match self.get(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(field, "true or false is needed")),
        }
    }

    fn bias(&self, field: &str) -> Result<Bias, LoadError> {
        Ok(if self.flag(field)? {
            Bias::With
        } else {
            Bias::Without
        })
    }

    fn token_ids(&self, field: &str) -> Result<Vec<u32>, LoadError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(field) {
            None => Some(vec![]),
            Some(Value::Array(values)) => values.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(field, "a token id or a list of them is needed"))
    }

    /// `hidden_act` as transformers' ACT2FN names it.
    fn activation(&self, field: &str) -> Result<Activation, LoadError> {
        match self.get(field).and_then(Value::as_str) {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
            _ => Err(self.wrong(field, "silu, gelu and gelu_pytorch_tanh are supported")),
        }
    }

    /// Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
    /// Source: transformers modeling_rope_utils.py.
    fn rope(&self, head_dim: i64) -> Result<RopeSpec, LoadError> {
        let (field, nested) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(value), _) => ("rope_parameters", Some(value)),
            (None, value) => ("rope_scaling", value),
        };
        let nested = match nested {
            None => Config {
                file: self.file,
                fields: Map::new(),
            },
            Some(Value::Object(fields)) => Config {
                file: self.file,
                fields: fields.clone(),
            },
            Some(_) => return Err(self.wrong(field, "an object is needed")),
        };
        let theta = match nested.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        let need = |name: &str| {
            nested
                .number(name)?
                .ok_or_else(|| self.wrong(field, &format!("`{name}` is missing")))
        };
        let kind = nested
            .get("rope_type")
            .or(nested.get("type"))
            .and_then(Value::as_str);
        let scaling = match kind {
            None if nested.fields.keys().all(|key| key == "rope_theta") => RopeScaling::None,
            Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear {
                factor: need("factor")?,
            },
            Some("llama3") => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: need("original_max_position_embeddings")? as i64,
            },
            _ => return Err(self.wrong(field, "rope_type must be default, linear or llama3")),
        };
        Ok(RopeSpec {
            theta,
            rotary_dim: head_dim,
            scaling,
        })
    }
}
