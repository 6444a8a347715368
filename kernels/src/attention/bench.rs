//! Prints what fraction of the measured ceilings attention reaches, on one thread and in its processor time, so that
//! other load on the machine disturbs little. `cargo test --release -p tandem-kernels --lib
//! attention::bench -- --ignored --nocapture --test-threads 1`

use tch::{Device, Kind, Tensor};

use super::*;
use crate::places::PagedGroup;
use crate::pool;
use crate::simd::{Element, PANEL, Product, Sum, product};
use crate::slice::{Pages, Plain};
use crate::weight::Precision;

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
const SHAPE_A: Heads = Heads {
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
};

fn thread_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a clock every Linux has, and a place for its answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// The median of some runs.
fn seconds(repeats: usize, mut run: impl FnMut()) -> f64 {
    pool::set_threads(1);
    run();
    let mut times: Vec<f64> = (0..repeats)
        .map(|_| {
            let start = thread_seconds();
            run();
            thread_seconds() - start
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[repeats / 2]
}

/// GFLOP/s of the micro-kernel alone, out of the nearest caches.
fn peak<T: Element + Plain>(m: usize, k: usize) -> f64 {
    let (a, panel) = (vec![T::default(); m * k], vec![T::default(); T::panel_len(k)]);
    let repeats = 100_000_000 / (m * k * PANEL);
    let time = seconds(7, || {
        let mut c = vec![0f32; m * PANEL];
        let product_of = Product {
            m,
            steps: T::steps(k),
            a: a.as_ptr(),
            lda: k,
            panels: panel.as_ptr(),
            panel_stride: 0,
            n: PANEL,
            c: c.as_mut_ptr(),
            ldc: PANEL,
            sum: Sum::Set,
        };
        for _ in 0..repeats {
            // SAFETY: whole buffers of the sizes named.
            unsafe { product(&product_of) };
        }
    });
    (repeats * 2 * m * k * PANEL) as f64 / time / 1e9
}

/// GB/s of reading memory.
fn bandwidth() -> f64 {
    let mut pages = Pages::<u32>::zeroed(64 << 20);
    pages.fill(1); // Untouched pages are all one page of zeroes.
    let time = seconds(5, || {
        std::hint::black_box(pages.iter().fold(0u32, |a, b| a.wrapping_add(*b)));
    });
    size_of_val(&pages[..]) as f64 / time / 1e9
}

fn options(heads: Heads) -> Options<'static> {
    Options {
        scale: 1.0 / (heads.head_dim as f64).sqrt(),
        window: None,
        cap: None,
        sinks: None,
    }
}

fn inputs(tokens: usize, heads: Heads) -> [Tensor; 3] {
    [heads.heads, heads.kv_heads, heads.kv_heads]
        .map(|n| Tensor::randn([tokens as i64, (n * heads.head_dim) as i64], FLOAT))
}

#[test]
#[ignore = "a measurement"]
fn training() {
    for (precision, peak) in [
        (Precision::Bf16, peak::<u16>(96, 128)),
        (Precision::F32, peak::<f32>(96, 128)),
    ] {
        println!("{precision:?}: micro-kernel {peak:.0} GFLOP/s");
        for (sequences, len) in [(4, 512), (1, 512), (1, 2048), (16, 100)] {
            let tokens = sequences * len;
            let [q, k, v] = inputs(tokens, SHAPE_A);
            let ends: Vec<usize> = (0..=sequences).map(|i| i * len).collect();
            let dout = q.randn_like();
            let options = options(SHAPE_A);
            let attended = packed(&q, &k, &v, &ends, SHAPE_A, options, precision);
            let forward = seconds(9, || drop(packed(&q, &k, &v, &ends, SHAPE_A, options, precision)));
            let backward = seconds(9, || {
                drop(packed_backward(
                    &q, &k, &v, &attended, &dout, &ends, SHAPE_A, options, precision,
                ));
            });
            // A product over the causal half.
            let product = (sequences * len * len * SHAPE_A.heads * SHAPE_A.head_dim) as f64;
            for (name, n, time) in [("forward", 2.0, forward), ("backward", 5.0, backward)] {
                let rate = n * product / time / 1e9;
                println!(
                    "  {sequences} x {len} {name}: {:.2} ms, {rate:.0} GFLOP/s, {:.0} % of the micro-kernel",
                    time * 1e3,
                    rate / peak * 100.0
                );
            }
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn serving() {
    let bandwidth = bandwidth();
    println!("read {bandwidth:.1} GB/s");
    let b = Heads {
        heads: 32,
        kv_heads: 4,
        head_dim: 64,
    };
    for (heads, layers) in [(SHAPE_A, 30), (b, 22)] {
        for dtype in CacheDtype::ALL {
            for (rows, kv_len, window) in [
                (1, 256, None),
                (1, 1024, None),
                (1, 8192, None),
                (1, 8192, Some(1024)),
                (8, 512, None),
                (16, 1024, None),
            ] {
                let blocks = rows * kv_len / BLOCK_SIZE;
                let Heads {
                    kv_heads, head_dim, ..
                } = heads;
                let shape = CacheShape {
                    layers,
                    blocks,
                    kv_heads,
                    head_dim,
                };
                let cache = KvCache::new(shape, dtype, Device::Cpu).expect("memory");
                let [_, k, v] = inputs(kv_len, heads);
                let q = Tensor::randn([rows as i64, (heads.heads * head_dim) as i64], FLOAT);
                let table: Vec<u32> = (0..blocks as u32).collect();
                for layer in 0..layers {
                    for row in 0..rows {
                        let slots: Vec<i64> = (0..kv_len).map(|i| (row * kv_len + i) as i64).collect();
                        write(&cache, layer, &k, &v, &(&slots).into());
                    }
                }
                let per_row = kv_len / BLOCK_SIZE;
                let seqs: Vec<PagedSeq> = (0..rows)
                    .map(|row| PagedSeq {
                        rows: row..row + 1,
                        table: &table[row * per_row..(row + 1) * per_row],
                        first_block: 0,
                        kv_len,
                    })
                    .collect();
                let group = PagedGroup::new(&[][..], seqs);
                let options = Options {
                    window,
                    ..options(heads)
                };
                let time = seconds(5, || {
                    (0..layers).for_each(|layer| drop(paged(&q, &cache, layer, &group, heads, options)));
                });
                let seen = window.unwrap_or(kv_len as i64) as f64 / kv_len as f64;
                let rate = cache.bytes() as f64 * seen / time / 1e9;
                println!(
                    "{heads:?} {dtype:?} {rows} rows, context {kv_len}, window {window:?}: {:.1} us a layer, {rate:.1} GB/s, {:.0} %",
                    time * 1e6 / layers as f64,
                    rate / bandwidth * 100.0
                );
            }
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn writing() {
    for dtype in CacheDtype::ALL {
        for tokens in [1usize, 16, 512] {
            let shape = CacheShape {
                layers: 1,
                blocks: 64,
                kv_heads: 3,
                head_dim: 64,
            };
            let cache = KvCache::new(shape, dtype, Device::Cpu).expect("memory");
            let [_, k, v] = inputs(tokens, SHAPE_A);
            let slots: Vec<i64> = (0..tokens as i64).collect();
            let time = seconds(99, || write(&cache, 0, &k, &v, &(&slots).into()));
            println!("{dtype:?} write {tokens} tokens: {:.2} us", time * 1e6);
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn micro_kernel() {
    for m in [1, 2, 3, 6, 7, 8, 12, 16, 32, 96] {
        for k in [32, 64, 128] {
            println!(
                "m {m} k {k}: bf16 {:.0}, f32 {:.0} GFLOP/s",
                peak::<u16>(m, k),
                peak::<f32>(m, k)
            );
        }
    }
}
