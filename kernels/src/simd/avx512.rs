//! The micro-kernels in AVX-512: 12 rows x 2 zmm are 24 accumulators; with two panel registers and one broadcast that
//! is 27 of 32. VDPBF16PS and FMA issue once a cycle with a latency of up to 6, and one broadcast feeds two of them,
//! so the dot unit is the only limit.

#![allow(clippy::needless_range_loop)] // Register tiles are indexed by row and column.

use std::arch::x86_64::*;

use super::{PANEL, PASS_STEPS, Product, Scaling, Sum};

/// How far ahead of its use a panel line is asked for. Reaching past a panel's end is right: the next panel follows it
/// in memory. A prefetch of an unmapped address is ignored.
const PREFETCH_BYTES: usize = 8192;

/// Rows of the largest register tile.
const MAX_TILE: usize = 12;
/// Up to this many rows two panels (64 columns) go through a tile side by side.
const MAX_WIDE_TILE: usize = 6;

pub(super) fn pass_columns(m: usize) -> usize {
    if m <= MAX_WIDE_TILE { 2 * PANEL } else { PANEL }
}

pub(super) fn pass_steps(m: usize) -> usize {
    if m <= MAX_TILE { usize::MAX } else { PASS_STEPS }
}

/// Cuts m rows into tiles of nearly equal height (13 rows are 7 + 6, not 12 + 1: a tile of one row is bound by the
/// latency of its chain) and picks the tile by its height and its number of zmm columns.
macro_rules! pass {
    ($(#[$doc:meta])* $name:ident, $tile:ident, $t:ty, $features:literal, { $($m:literal)* } { $($wide:literal)* }) => {
        $(#[$doc])*
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name(product: &Product<$t>) {
            let tiles = product.m.div_ceil(MAX_TILE);
            let (height, taller) = (product.m / tiles, product.m % tiles);
            let mut row = 0;
            for tile in 0..tiles {
                let height = height + usize::from(tile < taller);
                // SAFETY: the rows stay inside m, and the tile's registers cover n: the caller vouches for both.
                unsafe {
                    match (height, product.n.div_ceil(16)) {
                        $(
                            ($m, 1) => $tile::<$m, 1>(product, row),
                            ($m, 2) => $tile::<$m, 2>(product, row),
                        )*
                        $(($wide, _) => $tile::<$wide, 4>(product, row),)*
                        _ => unreachable!("a tile has 1..=12 rows, and 64 columns only up to 6 rows"),
                    }
                }
                row += height;
            }
        }
    };
}

pass!(
    /// `c (+)= a * panels` with bfloat16 operands and float32 sums.
    ///
    /// # Safety
    /// The CPU has AVX512-BF16; as [`super::product`] with n <= [`pass_columns`] and steps <= [`pass_steps`].
    pass_bf16, tile_bf16, u16, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16",
    { 1 2 3 4 5 6 7 8 9 10 11 12 } { 1 2 3 4 5 6 }
);

pass!(
    /// `c (+)= a * panels` in float32 with fused multiply-add.
    ///
    /// # Safety
    /// The CPU has AVX-512 (F, BW, DQ, VL); as [`super::product`] with n <= [`pass_columns`] and steps <= [`pass_steps`].
    pass_f32, tile_f32, f32, "avx512f,avx512bw,avx512dq,avx512vl",
    { 1 2 3 4 5 6 7 8 9 10 11 12 } { 1 2 3 4 5 6 }
);

/// One register tile: M rows, Z zmm of columns (1, 2, or 4 = two panels).
///
/// # Safety
/// As [`pass_bf16`], for rows row..row + M; n <= 16 Z.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn tile_bf16<const M: usize, const Z: usize>(product: &Product<u16>, row: usize) {
    let Product {
        steps,
        a,
        lda,
        panels,
        panel_stride,
        ..
    } = *product;
    // SAFETY: all reads and writes lie in the rows, panels and columns the caller vouches for.
    unsafe {
        let mut acc = start::<u16, M, Z>(product, row);
        let mut a = a.add(row * lda);
        let mut panel = panels;
        for _ in 0..steps {
            let mut b = [_mm512_setzero_si512(); Z];
            for z in 0..Z {
                let line = panel.wrapping_add(z / 2 * panel_stride + z % 2 * 32);
                b[z] = _mm512_loadu_si512(line.cast());
                _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH_BYTES));
            }
            for r in 0..M {
                let pair = _mm512_set1_epi32(a.add(r * lda).cast::<i32>().read_unaligned());
                for z in 0..Z {
                    acc[r][z] = _mm512_dpbf16_ps(acc[r][z], as_bf16(pair), as_bf16(b[z]));
                }
            }
            a = a.add(2);
            panel = panel.add(64);
        }
        finish(acc, product, row);
    }
}

/// One register tile in float32: M rows, Z zmm of columns (1, 2, or 4 = two panels).
///
/// # Safety
/// As [`pass_f32`], for rows row..row + M; n <= 16 Z.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn tile_f32<const M: usize, const Z: usize>(product: &Product<f32>, row: usize) {
    let Product {
        steps,
        a,
        lda,
        panels,
        panel_stride,
        ..
    } = *product;
    // SAFETY: all reads and writes lie in the rows, panels and columns the caller vouches for.
    unsafe {
        let mut acc = start::<f32, M, Z>(product, row);
        let mut a = a.add(row * lda);
        let mut panel = panels;
        for _ in 0..steps {
            let mut b = [_mm512_setzero_ps(); Z];
            for z in 0..Z {
                let line = panel.wrapping_add(z / 2 * panel_stride + z % 2 * 16);
                b[z] = _mm512_loadu_ps(line);
                _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH_BYTES));
            }
            for r in 0..M {
                let x = _mm512_set1_ps(*a.add(r * lda));
                for z in 0..Z {
                    acc[r][z] = _mm512_fmadd_ps(x, b[z], acc[r][z]);
                }
            }
            a = a.add(1);
            panel = panel.add(32);
        }
        finish(acc, product, row);
    }
}

/// The lanes of register z that are columns of c.
#[inline]
pub(super) fn lanes(n: usize, z: usize) -> u16 {
    ((1u32 << n.saturating_sub(16 * z).min(16)) - 1) as u16
}

/// # Safety
/// AVX-512F; for [`Sum::Continue`], c is readable for M rows from `row` in n columns.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn start<T: Copy, const M: usize, const Z: usize>(
    product: &Product<T>,
    row: usize,
) -> [[__m512; Z]; M] {
    let Product { n, c, ldc, sum, .. } = *product;
    let mut acc = [[_mm512_setzero_ps(); Z]; M];
    if sum == Sum::Continue {
        for r in 0..M {
            for z in 0..Z {
                // SAFETY: masked-off columns are not read; the others are the caller's.
                acc[r][z] =
                    unsafe { _mm512_maskz_loadu_ps(lanes(n, z), c.wrapping_add((row + r) * ldc + 16 * z)) };
            }
        }
    }
    acc
}

/// # Safety
/// AVX-512F; c is readable and writable for M rows from `row` in n columns.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn finish<T: Copy, const M: usize, const Z: usize>(
    acc: [[__m512; Z]; M],
    product: &Product<T>,
    row: usize,
) {
    let Product { n, c, ldc, sum, .. } = *product;
    for r in 0..M {
        for z in 0..Z {
            let c = c.wrapping_add((row + r) * ldc + 16 * z);
            let mut value = acc[r][z];
            // SAFETY: masked-off columns are neither read nor written; the others are the caller's.
            unsafe {
                match sum {
                    Sum::Set | Sum::Continue => (),
                    Sum::Add => value = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes(n, z), c), value),
                    Sum::Scaled(scaling) => {
                        let before = _mm512_maskz_loadu_ps(lanes(n, z), c);
                        value = scaled(value, before, &scaling, row + r, z);
                    }
                }
                _mm512_mask_storeu_ps(c, lanes(n, z), value);
            }
        }
    }
}

/// `before + scale * sum + offset * total` of a row's columns in register z.
///
/// # Safety
/// AVX-512F; the scaling is readable for the row and the register's panel.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn scaled(sum: __m512, before: __m512, scaling: &Scaling, row: usize, z: usize) -> __m512 {
    let at = z / 2 * scaling.panel_stride + z % 2 * 16;
    // SAFETY: all 32 columns of a panel have scales, and offsets if there are any: the caller vouches.
    unsafe {
        let value = _mm512_fmadd_ps(sum, _mm512_loadu_ps(scaling.scales.add(at)), before);
        if scaling.offsets.is_null() {
            return value;
        }
        let total = _mm512_set1_ps(*scaling.totals.add(row * scaling.totals_stride));
        _mm512_fmadd_ps(total, _mm512_loadu_ps(scaling.offsets.add(at)), value)
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 plain bytes; std::arch has no cast between them.
    unsafe { std::mem::transmute(bits) }
}

/// # Safety
/// The CPU has AVX512-BF16. The slices are equally long.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn round_bf16(from: &[f32], to: &mut [u16]) {
    let (blocks, rest) = from.as_chunks::<32>();
    let (to_blocks, to_rest) = to.as_chunks_mut::<32>();
    for (from, to) in blocks.iter().zip(to_blocks) {
        // SAFETY: 32 floats are read and 32 halves written, the lengths of the arrays.
        unsafe {
            let (low, high) = (
                _mm512_loadu_ps(from.as_ptr()),
                _mm512_loadu_ps(from.as_ptr().add(16)),
            );
            to.as_mut_ptr()
                .cast::<__m512bh>()
                .write_unaligned(_mm512_cvtne2ps_pbh(high, low));
        }
    }
    for (from, to) in rest.chunks(16).zip(to_rest.chunks_mut(16)) {
        let lanes = ((1u32 << from.len()) - 1) as u16;
        // SAFETY: only the lanes of the chunk are read and written.
        unsafe {
            let bits = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, from.as_ptr()));
            let bits = std::mem::transmute::<__m256bh, __m256i>(bits);
            _mm256_mask_storeu_epi16(to.as_mut_ptr().cast(), lanes, bits);
        }
    }
}
