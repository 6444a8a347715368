//! Rates of the frozen linear against the ceilings measured in the same run, and against libtorch's own linear:
//! `cargo bench -p tandem-kernels --bench linear [-- [--threads=N] [FILTER]]`, FILTER a part of a line: `bf16 576x576`; or
//! `formats`, `"formats int4 Q4_K 8 16"`: quantised weights against bfloat16, some of them, for so many rows.
//!
//! Weights rotate beyond the caches, so M=1 reads memory. Not criterion: what counts is a ratio to a ceiling of the same
//! minute, and the best of a few short rounds says it even on a machine that is not quiet.

mod ceilings;

use std::hint::black_box;
use std::time::Duration;

use tandem_kernels::linear::{linear, linear_backward};
use tandem_kernels::weight::{Grid, Precision, Quantised, Recipe, Weight};
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
/// Of each format and of bfloat16.
const TURNS: usize = 9;

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

/// Each format against bfloat16, in turns: how much less time a product takes, and a gradient, medians of all turns.
fn formats(filter: &str) {
    const FORMAT_ROWS: [i64; 6] = [1, 4, 8, 16, 64, 512];
    let (n, k) = (5632, 2048);
    let (names, rows): (Vec<&str>, Vec<&str>) = filter
        .split_whitespace()
        .partition(|word| word.parse::<i64>().is_err());
    let rows: Vec<i64> = rows.iter().map(|rows| rows.parse().expect("digits")).collect();
    let dense = Tensor::randn([n, k], (Kind::Float, Device::Cpu));
    let copies = |pack: &dyn Fn() -> Weight| -> Vec<Weight> {
        let first = pack();
        let copies = (ROTATED_BYTES / first.bytes() + 1).min(200);
        std::iter::once(first)
            .chain((1..copies).map(|_| pack()))
            .collect()
    };
    let bf16 = copies(&|| Weight::new(&dense, Precision::Bf16, Device::Cpu).expect("a matrix"));
    println!("format {n}x{k}     M        us    GB/s | bf16's time over it | dx likewise");
    for (name, from) in quantised(&dense) {
        if !names.is_empty() && !names.contains(&name) {
            continue;
        }
        let own = copies(&|| Weight::quantised(&from, Precision::Bf16, Device::Cpu).expect("a matrix"));
        for m in if rows.is_empty() {
            FORMAT_ROWS.to_vec()
        } else {
            rows.clone()
        } {
            let x = Tensor::randn([m, k], (Kind::Float, Device::Cpu));
            let dy = Tensor::randn([m, n], (Kind::Float, Device::Cpu));
            let (time, forward) = in_turns([&own, &bf16], |w| drop(black_box(linear(&x, w, None, &[]))));
            let (_, backward) = in_turns([&own, &bf16], |w| drop(black_box(linear_backward(&dy, w))));
            println!(
                "{name:16} {m:4} {:9.1} {:7.1} | {forward:.2} x | {backward:.2} x",
                time * 1e6,
                own[0].bytes() as f64 / time / 1e9,
            );
        }
    }
}

/// What `--quantization` makes, and the forms of GGUF files that are kept in their bits, of any numbers.
fn quantised(dense: &Tensor) -> Vec<(&'static str, Quantised)> {
    let made = Recipe::ALL.map(|recipe| (recipe.name(), recipe.quantise(dense).expect("a matrix")));
    let (n, k) = (dense.size()[0], dense.size()[1]);
    let ggml = [
        ("Q8_0", Grid::Int8, 32, false),
        ("Q4_0", Grid::Int4, 32, false),
        ("Q4_K", Grid::Int4, 32, true),
        ("Q6_K", Grid::Int8, 16, false),
    ]
    .map(|(name, grid, group, offsets)| {
        let numbers = || Tensor::rand([n, k / group], (Kind::Float, Device::Cpu)) * 0.01;
        let from = Quantised {
            grid,
            codes: Tensor::randint(1 << grid.bits(), [n, k], (Kind::Uint8, Device::Cpu)),
            group,
            scales: numbers(),
            offsets: offsets.then(numbers),
        };
        (name, from)
    });
    made.into_iter().chain(ggml).collect()
}

/// Seconds of a call with the first weights, and how many times as long the second take: medians of turns.
fn in_turns(weights: [&[Weight]; 2], call: impl Fn(&Weight)) -> (f64, f64) {
    let mut next = [0; 2];
    let mut turn = |which: usize| {
        let (begin, mut calls) = (Stopwatch::start(), 0);
        while calls == 0 || begin.elapsed() < Duration::from_millis(15) {
            call(&weights[which][next[which] % weights[which].len()]);
            next[which] += 1;
            calls += 1;
        }
        begin.elapsed().as_secs_f64() / f64::from(calls)
    };
    let (mut times, mut ratios): (Vec<f64>, Vec<f64>) = (0..TURNS)
        .map(|_| {
            let [own, other] = [turn(0), turn(1)];
            (own, other / own)
        })
        .unzip();
    let median = |numbers: &mut Vec<f64>| {
        numbers.sort_by(f64::total_cmp);
        numbers[numbers.len() / 2]
    };
    (median(&mut times), median(&mut ratios))
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
