//! A gated MLP of the decoder, forward and backward side by side.

use tandem_kernels::activation::{Activation, gated, gated_backward};
use tch::Tensor;

use super::linear::{Backward, Linear, Project};

pub(super) struct Mlp {
    pub activation: Activation,
    /// Inner features of this rank.
    pub inner: usize,
    pub gate_up: Linear,
    pub down: Linear,
}

/// What the backward reads.
pub(super) struct Saved {
    /// `[T, 2 I]`
    gate_up: Tensor,
}

impl Mlp {
    /// `residual + down(act(gate(x)) * up(x))` of `x [T, H]`, and what the backward reads; with several ranks parts of
    /// the sum.
    pub fn forward(&self, x: &Tensor, residual: Tensor, pass: &mut impl Project) -> (Tensor, Saved) {
        let gate_up = pass.project(&self.gate_up, x); // [T, 2 I]
        let activated = gated(&gate_up, self.activation); // [T, I]
        (
            pass.project_add(&self.down, &activated, residual),
            Saved { gate_up },
        )
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
        let Saved { gate_up } = saved;
        let activated = gated(&gate_up, self.activation);
        let dactivated = back.linear(&self.down, &activated, doutput);
        drop(activated);
        let dgate_up = gated_backward(&gate_up, &dactivated, self.activation);
        drop((gate_up, dactivated));
        back.linear(&self.gate_up, &x(), &dgate_up)
    }

    /// Numbers per token that [`Mlp::forward`] keeps.
    pub fn saved_numbers(&self) -> usize {
        2 * self.inner
    }
}
