//! Layer normalisation (Ba et al., 2016) and its gradient, in float32.

use tch::Tensor;

use crate::vector::{dot, in_chunks, map_rows, rows, rows_mut, sum_of, uninit, vector, vectorised};

use super::gpu::{self, Norm};
use super::{group_width, sum_over_rows};

/// (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias. `x` is [T, n H], `weight` and `bias` [H]: every run
/// of H columns is a norm of its own. The result is [T, n H].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Tensor {
    let bias_row = bias.map_or(Some(None), |bias| vector(bias).map(Some));
    let (Some(from), Some(weight_row), Some(bias_row)) = (rows(x), vector(weight), bias_row) else {
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::forward(gpu, Norm::Layer { bias }, x, weight, eps),
            None => layer_norm_reference(x, weight, bias, eps),
        };
    };
    let width = group_width(from.width, weight_row.len());
    if let Some(bias) = bias_row {
        assert_eq!(bias.len(), width, "bias and weight differ in length");
    }
    map_rows(from.rows, from.width, |row, y| {
        for (x, y) in from.row(row).chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            norm_row(x, weight_row, bias_row, eps as f32, y);
        }
    })
}

/// dx [T, n H] of [`layer_norm`] from `dy` [T, n H]; the bias does not matter.
pub fn layer_norm_backward_input(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Tensor {
    let (Some(from), Some(weight_row), Some(grad)) = (rows(x), vector(weight), rows(dy)) else {
        let norm = Norm::Layer { bias: None };
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::backward_input(gpu, norm, x, weight, eps, dy, None),
            None => layer_norm_backward_reference(x, weight, eps, dy).0,
        };
    };
    assert_eq!(
        (grad.rows, grad.width),
        (from.rows, from.width),
        "dy does not match x"
    );
    let width = group_width(from.width, weight_row.len());
    let mut dx = uninit(from.rows, from.width);
    let to = rows_mut(&mut dx);
    in_chunks(from.rows, from.width, |rows| {
        let mut normed = vec![0.0f32; width];
        for row in rows {
            // SAFETY: the row is this task's alone.
            let dx = unsafe { to.row(row) };
            let groups = from
                .row(row)
                .chunks_exact(width)
                .zip(grad.row(row).chunks_exact(width));
            for ((x, dy), dx) in groups.zip(dx.chunks_exact_mut(width)) {
                backward_row(x, weight_row, eps as f32, dy, &mut normed, dx);
            }
        }
    });
    dx
}

/// The gradients of weight and bias, [H] each. Their sums over rows run in one order.
pub fn layer_norm_backward_params(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> (Tensor, Tensor) {
    let (Some(from), Some(weight_row), Some(grad)) = (rows(x), vector(weight), rows(dy)) else {
        if let Some(gpu) = crate::gpu::of(x) {
            let norm = Norm::Layer { bias: None };
            return halves(&gpu::backward_params(gpu, norm, x, weight, eps, dy));
        }
        let (_, dweight, dbias) = layer_norm_backward_reference(x, weight, eps, dy);
        return (dweight, dbias);
    };
    let width = group_width(from.width, weight_row.len());
    let eps = eps as f32;
    let both = sum_over_rows(from, grad, width, 2 * width, |x, dy, sums| {
        let (dweight, dbias) = sums.split_at_mut(width);
        add_param_grads(x, eps, dy, dweight, dbias);
    });
    halves(&both)
}

fn halves(both: &Tensor) -> (Tensor, Tensor) {
    let width = both.numel() as i64 / 2;
    (both.narrow(0, 0, width), both.narrow(0, width, width))
}

/// [`layer_norm`] in plain tch, on any device.
pub fn layer_norm_reference(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Tensor {
    let [t, columns] = x.size()[..] else {
        panic!("x is not a matrix: {:?}", x.size())
    };
    let (normed, _) = normed(&x.reshape([t, -1, weight.size()[0]]), eps);
    let y = normed * weight;
    match bias {
        Some(bias) => y + bias,
        None => y,
    }
    .view([t, columns])
}

/// dx, dweight and dbias in plain tch, on any device.
pub fn layer_norm_backward_reference(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
) -> (Tensor, Tensor, Tensor) {
    let [t, columns] = x.size()[..] else {
        panic!("x is not a matrix: {:?}", x.size())
    };
    let shape = [t, -1, weight.size()[0]];
    let dy = dy.reshape(shape);
    let (normed, inverse) = normed(&x.reshape(shape), eps);
    let d_normed = &dy * weight;
    let dx = (&d_normed - mean(&d_normed) - &normed * mean(&(&d_normed * &normed))) * inverse;
    let over_rows = |x: &Tensor| x.sum_dim_intlist([0i64, 1].as_slice(), false, x.kind());
    (dx.view([t, columns]), over_rows(&(&dy * &normed)), over_rows(&dy))
}

/// x without mean, of variance one; and the factor that made it so.
fn normed(x: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let centred = x - mean(x);
    let inverse = (mean(&centred.square()) + eps).rsqrt();
    (centred * &inverse, inverse)
}

fn mean(x: &Tensor) -> Tensor {
    x.mean_dim([-1i64].as_slice(), true, x.kind())
}

/// The same as [`normed`] for one row.
#[inline(always)]
fn normed_row(x: &[f32], eps: f32, normed: &mut [f32]) -> f32 {
    let n = x.len() as f32;
    let mean = sum_of(x, |x| x) / n;
    for (y, x) in normed.iter_mut().zip(x) {
        *y = x - mean;
    }
    let inverse = 1.0 / (dot(normed, normed) / n + eps).sqrt();
    for y in normed {
        *y *= inverse;
    }
    inverse
}

vectorised!(
    fn norm_row(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, y: &mut [f32]) {
        normed_row(x, eps, y);
        match bias {
            Some(bias) => {
                for ((y, weight), bias) in y.iter_mut().zip(weight).zip(bias) {
                    *y = y.mul_add(*weight, *bias);
                }
            }
            None => {
                for (y, weight) in y.iter_mut().zip(weight) {
                    *y *= weight;
                }
            }
        }
    }
);

vectorised!(
    fn backward_row(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], normed: &mut [f32], dx: &mut [f32]) {
        let n = x.len() as f32;
        let inverse = normed_row(x, eps, normed);
        // dx stands for dy * weight until the means are known.
        for ((dx, dy), weight) in dx.iter_mut().zip(dy).zip(weight) {
            *dx = dy * weight;
        }
        let (mean, slope) = (sum_of(dx, |dx| dx) / n, dot(dx, normed) / n);
        for (dx, normed) in dx.iter_mut().zip(normed) {
            *dx = (*dx - mean - *normed * slope) * inverse;
        }
    }
);

vectorised!(
    fn add_param_grads(x: &[f32], eps: f32, dy: &[f32], dweight: &mut [f32], dbias: &mut [f32]) {
        let n = x.len() as f32;
        let mean = sum_of(x, |x| x) / n;
        let inverse = 1.0 / (sum_of(x, |x| (x - mean) * (x - mean)) / n + eps).sqrt();
        for (((dweight, dbias), x), dy) in dweight.iter_mut().zip(dbias).zip(x).zip(dy) {
            *dweight = ((x - mean) * inverse).mul_add(*dy, *dweight);
            *dbias += dy;
        }
    }
);

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Against float64 tch, of rows whose mean is as large as their spread: 2e-6 of the largest value forward, 4e-6
    /// backward.
    #[test]
    fn agrees_with_the_reference() {
        crate::gpu::everywhere(judge_by_the_reference);
    }

    fn judge_by_the_reference() {
        for (t, groups, width) in [(1, 1, 1), (1, 1, 576), (3, 1, 50), (70, 3, 64), (130, 1, 2048)] {
            let wide = Tensor::randn([t, groups * width + 5], FLOAT) * 3.0 + 3.0;
            let x = wide.narrow(1, 1, groups * width);
            let (weight, bias) = (Tensor::randn([width], FLOAT), Tensor::randn([width], FLOAT));
            let dy = Tensor::randn([t, groups * width], FLOAT);
            let double = |x: &Tensor| x.to_kind(Kind::Double);
            for bias in [None, Some(&bias)] {
                close(
                    &layer_norm(&x, &weight, bias, 1e-5),
                    &layer_norm_reference(&double(&x), &double(&weight), bias.map(double).as_ref(), 1e-5),
                    2e-6,
                );
            }
            let (want_dx, want_dweight, want_dbias) =
                layer_norm_backward_reference(&double(&x), &double(&weight), 1e-5, &double(&dy));
            let (dweight, dbias) = layer_norm_backward_params(&x, &weight, 1e-5, &dy);
            close(&layer_norm_backward_input(&x, &weight, 1e-5, &dy), &want_dx, 4e-6);
            close(&dweight, &want_dweight, 4e-6);
            close(&dbias, &want_dbias, 4e-6);
        }
    }

    /// libtorch's own layer norm and its autograd, in float64.
    #[test]
    fn the_reference_is_torchs() {
        let double = (Kind::Double, Device::Cpu);
        let [x, weight, bias] =
            [&[7i64, 12][..], &[12], &[12]].map(|size| Tensor::randn(size, double).set_requires_grad(true));
        let dy = Tensor::randn([7, 12], double);
        let y = x.layer_norm([12i64], Some(&weight), Some(&bias), 1e-6, false);
        close(&layer_norm_reference(&x, &weight, Some(&bias), 1e-6), &y, 1e-12);
        let want = Tensor::run_backward(
            &[(y * &dy).sum(Kind::Double)],
            &[&x, &weight, &bias],
            false,
            false,
        );
        let (dx, dweight, dbias) = layer_norm_backward_reference(&x.detach(), &weight.detach(), 1e-6, &dy);
        for (got, want) in [dx, dweight, dbias].iter().zip(&want) {
            close(got, want, 1e-12);
        }
    }

    #[test]
    fn a_row_alone_is_the_row_in_a_batch() {
        let [x, dy] = [(); 2].map(|()| Tensor::randn([33, 200], FLOAT));
        let [weight, bias] = [(); 2].map(|()| Tensor::randn([200], FLOAT));
        let all = layer_norm(&x, &weight, Some(&bias), 1e-6);
        let all_dx = layer_norm_backward_input(&x, &weight, 1e-6, &dy);
        for row in 0..33 {
            let one = |x: &Tensor| x.narrow(0, row, 1);
            assert_eq!(layer_norm(&one(&x), &weight, Some(&bias), 1e-6), one(&all));
            assert_eq!(
                layer_norm_backward_input(&one(&x), &weight, 1e-6, &one(&dy)),
                one(&all_dx)
            );
        }
    }

    fn close(got: &Tensor, want: &Tensor, tolerance: f64) {
        let scale = want.abs().max().double_value(&[]).max(1.0);
        let worst = (got.to_kind(Kind::Double) - want).abs().max().double_value(&[]);
        assert!(worst <= tolerance * scale, "{worst} of {scale}");
    }
}
