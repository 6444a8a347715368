//! Whether libtorch's GPU side is there at all. The linker drops a library that nothing refers to, libtorch then knows no
//! GPU, and a program that was meant for one computes on the CPU without a word: so this is asked at start. Not here:
//! whether the GPU computes well.

use std::ffi::c_int;
use std::path::PathBuf;

use crate::KernelError;

/// The libraries that register a GPU backend by being loaded.
const LIBRARIES: [&str; 2] = ["libtorch_cuda.so", "libtorch_hip.so"];

unsafe extern "C" {
    fn tandem_gpu_registered() -> c_int;
    fn tandem_gpu_memory(index: c_int, free_bytes: *mut u64, total_bytes: *mut u64) -> c_int;
}

/// What the libtorch this program was built with computes on: `cpu`, `cuda` or `rocm`.
pub fn flavour() -> &'static str {
    env!("TANDEM_LIBTORCH_FLAVOUR")
}

/// What adds up the parts of ranks on several GPUs, or why nothing does.
pub fn sums() -> String {
    match (flavour(), env!("TANDEM_COLLECTIVES")) {
        ("cpu", _) => "none: libtorch is built for the CPU".to_owned(),
        (_, "no") => "none: built without NCCL's headers, so ranks on several GPUs are refused".to_owned(),
        ("rocm", _) => "RCCL".to_owned(),
        _ => "NCCL".to_owned(),
    }
}

/// Has a GPU backend registered itself? (There may be no GPU all the same.)
pub fn registered() -> bool {
    // SAFETY: asks a registry; no arguments, and the C++ side catches what it throws.
    unsafe { tandem_gpu_registered() != 0 }
}

/// Of one GPU, in bytes, whoever uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub free: u64,
    pub total: u64,
}

/// `None` where there is no such GPU. What libtorch keeps for later counts as used.
pub fn memory(index: usize) -> Option<Memory> {
    let index = c_int::try_from(index).ok().filter(|_| registered())?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: both pointers are to live u64; the C++ side checks the index and catches what it throws.
    let told = unsafe { tandem_gpu_memory(index, &mut free, &mut total) };
    (told != 0).then_some(Memory { free, total })
}

/// An error where a GPU was meant and would silently not be used: libtorch has a GPU library, or this program was built
/// for one, but no GPU backend is registered. For every start that may choose a GPU.
pub fn gpu_check() -> Result<(), KernelError> {
    let folder = libtorch_folder();
    let lying = LIBRARIES
        .into_iter()
        .find(|name| folder.as_ref().is_some_and(|folder| folder.join(name).exists()));
    judge(lying, flavour(), registered())
}

fn judge(lying: Option<&str>, flavour: &str, registered: bool) -> Result<(), KernelError> {
    let why = match (registered, lying, flavour) {
        (true, ..) | (_, None, "cpu") => return Ok(()),
        (_, Some(library), "cpu") => format!(
            "{library} lies in libtorch's folder, but this program was built for the CPU: build it again with that libtorch"
        ),
        (_, Some(library), _) => {
            format!(
                "{library} is there, but was dropped when this program was linked (link arguments of kernels/link.rs)"
            )
        }
        (_, None, flavour) => {
            format!("this program was built for {flavour}, but the libtorch it found has no GPU library")
        }
    };
    Err(KernelError::Device(format!(
        "no GPU backend is registered, all would be computed on the CPU: {why}; \
         --device cpu says that this is meant"
    )))
}

/// Where the libtorch of this process lies.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let path = PathBuf::from(&line[line.find('/')?..]);
    path.parent().map(PathBuf::from)
}

#[cfg(test)]
#[allow(dead_code)] // Its main is the build script's.
#[path = "../../link.rs"]
mod link;

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_gpu_that_would_not_be_used_is_an_error() {
        for (lying, flavour, registered, says) in [
            (None, "cpu", false, None),
            (Some("libtorch_hip.so"), "rocm", true, None),
            (None, "cuda", true, None),
            (Some("libtorch_hip.so"), "rocm", false, Some("was dropped when")),
            (
                Some("libtorch_cuda.so"),
                "cpu",
                false,
                Some("was built for the CPU"),
            ),
            (None, "rocm", false, Some("was built for rocm, but")),
        ] {
            match (judge(lying, flavour, registered), says) {
                (Ok(()), None) => (),
                (Err(error), Some(says)) => assert!(error.to_string().contains(says), "{error}"),
                (found, _) => panic!("{lying:?} {flavour} {registered}: {found:?}"),
            }
        }
        gpu_check().expect("this build uses what its libtorch has");
        assert_eq!(
            memory(tch::Cuda::device_count().max(0) as usize),
            None,
            "one GPU too many"
        );
    }

    /// This binary, made with the link arguments of every package here, needs the GPU libraries that libtorch has.
    #[test]
    fn this_binary_needs_its_libtorch() {
        let needed = needed(&std::env::current_exe().unwrap());
        let folder = libtorch_folder().expect("libtorch is loaded");
        assert!(needed.iter().any(|name| name == "libtorch_cpu.so"), "{needed:?}");
        for name in LIBRARIES {
            let lies = folder.join(name).exists();
            assert_eq!(
                needed.iter().any(|needed| needed == name),
                lies,
                "{name}: {needed:?}"
            );
        }
    }

    /// Programs of rustc with empty GPU libraries: dropped as they are, kept by our link arguments.
    #[test]
    fn link_arguments_keep_a_gpu_library() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("main.rs"), "fn main() {}").unwrap();
        for (library, others) in [("torch_hip", vec!["c10_hip"]), ("torch_cuda", vec![])] {
            let names: Vec<&str> = std::iter::once(library).chain(others).collect();
            for name in &names {
                let mut cc = Command::new("cc");
                cc.args(["-shared", "-fPIC", "-x", "c", "/dev/null", "-o"])
                    .arg(at(&format!("lib{name}.so")))
                    .arg(format!("-Wl,-soname,lib{name}.so"));
                run(&mut cc);
            }
            for (arguments, kept) in [(Vec::new(), false), (link::gpu_arguments(folder.path()), true)] {
                let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
                rustc.arg(at("main.rs")).arg("-o").arg(at("main"));
                rustc.arg("-L").arg(folder.path());
                // As torch-sys asks for them.
                rustc.args(names.iter().map(|name| format!("-l{name}")));
                rustc.args(arguments.iter().map(|argument| format!("-Clink-arg={argument}")));
                run(&mut rustc);
                let needed = needed(&at("main"));
                for name in &names {
                    let name = format!("lib{name}.so");
                    assert_eq!(
                        needed.contains(&name),
                        kept,
                        "{name} with {arguments:?}: {needed:?}"
                    );
                }
            }
        }
    }

    fn run(command: &mut Command) {
        let status = command
            .status()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(status.success(), "{command:?}: {status}");
    }

    /// The libraries that a 64-bit little-endian ELF file says it needs, in order.
    fn needed(path: &Path) -> Vec<String> {
        const DYNAMIC: u64 = 2;
        const LOAD: u64 = 1;
        const NEEDED: u64 = 1;
        const STRINGS: u64 = 5;
        let file = std::fs::read(path).unwrap();
        assert_eq!(file[..6], *b"\x7fELF\x02\x01", "{path:?}");
        let number = |at: u64, bytes: usize| {
            let mut word = [0; 8];
            word[..bytes].copy_from_slice(&file[at as usize..at as usize + bytes]);
            u64::from_le_bytes(word)
        };
        // Segments: kind, offset in the file, address, size in the file.
        let (first, size, count) = (number(32, 8), number(54, 2), number(56, 2));
        let segments = (0..count).map(|i| first + i * size);
        let segments: Vec<[u64; 4]> = segments
            .map(|at| {
                [
                    number(at, 4),
                    number(at + 8, 8),
                    number(at + 16, 8),
                    number(at + 32, 8),
                ]
            })
            .collect();
        let in_file = |address: u64| {
            let holds = |[kind, _, begin, size]: &&[u64; 4]| {
                *kind == LOAD && (*begin..begin + size).contains(&address)
            };
            let [_, offset, begin, _] = segments.iter().find(holds).expect("a loaded address");
            address - begin + offset
        };
        let [_, dynamic, _, size] = segments
            .iter()
            .find(|segment| segment[0] == DYNAMIC)
            .expect("a dynamic program");
        let entries: Vec<(u64, u64)> = (0..size / 16)
            .map(|i| (number(dynamic + i * 16, 8), number(dynamic + i * 16 + 8, 8)))
            .collect();
        let (_, strings) = entries
            .iter()
            .find(|(tag, _)| *tag == STRINGS)
            .expect("a string table");
        let strings = in_file(*strings);
        let names = entries.iter().filter(|(tag, _)| *tag == NEEDED);
        names
            .map(|(_, at)| {
                let bytes = file[(strings + at) as usize..].iter();
                let name = bytes.take_while(|&&byte| byte != 0).copied().collect();
                String::from_utf8(name).unwrap()
            })
            .collect()
    }
}
