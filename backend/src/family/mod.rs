//! What a checkpoint's config.json means, as data. One file per family answers with a [`DecoderSpec`]; the decoder
//! (model/) reads nothing else. What is not understood is an error that names the field, never a default.

mod checkpoint;
mod cohere2;
mod config;
mod fields;
mod gemma;
mod glm;
mod gpt_oss;
mod granite;
mod layer_groups;
mod llama;
mod mistral;
mod mixtral;
mod olmo;
mod phi3;
mod qwen;
mod qwen_moe;
mod rope;
pub mod shard;
mod sizes;
mod smollm3;
mod spec;
mod starcoder2;
#[cfg(test)]
mod tests;

use std::path::Path;

use serde_json::{Map, Value};
use tch::Kind;

pub(crate) use checkpoint::layer_of;
pub use checkpoint::open;
pub use layer_groups::{CachePlace, LayerGroups};
pub use spec::{
    Among, AttnSpec, Bias, Body, Cut, DecoderSpec, ExpertsSpec, Head, LinearId, LinearSpec, Logits,
    MlpActivation, MlpSpec, NormId, NormKind, NormSpec, Param, ParamId, Part, QkNorm, Section, SharedExpert,
    Source, Sublayer,
};

use crate::weights::{LoadError, check_folder, gguf};
use config::Config;

/// What a config.json may be of. transformers chooses by the type, vLLM by the architecture: they must agree.
struct Family {
    architecture: &'static str,
    model_type: &'static str,
    spec: fn(&Config) -> Result<DecoderSpec, LoadError>,
}

#[rustfmt::skip] // one family, one line
const FAMILIES: [Family; 21] = [
    Family { architecture: "LlamaForCausalLM", model_type: "llama", spec: llama::spec },
    Family { architecture: "MistralForCausalLM", model_type: "mistral", spec: mistral::mistral },
    Family { architecture: "MinistralForCausalLM", model_type: "ministral", spec: mistral::ministral },
    Family { architecture: "MixtralForCausalLM", model_type: "mixtral", spec: mixtral::spec },
    Family { architecture: "Qwen2ForCausalLM", model_type: "qwen2", spec: qwen::qwen2 },
    Family { architecture: "Qwen3ForCausalLM", model_type: "qwen3", spec: qwen::qwen3 },
    Family { architecture: "Qwen2MoeForCausalLM", model_type: "qwen2_moe", spec: qwen_moe::qwen2 },
    Family { architecture: "Qwen3MoeForCausalLM", model_type: "qwen3_moe", spec: qwen_moe::qwen3 },
    Family { architecture: "GemmaForCausalLM", model_type: "gemma", spec: gemma::gemma },
    Family { architecture: "Gemma2ForCausalLM", model_type: "gemma2", spec: gemma::gemma2 },
    Family { architecture: "Gemma3ForCausalLM", model_type: "gemma3_text", spec: gemma::gemma3 },
    Family { architecture: "Phi3ForCausalLM", model_type: "phi3", spec: phi3::spec },
    Family { architecture: "Olmo2ForCausalLM", model_type: "olmo2", spec: olmo::olmo2 },
    Family { architecture: "Olmo3ForCausalLM", model_type: "olmo3", spec: olmo::olmo3 },
    Family { architecture: "GraniteForCausalLM", model_type: "granite", spec: granite::spec },
    Family { architecture: "GlmForCausalLM", model_type: "glm", spec: glm::glm },
    Family { architecture: "Glm4ForCausalLM", model_type: "glm4", spec: glm::glm4 },
    Family { architecture: "Cohere2ForCausalLM", model_type: "cohere2", spec: cohere2::spec },
    Family { architecture: "Starcoder2ForCausalLM", model_type: "starcoder2", spec: starcoder2::spec },
    Family { architecture: "GptOssForCausalLM", model_type: "gpt_oss", spec: gpt_oss::spec },
    Family { architecture: "SmolLM3ForCausalLM", model_type: "smollm3", spec: smollm3::spec },
];

/// Models of several parts, by architecture and type, whose text part is one of the families: it alone is taken.
const WRAPPERS: [(&str, &str); 2] = [
    ("Gemma3ForConditionalGeneration", "gemma3"),
    ("Mistral3ForConditionalGeneration", "mistral3"),
];

/// What a wrapper says of its text part beside it.
const OF_THE_TEXT_PART: [&str; 4] = ["tie_word_embeddings", "eos_token_id", "dtype", "torch_dtype"];

/// Reads `folder`/config.json (and generation_config.json when there is one), or what stands for it in a GGUF file.
pub fn read_spec(folder: &Path) -> Result<DecoderSpec, LoadError> {
    check_folder(folder)?;
    let config = match gguf::is_gguf(folder) {
        true => Config::new(gguf::CONFIG, "", gguf::Model::open(folder)?.config()?),
        false => Config::read(folder, "config.json")?,
    };
    let generation = match folder.join("generation_config.json").exists() {
        true => Some(Config::read(folder, "generation_config.json")?),
        false => None,
    };
    let (config, wrapped) = match text_part(&config)? {
        Some(text) => (text, true),
        None => (config, false),
    };
    let mut spec = (family(&config)?.spec)(&config)?;
    spec.eos_tokens = match generation.as_ref().and_then(|g| g.get("eos_token_id").map(|_| g)) {
        Some(generation) => generation.token_ids("eos_token_id")?,
        None => config.token_ids("eos_token_id")?,
    };
    // Read, though generation_config.json's may stand for it.
    config.get("eos_token_id");
    spec.notes = config.finish()?;
    if wrapped {
        let note = "config.json: of this model its text part alone is served; images and sound are not taken";
        spec.notes.insert(0, note.to_owned());
    }
    Ok(spec)
}

/// What a GGUF's metadata describe, as a config.json.
pub fn described(config: Map<String, Value>) -> Result<DecoderSpec, LoadError> {
    let config = Config::new(gguf::CONFIG, "", config);
    let mut spec = (family(&config)?.spec)(&config)?;
    spec.eos_tokens = config.token_ids("eos_token_id")?;
    Ok(spec)
}

/// By its folder's config.json; of a model of several parts, the text part's.
pub fn model_type(folder: &Path) -> Result<&'static str, LoadError> {
    let config = Config::read(folder, "config.json")?;
    let text = text_part(&config)?;
    Ok(family(text.as_ref().unwrap_or(&config))?.model_type)
}

/// `text_config` of a wrapper.
fn text_part(config: &Config) -> Result<Option<Config>, LoadError> {
    let named = |field: &str, name: &str| match config.get(field) {
        Some(Value::Array(names)) => names.len() == 1 && names[0].as_str() == Some(name),
        value => value.and_then(Value::as_str) == Some(name),
    };
    let wraps = |(architecture, model_type): &(&str, &str)| match config.get("architectures") {
        Some(_) => named("architectures", architecture),
        None => named("model_type", model_type),
    };
    if !WRAPPERS.iter().any(wraps) {
        return Ok(None);
    }
    let Some(Value::Object(text)) = config.get("text_config") else {
        return Err(config.wrong("text_config", "an object is needed: what the text part is"));
    };
    let mut fields = text.clone();
    for field in OF_THE_TEXT_PART {
        if let Some(value) = config.get(field) {
            fields.insert(field.to_owned(), value.clone());
        }
    }
    Ok(Some(Config::new(config.file, "text_config.", fields)))
}

fn family(config: &Config) -> Result<&'static Family, LoadError> {
    let known = |name: fn(&Family) -> &'static str| FAMILIES.iter().map(name).collect::<Vec<_>>().join(", ");
    let model_type = match config.get("model_type") {
        None => None,
        Some(Value::String(model_type)) => Some(model_type.as_str()),
        Some(_) => return Err(config.wrong("model_type", "a word is needed")),
    };
    let architecture = match config.get("architectures") {
        None => None,
        Some(Value::Array(names)) if names.is_empty() => None,
        Some(Value::Array(names)) if names.len() == 1 && names[0].is_string() => names[0].as_str(),
        Some(_) => return Err(config.wrong("architectures", "a list of one architecture name is needed")),
    };
    let Some(architecture) = architecture else {
        let found = model_type.and_then(|word| FAMILIES.iter().find(|family| family.model_type == word));
        let why = format!("{} are supported", known(|family| family.model_type));
        return found.ok_or_else(|| config.wrong("model_type", &why));
    };
    let Some(family) = FAMILIES.iter().find(|family| family.architecture == architecture) else {
        let why = format!("only {} are supported", known(|family| family.architecture));
        return Err(config.wrong("architectures", &why));
    };
    match model_type {
        Some(word) if word != family.model_type => {
            let why = format!(
                "transformers would make another model of it than the {architecture} that `architectures` names; \
                 \"{}\" is supported with that",
                family.model_type
            );
            Err(config.wrong("model_type", &why))
        }
        _ => Ok(family),
    }
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
