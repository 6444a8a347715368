//! Where a pass adds gradients, and those of what stands outside sublayers.

use std::ops::Range;

use tch::Tensor;

use super::{Decoder, Trainable, TrainedRows, scaled};
use crate::family::ParamId;

impl<'a> Trainable<'a> {
    /// The rows that have an adapter in training.
    pub(super) fn adapted(self) -> &'a [TrainedRows<'a>] {
        match self {
            Trainable::Lora(rows) => rows,
            Trainable::Full(_) => &[],
        }
    }

    /// To the gradient of a parameter of the base: computed only where it is trained.
    pub(super) fn add(self, id: ParamId, gradient: impl FnOnce() -> Tensor) {
        match self {
            Trainable::Full(gradients) if gradients.shape.has(id) => gradients.add(id, gradient()),
            Trainable::Full(_) | Trainable::Lora(_) => {}
        }
    }
}

impl TrainedRows<'_> {
    /// Its rows of `x [T, ..]`.
    pub(super) fn of(&self, x: &Tensor) -> Tensor {
        narrow_rows(x, self.rows.start as i64..self.rows.end as i64)
    }
}

impl Decoder {
    /// Through [`Decoder::final_norm`]: its gradient `[R, H]` to `dhidden [R, H]`.
    pub fn final_norm_backward(&self, hidden: &Tensor, dnormed: &Tensor, trainable: Trainable) -> Tensor {
        self.norm
            .backward(hidden, &scaled(dnormed, self.spec.logits.scale), trainable)
    }
}

pub(super) fn narrow_rows(x: &Tensor, rows: Range<i64>) -> Tensor {
    x.narrow(0, rows.start, rows.end - rows.start)
}

/// Gradients are kept where AdamW steps, on the CPU, wherever they were computed.
pub(super) fn add(to: &Tensor, gradient: Tensor) {
    let _ = to.shallow_clone().g_add_(&gradient.to_device(to.device()));
}
