//! The NVIDIA GPUs of this machine as the driver's own library shows them (NVML, opened at run time: without a driver there are
//! none). No GPU is opened, nothing set. Not here: which GPU computes.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

use crate::gpu::library::Library;

/// One GPU. What the driver does not tell is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gpu {
    /// NVML's number, in the order of the bus: libtorch's may differ (CUDA_DEVICE_ORDER, CUDA_VISIBLE_DEVICES).
    pub index: usize,
    pub name: Option<String>,
    /// `sm_90`.
    pub architecture: Option<String>,
    pub memory_bytes: Option<u64>,
    pub memory_used_bytes: Option<u64>,
    /// Of the last sample period, in which some kernel ran.
    pub busy_percent: Option<u32>,
    pub power_watts: Option<f64>,
    pub temperature_celsius: Option<f64>,
}

/// The GPUs that the driver tells of now. None where there is no driver.
pub fn gpus() -> Vec<Gpu> {
    static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
    let nvml = NVML.get_or_init(|| Nvml::open("libnvidia-ml.so.1").ok());
    nvml.as_ref().map(Nvml::gpus).unwrap_or_default()
}

type Device = *mut c_void;
type Code = c_int;

/// As in nvml.h.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

#[repr(C)]
#[derive(Default)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

struct Nvml {
    library: Library,
}

impl Nvml {
    fn open(path: &str) -> Result<Nvml, String> {
        let library = Library::open(&[path])?;
        // SAFETY: the signature of nvml.h. It is never shut down: it is asked as long as the process lives.
        let code = unsafe { library.function::<unsafe extern "C" fn() -> Code>(c"nvmlInit_v2")?() };
        match code {
            0 => Ok(Nvml { library }),
            code => Err(format!("NVML's error {code}")),
        }
    }

    fn gpus(&self) -> Vec<Gpu> {
        let mut count: c_uint = 0;
        // SAFETY: the signature of nvml.h, a place for the number.
        let counted = unsafe {
            self.library
                .function::<unsafe extern "C" fn(*mut c_uint) -> Code>(c"nvmlDeviceGetCount_v2")
                .is_ok_and(|get| get(&mut count) == 0)
        };
        let all = 0..if counted { count } else { 0 };
        all.filter_map(|index| self.gpu(index)).collect()
    }

    fn gpu(&self, index: c_uint) -> Option<Gpu> {
        const TEXT: usize = 96; // NVML_DEVICE_NAME_V2_BUFFER_SIZE
        const OF_THE_DIE: c_uint = 0; // NVML_TEMPERATURE_GPU
        let library = &self.library;
        let mut device = null_mut();
        // SAFETY: the signatures of nvml.h; every place is a live variable of the type that is written.
        unsafe {
            let handle: unsafe extern "C" fn(c_uint, *mut Device) -> Code =
                library.function(c"nvmlDeviceGetHandleByIndex_v2").ok()?;
            if handle(index, &mut device) != 0 {
                return None;
            }
            let memory = get::<Memory>(library, c"nvmlDeviceGetMemoryInfo", device);
            let mut text = [0 as c_char; TEXT];
            let name = library
                .function::<unsafe extern "C" fn(Device, *mut c_char, c_uint) -> Code>(c"nvmlDeviceGetName")
                .is_ok_and(|name| name(device, text.as_mut_ptr(), TEXT as c_uint) == 0);
            let (mut major, mut minor) = (0, 0);
            let capability = library
                .function::<unsafe extern "C" fn(Device, *mut c_int, *mut c_int) -> Code>(
                    c"nvmlDeviceGetCudaComputeCapability",
                )
                .is_ok_and(|get| get(device, &mut major, &mut minor) == 0);
            let mut celsius: c_uint = 0;
            let temperature = library
                .function::<unsafe extern "C" fn(Device, c_uint, *mut c_uint) -> Code>(
                    c"nvmlDeviceGetTemperature",
                )
                .is_ok_and(|get| get(device, OF_THE_DIE, &mut celsius) == 0);
            Some(Gpu {
                index: index as usize,
                name: name.then(|| CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned()),
                architecture: capability.then(|| format!("sm_{major}{minor}")),
                memory_bytes: memory.as_ref().map(|memory| memory.total),
                memory_used_bytes: memory.as_ref().map(|memory| memory.used),
                busy_percent: get::<Utilization>(library, c"nvmlDeviceGetUtilizationRates", device)
                    .map(|rates| rates.gpu),
                power_watts: get::<c_uint>(library, c"nvmlDeviceGetPowerUsage", device)
                    .map(|milliwatts| f64::from(milliwatts) / 1e3),
                temperature_celsius: temperature.then(|| f64::from(celsius)),
            })
        }
    }
}

/// What a function of this name tells of a device.
///
/// # Safety
/// It is `nvmlReturn_t name(nvmlDevice_t, T*)`, and the device is one of the library's.
unsafe fn get<T: Default>(library: &Library, name: &CStr, device: Device) -> Option<T> {
    let mut value = T::default();
    // SAFETY: of that signature, a place for the value.
    let told = unsafe {
        library
            .function::<unsafe extern "C" fn(Device, *mut T) -> Code>(name)
            .is_ok_and(|get| get(device, &mut value) == 0)
    };
    told.then_some(value)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Two GPUs: one tells all, one its memory only, a third is lost.
    const FAKE: &str = r#"
        #include <string.h>
        typedef struct { unsigned long long total, free, used; } Memory;
        typedef struct { unsigned gpu, memory; } Utilization;
        int nvmlInit_v2(void) { return FAILS; }
        int nvmlDeviceGetCount_v2(unsigned* n) { return *n = 3, 0; }
        int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** device) { return *device = (void*)(long)(i + 1), i == 2 ? 15 : 0; }
        int nvmlDeviceGetMemoryInfo(void* d, Memory* to) { return *to = (Memory){1000, 900, 100 * (long)d}, 0; }
        int nvmlDeviceGetUtilizationRates(void* d, Utilization* to) { return *to = (Utilization){37, 5}, (long)d > 1; }
        int nvmlDeviceGetPowerUsage(void* d, unsigned* to) { return *to = 139500, (long)d > 1; }
        int nvmlDeviceGetTemperature(void* d, unsigned sensor, unsigned* to) { return *to = 41, sensor || (long)d > 1; }
        int nvmlDeviceGetName(void* d, char* to, unsigned n) { return strncpy(to, "NVIDIA H200", n), (long)d > 1; }
        int nvmlDeviceGetCudaComputeCapability(void* d, int* major, int* minor) { return *major = 9, *minor = 0, (long)d > 1; }
    "#;

    #[test]
    fn what_the_library_tells_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("nvml.c");
        std::fs::write(&source, FAKE).unwrap();
        let open = |fails: u32| {
            let library = folder.path().join(format!("nvml{fails}.so"));
            let mut cc = Command::new("cc");
            cc.args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
                .arg(&library)
                .arg(&source);
            assert!(cc.arg(format!("-DFAILS={fails}")).status().unwrap().success());
            Nvml::open(library.to_str().unwrap())
        };
        assert!(open(9).err().unwrap().contains("error 9"));
        let all = Gpu {
            index: 0,
            name: Some("NVIDIA H200".to_owned()),
            architecture: Some("sm_90".to_owned()),
            memory_bytes: Some(1000),
            memory_used_bytes: Some(100),
            busy_percent: Some(37),
            power_watts: Some(139.5),
            temperature_celsius: Some(41.0),
        };
        let little = Gpu {
            index: 1,
            memory_bytes: Some(1000),
            memory_used_bytes: Some(200),
            ..Gpu::default()
        };
        assert_eq!(open(0).unwrap().gpus(), [all, little]);
        assert!(Nvml::open("no-such-library.so").is_err());
    }
}
