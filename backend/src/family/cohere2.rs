//! Command R7B and A (Cohere 2): attention and MLP side by side behind one norm by mean and deviation; rope over
//! neighbouring pairs in the layers with a window, none in the others; scaled logits. Source: transformers models/cohere2.

use tandem_kernels::activation::Activation;
use tandem_kernels::rope::RopeLayout;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{Bias, Body, DecoderSpec, NormKind, Sublayer};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 256_000,
    hidden: 8192,
    inner: 22_528,
    layers: 40,
    heads: 64,
    kv_heads: None,
    head_dim: None,
    max_positions: 8192,
};

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let window = config.window(Some(4096))?;
    let pattern = config.size("sliding_window_pattern", 4)?;
    let sliding = config.sliding_layers(sizes.layers, |i| (i + 1) % pattern != 0)?;
    let attention_bias = config.bias("attention_bias")?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let norms = Norms {
        kind: NormKind::Layer { bias: Bias::Without },
        eps: config.epsilon("layer_norm_eps", 1e-5)?,
    };
    let layer = |(i, sliding): (i64, bool)| {
        let at = format!("model.layers.{i}");
        let mut attn = sizes.attention(&format!("{at}.self_attn"), attention_bias, attention_bias);
        let window = window.filter(|_| sliding);
        // Where the window is none, transformers leaves the rope away too.
        attn.rope = window.map(|_| 0);
        attn.window = sizes.seen(window);
        let mlp = sizes.gated_mlp(&format!("{at}.mlp"), activation, Bias::Without);
        let norm = sizes.norm(norms, format!("{at}.input_layernorm"));
        Sublayer {
            bodies: vec![Body::Attention(attn), Body::Mlp(mlp)],
            pre: Some(norm),
            post: None,
            scale: 1.0,
        }
    };
    let layers = (0..).zip(sliding).map(layer).collect();
    // Rope over pairs of neighbours, as below.
    config.only("position_embedding_type", "rope_gptj")?;
    config.only("use_gated_activation", true)?;
    config.only("use_parallel_block", true)?;
    config.only("use_qk_norm", false)?;
    config.only("order_of_interleaved_layers", "local_attn_first")?;
    let rope = RopeDefaults {
        layout: RopeLayout::Interleaved,
        ..RopeDefaults::default()
    };
    let ropes = vec![config.rope(&sizes, rope)?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    let mut spec = sizes.decoder(layers, ropes, norm, config.head(true)?);
    spec.logits.scale = config.positive("logit_scale")?.unwrap_or(0.0625);
    Ok(spec)
}
