//! Completions, chat, tokens: shapes, and that every way to ask gives the same answer.

use serde_json::{Value, json};

use crate::client;
use crate::server::{Server, wait_for};

fn complete(server: &Server, extra: Value) -> Value {
    client::post(server.address, "/v1/completions", &body(server, extra)).ok()
}

fn body(server: &Server, extra: Value) -> Value {
    let mut body =
        json!({"model": server.model(), "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

fn ids(server: &Server, text: &str) -> Vec<u64> {
    let tokens = client::post(server.address, "/tokenize", &json!({"prompt": text})).ok();
    tokens["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap())
        .collect()
}

#[test]
fn a_completion_has_its_shape() {
    let server = Server::shared();
    let reply = client::post(server.address, "/v1/completions", &body(&server, json!({})));
    let completion = reply.ok();
    assert_eq!(completion["object"], "text_completion");
    assert_eq!(completion["model"], server.base["id"]);
    let choice = &completion["choices"][0];
    assert_eq!((&choice["index"], &choice["logprobs"]), (&json!(0), &Value::Null));
    assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().unwrap()));
    let usage = &completion["usage"];
    let count = |key: &str| usage[key].as_u64().unwrap();
    assert_eq!(
        count("prompt_tokens"),
        ids(&server, "Once upon a time").len() as u64
    );
    assert_eq!(
        count("total_tokens"),
        count("prompt_tokens") + count("completion_tokens")
    );
    assert!(usage["prompt_tokens_details"]["cached_tokens"].is_u64());
    // The fingerprint and the headers say the same of what answered.
    let fingerprint = completion["system_fingerprint"].as_str().unwrap();
    let base = reply.header("x-tandem-base").unwrap();
    assert!(
        base.len() == 64 && fingerprint == format!("fp_{}", &base[..12]),
        "{fingerprint} {base}"
    );
    assert_eq!(reply.header("x-tandem-adapter"), None);
}

#[test]
fn every_form_of_a_prompt_gives_the_same_answer() {
    let server = Server::shared();
    let ids = ids(&server, "Once upon a time");
    let expected = complete(&server, json!({}))["choices"][0]["text"].clone();
    for prompt in [
        json!("Once upon a time"),
        json!(["Once upon a time"]),
        json!(ids),
        json!([ids]),
    ] {
        assert_eq!(
            complete(&server, json!({"prompt": prompt}))["choices"][0]["text"],
            expected,
            "{prompt}"
        );
    }
    // Several prompts with several choices: index = prompt * n + choice.
    let many = complete(
        &server,
        json!({"prompt": ["Once upon a time", "The dog"], "n": 2}),
    );
    let texts: Vec<_> = many["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| &choice["text"])
        .collect();
    assert_eq!(texts.len(), 4);
    assert_eq!((texts[0], texts[1]), (&expected, &expected));
    assert_eq!(texts[2], texts[3]);
    let indices: Vec<_> = many["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| &choice["index"])
        .collect();
    assert_eq!(indices, [0, 1, 2, 3]);
}

#[test]
fn a_stream_says_what_the_whole_says() {
    let server = Server::shared();
    for extra in [
        json!({}),
        json!({"logprobs": 2}),
        json!({"n": 2}),
        json!({"echo": true}),
        json!({"echo": true, "logprobs": 1}),
    ] {
        let whole = complete(&server, extra.clone());
        let mut asked = body(&server, extra.clone());
        asked["stream"] = json!(true);
        asked["stream_options"] = json!({"include_usage": true});
        let mut events = client::post(server.address, "/v1/completions", &asked).events();
        let last = events.pop().unwrap();
        assert_eq!(
            (&last["choices"], &last["usage"]),
            (&json!([]), &whole["usage"]),
            "{extra}"
        );
        assert!(
            events
                .iter()
                .all(|event| event["usage"].is_null() && event["id"] == last["id"])
        );
        for choice in whole["choices"].as_array().unwrap() {
            let mine: Vec<&Value> = events
                .iter()
                .map(|event| &event["choices"][0])
                .filter(|one| one["index"] == choice["index"])
                .collect();
            let text: String = mine.iter().map(|one| one["text"].as_str().unwrap()).collect();
            assert_eq!(choice["text"], text, "{extra}");
            let (end, before) = mine.split_last().unwrap();
            assert_eq!(end["finish_reason"], choice["finish_reason"]);
            assert!(before.iter().all(|one| one["finish_reason"].is_null()));
            if choice["logprobs"].is_object() {
                for list in ["tokens", "text_offset"] {
                    let parts = mine
                        .iter()
                        .filter_map(|one| one["logprobs"][list].as_array())
                        .flatten();
                    assert_eq!(
                        choice["logprobs"][list],
                        parts.cloned().collect::<Value>(),
                        "{extra} {list}"
                    );
                }
            }
        }
    }
}

#[test]
fn echoed_logprobs_score_the_prompt_as_lm_eval_reads_them() {
    let server = Server::shared();
    let ids = ids(&server, "Once upon a time there was");
    let asked = json!({"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": true});
    let choice = complete(&server, asked)["choices"][0].clone();
    let list = |name: &str| choice["logprobs"][name].as_array().unwrap().clone();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), ids.len() + 1, "{name}");
    }
    assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
    for (logprob, top) in list("token_logprobs").iter().zip(list("top_logprobs")).skip(1) {
        let logprob = logprob.as_f64().unwrap();
        let best = top
            .as_object()
            .unwrap()
            .values()
            .map(|value| value.as_f64().unwrap())
            .fold(f64::MIN, f64::max);
        assert!(logprob <= best && best <= 0.0, "{logprob} {best}");
    }
    // The generated token is the most likely one: the very same number.
    let last = list("token_logprobs").pop().unwrap();
    assert!(
        list("top_logprobs")
            .pop()
            .unwrap()
            .as_object()
            .unwrap()
            .values()
            .any(|value| *value == last)
    );
    // Scoring alone.
    let scored = complete(
        &server,
        json!({"prompt": [ids], "max_tokens": 0, "logprobs": 1, "echo": true}),
    );
    let alone = scored["choices"][0]["logprobs"]["token_logprobs"]
        .as_array()
        .unwrap();
    assert_eq!(alone.len(), ids.len());
    for (one, other) in alone.iter().zip(list("token_logprobs")).skip(1) {
        assert!(
            (one.as_f64().unwrap() - other.as_f64().unwrap()).abs() < 1e-3,
            "{one} {other}"
        );
    }
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}

#[test]
fn stops_end_a_text() {
    let server = Server::shared();
    let text = complete(&server, json!({"max_tokens": 32, "ignore_eos": true}))["choices"][0]["text"].clone();
    let text = text.as_str().unwrap();
    let middle: Vec<char> = text.chars().skip(4).take(3).collect();
    let stop: String = middle.into_iter().collect();
    let end = text.find(&stop).unwrap();
    for (extra, expected) in [
        (json!({"stop": stop}), &text[..end]),
        (json!({"stop": ["\u{1F600}", stop]}), &text[..end]),
        (
            json!({"stop": stop, "include_stop_str_in_output": true}),
            &text[..end + stop.len()],
        ),
    ] {
        let mut asked = extra.clone();
        asked["max_tokens"] = json!(32);
        asked["ignore_eos"] = json!(true);
        let choice = complete(&server, asked)["choices"][0].clone();
        assert_eq!(
            (choice["text"].as_str().unwrap(), &choice["finish_reason"]),
            (expected, &json!("stop")),
            "{extra}"
        );
    }
}

#[test]
fn a_seed_repeats_and_nulls_are_absent() {
    let server = Server::shared();
    let sampled = |seed: i64| {
        complete(
            &server,
            json!({"temperature": 1.0, "seed": seed, "max_tokens": 16}),
        )["choices"][0]["text"]
            .clone()
    };
    assert_eq!(sampled(7), sampled(7));
    let nulls = json!({
        "logprobs": null, "seed": null, "stop": null, "n": null, "stream": null, "stream_options": null, "echo": null,
        "logit_bias": null, "top_p": null, "suffix": null, "best_of": null, "user": "me", "unheard_of": {"x": 1},
    });
    assert_eq!(
        complete(&server, nulls)["choices"][0]["text"],
        complete(&server, json!({}))["choices"][0]["text"]
    );
}

fn has_chat(server: &Server) -> bool {
    let has = client::get(server.address, "/tokenizer_info").ok()["chat_template"].is_string();
    if !has {
        println!("the model has no chat template");
    }
    has
}

fn chat(server: &Server, extra: Value) -> client::Reply {
    let mut body = json!({
        "model": server.model(), "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0,
    });
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    client::post(server.address, "/v1/chat/completions", &body)
}

#[test]
fn a_chat_has_its_shape_whole_and_streamed() {
    let server = Server::shared();
    if !has_chat(&server) {
        assert_eq!(chat(&server, json!({})).status, 400);
        return;
    }
    let whole = chat(&server, json!({"logprobs": true, "top_logprobs": 2})).ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"].as_object().unwrap().contains_key("refusal"));
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(
        content.len() as u64,
        whole["usage"]["completion_tokens"].as_u64().unwrap()
    );
    assert!(
        content
            .iter()
            .all(|token| token["top_logprobs"].as_array().unwrap().len() == 2 && token["bytes"].is_array())
    );
    // Content in parts is the same content; logprobs alone name no alternatives.
    let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}], "logprobs": true});
    let same = chat(&server, parts).ok();
    assert_eq!(same["choices"][0]["message"], choice["message"]);
    assert_eq!(
        same["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
        json!([])
    );

    let events = chat(&server, json!({"stream": true})).events();
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let deltas = events.iter().map(|event| &event["choices"][0]["delta"]);
    let text: String = deltas.filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(choice["message"]["content"], text);
    let (end, before) = events.split_last().unwrap();
    assert_eq!(
        (&end["choices"][0]["delta"], &end["choices"][0]["finish_reason"]),
        (&json!({}), &choice["finish_reason"])
    );
    for event in before {
        let choice = event["choices"][0].as_object().unwrap();
        assert!(choice.contains_key("finish_reason") && choice["finish_reason"].is_null());
        assert!(!event.as_object().unwrap().contains_key("usage"));
    }
    let counted = chat(
        &server,
        json!({"stream": true, "stream_options": {"continuous_usage_stats": true}}),
    )
    .events();
    assert!(
        counted
            .iter()
            .all(|event| event["usage"]["total_tokens"].is_u64())
    );
}

/// What stands in the prefix cache under one salt is not found under another, nor without one; answers are the same.
#[test]
fn a_salt_keeps_the_prefix_cache_apart() {
    let server = Server::start(&[]);
    let prompt = "The lighthouse keeper writes a letter. ".repeat(12);
    let ask = |salt: Value| {
        let answer = complete(&server, json!({"prompt": prompt, "cache_salt": salt}));
        let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
        (cached.unwrap() > 0, answer["choices"][0]["text"].clone())
    };
    let (_, text) = ask(json!("one"));
    for (salt, is_cached) in [
        (json!("two"), false),
        (Value::Null, false),
        (json!("one"), true),
        (json!("two"), true),
        (Value::Null, true),
        (json!("three"), false),
    ] {
        assert_eq!(ask(salt.clone()), (is_cached, text.clone()), "{salt}");
    }
    for salt in [json!(""), json!(7)] {
        let reply = client::post(
            server.address,
            "/v1/completions",
            &body(&server, json!({"cache_salt": salt})),
        );
        assert_eq!(reply.status, 400, "{salt}: {}", reply.text());
    }
}

#[test]
fn tokens_come_back_as_text() {
    let server = Server::shared();
    let post = |path: &str, body: Value| client::post(server.address, path, &body).ok();
    let text = "Once upon a time, there was a little girl.";
    let tokens = post(
        "/tokenize",
        json!({"prompt": text, "add_special_tokens": false, "return_token_strs": true}),
    );
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(
        tokens["token_strs"].as_array().unwrap().len(),
        tokens["tokens"].as_array().unwrap().len()
    );
    let back = post("/detokenize", json!({"tokens": tokens["tokens"]}));
    assert_eq!(back["prompt"].as_str().unwrap().trim_start(), text);
    assert!(
        client::get(server.address, "/tokenizer_info")
            .ok()
            .as_object()
            .unwrap()
            .contains_key("eos_token")
    );
}

#[test]
fn a_seed_repeats_and_minus_one_does_not() {
    let server = Server::shared();
    let texts = |seed: i64| {
        let asked = json!({"seed": seed, "temperature": 2, "max_tokens": 32, "ignore_eos": true});
        let ask = || complete(&server, asked.clone())["choices"][0]["text"].to_string();
        (0..4).map(|_| ask()).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(texts(7).len(), 1);
    assert_eq!(texts(-2).len(), 1);
    assert!(texts(-1).len() > 1);
}

#[test]
fn what_nobody_reads_is_stopped() {
    let server = Server::start(&[]);
    let body = body(
        &server,
        json!({"max_tokens": server.max_model_len() - 8, "ignore_eos": true, "stream": true, "n": 4}),
    )
    .to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = client::connect(server.address);
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    std::io::Read::read_exact(&mut stream, &mut [0; 64]).unwrap();
    drop(stream);
    wait_for("the end of the abandoned request", || {
        let metrics = client::get(server.address, "/metrics").text();
        let value = |name: &str| {
            let line = metrics
                .lines()
                .find(|line| line.starts_with(name))
                .unwrap_or_else(|| panic!("no {name}"));
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        let idle = value("vllm:num_requests_running") == 0.0 && value("tandem:open_calls") == 0.0;
        idle.then_some(())
    });
}

/// Lists and base64 hold the same numbers, each text its own, whatever stands beside it.
#[test]
fn texts_become_vectors() {
    let server = Server::shared();
    let embed = |change: Value| {
        let mut body = json!({"model": server.model(), "input": ["Once upon a time", "The end"]});
        body.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        client::post(server.address, "/v1/embeddings", &body).ok()
    };
    let floats = |reply: &Value, index: usize| -> Vec<f64> {
        let vector = reply["data"][index]["embedding"]
            .as_array()
            .expect("a list of numbers");
        vector.iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let length = |vector: &[f64]| vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    let reply = embed(json!({}));
    assert_eq!(
        (&reply["object"], &reply["model"]),
        (&json!("list"), &json!(server.model()))
    );
    assert_eq!(reply["data"][1]["index"], 1);
    let tokens = (ids(&server, "Once upon a time").len() + ids(&server, "The end").len()) as u64;
    assert_eq!(
        reply["usage"],
        json!({"prompt_tokens": tokens, "total_tokens": tokens})
    );
    let (first, second) = (floats(&reply, 0), floats(&reply, 1));
    assert!(first != second && (length(&first) - 1.0).abs() < 1e-5);
    for input in [
        json!("Once upon a time"),
        json!(ids(&server, "Once upon a time")),
        json!([ids(&server, "Once upon a time")]),
    ] {
        assert_eq!(floats(&embed(json!({"input": input})), 0), first, "{input}");
    }
    let base64 = embed(json!({"encoding_format": "base64"}));
    assert_eq!(
        base64["data"][0]["embedding"].as_str().unwrap().len(),
        (first.len() * 4).div_ceil(3) * 4
    );
    let raw = floats(&embed(json!({"normalize": false})), 0);
    let scale = length(&raw);
    assert!(
        raw.iter()
            .zip(&first)
            .all(|(raw, unit)| (raw / scale - unit).abs() < 1e-5)
    );
    let short = floats(&embed(json!({"dimensions": 8})), 0);
    let scale = length(&first[..8]);
    assert!(
        short.len() == 8
            && short
                .iter()
                .zip(&first)
                .all(|(short, long)| (short - long / scale).abs() < 1e-5)
    );
    let others = ["mean", "cls"].map(|pooling| floats(&embed(json!({"pooling": pooling})), 0));
    assert!(others[0] != first && others[1] != first && others[0] != others[1]);
    // vLLM's spelling.
    assert_eq!(floats(&embed(json!({"pooling": "LAST"})), 0), first);
}

/// `/v1/score` and `/v1/rerank` say the cosines of the vectors that `/v1/embeddings` gives, under all of their names.
#[test]
fn scores_are_cosines_of_embeddings() {
    let server = Server::shared();
    let texts = [
        "Where does Felix live?",
        "When does the bakery open?",
        "Felix lives here",
        "It opens at eight",
    ];
    for pooling in ["last", "mean", "cls"] {
        let ask = |path: &str, more: Value| {
            let mut body = json!({"model": server.model(), "pooling": pooling});
            body.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            client::post(server.address, path, &body).ok()
        };
        let embedded = ask("/v1/embeddings", json!({"input": texts}));
        let vector = |index: usize| -> Vec<f64> {
            let numbers = embedded["data"][index]["embedding"].as_array().unwrap().iter();
            numbers.map(|x| x.as_f64().unwrap()).collect()
        };
        let cosine =
            |i: usize, j: usize| -> f64 { vector(i).iter().zip(vector(j)).map(|(a, b)| a * b).sum() };
        let is_near = |found: &Value, expected: f64| (found.as_f64().unwrap() - expected).abs() < 1e-6;

        for path in ["/v1/score", "/score"] {
            // One with each, and pair by pair.
            let one = ask(path, json!({"text_1": texts[0], "text_2": texts[1..]}));
            let pairs = ask(path, json!({"text_1": texts[..2], "text_2": texts[2..]}));
            assert_eq!(one["object"], "list");
            for i in 0..3 {
                assert_eq!(one["data"][i]["index"], i);
                assert!(
                    is_near(&one["data"][i]["score"], cosine(0, i + 1)),
                    "{path} {pooling} {one}"
                );
            }
            for i in 0..2 {
                assert!(
                    is_near(&pairs["data"][i]["score"], cosine(i, i + 2)),
                    "{path} {pooling} {pairs}"
                );
            }
            assert_eq!(one["usage"], embedded["usage"]);
        }
        let mut expected: Vec<(usize, f64)> = (0..3).map(|i| (i, cosine(0, i + 1))).collect();
        expected.sort_by(|a, b| b.1.total_cmp(&a.1));
        for path in ["/v1/rerank", "/rerank", "/v2/rerank"] {
            let documents = json!([texts[1], {"text": texts[2]}, texts[3]]);
            let ranked = ask(path, json!({"query": texts[0], "documents": documents}));
            assert_eq!(ranked["results"].as_array().unwrap().len(), 3);
            for (result, (index, score)) in ranked["results"].as_array().unwrap().iter().zip(&expected) {
                assert_eq!(result["index"], *index, "{path} {pooling} {ranked}");
                assert_eq!(result["document"]["text"], texts[index + 1]);
                assert!(
                    is_near(&result["relevance_score"], *score),
                    "{path} {pooling} {ranked}"
                );
            }
            let best = ask(
                path,
                json!({"query": texts[0], "documents": documents, "top_n": 1, "return_documents": false}),
            );
            assert_eq!(best["results"].as_array().unwrap().len(), 1);
            assert_eq!(best["results"][0]["index"], expected[0].0);
            assert!(best["results"][0].get("document").is_none());
        }
    }
    for (path, body, param) in [
        (
            "/v1/score",
            json!({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}),
            "text_1",
        ),
        ("/v1/score", json!({"text_1": "a", "text_2": []}), "text_2"),
        ("/v1/rerank", json!({"query": "a", "documents": []}), "documents"),
        (
            "/v1/rerank",
            json!({"query": "a", "documents": ["b"], "top_n": -1}),
            "top_n",
        ),
        (
            "/v1/rerank",
            json!({"query": "a", "documents": ["b"], "pooling": "max"}),
            "pooling",
        ),
    ] {
        let mut body = body;
        body["model"] = json!(server.model());
        let reply = client::post(server.address, path, &body);
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (400, &json!(param)),
            "{path} {body}"
        );
    }
}
