//! Where gradients are added, and those of what stands outside sublayers: norms and the embedding. Checked against
//! peft's gradients (tests/numerics).

use tandem_kernels::norm::{rms_norm_backward_input, rms_norm_backward_weight};
use tch::Tensor;

use super::full::FullParams;
use super::{Decoder, Norm};
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
    /// Through the final norm: `d(norm(hidden)) [R, H]` to `dhidden [R, H]`.
    pub fn final_norm_backward(&self, hidden: &Tensor, dnormed: &Tensor, grads: &mut Grads) -> Tensor {
        self.norm.backward(ParamId::FinalNorm, hidden, dnormed, grads)
    }

    /// The embedding's gradient (nothing when it is frozen).
    pub fn embed_backward(&self, tokens: &[u32], dhidden: &Tensor, grads: &mut Grads) {
        if let Grads::Full(grads) = grads {
            let rows: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
            let mut embed = grads.view(ParamId::Embed);
            let _ = embed.index_add_(
                0,
                &Tensor::from_slice(&rows).to_device(embed.device()),
                &dhidden.to_device(embed.device()),
            );
        }
    }
}

impl Norm {
    /// `d(norm(x))` to `dx`.
    pub(super) fn backward(&self, id: ParamId, x: &Tensor, dy: &Tensor, grads: &Grads) -> Tensor {
        grads.add(id, || rms_norm_backward_weight(x, &self.weight, self.eps, dy));
        rms_norm_backward_input(x, &self.weight, self.eps, dy)
    }
}

/// Gradients are kept where AdamW steps, on the CPU, wherever they were computed.
pub(super) fn add(to: &Tensor, gradient: Tensor) {
    let _ = to.shallow_clone().g_add_(&gradient.to_device(to.device()));
}
