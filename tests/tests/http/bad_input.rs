//! What a client can get wrong: each mistake is answered with its status and OpenAI's error body, says nothing of the
//! server's insides, and leaves the server as it was.

use std::path::Path;

use serde_json::{Value, json};

use crate::client::{self, Reply};
use crate::server::Server;

/// An error body with all four keys, and nothing of the inside in it.
fn check(name: &str, reply: &Reply, statuses: &[u16], param: Option<&str>, text: &str) {
    let body = reply.text();
    assert!(
        statuses.contains(&reply.status),
        "{name}: {} {body}",
        reply.status
    );
    let error = &reply.json()["error"];
    for key in ["message", "type", "param", "code"] {
        assert!(error.get(key).is_some(), "{name}: no {key} in {body}");
    }
    if let Some(param) = param {
        assert_eq!(error["param"], param, "{name}: {body}");
    }
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(text), "{name}: {message:?} lacks {text:?}");
    for inside in [
        ".rs:",
        "panicked",
        "libtorch",
        env!("CARGO_MANIFEST_DIR"),
        "RouterError",
        "Some(",
    ] {
        assert!(!message.contains(inside), "{name}: {message:?} shows {inside:?}");
    }
    assert!(reply.header("x-request-id").is_some(), "{name}: no request id");
}

/// Name, path, body, status, param, part of the message.
#[rustfmt::skip]
struct Json(&'static str, &'static str, Value, u16, Option<&'static str>, &'static str);

/// Of a form: name, file name, content.
type Field<'a> = (&'a str, Option<&'a str>, &'a [u8]);

/// Of an adapter's folder: its content, if it is there.
type File = Option<Vec<u8>>;

#[test]
fn values() {
    let server = Server::shared();
    let (m, len) = (server.model(), server.max_model_len());
    let (chat, text) = ("/v1/chat/completions", "/v1/completions");
    let (jobs, tunes) = ("/v1/fine_tuning/jobs", "/v1/fine-tunes");
    let say = json!([{"role": "user", "content": "Hi"}]);
    let with = |field: &str, value: Value| {
        let mut body = json!({"model": m, "messages": say, "max_tokens": 4});
        body[field] = value;
        body
    };
    let prompt = |field: &str, value: Value| {
        let mut body = json!({"model": m, "prompt": "Hi", "max_tokens": 4});
        body[field] = value;
        body
    };
    let job = |field: &str, value: Value| {
        let mut body = json!({"model": m, "training_file": "file-unknown"});
        body[field] = value;
        body
    };
    #[rustfmt::skip] // one case, one line
    let cases = [
        Json("no model", chat, json!({"messages": say}), 400, Some("model"), "Missing required parameter"),
        Json("null model", chat, with("model", json!(null)), 400, Some("model"), "Invalid type"),
        Json("unknown model", chat, with("model", json!("nobody")), 404, Some("model"), "`nobody` does not exist"),
        Json("empty model", chat, with("model", json!("")), 404, Some("model"), "does not exist"),
        Json("no messages", chat, json!({"model": m}), 400, Some("messages"), "Missing"),
        Json("empty messages", chat, with("messages", json!([])), 400, Some("messages"), "at least one"),
        Json("messages a string", chat, with("messages", json!("Hi")), 400, Some("messages"), "Invalid type"),
        Json("role missing", chat, with("messages", json!([{"content": "x"}])), 400, Some("messages[0].role"), "Missing"),
        Json("role unknown", chat, with("messages", json!([{"role": "boss", "content": "x"}])), 400, Some("messages[0].role"), "boss"),
        Json("content missing", chat, with("messages", json!([{"role": "user"}])), 400, Some("messages[0].content"), "no content"),
        Json("content a number", chat, with("messages", json!([{"role": "user", "content": 3}])), 400, Some("messages[0].content"), "string"),
        Json("an image", chat, with("messages", json!([{"role": "user", "content": [{"type": "image_url"}]}])), 400, Some("messages[0].content[0]"), "image_url"),
        Json("temperature high", chat, with("temperature", json!(2.1)), 400, Some("temperature"), "2.1"),
        Json("temperature negative", chat, with("temperature", json!(-0.1)), 400, Some("temperature"), "-0.1"),
        Json("temperature a string", chat, with("temperature", json!("hot")), 400, Some("temperature"), "Invalid type"),
        Json("top_p zero", chat, with("top_p", json!(0)), 400, Some("top_p"), "got 0"),
        Json("top_k", chat, with("top_k", json!(-2)), 400, Some("top_k"), "-2"),
        Json("min_p", chat, with("min_p", json!(1.5)), 400, Some("min_p"), "1.5"),
        Json("presence_penalty", chat, with("presence_penalty", json!(3)), 400, Some("presence_penalty"), "3"),
        Json("repetition_penalty", chat, with("repetition_penalty", json!(0)), 400, Some("repetition_penalty"), "between 0.01 and 100"),
        Json("repetition_penalty tiny", chat, with("repetition_penalty", json!(1e-308)), 400, Some("repetition_penalty"), "between 0.01 and 100"),
        Json("stop long", chat, with("stop", json!("x".repeat(20_000))), 400, Some("stop"), "20000 bytes"),
        Json("stop_token_ids many", text, prompt("stop_token_ids", json!(vec![1; 2000])), 400, Some("stop_token_ids"), "at most 1024"),
        Json("logit_bias many", chat, with("logit_bias", (0..5000).map(|i| (i.to_string(), json!(0))).collect()), 400, Some("logit_bias"), "5000 tokens"),
        Json("a long text", "/tokenize", json!({"prompt": "x".repeat(5 << 20)}), 400, Some("prompt"), "at most 4194304"),
        Json("n zero", chat, with("n", json!(0)), 400, Some("n"), "at least 1"),
        Json("n huge", chat, with("n", json!(100_000)), 400, Some("n"), "at most"),
        Json("max_tokens zero", chat, with("max_tokens", json!(0)), 400, Some("max_tokens"), "at least 1"),
        Json("max_tokens negative", chat, with("max_tokens", json!(-1)), 400, Some("max_tokens"), "-1"),
        Json("max_tokens huge", chat, with("max_tokens", json!(i64::MAX)), 400, Some("max_tokens"), "at most"),
        Json("max_tokens half", chat, with("max_tokens", json!(1.5)), 400, Some("max_tokens"), "Invalid type"),
        Json("max_completion_tokens", chat, with("max_completion_tokens", json!(0)), 400, Some("max_completion_tokens"), "at least 1"),
        Json("top_logprobs alone", chat, with("top_logprobs", json!(2)), 400, Some("top_logprobs"), "logprobs"),
        Json("top_logprobs many", chat, with("top_logprobs", json!(21)), 400, Some("top_logprobs"), "at most 20"),
        Json("logit_bias key", chat, with("logit_bias", json!({"the": 1})), 400, Some("logit_bias"), "the"),
        Json("logit_bias token", chat, with("logit_bias", json!({"4000000000": 1})), 400, Some("logit_bias"), "4000000000"),
        Json("logit_bias range", chat, with("logit_bias", json!({"1": 101})), 400, Some("logit_bias"), "101"),
        Json("stop empty", chat, with("stop", json!("")), 400, Some("stop"), "empty"),
        Json("stop many", chat, with("stop", json!(vec!["x"; 65])), 400, Some("stop"), "65"),
        Json("stop a number", chat, with("stop", json!(3)), 400, Some("stop"), "string"),
        Json("stop_token_ids", chat, with("stop_token_ids", json!([-1])), 400, Some("stop_token_ids"), "-1"),
        Json("stream_options alone", chat, with("stream_options", json!({})), 400, Some("stream_options"), "stream"),
        Json("stream a string", chat, with("stream", json!("yes")), 400, Some("stream"), "Invalid type"),
        Json("tools", chat, with("tools", json!([{"type": "function"}])), 400, Some("tools[0].function"), "is missing"),
        Json("audio", chat, with("modalities", json!(["audio"])), 400, Some("modalities"), "not supported"),
        Json("min_tokens", chat, with("min_tokens", json!(5)), 400, Some("min_tokens"), "at most 4"),
        Json("prompt missing", text, json!({"model": m}), 400, Some("prompt"), "Missing"),
        Json("prompt an object", text, prompt("prompt", json!({})), 400, Some("prompt"), "array"),
        Json("prompt an empty list", text, prompt("prompt", json!([])), 400, Some("prompt"), "at least one"),
        Json("prompt of no tokens", text, prompt("prompt", json!([[]])), 400, None, ""),
        Json("prompt mixed", text, prompt("prompt", json!(["a", 1])), 400, Some("prompt"), "array"),
        Json("prompt token negative", text, prompt("prompt", json!([-1])), 400, Some("prompt"), "-1"),
        Json("prompt token unknown", text, prompt("prompt", json!([4_000_000_000_u32])), 400, None, "4000000000"),
        Json("prompt too long", text, prompt("prompt", json!(vec![1; len + 1])), 400, Some("prompt"), "maximum context length is"),
        Json("prompts many", text, prompt("prompt", json!(vec!["x"; 1025])), 400, Some("prompt"), "1025"),
        Json("max_tokens zero, no echo", text, prompt("max_tokens", json!(0)), 400, Some("max_tokens"), "at least 1"),
        Json("logprobs", text, prompt("logprobs", json!(21)), 400, Some("logprobs"), "at most 20"),
        Json("suffix", text, prompt("suffix", json!("end")), 400, Some("suffix"), "not supported"),
        Json("best_of", text, prompt("best_of", json!(3)), 400, Some("best_of"), "not supported"),
        Json("training_file unknown", jobs, job("suffix", json!(null)), 400, Some("training_file"), ""),
        Json("training_file missing", jobs, json!({"model": m}), 400, Some("training_file"), "Missing"),
        Json("job of an unknown model", jobs, job("model", json!("nobody")), 404, Some("model"), "nobody"),
        Json("fp16", jobs, job("fp16", json!(true)), 400, Some("fp16"), "nothing is computed in float16"),
        Json("thinking", chat, with("thinking", json!({"type": "enabled"})), 400, Some("thinking"), "chat_template_kwargs"),
        Json("messages beside a prompt", text, prompt("messages", say.clone()), 400, Some("messages"), "chat/completions"),
        Json("n_epochs", jobs, job("hyperparameters", json!({"n_epochs": 0})), 400, Some("hyperparameters.n_epochs"), "above 0 and at most 10000"),
        Json("n_epoch", jobs, job("hyperparameters", json!({"n_epoch": 1})), 400, Some("hyperparameters.n_epoch"), "did you mean n_epochs"),
        Json("lora_ran", jobs, job("lora_ran", json!(8)), 400, Some("lora_ran"), "did you mean lora_rank"),
        Json("a setting of others", jobs, job("load_in_4bit", json!(true)), 400, Some("load_in_4bit"), "not supported"),
        Json("legacy setting of others", tunes, job("modules_to_save", json!(["lm_head"])), 400, Some("modules_to_save"), "not supported"),
        Json("a setting of nobody", jobs, job("zzz", json!(1)), 400, Some("zzz"), "Unknown parameter"),
        Json("legacy setting of nobody", tunes, job("zzz", json!(1)), 400, Some("zzz"), "Unknown parameter"),
        Json("lora_r", jobs, job("lora_r", json!(1_000_000)), 400, Some("lora_r"), ""),
        Json("target module", jobs, job("lora_target_modules", json!(["nothing"])), 400, Some("lora_target_modules"), "nothing"),
        Json("dpo", jobs, job("method", json!({"type": "dpo"})), 400, Some("training_file"), "does not exist"),
        Json("rl", jobs, job("method", json!({"type": "reinforcement"})), 400, Some("method.type"), "not built"),
        Json("suffix of a job", jobs, job("suffix", json!("x".repeat(65))), 400, Some("suffix"), "65"),
        Json("seed", jobs, job("seed", json!(-1)), 400, Some("seed"), "-1"),
        Json("metadata", jobs, job("metadata", json!({"k": 3})), 400, None, "string"),
        Json("learning_rate", jobs, job("learning_rate", json!("fast")), 400, Some("learning_rate"), "a number"),
        Json("legacy file", tunes, json!({"training_file": "file-unknown"}), 400, Some("training_file"), ""),
        Json("legacy suffix", tunes, json!({"training_file": "x", "suffix": "x".repeat(41)}), 400, Some("suffix"), "41"),
        Json("embed nothing", "/v1/embeddings", json!({"model": m, "input": []}), 400, Some("input"), "empty list"),
        Json("embed an empty text", "/v1/embeddings", json!({"model": m, "input": [[]]}), 400, Some("input"), "empty"),
        Json("embed a stranger", "/v1/embeddings", json!({"model": "nobody", "input": "a"}), 404, None, "nobody"),
        Json("embed too much", "/v1/embeddings", json!({"model": m, "input": vec!["a"; 2049]}), 400, Some("input"), "2049"),
        Json("embed too long", "/v1/embeddings", json!({"model": m, "input": [vec![5; len + 1]]}), 400, Some("input"), "maximum context length"),
        Json("more numbers than there are", "/v1/embeddings", json!({"model": m, "input": "a", "dimensions": 100_000}), 400, Some("dimensions"), "at most"),
        Json("no numbers", "/v1/embeddings", json!({"model": m, "input": "a", "dimensions": 0}), 400, Some("dimensions"), "at least 1"),
        Json("a pooling", "/v1/embeddings", json!({"model": m, "input": "a", "pooling": "max"}), 400, Some("pooling"), "'mean', 'last', 'cls'"),
        Json("an encoding", "/v1/embeddings", json!({"model": m, "input": "a", "encoding_format": "hex"}), 400, Some("encoding_format"), "'base64'"),
        Json("tokenize nothing", "/tokenize", json!({}), 400, Some("prompt"), "Missing"),
        Json("detokenize", "/detokenize", json!({"tokens": [4_000_000_000_u32]}), 400, None, "4000000000"),
        Json("unload", "/v1/unload_lora_adapter", json!({"lora_name": "nobody"}), 404, None, "cannot be found"),
        Json("load", "/v1/load_lora_adapter", json!({"lora_name": "x", "lora_path": "/nowhere"}), 400, Some("lora_path"), "--lora-root"),
        Json("load as the base", "/v1/load_lora_adapter", json!({"lora_name": m, "lora_path": "/nowhere"}), 400, None, ""),
        Json("load without a path", "/v1/load_lora_adapter", json!({"lora_name": "x"}), 400, Some("lora_path"), "Missing"),
    ];
    for Json(name, path, body, status, param, text) in cases {
        check(
            name,
            &client::post(server.address, path, &body),
            &[status],
            param,
            text,
        );
    }
    client::get(server.address, "/health").ok();
}

#[test]
fn bodies() {
    let server = Server::shared();
    let json = ("content-type", "application/json");
    let deep = [b"{\"model\": ".as_slice(), &b"[".repeat(100_000)].concat();
    let cases: [(&str, &[u8], &str); 11] = [
        (
            "a key twice",
            b"{\"model\": \"m\", \"model\": \"n\"}",
            "twice in one object",
        ),
        ("empty", b"", "HINT"),
        ("blank", b"  \n", "HINT"),
        ("cut", b"{\"model\": \"m\"", "HINT"),
        ("an array", b"[1, 2]", "HINT"),
        ("two values", b"{} {}", ""),
        ("not UTF-8", b"{\"model\": \"\xff\xfe\"}", "HINT"),
        ("a lone surrogate", b"{\"model\": \"\\ud800\"}", "HINT"),
        (
            "a huge number",
            b"{\"model\": \"m\", \"messages\": [], \"temperature\": 1e999}",
            "HINT",
        ),
        ("a comment", b"{\"model\": \"m\" /* x */}", "HINT"),
        ("too deep", &deep, ""),
    ];
    for (name, body, text) in cases {
        let reply = client::send(server.address, "POST", "/v1/chat/completions", &[json], body);
        check(name, &reply, &[400], None, text);
    }
    // Announced, and found out while reading.
    let huge = [("content-length", "99999999999"), json];
    check(
        "announced",
        &client::send(server.address, "POST", "/v1/completions", &huge, b"{}"),
        &[413],
        None,
        "33554432",
    );
    let chunk = vec![b' '; 1 << 20];
    let mut request = b"POST /v1/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..33 {
        request.extend_from_slice(b"100000\r\n");
        request.extend_from_slice(&chunk);
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"0\r\n\r\n");
    check(
        "chunked",
        &client::raw(server.address, &request),
        &[413],
        None,
        "33554432",
    );
    // Brackets take a hundred times their bytes.
    let lists = "[[]],".repeat(1 << 20);
    let dense = format!(r#"{{"model": "m", "messages": [], "chat_template_kwargs": {{"x": [{lists}1]}}}}"#);
    check(
        "dense",
        &client::send(
            server.address,
            "POST",
            "/v1/chat/completions",
            &[json],
            dense.as_bytes(),
        ),
        &[413],
        None,
        "so many values",
    );
    // What a page of another origin may send without asking is not taken for JSON; parameters of the type are.
    let body = json!({"model": server.model(), "prompt": "Hi", "max_tokens": 1}).to_string();
    for (content_type, status) in [
        (Some("text/plain"), 415),
        (Some("application/x-www-form-urlencoded"), 415),
        (None, 415),
        (Some("application/json; charset=utf-8"), 200),
        (Some("Application/JSON"), 200),
    ] {
        let headers: Vec<_> = content_type
            .map(|kind| ("content-type", kind))
            .into_iter()
            .collect();
        let reply = client::send(
            server.address,
            "POST",
            "/v1/completions",
            &headers,
            body.as_bytes(),
        );
        match status {
            200 => drop(reply.ok()),
            status => check("content type", &reply, &[status], None, "application/json"),
        }
    }
}

#[test]
fn unknown_fields() {
    let server = Server::shared();
    let m = server.model();
    let (chat, text, load) = ("/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter");
    let conversation = |extra: Value| {
        let mut body = json!({"model": m, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        body
    };
    let prompt = |extra: Value| {
        let mut body = json!({"model": m, "prompt": "Hi", "max_tokens": 1});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        body
    };
    #[rustfmt::skip] // one case, one line
    let refused = [
        Json("adapter_id", text, prompt(json!({"adapter_id": "nope"})), 400, Some("adapter_id"), "name the adapter as model"),
        Json("adapter_id in a chat", chat, conversation(json!({"adapter_id": "nope"})), 400, Some("adapter_id"), "as model"),
        Json("lora_path", text, prompt(json!({"lora_path": "/x"})), 400, Some("lora_path"), "load_lora_adapter"),
        Json("regex", text, prompt(json!({"regex": "a+"})), 400, Some("regex"), "use structured_outputs"),
        Json("response_schema", chat, conversation(json!({"response_schema": {}})), 400, Some("response_schema"), "use response_format"),
        Json("max_new_tokens", text, prompt(json!({"max_new_tokens": 4})), 400, Some("max_new_tokens"), "use max_tokens"),
        Json("misspelt", chat, conversation(json!({"temprature": 0})), 400, Some("temprature"), "did you mean 'temperature'?"),
        Json("misspelt and missing", chat, json!({"modle": m, "messages": []}), 400, Some("modle"), "did you mean 'model'?"),
        Json("misspelt inside", chat, conversation(json!({"stream": true, "stream_options": {"include_usge": true}})), 400, Some("stream_options.include_usge"), "include_usage"),
        Json("misspelt in a message", chat, conversation(json!({"messages": [{"role": "user", "contents": "Hi"}]})), 400, Some("messages[0].contents"), "content"),
        Json("documents", text, prompt(json!({"documents": [{"a": "b"}]})), 400, Some("documents"), "/v1/chat/completions"),
        Json("sound", text, prompt(json!({"modalities": ["audio"]})), 400, Some("modalities"), "only text"),
        Json("suffix", chat, conversation(json!({"suffix": "x"})), 400, Some("suffix"), "/v1/completions"),
        Json("a weight", chat, conversation(json!({"messages": [{"role": "user", "content": "Hi", "weight": 0}]})), 400, Some("messages[0].weight"), "leave it out"),
        Json("embed with an adapter", "/v1/embeddings", json!({"model": m, "input": "a", "adapter_id": "x"}), 400, Some("adapter_id"), "as model"),
        Json("embed misspelt", "/v1/embeddings", json!({"model": m, "input": "a", "dimenson": 5}), 400, Some("dimenson"), "dimensions"),
        Json("best_of", text, prompt(json!({"best_of": 3})), 400, Some("best_of"), "equals n"),
        Json("load_in_place", load, json!({"lora_name": "x", "lora_path": "/x", "load_in_place": true}), 400, Some("load_in_place"), "load_inplace"),
        Json("tokenize", "/tokenize", json!({"content": "Hi"}), 400, Some("content"), "use prompt"),
        Json("query", "/v1/completions?api_key=x", prompt(json!({})), 400, Some("api_key"), "Authorization"),
    ];
    for Json(name, path, body, status, param, text) in refused {
        let reply = client::post(server.address, path, &body);
        check(name, &reply, &[status], param, text);
    }
    for query in ["/v1/files?limits=3", "/v1/models?include_checkpoint=true"] {
        check(
            query,
            &client::get(server.address, query),
            &[400],
            None,
            "did you mean",
        );
    }
    let misspelt: [Field; 2] = [
        ("porpose", None, b"fine-tune"),
        ("file", Some("x.jsonl"), b"{\"text\": \"a\"}\n"),
    ];
    check(
        "form",
        &client::form(server.address, "/v1/files", &misspelt),
        &[400],
        Some("porpose"),
        "purpose",
    );

    // Harmless, neutral, and new to us: the last is counted, and named in the log, once.
    let before = ignored(&server);
    let extra = json!({
        "user": "me", "store": false, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y", "metadata": {"a": "b"},
        "adapter_id": null, "grammar": "", "guided_json": null, "tools": [], "tool_choice": "none", "parallel_tool_calls": true,
        "response_format": {"type": "text"}, "modalities": ["text"], "truncate_prompt_tokens": null, "repeat_penalty": 1.0,
    });
    client::post(server.address, chat, &conversation(extra)).ok();
    assert_eq!(ignored(&server), before);
    for _ in 0..2 {
        client::post(server.address, chat, &conversation(json!({"wholly_new": 3}))).ok();
    }
    assert_eq!(ignored(&server), before + 2);
    assert_eq!(server.log().matches("wholly_new").count(), 1);
    let strict = Server::start(&["--strict-fields"]);
    let reply = client::post(strict.address, chat, &conversation(json!({"wholly_new": 3})));
    check("strict", &reply, &[400], Some("wholly_new"), "--strict-fields");
    client::post(strict.address, chat, &conversation(json!({"user": "me"}))).ok();
}

fn ignored(server: &Server) -> u64 {
    let text = client::get(server.address, "/metrics").text();
    let line = text
        .lines()
        .find(|line| line.starts_with("tandem:unknown_fields_total"));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
        .expect("the counter")
}

#[test]
fn paths_and_methods() {
    let server = Server::shared();
    let cases = [
        (
            "GET",
            "/v1/fine_tuning/jobs?status=failed",
            400,
            "choose among their items",
        ),
        ("GET", "/v1/fine_tuning/jobs?limti=3", 400, "did you mean 'limit'"),
        ("GET", "/v1/nothing", 404, ""),
        ("GET", "/v2/models", 404, "Invalid URL (GET /v2/models)"),
        ("GET", "/%ff", 404, ""),
        ("GET", "/v1/models/nobody", 404, "nobody"),
        ("GET", "/v1/models/a%2Fb%3Ac", 404, "a/b:c"),
        ("GET", "/v1/models/%ff", 400, "UTF-8"),
        ("DELETE", "/v1/models/nobody", 404, "nobody"),
        (
            "GET",
            "/v1/files/file-unknown",
            404,
            "No such File object: file-unknown",
        ),
        ("GET", "/v1/files/..%2F..%2Fetc%2Fpasswd", 404, "No such File"),
        ("GET", "/v1/files/file-unknown/content", 404, "No such File"),
        ("DELETE", "/v1/files/file-unknown", 404, "No such File"),
        ("GET", "/v1/files?limit=0", 400, "limit"),
        ("GET", "/v1/files?limit=x", 400, "limit"),
        ("GET", "/v1/files?order=up", 400, "order"),
        ("GET", "/v1/fine_tuning/jobs?limit=-1", 400, "limit"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-unknown", 404, "ftjob-unknown"),
        (
            "POST",
            "/v1/fine_tuning/jobs/ftjob-unknown/cancel",
            404,
            "ftjob-unknown",
        ),
        (
            "GET",
            "/v1/fine_tuning/jobs/ftjob-unknown/events",
            404,
            "ftjob-unknown",
        ),
        (
            "GET",
            "/v1/fine_tuning/jobs/ftjob-unknown/checkpoints",
            404,
            "ftjob-unknown",
        ),
        ("GET", "/v1/fine-tunes/ft-unknown", 404, "fine tune: ft-unknown"),
        (
            "DELETE",
            "/v1/fine-tunes/ft-unknown",
            404,
            "fine tune: ft-unknown",
        ),
        (
            "GET",
            "/v1/fine_tuning/jobs/ft-unknown",
            404,
            "fine tune: ft-unknown",
        ),
        ("GET", "/v1/fine_tunes/ft-unknown/events?stream=true", 404, ""),
        (
            "GET",
            "/v1/fine-tunes/ft-unknown/events?stream=maybe",
            400,
            "stream",
        ),
        ("GET", "/v1/chat/completions", 405, "GET"),
        ("PUT", "/v1/models", 405, "PUT"),
        ("DELETE", "/health", 405, "DELETE"),
    ];
    for (method, path, status, text) in cases {
        let reply = client::send(server.address, method, path, &[], b"");
        check(&format!("{method} {path}"), &reply, &[status], None, text);
    }
    let base = client::delete(server.address, &format!("/v1/models/{}", server.model()));
    check("delete of the base", &base, &[400, 409], None, "");
    assert_eq!(
        client::get(server.address, "/v1/models").ok()["data"][0]["id"],
        server.base["id"]
    );
}

#[test]
fn files() {
    let server = Server::shared();
    let good = b"{\"prompt\": \"a\", \"completion\": \" b\"}\n";
    let purpose: Field = ("purpose", None, b"fine-tune");
    #[rustfmt::skip] // one case, one line
    let cases: [(&str, &[Field], Option<&str>, &str); 14] = [
        ("a key twice", &[purpose, ("file", Some("x.jsonl"), b"{\"text\": \"a\", \"text\": \"b\"}\n")], None, "Line 1: \"text\" is there twice"),
        ("no file", &[purpose], Some("file"), "Missing"),
        ("no purpose", &[("file", Some("x.jsonl"), good)], Some("purpose"), "Missing"),
        ("purpose unknown", &[("purpose", None, b"fun"), ("file", Some("x.jsonl"), good)], Some("purpose"), "fun"),
        ("purpose not UTF-8", &[("purpose", None, b"\xff"), ("file", Some("x.jsonl"), good)], Some("purpose"), "UTF-8"),
        ("empty", &[purpose, ("file", Some("x.jsonl"), b"")], None, "empty"),
        ("not UTF-8", &[purpose, ("file", Some("x.jsonl"), b"\xff\xfe\n")], None, "1"),
        ("not JSON at line 2", &[purpose, ("file", Some("x.jsonl"), b"{\"text\": \"a\"}\n{oops\n")], None, "2"),
        ("a list at line 1", &[purpose, ("file", Some("x.jsonl"), b"[1]\n")], None, "Row 1 is not a dictionary"),
        ("an unknown shape", &[purpose, ("file", Some("x.jsonl"), b"{\"question\": \"a\"}\n")], None, "1"),
        ("no assistant", &[purpose, ("file", Some("x.jsonl"), b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n")], None, "assistant"),
        ("binary", &[purpose, ("file", Some("x.jsonl"), b"\x00\x01\x02\n")], None, "1"),
        ("expiry short", &[purpose, ("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"10"), ("file", Some("x.jsonl"), good)], Some("expires_after[seconds]"), "3600"),
        ("two files", &[purpose, ("file", Some("x.jsonl"), good), ("file", Some("y.jsonl"), good)], Some("file"), "two"),
    ];
    for (name, fields, param, text) in cases {
        check(
            name,
            &client::form(server.address, "/v1/files", fields),
            &[400],
            param,
            text,
        );
    }
    let not_a_form = client::post(server.address, "/v1/files", &json!({"purpose": "fine-tune"}));
    check("JSON for a form", &not_a_form, &[415], None, "multipart");
    let cut = [("content-type", "multipart/form-data; boundary=b")];
    let body = b"--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tu";
    check(
        "a cut form",
        &client::send(server.address, "POST", "/v1/files", &cut, body),
        &[400],
        None,
        "",
    );
    let huge = [
        ("content-type", "multipart/form-data; boundary=b"),
        ("content-length", "9999999999"),
    ];
    check(
        "a huge form",
        &client::send(server.address, "POST", "/v1/files", &huge, b"--b"),
        &[413],
        None,
        "536870912",
    );

    // Names with paths are only names.
    for name in [
        "../../../etc/passwd.jsonl",
        "/etc/passwd.jsonl",
        "..\\\\..\\\\x.jsonl",
        "a/../b.jsonl",
    ] {
        let file = client::upload(server.address, name, good).ok();
        let shown = file["filename"].as_str().unwrap();
        assert!(!shown.contains('/') && !shown.contains('\\'), "{shown}");
        let id = file["id"].as_str().unwrap();
        assert_eq!(
            client::get(server.address, &format!("/v1/files/{id}/content")).body,
            good
        );
        client::delete(server.address, &format!("/v1/files/{id}")).ok();
    }
}

#[test]
fn adapters() {
    let server = Server::shared();
    let work = tempfile::tempdir().unwrap();
    let config = |extra: Value| {
        let mut config = json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
            "base_model_name_or_path": "x", "task_type": "CAUSAL_LM",
        });
        config
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        config.to_string().into_bytes()
    };
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let tensors = |header: Value, data: usize| {
        let header = header.to_string().into_bytes();
        [
            (header.len() as u64).to_le_bytes().as_slice(),
            &header,
            &vec![0; data],
        ]
        .concat()
    };
    let shape = |shape: [u64; 2], bytes: u64| json!({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, bytes]}});
    let other_base = tensors(shape([4, 7], 112), 112);
    let cases: [(&str, File, File); 12] = [
        ("nothing in it", None, None),
        ("no tensors", Some(config(json!({}))), None),
        ("no config", None, Some(other_base.clone())),
        ("config not JSON", Some(b"{".to_vec()), Some(other_base.clone())),
        (
            "config not UTF-8",
            Some(b"\xff".to_vec()),
            Some(other_base.clone()),
        ),
        ("another base", Some(config(json!({}))), Some(other_base.clone())),
        (
            "not LoRA",
            Some(config(json!({"peft_type": "IA3"}))),
            Some(other_base.clone()),
        ),
        (
            "DoRA",
            Some(config(json!({"use_dora": true}))),
            Some(other_base.clone()),
        ),
        (
            "rank huge",
            Some(config(json!({"r": 1_000_000}))),
            Some(other_base.clone()),
        ),
        (
            "truncated",
            Some(config(json!({}))),
            Some(other_base[..60].to_vec()),
        ),
        (
            "a lying header",
            Some(config(json!({}))),
            Some(tensors(shape([4, 7], 1 << 40), 112)),
        ),
        (
            "a header longer than the file",
            Some(config(json!({}))),
            Some(u64::MAX.to_le_bytes().to_vec()),
        ),
    ];
    for (i, (name, config, tensors)) in cases.into_iter().enumerate() {
        let folder = work.path().join(i.to_string());
        std::fs::create_dir(&folder).unwrap();
        let put = |file: &str, bytes: Option<Vec<u8>>| {
            bytes.map(|bytes| std::fs::write(folder.join(file), bytes).unwrap())
        };
        put("adapter_config.json", config);
        put("adapter_model.safetensors", tensors);
        // By the path that the client named, not by where the server keeps it.
        let path = folder.to_str().unwrap();
        check(name, &load(&server, "bad", &folder), &[400, 404], None, path);
    }
    for (folder, files, text) in [
        (
            "pickled",
            &["adapter_config.json", "adapter_model.bin"][..],
            "safetensors.torch.save_file",
        ),
        ("outer", &["inner/adapter_config.json"], "inner inside it is one"),
        ("model", &["config.json"], "a whole model's folder"),
    ] {
        for file in files {
            let path = work.path().join(folder).join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        check(
            folder,
            &load(&server, "bad", &work.path().join(folder)),
            &[404],
            None,
            text,
        );
    }
    for (name, adapter) in [
        ("an empty name", ""),
        ("a control character", "a\nb"),
        ("a long name", &"x".repeat(300)),
    ] {
        check(name, &load(&server, adapter, work.path()), &[400], None, "");
    }
    let models = client::get(server.address, "/v1/models").ok();
    assert!(
        models["data"]
            .as_array()
            .unwrap()
            .iter()
            .all(|model| model["id"] != "bad"),
        "{models}"
    );
}

fn load(server: &Server, name: &str, folder: &Path) -> Reply {
    client::post(
        server.address,
        "/v1/load_lora_adapter",
        &json!({"lora_name": name, "lora_path": folder}),
    )
}
