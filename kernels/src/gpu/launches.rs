//! What a thread queues on a device: kernels of ours and libtorch's ops, by name. For gates and diagnosis.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};

unsafe extern "C" {
    fn tandem_hear_ops(hear: Option<extern "C" fn(*const c_char, bool)>);
}

/// Among the names: arrays sent to the device.
pub const COPY: &str = "copy to the device";
/// Among the names: reads of what the device has yet to compute.
pub const WAIT: &str = "wait for the device";

/// How often each was queued.
pub type Launches = BTreeMap<String, usize>;

/// What is heard meanwhile.
#[derive(Default)]
struct Heard {
    launches: Launches,
    /// Of each op that has begun and not ended: whether something was queued within it.
    within: Vec<bool>,
}

thread_local! {
    static HEARD: RefCell<Option<Heard>> = const { RefCell::new(None) };
}

/// Ops of libtorch that queue nothing: they make views, or memory of undefined content.
const NOTHING: [&str; 26] = [
    "alias",
    "as_strided",
    "contiguous",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "flatten",
    "lift_fresh",
    "narrow",
    "permute",
    "reshape",
    "_reshape_alias",
    "resolve_conj",
    "resolve_neg",
    "select",
    "slice",
    "split",
    "squeeze",
    "t",
    "to",
    "transpose",
    "unsqueeze",
    "_unsafe_view",
    "view",
];

/// What `run` gives, and what it queued on this thread.
pub fn counted<T>(run: impl FnOnce() -> T) -> (T, Launches) {
    struct Deaf;
    impl Drop for Deaf {
        fn drop(&mut self) {
            // SAFETY: removes this thread's callback.
            unsafe { tandem_hear_ops(None) };
            HEARD.set(None);
        }
    }
    HEARD.set(Some(Heard::default()));
    let deaf = Deaf;
    // SAFETY: a function that lives as long as the program.
    unsafe { tandem_hear_ops(Some(hear)) };
    let result = run();
    let heard = HEARD.take().unwrap_or_default().launches;
    drop(deaf);
    (result, heard)
}

/// A kernel was queued, a [`COPY`] or a [`WAIT`].
pub(crate) fn launched(name: &str) {
    HEARD.with_borrow_mut(|heard| {
        if let Some(Heard { launches, within }) = heard {
            *launches.entry(name.to_owned()).or_default() += 1;
            within.fill(true);
        }
    });
}

/// Of ops within each other the innermost ones queue something.
extern "C" fn hear(name: *const c_char, begins: bool) {
    // SAFETY: libtorch hands over a name that ends and lives as long as this call.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    let has_queued = HEARD.with_borrow_mut(|heard| {
        let within = &mut heard.as_mut()?.within;
        match begins {
            true => {
                within.push(false);
                None
            }
            false => within.pop(),
        }
    });
    let op = name.strip_prefix("aten::").unwrap_or(&name);
    if has_queued == Some(false) && !NOTHING.contains(&op) {
        launched(&name);
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::gpu::{Lanes, emulated};
    use crate::norm::rms_norm;

    #[test]
    fn ours_and_libtorchs_are_counted_and_views_are_not() {
        let x = Tensor::ones([3, 8], (Kind::Float, Device::Cpu));
        let weight = Tensor::ones([8], (Kind::Float, Device::Cpu));
        let (_, heard) = emulated(Lanes::Cdna, || {
            counted(|| (rms_norm(&x.narrow(0, 0, 2).view([2, 8]), &weight, 1e-5) + &weight).mm(&x.tr()))
        });
        let ours: usize = heard
            .iter()
            .filter(|(name, _)| name.starts_with("rms_norm"))
            .map(|(_, n)| n)
            .sum();
        assert_eq!(ours, 1, "{heard:?}");
        assert_eq!(
            (heard.get("aten::add"), heard.get("aten::mm")),
            (Some(&1), Some(&1)),
            "{heard:?}"
        );
        assert_eq!(heard.values().sum::<usize>(), 3, "{heard:?}");
        let (_, heard) = counted(|| ());
        assert!(heard.is_empty(), "{heard:?}");
    }
}
