//! Gemma 1, 2 and 3 (text): embeddings times the root of their width, norms that hold their weight less one; from 2 on a
//! norm behind each body too, windows in most layers and another scale of attention; caps in 2; norms of queries and keys
//! and a rope of its own for the layers with a window in 3. Source: transformers models/gemma, gemma2 and gemma3.

use tandem_kernels::activation::Activation;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{AttnSpec, Bias, Body, DecoderSpec, Logits, MlpSpec, NormKind, Sublayer};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 256_000,
    hidden: 2304,
    inner: 9216,
    layers: 26,
    heads: 8,
    kv_heads: Some(4),
    head_dim: Some(256),
    max_positions: 8192,
};

pub(super) fn gemma(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(
        config,
        Defaults {
            hidden: 3072,
            inner: 24_576,
            layers: 28,
            heads: 16,
            kv_heads: Some(16),
            ..DEFAULTS
        },
    )?;
    let common = Common::read(config, sizes)?;
    let layers = (0..sizes.layers).flat_map(|i| {
        let (at, attn, mlp) = common.bodies(i);
        sizes.pre_norm_layer(common.norms, &at, attn, mlp)
    });
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    common.decoder(config, layers.collect(), ropes)
}

pub(super) fn gemma2(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let common = Common::read(config, sizes)?;
    let windows = common.windows(config, 2)?;
    let cap = config.positive_or("attn_logit_softcapping", Some(50.0))?;
    let layers = (0..).zip(windows).flat_map(|(i, window)| {
        let (at, mut attn, mlp) = common.bodies(i);
        attn.window = window;
        attn.cap = cap;
        common.sandwich(&at, attn, mlp)
    });
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    let mut spec = common.decoder(config, layers.collect(), ropes)?;
    spec.logits.cap = config.positive_or("final_logit_softcapping", Some(30.0))?;
    Ok(spec)
}

pub(super) fn gemma3(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(
        config,
        Defaults {
            vocab: 262_208,
            max_positions: 131_072,
            ..DEFAULTS
        },
    )?;
    let common = Common::read(config, sizes)?;
    // As transformers 5 writes it, beside layer_types.
    config.get("_sliding_window_pattern");
    let pattern = config.size("sliding_window_pattern", 6)?;
    let sliding = config.sliding_layers(sizes.layers, |i| (i + 1) % pattern != 0)?;
    let window = sizes.seen(config.window(Some(4096))?);
    let layers = (0..).zip(sliding).flat_map(|(i, sliding)| {
        let (at, mut attn, mlp) = common.bodies(i);
        attn.rope = Some(usize::from(sliding));
        attn.window = window.filter(|_| sliding);
        attn.qk_norm = Some(sizes.head_norms(common.norms, &format!("{at}.self_attn")));
        common.sandwich(&at, attn, mlp)
    });
    let full = RopeDefaults {
        theta: 1_000_000.0,
        ..RopeDefaults::default()
    };
    let ropes = config.ropes_by_layer_type(&sizes, full, RopeDefaults::default(), "rope_local_base_freq")?;
    let mut spec = common.decoder(config, layers.collect(), ropes.into())?;
    spec.logits.cap = config.positive_or("final_logit_softcapping", None)?;
    Ok(spec)
}

struct Common {
    sizes: Sizes,
    norms: Norms,
    attention_bias: Bias,
    activation: Activation,
    /// Of attention.
    scale: f64,
}

impl Common {
    fn read(config: &Config, sizes: Sizes) -> Result<Common, LoadError> {
        // Gemma's first release wrote "gelu" and meant its approximation; `hidden_activation` came later and wins.
        let old = match config.get("hidden_act").and_then(|word| word.as_str()) {
            Some("gelu") | None => Activation::GeluTanh,
            Some(_) => config.activation("hidden_act", Activation::GeluTanh)?,
        };
        Ok(Common {
            sizes,
            norms: Norms {
                kind: NormKind::RmsPlusOne,
                eps: config.epsilon("rms_norm_eps", 1e-6)?,
            },
            attention_bias: config.bias("attention_bias")?,
            activation: config.activation("hidden_activation", old)?,
            scale: config
                .positive("query_pre_attn_scalar")?
                .unwrap_or(sizes.head_dim as f64)
                .powf(-0.5),
        })
    }

    fn bodies(&self, i: i64) -> (String, AttnSpec, MlpSpec) {
        let at = format!("model.layers.{i}");
        let (sizes, bias) = (self.sizes, self.attention_bias);
        let attn = AttnSpec {
            scale: self.scale,
            ..sizes.attention(&format!("{at}.self_attn"), bias, bias)
        };
        let mlp = sizes.gated_mlp(&format!("{at}.mlp"), self.activation, Bias::Without);
        (at, attn, mlp)
    }

    fn sandwich(&self, at: &str, attn: AttnSpec, mlp: MlpSpec) -> [Sublayer; 2] {
        let sublayer = |pre: &str, body, post: &str| Sublayer {
            post: Some(self.sizes.norm(self.norms, format!("{at}.{post}"))),
            ..Sublayer::new(self.sizes.norm(self.norms, format!("{at}.{pre}")), body)
        };
        [
            sublayer(
                "input_layernorm",
                Body::Attention(attn),
                "post_attention_layernorm",
            ),
            sublayer(
                "pre_feedforward_layernorm",
                Body::Mlp(mlp),
                "post_feedforward_layernorm",
            ),
        ]
    }

    /// A window in every layer but each `pattern`-th.
    fn windows(&self, config: &Config, pattern: i64) -> Result<Vec<Option<i64>>, LoadError> {
        let window = self.sizes.seen(config.window(Some(4096))?);
        let sliding = config.sliding_layers(self.sizes.layers, |i| (i + 1) % pattern != 0)?;
        Ok(sliding
            .into_iter()
            .map(|sliding| window.filter(|_| sliding))
            .collect())
    }

    fn decoder(
        &self,
        config: &Config,
        layers: Vec<Sublayer>,
        ropes: Vec<tandem_kernels::rope::RopeSpec>,
    ) -> Result<DecoderSpec, LoadError> {
        let norm = self.sizes.norm(self.norms, "model.norm".to_owned());
        Ok(DecoderSpec {
            embed_scale: (self.sizes.hidden as f64).sqrt(),
            logits: Logits::default(),
            ..self.sizes.decoder(layers, ropes, norm, config.head(true)?)
        })
    }
}
