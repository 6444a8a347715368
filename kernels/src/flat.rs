//! Flat buffers that tasks share, a piece each: what an optimizer steps over.

use std::ops::Range;

use tch::kind::Element;
use tch::{Device, Kind, Tensor};

use crate::gpu::{Arg, Gpu};
use crate::{pool, vector};

/// Elements of a task. Fixed, because the order of a sum over pieces of this size must not depend on the threads.
pub(crate) const PIECE: usize = 32 * 1024;

/// A contiguous CPU tensor as memory that tasks share, a piece each.
pub(crate) struct Flat<T> {
    first: *mut T,
    pub len: usize,
}

impl<T> Clone for Flat<T> {
    fn clone(&self) -> Flat<T> {
        *self
    }
}
impl<T> Copy for Flat<T> {}

// SAFETY: an address with a bound; `part` and `part_mut` carry the obligation.
unsafe impl<T: Send> Send for Flat<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Flat<T> {}

/// None where only the reference can go.
pub(crate) fn flat(tensor: &Tensor) -> Option<Flat<f32>> {
    vector::vector(tensor).map(|_| plain(tensor))
}

/// # Panics
/// When it is no contiguous tensor of `T` on the CPU.
pub(crate) fn plain<T: Element>(tensor: &Tensor) -> Flat<T> {
    let is_plain = tensor.device() == Device::Cpu && tensor.is_contiguous() && tensor.kind() == T::KIND;
    assert!(
        is_plain,
        "{tensor:?} is no contiguous tensor of {:?} on the CPU",
        T::KIND
    );
    Flat {
        first: tensor.data_ptr().cast(),
        len: tensor.numel(),
    }
}

impl<T> Flat<T> {
    /// # Safety
    /// The tensor lives and nobody writes the part for as long as the slice does.
    pub unsafe fn part<'a>(self, part: Range<usize>) -> &'a [T] {
        assert!(
            part.start <= part.end && part.end <= self.len,
            "{part:?} of {}",
            self.len
        );
        if part.is_empty() {
            return &[]; // the tensor's pointer may be null, which no slice is
        }
        // SAFETY: inside the tensor; the rest is the caller's.
        unsafe { std::slice::from_raw_parts(self.first.add(part.start), part.len()) }
    }

    /// # Safety
    /// The tensor lives and nobody else touches the part for as long as the slice does.
    pub unsafe fn part_mut<'a>(self, part: Range<usize>) -> &'a mut [T] {
        assert!(
            part.start <= part.end && part.end <= self.len,
            "{part:?} of {}",
            self.len
        );
        if part.is_empty() {
            return &mut [];
        }
        // SAFETY: inside the tensor; the rest is the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(part.start), part.len()) }
    }

    pub fn pieces(self) -> usize {
        self.len.div_ceil(PIECE)
    }

    /// Of a piece.
    pub fn range(self, piece: usize) -> Range<usize> {
        let start = piece * PIECE;
        start..self.len.min(start + PIECE)
    }
}

/// `work` on each piece of `params`, with the same piece of the others, on all threads.
pub(crate) fn for_each_piece<const N: usize>(
    params: &Tensor,
    grads: &Tensor,
    states: [&Tensor; N],
    work: impl Fn(&mut [f32], &[f32], [&mut [f32]; N]) + Sync,
) {
    let (params, grads): (Flat<f32>, Flat<f32>) = (plain(params), plain(grads));
    let states = states.map(plain::<f32>);
    let lengths = states.map(|state| state.len);
    assert!(
        grads.len == params.len && lengths.iter().all(|&len| len == params.len),
        "buffers of {} parameters have {} and {lengths:?} elements",
        params.len,
        grads.len
    );
    pool::for_each(params.pieces(), |piece| {
        let range = params.range(piece);
        // SAFETY: pieces are disjoint, and nobody else touches the tensors meanwhile.
        unsafe {
            let states = states.map(|state| state.part_mut(range.clone()));
            work(params.part_mut(range.clone()), grads.part(range), states);
        }
    });
}

/// Launches a kernel over flat buffers: its arguments are the buffers, their length and the numbers. Where it can do
/// without a buffer, none.
///
/// # Panics
/// When the buffers are not contiguous float32 of one length.
pub(crate) fn launch(gpu: Gpu, kernel: &str, buffers: &[Option<&Tensor>], numbers: &[f32]) {
    let n = buffers.iter().flatten().map(|buffer| buffer.numel()).max();
    let n = n.unwrap_or(0);
    for buffer in buffers.iter().flatten() {
        let is_flat = buffer.is_contiguous() && buffer.kind() == Kind::Float && buffer.numel() == n;
        assert!(is_flat, "{kernel} over {n} numbers: {buffer:?}");
    }
    let mut args: Vec<Arg> = buffers.iter().map(|&buffer| buffer.into()).collect();
    args.push((n as i64).into());
    args.extend(numbers.iter().map(|&number| Arg::from(number)));
    gpu.launch(kernel, [n.div_ceil(BLOCK), 1, 1], 256, &args);
}

/// Elements of a block of such a kernel.
const BLOCK: usize = 1024;
