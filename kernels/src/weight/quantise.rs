//! Dense matrices into few bits, by the recipes a user names. Not here: formats that only checkpoints bring.

use half::f16;
use tch::{Device, Kind, Tensor};

use super::panels::readable;
use super::{Format, Grid, Quantised};
use crate::error::KernelError;
use crate::pool;
use crate::slice::Shared;

/// How a dense matrix is brought to few bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recipe {
    /// A scale per row, the largest magnitude being 127: 8 bits a number.
    Int8,
    /// Groups of 32 with a scale in half precision: 4.5 bits a number. (Groups of 128 would be 4.1 bits, and lose about
    /// twice as much in small models.)
    Int4,
    /// Groups of 64 with a scale in float32: 4.5 bits a number, the same codes and scales as bitsandbytes.
    Nf4,
}

impl Recipe {
    pub const ALL: [Recipe; 3] = [Recipe::Int8, Recipe::Int4, Recipe::Nf4];

    pub fn grid(self) -> Grid {
        match self {
            Recipe::Int8 => Grid::Int8,
            Recipe::Int4 => Grid::Int4,
            Recipe::Nf4 => Grid::Nf4,
        }
    }

    /// As users write it.
    pub fn name(self) -> &'static str {
        self.grid().name()
    }

    /// What share a scale, of rows of k.
    pub fn group(self, k: usize) -> usize {
        match self {
            Recipe::Int8 => k.max(1),
            Recipe::Int4 => 32,
            Recipe::Nf4 => 64,
        }
    }

    pub fn format(self) -> Format {
        let group = self.group(usize::MAX);
        Format::Quantised {
            grid: self.grid(),
            group: (group < usize::MAX).then_some(group),
            offsets: false,
        }
    }

    /// Of a matrix `[n, k]`, about.
    pub fn bytes(self, n: u64, k: u64) -> u64 {
        let groups = k.div_ceil(self.group(k as usize) as u64);
        let scale_bytes = match self {
            Recipe::Int4 => 2,
            Recipe::Int8 | Recipe::Nf4 => 4,
        };
        n * (k * self.grid().bits() as u64 / 8 + groups * scale_bytes)
    }

    /// `dense` `[N, K]` of any floating dtype.
    pub fn quantise(self, dense: &Tensor) -> Result<Quantised, KernelError> {
        let &[n, k] = dense.size().as_slice() else {
            return Err(KernelError::Shape(format!(
                "a weight has two dimensions, not {:?}",
                dense.size()
            )));
        };
        let dense = readable(dense)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        let group = self.group(k as usize);
        let groups = (k as usize).div_ceil(group);
        let codes = Tensor::f_empty([n, k], (Kind::Uint8, Device::Cpu))?;
        let scales = Tensor::f_empty([n, groups as i64], (Kind::Float, Device::Cpu))?;
        let (from, to, to_scales) = (
            Shared(dense.data_ptr() as *mut f32),
            Shared(codes.data_ptr() as *mut u8),
            Shared(scales.data_ptr() as *mut f32),
        );
        let k = k as usize;
        pool::for_each(n as usize, |row| {
            // SAFETY: row `row` of three contiguous CPU tensors that live through the job; the results' rows are this
            // task's alone.
            let (from, to, to_scales) = unsafe {
                (
                    std::slice::from_raw_parts(from.get().add(row * k), k),
                    std::slice::from_raw_parts_mut(to.get().add(row * k), k),
                    std::slice::from_raw_parts_mut(to_scales.get().add(row * groups), groups),
                )
            };
            let in_groups = from.chunks(group).zip(to.chunks_mut(group));
            for ((from, to), scale) in in_groups.zip(to_scales) {
                *scale = match self {
                    Recipe::Int8 => int8(from, to),
                    Recipe::Int4 => int4(from, to),
                    Recipe::Nf4 => nf4(from, to),
                };
            }
        });
        Ok(Quantised {
            grid: self.grid(),
            codes,
            group: group as i64,
            scales,
            offsets: None,
        })
    }
}

fn largest(numbers: &[f32]) -> f32 {
    numbers
        .iter()
        .fold(0.0, |most: f32, number| most.max(number.abs()))
}

fn int8(from: &[f32], to: &mut [u8]) -> f32 {
    let scale = match largest(from) / 127.0 {
        0.0 => 1.0,
        scale => scale,
    };
    for (from, to) in from.iter().zip(to) {
        *to = (from / scale).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
    }
    scale
}

/// Scales that are tried, as shares of the one that puts the number of largest magnitude on -8 (llama.cpp's Q4_0 takes that
/// one): one that cuts the largest numbers often loses less in all.
const INT4_SHARES: [f32; 7] = [1.0, 0.96, 0.92, 0.88, 0.84, 1.04, 1.08];

/// The scale, either way round, of the least squared error.
fn int4(from: &[f32], to: &mut [u8]) -> f32 {
    let largest = from.iter().fold(
        0.0,
        |most: f32, &number| if number.abs() > most.abs() { number } else { most },
    );
    if largest == 0.0 {
        to.fill(8);
        return 1.0;
    }
    let code = |number: f32, inverse: f32| (number * inverse).round_ties_even().clamp(-8.0, 7.0);
    let mut best = (f32::INFINITY, 1.0);
    for share in INT4_SHARES {
        let scale = f16::from_f32(largest / -8.0 * share).to_f32();
        if scale == 0.0 || !scale.is_finite() {
            continue;
        }
        let inverse = 1.0 / scale;
        let error = from.iter().map(|&number| {
            let off = number - code(number, inverse) * scale;
            off * off
        });
        let error: f32 = error.sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    let inverse = 1.0 / best.1;
    for (&from, to) in from.iter().zip(to) {
        *to = (code(from, inverse) + 8.0) as u8;
    }
    best.1
}

fn nf4(from: &[f32], to: &mut [u8]) -> f32 {
    let levels = Grid::Nf4.levels();
    let scale = match largest(from) {
        0.0 => 1.0,
        scale => scale,
    };
    let inverse = 1.0 / scale;
    for (from, to) in from.iter().zip(to) {
        let number = from * inverse;
        // The nearest level: how many middles between neighbours lie below.
        let below = levels
            .windows(2)
            .filter(|pair| number > (pair[0] + pair[1]) * 0.5);
        *to = below.count() as u8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors are at most half a step of the grid (of the scale that was chosen; int4 may cut the largest).
    #[test]
    fn errors_are_below_half_a_step() {
        for (n, k) in [(1, 1), (3, 70), (40, 256)] {
            let dense = Tensor::randn([n, k], (Kind::Float, Device::Cpu));
            for recipe in Recipe::ALL {
                let quantised = recipe.quantise(&dense).unwrap();
                quantised.check().unwrap();
                let error = (quantised.dense() - &dense).abs();
                let worst = error.max().double_value(&[]);
                // In standard deviations; a group's largest number is about 3 of them.
                let limit = match recipe {
                    Recipe::Int8 => 0.03,
                    Recipe::Int4 => 0.9,
                    Recipe::Nf4 => 0.8,
                };
                assert!(worst < limit, "{recipe:?} [{n}, {k}]: {worst}");
                let mean = error.mean(Kind::Float).double_value(&[]);
                let limit = match recipe {
                    Recipe::Int8 => 0.01,
                    Recipe::Int4 | Recipe::Nf4 => 0.1,
                };
                assert!(mean < limit, "{recipe:?} [{n}, {k}]: {mean} on average");
            }
        }
        for recipe in Recipe::ALL {
            let zero = recipe
                .quantise(&Tensor::zeros([2, 40], (Kind::Half, Device::Cpu)))
                .unwrap();
            assert_eq!(zero.dense().abs().max().double_value(&[]), 0.0, "{recipe:?}");
        }
    }
}
