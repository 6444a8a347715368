//! What this machine can do right now: the rate of its dot instruction and of reading memory, on all threads of the pool.

use std::arch::x86_64::*;
use std::fmt;
use std::hint::black_box;
use std::time::Duration;

use tandem_kernels::weight::Precision;
use tandem_kernels::{machine, pool};

pub struct Ceilings {
    /// Multiply and add counted as two.
    pub dot_flops: f64,
    /// Bytes a second, all threads together, through huge pages.
    pub read_bytes: f64,
    pub read_bytes_one_thread: f64,
    threads: usize,
}

/// A clock for rates. With one thread it is the thread's own processor time, which a busy machine does not stretch
/// (it still shares caches and memory); with more it has to be the wall's.
pub struct Stopwatch(Duration);

impl Stopwatch {
    pub fn start() -> Stopwatch {
        Stopwatch(now())
    }

    pub fn elapsed(&self) -> Duration {
        now() - self.0
    }
}

fn now() -> Duration {
    let clock = if pool::threads() == 1 {
        libc::CLOCK_THREAD_CPUTIME_ID
    } else {
        libc::CLOCK_MONOTONIC
    };
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the struct it is given.
    unsafe { libc::clock_gettime(clock, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Ceilings {
            dot_flops,
            read_bytes,
            read_bytes_one_thread,
            threads,
        } = self;
        let (dot, read, alone) = (dot_flops / 1e9, read_bytes / 1e9, read_bytes_one_thread / 1e9);
        write!(
            f,
            "{threads} threads dot {dot:.0} GFLOP/s, read {read:.1} GB/s (one thread {alone:.1})"
        )
    }
}

const ROUNDS: usize = 8;
const READ_BYTES: usize = 256 << 20;
const READ_TASK_BYTES: usize = 1 << 20;

impl Ceilings {
    pub fn measure(precision: Precision) -> Ceilings {
        let threads = pool::threads();
        let features = machine::features();
        let name = match precision {
            Precision::Bf16 if features.amx => "tdpbf16",
            Precision::Bf16 if features.avx512bf16 => "dpbf16",
            _ if features.avx512f => "f32_avx512",
            _ => "f32_avx2",
        };
        let loops = machine::ceilings::multiply_adds();
        let dot = loops
            .iter()
            .find(|one| one.name == name)
            .expect("a loop for each feature");
        let buffer = Buffer::new();
        let (mut dot_flops, mut read_bytes, mut read_bytes_one_thread) = (0.0f64, 0.0f64, 0.0f64);
        for _ in 0..ROUNDS {
            let begin = Stopwatch::start();
            pool::for_each(threads, |_| (dot.run)());
            let flop = (threads * dot.operations) as f64;
            dot_flops = dot_flops.max(flop / begin.elapsed().as_secs_f64());
            let begin = Stopwatch::start();
            pool::for_each(READ_BYTES / READ_TASK_BYTES, |task| buffer.read(task));
            read_bytes = read_bytes.max(READ_BYTES as f64 / begin.elapsed().as_secs_f64());
            let begin = Stopwatch::start();
            (0..READ_BYTES / READ_TASK_BYTES).for_each(|task| buffer.read(task));
            read_bytes_one_thread =
                read_bytes_one_thread.max(READ_BYTES as f64 / begin.elapsed().as_secs_f64());
        }
        Ceilings {
            dot_flops,
            read_bytes,
            read_bytes_one_thread,
            threads,
        }
    }
}

/// Memory on huge pages, where the system has them.
struct Buffer(*mut u8);

// SAFETY: written once in `new`, then only read.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn new() -> Buffer {
        // SAFETY: a new anonymous mapping, advised and filled within its length.
        unsafe {
            let (protection, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            let start = libc::mmap(std::ptr::null_mut(), READ_BYTES, protection, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED, "no memory for the ceiling");
            libc::madvise(start, READ_BYTES, libc::MADV_HUGEPAGE);
            std::ptr::write_bytes(start.cast::<u8>(), 1, READ_BYTES);
            Buffer(start.cast())
        }
    }

    fn read(&self, task: usize) {
        // SAFETY: every CPU this runs on has AVX2, or the fast paths would have nothing to compare; the task is inside.
        black_box(unsafe { sum(self.0.add(task * READ_TASK_BYTES)) });
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { libc::munmap(self.0.cast(), READ_BYTES) };
    }
}

#[target_feature(enable = "avx2")]
unsafe fn sum(data: *const u8) -> i64 {
    let mut sums = [_mm256_setzero_si256(); 8];
    for at in (0..READ_TASK_BYTES).step_by(256) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: inside the task's bytes.
            *sum = _mm256_xor_si256(*sum, unsafe { _mm256_loadu_si256(data.add(at + 32 * i).cast()) });
        }
        for line in 0..4 {
            _mm_prefetch::<_MM_HINT_T0>(data.wrapping_add(at + 2048 + 64 * line).cast());
        }
    }
    sums.iter()
        .map(|&sum| _mm256_extract_epi64::<0>(sum))
        .fold(0, |a, b| a ^ b)
}
