//! Qwen 2, 2.5 and 3: Llama's layers with biases in q, k and v (2) or norms of queries and keys (3), and a window in the
//! upper layers where it is switched on. Source: transformers models/qwen2 and models/qwen3.

use tandem_kernels::activation::Activation;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{AttnSpec, Bias, DecoderSpec, NormKind};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 151_936,
    hidden: 4096,
    inner: 22_016,
    layers: 32,
    heads: 32,
    kv_heads: Some(32),
    head_dim: None,
    max_positions: 32_768,
};

pub(super) fn qwen2(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let attention = |_, module: &str| sizes.attention(module, Bias::With, Bias::Without);
    spec(config, sizes, attention)
}

pub(super) fn qwen3(config: &Config) -> Result<DecoderSpec, LoadError> {
    let head_dim = Some(128);
    let sizes = Sizes::read(config, Defaults { head_dim, ..DEFAULTS })?;
    let bias = config.bias("attention_bias")?;
    let attention = |norms, module: &str| AttnSpec {
        qk_norm: Some(sizes.head_norms(norms, module)),
        ..sizes.attention(module, bias, bias)
    };
    spec(config, sizes, attention)
}

fn spec(
    config: &Config,
    sizes: Sizes,
    attention: impl Fn(Norms, &str) -> AttnSpec,
) -> Result<DecoderSpec, LoadError> {
    let windows = windows(config, &sizes)?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-6)?,
    };
    let layer = |(i, window): (i64, Option<i64>)| {
        let at = format!("model.layers.{i}");
        let attn = AttnSpec {
            window,
            ..attention(norms, &format!("{at}.self_attn"))
        };
        let mlp = sizes.gated_mlp(&format!("{at}.mlp"), activation, Bias::Without);
        sizes.pre_norm_layer(norms, &at, attn, mlp)
    };
    let layers = (0..).zip(windows).flat_map(layer).collect();
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}

/// Where none is said.
pub(super) const WINDOW: Option<i64> = Some(4096);

/// Of each layer: none unless `use_sliding_window`, then from layer `max_window_layers` on.
fn windows(config: &Config, sizes: &Sizes) -> Result<Vec<Option<i64>>, LoadError> {
    let window = window(config, sizes, WINDOW)?;
    let first = config.count("max_window_layers", 28)?;
    let sliding = config.sliding_layers(sizes.layers, |i| window.is_some() && i >= first)?;
    Ok(sliding
        .into_iter()
        .map(|sliding| window.filter(|_| sliding))
        .collect())
}

/// None unless `use_sliding_window`.
pub(super) fn window(config: &Config, sizes: &Sizes, default: Option<i64>) -> Result<Option<i64>, LoadError> {
    if !config.flag("use_sliding_window")? {
        // Whatever it says: transformers writes 0 where there is none.
        config.get("sliding_window");
        return Ok(None);
    }
    Ok(sizes.seen(config.window(default)?))
}
