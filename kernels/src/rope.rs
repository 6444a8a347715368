//! Rotary position embeddings (Su et al., 2021), half-split as in GPT-NeoX and Llama: the table and its application.
//! Frequencies as transformers computes them (modeling_rope_utils.py). What a config.json means is read elsewhere.

use tch::{Device, Kind, Tensor};

use crate::KernelError;
use crate::slice::RowsMut;
use crate::vector::{in_chunks, vector, vectorised};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    /// The first this many of a head's dimensions turn; even, at most the head's dimension.
    pub rotary_dim: i64,
    pub scaling: RopeScaling,
}

/// `rope_type` of transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: i64,
    },
}

impl RopeSpec {
    /// [rotary_dim / 2] float32, operation by operation the arithmetic of transformers.
    pub fn inv_freq(&self) -> Result<Tensor, KernelError> {
        let RopeSpec {
            theta,
            rotary_dim,
            scaling,
        } = *self;
        let exponents = Tensor::f_arange_start_step(0, rotary_dim, 2, (Kind::Float, Device::Cpu))?;
        let inv_freq = Tensor::f_pow_scalar(theta, &exponents.f_div_scalar(rotary_dim)?)?.f_reciprocal()?;
        Ok(match scaling {
            RopeScaling::None => inv_freq,
            RopeScaling::Linear { factor } => inv_freq.f_div_scalar(factor)?,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = original_max_position_embeddings as f64;
                let wavelength = inv_freq
                    .f_reciprocal()?
                    .f_mul_scalar(2.0 * std::f64::consts::PI)?;
                let long = wavelength.f_gt(context / low_freq_factor)?;
                let short = wavelength.f_lt(context / high_freq_factor)?;
                let scaled = inv_freq.f_div_scalar(factor)?.f_where_self(&long, &inv_freq)?;
                let smooth = wavelength
                    .f_reciprocal()?
                    .f_mul_scalar(context)?
                    .f_sub_scalar(low_freq_factor)?
                    .f_div_scalar(high_freq_factor - low_freq_factor)?;
                let smoothed = (smooth.ones_like() - &smooth) * &scaled / factor + &smooth * &scaled;
                scaled.f_where_self(&long.f_logical_or(&short)?, &smoothed)?
            }
        })
    }
}

/// Cosines and sines of every position, for one spec and head dimension.
#[derive(Debug)]
pub struct Rope {
    /// [positions, rotary_dim] float32: cosines in the first half of the columns, sines in the second.
    table: Tensor,
    head_dim: usize,
}

impl Rope {
    pub fn new(
        spec: &RopeSpec,
        head_dim: i64,
        max_positions: i64,
        device: Device,
    ) -> Result<Rope, KernelError> {
        let rotary_dim = spec.rotary_dim;
        if rotary_dim <= 0 || rotary_dim % 2 != 0 || rotary_dim > head_dim {
            return Err(KernelError::Shape(format!(
                "rotary_dim {rotary_dim} of head_dim {head_dim}"
            )));
        }
        let positions = Tensor::f_arange(max_positions, (Kind::Float, Device::Cpu))?;
        // The angle is rounded to float32, as the reference model does; its cosine is then taken exactly.
        let angles = positions
            .f_unsqueeze(1)?
            .f_mul(&spec.inv_freq()?)?
            .f_to_kind(Kind::Double)?;
        let table = Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)?.f_to_kind(Kind::Float)?;
        Ok(Rope {
            table: table.f_to_device(device)?,
            head_dim: head_dim as usize,
        })
    }

    pub fn max_positions(&self) -> i64 {
        self.table.size()[0]
    }

    /// Turns every head of `x` [T, heads * D] in place, row t by the angle of `positions[t]`. Queries and keys that
    /// stand side by side in a fused tensor are turned in one call.
    ///
    /// # Panics
    /// When a position lies outside the table.
    pub fn apply(&self, x: &Tensor, positions: &[i64]) {
        self.turn(x, positions, Direction::Forward);
    }

    /// Turns back: the gradient of [`Rope::apply`], a rotation being orthogonal.
    pub fn apply_inverse(&self, x: &Tensor, positions: &[i64]) {
        self.turn(x, positions, Direction::Inverse);
    }

    fn turn(&self, x: &Tensor, positions: &[i64], direction: Direction) {
        let size = x.size();
        assert!(
            size.len() == 2
                && size[0] as usize == positions.len()
                && (size[1] as usize).is_multiple_of(self.head_dim),
            "x {size:?} for {} positions and head_dim {}",
            positions.len(),
            self.head_dim
        );
        let limit = self.max_positions();
        if let Some(position) = positions.iter().find(|p| !(0..limit).contains(*p)) {
            panic!("position {position} outside a table of {limit}");
        }
        let mut in_place = x.shallow_clone();
        let (Some(table), Some(rows)) = (vector(&self.table), RowsMut::of(&mut in_place)) else {
            return self.turn_reference(x, positions, direction);
        };
        let (rotary_dim, head_dim) = (self.table.size()[1] as usize, self.head_dim);
        in_chunks(rows.rows, rows.width, |range| {
            for row in range {
                let angles = &table[positions[row] as usize * rotary_dim..][..rotary_dim];
                let (cos, sin) = angles.split_at(rotary_dim / 2);
                // SAFETY: the row is this task's alone.
                for head in unsafe { rows.row(row) }.chunks_exact_mut(head_dim) {
                    let (first, second) = head[..rotary_dim].split_at_mut(rotary_dim / 2);
                    match direction {
                        Direction::Forward => turn_head(first, second, cos, sin, 1.0),
                        Direction::Inverse => turn_head(first, second, cos, sin, -1.0),
                    }
                }
            }
        });
    }

    /// The same in plain tch, on any device.
    fn turn_reference(&self, x: &Tensor, positions: &[i64], direction: Direction) {
        let half = self.table.size()[1] / 2;
        let index = Tensor::from_slice(positions).to_device(self.table.device());
        let angles = self.table.index_select(0, &index).unsqueeze(1).to_kind(x.kind()); // [T, 1, R]
        let (cos, sin) = (angles.narrow(2, 0, half), angles.narrow(2, half, half));
        let sin = match direction {
            Direction::Forward => sin,
            Direction::Inverse => -sin,
        };
        let heads = x.reshape([x.size()[0], -1, self.head_dim as i64]); // [T, heads, D]
        let (first, second) = (heads.narrow(2, 0, half), heads.narrow(2, half, half));
        let rest = heads.narrow(2, 2 * half, self.head_dim as i64 - 2 * half);
        let turned = Tensor::cat(
            &[&first * &cos - &second * &sin, second * cos + first * sin, rest],
            2,
        );
        x.shallow_clone().copy_(&turned.view([x.size()[0], -1]));
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Forward,
    Inverse,
}

vectorised!(
    fn turn_head(first: &mut [f32], second: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
            let (x, y, sin) = (*a, *b, sin * sign);
            *a = x * cos - y * sin;
            *b = y * cos + x * sin;
        }
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    const NONE: [f32; 8] = [
        1.0,
        0.193_922_76,
        0.037_606_03,
        0.007_292_665,
        0.001_414_213_4,
        0.000_274_248_2,
        5.318_295_7e-5,
        1.031_338_5e-5,
    ];
    const LLAMA3: [f32; 8] = [
        1.0,
        0.193_922_76,
        0.037_606_03,
        0.007_292_665,
        0.000_429_556_7,
        8.570_256e-6,
        1.661_967_4e-6,
        3.222_933e-7,
    ];

    fn spec(rotary_dim: i64, scaling: RopeScaling) -> RopeSpec {
        RopeSpec {
            theta: 500_000.0,
            rotary_dim,
            scaling,
        }
    }

    #[test]
    fn agrees_with_the_reference_and_turns_back() {
        for (t, heads, head_dim, rotary_dim) in
            [(1, 1, 2, 2), (5, 3, 64, 64), (40, 12, 64, 32), (9, 2, 80, 20)]
        {
            let rope =
                Rope::new(&spec(rotary_dim, RopeScaling::None), head_dim, 100, Device::Cpu).expect("valid");
            let positions: Vec<i64> = (0..t).map(|i| (i * 37) % 100).collect();
            let fused = Tensor::randn([t, heads * head_dim + 7], FLOAT);
            let untouched = fused.narrow(1, heads * head_dim, 7).copy();
            let x = fused.narrow(1, 0, heads * head_dim);
            let (before, want) = (x.copy(), x.copy().to_kind(Kind::Double));
            rope.apply(&x, &positions);
            rope.turn_reference(&want, &positions, Direction::Forward);
            assert!((x.to_kind(Kind::Double) - want).abs().max().double_value(&[]) < 2e-6);
            assert_eq!(fused.narrow(1, heads * head_dim, 7), untouched);
            rope.apply_inverse(&x, &positions);
            assert!((x - before).abs().max().double_value(&[]) < 3e-6);
        }
    }

    /// Values printed by transformers 5.23 (ROPE_INIT_FUNCTIONS) for head_dim 16, theta 500000.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let llama3 = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let cases: [(RopeScaling, [f32; 8]); 3] = [
            (RopeScaling::None, NONE),
            (RopeScaling::Linear { factor: 4.0 }, NONE.map(|x| x / 4.0)),
            (llama3, LLAMA3),
        ];
        for (scaling, want) in cases {
            let got = Vec::<f32>::try_from(spec(16, scaling).inv_freq().expect("valid")).expect("floats");
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() <= 2e-7 * want, "{scaling:?}: {got} for {want}");
            }
        }
    }

    #[test]
    fn a_position_outside_the_table_panics() {
        let rope = Rope::new(&spec(4, RopeScaling::None), 4, 8, Device::Cpu).expect("valid");
        let x = Tensor::zeros([1, 4], FLOAT);
        for position in [-1, 8] {
            assert!(
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| rope.apply(&x, &[position])))
                    .is_err()
            );
        }
        assert!(Rope::new(&spec(6, RopeScaling::None), 4, 8, Device::Cpu).is_err());
    }
}
