//! Rates of the frozen linear against the ceilings measured in the same run, and against libtorch's own linear:
//! `cargo bench -p tandem-kernels --bench linear [-- [--threads=N] [FILTER]]`, FILTER a part of a line: `bf16 576x576`; or
//! `formats`, `"formats int4"`: quantised weights against bfloat16.
//!
//! Weights rotate beyond the caches, so M=1 reads memory. Not criterion: what counts is a ratio to a ceiling of the same
//! minute, and the best of a few short rounds says it even on a machine that is not quiet.

mod ceilings;

use std::hint::black_box;
use std::time::Duration;

use tandem_kernels::linear::{linear, linear_backward};
use tandem_kernels::weight::{Precision, Recipe, Weight};
use tandem_kernels::{machine, pool};
use tch::{Device, Kind, Tensor};

use ceilings::{Ceilings, Stopwatch};

const SHAPES: [(i64, i64); 6] = [
    (576, 576),
    (1536, 576),
    (576, 1536),
    (49152, 576),
    (2048, 5632),
    (5632, 2048),
];
const ROWS: [i64; 6] = [1, 4, 8, 16, 128, 512];
const ROTATED_BYTES: u64 = 128 << 20;
const ROUNDS: usize = 5;

fn main() {
    let filter = std::env::args()
        .skip(1)
        .find(|arg| !arg.starts_with("--"))
        .unwrap_or_default();
    if let Some(threads) = std::env::args().find_map(|arg| arg.strip_prefix("--threads=")?.parse().ok()) {
        pool::set_threads(threads);
    }
    let threads = pool::threads();
    tch::set_num_threads(threads as i32);
    let _guard = tch::no_grad_guard();
    println!("{:?}, {threads} threads", machine::features());
    if let Some(filter) = filter.strip_prefix("formats") {
        return formats(filter.trim());
    }
    for precision in [Precision::Bf16, Precision::F32] {
        let label = if precision == Precision::Bf16 {
            "bf16"
        } else {
            "f32"
        };
        let mut announced = false;
        for (n, k) in SHAPES {
            let name = format!("{label} {n}x{k}");
            if !name.contains(&filter) {
                continue;
            }
            if !std::mem::replace(&mut announced, true) {
                println!(
                    "roof = the larger of work at the dot ceiling and bytes at the read ceiling, over the time taken"
                );
                println!(
                    "N x K                 M        us  GFLOP/s    GB/s    roof | dx, of dot | time of at::linear, with casts / bare"
                );
            }
            let bytes = (n * k) as u64 * precision.value_bytes() as u64;
            let copies = (ROTATED_BYTES / bytes + 1).min(200) as usize;
            let dense = Tensor::randn([n, k], (Kind::Float, Device::Cpu)).to_kind(precision.kind());
            let pack = || Weight::new(&dense, precision, Device::Cpu).expect("a matrix");
            let weights: Vec<Weight> = (0..copies).map(|_| pack()).collect();
            let plain: Vec<Tensor> = (0..copies).map(|_| dense.copy()).collect();
            let ceilings = Ceilings::measure(precision);
            println!("{label} ceilings: {ceilings}");
            for m in ROWS {
                let x = Tensor::randn([m, k], (Kind::Float, Device::Cpu));
                let rounded = x.to_kind(precision.kind());
                let own = best(copies, |i| drop(black_box(linear(&x, &weights[i], None, &[]))));
                let aten_casts = best(copies, |i| {
                    let y = x.to_kind(precision.kind()).linear::<Tensor>(&plain[i], None);
                    drop(black_box(y.to_kind(Kind::Float)))
                });
                let aten = best(copies, |i| {
                    drop(black_box(rounded.linear::<Tensor>(&plain[i], None)))
                });
                let flop = (2 * m * n * k) as f64;
                let read = bytes as f64 + (4 * m * (n + k)) as f64;
                let at_dot = flop / ceilings.dot_flops;
                let dx = if m < 128 {
                    String::new()
                } else {
                    let dy = Tensor::randn([m, n], (Kind::Float, Device::Cpu));
                    let time = best(copies, |i| drop(black_box(linear_backward(&dy, &weights[i]))));
                    format!("{:.2}", at_dot / time)
                };
                println!(
                    "{name:18} {m:4} {:9.1} {:8.1} {:7.1} {:7.2} | {dx:>10} | {:.2} x / {:.2} x",
                    own * 1e6,
                    flop / own / 1e9,
                    read / own / 1e9,
                    at_dot.max(read / ceilings.read_bytes) / own,
                    aten_casts / own,
                    aten / own,
                );
            }
        }
    }
}

/// Each format against bfloat16 in the same run: how much less time a product takes, and a gradient.
fn formats(filter: &str) {
    let (n, k) = (5632, 2048);
    let dense = Tensor::randn([n, k], (Kind::Float, Device::Cpu));
    let weights = |recipe: Option<Recipe>| -> Vec<Weight> {
        let quantised = recipe.map(|recipe| recipe.quantise(&dense).expect("a matrix"));
        let pack = || match &quantised {
            None => Weight::new(&dense, Precision::Bf16, Device::Cpu),
            Some(quantised) => Weight::quantised(quantised, Precision::Bf16, Device::Cpu),
        };
        let first = pack().expect("a matrix");
        let copies = (ROTATED_BYTES / first.bytes() + 1).min(200) as usize;
        (0..copies).map(|_| pack().expect("a matrix")).collect()
    };
    let bf16 = weights(None);
    println!("format {n}x{k}     M        us    GB/s | bf16's time over it | dx likewise");
    for recipe in Recipe::ALL
        .into_iter()
        .filter(|recipe| filter.is_empty() || recipe.name().contains(filter))
    {
        let quantised = weights(Some(recipe));
        for m in ROWS {
            let x = Tensor::randn([m, k], (Kind::Float, Device::Cpu));
            let dy = Tensor::randn([m, n], (Kind::Float, Device::Cpu));
            let [own, plain] = [&quantised, &bf16].map(|weights| {
                let forward = best(weights.len(), |i| {
                    drop(black_box(linear(&x, &weights[i], None, &[])))
                });
                let backward = best(weights.len(), |i| {
                    drop(black_box(linear_backward(&dy, &weights[i])))
                });
                (forward, backward)
            });
            println!(
                "{:16} {m:4} {:9.1} {:7.1} | {:.2} x | {:.2} x",
                recipe.name(),
                own.0 * 1e6,
                quantised[0].bytes() as f64 / own.0 / 1e9,
                plain.0 / own.0,
                plain.1 / own.1
            );
        }
    }
}

/// Seconds of a call in the best of a few rounds; a round goes through all copies, or as many as 400 ms allow.
fn best(copies: usize, mut call: impl FnMut(usize)) -> f64 {
    let mut best = f64::INFINITY;
    call(0);
    for _ in 0..ROUNDS {
        let (begin, mut calls) = (Stopwatch::start(), 0);
        while (calls < copies || begin.elapsed() < Duration::from_millis(20))
            && begin.elapsed() < Duration::from_millis(400)
        {
            call(calls % copies);
            calls += 1;
        }
        best = best.min(begin.elapsed().as_secs_f64() / calls as f64);
    }
    best
}
