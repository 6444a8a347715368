//! A matrix in few bits as tensors: what a checkpoint's reader or a quantiser hands to [`super::Weight`]. Not here: how
//! codes lie beside the kernels (`packed`), which checkpoint holds what.

use std::ops::Range;

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::error::KernelError;

/// What a code stands for before it is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Grid {
    /// 4 bits, `code - 8`.
    Int4,
    /// 4 bits, the 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal distribution.
    Nf4,
    /// 4 bits, E2M1 of the OCP microscaling formats: sign, two bits of exponent, one of fraction.
    Fp4,
    /// 8 bits, two's complement.
    Int8,
    /// 8 bits, E4M3 without infinities (arXiv 2209.05433). 0x7f and 0xff are no numbers: readers refuse them.
    Fp8,
}

impl Grid {
    pub const ALL: [Grid; 5] = [Grid::Int4, Grid::Nf4, Grid::Fp4, Grid::Int8, Grid::Fp8];

    pub fn bits(self) -> usize {
        match self {
            Grid::Int4 | Grid::Nf4 | Grid::Fp4 => 4,
            Grid::Int8 | Grid::Fp8 => 8,
        }
    }

    /// By code. In bfloat16 all but NF4's are exact.
    pub fn levels(self) -> &'static [f32] {
        match self {
            Grid::Int4 => &INT4,
            Grid::Nf4 => &NF4,
            Grid::Fp4 => &FP4,
            Grid::Int8 => &INT8,
            Grid::Fp8 => &FP8,
        }
    }

    /// By code, the bits of bfloat16.
    pub(crate) fn bf16_levels(self) -> &'static [u16] {
        const INT4_BITS: [u16; 16] = rounded(&INT4);
        const NF4_BITS: [u16; 16] = rounded(&NF4);
        const FP4_BITS: [u16; 16] = rounded(&FP4);
        const INT8_BITS: [u16; 256] = rounded(&INT8);
        const FP8_BITS: [u16; 256] = rounded(&FP8);
        match self {
            Grid::Int4 => &INT4_BITS,
            Grid::Nf4 => &NF4_BITS,
            Grid::Fp4 => &FP4_BITS,
            Grid::Int8 => &INT8_BITS,
            Grid::Fp8 => &FP8_BITS,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Grid::Int4 => "int4",
            Grid::Nf4 => "nf4",
            Grid::Fp4 => "fp4",
            Grid::Int8 => "int8",
            Grid::Fp8 => "fp8",
        }
    }
}

const INT4: [f32; 16] = {
    let mut levels = [0.0; 16];
    let mut code = 0;
    while code < 16 {
        levels[code] = code as f32 - 8.0;
        code += 1;
    }
    levels
};

#[allow(clippy::excessive_precision)] // As bitsandbytes prints them.
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

const FP4: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

const INT8: [f32; 256] = {
    let mut levels = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        levels[code] = code as u8 as i8 as f32;
        code += 1;
    }
    levels
};

const FP8: [f32; 256] = {
    let mut levels = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, fraction) = (code as u32 >> 3 & 15, code as u32 & 7);
        // Subnormal below 2^-6, in steps of 2^-9.
        let magnitude = match exponent {
            0 => fraction as f32 * f32::from_bits((127 - 9) << 23),
            _ => (8 + fraction) as f32 * f32::from_bits((exponent + 127 - 10) << 23),
        };
        levels[code] = if code & 0x80 == 0 { magnitude } else { -magnitude };
        code += 1;
    }
    levels
};

const fn rounded<const N: usize>(levels: &[f32; N]) -> [u16; N] {
    let mut bits = [0; N];
    let mut code = 0;
    while code < N {
        bits[code] = bf16::from_f32_const(levels[code]).to_bits();
        code += 1;
    }
    bits
}

/// W `[N, K]` with `w[n][k] = level(codes[n][k]) * scales[n][k / group] + offsets[n][k / group]`, on the CPU. What a
/// weight of any quantised checkpoint is brought to; the sum and the product are those of float32.
///
/// A zero point is an offset: integers `(q - z) * s` are the code q with the offset `(8 - z) * s` in [`Grid::Int4`], which
/// is exact for a scale of half precision.
#[derive(Debug)]
pub struct Quantised {
    pub grid: Grid,
    /// `[N, K]` uint8, a code a byte.
    pub codes: Tensor,
    /// Neighbours along K that share a scale: K, or a multiple of 4 (the last group may be shorter).
    pub group: i64,
    /// `[N, ceil(K / group)]` float32.
    pub scales: Tensor,
    pub offsets: Option<Tensor>,
}

impl Quantised {
    pub fn n(&self) -> i64 {
        self.codes.size()[0]
    }

    pub fn k(&self) -> i64 {
        self.codes.size()[1]
    }

    /// Groups along K.
    pub fn groups(&self) -> i64 {
        self.groups_of(self.k())
    }

    /// Those of a K of its own, where codes do not lie one a byte.
    pub(super) fn groups_of(&self, k: i64) -> i64 {
        k.div_ceil_of(self.group)
    }

    /// That it is what the kernels read, or what is wrong.
    pub fn check(&self) -> Result<(), KernelError> {
        let Quantised {
            grid,
            codes,
            group,
            scales,
            offsets,
        } = self;
        let wrong = |what: String| Err(KernelError::Shape(format!("a quantised weight: {what}")));
        let &[n, k] = codes.size().as_slice() else {
            return wrong(format!("codes have two dimensions, not {:?}", codes.size()));
        };
        if codes.kind() != Kind::Uint8 || codes.device() != Device::Cpu {
            return wrong(format!(
                "codes are bytes on the CPU, not {:?} on {:?}",
                codes.kind(),
                codes.device()
            ));
        }
        if *group < 1 || (*group < k && group % 4 != 0) {
            return wrong(format!("a group of {group} values of {k} is no multiple of 4"));
        }
        for (name, tensor) in [("scales", Some(scales)), ("offsets", offsets.as_ref())] {
            let Some(tensor) = tensor else { continue };
            if tensor.size() != [n, self.groups()] || tensor.kind() != Kind::Float {
                let (kind, size) = (tensor.kind(), tensor.size());
                return wrong(format!(
                    "{name} of [{n}, {}] float32 are wanted, not {size:?} {kind:?}",
                    self.groups()
                ));
            }
        }
        if grid.bits() < 8 && codes.numel() > 0 && i64::try_from(codes.max())? >= 1 << grid.bits() {
            return wrong(format!("a code is larger than {} bits", grid.bits()));
        }
        Ok(())
    }

    /// What it stands for, `[N, K]` float32.
    pub fn dense(&self) -> Tensor {
        self.with_levels(&Tensor::from_slice(self.grid.levels()))
    }

    /// As [`Quantised::dense`] with other levels, on the tensors' own device.
    pub(crate) fn with_levels(&self, levels: &Tensor) -> Tensor {
        let (n, k) = (self.n(), self.k());
        let levels = levels.to_device(self.codes.device());
        let codes = self.codes.to_kind(Kind::Int).view([-1]);
        let spread = |numbers: &Tensor| {
            let spread = numbers.repeat_interleave_self_int(self.group.min(k.max(1)), 1, None);
            spread.narrow(1, 0, k)
        };
        let mut dense = levels.index_select(0, &codes).view([n, k]) * spread(&self.scales);
        if let Some(offsets) = &self.offsets {
            dense += spread(offsets);
        }
        dense
    }

    /// Some of the rows.
    pub fn rows(&self, rows: Range<i64>) -> Quantised {
        let narrow = |tensor: &Tensor| tensor.narrow(0, rows.start, rows.end - rows.start);
        Quantised {
            codes: narrow(&self.codes),
            scales: narrow(&self.scales),
            offsets: self.offsets.as_ref().map(narrow),
            ..*self
        }
    }

    /// Some of the columns, the same numbers. Where they begin or end inside a group, groups become smaller. `None` where
    /// they would have to be smaller than 4.
    pub fn columns(&self, columns: Range<i64>) -> Option<Quantised> {
        let k = columns.end - columns.start;
        let mut group = self.group.min(self.k());
        if columns.start % group != 0 {
            group = common_divisor(group, columns.start);
            if group % 4 != 0 {
                return None;
            }
        }
        let whole = self.regrouped(group)?;
        let first = columns.start / group;
        let n_groups = k.div_ceil_of(group);
        let narrow = |tensor: &Tensor| tensor.narrow(1, first, n_groups);
        Some(Quantised {
            grid: self.grid,
            codes: self.codes.narrow(1, columns.start, k),
            group: group.min(k.max(1)),
            scales: narrow(&whole.scales),
            offsets: whole.offsets.as_ref().map(narrow),
        })
    }

    /// The same numbers in groups of `group`, which divides the present ones.
    fn regrouped(&self, group: i64) -> Option<Quantised> {
        let whole = self.group.min(self.k());
        if whole % group != 0 {
            return None;
        }
        let n_groups = self.k().div_ceil_of(group);
        let repeat = |numbers: &Tensor| {
            let repeated = numbers.repeat_interleave_self_int(whole / group, 1, None);
            repeated.narrow(1, 0, n_groups)
        };
        Some(Quantised {
            grid: self.grid,
            codes: self.codes.shallow_clone(),
            group,
            scales: repeat(&self.scales),
            offsets: self.offsets.as_ref().map(repeat),
        })
    }

    /// Matrices over the same K one under the other, the same numbers: parts that a fused product reads as one. Where they
    /// differ in groups, the smallest common ones are taken; integers of 4 bits beside integers of 8 become 8. `None`
    /// where no format holds them all.
    pub fn cat(parts: &[&Quantised]) -> Option<Quantised> {
        let (&first, rest) = parts.split_first()?;
        if rest.is_empty() {
            return first.regrouped(first.group.min(first.k()).max(1));
        }
        let k = first.k();
        let grid = match parts.iter().all(|part| part.grid == first.grid) {
            true => first.grid,
            false
                if parts
                    .iter()
                    .all(|part| matches!(part.grid, Grid::Int4 | Grid::Int8)) =>
            {
                Grid::Int8
            }
            false => return None,
        };
        let group = parts
            .iter()
            .map(|part| part.group.min(k))
            .reduce(common_divisor)?;
        if group < k && group % 4 != 0 {
            return None;
        }
        let parts: Option<Vec<Quantised>> = parts
            .iter()
            .map(|part| part.regrouped(group).map(|part| part.widened(grid)))
            .collect();
        let parts = parts?;
        let stack =
            |of: &dyn Fn(&Quantised) -> Tensor| Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0);
        let offset = |part: &Quantised| match &part.offsets {
            Some(offsets) => offsets.shallow_clone(),
            None => part.scales.zeros_like(),
        };
        Some(Quantised {
            grid,
            codes: stack(&|part| part.codes.shallow_clone()),
            group,
            scales: stack(&|part| part.scales.shallow_clone()),
            offsets: parts
                .iter()
                .any(|part| part.offsets.is_some())
                .then(|| stack(&offset)),
        })
    }

    /// Integers of 4 bits as integers of 8.
    fn widened(self, grid: Grid) -> Quantised {
        match (self.grid, grid) {
            (Grid::Int4, Grid::Int8) => Quantised {
                grid,
                // In bytes, 8 less is 248 more.
                codes: self.codes + 248_i64,
                ..self
            },
            _ => self,
        }
    }
}

fn common_divisor(a: i64, b: i64) -> i64 {
    match b {
        0 => a,
        _ => common_divisor(b, a % b),
    }
}

trait DivCeil {
    fn div_ceil_of(self, by: i64) -> i64;
}

impl DivCeil for i64 {
    /// (`i64::div_ceil` is not stable.)
    fn div_ceil_of(self, by: i64) -> i64 {
        (self + by - 1) / by
    }
}

/// Random codes and scales.
#[cfg(test)]
pub(crate) fn example(grid: Grid, n: i64, k: i64, group: i64, offsets: bool) -> Quantised {
    let groups = k.div_ceil_of(group);
    let codes = Tensor::randint(1 << grid.bits(), [n, k], (Kind::Uint8, Device::Cpu));
    // The codes of E4M3 that are no numbers.
    let codes = match grid {
        Grid::Fp8 => codes.where_self(&codes.bitwise_and(0x7f).ne(0x7f), &codes.zeros_like()),
        _ => codes,
    };
    let numbers = || Tensor::rand([n, groups], (Kind::Float, Device::Cpu)) + 0.5;
    Quantised {
        grid,
        codes,
        group,
        scales: numbers(),
        offsets: offsets.then(|| numbers() - 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_the_formats() {
        assert_eq!(Grid::Int4.levels()[..2], [-8.0, -7.0]);
        assert_eq!(Grid::Int8.levels()[0xff], -1.0);
        // 2^-9, the largest, the smallest normal and a negative.
        let fp8 = Grid::Fp8.levels();
        assert_eq!(
            [fp8[1], fp8[0x7e], fp8[8], fp8[0xb8]],
            [0.001953125, 448.0, 0.015625, -1.0]
        );
        for grid in Grid::ALL {
            assert_eq!(grid.levels().len(), 1 << grid.bits());
            let exact = |(level, bits): (&f32, &u16)| bf16::from_bits(*bits).to_f32() == *level;
            let all = grid.levels().iter().zip(grid.bf16_levels()).all(exact);
            assert_eq!(all, grid != Grid::Nf4, "{grid:?}");
        }
    }

    /// Parts, and parts put together, are the parts of what they stand for.
    #[test]
    fn parts_keep_their_numbers() {
        let whole = example(Grid::Int4, 6, 96, 32, true);
        whole.check().unwrap();
        for (columns, group) in [(0..96, 32), (32..96, 32), (16..80, 16), (64..96, 32), (4..90, 4)] {
            let part = whole.columns(columns.clone()).expect("groups of 4 and more");
            part.check().unwrap();
            assert_eq!(part.group, group.min(columns.end - columns.start), "{columns:?}");
            let (start, width) = (columns.start, columns.end - columns.start);
            assert!(
                part.dense().equal(&whole.dense().narrow(1, start, width)),
                "{columns:?}"
            );
        }
        assert!(whole.columns(2..96).is_none());
        assert!(whole.rows(1..4).dense().equal(&whole.dense().narrow(0, 1, 3)));
        let others = [
            (Grid::Int4, 64, false, Some((Grid::Int4, 32))),
            (Grid::Int4, 96, false, Some((Grid::Int4, 32))),
            (Grid::Int8, 16, true, Some((Grid::Int8, 16))),
            (Grid::Nf4, 32, false, None),
        ];
        for (grid, group, offsets, expected) in others {
            let other = example(grid, 5, 96, group, offsets);
            let dense = Tensor::cat(&[whole.dense(), other.dense()], 0);
            let both = Quantised::cat(&[&whole, &other]);
            assert_eq!(both.as_ref().map(|both| (both.grid, both.group)), expected);
            if let Some(both) = both {
                both.check().unwrap();
                assert!(both.dense().equal(&dense), "{grid:?} {group}");
            }
        }
    }
}
