//! Settings that are lists: trials beside each other, of which the losers stop and the winner is the job's model.

use serde_json::{Value, json};

use crate::client;
use crate::server::{Server, wait_for};

fn upload(server: &Server) -> Value {
    let row = |i: usize| {
        json!({"prompt": format!("Question {i}: "), "completion": " it is blue."}).to_string() + "\n"
    };
    let content: String = (0..16).map(row).collect();
    client::upload(server.address, "rows.jsonl", content.as_bytes()).ok()["id"].clone()
}

fn asked(server: &Server, file: &Value) -> Value {
    json!({
        "model": server.model(), "training_file": file, "validation_file": file, "suffix": "swept", "seed": 5,
        "max_steps": 200, "batch_size": 1, "max_seq_length": 64, "save_steps": 0,
        "learning_rate": [1e-6, 1e-3], "hyperparameters": {"lora_r": [2, 4]},
    })
}

fn post(server: &Server, path: &str, body: &Value) -> client::Reply {
    client::post(server.address, &format!("/v1/fine_tuning/jobs{path}"), body)
}

fn get(server: &Server, path: &str) -> Value {
    client::get(server.address, &format!("/v1/fine_tuning/jobs{path}")).ok()
}

fn created(server: &Server, body: &Value) -> String {
    let id = post(server, "", body).ok()["id"].clone();
    format!("/{}", id.as_str().unwrap())
}

fn ended(server: &Server, job: &str) -> Value {
    wait_for("the end of the job", || {
        let job = get(server, job);
        let status = job["status"].as_str().unwrap();
        ["succeeded", "failed", "cancelled"]
            .contains(&status)
            .then_some(job.clone())
    })
}

/// The digest of a model.
fn root(server: &Server, model: &Value) -> Value {
    let model = model.as_str().unwrap().replace(':', "%3A");
    client::get(server.address, &format!("/v1/models/{model}")).ok()["root"].clone()
}

fn of_trials(job: &Value, key: &str) -> Vec<Value> {
    let trials = job["trials"].as_array().unwrap().iter();
    trials.map(|trial| trial[key].clone()).collect()
}

fn messages(server: &Server, job: &str) -> Vec<String> {
    let events = get(server, &format!("{job}/events?limit=1000"));
    let messages = events["data"].as_array().unwrap().iter();
    messages
        .map(|event| event["message"].as_str().unwrap().to_owned())
        .collect()
}

/// One sweep runs undisturbed, one on fewer places and through kills and a pause: they end with the same bytes, which are
/// those of a job that is no trial.
#[test]
fn a_sweep_makes_the_same_model_whatever_happens_to_it() {
    let server = Server::start(&[]);
    let file = upload(&server);
    let job = created(&server, &asked(&server, &file));
    let done = ended(&server, &job);
    assert_eq!(done["status"], "succeeded", "{done}\n{}", server.log());
    let model = &done["fine_tuned_model"];
    assert!(model.as_str().unwrap().contains(":swept:"), "{done}");
    let trials = done["trials"].as_array().unwrap();
    assert_eq!(
        of_trials(&done, "hyperparameters"),
        [(1e-6, 2), (1e-6, 4), (1e-3, 2), (1e-3, 4)]
            .map(|(rate, r)| json!({"learning_rate": rate, "lora_r": r}))
    );
    // Half of them at a quarter of the run, half of those at its half.
    let mut rungs: Vec<u64> = trials
        .iter()
        .map(|trial| trial["rung"].as_u64().unwrap())
        .collect();
    rungs.sort_unstable();
    assert_eq!(rungs, [1, 1, 2, 2]);
    let winner = trials
        .iter()
        .position(|trial| trial["status"] == "succeeded")
        .unwrap();
    let stopped = trials.iter().filter(|trial| trial["status"] == "stopped");
    assert!(
        stopped
            .clone()
            .all(|trial| trial["step"].as_u64() < Some(200) && trial["metric_value"].is_f64())
    );
    assert_eq!(stopped.count(), 3, "{done}");
    assert!(winner >= 2, "who learns next to nothing is no winner: {done}");
    assert_eq!(done["hyperparameters"]["learning_rate"], 1e-3);
    let said = messages(&server, &job);
    for part in [
        "A sweep of 4 trials, compared by their validation loss: at 2 rungs 1 of 2 goes on",
        "Rung 1/2, 25 % of the run: 2 of 4 trials go on",
        "Rung 2/2, 50 % of the run: 1 of 2 trials go on",
        "is stopped after step",
    ] {
        assert!(
            said.iter().any(|message| message.contains(part)),
            "{part:?} is not in {said:?}"
        );
    }
    // The model answers under the job's name, and it is the winner's.
    let answer = json!({"model": model, "prompt": "Question 1: ", "max_tokens": 2});
    client::post(server.address, "/v1/completions", &answer).ok();
    assert_eq!(
        root(&server, model),
        root(&server, &trials[winner]["fine_tuned_model"])
    );
    let result = done["result_files"][0].as_str().unwrap();
    let csv = client::get(server.address, &format!("/v1/files/{result}/content")).text();
    assert_eq!(csv.lines().count(), 201, "{csv}");
    // Trials are jobs of their own, which are not listed beside it.
    let listed = get(&server, "");
    assert_eq!(listed["data"].as_array().unwrap().len(), 1, "{listed}");
    let trial = get(&server, &format!("/{}", trials[winner]["job"].as_str().unwrap()));
    assert_eq!(
        (&trial["sweep"], &trial["status"]),
        (&done["id"], &json!("succeeded"))
    );
    let pause = post(
        &server,
        &format!("/{}/pause", trials[winner]["job"].as_str().unwrap()),
        &json!({}),
    );
    assert!(pause.text().contains("is a trial of"), "{}", pause.text());

    // As a job of its own, with the settings that the winner shows.
    let mut alone = asked(&server, &file);
    alone["learning_rate"] = json!(1e-3);
    alone["hyperparameters"] = trials[winner]["hyperparameters"].clone();
    alone["hyperparameters"]
        .as_object_mut()
        .unwrap()
        .remove("learning_rate");
    alone["eval_steps"] = done["hyperparameters"]["eval_steps"].clone();
    let lone = ended(&server, &created(&server, &alone));
    assert_eq!(
        root(&server, &lone["fine_tuned_model"]),
        root(&server, model),
        "{lone}"
    );

    let expected = (winner, root(&server, model), of_trials(&done, "metric_value"));
    let flags = ["--max-training-jobs", "2"];
    let mut server = Server::start_in(server.kill(), &flags);
    let job = created(&server, &asked(&server, &file));
    for kills in 0..3 {
        wait_for("some steps", || {
            let steps = of_trials(&get(&server, &job), "job").into_iter().map(|trial| {
                let said = messages(&server, &format!("/{}", trial.as_str().unwrap()));
                said.iter()
                    .filter(|message| message.contains("training loss="))
                    .count()
            });
            (steps.sum::<usize>() > 40 + 80 * kills).then_some(())
        });
        if kills == 1 {
            let paused = post(&server, &format!("{job}/pause"), &json!({})).ok();
            assert_eq!(paused["status"], "paused", "{paused}");
        }
        server = Server::start_in(server.kill(), &flags);
        if kills == 1 {
            assert_eq!(get(&server, &job)["status"], "paused");
            post(&server, &format!("{job}/resume"), &json!({})).ok();
        }
    }
    let done = ended(&server, &job);
    assert_eq!(done["status"], "succeeded", "{done}\n{}", server.log());
    let winner = of_trials(&done, "status")
        .iter()
        .position(|status| status == "succeeded")
        .unwrap();
    let model = &done["fine_tuned_model"];
    assert_eq!(
        (winner, root(&server, model), of_trials(&done, "metric_value")),
        expected
    );
    // With the model go those of its trials.
    let path = format!("/v1/models/{}", model.as_str().unwrap().replace(':', "%3A"));
    client::delete(server.address, &path).ok();
    let left = client::get(server.address, "/v1/models?include_checkpoints=true").text();
    assert!(!left.contains(model.as_str().unwrap()), "{left}");
}

#[test]
fn a_sweep_is_cancelled_as_a_whole_and_a_bad_one_is_refused() {
    let server = Server::start(&["--max-training-jobs", "2"]);
    let file = upload(&server);
    let mut long = asked(&server, &file);
    long["max_steps"] = json!(100_000);
    let made = post(&server, "", &long).ok();
    assert_eq!(made["status"], "queued");
    assert_eq!(of_trials(&made, "status"), vec![json!("queued"); 4]);
    let job = format!("/{}", made["id"].as_str().unwrap());
    wait_for("training", || {
        of_trials(&get(&server, &job), "status")
            .contains(&json!("running"))
            .then_some(())
    });
    for verb in ["pause", "cancel"] {
        post(&server, &format!("{job}/{verb}"), &json!({})).ok();
    }
    let done = ended(&server, &job);
    assert_eq!(done["status"], "cancelled");
    for trial in of_trials(&done, "job") {
        let trial = get(&server, &format!("/{}", trial.as_str().unwrap()));
        assert_eq!(trial["status"], "cancelled", "{trial}");
    }
    // What every trial fails by is what the sweep fails by.
    let rows = b"{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": 1}\n";
    let bad = client::upload(server.address, "bad.jsonl", rows);
    if bad.status == 200 {
        let done = ended(&server, &created(&server, &asked(&server, &bad.json()["id"])));
        assert_eq!(
            (&done["status"], &done["error"]["code"]),
            (&json!("failed"), &json!("invalid_training_file"))
        );
        let message = done["error"]["message"].as_str().unwrap();
        assert!(
            message.starts_with("None of 4 trials came to a good end.") && message.contains('2'),
            "{message}"
        );
    }
    for (setting, value, says) in [
        ("seed", json!((1..=9).collect::<Vec<u32>>()), "36 trials"),
        ("template", json!(["alpaca", "grammar"]), "the same rows"),
        ("lora_alpha", json!([8, "many"]), "a number"),
        ("lora_r", json!([8, 10_000]), "the same setting"),
        (
            "lora_target_modules",
            json!([["q_proj"], ["nothing"]]),
            "no 'nothing'",
        ),
    ] {
        let mut body = asked(&server, &file);
        body[setting] = value;
        let refused = post(&server, "", &body);
        let error = &refused.json()["error"];
        assert!(
            refused.status == 400 && error["message"].as_str().unwrap().contains(says),
            "{setting}: {error}"
        );
    }
}
