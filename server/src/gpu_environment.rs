//! What AMD's GPU runtime reads from the environment when it is loaded: set before that, or refused when it cannot be
//! meant. Not here: the CPU's libraries (process.rs), whether the GPU computes (backend).

use std::collections::BTreeMap;
use std::path::Path;

use tandem_backend::amd;

/// The runtime and the collectives' library are one copy each, or a call into the one waits for the other for ever.
const SINGLE: [&str; 3] = ["libamdhip64.so", "libhsa-runtime64.so", "librccl.so"];
/// Each hides GPUs and numbers the rest anew, one after the other.
const VISIBLE: [&str; 3] = [
    "HIP_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
];

/// Variables that the AMD GPUs under `root` (`/` on a real machine) want; none without such a GPU.
pub fn wanted(root: &Path) -> Vec<(&'static str, &'static str)> {
    let gpus = amd::gpus(root);
    let mut wanted = Vec::new();
    if !gpus.is_empty() {
        // Large scratch memory is given back after each kernel otherwise, and asked for again by the next.
        wanted.push(("HSA_NO_SCRATCH_RECLAIM", "1"));
        // Arguments of a kernel in the GPU's own memory: microseconds less for each launch.
        wanted.push(("HIP_FORCE_DEV_KERNARG", "1"));
    }
    // One channel for a third of the compute units, of which these have 304.
    if gpus.len() > 1 && gpus.iter().all(|gpu| gpu.gfx == "gfx942" && gpu.xcc == Some(8)) {
        wanted.push(("NCCL_MIN_NCHANNELS", "112"));
    }
    wanted
}

/// Refuses what would hide GPUs twice. `set` says whether a variable is set.
pub fn check_visible(root: &Path, set: impl Fn(&str) -> bool) -> Result<(), String> {
    if amd::gpus(root).is_empty() {
        return Ok(());
    }
    let given: Vec<&str> = VISIBLE.into_iter().filter(|name| set(name)).collect();
    match given.len() {
        0 | 1 => Ok(()),
        _ => Err(format!(
            "{} are set: each hides GPUs and numbers the rest anew; set one of them",
            given.join(" and ")
        )),
    }
}

/// Refuses a process into which two copies of the runtime were loaded. `maps` is /proc/self/maps.
pub fn check_libraries(maps: &str) -> Result<(), String> {
    let mut copies: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for path in maps.lines().filter_map(|line| Some(&line[line.find('/')?..])) {
        let file = path.rsplit('/').next().unwrap_or(path);
        let Some(library) = SINGLE.into_iter().find(|library| file.starts_with(library)) else {
            continue;
        };
        let paths = copies.entry(library).or_default();
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    match copies.into_iter().find(|(_, paths)| paths.len() > 1) {
        None => Ok(()),
        Some((library, paths)) => Err(format!(
            "{library} was loaded more than once ({}): in LD_LIBRARY_PATH, libtorch's folder must stand before ROCm's",
            paths.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder in which `gpus` AMD GPUs of a kind are shown.
    fn machine(gpus: usize, version: u32, xcc: u32) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for node in 0..=gpus {
            let folder = root
                .path()
                .join(format!("sys/class/kfd/kfd/topology/nodes/{node}"));
            std::fs::create_dir_all(&folder).unwrap();
            // The first node is the processor.
            let version = if node == 0 { 0 } else { version };
            let properties = format!("gfx_target_version {version}\nnum_xcc {xcc}\n");
            std::fs::write(folder.join("properties"), properties).unwrap();
        }
        root
    }

    #[test]
    fn each_machine_gets_what_it_wants() {
        for (gpus, version, xcc, expected) in [
            (0, 0, 0, vec![]),
            (
                1,
                110_000,
                1,
                vec!["HSA_NO_SCRATCH_RECLAIM", "HIP_FORCE_DEV_KERNARG"],
            ),
            (
                1,
                90_402,
                8,
                vec!["HSA_NO_SCRATCH_RECLAIM", "HIP_FORCE_DEV_KERNARG"],
            ),
            (
                2,
                90_010,
                1,
                vec!["HSA_NO_SCRATCH_RECLAIM", "HIP_FORCE_DEV_KERNARG"],
            ),
            (
                8,
                90_402,
                8,
                vec![
                    "HSA_NO_SCRATCH_RECLAIM",
                    "HIP_FORCE_DEV_KERNARG",
                    "NCCL_MIN_NCHANNELS",
                ],
            ),
        ] {
            let root = machine(gpus, version, xcc);
            let names: Vec<&str> = wanted(root.path()).into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, expected, "{gpus} GPUs of version {version}");
        }
    }

    #[test]
    fn gpus_are_hidden_once() {
        let (amd, none) = (machine(2, 90_402, 8), machine(0, 0, 0));
        for (set, expected) in [
            (vec![], None),
            (vec!["HIP_VISIBLE_DEVICES"], None),
            (
                vec!["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"],
                Some("HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES"),
            ),
        ] {
            let is_set = |name: &str| set.contains(&name);
            let found = check_visible(amd.path(), is_set);
            assert_eq!(found.is_err(), expected.is_some(), "{set:?}");
            if let (Err(message), Some(expected)) = (found, expected) {
                assert!(message.starts_with(expected), "{message}");
            }
            assert_eq!(check_visible(none.path(), is_set), Ok(()));
        }
    }

    #[test]
    fn one_copy_of_the_runtime() {
        let line = |path: &str| format!("7f01-7f02 r-xp 00000000 fe:01 77    {path}\n");
        let own = line("/opt/tandem/torch/lib/librccl.so.1") + &line("/opt/tandem/torch/lib/librccl.so.1");
        assert_eq!(check_libraries(&own), Ok(()));
        let mixed = own + "7f03-7f04 rw-p 00000000 00:00 0\n" + &line("/opt/rocm/lib/librccl.so.1");
        let message = check_libraries(&mixed).unwrap_err();
        assert!(message.contains("/opt/rocm/lib/librccl.so.1"), "{message}");
        assert_eq!(
            check_libraries(&std::fs::read_to_string("/proc/self/maps").unwrap()),
            Ok(())
        );
    }
}
