//! Llama 2 and 3.x (and what is wired like them). Source: transformers models/llama/configuration_llama.py.

use super::{AttnSpec, Config, DecoderSpec, Head, LayerSpec, MlpSpec};
use crate::weights::LoadError;

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.size_or_none("num_key_value_heads")?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        let why = format!("{heads} attention heads are not a multiple of it");
        return Err(config.wrong("num_key_value_heads", &why));
    }
    let head_dim = match config.size_or_none("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            return Err(config.wrong(
                "hidden_size",
                &format!("is not a multiple of {heads} attention heads"),
            ));
        }
    };
    if head_dim % 2 != 0 {
        return Err(config.wrong(
            "head_dim",
            &format!("{head_dim} is odd; rotary embedding needs pairs"),
        ));
    }
    let attention_bias = config.bias("attention_bias")?;
    let layer = LayerSpec {
        attn: AttnSpec {
            heads,
            kv_heads,
            head_dim,
            qkv_bias: attention_bias,
            o_bias: attention_bias,
            rope: config.rope(head_dim)?,
            scale: (head_dim as f64).powf(-0.5),
        },
        mlp: MlpSpec {
            inner: config.size("intermediate_size")?,
            activation: config.activation("hidden_act")?,
            bias: config.bias("mlp_bias")?,
        },
    };
    Ok(DecoderSpec {
        vocab: config.size("vocab_size")?,
        hidden,
        layers: vec![layer; config.size("num_hidden_layers")? as usize],
        norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6),
        head: if config.flag("tie_word_embeddings")? {
            Head::Tied
        } else {
            Head::Own
        },
        max_positions: config.size("max_position_embeddings")?,
        eos_tokens: vec![],
    })
}
