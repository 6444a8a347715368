//! A norm of the decoder, forward and backward side by side. With several ranks a norm of all heads together stands in
//! pieces, and ranks sum what it divides by.

use tandem_kernels::comm::Comm;
use tandem_kernels::norm::{
    layer_norm, layer_norm_backward_input, layer_norm_backward_params, rms_norm, rms_norm_backward_add,
    rms_norm_backward_input, rms_norm_backward_weight,
};
use tch::{Kind, Tensor};

use super::Trainable;
use crate::family::{NormId, NormKind, ParamId};

pub(super) struct Norm {
    pub id: NormId,
    pub kind: NormKind,
    /// `[width]` float32, as it multiplies.
    pub weight: Tensor,
    /// `[width]` float32
    pub bias: Option<Tensor>,
    pub eps: f64,
    /// Where ranks hold pieces of it.
    pub spread: Option<Spread>,
}

pub(super) struct Spread {
    pub comm: Comm,
    /// Of all pieces.
    pub width: i64,
}

impl Norm {
    /// The weight of what the checkpoint holds.
    pub fn weight_of(kind: NormKind, stored: &Tensor) -> Tensor {
        match kind {
            NormKind::RmsPlusOne => stored + 1.0,
            NormKind::Rms | NormKind::Layer { .. } => stored.copy(),
        }
    }

    /// `x [T, n width]`
    pub fn apply(&self, x: &Tensor) -> Tensor {
        match (&self.spread, self.kind) {
            (Some(spread), _) => x * spread.inverse(x, self.eps) * &self.weight,
            (None, NormKind::Rms | NormKind::RmsPlusOne) => rms_norm(x, &self.weight, self.eps),
            (None, NormKind::Layer { .. }) => layer_norm(x, &self.weight, self.bias.as_ref(), self.eps),
        }
    }

    /// `d(norm(x))` to `dx`.
    pub fn backward(&self, x: &Tensor, dy: &Tensor, trainable: Trainable) -> Tensor {
        if let Some(spread) = &self.spread {
            return spread.backward(x, &self.weight, self.eps, dy);
        }
        match self.kind {
            NormKind::Rms | NormKind::RmsPlusOne => {
                self.add_rms_weight(x, dy, trainable);
                rms_norm_backward_input(x, &self.weight, self.eps, dy)
            }
            NormKind::Layer { .. } => {
                trainable.add(ParamId::Norm(self.id), || self.layer_norm_params(x, dy).0);
                if self.bias.is_some() {
                    trainable.add(ParamId::NormBias(self.id), || self.layer_norm_params(x, dy).1);
                }
                layer_norm_backward_input(x, &self.weight, self.eps, dy)
            }
        }
    }

    /// `dx + [Norm::backward]`: `dx` went around the norm.
    pub fn backward_add(&self, x: &Tensor, dy: &Tensor, dx: Tensor, trainable: Trainable) -> Tensor {
        match (&self.spread, self.kind) {
            (None, NormKind::Rms | NormKind::RmsPlusOne) => {
                self.add_rms_weight(x, dy, trainable);
                rms_norm_backward_add(x, &self.weight, self.eps, dy, dx)
            }
            _ => dx + self.backward(x, dy, trainable),
        }
    }

    fn add_rms_weight(&self, x: &Tensor, dy: &Tensor, trainable: Trainable) {
        trainable.add(ParamId::Norm(self.id), || {
            rms_norm_backward_weight(x, &self.weight, self.eps, dy)
        });
    }

    fn layer_norm_params(&self, x: &Tensor, dy: &Tensor) -> (Tensor, Tensor) {
        layer_norm_backward_params(x, &self.weight, self.eps, dy)
    }
}

impl Spread {
    /// 1 / sqrt(mean(x^2) + eps) over all ranks' columns, `[T, 1]`.
    fn inverse(&self, x: &Tensor, eps: f64) -> Tensor {
        (self.mean(&x.square()) + eps).rsqrt()
    }

    fn backward(&self, x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Tensor {
        let inverse = self.inverse(x, eps);
        let normed = x * &inverse;
        let dnormed = dy * weight;
        let mean = self.mean(&(&dnormed * &normed));
        (dnormed - normed * mean) * inverse
    }

    fn mean(&self, x: &Tensor) -> Tensor {
        let mut sum = x.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
        self.comm.all_reduce(&mut sum);
        sum / self.width as f64
    }
}
