//! What an adapter must fit: the base it answers beside, and how that is held here. All that is needed to pack one on
//! another thread than the one that owns the base.

use std::sync::Arc;

use tandem_kernels::weight::Precision;
use tandem_kernels::{KernelError, finite};
use tch::{Device, Kind};

use super::adapter::Adapter;
use super::params::AdapterParams;
use crate::family::DecoderSpec;
use crate::family::shard::Layout;

#[derive(Clone)]
pub struct Fit {
    /// Of the whole model.
    pub spec: DecoderSpec,
    pub layout: Arc<Layout>,
    pub precision: Precision,
    pub device: Device,
}

#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error(
        "the adapter has numbers that are infinite or not a number (NaN) {place}: it would answer nothing"
    )]
    NotFinite { place: String },
    #[error("DoRA (use_dora) of {what} is not supported: {instead}")]
    Dora {
        what: &'static str,
        instead: &'static str,
    },
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl Fit {
    /// The form that answers, of what this rank holds. Whatever is to answer comes through here, loaded or trained, and
    /// numbers that multiply to nothing do not.
    pub fn pack(&self, params: &AdapterParams) -> Result<Adapter, PackError> {
        self.check(params)?;
        Ok(Adapter::new(params, &self.layout, self.precision, self.device)?)
    }

    fn check(&self, params: &AdapterParams) -> Result<(), PackError> {
        if params.shape.magnitudes().is_some() {
            let dora = |what, instead| Err(PackError::Dora { what, instead });
            if self.layout.world() > 1 {
                return dora("a model on several ranks", "serve with --tensor-parallel-size 1");
            }
            if params.shape.linear(self.layout.head_id()).is_some() {
                return dora(
                    "the output layer",
                    "adapt it without use_dora, or leave lm_head out of target_modules",
                );
            }
            if params.shape.linear(self.layout.embed_id()).is_some() {
                return dora(
                    "the embedding",
                    "adapt it without use_dora, or leave embed_tokens out of target_modules",
                );
            }
            let mut parts = params.shape.iter().flat_map(|(_, linear)| &linear.parts);
            if parts.any(|part| part.path.contains(".experts.")) {
                return dora(
                    "experts",
                    "adapt the attention's modules alone (lora_target_modules)",
                );
            }
        }
        let not_finite = |place: String| Err(PackError::NotFinite { place });
        let is_finite = match self.precision {
            Precision::F32 => finite::all(&params.flat),
            // What is large may round to infinity.
            Precision::Bf16 => finite::all(&params.flat.to_kind(Kind::BFloat16)),
        };
        if !is_finite {
            return not_finite(format!("in {:?}", self.precision.kind()));
        }
        let parts = params.shape.iter().flat_map(|(_, linear)| &linear.parts);
        for part in parts {
            if !(part.scale as f32).is_finite() {
                return not_finite(format!("as the scale of {} ({:e})", part.path, part.scale));
            }
        }
        Ok(())
    }
}
