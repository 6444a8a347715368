//! A frozen matrix as the kernels want it: packed once, the only resident copy. Not a layer, and nothing autograd sees:
//! `linear` multiplies with it and, transposing blocks on the way, takes gradients through it.

use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use crate::error::KernelError;
use crate::pool;
use crate::simd::{self, Element, PANEL, pack};
use crate::slice::{Pages, Plain, RowsMut, Shared, Stay};

/// What a weight is stored in, and so what a multiply rounds its left side to. Sums are float32 with either.
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
}

// SAFETY: the plain tensor is the one field that is not Sync by itself. It is private, not a view of anything, not part
// of any graph, and changes only through `&mut self`; libtorch allows concurrent reads of such a tensor.
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
        };
        bytes as u64
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// `x Wt` by the precision rule in plain tch, `x` `[T, K]` -> `[T, N]`. For references.
    pub(crate) fn reference_forward(&self, x: &Tensor) -> Tensor {
        product(x, &self.plain().tr(), self.precision)
    }

    /// `dy W`, `dy` `[T, N]` -> `[T, K]`. For references.
    pub(crate) fn reference_backward(&self, dy: &Tensor) -> Tensor {
        product(dy, &self.plain(), self.precision)
    }

    fn plain(&self) -> Tensor {
        match &self.store {
            Store::Plain(tensor) => tensor.shallow_clone(),
            _ => self.dense(),
        }
    }

    /// Replaces the values, `[N, K]` as in [`Weight::new`], in the memory already held.
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
        }
        Ok(())
    }

    /// All of it, `[N, K]` in the precision's dtype: for export and checks, not for multiplying.
    pub fn dense(&self) -> Tensor {
        match &self.store {
            Store::F32(panels) => unpack(panels, self.n, self.k, Kind::Float),
            Store::Bf16(panels) => unpack(panels, self.n, self.k, Kind::BFloat16),
            Store::Plain(tensor) => tensor.copy(),
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
            Store::F32(panels) => gather(panels, self.k, rows, |value| value),
            Store::Bf16(panels) => gather(panels, self.k, rows, |bits| f32::from_bits((bits as u32) << 16)),
            Store::Plain(tensor) => {
                let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
                tensor
                    .index_select(0, &Tensor::from_slice(&rows).to(self.device))
                    .to_kind(Kind::Float)
            }
        }
    }
}

/// A dtype and layout `pack` reads without a copy, where it is one already.
fn readable(dense: &Tensor) -> Result<Tensor, KernelError> {
    let dense = dense.f_detach()?.f_to(Device::Cpu)?;
    let dense = match dense.kind() {
        Kind::Float | Kind::BFloat16 | Kind::Half => dense,
        _ => dense.f_to_kind(Kind::Float)?,
    };
    Ok(if dense.stride().last() == Some(&1) {
        dense
    } else {
        dense.f_contiguous()?
    })
}

/// Packs `dense` `[N, K]`, a panel a task.
fn pack<T: Element + Plain>(panels: &mut Pages<T>, dense: &Tensor) {
    let (n, k) = (dense.size()[0] as usize, dense.size()[1] as usize);
    let (row_stride, kind) = (dense.stride()[0] as usize, dense.kind());
    let from = Shared(dense.data_ptr() as *mut u8);
    let (to, panel_len) = (Shared(panels.as_mut_ptr()), T::panel_len(k));
    let padded = T::steps(k) * T::PER_STEP;
    pool::for_each(n.div_ceil(PANEL), |panel| {
        let columns = PANEL.min(n - panel * PANEL);
        let mut rows = pool::scratch::<T>(columns * padded);
        for (i, row) in rows.chunks_exact_mut(padded.max(1)).enumerate() {
            let at = from
                .get()
                .wrapping_add((panel * PANEL + i) * row_stride * kind.elt_size_in_bytes());
            // SAFETY: row `panel * 32 + i < n` of a CPU tensor that lives through the job; any bytes are a value.
            unsafe {
                match kind {
                    Kind::Float => T::round(std::slice::from_raw_parts(at.cast(), k), row),
                    Kind::BFloat16 => T::from_bf16(std::slice::from_raw_parts(at.cast(), k), row),
                    _ => T::from_f16(std::slice::from_raw_parts(at.cast(), k), row),
                }
            }
        }
        // SAFETY: fast paths exist (packed stores are made only then); `rows` are rows of whole steps, and the panel is
        // this task's alone.
        unsafe {
            let panel = to.get().add(panel * panel_len);
            pack::pack_rows(rows.as_ptr(), padded, columns, T::steps(k), panel);
        }
    });
}

fn unpack<T: Element + Plain>(panels: &Pages<T>, n: usize, k: usize, kind: Kind) -> Tensor {
    let dense = Tensor::empty([n as i64, k as i64], (kind, Device::Cpu));
    let to = Shared(dense.data_ptr() as *mut T);
    let padded = T::steps(k) * T::PER_STEP;
    pool::for_each(n.div_ceil(PANEL), |panel| {
        let columns = PANEL.min(n - panel * PANEL);
        let mut rows = pool::scratch::<T>(columns * padded);
        let from = panels[panel * T::panel_len(k)..].as_ptr();
        // SAFETY: one whole panel in, `columns` rows of whole steps out.
        unsafe { pack::unpack_rows(from, T::steps(k), columns, rows.as_mut_ptr(), padded) };
        for (i, row) in rows.chunks_exact(padded.max(1)).enumerate() {
            // SAFETY: row `panel * 32 + i < n` of the new tensor, whose dtype is as wide as T, is this task's alone.
            let to = unsafe { std::slice::from_raw_parts_mut(to.get().add((panel * PANEL + i) * k), k) };
            to.copy_from_slice(&row[..k]);
        }
    });
    dense
}

fn gather<T: Element + Plain>(panels: &Pages<T>, k: usize, rows: &[u32], widen: fn(T) -> f32) -> Tensor {
    let mut out = Tensor::empty([rows.len() as i64, k as i64], (Kind::Float, Device::Cpu));
    let to = RowsMut::of(&mut out).expect("a new float CPU tensor");
    // A row is a cache line of each step; enough of them a task that waking a worker pays.
    let rows_per_task = 16usize;
    pool::for_each(rows.len().div_ceil(rows_per_task), |task| {
        let first = task * rows_per_task;
        for (i, &row) in rows[first..].iter().take(rows_per_task).enumerate() {
            let (panel, column) = (row as usize / PANEL, row as usize % PANEL);
            let panel = &panels[panel * T::panel_len(k)..][..T::panel_len(k)];
            let steps = panel.chunks_exact(PANEL * T::PER_STEP);
            // SAFETY: each output row belongs to one task.
            let to = unsafe { to.row(first + i) };
            for (to, step) in to.chunks_mut(T::PER_STEP).zip(steps) {
                for (to, &value) in to.iter_mut().zip(&step[column * T::PER_STEP..]) {
                    *to = widen(value);
                }
            }
        }
    });
    out
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
