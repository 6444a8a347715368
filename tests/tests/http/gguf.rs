//! A GGUF file as a model: it answers as the folder that it was made from, and what is trained on it is served on it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::client;
use crate::server::{Server, command};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("numerics/fixtures")
        .join(name)
}

fn ask(server: &Server, model: &str) -> Value {
    let body = json!({"model": model, "prompt": "the other in the", "max_tokens": 12, "temperature": 0, "logprobs": 3,
                      "ignore_eos": true});
    let choice = client::post(server.address, "/v1/completions", &body).ok()["choices"][0].clone();
    json!({"text": choice["text"], "logprobs": choice["logprobs"]})
}

#[test]
fn a_file_answers_as_its_folder_and_is_trained_on() {
    let flags = ["--dtype", "float32"];
    let folder = Server::serving(&fixture("gqa_tied"), &flags);
    let wanted = ask(&folder, "gqa_tied");
    let file = Server::serving(&fixture("gguf/gqa_tied.gguf"), &flags);
    assert_eq!(file.model(), "gqa_tied");
    assert_eq!(file.base["max_model_len"], folder.base["max_model_len"]);
    // The same numbers in the same order: the same bits.
    assert_eq!(ask(&file, "gqa_tied"), wanted);
    let chat =
        json!({"model": "gqa_tied", "messages": [{"role": "user", "content": "the"}], "max_tokens": 2});
    client::post(file.address, "/v1/chat/completions", &chat).ok();

    let place = tempfile::tempdir().unwrap();
    let rows = place.path().join("rows.jsonl");
    let row = |i| format!("{{\"prompt\": \"the in {i}\", \"completion\": \" other other {i}\"}}\n");
    std::fs::write(&rows, (0..8).map(row).collect::<String>()).unwrap();
    let out = place.path().join("out");
    let output = command(&["train", "device=cpu", "dtype=float32", "n_epochs=2"])
        .arg(format!("model={}", fixture("gguf/gqa_tied.gguf").display()))
        .arg(format!("training_file={}", rows.display()))
        .arg(format!("output_dir={}", out.display()))
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let module = format!("tuned={}", out.join("adapter").display());
    let flags = ["--dtype", "float32", "--lora-modules", &module];
    let [of_file, of_folder] = ["gguf/gqa_tied.gguf", "gqa_tied"]
        .map(|model| ask(&Server::serving(&fixture(model), &flags), "tuned"));
    assert_eq!(of_file, of_folder);
    assert_ne!(of_file, wanted);
}
