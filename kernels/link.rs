//! Build script of every package here that makes a binary or a test: tells the linker where libtorch stands.
//! (A link argument does not travel from a library to a dependent binary, so each such package runs this file.)

use std::path::Path;

pub fn main() {
    println!("cargo:rerun-if-changed=../third_party/stamp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        return;
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    for argument in gpu_arguments(Path::new(&lib)) {
        println!("cargo:rustc-link-arg={argument}");
    }
}

/// The linker drops libraries nothing refers to, and the GPU library registers itself by being loaded (tch-rs issue
/// 1015: the program then runs silently on the CPU).
pub fn gpu_arguments(lib: &Path) -> Vec<String> {
    ["torch_cuda", "torch_hip", "c10_cuda", "c10_hip"]
        .iter()
        .filter(|name| lib.join(format!("lib{name}.so")).exists())
        .map(|name| format!("-Wl,--push-state,--no-as-needed,-l{name},--pop-state"))
        .collect()
}
