//! Mistral and Ministral: Llama's layers with a window, in every layer or where `layer_types` says. Source: transformers
//! models/mistral and models/ministral.

use tandem_kernels::activation::Activation;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{Bias, DecoderSpec, NormKind};
use crate::weights::LoadError;

pub(super) const DEFAULTS: Defaults = Defaults {
    vocab: 32_000,
    hidden: 4096,
    inner: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: Some(8),
    head_dim: None,
    max_positions: 131_072,
};

pub(super) fn mistral(config: &Config) -> Result<DecoderSpec, LoadError> {
    spec(config, |layers| Ok(vec![true; layers as usize]))
}

pub(super) fn ministral(config: &Config) -> Result<DecoderSpec, LoadError> {
    spec(config, |layers| config.sliding_layers(layers, |_| true))
}

fn spec(
    config: &Config,
    sliding: impl Fn(i64) -> Result<Vec<bool>, LoadError>,
) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let window = sizes.seen(config.window(Some(4096))?);
    let sliding = sliding(sizes.layers)?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-6)?,
    };
    let layer = |(i, sliding): (i64, bool)| {
        let at = format!("model.layers.{i}");
        let mut attn = sizes.attention(&format!("{at}.self_attn"), Bias::Without, Bias::Without);
        attn.window = window.filter(|_| sliding);
        let mlp = sizes.gated_mlp(&format!("{at}.mlp"), activation, Bias::Without);
        sizes.pre_norm_layer(norms, &at, attn, mlp)
    };
    let layers = (0..).zip(sliding).flat_map(layer).collect();
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}
