//! A few rows times a panel of codes in AVX2, in the order of its micro-kernel: one value of K after the other, in float32.

#![allow(clippy::needless_range_loop)] // Register tiles are indexed by row and column.

use std::arch::x86_64::*;

use super::{FLOATS, FewRows, INTEGERS, NIBBLES, PREFETCH_BYTES};
use crate::simd::Scaling;
use crate::simd::avx2::{lanes, scaled};
use crate::simd::codes::LINE;
use crate::simd::codes::avx2::{Bytes, Nibbles};
use crate::weight::Grid;

/// Rows of a tile.
const ROWS: usize = 4;

/// With more, levels that were made once for all of them are better written down: those of 4 bits take a third of the time.
pub(super) fn most_rows(grid: Grid) -> usize {
    match grid.bits() {
        4 => 1,
        _ => ROWS,
    }
}

impl FewRows {
    /// # Safety
    /// The CPU has AVX2 and FMA; as [`FewRows::multiply`], at most [`ROWS`] rows.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply_avx2(&self) {
        // SAFETY: the caller's contract.
        unsafe {
            match self.grid {
                Grid::Int8 => self.tiles::<INTEGERS>(),
                Grid::Fp8 => self.tiles::<FLOATS>(),
                _ => self.tiles::<NIBBLES>(),
            }
        }
    }

    /// One or two rows take all columns at once, for a sum waits for itself; more need the registers.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tiles<const CODES: u8>(&self) {
        // SAFETY: the caller's contract; the two halves of the columns.
        unsafe {
            match self.m {
                1 => self.narrow::<1, 4, CODES>(0),
                2 => self.narrow::<2, 4, CODES>(0),
                3 => (0..2).for_each(|half| self.narrow::<3, 2, CODES>(half)),
                4 => (0..2).for_each(|half| self.narrow::<4, 2, CODES>(half)),
                m => unreachable!("{m} rows are not few"),
            }
        }
    }

    /// M rows and Y registers of columns: 8 of each half of a panel and of a line, the next 8 likewise.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn narrow<const M: usize, const Y: usize, const CODES: u8>(&self, half: usize) {
        let FewRows {
            grid,
            codes,
            k,
            group,
            span,
            scaling,
            n,
            c,
            ldc,
            wide,
            wide_stride,
            ..
        } = *self;
        let column = |y: usize| 8 * (half + y / 2) + 16 * (y % 2);
        let nibbles = Nibbles::new(match CODES {
            NIBBLES => grid.bf16_levels(),
            _ => &[0; 16],
        });
        let bytes = match CODES {
            FLOATS => Bytes::of(grid),
            _ => Bytes::Integers,
        };
        let line_values = if CODES == NIBBLES { 4 } else { 2 };
        let mut totals = [[_mm256_setzero_ps(); Y]; M];
        // SAFETY: rows, lines, scales and columns of c are the caller's; masked-off columns are neither read nor written.
        unsafe {
            for r in 0..M {
                for y in 0..Y {
                    let c = c.wrapping_add(r * ldc + column(y));
                    totals[r][y] = _mm256_maskload_ps(c, lanes(n, column(y) / 8));
                }
            }
            let (mut number, mut first) = (0, 0);
            while first < k {
                let group_end = k.min((first / group + 1) * group);
                let end = group_end.min(first + span);
                let mut sums = [[_mm256_setzero_ps(); Y]; M];
                let mut line = codes.add(first / line_values * LINE);
                let mut a = wide.add(first);
                for _ in 0..(end - first).div_ceil(line_values) {
                    _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH_BYTES));
                    for pair in 0..Y / 2 {
                        let at = half + pair;
                        let mut add = |value: usize, y: usize, levels: __m256| {
                            for r in 0..M {
                                let a = _mm256_broadcast_ss(&*a.add(r * wide_stride + value));
                                sums[r][y] = _mm256_fmadd_ps(a, levels, sums[r][y]);
                            }
                        };
                        if CODES == NIBBLES {
                            let codes = _mm256_loadu_si256(line.add(32 * at).cast());
                            for (y, codes) in [codes, _mm256_srli_epi16::<4>(codes)].into_iter().enumerate() {
                                for (i, words) in nibbles.pairs(codes).into_iter().enumerate() {
                                    let [even, odd] = widened(words);
                                    add(2 * i, 2 * pair + y, even);
                                    add(2 * i + 1, 2 * pair + y, odd);
                                }
                            }
                        } else {
                            for y in 0..2 {
                                let codes = _mm_loadu_si128(line.add(16 * at + 32 * y).cast());
                                let [even, odd] = bytes.split(codes);
                                add(0, 2 * pair + y, even);
                                add(1, 2 * pair + y, odd);
                            }
                        }
                    }
                    line = line.add(LINE);
                    a = a.add(line_values);
                }
                let scaling = Scaling {
                    totals: scaling.totals.wrapping_add(number),
                    ..scaling.of_group(first / group)
                };
                for r in 0..M {
                    for y in 0..Y {
                        totals[r][y] = scaled(sums[r][y], totals[r][y], &scaling, r, column(y));
                    }
                }
                (number, first) = (number + 1, end);
            }
            for r in 0..M {
                for y in 0..Y {
                    let c = c.wrapping_add(r * ldc + column(y));
                    _mm256_maskstore_ps(c, lanes(n, column(y) / 8), totals[r][y]);
                }
            }
        }
    }
}

/// Pairs of bfloat16 as the even and the odd values.
#[inline]
#[target_feature(enable = "avx2")]
fn widened(pairs: __m256i) -> [__m256; 2] {
    let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    [
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)),
        _mm256_castsi256_ps(_mm256_and_si256(pairs, high)),
    ]
}

/// Rows of bfloat16 as float32, zeroes up to whole lines of codes.
///
/// # Safety
/// `from` is readable for k values, `to` writable for as many, rounded up to 4.
pub(super) unsafe fn widen(from: *const u16, k: usize, to: *mut f32) {
    for at in 0..k.next_multiple_of(4) {
        // SAFETY: the caller's contract.
        unsafe {
            let bits = if at < k { *from.add(at) } else { 0 };
            *to.add(at) = f32::from_bits(u32::from(bits) << 16);
        }
    }
}
