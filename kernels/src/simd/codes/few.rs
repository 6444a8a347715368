//! A few rows times a panel of codes, in AVX-512 (and in `avx2`): levels are made in registers and never written, so that a product waits
//! for the bytes of the codes. The order of summation is that of the unit which multiplies many rows: pairs by VDPBF16PS one
//! after the other, or, as AMX has it, the even and the odd values of sixteen steps apart, then both, then the sum so far.

#![allow(clippy::needless_range_loop)] // Register tiles are indexed by row and column.

mod avx2;

use std::arch::x86_64::*;

use super::LINE;
use super::avx512::{
    Tables, fp8_levels, int8_levels, int8_tables, integers, looked_up, nibble_table, widened,
};
use crate::machine::features;
use crate::simd::avx512::{add_scaled, as_bf16, lanes, read, write};
use crate::simd::{GRAIN, PANEL, Scaling};
use crate::weight::Grid;

/// How far ahead of its use a line of codes is asked for.
const PREFETCH_BYTES: usize = 4096;

/// Up to so many rows this is the faster way: more find the levels in the nearest cache, made once for all of them.
pub(crate) fn most_rows(grid: Grid) -> usize {
    match (features().amx, features().avx512bf16, grid.bits()) {
        (true, ..) => 2 * SPLIT_ROWS,
        // Levels of 4 bits are soon made, a second time, too.
        (_, true, 4) => 2 * PAIR_ROWS,
        (_, true, _) => PAIR_ROWS,
        _ => avx2::most_rows(grid),
    }
}

/// Rows of a register tile, two sums for each of two columns of registers and row.
const SPLIT_ROWS: usize = 4;
/// One sum for each.
const PAIR_ROWS: usize = 8;

/// `c = c + sums of a * codes, scaled`, group by group.
#[derive(Clone, Copy)]
pub(crate) struct FewRows {
    pub grid: Grid,
    pub m: usize,
    /// Rows of bfloat16, whole steps.
    pub a: *const u16,
    pub lda: usize,
    /// The same rows in float32. Not read where VDPBF16PS multiplies many rows.
    pub wide: *const f32,
    pub wide_stride: usize,
    /// The panel's lines over K.
    pub codes: *const u8,
    pub k: usize,
    /// Values that share scales, and of them those that are summed before they are scaled.
    pub group: usize,
    pub span: usize,
    /// Of the panel's columns, by group; totals by span. (Its steps and its stride of panels are not read.)
    pub scaling: Scaling,
    pub c: *mut f32,
    pub ldc: usize,
    /// Columns, at most 32.
    pub n: usize,
}

impl FewRows {
    /// # Safety
    /// `m <= most_rows()`; rows, codes, scales and the columns of c are as long as said.
    pub unsafe fn multiply(&self) {
        // SAFETY: fast paths are available: AVX2, or AVX512-BF16 and VBMI; the rest is the caller's contract.
        unsafe {
            if !features().avx512bf16 {
                return self.multiply_avx2();
            }
            match (features().amx, self.grid.bits(), self.grid) {
                (true, 4, _) => self.rows::<SPLIT_ROWS, true, NIBBLES>(),
                (true, _, Grid::Int8) => self.rows::<SPLIT_ROWS, true, INTEGERS>(),
                (true, ..) => self.rows::<SPLIT_ROWS, true, FLOATS>(),
                (_, 4, _) => self.rows::<PAIR_ROWS, false, NIBBLES>(),
                (.., Grid::Int8) => self.rows::<PAIR_ROWS, false, INTEGERS>(),
                _ => self.rows::<PAIR_ROWS, false, FLOATS>(),
            }
        }
    }

    /// In tiles of nearly equal height.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn rows<const MOST: usize, const SPLIT: bool, const CODES: u8>(&self) {
        let tiles = self.m.div_ceil(MOST);
        for tile in 0..tiles {
            let row = tile * self.m / tiles;
            let height = (tile + 1) * self.m / tiles - row;
            // SAFETY: the rows are inside m.
            unsafe {
                match height {
                    1 => self.tile::<1, SPLIT, CODES>(row),
                    2 => self.tile::<2, SPLIT, CODES>(row),
                    3 => self.tile::<3, SPLIT, CODES>(row),
                    4 => self.tile::<4, SPLIT, CODES>(row),
                    5 => self.tile::<5, SPLIT, CODES>(row),
                    6 => self.tile::<6, SPLIT, CODES>(row),
                    7 => self.tile::<7, SPLIT, CODES>(row),
                    8 => self.tile::<8, SPLIT, CODES>(row),
                    _ => unreachable!("a tile has 1..=8 rows"),
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn tile<const M: usize, const SPLIT: bool, const CODES: u8>(&self, row: usize) {
        let FewRows {
            grid,
            codes,
            k,
            group,
            span,
            scaling,
            n,
            ..
        } = *self;
        let tables = match CODES {
            NIBBLES => [nibble_table(grid.bf16_levels()); 5],
            INTEGERS => int8_tables(),
            _ => [_mm512_setzero_si512(); 5],
        };
        let line_values = super::line_values(grid);
        let c = self.c.wrapping_add(row * self.ldc);
        // SAFETY: the rows and columns of c are the caller's.
        let mut totals = unsafe { read::<M, 2>(c, self.ldc, n) };
        let (mut number, mut first) = (0, 0);
        while first < k {
            let group_end = k.min((first / group + 1) * group);
            let end = group_end.min(first + span);
            // SAFETY: the span's values and lines and its scales are the caller's.
            unsafe {
                let lines = codes.add(first / line_values * LINE);
                let steps = (end - first).div_ceil(2);
                let sums = match SPLIT {
                    true => self.split_sums::<M, CODES>(row, first, lines, steps, tables),
                    false => self.pair_sums::<M, CODES>(row, first, lines, steps, tables),
                };
                let scaling = Scaling {
                    totals: scaling.totals.wrapping_add(number),
                    ..scaling.of_group(first / group)
                };
                add_scaled(&mut totals, sums, &scaling, row);
            }
            (number, first) = (number + 1, end);
        }
        // SAFETY: as above.
        unsafe { write(totals, c, self.ldc, n) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn pair_sums<const M: usize, const CODES: u8>(
        &self,
        row: usize,
        first: usize,
        lines: *const u8,
        steps: usize,
        tables: Tables,
    ) -> [[__m512; 2]; M] {
        let mut sums = [[_mm512_setzero_ps(); 2]; M];
        // SAFETY: the steps of M rows and their lines are the caller's.
        unsafe {
            let a = self.a.add(row * self.lda + first);
            let mut add = |step: usize, levels: [__m512i; 2]| {
                for r in 0..M {
                    let pair = a.add(r * self.lda + 2 * step);
                    let pair = _mm512_set1_epi32(pair.cast::<i32>().read_unaligned());
                    for z in 0..2 {
                        sums[r][z] = _mm512_dpbf16_ps(sums[r][z], as_bf16(pair), as_bf16(levels[z]));
                    }
                }
            };
            for step in (0..steps).step_by(line_steps(CODES)) {
                let [one, two] = pairs::<CODES>(lines, step, tables);
                add(step, one);
                if line_steps(CODES) == 2 && step + 1 < steps {
                    add(step + 1, two);
                }
            }
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn split_sums<const M: usize, const CODES: u8>(
        &self,
        row: usize,
        first: usize,
        lines: *const u8,
        steps: usize,
        tables: Tables,
    ) -> [[__m512; 2]; M] {
        let mut sums = [[_mm512_setzero_ps(); 2]; M];
        // SAFETY: as above; the rows are there in float32, too.
        unsafe {
            let a = self.wide.add(row * self.wide_stride + first);
            for grain in (0..steps).step_by(GRAIN) {
                let [mut even, mut odd] = [[[_mm512_setzero_ps(); 2]; M]; 2];
                let end = steps.min(grain + GRAIN);
                let mut add = |step: usize, levels: [[__m512; 2]; 2]| {
                    for r in 0..M {
                        let values = a.add(r * self.wide_stride + 2 * step);
                        let (one, two) = (_mm512_set1_ps(*values), _mm512_set1_ps(*values.add(1)));
                        for z in 0..2 {
                            even[r][z] = _mm512_fmadd_ps(one, levels[z][0], even[r][z]);
                            odd[r][z] = _mm512_fmadd_ps(two, levels[z][1], odd[r][z]);
                        }
                    }
                };
                for step in (grain..end).step_by(line_steps(CODES)) {
                    let [one, two] = split::<CODES>(lines, step, tables);
                    add(step, one);
                    if line_steps(CODES) == 2 && step + 1 < end {
                        add(step + 1, two);
                    }
                }
                for r in 0..M {
                    for z in 0..2 {
                        sums[r][z] = _mm512_add_ps(sums[r][z], _mm512_add_ps(even[r][z], odd[r][z]));
                    }
                }
            }
        }
        sums
    }
}

/// What codes are: 4 bits by a table, integers of 8, or floats of 8.
const NIBBLES: u8 = 0;
const INTEGERS: u8 = 1;
const FLOATS: u8 = 2;

const fn line_steps(codes: u8) -> usize {
    match codes {
        NIBBLES => 2,
        _ => 1,
    }
}

/// The levels of a line as pairs of bfloat16, by step and register; bytes have one step.
///
/// # Safety
/// AVX512-BF16 and VBMI; the line of step `step`, an even one for nibbles, is readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn pairs<const CODES: u8>(lines: *const u8, step: usize, tables: Tables) -> [[__m512i; 2]; 2] {
    // SAFETY: the caller's contract.
    unsafe {
        if CODES == NIBBLES {
            let line = lines.add(step / 2 * LINE);
            _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH_BYTES));
            let [a, b, c, d] = looked_up(_mm512_loadu_si512(line.cast()), tables[0]);
            return [[a, b], [c, d]];
        }
        let line = lines.add(step * LINE);
        _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH_BYTES));
        let levels = match CODES {
            INTEGERS => int8_levels(line, tables),
            _ => [fp8_levels(line), fp8_levels(line.add(LINE / 2))],
        };
        [levels; 2]
    }
}

/// The same in float32, the even and the odd values of K apart.
///
/// # Safety
/// As [`pairs`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn split<const CODES: u8>(lines: *const u8, step: usize, tables: Tables) -> [[[__m512; 2]; 2]; 2] {
    // SAFETY: the caller's contract.
    unsafe {
        if CODES == INTEGERS {
            let line = lines.add(step * LINE);
            _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH_BYTES));
            let levels = [integers(line), integers(line.add(LINE / 2))];
            return [levels; 2];
        }
        let [[a, b], [c, d]] = pairs::<CODES>(lines, step, tables);
        [[widened(a), widened(b)], [widened(c), widened(d)]]
    }
}

/// Rows of bfloat16 as float32.
///
/// # Safety
/// `from` is readable for k values, `to` writable for as many, rounded up to 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn widen(from: *const u16, k: usize, to: *mut f32) {
    for at in (0..k).step_by(16) {
        let lanes = lanes(k - at, 0);
        // SAFETY: masked-off values are not read.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from.add(at).cast()));
            _mm512_storeu_ps(to.add(at), _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)));
        }
    }
}

/// Values between rows that [`widen_rows`] makes.
pub(crate) fn wide_stride(k: usize) -> usize {
    k.next_multiple_of(2 * PANEL)
}

/// Rows of bfloat16, whole steps over k values, as float32, where products of few rows read them so.
///
/// # Safety
/// `m <= most_rows()`; the rows are readable, `to` is writable for m rows of [`wide_stride`].
pub(crate) unsafe fn widen_rows(a: *const u16, lda: usize, m: usize, k: usize, to: *mut f32) {
    let k = k.next_multiple_of(2);
    for row in 0..m {
        // SAFETY: the caller's contract.
        unsafe {
            let (from, to) = (a.add(row * lda), to.add(row * wide_stride(k)));
            match (features().amx, features().avx512bf16) {
                (true, _) => widen(from, k, to),
                (_, false) => avx2::widen(from, k, to),
                _ => return,
            }
        }
    }
}
