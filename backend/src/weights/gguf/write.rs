//! A model as a GGUF file: its keys, its tensors' names, order and numbers. What the reader beside it makes of the keys must
//! be the same model again, or nothing is written. Reference: gguf-py/gguf/constants.py and convert_hf_to_gguf.py of
//! llama.cpp. Not here: the tokenizer's keys (text), the numbers themselves (`merge`).

use std::path::Path;

use tandem_core::gguf::{self as format, Metadata, TensorInfo, Value};
use tandem_kernels::rope::{RopeScaling, RopeSpec};
use tch::{Kind, Tensor};

use super::config::{self, Architecture, Facts, ROPE_FACTORS, llama3_factors};
use super::ggml::GgmlType;
use super::names::{Undo, tensor_name};
use crate::family::{self, Body, DecoderSpec, Head};
use crate::weights::{Checkpoint, LoadError};

/// What a file that is to be written holds.
pub struct Plan {
    /// Up to where the first tensor begins.
    pub head: Vec<u8>,
    pub tensors: Vec<Planned>,
    pub notes: Vec<String>,
}

pub enum Planned {
    /// Of the checkpoint.
    Stored {
        name: String,
        shape: Vec<i64>,
        kind: Kind,
        conversion: Conversion,
    },
    /// Part of the configuration.
    Numbers(Vec<f32>),
}

/// What conversion does to a tensor's numbers.
#[derive(Clone, Copy)]
pub struct Conversion(Undo);

impl Planned {
    pub fn bytes(&self) -> u64 {
        match self {
            Planned::Stored { shape, kind, .. } => {
                shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64
            }
            Planned::Numbers(numbers) => numbers.len() as u64 * 4,
        }
    }

    fn info(&self, name: String, offset: u64) -> TensorInfo {
        let (shape, kind) = match self {
            Planned::Stored { shape, kind, .. } => (shape.clone(), *kind),
            Planned::Numbers(numbers) => (vec![numbers.len() as i64], Kind::Float),
        };
        TensorInfo {
            name,
            shape,
            type_id: ggml_type(kind).id(),
            offset,
        }
    }
}

impl Conversion {
    pub fn of(self, tensor: Tensor) -> Tensor {
        match self.0 {
            Undo::Nothing => tensor,
            Undo::AddedOne => tensor + 1.0,
            Undo::PairedRows { .. } => {
                let rows = tensor.size()[0] as usize;
                let mut order = vec![0; rows];
                for row in 0..rows {
                    order[self.0.stored_row(row, rows)] = row as i64;
                }
                tensor.index_select(0, &Tensor::from_slice(&order))
            }
        }
    }
}

/// Of the model in the folder `base`, called `name`. `tokenizer`: keys that say how text becomes tokens.
pub fn plan(
    base: &Path,
    spec: &DecoderSpec,
    checkpoint: &Checkpoint,
    name: &str,
    tokenizer: Vec<(String, Value)>,
) -> Result<Plan, LoadError> {
    let model_type = family::model_type(base)?;
    let architecture = Architecture::of_model_type(model_type).ok_or_else(|| {
        let known = Architecture::model_types();
        cannot(format!(
            "models of the types {known} are written, this is a {model_type}"
        ))
    })?;
    let mut values = keys(architecture, spec, checkpoint, name);
    values.extend(tokenizer);
    add_ends(&mut values, &spec.eos_tokens);
    let factors = rope_factors(spec)?;
    let metadata = Metadata::new("the GGUF", &values);
    let facts = Facts {
        metadata: &metadata,
        vocab: spec.vocab,
        has_head: spec.head == Head::Own,
        has_biases: ["q_proj.bias", "up_proj.bias"].map(|name| {
            let params = spec.params();
            let mut tensors = params.iter().flat_map(|param| &param.tensors);
            tensors.any(|source| source.name.ends_with(name))
        }),
        rope_tensor: &|tensor| Ok(factors.clone().filter(|_| tensor == ROPE_FACTORS)),
    };
    let read = config::config(&facts)
        .map_err(LoadError::from)
        .and_then(family::described);
    let read = read.map_err(|error| cannot(format!("what would be written is refused: {error}")))?;
    check_same(architecture, spec, &read)?;
    let mut notes = vec![];
    for end in spec
        .eos_tokens
        .iter()
        .filter(|end| !read.eos_tokens.contains(end))
    {
        notes.push(format!(
            "token {end} ends answers of the base, and no key of a GGUF is left to say so: it will not there"
        ));
    }
    let (wiring, heads) = config::wiring(&metadata)?;
    let mut named: Vec<(String, Planned)> = vec![];
    named.extend(factors.map(|factors| (ROPE_FACTORS.to_owned(), Planned::Numbers(factors))));
    for param in spec.params() {
        for source in &param.tensors {
            let stored = checkpoint.stored_name(&source.name, spec.head);
            let shape = [&[source.rows], &param.shape[1..]].concat();
            let found = tensor_name(&source.name, wiring, heads).filter(|_| source.among.is_none());
            let (tensor, undo) =
                found.ok_or_else(|| cannot(format!("no name for `{}` is known there", source.name)))?;
            // As llama.cpp wants vectors.
            let kind = match shape.len() {
                1 => Kind::Float,
                _ => checkpoint.kind_of(checkpoint.table_name(stored)),
            };
            let planned = Planned::Stored {
                name: stored.to_owned(),
                shape,
                kind,
                conversion: Conversion(undo),
            };
            named.push((tensor, planned));
        }
    }
    let mut offset = 0;
    let (mut infos, mut tensors) = (vec![], vec![]);
    for (name, planned) in named {
        infos.push(planned.info(name, offset));
        offset = format::aligned(offset + planned.bytes());
        tensors.push(planned);
    }
    Ok(Plan {
        head: format::head(&values, &infos),
        tensors,
        notes,
    })
}

fn cannot(why: String) -> LoadError {
    LoadError::Folder(format!("no GGUF is written of this model: {why}"))
}

fn ggml_type(kind: Kind) -> GgmlType {
    match kind {
        Kind::BFloat16 => GgmlType::Bf16,
        Kind::Half => GgmlType::F16,
        _ => GgmlType::F32,
    }
}

/// gguf-py/gguf/constants.py, LlamaFileType.
fn file_type(kind: Kind) -> i128 {
    match kind {
        Kind::BFloat16 => 32,
        Kind::Half => 1,
        _ => 0,
    }
}

fn keys(
    architecture: &Architecture,
    spec: &DecoderSpec,
    checkpoint: &Checkpoint,
    name: &str,
) -> Vec<(String, Value)> {
    let attn = spec.attentions().next().expect("a decoder attends");
    let bodies = spec.sublayers.iter().flat_map(|sublayer| &sublayer.bodies);
    let inner = bodies.filter_map(|body| match body {
        Body::Mlp(mlp) => Some(mlp.inner),
        Body::Attention(_) | Body::Experts(_) => None,
    });
    let whole = |n: i64| Some(Value::Whole(n.into()));
    let text = |text: &str| Some(Value::Text(text.to_owned()));
    let rope = attn_rope(spec);
    let (kind, factor, original) = match &rope.scaling {
        RopeScaling::Linear { factor } => (text("linear"), Some(*factor), None),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            ..
        } => (
            text("yarn"),
            Some(*factor),
            Some(*original_max_position_embeddings),
        ),
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::LongRope { .. } => (None, None, None),
    };
    let window = spec.attentions().find_map(|attn| attn.window);
    // Without the key readers know a window of their own there; one of all positions is none.
    let window = window.or(architecture.wiring.is_gemma.then_some(spec.max_positions));
    let sliding = spec.ropes.get(1);
    let own = [
        ("vocab_size", whole(spec.vocab)),
        ("context_length", whole(spec.max_positions)),
        ("embedding_length", whole(spec.hidden)),
        ("block_count", whole(spec.attentions().count() as i64)),
        ("feed_forward_length", whole(inner.max().unwrap_or(0))),
        ("attention.head_count", whole(attn.heads)),
        ("attention.head_count_kv", whole(attn.kv_heads)),
        ("attention.key_length", whole(attn.head_dim)),
        ("attention.value_length", whole(attn.head_dim)),
        (
            "attention.layer_norm_rms_epsilon",
            Some(Value::Float(spec.final_norm.eps)),
        ),
        ("attention.sliding_window", window.and_then(whole)),
        ("attn_logit_softcapping", attn.cap.map(Value::Float)),
        ("final_logit_softcapping", spec.logits.cap.map(Value::Float)),
        ("rope.dimension_count", whole(rope.rotary_dim)),
        ("rope.freq_base", Some(Value::Float(rope.theta))),
        ("rope.freq_base_swa", sliding.map(|rope| Value::Float(rope.theta))),
        ("rope.scaling.type", kind),
        ("rope.scaling.factor", factor.map(Value::Float)),
        ("rope.scaling.original_context_length", original.and_then(whole)),
    ];
    let general = [
        ("general.architecture", text(architecture.name)),
        ("general.type", text("model")),
        ("general.name", text(name)),
        (
            "general.file_type",
            Some(Value::Whole(file_type(checkpoint.main_kind()))),
        ),
    ];
    let general = general.map(|(key, value)| (key.to_owned(), value));
    let own = own.map(|(key, value)| (format!("{}.{key}", architecture.name), value));
    let all = general.into_iter().chain(own);
    all.filter_map(|(key, value)| Some((key, value?))).collect()
}

/// Of layers that attend to everything.
fn attn_rope(spec: &DecoderSpec) -> &RopeSpec {
    spec.ropes
        .first()
        .expect("a model that a GGUF holds encodes positions")
}

/// Llama 3's rope is written as its factors alone.
fn rope_factors(spec: &DecoderSpec) -> Result<Option<Vec<f32>>, LoadError> {
    let rope = attn_rope(spec);
    match rope.scaling {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let factors = llama3_factors(
                rope.theta,
                rope.rotary_dim,
                factor,
                [low_freq_factor, high_freq_factor],
                original_max_position_embeddings as f64,
            );
            Ok(Some(factors.map(|factor| factor as f32).collect()))
        }
        RopeScaling::LongRope { .. } => Err(cannot("a rope of the kind longrope is not written".to_owned())),
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Yarn { .. } => Ok(None),
    }
}

/// Tokens that end an answer: the tokenizer's own, and under two more keys others that the model has.
fn add_ends(values: &mut Vec<(String, Value)>, ends: &[u32]) {
    let key = |name: &str| format!("tokenizer.ggml.{name}_token_id");
    let is_there = |values: &[(String, Value)], end: u32| {
        let named = ["eos", "eot", "eom"].map(key);
        (values.iter()).any(|(key, value)| named.contains(key) && *value == Value::Whole(end.into()))
    };
    for &end in ends {
        let free = ["eos", "eot", "eom"].map(key);
        let free = free
            .into_iter()
            .find(|name| values.iter().all(|(key, _)| key != name));
        if let Some(free) = free.filter(|_| !is_there(values, end)) {
            values.push((free, Value::Whole(end.into())));
        }
    }
}

/// Whoever reads the file computes what the folder says.
fn check_same(
    architecture: &Architecture,
    folder: &DecoderSpec,
    read: &DecoderSpec,
) -> Result<(), LoadError> {
    let plain = |spec: &DecoderSpec| {
        let spec = DecoderSpec {
            eos_tokens: vec![],
            notes: vec![],
            ..spec.clone()
        };
        format!("{spec:#?}")
    };
    let [folder, read] = [folder, read].map(plain);
    let differs = folder.lines().zip(read.lines()).find(|(own, read)| own != read);
    match differs {
        None if folder == read => Ok(()),
        differs => {
            let (own, read) = differs.unwrap_or_default();
            Err(cannot(format!(
                "of a {} it would be read as another one, with `{}` in place of `{}`",
                architecture.name,
                read.trim(),
                own.trim()
            )))
        }
    }
}
