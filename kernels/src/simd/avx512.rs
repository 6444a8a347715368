//! The micro-kernels in AVX-512: 12 rows x 2 zmm are 24 accumulators; with two panel registers and one broadcast that
//! is 27 of 32. VDPBF16PS and FMA issue once a cycle with a latency of up to 6, and one broadcast feeds two of them,
//! so the dot unit is the only limit.

#![allow(clippy::needless_range_loop)] // Register tiles are indexed by row and column.

use std::arch::x86_64::*;

use super::{Ahead, Element, PANEL, PASS_STEPS, Product, Scaling, Sum};

/// How far ahead of its use a panel line is asked for. Reaching past a panel's end is right: the next panel follows it
/// in memory. A prefetch of an unmapped address is ignored.
const PREFETCH_BYTES: usize = 8192;

/// Rows of the largest register tile.
const MAX_TILE: usize = 12;
/// Up to this many rows two panels (64 columns) go through a tile side by side.
const MAX_WIDE_TILE: usize = 6;
/// Rows of the largest tile whose sums are scaled, group by group: what they are added to wants registers, too.
const MAX_SCALED_TILE: usize = 8;

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
            let highest = match product.sum {
                Sum::Scaled(_) => MAX_SCALED_TILE,
                _ => MAX_TILE,
            };
            let tiles = product.m.div_ceil(highest);
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

/// A register tile: M rows, Z zmm of columns (1, 2, or 4 = two panels).
macro_rules! tile {
    ($tile:ident, $sums:ident, $t:ty, $features:literal, $pass:ident) => {
        /// # Safety
        #[doc = concat!("As [`", stringify!($pass), "`], for rows row..row + M; n <= 16 Z.")]
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $tile<const M: usize, const Z: usize>(product: &Product<$t>, row: usize) {
            let Product {
                steps,
                a,
                lda,
                panels,
                panel_stride,
                n,
                c,
                ldc,
                sum,
                ..
            } = *product;
            const PER_STEP: usize = <$t as Element>::PER_STEP;
            // SAFETY: all reads and writes lie in the rows, panels and columns the caller vouches for.
            unsafe {
                let a = a.add(row * lda);
                let Sum::Scaled(scaling) = sum else {
                    let acc = start::<$t, M, Z>(product, row);
                    let ahead = Ahead::nothing(panels.cast());
                    let acc = $sums::<M, Z, false>(acc, (a, lda), (panels, panel_stride), steps, ahead);
                    return finish(acc, product, row);
                };
                // Levels of codes lie in the nearest cache; the first rows ask for the codes that follow. What all groups
                // come to stays in registers.
                let c = c.wrapping_add(row * ldc);
                let mut totals = read::<M, Z>(c, ldc, n);
                for group in 0..steps / scaling.group_steps {
                    let skipped = group * scaling.group_steps * PER_STEP;
                    let (from, levels) = (a.add(skipped), panels.add(skipped * PANEL));
                    let scaling = scaling.of_group(group);
                    let ahead = match row {
                        0 => scaling.ahead,
                        _ => Ahead::nothing(levels.cast()),
                    };
                    let sums = [[_mm512_setzero_ps(); Z]; M];
                    let sums = $sums::<M, Z, true>(
                        sums,
                        (from, lda),
                        (levels, panel_stride),
                        scaling.group_steps,
                        ahead,
                    );
                    add_scaled(&mut totals, sums, &scaling, row);
                }
                write(totals, c, ldc, n);
            }
        }
    };
}

tile!(
    tile_bf16,
    sums_bf16,
    u16,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16",
    pass_bf16
);
tile!(
    tile_f32,
    sums_f32,
    f32,
    "avx512f,avx512bw,avx512dq,avx512vl",
    pass_f32
);

/// `acc` plus `steps` steps of rows times panels. Of levels, made in the nearest cache, `ahead` says what to ask memory for.
///
/// # Safety
/// AVX512-BF16; rows and panels are readable for the steps.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn sums_bf16<const M: usize, const Z: usize, const LEVELS: bool>(
    mut acc: [[__m512; Z]; M],
    (mut a, lda): (*const u16, usize),
    (mut panel, panel_stride): (*const u16, usize),
    steps: usize,
    mut ahead: Ahead,
) -> [[__m512; Z]; M] {
    // SAFETY: the caller's contract.
    unsafe {
        for _ in 0..steps {
            let mut b = [_mm512_setzero_si512(); Z];
            for z in 0..Z {
                let line = panel.wrapping_add(z / 2 * panel_stride + z % 2 * 32);
                b[z] = _mm512_loadu_si512(line.cast());
                if !LEVELS {
                    _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH_BYTES));
                }
            }
            if LEVELS {
                ahead.ask();
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
    }
    acc
}

/// As [`sums_bf16`].
///
/// # Safety
/// AVX-512F; rows and panels are readable for the steps.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn sums_f32<const M: usize, const Z: usize, const LEVELS: bool>(
    mut acc: [[__m512; Z]; M],
    (mut a, lda): (*const f32, usize),
    (mut panel, panel_stride): (*const f32, usize),
    steps: usize,
    mut ahead: Ahead,
) -> [[__m512; Z]; M] {
    // SAFETY: the caller's contract.
    unsafe {
        for _ in 0..steps {
            let mut b = [_mm512_setzero_ps(); Z];
            for z in 0..Z {
                let line = panel.wrapping_add(z / 2 * panel_stride + z % 2 * 16);
                b[z] = _mm512_loadu_ps(line);
                if !LEVELS {
                    _mm_prefetch::<_MM_HINT_T0>(line.cast::<i8>().wrapping_add(PREFETCH_BYTES));
                }
            }
            if LEVELS {
                ahead.ask();
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
    }
    acc
}

impl Ahead {
    #[inline]
    fn ask(&mut self) {
        // SAFETY: a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(self.line.cast()) };
        self.line = self.line.wrapping_add(self.stride);
    }
}

/// M rows of n columns; lanes beyond them are zero.
///
/// # Safety
/// AVX-512F; they are readable.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn read<const M: usize, const Z: usize>(
    c: *const f32,
    ldc: usize,
    n: usize,
) -> [[__m512; Z]; M] {
    let mut sums = [[_mm512_setzero_ps(); Z]; M];
    for r in 0..M {
        for z in 0..Z {
            // SAFETY: masked-off columns are not read; the others are the caller's.
            sums[r][z] = unsafe { _mm512_maskz_loadu_ps(lanes(n, z), c.wrapping_add(r * ldc + 16 * z)) };
        }
    }
    sums
}

/// # Safety
/// AVX-512F; the columns are writable.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn write<const M: usize, const Z: usize>(
    sums: [[__m512; Z]; M],
    c: *mut f32,
    ldc: usize,
    n: usize,
) {
    for r in 0..M {
        for z in 0..Z {
            let to = c.wrapping_add(r * ldc + 16 * z);
            // SAFETY: masked-off columns are not written; the others are the caller's.
            unsafe {
                match n >= 16 * Z {
                    // A masked store is several operations on Zen.
                    true => _mm512_storeu_ps(to, sums[r][z]),
                    false => _mm512_mask_storeu_ps(to, lanes(n, z), sums[r][z]),
                }
            }
        }
    }
}

/// `totals += scale * sums + offset * total` of the scaling's first group, for M rows from `row`.
///
/// # Safety
/// AVX-512F; the scaling is readable for the rows and the registers' panels.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn add_scaled<const M: usize, const Z: usize>(
    totals: &mut [[__m512; Z]; M],
    sums: [[__m512; Z]; M],
    scaling: &Scaling,
    row: usize,
) {
    // SAFETY: all 32 columns of a panel have scales, and offsets if there are any: the caller vouches.
    unsafe {
        let of = |numbers: *const f32, z: usize| {
            _mm512_loadu_ps(numbers.add(z / 2 * scaling.panel_stride + z % 2 * 16))
        };
        for z in 0..Z {
            let scales = of(scaling.scales, z);
            for r in 0..M {
                totals[r][z] = _mm512_fmadd_ps(sums[r][z], scales, totals[r][z]);
            }
        }
        if scaling.offsets.is_null() {
            return;
        }
        for z in 0..Z {
            let offsets = of(scaling.offsets, z);
            for r in 0..M {
                let total = _mm512_set1_ps(*scaling.totals.add((row + r) * scaling.totals_stride));
                totals[r][z] = _mm512_fmadd_ps(total, offsets, totals[r][z]);
            }
        }
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
    match sum {
        // SAFETY: the caller's contract.
        Sum::Continue => unsafe { read::<M, Z>(c.wrapping_add(row * ldc), ldc, n) },
        _ => [[_mm512_setzero_ps(); Z]; M],
    }
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
    let c = c.wrapping_add(row * ldc);
    let mut acc = acc;
    // SAFETY: the rows and columns of c are the caller's.
    unsafe {
        if sum == Sum::Add {
            let before = read::<M, Z>(c, ldc, n);
            for r in 0..M {
                for z in 0..Z {
                    acc[r][z] = _mm512_add_ps(before[r][z], acc[r][z]);
                }
            }
        }
        write(acc, c, ldc, n);
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
