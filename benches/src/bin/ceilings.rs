//! What this machine can do at most, measured now: read bandwidth (huge pages) and multiply-add rates, with one thread
//! and with all. Figures of other benchmarks are fractions of these.
//!
//!   target/release/ceilings                     this processor
//!   target/release/ceilings --device cuda:0     a GPU, by libtorch's own ops (`cpu`: the processor, by the same)

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use clap::Parser;
use serde_json::json;
use tandem_benches::{machine, percentile::median};
use tandem_kernels::machine::ceilings::{self, Memory};

#[derive(Parser)]
struct Options {
    /// cpu or cuda:N, measured by libtorch's ops instead of this program's loops
    #[arg(long)]
    device: Option<String>,
}

/// Beyond every cache, small enough for a laptop.
const READ_BYTES: usize = 512 << 20;
const RUNS: usize = 7;

fn main() -> anyhow::Result<()> {
    if let Some(device) = Options::parse().device {
        println!("{}", tandem_benches::device::ceilings(&device)?);
        return Ok(());
    }
    let loops = ceilings::multiply_adds();
    if loops.is_empty() {
        println!("{}", json!({"error": "this processor has no AVX2 with FMA"}));
        return Ok(());
    }
    let all = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads: Vec<usize> = if all == 1 { vec![1] } else { vec![1, all] };
    let memory = Memory::new(READ_BYTES);
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
        let parts = memory.parts(n);
        let rates = rates(n, (READ_BYTES / n * n) as f64, |i| ceilings::read(parts[i]));
        line("read", "GB/s", n, &rates);
    }
    for one in &loops {
        for &n in &threads {
            let rates = rates(n, (one.operations * n) as f64, |_| (one.run)());
            line(one.name, one.unit, n, &rates);
        }
    }
    println!("{report}");
    Ok(())
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
