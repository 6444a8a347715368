//! AdamW (Loshchilov and Hutter, 2019) over flat float32 buffers, the arithmetic of torch.optim.AdamW, and what a
//! trainer does to gradients before it: their norm and their scaling. Schedules and clipping policy are the trainer's.

use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Kind, Tensor};

use crate::flat::{self, PIECE, flat, for_each_piece};
use crate::gpu::{self, Gpu};
use crate::pool;
use crate::vector::vectorised;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// The step's numbers, computed in float64 as Python does.
#[derive(Clone, Copy)]
pub(crate) struct Coefficients {
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    sqrt_bias_correction2: f32,
    epsilon: f32,
    step_size: f32,
}

impl AdamW {
    /// One step, the `step`-th from 1, with learning rate `lr`, over float32 tensors [N] of one length. All but the
    /// gradients are updated in place; `m` and `v` are the first and second moments (`exp_avg`, `exp_avg_sq`).
    pub fn step(&self, params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, lr: f64, step: u64) {
        assert!(step > 0, "steps count from 1");
        if let Some(gpu) = gpu::of(params) {
            let no_bank = None;
            let buffers = [Some(params), Some(grads), Some(m), Some(v), no_bank];
            return flat::launch(gpu, "adamw", &buffers, &self.coefficients(lr, step).in_order());
        }
        if flat(params).is_none() {
            return self.step_reference(params, grads, m, v, lr, step);
        }
        let coefficients = self.coefficients(lr, step);
        for_each_piece(params, grads, [m, v], |params, grads, [m, v]| {
            update(params, grads, m, v, coefficients);
        });
    }

    /// Of the `step`-th step.
    pub(crate) fn coefficients(&self, lr: f64, step: u64) -> Coefficients {
        let AdamW {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = *self;
        let step = step as f64;
        Coefficients {
            decay: (1.0 - lr * weight_decay) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            sqrt_bias_correction2: (1.0 - beta2.powf(step)).sqrt() as f32,
            epsilon: epsilon as f32,
            step_size: (lr / (1.0 - beta1.powf(step))) as f32,
        }
    }

    /// [`AdamW::step`] in plain tch, on any device and in any dtype.
    pub fn step_reference(
        &self,
        params: &Tensor,
        grads: &Tensor,
        m: &Tensor,
        v: &Tensor,
        lr: f64,
        step: u64,
    ) {
        let AdamW {
            beta1,
            beta2,
            epsilon,
            weight_decay,
        } = *self;
        let (correction1, correction2) = (1.0 - beta1.powf(step as f64), 1.0 - beta2.powf(step as f64));
        let [mut params, mut m, mut v] = [params, m, v].map(Tensor::shallow_clone);
        let _ = params.g_mul_scalar_(1.0 - lr * weight_decay);
        let _ = m.lerp_(grads, 1.0 - beta1);
        let _ = v.g_mul_scalar_(beta2);
        v += grads * grads * (1.0 - beta2);
        params -= m / (v.sqrt() / correction2.sqrt() + epsilon) * (lr / correction1);
    }
}

impl Coefficients {
    /// As the kernel takes them.
    fn in_order(self) -> [f32; 7] {
        let Coefficients {
            decay,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            sqrt_bias_correction2,
            epsilon,
            step_size,
        } = self;
        [
            decay,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            sqrt_bias_correction2,
            epsilon,
            step_size,
        ]
    }
}

/// The 2-norm of all gradients: float64 sums over fixed pieces, added in order.
pub fn global_norm(grads: &Tensor) -> f64 {
    if let Some(gpu) = gpu::of(grads) {
        return global_norm_gpu(gpu, grads);
    }
    let Some(flat) = flat(grads) else {
        return grads
            .to_kind(Kind::Double)
            .square()
            .sum(Kind::Double)
            .double_value(&[])
            .sqrt();
    };
    let sums: Vec<AtomicU64> = (0..flat.pieces()).map(|_| AtomicU64::default()).collect();
    pool::for_each(flat.pieces(), |piece| {
        // SAFETY: the tensor is borrowed for the call and nobody writes it.
        let sum = sum_of_squares(unsafe { flat.part(flat.range(piece)) });
        sums[piece].store(sum.to_bits(), Ordering::Relaxed);
    });
    sums.into_iter()
        .map(|sum| f64::from_bits(sum.into_inner()))
        .sum::<f64>()
        .sqrt()
}

fn global_norm_gpu(gpu: Gpu, grads: &Tensor) -> f64 {
    let grads = grads.contiguous();
    let pieces = grads.numel().div_ceil(PIECE);
    let sums = Tensor::empty([pieces as i64], (Kind::Double, grads.device()));
    let args = [(&grads).into(), (&sums).into(), (grads.numel() as i64).into()];
    gpu.launch("square_sums", [pieces, 1, 1], 256, &args);
    let sums = Vec::<f64>::try_from(sums).expect("a flat float64 tensor");
    sums.into_iter().sum::<f64>().sqrt()
}

/// grads *= factor, in place.
pub fn scale(grads: &Tensor, factor: f64) {
    if let Some(gpu) = gpu::of(grads)
        && grads.is_contiguous()
    {
        return flat::launch(gpu, "scale", &[Some(grads)], &[factor as f32]);
    }
    let Some(flat) = flat(grads) else {
        let _ = grads.shallow_clone().g_mul_scalar_(factor);
        return;
    };
    pool::for_each(flat.pieces(), |piece| {
        // SAFETY: pieces are disjoint and nobody else writes the tensor meanwhile.
        scale_piece(unsafe { flat.part_mut(flat.range(piece)) }, factor as f32);
    });
}

vectorised!(
    pub(crate) fn update(
        params: &mut [f32],
        grads: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        coefficients: Coefficients,
    ) {
        let Coefficients {
            decay,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            sqrt_bias_correction2,
            epsilon,
            step_size,
        } = coefficients;
        for ((param, grad), (m, v)) in params.iter_mut().zip(grads).zip(m.iter_mut().zip(v.iter_mut())) {
            *m = (grad - *m).mul_add(one_minus_beta1, *m);
            *v = (grad * grad).mul_add(one_minus_beta2, *v * beta2);
            let denominator = v.sqrt() / sqrt_bias_correction2 + epsilon;
            *param = (*m / denominator).mul_add(-step_size, *param * decay);
        }
    }
);

vectorised!(
    pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
        const LANES: usize = 32;
        let mut sums = [0.0f64; LANES];
        let (blocks, rest) = x.as_chunks::<LANES>();
        for x in blocks {
            for lane in 0..LANES {
                let x = f64::from(x[lane]);
                sums[lane] = x.mul_add(x, sums[lane]);
            }
        }
        for (x, sum) in rest.iter().zip(&mut sums) {
            *sum = f64::from(*x).mul_add(f64::from(*x), *sum);
        }
        sums.iter().sum()
    }
);

vectorised!(
    fn scale_piece(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
);

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Twenty steps against the formula in float64: 2e-6 of the largest parameter, and tch's float32 reference too.
    #[test]
    fn agrees_with_the_formula() {
        gpu::everywhere(judge_by_the_formula);
    }

    fn judge_by_the_formula() {
        let cases = [
            (
                1,
                AdamW {
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay: 0.01,
                },
            ),
            (
                100_003,
                AdamW {
                    beta1: 0.9,
                    beta2: 0.95,
                    epsilon: 1e-6,
                    weight_decay: 0.1,
                },
            ),
            (
                77,
                AdamW {
                    beta1: 0.0,
                    beta2: 0.5,
                    epsilon: 1e-3,
                    weight_decay: 0.0,
                },
            ),
        ];
        for (n, adamw) in cases {
            let start = Tensor::randn([n], FLOAT);
            let fast = [start.copy(), start.zeros_like(), start.zeros_like()];
            let reference = fast.each_ref().map(Tensor::copy);
            let mut exact = fast
                .each_ref()
                .map(|x| Vec::<f64>::try_from(x.to_kind(Kind::Double)).expect("floats"));
            for step in 1..=20 {
                let lr = 1e-2 / step as f64;
                let grads = Tensor::randn([n], FLOAT);
                let [params, m, v] = &fast;
                adamw.step(params, &grads, m, v, lr, step);
                let [params, m, v] = &reference;
                adamw.step_reference(params, &grads, m, v, lr, step);
                let [params, m, v] = &mut exact;
                let grads = Vec::<f32>::try_from(&grads).expect("floats");
                for (i, grad) in grads.iter().map(|&grad| f64::from(grad)).enumerate() {
                    params[i] *= 1.0 - lr * adamw.weight_decay;
                    m[i] = adamw.beta1 * m[i] + (1.0 - adamw.beta1) * grad;
                    v[i] = adamw.beta2 * v[i] + (1.0 - adamw.beta2) * grad * grad;
                    let m_hat = m[i] / (1.0 - adamw.beta1.powi(step as i32));
                    let v_hat = v[i] / (1.0 - adamw.beta2.powi(step as i32));
                    params[i] -= lr * m_hat / (v_hat.sqrt() + adamw.epsilon);
                }
            }
            let want = Tensor::from_slice(&exact[0]);
            for got in [&fast[0], &reference[0]] {
                let worst = (got.to_kind(Kind::Double) - &want).abs().max().double_value(&[]);
                assert!(
                    worst < 2e-6 * want.abs().max().double_value(&[]).max(1.0),
                    "n {n}: {worst}"
                );
            }
        }
    }

    #[test]
    fn a_gpu_steps_to_the_same_bits() {
        let adamw = AdamW {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-6,
            weight_decay: 0.1,
        };
        let [start, grads] = [(); 2].map(|()| Tensor::randn([40_003], FLOAT));
        let steps = || {
            let [params, m, v] = [start.copy(), start.zeros_like(), start.zeros_like()];
            for step in 1..=3 {
                adamw.step(&params, &grads, &m, &v, 1e-2, step);
            }
            [params, m, v]
        };
        let cpu = steps();
        for lanes in gpu::Lanes::ALL {
            assert_eq!(gpu::emulated(lanes, steps), cpu, "{lanes}");
        }
    }

    #[test]
    fn norm_and_scale() {
        gpu::everywhere(judge_norm_and_scale);
    }

    fn judge_norm_and_scale() {
        for n in [0i64, 1, 31, 100_000] {
            let grads = Tensor::randn([n], FLOAT);
            let want = grads
                .to_kind(Kind::Double)
                .square()
                .sum(Kind::Double)
                .double_value(&[])
                .sqrt();
            let got = global_norm(&grads);
            assert!((got - want).abs() <= 1e-12 * want, "{got} for {want}");
            let halved = &grads * 0.5;
            scale(&grads, 0.5);
            assert_eq!(grads, halved);
        }
    }
}
