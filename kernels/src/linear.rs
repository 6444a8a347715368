//! y = x Wt + bias with a frozen W, the LoRA branches computed inside the same job, and the gradient dx = dy W. Not
//! here: gradients of A and B (`matmul`), adapters as files, which rows belong to which adapter.
//!
//! # LoRA inside the job
//! One more barrier at most: all branches shrink their rows (ragged ranks, in parallel), then the tasks of the base
//! product add the expansion of their own columns before they store them. Rows in no branch are computed as if there
//! were none: the same bits, at the same price. (S-LoRA, Punica: the same grouping as separate kernels.)

mod backward;
mod branch;

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::matmul::gemm::{Block, Gemm, Left, Right, views};
use crate::simd::Element;
use crate::slice::{Plain, Rows, RowsMut};
use crate::weight::{Precision, Store, Weight};
pub use backward::linear_backward;
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

/// y `[T, N]` = x Wt + bias, plus the branch of each group on the group's rows. x `[T, K]`, bias `[N]`, float32; groups
/// are sorted and disjoint.
pub fn linear(x: &Tensor, w: &Weight, bias: Option<&Tensor>, lora: &[LoraRows]) -> Tensor {
    match Job::new(x, w, bias, lora.iter().map(|group| (group, x))) {
        Some(job) => job.into_new(),
        None => reference(x, w, bias, lora),
    }
}

/// As [`linear`], added into `residual` `[T, N]` in place.
pub fn linear_add(x: &Tensor, w: &Weight, bias: Option<&Tensor>, lora: &[LoraRows], residual: &mut Tensor) {
    let job = Job::new(x, w, bias, lora.iter().map(|group| (group, x)));
    match (job, RowsMut::of(residual)) {
        (Some(job), Some(to)) => job.run(to, |to, y| to.iter_mut().zip(y).for_each(|(to, y)| *to += y)),
        _ => {
            let _ = residual.g_add_(&reference(x, w, bias, lora));
        }
    }
}

/// As [`linear`] with one module over all rows, whose branch reads `lora_x` `[T, K]` (the input after dropout). Also
/// returns the shrunk rows `lora_x At` `[T, R]`, before scaling, which the gradient of B wants.
pub fn linear_training(
    x: &Tensor,
    w: &Weight,
    bias: Option<&Tensor>,
    lora: &LoraModule,
    lora_x: &Tensor,
) -> (Tensor, Tensor) {
    assert_eq!(x.size(), lora_x.size(), "the branch reads the same rows");
    let group = LoraRows {
        rows: 0..x.size()[0],
        module: lora,
    };
    match Job::new(x, w, bias, std::iter::once((&group, lora_x))) {
        Some(mut job) => {
            let mut shrunk = Tensor::empty([x.size()[0], lora.a.n()], (Kind::Float, Device::Cpu));
            job.shrunk = RowsMut::of(&mut shrunk);
            (job.into_new(), shrunk)
        }
        None => {
            let mut y = w.reference_forward(x);
            let shrunk = lora.a.reference_forward(lora_x);
            reference_expand(&mut y, &shrunk, lora);
            (reference_bias(y, bias), shrunk)
        }
    }
}

fn reference(x: &Tensor, w: &Weight, bias: Option<&Tensor>, lora: &[LoraRows]) -> Tensor {
    let y = w.reference_forward(x);
    for LoraRows { rows, module } in lora {
        let n_rows = rows.end - rows.start;
        let shrunk = module.a.reference_forward(&x.narrow(0, rows.start, n_rows));
        reference_expand(&mut y.narrow(0, rows.start, n_rows), &shrunk, module);
    }
    reference_bias(y, bias)
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

fn reference_bias(y: Tensor, bias: Option<&Tensor>) -> Tensor {
    match bias {
        Some(bias) => y + bias,
        None => y,
    }
}

/// A linear all of whose operands the fast path reads.
struct Job<'a> {
    x: Rows<'a>,
    w: &'a Weight,
    bias: Option<&'a [f32]>,
    branches: Vec<Branch<'a>>,
    /// Where the branches' shrunk rows go, if they are wanted.
    shrunk: Option<RowsMut<'a>>,
}

impl<'a> Job<'a> {
    /// None where only the reference can go.
    fn new(
        x: &'a Tensor,
        w: &'a Weight,
        bias: Option<&'a Tensor>,
        lora: impl Iterator<Item = (&'a LoraRows<'a>, &'a Tensor)>,
    ) -> Option<Job<'a>> {
        let [rows] = views([x])?;
        if let Store::Plain(_) | Store::Held(_) = w.store() {
            return None;
        }
        assert_eq!(
            rows.width as i64,
            w.k(),
            "x {:?} and a weight of [{}, {}]",
            x.size(),
            w.n(),
            w.k()
        );
        let bias = match bias {
            Some(bias) => Some(vector(bias, w.n())?),
            None => None,
        };
        let branches: Option<Vec<Branch>> = lora
            .map(|(group, input)| Branch::new(group, x, input, w))
            .collect();
        Some(Job {
            x: rows,
            w,
            bias,
            branches: branches?,
            shrunk: None,
        })
    }

    fn into_new(self) -> Tensor {
        let mut y = Tensor::empty([self.x.rows as i64, self.w.n()], (Kind::Float, Device::Cpu));
        let to = RowsMut::of(&mut y).expect("a new float CPU tensor");
        self.run(to, <[f32]>::copy_from_slice);
        y
    }

    /// Computes y and gives each piece of a row of it to `store`, with the same piece of `to`.
    fn run(mut self, to: RowsMut, store: impl Fn(&mut [f32], &[f32]) + Sync) {
        assert_eq!(
            (to.rows, to.width),
            (self.x.rows, self.w.n() as usize),
            "the output's shape"
        );
        match (self.w.store(), self.w.precision()) {
            (Store::F32(panels), _) => self.run_in::<f32>(Right::Panels(panels), to, store),
            (Store::Bf16(panels), _) => self.run_in::<u16>(Right::Panels(panels), to, store),
            (Store::Packed(packed), Precision::F32) => self.run_in::<f32>(Right::Packed(packed), to, store),
            (Store::Packed(packed), Precision::Bf16) => self.run_in::<u16>(Right::Packed(packed), to, store),
            (Store::Plain(_) | Store::Held(_), _) => unreachable!("`new` leaves them to the reference"),
        }
    }

    fn run_in<T: Element + Plain>(
        &mut self,
        right: Right<T>,
        to: RowsMut,
        store: impl Fn(&mut [f32], &[f32]) + Sync,
    ) {
        let left = Left::<T>::round(self.x);
        shrink(&mut self.branches, &left, self.shrunk);
        let (branches, bias) = (&self.branches, self.bias);
        let gemm = Gemm {
            left: &left,
            right,
            k: self.x.width,
            n: to.width,
        };
        gemm.run(|mut block: Block| {
            branches.iter().for_each(|branch| branch.expand(&mut block));
            for (i, row) in block.rows.clone().enumerate() {
                let sums = &mut block.sums[i * block.stride..][..block.columns.len()];
                if let Some(bias) = bias {
                    sums.iter_mut()
                        .zip(&bias[block.columns.clone()])
                        .for_each(|(sum, bias)| *sum += bias);
                }
                // SAFETY: a block's columns of a row belong to its task.
                store(unsafe { to.columns(row, block.columns.clone()) }, sums);
            }
        });
    }
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
