//! Llama 2 and 3.x (and what is wired like them). Source: transformers models/llama/configuration_llama.py, whose defaults
//! stand for absent fields.

use tandem_kernels::activation::Activation;

use super::config::Config;
use super::spec::Projections;
use super::{AttnSpec, Body, DecoderSpec, Head, MlpSpec, NormSpec, Sublayer};
use crate::weights::LoadError;

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let hidden = config.size("hidden_size", 4096)?;
    let heads = config.size("num_attention_heads", 32)?;
    let kv_heads = config.size("num_key_value_heads", heads)?;
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
    let max_positions = config.size("max_position_embeddings", 2048)?;
    config.no_window(max_positions)?;
    let attention_bias = config.bias("attention_bias")?;
    let inner = config.size("intermediate_size", 11_008)?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let mlp_bias = config.bias("mlp_bias")?;
    let eps = config.epsilon("rms_norm_eps", 1e-6)?;
    let norm = |path: String| NormSpec { path, eps };
    let layer = |i: i64| {
        let at = format!("model.layers.{i}");
        let (qkv, output) = Projections {
            module: &format!("{at}.self_attn"),
            hidden,
            heads,
            kv_heads,
            head_dim,
            qkv_bias: attention_bias,
            o_bias: attention_bias,
        }
        .linears();
        let attn = AttnSpec {
            heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5),
            rope: 0,
            qkv,
            output,
        };
        let mlp = MlpSpec::gated(&format!("{at}.mlp"), hidden, inner, activation, mlp_bias);
        [
            Sublayer {
                norm: norm(format!("{at}.input_layernorm")),
                body: Body::Attention(attn),
            },
            Sublayer {
                norm: norm(format!("{at}.post_attention_layernorm")),
                body: Body::Mlp(mlp),
            },
        ]
    };
    Ok(DecoderSpec {
        vocab: config.size("vocab_size", 32_000)?,
        hidden,
        sublayers: (0..config.size("num_hidden_layers", 32)?)
            .flat_map(layer)
            .collect(),
        ropes: vec![config.rope(head_dim, max_positions)?],
        final_norm: norm("model.norm".to_owned()),
        head: if config.flag("tie_word_embeddings")? {
            Head::Tied
        } else {
            Head::Own
        },
        max_positions,
        eos_tokens: vec![],
        notes: vec![],
    })
}
