//! `tandem eval` against transformers and peft, and against the validations of a run.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

use crate::server::command;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../server/demo");

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("numerics/fixtures/evaluation")
}

fn said(output: &Output) -> [String; 2] {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned())
}

/// The line of JSON, which is the last.
fn eval(words: &[&str]) -> Value {
    let output = command(&["eval"]).args(words).output().unwrap();
    let [out, log] = said(&output);
    assert!(output.status.success(), "{words:?}: {out}{log}");
    let line = out.lines().last().unwrap_or_default();
    assert!(out.contains("perplexity") && !log.contains('\r'), "{out}{log}");
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {out}{log}"))
}

fn number(value: &Value, name: &str) -> f64 {
    value[name]
        .as_f64()
        .unwrap_or_else(|| panic!("{name} is not in {value}"))
}

#[test]
fn losses_are_those_of_transformers_and_peft() {
    let expected = std::fs::read(fixtures().join("expected.json")).expect("scripts/fixtures made it");
    let expected: Value = serde_json::from_slice(&expected).expect("JSON");
    let cases = expected["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 5);
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("rows.jsonl").display().to_string();
    let adapter = format!("adapter={}", fixtures().join("adapter").display());
    let mut losses = vec![];
    for case in cases {
        let rows = case["rows"].as_array().expect("rows").iter();
        std::fs::write(&data, rows.map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        let settings = case["settings"].as_array().expect("settings").iter();
        let mut words = vec![MODEL, &data, "dtype=float32", "device=cpu"];
        words.extend(settings.map(|word| word.as_str().expect("a word")));
        words.extend((case["adapter"] == true).then_some(adapter.as_str()));
        let found = eval(&words);
        assert_eq!(found["label_tokens"], case["label_tokens"], "{}", case["name"]);
        for name in ["loss", "token_accuracy"] {
            let (ours, theirs) = (number(&found, name), number(case, name));
            assert!(
                (ours - theirs).abs() < 1e-5,
                "{}: {name} {ours} and {theirs}",
                case["name"]
            );
        }
        let perplexity = number(&found, "perplexity") / number(case, "perplexity");
        assert!((perplexity - 1.0).abs() < 1e-5, "{}: {perplexity}", case["name"]);
        losses.push(number(&found, "loss"));
    }
    // Each is about something of its own.
    losses.sort_by(f64::total_cmp);
    assert!(
        losses.windows(2).all(|pair| pair[1] - pair[0] > 1e-3),
        "{losses:?}"
    );
}

/// The last validation of a run, to the bit: with its adapter, on its base in 4 bits.
#[test]
fn it_is_what_a_run_validates() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let recipe = format!(
        "model: {MODEL}\ntraining_file: {0}\nvalidation_file: {0}\nsplit: \"train[:16]\"\noutput_dir: {1}\nmax_steps: 3\n\
         max_seq_length: 20\nquantization: nf4\nlearning_rate: 1e-2\n",
        concat!(env!("CARGO_MANIFEST_DIR"), "/../server/demo/finetune.jsonl"),
        at("out")
    );
    std::fs::write(at("recipe.yaml"), recipe).unwrap();
    let trained = command(&["train", &at("recipe.yaml")]).output().unwrap();
    assert!(trained.status.success(), "{:?}", said(&trained));
    let lines = std::fs::read_to_string(at("out/metrics.jsonl")).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let validated = lines
        .filter_map(|line| line["eval_loss"].as_f64())
        .next_back()
        .unwrap();
    let found = eval(&[&at("recipe.yaml"), &format!("adapter={}", at("out/adapter"))]);
    assert_eq!(number(&found, "loss"), validated);
    assert_ne!(number(&eval(&[&at("recipe.yaml")]), "loss"), validated);
}

#[test]
fn what_is_wrong_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("rows.jsonl"), "{\"text\": \"a\"}\n").unwrap();
    let tasks = "model:\n  _component_: torchtune.models.llama2.llama2_7b\ntasks: [truthfulqa_mc2]\n";
    std::fs::write(at("tasks.yaml"), tasks).unwrap();
    for (words, expected) in [
        (
            &[MODEL, &at("rows.jsonl"), "learning_rate=1"][..],
            "learning_rate: is of training",
        ),
        (
            &[MODEL, &at("rows.jsonl"), "output_dir=x"],
            "output_dir: is of training",
        ),
        (
            &[MODEL, &at("rows.jsonl"), "max_seq_lenght=8"],
            "did you mean max_seq_length?",
        ),
        (&[MODEL, &at("rows.jsonl"), "objective=dpo"], "compares answers"),
        (
            &[MODEL, &at("rows.jsonl"), "adapter=/nowhere"],
            "adapter_config.json",
        ),
        (
            &[MODEL, &at("rows.jsonl"), "validation_file=x"],
            "rows.jsonl and validation_file are the same setting",
        ),
        (
            &[MODEL, "model_name=m", &format!("data={}", at("rows.jsonl"))],
            "model_name are the same setting",
        ),
        (&[MODEL], "training_file"),
        (&[&at("tasks.yaml")], "local-completions"),
    ] {
        let output = command(&["eval"]).args(words).output().unwrap();
        let log = said(&output)[1].clone();
        assert!(
            !output.status.success() && log.contains(expected),
            "{words:?}: {log}"
        );
    }
    let help = said(&command(&["eval", "help"]).output().unwrap())[0].clone();
    assert!(
        help.contains("max_seq_length") && !help.contains("learning_rate"),
        "{help}"
    );
}
