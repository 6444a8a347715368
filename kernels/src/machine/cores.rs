//! How many threads compute: one for each physical core that this process may use. Two threads of one core share its
//! multipliers, so the second only takes caches from the first. And no more than its share of processor time: a
//! container's limit (cgroup) stops all threads together when it is used up.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

/// At least 1.
pub fn compute_threads() -> usize {
    // Of affinity and cgroup quotas, in logical processors.
    let granted = std::thread::available_parallelism().map_or(1, usize::from);
    physical(Path::new("/")).map_or(granted, |cores| cores.min(granted))
}

/// Distinct cores of the processors that this process may run on. `None` where the system does not say.
fn physical(root: &Path) -> Option<usize> {
    let status = fs::read_to_string(root.join("proc/self/status")).ok()?;
    let allowed = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = HashSet::new();
    for processor in processors(allowed)? {
        let topology = root.join(format!("sys/devices/system/cpu/cpu{processor}/topology"));
        // The older name on kernels before 5.5.
        let siblings = ["core_cpus_list", "thread_siblings_list"]
            .into_iter()
            .find_map(|name| fs::read_to_string(topology.join(name)).ok())?;
        cores.insert(siblings);
    }
    (!cores.is_empty()).then_some(cores.len())
}

/// `0-3,8` is 0, 1, 2, 3 and 8.
fn processors(list: &str) -> Option<Vec<usize>> {
    let mut all = vec![];
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        all.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_one_core_count_once() {
        // Four cores of two threads each, numbered as Linux does: 0 and 4 are one.
        let root = tempfile::tempdir().unwrap();
        for processor in 0..8 {
            let topology = root
                .path()
                .join(format!("sys/devices/system/cpu/cpu{processor}/topology"));
            fs::create_dir_all(&topology).unwrap();
            let core = processor % 4;
            fs::write(topology.join("core_cpus_list"), format!("{core},{}\n", core + 4)).unwrap();
        }
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        let allowed = |list: &str| {
            let status = format!("Name:\ttandem\nCpus_allowed:\tff\nCpus_allowed_list:\t{list}\n");
            fs::write(root.path().join("proc/self/status"), status).unwrap();
            physical(root.path())
        };
        assert_eq!(allowed("0-7"), Some(4));
        assert_eq!(allowed("0,4"), Some(1));
        assert_eq!(allowed("1-2,6"), Some(2));
        assert_eq!(allowed("3"), Some(1));
        assert_eq!(allowed("0-9"), None, "two that the system does not describe");
        assert_eq!(allowed("all of them"), None);
        assert!(compute_threads() >= 1);
    }
}
