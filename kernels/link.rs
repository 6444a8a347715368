//! Build script of every package here that makes a binary or a test: tells the linker where libtorch stands.
//! (A link argument does not travel from a library to a dependent binary, so each such package runs this file.)

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=../third_party/stamp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        return;
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    // The linker drops libraries nothing refers to, and the GPU library registers itself by being loaded
    // (tch-rs issue 1015: the program then runs silently on the CPU).
    for gpu in ["torch_cuda", "torch_hip"] {
        if Path::new(&lib).join(format!("lib{gpu}.so")).exists() {
            println!("cargo:rustc-link-arg=-Wl,--push-state,--no-as-needed,-l{gpu},--pop-state");
        }
    }
}
