//! What this machine can do at most, measured now: read bandwidth (huge pages) and multiply-add rates, with one thread
//! and with all. Figures of other benchmarks are fractions of these. x86-64 with AVX2 at least; bf16 and int8 dot
//! products where the processor shows AVX-512 BF16 and VNNI.
//!
//!   target/release/ceilings                     this processor
//!   target/release/ceilings --device cuda:0     a GPU, by libtorch's own ops (`cpu`: the processor, by the same)

use clap::Parser;

#[derive(Parser)]
struct Options {
    /// cpu or cuda:N, measured by libtorch's ops instead of this program's loops
    #[arg(long)]
    device: Option<String>,
}

fn main() -> anyhow::Result<()> {
    if let Some(device) = Options::parse().device {
        println!("{}", tandem_benches::device::ceilings(&device)?);
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    x86::main();
    #[cfg(not(target_arch = "x86_64"))]
    println!("{{\"error\": \"ceilings are written for x86-64\"}}");
    Ok(())
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;
    use std::sync::Barrier;
    use std::time::Instant;

    use serde_json::json;
    use tandem_benches::{machine, percentile::median};

    /// Beyond every cache, small enough for a laptop.
    const READ_BYTES: usize = 512 << 20;
    const RUNS: usize = 7;
    /// Independent sums: a latency of 4 in 2 units needs 8; AVX2 has 16 registers, two of them hold the factors.
    const ACCUMULATORS: usize = 12;
    const ROUNDS: usize = 1_000_000;

    pub fn main() {
        if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
            println!("{}", json!({"error": "this processor has no AVX2 with FMA"}));
            return;
        }
        let all = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads: Vec<usize> = if all == 1 { vec![1] } else { vec![1, all] };
        let memory = HugeBuffer::new(READ_BYTES);
        let load = machine::load_average();
        println!("load average {load:.2?}, {all} threads; best (median) of {RUNS}");
        let mut report = json!({"load_average": load, "threads": all});
        let mut line = |name: &str, unit: &str, n: usize, rates: &[f64]| {
            let best = rates.iter().copied().fold(0.0, f64::max);
            println!(
                "{name:10} {n:2} threads  {best:8.1} ({:8.1}) {unit}",
                median(rates).unwrap_or(0.0)
            );
            report[format!("{name}_{n}")] = json!((10.0 * best).round() / 10.0);
        };
        for &n in &threads {
            let parts: Vec<&[u8]> = memory.bytes().chunks(READ_BYTES / n).take(n).collect();
            // SAFETY: AVX2 was detected above.
            let rates = rates(n, (READ_BYTES / n * n) as f64, |i| unsafe { read(parts[i]) });
            line("read", "GB/s", n, &rates);
        }
        let lanes = |operations: usize| (operations * ACCUMULATORS * ROUNDS) as f64;
        for &n in &threads {
            // SAFETY: AVX2 and FMA were detected above.
            line(
                "f32_avx2",
                "GFLOP/s",
                n,
                &rates(n, lanes(2 * 8) * n as f64, |_| unsafe { fma_avx2() }),
            );
        }
        if is_x86_feature_detected!("avx512f") {
            for &n in &threads {
                // SAFETY: AVX-512 F was just detected.
                line(
                    "f32_avx512",
                    "GFLOP/s",
                    n,
                    &rates(n, lanes(2 * 16) * n as f64, |_| unsafe { fma_avx512() }),
                );
            }
        }
        if is_x86_feature_detected!("avx512bf16") {
            for &n in &threads {
                // SAFETY: AVX-512 BF16 was just detected.
                line(
                    "dpbf16",
                    "GFLOP/s",
                    n,
                    &rates(n, lanes(2 * 32) * n as f64, |_| unsafe { dpbf16() }),
                );
            }
        }
        if is_x86_feature_detected!("avx512vnni") {
            for &n in &threads {
                // SAFETY: AVX-512 VNNI was just detected.
                line(
                    "dpbusd",
                    "GOP/s",
                    n,
                    &rates(n, lanes(2 * 64) * n as f64, |_| unsafe { dpbusd() }),
                );
            }
        }
        println!("{report}");
    }

    /// 1e9 operations (or bytes) per second of `work` on `threads` threads that begin together, of each run.
    fn rates<T: Send>(threads: usize, operations: f64, work: impl Fn(usize) -> T + Sync) -> Vec<f64> {
        let run = || {
            let barrier = Barrier::new(threads + 1);
            std::thread::scope(|scope| {
                let workers: Vec<_> = (0..threads)
                    .map(|i| {
                        let (barrier, work) = (&barrier, &work);
                        scope.spawn(move || {
                            barrier.wait();
                            black_box(work(i));
                        })
                    })
                    .collect();
                let began = Instant::now();
                barrier.wait();
                workers
                    .into_iter()
                    .for_each(|worker| worker.join().expect("a loop over numbers cannot panic"));
                operations / began.elapsed().as_secs_f64() / 1e9
            })
        };
        (0..RUNS).map(|_| run()).collect()
    }

    #[target_feature(enable = "avx2")]
    fn read(bytes: &[u8]) -> i64 {
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

    /// Memory in 2 MiB pages where the kernel grants them: 4 KiB pages cost a third of the bandwidth to page walks.
    struct HugeBuffer {
        start: *mut u8,
        len: usize,
    }

    impl HugeBuffer {
        fn new(len: usize) -> HugeBuffer {
            // SAFETY: an anonymous private mapping of `len` bytes; the result is checked; advice may be refused.
            let start = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let start = libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    flags,
                    -1,
                    0,
                );
                assert!(start != libc::MAP_FAILED, "no {len} bytes of memory");
                libc::madvise(start, len, libc::MADV_HUGEPAGE);
                std::ptr::write_bytes(start.cast::<u8>(), 1, len);
                start.cast()
            };
            HugeBuffer { start, len }
        }

        fn bytes(&self) -> &[u8] {
            // SAFETY: the mapping is `len` initialised bytes and lives as long as self.
            unsafe { std::slice::from_raw_parts(self.start, self.len) }
        }
    }

    impl Drop for HugeBuffer {
        fn drop(&mut self) {
            // SAFETY: the mapping made in `new`, once.
            unsafe { libc::munmap(self.start.cast(), self.len) };
        }
    }
}
