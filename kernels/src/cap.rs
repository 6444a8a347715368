//! The soft cap on logits (Gemma 2), `cap * tanh(x / cap)`, and its gradient. Caps on scores are attention's own.

use tch::Tensor;

use crate::gpu::rows::{Matrix, THREADS};
use crate::gpu::{self, Gpu, int};
use crate::vector::{exp, in_chunks, rows, rows_mut, vectorised};

/// `x [T, N]` in place.
pub fn soft_cap(x: &mut Tensor, cap: f64) {
    if rows(x).is_none() {
        match gpu::of(x) {
            Some(gpu) => cap_on(gpu, x, cap),
            None => {
                let capped = (&*x / cap).tanh() * cap;
                x.copy_(&capped);
            }
        }
        return;
    }
    let to = rows_mut(x);
    in_chunks(to.rows, to.width, |rows| {
        for row in rows {
            // SAFETY: the row is this task's alone.
            cap_row(unsafe { to.row(row) }, cap as f32);
        }
    });
}

/// `dcapped` of what [`soft_cap`] made `capped` to the gradient of what it was given.
pub fn soft_cap_backward(capped: &Tensor, dcapped: &Tensor, cap: f64) -> Tensor {
    match gpu::of(capped) {
        Some(gpu) => cap_backward_on(gpu, capped, dcapped, cap),
        None => (1.0 - (capped / cap).square()) * dcapped,
    }
}

fn cap_on(gpu: Gpu, x: &mut Tensor, cap: f64) {
    let to = Matrix::of(x);
    let args = [(&to).into(), to.stride(), int(to.width), (cap as f32).into()];
    gpu.launch("soft_cap", to.grid(), THREADS, &args);
    let capped = to.into_tensor();
    if capped.data_ptr() != x.data_ptr() {
        x.copy_(&capped); // Its rows did not lie as the kernel wants them.
    }
}

fn cap_backward_on(gpu: Gpu, capped: &Tensor, dcapped: &Tensor, cap: f64) -> Tensor {
    assert_eq!(dcapped.size(), capped.size(), "dcapped does not match");
    let (y, dy) = (Matrix::of(capped), Matrix::of(dcapped));
    let dx = y.like();
    let args = [
        (&y).into(),
        y.stride(),
        (&dy).into(),
        dy.stride(),
        (&dx).into(),
        int(y.width),
        (cap as f32).into(),
    ];
    gpu.launch("soft_cap_backward", dx.grid(), THREADS, &args);
    dx.into_tensor()
}

vectorised!(
    // tanh y = 1 - 2 / (1 + e^2y)
    fn cap_row(row: &mut [f32], cap: f32) {
        for x in row {
            *x = cap - 2.0 * cap / (1.0 + exp(*x * (2.0 / cap)));
        }
    }
);

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn agrees_with_libtorch() {
        gpu::everywhere(judge_by_libtorch);
    }

    fn judge_by_libtorch() {
        for (t, n) in [(1, 1), (3, 50), (70, 333)] {
            let x = Tensor::randn([t, n], (Kind::Float, Device::Cpu)) * 40.0;
            let mut capped = x.copy();
            soft_cap(&mut capped, 30.0);
            let wide = x.to_kind(Kind::Double).set_requires_grad(true);
            let want = (&wide / 30.0).tanh() * 30.0;
            let worst = (&capped - &want).abs().max().double_value(&[]);
            assert!(worst < 1e-5, "{worst}");
            let dy = Tensor::randn([t, n], (Kind::Float, Device::Cpu));
            let want = Tensor::run_backward(&[(&want * &dy).sum(Kind::Double)], &[&wide], false, false);
            let worst = (soft_cap_backward(&capped, &dy, 30.0) - &want[0]).abs().max();
            assert!(worst.double_value(&[]) < 1e-5);
        }
    }
}
