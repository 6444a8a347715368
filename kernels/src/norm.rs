//! RMS normalisation (Zhang and Sennrich, 2019) and its gradient, in float32; layer normalisation is in [`layer`]. A
//! family whose checkpoint stores `weight - 1` adds the one at load.

mod gpu;
mod layer;

pub use layer::{
    layer_norm, layer_norm_backward_input, layer_norm_backward_params, layer_norm_backward_reference,
    layer_norm_reference,
};

use gpu::Norm;
use tch::Tensor;

use crate::pool;
use crate::slice::{Rows, RowsMut};
use crate::vector::{dot, in_chunks, map_rows, rows, rows_mut, uninit, vector, vectorised};

/// x / sqrt(mean(x^2) + eps) * weight. `x` is [T, n H] and `weight` [H]: every run of H columns is a norm of its own
/// (n = 1 before a block, n = heads for the norm of queries and keys). The result is [T, n H].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let (Some(from), Some(weight_row)) = (rows(x), vector(weight)) else {
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::forward(gpu, Norm::Rms, x, weight, eps),
            None => rms_norm_reference(x, weight, eps),
        };
    };
    let width = group_width(from.width, weight_row.len());
    map_rows(from.rows, from.width, |row, y| {
        for (x, y) in from.row(row).chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            norm_row(x, weight_row, eps as f32, y);
        }
    })
}

/// The gradients of [`rms_norm`] from `dy` [T, n H]: dx [T, n H] and dweight [H].
pub fn rms_norm_backward(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> (Tensor, Tensor) {
    (
        rms_norm_backward_input(x, weight, eps, dy),
        rms_norm_backward_weight(x, weight, eps, dy),
    )
}

/// dx [T, n H] alone: the norm's weight is frozen.
pub fn rms_norm_backward_input(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Tensor {
    let (Some(from), Some(weight_row), Some(grad)) = (rows(x), vector(weight), rows(dy)) else {
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::backward_input(gpu, Norm::Rms, x, weight, eps, dy, None),
            None => rms_norm_backward_reference(x, weight, eps, dy).0,
        };
    };
    assert_eq!(
        (grad.rows, grad.width),
        (from.rows, from.width),
        "dy does not match x"
    );
    let width = group_width(from.width, weight_row.len());
    map_rows(from.rows, from.width, |row, dx| {
        let groups = from
            .row(row)
            .chunks_exact(width)
            .zip(grad.row(row).chunks_exact(width));
        for ((x, dy), dx) in groups.zip(dx.chunks_exact_mut(width)) {
            backward_row(x, weight_row, eps as f32, dy, dx);
        }
    })
}

/// `to` [T, n H] and dx: what reaches a residual stream around the norm and through it.
pub fn rms_norm_backward_add(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor, mut to: Tensor) -> Tensor {
    assert_eq!(to.size(), x.size(), "a gradient of x");
    let (Some(from), Some(weight_row), Some(grad), Some(sums)) =
        (rows(x), vector(weight), rows(dy), RowsMut::of(&mut to))
    else {
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::backward_input(gpu, Norm::Rms, x, weight, eps, dy, Some(to)),
            None => to + rms_norm_backward_input(x, weight, eps, dy),
        };
    };
    let width = group_width(from.width, weight_row.len());
    in_chunks(from.rows, from.width, |chunk| {
        let mut dx = pool::scratch::<f32>(width);
        for row in chunk {
            // SAFETY: the row is this task's alone.
            let sums = unsafe { sums.row(row) };
            let groups = from
                .row(row)
                .chunks_exact(width)
                .zip(grad.row(row).chunks_exact(width));
            for ((x, dy), sums) in groups.zip(sums.chunks_exact_mut(width)) {
                backward_row(x, weight_row, eps as f32, dy, &mut dx);
                sums.iter_mut().zip(&*dx).for_each(|(sum, dx)| *sum += dx);
            }
        }
    });
    to
}

/// dweight [H] alone. Its sum over rows runs in one order.
pub fn rms_norm_backward_weight(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Tensor {
    let (Some(from), Some(weight_row), Some(grad)) = (rows(x), vector(weight), rows(dy)) else {
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::backward_params(gpu, Norm::Rms, x, weight, eps, dy),
            None => rms_norm_backward_reference(x, weight, eps, dy).1,
        };
    };
    let width = group_width(from.width, weight_row.len());
    let eps = eps as f32;
    sum_over_rows(from, grad, width, width, |x, dy, sum| {
        add_weight_grad(x, eps, dy, sum)
    })
}

/// [sum_width], to which `add` brings each run of `width` columns of `x` and `dy`, in one order: over pieces of a fixed
/// number of rows, then over the pieces.
fn sum_over_rows(
    x: Rows,
    dy: Rows,
    width: usize,
    sum_width: usize,
    add: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
) -> Tensor {
    const PIECE: usize = 32;
    assert_eq!((dy.rows, dy.width), (x.rows, x.width), "dy does not match x");
    let pieces = x.rows.div_ceil(PIECE);
    let mut partial = uninit(pieces.max(1), sum_width);
    let sums = rows_mut(&mut partial);
    pool::for_each(pieces, |piece| {
        // SAFETY: one task a piece.
        let sum = unsafe { sums.row(piece) };
        sum.fill(0.0);
        for row in piece * PIECE..((piece + 1) * PIECE).min(x.rows) {
            let groups = x
                .row(row)
                .chunks_exact(width)
                .zip(dy.row(row).chunks_exact(width));
            groups.for_each(|(x, dy)| add(x, dy, sum));
        }
    });
    let mut total = vec![0.0f32; sum_width];
    for piece in 0..pieces {
        // SAFETY: the job is over, nothing else looks at the row.
        total
            .iter_mut()
            .zip(unsafe { sums.row(piece) })
            .for_each(|(total, sum)| *total += *sum);
    }
    Tensor::from_slice(&total)
}

/// [`rms_norm`] in plain tch, on any device.
pub fn rms_norm_reference(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let [t, columns] = x.size()[..] else {
        panic!("x is not a matrix: {:?}", x.size())
    };
    let x = x.reshape([t, -1, weight.size()[0]]);
    let inverse = (mean_square(&x) + eps).rsqrt();
    (x * inverse * weight).view([t, columns])
}

/// [`rms_norm_backward`] in plain tch, on any device.
pub fn rms_norm_backward_reference(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> (Tensor, Tensor) {
    let [t, columns] = x.size()[..] else {
        panic!("x is not a matrix: {:?}", x.size())
    };
    let (x, dy) = (
        x.reshape([t, -1, weight.size()[0]]),
        dy.reshape([t, -1, weight.size()[0]]),
    );
    let inverse = (mean_square(&x) + eps).rsqrt();
    let normed = &x * &inverse;
    let d_normed = &dy * weight;
    let mean = (&d_normed * &normed).mean_dim([-1i64].as_slice(), true, x.kind());
    let dx = (d_normed - &normed * mean) * inverse;
    let dweight = (dy * normed).sum_dim_intlist([0i64, 1].as_slice(), false, x.kind());
    (dx.view([t, columns]), dweight)
}

fn mean_square(x: &Tensor) -> Tensor {
    x.square().mean_dim([-1i64].as_slice(), true, x.kind())
}

fn group_width(columns: usize, weight: usize) -> usize {
    assert!(
        weight > 0 && columns.is_multiple_of(weight),
        "{columns} columns are no multiple of the weight's {weight}"
    );
    weight
}

vectorised!(
    fn norm_row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = x * inverse * weight;
        }
    }
);

vectorised!(
    fn backward_row(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
        let n = x.len() as f32;
        let inverse = 1.0 / (dot(x, x) / n + eps).sqrt();
        // dx stands for dy * weight until the mean is known.
        for ((dx, dy), weight) in dx.iter_mut().zip(dy).zip(weight) {
            *dx = dy * weight;
        }
        let mean = dot(dx, x) * inverse * inverse / n;
        for (dx, x) in dx.iter_mut().zip(x) {
            *dx = (*dx - x * mean) * inverse;
        }
    }
);

vectorised!(
    fn add_weight_grad(x: &[f32], eps: f32, dy: &[f32], sum: &mut [f32]) {
        let inverse = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((sum, x), dy) in sum.iter_mut().zip(x).zip(dy) {
            *sum = (x * inverse).mul_add(*dy, *sum);
        }
    }
);

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Against float64 tch: 1e-6 of the largest value forward, 3e-6 backward.
    #[test]
    fn agrees_with_the_reference() {
        crate::gpu::everywhere(judge_by_the_reference);
    }

    fn judge_by_the_reference() {
        for (t, groups, width) in [
            (1, 1, 1),
            (1, 1, 576),
            (3, 1, 50),
            (70, 3, 64),
            (5, 9, 16),
            (130, 1, 2048),
        ] {
            let wide = Tensor::randn([t, groups * width + 5], FLOAT) * 3.0;
            let x = wide.narrow(1, 1, groups * width);
            let (weight, dy) = (
                Tensor::randn([width], FLOAT),
                Tensor::randn([t, groups * width], FLOAT),
            );
            let double = |x: &Tensor| x.to_kind(Kind::Double);
            close(
                &rms_norm(&x, &weight, 1e-5),
                &rms_norm_reference(&double(&x), &double(&weight), 1e-5),
                1e-6,
            );
            let (dx, dweight) = rms_norm_backward(&x, &weight, 1e-5, &dy);
            let (want_dx, want_dweight) =
                rms_norm_backward_reference(&double(&x), &double(&weight), 1e-5, &double(&dy));
            close(&dx, &want_dx, 3e-6);
            let around = Tensor::randn([t, groups * width], FLOAT);
            let sum = rms_norm_backward_add(&x, &weight, 1e-5, &dy, around.copy());
            assert!(sum.equal(&(around + &dx)), "added as it is");
            close(&dweight, &want_dweight, 3e-6);
        }
    }

    #[test]
    fn reference_backward_is_autograd() {
        let double = (Kind::Double, Device::Cpu);
        let x = Tensor::randn([7, 36], double).set_requires_grad(true);
        let weight = Tensor::randn([12], double).set_requires_grad(true);
        let dy = Tensor::randn([7, 36], double);
        let loss = (rms_norm_reference(&x, &weight, 1e-6) * &dy).sum(Kind::Double);
        let want = Tensor::run_backward(&[loss], &[&x, &weight], false, false);
        let (dx, dweight) = rms_norm_backward_reference(&x.detach(), &weight.detach(), 1e-6, &dy);
        close(&dx, &want[0], 1e-12);
        close(&dweight, &want[1], 1e-12);
    }

    #[test]
    fn a_row_alone_is_the_row_in_a_batch() {
        let (x, weight) = (Tensor::randn([33, 200], FLOAT), Tensor::randn([200], FLOAT));
        let all = rms_norm(&x, &weight, 1e-6);
        for row in 0..33 {
            assert_eq!(
                rms_norm(&x.narrow(0, row, 1), &weight, 1e-6),
                all.narrow(0, row, 1)
            );
        }
    }

    fn close(got: &Tensor, want: &Tensor, tolerance: f64) {
        let scale = want.abs().max().double_value(&[]).max(1.0);
        let worst = (got.to_kind(Kind::Double) - want).abs().max().double_value(&[]);
        assert!(worst <= tolerance * scale, "{worst} of {scale}");
    }
}
