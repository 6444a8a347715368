//! A GGUF's metadata as the config.json of the same model, so that families read one kind of configuration. Reference:
//! gguf-py/gguf/constants.py (keys), convert_hf_to_gguf.py (where their values come from) and, for what llama.cpp knows
//! without a key, src/models of llama.cpp.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::f64::consts::TAU;

use serde_json::{Map, Value as Json, json};
use tandem_core::gguf::{GgufError, Metadata, Value};

use super::names::{Heads, Wiring};

const ARCHITECTURE: &str = "general.architecture";
const TOKENS: &str = "tokenizer.ggml.tokens";
/// One factor for each pair of a head, by which its frequency is divided.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";
pub const LONG_FACTORS: &str = "rope_factors_long.weight";
pub const SHORT_FACTORS: &str = "rope_factors_short.weight";

/// What there is beside the metadata that a configuration says.
pub struct Facts<'a> {
    pub metadata: &'a Metadata,
    pub vocab: i64,
    pub has_head: bool,
    /// Of attention and of the MLP: no key says it.
    pub has_biases: [bool; 2],
    /// The numbers of one of the rope tensors, where it is there.
    pub rope_tensor: &'a ReadTensor<'a>,
}

type ReadTensor<'a> = dyn Fn(&str) -> Result<Option<Vec<f32>>, GgufError> + 'a;

pub struct Architecture {
    /// In `general.architecture`, and before the keys.
    pub name: &'static str,
    class: &'static str,
    model_type: &'static str,
    pub wiring: Wiring,
    /// What is its own.
    more: fn(&Keys, &mut Map<String, Json>) -> Result<(), GgufError>,
}

const PLAIN: Wiring = Wiring {
    pairs_rows: false,
    is_gemma: false,
    fuses_gate: false,
};
const GEMMA: Wiring = Wiring {
    is_gemma: true,
    ..PLAIN
};

const ARCHITECTURES: [Architecture; 6] = [
    // Llama, Mistral, SmolLM: what convert_hf_to_gguf.py writes under this name has no windows.
    Architecture {
        name: "llama",
        class: "LlamaForCausalLM",
        model_type: "llama",
        wiring: Wiring {
            pairs_rows: true,
            ..PLAIN
        },
        more: |_, _| Ok(()),
    },
    Architecture {
        name: "qwen2",
        class: "Qwen2ForCausalLM",
        model_type: "qwen2",
        wiring: PLAIN,
        more: |_, _| Ok(()),
    },
    Architecture {
        name: "qwen3",
        class: "Qwen3ForCausalLM",
        model_type: "qwen3",
        wiring: PLAIN,
        more: |_, _| Ok(()),
    },
    Architecture {
        name: "gemma2",
        class: "Gemma2ForCausalLM",
        model_type: "gemma2",
        wiring: GEMMA,
        more: |keys, config| gemma(keys, config, 46),
    },
    Architecture {
        name: "gemma3",
        class: "Gemma3ForCausalLM",
        model_type: "gemma3_text",
        wiring: GEMMA,
        more: |keys, config| gemma(keys, config, 62),
    },
    Architecture {
        name: "phi3",
        class: "Phi3ForCausalLM",
        model_type: "phi3",
        wiring: Wiring {
            fuses_gate: true,
            ..PLAIN
        },
        more: phi3,
    },
];

/// A model without a window, which Mistral mostly is, is a Llama to llama.cpp.
const ALSO: [(&str, &str); 1] = [("mistral", "llama")];

impl Architecture {
    /// What a model of a config.json's type is written as.
    pub fn of_model_type(model_type: &str) -> Option<&'static Architecture> {
        let also = ALSO.iter().find(|(other, _)| *other == model_type);
        let known = also.map_or(model_type, |(_, known)| known);
        ARCHITECTURES
            .iter()
            .find(|architecture| architecture.model_type == known)
    }

    /// For errors.
    pub fn model_types() -> String {
        let types = ARCHITECTURES.iter().map(|architecture| architecture.model_type);
        let types: Vec<&str> = types.chain(ALSO.map(|(other, _)| other)).collect();
        types.join(", ")
    }
}

/// Keys that change no number, or say again what others say.
const HARMLESS: [&str; 4] = [
    "vocab_size",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "attention.causal",
];

/// Control tokens that end an answer, whatever `eos_token_id` says: llama.cpp finds them by their text, too
/// (src/llama-vocab.cpp, special_eog_ids).
const ENDS: [&str; 10] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
];
/// tokenizer.ggml.token_type of a control token.
const CONTROL: i64 = 3;

/// The metadata under one architecture's name, and which of it was read.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'static Architecture,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    fn new(metadata: &'a Metadata) -> Result<Keys<'a>, GgufError> {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
        let known = known.join(", ");
        if let Some(kind) = metadata.text("general.type")?
            && kind != "model"
        {
            return Err(metadata.wrong("general.type", "a file of type \"model\" is needed"));
        }
        let name = metadata.text(ARCHITECTURE)?;
        let name = name.ok_or_else(|| metadata.missing(ARCHITECTURE, &format!("{known} are supported")))?;
        let architecture = ARCHITECTURES.iter().find(|known| known.name == name);
        let architecture =
            architecture.ok_or_else(|| metadata.wrong(ARCHITECTURE, &format!("{known} are supported")))?;
        Ok(Keys {
            metadata,
            architecture,
            read: RefCell::default(),
        })
    }

    fn key(&self, name: &str) -> String {
        self.read.borrow_mut().insert(name.to_owned());
        format!("{}.{name}", self.architecture.name)
    }

    fn wrong(&self, name: &str, why: &str) -> GgufError {
        self.metadata.wrong(&self.key(name), why)
    }

    fn whole(&self, name: &str) -> Result<Option<i64>, GgufError> {
        let key = self.key(name);
        match self.metadata.get(&key) {
            // One for each layer: taken where all are one.
            Some(Value::Wholes(list)) => match list.split_first() {
                Some((first, rest)) if rest.iter().all(|n| n == first) => Ok(Some(*first)),
                _ => Err(self.wrong(name, "layers that differ from each other are not supported")),
            },
            _ => self.metadata.whole(&key),
        }
    }

    fn size(&self, name: &str) -> Result<i64, GgufError> {
        match self.whole(name)? {
            Some(0) => Err(self.wrong(name, "a number above 0 is needed")),
            Some(n) => Ok(n),
            None => Err(self.metadata.missing(&self.key(name), "a model has it")),
        }
    }

    fn float(&self, name: &str) -> Result<Option<f64>, GgufError> {
        self.metadata.float(&self.key(name))
    }

    fn heads(&self) -> Result<Heads, GgufError> {
        let q = self.size("attention.head_count")?;
        let k = match self.whole("attention.head_count_kv")? {
            None => q,
            Some(_) => self.size("attention.head_count_kv")?,
        };
        Ok(Heads { q, k })
    }

    fn head_dim(&self) -> Result<i64, GgufError> {
        let (hidden, heads) = (self.size("embedding_length")?, self.heads()?.q);
        let head_dim = match self.whole("attention.key_length")? {
            Some(_) => self.size("attention.key_length")?,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                let why = format!("no whole number of {heads} heads");
                return Err(self.wrong("embedding_length", &why));
            }
        };
        match self.whole("attention.value_length")? {
            Some(value) if value != head_dim => {
                let why = format!("other lengths than those of keys ({head_dim}) are not supported");
                Err(self.wrong("attention.value_length", &why))
            }
            _ => Ok(head_dim),
        }
    }

    /// Refuses what was not read and may change numbers; the rest keeps its name, for the log.
    fn rest(&self) -> Result<Vec<(String, Json)>, GgufError> {
        let prefix = format!("{}.", self.architecture.name);
        let read = self.read.borrow().clone();
        let mut rest = vec![];
        for key in self.metadata.keys() {
            let Some(name) = key.strip_prefix(&prefix).filter(|name| !read.contains(*name)) else {
                continue;
            };
            if HARMLESS.contains(&name) || self.is_off(key) {
                continue;
            }
            if ["rope", "attention", "expert", "ssm"]
                .iter()
                .any(|part| name.starts_with(part))
            {
                return Err(self.wrong(name, "this key is not supported: answers would differ without it"));
            }
            rest.push((key.to_owned(), Json::Bool(true)));
        }
        Ok(rest)
    }

    fn is_off(&self, key: &str) -> bool {
        match self.metadata.get(key) {
            Some(Value::Whole(n)) => *n == 0,
            Some(Value::Float(x)) => *x == 0.0,
            Some(Value::Flag(flag)) => !flag,
            _ => false,
        }
    }
}

/// What undoes this file's conversion.
pub fn wiring(metadata: &Metadata) -> Result<(Wiring, Heads), GgufError> {
    let keys = Keys::new(metadata)?;
    Ok((keys.architecture.wiring, keys.heads()?))
}

pub fn config(facts: &Facts) -> Result<Map<String, Json>, GgufError> {
    let keys = Keys::new(facts.metadata)?;
    let Architecture {
        class,
        model_type,
        more,
        ..
    } = keys.architecture;
    let heads = keys.heads()?;
    let head_dim = keys.head_dim()?;
    let mut config = Map::from_iter([
        ("architectures".to_owned(), json!([class])),
        ("model_type".to_owned(), json!(model_type)),
        ("vocab_size".to_owned(), json!(facts.vocab)),
        ("hidden_size".to_owned(), json!(keys.size("embedding_length")?)),
        (
            "intermediate_size".to_owned(),
            json!(keys.size("feed_forward_length")?),
        ),
        ("num_hidden_layers".to_owned(), json!(keys.size("block_count")?)),
        ("num_attention_heads".to_owned(), json!(heads.q)),
        ("num_key_value_heads".to_owned(), json!(heads.k)),
        ("head_dim".to_owned(), json!(head_dim)),
        (
            "max_position_embeddings".to_owned(),
            json!(keys.size("context_length")?),
        ),
        ("tie_word_embeddings".to_owned(), json!(!facts.has_head)),
    ]);
    let eps = "attention.layer_norm_rms_epsilon";
    let value = keys.float(eps)?;
    let value = value.ok_or_else(|| facts.metadata.missing(&keys.key(eps), "a model has it"))?;
    config.insert("rms_norm_eps".to_owned(), json!(value));
    let ends = ends(facts)?;
    if !ends.is_empty() {
        config.insert("eos_token_id".to_owned(), json!(ends));
    }
    if let Some(window) = keys
        .whole("attention.sliding_window")?
        .filter(|&window| window > 0)
    {
        config.insert("sliding_window".to_owned(), json!(window));
    }
    // Where the family may have them or not.
    if ["llama", "qwen3"].contains(model_type) {
        for (field, has) in ["attention_bias", "mlp_bias"].into_iter().zip(facts.has_biases) {
            if has {
                config.insert(field.to_owned(), json!(true));
            }
        }
    }
    rope(&keys, facts, head_dim, &mut config)?;
    more(&keys, &mut config)?;
    config.extend(keys.rest()?);
    Ok(config)
}

/// End-of-sequence tokens: those with a key, first, and those known by their text.
fn ends(facts: &Facts) -> Result<Vec<u32>, GgufError> {
    let metadata = facts.metadata;
    let tokens = metadata.texts(TOKENS)?.unwrap_or(&[]);
    let named = ["eos", "eot", "eom"].map(|name| format!("tokenizer.ggml.{name}_token_id"));
    let mut ends = metadata.token_ids(&named.each_ref().map(String::as_str), facts.vocab as usize)?;
    let types = metadata.wholes("tokenizer.ggml.token_type")?.unwrap_or(&[]);
    for (id, token) in (0..).zip(tokens) {
        let is_control = types.get(id as usize) == Some(&CONTROL);
        if is_control && ENDS.contains(&token.as_str()) && !ends.contains(&id) {
            ends.push(id);
        }
    }
    Ok(ends)
}

fn rope(keys: &Keys, facts: &Facts, head_dim: i64, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    config.insert("rope_theta".to_owned(), json!(theta));
    if let Some(rotary) = keys
        .whole("rope.dimension_count")?
        .filter(|&rotary| rotary != head_dim)
    {
        config.insert(
            "partial_rotary_factor".to_owned(),
            json!(rotary as f64 / head_dim as f64),
        );
    }
    let factor = match keys.float("rope.scaling.factor")? {
        None => keys.float("rope.scale_linear")?,
        factor => factor,
    };
    let original = keys.whole("rope.scaling.original_context_length")?;
    let kind = facts.metadata.text(&keys.key("rope.scaling.type"))?;
    let factors = (facts.rope_tensor)(ROPE_FACTORS)?;
    let (short, long) = (
        (facts.rope_tensor)(SHORT_FACTORS)?,
        (facts.rope_tensor)(LONG_FACTORS)?,
    );
    let scaling = match (kind, factors, short, long) {
        (None | Some("none"), Some(factors), None, None) => llama3(keys, &factors, theta, head_dim)?,
        (None | Some("none" | "longrope"), None, Some(short), Some(long)) => {
            // Conversion writes the factor that follows from the lengths, rounded to float32.
            let (long_context, short_context) = (keys.size("context_length")?, original.unwrap_or(0));
            let stretched = (long_context as f64 / short_context as f64).ln();
            let follows = (1.0 + stretched / (short_context as f64).ln()).sqrt();
            let differs = |factor: &f64| (factor / follows - 1.0).abs() > 1e-6 || follows.is_nan();
            let attention = keys.float("rope.scaling.attn_factor")?.filter(differs);
            json!({"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention})
        }
        (None | Some("none"), None, None, None)
            if factor.is_none_or(|factor| factor == 1.0 || factor == 0.0) =>
        {
            return Ok(());
        }
        (None | Some("linear"), None, None, None) => json!({"rope_type": "linear", "factor": factor}),
        (Some("yarn"), None, None, None) => {
            json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original})
        }
        (Some("none" | "linear" | "yarn" | "longrope") | None, ..) => {
            let why = format!(
                "it cannot be read together with the tensors {ROPE_FACTORS}, {SHORT_FACTORS}, {LONG_FACTORS} that are there"
            );
            return Err(keys.wrong("rope.scaling.type", &why));
        }
        (Some(_), ..) => {
            return Err(keys.wrong("rope.scaling.type", "none, linear, yarn and longrope are known"));
        }
    };
    if let Some(original) = original {
        config.insert("original_max_position_embeddings".to_owned(), json!(original));
    }
    config.insert("rope_scaling".to_owned(), scaling);
    Ok(())
}

/// Conversion writes Llama 3's rope as its factors alone. All checkpoints that have it share three of its four numbers, and
/// the fourth is the largest factor; where these do not give the factors that are stored, it is another kind of rope.
fn llama3(keys: &Keys, factors: &[f32], theta: f64, head_dim: i64) -> Result<Json, GgufError> {
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let factor = factors.iter().copied().fold(1.0, f32::max).round();
    let expected: Vec<f64> = llama3_factors(theta, head_dim, factor.into(), [low, high], original).collect();
    let is_known = factors.len() as i64 == head_dim / 2
        && (factors.iter().enumerate())
            .all(|(pair, &found)| (f64::from(found) / expected[pair] - 1.0).abs() < 1e-3);
    match is_known {
        true => Ok(json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original as i64,
        })),
        false => Err(GgufError {
            file: keys.metadata.file().to_owned(),
            message: format!(
                "tensor `{ROPE_FACTORS}`: its {} factors are not those of Llama 3's rope (low 1, high 4, original context 8192, \
                 factor {factor}), and no other is supported",
                factors.len()
            ),
        }),
    }
}

/// By what the frequency of each pair of a head is divided. Source: transformers modeling_rope_utils.py,
/// _compute_llama3_parameters. `bounds`: the low and the high frequency's factor.
pub fn llama3_factors(
    theta: f64,
    head_dim: i64,
    factor: f64,
    [low, high]: [f64; 2],
    original: f64,
) -> impl Iterator<Item = f64> {
    (0..head_dim / 2).map(move |pair| {
        let turns = original / (TAU * theta.powf(2.0 * pair as f64 / head_dim as f64));
        match turns {
            turns if turns > high => 1.0,
            turns if turns < low => factor,
            turns => {
                let smooth = (turns - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        }
    })
}

/// llama.cpp knows the largest of a Gemma's sizes by its number of layers; it alone scales by another length than a head's.
fn gemma(keys: &Keys, config: &mut Map<String, Json>, layers_of_27b: i64) -> Result<(), GgufError> {
    let scalar = match keys.size("block_count")? == layers_of_27b {
        true => keys.size("embedding_length")? / keys.heads()?.q,
        false => keys.head_dim()?,
    };
    config.insert("query_pre_attn_scalar".to_owned(), json!(scalar));
    for (key, field) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("rope.freq_base_swa", "rope_local_base_freq"),
    ] {
        if let Some(value) = keys.float(key)? {
            config.insert(field.to_owned(), json!(value));
        }
    }
    Ok(())
}

fn phi3(keys: &Keys, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    // Its rope keeps the length of a head, unless it is partial.
    keys.float("rope.scaling.attn_factor")?;
    config
        .entry("original_max_position_embeddings")
        .or_insert(json!(keys.size("context_length")?));
    Ok(())
}
