//! Integers that a device is told. What is told again has not changed and is there already: all layers of a step, and the
//! steps behind it, share the copy.

use std::cell::RefCell;
use std::collections::VecDeque;

use tch::{Device, Kind, Tensor};

use super::launches::{self, COPY};

/// Arrays that are remembered, of each thread that computes.
const REMEMBERED: usize = 256;
/// Longer ones are not worth comparing.
const LONGEST: usize = 16 * 1024;

struct Told {
    values: Vec<i64>,
    kind: Kind,
    device: Device,
    there: Tensor,
}

impl Told {
    fn is(&self, values: &[i64], kind: Kind, device: Device) -> bool {
        self.kind == kind && self.device == device && self.values == values
    }
}

thread_local! {
    /// The last told first.
    static TOLD: RefCell<VecDeque<Told>> = const { RefCell::new(VecDeque::new()) };
    /// What the step now computed brought with the rest: not remembered longer, as all of its buffer would stay.
    static BROUGHT: RefCell<Option<Told>> = const { RefCell::new(None) };
}

/// `[n]` of `kind` (int32 or int64) on `device`, which nobody writes.
///
/// # Panics
/// When one does not fit `kind`.
pub(crate) fn told(values: Vec<i64>, kind: Kind, device: Device) -> Tensor {
    let brought = BROUGHT.with_borrow(|brought| {
        let found = brought.as_ref().filter(|told| told.is(&values, kind, device))?;
        Some(found.there.shallow_clone())
    });
    if let Some(there) = brought {
        return there;
    }
    TOLD.with_borrow_mut(|all| {
        if let Some(found) = all.iter().position(|told| told.is(&values, kind, device)) {
            let told = all.remove(found).expect("it was found");
            let there = told.there.shallow_clone();
            all.push_front(told);
            return there;
        }
        let there = send(&numbers(&values, kind), device);
        if values.len() <= LONGEST {
            all.truncate(REMEMBERED - 1);
            all.push_front(Told {
                values,
                kind,
                device,
                there: there.shallow_clone(),
            });
        }
        there
    })
}

/// `there` are these, of `kind` on `device`, until others are brought.
pub(crate) fn brought(values: Vec<i64>, kind: Kind, device: Device, there: Tensor) {
    BROUGHT.set(Some(Told {
        values,
        kind,
        device,
        there,
    }));
}

/// A copy on `device`. From pinned memory it waits for nothing, and only what is queued behind it waits for it.
pub(crate) fn send(here: &Tensor, device: Device) -> Tensor {
    launches::launched(COPY);
    match device {
        Device::Cpu => here.shallow_clone(),
        _ => here
            .pin_memory(device)
            .to_device_(device, here.kind(), true, false),
    }
}

fn numbers(values: &[i64], kind: Kind) -> Tensor {
    match kind {
        Kind::Int => {
            let narrow = |&value| i32::try_from(value).expect("a number below 2^31");
            Tensor::from_slice(&values.iter().map(narrow).collect::<Vec<i32>>())
        }
        _ => Tensor::from_slice(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::counted;

    #[test]
    fn what_a_step_brought_is_there_until_the_next() {
        let brings = |values: &[i64]| {
            let there = Tensor::from_slice(&[0, 1, 2, 3, 4]).narrow(0, values[0], values.len() as i64);
            brought(values.to_vec(), Kind::Int, Device::Cpu, there);
        };
        let copies = |values: &[i64]| {
            let (there, heard) = counted(|| told(values.to_vec(), Kind::Int, Device::Cpu));
            assert_eq!(Vec::<i32>::try_from(there).unwrap().len(), values.len());
            heard.get(COPY).copied()
        };
        brings(&[1, 2]);
        assert_eq!((copies(&[1, 2]), copies(&[3, 4])), (None, Some(1)));
        brings(&[2, 3]);
        assert_eq!((copies(&[2, 3]), copies(&[1, 2])), (None, Some(1)));
    }

    #[test]
    fn what_is_told_again_is_there_already() {
        let tell = |values: &[i64], kind| told(values.to_vec(), kind, Device::Cpu);
        let place = |tensor: &Tensor| tensor.data_ptr() as usize;
        let first = tell(&[1, 2], Kind::Int);
        assert_eq!(place(&first), place(&tell(&[1, 2], Kind::Int)));
        assert_ne!(place(&first), place(&tell(&[1, 2], Kind::Int64)));
        assert_ne!(place(&first), place(&tell(&[1, 3], Kind::Int)));
        // Those told often stay, others go.
        for i in 0..2 * REMEMBERED as i64 {
            drop(tell(&[i, i], Kind::Int));
            drop(tell(&[1, 2], Kind::Int));
        }
        assert_eq!(place(&first), place(&tell(&[1, 2], Kind::Int)));
        assert_eq!(TOLD.with_borrow(VecDeque::len), REMEMBERED);
        assert_eq!(Vec::<i32>::try_from(first).unwrap(), [1, 2]);
    }
}
