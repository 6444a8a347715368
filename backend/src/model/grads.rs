//! Where gradients are added, and those of what stands outside sublayers. Checked against peft's gradients
//! (tests/numerics).

use tch::Tensor;

use super::full::FullParams;
use super::{Decoder, scaled};
use crate::family::ParamId;
use crate::lora::params::AdapterParams;

/// Shaped like what is trained.
pub enum Grads {
    Lora(AdapterParams),
    Full(FullParams),
}

impl Grads {
    /// All of them, `[P]` float32.
    pub fn flat(&self) -> &Tensor {
        match self {
            Grads::Lora(grads) => &grads.flat,
            Grads::Full(grads) => &grads.flat,
        }
    }

    /// Of a parameter of the base: computed only where it is trained.
    pub(super) fn add(&self, id: ParamId, gradient: impl FnOnce() -> Tensor) {
        if let Grads::Full(grads) = self {
            add(&grads.view(id), gradient());
        }
    }
}

impl Decoder {
    /// Through [`Decoder::final_norm`]: its gradient `[R, H]` to `dhidden [R, H]`.
    pub fn final_norm_backward(&self, hidden: &Tensor, dnormed: &Tensor, grads: &mut Grads) -> Tensor {
        self.norm
            .backward(hidden, &scaled(dnormed, self.spec.logits.scale), grads)
    }

    /// The embedding's gradient (nothing when it is frozen).
    pub fn embed_backward(&self, tokens: &[u32], dhidden: &Tensor, grads: &mut Grads) {
        if let Grads::Full(grads) = grads {
            let rows: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
            let mut embed = grads.view(ParamId::Embed);
            let _ = embed.index_add_(
                0,
                &Tensor::from_slice(&rows).to_device(embed.device()),
                &scaled(dhidden, self.embed_scale).to_device(embed.device()),
            );
        }
    }
}

/// Gradients are kept where AdamW steps, on the CPU, wherever they were computed.
pub(super) fn add(to: &Tensor, gradient: Tensor) {
    let _ = to.shallow_clone().g_add_(&gradient.to_device(to.device()));
}
