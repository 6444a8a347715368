//! Codes to levels in AVX2. Four bits are looked up in registers, eight in memory.

use std::arch::x86_64::*;

use super::LINE;
use crate::weight::Grid;

/// # Safety
/// The CPU has AVX2; as [`super::to_bf16`].
#[target_feature(enable = "avx2")]
pub(super) unsafe fn nibbles_to_bf16(levels: &[u16], from: *const u8, lines: usize, to: *mut u16) {
    let nibbles = Nibbles::new(levels);
    for line in 0..lines {
        for half in 0..2 {
            // SAFETY: half a line in (8 columns of both halves of the panel), a register of each of two steps out.
            unsafe {
                let codes = _mm256_loadu_si256(from.add(line * LINE + half * 32).cast());
                let to = to.add(line * 128 + half * 16);
                for (y, codes) in [codes, _mm256_srli_epi16::<4>(codes)].into_iter().enumerate() {
                    for (step, pairs) in nibbles.pairs(codes).into_iter().enumerate() {
                        _mm256_storeu_si256(to.add(step * 64 + y * 32).cast(), pairs);
                    }
                }
            }
        }
    }
}

/// The lower and the upper bytes of 16 levels in bfloat16.
#[derive(Clone, Copy)]
pub(super) struct Nibbles([__m256i; 2]);

impl Nibbles {
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn new(levels: &[u16]) -> Nibbles {
        assert_eq!(levels.len(), 16);
        let mut halves = [[0u8; 16]; 2];
        for (i, level) in levels.iter().enumerate() {
            [halves[0][i], halves[1][i]] = level.to_le_bytes();
        }
        // SAFETY: 16 bytes each.
        Nibbles(
            halves.map(|half| unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(half.as_ptr().cast())) }),
        )
    }

    /// The levels of the codes in the lower halves of the bytes: those of the words' lower bytes, a step, and those of the
    /// upper ones, the next. Above a code there may be anything.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn pairs(self, codes: __m256i) -> [__m256i; 2] {
        let codes = _mm256_and_si256(codes, _mm256_set1_epi8(0x0f));
        let [low, high] = self.0.map(|table| _mm256_shuffle_epi8(table, codes));
        let upper = _mm256_set1_epi16(0xff00_u16 as i16);
        [
            _mm256_blendv_epi8(low, _mm256_slli_epi16::<8>(high), upper),
            _mm256_blendv_epi8(_mm256_srli_epi16::<8>(low), high, upper),
        ]
    }
}

/// # Safety
/// The CPU has AVX2; as [`super::to_f32`].
#[target_feature(enable = "avx2")]
pub(super) unsafe fn nibbles_to_f32(levels: &[f32], from: *const u8, lines: usize, to: *mut f32) {
    assert_eq!(levels.len(), 16);
    // SAFETY: 8 floats each.
    let [low, high] = unsafe { [0, 8].map(|at| _mm256_loadu_ps(levels.as_ptr().add(at))) };
    let look_up = |codes: __m256i| {
        let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
        _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(low, codes),
            _mm256_permutevar8x32_ps(high, codes),
            upper,
        )
    };
    for line in 0..lines {
        for half in 0..2 {
            // SAFETY: half a line in (8 columns of both halves of the panel), 8 columns of four values out, twice.
            unsafe {
                let codes = _mm256_loadu_si256(from.add(line * LINE + half * 32).cast());
                let store = |k: usize, upper: usize, codes: __m256i| {
                    let to = to.add((line * 4 + k) * 32 + upper * 16 + half * 8);
                    _mm256_storeu_ps(to, look_up(codes));
                };
                store(0, 0, codes);
                store(0, 1, _mm256_srli_epi32::<4>(codes));
                store(2, 0, _mm256_srli_epi32::<8>(codes));
                store(2, 1, _mm256_srli_epi32::<12>(codes));
                store(1, 0, _mm256_srli_epi32::<16>(codes));
                store(1, 1, _mm256_srli_epi32::<20>(codes));
                store(3, 0, _mm256_srli_epi32::<24>(codes));
                store(3, 1, _mm256_srli_epi32::<28>(codes));
            }
        }
    }
}

/// What eight bits mean: integers are converted, anything else is looked up.
#[derive(Clone, Copy)]
pub(super) enum Bytes<'a> {
    Integers,
    Levels(&'a [f32; 256]),
}

impl Bytes<'static> {
    pub fn of(grid: Grid) -> Bytes<'static> {
        match grid {
            Grid::Int8 => Bytes::Integers,
            _ => Bytes::Levels(grid.levels().try_into().expect("eight bits have 256 levels")),
        }
    }
}

impl Bytes<'_> {
    /// The levels of the even and of the odd codes.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn split(self, codes: __m128i) -> [__m256; 2] {
        if let Bytes::Integers = self {
            let words = _mm256_cvtepi8_epi16(codes);
            let even = _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(words));
            return [even, _mm256_srai_epi32::<16>(words)].map(|codes| _mm256_cvtepi32_ps(codes));
        }
        let codes = _mm256_cvtepu16_epi32(codes);
        [self.levels(codes), self.levels(_mm256_srli_epi32::<8>(codes))]
    }

    /// Codes in the lowest byte of each lane; the other bytes may be anything.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn levels(self, codes: __m256i) -> __m256 {
        match self {
            Bytes::Integers => _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(codes))),
            Bytes::Levels(levels) => {
                let codes = _mm256_and_si256(codes, _mm256_set1_epi32(0xff));
                // SAFETY: a byte is an index into 256 levels.
                unsafe { _mm256_i32gather_ps::<4>(levels.as_ptr(), codes) }
            }
        }
    }
}

/// Levels of eight bits have at most the 8 significant bits of bfloat16: the upper half of the float32 is the level.
///
/// # Safety
/// The CPU has AVX2; as [`super::to_bf16`].
#[target_feature(enable = "avx2")]
pub(super) unsafe fn bytes_to_bf16(bytes: Bytes, from: *const u8, lines: usize, to: *mut u16) {
    for eight in 0..lines * 4 {
        // SAFETY: two codes of 8 columns in, as many halves out.
        unsafe {
            let [even, odd] = bytes
                .split(_mm_loadu_si128(from.add(eight * 16).cast()))
                .map(|x| _mm256_castps_si256(x));
            let pairs = _mm256_blend_epi16::<0b1010_1010>(_mm256_srli_epi32::<16>(even), odd);
            _mm256_storeu_si256(to.add(eight * 16).cast(), pairs);
        }
    }
}

/// # Safety
/// The CPU has AVX2; as [`super::to_f32`].
#[target_feature(enable = "avx2")]
pub(super) unsafe fn bytes_to_f32(bytes: Bytes, from: *const u8, lines: usize, to: *mut f32) {
    for line in 0..lines {
        for eight in 0..4 {
            // SAFETY: 8 columns of a line in, as many of two values out.
            unsafe {
                let levels = bytes.split(_mm_loadu_si128(from.add(line * LINE + eight * 16).cast()));
                for (value, levels) in levels.into_iter().enumerate() {
                    _mm256_storeu_ps(to.add(line * 64 + value * 32 + eight * 8), levels);
                }
            }
        }
    }
}
