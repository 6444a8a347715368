//! A replica of two ranks that are processes: it answers and trains as one rank does; a rank that is killed costs the
//! requests that had begun, a clear 503 each, and the replica is back; nobody outlives rank 0. The other ranks may also
//! be started beside it, as torchrun does.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::client::{self, Reply};
use crate::server::{Server, wait_for};

const CLOSE: f64 = 1e-4;
const RANKS: [&str; 4] = [
    "--tensor-parallel-size",
    "2",
    "--distributed-executor-backend",
    "mp",
];
const FLOAT: [&str; 4] = ["--dtype", "float32", "--threads", "2"];

fn completion(server: &Server, model: &str, max_tokens: u32) -> Reply {
    let body = json!({"model": model, "prompt": "Who is the baker?", "max_tokens": max_tokens, "temperature": 0,
                      "logprobs": 1, "echo": true, "ignore_eos": true});
    client::post(server.address, "/v1/completions", &body)
}

/// Text and log-probabilities.
fn said(reply: &Value) -> (String, Vec<f64>) {
    let choice = &reply["choices"][0];
    let numbers = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    let text = choice["text"].as_str().unwrap().to_owned();
    (text, numbers.iter().filter_map(Value::as_f64).collect())
}

fn assert_same(ours: &Value, expected: &Value, what: &str) {
    let (ours, expected) = (said(ours), said(expected));
    assert_eq!(ours.0, expected.0, "{what}");
    assert!(ours.1.len() == expected.1.len() && ours.1.len() > 20, "{what}");
    let worst = ours
        .1
        .iter()
        .zip(&expected.1)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max);
    println!("{what}: log-probabilities differ by {worst:.1e} at most");
    assert!(worst <= CLOSE, "{what}: log-probabilities differ by {worst}");
}

/// Living processes that `pid` started.
fn children(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let of_thread = |thread: std::fs::DirEntry| {
        std::fs::read_to_string(thread.path().join("children")).unwrap_or_default()
    };
    let all = threads.map(of_thread).collect::<Vec<_>>().join(" ");
    all.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .filter(|&pid| lives(pid))
        .collect()
}

fn lives(pid: u32) -> bool {
    // A zombie has ended; only nobody has asked how.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| !rest.trim_start().starts_with('Z'))
    })
}

fn kill(pid: u32) {
    let status = std::process::Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Starts a job; its URL.
fn train(server: &Server, epochs: u32) -> String {
    let rows: String = (0..24)
        .map(|i| json!({"prompt": format!("Question {i}: "), "completion": " blue."}).to_string() + "\n")
        .collect();
    let file = client::upload(server.address, "t.jsonl", rows.as_bytes()).ok();
    let request = json!({"model": server.model(), "training_file": file["id"], "seed": 1,
                         "hyperparameters": {"n_epochs": epochs, "batch_size": 8}});
    let job = client::post(server.address, "/v1/fine_tuning/jobs", &request).ok();
    format!("/v1/fine_tuning/jobs/{}", job["id"].as_str().unwrap())
}

fn finished(server: &Server, job: &str) -> String {
    let job = wait_for("the job ends", || {
        let job = client::get(server.address, job).ok();
        ["succeeded", "failed", "cancelled"]
            .contains(&job["status"].as_str().unwrap())
            .then_some(job)
    });
    assert_eq!(job["status"], "succeeded", "{job}\n{}", server.log());
    job["fine_tuned_model"].as_str().unwrap().to_owned()
}

#[test]
fn ranks_that_are_processes() {
    let alone = Server::start(&FLOAT);
    let server = Server::start(&[&RANKS[..], &FLOAT[..]].concat());
    let expected = completion(&alone, alone.model(), 40).ok();
    assert_same(&completion(&server, server.model(), 40).ok(), &expected, "base");

    // The same job on both: what it made says the same.
    let jobs = [&alone, &server].map(|server| train(server, 2));
    let made = [finished(&alone, &jobs[0]), finished(&server, &jobs[1])];
    let tuned = completion(&alone, &made[0], 40).ok();
    assert_ne!(said(&tuned), said(&expected));
    assert_same(&completion(&server, &made[1], 40).ok(), &tuned, "adapter");

    // A rank dies under requests and beside a job.
    let job = train(&server, 40);
    let ranks = children(server.pid());
    let [rank] = ranks[..] else {
        panic!("one rank beside rank 0, not {ranks:?}")
    };
    let (replies, took) = std::thread::scope(|scope| {
        let long = || scope.spawn(|| completion(&server, server.model(), 900));
        let running: Vec<_> = (0..4).map(|_| long()).collect();
        wait_for("they run", || {
            let text = client::get(server.address, "/metrics").text();
            let running = text
                .lines()
                .find(|line| line.starts_with("vllm:num_requests_running{"));
            running.is_some_and(|line| line.ends_with(" 4")).then_some(())
        });
        kill(rank);
        let killed = Instant::now();
        let replies: Vec<Reply> = running.into_iter().map(|reply| reply.join().unwrap()).collect();
        (replies, killed.elapsed())
    });
    // Those that had begun hear it; one that had not is asked again.
    for reply in &replies {
        let error = reply.status == 503 && reply.json()["error"]["code"] == "replica_lost";
        assert!(error || reply.status == 200, "{}", reply.text());
    }
    assert!(
        replies.iter().any(|reply| reply.status == 503),
        "nothing was lost: {}",
        server.log()
    );
    let killed = Instant::now();
    let again = wait_for("the replica is back", || {
        let reply = completion(&server, server.model(), 40);
        (reply.status == 200).then(|| reply.json())
    });
    println!(
        "a rank was killed: last 503 after {took:.2?}, the next answer {:.2?} later",
        killed.elapsed()
    );
    assert_same(&again, &expected, "after the loss");
    assert_same(
        &completion(&server, &made[1], 40).ok(),
        &tuned,
        "its adapter after the loss",
    );
    finished(&server, &job);

    // Nobody outlives rank 0.
    let ranks = children(server.pid());
    assert_eq!(ranks.len(), 1);
    drop(server.kill());
    wait_for("the other rank ends", || (!lives(ranks[0])).then_some(()));
    drop(alone);
}

#[test]
fn ranks_that_were_started_beside_each_other() {
    let free = || {
        std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port()
    };
    let port = free().to_string();
    let data = Arc::new(tempfile::tempdir().unwrap());
    let rank = |rank: &'static str| {
        [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", &port),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    // The same command line for both.
    let mut follower = crate::server::command(&["serve", "--port", "0", "--data-dir"])
        .arg(data.path().join("other"))
        .args(FLOAT)
        .envs(rank("1"))
        .stderr(std::fs::File::create(data.path().join("rank-1")).unwrap())
        .spawn()
        .unwrap();
    let mut server = Server::start_with(data.clone(), &rank("0"), &FLOAT);
    let alone = Server::start(&FLOAT);
    let expected = completion(&alone, alone.model(), 30).ok();
    assert_same(
        &completion(&server, server.model(), 30).ok(),
        &expected,
        "met by environment",
    );
    let status = server.terminate();
    assert!(status.success(), "{status}\n{}", server.log());
    let log = || std::fs::read_to_string(data.path().join("rank-1")).unwrap();
    let status = follower.wait().unwrap();
    assert!(
        status.success(),
        "rank 1 ends in order with rank 0: {status}\n{}",
        log()
    );
}
