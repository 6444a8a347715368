//! Moving matrices into and out of panels. Everything is a transposition of 32-bit words (a float32, or a pair of
//! bfloat16 along K) or an interleaving of two rows; no arithmetic, so AVX2 serves every machine that has it.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Element, PANEL};

/// Packs up to 32 rows of a matrix `[n, K]` as the columns of one panel: `panel[k][j] = rows[j][k]`. Missing columns
/// are zeroed. Rows are padded with a zero where K is odd and pairs are wanted.
///
/// # Safety
/// [`super::available`]. `rows` is readable for n <= 32 rows of steps * PER_STEP elements, `stride` apart, both counts
/// a multiple of PER_STEP and the pointer aligned to as many elements; `panel` is writable for `32 * steps * PER_STEP`
/// elements.
pub(crate) unsafe fn pack_rows<T: Element>(
    rows: *const T,
    stride: usize,
    n: usize,
    steps: usize,
    panel: *mut T,
) {
    // SAFETY: a step is one 32-bit word in both types; the rest is the caller's contract.
    unsafe {
        let panel: *mut u32 = panel.cast();
        if n < PANEL {
            std::ptr::write_bytes(panel, 0, steps * PANEL);
        }
        transpose(
            Words {
                ptr: rows.cast(),
                stride: stride / T::PER_STEP,
            },
            n,
            steps,
            panel,
            PANEL,
        );
    }
}

/// The inverse of [`pack_rows`]: `steps` steps of a panel back into n <= 32 rows.
///
/// # Safety
/// [`super::available`]. `panel` is readable for `32 * steps * PER_STEP` elements; `rows` is writable for n rows of
/// steps * PER_STEP elements, `stride` apart, aligned as in [`pack_rows`].
pub(crate) unsafe fn unpack_rows<T: Element>(
    panel: *const T,
    steps: usize,
    n: usize,
    rows: *mut T,
    stride: usize,
) {
    // SAFETY: a step is one 32-bit word in both types; the rest is the caller's contract.
    unsafe {
        transpose(
            Words {
                ptr: panel.cast(),
                stride: PANEL,
            },
            steps,
            n,
            rows.cast(),
            stride / T::PER_STEP,
        );
    }
}

/// Packs PER_STEP rows of a matrix `[K, 32]` as one step of a panel: float32 is copied, two rows of bfloat16 are
/// interleaved (`rows[1]` is then the second; in float32 it is not looked at).
///
/// # Panics
/// When the step has not 32 * PER_STEP elements.
#[inline]
pub(crate) fn pack_step<T: Element>(rows: [&[T; PANEL]; 2], step: &mut [T]) {
    assert_eq!(step.len(), PANEL * T::PER_STEP);
    if T::PER_STEP == 1 {
        step.copy_from_slice(rows[0]);
        return;
    }
    // SAFETY: two rows of 32 halves in, 64 halves out, and fast paths were asked for by whoever packs.
    unsafe {
        interleave(
            rows[0].as_ptr().cast(),
            rows[1].as_ptr().cast(),
            step.as_mut_ptr().cast(),
        )
    }
}

/// # Safety
/// The CPU has AVX2. `even` and `odd` are readable for 32 values, `to` is writable for 64.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn interleave(even: *const u16, odd: *const u16, to: *mut u16) {
    for half in [0, 16] {
        // SAFETY: 16 values at 0 and at 16, 32 at twice that.
        unsafe {
            let even = _mm256_loadu_si256(even.add(half).cast());
            let odd = _mm256_loadu_si256(odd.add(half).cast());
            let (low, high) = (_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd));
            let to = to.add(2 * half).cast::<__m256i>();
            _mm256_storeu_si256(to, _mm256_permute2x128_si256::<0x20>(low, high));
            _mm256_storeu_si256(to.add(1), _mm256_permute2x128_si256::<0x31>(low, high));
        }
    }
}

/// # Safety
/// `even` and `odd` are readable for 32 values, `to` is writable for 64.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn interleave(even: *const u16, odd: *const u16, to: *mut u16) {
    for i in 0..PANEL {
        // SAFETY: i < 32.
        unsafe {
            *to.add(2 * i) = *even.add(i);
            *to.add(2 * i + 1) = *odd.add(i);
        }
    }
}

/// Halves of a square of pairs: 32 columns over 32 values.
pub(crate) const SQUARE: usize = 32 * PANEL;

/// A square of a panel of bfloat16 (`[16][32][2]`: 16 pairs along K of 32 columns) as that of the panel whose columns are K:
/// `to[n / 2][k][n % 2] = from[k / 2][n][k % 2]`. Pairs of pairs change places like the numbers of a matrix, and within one the
/// two in the middle do.
///
/// # Safety
/// [`super::available`]. Both are a square of [`SQUARE`] halves.
pub(crate) unsafe fn turn_square(from: *const u16, to: *mut u16) {
    // SAFETY: the caller's contract.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        turn_square_avx2(from, to)
    }
    #[cfg(not(target_arch = "x86_64"))]
    for (n, k) in (0..PANEL).flat_map(|n| (0..32).map(move |k| (n, k))) {
        // SAFETY: n and k below 32.
        unsafe { *to.add((n / 2 * PANEL + k) * 2 + n % 2) = *from.add((k / 2 * PANEL + n) * 2 + k % 2) };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn turn_square_avx2(from: *const u16, to: *mut u16) {
    let middle = _mm256_setr_epi8(
        0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11,
        14, 15,
    );
    let (from, to) = (from.cast::<u64>(), to.cast::<u64>());
    // SAFETY: 16 rows of 16 pairs of pairs on both sides.
    unsafe {
        // (An iterator over both does not dissolve into this loop.)
        for block in 0..16 {
            let (row, column) = (block / 4 * 4, block % 4 * 4);
            let r: [__m256i; 4] = std::array::from_fn(|i| {
                let pairs = _mm256_loadu_si256(from.add((row + i) * 16 + column).cast());
                _mm256_shuffle_epi8(pairs, middle)
            });
            let even = [
                _mm256_unpacklo_epi64(r[0], r[1]),
                _mm256_unpacklo_epi64(r[2], r[3]),
            ];
            let odd = [
                _mm256_unpackhi_epi64(r[0], r[1]),
                _mm256_unpackhi_epi64(r[2], r[3]),
            ];
            let turned = [
                _mm256_permute2x128_si256::<0x20>(even[0], even[1]),
                _mm256_permute2x128_si256::<0x20>(odd[0], odd[1]),
                _mm256_permute2x128_si256::<0x31>(even[0], even[1]),
                _mm256_permute2x128_si256::<0x31>(odd[0], odd[1]),
            ];
            for (i, turned) in turned.into_iter().enumerate() {
                _mm256_storeu_si256(to.add((column + i) * 16 + row).cast(), turned);
            }
        }
    }
}

/// A matrix of 32-bit words by its first word and the distance of its rows.
#[derive(Clone, Copy)]
pub(crate) struct Words {
    pub ptr: *const u32,
    pub stride: usize,
}

/// `to[column][row] = from[row][column]`.
///
/// # Safety
/// The CPU has AVX2. `from` is readable for `rows` rows of `columns` words; `to` is writable for `columns` rows of
/// `rows` words, `to_stride` apart.
pub(crate) unsafe fn transpose(from: Words, rows: usize, columns: usize, to: *mut u32, to_stride: usize) {
    // SAFETY: the caller's contract.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        transpose_avx2(from, rows, columns, to, to_stride)
    }
    #[cfg(not(target_arch = "x86_64"))]
    for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
        // SAFETY: row < rows and column < columns, for which the caller vouches.
        unsafe {
            to.add(column * to_stride + row)
                .write_unaligned(from.ptr.add(row * from.stride + column).read_unaligned());
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn transpose_avx2(from: Words, rows: usize, columns: usize, to: *mut u32, to_stride: usize) {
    let (whole_rows, whole_columns) = (rows / 8 * 8, columns / 8 * 8);
    // SAFETY: all indices stay below rows and columns, for which the caller vouches.
    unsafe {
        for column in (0..whole_columns).step_by(8) {
            for row in (0..whole_rows).step_by(8) {
                let from = Words {
                    ptr: from.ptr.add(row * from.stride + column),
                    stride: from.stride,
                };
                transpose_8x8(from, to.add(column * to_stride + row), to_stride);
            }
        }
        let edge = |row: usize, column: usize| {
            to.add(column * to_stride + row)
                .write_unaligned(from.ptr.add(row * from.stride + column).read_unaligned());
        };
        for row in 0..rows {
            let begin = if row < whole_rows { whole_columns } else { 0 };
            (begin..columns).for_each(|column| edge(row, column));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transpose_8x8(from: Words, to: *mut u32, to_stride: usize) {
    // SAFETY: 8 rows of 8 words on both sides, for which the caller vouches.
    unsafe {
        let r: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(from.ptr.add(i * from.stride).cast()));
        // Pairs of words, then pairs of pairs, then the halves of the registers.
        let t: [__m256; 8] = std::array::from_fn(|i| match i % 2 {
            0 => _mm256_unpacklo_ps(r[i], r[i + 1]),
            _ => _mm256_unpackhi_ps(r[i - 1], r[i]),
        });
        let s: [__m256; 8] = std::array::from_fn(|i| {
            let (a, b) = (t[i / 4 * 4 + i % 4 / 2], t[i / 4 * 4 + i % 4 / 2 + 2]);
            match i % 2 {
                0 => _mm256_shuffle_ps::<0x44>(a, b),
                _ => _mm256_shuffle_ps::<0xee>(a, b),
            }
        });
        for i in 0..8 {
            let row = match i / 4 {
                0 => _mm256_permute2f128_ps::<0x20>(s[i], s[i + 4]),
                _ => _mm256_permute2f128_ps::<0x31>(s[i - 4], s[i]),
            };
            _mm256_storeu_ps(to.add(i * to_stride).cast(), row);
        }
    }
}
