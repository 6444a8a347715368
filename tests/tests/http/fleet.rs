//! A router in front of two backends, all real processes: one is killed under streams and comes back, one is stopped in
//! order, and a job's adapter answers from both.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::json;

use crate::client;
use crate::server::{Server, command, wait_for};

const STREAMS: usize = 12;

#[test]
fn a_router_without_a_backend_says_so_and_begins_when_there_is_one() {
    let free = || {
        std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
    };
    let (own, backend) = (free(), free());
    let data = Arc::new(tempfile::tempdir().unwrap());
    let url = format!("http://{backend}");
    let folder = data.path().join("router");
    let port = own.port().to_string();
    let mut router = command(&["router", "--port", &port, "--backend", &url, "--data-dir"])
        .arg(&folder)
        .stdout(std::process::Stdio::piped())
        .stderr(std::fs::File::create(data.path().join("router.log")).unwrap())
        .spawn()
        .unwrap();
    wait_for("the router's socket", || std::net::TcpStream::connect(own).ok());
    assert_eq!(client::get(own, "/health").status, 200);
    let refused = client::get(own, "/v1/models");
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (503, &json!("no_backend"))
    );
    assert_eq!(client::get(own, "/ready").status, 503);
    let _backend = Server::backend(data.clone(), "backend.log", &backend.to_string());
    let mut line = String::new();
    BufReader::new(router.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("listening on"), "{line}");
    client::get(own, "/v1/models").ok();
    router.kill().unwrap();
    router.wait().unwrap();
}

/// How a stream ended.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ended {
    Whole,
    /// Text came, then an error that says so.
    CutWithWord,
}

/// Streams under way: the status line of each has come when this returns.
fn streams(router: &Server, model: &str, max_tokens: u32) -> Vec<std::thread::JoinHandle<Ended>> {
    let body = json!({
        "model": model, "prompt": "Who is the baker?", "max_tokens": max_tokens, "ignore_eos": true, "stream": true,
    });
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let open = |_| {
        let mut stream = client::connect(router.address);
        stream.write_all((head.clone() + &body).as_bytes()).unwrap();
        stream
    };
    let open: Vec<_> = (0..STREAMS).map(open).collect();
    let begin = |mut stream: std::net::TcpStream| {
        let mut text = vec![0; 256];
        stream.read_exact(&mut text).unwrap();
        std::thread::spawn(move || {
            stream.read_to_end(&mut text).unwrap();
            let text = String::from_utf8_lossy(&text);
            assert!(text.starts_with("HTTP/1.1 200"), "{text}");
            assert!(text.contains("data: [DONE]"), "an end was said: {text}");
            match text.contains("\"replica_lost\"") {
                true => Ended::CutWithWord,
                false => Ended::Whole,
            }
        })
    };
    open.into_iter().map(begin).collect()
}

fn ends(streams: Vec<std::thread::JoinHandle<Ended>>) -> BTreeMap<Ended, usize> {
    let mut ends = BTreeMap::new();
    for stream in streams {
        *ends.entry(stream.join().unwrap()).or_default() += 1;
    }
    ends
}

fn number(address: SocketAddr, series: &str) -> f64 {
    let text = client::get(address, "/metrics").text();
    let line = text.lines().find(|line| line.starts_with(series));
    let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    value.unwrap_or_else(|| panic!("{series} is not in\n{text}"))
}

fn replica(router: &Server, name: &str, backend: SocketAddr) -> f64 {
    let model = router.model();
    let series = format!("tandem:{name}{{model_name=\"{model}\",replica=\"http://{backend}\"}}");
    number(router.address, &series)
}

#[test]
fn a_fleet_outlives_its_backends() {
    let data = Arc::new(tempfile::tempdir().unwrap());
    let first = Server::backend(data.clone(), "first", "127.0.0.1:0");
    let second = Server::backend(data.clone(), "second", "127.0.0.1:0");
    let (a, b) = (first.address, second.address);
    for path in ["/health", "/ready", "/version", "/metrics"] {
        assert_eq!(client::get(a, path).status, 200, "{path}");
    }
    let mut router = Server::router(data.clone(), &[a, b]);
    let up = |backend| move |router: &Server| (replica(router, "replica_up", backend) == 1.0).then_some(());
    for backend in [a, b] {
        wait_for("both backends are up", || up(backend)(&router));
    }

    // One dies under streams: those it had begun end with a word, all others whole.
    let running = streams(&router, router.model(), 400);
    assert!(replica(&router, "replica_live", a) >= 1.0 && replica(&router, "replica_live", b) >= 1.0);
    drop(first.kill());
    let ended = ends(running);
    assert!(
        ended.get(&Ended::Whole).is_some_and(|&whole| whole >= 1),
        "{ended:?}"
    );
    wait_for("it is ejected", || {
        (replica(&router, "replica_up", a) == 0.0).then_some(())
    });
    assert_eq!(replica(&router, "replica_ejections_total", a), 1.0);
    assert_eq!(
        ends(streams(&router, router.model(), 8)),
        BTreeMap::from([(Ended::Whole, STREAMS)])
    );

    // It comes back where it was.
    let mut first = Server::backend(data.clone(), "first-again", &a.to_string());
    wait_for("it is back", || up(a)(&router));

    // A job trains on one of them, both serve what it made.
    let rows: String = (0..8)
        .map(|i| json!({"prompt": format!("Question {i}: "), "completion": " blue."}).to_string() + "\n")
        .collect();
    let file = client::upload(router.address, "t.jsonl", rows.as_bytes()).ok();
    let request = json!({"model": router.model(), "training_file": file["id"], "seed": 1,
                         "hyperparameters": {"n_epochs": 2, "batch_size": 4}});
    let job = client::post(router.address, "/v1/fine_tuning/jobs", &request).ok();
    let path = format!("/v1/fine_tuning/jobs/{}", job["id"].as_str().unwrap());
    let job = wait_for("the job ends", || {
        let job = client::get(router.address, &path).ok();
        ["succeeded", "failed", "cancelled"]
            .contains(&job["status"].as_str().unwrap())
            .then_some(job)
    });
    assert_eq!(
        job["status"],
        "succeeded",
        "{job}\n{}\n{}",
        first.log(),
        second.log()
    );
    let tuned = job["fine_tuned_model"].as_str().unwrap();
    let model = format!("{{model_name=\"{}\"}}", router.model());
    let resident = || [a, b].map(|backend| number(backend, &format!("tandem:adapters_resident{model}")));
    wait_for("both have the adapter", || {
        let whole = BTreeMap::from([(Ended::Whole, STREAMS)]);
        assert_eq!(ends(streams(&router, tuned, 64)), whole);
        // Where it was made, its checkpoints are as well.
        resident().iter().all(|&adapters| adapters >= 1.0).then_some(())
    });

    // One is stopped in order: nothing fails, and it leaves with success.
    let running = streams(&router, tuned, 200);
    let status = first.terminate();
    assert!(status.success(), "{status}\n{}", first.log());
    assert_eq!(
        ends(running),
        BTreeMap::from([(Ended::Whole, STREAMS)]),
        "{}",
        first.log()
    );
    // So is the router.
    let running = streams(&router, tuned, 100);
    let status = router.terminate();
    assert!(status.success(), "{status}\n{}", router.log());
    assert_eq!(ends(running), BTreeMap::from([(Ended::Whole, STREAMS)]));
    assert_eq!(
        client::get(b, "/ready").status,
        200,
        "a backend outlives its router"
    );
}
