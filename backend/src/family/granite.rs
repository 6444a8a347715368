//! Granite 3: Llama with factors on embeddings, attention, residuals and logits. Source: transformers models/granite.

use super::config::Config;
use super::{Body, DecoderSpec, llama};
use crate::weights::LoadError;

pub(super) fn spec(config: &Config) -> Result<DecoderSpec, LoadError> {
    let mut spec = llama::spec(config)?;
    let factor = |field| Ok::<f64, LoadError>(config.positive(field)?.unwrap_or(1.0));
    spec.embed_scale = factor("embedding_multiplier")?;
    spec.logits.scale = factor("logits_scaling")?.recip();
    let (attention, residual) = (factor("attention_multiplier")?, factor("residual_multiplier")?);
    for sublayer in &mut spec.sublayers {
        sublayer.scale = residual;
        for body in &mut sublayer.bodies {
            if let Body::Attention(attn) = body {
                attn.scale = attention;
            }
        }
    }
    Ok(spec)
}
