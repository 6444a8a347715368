//! StarCoder 2: norms by mean and deviation, biases everywhere, an MLP without a gate. Source: transformers
//! models/starcoder2.

use tandem_kernels::activation::Activation;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{Bias, DecoderSpec, NormKind};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 49_152,
    hidden: 3072,
    inner: 12_288,
    layers: 30,
    heads: 24,
    kv_heads: Some(2),
    head_dim: None,
    max_positions: 4096,
};

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let window = sizes.seen(config.window(None)?);
    let bias = config.bias_or("use_bias", true)?;
    config.only("mlp_type", "default")?;
    config.only("norm_type", "layer_norm")?;
    let activation = config.activation("hidden_act", Activation::GeluTanh)?;
    let norms = Norms {
        kind: NormKind::Layer { bias: Bias::With },
        eps: config.epsilon("norm_epsilon", 1e-5)?,
    };
    let layer = |i: i64| {
        let at = format!("model.layers.{i}");
        let mut attn = sizes.attention(&format!("{at}.self_attn"), bias, bias);
        attn.window = window;
        let mlp = sizes.plain_mlp(&format!("{at}.mlp"), ["c_fc", "c_proj"], activation, bias);
        sizes.pre_norm_layer(norms, &at, attn, mlp)
    };
    let layers = (0..sizes.layers).flat_map(layer).collect();
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(true)?))
}
