//! Commands of README and of the guides run as they are written: those that ask a server or work on files. Those that set up,
//! build, or start what does not end are left out by their first word.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::server::{Server, binary, without_options};

/// A page, and what the blocks of it that are run must say, in their order.
const PAGES: [(&str, &[&str]); 4] = [
    (
        include_str!("../../../README.md"),
        &[
            "\"content\"",
            "ft:tandem-demo:",
            "written to adapters/ahoy/adapter",
            "\"ahoy\"",
        ],
    ),
    (
        include_str!("../../../docs/serving.md"),
        &[
            "[DONE]",
            "\"embedding\"",
            "\"prompt\"",
            "\\\"age\\\"",
            "\"custom_id\":\"3\"",
            "vllm:num_requests_running",
        ],
    ),
    (
        include_str!("../../../docs/fine-tuning.md"),
        &[
            "\"loss_mask\"",
            "\"text\"",
            "fine_tuning.job",
            "is the best",
            "Rung 2/2",
            "succeeded",
            "succeeded",
            "succeeded",
            "adapter_model.safetensors",
            "2 ranks, each with 1",
            "2 ranks, each with 1",
            "2 models on 4 ranks, each with 1",
            "\"perplexity\":",
        ],
    ),
    (
        include_str!("../../../docs/adapters.md"),
        &[
            "\"content\"",
            "pirate/adapter_model.safetensors",
            "matrices changed",
            "GGUF",
            "removed",
        ],
    ),
];
/// Of lines that are not run here.
const LEFT_OUT: [&str; 6] = [
    "./scripts/",
    "export",
    "tandem serve",
    "docker",
    "tandem router",
    "HIP_",
];

/// The shell blocks of a page that ask a server or work on files, without what is left out.
fn scripts(page: &str) -> Vec<String> {
    let blocks = page.split("```sh\n").skip(1);
    let blocks = blocks.map(|block| block.split("```").next().unwrap_or_default());
    let run = |line: &&str| !LEFT_OUT.iter().any(|word| line.starts_with(word));
    let scripts = blocks.map(|block| block.lines().filter(run).collect::<Vec<_>>().join("\n"));
    scripts
        .filter(|script| {
            ["curl", "tandem train", "tandem merge"]
                .iter()
                .any(|word| script.contains(word))
        })
        .collect()
}

#[test]
fn their_commands_run_as_written() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .canonicalize()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
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
    for (number, (page, expected)) in PAGES.into_iter().enumerate() {
        let place = folder.path().join(number.to_string());
        std::fs::create_dir(&place).unwrap();
        std::os::unix::fs::symlink(root.join("server"), place.join("server")).unwrap();
        let mut said = Vec::new();
        for script in scripts(page) {
            let script = script.replace("localhost:8000", &server.address.to_string());
            let output = without_options(Command::new("bash"))
                .args(["-euo", "pipefail", "-c", &script])
                .current_dir(&place)
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
        assert_eq!(said.len(), expected.len(), "blocks of page {number} that are run");
        for (out, expected) in said.iter().zip(expected) {
            assert!(
                out.contains(expected),
                "page {number}: {expected} is not in\n{out}"
            );
        }
    }
}
