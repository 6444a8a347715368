//! Turns a panic of the tensor library (every plain tch op panics on a torch error) into an error of one step. Not
//! here: what the step's requests are told.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use tandem_kernels::comm::LOST;

/// A step or a training quantum that did not end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TorchFault {
    pub message: String,
}

impl TorchFault {
    /// Can the replica still compute? After a GPU error other than out of memory every later call fails too, and so does
    /// every later sum over ranks of which one was lost.
    pub fn kills_device(&self) -> bool {
        let gpu = ["CUDA error", "HIP error", "device-side assert"]
            .iter()
            .any(|sign| self.message.contains(sign));
        self.message.contains(LOST) || gpu && !self.message.contains("out of memory")
    }
}

/// Runs `work`. A panic in it is an error, said nowhere else; the thread's grad mode is what it was before (tch's
/// `no_grad(closure)` leaves it off after a panic).
pub fn torch<T>(work: impl FnOnce() -> T) -> Result<T, TorchFault> {
    static QUIET_HOOK: Once = Once::new();
    QUIET_HOOK.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| match GUARDED.get() {
            true => PLACE.set(
                info.location()
                    .map(|place| format!(" (at {}:{})", file_name(place.file()), place.line())),
            ),
            false => loud(info),
        }));
    });
    // Restores the mode when it drops.
    let _grad_mode = tch::no_grad_guard();
    let outer = GUARDED.replace(true);
    // What `work` changed in part is the caller's to give up: the plan's sequences, the job.
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    result.map_err(|panic| TorchFault {
        message: first_line(panic.as_ref()) + &PLACE.take().unwrap_or_default(),
    })
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// torch appends a C++ stack trace to its messages.
fn first_line(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("a panic without a message");
    // tch's unwrap prints the error with its line breaks escaped.
    let end = text
        .find('\n')
        .unwrap_or(text.len())
        .min(text.find("\\n").unwrap_or(text.len()));
    text[..end].to_owned()
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_torch_panic_is_an_error_and_leaves_grad_mode_alone() {
        let ones = |n: i64| Tensor::ones([n], (Kind::Float, Device::Cpu));
        let needs_grad = || ones(1).set_requires_grad(true) * 2.0;
        assert!(needs_grad().requires_grad());
        let fault = torch(|| tch::no_grad(|| ones(3) + ones(4))).unwrap_err();
        assert!(
            fault.message.contains("size of tensor a (3)") && !fault.message.contains('\n'),
            "{fault}"
        );
        assert!(!fault.kills_device());
        assert!(needs_grad().requires_grad(), "grad mode is back");
        assert!(
            !torch(needs_grad).unwrap().requires_grad(),
            "a step records no graph"
        );
        assert!(
            torch(|| panic!("CUDA error: an illegal memory access"))
                .unwrap_err()
                .kills_device()
        );
    }
}
