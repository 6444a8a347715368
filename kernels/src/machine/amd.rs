//! The AMD GPUs of this machine as the kernel driver shows them in files: no library, no device opened, nothing set. Each
//! file is read only if it is there: drivers, partitions and containers differ in what they show. Not here: which GPU
//! computes (libtorch's numbering follows its own environment variables).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where the compute driver (KFD) lists its nodes; processors are nodes too.
const NODES: &str = "sys/class/kfd/kfd/topology/nodes";
const DRM: &str = "sys/class/drm";

/// One GPU, or one partition of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gpu {
    /// Number among the driver's GPUs, from 0, in its order.
    pub index: usize,
    /// `gfx942`.
    pub gfx: String,
    /// The board's name, where the driver knows it.
    pub name: Option<String>,
    /// Threads of a wavefront: 64 or 32.
    pub wave: Option<u32>,
    /// Compute dies.
    pub xcc: Option<u32>,
    /// GPUs of one number reach each other over XGMI.
    pub hive: Option<u64>,
    /// `N` of `/dev/dri/renderDN`.
    pub render_minor: Option<u32>,
    /// SPX, DPX, QPX, CPX: how the compute dies are shared out.
    pub compute_partition: Option<String>,
    /// NPS1, NPS4: how the memory is.
    pub memory_partition: Option<String>,
    /// The memory node of the host that it is attached to.
    pub numa_node: Option<u32>,
    pub vram_total_bytes: Option<u64>,
    pub vram_used_bytes: Option<u64>,
    pub busy_percent: Option<u32>,
    pub power_watts: Option<f64>,
    /// Of the hottest place (the junction), where the driver says which that is.
    pub temperature_celsius: Option<f64>,
}

/// The GPUs under `root` (`/` on a real machine), in the driver's order. None where there is no driver.
pub fn gpus(root: &Path) -> Vec<Gpu> {
    let Ok(entries) = fs::read_dir(root.join(NODES)) else {
        return Vec::new();
    };
    let mut nodes: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    nodes.sort_unstable();
    let gpus = nodes.into_iter().filter_map(|node| gpu(root, node));
    gpus.enumerate()
        .map(|(index, gpu)| Gpu { index, ..gpu })
        .collect()
}

/// None for a processor, and for a GPU that this container may not see (its file is then unreadable or empty).
fn gpu(root: &Path, node: u32) -> Option<Gpu> {
    let properties = fs::read_to_string(root.join(NODES).join(node.to_string()).join("properties")).ok()?;
    let property = |name: &str| -> Option<u64> {
        let mut pairs = properties.lines().filter_map(|line| line.split_once(' '));
        pairs
            .find(|(key, _)| *key == name)
            .and_then(|(_, value)| value.trim().parse().ok())
    };
    let gfx = gfx_name(property("gfx_target_version").filter(|&version| version != 0)?);
    let small = |name| property(name).and_then(|value| u32::try_from(value).ok());
    let render_minor = small("drm_render_minor").filter(|&minor| minor != 0);
    let device = render_minor.map(|minor| root.join(DRM).join(format!("renderD{minor}/device")));
    let word = |name: &str| device.as_deref().and_then(|device| word(&device.join(name)));
    let sensors = device.as_deref().map(sensors).unwrap_or_default();
    Some(Gpu {
        index: 0,
        gfx,
        name: word("product_name"),
        wave: small("wave_front_size"),
        xcc: small("num_xcc"),
        hive: property("hive_id").filter(|&hive| hive != 0),
        render_minor,
        compute_partition: word("current_compute_partition"),
        memory_partition: word("current_memory_partition"),
        // -1 where the machine has one node only.
        numa_node: word("numa_node").and_then(|node| node.parse().ok()),
        vram_total_bytes: word("mem_info_vram_total").and_then(|bytes| bytes.parse().ok()),
        vram_used_bytes: word("mem_info_vram_used").and_then(|bytes| bytes.parse().ok()),
        busy_percent: word("gpu_busy_percent").and_then(|percent| percent.parse().ok()),
        power_watts: sensors.power_watts,
        temperature_celsius: sensors.temperature_celsius,
    })
}

/// 90402 is gfx942, 90010 is gfx90a: major, minor and stepping, two decimal digits each, the last two said in hexadecimal.
fn gfx_name(version: u64) -> String {
    let (major, minor, stepping) = (version / 10_000, version / 100 % 100, version % 100);
    format!("gfx{major}{minor:x}{stepping:x}")
}

fn word(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[derive(Default)]
struct Sensors {
    power_watts: Option<f64>,
    temperature_celsius: Option<f64>,
}

fn sensors(device: &Path) -> Sensors {
    let mut folders: Vec<PathBuf> = fs::read_dir(device.join("hwmon"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    folders.sort();
    let Some(folder) = folders.first() else {
        return Sensors::default();
    };
    let number = |name: &str| word(&folder.join(name)).and_then(|value| value.parse::<f64>().ok());
    let junction =
        (1..=8).find(|i| word(&folder.join(format!("temp{i}_label"))).as_deref() == Some("junction"));
    Sensors {
        // Microwatts; newer GPUs have only the momentary value.
        power_watts: number("power1_average")
            .or_else(|| number("power1_input"))
            .map(|microwatts| microwatts / 1e6),
        temperature_celsius: number(&format!("temp{}_input", junction.unwrap_or(1))).map(|milli| milli / 1e3),
    }
}

/// The compute driver's door, and the folder of the GPUs' own.
const KFD: &str = "dev/kfd";
const DRI: &str = "dev/dri";

/// Why this process may not use the GPUs that the driver shows: a container that was not given the devices, or a process
/// outside the groups that may open them. `None`: there are no GPUs, or it may. No device is opened for this.
pub fn barred(root: &Path) -> Option<String> {
    let gpus = gpus(root);
    if gpus.is_empty() {
        return None;
    }
    let who = Identity::of_this_process(root)?;
    let renderers = gpus.iter().filter_map(|gpu| gpu.render_minor);
    let renderers = renderers.map(|minor| format!("{DRI}/renderD{minor}"));
    // A container may be given some GPUs only, so one that may be opened is enough.
    let (mut missing, mut shut) = (None, None);
    for device in renderers {
        match fs::metadata(root.join(&device)) {
            Err(_) => missing = missing.or(Some(device)),
            Ok(found) if who.may_open(&found) => {
                (missing, shut) = (None, None);
                break;
            }
            Ok(found) => shut = shut.or(Some((device, found))),
        }
    }
    match fs::metadata(root.join(KFD)) {
        Err(_) => missing = Some(KFD.to_owned()),
        Ok(found) if !who.may_open(&found) => shut = Some((KFD.to_owned(), found)),
        Ok(_) => {}
    }
    let n = gpus.len();
    if let Some((device, found)) = shut {
        return Some(format!(
            "the driver shows {n} AMD GPUs, but /{device} belongs to group {} (mode {:o}) and this process, user {}, is in \
             groups {:?}: add that group (docker --group-add, RENDER_GID and VIDEO_GID of docker/compose.yaml, \
             supplementalGroups in Kubernetes, usermod -aG on a machine)",
            found.gid(),
            found.mode() & 0o777,
            who.user,
            who.groups
        ));
    }
    missing.map(|device| {
        format!(
            "the driver shows {n} AMD GPUs, but there is no /{device} here: give the container its devices \
             (--device /dev/kfd --device /dev/dri)"
        )
    })
}

struct Identity {
    user: u32,
    groups: Vec<u32>,
}

impl Identity {
    fn of_this_process(root: &Path) -> Option<Identity> {
        let status = fs::read_to_string(root.join("proc/self/status")).ok()?;
        let numbers = |name: &str| -> Option<Vec<u32>> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(
                line.split_whitespace()
                    .filter_map(|number| number.parse().ok())
                    .collect(),
            )
        };
        // Real, effective, saved, of the file system.
        let (user, group) = (*numbers("Uid:")?.get(1)?, *numbers("Gid:")?.get(1)?);
        let mut groups = numbers("Groups:")?;
        if !groups.contains(&group) {
            groups.push(group);
        }
        groups.sort_unstable();
        Some(Identity { user, groups })
    }

    /// To read and to write.
    fn may_open(&self, device: &fs::Metadata) -> bool {
        let allows = |shift: u32| device.mode() >> shift & 0o6 == 0o6;
        if self.user == 0 {
            return true;
        }
        match (device.uid() == self.user, self.groups.contains(&device.gid())) {
            (true, _) => allows(6),
            (_, true) => allows(3),
            _ => allows(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_open_the_devices_is_told_why() {
        use std::os::unix::fs::PermissionsExt;
        let gpu =
            "sys/class/kfd/kfd/topology/nodes/1/properties gfx_target_version 90402;drm_render_minor 128";
        let devices = "\ndev/kfd x\ndev/dri/renderD128 x";
        // Files of a test belong to the one who runs it.
        let own = tempfile::NamedTempFile::new()
            .unwrap()
            .as_file()
            .metadata()
            .unwrap();
        let group = own.gid();
        let (inside, outside) = (group.to_string(), (group + 1).to_string());
        let belongs = format!("/dev/kfd belongs to group {group} (mode 660)");
        for (gpus, user, groups, mode, expected) in [
            ("", 4242, &outside, 0o660, None),
            (gpu, 4242, &inside, 0o660, None),
            (gpu, 4242, &outside, 0o666, None),
            (gpu, 0, &outside, 0o660, None),
            (gpu, 4242, &outside, 0o660, Some(belongs.as_str())),
        ] {
            let status = format!(
                "\nproc/self/status Uid:\t{user}\t{user}\t{user}\t{user};Gid:\t4242\t4242\t4242\t4242;Groups:\t44 {groups}"
            );
            let root = tree(&format!("{gpus}{devices}{status}"));
            for device in ["dev/kfd", "dev/dri/renderD128"] {
                let mode = std::fs::Permissions::from_mode(mode);
                fs::set_permissions(root.path().join(device), mode).unwrap();
            }
            let found = barred(root.path());
            match expected {
                None => assert_eq!(found, None),
                Some(expected) => assert!(
                    found.as_ref().is_some_and(|why| why.contains(expected)),
                    "{found:?}"
                ),
            }
        }
        let none = tree(&format!(
            "{gpu}\nproc/self/status Uid:\t1\t1\t1\t1;Gid:\t1\t1\t1\t1;Groups:\t"
        ));
        let why = barred(none.path()).expect("no device");
        assert!(why.contains("there is no /dev/kfd here"), "{why}");
    }

    /// A tree of files: `path value` a line, the value to the end of the line, `;` for a line break in it.
    fn tree(files: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, value) in files.lines().filter_map(|line| line.trim().split_once(' ')) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value.replace(';', "\n") + "\n").unwrap();
        }
        root
    }

    /// Two sockets, two MI300X, one with sensors; a container may not see the third.
    const SERVER: &str = "
        sys/class/kfd/kfd/topology/nodes/0/properties cpu_cores_count 96;simd_count 0;gfx_target_version 0
        sys/class/kfd/kfd/topology/nodes/1/properties cpu_cores_count 96;simd_count 0;gfx_target_version 0
        sys/class/kfd/kfd/topology/nodes/2/properties simd_count 1216;wave_front_size 64;gfx_target_version 90402;drm_render_minor 128;hive_id 11638818706288400384;num_xcc 8
        sys/class/kfd/kfd/topology/nodes/10/properties simd_count 1216;wave_front_size 64;gfx_target_version 90402;drm_render_minor 136;hive_id 11638818706288400384;num_xcc 8
        sys/class/kfd/kfd/topology/nodes/11/properties
        sys/class/drm/renderD128/device/product_name AMD Instinct MI300X OAM
        sys/class/drm/renderD128/device/mem_info_vram_total 206141652992
        sys/class/drm/renderD128/device/mem_info_vram_used 297402368
        sys/class/drm/renderD128/device/gpu_busy_percent 37
        sys/class/drm/renderD128/device/numa_node 0
        sys/class/drm/renderD128/device/current_compute_partition SPX
        sys/class/drm/renderD128/device/current_memory_partition NPS1
        sys/class/drm/renderD128/device/hwmon/hwmon5/power1_input 139000000
        sys/class/drm/renderD128/device/hwmon/hwmon5/temp1_input 33000
        sys/class/drm/renderD128/device/hwmon/hwmon5/temp2_label junction
        sys/class/drm/renderD128/device/hwmon/hwmon5/temp2_input 41000
        sys/class/drm/renderD136/device/numa_node 1";

    #[test]
    fn a_server_with_two_gpus() {
        let root = tree(SERVER);
        let found = gpus(root.path());
        let shared = Gpu {
            gfx: "gfx942".to_owned(),
            wave: Some(64),
            xcc: Some(8),
            hive: Some(11638818706288400384),
            ..Gpu::default()
        };
        let first = Gpu {
            name: Some("AMD Instinct MI300X OAM".to_owned()),
            render_minor: Some(128),
            compute_partition: Some("SPX".to_owned()),
            memory_partition: Some("NPS1".to_owned()),
            numa_node: Some(0),
            vram_total_bytes: Some(206_141_652_992),
            vram_used_bytes: Some(297_402_368),
            busy_percent: Some(37),
            power_watts: Some(139.0),
            temperature_celsius: Some(41.0),
            ..shared.clone()
        };
        let second = Gpu {
            index: 1,
            render_minor: Some(136),
            numa_node: Some(1),
            ..shared
        };
        assert_eq!(found, [first, second]);
    }

    #[test]
    fn a_desktop_shows_less() {
        let root = tree(
            "sys/class/kfd/kfd/topology/nodes/1/properties wave_front_size 32;gfx_target_version 110000;drm_render_minor 128
             sys/class/drm/renderD128/device/numa_node -1
             sys/class/drm/renderD128/device/product_name
             sys/class/drm/renderD128/device/hwmon/hwmon2/power1_average 55000000
             sys/class/drm/renderD128/device/hwmon/hwmon2/temp1_input 50500",
        );
        let expected = Gpu {
            gfx: "gfx1100".to_owned(),
            wave: Some(32),
            render_minor: Some(128),
            power_watts: Some(55.0),
            temperature_celsius: Some(50.5),
            ..Gpu::default()
        };
        assert_eq!(gpus(root.path()), [expected]);
    }

    #[test]
    fn no_driver_no_gpus() {
        assert_eq!(gpus(tree("").path()), []);
    }

    #[test]
    fn gfx_names() {
        for (version, name) in [
            (90010, "gfx90a"),
            (90402, "gfx942"),
            (90500, "gfx950"),
            (110000, "gfx1100"),
            (120001, "gfx1201"),
        ] {
            assert_eq!(gfx_name(version), name);
        }
    }
}
