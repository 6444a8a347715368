//! What the element-wise ops share: one loop compiled for each instruction set, exp, fixed-order sums.
//! Not the matrix products (`simd`), not the threads (`pool`), not the views of tensors (`slice`).
//!
//! The loops are plain Rust over slices that the compiler vectorises; [`vectorised!`] compiles a body under AVX-512 and
//! under AVX2 and chooses once per call. Fused multiply-add is always asked for by name ([`f32::mul_add`]), so the bits
//! are the same whatever the width of a register, and a loop's remainder does the arithmetic of its body.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::gpu;
use crate::machine::features;
use crate::pool;
use crate::slice::{Rows, RowsMut};

/// Whether [`vectorised!`] functions may be called: without FMA, `mul_add` would be a library call.
pub(crate) fn available() -> bool {
    features().avx2 && gpu::emulating().is_none()
}

/// Compiles a function's body for AVX-512 and AVX2; the name dispatches. Call only when [`available`].
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $output:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $type),*) $(-> $output)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $type),*) $(-> $output)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $type),*) $(-> $output)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $type),*) $(-> $output)? { body($($arg),*) }
                let features = $crate::machine::features();
                if features.avx512f {
                    // SAFETY: the instruction sets were asked for.
                    return unsafe { avx512($($arg),*) };
                }
                if features.avx2 {
                    // SAFETY: the instruction sets were asked for.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// e^x within 2 ulp over the normal range; 0 below -86.98 (2^-126 and what is less), infinity above 88.7, NaN for NaN.
/// x = n ln 2 + r with ln 2 in two parts (Cody and Waite), polynomial of Cephes' expf.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -86.98;
    const HIGHEST: f32 = 89.0;
    // Written so that a NaN falls through both.
    let clamped = if x > HIGHEST { HIGHEST } else { x };
    let clamped = if clamped < LOWEST { LOWEST } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = shifted - ROUNDER;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = (r * r).mul_add(p, r) + 1.0;
    // 2^n in two factors: n = 128 (x from 88.4) has no float of its own.
    let half = f32::from_bits((shifted.to_bits() << 23).wrapping_add(ONE_BITS - (1 << 23)));
    let y = p * half * 2.0;
    if x < LOWEST { 0.0 } else { y }
}

/// 2^x for x <= 0 within 3 ulp, 0 below -126 (and for -infinity): the softmax's exponential. Minimax polynomial of
/// degree 5 on [-1/2, 1/2], relative error 9e-8, exactly 1 at 0.
#[inline(always)]
pub(crate) fn exp2_nonpositive(x: f32) -> f32 {
    let shifted = x + ROUNDER;
    let r = x - (shifted - ROUNDER);
    let p = 1.326_472_7e-3f32;
    let p = p.mul_add(r, 9.671_513e-3);
    let p = p.mul_add(r, 5.550_733_6e-2);
    let p = p.mul_add(r, 2.402_224_2e-1);
    let p = p.mul_add(r, f32::from_bits(0x3f31_7215)); // 3 ulp below ln 2
    let p = p.mul_add(r, 1.0);
    let y = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x > -126.0 { y } else { 0.0 }
}

/// 1.5 * 2^23: added to |x| < 2^22 it leaves the nearest integer in the low bits of the mantissa.
const ROUNDER: f32 = 12_582_912.0;
const ONE_BITS: u32 = 0x3f80_0000;

/// Running sums per row: enough independent chains to hide the latency of an addition.
const LANES: usize = 64;

/// Sum of a[i] * b[i], fused, always in the same order: 64 running sums, then a tree over
/// them.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
        }
    }
    for ((a, b), sum) in a_rest.iter().zip(b_rest).zip(&mut sums) {
        *sum = a.mul_add(*b, *sum);
    }
    tree(sums)
}

/// Sum of `term` of each element, in the order of [`dot`].
#[inline(always)]
pub(crate) fn sum_of(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for x in blocks {
        for lane in 0..LANES {
            sums[lane] += term(x[lane]);
        }
    }
    for (x, sum) in rest.iter().zip(&mut sums) {
        *sum += term(*x);
    }
    tree(sums)
}

#[inline(always)]
fn tree(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0]
}

/// The largest of a row; -infinity for an empty one. NaNs are passed over.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for x in blocks {
        for lane in 0..LANES {
            best[lane] = if x[lane] > best[lane] { x[lane] } else { best[lane] };
        }
    }
    for (x, best) in rest.iter().zip(&mut best) {
        *best = if *x > *best { *x } else { *best };
    }
    best.iter()
        .fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// The rows of a float32 CPU tensor [n, width]; None when the fast paths do not apply.
pub(crate) fn rows(tensor: &Tensor) -> Option<Rows<'_>> {
    if available() { Rows::of(tensor) } else { None }
}

/// A new float32 CPU tensor [n, width] of undefined content.
pub(crate) fn uninit(n: usize, width: usize) -> Tensor {
    Tensor::empty([n as i64, width as i64], (Kind::Float, Device::Cpu))
}

/// The memory of a tensor just made by [`uninit`].
pub(crate) fn rows_mut(tensor: &mut Tensor) -> RowsMut<'_> {
    RowsMut::of(tensor).expect("a new float32 CPU matrix")
}

/// A vector [n] of a float32 CPU tensor, contiguous. None as in [`rows`].
pub(crate) fn vector(tensor: &Tensor) -> Option<&[f32]> {
    if !available()
        || tensor.device() != Device::Cpu
        || tensor.kind() != Kind::Float
        || !tensor.is_contiguous()
    {
        return None;
    }
    // SAFETY: a contiguous float32 tensor has numel floats; the borrow of the tensor keeps them alive. As everywhere in
    // tch, another handle of the same storage could write meanwhile; no op of this crate writes its read-only inputs.
    Some(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) })
}

/// Elements below which a second thread costs more than it saves (a hand-over is a few microseconds).
const GRAIN: usize = 16 * 1024;

/// Calls `f` with ranges that cover 0..n in parallel, each of about [`GRAIN`] elements of `width` each.
pub(crate) fn in_chunks(n: usize, width: usize, f: impl Fn(Range<usize>) + Sync) {
    let chunk = (GRAIN / width.max(1)).max(1);
    pool::for_each(n.div_ceil(chunk), |task| {
        f(task * chunk..((task + 1) * chunk).min(n))
    });
}

/// A new [n, width], each row written by `write`.
pub(crate) fn map_rows(n: usize, width: usize, write: impl Fn(usize, &mut [f32]) + Sync) -> Tensor {
    let mut y = uninit(n, width);
    let to: RowsMut = rows_mut(&mut y);
    in_chunks(n, width, |rows| {
        // SAFETY: the row is this task's alone.
        rows.for_each(|row| write(row, unsafe { to.row(row) }));
    });
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        vectorised!(
            fn map(x: &[f32], y: &mut [f32]) {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = exp(*x);
                }
            }
        );
        let x: Vec<f32> = (0..2_000_003)
            .map(|i| -86.97 + i as f32 * (175.6 / 2_000_003.0))
            .collect();
        let mut y = vec![0.0; x.len()];
        map(&x, &mut y);
        let worst = x
            .iter()
            .zip(&y)
            .map(|(x, y)| ulps(*y, f64::from(*x).exp()))
            .fold(0.0, f64::max);
        assert!(worst < 2.0, "{worst} ulp");
        assert_eq!([exp(0.0), exp(-1e9), exp(f32::NEG_INFINITY)], [1.0, 0.0, 0.0]);
        assert_eq!([exp(1e9), exp(f32::INFINITY)], [f32::INFINITY; 2]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp2_is_within_three_ulp() {
        let worst = (0..2_000_003)
            .map(|i| i as f32 * (-125.99 / 2_000_003.0))
            .map(|x| ulps(exp2_nonpositive(x), f64::from(x).exp2()))
            .fold(0.0, f64::max);
        assert!(worst < 3.0, "{worst} ulp");
        assert_eq!(
            [0.0, -127.0, -1e30, f32::NEG_INFINITY].map(exp2_nonpositive),
            [1.0, 0.0, 0.0, 0.0]
        );
    }

    #[test]
    fn sums_take_every_element_once() {
        for n in [0usize, 1, 15, 63, 64, 65, 128, 1000] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let whole = (n * n.saturating_sub(1) / 2) as f32;
            assert_eq!(dot(&x, &vec![1.0; n]), whole, "n = {n}");
            assert_eq!(max(&x), if n == 0 { f32::NEG_INFINITY } else { (n - 1) as f32 });
        }
    }

    fn ulps(got: f32, want: f64) -> f64 {
        let rounded = want as f32;
        let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
        (f64::from(got) - want).abs() / ulp
    }
}
