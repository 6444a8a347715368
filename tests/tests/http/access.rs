//! Keys with roles and owners: every route by every kind of key, whose things are whose, and what is written down.

use serde_json::{Value, json};

use crate::client::{self, Reply};
use crate::server::{Server, command, wait_for};

const ADMIN: &str = "an-admin-of-the-command-line";
const JSON: (&str, &str) = ("content-type", "application/json");

/// A key that `tandem keys` makes beside the running server: its id, and the key.
fn key(server: &Server, tenant: &str, role: &str) -> (String, String) {
    limited_key(server, tenant, role, &[])
}

fn limited_key(server: &Server, tenant: &str, role: &str, limits: &[&str]) -> (String, String) {
    let data = server.data.path().join("data");
    let made = command(&["keys", "create", "--tenant", tenant, "--role", role, "--data-dir"])
        .arg(data)
        .args(limits)
        .output()
        .unwrap();
    let said = String::from_utf8(made.stderr).unwrap();
    assert!(made.status.success(), "{said}");
    let row = said
        .lines()
        .find(|line| line.starts_with("key-"))
        .expect("its row");
    let id = row.split('\t').next().unwrap().to_owned();
    (id, String::from_utf8(made.stdout).unwrap().trim().to_owned())
}

fn ask(server: &Server, method: &str, path: &str, key: Option<&str>, body: &Value) -> Reply {
    let bearer = key.map(|key| format!("Bearer {key}"));
    let mut headers = vec![JSON];
    headers.extend(bearer.as_deref().map(|bearer| ("authorization", bearer)));
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    client::send(server.address, method, path, &headers, body.as_bytes())
}

fn get(server: &Server, path: &str, key: &str) -> Reply {
    ask(server, "GET", path, Some(key), &Value::Null)
}

/// Until the server has seen it.
fn is_taken(server: &Server, key: &str) {
    wait_for("the server's look at its keys", || {
        (get(server, "/v1/models", key).status == 200).then_some(())
    });
}

#[test]
fn every_route_asks_for_its_role() {
    let server = Server::start(&["--api-key", ADMIN]);
    let keys: Vec<(u8, String)> = [("infer", 1), ("train", 2), ("admin", 3)]
        .into_iter()
        .map(|(role, rank)| (rank, key(&server, "acme", role).1))
        .collect();
    keys.iter().for_each(|(_, key)| is_taken(&server, key));
    let document = get(&server, "/openapi.json", ADMIN).ok();
    let mut routes = vec![
        ("GET".to_owned(), "/".to_owned(), 0),
        ("GET".to_owned(), "/docs".to_owned(), 0),
        ("GET".to_owned(), "/openapi.json".to_owned(), 1),
    ];
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let least = match operation["x-least-role"].as_str().unwrap() {
                "none" => 0,
                "infer" => 1,
                "train" => 2,
                "admin" => 3,
                other => panic!("{other} is no role"),
            };
            let path = path.replace("{id}", "unknown");
            routes.push((
                method.to_uppercase(),
                path.replace("fine-tunes", "fine_tunes"),
                least,
            ));
            routes.push((method.to_uppercase(), path, least));
        }
    }
    assert!(routes.len() > 60, "{}", routes.len());
    for (method, path, least) in routes {
        let body = if method == "POST" { json!({}) } else { Value::Null };
        let of = |key: Option<&str>| {
            let reply = ask(&server, &method, &path, key, &body);
            // Anthropic's API names it by the type, text-generation-inference's has no name.
            let code = match (reply.status, reply.json_or_null()) {
                (401 | 403, body) if body["error"].is_string() => body["error_type"].clone(),
                (401 | 403, body) if body["type"] == "error" => body["error"]["type"].clone(),
                (401 | 403, body) => body["error"]["code"].clone(),
                _ => Value::Null,
            };
            (reply.status, code)
        };
        for key in [None, Some("unknown")] {
            let (status, code) = of(key);
            assert_eq!(status == 401, least > 0, "{method} {path} {key:?}: {status}");
            let known = ["invalid_api_key", "authentication_error", "validation"].map(Value::from);
            assert!(status != 401 || known.contains(&code), "{code}");
        }
        for (rank, key) in &keys {
            let (status, code) = of(Some(key));
            assert_eq!(
                status == 403,
                *rank < least,
                "{method} {path} by {rank}: {status}"
            );
            let known = ["insufficient_permissions", "permission_error", "validation"].map(Value::from);
            assert!(status != 403 || known.contains(&code), "{code}");
            assert_ne!(status, 401, "{method} {path} by {rank}");
        }
    }
}

#[test]
fn what_is_anothers_does_not_exist() {
    let audit = tempfile::NamedTempFile::new().unwrap();
    let server = Server::start(&["--api-key", ADMIN, "--audit-log", audit.path().to_str().unwrap()]);
    let (acme_id, acme) = key(&server, "acme", "train");
    let (_, other) = key(&server, "other", "train");
    [&acme, &other].into_iter().for_each(|key| is_taken(&server, key));
    let model = get(&server, "/v1/models", &acme).ok()["data"][0]["id"].clone();

    let row =
        json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]});
    let form = format!(
        "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--b\r\n\
         content-disposition: form-data; name=\"file\"; filename=\"rows.jsonl\"\r\n\r\n{}\r\n--b--\r\n",
        vec![row.to_string(); 4].join("\n")
    );
    let bearer = format!("Bearer {acme}");
    let headers = [
        ("content-type", "multipart/form-data; boundary=b"),
        ("authorization", bearer.as_str()),
    ];
    let file = client::send(server.address, "POST", "/v1/files", &headers, form.as_bytes()).ok();
    let file = file["id"].as_str().unwrap();
    let body =
        json!({"model": model, "training_file": file, "max_steps": 2, "lora_r": 2, "max_seq_length": 32});
    // A file of another is none.
    let refused = ask(&server, "POST", "/v1/fine_tuning/jobs", Some(&other), &body);
    assert_eq!(refused.status, 400, "{}", refused.text());
    assert!(refused.text().contains("does not exist"), "{}", refused.text());
    let job = ask(&server, "POST", "/v1/fine_tuning/jobs", Some(&acme), &body).ok();
    let job = job["id"].as_str().unwrap();
    let tuned = wait_for("the job's end", || {
        let job = get(&server, &format!("/v1/fine_tuning/jobs/{job}"), &acme).ok();
        assert_ne!(job["status"], "failed", "{job}");
        job["fine_tuned_model"].as_str().map(str::to_owned)
    });
    let result = get(&server, &format!("/v1/fine_tuning/jobs/{job}"), &acme).ok()["result_files"][0].clone();
    let asked = json!({"model": model, "input": "Hi", "max_output_tokens": 2});
    let response = ask(&server, "POST", "/v1/responses", Some(&acme), &asked).ok();
    let response = response["id"].as_str().unwrap();
    // Nor can a conversation of another be gone on with.
    let mut goes_on = asked;
    goes_on["previous_response_id"] = json!(response);
    let refused = ask(&server, "POST", "/v1/responses", Some(&other), &goes_on);
    assert_eq!(
        refused.json()["error"]["code"],
        "previous_response_not_found",
        "{}",
        refused.text()
    );
    ask(&server, "POST", "/v1/responses", Some(&acme), &goes_on).ok();

    let paths = [
        ("GET", format!("/v1/files/{file}")),
        ("GET", format!("/v1/files/{}/content", result.as_str().unwrap())),
        ("GET", format!("/v1/fine_tuning/jobs/{job}")),
        ("GET", format!("/v1/fine_tuning/jobs/{job}/events")),
        ("GET", format!("/v1/fine_tuning/jobs/{job}/checkpoints")),
        ("GET", format!("/v1/fine-tunes/{job}")),
        ("GET", format!("/v1/models/{tuned}")),
        ("GET", format!("/v1/responses/{response}")),
        ("GET", format!("/v1/responses/{response}/input_items")),
        ("POST", format!("/v1/responses/{response}/cancel")),
        ("DELETE", format!("/v1/responses/{response}")),
        ("POST", format!("/v1/fine_tuning/jobs/{job}/cancel")),
        ("DELETE", format!("/v1/fine-tunes/{job}")),
        ("DELETE", format!("/v1/models/{tuned}")),
        ("DELETE", format!("/v1/files/{file}")),
    ];
    for (method, path) in &paths {
        let hidden = ask(&server, method, path, Some(&other), &Value::Null);
        assert_eq!(hidden.status, 404, "{method} {path}: {}", hidden.text());
        // In the words for what never was.
        let unknown = path
            .replace(file, "file-0")
            .replace(job, "ftjob-0")
            .replace(&*tuned, "nobody")
            .replace(response, "resp_0");
        let unknown = unknown.replace(result.as_str().unwrap(), "file-0");
        let never = ask(&server, method, &unknown, Some(&other), &Value::Null);
        let words = |reply: &Reply| {
            let text = reply
                .text()
                .replace(file, "file-0")
                .replace(job, "ftjob-0")
                .replace(&*tuned, "nobody")
                .replace(response, "resp_0");
            text.replace(result.as_str().unwrap(), "file-0")
        };
        assert_eq!(
            (never.status, words(&never)),
            (404, words(&hidden)),
            "{method} {path}"
        );
        if *method == "GET" {
            for key in [&acme[..], ADMIN] {
                assert_eq!(get(&server, path, key).status, 200, "{path}");
            }
        }
    }
    for path in [
        "/v1/files",
        "/v1/fine_tuning/jobs",
        "/v1/fine-tunes",
        "/v1/models",
    ] {
        let count = |key: &str| get(&server, path, key).ok()["data"].as_array().unwrap().len();
        let nothing = usize::from(path == "/v1/models");
        assert_eq!((count(&other), count(&acme) > nothing), (nothing, true), "{path}");
        assert_eq!(count(ADMIN), count(&acme), "{path}");
    }
    let prompt = |key: &str| {
        let body = json!({"model": tuned, "prompt": "Hi", "max_tokens": 1});
        ask(&server, "POST", "/v1/completions", Some(key), &body)
    };
    assert_eq!((prompt(&acme).status, prompt(ADMIN).status), (200, 200));
    let hidden = prompt(&other);
    assert_eq!(
        (hidden.status, &hidden.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    assert_eq!(
        ask(
            &server,
            "DELETE",
            &format!("/v1/models/{tuned}"),
            Some(&acme),
            &Value::Null
        )
        .status,
        200
    );

    // What a prompt finds in the cache tells nothing of what others asked.
    let long = "Once upon a time there was a baker who baked bread for everybody in the town. ".repeat(4);
    let cached = |key: &str| {
        let body = json!({"model": model, "prompt": long, "max_tokens": 1});
        let reply = ask(&server, "POST", "/v1/completions", Some(key), &body).ok();
        reply["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(cached(&acme), 0);
    assert!(cached(&acme) > 0);
    assert_eq!((cached(&other), cached(ADMIN)), (0, 0));

    // A key that is revoked, and then nobody without one.
    let revoked = command(&["keys", "revoke", &acme_id, "--data-dir"])
        .arg(server.data.path().join("data"))
        .status();
    assert!(revoked.unwrap().success());
    wait_for("the revocation", || {
        (get(&server, "/v1/models", &acme).status == 401).then_some(())
    });

    let lines = wait_for("the audit log", || {
        let text = std::fs::read_to_string(audit.path()).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        lines
            .iter()
            .any(|line| line["action"] == "model.delete" && line["status"] == 200)
            .then_some(lines)
    });
    let of = |action: &str, status: u16| {
        let found = lines
            .iter()
            .find(|line| line["action"] == action && line["status"] == status);
        found.unwrap_or_else(|| panic!("{action} {status} is not in {lines:?}"))
    };
    let made = of("file.create", 200);
    assert_eq!(
        (&made["object"], &made["tenant"], &made["key"], &made["role"]),
        (&json!(file), &json!("acme"), &json!(acme_id), &json!("train"))
    );
    assert_eq!(of("job.create", 200)["object"], json!(job));
    assert_eq!(of("file.delete", 404)["tenant"], json!("other"));
    let text = std::fs::read_to_string(audit.path()).unwrap() + &server.log();
    assert!(
        !text.contains(&acme) && !text.contains(ADMIN),
        "a key is in a log"
    );
}

#[test]
fn a_key_with_limits_waits_when_they_are_used_up() {
    let server = Server::start(&["--api-key", ADMIN]);
    let few = limited_key(&server, "acme", "infer", &["--requests-per-minute", "3"]).1;
    let (id, short) = limited_key(&server, "acme", "train", &["--tokens-per-minute", "30"]);
    is_taken(&server, &few);
    is_taken(&server, &short);
    let body = |max_tokens: u32| json!({"model": "tandem-demo", "prompt": "one", "max_tokens": max_tokens, "ignore_eos": true});
    let complete =
        |key: &str, max_tokens| ask(&server, "POST", "/v1/completions", Some(key), &body(max_tokens));
    let number = |reply: &Reply, name: &str| -> i64 {
        let value = reply
            .header(name)
            .unwrap_or_else(|| panic!("no {name}: {}", reply.text()));
        value.trim_end_matches('s').parse::<f64>().unwrap() as i64
    };
    for left in [2, 1, 0] {
        let reply = complete(&few, 1);
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(number(&reply, "x-ratelimit-limit-requests"), 3);
        assert_eq!(number(&reply, "x-ratelimit-remaining-requests"), left);
        assert_eq!(reply.header("x-ratelimit-limit-tokens"), None);
        // What asks no model is not counted.
        assert_eq!(get(&server, "/v1/models", &few).status, 200);
    }
    let reply = complete(&few, 1);
    assert_eq!(reply.status, 429, "{}", reply.text());
    assert!(
        reply.text().contains("3 requests a minute") && reply.text().contains("rate_limit_exceeded"),
        "{}",
        reply.text()
    );
    assert!((1..=20).contains(&number(&reply, "retry-after")));

    // Tokens are counted when it is known how many there were, of streams as well.
    let whole = complete(&short, 20);
    assert_eq!(whole.status, 200, "{}", whole.text());
    assert!(number(&whole, "x-ratelimit-remaining-tokens") < 12);
    let mut streamed = body(25);
    streamed["stream"] = json!(true);
    assert_eq!(
        ask(&server, "POST", "/v1/completions", Some(&short), &streamed).status,
        200
    );
    let refused = complete(&short, 1);
    assert_eq!(
        (refused.status, number(&refused, "x-ratelimit-remaining-tokens")),
        (429, 0),
        "{}",
        refused.text()
    );
    assert!(
        refused.text().contains("30 tokens a minute"),
        "{}",
        refused.text()
    );
    let batch = json!({"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"});
    let batch = ask(&server, "POST", "/v1/batches", Some(&short), &batch);
    assert_eq!(batch.status, 403, "{}", batch.text());

    // Other keys have nothing to do with it; another in its place has its limits, and says them.
    let admins = complete(ADMIN, 1);
    assert_eq!(
        (admins.status, admins.header("x-ratelimit-limit-tokens")),
        (200, None)
    );
    let data = server.data.path().join("data");
    let rotated = command(&["keys", "rotate", &id, "--data-dir"])
        .arg(&data)
        .output()
        .unwrap();
    let said = String::from_utf8(rotated.stderr).unwrap();
    assert!(said.contains("30 tokens a minute"), "{said}");
}

#[test]
fn a_key_stores_what_it_may_and_an_upload_what_it_announced() {
    let server = Server::start(&["--api-key", ADMIN]);
    let (id, small) = limited_key(&server, "acme", "train", &["--stored-bytes", "1000"]);
    is_taken(&server, &small);
    let bearer = format!("Bearer {small}");
    let send = |path: &str, field: &str, content: &str| {
        let form = format!(
            "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nuser_data\r\n--b\r\n\
             content-disposition: form-data; name=\"{field}\"; filename=\"x\"\r\n\r\n{content}\r\n--b--\r\n"
        );
        let headers = [
            ("content-type", "multipart/form-data; boundary=b"),
            ("authorization", bearer.as_str()),
        ];
        client::send(server.address, "POST", path, &headers, form.as_bytes())
    };
    let file = send("/v1/files", "file", &"x".repeat(600)).ok();
    let refused = send("/v1/files", "file", &"x".repeat(401));
    assert_eq!(refused.status, 403, "{}", refused.text());
    let error = &refused.json()["error"];
    assert_eq!(error["code"], "storage_limit_exceeded");
    let said = "this key lets its tenant store 1000 bytes, 600 are stored, and this would add";
    assert!(error["message"].as_str().unwrap().contains(said), "{error}");

    // What is announced is counted, and a part beyond it is refused when it comes.
    let begin = |bytes: u64| {
        let body =
            json!({"filename": "x", "purpose": "user_data", "bytes": bytes, "mime_type": "text/plain"});
        ask(&server, "POST", "/v1/uploads", Some(&small), &body)
    };
    assert_eq!(begin(401).status, 403);
    let upload = begin(400).ok();
    let parts = format!("/v1/uploads/{}/parts", upload["id"].as_str().unwrap());
    let refused = send(&parts, "data", &"x".repeat(401));
    assert_eq!(refused.status, 400, "{}", refused.text());
    let said = "the parts have 401 bytes together, the upload was announced with 400";
    assert!(refused.text().contains(said), "{}", refused.text());
    let listed = command(&["keys", "list", "--data-dir"])
        .arg(server.data.path().join("data"))
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let row = listed.lines().find(|line| line.starts_with(&id)).unwrap();
    assert!(row.ends_with("1000 of 1000 bytes stored"), "{row}");

    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    ask(&server, "DELETE", &path, Some(&small), &Value::Null).ok();
    send("/v1/files", "file", &"x".repeat(600)).ok();
}

#[test]
fn the_first_key_closes_an_open_server() {
    let server = Server::start(&[]);
    assert_eq!(client::get(server.address, "/v1/models").status, 200);
    let (id, admin) = key(&server, "default", "admin");
    wait_for("the server's look at its keys", || {
        (client::get(server.address, "/v1/models").status == 401).then_some(())
    });
    is_taken(&server, &admin);
    // Nor does it open again when the last is gone.
    let data = server.data.path().join("data");
    assert!(
        command(&["keys", "revoke", &id, "--data-dir"])
            .arg(&data)
            .status()
            .unwrap()
            .success()
    );
    wait_for("the revocation", || {
        (get(&server, "/v1/models", &admin).status == 401).then_some(())
    });
    assert_eq!(client::get(server.address, "/v1/models").status, 401);
    let listed = command(&["keys", "list", "--data-dir"])
        .arg(&data)
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(
        listed.contains(&id) && listed.contains("revoked") && !listed.contains("sk-tandem"),
        "{listed}"
    );
    for keys in ["", ",", "one,,two"] {
        let started = command(&["serve", "--port", "0", "--data-dir"])
            .arg(data.with_file_name("other"))
            .env("TANDEM_API_KEY", keys)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&started.stderr).into_owned();
        assert!(
            !started.status.success() && said.contains("--api-key: is empty"),
            "{keys:?}: {said}"
        );
    }
}
