//! y = x Wt + bias with a frozen W, the LoRA branches computed inside the same job, and the gradient dx = dy W. Not
//! here: gradients of A and B (`matmul`), adapters as files, which rows belong to which adapter.
//!
//! # LoRA inside the job
//! One more barrier at most: all branches shrink their rows (ragged ranks, in parallel), then the tasks of the base
//! product add the expansion of their own columns before they store them. Rows in no branch are computed as if there
//! were none: the same bits, at the same price. (S-LoRA, Punica: the same grouping as separate kernels.)

mod backward;
mod branch;
mod device;

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::gpu;
use crate::matmul::gemm::{Block, Gemm, Left, Part, views};
use crate::slice::{Rows, RowsMut};
use crate::weight::{Multiplied, Precision, Weight};
pub use backward::{BranchBack, linear_backward, linear_backward_with, linear_grouped_backward};
use branch::{Branch, shrink};

/// One projection's share of a LoRA module: `y[:, columns] += scale (x A[ranks]t) Bt`.
pub struct LoraPart {
    /// Columns of the fused output.
    pub columns: Range<i64>,
    /// Rows of the module's A.
    pub ranks: Range<i64>,
    /// `[columns.len(), ranks.len()]`.
    pub b: Weight,
    pub scale: f64,
}

/// The LoRA module of one (fused) linear.
pub struct LoraModule {
    /// `[R, K]`: the parts' A stacked, so that x is read once.
    pub a: Weight,
    pub parts: Vec<LoraPart>,
}

/// Rows of x that go through a module.
pub struct LoraRows<'a> {
    pub rows: Range<i64>,
    pub module: &'a LoraModule,
}

impl<'a> LoraRows<'a> {
    /// Of some rows of x, those of this group, counted from the first of them.
    pub fn within(&self, rows: &Range<i64>) -> Option<LoraRows<'a>> {
        let own = self.rows.start.max(rows.start)..self.rows.end.min(rows.end);
        (!own.is_empty()).then(|| LoraRows {
            rows: own.start - rows.start..own.end - rows.start,
            module: self.module,
        })
    }
}

/// Rows of x that are multiplied with a weight of their own: those of one expert.
pub struct WeightRows<'a> {
    pub rows: Range<i64>,
    pub weight: &'a Weight,
    /// `[N]` float32.
    pub bias: Option<&'a Tensor>,
}

/// y `[T, N]` = x Wt + bias, plus the branch of each group on the group's rows. x `[T, K]`, bias `[N]`, float32; groups
/// are sorted and disjoint.
pub fn linear(x: &Tensor, w: &Weight, bias: Option<&Tensor>, lora: &[LoraRows]) -> Tensor {
    linear_grouped(x, &[all_rows(x, w, bias)], lora)
}

/// As [`linear`], the rows of each group by its own weight, all in one job: sorted groups that cover the rows, weights of
/// one shape and precision. No group of `lora` reaches over the end of a group.
pub fn linear_grouped(x: &Tensor, groups: &[WeightRows], lora: &[LoraRows]) -> Tensor {
    match Job::new(x, groups, lora, x) {
        Some(job) => job.into_new(None),
        None => elsewhere(x, groups, lora, x, None, None),
    }
}

/// As [`linear`], added into `residual` `[T, N]` in place.
pub fn linear_add(x: &Tensor, w: &Weight, bias: Option<&Tensor>, lora: &[LoraRows], residual: &mut Tensor) {
    let groups = [all_rows(x, w, bias)];
    match (Job::new(x, &groups, lora, x), RowsMut::of(residual)) {
        (Some(job), Some(to)) => job.run(to, Onto::Output),
        _ => match gpu::of(x) {
            Some(gpu) => device::forward(gpu, x, &groups, (lora, x), Some(residual), residual, None),
            None => {
                let _ = residual.g_add_(&reference(x, &groups, lora, x).0);
            }
        },
    }
}

/// As [`linear`], the branches reading `lora_x` `[T, K]` (the input after dropout). Also returns the shrunk rows
/// `lora_x At` `[T, R]`, before scaling, which the gradient of B wants: as wide as the largest module's ranks; what belongs
/// to no module is zero. A residual `[T, N]` is added to y.
pub fn linear_training(
    x: &Tensor,
    w: &Weight,
    bias: Option<&Tensor>,
    lora: &[LoraRows],
    lora_x: &Tensor,
    residual: Option<&Tensor>,
) -> (Tensor, Tensor) {
    linear_grouped_training(x, &[all_rows(x, w, bias)], lora, lora_x, residual)
}

/// As [`linear_grouped`], the branches reading `lora_x`, and the shrunk rows as [`linear_training`].
pub fn linear_grouped_training(
    x: &Tensor,
    groups: &[WeightRows],
    lora: &[LoraRows],
    lora_x: &Tensor,
    residual: Option<&Tensor>,
) -> (Tensor, Tensor) {
    assert_eq!(x.size(), lora_x.size(), "the branch reads the same rows");
    let around = match residual {
        Some(residual) => views([residual]).map(|[rows]| Some(rows)),
        None => Some(None),
    };
    match (Job::new(x, groups, lora, lora_x), around) {
        (Some(mut job), Some(around)) => {
            let mut shrunk = Tensor::zeros([x.size()[0], most_ranks(lora)], (Kind::Float, Device::Cpu));
            job.shrunk = RowsMut::of(&mut shrunk);
            (job.into_new(around), shrunk)
        }
        _ => {
            let shrunk = Tensor::zeros([x.size()[0], most_ranks(lora)], (Kind::Float, x.device()));
            let y = elsewhere(x, groups, lora, lora_x, residual, Some(&shrunk));
            (y, shrunk)
        }
    }
}

fn all_rows<'a>(x: &Tensor, weight: &'a Weight, bias: Option<&'a Tensor>) -> WeightRows<'a> {
    WeightRows {
        rows: 0..x.size()[0],
        weight,
        bias,
    }
}

fn most_ranks(lora: &[LoraRows]) -> i64 {
    lora.iter().map(|group| group.module.a.n()).max().unwrap_or(0)
}

/// The first of the groups' weights, whose shape and precision are those of all. `width` says which of their sides the
/// columns of `x` are.
fn check_groups<'a>(
    x: &Tensor,
    groups: &[WeightRows<'a>],
    name: &str,
    width: impl Fn(&Weight) -> i64,
) -> &'a Weight {
    let first = groups.first().expect("rows have a weight").weight;
    let (n, k) = (first.n(), first.k());
    assert_eq!(
        x.size()[1],
        width(first),
        "{name} {:?} and a weight of [{n}, {k}]",
        x.size()
    );
    let mut end = 0;
    for WeightRows { rows, weight, .. } in groups {
        assert_eq!(rows.start, end, "groups cover the rows in order");
        end = rows.end;
        assert_eq!(
            (weight.n(), weight.k(), weight.precision()),
            (n, k, first.precision()),
            "the shape and precision of the first weight"
        );
    }
    assert_eq!(end, x.size()[0], "groups cover the rows");
    first
}

/// The groups as parts of a product in their precision, empty ones left out; None where only the reference can go.
fn parts<'a, T: Multiplied>(groups: &[WeightRows<'a>]) -> Option<Vec<Part<'a, T>>> {
    let with_rows = groups.iter().filter(|group| !group.rows.is_empty());
    let part = |group: &WeightRows<'a>| {
        Some(Part {
            rows: group.rows.start as usize..group.rows.end as usize,
            right: group.weight.right()?,
        })
    };
    with_rows.map(part).collect()
}

/// Where the CPU's fast path cannot go: on a device's kernels, else in plain tch.
fn elsewhere(
    x: &Tensor,
    groups: &[WeightRows],
    lora: &[LoraRows],
    lora_x: &Tensor,
    residual: Option<&Tensor>,
    shrunk: Option<&Tensor>,
) -> Tensor {
    match gpu::of(x) {
        Some(gpu) => {
            let residual = residual.map(Tensor::contiguous);
            let y = device::new(x.size()[0], groups[0].weight.n(), x);
            device::forward(gpu, x, groups, (lora, lora_x), residual.as_ref(), &y, shrunk);
            y
        }
        None => {
            let (y, own) = reference(x, groups, lora, lora_x);
            if let Some(shrunk) = shrunk {
                shrunk.shallow_clone().copy_(&own);
            }
            residual.map_or_else(|| y.shallow_clone(), |residual| residual + &y)
        }
    }
}

/// y, and the shrunk rows.
fn reference(x: &Tensor, groups: &[WeightRows], lora: &[LoraRows], lora_x: &Tensor) -> (Tensor, Tensor) {
    let parts = groups.iter().map(|WeightRows { rows, weight, bias }| {
        let y = weight.reference_forward(&x.narrow(0, rows.start, rows.end - rows.start));
        match bias {
            Some(bias) => y + *bias,
            None => y,
        }
    });
    let y = Tensor::cat(&parts.collect::<Vec<_>>(), 0);
    let shrunk = Tensor::zeros([x.size()[0], most_ranks(lora)], (y.kind(), y.device()));
    for LoraRows { rows, module } in lora {
        let n_rows = rows.end - rows.start;
        let own = module.a.reference_forward(&lora_x.narrow(0, rows.start, n_rows));
        reference_expand(&mut y.narrow(0, rows.start, n_rows), &own, module);
        shrunk
            .narrow(0, rows.start, n_rows)
            .narrow(1, 0, module.a.n())
            .copy_(&own);
    }
    (y, shrunk)
}

/// `y[:, columns] += (scale shrunk[:, ranks]) Bt` for every part.
fn reference_expand(y: &mut Tensor, shrunk: &Tensor, module: &LoraModule) {
    for LoraPart {
        columns,
        ranks,
        b,
        scale,
    } in &module.parts
    {
        let scaled = shrunk.narrow(1, ranks.start, ranks.end - ranks.start) * *scale;
        let delta = b.reference_forward(&scaled);
        let _ = y
            .narrow(1, columns.start, columns.end - columns.start)
            .g_add_(&delta);
    }
}

/// A linear all of whose operands the fast path reads.
struct Job<'a> {
    x: Rows<'a>,
    groups: &'a [WeightRows<'a>],
    branches: Vec<Branch<'a>>,
    /// Where the branches' shrunk rows go, if they are wanted.
    shrunk: Option<RowsMut<'a>>,
}

impl<'a> Job<'a> {
    /// None where only the reference can go.
    fn new(
        x: &'a Tensor,
        groups: &'a [WeightRows<'a>],
        lora: &'a [LoraRows<'a>],
        lora_x: &'a Tensor,
    ) -> Option<Job<'a>> {
        let first = check_groups(x, groups, "x", Weight::k);
        let [rows] = views([x])?;
        let readable = |group: &WeightRows| {
            let bias = group.bias.map_or(Some(&[][..]), |bias| vector(bias, first.n()));
            group.weight.is_packed() && bias.is_some()
        };
        if !groups.iter().all(readable) {
            return None;
        }
        let branches: Option<Vec<Branch>> = lora
            .iter()
            .map(|group| Branch::new(group, x, lora_x, first))
            .collect();
        Some(Job {
            x: rows,
            groups,
            branches: branches?,
            shrunk: None,
        })
    }

    /// y, and what went around it.
    fn into_new(self, around: Option<Rows>) -> Tensor {
        let n = self.groups[0].weight.n();
        let mut y = Tensor::empty([self.x.rows as i64, n], (Kind::Float, Device::Cpu));
        let to = RowsMut::of(&mut y).expect("a new float CPU tensor");
        match around {
            None => self.run(to, Onto::Nothing),
            Some(around) => {
                assert_eq!(
                    (around.rows, around.width),
                    (to.rows, to.width),
                    "the output's shape"
                );
                self.run(to, Onto::Rows(around))
            }
        }
        y
    }

    /// Computes y and stores it in `to`.
    fn run(mut self, to: RowsMut, onto: Onto) {
        let first = self.groups[0].weight;
        assert_eq!(
            (to.rows, to.width),
            (self.x.rows, first.n() as usize),
            "the output's shape"
        );
        match first.precision() {
            Precision::F32 => self.run_in::<f32>(to, onto),
            Precision::Bf16 => self.run_in::<u16>(to, onto),
        }
    }

    fn run_in<T: Multiplied>(&mut self, to: RowsMut, onto: Onto) {
        let left = Left::<T>::round(self.x);
        shrink(&mut self.branches, &left, self.shrunk);
        let with_rows = self.groups.iter().filter(|group| !group.rows.is_empty());
        let biases: Vec<Option<&[f32]>> = with_rows
            .map(|group| group.bias.and_then(|bias| vector(bias, to.width as i64)))
            .collect();
        let branches = &self.branches;
        let gemm = Gemm {
            left: &left,
            parts: &parts(self.groups).expect("`new` leaves other weights to the reference"),
            k: self.x.width,
            n: to.width,
        };
        let whole = |part: usize, block: &mut Block| {
            branches.iter().for_each(|branch| branch.expand(block));
            if let Some(bias) = biases[part] {
                let bias = &bias[block.columns.clone()];
                (0..block.rows.len()).for_each(|i| add(block.row_mut(i), bias));
            }
        };
        match onto {
            Onto::Nothing => gemm.run_into(to, |part, mut block| whole(part, &mut block)),
            Onto::Rows(around) => gemm.run_into(to, |part, mut block| {
                whole(part, &mut block);
                for (i, row) in block.rows.clone().enumerate() {
                    let columns = block.columns.clone();
                    add(block.row_mut(i), &around.row(row)[columns]);
                }
            }),
            Onto::Output => gemm.run(|part, mut block| {
                whole(part, &mut block);
                for (i, row) in block.rows.clone().enumerate() {
                    // SAFETY: a block's columns of a row belong to its task.
                    add(unsafe { to.columns(row, block.columns.clone()) }, block.row(i));
                }
            }),
        }
    }
}

/// What y is added to.
enum Onto<'a> {
    Nothing,
    Rows(Rows<'a>),
    /// What stands where it goes.
    Output,
}

fn add(to: &mut [f32], more: &[f32]) {
    to.iter_mut().zip(more).for_each(|(to, more)| *to += more);
}

/// A bias as a slice; None where only the reference can go.
fn vector(bias: &Tensor, n: i64) -> Option<&[f32]> {
    assert_eq!(bias.size(), [n], "a bias for {n} columns");
    let plain = bias.device() == Device::Cpu && bias.kind() == Kind::Float && bias.is_contiguous();
    // SAFETY: n contiguous floats of a tensor that outlives the borrow.
    plain.then(|| unsafe { std::slice::from_raw_parts(bias.data_ptr() as *const f32, n as usize) })
}

#[cfg(test)]
mod tests;
