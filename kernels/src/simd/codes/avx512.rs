//! Codes to levels in AVX-512. Four bits are looked up in a register; eight are converted.

use std::arch::x86_64::*;

use super::LINE;

/// # Safety
/// The CPU has AVX-512 (F, BW); as [`super::to_bf16`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn nibbles_to_bf16(levels: &[u16], from: *const u8, lines: usize, to: *mut u16) {
    let table = nibble_table(levels);
    for line in 0..lines {
        // SAFETY: a line in, four registers (4 values of 32 columns) out.
        unsafe {
            let codes = _mm512_loadu_si512(from.add(line * LINE).cast());
            for (i, levels) in looked_up(codes, table).into_iter().enumerate() {
                _mm512_storeu_si512(to.add((line * 4 + i) * 32).cast(), levels);
            }
        }
    }
}

/// The 16 levels twice: an index may then have anything above its four bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn nibble_table(levels: &[u16]) -> __m512i {
    let mut table = [0u16; 32];
    table
        .iter_mut()
        .zip(levels.iter().cycle())
        .for_each(|(to, level)| *to = *level);
    // SAFETY: 64 bytes of the array.
    unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
}

/// The four registers of a line's two steps.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn looked_up(codes: __m512i, table: __m512i) -> [__m512i; 4] {
    [
        _mm512_permutexvar_epi16(codes, table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), table),
    ]
}

/// # Safety
/// The CPU has AVX-512 (F, BW); as [`super::to_f32`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn nibbles_to_f32(levels: &[f32], from: *const u8, lines: usize, to: *mut f32) {
    assert_eq!(levels.len(), 16);
    // SAFETY: 16 floats.
    let table = unsafe { _mm512_loadu_ps(levels.as_ptr()) };
    for line in 0..lines {
        // SAFETY: a line in, four values of 32 columns out.
        unsafe {
            let codes = _mm512_loadu_si512(from.add(line * LINE).cast());
            let store = |k: usize, half: usize, codes: __m512i| {
                let to = to.add((line * 4 + k) * 32 + half * 16);
                _mm512_storeu_ps(to, _mm512_permutexvar_ps(codes, table));
            };
            store(0, 0, codes);
            store(0, 1, _mm512_srli_epi32::<4>(codes));
            store(2, 0, _mm512_srli_epi32::<8>(codes));
            store(2, 1, _mm512_srli_epi32::<12>(codes));
            store(1, 0, _mm512_srli_epi32::<16>(codes));
            store(1, 1, _mm512_srli_epi32::<20>(codes));
            store(3, 0, _mm512_srli_epi32::<24>(codes));
            store(3, 1, _mm512_srli_epi32::<28>(codes));
        }
    }
}

/// # Safety
/// The CPU has AVX512-BF16; as [`super::to_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn int8_to_bf16(from: *const u8, lines: usize, to: *mut u16) {
    for half in 0..lines * 2 {
        // SAFETY: half a line in, a register of 32 halves out.
        unsafe {
            let levels = int8_levels(from.add(half * 32));
            _mm512_storeu_si512(to.add(half * 32).cast(), levels);
        }
    }
}

/// 32 codes of half a line as bfloat16.
///
/// # Safety
/// The CPU has AVX512-BF16; `from` is readable for 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn int8_levels(from: *const u8) -> __m512i {
    // SAFETY: two times 16 bytes.
    let [low, high] = unsafe {
        [0, 16].map(|at| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.add(at).cast()))))
    };
    pair(low, high)
}

/// # Safety
/// The CPU has AVX512-BF16; as [`super::to_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn fp8_to_bf16(from: *const u8, lines: usize, to: *mut u16) {
    for half in 0..lines * 2 {
        // SAFETY: half a line in, a register of 32 halves out.
        unsafe {
            let levels = fp8_levels(from.add(half * 32));
            _mm512_storeu_si512(to.add(half * 32).cast(), levels);
        }
    }
}

/// 32 codes E4M3 of half a line as bfloat16. Shifted into the fields of half precision a code is 2^-8 of its value, also
/// where it is subnormal. (The two codes that are no number become 480; whoever packs has refused them.)
///
/// # Safety
/// The CPU has AVX512-BF16; `from` is readable for 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn fp8_levels(from: *const u8) -> __m512i {
    // SAFETY: two times 16 bytes.
    let [low, high] = unsafe {
        [0, 16].map(|at| {
            let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.add(at).cast()));
            let halves = _mm256_and_si256(_mm256_slli_epi16::<7>(wide), _mm256_set1_epi16(0xbfff_u16 as i16));
            _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0))
        })
    };
    pair(low, high)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pair(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 64 plain bytes; std::arch has no cast between them.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}
