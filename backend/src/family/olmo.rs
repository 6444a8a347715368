//! OLMo 2 and 3: norms behind the bodies instead of before them, and of all queries and all keys together; in 3 windows in
//! most layers, whose rope is never stretched. Source: transformers models/olmo2 and models/olmo3.

use tandem_kernels::activation::Activation;
use tandem_kernels::rope::RopeSpec;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Norms, Sizes};
use super::{Bias, Body, DecoderSpec, NormKind, QkNorm, Sublayer, llama};
use crate::weights::LoadError;

pub(super) fn olmo2(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = sizes(config)?;
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    let layers = vec![(0, None); sizes.layers as usize];
    spec(config, sizes, ropes, layers)
}

pub(super) fn olmo3(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = sizes(config)?;
    let defaults = RopeDefaults {
        theta: 500_000.0,
        ..RopeDefaults::default()
    };
    let ropes = config.ropes_by_layer_type(&sizes, defaults, defaults, "rope_theta")?;
    let window = sizes.seen(config.window(Some(4096))?);
    let sliding = config.sliding_layers(sizes.layers, |i| (i + 1) % 4 != 0)?;
    let layers = sliding.into_iter().map(|sliding| match sliding {
        true => (1, window),
        false => (0, None),
    });
    spec(config, sizes, ropes.into(), layers.collect())
}

fn sizes(config: &Config) -> Result<Sizes, LoadError> {
    let vocab = 50_304;
    let defaults = super::sizes::Defaults {
        vocab,
        ..llama::DEFAULTS
    };
    Sizes::read(config, defaults)
}

/// `layers`: the rope and the window of each.
fn spec(
    config: &Config,
    sizes: Sizes,
    ropes: Vec<RopeSpec>,
    layers: Vec<(usize, Option<i64>)>,
) -> Result<DecoderSpec, LoadError> {
    let bias = config.bias("attention_bias")?;
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-5)?,
    };
    let layer = |(i, (rope, window)): (i64, (usize, Option<i64>))| {
        let at = format!("model.layers.{i}");
        let module = format!("{at}.self_attn");
        let mut attn = sizes.attention(&module, bias, bias);
        attn.rope = Some(rope);
        attn.window = window;
        attn.qk_norm = Some(QkNorm {
            query: norms.of(format!("{module}.q_norm"), sizes.heads * sizes.head_dim),
            key: norms.of(format!("{module}.k_norm"), sizes.kv_heads * sizes.head_dim),
        });
        let mlp = sizes.gated_mlp(&format!("{at}.mlp"), activation, Bias::Without);
        let sublayer = |body, post: &str| Sublayer {
            pre: None,
            bodies: vec![body],
            post: Some(sizes.norm(norms, format!("{at}.{post}"))),
            scale: 1.0,
        };
        [
            sublayer(Body::Attention(attn), "post_attention_layernorm"),
            sublayer(Body::Mlp(mlp), "post_feedforward_layernorm"),
        ]
    };
    let layers = (0..).zip(layers).flat_map(layer).collect();
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}
