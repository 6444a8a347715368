//! dx = dy W out of the panels packed for y = x Wt: the reduction now runs over N, so blocks of the panels are turned
//! into panels over N in scratch, a few hundred rows of W at a time. No second copy of W stays resident. A quantised W is
//! decoded on the way, and its numbers, scaled, are rounded to the precision of the multiply.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{WeightRows, check_groups, device, parts};
use crate::gpu;
use crate::matmul::gemm::{Left, Part, ROWS_TOGETHER, Right, for_each_of, spread, views};
use crate::pool;
use crate::simd::pack::{SQUARE, turn_square, unpack_rows};
use crate::simd::{self, Element, PANEL, Product, Sum};
use crate::slice::{Plain, Rows, RowsMut};
use crate::weight::{Multiplied, Precision, Weight};

/// Columns of dx a task computes side by side.
const BLOCK_COLUMNS: usize = 4 * PANEL;
/// Rows of W turned at a time: with all columns of a block 128 KiB in bfloat16, beside the rows of dy in the cache.
const TURN_ROWS: usize = 16 * PANEL;
/// Rows of dx for which a turned block is used: the turning is then a few percent of the product.
const BLOCK_ROWS: usize = 256;

/// What comes back through a LoRA branch: `dshrunk A` of some rows, dshrunk `[rows, R]` float32, A `[R, K]`.
pub struct BranchBack<'a> {
    pub rows: Range<i64>,
    pub dshrunk: &'a Tensor,
    pub a: &'a Weight,
}

/// dx `[T, K]` = dy W, dy `[T, N]` float32 (rounded to W's precision), sums in float32.
pub fn linear_backward(dy: &Tensor, w: &Weight) -> Tensor {
    linear_backward_with(dy, w, &[])
}

/// The same, plus what comes back through branches: groups of rows that do not overlap.
pub fn linear_backward_with(dy: &Tensor, w: &Weight, branches: &[BranchBack]) -> Tensor {
    let rows = 0..dy.size()[0];
    backward(
        dy,
        &[WeightRows {
            rows,
            weight: w,
            bias: None,
        }],
        branches,
    )
}

/// The same, the rows of each group by its own W: the gradient of [`super::linear_grouped`] without LoRA.
pub fn linear_grouped_backward(dy: &Tensor, groups: &[WeightRows]) -> Tensor {
    backward(dy, groups, &[])
}

fn backward(dy: &Tensor, groups: &[WeightRows], branches: &[BranchBack]) -> Tensor {
    let first = check_groups(dy, groups, "dy", Weight::n);
    for BranchBack { rows, dshrunk, a } in branches {
        let size = [rows.end - rows.start, a.n()];
        assert_eq!(
            (dshrunk.size(), a.k()),
            (size.to_vec(), first.k()),
            "a branch of {rows:?}"
        );
    }
    let Some([rows]) = views([dy]) else {
        return match gpu::of(dy) {
            Some(gpu) => device::backward(gpu, dy, groups, branches),
            None => reference(dy, groups, branches),
        };
    };
    let mut dx = Tensor::empty([rows.rows as i64, first.k()], (Kind::Float, Device::Cpu));
    let to = RowsMut::of(&mut dx).expect("a new float CPU tensor");
    let done = match first.precision() {
        Precision::F32 => fast::<f32>(rows, groups, branches, to),
        Precision::Bf16 => fast::<u16>(rows, groups, branches, to),
    };
    match done {
        Some(apart) => {
            add_branches(&dx, &apart);
            dx
        }
        None => reference(dy, groups, branches),
    }
}

fn add_branches(dx: &Tensor, branches: &[&BranchBack]) {
    for BranchBack { rows, dshrunk, a } in branches {
        let _ = dx
            .narrow(0, rows.start, rows.end - rows.start)
            .g_add_(&linear_backward(dshrunk, a));
    }
}

fn reference(dy: &Tensor, groups: &[WeightRows], branches: &[BranchBack]) -> Tensor {
    let parts = groups.iter().map(|WeightRows { rows, weight, .. }| {
        weight.reference_backward(&dy.narrow(0, rows.start, rows.end - rows.start))
    });
    let dx = Tensor::cat(&parts.collect::<Vec<_>>(), 0);
    add_branches(&dx, &branches.iter().collect::<Vec<_>>());
    dx
}

/// A branch whose A is in the precision of W.
struct Back<'a, T: Element + Plain> {
    rows: Range<usize>,
    dshrunk: Left<'a, T>,
    a: Right<'a, T>,
    ranks: usize,
}

impl<'a, T: Multiplied> Back<'a, T> {
    fn new(branch: &BranchBack<'a>) -> Option<Back<'a, T>> {
        if branch.a.precision() != T::PRECISION {
            return None;
        }
        let [dshrunk] = views([branch.dshrunk])?;
        Some(Back {
            rows: branch.rows.start as usize..branch.rows.end as usize,
            dshrunk: Left::round(dshrunk),
            a: branch.a.right()?,
            ranks: branch.a.n() as usize,
        })
    }
}

/// The branches that are still to be added; None where only the reference can go.
fn fast<'a, T: Multiplied>(
    dy: Rows,
    groups: &[WeightRows],
    branches: &'a [BranchBack<'a>],
    to: RowsMut,
) -> Option<Vec<&'a BranchBack<'a>>> {
    let (n, k) = (dy.width, to.width);
    let parts = parts::<T>(groups)?;
    let (mut at_once, mut apart) = (vec![], vec![]);
    for branch in branches {
        match Back::<T>::new(branch) {
            Some(back) => at_once.push(back),
            None => apart.push(branch),
        }
    }
    let dy = &Left::<T>::round(dy);
    let column_blocks = k.div_ceil(BLOCK_COLUMNS);
    let cut = |part: &Part<T>| {
        let m = part.rows.len();
        // Enough blocks for all threads, though each turns W anew.
        let wanted = (2 * pool::threads())
            .div_ceil(column_blocks.max(1))
            .min(m.div_ceil(ROWS_TOGETHER));
        let row_blocks = m.div_ceil(BLOCK_ROWS).max(wanted);
        (row_blocks, row_blocks * column_blocks)
    };
    for_each_of(&parts, cut, |part, &row_blocks, task| {
        let part = &parts[part];
        let w = &part.right;
        let (block, group) = (task % row_blocks, task / row_blocks);
        let rows = spread(part.rows.len(), row_blocks, block);
        let rows = part.rows.start + rows.start..part.rows.start + rows.end;
        let columns = group * BLOCK_COLUMNS..k.min((group + 1) * BLOCK_COLUMNS);
        let n_panels = columns.len().div_ceil(PANEL);
        let panel_stride = T::panel_len(TURN_ROWS);
        let mut turned = pool::scratch::<T>(n_panels * panel_stride);
        let sums = to.at(rows.start, columns.start);
        // Rows `reduced` of a right side, times these columns of some rows of a left side, to the sums of the rows from `at` on.
        let mut add =
            |w: &Right<T>, reduced: Range<usize>, left: (&Left<T>, Range<usize>), at: usize, sum: Sum| {
                turn(w, k, &reduced, &columns, &mut turned);
                let (left, own) = left;
                let product = Product {
                    m: own.len(),
                    steps: T::steps(reduced.len()),
                    a: left.row(own.start).wrapping_add(reduced.start),
                    lda: left.stride,
                    panels: turned.as_ptr(),
                    panel_stride,
                    n: columns.len(),
                    c: sums.wrapping_add(at * to.stride),
                    ldc: to.stride,
                    sum,
                };
                // SAFETY: packed panels mean that fast paths are available; `turned` holds the steps of all its panels, the left
                // side's rows are whole steps, and these rows and columns of dx are this task's alone.
                unsafe { simd::product(&product) };
            };
        for first in (0..n).step_by(TURN_ROWS) {
            let sum = if first == 0 { Sum::Set } else { Sum::Continue };
            add(w, first..n.min(first + TURN_ROWS), (dy, rows.clone()), 0, sum);
        }
        for Back {
            rows: of,
            dshrunk,
            a,
            ranks,
        } in &at_once
        {
            let own = of.start.max(rows.start)..of.end.min(rows.end);
            if own.is_empty() {
                continue;
            }
            for first in (0..*ranks).step_by(TURN_ROWS) {
                let left = (dshrunk, own.start - of.start..own.end - of.start);
                let reduced = first..(first + TURN_ROWS).min(*ranks);
                add(a, reduced, left, own.start - rows.start, Sum::Add);
            }
        }
    });
    Some(apart)
}

/// Rows `reduced` and columns `columns` of W, out of its panels over K, into panels over N: `turned[c][n][j] =
/// W[reduced.start + n][columns.start + 32 c + j]`. A task's share, so not parallel itself.
fn turn<T: Element + Plain>(
    w: &Right<T>,
    k: usize,
    reduced: &Range<usize>,
    columns: &Range<usize>,
    turned: &mut [T],
) {
    let (panel_len, turned_len) = (T::panel_len(k), T::panel_len(TURN_ROWS));
    let block_len = T::panel_len(columns.len());
    let mut decoded = match w {
        Right::Panels(_) => pool::scratch::<T>(0),
        Right::Packed(_) => pool::scratch::<T>(T::panel_len(columns.len().next_multiple_of(4))),
    };
    for first in reduced.clone().step_by(PANEL) {
        let from = match w {
            Right::Panels(panels) => {
                &panels[first / PANEL * panel_len + columns.start * PANEL..][..block_len]
            }
            Right::Packed(packed) => {
                packed.panel(first / PANEL, columns.clone(), &mut decoded);
                &decoded[..block_len]
            }
        };
        let at = (first - reduced.start) * PANEL..(first - reduced.start + PANEL) * PANEL;
        let turned = turned
            .chunks_exact_mut(turned_len)
            .map(|turned| &mut turned[at.clone()]);
        if T::PER_STEP == 1 {
            // In float32 a step of a panel is a row of W's block already.
            for (from, turned) in from.chunks(PANEL * PANEL).zip(turned) {
                // SAFETY: packed panels mean that fast paths are available; up to 32 steps of a panel of W into 32 rows
                // of 32.
                unsafe {
                    unpack_rows(
                        from.as_ptr(),
                        from.len() / PANEL,
                        PANEL,
                        turned.as_mut_ptr(),
                        PANEL,
                    )
                };
            }
            continue;
        }
        for (from, turned) in from.chunks(SQUARE).zip(turned) {
            let mut last = [T::default(); SQUARE];
            let from = match from.len() {
                SQUARE => from,
                len => {
                    last[..len].copy_from_slice(from);
                    &last
                }
            };
            // SAFETY: as above; two values a step are 16 bits each, and both are a square. Columns of W beyond N are there, and
            // zero.
            unsafe { turn_square(from.as_ptr().cast(), turned.as_mut_ptr().cast()) };
        }
    }
}
