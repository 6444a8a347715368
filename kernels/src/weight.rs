//! A frozen matrix as the kernels want it: packed once, the only resident copy. Not a layer, and nothing autograd sees:
//! `linear` multiplies with it and, transposing blocks on the way, takes gradients through it.
//!
//! How its bytes lie is its [`Format`]; what a multiply rounds its left side to is a [`Precision`]. A dense weight is stored
//! in the precision it is multiplied in; a quantised one is multiplied in either.

mod held;
pub(crate) mod packed;
mod panels;
mod quantise;
mod quantised;
mod shard;

use std::fmt;
use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use crate::error::KernelError;
use crate::gpu::{self, Gpu, gemm};
use crate::matmul::gemm::Right;
use crate::simd::{self, Element, PANEL};
use crate::slice::{Pages, Plain, Stay};
use held::Held;
use packed::Packed;
use panels::{gather, pack, readable, unpack};
pub use quantise::Recipe;
pub use quantised::{Grid, Quantised};
pub use shard::Shard;

/// What a multiply rounds its left side to (and what the KV cache stores). Sums are float32 with either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    F32,
    Bf16,
}

impl Precision {
    pub fn kind(self) -> Kind {
        match self {
            Precision::F32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        }
    }

    pub fn value_bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

/// How the numbers of a weight are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    F32,
    Bf16,
    Quantised {
        grid: Grid,
        /// Values of K that share a scale; `None`: all of a row.
        group: Option<usize>,
        /// Whether groups have an offset beside their scale.
        offsets: bool,
    },
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Format::Quantised { grid, group, offsets } = self else {
            return f.write_str(match self {
                Format::F32 => "float32",
                _ => "bfloat16",
            });
        };
        match group {
            Some(group) => write!(f, "{} in groups of {group}", grid.name())?,
            None => write!(f, "{} by rows", grid.name())?,
        }
        f.write_str(if *offsets { " with offsets" } else { "" })
    }
}

/// W `[N, K]` of y = x Wt. On a CPU with fast paths: `ceil(N / 32)` panels of 32 output columns (the layout is in
/// `simd`), N padded with zero columns, an odd K with a zero. Elsewhere: a tensor `[N, K]` of the precision's dtype.
pub struct Weight {
    n: usize,
    k: usize,
    precision: Precision,
    device: Device,
    store: Store,
}

pub(crate) enum Store {
    F32(Pages<f32>),
    Bf16(Pages<u16>),
    Plain(Tensor),
    Packed(Packed),
    Held(Held),
}

/// The element type of products in a precision.
pub(crate) trait Multiplied: Element + Plain {
    const PRECISION: Precision;
    /// The panels of a dense weight.
    fn panels(store: &Store) -> Option<&[Self]>;
}

impl Multiplied for f32 {
    const PRECISION: Precision = Precision::F32;

    fn panels(store: &Store) -> Option<&[f32]> {
        match store {
            Store::F32(panels) => Some(panels),
            _ => None,
        }
    }
}

impl Multiplied for u16 {
    const PRECISION: Precision = Precision::Bf16;

    fn panels(store: &Store) -> Option<&[u16]> {
        match store {
            Store::Bf16(panels) => Some(panels),
            _ => None,
        }
    }
}

// SAFETY: plain and held tensors are the fields that are not Sync by themselves. They are private, not views of anything,
// not part of any graph, and change only through `&mut self`; libtorch allows concurrent reads of such tensors.
unsafe impl Sync for Weight {}

impl Weight {
    /// Takes `[N, K]` of any floating dtype on any device; rounds to `precision` (exact where the dtype is the same).
    pub fn new(dense: &Tensor, precision: Precision, device: Device) -> Result<Weight, KernelError> {
        Weight::placed(dense, precision, device, Stay::Long)
    }

    /// As [`Weight::new`], for an adapter: its memory is its own and goes with it.
    pub fn passing(dense: &Tensor, precision: Precision, device: Device) -> Result<Weight, KernelError> {
        Weight::placed(dense, precision, device, Stay::Short)
    }

    /// A quantised matrix, kept in its bits and multiplied in `precision`.
    pub fn quantised(from: &Quantised, precision: Precision, device: Device) -> Result<Weight, KernelError> {
        from.check()?;
        let packed = device == Device::Cpu && simd::available();
        Ok(Weight {
            n: from.n() as usize,
            k: from.k() as usize,
            precision,
            device,
            store: match packed {
                true => Store::Packed(Packed::new(from)),
                false => Store::Held(Held::new(from, device)?),
            },
        })
    }

    fn placed(
        dense: &Tensor,
        precision: Precision,
        device: Device,
        stay: Stay,
    ) -> Result<Weight, KernelError> {
        let &[n, k] = dense.size().as_slice() else {
            return Err(KernelError::Shape(format!(
                "a weight has two dimensions, not {:?}",
                dense.size()
            )));
        };
        let (n, k) = (n as usize, k as usize);
        let packed = device == Device::Cpu && simd::available();
        let store = match precision {
            _ if !packed => Store::Plain(Tensor::f_empty([n as i64, k as i64], (precision.kind(), device))?),
            Precision::F32 => Store::F32(Pages::placed(n.div_ceil(PANEL) * f32::panel_len(k), stay)),
            Precision::Bf16 => Store::Bf16(Pages::placed(n.div_ceil(PANEL) * u16::panel_len(k), stay)),
        };
        let mut weight = Weight {
            n,
            k,
            precision,
            device,
            store,
        };
        weight.overwrite(dense)?;
        Ok(weight)
    }

    /// Output features N.
    pub fn n(&self) -> i64 {
        self.n as i64
    }

    /// Input features K.
    pub fn k(&self) -> i64 {
        self.k as i64
    }

    /// Resident memory.
    pub fn bytes(&self) -> u64 {
        let bytes = match &self.store {
            Store::F32(panels) => size_of_val(&panels[..]),
            Store::Bf16(panels) => size_of_val(&panels[..]),
            Store::Plain(_) => self.n * self.k * self.precision.value_bytes(),
            Store::Packed(packed) => packed.bytes(),
            Store::Held(held) => held.bytes(),
        };
        bytes as u64
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub fn format(&self) -> Format {
        let (grid, group, offsets) = match (&self.store, self.precision) {
            (Store::Packed(packed), _) => (packed.grid, packed.group, packed.has_offsets()),
            (Store::Held(held), _) => held.format(),
            (_, Precision::F32) => return Format::F32,
            (_, Precision::Bf16) => return Format::Bf16,
        };
        let group = (group < self.k).then_some(group);
        Format::Quantised { grid, group, offsets }
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Whether the fast paths read it.
    pub(crate) fn is_packed(&self) -> bool {
        !matches!(self.store, Store::Plain(_) | Store::Held(_))
    }

    /// As the right side of a product in its precision, whose elements are `T`; None where it is not packed.
    pub(crate) fn right<T: Multiplied>(&self) -> Option<Right<'_, T>> {
        assert_eq!(T::PRECISION, self.precision, "a product in another precision");
        match &self.store {
            Store::Packed(packed) => Some(Right::Packed(packed)),
            store => T::panels(store).map(Right::Panels),
        }
    }

    /// `y [T, N] = x Wt + bias + around` by kernels of a device, see [`gemm::forward`]. False where they do not take it.
    pub(crate) fn forward_on(
        &self,
        gpu: Gpu,
        x: &Tensor,
        bias: Option<&Tensor>,
        around: Option<&Tensor>,
        y: &Tensor,
    ) -> bool {
        match &self.store {
            Store::Plain(w) => gemm::forward(gpu, x, w, bias, around, y),
            Store::Held(held) if self.precision == Precision::Bf16 => {
                held.forward_on(gpu, x, bias, around, y)
            }
            _ => false,
        }
    }

    /// `dx [T, K] = dy W + around` likewise.
    pub(crate) fn backward_on(&self, gpu: Gpu, dy: &Tensor, around: Option<&Tensor>, dx: &Tensor) -> bool {
        match &self.store {
            Store::Plain(w) => gemm::backward(gpu, dy, w, around, dx),
            Store::Held(_) => gemm::backward(gpu, dy, &self.plain(), around, dx),
            _ => false,
        }
    }

    /// `x Wt` by the precision rule in plain tch, `x` `[T, K]` -> `[T, N]`. For references.
    pub(crate) fn reference_forward(&self, x: &Tensor) -> Tensor {
        match &self.store {
            // Levels are multiplied in the precision, scales in float32.
            Store::Packed(packed) => {
                let x = x.to_kind(self.precision.kind()).to_kind(Kind::Float);
                x.mm(&packed.dense(self.precision).tr())
            }
            _ => product(x, &self.plain().tr(), self.precision),
        }
    }

    /// `dy W`, `dy` `[T, N]` -> `[T, K]`. For references.
    pub(crate) fn reference_backward(&self, dy: &Tensor) -> Tensor {
        product(dy, &self.plain(), self.precision)
    }

    /// In the precision's dtype.
    fn plain(&self) -> Tensor {
        match &self.store {
            Store::Plain(tensor) => tensor.shallow_clone(),
            Store::Held(held) if self.precision == Precision::Bf16 => match gpu::on(self.device) {
                Some(gpu) => held.rounded_on(gpu),
                None => held.dense().to_kind(Kind::BFloat16),
            },
            _ => self.dense().to_kind(self.precision.kind()),
        }
    }

    /// Replaces the values, `[N, K]` as in [`Weight::new`], in the memory already held. Not of a quantised weight.
    pub fn overwrite(&mut self, dense: &Tensor) -> Result<(), KernelError> {
        if dense.size() != [self.n as i64, self.k as i64] {
            let (n, k) = (self.n, self.k);
            return Err(KernelError::Shape(format!(
                "{:?} cannot replace a weight of [{n}, {k}]",
                dense.size()
            )));
        }
        match &mut self.store {
            Store::F32(panels) => pack(panels, &readable(dense)?),
            Store::Bf16(panels) => pack(panels, &readable(dense)?),
            Store::Plain(tensor) => tensor.f_detach()?.f_copy_(&dense.f_detach()?)?,
            Store::Packed(_) | Store::Held(_) => {
                return Err(KernelError::Shape(format!(
                    "a weight in {} does not change",
                    self.format()
                )));
            }
        }
        Ok(())
    }

    /// All of it, `[N, K]` in the precision's dtype, float32 where it is quantised: for export and checks, not for
    /// multiplying.
    pub fn dense(&self) -> Tensor {
        match &self.store {
            Store::F32(panels) => unpack(panels, self.n, self.k, Kind::Float),
            Store::Bf16(panels) => unpack(panels, self.n, self.k, Kind::BFloat16),
            Store::Plain(tensor) => tensor.copy(),
            Store::Packed(packed) => packed.dense(Precision::F32),
            Store::Held(held) => held.dense(),
        }
    }

    /// Rows `[T, K]` in float32: an embedding lookup out of the panels, so that a tied head needs no second copy.
    ///
    /// # Panics
    /// When a row is not below N.
    pub fn gather(&self, rows: &[u32]) -> Tensor {
        if let Some(row) = rows.iter().find(|&&row| row as usize >= self.n) {
            panic!("row {row} of a weight with {} rows", self.n);
        }
        match &self.store {
            Store::F32(panels) => gather(panels, self.k, rows),
            Store::Bf16(panels) => gather(panels, self.k, rows),
            Store::Plain(tensor) => match gpu::on(self.device) {
                Some(gpu) => gpu::embedding::gather(gpu, tensor, rows),
                None => tensor.index_select(0, &self.index(rows)).to_kind(Kind::Float),
            },
            Store::Packed(packed) => packed.gather(rows),
            Store::Held(held) => held.gather(&self.index(rows)),
        }
    }

    fn index(&self, rows: &[u32]) -> Tensor {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        Tensor::from_slice(&rows).to(self.device)
    }
}

/// Whether products of bfloat16 on this GPU widen the weight to float32 at every call, which takes several times as
/// long: libtorch has a product of its own with a float32 result, but not in every build and for every GPU.
pub fn widens(device: Device) -> bool {
    static WIDENS: OnceLock<bool> = OnceLock::new();
    *WIDENS.get_or_init(|| {
        let ones = Tensor::ones([16, 16], (Kind::BFloat16, device));
        ones.f_mm_dtype(&ones, Kind::Float).is_err()
    })
}

/// `a b` with `a` rounded to `precision` and `b` in it, summed in float32.
pub(crate) fn product(a: &Tensor, b: &Tensor, precision: Precision) -> Tensor {
    let a = a.to_kind(precision.kind());
    if precision == Precision::Bf16
        && a.device().is_cuda()
        && !widens(a.device())
        && let Ok(product) = a.f_mm_dtype(b, Kind::Float)
    {
        return product;
    }
    // Products of two bfloat16 are exact in float32.
    a.to_kind(Kind::Float).mm(&b.to_kind(Kind::Float))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(n: i64, k: i64, kind: Kind) -> Tensor {
        Tensor::randn([n, k], (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    /// Packing and unpacking lose nothing, whatever the shape, dtype and precision; gather picks the same rows.
    #[test]
    fn dense_and_gather_are_exact() {
        gpu::everywhere(judge_dense_and_gather);
    }

    fn judge_dense_and_gather() {
        for (n, k) in [
            (1, 1),
            (3, 7),
            (32, 16),
            (33, 64),
            (96, 31),
            (100, 129),
            (576, 200),
        ] {
            for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
                for precision in [Precision::F32, Precision::Bf16] {
                    let dense = random(n, k, kind);
                    let expected = dense.to_kind(Kind::Float).to_kind(precision.kind());
                    let weight = Weight::new(&dense, precision, Device::Cpu).unwrap();
                    assert_eq!((weight.n(), weight.k()), (n, k));
                    assert!(
                        weight.dense().equal(&expected),
                        "[{n}, {k}] {kind:?} as {precision:?}"
                    );
                    let rows: Vec<u32> = (0..40).map(|i| (i * 7 % n) as u32).collect();
                    let index = Tensor::from_slice(&rows.iter().map(|&row| row as i64).collect::<Vec<_>>());
                    let picked = expected.index_select(0, &index).to_kind(Kind::Float);
                    assert!(
                        weight.gather(&rows).equal(&picked),
                        "[{n}, {k}] {kind:?} as {precision:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn overwrite_and_strided_sources() {
        let mut weight = Weight::new(&random(40, 50, Kind::Float), Precision::F32, Device::Cpu).unwrap();
        let columns = random(40, 80, Kind::Float).narrow(1, 20, 50);
        weight.overwrite(&columns).unwrap();
        assert!(weight.dense().equal(&columns));
        let transposed = random(50, 40, Kind::Float).tr();
        weight.overwrite(&transposed).unwrap();
        assert!(weight.dense().equal(&transposed));
        assert!(weight.overwrite(&random(40, 51, Kind::Float)).is_err());
        assert!(
            Weight::new(
                &Tensor::zeros([4], (Kind::Float, Device::Cpu)),
                Precision::F32,
                Device::Cpu
            )
            .is_err()
        );
    }
}
