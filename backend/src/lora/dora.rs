//! DoRA (Liu et al., arXiv 2402.09353) as peft computes it: an output is `m / ||W + s B A|| * (W + s B A) x`, with a
//! magnitude m and a norm for each output. So where plain LoRA makes `u = (W + s B A) x`, DoRA adds `gain * u` with
//! `gain = m / ||W + s B A|| - 1`; gradients take the norm as a constant. An adapter without magnitudes pays nothing.
//!
//! A norm is taken apart, so that no sum of matrices is made: `||w||^2 + 2 s b (A w) + s^2 b (A At) bt` for a row w of W and
//! b of B. Everything here is of one rank.

use std::sync::OnceLock;

use tandem_kernels::linear::{LoraModule, linear};
use tandem_kernels::weight::{Precision, Weight};
use tch::{Device, Kind, Tensor};

/// Rows of a weight that are looked at together.
const ROWS_AT_ONCE: usize = 512;

/// The magnitudes of an adapted linear, and what the base makes of them.
pub struct Magnitudes {
    /// By part, by output.
    parts: Vec<Vec<f32>>,
    /// Known once there is a base.
    scaled: OnceLock<Scaled>,
}

/// Of each output of the (fused) linear; of one that is not adapted, zero.
pub struct Scaled {
    gain: Vec<f32>,
    inverse_norm: Vec<f32>,
}

impl Magnitudes {
    pub fn new(parts: Vec<Vec<f32>>) -> Magnitudes {
        Magnitudes {
            parts,
            scaled: OnceLock::new(),
        }
    }

    /// Beside the base's `weight`, whose rows have these squared norms.
    pub fn scaled(&self, module: &LoraModule, weight: &Weight, squares: &[f32]) -> &Scaled {
        self.scaled
            .get_or_init(|| Scaled::new(&self.parts, module, weight, squares))
    }
}

impl Scaled {
    fn new(magnitudes: &[Vec<f32>], module: &LoraModule, weight: &Weight, squares: &[f32]) -> Scaled {
        let n = squares.len();
        let (mut gain, mut inverse_norm) = (vec![0.0; n], vec![0.0; n]);
        let a = dense(&module.a); // [R, K]
        let through_base = numbers(&linear(&a.to_device(weight.device()), weight, None, &[])); // [R, N]
        for (part, magnitudes) in module.parts.iter().zip(magnitudes) {
            let (first_rank, rank) = (part.ranks.start, part.ranks.end - part.ranks.start);
            let (a, b) = (a.narrow(0, first_rank, rank), dense(&part.b));
            let gram = product(&a, &a); // [r, r], symmetric
            let spread = numbers(&product(&b, &gram)); // [width, r]
            let b = numbers(&b);
            let (rank, first_rank) = (rank as usize, first_rank as usize);
            let scale = part.scale;
            for (i, &magnitude) in magnitudes.iter().enumerate() {
                let column = part.columns.start as usize + i;
                let (mut crossed, mut own) = (0.0, 0.0);
                for r in 0..rank {
                    let b = f64::from(b[i * rank + r]);
                    crossed += b * f64::from(through_base[(first_rank + r) * n + column]);
                    own += b * f64::from(spread[i * rank + r]);
                }
                let square = f64::from(squares[column]) + 2.0 * scale * crossed + scale * scale * own;
                let norm = square.max(f64::MIN_POSITIVE).sqrt();
                gain[column] = (f64::from(magnitude) / norm - 1.0) as f32;
                inverse_norm[column] = (1.0 / norm) as f32;
            }
        }
        Scaled { gain, inverse_norm }
    }

    /// `[N]`
    pub fn gain(&self, device: Device) -> Tensor {
        Tensor::from_slice(&self.gain).to_device(device)
    }

    /// `[N]`
    pub fn inverse_norm(&self, device: Device) -> Tensor {
        Tensor::from_slice(&self.inverse_norm).to_device(device)
    }
}

/// `||w||^2` of each row of a weight.
pub fn row_squares(weight: &Weight) -> Vec<f32> {
    let rows: Vec<u32> = (0..weight.n() as u32).collect();
    let width = weight.k() as usize;
    let square = |row: &[f32]| row.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>() as f32;
    rows.chunks(ROWS_AT_ONCE)
        .flat_map(|rows| {
            let rows = numbers(&weight.gather(rows));
            rows.chunks(width).map(square).collect::<Vec<_>>()
        })
        .collect()
}

/// `x yt`, with the same bits whatever the number of threads.
fn product(x: &Tensor, y: &Tensor) -> Tensor {
    let y = Weight::passing(&y.contiguous(), Precision::F32, Device::Cpu);
    linear(&x.contiguous(), &y.expect("float32 numbers pack"), None, &[])
}

fn dense(weight: &Weight) -> Tensor {
    weight.dense().to_device(Device::Cpu).to_kind(Kind::Float)
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    let flat = tensor
        .to_device(Device::Cpu)
        .to_kind(Kind::Float)
        .contiguous()
        .view(-1);
    Vec::try_from(flat).expect("a flat float32 tensor")
}
