//! gpt-oss: a sink for each head, a window in every second layer, yarn without rounding, and experts with biases and a
//! clamped gate, all of a layer's in one tensor. Source: transformers models/gpt_oss.

use tandem_kernels::activation::{Activation, Gate};
use tandem_kernels::experts::RoutingWeights;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Defaults, Norms, Sizes};
use super::{
    Among, AttnSpec, Bias, Body, DecoderSpec, ExpertsSpec, LinearSpec, MlpActivation, MlpSpec, NormKind,
};
use crate::weights::LoadError;

const DEFAULTS: Defaults = Defaults {
    vocab: 201_088,
    hidden: 2880,
    inner: 2880,
    layers: 36,
    heads: 64,
    kv_heads: Some(8),
    head_dim: Some(64),
    max_positions: 131_072,
};

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, DEFAULTS)?;
    let bias = config.bias_or("attention_bias", true)?;
    let window = sizes.seen(config.window(Some(128))?);
    let sliding = config.sliding_layers(sizes.layers, |i| i % 2 == 0)?;
    let experts = config.size("num_local_experts", 128)?;
    let top_k = config.top_k("num_experts_per_tok", 4, experts)?;
    // The same number under an old name.
    config.size_or_none("experts_per_token")?;
    // Of its clamped gate.
    config.only("hidden_act", "silu")?;
    let gate = Gate::Clamped {
        alpha: config.positive("swiglu_alpha")?.unwrap_or(1.702) as f32,
        limit: config.positive("swiglu_limit")?.unwrap_or(7.0) as f32,
    };
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-5)?,
    };
    let layer = |(i, sliding): (i64, bool)| {
        let at = format!("model.layers.{i}");
        let attn = AttnSpec {
            window: window.filter(|_| sliding),
            sinks: Some(format!("{at}.self_attn.sinks")),
            ..sizes.attention(&format!("{at}.self_attn"), bias, bias)
        };
        let module = format!("{at}.mlp");
        let experts = ExpertsSpec {
            top_k,
            weights: RoutingWeights::OfChosen,
            router: LinearSpec {
                bias: Bias::With,
                ..sizes.router(&module, "router", experts)
            },
            experts: (0..experts)
                .map(|e| expert(&sizes, &module, e, experts, gate))
                .collect(),
            shared: None,
        };
        sizes.pre_norm_bodies(norms, &at, attn, Body::Experts(experts))
    };
    let layers = (0..).zip(sliding).flat_map(layer).collect();
    if !config.has("rope_parameters") && !config.has("rope_scaling") {
        return Err(config.wrong("rope_parameters", "is missing: this family's rope is yarn's"));
    }
    let rope = RopeDefaults {
        theta: 150_000.0,
        ..RopeDefaults::default()
    };
    let ropes = vec![config.rope(&sizes, rope)?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}

/// Gate and up take turns in the rows of `gate_up_proj`.
fn expert(sizes: &Sizes, module: &str, expert: i64, experts: i64, gate: Gate) -> MlpSpec {
    let mut mlp = MlpSpec {
        activation: MlpActivation::Gated(gate),
        ..sizes.gated_mlp(
            &format!("{module}.experts.{expert}"),
            Activation::Silu,
            Bias::With,
        )
    };
    let among = |name: &str, outputs, first, step| Among {
        name: format!("{module}.experts.{name}"),
        expert,
        experts,
        outputs,
        first,
        step,
    };
    for (first, part) in (0..).zip(&mut mlp.up.parts) {
        part.among = Some(among("gate_up_proj", 2 * sizes.inner, first, 2));
    }
    mlp.down.parts[0].among = Some(among("down_proj", sizes.hidden, 0, 1));
    mlp
}
