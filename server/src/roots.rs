//! Which folders of this machine a client may have read: those below the roots that the command line names. Not here:
//! what lies in them.

use std::path::{Path, PathBuf};

use crate::error::{ApiError, invalid};

const ADAPTER_FILES: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "README.md"];

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

    /// The folder, links resolved; those of its files may lead to other places below the roots. What lies elsewhere is refused
    /// alike whether it is there or not.
    pub fn resolve(&self, folder: &Path) -> Result<PathBuf, ApiError> {
        let whole = folder.canonicalize().ok();
        let roots: Vec<PathBuf> = self
            .0
            .iter()
            .filter_map(|root| root.canonicalize().ok())
            .collect();
        let is_below = |path: &Path| roots.iter().any(|root| path.starts_with(root));
        let leads_out = |whole: &Path, file: &str| {
            let led = whole.join(file).canonicalize();
            led.is_ok_and(|led| !is_below(&led))
        };
        let is_inside =
            |whole: &PathBuf| is_below(whole) && !ADAPTER_FILES.iter().any(|file| leads_out(whole, file));
        match whole.filter(is_inside) {
            Some(whole) => Ok(whole),
            None => Err(invalid(
                "lora_path",
                format!(
                    "No adapter can be read at {}: it must be a folder, with its files, below one that the server was started with \
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
        for (folder, file, target) in [
            ("root/b", "README.md", "elsewhere/x"),
            ("root/c", "adapter_config.json", "root/a/x"),
        ] {
            std::fs::create_dir_all(at(folder)).unwrap();
            std::fs::write(at(target), "x").unwrap();
            symlink(at(target), at(folder).join(file)).unwrap();
        }
        let data = at("data");
        let roots = LoraRoots::new(&[at("root")], [data.as_path()].into_iter()).unwrap();
        for (folder, allowed) in [
            ("root/a", true),
            ("root/../root/a", true),
            ("in", true),
            ("data/adapters/x", true),
            ("root/b", false),
            ("root/c", true),
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
