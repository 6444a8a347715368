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
fn a_key_guards_every_route() {
    let server = Server::start(&["--api-key", "sekret"]);
    let ask = |path: &str, headers: &[(&str, &str)]| client::send(server.address, "GET", path, headers, b"");
    for path in ["/health", "/ready"] {
        assert_eq!(ask(path, &[]).status, 200);
    }
    for path in [
        "/v1/models",
        "/tokenizer_info",
        "/metrics",
        "/version",
        "/docs",
        "/",
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
fn a_stream_ends_before_the_server_does() {
    let mut server = Server::start(&[]);
    let body = json!({"model": server.model(), "prompt": "Once", "max_tokens": 32, "ignore_eos": true, "stream": true}).to_string();
    let mut stream = client::connect(server.address);
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
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
            &["serve", "--data-dir", data, "--port", "0", "--device", "abacus"],
            None,
            "abacus",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0", "--config", config],
            None,
            "max_num_seqs",
        ),
        (
            &["serve", "--data-dir", data, "--port", "0"],
            Some("TANDEM_PROT"),
            "TANDEM_PORT",
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
        variable.map(|name| command.env(name, "1"));
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
