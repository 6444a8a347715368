//! The gated activation of an MLP, act(gate) * up, and its gradient. Not the projections around it.

use tch::Tensor;

use crate::vector::{exp, in_chunks, rows, rows_mut, uninit, vectorised};

/// The functions config.json calls `hidden_act`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x) ("silu", "swish").
    Silu,
    /// The tanh approximation ("gelu_pytorch_tanh", "gelu_new").
    GeluTanh,
    /// x Phi(x) by erf ("gelu").
    Gelu,
}

/// act(gate) * up. `gate_up` is [T, 2I] with the gate in the first I columns; the result is [T, I].
pub fn gated(gate_up: &Tensor, activation: Activation) -> Tensor {
    let Some(from) = rows(gate_up) else {
        return gated_reference(gate_up, activation);
    };
    let inner = from.width / 2;
    let mut y = uninit(from.rows, inner);
    let to = rows_mut(&mut y);
    in_chunks(from.rows, inner, |rows| {
        for row in rows {
            let (gate, up) = from.row(row).split_at(inner);
            // SAFETY: the row is this task's alone.
            forward_row(activation, gate, up, unsafe { to.row(row) });
        }
    });
    y
}

/// The gradient of [`gated`]: [T, 2I] from `gate_up` [T, 2I] and `dy` [T, I].
pub fn gated_backward(gate_up: &Tensor, dy: &Tensor, activation: Activation) -> Tensor {
    let (Some(from), Some(grad)) = (rows(gate_up), rows(dy)) else {
        return gated_backward_reference(gate_up, dy, activation);
    };
    let inner = from.width / 2;
    assert_eq!(
        (grad.rows, grad.width),
        (from.rows, inner),
        "dy does not match gate_up"
    );
    let mut d = uninit(from.rows, from.width);
    let to = rows_mut(&mut d);
    in_chunks(from.rows, from.width, |rows| {
        for row in rows {
            let (gate, up) = from.row(row).split_at(inner);
            // SAFETY: the row is this task's alone.
            let (d_gate, d_up) = unsafe { to.row(row) }.split_at_mut(inner);
            backward_row(activation, gate, up, grad.row(row), d_gate, d_up);
        }
    });
    d
}

/// [`gated`] in plain tch, on any device.
pub fn gated_reference(gate_up: &Tensor, activation: Activation) -> Tensor {
    let inner = gate_up.size()[1] / 2;
    act_reference(activation, &gate_up.narrow(1, 0, inner)) * gate_up.narrow(1, inner, inner)
}

/// [`gated_backward`] in plain tch, on any device.
pub fn gated_backward_reference(gate_up: &Tensor, dy: &Tensor, activation: Activation) -> Tensor {
    let inner = gate_up.size()[1] / 2;
    let (gate, up) = (gate_up.narrow(1, 0, inner), gate_up.narrow(1, inner, inner));
    let derivative = match activation {
        Activation::Silu => {
            let s = gate.sigmoid();
            &s + &gate * &s * (1.0 - &s)
        }
        Activation::GeluTanh => {
            let slope = (gate.square() * (3.0 * CUBIC) + 1.0) * (2.0 * SQRT_2_OVER_PI);
            let s = ((&gate + gate.pow_tensor_scalar(3) * CUBIC) * (2.0 * SQRT_2_OVER_PI)).sigmoid();
            &s + &gate * &s * (1.0 - &s) * slope
        }
        Activation::Gelu => {
            let cdf = ((&gate * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
            cdf + &gate * (gate.square() * -0.5).exp() * INV_SQRT_2PI
        }
    };
    let d_up = dy * act_reference(activation, &gate);
    Tensor::cat(&[dy * up * derivative, d_up], 1)
}

fn act_reference(activation: Activation, x: &Tensor) -> Tensor {
    match activation {
        Activation::Silu => x.silu(),
        Activation::GeluTanh => x.gelu("tanh"),
        Activation::Gelu => x.gelu("none"),
    }
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const INV_SQRT_2PI: f64 = 0.398_942_280_401_432_7;
const CUBIC: f64 = 0.044_715;

/// One loop per function: the choice stands outside, so each loop is straight-line and vectorises.
fn forward_row(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
    match activation {
        Activation::Silu => forward_silu(gate, up, y),
        Activation::GeluTanh => forward_gelu_tanh(gate, up, y),
        Activation::Gelu => forward_gelu(gate, up, y),
    }
}

fn backward_row(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    d_gate: &mut [f32],
    d_up: &mut [f32],
) {
    match activation {
        Activation::Silu => backward_silu(gate, up, dy, d_gate, d_up),
        Activation::GeluTanh => backward_gelu_tanh(gate, up, dy, d_gate, d_up),
        Activation::Gelu => backward_gelu(gate, up, dy, d_gate, d_up),
    }
}

macro_rules! row_loops {
    ($forward:ident, $backward:ident, $act:ident) => {
        vectorised!(
            fn $forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
                for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = $act(*gate).0 * up;
                }
            }
        );
        vectorised!(
            fn $backward(gate: &[f32], up: &[f32], dy: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
                let inputs = gate.iter().zip(up).zip(dy);
                for ((d_gate, d_up), ((gate, up), dy)) in d_gate.iter_mut().zip(d_up).zip(inputs) {
                    let (value, derivative) = $act(*gate);
                    *d_gate = dy * up * derivative;
                    *d_up = dy * value;
                }
            }
        );
    };
}
row_loops!(forward_silu, backward_silu, silu);
row_loops!(forward_gelu_tanh, backward_gelu_tanh, gelu_tanh);
row_loops!(forward_gelu, backward_gelu, gelu);

// Each gives the value and the derivative; what a loop does not use is not computed.

#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-x));
    let y = x * s;
    (y, y.mul_add(1.0 - s, s))
}

/// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const TWICE: f32 = (2.0 * SQRT_2_OVER_PI) as f32;
    const TWICE_CUBIC: f32 = (2.0 * SQRT_2_OVER_PI * CUBIC) as f32;
    const SLOPE: f32 = (6.0 * SQRT_2_OVER_PI * CUBIC) as f32;
    let square = x * x;
    let s = 1.0 / (1.0 + exp(-x * TWICE_CUBIC.mul_add(square, TWICE)));
    let y = x * s;
    (y, (y * (1.0 - s)).mul_add(SLOPE.mul_add(square, TWICE), s))
}

#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    let cdf = erf(x * std::f32::consts::FRAC_1_SQRT_2).mul_add(0.5, 0.5);
    (x * cdf, (x * INV_SQRT_2PI as f32).mul_add(exp(-0.5 * x * x), cdf))
}

/// Within 1.1 ulp. Two polynomials met at 475/512 and chosen without a branch (after N. Juffa's erff: odd polynomial
/// near 0, 1 - exp(polynomial) above).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let (t, s) = (x.abs(), x * x);
    // Beyond 4 erf is 1 in float32; the cap keeps the polynomial in its range.
    let t = if t > 4.0 { 4.0 } else { t };
    let r = (-1.728_534_7e-5f32).mul_add(t, 3.831_972e-4);
    let u = (-3.883_964_4e-3f32).mul_add(t, 2.425_462_2e-2);
    let r = r.mul_add(t * t, u);
    let r = r.mul_add(t, -1.067_778_8e-1);
    let r = r.mul_add(t, -6.348_467e-1);
    let r = r.mul_add(t, -1.287_175e-1);
    let far = (1.0 - exp(r.mul_add(t, -t))).copysign(x);
    let r = -5.967_617e-4f32;
    let r = r.mul_add(s, 4.991_194e-3);
    let r = r.mul_add(s, -2.676_813_5e-2);
    let r = r.mul_add(s, 1.128_199_3e-1);
    let r = r.mul_add(s, -3.761_253_4e-1);
    let r = r.mul_add(s, 1.283_791_7e-1);
    let near = r.mul_add(x, x);
    if t > 475.0 / 512.0 { far } else { near }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    const ALL: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::Gelu];

    /// Against float64 tch over a grid of shapes: 1e-6 of the largest value.
    #[test]
    fn agrees_with_the_reference() {
        for activation in ALL {
            for (t, inner) in [(1, 1), (1, 7), (3, 64), (5, 100), (40, 1536)] {
                let wide = Tensor::randn([t, 2 * inner + 3], (Kind::Float, Device::Cpu)) * 4.0;
                let gate_up = wide.narrow(1, 2, 2 * inner);
                let dy = Tensor::randn([t, inner], (Kind::Float, Device::Cpu));
                let want = gated_reference(&gate_up.to_kind(Kind::Double), activation);
                close(&gated(&gate_up, activation), &want, 1e-6);
                let want = gated_backward_reference(
                    &gate_up.to_kind(Kind::Double),
                    &dy.to_kind(Kind::Double),
                    activation,
                );
                close(&gated_backward(&gate_up, &dy, activation), &want, 2e-6);
            }
        }
    }

    /// The written derivative is the one autograd finds.
    #[test]
    fn reference_backward_is_autograd() {
        for activation in ALL {
            let gate_up = Tensor::randn([9, 26], (Kind::Double, Device::Cpu)).set_requires_grad(true);
            let dy = Tensor::randn([9, 13], (Kind::Double, Device::Cpu));
            let y = gated_reference(&gate_up, activation);
            let want = Tensor::run_backward(&[(y * &dy).sum(Kind::Double)], &[&gate_up], false, false);
            close(
                &gated_backward_reference(&gate_up.detach(), &dy, activation),
                &want[0],
                1e-12,
            );
        }
    }

    #[test]
    fn extremes_stay_finite() {
        let x = Tensor::from_slice(&[-1e30f32, -100.0, -0.0, 0.0, 100.0, 1e4]).view([6, 1]);
        let gate_up = Tensor::cat(&[&x, &x.ones_like()], 1);
        for activation in ALL {
            let want = [0.0, 0.0, 0.0, 0.0, 100.0, 1e4];
            let got = Vec::<f32>::try_from(gated(&gate_up, activation).view([6])).expect("six floats");
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-6, "{activation:?}: {got} for {want}");
            }
        }
    }

    fn close(got: &Tensor, want: &Tensor, tolerance: f64) {
        let scale = want.abs().max().double_value(&[]).max(1.0);
        let worst = (got.to_kind(Kind::Double) - want).abs().max().double_value(&[]);
        assert!(worst <= tolerance * scale, "{worst} of {scale}");
    }
}
