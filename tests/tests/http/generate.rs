//! `tandem generate` beside a server that gets the same requests.

use std::process::Output;

use serde_json::{Value, json};

use crate::client::post;
use crate::server::{Server, command};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../server/demo");

fn generate(words: &[&str]) -> Output {
    command(&["generate"]).args(words).output().unwrap()
}

fn said(output: &Output) -> [String; 2] {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned())
}

fn adapter(folder: &std::path::Path) -> String {
    let rows = folder.join("rows.jsonl");
    let row = r#"{"prompt": "Who is it?", "completion": " Ahoy, it is the captain."}"#;
    std::fs::write(&rows, format!("{row}\n").repeat(8)).unwrap();
    let out = folder.join("out");
    let settings = [
        format!("model={MODEL}"),
        format!("training_file={}", rows.display()),
        format!("output_dir={}", out.display()),
        "max_steps=12".to_owned(),
        "lora_r=128".to_owned(),
    ];
    let made = command(&["train"]).args(settings).output().unwrap();
    assert!(made.status.success(), "{:?}", said(&made));
    out.join("adapter").display().to_string()
}

/// Greedy, drawn with a seed, of a chat and of an adapter: the very text, and all else that an answer says but for its name and
/// time.
#[test]
fn it_answers_as_a_server_does() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = adapter(folder.path());
    let loaded = format!("a={adapter}");
    let server = Server::serving(
        MODEL.as_ref(),
        &["--lora-modules", &loaded, "--max-lora-rank", "128"],
    );
    let base = server.model();
    for (words, is_adapter, body) in [
        (
            &["prompt=Who is it?", "temperature=0"][..],
            false,
            json!({"prompt": "Who is it?", "temperature": 0, "max_tokens": 256}),
        ),
        (
            &[
                "prompt=Who is it?",
                "max_new_tokens=24",
                "temperature=1.2",
                "top_k=40",
                "top_p=0.9",
                "seed=7",
            ],
            true,
            json!({
                "prompt": "Who is it?", "max_tokens": 24, "temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 7,
            }),
        ),
        (
            &[
                "system=Be brief.",
                "user=Where does Felix live?",
                "seed=3",
                "stop=.",
            ],
            false,
            json!({
                "messages": [
                    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does Felix live?"},
                ],
                "seed": 3, "stop": ".", "max_tokens": 256,
            }),
        ),
    ] {
        let (route, is_chat) = match body["prompt"].is_null() {
            true => ("/v1/chat/completions", true),
            false => ("/v1/completions", false),
        };
        let mut body = body;
        body["model"] = json!(if is_adapter { "a" } else { base });
        let expected = post(server.address, route, &body).ok();
        let choice = &expected["choices"][0];
        let text = if is_chat {
            &choice["message"]["content"]
        } else {
            &choice["text"]
        };
        let adapter = format!("adapter={adapter}");
        let words: Vec<&str> = [MODEL]
            .into_iter()
            .chain(words.iter().copied())
            .chain(is_adapter.then_some(adapter.as_str()))
            .collect();
        let streamed = generate(&words);
        let [out, log] = said(&streamed);
        assert!(streamed.status.success(), "{words:?}: {log}");
        let text = text.as_str().unwrap();
        assert_eq!(
            out.strip_suffix('\n').unwrap_or(&out),
            text.strip_suffix('\n').unwrap_or(text)
        );
        assert!(log.contains("tokens behind a prompt of"), "{log}");

        let whole = generate(&[&words[..], &["output=json"]].concat());
        let [out, log] = said(&whole);
        let answer: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{log}"));
        for part in ["choices", "system_fingerprint", "object"] {
            assert_eq!(answer[part], expected[part], "{words:?}: {part}");
        }
        for part in ["prompt_tokens", "completion_tokens"] {
            assert_eq!(
                answer["usage"][part], expected["usage"][part],
                "{words:?}: {part}"
            );
        }
    }
}

#[test]
fn a_config_of_tune_run_generate_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mine.yaml").display().to_string();
    let copied = command(&["recipes", "cp", "generation", &file]).output().unwrap();
    assert!(copied.status.success(), "{:?}", said(&copied));
    let checked = command(&["recipes", "validate", &file]).output().unwrap();
    assert!(
        said(&checked)[0].contains("a request to /v1/completions"),
        "{:?}",
        said(&checked)
    );
    let place = format!("checkpointer.checkpoint_dir={MODEL}");
    let toy = ["--config", &file, &place, "max_new_tokens=8"];
    let [out, log] = said(&generate(&toy));
    assert!(
        !out.is_empty() && log.contains("tokens behind a prompt of"),
        "{out}{log}"
    );
    let again = generate(&[&toy[..], &["prompt.user=Hi", "output=json"]].concat());
    let answer: Value =
        serde_json::from_slice(&again.stdout).unwrap_or_else(|_| panic!("{:?}", said(&again)));
    assert_eq!(answer["object"], "chat.completion");

    // The wrong program is told the right one.
    let trained = command(&["train", &file]).output().unwrap();
    assert!(
        said(&trained)[1].contains("tandem generate"),
        "{:?}",
        said(&trained)
    );
}

#[test]
fn what_is_wrong_is_said() {
    for (words, expected) in [
        (&["prompt=a", "temperatur=1"][..], "temperature"),
        (&["prompt=a", "temperature=9"], "temperature"),
        (&["prompt=a", "max_tokens=0"], "max_tokens"),
        (&["prompt=a", "adapter=/nowhere"], "/nowhere"),
        (&["prompt=a", "tasks=[mmlu]"], "tasks"),
        (&["/nowhere/model", "prompt=a"], "/nowhere/model"),
    ] {
        let output = generate(words);
        let [out, log] = said(&output);
        assert!(!output.status.success() && out.is_empty(), "{words:?}: {out}");
        assert!(
            log.contains(expected) && !log.contains("panicked"),
            "{words:?}: {log}"
        );
    }
    let help = said(&generate(&["help"]))[0].clone();
    assert!(
        help.contains("prompt_file") && help.contains("max_new_tokens"),
        "{help}"
    );
}
