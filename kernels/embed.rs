//! Part of the build script: what of `gpu/` becomes part of the program, as a Rust file in OUT_DIR. The objects in
//! `gpu/objects`, and the source, for an architecture that no object is for.

use std::path::{Path, PathBuf};

pub fn main() {
    let folder = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo")).join("gpu");
    let mut objects: Vec<PathBuf> = std::fs::read_dir(folder.join("objects"))
        .expect("kernels/gpu/objects")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some())
        .collect();
    objects.sort();
    let mut sources = Vec::new();
    visit(&folder, "kernels.cu", &mut sources);
    let objects = objects.iter().map(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        format!("({name:?}, include_bytes!({path:?})),\n")
    });
    let sources = sources
        .iter()
        .map(|name| format!("({name:?}, include_str!({:?})),\n", folder.join(name)));
    let text = format!(
        "pub const OBJECTS: &[(&str, &[u8])] = &[\n{}];\npub const SOURCES: &[(&str, &str)] = &[\n{}];\n",
        objects.collect::<String>(),
        sources.collect::<String>()
    );
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo"));
    std::fs::write(out.join("gpu_embedded.rs"), text).expect("OUT_DIR");
}

/// A file of the source after those it includes, each once. emu.h is the CPU's alone. (scripts/gpu_kernels.py does the same.)
fn visit(folder: &Path, name: &str, found: &mut Vec<String>) {
    if name == "emu.h" || found.iter().any(|known| known == name) {
        return;
    }
    let text = std::fs::read_to_string(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    for line in text.lines() {
        let Some(rest) = line.trim_start().strip_prefix('#').map(str::trim_start) else {
            continue;
        };
        let included = rest
            .strip_prefix("include")
            .map(str::trim_start)
            .and_then(|rest| rest.strip_prefix('"'));
        if let Some((included, _)) = included.and_then(|rest| rest.split_once('"')) {
            visit(folder, included, found);
        }
    }
    found.push(name.to_owned());
}
