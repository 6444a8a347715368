//! Black-box and numeric tests live in tests/; here stand only the checks of the tree itself.

#[cfg(test)]
mod tidy {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use serde_json::Value;

    /// ARCHITECTURE.md, "Who may import whom".
    const EDGES: [(&str, &[&str]); 9] = [
        (
            "tandem-server",
            &["router", "backend", "rpc", "store", "openapi", "text", "core"],
        ),
        ("tandem-router", &["text", "store", "rpc", "core"]),
        ("tandem-rpc", &["core"]),
        ("tandem-backend", &["core", "kernels"]),
        ("tandem-text", &["core"]),
        ("tandem-store", &["core"]),
        ("tandem-kernels", &[]),
        ("tandem-openapi", &[]),
        ("tandem-core", &[]),
    ];

    #[test]
    fn crates_import_only_their_floors() {
        let packages = packages();
        for (name, allowed) in EDGES {
            let package = packages
                .iter()
                .find(|package| package["name"] == name)
                .expect(name);
            for dependency in package["dependencies"].as_array().expect("dependencies") {
                let ours = dependency["name"]
                    .as_str()
                    .and_then(|name| name.strip_prefix("tandem-"));
                let imported = dependency["kind"].is_null();
                assert!(
                    ours.is_none_or(|ours| !imported || allowed.contains(&ours)),
                    "{name} imports {}",
                    dependency["name"]
                );
            }
        }
    }

    #[test]
    fn every_file_says_what_it_is() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("the workspace");
        let mut files = vec![];
        for folder in ["server", "router", "backend", "kernels", "openapi"] {
            rust_files(&root.join(folder), &mut files);
        }
        assert!(files.len() > 80, "only {} files found", files.len());
        for file in files {
            let text = std::fs::read_to_string(&file).expect("a source file");
            let name = file.strip_prefix(root).expect("under the root").display();
            assert!(text.starts_with("//!"), "{name} does not say what it is");
        }
    }

    /// The lint that forbids unsafe code binds whoever inherits it.
    #[test]
    fn every_crate_but_kernels_takes_the_workspaces_lints() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("the workspace");
        let workspace = std::fs::read_to_string(root.join("Cargo.toml")).expect("a manifest");
        assert!(workspace.contains("unsafe_code = \"forbid\""));
        for package in packages() {
            let name = package["name"].as_str().expect("a name");
            let manifest = package["manifest_path"].as_str().expect("a path");
            let manifest = std::fs::read_to_string(manifest).expect("a manifest");
            let inherits = manifest.contains("[lints]\nworkspace = true");
            assert!(
                inherits || name == "tandem-kernels",
                "{name} has lints of its own"
            );
        }
    }

    fn packages() -> Vec<Value> {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
        metadata["packages"].as_array().expect("packages").clone()
    }

    fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("a source folder").flatten() {
            let path = entry.path();
            if path.is_dir() && !path.ends_with("target") {
                rust_files(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
}
