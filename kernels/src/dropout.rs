//! Dropout whose mask is a function of (seed, step, stream, row, column) and of nothing else: a resumed job, another
//! number of threads or other rows in the batch give the same mask, and the backward draws it again instead of keeping
//! it. Not a generator for anything that must be unpredictable.

use tch::Tensor;

use crate::gpu::{self, Gpu};
use crate::vector::{in_chunks, rows, rows_mut, uninit, vectorised};

/// What a mask depends on besides row and column. `stream` tells the places of one step apart (layer and module).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub seed: u64,
    pub step: u64,
    pub stream: u64,
}

/// Of the stream's endless matrix, the row and column where an input begins: a rank that holds some columns of an input
/// drops what it would drop of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Corner {
    pub row: u64,
    pub column: u32,
}

/// x * keep / (1 - p) for `x` [T, K], which begins at `corner` of the stream. The same call on the gradient of the result
/// is the backward.
///
/// # Panics
/// When p is not in [0, 1).
pub fn apply(x: &Tensor, p: f64, key: Key, corner: Corner) -> Tensor {
    let Some(from) = rows(x) else {
        return match gpu::of(x) {
            Some(gpu) => apply_gpu(gpu, x, p, key, corner),
            None => apply_reference(x, p, key, corner),
        };
    };
    let (threshold, scale) = (threshold(p), scale(p));
    let mut y = uninit(from.rows, from.width);
    let to = rows_mut(&mut y);
    in_chunks(from.rows, from.width, |rows| {
        for row in rows {
            // SAFETY: the row is this task's alone.
            let y = unsafe { to.row(row) };
            apply_row(
                from.row(row),
                row_key(key, corner.row + row as u64),
                corner.column,
                threshold,
                scale,
                y,
            );
        }
    });
    y
}

fn apply_gpu(gpu: Gpu, x: &Tensor, p: f64, key: Key, corner: Corner) -> Tensor {
    let [t, columns] = x.size()[..] else {
        panic!("x is not a matrix: {:?}", x.size())
    };
    let x = x.contiguous();
    let y = x.empty_like();
    let args = [
        (&x).into(),
        (&y).into(),
        gpu::int(columns),
        (key.seed as i64).into(),
        (key.step as i64).into(),
        (key.stream as i64).into(),
        (corner.row as i64).into(),
        (corner.column as i32).into(),
        (threshold(p) as i32).into(),
        scale(p).into(),
    ];
    gpu.launch("dropout", [t as usize, 1, 1], 256, &args);
    y
}

/// The same in plain tch on any device; the mask is drawn on the host.
pub fn apply_reference(x: &Tensor, p: f64, key: Key, corner: Corner) -> Tensor {
    let [t, columns] = x.size()[..] else {
        panic!("x is not a matrix: {:?}", x.size())
    };
    let threshold = threshold(p);
    let mut factors = Vec::with_capacity((t * columns) as usize);
    for row in 0..t as u64 {
        let row_key = row_key(key, corner.row + row);
        factors.extend((corner.column..corner.column + columns as u32).map(|column| {
            match hash(row_key, column) >= threshold {
                true => scale(p),
                false => 0.0,
            }
        }));
    }
    x * Tensor::from_slice(&factors)
        .view([t, columns])
        .to_device(x.device())
        .to_kind(x.kind())
}

fn threshold(p: f64) -> u32 {
    assert!(
        (0.0..1.0).contains(&p),
        "dropout probability {p} is not in [0, 1)"
    );
    (p * 2f64.powi(32)) as u32
}

fn scale(p: f64) -> f32 {
    (1.0 / (1.0 - p)) as f32
}

vectorised!(
    fn apply_row(x: &[f32], row_key: (u32, u32), column0: u32, threshold: u32, scale: f32, y: &mut [f32]) {
        for (column, (y, x)) in (column0..).zip(y.iter_mut().zip(x)) {
            *y = if hash(row_key, column) >= threshold {
                x * scale
            } else {
                0.0
            };
        }
    }
);

/// SplitMix64 (Steele, Lea and Flood, 2014) absorbing one word after the other: once a row, so it may be slow and good.
fn row_key(key: Key, row: u64) -> (u32, u32) {
    let mut state = 0u64;
    for word in [key.seed, key.step, key.stream, row] {
        state = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 31;
    }
    (state as u32, (state >> 32) as u32)
}

/// 32 bits of an element: the mixer "lowbias32" (C. Wellons) between the two halves of the row's key, in 32-bit
/// arithmetic so that a vector register holds as many as there are floats.
#[inline(always)]
fn hash((low, high): (u32, u32), column: u32) -> u32 {
    let mut x = column.wrapping_mul(0x9e37_79b9) ^ low;
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_add(high).wrapping_mul(0x846c_a68b);
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x ^ (x >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
    const KEY: Key = Key {
        seed: 17,
        step: 3,
        stream: 5,
    };

    #[test]
    fn agrees_with_the_reference() {
        gpu::everywhere(judge_by_the_reference);
    }

    fn judge_by_the_reference() {
        for (t, columns, p) in [(1, 1, 0.5), (3, 37, 0.1), (50, 576, 0.05), (4, 64, 0.0)] {
            let x = Tensor::randn([t, columns + 2], FLOAT).narrow(1, 1, columns);
            let corner = Corner { row: 9, column: 4 };
            assert_eq!(apply(&x, p, KEY, corner), apply_reference(&x, p, KEY, corner));
        }
    }

    #[test]
    fn a_row_does_not_know_its_neighbours() {
        let x = Tensor::randn([20, 100], FLOAT);
        let at = |row: u64, column: u32| Corner { row, column };
        let all = apply(&x, 0.3, KEY, at(100, 0));
        for row in 0..20 {
            assert_eq!(
                apply(&x.narrow(0, row, 1), 0.3, KEY, at(100 + row as u64, 0)),
                all.narrow(0, row, 1)
            );
        }
        // Nor do some columns know the others.
        assert_eq!(
            apply(&x.narrow(1, 37, 50), 0.3, KEY, at(100, 37)),
            all.narrow(1, 37, 50)
        );
    }

    /// Shares within 5 standard deviations, along rows, along columns and between keys.
    #[test]
    fn masks_are_uniform_and_independent() {
        let ones = Tensor::ones([1000, 1000], FLOAT);
        for p in [0.05, 0.5, 0.9] {
            let keep = |key, row| {
                let corner = Corner { row, column: 0 };
                apply(&ones, p, key, corner).gt(0.0).to_kind(Kind::Double)
            };
            let near = |share: f64, q: f64, n: f64| {
                let bound = 5.0 * (q * (1.0 - q) / n).sqrt();
                assert!(
                    (share - q).abs() < bound,
                    "p {p}: {share} is not {q} within {bound}"
                );
            };
            let mask = keep(KEY, 0);
            near(mask.mean(Kind::Double).double_value(&[]), 1.0 - p, 1e6);
            for dim in [0i64, 1] {
                let means = mask.mean_dim([dim].as_slice(), false, Kind::Double);
                near(means.min().double_value(&[]), 1.0 - p, 1e3);
                near(means.max().double_value(&[]), 1.0 - p, 1e3);
            }
            let both = (1.0 - p) * (1.0 - p);
            let others = [
                keep(Key { seed: 18, ..KEY }, 0),
                keep(Key { step: 4, ..KEY }, 0),
                keep(Key { stream: 6, ..KEY }, 0),
                keep(KEY, 1),
                mask.roll([1], [1]),
                mask.roll([16], [1]),
            ];
            for other in others {
                near((&mask * other).mean(Kind::Double).double_value(&[]), both, 1e6);
            }
        }
    }
}
