//! The fuzz targets' functions over their seeds and over what fuzzing found (tests/fuzz/found/TARGET), so that they compile and
//! hold without nightly. `FUZZ_CORPUS=DIR` writes the seeds to DIR/TARGET, for fuzzing to begin with.

#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

const TARGETS: [Target; 8] = [
    ("adapter", targets::adapter, adapters),
    ("model", targets::model, models),
    ("rows", targets::rows, rows),
    ("template", targets::template, || {
        files("router/text/src/fixture", "jinja", &[])
    }),
    ("bodies", targets::bodies, bodies),
    ("grammar", targets::grammar, grammars),
    ("gguf", targets::gguf, ggufs),
    ("wire", targets::wire, wires),
];

#[test]
fn seeds_and_findings_are_read() {
    for (name, read, seeds) in TARGETS {
        let (seeds, found) = (seeds(), files(&format!("tests/fuzz/found/{name}"), "", &[]));
        assert!(seeds.len() > 1, "{name} has no seeds");
        for bytes in seeds.iter().chain(&found) {
            read(bytes);
        }
        let Some(folder) = std::env::var_os("FUZZ_CORPUS") else {
            continue;
        };
        let folder = Path::new(&folder).join(name);
        fs::create_dir_all(&folder).unwrap();
        for (i, bytes) in seeds.iter().enumerate() {
            fs::write(folder.join(format!("seed-{i}")), bytes).unwrap();
        }
    }
}

/// Files of a folder of this repository whose names end so, each behind the bytes that choose how it is read.
fn files(folder: &str, ending: &str, before: &[u8]) -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let entries = fs::read_dir(root.join(folder)).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .collect();
    paths.sort();
    let content = |path| [before, &fs::read(path).unwrap()].concat();
    paths.into_iter().map(content).collect()
}

const FIXTURES: &str = "tests/numerics/fixtures";

fn adapters() -> Vec<Vec<u8>> {
    let folders = ["gqa_tied/adapter-all", "gqa_tied/adapter-some", "dora"];
    let of = |folder| {
        let file = |name| files(&format!("{FIXTURES}/{folder}"), name, &[]).remove(0);
        let (config, tensors) = (file("adapter_config.json"), file("adapter_model.safetensors"));
        let length = u16::try_from(config.len()).unwrap().to_le_bytes();
        [&length[..], &config, &tensors].concat()
    };
    folders.into_iter().map(of).collect()
}

fn models() -> Vec<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut names: Vec<String> = fs::read_dir(root.join(FIXTURES))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let of = |name: &String| files(&format!("{FIXTURES}/{name}"), "/config.json", &[]);
    names.iter().flat_map(of).collect()
}

fn chosen(seeds: &[(u8, &str)]) -> Vec<Vec<u8>> {
    seeds
        .iter()
        .map(|(choice, text)| [&[*choice], text.as_bytes()].concat())
        .collect()
}

fn rows() -> Vec<Vec<u8>> {
    let texts = chosen(&[
        (
            0,
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\", \"weight\": 0}]}\n",
        ),
        (
            0,
            "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"text\": \"c\"}\n",
        ),
        (
            0,
            "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n{\"input\": {\"messages\": []}, \"preferred_output\": [], \"non_preferred_output\": []}",
        ),
        (
            0,
            "{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}]}",
        ),
        (
            1,
            "[{\"instruction\": \"a\", \"input\": \"\", \"output\": \"b\"},\n {\"question\": \"c\", \"answer\": \"d\"}]",
        ),
        (2, "\u{feff}prompt,completion\n\"a \"\"b\"\"\n\",c\nd,e\n"),
        (3, "prompt\tcompletion\na\tb\n"),
        (5, "a\n\nb\nc"),
    ]);
    [texts, files("router/text/src/fixture/parquet", ".parquet", &[4])].concat()
}

fn bodies() -> Vec<Vec<u8>> {
    chosen(&[
        (
            0,
            r#"{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool",
            "tool_call_id": "c", "content": "b"}], "tools": [{"type": "function", "function": {"name": "f", "parameters":
            {"type": "object", "properties": {"a": {"type": "string"}}}}}], "response_format": {"type": "json_object"}}"#,
        ),
        (
            1,
            r#"{"model": "m", "prompt": [[1, 2], [3]], "stop": ["a"], "logit_bias": {"1": -100}, "n": 2}"#,
        ),
        (
            2,
            r#"{"model": "m", "input": [{"role": "user", "content": "a"}], "text": {"format": {"type": "text"}}}"#,
        ),
        (
            3,
            r#"{"model": "m", "max_tokens": 9, "system": "a", "messages": [{"role": "user", "content": "b"}]}"#,
        ),
        (
            4,
            r#"{"inputs": "a", "parameters": {"max_new_tokens": 9, "details": true}}"#,
        ),
        (
            5,
            r#"{"model": "m", "input": ["a", "b"], "encoding_format": "base64"}"#,
        ),
        (
            6,
            r#"{"model": "m", "messages": [{"role": "user", "content": "a"}]}"#,
        ),
        (
            7,
            r#"{"session_id": "s", "model_seq_id": 1, "base_model": "m", "lora_config": {"rank": 8}}"#,
        ),
        (
            8,
            r#"{"model_id": "m", "adam_params": {"learning_rate": 1e-4, "beta1": 0.9}, "seq_id": 2}"#,
        ),
        (
            9,
            r#"{"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "sampling_params": {"max_tokens": 4}}"#,
        ),
        (11, "\n\u{1}m\u{10}\u{1}"),
        (12, r#"{"a": 1, "b": {"a": 2, "a": 3}}"#),
    ])
}

fn grammars() -> Vec<Vec<u8>> {
    chosen(&[
        (
            0,
            r##"{"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}, "b": {"$ref": "#/$defs/c"}},
            "required": ["a"], "$defs": {"c": {"anyOf": [{"enum": ["x", null]}, {"type": "array", "items": {}, "maxItems": 3}]}}}"##,
        ),
        (
            0,
            r#"{"type": "string", "pattern": "^a+$", "format": "date-time"}"#,
        ),
        (1, "[a-z]{1,9}(foo|bar)?\\d+"),
        (
            2,
            "start: NAME \"=\" value\nvalue: /[0-9]+/ | \"(\" value \")\"\nNAME: /[a-z]+/\n",
        ),
        (2, "root ::= \"yes\" | [0-9]+ ws\nws ::= \" \"*\n"),
        (3, "yes\nno\nyes, but\n"),
    ])
}

/// Heads with a value of each kind: texts, numbers, lists, tensors.
fn ggufs() -> Vec<Vec<u8>> {
    use tandem_core::gguf::{Value, head};
    let values = [
        ("general.architecture", Value::Text("llama".to_owned())),
        ("llama.block_count", Value::Whole(2)),
        ("llama.rope.freq_base", Value::Float(1e4)),
        (
            "tokenizer.ggml.tokens",
            Value::Texts(vec!["a".to_owned(), "b".to_owned()]),
        ),
        ("tokenizer.ggml.token_type", Value::Wholes(vec![1, 3])),
    ];
    let values = values.map(|(name, value)| (name.to_owned(), value));
    vec![head(&values, &[]), head(&values[..1], &[])]
}

fn wires() -> Vec<Vec<u8>> {
    use prost::Message;
    use tandem_rpc::wire::{
        Credit, Description, Down, Event, Events, Finished, Generate, StartJob, Up, event::What, up::Say,
    };
    let say = |say| Up { say: Some(say) }.encode_to_vec();
    let generate = Generate {
        stream: 1,
        prompt: vec![1, 2],
        sampling_json: br#"{"temperature": 1.0, "n": 1}"#.to_vec(),
        adapter: Some(vec![7; 32]),
        ..Generate::default()
    };
    let start = StartJob {
        spec_json: br#"{"id": "ftjob-1"}"#.to_vec(),
        ..StartJob::default()
    };
    let events = vec![Event {
        what: Some(What::Finished(Finished::default())),
        is_last: true,
    }];
    let down = Down {
        events: vec![Events { stream: 1, events }],
        stats_json: Some(b"{}".to_vec()),
        ..Down::default()
    };
    let seeds: [(u8, Vec<u8>); 6] = [
        (0, say(Say::Generate(generate))),
        (0, say(Say::StartJob(start))),
        (0, say(Say::Credit(Credit { stream: 1, events: 2 }))),
        (1, down.encode_to_vec()),
        (2, br#"{"id": "ftjob-1"}"#.to_vec()),
        (
            3,
            Description {
                info_json: b"{}".to_vec(),
                ..Description::default()
            }
            .encode_to_vec(),
        ),
    ];
    seeds
        .into_iter()
        .map(|(choice, bytes)| [vec![choice], bytes].concat())
        .collect()
}
