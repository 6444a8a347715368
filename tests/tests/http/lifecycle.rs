//! The process: what it says of itself, keys, the API document, the end.

use std::io::{Read, Write};

use serde_json::{Value, json};

use crate::client;
use crate::server::{Server, command};

#[test]
fn it_says_what_it_is() {
    let server = Server::shared();
    for path in ["/health", "/ready", "/version", "/v1/models", "/tokenizer_info"] {
        client::get(server.address, path).ok();
    }
    for (path, text) in [
        ("/", "<title>Tandem</title>"),
        ("/docs", "openapi.json"),
        ("/metrics", "vllm:num_requests_running"),
    ] {
        let reply = client::get(server.address, path);
        assert!(reply.status == 200 && reply.text().contains(text), "{path}");
        // Nothing is fetched from elsewhere.
        assert!(!reply.text().contains("https://"), "{path}");
    }
    let id = client::send(server.address, "GET", "/health", &[("x-request-id", "mine")], b"");
    assert_eq!(id.header("x-request-id"), Some("mine"));
}

#[test]
fn the_served_document_is_the_committed_one() {
    let server = Server::shared();
    let committed = include_str!("../../../openapi/openapi.json");
    assert!(
        client::get(server.address, "/openapi.json").text() == committed,
        "openapi/openapi.json is stale"
    );
    let document: Value = serde_json::from_str(committed).unwrap();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            for status in ["400", "401", "404", "500"] {
                assert!(
                    operation["responses"][status].is_object(),
                    "{method} {path} does not document {status}"
                );
            }
        }
    }
}

#[test]
fn a_chat_template_may_be_chosen() {
    let template = "{% for message in messages %}[{{ message.content }}]\\n{% endfor %}";
    let server = Server::start(&["--chat-template", template]);
    let tokens = |body: Value| client::post(server.address, "/tokenize", &body).ok()["tokens"].clone();
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]);
    assert_eq!(
        tokens(json!({"messages": messages})),
        tokens(json!({"prompt": "[Hi]\n[Ho]\n", "add_special_tokens": false}))
    );
    let info = client::get(server.address, "/tokenizer_info").ok();
    assert_eq!(info["chat_template"], json!(template.replace("\\n", "\n")));
}

#[test]
fn sequences_are_as_long_as_the_cache_holds_unless_it_was_said() {
    let server = Server::start(&["--kv-cache-memory-bytes", "100K"]);
    assert_eq!(server.base["max_model_len"], json!(96));
}

#[test]
fn a_key_guards_every_route() {
    // As a secret's file ends.
    let server = Server::start(&["--api-key", "sekret\n"]);
    let ask = |path: &str, headers: &[(&str, &str)]| client::send(server.address, "GET", path, headers, b"");
    // A browser cannot send a key before a page has asked for it.
    for path in ["/health", "/ready", "/", "/docs"] {
        assert_eq!(ask(path, &[]).status, 200);
    }
    for path in [
        "/v1/models",
        "/tokenizer_info",
        "/metrics",
        "/version",
        "/openapi.json",
        "/nothing",
        "/health/",
    ] {
        for headers in [
            &[][..],
            &[("authorization", "Bearer wrong")],
            &[("authorization", "sekret")],
            &[("x-api-key", "")],
        ] {
            let reply = ask(path, headers);
            assert_eq!(
                (reply.status, &reply.json()["error"]["code"]),
                (401, &json!("invalid_api_key")),
                "{path} {headers:?}"
            );
        }
    }
    for headers in [("authorization", "Bearer sekret"), ("x-api-key", "sekret")] {
        assert_eq!(ask("/v1/models", &[headers]).status, 200);
    }
    assert!(!server.log().contains("sekret"), "the key is in the log");
}

#[test]
fn a_page_of_elsewhere_commands_no_server_without_a_key() {
    let server = Server::shared();
    let body = json!({"model": server.model(), "prompt": "Hi", "max_tokens": 1}).to_string();
    let own = format!("http://{}", server.address);
    let host = server.address.to_string();
    let json = ("content-type", "application/json");
    let evil = ("origin", "https://evil.example");
    let form = ("content-type", "multipart/form-data; boundary=b");
    let cancel = "/v1/fine_tuning/jobs/ftjob-unknown/cancel";
    for (method, path, headers, status) in [
        ("POST", "/v1/completions", vec![json], 200),
        (
            "POST",
            "/v1/completions",
            vec![json, ("host", &*host), ("origin", &*own)],
            200,
        ),
        (
            "POST",
            "/v1/completions",
            vec![json, ("origin", "http://localhost:3000")],
            200,
        ),
        ("POST", "/v1/completions", vec![json, evil], 403),
        ("POST", "/v1/completions", vec![json, ("origin", "null")], 403),
        ("POST", "/v1/files", vec![form, evil], 403),
        ("POST", cancel, vec![evil], 403),
        ("DELETE", "/v1/models/x", vec![evil], 403),
        // A browser says that it is the server's own page, behind a proxy that has another name.
        (
            "DELETE",
            "/v1/models/x",
            vec![evil, ("sec-fetch-site", "same-origin")],
            404,
        ),
        // A page cannot read this, and a link may lead here.
        ("GET", "/", vec![evil], 200),
        // A name that somebody made point to this machine.
        ("GET", "/v1/models", vec![("host", "evil.example:8000")], 403),
        ("GET", "/health", vec![("host", "evil.example:8000")], 200),
    ] {
        let reply = client::send(server.address, method, path, &headers, body.as_bytes());
        assert_eq!(
            reply.status,
            status,
            "{method} {path} {headers:?}: {}",
            reply.text()
        );
        assert!(
            status != 403 || reply.text().contains("--allowed-origins"),
            "{}",
            reply.text()
        );
    }
}

#[test]
fn listed_pages_are_granted() {
    let server = Server::start(&[
        "--allowed-origins",
        "[\"https://chat.example.com\"]",
        "--api-key",
        "sekret",
    ]);
    let ask = |origin: &str| {
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,content-type"),
        ];
        let reply = client::send(server.address, "OPTIONS", "/v1/chat/completions", &headers, b"");
        let granted = reply.header("access-control-allow-origin").map(str::to_owned);
        (
            reply.status,
            granted,
            reply.header("access-control-allow-headers").map(str::to_owned),
        )
    };
    let (status, granted, headers) = ask("https://chat.example.com");
    assert_eq!(
        (status, granted.as_deref()),
        (200, Some("https://chat.example.com"))
    );
    assert_eq!(headers.as_deref(), Some("authorization,content-type"));
    assert_eq!(ask("https://evil.example").1, None);
    // Also what goes wrong can be read.
    let origin = [("origin", "https://chat.example.com")];
    let refused = client::send(server.address, "GET", "/v1/models", &origin, b"");
    assert_eq!(
        (refused.status, refused.header("access-control-allow-origin")),
        (401, Some("https://chat.example.com"))
    );
}

#[test]
fn a_refused_body_does_not_end_the_connection() {
    let server = Server::shared();
    let body = "x".repeat(100_000);
    let refused = |path: &str, kind: &str| {
        let length = body.len();
        format!("POST {path} HTTP/1.1\r\nhost: t\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}").into_bytes()
    };
    let mut requests = Vec::new();
    for _ in 0..100 {
        requests.push(refused("/nowhere", "application/json"));
        requests.push(refused("/v1/completions", "text/plain"));
        requests.push(refused("/v1/files", "multipart/form-data; boundary=b"));
    }
    let statuses: Vec<u16> = client::in_turn(server.address, &requests)
        .iter()
        .map(|reply| reply.status)
        .collect();
    assert_eq!(statuses, [404, 415, 400].repeat(100));
}

#[test]
fn a_model_recommends_sampling_parameters() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"temperature": 0.0, "max_new_tokens": 3});
    std::fs::write(folder.path().join("generation_config.json"), config.to_string()).unwrap();
    let server = Server::start(&["--generation-config", folder.path().to_str().unwrap()]);
    assert!(
        server.log().contains("temperature 0, max_tokens 3"),
        "{}",
        server.log()
    );
    let ask = |extra: Value| {
        let mut body = json!({"model": server.model(), "messages": [{"role": "user", "content": "Tell me a story"}], "ignore_eos": true});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        client::post(server.address, "/v1/chat/completions", &body).ok()
    };
    let greedy = ask(json!({"temperature": 0, "max_tokens": 3}));
    let default = ask(json!({}));
    assert_eq!(default["usage"]["completion_tokens"], 3);
    assert_eq!(default["choices"][0]["message"], greedy["choices"][0]["message"]);
    assert_eq!(ask(json!({"max_tokens": 5}))["usage"]["completion_tokens"], 5);
}

#[test]
fn the_base_answers_to_each_of_its_names() {
    let names = ["first", "second"];
    let server = Server::start(&[
        "--served-model-name",
        names[0],
        names[1],
        "--enable-lora",
        "--max-model-len",
        "-1",
    ]);
    let listed = client::get(server.address, "/v1/models").ok();
    let listed: Vec<&Value> = listed["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|card| &card["id"])
        .collect();
    assert_eq!(listed, names);
    for name in names {
        let body = json!({"model": name, "prompt": "Once", "max_tokens": 1});
        assert_eq!(
            client::post(server.address, "/v1/completions", &body).ok()["model"],
            name
        );
        assert_eq!(
            client::get(server.address, &format!("/v1/models/{name}")).ok()["id"],
            name
        );
        let gone = client::send(server.address, "DELETE", &format!("/v1/models/{name}"), &[], b"");
        assert!(gone.status >= 400, "{name} was deleted");
    }
    let log = server.log();
    assert!(log.contains("enable-lora") && log.contains("not needed"), "{log}");
    assert!(
        !log.contains("max-num-seqs"),
        "what nobody gave is in the log: {log}"
    );
}

#[test]
fn a_stream_ends_before_the_server_does() {
    let mut server = Server::start(&[]);
    let body = json!({"model": server.model(), "prompt": "Once", "max_tokens": 32, "ignore_eos": true, "stream": true}).to_string();
    let mut stream = client::connect(server.address);
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut text = vec![0; 64];
    stream.read_exact(&mut text).unwrap();
    let status = server.terminate();
    assert!(status.success(), "{status}\n{}", server.log());
    stream.read_to_end(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("data: [DONE]"), "the stream was cut: {text}");
}

#[test]
fn wrong_starts_are_explained() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path().to_str().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "max-num-seq = 4\n").unwrap();
    let config = file.path().to_str().unwrap();
    let gguf = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
    let gguf = gguf.path().to_str().unwrap();
    for (args, variable, expected) in [
        (&["serve", "--data-dir", data, "--prot", "1"][..], None, "--port"),
        (&["serve", "--data-dir", data, "--port", "99999"], None, "99999"),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--model",
                "/nowhere/at/all",
            ],
            None,
            "/nowhere/at/all",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0", "--model", gguf],
            None,
            "it is cut off",
        ),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--kv-cache-memory-bytes",
                "100T",
            ],
            None,
            "--kv-cache-memory-bytes asks for 100 TiB, ",
        ),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--kv-cache-memory-bytes",
                "100",
            ],
            None,
            "not one block of 32 tokens",
        ),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--kv-cache-memory-bytes",
                "100K",
                "--max-model-len",
                "128",
            ],
            None,
            "choose --max-model-len 96 or less",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0", "--device", "abacus"],
            None,
            "abacus",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0", "--config", config],
            None,
            "max-num-seqs",
        ),
        (
            &[
                "serve",
                "--gpu-memory-utilization",
                "0.9",
                "--tool-call-parser=hermes",
            ],
            None,
            "--gpu-memory-utilization is not taken: what the KV cache may take is said in bytes: use --kv-cache-memory-bytes",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0"],
            Some(("TANDEM_ENABLE_EXPERT_PARALLEL", "1")),
            "TANDEM_ENABLE_EXPERT_PARALLEL is not taken",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0", "no-such/Model-1B"],
            Some(("HF_HUB_OFFLINE", "1")),
            "there is no folder no-such/Model-1B in ",
        ),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--chat-template",
                "a\\n{% if",
            ],
            None,
            "(line 2 of the template)",
        ),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--chat-template",
                "chatml",
            ],
            None,
            "without such a file the text must be a template",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0", "no-such-model"],
            None,
            "there is no such folder, and a name on the hub is ORG/NAME",
        ),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--revision",
                "v1",
                data,
            ],
            None,
            "--revision v1 is for names of the hub",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0", "--model", config],
            None,
            "is a file: a folder with config.json",
        ),
        (&["chat"], None, "`tandem serve`"),
        (&[], None, "To begin:"),
        (
            &["serve", "--data-dir", data, "--port", "0"],
            Some(("TANDEM_PROT", "1")),
            "TANDEM_PORT",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0"],
            Some(("TANDEM_API_KEY", "")),
            "--api-key: is empty",
        ),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--allowed-origins",
                "example.com",
            ],
            None,
            "\"example.com\" is no origin",
        ),
        (
            &[
                "serve",
                "--data-dir",
                data,
                "--port",
                "0",
                "--generation-config",
                "/nowhere",
            ],
            None,
            "/nowhere/generation_config.json",
        ),
        (&["router", "--data-dir", data, "--port", "0"], None, "--backend"),
        (
            &[
                "router",
                "--data-dir",
                data,
                "--port",
                "0",
                "--backend",
                "10.0.0.7:8001",
            ],
            None,
            "http://",
        ),
        (&["backend", "--data-dir", data, "--listen", "8001"], None, "8001"),
        (&["train", "model=x", "learning_rat=1"], None, "learning_rate"),
        (&["health", "--port", "1"], None, "port 1"),
    ] {
        let mut command = command(args);
        variable.map(|(name, value)| command.env(name, value));
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(expected),
            "{args:?}: {text}"
        );
        assert!(!text.contains("panicked"), "{args:?}: {text}");
    }
    let server = Server::shared();
    let port = server.address.port().to_string();
    assert!(
        command(&["health", "--port", &port])
            .output()
            .unwrap()
            .status
            .success()
    );
    assert!(command(&["doctor"]).output().unwrap().status.success());
    let taken = command(&["serve", "--data-dir", data, "--port", &port])
        .output()
        .unwrap();
    assert!(!taken.status.success() && String::from_utf8_lossy(&taken.stderr).contains("cannot listen"));
}

#[test]
fn the_exit_code_says_whether_another_start_can_help() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let data = data.to_str().unwrap();
    let empty = tempfile::NamedTempFile::new().unwrap();
    let empty = empty.path().to_str().unwrap();
    let server = Server::shared();
    let port = server.address.port().to_string();
    let serve = |more: &[&'static str]| [&["serve", "--port", "0"], more].concat();
    for (args, data, expected) in [
        (serve(&["--max-num-seqs", "many"]), data, 2),
        (serve(&["--model", "/nowhere/at/all"]), data, 78),
        (serve(&["--device", "abacus"]), data, 78),
        // A folder that cannot be made.
        (serve(&[]), "/proc/data", 78),
        (serve(&["--published", "0.0.0.0:8000"]), data, 78),
        (serve(&["--api-key-file", "/nowhere/keys"]), data, 78),
        (
            [&["serve", "--port", "0", "--api-key-file"][..], &[empty]].concat(),
            data,
            78,
        ),
        (vec!["router", "--port", "0"], data, 78),
        // Whoever has the port may be about to go.
        (vec!["serve", "--port", &port], data, 1),
    ] {
        let output = command(&args).args(["--data-dir", data]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(expected), "{args:?}: {text}");
    }
}

#[test]
fn keys_come_from_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "\u{feff}first\r\n# a comment\n second \n").unwrap();
    let server = Server::start(&[
        "--api-key-file",
        file.path().to_str().unwrap(),
        "--published",
        "0.0.0.0:1",
    ]);
    for (key, expected) in [
        ("first", 200),
        ("second", 200),
        ("third", 401),
        ("# a comment", 401),
        ("", 401),
    ] {
        let headers = [("authorization", format!("Bearer {key}"))];
        let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
        let reply = client::send(server.address, "GET", "/v1/models", &headers, b"");
        assert_eq!(reply.status, expected, "{key}");
    }
    assert!(!server.log().contains("second"), "a key is in the log");
}
