//! Loops that only read, or only multiply and add: what a processor can do at most. For measuring, no op uses them.
//! x86-64 with AVX2 at least; bf16 and int8 dot products where the processor shows AVX-512 BF16, AMX and VNNI.

use crate::slice::Pages;

/// A loop that can run on any number of threads.
pub struct Loop {
    pub name: &'static str,
    pub unit: &'static str,
    /// Of one run.
    pub operations: usize,
    pub run: fn(),
}

/// Those that this processor has; none where it lacks AVX2.
pub fn multiply_adds() -> Vec<Loop> {
    #[cfg(target_arch = "x86_64")]
    return x86::multiply_adds();
    #[cfg(not(target_arch = "x86_64"))]
    vec![]
}

/// Memory in 2 MiB pages where the kernel grants them, written once: 4 KiB pages cost a third of the bandwidth.
pub struct Memory(Pages<u8>);

impl Memory {
    pub fn new(bytes: usize) -> Memory {
        let mut pages = Pages::zeroed(bytes);
        pages.fill(1);
        Memory(pages)
    }

    /// `n` equal parts.
    pub fn parts(&self, n: usize) -> Vec<&[u8]> {
        self.0.chunks(self.0.len() / n).take(n).collect()
    }
}

/// Reads all of it once. The result only keeps the reading from being left out.
pub fn read(bytes: &[u8]) -> i64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 was just detected.
        return unsafe { x86::read(bytes) };
    }
    let words = bytes
        .chunks_exact(8)
        .map(|word| i64::from_ne_bytes(word.try_into().expect("8 bytes")));
    words.fold(0, |sum, word| sum ^ word)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::Loop;
    use crate::machine::tiles;
    use crate::simd::amx;

    /// Independent sums: a latency of 4 in 2 units needs 8; AVX2 has 16 registers, two of them hold the factors.
    const ACCUMULATORS: usize = 12;
    const ROUNDS: usize = 1_000_000;

    pub fn multiply_adds() -> Vec<Loop> {
        let all = [
            (
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
                ("f32_avx2", "GFLOP/s", 2 * 8),
                // SAFETY: the list holds it only where the features were detected; so below.
                (|| {
                    let _ = black_box(unsafe { fma_avx2() });
                }) as fn(),
            ),
            (
                is_x86_feature_detected!("avx512f"),
                ("f32_avx512", "GFLOP/s", 2 * 16),
                // SAFETY: as above.
                || {
                    let _ = black_box(unsafe { fma_avx512() });
                },
            ),
            (
                is_x86_feature_detected!("avx512bf16"),
                ("dpbf16", "GFLOP/s", 2 * 32),
                // SAFETY: as above.
                || {
                    let _ = black_box(unsafe { dpbf16() });
                },
            ),
            (
                tiles::permitted(),
                // Twelve accumulators take as long as the four that there are tiles for.
                ("tdpbf16", "GFLOP/s", 2 * 16 * 16 * 32),
                || amx::multiply(ACCUMULATORS * ROUNDS / 4),
            ),
            (
                is_x86_feature_detected!("avx512vnni"),
                ("dpbusd", "GOP/s", 2 * 64),
                // SAFETY: as above.
                || {
                    let _ = black_box(unsafe { dpbusd() });
                },
            ),
        ];
        let known = all.into_iter().filter(|(is_there, _, _)| *is_there);
        known
            .map(|(_, (name, unit, lanes), run)| Loop {
                name,
                unit,
                operations: lanes * ACCUMULATORS * ROUNDS,
                run,
            })
            .collect()
    }

    #[target_feature(enable = "avx2")]
    pub fn read(bytes: &[u8]) -> i64 {
        let mut sums = [_mm256_setzero_si256(); 8];
        for lines in bytes.chunks_exact(8 * 32) {
            for (sum, line) in sums.iter_mut().zip(lines.chunks_exact(32)) {
                // SAFETY: `line` is 32 bytes; the load needs no alignment.
                *sum = _mm256_xor_si256(*sum, unsafe { _mm256_loadu_si256(line.as_ptr().cast()) });
            }
        }
        sums.into_iter()
            .map(|sum| _mm256_extract_epi64::<0>(sum))
            .fold(0, |a, b| a ^ b)
    }

    #[target_feature(enable = "avx2,fma")]
    fn fma_avx2() -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        let mut sums = [_mm256_setzero_ps(); ACCUMULATORS];
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(a, b, *sum));
        }
        sums.into_iter().map(|sum| _mm256_cvtss_f32(sum)).sum()
    }

    #[target_feature(enable = "avx512f")]
    fn fma_avx512() -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut sums = [_mm512_setzero_ps(); ACCUMULATORS];
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(a, b, *sum));
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dpbf16() -> f32 {
        let ones = _mm512_set1_ps(black_box(1.0));
        let (a, b) = (_mm512_cvtne2ps_pbh(ones, ones), _mm512_cvtne2ps_pbh(ones, ones));
        let mut sums = [_mm512_setzero_ps(); ACCUMULATORS];
        for _ in 0..ROUNDS {
            sums.iter_mut()
                .for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, a, b));
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn dpbusd() -> i32 {
        let (a, b) = (_mm512_set1_epi8(black_box(1)), _mm512_set1_epi8(black_box(2)));
        let mut sums = [_mm512_setzero_si512(); ACCUMULATORS];
        for _ in 0..ROUNDS {
            sums.iter_mut()
                .for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, a, b));
        }
        sums.into_iter()
            .map(|sum| _mm512_reduce_add_epi32(sum))
            .fold(0, i32::wrapping_add)
    }
}
