//! From an upload to an answer of the new model, in both APIs, and the ends a job can have.

use std::io::{Read, Write};

use serde_json::{Value, json};

use crate::client;
use crate::server::{Server, wait_for};

fn training_file(server: &Server, rows: usize) -> String {
    let row = |i: usize| {
        json!({"prompt": format!("Question {i}: "), "completion": " the answer is blue."}).to_string() + "\n"
    };
    let content: String = (0..rows).map(row).collect();
    let file = client::upload(server.address, "données été.jsonl", content.as_bytes()).ok();
    assert_eq!(
        (file["filename"].as_str().unwrap(), &file["status"]),
        ("données été.jsonl", &json!("processed"))
    );
    file["id"].as_str().unwrap().to_owned()
}

fn job(server: &Server, extra: Value) -> client::Reply {
    let mut body = json!({
        "model": server.model(), "save_steps": 2, "suffix": "sky blue", "hyperparameters": {"n_epochs": 1, "batch_size": 1},
        "lora_r": 4, "max_steps": 4, "max_seq_length": 64,
    });
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    client::post(server.address, "/v1/fine_tuning/jobs", &body)
}

fn ended(server: &Server, id: &str) -> Value {
    wait_for("the end of the job", || {
        let job = client::get(server.address, &format!("/v1/fine_tuning/jobs/{id}")).ok();
        ["succeeded", "failed", "cancelled"]
            .contains(&job["status"].as_str().unwrap())
            .then_some(job)
    })
}

/// transformers: ceil(num_train_epochs x steps of an epoch), under each of the setting's names, in a sweep, too.
#[test]
fn a_job_may_end_within_an_epoch() {
    let server = Server::start(&[]);
    let file = training_file(&server, 8);
    let body = json!({"training_file": file, "max_steps": -1, "hyperparameters": {"n_epochs": 1.3, "batch_size": 2}});
    let done = ended(&server, job(&server, body).ok()["id"].as_str().unwrap());
    assert_eq!(done["status"], "succeeded", "{done}\n{}", server.log());
    assert_eq!(done["hyperparameters"]["n_epochs"], json!(1.3));
    // Four steps an epoch.
    let last = |job: &Value| {
        let path = format!(
            "/v1/fine_tuning/jobs/{}/events?limit=100",
            job["id"].as_str().unwrap()
        );
        let events = client::get(server.address, &path).ok();
        let steps: Vec<Value> = events["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|event| event["data"].clone())
            .collect();
        let of_step = steps.into_iter().filter(|data| data["train_loss"].is_f64());
        of_step.max_by_key(|data| data["step"].as_u64()).unwrap()
    };
    let end = last(&done);
    assert_eq!(
        (&end["step"], &end["total_steps"], &end["epoch"]),
        (&json!(6), &json!(6), &json!(1.5))
    );
    // What is whole is written as an integer.
    let preview = json!({"model": server.model(), "training_file": file, "num_train_epochs": 2.0});
    let preview = client::post(server.address, "/v1/fine_tuning/preview", &preview).ok();
    assert_eq!(preview["hyperparameters"]["n_epochs"].to_string(), "2");
    let sweep = json!({
        "model": server.model(), "training_file": file, "num_train_epochs": [0.5, 1.5], "batch_size": 2, "lora_r": 2, "reduction_factor": 1,
    });
    let sweep = client::post(server.address, "/v1/fine_tuning/jobs", &sweep).ok();
    let done = ended(&server, sweep["id"].as_str().unwrap());
    assert_eq!(done["status"], "succeeded", "{done}\n{}", server.log());
    let trials = done["trials"].as_array().unwrap();
    let lengths: Vec<(&Value, &Value)> = trials
        .iter()
        .map(|trial| (&trial["hyperparameters"]["n_epochs"], &trial["total_steps"]))
        .collect();
    assert_eq!(lengths, [(&json!(0.5), &json!(2)), (&json!(1.5), &json!(6))]);
    let refused = job(
        &server,
        json!({"training_file": file, "hyperparameters": {"n_epochs": 0}}),
    );
    assert_eq!(refused.status, 400);
}

/// What a row learns where a token lies in prompt and completion, as TRL has it; and it is said.
#[test]
fn a_preview_shows_where_a_completion_begins() {
    let server = Server::start(&[]);
    let row = |prompt: &str, completion: &str| {
        json!({"prompt": prompt, "completion": completion}).to_string() + "\n"
    };
    let content = row("Who bakes?", " Rosa.") + &row("Felix lives in the mi", "ll.");
    let file = client::upload(server.address, "rows.jsonl", content.as_bytes()).ok();
    let body = json!({"model": server.model(), "training_file": file["id"]});
    let preview = client::post(server.address, "/v1/fine_tuning/preview?rows=2", &body).ok();
    assert_eq!(preview["statistics"]["merged"], 1);
    let learned = |row: usize| {
        preview["data"][row]["examples"][0]["pieces"][1]["text"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        (learned(0).as_str(), learned(1).as_str()),
        (" Rosa.<|end|>", " mill.<|end|>")
    );
}

#[test]
fn a_job_makes_a_model_that_answers() {
    let server = Server::start(&[]);
    let file = training_file(&server, 8);
    let created = job(&server, json!({"training_file": file, "metadata": {"who": "me"}})).ok();
    for key in [
        "id",
        "object",
        "created_at",
        "finished_at",
        "model",
        "fine_tuned_model",
        "organization_id",
        "result_files",
        "status",
        "training_file",
        "validation_file",
        "trained_tokens",
        "error",
        "seed",
        "hyperparameters",
    ] {
        assert!(
            created.as_object().unwrap().contains_key(key),
            "{key} is missing in {created}"
        );
    }
    let id = created["id"].as_str().unwrap();
    let done = ended(&server, id);
    assert_eq!(done["status"], "succeeded", "{done}\n{}", server.log());
    assert_eq!(
        (
            &done["hyperparameters"]["n_epochs"],
            &done["hyperparameters"]["lora_r"]
        ),
        (&json!(1), &json!(4))
    );
    assert!(done["trained_tokens"].as_u64().unwrap() > 0 && done["finished_at"].is_i64());

    // It answers, and says that it did.
    let model = done["fine_tuned_model"].as_str().unwrap();
    assert!(
        model.starts_with("ft:") && model.contains(":sky-blue:"),
        "{model}"
    );
    let body = json!({"model": model, "prompt": "Question 1: ", "max_tokens": 4});
    let reply = client::post(server.address, "/v1/completions", &body);
    assert_eq!(reply.ok()["model"], model);
    assert_eq!(reply.header("x-tandem-adapter").map(str::len), Some(64));
    let encoded = model.replace(':', "%3A");
    let card = client::get(server.address, &format!("/v1/models/{encoded}")).ok();
    assert_eq!(
        (&card["parent"], &card["fine_tuning_job_id"]),
        (&server.base["id"], &json!(id))
    );

    // Its records.
    let events = client::get(
        server.address,
        &format!("/v1/fine_tuning/jobs/{id}/events?limit=100"),
    )
    .ok();
    let messages: Vec<_> = events["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["message"].as_str().unwrap())
        .collect();
    assert!(
        messages.iter().any(|message| message.contains(model)),
        "{messages:?}"
    );
    assert!(
        events["data"]
            .as_array()
            .unwrap()
            .iter()
            .any(|event| event["type"] == "metrics" && event["data"]["train_loss"].is_f64())
    );
    let page = client::get(
        server.address,
        &format!("/v1/fine_tuning/jobs/{id}/events?limit=1"),
    )
    .ok();
    assert_eq!(
        (page["data"].as_array().unwrap().len(), &page["has_more"]),
        (1, &json!(true))
    );
    let checkpoints = client::get(server.address, &format!("/v1/fine_tuning/jobs/{id}/checkpoints")).ok();
    // Checkpoints are models that are listed only when they are asked for.
    let listed = |query: &str| {
        let models = client::get(server.address, &format!("/v1/models{query}")).ok();
        models["data"].as_array().unwrap().len()
    };
    let saved = checkpoints["data"].as_array().unwrap().len();
    assert!(saved > 0);
    assert_eq!((listed(""), listed("?include_checkpoints=true")), (2, 2 + saved));
    for checkpoint in checkpoints["data"].as_array().unwrap() {
        let body =
            json!({"model": checkpoint["fine_tuned_model_checkpoint"], "prompt": "x", "max_tokens": 1});
        client::post(server.address, "/v1/completions", &body).ok();
    }
    let result = done["result_files"][0].as_str().unwrap();
    let csv = client::get(server.address, &format!("/v1/files/{result}/content")).text();
    assert!(csv.starts_with("step,train_loss"), "{csv}");
    let events = done["result_files"][1].as_str().unwrap();
    let about = client::get(server.address, &format!("/v1/files/{events}")).ok();
    assert!(
        about["filename"]
            .as_str()
            .unwrap()
            .starts_with("events.out.tfevents.")
    );
    let events = client::get(server.address, &format!("/v1/files/{events}/content")).body;
    let named = |tag: &str| {
        events
            .windows(tag.len())
            .filter(|part| *part == tag.as_bytes())
            .count()
    };
    assert_eq!(named("train/loss"), csv.lines().count() - 1);
    let mine = client::get(server.address, "/v1/fine_tuning/jobs?metadata%5Bwho%5D=me").ok();
    let none = client::get(server.address, "/v1/fine_tuning/jobs?metadata%5Bwho%5D=you").ok();
    assert_eq!(
        (mine["data"][0]["id"].as_str(), &none["data"]),
        (Some(id), &json!([]))
    );

    // What has ended cannot be cancelled, and a retry would not help.
    let cancel = client::send(
        server.address,
        "POST",
        &format!("/v1/fine_tuning/jobs/{id}/cancel"),
        &[("content-type", "application/json")],
        b"",
    );
    assert!([400, 409].contains(&cancel.status), "{}", cancel.text());
    assert!(cancel.status == 400 || cancel.header("x-should-retry") == Some("false"));
    for verb in ["pause", "resume"] {
        let path = format!("/v1/fine_tuning/jobs/{id}/{verb}");
        let refused = client::post(server.address, &path, &json!({}));
        assert_eq!(refused.status, cancel.status, "{}", refused.text());
    }

    // A kill later everything is still there; a deleted model is not.
    let server = Server::start_in(server.kill(), &[]);
    client::post(server.address, "/v1/completions", &body).ok();
    assert_eq!(
        client::get(server.address, &format!("/v1/fine_tuning/jobs/{id}")).ok()["status"],
        "succeeded"
    );
    assert_eq!(
        client::delete(server.address, &format!("/v1/models/{encoded}")).ok()["deleted"],
        true
    );
    assert_eq!(client::post(server.address, "/v1/completions", &body).status, 404);
    // Its checkpoints went with it.
    let models = client::get(server.address, "/v1/models?include_checkpoints=true").ok();
    assert_eq!(models["data"].as_array().unwrap().len(), 1, "{models}");
}

#[test]
fn the_legacy_api_streams_its_events() {
    let server = Server::start(&[]);
    let file = training_file(&server, 4);
    let body = json!({"training_file": file, "n_epochs": 1, "suffix": "old", "max_steps": 2, "lora_r": 2});
    let tune = client::post(server.address, "/v1/fine-tunes", &body).ok();
    let id = tune["id"].as_str().unwrap();
    assert!(id.starts_with("ft-"), "{id}");
    assert_eq!(
        (&tune["object"], &tune["training_files"][0]["id"]),
        (&json!("fine-tune"), &json!(file))
    );
    for path in ["fine-tunes", "fine_tunes"] {
        let events = client::get(server.address, &format!("/v1/{path}/{id}/events?stream=true")).events();
        assert!(
            events.iter().all(|event| event["object"] == "fine-tune-event"),
            "{events:?}"
        );
        assert!(events.len() > 2);
    }
    let done = client::get(server.address, &format!("/v1/fine_tunes/{id}")).ok();
    assert_eq!(done["status"], "succeeded", "{done}\n{}", server.log());
    assert_eq!(
        client::get(server.address, "/v1/fine-tunes").ok()["data"][0]["id"],
        id
    );
    let model = done["fine_tuned_model"].as_str().unwrap().to_owned();
    client::post(
        server.address,
        "/v1/completions",
        &json!({"model": model, "prompt": "x", "max_tokens": 1}),
    )
    .ok();
    // By the job, as the client of 2023 does; its record stays.
    let deleted = client::delete(server.address, &format!("/v1/fine-tunes/{id}")).ok();
    assert_eq!((&deleted["id"], &deleted["deleted"]), (&json!(id), &json!(true)));
    let gone = client::get(
        server.address,
        &format!("/v1/models/{}", model.replace(':', "%3A")),
    );
    assert_eq!(gone.status, 404);
    client::get(server.address, &format!("/v1/fine-tunes/{id}")).ok();
}

/// One job runs undisturbed, one with the same settings rests in between, over a kill of the server.
#[test]
fn a_job_that_rested_makes_the_same_adapter() {
    let server = Server::start(&[]);
    let file = training_file(&server, 16);
    let asked = json!({"training_file": file, "max_steps": 250, "seed": 5, "save_steps": 0});
    let created = job(&server, asked.clone()).ok();
    let id = created["id"].as_str().unwrap();
    assert_eq!(ended(&server, id)["status"], "succeeded");
    let root = |server: &Server, job: &Value| {
        let model = job["fine_tuned_model"].as_str().unwrap().replace(':', "%3A");
        client::get(server.address, &format!("/v1/models/{model}")).ok()["root"].clone()
    };
    let expected = root(
        &server,
        &client::get(server.address, &format!("/v1/fine_tuning/jobs/{id}")).ok(),
    );

    let created = job(&server, asked).ok();
    let id = created["id"].as_str().unwrap();
    let path = format!("/v1/fine_tuning/jobs/{id}");
    wait_for("a step", || {
        let events = client::get(server.address, &format!("{path}/events?limit=100")).ok();
        let steps = |event: &Value| event["data"]["train_loss"].is_f64();
        events["data"].as_array().unwrap().iter().any(steps).then_some(())
    });
    let paused = client::post(server.address, &format!("{path}/pause"), &json!({})).ok();
    assert_eq!(paused["status"], "paused", "{paused}");
    let server = Server::start_in(server.kill(), &[]);
    let rests = client::get(server.address, &path).ok();
    assert_eq!(rests["status"], "paused", "{rests}");
    let resumed = client::post(server.address, &format!("{path}/resume"), &json!({})).ok();
    assert!(
        ["queued", "running"].contains(&resumed["status"].as_str().unwrap()),
        "{resumed}"
    );
    let done = ended(&server, id);
    assert_eq!(done["status"], "succeeded", "{done}");
    assert_eq!(root(&server, &done), expected);
}

#[test]
fn a_job_can_be_cancelled_and_can_fail() {
    // So that one waits: the one that is ready last.
    let server = Server::start(&["--max-training-jobs", "1"]);
    let file = training_file(&server, 64);
    let long = || job(&server, json!({"training_file": file, "max_steps": 100_000})).ok();
    let path = |job: &Value| format!("/v1/fine_tuning/jobs/{}/cancel", job["id"].as_str().unwrap());
    for job in [&long(), &long()] {
        let cancelled = client::send(
            server.address,
            "POST",
            &path(job),
            &[("content-type", "application/json")],
            b"",
        );
        cancelled.ok();
        assert_eq!(ended(&server, job["id"].as_str().unwrap())["status"], "cancelled");
    }
    // The file goes before the job reads it, or the job has read it: both are ends.
    let empty = client::upload(
        server.address,
        "x.jsonl",
        b"{\"prompt\": \"a\", \"completion\": \"\"}\n",
    );
    if empty.status == 200 {
        let id = job(&server, json!({"training_file": empty.json()["id"]})).ok()["id"]
            .as_str()
            .unwrap()
            .to_owned();
        let end = ended(&server, &id);
        assert!(
            end["status"] == "succeeded" || end["error"]["message"].is_string(),
            "{end}"
        );
    }
    client::get(server.address, "/health").ok();
}

/// Files of others' formats: what a job would make of them is seen before, and it makes just that.
#[test]
fn columns_are_previewed_and_trained() {
    let server = Server::start(&[]);
    let cases = [
        (
            "summaries.csv",
            "id,document,summary\n1,\"A, and B\",They\n2,C,It\n".to_owned(),
            json!({"template": "torchtune.data.SummarizeTemplate", "column_map": {"dialogue": "document", "output": "summary"}}),
            "CSV",
            "Summarize this dialogue:\nA, and B\n---\nSummary:\n",
            "They",
        ),
        (
            "alpaca.json",
            json!([{"instruction": "Greet.", "input": "", "output": "Hi."}, {"instruction": "Go.", "input": "x", "output": "Gone."}])
                .to_string(),
            json!({}),
            "a JSON array",
            "### Instruction:\nGreet.\n\n### Response:\n",
            "Hi.",
        ),
        (
            "share.jsonl",
            json!({"conversations": [{"from": "human", "value": "Who bakes?"}, {"from": "gpt", "value": "Rosa."}]}).to_string(),
            json!({}),
            "JSONL",
            "Who bakes?",
            "Rosa.",
        ),
        (
            "notes.txt",
            "Rosa bakes.\n\nFelix lives in the mill.\n".to_owned(),
            json!({"packing_strategy": "wrapped"}),
            "plain text",
            "Rosa bakes.",
            "Felix lives",
        ),
    ];
    for (name, content, settings, format, read, learned) in cases {
        let file = client::upload(server.address, name, content.as_bytes()).ok()["id"].clone();
        let mut body = json!({"model": server.model(), "training_file": file, "max_steps": 1, "seed": 7, "max_seq_length": 256});
        body.as_object_mut()
            .unwrap()
            .extend(settings.as_object().unwrap().clone());
        let preview = client::post(server.address, "/v1/fine_tuning/preview?rows=1", &body).ok();
        let example = &preview["data"][0]["examples"][0];
        let statistics = &preview["statistics"];
        assert_eq!(
            (&preview["format"], &statistics["whole_file"]),
            (&json!(format), &json!(true)),
            "{preview}"
        );
        assert!(
            example["text"].as_str().unwrap().contains(read),
            "{name}: {example}"
        );
        let pieces = example["pieces"].as_array().unwrap().iter();
        let text: String = pieces
            .filter(|piece| piece["weight"] != 0.0)
            .map(|piece| piece["text"].as_str().unwrap())
            .collect();
        assert!(text.contains(learned), "{name}: {example}");
        assert_eq!(
            example["tokens"].as_array().unwrap().len(),
            example["loss_mask"].as_array().unwrap().len()
        );
        let created = client::post(server.address, "/v1/fine_tuning/jobs", &body).ok();
        let done = ended(&server, created["id"].as_str().unwrap());
        assert_eq!(done["status"], "succeeded", "{name}: {done}");
        assert!(done["trained_tokens"].as_u64() > Some(0), "{done}");
        for (key, value) in settings.as_object().unwrap() {
            assert_eq!(&done["hyperparameters"][key], value, "{done}");
        }
    }
    let file = client::upload(server.address, "t.csv", b"question,answer\na,b\n").ok()["id"].clone();
    for (settings, param, says) in [
        (json!({}), "training_file", "has the keys [question, answer]"),
        (json!({"template": "Q: {q}"}), "training_file", "has no column q"),
        (json!({"template": "nothing"}), "template", "there is no template"),
        (json!({"split": "test"}), "split", "a file is one split"),
    ] {
        let mut body = json!({"model": server.model(), "training_file": file});
        body.as_object_mut()
            .unwrap()
            .extend(settings.as_object().unwrap().clone());
        let refused = client::post(server.address, "/v1/fine_tuning/preview", &body);
        let error = &refused.json()["error"];
        assert_eq!((refused.status, &error["param"]), (400, &json!(param)), "{error}");
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
}

/// What a disk has changed since it was uploaded is said, and not sent: of a small file nothing, of a large one never the end.
#[test]
fn a_damaged_file_is_not_served() {
    let data = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let server = Server::start_in(data.clone(), &[]);
    for size in [1_000, 5 << 20] {
        let content = vec![b'x'; size];
        let form = [
            ("purpose", None, &b"user_data"[..]),
            ("file", Some("x"), &content),
        ];
        let file = client::form(server.address, "/v1/files", &form).ok();
        let id = file["id"].as_str().unwrap();
        let path = format!("/v1/files/{id}/content");
        assert!(client::get(server.address, &path).body == content);
        let stored = data.path().join("data/files").join(id);
        std::fs::write(&stored, [&content[1..], b"y"].concat()).unwrap();
        let mut stream = client::connect(server.address);
        let request = format!("GET {path} HTTP/1.1\r\nhost: tandem\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = vec![];
        // It may be reset.
        let _ = stream.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        match size {
            1_000 => {
                assert!(
                    text.starts_with("HTTP/1.1 500 ") && text.contains("\"file_damaged\""),
                    "{text}"
                );
                assert!(text.contains(id) && text.contains("upload it again"), "{text}");
            }
            _ => {
                assert!(
                    text.starts_with("HTTP/1.1 200 ") && answer.len() < size,
                    "{}",
                    answer.len()
                );
                let log = server.log();
                assert!(log.contains("a download was cut") && log.contains(id), "{log}");
            }
        }
    }
}
