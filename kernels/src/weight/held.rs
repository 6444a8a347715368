//! A quantised matrix where there are no panels: tensors on its device, four bits two to a byte. A product makes the dense
//! matrix of it anew each time, so it saves memory and no time.

use tch::{Device, Kind, Tensor};

use super::{Grid, Quantised};
use crate::error::KernelError;

pub(crate) struct Held {
    /// Codes of four bits: `[N, ceil(K / 2)]`, the even value of K in the low half.
    stored: Quantised,
    k: i64,
}

impl Held {
    /// `from` is checked.
    pub fn new(from: &Quantised, device: Device) -> Result<Held, KernelError> {
        let codes = match from.grid.bits() {
            4 => {
                let even = from.codes.f_constant_pad_nd([0, from.k() % 2])?;
                let pairs = even.f_view([from.n(), -1, 2])?;
                let (low, high) = (pairs.f_select(2, 0)?, pairs.f_select(2, 1)?);
                high.f_bitwise_left_shift_tensor_scalar(4)?
                    .f_bitwise_or_tensor(&low)?
            }
            _ => from.codes.f_contiguous()?,
        };
        // A copy in any case, so that nothing else refers to it.
        let held = |tensor: &Tensor| Ok::<_, KernelError>(tensor.f_to_device(device)?.f_clone(tensor)?);
        Ok(Held {
            k: from.k(),
            stored: Quantised {
                grid: from.grid,
                codes: held(&codes)?,
                group: from.group,
                scales: held(&from.scales)?,
                offsets: from.offsets.as_ref().map(held).transpose()?,
            },
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
        let codes = match stored.grid.bits() {
            4 => {
                let (low, high) = (
                    stored.codes.bitwise_and(15),
                    stored.codes.bitwise_right_shift_tensor_scalar(4),
                );
                let pairs = Tensor::stack(&[low, high], 2).view([stored.codes.size()[0], -1]);
                pairs.narrow(1, 0, self.k)
            }
            _ => stored.codes.shallow_clone(),
        };
        Quantised {
            codes,
            scales: stored.scales.shallow_clone(),
            offsets: stored.offsets.as_ref().map(Tensor::shallow_clone),
            ..*stored
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Precision, Store, Weight};
    use super::*;

    /// On another device a weight stands for the same numbers.
    #[test]
    fn held_tensors_are_the_same_numbers() {
        for grid in Grid::ALL {
            for (n, k, group) in [(3, 7, 7), (10, 33, 4), (2, 64, 32)] {
                let from = super::super::quantised::example(grid, n, k, group, true);
                let store = Store::Held(Held::new(&from, Device::Cpu).unwrap());
                let (n, k) = (n as usize, k as usize);
                let (precision, device) = (Precision::Bf16, Device::Cpu);
                let w = Weight {
                    n,
                    k,
                    precision,
                    device,
                    store,
                };
                assert!(w.dense().equal(&from.dense()), "{grid:?}");
                let rows = from.dense().index_select(0, &Tensor::from_slice(&[1_i64, 0, 1]));
                assert!(w.gather(&[1, 0, 1]).equal(&rows), "{grid:?}");
                let x = Tensor::randn([4, k as i64], (Kind::Float, Device::Cpu));
                let slow = super::super::product(&x, &from.dense().to_kind(Kind::BFloat16).tr(), precision);
                assert!(crate::linear::linear(&x, &w, None, &[]).equal(&slow), "{grid:?}");
            }
        }
    }
}
