//! SmolLM 3: Llama with layers that do not encode positions. Source: transformers models/smollm3.

use serde_json::Value;
use tandem_kernels::activation::Activation;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{DecoderSpec, NormKind, qwen};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 128_256,
    hidden: 2048,
    inner: 11_008,
    layers: 36,
    heads: 16,
    kv_heads: Some(4),
    head_dim: None,
    max_positions: 32_768,
};

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let rotated = rotated_layers(config, sizes.layers)?;
    let window = qwen::window(config, &sizes, None)?;
    config.get("max_window_layers");
    let sliding = config.sliding_layers(sizes.layers, |i| !rotated[i as usize])?;
    let attention_bias = config.bias("attention_bias")?;
    let mlp_bias = config.bias("mlp_bias")?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-6)?,
    };
    let layer = |(i, (rotated, sliding)): (i64, (bool, bool))| {
        let at = format!("model.layers.{i}");
        let mut attn = sizes.attention(&format!("{at}.self_attn"), attention_bias, attention_bias);
        attn.rope = rotated.then_some(0);
        attn.window = window.filter(|_| sliding);
        let mlp = sizes.gated_mlp(&format!("{at}.mlp"), activation, mlp_bias);
        sizes.pre_norm_layer(norms, &at, attn, mlp)
    };
    let layers = (0..)
        .zip(rotated.iter().copied().zip(sliding))
        .flat_map(layer)
        .collect();
    let rope = RopeDefaults {
        theta: 2_000_000.0,
        ..RopeDefaults::default()
    };
    let ropes = vec![config.rope(&sizes, rope)?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(true)?))
}

/// `no_rope_layers`, where 1 says that a layer has rope; without it every `no_rope_layer_interval`-th has none.
fn rotated_layers(config: &Config, layers: i64) -> Result<Vec<bool>, LoadError> {
    let (field, interval) = ("no_rope_layers", config.size("no_rope_layer_interval", 4)?);
    let Some(listed) = config.get(field) else {
        return Ok((0..layers).map(|i| (i + 1) % interval != 0).collect());
    };
    let wrong = || {
        config.wrong(
            field,
            &format!("a list of 0 and 1 is needed, a number for each of {layers} layers"),
        )
    };
    let numbers = listed.as_array().ok_or_else(wrong)?;
    if (numbers.len() as i64) < layers {
        return Err(wrong());
    }
    let rotated = |number: &Value| match number.as_i64() {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => Err(wrong()),
    };
    numbers.iter().take(layers as usize).map(rotated).collect()
}
