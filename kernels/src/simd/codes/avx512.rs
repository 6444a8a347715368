//! Codes to levels in AVX-512. Four bits are looked up in a register; eight are converted.

use std::arch::x86_64::*;

use half::bf16;

use super::LINE;
use crate::simd::PANEL;
use crate::weight::Grid;

/// # Safety
/// The CPU has AVX-512 (F, BW); as [`super::to_bf16`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn nibbles_to_bf16(levels: &[u16], from: *const u8, lines: usize, to: *mut u16) {
    let table = nibble_table(levels);
    for line in 0..lines {
        // SAFETY: a line in, four registers (4 values of 32 columns) out.
        unsafe {
            let from = from.add(line * LINE);
            let codes = _mm512_loadu_si512(from.cast());
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
/// The CPU has AVX-512 with VBMI; as [`super::to_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(super) unsafe fn int8_to_bf16(from: *const u8, lines: usize, to: *mut u16) {
    let tables = int8_tables();
    for line in 0..lines {
        // SAFETY: a line in, a step of 64 halves out.
        unsafe {
            let from = from.add(line * LINE);
            for (half, levels) in int8_levels(from, tables).into_iter().enumerate() {
                _mm512_storeu_si512(to.add(line * 64 + half * 32).cast(), levels);
            }
        }
    }
}

/// What levels are looked up in.
pub(crate) type Tables = [__m512i; 5];

/// The lower and the upper bytes of the bfloat16 of 0 to 127, where 0 stands for 128; and the order of a line's eighths in
/// which the halves of its lanes are the columns of two registers.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn int8_tables() -> Tables {
    static BYTES: [[u8; 128]; 2] = {
        let mut bytes = [[0; 128]; 2];
        let mut magnitude = 1;
        while magnitude <= 128 {
            let bits = bf16::from_f32_const(magnitude as f32).to_bits();
            [bytes[0][magnitude % 128], bytes[1][magnitude % 128]] = bits.to_le_bytes();
            magnitude += 1;
        }
        bytes
    };
    let table = |half: usize, at: usize| {
        // SAFETY: 64 of 128 bytes.
        unsafe { _mm512_loadu_si512(BYTES[half].as_ptr().add(at).cast()) }
    };
    let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    [table(0, 0), table(0, 64), table(1, 0), table(1, 64), order]
}

/// A line of codes as the two registers of a step in bfloat16: bytes of magnitudes are looked up, signs are what they were,
/// and a code of zero is zero, not 128. (Converting to float32 and back takes half as long again.)
///
/// # Safety
/// The CPU has AVX-512 with VBMI; `from` is readable for a line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(crate) unsafe fn int8_levels(from: *const u8, tables: Tables) -> [__m512i; 2] {
    let [low, low_rest, high, high_rest, order] = tables;
    // SAFETY: a line.
    let codes = _mm512_permutexvar_epi64(order, unsafe { _mm512_loadu_si512(from.cast()) });
    let magnitudes = _mm512_abs_epi8(codes);
    let low = _mm512_permutex2var_epi8(low, magnitudes, low_rest);
    let some = _mm512_test_epi8_mask(codes, codes);
    let high = _mm512_maskz_permutex2var_epi8(some, high, magnitudes, high_rest);
    // high | codes & sign
    let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, _mm512_set1_epi8(-128));
    [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
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

/// Lines of codes as a panel of numbers in bfloat16: levels in float32, scaled, then rounded.
///
/// # Safety
/// The CPU has AVX512-BF16 and VBMI; as [`super::numbers_to_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi")]
pub(super) unsafe fn numbers_to_bf16(
    grid: Grid,
    from: *const u8,
    lines: usize,
    [scales, offsets]: [&[f32; PANEL]; 2],
    to: *mut u16,
) {
    let of = |numbers: &[f32; PANEL]| {
        // SAFETY: 32 floats.
        [0, 16].map(|at| unsafe { _mm512_loadu_ps(numbers.as_ptr().add(at)) })
    };
    let (scales, offsets) = (of(scales), of(offsets));
    // Word 2 i of a register of pairs is its i-th even value, word 2 i + 1 the odd one: those are 16 words further on.
    let even = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let odd = _mm512_slli_epi32::<16>(_mm512_add_epi32(even, _mm512_set1_epi32(16)));
    let order = _mm512_or_si512(even, odd);
    let rounded = |[even, odd]: [__m512; 2], half: usize| {
        // The product and the sum are rounded each, as the definition has them.
        let number = |level| _mm512_add_ps(_mm512_mul_ps(level, scales[half]), offsets[half]);
        _mm512_permutexvar_epi16(order, pair(number(even), number(odd)))
    };
    // SAFETY: lines in, as many steps as they hold out; 16 floats of a table.
    unsafe {
        let table = match grid.bits() {
            4 => _mm512_loadu_ps(grid.levels().as_ptr()),
            _ => _mm512_setzero_ps(),
        };
        for line in 0..lines {
            let codes = from.add(line * LINE);
            if grid.bits() == 4 {
                let codes = _mm512_loadu_si512(codes.cast());
                let level = |shift: u32| _mm512_permutexvar_ps(shifted(codes, shift), table);
                for (i, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let at = 8 * i as u32 + 4 * half as u32;
                    let pairs = rounded([level(at), level(at + 16)], half);
                    _mm512_storeu_si512(to.add((line * 2 + i) * 64 + half * 32).cast(), pairs);
                }
                continue;
            }
            for half in 0..2 {
                let codes = codes.add(half * LINE / 2);
                let levels = match grid {
                    Grid::Int8 => integers(codes),
                    _ => widened(fp8_levels(codes)),
                };
                _mm512_storeu_si512(to.add(line * 64 + half * 32).cast(), rounded(levels, half));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn shifted(codes: __m512i, by: u32) -> __m512i {
    _mm512_srlv_epi32(codes, _mm512_set1_epi32(by as i32))
}

/// Pairs of bfloat16 as the even and the odd values.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn widened(pairs: __m512i) -> [__m512; 2] {
    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    [
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
        _mm512_castsi512_ps(_mm512_and_si512(pairs, high)),
    ]
}

/// 32 codes of half a line, integers, likewise.
///
/// # Safety
/// AVX-512; `from` is readable for 32 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn integers(from: *const u8) -> [__m512; 2] {
    // SAFETY: the caller's contract.
    let wide = unsafe { _mm512_cvtepi16_epi32(_mm256_loadu_si256(from.cast())) };
    let even = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(wide));
    [
        _mm512_cvtepi32_ps(even),
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<8>(wide)),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pair(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 64 plain bytes; std::arch has no cast between them.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}
