//! A quantised matrix where there are no panels: codes in the pieces that kernels of a device read (`kernels/gpu/dequant.cu`),
//! which multiply few rows with them and make bfloat16 of them for many; elsewhere tensor ops unpack them, anew each time.

use tch::{Device, Kind, Tensor};

use super::{Grid, Quantised};
use crate::error::KernelError;
use crate::gpu::{Arg, Gpu, deterministic, int};

/// Bytes of a piece: neighbours along K of one row.
const PIECE: i64 = 64;
/// Rows of x that one reading of the codes serves.
const FEW_ROWS: i64 = 16;

pub(crate) struct Held {
    /// Codes: `[N, pieces * 64]`, see [`laid`].
    stored: Quantised,
    k: i64,
    /// `[16]` or `[256]` float32 on the device.
    levels: Tensor,
}

/// Values of K in a piece.
fn span(grid: Grid) -> i64 {
    PIECE * 8 / grid.bits() as i64
}

/// `[N, K]` a code a byte -> `[N, pieces * 64]`. A piece has four units of 16 bytes; of each tile of sixteen neighbours, unit q
/// has the values 4 q to 4 q + 3, tile after tile. Of two codes in a byte the first is in the low half; beyond K they are 0.
fn laid(codes: &Tensor, grid: Grid) -> Result<Tensor, KernelError> {
    let (n, k, span) = (codes.size()[0], codes.size()[1], span(grid));
    let padded = codes.f_constant_pad_nd([0, (span - k % span) % span])?;
    let units = padded
        .f_view([n, -1, span / 16, 4, 4])?
        .f_permute([0, 1, 3, 2, 4])?;
    let bytes = match grid.bits() {
        4 => {
            let pairs = units.f_reshape([n, -1, 2])?;
            let (low, high) = (pairs.f_select(2, 0)?, pairs.f_select(2, 1)?);
            high.f_bitwise_left_shift_tensor_scalar(4)?
                .f_bitwise_or_tensor(&low)?
        }
        _ => units.f_contiguous()?,
    };
    Ok(bytes.f_reshape([n, -1])?)
}

/// The inverse of [`laid`], of any number of rows.
fn unlaid(bytes: &Tensor, grid: Grid, k: i64) -> Tensor {
    let n = bytes.size()[0];
    let codes = match grid.bits() {
        4 => {
            let low = bytes.bitwise_and(15);
            let high = bytes.bitwise_right_shift_tensor_scalar(4);
            Tensor::stack(&[low, high], 2)
        }
        _ => bytes.shallow_clone(),
    };
    let units = codes
        .reshape([n, -1, 4, span(grid) / 16, 4])
        .permute([0, 1, 3, 2, 4]);
    units.reshape([n, -1]).narrow(1, 0, k)
}

impl Held {
    /// `from` is checked.
    pub fn new(from: &Quantised, device: Device) -> Result<Held, KernelError> {
        // A copy in any case, so that nothing else refers to it.
        let held = |tensor: &Tensor| {
            let there = tensor.f_to_device(device)?;
            Ok::<_, KernelError>(there.f_contiguous()?.f_clone(tensor)?)
        };
        Ok(Held {
            k: from.k(),
            stored: Quantised {
                grid: from.grid,
                codes: held(&laid(&from.codes, from.grid)?)?,
                group: from.group,
                scales: held(&from.scales)?,
                offsets: from.offsets.as_ref().map(held).transpose()?,
            },
            levels: Tensor::from_slice(from.grid.levels()).f_to_device(device)?,
        })
    }

    pub fn bytes(&self) -> usize {
        let Quantised {
            codes,
            scales,
            offsets,
            ..
        } = &self.stored;
        let offsets = offsets.as_ref().map_or(0, Tensor::numel);
        codes.numel() + (scales.numel() + offsets) * Kind::Float.elt_size_in_bytes()
    }

    /// The memory that it lies in: codes, scales, offsets.
    pub fn buffers(&self) -> Vec<Tensor> {
        let Quantised {
            codes,
            scales,
            offsets,
            ..
        } = &self.stored;
        let tensors = [codes, scales].into_iter().chain(offsets);
        tensors.map(Tensor::shallow_clone).collect()
    }

    /// The same with buffers of these shapes, whose numbers mean nothing.
    pub fn sized(&self, shapes: &[Vec<i64>]) -> Held {
        let sized = |tensor: &Tensor, shape: &Vec<i64>| {
            Tensor::empty(shape.as_slice(), (tensor.kind(), tensor.device()))
        };
        let Quantised {
            grid,
            codes,
            group,
            scales,
            offsets,
        } = &self.stored;
        Held {
            k: self.k,
            stored: Quantised {
                grid: *grid,
                codes: sized(codes, &shapes[0]),
                group: *group,
                scales: sized(scales, &shapes[1]),
                offsets: offsets.as_ref().map(|offsets| sized(offsets, &shapes[2])),
            },
            levels: self.levels.shallow_clone(),
        }
    }

    /// Grid, group and whether there are offsets.
    pub fn format(&self) -> (Grid, usize, bool) {
        let Quantised {
            grid, group, offsets, ..
        } = &self.stored;
        (*grid, *group as usize, offsets.is_some())
    }

    /// `[N, K]` float32 on the device.
    pub fn dense(&self) -> Tensor {
        self.unpacked(&self.stored).dense()
    }

    /// Rows `[T, K]` float32 of an index on the device.
    pub fn gather(&self, rows: &Tensor) -> Tensor {
        let pick = |tensor: &Tensor| tensor.index_select(0, rows);
        self.unpacked(&Quantised {
            codes: pick(&self.stored.codes),
            scales: pick(&self.stored.scales),
            offsets: self.stored.offsets.as_ref().map(pick),
            ..self.stored
        })
        .dense()
    }

    /// With a code a byte.
    fn unpacked(&self, stored: &Quantised) -> Quantised {
        Quantised {
            codes: unlaid(&stored.codes, stored.grid, self.k),
            scales: stored.scales.shallow_clone(),
            offsets: stored.offsets.as_ref().map(Tensor::shallow_clone),
            ..*stored
        }
    }

    /// `y [T, N] = x Wt + bias + around` where x is rounded to bfloat16, by a kernel that reads codes: for few rows, or where a
    /// row's bits must not depend on how many there are. False where it is not for that kernel: nothing was computed.
    pub fn forward_on(
        &self,
        gpu: Gpu,
        x: &Tensor,
        bias: Option<&Tensor>,
        around: Option<&Tensor>,
        y: &Tensor,
    ) -> bool {
        let Quantised { grid, group, .. } = self.stored;
        let (rows, n) = (x.size()[0], self.stored.codes.size()[0]);
        let in_rows = |x: &Tensor| x.kind() == Kind::Float && (x.stride()[1] == 1 || x.size()[1] == 1);
        let alike = around.is_none_or(|around| in_rows(around) && around.stride()[0] == y.stride()[0]);
        let few = rows <= FEW_ROWS || deterministic();
        let whole_tiles = group % 16 == 0 || group >= self.k;
        if !few || !alike || !in_rows(y) || self.k % 4 != 0 || !whole_tiles {
            return false;
        }
        // Sixteen bytes are read at a time.
        let aligned = in_rows(x) && x.stride()[0] % 4 == 0 && (x.data_ptr() as usize).is_multiple_of(16);
        let x = if aligned {
            x.shallow_clone()
        } else {
            x.contiguous().copy()
        };
        let args = [
            (&x).into(),
            Arg::Long(x.stride()[0]),
            (&self.stored.codes).into(),
            (&self.levels).into(),
            (&self.stored.scales).into(),
            self.stored.offsets.as_ref().into(),
            bias.into(),
            around.into(),
            y.into(),
            Arg::Long(y.stride()[0]),
            int(rows),
            int(n),
            int(self.k),
            int(self.stored.codes.size()[1]),
            int(group.min(self.k)),
            int(self.stored.groups_of(self.k)),
        ];
        let name = if grid.bits() == 4 {
            "few_rows_4"
        } else {
            "few_rows_8"
        };
        let tiles = |n: i64| (n as usize).div_ceil(16);
        gpu.launch(name, [tiles(n), tiles(rows), 1], 256, &args);
        true
    }

    /// `[N, K]` bfloat16, of numbers rounded as [`Held::dense`]'s are to it.
    pub fn rounded_on(&self, gpu: Gpu) -> Tensor {
        const COLUMNS: usize = 2048;
        let Quantised { grid, group, .. } = self.stored;
        let n = self.stored.codes.size()[0];
        let to = Tensor::empty([n, self.k], (Kind::BFloat16, self.levels.device()));
        let args = [
            (&self.stored.codes).into(),
            (&self.levels).into(),
            (&self.stored.scales).into(),
            self.stored.offsets.as_ref().into(),
            (&to).into(),
            int(self.k),
            int(self.stored.codes.size()[1]),
            int(group.min(self.k)),
            int(self.stored.groups_of(self.k)),
        ];
        let name = if grid.bits() == 4 {
            "dequantise_4"
        } else {
            "dequantise_8"
        };
        gpu.launch(
            name,
            [n as usize, (self.k as usize).div_ceil(COLUMNS), 1],
            256,
            &args,
        );
        to
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Precision, Store, Weight};
    use super::*;
    use crate::gpu::{Lanes, counted, emulated, everywhere};

    fn weight(from: &Quantised) -> Weight {
        Weight {
            n: from.n() as usize,
            k: from.k() as usize,
            precision: Precision::Bf16,
            device: Device::Cpu,
            store: Store::Held(Held::new(from, Device::Cpu).unwrap()),
        }
    }

    /// On another device a weight stands for the same numbers.
    #[test]
    fn held_tensors_are_the_same_numbers() {
        everywhere(|| {
            for grid in Grid::ALL {
                for (n, k, group) in [(3, 7, 7), (10, 33, 4), (2, 64, 32), (5, 300, 128)] {
                    let from = super::super::quantised::example(grid, n, k, group, true);
                    let w = weight(&from);
                    assert!(w.dense().equal(&from.dense()), "{grid:?}");
                    let rows = from.dense().index_select(0, &Tensor::from_slice(&[1_i64, 0, 1]));
                    assert!(w.gather(&[1, 0, 1]).equal(&rows), "{grid:?}");
                    assert!(w.plain().equal(&from.dense().to_kind(Kind::BFloat16)), "{grid:?}");
                }
            }
        });
    }

    /// Where there are no kernels, products are those with the dense matrix in bfloat16.
    #[test]
    fn without_kernels_the_dense_matrix_multiplies() {
        for grid in Grid::ALL {
            let from = super::super::quantised::example(grid, 10, 64, 32, true);
            let x = Tensor::randn([4, 64], (Kind::Float, Device::Cpu));
            let dense = from.dense().to_kind(Kind::BFloat16);
            let slow = super::super::product(&x, &dense.tr(), Precision::Bf16);
            let fast = crate::linear::linear(&x, &weight(&from), None, &[]);
            assert!(fast.equal(&slow), "{grid:?}");
        }
    }

    /// int8 by rows and Q8_0, Q6_K, int4 and Q4_0, Q4_K, nf4, MXFP4 and fp8 of blocks, and shapes that kernels leave to tensor ops: x and
    /// levels in bfloat16, scales on sums; a row has the same bits alone and among others; both ways.
    #[test]
    fn kernels_multiply_as_the_formats_say() {
        let float = (Kind::Float, Device::Cpu);
        for (grid, n, k, group, offsets) in [
            (Grid::Int8, 40, 200, 200, false),
            (Grid::Int8, 33, 96, 32, false),
            (Grid::Int8, 33, 256, 16, false),
            (Grid::Int4, 50, 160, 32, false),
            (Grid::Int4, 17, 256, 32, true),
            (Grid::Nf4, 16, 192, 64, false),
            (Grid::Fp4, 16, 64, 32, false),
            (Grid::Fp8, 20, 256, 128, false),
            (Grid::Int4, 12, 40, 4, true),
            (Grid::Int8, 12, 33, 33, true),
        ] {
            let from = super::super::quantised::example(grid, n, k, group, offsets);
            let levels: Vec<f32> = grid
                .bf16_levels()
                .iter()
                .map(|&bits| half::bf16::from_bits(bits).to_f32())
                .collect();
            let want_w = from
                .with_levels(&Tensor::from_slice(&levels))
                .to_kind(Kind::Double);
            let wide = Tensor::randn([20, k + 3], float);
            let (x, bias) = (wide.narrow(1, 1, k), Tensor::randn([n], float));
            let want = x.to_kind(Kind::BFloat16).to_kind(Kind::Double).mm(&want_w.tr()) + &bias;
            let dy = Tensor::randn([20, n], float);
            let want_back = dy
                .to_kind(Kind::BFloat16)
                .to_kind(Kind::Double)
                .mm(&from.dense().to_kind(Kind::BFloat16).to_kind(Kind::Double));
            let off =
                |got: &Tensor, want: &Tensor| ((got - want).abs().max() / want.abs().max()).double_value(&[]);
            // Those of tensor ops round the whole number to bfloat16.
            let takes = k % 4 == 0 && (group % 16 == 0 || group == k);
            let bar = if takes { 1e-6 } else { 1e-2 };
            for lanes in Lanes::ALL {
                emulated(lanes, || {
                    let w = weight(&from);
                    let (y, launches) = counted(|| crate::linear::linear(&x, &w, Some(&bias), &[]));
                    let what = format!("{grid:?} [{n}, {k}] in groups of {group}, {lanes}");
                    assert!(off(&y, &want) < bar, "{what}: {}", off(&y, &want));
                    let read = launches.keys().any(|name| name.starts_with("few_rows"));
                    assert_eq!(read, takes, "{what}: {launches:?}");
                    if takes {
                        let alone = crate::linear::linear(&x.narrow(0, 7, 1), &w, Some(&bias), &[]);
                        assert!(alone.equal(&y.narrow(0, 7, 1)), "{what}: a row alone");
                    }
                    let back = crate::linear::linear_backward(&dy, &w);
                    assert!(
                        off(&back, &want_back) < 1e-5,
                        "{what}: {}",
                        off(&back, &want_back)
                    );
                });
            }
        }
    }
}
