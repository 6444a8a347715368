//! Phi 3, 3.5 and 4: Llama's layers with fused tensors, heads that turn in part, and longrope. Source: transformers
//! models/phi3.

use tandem_kernels::activation::Activation;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{DecoderSpec, NormKind};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 32_064,
    hidden: 3072,
    inner: 8192,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    max_positions: 4096,
};

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let window = sizes.seen(config.window(None)?);
    // Of longrope, where there is one.
    config.size_or_none("original_max_position_embeddings")?;
    config.only("interpolate_factor", 1)?;
    config.only("full_attn_mod", 1)?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-5)?,
    };
    let layer = |i: i64| {
        let at = format!("model.layers.{i}");
        let mut attn = sizes.fused_attention(&format!("{at}.self_attn"));
        attn.window = window;
        let mlp = sizes.fused_mlp(&format!("{at}.mlp"), activation);
        sizes.pre_norm_layer(norms, &at, attn, mlp)
    };
    let layers = (0..sizes.layers).flat_map(layer).collect();
    let rope = RopeDefaults {
        partial: Some(1.0),
        ..RopeDefaults::default()
    };
    let ropes = vec![config.rope(&sizes, rope)?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}
