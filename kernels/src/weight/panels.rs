//! Dense matrices in and out of panels of 32 output columns, the layout the micro-kernels read (`simd`).

use tch::{Device, Kind, Tensor};

use crate::error::KernelError;
use crate::pool;
use crate::simd::pack::{pack_rows, unpack_rows};
use crate::simd::{Element, PANEL};
use crate::slice::{Pages, Plain, RowsMut, Shared};

/// A dtype and layout `pack` reads without a copy, where it is one already.
pub(super) fn readable(dense: &Tensor) -> Result<Tensor, KernelError> {
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
pub(super) fn pack<T: Element + Plain>(panels: &mut Pages<T>, dense: &Tensor) {
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
            pack_rows(rows.as_ptr(), padded, columns, T::steps(k), panel);
        }
    });
}

pub(super) fn unpack<T: Element + Plain>(panels: &Pages<T>, n: usize, k: usize, kind: Kind) -> Tensor {
    let dense = Tensor::empty([n as i64, k as i64], (kind, Device::Cpu));
    let to = Shared(dense.data_ptr() as *mut T);
    let padded = T::steps(k) * T::PER_STEP;
    pool::for_each(n.div_ceil(PANEL), |panel| {
        let columns = PANEL.min(n - panel * PANEL);
        let mut rows = pool::scratch::<T>(columns * padded);
        let from = panels[panel * T::panel_len(k)..].as_ptr();
        // SAFETY: one whole panel in, `columns` rows of whole steps out.
        unsafe { unpack_rows(from, T::steps(k), columns, rows.as_mut_ptr(), padded) };
        for (i, row) in rows.chunks_exact(padded.max(1)).enumerate() {
            // SAFETY: row `panel * 32 + i < n` of the new tensor, whose dtype is as wide as T, is this task's alone.
            let to = unsafe { std::slice::from_raw_parts_mut(to.get().add((panel * PANEL + i) * k), k) };
            to.copy_from_slice(&row[..k]);
        }
    });
    dense
}

pub(super) fn gather<T: Element + Plain>(panels: &Pages<T>, k: usize, rows: &[u32]) -> Tensor {
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
                    *to = value.widen();
                }
            }
        }
    });
    out
}
