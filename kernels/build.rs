//! Compiles the C++ shim (`csrc`) against the libtorch that torch-sys found, then does what every package with binaries
//! or tests does (`link.rs`).

use std::path::{Path, PathBuf};

#[path = "embed.rs"]
mod embed;
#[allow(dead_code)] // Some of it is for the test that links.
#[path = "link.rs"]
mod link;

fn main() {
    link::main();
    embed::main();
    println!("cargo:rerun-if-changed=csrc");
    for name in ["ROCM_PATH", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    // Not there where only documentation is made.
    let lib = std::env::var("DEP_TCH_LIBTORCH_LIB").unwrap_or_default();
    let lib = Path::new(&lib);
    let has = |name: &str| lib.join(name).exists();
    let flavour = match (has("libtorch_hip.so"), has("libtorch_cuda.so")) {
        (true, _) => "rocm",
        (_, true) => "cuda",
        _ => "cpu",
    };
    println!("cargo:rustc-env=TANDEM_LIBTORCH_FLAVOUR={flavour}");
    let gpu = gpu_headers(lib);
    let collectives = if matches!(gpu, Gpu::Cuda(_) | Gpu::Rocm(_)) {
        "yes"
    } else {
        "no"
    };
    println!("cargo:rustc-env=TANDEM_COLLECTIVES={collectives}");
    if lib.as_os_str().is_empty() {
        return;
    }
    emulated_device();
    let include = lib.join("../include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        // Every call of it waits for a network; optimising libtorch's headers takes three times as long.
        .opt_level(0)
        .debug(false)
        .include("csrc")
        .flag("-isystem")
        .flag(&include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"))
        .define("USE_C10D_GLOO", None)
        .files(["csrc/c10d.cpp", "csrc/gpu.cpp", "csrc/ops.cpp"]);
    match gpu {
        Gpu::None => (),
        Gpu::Cuda(folders) => {
            build.define("USE_C10D_NCCL", None);
            build.includes(folders);
        }
        Gpu::Rocm(folder) => {
            for (name, value) in [
                ("USE_C10D_NCCL", None),
                ("USE_ROCM", None),
                ("__HIP_PLATFORM_AMD__", Some("1")),
                ("HIPBLAS_V2", None),
            ] {
                build.define(name, value);
            }
            build.include(folder);
        }
        Gpu::Headless(what) => {
            println!("cargo:warning={what}: built without NCCL, so ranks on several GPUs will be refused")
        }
    }
    build.compile("tandem_shim");
}

/// The GPU kernels for the CPU, in each maker's lanes (`gpu/emu.cpp`).
fn emulated_device() {
    println!("cargo:rerun-if-changed=gpu");
    let out = std::env::var("OUT_DIR").expect("Cargo names the folder of what a build makes");
    let compile = |lanes: &str| {
        // An object goes by its source's name, so one source compiled three times at once needs three folders.
        let folder = Path::new(&out).join(format!("lanes{lanes}"));
        std::fs::create_dir_all(&folder).expect("the folder of what a build makes takes folders");
        let mut build = cc::Build::new();
        build
            .out_dir(folder)
            .cpp(true)
            .std("c++20")
            .opt_level(2)
            .debug(false)
            .define("GPU_TILE", lanes)
            .warnings(false) // Those of the compilers for GPUs count.
            .file("gpu/emu.cpp")
            .compile(&format!("tandem_emu_{lanes}"));
    };
    std::thread::scope(|scope| {
        for lanes in ["1", "2", "3"] {
            scope.spawn(move || compile(lanes));
        }
    });
}

enum Gpu {
    /// A libtorch for the CPU.
    None,
    Cuda(Vec<PathBuf>),
    Rocm(PathBuf),
    /// A libtorch for a GPU, but not the headers its NCCL group includes: what is missing.
    Headless(String),
}

fn gpu_headers(lib: &Path) -> Gpu {
    if lib.join("libtorch_hip.so").exists() {
        let root = std::env::var("ROCM_PATH").unwrap_or_else(|_| "/opt/rocm".to_owned());
        let folder = Path::new(&root).join("include");
        return match folder.join("rccl/rccl.h").exists() {
            true => Gpu::Rocm(folder),
            false => Gpu::Headless(format!("no HIP and RCCL headers in {}", folder.display())),
        };
    }
    if !lib.join("libtorch_cuda.so").exists() {
        return Gpu::None;
    }
    // Beside a torch of pip lie NVIDIA's packages; else a CUDA toolkit.
    let packages = lib.join("../../nvidia");
    let toolkit = std::env::var("CUDA_HOME").unwrap_or_else(|_| "/usr/local/cuda".to_owned());
    let toolkit = Path::new(&toolkit).join("include");
    let mut folders: Vec<PathBuf> = ["cu13/include", "cu13/include/cccl", "nccl/include"]
        .map(|folder| packages.join(folder))
        .into();
    folders.extend([toolkit.clone(), toolkit.join("cccl")]);
    folders.retain(|folder| folder.is_dir());
    for header in ["nccl.h", "cuda_runtime_api.h", "crt/host_config.h"] {
        let system = Path::new("/usr/include").to_path_buf();
        if !folders
            .iter()
            .chain([&system])
            .any(|folder| folder.join(header).exists())
        {
            return Gpu::Headless(format!("no {header} in {folders:?}"));
        }
    }
    Gpu::Cuda(folders)
}
