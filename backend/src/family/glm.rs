//! GLM 4: gate and up in one tensor, biases in q, k and v, the first half of a head turning in neighbouring pairs; the
//! 0414 releases also have a norm behind each body. Source: transformers models/glm and models/glm4.

use tandem_kernels::activation::Activation;
use tandem_kernels::rope::RopeLayout;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{Bias, DecoderSpec, NormKind, Sublayer};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 151_552,
    hidden: 4096,
    inner: 13_696,
    layers: 40,
    heads: 32,
    kv_heads: Some(2),
    head_dim: Some(128),
    max_positions: 131_072,
};

pub(super) fn glm(config: &Config) -> Result<DecoderSpec, LoadError> {
    spec(config, |_, sublayer, _| sublayer)
}

pub(super) fn glm4(config: &Config) -> Result<DecoderSpec, LoadError> {
    spec(config, |post, sublayer, norm| Sublayer {
        post: Some(norm(post)),
        ..sublayer
    })
}

/// `finish` takes the name of the norm behind a sublayer, the sublayer without it, and what makes a norm of a name.
fn spec(
    config: &Config,
    finish: impl Fn(&str, Sublayer, &dyn Fn(&str) -> super::NormSpec) -> Sublayer,
) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let qkv_bias = config.bias_or("attention_bias", true)?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1.5625e-7)?,
    };
    let layer = |i: i64| {
        let at = format!("model.layers.{i}");
        let attn = sizes.attention(&format!("{at}.self_attn"), qkv_bias, Bias::Without);
        let mlp = sizes.fused_mlp(&format!("{at}.mlp"), activation);
        let [attn, mlp] = sizes.pre_norm_layer(norms, &at, attn, mlp);
        let norm = |name: &str| sizes.norm(norms, format!("{at}.{name}"));
        [
            finish("post_self_attn_layernorm", attn, &norm),
            finish("post_mlp_layernorm", mlp, &norm),
        ]
    };
    let layers = (0..sizes.layers).flat_map(layer).collect();
    let rope = RopeDefaults {
        partial: Some(0.5),
        layout: RopeLayout::Interleaved,
        ..RopeDefaults::default()
    };
    let ropes = vec![config.rope(&sizes, rope)?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}
