//! Norms by the kernels of `gpu/norm.cu`: a block a run, or 32 lanes a short one.

use tch::{Kind, Tensor};

use super::group_width;
use crate::gpu::rows::{Matrix, THREADS};
use crate::gpu::{Arg, Gpu, int};

#[derive(Clone, Copy)]
pub(super) enum Norm<'a> {
    Rms,
    Layer { bias: Option<&'a Tensor> },
}

/// Columns of a run up to which 32 lanes are enough.
const SHORT: usize = 256;

struct Runs {
    runs: usize,
    groups: usize,
    width: usize,
}

impl Runs {
    fn of(x: &Matrix, weight: &Tensor) -> Runs {
        let width = group_width(x.width, weight.numel());
        let groups = x.width / width;
        Runs {
            runs: x.rows * groups,
            groups,
            width,
        }
    }

    /// The kernel's name, and a grid for `n` runs or pieces of them.
    fn launch(&self, gpu: Gpu, norm: Norm, what: &str, n: usize, args: &[Arg], eps: f64) {
        let norm = match norm {
            Norm::Rms => "rms_norm",
            Norm::Layer { .. } => "layer_norm",
        };
        let (short, blocks) = match self.is_short() {
            true => ("_short", n.div_ceil(8)),
            false => ("", n),
        };
        let shape = [
            int(self.runs),
            int(self.groups),
            int(self.width),
            (eps as f32).into(),
        ];
        let args = [args, &shape].concat();
        gpu.launch(&format!("{norm}{what}{short}"), [blocks, 1, 1], THREADS, &args);
    }

    fn is_short(&self) -> bool {
        self.width <= SHORT
    }
}

pub(super) fn forward(gpu: Gpu, norm: Norm, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let (x, weight) = (Matrix::of(x), weight.contiguous());
    let out = x.like();
    let runs = Runs::of(&x, &weight);
    let mut args = vec![(&x).into(), x.stride(), Arg::Null, (&weight).into()];
    let bias = match norm {
        Norm::Rms => None,
        Norm::Layer { bias } => {
            let bias = bias.map(Tensor::contiguous);
            let length = bias.as_ref().map_or(runs.width, Tensor::numel);
            assert_eq!(length, runs.width, "bias and weight differ in length");
            Some(bias)
        }
    };
    args.extend(bias.as_ref().map(|bias| Arg::from(bias.as_ref())));
    args.extend([(&out).into(), Arg::Null]);
    runs.launch(gpu, norm, "", runs.runs, &args, eps);
    out.into_tensor()
}

/// dx, added to `onto` if there is one.
pub(super) fn backward_input(
    gpu: Gpu,
    norm: Norm,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
    onto: Option<Tensor>,
) -> Tensor {
    let (x, weight, dy) = (Matrix::of(x), weight.contiguous(), grad(x, dy));
    let added = onto.is_some();
    let dx = match onto {
        Some(onto) => Matrix::of(&onto.contiguous()),
        None => x.like(),
    };
    let args = [
        (&x).into(),
        x.stride(),
        (&dy).into(),
        dy.stride(),
        (&weight).into(),
        (&dx).into(),
        int(i32::from(added)),
    ];
    let runs = Runs::of(&x, &weight);
    runs.launch(gpu, norm, "_backward", runs.runs, &args, eps);
    dx.into_tensor()
}

/// The gradient of the weight and, behind it, of a layer norm's bias: pieces of a fixed number of runs, then over the pieces.
pub(super) fn backward_params(
    gpu: Gpu,
    norm: Norm,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
) -> Tensor {
    const PIECE: usize = 16;
    let (x, dy) = (Matrix::of(x), grad(x, dy));
    let runs = Runs::of(&x, weight);
    let columns = match norm {
        Norm::Rms => runs.width,
        Norm::Layer { .. } => 2 * runs.width,
    };
    let pieces = match runs.is_short() {
        true => runs.runs.div_ceil(PIECE).next_multiple_of(8),
        false => runs.runs.div_ceil(PIECE),
    };
    let partial = Matrix::new(pieces, columns, weight);
    let args = [
        (&x).into(),
        x.stride(),
        (&dy).into(),
        dy.stride(),
        (&partial).into(),
        int(PIECE),
    ];
    runs.launch(gpu, norm, "_params", pieces, &args, eps);
    let sums = Tensor::empty([columns as i64], (Kind::Float, weight.device()));
    let args = [(&partial).into(), (&sums).into(), int(pieces), int(columns)];
    gpu.launch("column_sums", [columns.div_ceil(32), 1, 1], THREADS, &args);
    sums
}

fn grad(x: &Tensor, dy: &Tensor) -> Matrix {
    assert_eq!(dy.size(), x.size(), "dy does not match x");
    Matrix::of(dy)
}
