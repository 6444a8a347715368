//! The micro-kernels in AVX2 with FMA. 6 rows x 2 ymm are 12 accumulators, enough for two FMA units of latency 4; with
//! two panel registers, a broadcast and a mask that is all 16. Half a panel therefore goes through a tall tile, a whole
//! one through a tile of up to 3 rows. (Two panels through one row: slower, the compiler spills.)
//!
//! bfloat16 operands are widened on the way (a shift for the even value of a pair, a mask for the odd one): half the
//! bytes of float32 at the same rate of arithmetic. Products of two bfloat16 are exact in float32.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{PANEL, PASS_STEPS, Product, Sum};

/// Bytes of a panel's step, in either type.
const PANEL_STEP_BYTES: usize = 128;

/// Rows of the largest register tile.
const MAX_TILE: usize = 6;

/// The rows of a tile in float32, the even and the odd values of the pairs apart: a broadcast is then a plain load at a
/// fixed distance from one pointer. Left to itself the compiler widens pairs in integer registers, at a third of the
/// speed. The widening is shared by all columns of the pass.
#[repr(align(64))]
struct Widened {
    #[allow(dead_code)] // Reached by pointer only: never initialised as a whole.
    values: [[[f32; PASS_STEPS]; 2]; MAX_TILE],
}

/// Calls `$tile::<M, Y>` for `$height` rows and `$width` columns.
macro_rules! tile {
    ($tile:ident, $height:expr, $width:expr, $arguments:tt) => {
        match ($height, $width.div_ceil(8)) {
            (1, 1) => $tile::<1, 1> $arguments,
            (1, 2) => $tile::<1, 2> $arguments,
            (1, _) => $tile::<1, 4> $arguments,
            (2, 1) => $tile::<2, 1> $arguments,
            (2, 2) => $tile::<2, 2> $arguments,
            (2, _) => $tile::<2, 4> $arguments,
            (3, 1) => $tile::<3, 1> $arguments,
            (3, 2) => $tile::<3, 2> $arguments,
            (3, _) => $tile::<3, 4> $arguments,
            (4, 1) => $tile::<4, 1> $arguments,
            (4, _) => $tile::<4, 2> $arguments,
            (5, 1) => $tile::<5, 1> $arguments,
            (5, _) => $tile::<5, 2> $arguments,
            (6, 1) => $tile::<6, 1> $arguments,
            (6, _) => $tile::<6, 2> $arguments,
            _ => unreachable!("a tile has 1..=6 rows"),
        }
    };
}

/// `c (+)= a * panels` with bfloat16 operands and float32 sums.
///
/// # Safety
/// The CPU has AVX2 and FMA; as [`super::product`] with steps <= PASS_STEPS.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn pass_bf16(product: &Product<u16>) {
    let Product {
        m, steps, a, lda, n, ..
    } = *product;
    let mut widened = std::mem::MaybeUninit::<Widened>::uninit();
    let widened: *mut f32 = widened.as_mut_ptr().cast();
    for (row, height) in tiles(m) {
        for r in 0..height {
            // SAFETY: a row of the caller's a into a row of the buffer, which holds PASS_STEPS pairs.
            unsafe { widen(a.add((row + r) * lda), steps, widened.add(r * 2 * PASS_STEPS)) };
        }
        for (column, width) in parts(n, height) {
            // SAFETY: rows and columns inside m and n, for which the caller vouches, and `height` rows are widened.
            unsafe { tile!(tile_bf16, height, width, (product, widened, row, column, width)) };
        }
    }
}

/// `c (+)= a * panels` in float32.
///
/// # Safety
/// The CPU has AVX2 and FMA; as [`super::product`].
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn pass_f32(product: &Product<f32>) {
    let Product { m, n, .. } = *product;
    for (row, height) in tiles(m) {
        for (column, width) in parts(n, height) {
            // SAFETY: rows and columns inside m and n, for which the caller vouches.
            unsafe { tile!(tile_f32, height, width, (product, row, column, width)) };
        }
    }
}

/// Cuts m rows into tiles of nearly equal height: (first row, rows).
fn tiles(m: usize) -> impl Iterator<Item = (usize, usize)> {
    let tiles = m.div_ceil(MAX_TILE);
    (0..tiles).map(move |tile| (tile * m / tiles, (tile + 1) * m / tiles - tile * m / tiles))
}

/// Cuts n columns into what a tile of this height holds: (first column, columns).
fn parts(n: usize, height: usize) -> impl Iterator<Item = (usize, usize)> {
    let widest = if height <= 3 { PANEL } else { PANEL / 2 };
    (0..n)
        .step_by(widest)
        .map(move |column| (column, widest.min(n - column)))
}

/// Asks memory for the panel's next piece while this one is multiplied: the first tile of the rows does, at a pace that
/// is done when the tile is. (Asking at a fixed distance instead has memory idle while the second half of the columns
/// goes through: a quarter slower at 4 to 16 rows.)
struct Ahead {
    line: *const i8,
    stride: usize,
}

impl Ahead {
    /// `piece` is where the tile begins to read the panel: at its first column, or at the 17th.
    #[inline]
    fn new<const Y: usize>(piece: *const i8, steps: usize, row: usize, column: usize) -> Ahead {
        let next = piece.wrapping_add(steps * PANEL_STEP_BYTES);
        match (row, column % PANEL) {
            (0, 0) => Ahead { line: next, stride: PANEL_STEP_BYTES / if Y > 2 { 1 } else { 2 } },
            (0, _) => Ahead { line: next.wrapping_add(steps * PANEL_STEP_BYTES / 2), stride: PANEL_STEP_BYTES / 2 },
            // Read already.
            _ => Ahead { line: piece, stride: 0 },
        }
    }

    #[inline]
    fn ask<const Y: usize>(&mut self) {
        // SAFETY: every x86-64 CPU has it, and an address that cannot be read is ignored.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(self.line);
            if Y > 2 {
                _mm_prefetch::<_MM_HINT_T1>(self.line.wrapping_add(64));
            }
        }
        self.line = self.line.wrapping_add(self.stride);
    }
}

/// # Safety
/// AVX2; `from` holds 2 steps values, `to` two rows of PASS_STEPS >= steps.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn widen(from: *const u16, steps: usize, to: *mut f32) {
    for step in 0..steps {
        // SAFETY: inside what the caller vouches for.
        unsafe {
            let pair = from.add(2 * step).cast::<u32>().read_unaligned();
            to.add(step).write(f32::from_bits(pair << 16));
            to.add(PASS_STEPS + step)
                .write(f32::from_bits(pair & 0xffff_0000));
        }
    }
}

/// One register tile: M rows, Y ymm of columns of one panel.
///
/// # Safety
/// As [`pass_bf16`], for rows row..row + M, whose values stand in `widened`, and the columns from `column`; n <= 8 Y.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_bf16<const M: usize, const Y: usize>(
    product: &Product<u16>,
    widened: *const f32,
    row: usize,
    column: usize,
    n: usize,
) {
    let Product {
        steps,
        panels,
        panel_stride,
        ..
    } = *product;
    let mut panel = panels.wrapping_add(column / PANEL * panel_stride + column % PANEL * 2);
    let mut ahead = Ahead::new::<Y>(panel.cast(), steps, row, column);
    let odd_mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    // SAFETY: all reads and writes lie in the rows, panels and columns the caller vouches for.
    unsafe {
        let mut acc = start::<u16, M, Y>(product, row, column, n);
        for step in 0..steps {
            let line = |y: usize| panel.wrapping_add(y * 16);
            ahead.ask::<Y>();
            let x =
                |r: usize, odd: usize| _mm256_broadcast_ss(&*widened.add((2 * r + odd) * PASS_STEPS + step));
            let even =
                |y: usize| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(line(y).cast())));
            // All even values before the odd ones: only half of the widened panel is in registers at a time. The odd
            // half reads the panel's line again, by hand, since the compiler would keep it and spill accumulators.
            let odd = |y: usize| {
                let value: __m256;
                asm!(
                    "vandps {value}, {mask}, ymmword ptr [{line}]",
                    value = out(ymm_reg) value, mask = in(ymm_reg) odd_mask, line = in(reg) line(y),
                    options(readonly, nostack, preserves_flags),
                );
                value
            };
            accumulate(&mut acc, |r| x(r, 0), even);
            accumulate(&mut acc, |r| x(r, 1), odd);
            panel = panel.wrapping_add(2 * PANEL);
        }
        finish(acc, product, row, column, n);
    }
}

/// One register tile in float32: M rows, Y ymm of columns of one panel.
///
/// # Safety
/// As [`pass_f32`], for rows row..row + M and the columns from `column`; n <= 8 Y.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_f32<const M: usize, const Y: usize>(
    product: &Product<f32>,
    row: usize,
    column: usize,
    n: usize,
) {
    let Product {
        steps,
        a,
        lda,
        panels,
        panel_stride,
        ..
    } = *product;
    let mut panel = panels.wrapping_add(column / PANEL * panel_stride + column % PANEL);
    let mut ahead = Ahead::new::<Y>(panel.cast(), steps, row, column);
    let mut a = a.wrapping_add(row * lda);
    // SAFETY: all reads and writes lie in the rows, panels and columns the caller vouches for.
    unsafe {
        let mut acc = start::<f32, M, Y>(product, row, column, n);
        for _ in 0..steps {
            let line = |y: usize| panel.wrapping_add(y * 8);
            ahead.ask::<Y>();
            accumulate(
                &mut acc,
                |r| _mm256_broadcast_ss(&*a.add(r * lda)),
                |y| _mm256_loadu_ps(line(y)),
            );
            a = a.wrapping_add(1);
            panel = panel.wrapping_add(PANEL);
        }
        finish(acc, product, row, column, n);
    }
}

/// acc[r][y] += x(r) b(y), with whichever of the two there is less of held in registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn accumulate<const M: usize, const Y: usize>(
    acc: &mut [[__m256; Y]; M],
    x: impl Fn(usize) -> __m256,
    b: impl Fn(usize) -> __m256,
) {
    if Y <= 2 {
        let b: [__m256; Y] = std::array::from_fn(b);
        for r in 0..M {
            let x = x(r);
            for y in 0..Y {
                acc[r][y] = _mm256_fmadd_ps(x, b[y], acc[r][y]);
            }
        }
    } else {
        let x: [__m256; M] = std::array::from_fn(x);
        for y in 0..Y {
            let b = b(y);
            for r in 0..M {
                acc[r][y] = _mm256_fmadd_ps(x[r], b, acc[r][y]);
            }
        }
    }
}

/// The lanes of register y that are columns of c, as the sign bits VMASKMOVPS looks at.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes(n: usize, y: usize) -> __m256i {
    let count = n as i32 - 8 * y as i32;
    _mm256_cmpgt_epi32(
        _mm256_set1_epi32(count),
        _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
    )
}

/// # Safety
/// AVX2; for [`Sum::Continue`], c is readable for M rows from `row` in n columns from `column`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn start<T: Copy, const M: usize, const Y: usize>(
    product: &Product<T>,
    row: usize,
    column: usize,
    n: usize,
) -> [[__m256; Y]; M] {
    let Product { c, ldc, sum, .. } = *product;
    let mut acc = [[_mm256_setzero_ps(); Y]; M];
    if sum == Sum::Continue {
        for r in 0..M {
            for y in 0..Y {
                let c = c.wrapping_add((row + r) * ldc + column + 8 * y);
                // SAFETY: masked-off columns are not read; the others are the caller's.
                acc[r][y] = unsafe {
                    match n == 8 * Y {
                        true => _mm256_loadu_ps(c),
                        false => _mm256_maskload_ps(c, lanes(n, y)),
                    }
                };
            }
        }
    }
    acc
}

/// # Safety
/// AVX2; c is readable and writable for M rows from `row` in n columns from `column`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn finish<T: Copy, const M: usize, const Y: usize>(
    acc: [[__m256; Y]; M],
    product: &Product<T>,
    row: usize,
    column: usize,
    n: usize,
) {
    let Product { c, ldc, sum, .. } = *product;
    for r in 0..M {
        for y in 0..Y {
            let c = c.wrapping_add((row + r) * ldc + column + 8 * y);
            let mut value = acc[r][y];
            // SAFETY: masked-off columns are neither read nor written; the others are the caller's.
            unsafe {
                // A masked store is some twenty operations on Zen: only where columns are missing.
                match (n == 8 * Y, sum == Sum::Add) {
                    (true, true) => _mm256_storeu_ps(c, _mm256_add_ps(_mm256_loadu_ps(c), value)),
                    (true, false) => _mm256_storeu_ps(c, value),
                    (false, add) => {
                        let lanes = lanes(n, y);
                        if add {
                            value = _mm256_add_ps(_mm256_maskload_ps(c, lanes), value);
                        }
                        _mm256_maskstore_ps(c, lanes, value);
                    }
                }
            }
        }
    }
}

/// # Safety
/// The CPU has AVX2. The slices are equally long.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn round_bf16(from: &[f32], to: &mut [u16]) {
    // Plain arithmetic, which the compiler vectorises. Adding 0x7fff plus the lowest kept bit carries into the kept
    // half exactly when round-to-nearest-even goes up; a NaN is made quiet instead, or the carry could make it infinite.
    for (from, to) in from.iter().zip(to) {
        let bits = from.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let nan = bits >> 16 | 0x40;
        *to = (if from.is_nan() { nan } else { rounded }) as u16;
    }
}
