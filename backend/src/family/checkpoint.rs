//! A model's config.json and its weights laid beside each other. Not here: how a tensor is read (weights), what a spec is.

use std::collections::HashSet;
use std::path::Path;

use super::{DecoderSpec, Head, read_spec};
use crate::weights::{Checkpoint, EMBED, HEAD, LoadError};

/// Opens a model's folder. A tensor that the config has no place for was trained to be used, so a model without it would
/// answer otherwise: it is refused.
pub fn open(folder: &Path) -> Result<(DecoderSpec, Checkpoint), LoadError> {
    let mut spec = read_spec(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    spec.notes.extend(checkpoint.notes().iter().cloned());
    if spec.head == Head::Tied && checkpoint.differ(EMBED, HEAD) {
        spec.head = Head::Own;
        spec.notes.push(format!(
            "config.json: `tie_word_embeddings` is true, but `{HEAD}` and `{EMBED}` are stored with different numbers: the \
             stored head is taken, as in transformers 5; false says so"
        ));
    }
    check_all_read(&spec, &checkpoint)?;
    Ok((spec, checkpoint))
}

/// Tensors to name in an error.
const SHOWN: usize = 3;

fn check_all_read(spec: &DecoderSpec, checkpoint: &Checkpoint) -> Result<(), LoadError> {
    let params = spec.params();
    let tensors = params.iter().flat_map(|param| &param.tensors);
    let known: HashSet<&str> = tensors.map(|source| source.name.as_str()).collect();
    let unread: Vec<&str> = checkpoint
        .names()
        .filter(|name| !known.contains(name) && !is_computed(name))
        // A tied table under its second name.
        .filter(|name| !(spec.head == Head::Tied && *name == HEAD))
        .collect();
    let Some(first) = unread.first() else {
        return Ok(());
    };
    let is_bias = |name: &&str| {
        let module = name.strip_suffix(".bias");
        module.is_some_and(|module| known.contains(format!("{module}.weight").as_str()))
    };
    let layers = spec.attentions().count();
    let hint = match layer_of(first) {
        Some(layer) if layer >= layers => format!("`num_hidden_layers` in config.json is {layers}"),
        _ if unread.iter().all(is_bias) => {
            "`attention_bias` and `mlp_bias` in config.json say where biases are".to_owned()
        }
        _ => "config.json describes a model without it".to_owned(),
    };
    let shown = unread.iter().take(SHOWN).map(|name| format!("`{name}`"));
    let more = match unread.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Err(LoadError::Weights {
        file: checkpoint.file_of(first).to_owned(),
        message: format!(
            "no part of this model: {}{more} ({hint}); a model made without what was trained would answer otherwise",
            shown.collect::<Vec<_>>().join(", ")
        ),
    })
}

/// Buffers that old versions of transformers stored and new ones compute, as we do.
fn is_computed(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

/// 3 of `model.layers.3.mlp.up_proj.weight`
pub fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}
