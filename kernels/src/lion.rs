//! Lion (Chen et al., arXiv 2302.06675) over flat float32 buffers: the sign of a mean of gradients is the step. The arithmetic
//! of bitsandbytes.optim.Lion with 32 bits.

use tch::Tensor;

use crate::flat::{self, for_each_piece};
use crate::gpu;
use crate::vector::vectorised;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Of the mean whose sign is taken.
    pub beta1: f64,
    /// Of the mean that is kept.
    pub beta2: f64,
    pub weight_decay: f64,
}

impl Lion {
    /// One step, in place, over tensors [N] of float32. `m` is the mean of gradients.
    pub fn step(&self, params: &Tensor, grads: &Tensor, m: &Tensor, lr: f64) {
        let numbers = self.numbers(lr);
        if let Some(gpu) = gpu::of(params) {
            let buffers = [params, grads, m].map(Some);
            return flat::launch(gpu, "lion", &buffers, &numbers.in_order());
        }
        for_each_piece(params, grads, [m], |params, grads, [m]| {
            update(params, grads, m, numbers)
        });
    }

    fn numbers(&self, lr: f64) -> Numbers {
        let &Lion {
            beta1,
            beta2,
            weight_decay,
        } = self;
        Numbers {
            decay: (1.0 - lr * weight_decay) as f32,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            lr: lr as f32,
        }
    }

    /// [`Lion::step`] in plain tch.
    pub fn step_reference(&self, params: &Tensor, grads: &Tensor, m: &Tensor, lr: f64) {
        let sign = (m * self.beta1 + grads * (1.0 - self.beta1)).sign();
        let stepped = params * (1.0 - lr * self.weight_decay) - sign * lr;
        params.shallow_clone().copy_(&stepped);
        m.shallow_clone()
            .copy_(&(m * self.beta2 + grads * (1.0 - self.beta2)));
    }
}

/// Of a step, computed in float64 as Python does.
#[derive(Clone, Copy)]
struct Numbers {
    decay: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    lr: f32,
}

impl Numbers {
    /// As the kernel takes them.
    fn in_order(self) -> [f32; 6] {
        let Numbers {
            decay,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            lr,
        } = self;
        [decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr]
    }
}

vectorised!(
    fn update(params: &mut [f32], grads: &[f32], m: &mut [f32], numbers: Numbers) {
        let Numbers {
            decay,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            lr,
        } = numbers;
        for ((param, grad), m) in params.iter_mut().zip(grads).zip(m) {
            // Not fused: a sum that is zero has no sign, and must be zero where it is in torch.
            let mean = *m * beta1 + grad * one_minus_beta1;
            let sign = f32::from(u8::from(mean > 0.0)) - f32::from(u8::from(mean < 0.0));
            *param = *param * decay - lr * sign;
            *m = *m * beta2 + grad * one_minus_beta2;
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
        let lion = Lion {
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.1,
        };
        let start = Tensor::randn([70_001], (Kind::Float, Device::Cpu));
        let [fast, reference] = [(); 2].map(|()| (start.copy(), start.zeros_like()));
        for step in 0..5 {
            let grads = start.randn_like();
            // What has no gradient at the first step does not move.
            let _ = grads.narrow(0, 0, 1000).fill_(f64::from(step));
            lion.step(&fast.0, &grads, &fast.1, 0.1);
            lion.step_reference(&reference.0, &grads, &reference.1, 0.1);
        }
        let worst = (fast.0 - reference.0).abs().max().double_value(&[]);
        assert!(worst < 2e-6, "{worst}");
    }
}
