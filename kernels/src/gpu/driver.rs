//! The kernels on a real GPU: the module of its architecture, loaded once, and launches on ATen's current stream. The two
//! makers' drivers differ in their names and in how a device is chosen; the rest is one. Not here: what is launched.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

use super::library::Library;
use super::{Lanes, objects, runtime};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Maker {
    Amd,
    Nvidia,
}

/// Where the libraries are.
pub(super) struct Libraries {
    pub maker: Maker,
    pub driver: Library,
    /// What has `aoti_torch_get_current_cuda_stream`.
    pub torch: Library,
    /// The names of the compiler, which is opened only when it is needed.
    pub compiler: Vec<String>,
}

impl Libraries {
    /// Those that libtorch uses: HIP's is in the process with a libtorch for ROCm; NVIDIA's comes with the kernel driver.
    fn of_libtorch() -> Result<Libraries, String> {
        let process = Library::of_the_process();
        let (maker, driver, compiler): (_, _, &[&str]) = match process.has(c"hipModuleLoadData") {
            true => (
                Maker::Amd,
                Library::of_the_process(),
                &[
                    "libhiprtc.so.7",
                    "libhiprtc.so.6",
                    "libhiprtc.so",
                    "libcaffe2_nvrtc.so",
                ],
            ),
            false => (
                Maker::Nvidia,
                Library::open(&["libcuda.so.1"])?,
                &["libnvrtc.so.13", "libnvrtc.so.12", "libcaffe2_nvrtc.so"],
            ),
        };
        Ok(Libraries {
            maker,
            driver,
            torch: process,
            compiler: compiler.iter().map(|&name| name.to_owned()).collect(),
        })
    }
}

type Handle = *mut c_void;
type Code = c_int;

type Launch = unsafe extern "C" fn(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    threads_x: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared_bytes: c_uint,
    stream: Handle,
    args: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Code;

/// How a thread is told which device it launches on.
enum Choose {
    Amd(unsafe extern "C" fn(c_int) -> Code),
    Nvidia(unsafe extern "C" fn(Handle) -> Code, Handle),
}

/// A device whose kernels are loaded.
pub(super) struct Driver {
    maker: Maker,
    device: c_int,
    architecture: String,
    compiled: bool,
    functions: HashMap<&'static str, usize>,
    driver: Library,
    choose: Choose,
    launch: Launch,
    stream: unsafe extern "C" fn(device: i32, stream: *mut Handle) -> i32,
}

// SAFETY: the handles of functions and of the primary context belong to the process, and both drivers may be called from
// any thread; nothing of it changes after `open`.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

impl Driver {
    /// Loads the kernels on libtorch's device of this number.
    pub fn open(device: i64) -> Result<Driver, String> {
        Driver::open_with(device, Libraries::of_libtorch()?)
    }

    pub fn open_with(device: i64, libraries: Libraries) -> Result<Driver, String> {
        let Libraries {
            maker,
            driver,
            torch,
            compiler,
        } = libraries;
        let device = c_int::try_from(device).map_err(|_| format!("device {device}"))?;
        // SAFETY: the signatures of hip_runtime_api.h, cuda.h and torch's shim.h.
        let (choose, launch, stream, architecture) = unsafe {
            let launch = driver.function::<Launch>(match maker {
                Maker::Amd => c"hipModuleLaunchKernel",
                Maker::Nvidia => c"cuLaunchKernel",
            })?;
            let stream = torch.function(c"aoti_torch_get_current_cuda_stream")?;
            let (choose, architecture) = match maker {
                Maker::Amd => amd(&driver, device)?,
                Maker::Nvidia => nvidia(&driver, device)?,
            };
            (choose, launch, stream, architecture)
        };
        let mut opened = Driver {
            maker,
            device,
            architecture,
            compiled: false,
            functions: HashMap::new(),
            driver,
            choose,
            launch,
            stream,
        };
        opened.choose().map_err(|why| format!("device {device}: {why}"))?;
        let module = opened.module(&compiler)?;
        // SAFETY: the signature of hipModuleGetFunction and cuModuleGetFunction.
        let get: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> Code = unsafe {
            opened.driver.function(match maker {
                Maker::Amd => c"hipModuleGetFunction",
                Maker::Nvidia => c"cuModuleGetFunction",
            })
        }?;
        for name in objects::kernels() {
            let c_name = CString::new(name).expect("a kernel's name");
            let mut function = null_mut();
            // SAFETY: a place for the handle, a live module, a string that ends.
            let code = unsafe { get(&mut function, module, c_name.as_ptr()) };
            opened.check(code, || format!("looking up the kernel {name}"))?;
            opened.functions.insert(name, function as usize);
        }
        Ok(opened)
    }

    /// What this program brings for the device; where there is nothing, or the driver does not take it, what the maker's
    /// compiler makes of the source here.
    fn module(&mut self, compiler: &[String]) -> Result<Handle, String> {
        // gfx942:sramecc+:xnack- is gfx942 with settings of the machine; an object is for all of them.
        let plain = self.architecture.split(':').next().unwrap_or_default();
        let refused = match objects::object(plain).map(|object| self.load(object)) {
            Some(Ok(module)) => return Ok(module),
            Some(Err(why)) => why,
            None => "no object of it is part of this program".to_owned(),
        };
        let names: Vec<&str> = compiler.iter().map(String::as_str).collect();
        let compiled = Library::open(&names)
            .and_then(|library| runtime::compile(&library, self.maker, &self.architecture))
            .and_then(|image| self.load(&image));
        self.compiled = true;
        compiled.map_err(|why| format!("{}: {refused}; compiled here: {why}", self.architecture))
    }

    fn load(&self, image: &[u8]) -> Result<Handle, String> {
        // SAFETY: the signature of hipModuleLoadData and cuModuleLoadData.
        let load: unsafe extern "C" fn(*mut Handle, *const c_void) -> Code = unsafe {
            self.driver.function(match self.maker {
                Maker::Amd => c"hipModuleLoadData",
                Maker::Nvidia => c"cuModuleLoadData",
            })
        }?;
        let mut module = null_mut();
        // SAFETY: a place for the handle, and a whole image, which says its own length. Both drivers copy it.
        let code = unsafe { load(&mut module, image.as_ptr().cast()) };
        self.check(code, || format!("loading the kernels for {}", self.architecture))?;
        Ok(module)
    }

    /// Queues a kernel on ATen's current stream of the device. `values` are its arguments' bytes from the lowest on.
    pub fn launch(
        &self,
        name: &str,
        [x, y, z]: [u32; 3],
        threads: u32,
        values: &[u64],
    ) -> Result<(), String> {
        let Some(&function) = self.functions.get(name) else {
            return Err(format!("no kernel {name}"));
        };
        self.choose()?;
        let mut stream = null_mut();
        // SAFETY: a place for the handle. ATen knows the device: its tensors are there.
        if unsafe { (self.stream)(self.device, &mut stream) } != 0 {
            return Err(format!(
                "libtorch has no current stream of device {}",
                self.device
            ));
        }
        let mut args: Vec<*mut c_void> = values
            .iter()
            .map(|value| (&raw const *value).cast_mut().cast())
            .collect();
        // SAFETY: a function of a module that stays loaded, a stream of ATen's, addresses of as many values as there are;
        // that the kernel takes so many, of these types, is the caller's to know, and the emulated device checks it.
        let code = unsafe {
            (self.launch)(
                function as Handle,
                x,
                y,
                z,
                threads,
                1,
                1,
                0,
                stream,
                args.as_mut_ptr(),
                null_mut(),
            )
        };
        self.check(code, || {
            format!("launching the kernel {name}, {x} x {y} x {z} blocks of {threads} threads")
        })
    }

    /// A thread has a current device; ATen may have left another one than this.
    fn choose(&self) -> Result<(), String> {
        // SAFETY: a device that was opened, its primary context, which is kept.
        let code = unsafe {
            match self.choose {
                Choose::Amd(set) => set(self.device),
                Choose::Nvidia(set, context) => set(context),
            }
        };
        self.check(code, || format!("choosing device {}", self.device))
    }

    fn check(&self, code: Code, doing: impl FnOnce() -> String) -> Result<(), String> {
        check(&self.driver, self.maker, code, doing)
    }

    pub fn lanes(&self) -> Lanes {
        match self.maker {
            Maker::Nvidia => Lanes::Nvidia,
            Maker::Amd if self.architecture.starts_with("gfx9") => Lanes::Cdna,
            Maker::Amd => Lanes::Rdna,
        }
    }

    /// One line for who asks what runs here.
    pub fn report(&self) -> String {
        let origin = match self.compiled {
            true => "compiled at the start",
            false => "embedded",
        };
        format!(
            "{} kernels for {}, {origin}",
            self.functions.len(),
            self.architecture
        )
    }
}

/// # Safety
/// The library is HIP's.
unsafe fn amd(driver: &Library, device: c_int) -> Result<(Choose, String), String> {
    // hipDeviceProp_t has grown from release to release; the architecture is the one text in it that begins so.
    const PROPERTIES: usize = 16 << 10;
    const NAME: usize = 256;
    // SAFETY: the signatures of hip_runtime_api.h.
    let (set, properties) = unsafe {
        let set: unsafe extern "C" fn(c_int) -> Code = driver.function(c"hipSetDevice")?;
        let properties: unsafe extern "C" fn(*mut u8, c_int) -> Code = driver
            .function(c"hipGetDevicePropertiesR0600")
            .or_else(|_| driver.function(c"hipGetDeviceProperties"))?;
        (set, properties)
    };
    let mut bytes = vec![0; PROPERTIES];
    // SAFETY: more room than any release's hipDeviceProp_t takes (1.5 kB).
    let code = unsafe { properties(bytes.as_mut_ptr(), device) };
    check(driver, Maker::Amd, code, || format!("asking for device {device}"))?;
    let rest = &bytes[NAME..];
    let at = rest.windows(4).position(|window| window == b"\0gfx");
    let text = at.and_then(|at| CStr::from_bytes_until_nul(&rest[at + 1..]).ok());
    let text = text.and_then(|text| text.to_str().ok());
    let text = text.ok_or_else(|| format!("HIP names no architecture of device {device}"))?;
    Ok((Choose::Amd(set), text.to_owned()))
}

/// # Safety
/// The library is NVIDIA's driver.
unsafe fn nvidia(driver: &Library, device: c_int) -> Result<(Choose, String), String> {
    const MAJOR: c_int = 75; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    const MINOR: c_int = 76;
    let ok = |code, what: &str| {
        check(driver, Maker::Nvidia, code, || {
            format!("{what} of device {device}")
        })
    };
    // SAFETY: the signatures of cuda.h; each place is a live variable.
    unsafe {
        let init: unsafe extern "C" fn(c_uint) -> Code = driver.function(c"cuInit")?;
        let get: unsafe extern "C" fn(*mut c_int, c_int) -> Code = driver.function(c"cuDeviceGet")?;
        let attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Code =
            driver.function(c"cuDeviceGetAttribute")?;
        let retain: unsafe extern "C" fn(*mut Handle, c_int) -> Code =
            driver.function(c"cuDevicePrimaryCtxRetain")?;
        let set: unsafe extern "C" fn(Handle) -> Code = driver.function(c"cuCtxSetCurrent")?;
        ok(init(0), "the driver")?;
        let (mut handle, mut major, mut minor, mut context) = (0, 0, 0, null_mut());
        ok(get(&mut handle, device), "the handle")?;
        ok(attribute(&mut major, MAJOR, handle), "the compute capability")?;
        ok(attribute(&mut minor, MINOR, handle), "the compute capability")?;
        // ATen's own context, too.
        ok(retain(&mut context, handle), "the primary context")?;
        Ok((Choose::Nvidia(set, context), format!("sm_{major}{minor}")))
    }
}

/// An error says code, name and what was being done. "HIP error" and "CUDA error" are how ATen begins, too: a replica
/// then knows its device for lost.
fn check(driver: &Library, maker: Maker, code: Code, doing: impl FnOnce() -> String) -> Result<(), String> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the signatures of hip_runtime_api.h and cuda.h; texts that end and stay.
    let text = unsafe {
        let text = match maker {
            Maker::Amd => driver
                .function::<unsafe extern "C" fn(Code) -> *const c_char>(c"hipGetErrorString")
                .map(|text| text(code)),
            Maker::Nvidia => driver
                .function::<unsafe extern "C" fn(Code, *mut *const c_char) -> Code>(c"cuGetErrorString")
                .map(|text| {
                    let mut to = std::ptr::null();
                    text(code, &mut to);
                    to
                }),
        };
        match text {
            Ok(text) if !text.is_null() => CStr::from_ptr(text).to_string_lossy().into_owned(),
            _ => "unknown".to_owned(),
        }
    };
    let maker = match maker {
        Maker::Amd => "HIP",
        Maker::Nvidia => "CUDA",
    };
    Err(format!("{maker} error {code} ({text}) when {}", doing()))
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
