//! A quantised matrix beside the micro-kernels: panels of codes (layout in `simd::codes`) and the scales of their groups.
//! A product goes group by group: codes become levels in scratch, which every operand type holds, the rows are multiplied
//! with them, and the sums are scaled as they are added up. For few rows of bfloat16 levels are made in registers, in the same
//! order. No number is rounded on the way that is not rounded in a dense product, and few rows or many, the order of summation
//! is the same.

use std::ops::Range;

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use super::{Grid, Precision, Quantised, shard};
use crate::matmul::gemm::Left;
use crate::pool::{self, Scratch};
#[cfg(target_arch = "x86_64")]
use crate::simd::codes::few::{self, FewRows};
use crate::simd::codes::{self, LINE};
use crate::simd::pack;
use crate::simd::{self, Ahead, Element, PANEL, Product, Scaling, Sum};
use crate::slice::{Pages, Plain, RowsMut, Shared};

/// Values of a longer group that are summed before they are scaled: one pass of the micro-kernels, in any type.
const SPAN: usize = simd::PASS_STEPS;
/// Values of a panel decoded at once: they stay in the first-level cache for all rows.
const PIECE: usize = SPAN;

pub(crate) struct Packed {
    pub grid: Grid,
    pub n: usize,
    pub k: usize,
    /// At most K.
    pub group: usize,
    /// `ceil(N / 32)` panels.
    codes: Pages<u8>,
    scales: Scales,
    offsets: Option<Scales>,
}

/// `[panel][group][32]`, in half precision where that holds every one of them exactly.
enum Scales {
    F16(Pages<u16>),
    F32(Pages<f32>),
}

/// What a block of a product is made of: rows `a` of whole steps, and where the sums go.
pub(crate) struct Rows<T> {
    pub m: usize,
    pub a: *const T,
    pub lda: usize,
    /// [`Packed::totals`] of these rows.
    pub totals: *const f32,
    pub totals_stride: usize,
    pub c: *mut f32,
    pub ldc: usize,
}

impl Packed {
    /// `from` is checked.
    pub fn new(from: &Quantised) -> Packed {
        let (n, k) = (from.n() as usize, from.k() as usize);
        let group = (from.group as usize).min(k).max(1);
        let grid = from.grid;
        let mut packed = Packed {
            grid,
            n,
            k,
            group,
            codes: Pages::zeroed(n.div_ceil(PANEL) * codes::panel_bytes(grid, k)),
            scales: Scales::new(&from.scales),
            offsets: from.offsets.as_ref().map(Scales::new),
        };
        packed.pack(&from.codes.contiguous());
        packed
    }

    fn pack(&mut self, from: &Tensor) {
        let (n, k, grid) = (self.n, self.k, self.grid);
        let panel_bytes = codes::panel_bytes(grid, k);
        let (from, to) = (
            Shared(from.data_ptr() as *mut u8),
            Shared(self.codes.as_mut_ptr()),
        );
        pool::for_each(n.div_ceil(PANEL), |panel| {
            // SAFETY: this panel is this task's alone, and zero.
            let to =
                unsafe { std::slice::from_raw_parts_mut(to.get().add(panel * panel_bytes), panel_bytes) };
            for column in 0..PANEL.min(n - panel * PANEL) {
                // SAFETY: row `panel * 32 + column < n` of a contiguous tensor of bytes that lives through the job.
                let row =
                    unsafe { std::slice::from_raw_parts(from.get().add((panel * PANEL + column) * k), k) };
                for (line, codes) in row.chunks(codes::line_values(grid)).enumerate() {
                    let to = &mut to[line * LINE..][..LINE];
                    for (i, code) in codes.iter().enumerate() {
                        let (byte, shift) = codes::place(grid, i, column);
                        to[byte] |= code << shift;
                    }
                }
            }
        });
    }

    pub fn bytes(&self) -> usize {
        let offsets = self.offsets.as_ref().map_or(0, Scales::bytes);
        self.codes.len() + self.scales.bytes() + offsets
    }

    /// The memory that it lies in: codes, scales, offsets.
    pub fn buffers(&self) -> Vec<Tensor> {
        let scales = std::iter::once(&self.scales).chain(&self.offsets);
        std::iter::once(shard::pages(&self.codes, Kind::Uint8))
            .chain(scales.map(Scales::buffer))
            .collect()
    }

    /// The same with buffers of these shapes, whose numbers mean nothing.
    pub fn sized(&self, shapes: &[Vec<i64>]) -> Packed {
        Packed {
            codes: shard::room(&shapes[0]),
            scales: self.scales.sized(&shapes[1]),
            offsets: self.offsets.as_ref().map(|offsets| offsets.sized(&shapes[2])),
            ..*self
        }
    }

    pub fn has_offsets(&self) -> bool {
        self.offsets.is_some()
    }

    fn groups(&self) -> usize {
        self.k.div_ceil(self.group)
    }

    /// What is summed before it is scaled, in order: pieces of groups.
    fn spans(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (group, k) = (self.group, self.k);
        (0..k).step_by(group).flat_map(move |first| {
            let end = k.min(first + group);
            (first..end).step_by(SPAN).map(move |at| at..end.min(at + SPAN))
        })
    }

    /// The sum of each row of a left side over each span `[m][spans]`: what offsets are multiplied with.
    pub fn totals<T: Element + Plain>(&self, left: &Left<T>) -> Scratch<f32> {
        let spans: Vec<Range<usize>> = self.spans().collect();
        let mut totals = pool::scratch::<f32>(left.m * spans.len());
        let to = Shared(totals.as_mut_ptr());
        pool::for_each(left.m, |row| {
            for (i, span) in spans.iter().enumerate() {
                // SAFETY: the row has K values, of which the span are some; row `row` of the totals is this task's alone.
                unsafe {
                    let values = std::slice::from_raw_parts(left.row(row).add(span.start), span.len());
                    *to.get().add(row * spans.len() + i) = total(values);
                }
            }
        });
        totals
    }

    pub fn n_spans(&self) -> usize {
        self.spans().count()
    }

    /// `c = a Wt` of columns that begin with a panel.
    ///
    /// # Safety
    /// Fast paths are available; `rows` are m rows of whole steps over K, their totals if there are offsets, and room for
    /// m rows of the columns.
    pub unsafe fn multiply<T: Element + Plain>(&self, rows: &Rows<T>, columns: Range<usize>) {
        let Rows {
            m,
            a,
            lda,
            totals,
            totals_stride,
            c,
            ldc,
        } = *rows;
        let width = columns.len();
        for row in 0..m {
            // SAFETY: m rows of the columns, for which the caller vouches.
            unsafe { std::slice::from_raw_parts_mut(c.add(row * ldc), width) }.fill(0.0);
        }
        #[cfg(target_arch = "x86_64")]
        if T::PER_STEP == 2 && m <= few::most_rows(self.grid) {
            // SAFETY: the caller's contract; two values a step are bfloat16.
            return unsafe { self.multiply_few(rows, columns) };
        }
        let spans: Vec<Range<usize>> = self.spans().collect();
        let pieces = pieces(&spans);
        let values = |piece: &Range<usize>| spans[piece.start].start..spans[piece.end - 1].end;
        let most = |of: &dyn Fn(&Range<usize>) -> usize| pieces.iter().map(of).max().unwrap_or(0);
        let most_spans = most(&|piece| piece.len());
        let panel_stride = T::panel_len(most(&|piece| values(piece).len()).next_multiple_of(4));
        let pass_columns = T::pass_columns(m);
        let n_panels = pass_columns.min(width.next_multiple_of(PANEL)) / PANEL;
        let mut levels = pool::scratch::<T>(n_panels * panel_stride);
        let mut scales = pool::scratch::<f32>(2 * n_panels * most_spans * PANEL);
        let (scales, offsets) = scales.split_at_mut(n_panels * most_spans * PANEL);
        // All columns before the next piece, so that the piece of the rows is found in the second-level cache.
        let mut turns = (pieces.iter())
            .flat_map(|piece| (0..width).step_by(pass_columns).map(move |first| (piece, first)))
            .peekable();
        while let Some((piece, first)) = turns.next() {
            let (n, in_piece, values) = (
                pass_columns.min(width - first),
                &spans[piece.clone()],
                values(piece),
            );
            let panel = (columns.start + first) / PANEL;
            for i in 0..n.div_ceil(PANEL) {
                self.decode(panel + i, values.clone(), &mut levels[i * panel_stride..]);
                let at = i * most_spans * PANEL..(i * most_spans + piece.len()) * PANEL;
                self.read_scales(&self.scales, panel + i, in_piece, &mut scales[at.clone()]);
                if let Some(from) = &self.offsets {
                    self.read_scales(from, panel + i, in_piece, &mut offsets[at]);
                }
            }
            let next = turns.peek().map(|&(next, first)| {
                let (from, _) = self.lines((columns.start + first) / PANEL, spans[next.start].clone());
                from.as_ptr()
            });
            // Groups of one length go together.
            let mut j = 0;
            for alike in in_piece.chunk_by(|one, next| one.len() == next.len()) {
                let (start, group_steps) = (alike[0].start, T::steps(alike[0].len()));
                let skipped = T::steps(start - values.start);
                let ahead_stride = LINE * T::PER_STEP / codes::line_values(self.grid);
                let product = Product {
                    m,
                    steps: group_steps * alike.len(),
                    a: a.wrapping_add(start),
                    lda,
                    panels: levels[skipped * T::PER_STEP * PANEL..].as_ptr(),
                    panel_stride,
                    n,
                    c: c.wrapping_add(first),
                    ldc,
                    sum: Sum::Scaled(Scaling {
                        group_steps,
                        scales: scales[j * PANEL..].as_ptr(),
                        offsets: match self.has_offsets() {
                            true => offsets[j * PANEL..].as_ptr(),
                            false => std::ptr::null(),
                        },
                        panel_stride: most_spans * PANEL,
                        totals: totals.wrapping_add(piece.start + j),
                        totals_stride,
                        ahead: Ahead {
                            line: next.map_or(a.cast(), |next| next.wrapping_add(skipped * ahead_stride)),
                            stride: next.map_or(0, |_| ahead_stride),
                        },
                    }),
                };
                j += alike.len();
                // SAFETY: the spans' steps of the caller's rows; `levels`, `scales` and `offsets` hold them for all
                // panels of the columns; a piece is one pass.
                unsafe { simd::product(&product) };
            }
        }
    }

    /// The scales, or offsets, of spans of a panel that follow one another, 32 each.
    fn read_scales(&self, from: &Scales, panel: usize, spans: &[Range<usize>], to: &mut [f32]) {
        let first = panel * self.groups();
        if self.group <= SPAN {
            // A span is a group.
            return from.read(first + spans[0].start / self.group, to);
        }
        for (span, to) in spans.iter().zip(to.chunks_exact_mut(PANEL)) {
            from.read(first + span.start / self.group, to);
        }
    }

    /// [`Packed::multiply`] of few rows of bfloat16, added to c.
    ///
    /// # Safety
    /// As there; at most [`few::most_rows`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn multiply_few<T: Plain>(&self, rows: &Rows<T>, columns: Range<usize>) {
        let (a, wide_stride) = (rows.a.cast::<u16>(), few::wide_stride(self.k));
        let mut wide = pool::scratch::<f32>(rows.m * wide_stride);
        let of_panel = self.groups() * PANEL;
        let mut scales = pool::scratch::<f32>(2 * of_panel);
        let (scales, offsets) = scales.split_at_mut(of_panel);
        let panel_bytes = codes::panel_bytes(self.grid, self.k);
        // SAFETY: rows and columns are the caller's; codes and scales those of whole panels.
        unsafe { few::widen_rows(a, rows.lda, rows.m, self.k, wide.as_mut_ptr()) };
        for first in (0..columns.len()).step_by(PANEL) {
            let panel = (columns.start + first) / PANEL;
            self.scales.read(panel * self.groups(), scales);
            if let Some(from) = &self.offsets {
                from.read(panel * self.groups(), offsets);
            }
            let codes = self.codes[panel * panel_bytes..][..panel_bytes].as_ptr();
            let product = FewRows {
                grid: self.grid,
                m: rows.m,
                a,
                lda: rows.lda,
                wide: wide.as_ptr(),
                wide_stride,
                codes,
                k: self.k,
                group: self.group,
                span: SPAN,
                scaling: Scaling {
                    group_steps: 0,
                    scales: scales.as_ptr(),
                    offsets: match self.has_offsets() {
                        true => offsets.as_ptr(),
                        false => std::ptr::null(),
                    },
                    panel_stride: 0,
                    totals: rows.totals,
                    totals_stride: rows.totals_stride,
                    ahead: Ahead::nothing(codes),
                },
                c: rows.c.wrapping_add(first),
                ldc: rows.ldc,
                n: PANEL.min(columns.len() - first),
            };
            // SAFETY: as above.
            unsafe { product.multiply() };
        }
    }

    /// The levels of a panel over `values`, which begin with a line.
    fn decode<T: Element>(&self, panel: usize, values: Range<usize>, to: &mut [T]) {
        let (from, lines) = self.lines(panel, values.clone());
        let room = lines * codes::line_values(self.grid) * PANEL;
        assert!(to.len() >= room, "a panel of {values:?}");
        // SAFETY: packed only where fast paths are available; the lines are there, and room for their values.
        unsafe { T::decode(self.grid, from.as_ptr(), lines, to.as_mut_ptr()) };
    }

    /// The codes of a panel over `values`, which begin with a line, and how many lines they are.
    fn lines(&self, panel: usize, values: Range<usize>) -> (&[u8], usize) {
        let per_line = codes::line_values(self.grid);
        assert_eq!(values.start % per_line, 0, "codes are decoded by the line");
        let lines = values.len().div_ceil(per_line);
        let panel_bytes = codes::panel_bytes(self.grid, self.k);
        let codes = &self.codes[panel * panel_bytes..][..panel_bytes];
        (&codes[values.start / per_line * LINE..][..lines * LINE], lines)
    }

    /// Values `values` of a panel as numbers `[values][32]`: the levels, as `precision` has them, scaled in float32. They
    /// begin with a line, and `to` has room for whole lines.
    fn numbers(&self, panel: usize, values: Range<usize>, precision: Precision, to: &mut [f32]) {
        self.decode(panel, values.clone(), to);
        if precision == Precision::Bf16 {
            to.iter_mut()
                .for_each(|level| *level = bf16::from_f32(*level).to_f32());
        }
        let [mut scales, mut offsets] = [[0.0; PANEL]; 2];
        let mut k = values.start;
        while k < values.end {
            let group = k / self.group;
            let end = values.end.min((group + 1) * self.group);
            self.scales.read(panel * self.groups() + group, &mut scales);
            if let Some(from) = &self.offsets {
                from.read(panel * self.groups() + group, &mut offsets);
            }
            for row in to[(k - values.start) * PANEL..(end - values.start) * PANEL].chunks_exact_mut(PANEL) {
                for ((to, scale), offset) in row.iter_mut().zip(&scales).zip(&offsets) {
                    *to = *to * scale + offset;
                }
            }
            k = end;
        }
    }

    /// Values `values` of a panel as a panel of numbers, rounded to the operand type. They begin with a line, and `to` has
    /// room for whole lines.
    pub fn panel<T: Element + Plain>(&self, panel: usize, values: Range<usize>, to: &mut [T]) {
        let len = values.len();
        if T::PER_STEP == 2 && self.bf16_panel(panel, values.clone(), to.as_mut_ptr().cast(), to.len()) {
            if len % 2 == 1 {
                let last = &mut to[len / 2 * 2 * PANEL..][..2 * PANEL];
                last.chunks_exact_mut(2).for_each(|pair| pair[1] = T::default());
            }
            return;
        }
        let mut numbers = pool::scratch::<f32>(len.next_multiple_of(4) * PANEL);
        self.numbers(panel, values, Precision::F32, &mut numbers);
        // An odd K is padded with zeroes.
        numbers[len * PANEL..].fill(0.0);
        let steps = numbers.chunks_exact(PANEL * T::PER_STEP);
        for (from, to) in steps.zip(to.chunks_exact_mut(PANEL * T::PER_STEP)) {
            let mut rows = [[T::default(); PANEL]; 2];
            for (from, row) in from.chunks_exact(PANEL).zip(&mut rows) {
                T::round(from, row);
            }
            pack::pack_step([&rows[0], &rows[1]], to);
        }
    }

    /// [`Packed::panel`] in bfloat16, whole lines without the padding, where there is a way to it without float32 in memory.
    fn bf16_panel(&self, panel: usize, values: Range<usize>, to: *mut u16, room: usize) -> bool {
        let per_line = codes::line_values(self.grid);
        assert!(
            room >= values.len().next_multiple_of(per_line) * PANEL,
            "a panel of {values:?}"
        );
        let [mut scales, mut offsets] = [[0.0; PANEL]; 2];
        let mut first = values.start;
        while first < values.end {
            let group = first / self.group;
            let end = values.end.min((group + 1) * self.group);
            self.scales.read(panel * self.groups() + group, &mut scales);
            if let Some(from) = &self.offsets {
                from.read(panel * self.groups() + group, &mut offsets);
            }
            let (from, lines) = self.lines(panel, first..end);
            // SAFETY: packed only where fast paths are available; the lines are there, and room for their values.
            let done = unsafe {
                let to = to.add((first - values.start) * PANEL);
                codes::numbers_to_bf16(self.grid, from.as_ptr(), lines, [&scales, &offsets], to)
            };
            if !done {
                return false;
            }
            first = end;
        }
        true
    }

    /// All of it, `[N, K]` float32, the levels as `precision` has them.
    pub fn dense(&self, precision: Precision) -> Tensor {
        let (n, k) = (self.n, self.k);
        let dense = Tensor::empty([n as i64, k as i64], (Kind::Float, Device::Cpu));
        let to = Shared(dense.data_ptr() as *mut f32);
        pool::for_each(n.div_ceil(PANEL), |panel| {
            let mut numbers = pool::scratch::<f32>(k.next_multiple_of(4) * PANEL);
            self.numbers(panel, 0..k, precision, &mut numbers);
            for column in 0..PANEL.min(n - panel * PANEL) {
                // SAFETY: row `panel * 32 + column < n` of the new tensor is this task's alone.
                let row =
                    unsafe { std::slice::from_raw_parts_mut(to.get().add((panel * PANEL + column) * k), k) };
                let from = numbers.chunks_exact(PANEL).map(|numbers| numbers[column]);
                row.iter_mut().zip(from).for_each(|(to, from)| *to = from);
            }
        });
        dense
    }

    /// Rows `[T, K]` float32.
    pub fn gather(&self, rows: &[u32]) -> Tensor {
        let mut out = Tensor::empty([rows.len() as i64, self.k as i64], (Kind::Float, Device::Cpu));
        let to = RowsMut::of(&mut out).expect("a new float CPU tensor");
        let (panel_bytes, groups) = (codes::panel_bytes(self.grid, self.k), self.groups());
        let (levels, mask) = (self.grid.levels(), ((1u16 << self.grid.bits()) - 1) as u8);
        pool::for_each(rows.len(), |i| {
            let (panel, column) = (rows[i] as usize / PANEL, rows[i] as usize % PANEL);
            let codes = &self.codes[panel * panel_bytes..][..panel_bytes];
            // SAFETY: each output row belongs to one task.
            let to = unsafe { to.row(i) };
            for (group, to) in to.chunks_mut(self.group).enumerate() {
                let at = (panel * groups + group) * PANEL + column;
                let scale = self.scales.get(at);
                let offset = self.offsets.as_ref().map_or(0.0, |offsets| offsets.get(at));
                for (k, to) in to.iter_mut().enumerate() {
                    let (byte, shift) = codes::place(self.grid, group * self.group + k, column);
                    *to = levels[(codes[byte] >> shift & mask) as usize] * scale + offset;
                }
            }
        });
        out
    }
}

/// Spans that are decoded together, at most [`PIECE`] values.
fn pieces(spans: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = vec![];
    for (i, span) in spans.iter().enumerate() {
        match pieces.last_mut() {
            Some(piece) if span.end - spans[piece.start].start <= PIECE => piece.end = i + 1,
            _ => pieces.push(i..i + 1),
        }
    }
    pieces
}

/// In eight sums side by side, then those: one after the other a sum would wait for the one before.
fn total<T: Element>(values: &[T]) -> f32 {
    let mut sums = [0.0; 8];
    for values in values.chunks(sums.len()) {
        sums.iter_mut()
            .zip(values)
            .for_each(|(sum, value)| *sum += value.widen());
    }
    sums.iter().sum()
}

impl Scales {
    /// Of `[N, groups]` float32.
    fn new(from: &Tensor) -> Scales {
        let (n, groups) = (from.size()[0] as usize, from.size()[1] as usize);
        let from = from.contiguous();
        // SAFETY: n * groups contiguous floats of a tensor that outlives the borrow.
        let from = unsafe { std::slice::from_raw_parts(from.data_ptr() as *const f32, n * groups) };
        let len = n.div_ceil(PANEL) * groups * PANEL;
        let placed = from.iter().enumerate().map(|(i, number)| {
            let (row, group) = (i / groups.max(1), i % groups.max(1));
            ((row / PANEL * groups + group) * PANEL + row % PANEL, *number)
        });
        let is_half = |number: &f32| f16::from_f32(*number).to_f32().to_bits() == number.to_bits();
        if from.iter().all(is_half) {
            let mut to = Pages::zeroed(len);
            placed.for_each(|(at, number)| to[at] = f16::from_f32(number).to_bits());
            return Scales::F16(to);
        }
        let mut to = Pages::zeroed(len);
        placed.for_each(|(at, number)| to[at] = number);
        Scales::F32(to)
    }

    fn buffer(&self) -> Tensor {
        match self {
            Scales::F16(scales) => shard::pages(scales, Kind::Int16),
            Scales::F32(scales) => shard::pages(scales, Kind::Float),
        }
    }

    fn sized(&self, shape: &[i64]) -> Scales {
        match self {
            Scales::F16(_) => Scales::F16(shard::room(shape)),
            Scales::F32(_) => Scales::F32(shard::room(shape)),
        }
    }

    /// The numbers of groups from `group` on, 32 each.
    fn read(&self, group: usize, to: &mut [f32]) {
        match self {
            Scales::F32(from) => to.copy_from_slice(&from[group * PANEL..][..to.len()]),
            Scales::F16(from) => simd::widen_f16(&from[group * PANEL..][..to.len()], to),
        }
    }

    fn get(&self, at: usize) -> f32 {
        match self {
            Scales::F32(from) => from[at],
            Scales::F16(from) => f16::from_bits(from[at]).to_f32(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Scales::F32(from) => size_of_val(&from[..]),
            Scales::F16(from) => size_of_val(&from[..]),
        }
    }
}
