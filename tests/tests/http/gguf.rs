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

/// What the route sends is what `tandem merge` writes, byte for byte, and both forms answer as each other and, to rounding, as the
/// adapter beside its base.
#[test]
fn a_model_is_merged_on_its_way_out() {
    let (base, adapter) = (fixture("gqa_tied"), fixture("gqa_tied/adapter-all"));
    let module = format!("tuned={}", adapter.display());
    let server = Server::serving(&base, &["--dtype", "float32", "--lora-modules", &module]);
    let beside = ask(&server, "tuned");
    let place = tempfile::tempdir().unwrap();
    let merge = |body: Value| client::post(server.address, "/v1/adapters/tuned/merge", &body);
    let written = |name: &str| {
        let out = place.path().join(name);
        let output = command(&["merge"])
            .args([&base, &adapter, &out])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        out
    };
    let file = written("tuned.gguf");
    let sent = merge(json!({"format": "gguf"}));
    assert_eq!(sent.status, 200);
    assert_eq!(
        sent.header("content-disposition"),
        Some("attachment; filename*=UTF-8''tuned.gguf")
    );
    assert!(sent.body == std::fs::read(&file).unwrap(), "the same file");

    let folder = written("tuned");
    let sent = merge(json!({}));
    assert_eq!(
        (sent.status, sent.header("content-type")),
        (200, Some("application/x-tar"))
    );
    let archive = place.path().join("tuned.tar");
    std::fs::write(&archive, &sent.body).unwrap();
    let unpacked = tempfile::tempdir().unwrap();
    let tar = std::process::Command::new("tar")
        .arg("xf")
        .arg(&archive)
        .arg("-C")
        .arg(unpacked.path())
        .status();
    assert!(tar.unwrap().success());
    let mut files: Vec<String> = folder
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    for wanted in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(files.iter().any(|name| name == wanted), "{files:?}");
    }
    assert_eq!(
        unpacked.path().join("tuned").read_dir().unwrap().count(),
        files.len()
    );
    for name in files {
        let [sent, written] =
            [unpacked.path().join("tuned"), folder.clone()].map(|at| std::fs::read(at.join(&name)).unwrap());
        assert!(sent == written, "{name}");
    }

    let [of_file, of_folder] =
        [&file, &folder].map(|model| ask(&Server::serving(model, &["--dtype", "float32"]), "tuned"));
    assert_eq!(of_file, of_folder);
    assert_eq!(of_file["text"], beside["text"]);
    let numbers = |answer: &Value| -> Vec<f64> {
        let list = answer["logprobs"]["token_logprobs"].as_array().unwrap().iter();
        list.map(|x| x.as_f64().unwrap()).collect()
    };
    for (merged, beside) in numbers(&of_file).iter().zip(numbers(&beside)) {
        assert!((merged - beside).abs() < 1e-4, "{merged} {beside}");
    }
    for (path, body, status) in [
        ("/v1/adapters/tuned/merge", json!({"format": "onnx"}), 400),
        ("/v1/adapters/none/merge", json!({}), 404),
        ("/v1/adapters/gqa_tied/merge", json!({}), 400),
    ] {
        assert_eq!(
            client::post(server.address, path, &body).status,
            status,
            "{path} {body}"
        );
    }
}
