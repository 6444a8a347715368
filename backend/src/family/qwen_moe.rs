//! Qwen 1.5, 2 and 3 with experts: Qwen's attention; in 2 an expert that every token goes through, behind a gate of its
//! own; dense layers between where the config says so. Source: transformers models/qwen2_moe and models/qwen3_moe.

use tandem_kernels::activation::Activation;
use tandem_kernels::experts::RoutingWeights;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::spec::GATED;
use super::{AttnSpec, Bias, Body, DecoderSpec, ExpertsSpec, MlpSpec, NormKind, SharedExpert, qwen};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 151_936,
    hidden: 2048,
    inner: 5632,
    layers: 24,
    heads: 16,
    kv_heads: Some(16),
    head_dim: None,
    max_positions: 32_768,
};

pub(super) fn qwen2(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let qkv_bias = config.bias_or("qkv_bias", true)?;
    let shared = config.size("shared_expert_intermediate_size", 5632)?;
    let experts = Experts::read(config, &sizes, [60, 4, 1408], Some(shared))?;
    // Every second of the lower layers, not the upper ones as without experts.
    let window = qwen::window(config, &sizes, qwen::WINDOW)?;
    let lower = config.count("max_window_layers", 28)?;
    let sliding = config.sliding_layers(sizes.layers, |i| i % 2 == 0 && i < lower)?;
    let attention = |i: i64, _: Norms, module: &str| AttnSpec {
        window: window.filter(|_| sliding[i as usize]),
        ..sizes.attention(module, qkv_bias, Bias::Without)
    };
    spec(config, sizes, experts, attention)
}

pub(super) fn qwen3(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(
        config,
        Defaults {
            inner: 6144,
            heads: 32,
            kv_heads: Some(4),
            ..DEFAULTS
        },
    )?;
    let bias = config.bias("attention_bias")?;
    let experts = Experts::read(config, &sizes, [128, 8, 768], None)?;
    let window = qwen::window(config, &sizes, qwen::WINDOW)?;
    config.count("max_window_layers", 0)?;
    let attention = |_, norms, module: &str| AttnSpec {
        window,
        qk_norm: Some(sizes.head_norms(norms, module)),
        ..sizes.attention(module, bias, bias)
    };
    spec(config, sizes, experts, attention)
}

fn spec(
    config: &Config,
    sizes: Sizes,
    experts: Experts,
    attention: impl Fn(i64, Norms, &str) -> AttnSpec,
) -> Result<DecoderSpec, LoadError> {
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-6)?,
    };
    let layer = |i: i64| {
        let at = format!("model.layers.{i}");
        let attn = attention(i, norms, &format!("{at}.self_attn"));
        sizes.pre_norm_bodies(norms, &at, attn, experts.body(i, &sizes, &format!("{at}.mlp")))
    };
    let layers = (0..sizes.layers).flat_map(layer).collect();
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}

struct Experts {
    count: i64,
    top_k: i64,
    /// Of an expert.
    inner: i64,
    /// Inner features of the shared one.
    shared: Option<i64>,
    weights: RoutingWeights,
    activation: Activation,
    /// Of each layer, whether it has experts.
    sparse: Vec<bool>,
}

impl Experts {
    fn read(
        config: &Config,
        sizes: &Sizes,
        [count, top_k, inner]: [i64; 3],
        shared: Option<i64>,
    ) -> Result<Experts, LoadError> {
        // transformers 5 saves some of them under another family's name.
        let saved = config.size_or_none("num_local_experts")?;
        let count = match (config.size_or_none("num_experts")?, saved) {
            (Some(count), Some(saved)) if count != saved => {
                let why = format!("contradicts `num_local_experts` {saved}; remove one");
                return Err(config.wrong("num_experts", &why));
            }
            (own, saved) => own.or(saved).unwrap_or(count),
        };
        let dense = config.layer_numbers("mlp_only_layers")?;
        let step = config.size("decoder_sparse_step", 1)?;
        let sparse = |i: i64| !dense.contains(&i) && (i + 1) % step == 0;
        Ok(Experts {
            count,
            top_k: config.top_k("num_experts_per_tok", top_k, count)?,
            inner: config.size("moe_intermediate_size", inner)?,
            shared,
            weights: match config.flag("norm_topk_prob")? {
                true => RoutingWeights::OfChosen,
                false => RoutingWeights::OfAll,
            },
            activation: config.activation("hidden_act", Activation::Silu)?,
            sparse: (0..sizes.layers).map(sparse).collect(),
        })
    }

    fn body(&self, layer: i64, sizes: &Sizes, module: &str) -> Body {
        if !self.sparse[layer as usize] {
            return Body::Mlp(sizes.gated_mlp(module, self.activation, Bias::Without));
        }
        let mlp = |name: &str, inner| {
            let (module, shape) = (format!("{module}.{name}"), [sizes.hidden, inner]);
            MlpSpec::gated(&module, GATED, shape, self.activation, Bias::Without)
        };
        Body::Experts(ExpertsSpec {
            top_k: self.top_k,
            weights: self.weights,
            router: sizes.router(module, "gate", self.count),
            experts: (0..self.count)
                .map(|e| mlp(&format!("experts.{e}"), self.inner))
                .collect(),
            shared: self.shared.map(|inner| SharedExpert {
                gate: sizes.router(module, "shared_expert_gate", 1),
                mlp: mlp("shared_expert", inner),
            }),
        })
    }
}
