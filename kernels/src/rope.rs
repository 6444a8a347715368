//! Rotary position embeddings (Su et al., 2021): the table and its application. Frequencies and attention factors as
//! transformers computes them (modeling_rope_utils.py, ROPE_INIT_FUNCTIONS). What a config.json means is read elsewhere.

#[cfg(test)]
mod tests;

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use crate::KernelError;
use crate::gpu::{self, Gpu};
use crate::places::Ints;
use crate::slice::RowsMut;
use crate::vector::{in_chunks, vector, vectorised};

#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    /// The first this many of a head's dimensions turn; even, at most the head's dimension.
    pub rotary_dim: i64,
    pub layout: RopeLayout,
    pub scaling: RopeScaling,
}

/// Which two dimensions turn together by the i-th angle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// i and i + rotary_dim / 2 (GPT-NeoX, Llama).
    Half,
    /// 2 i and 2 i + 1 (GPT-J, GLM 4, Cohere 2).
    Interleaved,
}

/// `rope_type` of transformers. `dynamic` below the model's own positions is [`RopeScaling::None`].
#[derive(Clone, Debug, PartialEq)]
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
    /// YaRN (Peng et al., 2023).
    Yarn {
        factor: f64,
        /// 32 where a config does not say.
        beta_fast: f64,
        /// 1 where a config does not say.
        beta_slow: f64,
        /// Instead of what follows from `factor`, `mscale` and `mscale_all_dim`.
        attention_factor: Option<f64>,
        mscale: Option<f64>,
        mscale_all_dim: Option<f64>,
        /// Whether the borders between kept and divided frequencies are whole dimensions; true where a config does not say.
        truncate: bool,
        original_max_position_embeddings: i64,
    },
    /// LongRoPE (Ding et al., 2024): a divisor per frequency, one list up to the original positions and one beyond.
    LongRope {
        /// rotary_dim / 2 each.
        short_factor: Vec<f64>,
        long_factor: Vec<f64>,
        /// How much longer the model is than it was: max_position_embeddings / original_max_position_embeddings where a
        /// config does not say.
        factor: f64,
        /// Instead of what follows from `factor`.
        attention_factor: Option<f64>,
        original_max_position_embeddings: i64,
    },
}

impl RopeSpec {
    /// [rotary_dim / 2] float32, operation by operation the arithmetic of transformers, for a table of `max_positions`.
    ///
    /// LongRoPE's list is the long one when the table is longer than the original positions, for every position of it, as
    /// in vLLM and llama.cpp: keys that are cached must have been turned by the frequencies of the queries that
    /// come later. (transformers chooses anew at each call, by the longest position in it.)
    pub fn inv_freq(&self, max_positions: i64) -> Result<Tensor, KernelError> {
        let RopeSpec {
            theta,
            rotary_dim,
            layout: _,
            scaling,
        } = self;
        let exponents = Tensor::f_arange_start_step(0, *rotary_dim, 2, (Kind::Float, Device::Cpu))?
            .f_div_scalar(*rotary_dim)?;
        let wavelength_factor = Tensor::f_pow_scalar(*theta, &exponents)?; // wavelength / 2 pi
        let inv_freq = wavelength_factor.f_reciprocal()?;
        Ok(match scaling {
            RopeScaling::None => inv_freq,
            RopeScaling::Linear { factor } => inv_freq.f_div_scalar(*factor)?,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = *original_max_position_embeddings as f64;
                let wavelength = inv_freq.f_reciprocal()?.f_mul_scalar(2.0 * PI)?;
                let long = wavelength.f_gt(context / low_freq_factor)?;
                let short = wavelength.f_lt(context / high_freq_factor)?;
                let scaled = inv_freq.f_div_scalar(*factor)?.f_where_self(&long, &inv_freq)?;
                let smooth = wavelength
                    .f_reciprocal()?
                    .f_mul_scalar(context)?
                    .f_sub_scalar(*low_freq_factor)?
                    .f_div_scalar(high_freq_factor - low_freq_factor)?;
                let smoothed = (smooth.ones_like() - &smooth) * &scaled / *factor + &smooth * &scaled;
                scaled.f_where_self(&long.f_logical_or(&short)?, &smoothed)?
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings,
                ..
            } => {
                let dim = *rotary_dim as f64;
                let context = *original_max_position_embeddings as f64;
                // The dimension whose frequency turns this often within the original positions.
                let border = |turns: f64| dim * (context / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
                let (low, high) = (border(*beta_fast), border(*beta_slow));
                let (low, high) = match truncate {
                    true => (low.floor(), high.ceil()),
                    false => (low, high),
                };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let divided = Tensor::f_arange(rotary_dim / 2, (Kind::Float, Device::Cpu))?
                    .f_sub_scalar(low)?
                    .f_div_scalar(high - low)?
                    .f_clamp(0.0, 1.0)?;
                let kept = 1.0 - divided;
                let interpolated = wavelength_factor.f_mul_scalar(*factor)?.f_reciprocal()?;
                interpolated * (1.0 - &kept) + inv_freq * kept
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position_embeddings,
                ..
            } => {
                let factors = match max_positions > *original_max_position_embeddings {
                    true => long_factor,
                    false => short_factor,
                };
                if factors.len() as i64 != rotary_dim / 2 {
                    return Err(KernelError::Shape(format!(
                        "{} factors of longrope for the {} frequencies of rotary_dim {rotary_dim}",
                        factors.len(),
                        rotary_dim / 2
                    )));
                }
                let factors = Tensor::f_from_slice(factors)?.f_to_kind(Kind::Float)?;
                factors.f_mul(&wavelength_factor)?.f_reciprocal()?
            }
        })
    }

    /// What cosines and sines are multiplied by: scores of stretched models are sharpened by its square.
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
            RopeScaling::Yarn {
                factor,
                attention_factor,
                mscale,
                mscale_all_dim,
                ..
            } => {
                let sharpen = |mscale: f64| match *factor <= 1.0 {
                    true => 1.0,
                    false => 0.1 * mscale * factor.ln() + 1.0,
                };
                let nonzero = |mscale: &Option<f64>| mscale.filter(|mscale| *mscale != 0.0);
                match (attention_factor, nonzero(mscale), nonzero(mscale_all_dim)) {
                    (Some(given), _, _) => *given,
                    (None, Some(mscale), Some(all)) => sharpen(mscale) / sharpen(all),
                    (None, _, _) => sharpen(1.0),
                }
            }
            RopeScaling::LongRope {
                factor,
                attention_factor,
                original_max_position_embeddings,
                ..
            } => match attention_factor {
                Some(given) => *given,
                None if *factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / (*original_max_position_embeddings as f64).ln()).sqrt(),
            },
        }
    }
}

/// Cosines and sines of every position, for one spec and head dimension.
#[derive(Debug)]
pub struct Rope {
    /// [positions, rotary_dim] float32: cosines in the first half of the columns, sines in the second, both times the
    /// attention factor.
    table: Tensor,
    layout: RopeLayout,
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
            .f_mul(&spec.inv_freq(max_positions)?)?
            .f_to_kind(Kind::Double)?;
        let table = Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)?
            .f_mul_scalar(spec.attention_factor())?
            .f_to_kind(Kind::Float)?;
        Ok(Rope {
            table: table.f_to_device(device)?,
            layout: spec.layout,
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
    pub fn apply(&self, x: &Tensor, positions: &Ints) {
        self.turn(x, positions, Direction::Forward);
    }

    /// The gradient of [`Rope::apply`], in place: the gradient of what it gave becomes the gradient of what it was given.
    /// Each pair turns back and is multiplied by the attention factor once more, which is the transposed map and, with a
    /// factor other than 1, not the inverse.
    pub fn apply_backward(&self, gradient: &Tensor, positions: &Ints) {
        self.turn(gradient, positions, Direction::Backward);
    }

    /// For kernels that turn on their way.
    pub(crate) fn turns(&self) -> Turns<'_> {
        Turns {
            table: &self.table,
            half: self.table.size()[1] as usize / 2,
            interleaved: i32::from(self.layout == RopeLayout::Interleaved),
        }
    }

    /// Panics when [`Rope::apply`] would.
    pub(crate) fn check(&self, x: &Tensor, positions: &Ints) {
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
    }

    fn turn(&self, x: &Tensor, positions: &Ints, direction: Direction) {
        self.check(x, positions);
        let mut in_place = x.shallow_clone();
        let (Some(table), Some(rows)) = (vector(&self.table), RowsMut::of(&mut in_place)) else {
            return match gpu::of(x) {
                Some(gpu) => self.turn_gpu(gpu, x, positions, direction),
                None => self.turn_reference(x, positions, direction),
            };
        };
        let (rotary_dim, head_dim) = (self.table.size()[1] as usize, self.head_dim);
        let (layout, sign) = (self.layout, direction.sign());
        let positions: &[i64] = positions;
        in_chunks(rows.rows, rows.width, |range| {
            for row in range {
                let angles = &table[positions[row] as usize * rotary_dim..][..rotary_dim];
                let (cos, sin) = angles.split_at(rotary_dim / 2);
                // SAFETY: the row is this task's alone.
                for head in unsafe { rows.row(row) }.chunks_exact_mut(head_dim) {
                    let head = &mut head[..rotary_dim];
                    match layout {
                        RopeLayout::Half => turn_halves(head, cos, sin, sign),
                        RopeLayout::Interleaved => turn_pairs(head, cos, sin, sign),
                    }
                }
            }
        });
    }

    fn turn_gpu(&self, gpu: Gpu, x: &Tensor, positions: &Ints, direction: Direction) {
        let [rows, width] = x.size()[..] else {
            unreachable!("it was checked")
        };
        let [stride, step] = x.stride()[..] else {
            unreachable!("a matrix has two strides")
        };
        assert_eq!(step, 1, "x with gaps between its columns");
        let Turns {
            table,
            half,
            interleaved,
        } = self.turns();
        let heads = width as usize / self.head_dim;
        let positions = positions.on(x.device());
        let args = [
            x.into(),
            table.into(),
            (&positions).into(),
            stride.into(),
            gpu::int(heads),
            gpu::int(self.head_dim),
            gpu::int(half),
            interleaved.into(),
            direction.sign().into(),
        ];
        // A thread turns four pairs.
        let blocks = (heads * half.div_ceil(4)).div_ceil(256);
        gpu.launch("rope", [rows as usize, blocks, 1], 256, &args);
    }

    /// The same in plain tch, on any device.
    fn turn_reference(&self, x: &Tensor, positions: &Ints, direction: Direction) {
        let half = self.table.size()[1] / 2;
        let index = positions.on(self.table.device());
        let angles = self.table.index_select(0, &index).unsqueeze(1).to_kind(x.kind()); // [T, 1, R]
        let cos = angles.narrow(2, 0, half);
        let sin = angles.narrow(2, half, half) * f64::from(direction.sign());
        let heads = x.reshape([x.size()[0], -1, self.head_dim as i64]); // [T, heads, D]
        let turning = heads.narrow(2, 0, 2 * half);
        let rest = heads.narrow(2, 2 * half, self.head_dim as i64 - 2 * half);
        // Where the two of a pair stand: [T, heads, 2, half], or [T, heads, half, 2].
        let (shape, axis): ([i64; 2], i64) = match self.layout {
            RopeLayout::Half => ([2, half], 2),
            RopeLayout::Interleaved => ([half, 2], 3),
        };
        let pairs = turning.reshape([x.size()[0], -1, shape[0], shape[1]]);
        let (first, second) = (pairs.select(axis, 0), pairs.select(axis, 1));
        let turned = Tensor::stack(
            &[&first * &cos - &second * &sin, second * cos + first * sin],
            axis,
        );
        let turned = Tensor::cat(&[turned.reshape(turning.size()), rest], 2);
        x.shallow_clone().copy_(&turned.view([x.size()[0], -1]));
    }
}

/// What a kernel that turns is given.
pub(crate) struct Turns<'a> {
    /// [positions, 2 half]: cosines, then sines.
    pub table: &'a Tensor,
    pub half: usize,
    /// Whether pairs stand side by side.
    pub interleaved: i32,
}

#[derive(Clone, Copy)]
enum Direction {
    Forward,
    Backward,
}

impl Direction {
    fn sign(self) -> f32 {
        match self {
            Direction::Forward => 1.0,
            Direction::Backward => -1.0,
        }
    }
}

vectorised!(
    fn turn_halves(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let (first, second) = head.split_at_mut(cos.len());
        for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
            let (x, y, sin) = (*a, *b, sin * sign);
            *a = x * cos - y * sin;
            *b = y * cos + x * sin;
        }
    }
);

vectorised!(
    fn turn_pairs(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
        let (pairs, _) = head.as_chunks_mut::<2>();
        for ([a, b], (cos, sin)) in pairs.iter_mut().zip(cos.iter().zip(sin)) {
            let (x, y, sin) = (*a, *b, sin * sign);
            *a = x * cos - y * sin;
            *b = y * cos + x * sin;
        }
    }
);
