//! The blocked product behind `linear` and `matmul`: rounds the left side once, cuts the result into tasks for the pool,
//! sums a block in scratch and hands it to whoever knows what to do with it. Knows no tensor, bias or adapter.

use std::ops::Range;

use crate::pool::{self, Scratch};
use crate::simd::{self, Element, FEW_ROWS, PANEL, Product, Sum};
use crate::slice::{Plain, Rows, RowsMut, Shared};
use crate::weight::packed::{self, Packed};

/// The left side of a product in the right side's type: `m` rows of whole steps.
pub(crate) struct Left<'a, T: Element + Plain> {
    rows: LeftRows<'a, T>,
    pub m: usize,
    pub stride: usize,
}

enum LeftRows<'a, T: Element + Plain> {
    Rounded(Scratch<T>),
    /// float32 rows used where they are.
    Borrowed(Rows<'a>),
}

/// Rows a task rounds.
const ROUND_ROWS: usize = 32;
/// Rows of a task: a pass of the micro-kernels over them (1 KiB a row), their sums and the panels' pieces fit the
/// second-level cache, and each panel is read once for all of them.
const BLOCK_ROWS: usize = 192;
/// Blocks begin at multiples of it: whole tiles of AMX, and as good as any for the others.
pub(crate) const ROWS_TOGETHER: usize = 32;
/// Columns summed in scratch at once.
const BLOCK_COLUMNS: usize = 4 * PANEL;
/// Tasks a thread, so that one that starts late or loses its core is made good by the others.
const TASKS_PER_THREAD: usize = 8;
/// Panels of one task, so that those of all threads, each with rows of its own, are found in the third-level cache.
const PANEL_BYTES: usize = 2 << 20;

/// Elements between the rows of a left side in scratch: whole steps, and an odd number of cache lines, so that the rows
/// of a tile do not compete for one set of the first-level cache.
pub(crate) fn left_stride<T: Element>(k: usize) -> usize {
    let per_line = 64 / size_of::<T>();
    let lines = (T::steps(k) * T::PER_STEP).div_ceil(per_line);
    (lines | 1) * per_line
}

impl<'a, T: Element + Plain> Left<'a, T> {
    /// Rounds x `[m, K]`, in parallel where that pays.
    pub fn round(x: Rows<'a>) -> Left<'a, T> {
        let (m, stride) = (x.rows, left_stride::<T>(x.width));
        // A few rows fit the ways of a cache set whatever their distance.
        if T::PER_STEP == 1 && (m <= 8 || x.stride / PANEL % 2 == 1) {
            return Left {
                rows: LeftRows::Borrowed(x),
                m,
                stride: x.stride,
            };
        }
        let mut rows = pool::scratch::<T>(m * stride);
        let padded = T::steps(x.width) * T::PER_STEP;
        let rounded = Shared(rows.as_mut_ptr());
        // Few rows: another barrier would cost more than it gains.
        let task_rows = if m <= FEW_ROWS { FEW_ROWS } else { ROUND_ROWS };
        pool::for_each(m.div_ceil(task_rows), |task| {
            for row in task * task_rows..m.min((task + 1) * task_rows) {
                // SAFETY: row < m of the scratch above, written by this task alone.
                let to = unsafe { std::slice::from_raw_parts_mut(rounded.get().add(row * stride), padded) };
                T::round(x.row(row), to);
            }
        });
        Left {
            rows: LeftRows::Rounded(rows),
            m,
            stride,
        }
    }

    /// Rows of whole steps that the caller has written, `stride` apart.
    pub fn scratch(rows: Scratch<T>, m: usize, stride: usize) -> Left<'a, T> {
        assert!(rows.len() >= m * stride, "{m} rows of {stride} in {}", rows.len());
        Left {
            rows: LeftRows::Rounded(rows),
            m,
            stride,
        }
    }

    pub fn row(&self, row: usize) -> *const T {
        match &self.rows {
            LeftRows::Rounded(rows) => rows.as_ptr().wrapping_add(row * self.stride),
            // Borrowed only where T is f32.
            LeftRows::Borrowed(rows) => rows.ptr.wrapping_add(row * self.stride).cast(),
        }
    }
}

/// `left [m, K]` times packed columns, some rows each times columns of their own: all in one job.
pub(crate) struct Gemm<'a, T: Element + Plain> {
    pub left: &'a Left<'a, T>,
    pub parts: &'a [Part<'a, T>],
    pub k: usize,
    pub n: usize,
}

/// Rows of a left side and what they are multiplied with.
pub(crate) struct Part<'a, T> {
    pub rows: Range<usize>,
    pub right: Right<'a, T>,
}

/// Columns, 32 a panel.
pub(crate) enum Right<'a, T> {
    /// `ceil(n / 32)` panels over K.
    Panels(&'a [T]),
    /// Codes, which become panels a piece at a time.
    Packed(&'a Packed),
}

/// A block of the result, this task's alone: `sums[i * stride + j]` belongs to row `rows.start + i`, column `columns.start + j`.
/// Between its rows may lie what belongs to others.
pub(crate) struct Block {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    pub sums: *mut f32,
    pub stride: usize,
}

impl Block {
    /// The sums of the block's row i.
    pub fn row(&self, i: usize) -> &[f32] {
        assert!(i < self.rows.len(), "row {i} of {:?}", self.rows);
        // SAFETY: a row of the block.
        unsafe { std::slice::from_raw_parts(self.sums.add(i * self.stride), self.columns.len()) }
    }

    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows.len(), "row {i} of {:?}", self.rows);
        // SAFETY: a row of the block, borrowed as the block is.
        unsafe { std::slice::from_raw_parts_mut(self.sums.add(i * self.stride), self.columns.len()) }
    }
}

impl<T: Element + Plain> Gemm<'_, T> {
    /// Computes all blocks, each on some thread, and calls `finish` with the number of its part and each: summed in scratch.
    pub fn run(&self, finish: impl Fn(usize, Block) + Sync) {
        self.run_in(None, finish);
    }

    /// The same, summed where the result belongs.
    pub fn run_into(&self, to: RowsMut, finish: impl Fn(usize, Block) + Sync) {
        assert!(self.left.m <= to.rows && self.n <= to.width, "the result's shape");
        self.run_in(Some(to), finish);
    }

    fn run_in(&self, to: Option<RowsMut>, finish: impl Fn(usize, Block) + Sync) {
        let Gemm { left, parts, k, n } = *self;
        let panel_len = T::panel_len(k);
        let (mut totals, mut totals_of) = (None, None);
        for Part { rows, right } in parts {
            assert!(rows.end <= left.m, "rows {rows:?} of {}", left.m);
            match right {
                Right::Panels(panels) => assert!(
                    panels.len() >= n.div_ceil(PANEL) * panel_len,
                    "{n} columns in {} elements",
                    panels.len()
                ),
                Right::Packed(packed) => {
                    assert_eq!((packed.n, packed.k), (n, k), "the right side's shape");
                    if packed.has_offsets() {
                        // Sums of the left side over the groups: one set of them for all parts.
                        let groups = (packed.n_spans(), packed.group);
                        assert_eq!(*totals_of.get_or_insert(groups), groups, "parts grouped alike");
                        totals.get_or_insert_with(|| packed.totals(left));
                    }
                }
            }
        }
        let (totals, totals_stride) = (totals.as_deref(), totals_of.map_or(0, |(n_spans, _)| n_spans));
        let cut = |part: &Part<T>| {
            let plan = Plan::new(part.rows.len(), n, panel_len * size_of::<T>());
            let tasks = part.rows.len().div_ceil(plan.block_rows) * n.div_ceil(plan.task_panels * PANEL);
            (plan, tasks)
        };
        // Rows inside, columns outside: the panels are read from memory once, by all threads at about the same time.
        for_each_of(parts, cut, |index, plan, task| {
            let Part { rows, right } = &parts[index];
            let &Plan {
                block_rows,
                task_panels,
            } = plan;
            let row_blocks = rows.len().div_ceil(block_rows);
            let (block, group) = (task % row_blocks, task / row_blocks);
            let block = spread(rows.len(), row_blocks, block);
            let rows = rows.start + block.start..rows.start + block.end;
            let columns = group * task_panels * PANEL..n.min((group + 1) * task_panels * PANEL);
            let mut scratch = pool::scratch::<f32>(match to {
                Some(_) => 0,
                None => rows.len() * BLOCK_COLUMNS,
            });
            for column in columns.clone().step_by(BLOCK_COLUMNS) {
                let columns = column..columns.end.min(column + BLOCK_COLUMNS);
                let (sums, stride) = match &to {
                    Some(to) => (to.at(rows.start, column), to.stride),
                    None => (scratch.as_mut_ptr(), BLOCK_COLUMNS),
                };
                let (m, a) = (rows.len(), left.row(rows.start));
                // SAFETY: panels, codes and left sides are made only where fast paths are available; rows and columns lie
                // in them, and the block in its scratch or in the result, where it is this task's alone.
                match right {
                    Right::Panels(panels) => unsafe {
                        simd::product(&Product {
                            m,
                            steps: T::steps(k),
                            a,
                            lda: left.stride,
                            panels: panels[column / PANEL * panel_len..].as_ptr(),
                            panel_stride: panel_len,
                            n: columns.len(),
                            c: sums,
                            ldc: stride,
                            sum: Sum::Set,
                        })
                    },
                    Right::Packed(packed) => unsafe {
                        let rows = packed::Rows {
                            m,
                            a,
                            lda: left.stride,
                            totals: totals.map_or(std::ptr::null(), |totals| {
                                totals[rows.start * totals_stride..].as_ptr()
                            }),
                            totals_stride,
                            c: sums,
                            ldc: stride,
                        };
                        packed.multiply(&rows, columns.clone())
                    },
                }
                let block = Block {
                    rows: rows.clone(),
                    columns,
                    sums,
                    stride,
                };
                finish(index, block);
            }
        });
    }
}

/// Calls `task` with each part's number, how the part is cut and the number of each task of it, all in one job. `cut`
/// says how, and into how many tasks: once for each part, before any runs, for what it looks at (the pool's threads) may
/// change meanwhile.
pub(crate) fn for_each_of<P, C: Sync>(
    parts: &[P],
    cut: impl Fn(&P) -> (C, usize),
    task: impl Fn(usize, &C, usize) + Sync,
) {
    let (cuts, tasks): (Vec<C>, Vec<usize>) = parts.iter().map(cut).unzip();
    let mut starts = vec![0];
    for tasks in tasks {
        starts.push(starts[starts.len() - 1] + tasks);
    }
    pool::for_each(starts[parts.len()], |i| {
        let part = starts.partition_point(|start| *start <= i) - 1;
        task(part, &cuts[part], i - starts[part]);
    });
}

/// Part `index` of 0..m cut into `parts` nearly equal ones, where there is more than one, at whole tiles.
pub(crate) fn spread(m: usize, parts: usize, index: usize) -> Range<usize> {
    let [start, end] =
        [index, index + 1].map(|part| (part * m / parts).next_multiple_of(ROWS_TOGETHER).min(m));
    start..end
}

struct Plan {
    block_rows: usize,
    task_panels: usize,
}

impl Plan {
    fn new(m: usize, n: usize, panel_bytes: usize) -> Plan {
        let (n_panels, wanted) = (n.div_ceil(PANEL), pool::threads() * TASKS_PER_THREAD);
        let mut block_rows = m;
        if m > FEW_ROWS {
            // Few columns (an adapter's ranks): rows are then all there is to share out.
            let shared = (m * n_panels).div_ceil(wanted).next_multiple_of(ROWS_TOGETHER);
            block_rows = BLOCK_ROWS.min(shared);
        }
        let tasks = n_panels * m.div_ceil(block_rows.max(1)).max(1);
        let cached = (PANEL_BYTES / panel_bytes.max(1)).max(1);
        let mut task_panels = (tasks / wanted).clamp(1, cached);
        if task_panels > 4 {
            task_panels = task_panels / 4 * 4;
        }
        Plan {
            block_rows: block_rows.max(1),
            task_panels,
        }
    }
}

/// Whether fast paths exist, and the operands are tensors they read.
pub(crate) fn views<'a, const N: usize>(tensors: [&'a tch::Tensor; N]) -> Option<[Rows<'a>; N]> {
    if !simd::available() {
        return None;
    }
    let views = tensors.map(Rows::of);
    views
        .iter()
        .all(Option::is_some)
        .then(|| views.map(|view| view.expect("all are some")))
}
