//! `tandem adapters`: folders, a data folder beside its server, and the server itself.

use std::path::Path;
use std::process::Output;

use crate::client::{get, post};
use crate::server::{Server, command};

const ADAPTER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/numerics/fixtures/evaluation/adapter"
);
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../server/demo");

fn adapters(words: &[&str]) -> Output {
    command(&["adapters"]).args(words).output().unwrap()
}

fn said(output: &Output) -> [String; 2] {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned())
}

fn shows(words: &[&str], parts: &[&str]) -> String {
    let output = adapters(words);
    let [out, log] = said(&output);
    assert!(output.status.success(), "{words:?}: {log}");
    for part in parts {
        assert!(out.contains(part), "{words:?}: {part:?} is not in\n{out}");
    }
    out
}

fn refuses(words: &[&str], expected: &str) {
    let output = adapters(words);
    let [out, log] = said(&output);
    assert!(
        !output.status.success() && log.contains(expected),
        "{words:?}: {out}{log}"
    );
}

fn copy(to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(Path::new(ADAPTER).join(name), to.join(name)).unwrap();
    }
}

#[test]
fn adapters_are_listed_shown_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    for name in ["one/adapter", "one/checkpoint-4", "two"] {
        copy(&folder.path().join(name));
    }
    std::fs::write(at("one/run.yaml"), "settings: {}\n").unwrap();
    std::fs::write(at("two/notes.txt"), "mine").unwrap();
    let root = folder.path().display().to_string();
    let list = shows(
        &["ls", &root],
        &["\t2\tserver/demo\tq_proj,v_proj\t", "run.yaml), after step 4"],
    );
    assert_eq!(list.lines().count(), 3, "{list}");
    shows(&["show", &at("two")], &["alpha", "8", "q_proj,v_proj", "LORA"]);
    refuses(
        &["show", "nobody", "--data-dir", &root],
        "there is no adapter nobody",
    );

    let server = Server::serving(
        MODEL.as_ref(),
        &["--lora-modules", &format!("pirate={}", at("two"))],
    );
    let url = format!("http://{}", server.address);
    let card = get(server.address, "/v1/models/pirate").ok();
    let digest = card["root"].as_str().unwrap();
    let data = server.data.path().join("data").display().to_string();
    // The database is read while the server has it open.
    shows(
        &["ls", &data],
        &["pirate\t2\tserver/demo\tq_proj,v_proj\t", "--lora-modules"],
    );
    shows(
        &["show", "pirate", "--data-dir", &data],
        &[digest, "tenant", "alpha", "default"],
    );
    shows(&["ls", "--url", &url], &["pirate\t2\t"]);
    shows(&["show", "pirate", "--url", &url], &[digest]);
    refuses(
        &["rm", &format!("{data}/adapters/{digest}")],
        "whose database speaks of it",
    );
    refuses(&["rm", "nobody", "--url", &url], "nobody");
    refuses(&["ls", "--url", "nowhere"], "http://localhost:8000");
    shows(&["rm", "pirate", "--url", &url], &["pirate is no model"]);
    let gone = post(
        server.address,
        "/v1/completions",
        &serde_json::json!({"model": "pirate", "prompt": "a"}),
    );
    assert_eq!(gone.status, 404);

    std::os::unix::fs::symlink(at("one/checkpoint-4"), at("link")).unwrap();
    refuses(&["rm", &format!("{}/", at("link"))], "is a link to");
    shows(&["rm", &at("one/checkpoint-4")], &["is gone"]);
    shows(&["rm", &at("two")], &["notes.txt stay"]);
    refuses(&["rm", &at("two")], "no PEFT folder");
    assert!(!Path::new(&at("one/checkpoint-4")).exists() && Path::new(&at("two/notes.txt")).exists());
    assert!(Path::new(&at("one/adapter/adapter_model.safetensors")).exists());
}
