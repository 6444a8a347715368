//! The compiled kernels that are part of this program, by architecture, and their source for the others. They are made by
//! `scripts/gpu-kernels build`. Not here: loading them (`driver.rs`).

include!(concat!(env!("OUT_DIR"), "/gpu_embedded.rs"));

/// Of all of NVIDIA's architectures.
const FATBIN: &str = "cuda.fatbin";
const KERNELS: &str = include_str!("../../gpu/kernels.def");

/// The object for an architecture: `gfx942`, or `sm_90`. NVIDIA's holds code for sm_80 and sm_90, and what the driver
/// compiles for later ones.
pub(super) fn object(architecture: &str) -> Option<&'static [u8]> {
    let name = match architecture.strip_prefix("sm_") {
        Some(version) => (version.parse::<u32>().ok()? >= 80).then(|| FATBIN.to_owned())?,
        None => format!("{architecture}.hsaco"),
    };
    OBJECTS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, bytes)| *bytes)
}

/// The architectures that have an object of their own, for a report.
pub fn architectures() -> Vec<&'static str> {
    let names = OBJECTS.iter().map(|(name, _)| match *name {
        FATBIN => "sm_80 and later",
        name => name.trim_end_matches(".hsaco"),
    });
    names.collect()
}

/// Every kernel's name.
pub(super) fn kernels() -> impl Iterator<Item = &'static str> {
    KERNELS
        .lines()
        .filter_map(|line| line.strip_prefix("GPU_KERNEL(")?.strip_suffix(')'))
}

/// The file that includes all others, and those, each by the name it is included by.
pub(super) fn source() -> (&'static str, &'static [(&'static str, &'static str)]) {
    let ((_, main), headers) = SOURCES.split_last().expect("kernels.cu");
    (main, headers)
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    const MANIFEST: &str = include_str!("../../gpu/objects/manifest");

    fn hex(digest: impl AsRef<[u8]>) -> String {
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_objects_are_of_todays_source() {
        let mut digest = Sha256::new();
        for (name, text) in SOURCES {
            digest.update(format!("{name} {}\n{text}", text.len()));
        }
        let mut lines = MANIFEST.lines();
        let stale = "kernels/gpu/objects is not of today's source: scripts/gpu-kernels build";
        assert_eq!(
            lines.next().unwrap(),
            format!("source {}", hex(digest.finalize())),
            "{stale}"
        );
        let names = kernels().collect::<Vec<_>>().join(" ");
        assert_eq!(lines.next().unwrap(), format!("kernels {names}"), "{stale}");
        let listed: Vec<(String, String)> = lines
            .map(|line| {
                let mut words = line.split(' ').map(str::to_owned);
                (words.next().unwrap(), words.next().unwrap())
            })
            .collect();
        let mut found: Vec<_> = OBJECTS
            .iter()
            .map(|(name, bytes)| (name.to_string(), hex(Sha256::digest(bytes))))
            .collect();
        found.sort_by_key(|(name, _)| listed.iter().position(|(known, _)| known == name));
        assert_eq!(found, listed, "{stale}");
    }

    /// AMD's objects say so themselves; NVIDIA's is compressed, and `scripts/gpu-kernels check` reads it.
    #[test]
    fn every_kernel_is_in_every_object() {
        let amd = OBJECTS.iter().filter(|(name, _)| name.ends_with(".hsaco"));
        assert_eq!(amd.clone().count(), 5);
        for (object, bytes) in amd {
            for kernel in kernels() {
                let symbol = format!("\0{kernel}.kd\0");
                let found = bytes
                    .windows(symbol.len())
                    .any(|window| window == symbol.as_bytes());
                assert!(found, "{kernel} is not in {object}");
            }
        }
    }

    #[test]
    fn an_architecture_has_its_own_object() {
        assert!(object("gfx942").unwrap().starts_with(b"\x7fELF"));
        assert_ne!(object("gfx942"), object("gfx90a"));
        assert_eq!(object("sm_80"), object("sm_120"));
        assert!(object("sm_80").is_some());
        for none in ["sm_75", "gfx1030", "sm_", ""] {
            assert_eq!(object(none), None, "{none}");
        }
    }
}
