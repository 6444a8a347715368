//! Llama 1 to 3.x (and what is wired like them). Source: transformers models/llama/configuration_llama.py, whose defaults
//! stand for absent fields.

use tandem_kernels::activation::Activation;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{DecoderSpec, NormKind};
use crate::weights::LoadError;

pub(super) const DEFAULTS: Defaults = Defaults {
    vocab: 32_000,
    hidden: 4096,
    inner: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    max_positions: 2048,
};

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    config.no_window(sizes.reach)?;
    let attention_bias = config.bias("attention_bias")?;
    let mlp_bias = config.bias("mlp_bias")?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-6)?,
    };
    let layer = |i: i64| {
        let at = format!("model.layers.{i}");
        let attn = sizes.attention(&format!("{at}.self_attn"), attention_bias, attention_bias);
        let mlp = sizes.gated_mlp(&format!("{at}.mlp"), activation, mlp_bias);
        sizes.pre_norm_layer(norms, &at, attn, mlp)
    };
    let layers = (0..sizes.layers).flat_map(layer).collect();
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}
