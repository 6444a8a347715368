//! Kernels of our own on GPUs: whether a tensor's device has them ([`of`]), and a launch by name. Their source is in
//! `kernels/gpu`, a kernel's shapes and geometry stand above it there. Not here: what an op computes; each op asks for
//! itself and has its reference beside it.
//!
//! # The emulated device
//! The same kernels run on the CPU, a fiber a GPU thread, in the lanes of each maker ([`Lanes`]): [`emulate`] makes the
//! CPU's tensors those of such a device, so that a whole server takes a GPU's path. Slow; for tests and diagnosis.

pub mod cases;
mod driver;
pub(crate) mod embedding;
mod emu;
pub(crate) mod gemm;
pub(crate) mod launches;
pub(crate) mod library;
pub(crate) mod lora;
mod objects;
pub(crate) mod rows;
mod runtime;
pub(crate) mod told;

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Kind, Tensor};

use driver::Driver;
pub use launches::{COPY, Launches, WAIT, counted};

/// Whose way of holding a tile in its lanes the emulated device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    /// AMD's matrix cores (MFMA), waves of 64.
    Cdna,
    /// AMD's WMMA, waves of 32.
    Rdna,
    /// mma.sync, warps of 32.
    Nvidia,
}

impl Lanes {
    pub const ALL: [Lanes; 3] = [Lanes::Cdna, Lanes::Rdna, Lanes::Nvidia];

    pub fn name(self) -> &'static str {
        match self {
            Lanes::Cdna => "cdna",
            Lanes::Rdna => "rdna",
            Lanes::Nvidia => "nvidia",
        }
    }
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Lanes {
    type Err = String;

    fn from_str(word: &str) -> Result<Lanes, String> {
        let known = Lanes::ALL.into_iter().find(|lanes| lanes.name() == word);
        known.ok_or_else(|| format!("lanes {word:?}: cdna, rdna or nvidia"))
    }
}

static EMULATED: OnceLock<Lanes> = OnceLock::new();

thread_local! {
    static HERE: Cell<Option<Lanes>> = const { Cell::new(None) };
}

/// From now on the CPU's tensors are an emulated device's, in the whole process: before anything is loaded.
///
/// # Panics
/// When it was asked for with other lanes before.
pub fn emulate(lanes: Lanes) {
    let chosen = *EMULATED.get_or_init(|| lanes);
    assert_eq!(chosen, lanes, "one emulated device in a process");
}

/// The same for what this thread does within `run`: for tests.
pub fn emulated<T>(lanes: Lanes, run: impl FnOnce() -> T) -> T {
    struct Restore(Option<Lanes>);
    impl Drop for Restore {
        fn drop(&mut self) {
            HERE.set(self.0);
        }
    }
    let _restore = Restore(HERE.replace(Some(lanes)));
    run()
}

/// `run` as it is, then on the emulated device in all lanes.
#[cfg(test)]
pub(crate) fn everywhere(run: impl Fn()) {
    run();
    Lanes::ALL.into_iter().for_each(|lanes| emulated(lanes, &run));
}

/// The emulated device, where there is one.
pub fn emulating() -> Option<Lanes> {
    HERE.get().or_else(|| EMULATED.get().copied())
}

static DETERMINISTIC: AtomicBool = AtomicBool::new(false);

/// From now on, in the whole process: products of many rows on our kernels, too.
pub fn be_deterministic() {
    DETERMINISTIC.store(true, Ordering::Relaxed);
}

/// Whether a row's bits are to be the same whatever is beside it: always on the emulated device.
pub fn deterministic() -> bool {
    DETERMINISTIC.load(Ordering::Relaxed) || emulating().is_some()
}

/// A device with kernels of ours.
#[derive(Clone, Copy)]
pub struct Gpu {
    lanes: Lanes,
    /// None: emulated.
    driver: Option<&'static Driver>,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.driver {
            Some(driver) => f.write_str(&driver.report()),
            None => write!(f, "emulated, {}", self.lanes),
        }
    }
}

/// The kernels of the device of a float32 tensor (activations are of no other type), if it has any.
pub fn of(tensor: &Tensor) -> Option<Gpu> {
    on(tensor.device()).filter(|_| tensor.kind() == Kind::Float)
}

pub fn on(device: Device) -> Option<Gpu> {
    match device {
        Device::Cpu => emulating().map(|lanes| Gpu { lanes, driver: None }),
        Device::Cuda(index) => loaded(index).as_ref().ok().map(|driver| Gpu {
            lanes: driver.lanes(),
            driver: Some(driver),
        }),
        _ => None,
    }
}

/// `TANDEM_GPU_KERNELS=aten` (diagnosis): GPUs run libtorch's ops instead.
pub const KERNELS_VARIABLE: &str = "TANDEM_GPU_KERNELS";

/// The kernels on libtorch's GPU of this number, loaded when they are first asked for.
fn loaded(index: usize) -> &'static Result<Driver, String> {
    const MOST: usize = 64;
    static LOADED: [OnceLock<Result<Driver, String>>; MOST] = [const { OnceLock::new() }; MOST];
    static BEYOND: OnceLock<Result<Driver, String>> = OnceLock::new();
    let place = LOADED.get(index).unwrap_or(&BEYOND);
    place.get_or_init(|| match std::env::var(KERNELS_VARIABLE) {
        _ if index >= MOST => Err(format!("GPU {index}: beyond the first {MOST}")),
        Err(_) => Driver::open(index as i64),
        Ok(word) if word == "aten" => Err(format!("{KERNELS_VARIABLE}=aten")),
        Ok(word) => Err(format!("{KERNELS_VARIABLE}={word}: aten, or unset")),
    })
}

/// What runs on libtorch's GPU of this number: kernels of ours, or why they do not.
pub fn report(index: usize) -> Result<String, String> {
    loaded(index).as_ref().map(Driver::report).map_err(String::clone)
}

pub use objects::architectures;

/// What a kernel is given. Of a tensor its first element: how its rows lie is told in other arguments.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    Tensor(&'a Tensor),
    /// A pointer the kernel takes for "none".
    Null,
    Int(i32),
    Long(i64),
    Float(f32),
}

impl<'a> From<&'a Tensor> for Arg<'a> {
    fn from(tensor: &'a Tensor) -> Arg<'a> {
        Arg::Tensor(tensor)
    }
}

impl<'a> From<Option<&'a Tensor>> for Arg<'a> {
    fn from(tensor: Option<&'a Tensor>) -> Arg<'a> {
        tensor.map_or(Arg::Null, Arg::Tensor)
    }
}

impl From<i32> for Arg<'_> {
    fn from(number: i32) -> Self {
        Arg::Int(number)
    }
}

impl From<i64> for Arg<'_> {
    fn from(number: i64) -> Self {
        Arg::Long(number)
    }
}

impl From<f32> for Arg<'_> {
    fn from(number: f32) -> Self {
        Arg::Float(number)
    }
}

impl Arg<'_> {
    /// Its bytes from the lowest on, as kernels' arguments lie.
    fn bits(self) -> u64 {
        match self {
            Arg::Tensor(tensor) => tensor.data_ptr() as u64,
            Arg::Null => 0,
            Arg::Int(number) => u64::from(number as u32),
            Arg::Long(number) => number as u64,
            Arg::Float(number) => u64::from(number.to_bits()),
        }
    }
}

impl Gpu {
    /// Threads that go in step: AMD's waves, NVIDIA's warps.
    pub(crate) fn warp(self) -> u32 {
        match self.lanes {
            Lanes::Cdna => 64,
            Lanes::Rdna | Lanes::Nvidia => 32,
        }
    }

    /// Queues a kernel of `kernels/gpu` on the device, `grid` blocks of `threads`. Nothing is launched for an empty grid.
    ///
    /// # Panics
    /// When the device has no such kernel, or of another number of arguments, or a GPU's driver refuses. What the arguments are is the caller's to
    /// know: a kernel writes where it is told to.
    pub(crate) fn launch(self, name: &str, grid: [usize; 3], threads: u32, args: &[Arg]) {
        let grid = grid.map(|n| u32::try_from(n).expect("a grid of 32 bits"));
        if grid.contains(&0) {
            return;
        }
        launches::launched(name);
        let values: Vec<u64> = args.iter().map(|arg| arg.bits()).collect();
        match self.driver {
            None => emu::launch(self.lanes, name, grid, threads, &values),
            Some(driver) => driver
                .launch(name, grid, threads, &values)
                .unwrap_or_else(|why| panic!("{why}")),
        }
    }
}

/// A size as kernels take it.
///
/// # Panics
/// Beyond 2^31.
pub(crate) fn int(n: impl TryInto<i32>) -> Arg<'static> {
    Arg::Int(n.try_into().ok().expect("a size below 2^31"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulated_device_is_this_threads_for_as_long_as_it_runs() {
        assert!(of(&Tensor::zeros([1], (Kind::Float, Device::Cpu))).is_none());
        let inner = emulated(Lanes::Rdna, || {
            emulated(Lanes::Nvidia, || assert_eq!(emulating(), Some(Lanes::Nvidia)));
            assert!(std::thread::spawn(emulating).join().unwrap().is_none());
            emulating()
        });
        assert_eq!((inner, emulating()), (Some(Lanes::Rdna), None));
        assert_eq!("cdna".parse(), Ok(Lanes::Cdna));
        assert!(
            "amd"
                .parse::<Lanes>()
                .unwrap_err()
                .contains("cdna, rdna or nvidia")
        );
    }

    #[test]
    #[should_panic(expected = "no kernel rms_norm of 2 arguments")]
    fn a_launch_that_fits_no_kernel_is_an_error() {
        let gpu = emulated(Lanes::Cdna, || on(Device::Cpu)).unwrap();
        gpu.launch("rms_norm", [1, 1, 1], 256, &[Arg::Null, Arg::Int(1)]);
    }
}
