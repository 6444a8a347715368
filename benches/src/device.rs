//! What a device reaches with libtorch's own ops: bytes read and products, the ceilings that figures of a GPU are shares
//! of. The processor's own ceilings, by loops of ours, are `ceilings` without a device.

use std::time::Instant;

use serde_json::{Value, json};
use tandem_backend::words;
use tch::{Cuda, Device, Kind, Tensor};

use crate::percentile::median;

const RUNS: usize = 7;
/// Beyond every cache of a GPU; of a processor.
const GPU_READ_BYTES: i64 = 4 << 30;
const CPU_READ_BYTES: i64 = 256 << 20;
/// Rows of the square products: large enough to fill a GPU; not to bore on a processor.
const GPU_ROWS: i64 = 8192;
const CPU_ROWS: i64 = 1024;

/// Prints a line for each and returns all: `read` in GB/s, `float32` and `bfloat16` in GFLOP/s; best of some runs.
pub fn ceilings(word: &str) -> anyhow::Result<Value> {
    let device = words::device(word)?;
    let (bytes, rows) = match device {
        Device::Cpu => (CPU_READ_BYTES, CPU_ROWS),
        _ => (GPU_READ_BYTES, GPU_ROWS),
    };
    let mut report = json!({"device": word});
    let mut line = |name: &str, unit: &str, rates: &[f64]| {
        let best = rates.iter().copied().fold(0.0, f64::max);
        let median = median(rates).unwrap_or(0.0);
        println!("{name:10} {word:8} {best:10.1} ({median:10.1}) {unit}");
        report[name] = json!((10.0 * best).round() / 10.0);
    };
    let _no_grad = tch::no_grad_guard();
    let numbers = Tensor::ones([bytes / 4], (Kind::Float, device));
    line("read", "GB/s", &rates(device, bytes as f64, || numbers.max()));
    drop(numbers);
    for (name, kind) in [("float32", Kind::Float), ("bfloat16", Kind::BFloat16)] {
        let matrix = || Tensor::randn([rows, rows], (Kind::Float, device)).to_kind(kind);
        let (a, b) = (matrix(), matrix());
        line(
            name,
            "GFLOP/s",
            &rates(device, 2.0 * (rows as f64).powi(3), || a.mm(&b)),
        );
    }
    Ok(report)
}

/// 1e9 operations (or bytes) per second of each run but the first, which warms up.
fn rates(device: Device, operations: f64, work: impl Fn() -> Tensor) -> Vec<f64> {
    let run = |_| {
        let began = Instant::now();
        let result = work();
        if let Device::Cuda(index) = device {
            Cuda::synchronize(index as i64);
        }
        drop(result);
        operations / began.elapsed().as_secs_f64() / 1e9
    };
    (0..=RUNS).map(run).skip(1).collect()
}
