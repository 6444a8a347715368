//! README's commands run as they are written: those that ask a server or train. Those that set up, build, or start what
//! does not end are left out by their first word.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::server::{Server, binary, without_options};

const README: &str = include_str!("../../../README.md");
/// Of lines that are not run here.
const LEFT_OUT: [&str; 6] = [
    "./scripts/",
    "export",
    "tandem serve",
    "docker",
    "tandem router",
    "HIP_",
];

/// The shell blocks that ask or train, without what is left out.
fn scripts() -> Vec<String> {
    let blocks = README.split("```sh\n").skip(1);
    let blocks = blocks.map(|block| block.split("```").next().unwrap_or_default());
    let run = |line: &&str| !LEFT_OUT.iter().any(|word| line.starts_with(word));
    let scripts = blocks.map(|block| block.lines().filter(run).collect::<Vec<_>>().join("\n"));
    scripts
        .filter(|script| script.contains("curl") || script.contains("tandem train"))
        .collect()
}

#[test]
fn its_commands_run_as_written() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .canonicalize()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(root.join("server"), folder.path().join("server")).unwrap();
    let server = Server::start_with(
        Arc::new(tempfile::tempdir().unwrap()),
        &[],
        &[
            "--served-model-name",
            "tandem-demo",
            "--lora-root",
            folder.path().to_str().unwrap(),
        ],
    );
    let binary = binary().canonicalize().unwrap();
    let path = format!(
        "{}:{}",
        binary.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let mut said = Vec::new();
    for script in scripts() {
        let script = script.replace("localhost:8000", &server.address.to_string());
        let output = without_options(Command::new("bash"))
            .args(["-euo", "pipefail", "-c", &script])
            .current_dir(folder.path())
            .env("PATH", &path)
            .output()
            .unwrap();
        let [out, log] =
            [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        assert!(
            output.status.success() && !out.contains("\"error\":{"),
            "{script}\n{out}\n{log}"
        );
        said.push(out);
    }
    let [asked, fine_tuned, trained, adapters] = &said[..] else {
        panic!("README has {} blocks that ask or train", said.len())
    };
    assert!(asked.contains("\"content\""), "{asked}");
    assert!(
        fine_tuned.contains("succeeded") && fine_tuned.contains("ft:tandem-demo:"),
        "{fine_tuned}"
    );
    assert!(trained.contains("written to adapters/ahoy/adapter"), "{trained}");
    assert!(adapters.contains("\"ahoy\""), "{adapters}");
}
