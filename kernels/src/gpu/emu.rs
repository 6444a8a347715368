//! Launches on the emulated device (`kernels/gpu/emu.h`), one at a time: its threads share their block's memory as static
//! variables.

use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::Mutex;

use super::Lanes;

type Launch = unsafe extern "C" fn(
    name: *const c_char,
    args: *const *const c_void,
    arguments: c_int,
    grid: *const u32,
    threads: u32,
) -> bool;

unsafe extern "C" {
    fn tandem_emu_1(_: *const c_char, _: *const *const c_void, _: c_int, _: *const u32, _: u32) -> bool;
    fn tandem_emu_2(_: *const c_char, _: *const *const c_void, _: c_int, _: *const u32, _: u32) -> bool;
    fn tandem_emu_3(_: *const c_char, _: *const *const c_void, _: c_int, _: *const u32, _: u32) -> bool;
}

/// # Panics
/// When there is no such kernel, or it takes another number of arguments.
pub(super) fn launch(lanes: Lanes, name: &str, grid: [u32; 3], threads: u32, values: &[u64]) {
    static ONE: Mutex<()> = Mutex::new(());
    let launch: Launch = match lanes {
        Lanes::Cdna => tandem_emu_1,
        Lanes::Rdna => tandem_emu_2,
        Lanes::Nvidia => tandem_emu_3,
    };
    let c_name = CString::new(name).expect("a kernel's name");
    let args: Vec<*const c_void> = values.iter().map(|value| (&raw const *value).cast()).collect();
    // A launch that panicked left nothing behind that the next one reads.
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // SAFETY: a name that ends, as many addresses of values as are told, three numbers; what the values mean is between
    // the caller and the kernel, as on a GPU.
    let ran = unsafe {
        launch(
            c_name.as_ptr(),
            args.as_ptr(),
            args.len() as c_int,
            grid.as_ptr(),
            threads,
        )
    };
    assert!(ran, "no kernel {name} of {} arguments", args.len());
}
