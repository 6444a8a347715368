//! Activations by the kernels of `gpu/activation.cu`.

use tch::Tensor;

use super::{Activation, Gate};
use crate::gpu::rows::{Matrix, THREADS};
use crate::gpu::{Arg, Gpu, int};

/// As the kernels number them.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Silu = 0,
    GeluTanh = 1,
    Gelu = 2,
    QuickGelu = 3,
    Relu = 4,
    SquaredRelu = 5,
    Sigmoid = 6,
    Clamped = 7,
}

impl From<Activation> for Kind {
    fn from(activation: Activation) -> Kind {
        match activation {
            Activation::Silu => Kind::Silu,
            Activation::GeluTanh => Kind::GeluTanh,
            Activation::Gelu => Kind::Gelu,
            Activation::QuickGelu => Kind::QuickGelu,
            Activation::Relu => Kind::Relu,
            Activation::SquaredRelu => Kind::SquaredRelu,
        }
    }
}

/// Kind, alpha and limit.
fn numbers(gate: Gate) -> [Arg<'static>; 3] {
    let (kind, alpha, limit) = match gate {
        Gate::Act(activation) => (activation.into(), 0.0, 0.0),
        Gate::Clamped { alpha, limit } => (Kind::Clamped, alpha, limit),
    };
    [int(kind as i32), alpha.into(), limit.into()]
}

pub(super) fn gated(gpu: Gpu, gate_up: &Tensor, gate: Gate) -> Tensor {
    let x = Matrix::of(gate_up);
    let out = Matrix::new(x.rows, x.width / 2, gate_up);
    let [kind, alpha, limit] = numbers(gate);
    let args = [
        (&x).into(),
        x.stride(),
        (&out).into(),
        Arg::Null,
        int(out.width),
        kind,
        alpha,
        limit,
    ];
    gpu.launch("gated", out.grid(), THREADS, &args);
    out.into_tensor()
}

pub(super) fn gated_backward(gpu: Gpu, gate_up: &Tensor, dy: &Tensor, gate: Gate) -> Tensor {
    let (x, dy) = (Matrix::of(gate_up), Matrix::of(dy));
    assert_eq!(
        (dy.rows, dy.width),
        (x.rows, x.width / 2),
        "dy does not match gate_up"
    );
    let dx = Matrix::new(x.rows, x.width, gate_up);
    let [kind, alpha, limit] = numbers(gate);
    let args = [
        (&x).into(),
        x.stride(),
        (&dy).into(),
        dy.stride(),
        (&dx).into(),
        int(dy.width),
        kind,
        alpha,
        limit,
    ];
    gpu.launch("gated_backward", dy.grid(), THREADS, &args);
    dx.into_tensor()
}

pub(super) fn plain(gpu: Gpu, x: &Tensor, kind: Kind) -> Tensor {
    let x = Matrix::of(x);
    let out = x.like();
    let args = [
        (&x).into(),
        x.stride(),
        (&out).into(),
        Arg::Null,
        int(x.width),
        int(kind as i32),
    ];
    gpu.launch("activate", x.grid(), THREADS, &args);
    out.into_tensor()
}

pub(super) fn plain_backward(gpu: Gpu, x: &Tensor, dy: &Tensor, kind: Kind) -> Tensor {
    let (x, dy) = (Matrix::of(x), Matrix::of(dy));
    assert_eq!((dy.rows, dy.width), (x.rows, x.width), "dy does not match x");
    let dx = x.like();
    let args = [
        (&x).into(),
        x.stride(),
        (&dy).into(),
        dy.stride(),
        (&dx).into(),
        int(x.width),
        int(kind as i32),
    ];
    gpu.launch("activate_backward", x.grid(), THREADS, &args);
    dx.into_tensor()
}
