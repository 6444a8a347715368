//! Stochastic gradient descent over flat float32 buffers, the arithmetic of torch.optim.SGD (without dampening).

use tch::Tensor;

use crate::flat::{self, for_each_piece};
use crate::gpu;
use crate::vector::vectorised;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    pub momentum: f64,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
    /// Added to the gradient, so it is part of the momentum.
    pub weight_decay: f64,
}

impl Sgd {
    /// One step, the `step`-th from 1, in place, over tensors [N] of float32. `velocity` is torch's momentum buffer,
    /// whose first value is the first gradient; `None` where there is no momentum.
    pub fn step(&self, params: &Tensor, grads: &Tensor, velocity: Option<&Tensor>, lr: f64, step: u64) {
        let &Sgd {
            momentum,
            nesterov,
            weight_decay,
        } = self;
        let (lr, decay) = (lr as f32, weight_decay as f32);
        let kept = if step == 1 { 0.0 } else { momentum as f32 };
        let ahead = nesterov.then_some(momentum as f32);
        if let Some(gpu) = gpu::of(params) {
            let buffers = [Some(params), Some(grads), velocity];
            return flat::launch(gpu, "sgd", &buffers, &[lr, decay, kept, ahead.unwrap_or(0.0)]);
        }
        match velocity {
            None => for_each_piece(params, grads, [], |params, grads, []| {
                plain(params, grads, lr, decay);
            }),
            Some(velocity) => {
                for_each_piece(params, grads, [velocity], |params, grads, [velocity]| {
                    with_momentum(params, grads, velocity, lr, decay, kept, ahead);
                });
            }
        }
    }

    /// [`Sgd::step`] in plain tch.
    pub fn step_reference(
        &self,
        params: &Tensor,
        grads: &Tensor,
        velocity: Option<&Tensor>,
        lr: f64,
        step: u64,
    ) {
        let grads = grads + params * self.weight_decay;
        let mut params = params.shallow_clone();
        let Some(velocity) = velocity else {
            params -= grads * lr;
            return;
        };
        let kept = if step == 1 { 0.0 } else { self.momentum };
        velocity.shallow_clone().copy_(&(velocity * kept + &grads));
        match self.nesterov {
            true => params -= (grads + velocity * self.momentum) * lr,
            false => params -= velocity * lr,
        }
    }
}

vectorised!(
    fn plain(params: &mut [f32], grads: &[f32], lr: f32, decay: f32) {
        for (param, grad) in params.iter_mut().zip(grads) {
            let grad = param.mul_add(decay, *grad);
            *param = grad.mul_add(-lr, *param);
        }
    }
);

vectorised!(
    fn with_momentum(
        params: &mut [f32],
        grads: &[f32],
        velocity: &mut [f32],
        lr: f32,
        decay: f32,
        kept: f32,
        ahead: Option<f32>,
    ) {
        for ((param, grad), velocity) in params.iter_mut().zip(grads).zip(velocity) {
            let grad = param.mul_add(decay, *grad);
            *velocity = velocity.mul_add(kept, grad);
            let update = match ahead {
                Some(momentum) => velocity.mul_add(momentum, grad),
                None => *velocity,
            };
            *param = update.mul_add(-lr, *param);
        }
    }
);

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn it_is_the_reference() {
        gpu::everywhere(judge_by_the_reference);
    }

    fn judge_by_the_reference() {
        for (momentum, nesterov, weight_decay) in [(0.0, false, 0.1), (0.9, false, 0.1), (0.8, true, 0.0)] {
            let sgd = Sgd {
                momentum,
                nesterov,
                weight_decay,
            };
            let start = Tensor::randn([70_001], (Kind::Float, Device::Cpu));
            let [fast, reference] = [(); 2].map(|()| (start.copy(), start.zeros_like()));
            for step in 1..=5 {
                let grads = start.randn_like();
                let velocity = |of: &(Tensor, Tensor)| (momentum > 0.0).then(|| of.1.shallow_clone());
                sgd.step(&fast.0, &grads, velocity(&fast).as_ref(), 0.1, step);
                sgd.step_reference(&reference.0, &grads, velocity(&reference).as_ref(), 0.1, step);
            }
            let worst = (fast.0 - reference.0).abs().max().double_value(&[]);
            assert!(worst < 2e-6, "{sgd:?}: {worst}");
        }
    }
}
