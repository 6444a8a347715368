//! Whether every number of a tensor is finite: one pass over its bits, at the speed of memory. (`isfinite` of torch makes
//! several tensors of the same size, and on one thread.)

use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Kind, Tensor};

use crate::pool;

/// Bytes of one task.
const TASK_BYTES: usize = 1 << 20;

/// Of a tensor of any floating dtype and shape.
pub fn all(x: &Tensor) -> bool {
    let plain = x.device() == Device::Cpu && x.is_contiguous();
    match x.kind() {
        Kind::Float if plain => words(x, |word: u32| word & 0x7f80_0000 == 0x7f80_0000),
        Kind::BFloat16 if plain => words(x, |word: u16| word & 0x7f80 == 0x7f80),
        Kind::Half if plain => words(x, |word: u16| word & 0x7c00 == 0x7c00),
        _ => reference(x),
    }
}

fn reference(x: &Tensor) -> bool {
    x.isfinite().all().int64_value(&[]) == 1
}

/// `is_special`: all bits of the exponent are set.
fn words<T: Copy + Send + Sync>(x: &Tensor, is_special: impl Fn(T) -> bool + Sync) -> bool {
    if x.numel() == 0 {
        return true; // its pointer may be null, which no slice is
    }
    // SAFETY: a contiguous CPU tensor holds `numel` words of its dtype, which is as wide as T; it is borrowed for as long.
    let words = unsafe { std::slice::from_raw_parts(x.data_ptr().cast::<T>(), x.numel()) };
    let tasks: Vec<&[T]> = words.chunks(TASK_BYTES / size_of::<T>()).collect();
    let special = AtomicBool::new(false);
    pool::for_each(tasks.len(), |task| {
        // No early end: the loop is vectorised without one.
        if tasks[task]
            .iter()
            .fold(false, |found, &word| found | is_special(word))
        {
            special.store(true, Ordering::Relaxed);
        }
    });
    !special.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_reference() {
        let numbers = [
            0.0,
            -1.5,
            65504.0,
            1e-40,
            f64::INFINITY,
            f64::NEG_INFINITY,
            f64::NAN,
        ];
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            for len in [0, 1, 33, TASK_BYTES as i64 / 2 + 7] {
                let plain = Tensor::ones([len], (kind, Device::Cpu));
                assert!(all(&plain) && reference(&plain));
                for (number, at) in numbers.iter().flat_map(|number| [(number, 0), (number, len - 1)]) {
                    if len == 0 {
                        continue;
                    }
                    let x = plain.copy();
                    let _ = x.narrow(0, at, 1).fill_(*number);
                    assert_eq!(all(&x), reference(&x), "{number} at {at} of {len}, {kind:?}");
                    assert_eq!(all(&x), number.is_finite(), "{number} at {at} of {len}, {kind:?}");
                }
            }
        }
        let strided = Tensor::ones([4, 6], (Kind::Float, Device::Cpu));
        let _ = strided.narrow(1, 5, 1).fill_(f64::NAN);
        assert!(all(&strided.narrow(1, 0, 5)) && !all(&strided.narrow(1, 1, 5)));
    }
}
