//! Mixtral: Mistral's layers with experts for MLPs. Source: transformers models/mixtral.

use tandem_kernels::activation::Activation;
use tandem_kernels::experts::RoutingWeights;

use super::config::Config;
use super::rope::RopeDefaults;
use super::sizes::{Norms, Sizes};
use super::{Bias, Body, DecoderSpec, ExpertsSpec, MlpSpec, NormKind, mistral};
use crate::weights::LoadError;

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let sizes = Sizes::read(config, mistral::DEFAULTS)?;
    let window = sizes.seen(config.window(None)?);
    let activation = config.activation("hidden_act", Activation::Silu)?;
    let experts = config.size("num_local_experts", 8)?;
    let top_k = config.top_k("num_experts_per_tok", 2, experts)?;
    let norms = Norms {
        kind: NormKind::Rms,
        eps: config.epsilon("rms_norm_eps", 1e-5)?,
    };
    let layer = |i: i64| {
        let at = format!("model.layers.{i}");
        let mut attn = sizes.attention(&format!("{at}.self_attn"), Bias::Without, Bias::Without);
        attn.window = window;
        let module = format!("{at}.block_sparse_moe");
        let expert = |e| {
            let (module, shape) = (format!("{module}.experts.{e}"), [sizes.hidden, sizes.inner]);
            MlpSpec::gated(&module, ["w1", "w3", "w2"], shape, activation, Bias::Without)
        };
        let experts = ExpertsSpec {
            top_k,
            weights: RoutingWeights::OfChosen,
            router: sizes.router(&module, "gate", experts),
            experts: (0..experts).map(expert).collect(),
            shared: None,
        };
        sizes.pre_norm_bodies(norms, &at, attn, Body::Experts(experts))
    };
    let layers = (0..sizes.layers).flat_map(layer).collect();
    let ropes = vec![config.rope(&sizes, RopeDefaults::default())?];
    let norm = sizes.norm(norms, "model.norm".to_owned());
    Ok(sizes.decoder(layers, ropes, norm, config.head(false)?))
}
