//! Which folders of this machine a client may have read: those below the roots that the command line names. Not here:
//! what lies in them.

use std::path::{Path, PathBuf};

use crate::error::{ApiError, invalid};

/// Adapters are read below these.
pub struct LoraRoots(Vec<PathBuf>);

impl LoraRoots {
    /// `given` by --lora-root, which may be made later; `named` are folders that are served or written anyway.
    pub fn new<'a>(
        given: &'a [PathBuf],
        named: impl Iterator<Item = &'a Path>,
    ) -> std::io::Result<LoraRoots> {
        let all = given.iter().map(PathBuf::as_path).chain(named);
        all.map(std::path::absolute)
            .collect::<Result<_, _>>()
            .map(LoraRoots)
    }

    /// The folder, links resolved. What lies elsewhere is refused alike whether it is there or not.
    pub fn resolve(&self, folder: &Path) -> Result<PathBuf, ApiError> {
        let whole = folder.canonicalize().ok();
        let mut roots = self.0.iter().filter_map(|root| root.canonicalize().ok());
        match whole.filter(|whole| roots.any(|root| whole.starts_with(root))) {
            Some(whole) => Ok(whole),
            None => Err(invalid(
                "lora_path",
                format!(
                    "No adapter can be read at {}: it must be a folder below one that the server was started with \
                     (--lora-root DIR), or a name on the hub (ORG/NAME)",
                    folder.display()
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_is_read_outside_of_the_roots() {
        let machine = tempfile::tempdir().unwrap();
        let at = |name: &str| machine.path().join(name);
        for folder in ["root/a", "roots", "data/adapters/x", "elsewhere"] {
            std::fs::create_dir_all(at(folder)).unwrap();
        }
        symlink(at("elsewhere"), at("root/out")).unwrap();
        symlink(at("root/a"), at("in")).unwrap();
        let data = at("data");
        let roots = LoraRoots::new(&[at("root")], [data.as_path()].into_iter()).unwrap();
        for (folder, allowed) in [
            ("root/a", true),
            ("root/../root/a", true),
            ("in", true),
            ("data/adapters/x", true),
            ("root/out", false),
            ("root/../elsewhere", false),
            ("roots", false),
            ("nowhere", false),
            ("root/nothing", false),
        ] {
            assert_eq!(roots.resolve(&at(folder)).is_ok(), allowed, "{folder}");
        }
    }
}
