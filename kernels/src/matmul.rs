//! Products of two activations, float32 in and out: gradients of adapters and of full training. Not for frozen weights
//! (`linear`), which are packed once and not per call.
//!
//! On the CPU a row of the result depends only on its own row of the left side: bit for bit the same in any batch.

pub(crate) mod gemm;

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::pool::{self, Scratch};
use crate::simd::pack::{self, Words};
use crate::simd::{Element, PANEL};
use crate::slice::{Plain, Rows, RowsMut, Shared};
use crate::weight::{self, Precision};
use gemm::{Block, Gemm, Left, Part, Right, left_stride, views};

/// `a bt`: a `[M, K]`, b `[N, K]` -> `[M, N]`.
pub fn nt(a: &Tensor, b: &Tensor) -> Tensor {
    product(a, Side::Rows, b, Side::Columns, Precision::F32)
}

/// `a b`: a `[M, K]`, b `[K, N]` -> `[M, N]`.
pub fn nn(a: &Tensor, b: &Tensor) -> Tensor {
    product(a, Side::Rows, b, Side::Rows, Precision::F32)
}

/// `at b`: a `[K, M]`, b `[K, N]` -> `[M, N]`.
pub fn tn(a: &Tensor, b: &Tensor) -> Tensor {
    product(a, Side::Columns, b, Side::Rows, Precision::F32)
}

/// [`nt`] with both sides rounded to `precision` first.
pub fn nt_rounded(a: &Tensor, b: &Tensor, precision: Precision) -> Tensor {
    product(a, Side::Rows, b, Side::Columns, precision)
}

/// [`nn`] with both sides rounded to `precision` first.
pub fn nn_rounded(a: &Tensor, b: &Tensor, precision: Precision) -> Tensor {
    product(a, Side::Rows, b, Side::Rows, precision)
}

/// [`tn`] with both sides rounded to `precision` first.
pub fn tn_rounded(a: &Tensor, b: &Tensor, precision: Precision) -> Tensor {
    product(a, Side::Columns, b, Side::Rows, precision)
}

/// What the rows of an operand's tensor are of the mathematical operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Rows,
    /// The operand is the tensor's transpose.
    Columns,
}

/// Bytes of each side in scratch at a time: a gradient of an output head would otherwise hold a copy of both.
const SIDE_BYTES: usize = 16 << 20;

fn product(a: &Tensor, a_side: Side, b: &Tensor, b_side: Side, precision: Precision) -> Tensor {
    let Some([rows_a, rows_b]) = views([a, b]) else {
        return reference(a, a_side, b, b_side, precision);
    };
    let ((m, k), (k_b, n)) = (shape(rows_a, a_side), shape(rows_b, b_side));
    assert_eq!(
        k,
        k_b,
        "{:?} as {a_side:?} times {:?} as {b_side:?}",
        a.size(),
        b.size()
    );
    let mut out = Tensor::empty([m as i64, n as i64], (Kind::Float, Device::Cpu));
    let to = RowsMut::of(&mut out).expect("a new float CPU tensor");
    let (left, right, destination) = match (a_side, b_side) {
        // at b is (bt a)t, to the same bits. The left side is turned, which is dearer than to cut the right one into panels:
        // the gradient of an adapter's B has a thousand rows, of a few ranks each.
        (Side::Columns, Side::Rows) if n * TURNED_FEWER <= m => (
            (rows_b, Side::Columns),
            (rows_a, Side::Rows),
            Destination::Turned(to),
        ),
        _ => ((rows_a, a_side), (rows_b, b_side), Destination::AsItIs(to)),
    };
    match precision {
        Precision::F32 => fast::<f32>(left, right, &destination),
        Precision::Bf16 => fast::<u16>(left, right, &destination),
    }
    out
}

/// How many times fewer columns the right side has where the product's transpose is computed: its result is turned.
const TURNED_FEWER: usize = 4;

/// Where a result goes.
enum Destination<'a> {
    AsItIs(RowsMut<'a>),
    /// The result's transpose.
    Turned(RowsMut<'a>),
}

impl Destination<'_> {
    /// The block of a result whose part begins at `row` and `column`.
    fn put(&self, block: &Block, row: usize, column: usize) {
        let (row, column) = (row + block.rows.start, column + block.columns.start);
        match self {
            Destination::AsItIs(to) => {
                for i in 0..block.rows.len() {
                    // SAFETY: a block's columns of a row belong to its task.
                    let to = unsafe { to.columns(row + i, column..column + block.columns.len()) };
                    to.copy_from_slice(block.row(i));
                }
            }
            Destination::Turned(to) => {
                let from = Words {
                    ptr: block.sums.cast_const().cast(),
                    stride: block.stride,
                };
                let (rows, columns) = (block.rows.len(), block.columns.len());
                assert!(
                    column + columns <= to.rows && row + rows <= to.width,
                    "inside the result"
                );
                // SAFETY: fast paths are available; the block's rows, into as many columns of the rows of `to` that are
                // its columns: this task's alone.
                unsafe {
                    pack::transpose(from, rows, columns, to.at(column, row).cast(), to.stride);
                }
            }
        }
    }
}

/// The operand's own shape.
fn shape(tensor: Rows, side: Side) -> (usize, usize) {
    match side {
        Side::Rows => (tensor.rows, tensor.width),
        Side::Columns => (tensor.width, tensor.rows),
    }
}

fn reference(a: &Tensor, a_side: Side, b: &Tensor, b_side: Side, precision: Precision) -> Tensor {
    let (a, b) = (a.to_kind(precision.kind()), b.to_kind(precision.kind()));
    let a = if a_side == Side::Columns { a.tr() } else { a };
    let b = if b_side == Side::Columns { b.tr() } else { b };
    weight::product(&a, &b, precision)
}

fn fast<T: Element + Plain>((a, a_side): (Rows, Side), (b, b_side): (Rows, Side), destination: &Destination) {
    let ((m, k), (_, n)) = (shape(a, a_side), shape(b, b_side));
    let side_rows = |stride: usize| (SIDE_BYTES / size_of::<T>() / stride.max(1) / PANEL).max(1) * PANEL;
    let (left_rows, right_columns) = (side_rows(left_stride::<T>(k)), side_rows(k));
    for first_column in (0..n).step_by(right_columns) {
        let columns = first_column..n.min(first_column + right_columns);
        let panels = pack_right::<T>(b, b_side, columns.clone(), k);
        for first_row in (0..m).step_by(left_rows) {
            let rows = first_row..m.min(first_row + left_rows);
            let left = match a_side {
                Side::Rows => Left::round(a.part(rows.clone())),
                Side::Columns => turn::<T>(a, rows.clone()),
            };
            let gemm = Gemm {
                left: &left,
                parts: &[Part {
                    rows: 0..left.m,
                    right: Right::Panels(&panels),
                }],
                k,
                n: columns.len(),
            };
            gemm.run(|_, block| destination.put(&block, first_row, first_column));
        }
    }
}

/// Columns `rows` of a `[K, M]`, as rows of a left side.
fn turn<'a, T: Element + Plain>(a: Rows, rows: Range<usize>) -> Left<'a, T> {
    let (m, k) = (rows.len(), a.rows);
    let (stride, padded) = (left_stride::<T>(k), T::steps(k) * T::PER_STEP);
    let mut turned = pool::scratch::<T>(m * stride);
    let to = Shared(turned.as_mut_ptr());
    pool::for_each(m.div_ceil(PANEL), |task| {
        let block = task * PANEL..m.min((task + 1) * PANEL);
        let from = Words {
            ptr: a.at(0, rows.start + block.start).cast(),
            stride: a.stride,
        };
        let mut float = pool::scratch::<f32>(block.len() * k);
        // SAFETY: fast paths are available; K rows of the block's columns of a, into the block's rows of K each.
        unsafe { pack::transpose(from, k, block.len(), float.as_mut_ptr().cast(), k) };
        for (i, row) in block.enumerate() {
            // SAFETY: row < m of `turned`, written by this task alone.
            let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * stride), padded) };
            T::round(&float[i * k..][..k], to);
        }
    });
    Left::scratch(turned, m, stride)
}

/// Columns `columns` of the right operand as panels.
fn pack_right<T: Element + Plain>(b: Rows, side: Side, columns: Range<usize>, k: usize) -> Scratch<T> {
    let panel_len = T::panel_len(k);
    let n_panels = columns.len().div_ceil(PANEL);
    let mut panels = pool::scratch::<T>(n_panels * panel_len);
    let to = Shared(panels.as_mut_ptr());
    pool::for_each(n_panels, |panel| {
        let block = panel_columns(columns.clone(), panel);
        // SAFETY: this panel of the scratch above, written by this task alone.
        let panel = unsafe { std::slice::from_raw_parts_mut(to.get().add(panel * panel_len), panel_len) };
        match side {
            Side::Rows => {
                for (step, to) in panel.chunks_exact_mut(PANEL * T::PER_STEP).enumerate() {
                    let mut rows = [[T::default(); PANEL]; 2];
                    for (i, row) in rows
                        .iter_mut()
                        .enumerate()
                        .take(T::PER_STEP.min(k - step * T::PER_STEP))
                    {
                        T::round(&b.row(step * T::PER_STEP + i)[block.clone()], row);
                    }
                    pack::pack_step([&rows[0], &rows[1]], to);
                }
            }
            Side::Columns => {
                let padded = T::steps(k) * T::PER_STEP;
                let mut rows = pool::scratch::<T>(block.len() * padded);
                for (i, row) in block.clone().enumerate() {
                    T::round(b.row(row), &mut rows[i * padded..][..padded]);
                }
                // SAFETY: fast paths are available; `rows` holds the block's rows of whole steps.
                unsafe {
                    pack::pack_rows(
                        rows.as_ptr(),
                        padded,
                        block.len(),
                        T::steps(k),
                        panel.as_mut_ptr(),
                    )
                };
            }
        }
    });
    panels
}

fn panel_columns(columns: Range<usize>, panel: usize) -> Range<usize> {
    let start = columns.start + panel * PANEL;
    start..columns.end.min(start + PANEL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: i64, columns: i64) -> Tensor {
        Tensor::randn([rows, columns], (Kind::Float, Device::Cpu))
    }

    /// All layouts and precisions over shapes around the tiles, against tch; rows alone have the bits they have in a batch.
    #[test]
    fn products_are_the_reference_and_batch_invariant() {
        for (m, n, k) in [
            (1, 1, 1),
            (3, 5, 7),
            (16, 100, 40),
            (33, 16, 129),
            (70, 65, 300),
            (200, 130, 64),
            (300, 16, 600),
        ] {
            for precision in [Precision::F32, Precision::Bf16] {
                for (a_side, b_side) in [
                    (Side::Rows, Side::Columns),
                    (Side::Rows, Side::Rows),
                    (Side::Columns, Side::Rows),
                ] {
                    let a = if a_side == Side::Rows {
                        random(m, k)
                    } else {
                        random(k, m)
                    };
                    let b = if b_side == Side::Rows {
                        random(k, n)
                    } else {
                        random(n, k)
                    };
                    let fast = product(&a, a_side, &b, b_side, precision);
                    let slow = reference(&a, a_side, &b, b_side, precision);
                    let error = (&fast - &slow).abs().max().double_value(&[]);
                    let tolerance = 4e-7 * k as f64 + 5e-6;
                    let what = format!("{a_side:?} {b_side:?} {precision:?} [{m}, {k}] [{k}, {n}]");
                    assert!(
                        error < tolerance,
                        "{what}: {error:.2e} off, {tolerance:.2e} allowed"
                    );
                    for (first, rows) in [(0, 1), (m - 1, 1), (m / 2, m - m / 2)] {
                        let part = a.narrow(if a_side == Side::Rows { 0 } else { 1 }, first, rows);
                        let alone = product(&part, a_side, &b, b_side, precision);
                        assert!(
                            alone.equal(&fast.narrow(0, first, rows)),
                            "{what}: {rows} rows from {first}"
                        );
                    }
                }
            }
        }
    }

    /// Sides that do not fit the scratch at once.
    #[test]
    fn large_sides_are_cut() {
        let (a, b) = (random(40, 9000), random(40, 33));
        let fast = tn(&a, &b);
        assert!((fast - a.tr().mm(&b)).abs().max().double_value(&[]) < 1e-4);
        let (a, b) = (random(7, 700), random(9000, 700));
        let fast = nt(&a, &b);
        assert!((fast - a.mm(&b.tr())).abs().max().double_value(&[]) < 1e-3);
    }

    #[test]
    fn other_tensors_go_by_the_reference() {
        let (a, b) = (
            random(4, 6).to_kind(Kind::Double),
            random(6, 5).to_kind(Kind::Double),
        );
        assert!(nn_rounded(&a, &b, Precision::F32).allclose(
            &a.mm(&b).to_kind(Kind::Float),
            1e-5,
            1e-6,
            false
        ));
        let (a, b) = (random(6, 4).tr(), random(6, 5));
        assert!(nn(&a, &b).allclose(&a.mm(&b), 1e-5, 1e-6, false));
    }
}
