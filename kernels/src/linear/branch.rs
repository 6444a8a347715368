//! The LoRA branch of a linear's job: shrink `s = x At` before the base product, expand `(scale s) Bt` in its tasks.

use std::ops::Range;

use tch::Tensor;

use super::{LoraPart, LoraRows};
use crate::matmul::gemm::{Block, Left};
use crate::pool::{self, Scratch};
use crate::simd::{self, Element, PANEL, Product, Sum};
use crate::slice::{Plain, Rows, RowsMut, Shared};
use crate::weight::{Precision, Store, Weight};

/// Rows of one shrinking task: enough that A's panel is read a few times only, few enough to share out a batch.
const SHRINK_ROWS: usize = 48;

/// One group's rows of the job and its module.
pub(super) struct Branch<'a> {
    rows: Range<usize>,
    input: Input<'a>,
    a: &'a Weight,
    parts: Vec<Part<'a>>,
    /// `scale s` of all parts, rounded to each part's own precision.
    float: Scaled<f32>,
    bfloat: Scaled<u16>,
}

/// What A is multiplied with.
enum Input<'a> {
    /// The job's own left side, rounded already.
    Base,
    Float(Left<'a, f32>),
    Bfloat(Left<'a, u16>),
}

struct Part<'a> {
    columns: Range<usize>,
    ranks: Range<usize>,
    b: &'a Weight,
    scale: f32,
    /// Where this part's ranks begin in its `Scaled`.
    offset: usize,
}

/// Rows of parts, each part in whole steps; the padding is zero.
struct Scaled<T: Element + Plain> {
    values: Scratch<T>,
    stride: usize,
}

impl<'a> Branch<'a> {
    /// `x` is the job's input, `input` the branch's. None where only the reference can go.
    pub fn new(group: &'a LoraRows<'a>, x: &Tensor, input: &'a Tensor, w: &Weight) -> Option<Branch<'a>> {
        let LoraRows { rows, module } = group;
        let (a, rows) = (&module.a, rows.start as usize..rows.end as usize);
        let (n_rows, all) = (rows.len(), Rows::of(input)?);
        assert_eq!(
            a.k(),
            w.k(),
            "A {:?} of a linear of {} inputs",
            [a.n(), a.k()],
            w.k()
        );
        let own = x.data_ptr() != input.data_ptr() || a.precision() != w.precision();
        let input = match a.store() {
            // Adapters are dense.
            Store::Plain(_) | Store::Held(_) | Store::Packed(_) => return None,
            _ if !own => Input::Base,
            Store::F32(_) => Input::Float(Left::round(all.part(rows.clone()))),
            Store::Bf16(_) => Input::Bfloat(Left::round(all.part(rows.clone()))),
        };
        let (mut float, mut bfloat) = (0, 0);
        let mut parts = Vec::with_capacity(module.parts.len());
        for LoraPart {
            columns,
            ranks,
            b,
            scale,
        } in &module.parts
        {
            let (columns, ranks) = (
                columns.start as usize..columns.end as usize,
                ranks.start as usize..ranks.end as usize,
            );
            let size = [b.n() as usize, b.k() as usize];
            assert_eq!(
                size,
                [columns.len(), ranks.len()],
                "B of columns {columns:?} and ranks {ranks:?}"
            );
            assert!(
                columns.end <= w.n() as usize && ranks.end <= a.n() as usize,
                "{columns:?}, {ranks:?}"
            );
            let width = match b.store() {
                Store::Plain(_) | Store::Held(_) | Store::Packed(_) => return None,
                Store::F32(_) => &mut float,
                Store::Bf16(_) => &mut bfloat,
            };
            let offset = *width;
            *width += ranks.len().next_multiple_of(2);
            parts.push(Part {
                columns,
                ranks,
                b,
                scale: *scale as f32,
                offset,
            });
        }
        let (float, bfloat) = (Scaled::new(n_rows, float), Scaled::new(n_rows, bfloat));
        Some(Branch {
            rows,
            input,
            a,
            parts,
            float,
            bfloat,
        })
    }

    /// Adds this branch to a block of the base product.
    pub fn expand(&self, block: &mut Block) {
        let rows = self.rows.start.max(block.rows.start)..self.rows.end.min(block.rows.end);
        if rows.is_empty() {
            return;
        }
        for part in &self.parts {
            let columns =
                part.columns.start.max(block.columns.start)..part.columns.end.min(block.columns.end);
            if columns.is_empty() {
                continue;
            }
            match part.b.store() {
                Store::F32(panels) => {
                    self.expand_part(part, &self.float, panels, rows.clone(), columns, block)
                }
                Store::Bf16(panels) => {
                    self.expand_part(part, &self.bfloat, panels, rows.clone(), columns, block)
                }
                _ => unreachable!("`new` leaves other weights to the reference"),
            }
        }
    }

    fn expand_part<T: Element + Plain>(
        &self,
        part: &Part,
        scaled: &Scaled<T>,
        panels: &[T],
        rows: Range<usize>,
        columns: Range<usize>,
        block: &mut Block,
    ) {
        let panel_len = T::panel_len(part.ranks.len());
        let mut column = columns.start;
        while column < columns.end {
            // B's panels begin with the part, the block's columns with the base's panels: they need not agree.
            let (panel, skipped) = (
                (column - part.columns.start) / PANEL,
                (column - part.columns.start) % PANEL,
            );
            let n = match skipped {
                0 => columns.end - column,
                _ => (PANEL - skipped).min(columns.end - column),
            };
            let (first_row, first_column) = (rows.start - block.rows.start, column - block.columns.start);
            let to = first_row * block.stride + first_column;
            let product = Product {
                m: rows.len(),
                steps: T::steps(part.ranks.len()),
                a: scaled.row(rows.start - self.rows.start).wrapping_add(part.offset),
                lda: scaled.stride,
                panels: panels[panel * panel_len..].as_ptr(),
                panel_stride: panel_len,
                n,
                c: block.sums.wrapping_add(to),
                ldc: block.stride,
                sum: Sum::Add,
            };
            if skipped == 0 {
                // SAFETY: the part's scaled rows and its B are packed (so fast paths are available); the rows and
                // columns are those of the block.
                unsafe { simd::product(&product) };
            } else {
                // The sum of a whole panel apart, of which the last columns are wanted.
                let mut sums = pool::scratch::<f32>(rows.len() * PANEL);
                let n = skipped + n;
                let apart = Product {
                    n,
                    c: sums.as_mut_ptr(),
                    ldc: PANEL,
                    sum: Sum::Set,
                    ..product
                };
                // SAFETY: as above, into the scratch.
                unsafe { simd::product(&apart) };
                for i in 0..rows.len() {
                    let sums = &sums[i * PANEL..][skipped..n];
                    let to = &mut block.row_mut(first_row + i)[first_column..];
                    to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
                }
            }
            column += n;
        }
    }
}

impl<T: Element + Plain> Scaled<T> {
    fn new(n_rows: usize, stride: usize) -> Scaled<T> {
        let mut values = pool::scratch::<T>(n_rows * stride);
        values.fill(T::default());
        Scaled { values, stride }
    }

    fn row(&self, row: usize) -> *const T {
        self.values.as_ptr().wrapping_add(row * self.stride)
    }
}

/// Fills the scaled rows of all branches, and `shrunk` where it is wanted: one parallel region, a panel of A (32 ranks)
/// and a few rows a task.
pub(super) fn shrink<T: Element + Plain>(branches: &mut [Branch], base: &Left<T>, shrunk: Option<RowsMut>) {
    struct Task {
        branch: usize,
        rows: Range<usize>,
        panel: usize,
    }
    let mut tasks = Vec::new();
    let mut to = Vec::with_capacity(branches.len());
    for (i, branch) in branches.iter_mut().enumerate() {
        to.push((
            Shared(branch.float.values.as_mut_ptr()),
            Shared(branch.bfloat.values.as_mut_ptr()),
        ));
        for panel in 0..(branch.a.n() as usize).div_ceil(PANEL) {
            for row in (0..branch.rows.len()).step_by(SHRINK_ROWS) {
                let rows = row..branch.rows.len().min(row + SHRINK_ROWS);
                tasks.push(Task {
                    branch: i,
                    rows,
                    panel,
                });
            }
        }
    }
    let branches = &*branches;
    pool::for_each(tasks.len(), |task| {
        let Task {
            branch: i,
            ref rows,
            panel,
        } = tasks[task];
        let (branch, (float, bfloat)) = (&branches[i], &to[i]);
        let ranks = panel * PANEL..(branch.a.n() as usize).min((panel + 1) * PANEL);
        let mut sums = [[0.0; PANEL]; SHRINK_ROWS];
        let out = Out {
            sums: sums.as_mut_ptr().cast(),
            rows: rows.clone(),
            ranks: ranks.clone(),
        };
        match (&branch.input, branch.a.store()) {
            // The base's left side is of A's precision here, so T is the type of A's panels: one of two arms each.
            (Input::Base, Store::F32(panels)) => out.fill(base, branch.rows.start, panels, branch.a),
            (Input::Base, Store::Bf16(panels)) => out.fill(base, branch.rows.start, panels, branch.a),
            (Input::Float(left), Store::F32(panels)) => out.fill(left, 0, panels, branch.a),
            (Input::Bfloat(left), Store::Bf16(panels)) => out.fill(left, 0, panels, branch.a),
            _ => unreachable!("`Branch::new` rounds the input to A's precision"),
        }
        for (row, sums) in rows.clone().zip(&sums) {
            if let Some(shrunk) = shrunk {
                // SAFETY: these ranks of this row belong to this task.
                let to = unsafe { shrunk.columns(branch.rows.start + row, ranks.clone()) };
                to.copy_from_slice(&sums[..ranks.len()]);
            }
            for part in &branch.parts {
                let own = part.ranks.start.max(ranks.start)..part.ranks.end.min(ranks.end);
                if own.is_empty() {
                    continue;
                }
                let mut scaled = [0.0; PANEL];
                let scaled = &mut scaled[..own.len()];
                scaled.copy_from_slice(&sums[own.start - ranks.start..own.end - ranks.start]);
                scaled.iter_mut().for_each(|value| *value *= part.scale);
                let at = part.offset + own.start - part.ranks.start;
                // SAFETY: these ranks of this row of the part's own values belong to this task.
                unsafe {
                    match part.b.precision() {
                        Precision::F32 => put(float, row * branch.float.stride + at, scaled),
                        Precision::Bf16 => put(bfloat, row * branch.bfloat.stride + at, scaled),
                    }
                }
            }
        }
    });
}

/// Rounds `values` to `to[at..]`.
///
/// # Safety
/// The elements are writable and nobody else's for the moment.
unsafe fn put<T: Element>(to: &Shared<T>, at: usize, values: &[f32]) {
    // SAFETY: the caller's contract.
    T::round(values, unsafe {
        std::slice::from_raw_parts_mut(to.get().add(at), values.len())
    });
}

/// A tile of shrunk rows to be computed.
struct Out {
    sums: *mut f32,
    rows: Range<usize>,
    ranks: Range<usize>,
}

impl Out {
    fn fill<L: Element + Plain, T: Element + Plain>(
        &self,
        left: &Left<L>,
        first: usize,
        panels: &[T],
        a: &Weight,
    ) {
        assert_eq!(L::PER_STEP, T::PER_STEP, "the left side is in A's precision");
        let (k, panel_len) = (a.k() as usize, T::panel_len(a.k() as usize));
        let product = Product {
            m: self.rows.len(),
            steps: T::steps(k),
            a: left.row(first + self.rows.start).cast::<T>(),
            lda: left.stride,
            panels: panels[self.ranks.start / PANEL * panel_len..].as_ptr(),
            panel_stride: panel_len,
            n: self.ranks.len(),
            c: self.sums,
            ldc: PANEL,
            sum: Sum::Set,
        };
        // SAFETY: L is T; a packed A means that fast paths are available; rows and ranks lie in left and panels, and
        // the tile holds SHRINK_ROWS rows of 32.
        unsafe { simd::product(&product) };
    }
}
