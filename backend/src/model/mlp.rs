//! An MLP of the decoder, forward and backward side by side.

use tandem_kernels::activation::{activate, activate_backward, gated, gated_backward};
use tch::Tensor;

use super::linear::{Backward, Linear, Project};
use crate::family::MlpActivation;

pub(super) struct Mlp {
    pub activation: MlpActivation,
    pub up: Linear,
    pub down: Linear,
}

/// What the backward reads.
pub(super) struct Saved {
    /// `[T, I]`, `[T, 2 I]` with the gate
    up: Tensor,
}

impl Mlp {
    /// `residual + down(act(up(x)))` of `x [T, H]`, and what the backward reads; with several ranks parts of the sum.
    pub fn forward(&self, x: &Tensor, residual: Option<Tensor>, pass: &mut impl Project) -> (Tensor, Saved) {
        let up = pass.project(&self.up, x);
        let output = pass.project_add(&self.down, &self.activated(&up), residual);
        (output, Saved { up })
    }

    /// `doutput [T, H]` to the gradient of `x`; with several ranks its parts, to be summed. `x` is made again when it is
    /// needed.
    pub fn backward(
        &self,
        saved: Saved,
        doutput: &Tensor,
        x: impl FnOnce() -> Tensor,
        back: &Backward,
    ) -> Tensor {
        let Saved { up } = saved;
        let activated = self.activated(&up);
        let dactivated = back.linear(&self.down, &activated, doutput);
        drop(activated);
        let dup = self.up_gradient(&up, &dactivated);
        drop((up, dactivated));
        back.linear(&self.up, &x(), &dup)
    }

    /// `[T, I]`
    pub fn activated(&self, up: &Tensor) -> Tensor {
        match self.activation {
            MlpActivation::Gated(activation) => gated(up, activation),
            MlpActivation::Plain(activation) => activate(up, activation),
        }
    }

    /// The gradient of what [`Mlp::activated`] gave to that of `up`.
    pub fn up_gradient(&self, up: &Tensor, dactivated: &Tensor) -> Tensor {
        match self.activation {
            MlpActivation::Gated(activation) => gated_backward(up, dactivated, activation),
            MlpActivation::Plain(activation) => activate_backward(up, dactivated, activation),
        }
    }

    /// Numbers per token that [`Mlp::forward`] keeps.
    pub fn saved_numbers(&self) -> usize {
        self.up.weight.n() as usize
    }
}
