//! Every linear against its reference, over a grid of shapes, and the bits of a row alone and in a batch.

use tch::{Device, Kind, Tensor};

use super::*;
use crate::pool;
use crate::weight::Precision::{self, Bf16, F32};
use crate::weight::{Grid, Quantised};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn random(rows: i64, columns: i64) -> Tensor {
    Tensor::randn([rows, columns], CPU)
}

fn packed(dense: &Tensor, precision: Precision) -> Weight {
    Weight::new(dense, precision, Device::Cpu).unwrap()
}

fn reference(x: &Tensor, w: &Weight, bias: Option<&Tensor>, lora: &[LoraRows]) -> Tensor {
    super::reference(x, &[all_rows(x, w, bias)], lora, x).0
}

fn max_abs(x: &Tensor) -> f64 {
    if x.numel() == 0 {
        0.0
    } else {
        x.abs().max().double_value(&[])
    }
}

/// Sums of k products of order one in two orders: partial sums of sqrt(k), each rounded, k times.
fn close(fast: &Tensor, slow: &Tensor, k: i64, what: &str) {
    let (error, tolerance) = (max_abs(&(fast - slow)), 4e-7 * k as f64 + 5e-6);
    assert!(
        error < tolerance,
        "{what}: {error:.2e} off, {tolerance:.2e} allowed"
    );
}

fn same_bits(a: &Tensor, b: &Tensor, what: &str) {
    assert!(
        a.equal(b),
        "{what}: bits differ by up to {:.2e}",
        max_abs(&(a - b))
    );
}

const SHAPES: [(i64, i64); 10] = [
    (1, 1),
    (5, 3),
    (32, 64),
    (33, 65),
    (64, 31),
    (100, 200),
    (130, 257),
    (576, 576),
    (192, 1100),
    (1056, 96),
];
const ROWS: [i64; 14] = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 17, 61, 150];

/// Fewer on an emulated device, which takes its time: less than a tile, odd ones, more than a segment.
fn shapes() -> &'static [(i64, i64)] {
    match gpu::emulating() {
        None => &SHAPES,
        Some(_) => &[(5, 3), (33, 65), (64, 31), (40, 600)],
    }
}

fn row_counts() -> &'static [i64] {
    match gpu::emulating() {
        None => &ROWS,
        Some(_) => &[1, 5, 17, 70],
    }
}

/// On a device the residual comes before the branches: the sum is another in its last bits.
fn sum_with_a_residual(a: &Tensor, b: &Tensor, what: &str) {
    match gpu::emulating() {
        None => same_bits(a, b, what),
        Some(_) => close(a, b, 64, what),
    }
}

#[test]
fn linear_is_the_reference() {
    gpu::everywhere(|| {
        for &(n, k) in shapes() {
            for precision in [F32, Bf16] {
                let (w, bias) = (packed(&random(n, k), precision), random(1, n).view([-1]));
                for &m in row_counts() {
                    let x = random(m, k);
                    let what = format!("{precision:?} [{m}, {k}] x [{n}, {k}]");
                    close(
                        &linear(&x, &w, None, &[]),
                        &reference(&x, &w, None, &[]),
                        k,
                        &what,
                    );
                    close(
                        &linear(&x, &w, Some(&bias), &[]),
                        &reference(&x, &w, Some(&bias), &[]),
                        k,
                        &what,
                    );
                    let residual = random(m, n);
                    let mut sum = residual.copy();
                    linear_add(&x, &w, Some(&bias), &[], &mut sum);
                    close(&sum, &(residual + reference(&x, &w, Some(&bias), &[])), k, &what);
                }
            }
        }
    });
}

/// Every grid, in groups that are whole rows, single lines of codes, longer than a span, or cut short, with offsets and
/// without.
fn quantised(n: i64, k: i64) -> Vec<Quantised> {
    let mut all = vec![];
    for (i, grid) in Grid::ALL.into_iter().enumerate() {
        for group in [k, 4, 16, 32, 64, 300] {
            // Levels of order one.
            let largest = grid
                .levels()
                .iter()
                .fold(0.0, |most: f32, level| most.max(level.abs()));
            let size = [n, (k + group - 1) / group];
            let codes = Tensor::randint(1 << grid.bits(), [n, k], (Kind::Uint8, Device::Cpu));
            let number = codes.bitwise_and(0x7f).ne(0x7f);
            let offsets = (i + group as usize / 4).is_multiple_of(2);
            all.push(Quantised {
                grid,
                codes: match grid {
                    Grid::Fp8 => codes.where_self(&number, &codes.zeros_like()),
                    _ => codes,
                },
                group,
                scales: (Tensor::rand(size, CPU) + 0.5) / f64::from(largest) * 2.0,
                offsets: offsets.then(|| Tensor::randn(size, CPU)),
            });
        }
    }
    all
}

/// Against the definition in float32: the sum over K of x, rounded to the precision, times level (rounded likewise) times
/// scale plus offset.
#[test]
fn quantised_weights_are_their_definition() {
    for (n, k) in [
        (1, 1),
        (5, 3),
        (33, 65),
        (64, 31),
        (100, 200),
        (130, 257),
        (70, 1100),
    ] {
        for from in quantised(n, k) {
            for precision in [F32, Bf16] {
                let w = Weight::quantised(&from, precision, Device::Cpu).unwrap();
                let what = format!("{} of {precision:?} [{n}, {k}]", w.format());
                same_bits(&w.dense(), &from.dense(), &what);
                let rows: Vec<u32> = (0..20).map(|i| (i * 7 % n) as u32).collect();
                let index = Tensor::from_slice(&rows.iter().map(|&row| i64::from(row)).collect::<Vec<_>>());
                same_bits(&w.gather(&rows), &from.dense().index_select(0, &index), &what);
                let levels = Tensor::from_slice(from.grid.levels()).to_kind(precision.kind());
                let rounded = from.with_levels(&levels.to_kind(Kind::Float));
                let bias = random(1, n).view([-1]);
                for m in [1, 3, 7, 13, 16, 17, 61] {
                    let (x, dy) = (random(m, k), random(m, n));
                    let in_precision = |x: &Tensor| x.to_kind(precision.kind()).to_kind(Kind::Float);
                    let slow = in_precision(&x).mm(&rounded.tr()) + &bias;
                    close(&linear(&x, &w, Some(&bias), &[]), &slow, 3 * k, &what);
                    close(&w.reference_forward(&x), &(slow - &bias), 3 * k, &what);
                    let slow = in_precision(&dy).mm(&in_precision(&from.dense()));
                    close(&linear_backward(&dy, &w), &slow, 3 * n, &what);
                    close(&w.reference_backward(&dy), &slow, 3 * n, &what);
                }
            }
        }
    }
}

#[test]
fn quantised_weights_are_batch_invariant_and_carry_adapters() {
    let (n, k) = (250, 600);
    for from in quantised(n, k) {
        for precision in [F32, Bf16] {
            let w = Weight::quantised(&from, precision, Device::Cpu).unwrap();
            let what = format!("{} of {precision:?}", w.format());
            let (x, dy) = (random(200, k), random(200, n));
            let module = module(k, [8, 3, 16], precision);
            let lora = |rows| LoraRows {
                rows,
                module: &module,
            };
            let (y, adapted) = (linear(&x, &w, None, &[]), linear(&x, &w, None, &[lora(0..200)]));
            let dx = linear_backward(&dy, &w);
            for (first, m) in (0..3)
                .map(|i| (i, 1))
                .chain([2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 100].map(|m| (50, m)))
            {
                let what = format!("{what}, {m} rows from {first}");
                let part = x.narrow(0, first, m);
                same_bits(&linear(&part, &w, None, &[]), &y.narrow(0, first, m), &what);
                same_bits(
                    &linear(&part, &w, None, &[lora(0..m)]),
                    &adapted.narrow(0, first, m),
                    &what,
                );
                same_bits(
                    &linear_backward(&dy.narrow(0, first, m), &w),
                    &dx.narrow(0, first, m),
                    &what,
                );
            }
        }
    }
}

#[test]
fn views_with_a_stride_are_read_and_written_in_place() {
    gpu::everywhere(|| {
        let (whole, w) = (random(20, 300), packed(&random(70, 100), Bf16));
        let x = whole.narrow(1, 50, 100);
        same_bits(
            &linear(&x, &w, None, &[]),
            &linear(&x.contiguous(), &w, None, &[]),
            "a view",
        );
        let fused = Tensor::zeros([20, 200], CPU);
        linear_add(&x, &w, None, &[], &mut fused.narrow(1, 60, 70));
        same_bits(
            &fused.narrow(1, 60, 70),
            &linear(&x, &w, None, &[]),
            "into a view",
        );
        assert_eq!(
            max_abs(&fused.narrow(1, 0, 60)) + max_abs(&fused.narrow(1, 130, 70)),
            0.0
        );
        let turned = random(100, 20).tr();
        close(
            &linear(&turned, &w, None, &[]),
            &reference(&turned, &w, None, &[]),
            100,
            "by the reference",
        );
    });
}

/// A fused q, k, v of odd sizes: parts that begin inside a panel, ragged ranks, one column range without a part.
fn module(k: i64, ranks: [i64; 3], precision: Precision) -> LoraModule {
    let columns = [0..100, 100..147, 180..250];
    let mut parts = Vec::new();
    let mut first = 0;
    for (columns, r) in columns.into_iter().zip(ranks) {
        let b = packed(&(random(columns.end - columns.start, r) * 0.1), precision);
        parts.push(LoraPart {
            columns,
            ranks: first..first + r,
            b,
            scale: 0.5 + r as f64 / 8.0,
        });
        first += r;
    }
    LoraModule {
        a: packed(&(random(first, k) * (k as f64).powf(-0.5)), precision),
        parts,
    }
}

#[test]
fn lora_rows_are_the_reference_and_others_untouched() {
    gpu::everywhere(|| {
        let (n, k) = (250, 131);
        for (precision, lora_precision) in [(F32, F32), (Bf16, Bf16), (Bf16, F32), (F32, Bf16)] {
            let w = packed(&random(n, k), precision);
            let modules = [
                module(k, [8, 3, 16], lora_precision),
                module(k, [1, 64, 5], lora_precision),
            ];
            for (m, groups) in [(4, [0..1, 2..4]), (17, [3..9, 9..16]), (200, [10..77, 120..200])] {
                let (x, bias) = (random(m, k), random(1, n).view([-1]));
                let lora: Vec<LoraRows> = groups
                    .iter()
                    .zip(&modules)
                    .map(|(rows, module)| LoraRows {
                        rows: rows.clone(),
                        module,
                    })
                    .collect();
                let (fast, base) = (
                    linear(&x, &w, Some(&bias), &lora),
                    linear(&x, &w, Some(&bias), &[]),
                );
                let slow = reference(&x, &w, Some(&bias), &lora);
                // A shrunk row may round to the neighbouring bfloat16: 2^-8 of it (4 at most), times B (0.4), times a scale of 8.
                let rounding = if lora_precision == Bf16 { 0.05 } else { 0.0 };
                let error = max_abs(&(&fast - &slow));
                assert!(
                    error < 1e-4 + rounding,
                    "{precision:?} {lora_precision:?} {m} rows: {error:.2e}"
                );
                let changed = max_abs(&(&fast - &base));
                assert!(changed > 0.1, "the adapters do something: {changed:.2e}");
                for row in 0..m {
                    let alone = x.narrow(0, row, 1);
                    let own: Vec<LoraRows> = (lora.iter())
                        .filter(|group| group.rows.contains(&row))
                        .map(|group| LoraRows {
                            rows: 0..1,
                            module: group.module,
                        })
                        .collect();
                    let alone = linear(&alone, &w, Some(&bias), &own);
                    same_bits(
                        &fast.narrow(0, row, 1),
                        &alone,
                        &format!("row {row} of {m} alone"),
                    );
                    if own.is_empty() {
                        same_bits(
                            &fast.narrow(0, row, 1),
                            &base.narrow(0, row, 1),
                            "a row of no group",
                        );
                    }
                }
                let mut sum = x.narrow(1, 0, 1).expand([m, n], false).contiguous();
                let before = sum.copy();
                linear_add(&x, &w, Some(&bias), &lora, &mut sum);
                sum_with_a_residual(&sum, &(before + fast), "into a residual");
            }
        }
    });
}

/// Groups of rows with weights of their own: each has the bits of its own [`linear`], forward and backward, dense or
/// quantised, whatever the sizes of the groups (none and one among them), with two adapters within a group.
#[test]
fn groups_are_linears_of_their_own() {
    gpu::everywhere(|| {
        let (n, k) = (250, 131);
        let sizes = [7, 0, 1, 40, 300, 0, 2];
        let dense = |precision| move |_| packed(&random(n, k), precision);
        let codes = |precision| {
            move |i: usize| {
                let group = 32;
                let size = [n, (k + group - 1) / group];
                let from = Quantised {
                    grid: Grid::ALL[0],
                    codes: Tensor::randint(1 << Grid::ALL[0].bits(), [n, k], (Kind::Uint8, Device::Cpu)),
                    group,
                    scales: Tensor::rand(size, CPU) * 0.1,
                    offsets: (i != 3).then(|| Tensor::randn(size, CPU)),
                };
                Weight::quantised(&from, precision, Device::Cpu).unwrap()
            }
        };
        type Make = Box<dyn Fn(usize) -> Weight>;
        let makes: [Make; 4] = [
            Box::new(dense(F32)),
            Box::new(dense(Bf16)),
            Box::new(codes(F32)),
            Box::new(codes(Bf16)),
        ];
        for make in makes {
            let weights: Vec<Weight> = (0..sizes.len()).map(make).collect();
            let bias: Vec<Tensor> = sizes.iter().map(|_| random(1, n).view([-1])).collect();
            let modules = [module(k, [8, 3, 16], F32), module(k, [1, 64, 5], F32)];
            let mut groups: Vec<WeightRows> = vec![];
            let mut lora: Vec<LoraRows> = vec![];
            let mut end = 0;
            for (i, size) in sizes.into_iter().enumerate() {
                let (start, middle) = (end, end + size / 2);
                end += size;
                groups.push(WeightRows {
                    rows: start..end,
                    weight: &weights[i],
                    bias: (i != 0).then_some(&bias[i]),
                });
                // The second adapter leaves the last row of a group without one.
                let ranges = [start..middle, middle..(end - 1).max(middle)];
                for (rows, module) in ranges.into_iter().zip(&modules) {
                    if !rows.is_empty() {
                        lora.push(LoraRows { rows, module });
                    }
                }
            }
            let (x, dropped, dy) = (random(end, k), random(end, k), random(end, n));
            let y = linear_grouped(&x, &groups, &lora);
            let dx = linear_grouped_backward(&dy, &groups);
            let (trained, shrunk) = linear_grouped_training(&x, &groups, &lora, &dropped, None);
            let (slow, slow_shrunk) = super::reference(&x, &groups, &lora, &dropped);
            close(&trained, &slow, 8 * k, "training");
            close(&shrunk, &slow_shrunk, k, "shrunk");
            for WeightRows { rows, weight, bias } in &groups {
                let part = |x: &Tensor| x.narrow(0, rows.start, rows.end - rows.start);
                let own: Vec<LoraRows> = (lora.iter())
                    .filter(|group| rows.start <= group.rows.start && group.rows.end <= rows.end)
                    .map(|group| LoraRows {
                        rows: group.rows.start - rows.start..group.rows.end - rows.start,
                        module: group.module,
                    })
                    .collect();
                let what = format!("{} rows {rows:?}", weight.format());
                same_bits(&part(&y), &linear(&part(&x), weight, *bias, &own), &what);
                same_bits(&part(&dx), &linear_backward(&part(&dy), weight), &what);
            }
        }
    });
}

#[test]
fn training_reads_its_own_input_and_returns_the_shrunk_rows() {
    gpu::everywhere(|| {
        let (n, k, m) = (250, 96, 100);
        for (precision, lora_precision) in [(F32, F32), (Bf16, F32), (Bf16, Bf16)] {
            let (w, module) = (
                packed(&random(n, k), precision),
                module(k, [8, 5, 33], lora_precision),
            );
            let (x, dropped) = (random(m, k), random(m, k));
            let lora = [LoraRows {
                rows: 0..m,
                module: &module,
            }];
            let (y, shrunk) = linear_training(&x, &w, None, &lora, &dropped, None);
            close(&shrunk, &module.a.reference_forward(&dropped), k, "shrunk");
            let mut slow = w.reference_forward(&x);
            reference_expand(&mut slow, &shrunk, &module);
            close(&y, &slow, k, "y");
            let residual = random(m, n);
            let (around, _) = linear_training(&x, &w, None, &lora, &dropped, Some(&residual));
            sum_with_a_residual(&around, &(residual + y), "with a residual");
            let (same_input, _) = linear_training(&x, &w, None, &lora, &x, None);
            same_bits(
                &same_input,
                &linear(&x, &w, None, &lora),
                "without dropout it is the served linear",
            );
        }
    });
}

/// Two branches over parts of the rows, of more ranks than are turned at once and of few: the sum of what goes back alone, and
/// the same bits in any batch.
#[test]
fn branches_go_back_with_the_base() {
    gpu::everywhere(|| {
        let (n, k, m) = (250, 96, 100);
        for (precision, lora_precision) in [(F32, F32), (Bf16, F32), (Bf16, Bf16)] {
            let w = packed(&random(n, k), precision);
            let dy = random(m, n);
            let base = linear_backward(&dy, &w);
            for ranks in [16, 600] {
                let a = packed(&random(ranks, k), lora_precision);
                let (first, second) = (random(30, ranks), random(45, ranks));
                let back = |rows, dshrunk| BranchBack { rows, dshrunk, a: &a };
                let branches = [back(5..35, &first), back(50..95, &second)];
                let dx = linear_backward_with(&dy, &w, &branches);
                let slow = base.copy();
                for BranchBack { rows, dshrunk, a } in &branches {
                    let _ = slow
                        .narrow(0, rows.start, rows.end - rows.start)
                        .g_add_(&linear_backward(dshrunk, a));
                }
                let what = format!("{precision:?} {lora_precision:?} {ranks} ranks");
                close(&dx, &slow, ranks, &what);
                same_bits(&dx.narrow(0, 0, 5), &base.narrow(0, 0, 5), &what);
                let alone = linear_backward_with(&dy.narrow(0, 50, 45), &w, &[back(0..45, &second)]);
                same_bits(&alone, &dx.narrow(0, 50, 45), &what);
            }
        }
    });
}

#[test]
fn backward_is_the_reference() {
    gpu::everywhere(|| {
        for &(n, k) in shapes() {
            for precision in [F32, Bf16] {
                let w = packed(&random(n, k), precision);
                for m in [1, 2, 5, 12, 29, 150, 300] {
                    let dy = random(m, n);
                    let what = format!("{precision:?} [{m}, {n}] x [{n}, {k}]");
                    close(&linear_backward(&dy, &w), &w.reference_backward(&dy), n, &what);
                }
            }
        }
    });
}

/// A row's bits depend neither on its neighbours nor on the number of threads.
#[test]
fn batch_invariance() {
    gpu::everywhere(|| {
        let threads = pool::threads();
        for (n, k) in [(100, 70), (576, 576), (96, 1100)] {
            for precision in [F32, Bf16] {
                let (w, x, dy) = (packed(&random(n, k), precision), random(300, k), random(300, n));
                let (y, dx) = (linear(&x, &w, None, &[]), linear_backward(&dy, &w));
                for (first, m) in (0..12)
                    .map(|i| (i, 1))
                    .chain([2, 3, 5, 7, 8, 13, 16, 17, 40, 200].map(|m| (50, m)))
                {
                    let part = linear(&x.narrow(0, first, m), &w, None, &[]);
                    same_bits(&y.narrow(0, first, m), &part, &format!("{precision:?} {m} rows"));
                    let part = linear_backward(&dy.narrow(0, first, m), &w);
                    same_bits(
                        &dx.narrow(0, first, m),
                        &part,
                        &format!("{precision:?} {m} rows backward"),
                    );
                }
                for other in [1, 2, 3] {
                    pool::set_threads(other);
                    same_bits(&y, &linear(&x, &w, None, &[]), &format!("{other} threads"));
                    same_bits(
                        &dx,
                        &linear_backward(&dy, &w),
                        &format!("{other} threads backward"),
                    );
                }
                pool::set_threads(threads);
            }
        }
    });
}
