//! The activation of an MLP, gated (act(gate) * up) or plain, and its gradient. Not the projections around it.

mod gpu;

use tch::Tensor;

use crate::vector::{exp, map_rows, rows, vectorised};

/// The functions config.json calls `hidden_act`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x) ("silu", "swish").
    Silu,
    /// The tanh approximation ("gelu_pytorch_tanh", "gelu_new", "gelu_fast").
    GeluTanh,
    /// x Phi(x) by erf ("gelu").
    Gelu,
    /// x sigmoid(1.702 x) ("quick_gelu").
    QuickGelu,
    /// max(x, 0) ("relu").
    Relu,
    /// max(x, 0)^2 ("relu2").
    SquaredRelu,
}

/// How a gate g and its value u become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// act(g) * u
    Act(Activation),
    /// g' sigmoid(alpha g') * (u' + 1) with g' = min(g, limit) and u' = clamp(u, -limit, limit) (gpt-oss).
    Clamped { alpha: f32, limit: f32 },
}

impl From<Activation> for Gate {
    fn from(activation: Activation) -> Gate {
        Gate::Act(activation)
    }
}

/// `gate_up` is [T, 2I] with the gates in the first I columns; the result is [T, I].
pub fn gated(gate_up: &Tensor, gate: impl Into<Gate>) -> Tensor {
    let gate = gate.into();
    let Some(from) = rows(gate_up) else {
        return match crate::gpu::of(gate_up) {
            Some(gpu) => gpu::gated(gpu, gate_up, gate),
            None => gated_reference(gate_up, gate),
        };
    };
    let inner = from.width / 2;
    map_rows(from.rows, inner, |row, y| {
        let (gates, up) = from.row(row).split_at(inner);
        gated_row(gate, gates, up, y);
    })
}

/// The gradient of [`gated`]: [T, 2I] from `gate_up` [T, 2I] and `dy` [T, I].
pub fn gated_backward(gate_up: &Tensor, dy: &Tensor, gate: impl Into<Gate>) -> Tensor {
    let gate = gate.into();
    let (Some(from), Some(grad)) = (rows(gate_up), rows(dy)) else {
        return match crate::gpu::of(gate_up) {
            Some(gpu) => gpu::gated_backward(gpu, gate_up, dy, gate),
            None => gated_backward_reference(gate_up, dy, gate),
        };
    };
    let inner = from.width / 2;
    assert_eq!(
        (grad.rows, grad.width),
        (from.rows, inner),
        "dy does not match gate_up"
    );
    map_rows(from.rows, from.width, |row, d| {
        let (gates, up) = from.row(row).split_at(inner);
        let (d_gate, d_up) = d.split_at_mut(inner);
        gated_backward_row(gate, gates, up, grad.row(row), d_gate, d_up);
    })
}

/// act(x), [T, I].
pub fn activate(x: &Tensor, activation: Activation) -> Tensor {
    let Some(from) = rows(x) else {
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::plain(gpu, x, activation.into()),
            None => activate_reference(x, activation),
        };
    };
    map_rows(from.rows, from.width, |row, y| {
        activate_row(activation, from.row(row), y)
    })
}

/// The gradient of [`activate`] from `x` and `dy`, [T, I].
pub fn activate_backward(x: &Tensor, dy: &Tensor, activation: Activation) -> Tensor {
    let (Some(from), Some(grad)) = (rows(x), rows(dy)) else {
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::plain_backward(gpu, x, dy, activation.into()),
            None => activate_backward_reference(x, dy, activation),
        };
    };
    assert_eq!(
        (grad.rows, grad.width),
        (from.rows, from.width),
        "dy does not match x"
    );
    map_rows(from.rows, from.width, |row, d| {
        activate_backward_row(activation, from.row(row), grad.row(row), d);
    })
}

/// 1 / (1 + e^-x), [T, I]: how far a gate is open.
pub fn sigmoid(x: &Tensor) -> Tensor {
    let Some(from) = rows(x) else {
        return match crate::gpu::of(x) {
            Some(gpu) => gpu::plain(gpu, x, gpu::Kind::Sigmoid),
            None => x.sigmoid(),
        };
    };
    map_rows(from.rows, from.width, |row, y| sigmoid_row(from.row(row), y))
}

/// [`gated`] in plain tch, on any device.
pub fn gated_reference(gate_up: &Tensor, gate: impl Into<Gate>) -> Tensor {
    let (gates, up) = halves(gate_up);
    match gate.into() {
        Gate::Act(activation) => activate_reference(&gates, activation) * up,
        Gate::Clamped { alpha, limit } => {
            let (gates, up) = clamped(&gates, &up, limit);
            sigmoid_gate(&gates, alpha.into()).0 * (up + 1.0)
        }
    }
}

/// [`gated_backward`] in plain tch, on any device.
pub fn gated_backward_reference(gate_up: &Tensor, dy: &Tensor, gate: impl Into<Gate>) -> Tensor {
    let (gates, up) = halves(gate_up);
    let (d_gate, d_up) = match gate.into() {
        Gate::Act(activation) => (
            dy * up * derivative_reference(&gates, activation),
            dy * activate_reference(&gates, activation),
        ),
        Gate::Clamped { alpha, limit } => {
            let limit64 = f64::from(limit);
            let (free_gate, free_up) = (gates.le(limit64), up.abs().le(limit64));
            let (gates, up) = clamped(&gates, &up, limit);
            let (value, derivative) = sigmoid_gate(&gates, alpha.into());
            (dy * (up + 1.0) * derivative * free_gate, dy * value * free_up)
        }
    };
    Tensor::cat(&[d_gate, d_up], 1)
}

/// [`activate`] in plain tch, on any device.
pub fn activate_reference(x: &Tensor, activation: Activation) -> Tensor {
    match activation {
        Activation::Silu => x.silu(),
        Activation::GeluTanh => x.gelu("tanh"),
        Activation::Gelu => x.gelu("none"),
        Activation::QuickGelu => sigmoid_gate(x, QUICK).0,
        Activation::Relu => x.relu(),
        Activation::SquaredRelu => x.relu().square(),
    }
}

/// [`activate_backward`] in plain tch, on any device.
pub fn activate_backward_reference(x: &Tensor, dy: &Tensor, activation: Activation) -> Tensor {
    dy * derivative_reference(x, activation)
}

fn derivative_reference(x: &Tensor, activation: Activation) -> Tensor {
    match activation {
        Activation::Silu => sigmoid_gate(x, 1.0).1,
        Activation::GeluTanh => {
            let slope = (x.square() * (3.0 * CUBIC) + 1.0) * (2.0 * SQRT_2_OVER_PI);
            let s = ((x + x.pow_tensor_scalar(3) * CUBIC) * (2.0 * SQRT_2_OVER_PI)).sigmoid();
            &s + x * &s * (1.0 - &s) * slope
        }
        Activation::Gelu => {
            let cdf = ((x * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
            cdf + x * (x.square() * -0.5).exp() * INV_SQRT_2PI
        }
        Activation::QuickGelu => sigmoid_gate(x, QUICK).1,
        Activation::Relu => x.gt(0.0).to_kind(x.kind()),
        Activation::SquaredRelu => x.relu() * 2.0,
    }
}

/// x sigmoid(alpha x) and its derivative.
fn sigmoid_gate(x: &Tensor, alpha: f64) -> (Tensor, Tensor) {
    let s = (x * alpha).sigmoid();
    let value = x * &s;
    let derivative = &s + &value * (1.0 - &s) * alpha;
    (value, derivative)
}

fn clamped(gates: &Tensor, up: &Tensor, limit: f32) -> (Tensor, Tensor) {
    let limit = f64::from(limit);
    (gates.clamp_max(limit), up.clamp(-limit, limit))
}

fn halves(gate_up: &Tensor) -> (Tensor, Tensor) {
    let inner = gate_up.size()[1] / 2;
    (gate_up.narrow(1, 0, inner), gate_up.narrow(1, inner, inner))
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const INV_SQRT_2PI: f64 = 0.398_942_280_401_432_7;
const CUBIC: f64 = 0.044_715;
/// transformers' QuickGELUActivation.
const QUICK: f64 = 1.702;

/// `$body` with `$act` standing for the function of `$activation`. The choice stands outside of the body's loop, so each
/// loop is straight-line and vectorises.
macro_rules! with_act {
    ($activation:expr, $act:ident => $body:expr) => {
        match $activation {
            Activation::Silu => with_act!(@ silu, $act => $body),
            Activation::GeluTanh => with_act!(@ gelu_tanh, $act => $body),
            Activation::Gelu => with_act!(@ gelu, $act => $body),
            Activation::QuickGelu => with_act!(@ quick_gelu, $act => $body),
            Activation::Relu => with_act!(@ relu, $act => $body),
            Activation::SquaredRelu => with_act!(@ squared_relu, $act => $body),
        }
    };
    (@ $function:ident, $act:ident => $body:expr) => {{
        let $act = $function;
        $body
    }};
}

vectorised!(
    fn gated_row(gate: Gate, gates: &[f32], up: &[f32], y: &mut [f32]) {
        let inputs = gates.iter().zip(up);
        match gate {
            Gate::Act(activation) => with_act!(activation, act => {
                for (y, (gate, up)) in y.iter_mut().zip(inputs) {
                    *y = act(*gate).0 * up;
                }
            }),
            Gate::Clamped { alpha, limit } => {
                for (y, (gate, up)) in y.iter_mut().zip(inputs) {
                    let value = sigmoid_act(at_most(*gate, limit), alpha).0;
                    *y = value * (at_least(at_most(*up, limit), -limit) + 1.0);
                }
            }
        }
    }
);

vectorised!(
    fn gated_backward_row(
        gate: Gate,
        gates: &[f32],
        up: &[f32],
        dy: &[f32],
        d_gate: &mut [f32],
        d_up: &mut [f32],
    ) {
        let inputs = gates.iter().zip(up).zip(dy);
        let outputs = d_gate.iter_mut().zip(d_up);
        match gate {
            Gate::Act(activation) => with_act!(activation, act => {
                for ((d_gate, d_up), ((gate, up), dy)) in outputs.zip(inputs) {
                    let (value, derivative) = act(*gate);
                    *d_gate = dy * up * derivative;
                    *d_up = dy * value;
                }
            }),
            Gate::Clamped { alpha, limit } => {
                for ((d_gate, d_up), ((gate, up), dy)) in outputs.zip(inputs) {
                    let (value, derivative) = sigmoid_act(at_most(*gate, limit), alpha);
                    let slope = dy * (at_least(at_most(*up, limit), -limit) + 1.0) * derivative;
                    *d_gate = if *gate <= limit { slope } else { 0.0 };
                    *d_up = if up.abs() <= limit { dy * value } else { 0.0 };
                }
            }
        }
    }
);

vectorised!(
    fn sigmoid_row(x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = 1.0 / (1.0 + exp(-*x));
        }
    }
);

vectorised!(
    fn activate_row(activation: Activation, x: &[f32], y: &mut [f32]) {
        with_act!(activation, act => {
            for (y, x) in y.iter_mut().zip(x) {
                *y = act(*x).0;
            }
        })
    }
);

vectorised!(
    fn activate_backward_row(activation: Activation, x: &[f32], dy: &[f32], d: &mut [f32]) {
        with_act!(activation, act => {
            for (d, (x, dy)) in d.iter_mut().zip(x.iter().zip(dy)) {
                *d = dy * act(*x).1;
            }
        })
    }
);

// Each gives the value and the derivative; what a loop does not use is not computed.

#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    sigmoid_act(x, 1.0)
}

#[inline(always)]
fn quick_gelu(x: f32) -> (f32, f32) {
    sigmoid_act(x, QUICK as f32)
}

/// x sigmoid(alpha x).
#[inline(always)]
fn sigmoid_act(x: f32, alpha: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-(alpha * x)));
    let y = x * s;
    (y, (alpha * y).mul_add(1.0 - s, s))
}

// Not f32's min and max, which give the other number for a NaN.

#[inline(always)]
fn at_most(x: f32, limit: f32) -> f32 {
    if x > limit { limit } else { x }
}

#[inline(always)]
fn at_least(x: f32, limit: f32) -> f32 {
    if x < limit { limit } else { x }
}

#[inline(always)]
fn relu(x: f32) -> (f32, f32) {
    (at_least(x, 0.0), if x > 0.0 { 1.0 } else { 0.0 })
}

#[inline(always)]
fn squared_relu(x: f32) -> (f32, f32) {
    let y = relu(x).0;
    (y * y, 2.0 * y)
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

    const ALL: [Activation; 6] = [
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Gelu,
        Activation::QuickGelu,
        Activation::Relu,
        Activation::SquaredRelu,
    ];

    /// The limit lies within the numbers of the tests, on both sides of gate and up.
    fn gates() -> Vec<Gate> {
        let clamped = Gate::Clamped {
            alpha: 1.702,
            limit: 3.0,
        };
        ALL.map(Gate::Act).into_iter().chain([clamped]).collect()
    }

    /// Against float64 tch over a grid of shapes: 1e-6 of the largest value.
    #[test]
    fn agrees_with_the_reference() {
        crate::gpu::everywhere(judge_by_the_reference);
    }

    fn judge_by_the_reference() {
        let double = |x: &Tensor| x.to_kind(Kind::Double);
        for (t, inner) in [(1, 1), (1, 7), (3, 64), (5, 100), (40, 1536)] {
            let wide = Tensor::randn([t, 2 * inner + 3], (Kind::Float, Device::Cpu)) * 4.0;
            let gate_up = wide.narrow(1, 2, 2 * inner);
            let x = wide.narrow(1, 1, inner);
            let dy = Tensor::randn([t, inner], (Kind::Float, Device::Cpu));
            for gate in gates() {
                let want = gated_reference(&double(&gate_up), gate);
                close(&gated(&gate_up, gate), &want, 1e-6);
                let want = gated_backward_reference(&double(&gate_up), &double(&dy), gate);
                close(&gated_backward(&gate_up, &dy, gate), &want, 2e-6);
            }
            for activation in ALL {
                let want = activate_reference(&double(&x), activation);
                close(&activate(&x, activation), &want, 1e-6);
                let want = activate_backward_reference(&double(&x), &double(&dy), activation);
                close(&activate_backward(&x, &dy, activation), &want, 2e-6);
            }
            close(&sigmoid(&x), &double(&x).sigmoid(), 1e-6);
        }
    }

    /// The written derivative is the one autograd finds.
    #[test]
    fn reference_backward_is_autograd() {
        let gate_up = (Tensor::randn([9, 26], (Kind::Double, Device::Cpu)) * 3.0).set_requires_grad(true);
        let dy = Tensor::randn([9, 13], (Kind::Double, Device::Cpu));
        let gradient = |y: Tensor| {
            Tensor::run_backward(&[(y * &dy).sum(Kind::Double)], &[&gate_up], false, false).remove(0)
        };
        let plain = gate_up.detach();
        for gate in gates() {
            let want = gradient(gated_reference(&gate_up, gate));
            close(&gated_backward_reference(&plain, &dy, gate), &want, 1e-12);
        }
        for activation in ALL {
            let want = gradient(activate_reference(&gate_up.narrow(1, 0, 13), activation)).narrow(1, 0, 13);
            let got = activate_backward_reference(&plain.narrow(1, 0, 13), &dy, activation);
            close(&got, &want, 1e-12);
        }
    }

    #[test]
    fn extremes_stay_finite() {
        crate::gpu::everywhere(judge_extremes);
    }

    fn judge_extremes() {
        let x = Tensor::from_slice(&[-1e30f32, -100.0, -0.0, 0.0, 100.0, 1e4]).view([6, 1]);
        let gate_up = Tensor::cat(&[&x, &x.ones_like()], 1);
        for gate in gates() {
            let want = match gate {
                Gate::Act(Activation::SquaredRelu) => [0.0, 0.0, 0.0, 0.0, 1e4, 1e8],
                Gate::Act(_) => [0.0, 0.0, 0.0, 0.0, 100.0, 1e4],
                Gate::Clamped { .. } => [0.0, 0.0, 0.0, 0.0, 5.963_857, 5.963_857],
            };
            let got = Vec::<f32>::try_from(gated(&gate_up, gate).view([6])).expect("six floats");
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-5, "{gate:?}: {got} for {want}");
            }
        }
    }

    fn close(got: &Tensor, want: &Tensor, tolerance: f64) {
        let scale = want.abs().max().double_value(&[]).max(1.0);
        let worst = (got.to_kind(Kind::Double) - want).abs().max().double_value(&[]);
        assert!(worst <= tolerance * scale, "{worst} of {scale}");
    }
}
