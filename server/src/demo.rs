//! The model that is served when none is named: a small one inside the binary, written to the data folder at the first
//! start. Not here: what is in it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

pub const NAME: &str = "tandem-demo";

macro_rules! embed {
    ($($name:literal),+ $(,)?) => { &[$(($name, include_bytes!(concat!("../demo/", $name)))),+] };
}

const FILES: &[(&str, &[u8])] = embed![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// `<data_dir>/demo-model-<digest8>`, complete or not at all. A file of it that is damaged is made anew.
pub fn materialise(data_dir: &Path) -> io::Result<PathBuf> {
    let mut hasher = Sha256::new();
    for (name, bytes) in FILES {
        hasher.update(name);
        hasher.update(bytes.len().to_le_bytes());
        hasher.update(bytes);
    }
    let digest: String = hasher
        .finalize()
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let folder = data_dir.join(format!("demo-model-{digest}"));
    if folder.is_dir() {
        for (name, bytes) in FILES {
            let path = folder.join(name);
            if fs::read(&path).is_ok_and(|found| found == *bytes) {
                continue;
            }
            tracing::warn!(path = %path.display(), "a file of the demo model was damaged; it is made anew");
            let fresh = folder.join(format!(".{name}-{}", std::process::id()));
            write(&fresh, bytes)?;
            fs::rename(&fresh, &path)?;
        }
        return Ok(folder);
    }
    let fresh = data_dir.join(format!(".demo-model-{}", std::process::id()));
    fs::create_dir_all(&fresh)?;
    for (name, bytes) in FILES {
        write(&fresh.join(name), bytes)?;
    }
    match fs::rename(&fresh, &folder) {
        Ok(()) => fs::File::open(data_dir)?.sync_all()?,
        // Another process was faster; the content is the same.
        Err(_) if folder.is_dir() => fs::remove_dir_all(&fresh)?,
        Err(error) => return Err(error),
    }
    Ok(folder)
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_once_and_whole() {
        let data = tempfile::tempdir().unwrap();
        let folder = materialise(data.path()).unwrap();
        fs::write(folder.join(FILES[2].0), "cut").unwrap();
        fs::remove_file(folder.join(FILES[4].0)).unwrap();
        assert_eq!(materialise(data.path()).unwrap(), folder);
        for (name, bytes) in FILES {
            assert_eq!(fs::read(folder.join(name)).unwrap(), *bytes, "{name}");
        }
        assert_eq!(
            fs::read_dir(data.path()).unwrap().count(),
            1,
            "nothing else is left behind"
        );
        assert_eq!(fs::read_dir(folder).unwrap().count(), FILES.len());
    }
}
