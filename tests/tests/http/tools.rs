//! Tools: a call that must be is valid whatever the model's weights say, a stream says what the whole says, and what cannot
//! be called is refused with its place. The demo model knows no tools: a template of the tests writes them.

use serde_json::{Value, json};

use crate::client;
use crate::server::Server;

const CHAT: &str = "/v1/chat/completions";

fn start(flags: &[&str]) -> Server {
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/tools.jinja");
    Server::start(&[&["--chat-template", template], flags].concat())
}

fn paint() -> Value {
    json!({"type": "function", "function": {"name": "paint", "description": "Paint.", "parameters": {
        "type": "object", "additionalProperties": false, "required": ["n", "color"], "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 99}, "color": {"enum": ["red", "blue"]}}}}})
}

fn nap() -> Value {
    json!({"type": "function", "function": {"name": "nap", "parameters": {
        "type": "object", "additionalProperties": false, "properties": {"long": {"type": "boolean"}}, "required": ["long"]}}})
}

fn body(server: &Server, extra: Value) -> Value {
    let messages = json!([{"role": "user", "content": "Paint!"}]);
    let mut body = json!({"model": server.model(), "messages": messages, "max_tokens": 260, "temperature": 1, "seed": 3,
        "tools": [paint(), nap()]});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

fn is_valid(name: &str, arguments: &str) -> bool {
    let Ok(Value::Object(arguments)) = serde_json::from_str(arguments) else {
        return false;
    };
    match name {
        "paint" => {
            arguments.keys().eq(["n", "color"])
                && arguments["n"].as_i64().is_some_and(|n| (0..100).contains(&n))
                && ["red", "blue"].contains(&arguments["color"].as_str().unwrap_or_default())
        }
        "nap" => arguments.keys().eq(["long"]) && arguments["long"].is_boolean(),
        _ => false,
    }
}

/// One message of a stream's chunks, as clients put it together; each call's id, type and name come once.
fn joined(events: &[Value], index: u64) -> (Value, Value) {
    let mut message = json!({"content": null, "tool_calls": []});
    let mut finish = Value::Null;
    for choice in events
        .iter()
        .map(|event| &event["choices"][0])
        .filter(|choice| choice["index"] == index)
    {
        let delta = &choice["delta"];
        for field in ["content", "reasoning", "reasoning_content"] {
            if let Some(text) = delta[field].as_str() {
                let known = message[field].as_str().unwrap_or_default();
                message[field] = json!(format!("{known}{text}"));
            }
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let calls = message["tool_calls"].as_array_mut().unwrap();
            let at = call["index"].as_u64().unwrap() as usize;
            if at == calls.len() {
                assert!(
                    call["id"].is_string()
                        && call["type"] == "function"
                        && call["function"]["name"].is_string()
                );
                calls.push(json!({"name": call["function"]["name"], "arguments": ""}));
            } else {
                assert!(
                    call.get("id").is_none() && call["function"].get("name").is_none(),
                    "{call}"
                );
            }
            let known = calls[at]["arguments"].as_str().unwrap().to_owned();
            calls[at]["arguments"] = json!(known + call["function"]["arguments"].as_str().unwrap());
        }
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    (message, finish)
}

fn calls(message: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    calls
        .map(|call| {
            (
                text(&call["function"]["name"]),
                text(&call["function"]["arguments"]),
            )
        })
        .collect()
}

#[test]
fn what_must_be_called_is_called_and_valid() {
    let server = start(&[]);
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let allowed =
        json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("nap")]}});
    #[rustfmt::skip] // one case, one line
    let cases = [
        (json!({"tool_choice": "required", "parallel_tool_calls": false}), None, "tool_calls"),
        (json!({"tool_choice": "required", "parallel_tool_calls": false, "n": 3}), None, "tool_calls"),
        (json!({"tool_choice": "required", "parallel_tool_calls": false, "temperature": 0, "logprobs": true}), None, "tool_calls"),
        (json!({"tool_choice": named("paint")}), Some("paint"), "stop"),
        (json!({"tool_choice": named("nap"), "n": 2, "seed": 8}), Some("nap"), "stop"),
        (json!({"tool_choice": allowed, "parallel_tool_calls": false}), Some("nap"), "tool_calls"),
        (json!({"tool_choice": "required"}), None, "tool_calls"),
    ];
    for (extra, name, finish) in cases {
        let asked = body(&server, extra.clone());
        let whole = client::post(server.address, CHAT, &asked).ok();
        let mut streamed = asked.clone();
        streamed["stream"] = json!(true);
        let events = client::post(server.address, CHAT, &streamed).events();
        for choice in whole["choices"].as_array().unwrap() {
            let (message, called) = (&choice["message"], calls(&choice["message"]));
            assert!(
                message["content"].is_null() && !called.is_empty(),
                "{extra}: {choice}"
            );
            // Several calls may be more than the tokens that were asked for.
            let is_cut = choice["finish_reason"] == "length" && called.len() > 1;
            assert!(is_cut || choice["finish_reason"] == finish, "{extra}: {choice}");
            for (called, arguments) in &called[..called.len() - usize::from(is_cut)] {
                assert!(is_valid(called, arguments), "{extra}: {called} {arguments}");
                assert!(name.is_none_or(|name| name == called), "{extra}: {called}");
            }
            let ids = message["tool_calls"]
                .as_array()
                .unwrap()
                .iter()
                .map(|call| &call["id"]);
            assert!(
                ids.clone()
                    .all(|id| id.as_str().unwrap().len() == 29 && id.as_str().unwrap().starts_with("call_"))
            );
            let (message, finish) = joined(&events, choice["index"].as_u64().unwrap());
            let called: Vec<Value> = called
                .iter()
                .map(|(name, arguments)| json!({"name": name, "arguments": arguments}))
                .collect();
            assert_eq!(
                message,
                json!({"content": null, "tool_calls": called}),
                "{extra}: as a stream"
            );
            assert_eq!(finish, choice["finish_reason"], "{extra}: as a stream");
        }
    }
    // The older form.
    let functions =
        json!({"tools": null, "functions": [paint()["function"]], "function_call": {"name": "paint"}});
    let choice = client::post(server.address, CHAT, &body(&server, functions)).ok()["choices"][0].clone();
    let call = &choice["message"]["function_call"];
    assert!(
        is_valid("paint", call["arguments"].as_str().unwrap()) && call["name"] == "paint",
        "{choice}"
    );
    assert!(choice["message"].get("tool_calls").is_none(), "{choice}");
    // Cut inside a call: what there is of it, and the length as the reason.
    let cut = json!({"tool_choice": "required", "max_tokens": 14});
    let choice = client::post(server.address, CHAT, &body(&server, cut)).ok()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "length", "{choice}");
    // What was called comes back as history, and the model answers.
    let history = json!({"messages": [
        {"role": "user", "content": "Paint!"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "nap", "arguments": "{\"long\": true}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "done"}], "max_tokens": 4});
    client::post(server.address, CHAT, &body(&server, history)).ok();
}

#[test]
fn reasoning_stands_apart() {
    // This format begins with reasoning, and the demo model never ends it.
    let server = start(&[
        "--reasoning-parser",
        "deepseek_r1",
        "--tool-call-parser",
        "hermes",
    ]);
    assert!(
        server.log().contains("reasoning=\"deepseek_r1\""),
        "{}",
        server.log()
    );
    let ask = |extra: Value| {
        let mut asked = body(
            &server,
            json!({"tools": null, "max_tokens": 12, "temperature": 0}),
        );
        asked
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        asked
    };
    let message =
        |extra: Value| client::post(server.address, CHAT, &ask(extra)).ok()["choices"][0]["message"].clone();
    let apart = message(json!({}));
    assert!(
        apart["content"].is_null() && !apart["reasoning"].as_str().unwrap().is_empty(),
        "{apart}"
    );
    assert_eq!(apart["reasoning"], apart["reasoning_content"]);
    assert_eq!(
        message(json!({"separate_reasoning": false}))["content"],
        apart["reasoning"]
    );
    let hidden = message(json!({"include_reasoning": false}));
    assert!(
        hidden.get("reasoning").is_none() && hidden["content"].is_null(),
        "{hidden}"
    );
    let events = client::post(server.address, CHAT, &ask(json!({"stream": true}))).events();
    let (streamed, _) = joined(&events, 0);
    assert_eq!(
        (&streamed["reasoning"], &streamed["content"]),
        (&apart["reasoning"], &Value::Null)
    );
    // What must be something stands behind reasoning, which does not end here: it is cut by the length of the answer.
    let form = json!({"guided_choice": ["yes"]});
    let cut = message(form.clone());
    assert_eq!(
        (&cut["content"], &cut["reasoning"]),
        (&Value::Null, &apart["reasoning"])
    );
    // A bound on it ends it, and the form follows; alone, several at once, beside tools, drawn, with log-probabilities, guessed.
    let guessing = json!({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}).to_string();
    let guessing = start(&[
        "--reasoning-parser",
        "deepseek_r1",
        "--tool-call-parser",
        "hermes",
        "--speculative-config",
        &guessing,
    ]);
    let schema = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"], "additionalProperties": false}}});
    #[rustfmt::skip] // one case, one line
    let cases = [
        (json!({"thinking_token_budget": 5}), 5),
        (json!({"thinking_token_budget": 0, "temperature": 1}), 0),
        (json!({"thinking_token_budget": 9, "n": 3, "temperature": 1, "logprobs": true, "top_logprobs": 2}), 9),
        (json!({"thinking_token_budget": 5, "guided_choice": null, "response_format": schema}), 5),
        (json!({"thinking_token_budget": 5, "tools": [nap()], "guided_choice": ["yes"], "include_reasoning": false}), 5),
    ];
    for (extra, budget) in cases {
        let mut asked = ask(form.clone());
        asked["max_tokens"] = json!(200);
        asked
            .as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        let whole = client::post(server.address, CHAT, &asked).ok();
        let same = client::post(guessing.address, CHAT, &asked).ok();
        let mut streamed = asked.clone();
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        let events = client::post(server.address, CHAT, &streamed).events();
        let choices = whole["choices"].as_array().unwrap();
        for choice in choices {
            let message = &choice["message"];
            let index = choice["index"].as_u64().unwrap();
            match message["content"].as_str().unwrap() {
                "yes" => {}
                object => assert!(
                    extra["response_format"].is_object()
                        && serde_json::from_str::<Value>(object).unwrap()["n"].is_u64(),
                    "{choice}"
                ),
            }
            assert_eq!(choice["finish_reason"], "stop", "{extra}");
            let is_thought = budget > 0 && extra["include_reasoning"] != false;
            assert_eq!(
                message["reasoning"].as_str().is_some_and(|text| !text.is_empty()),
                is_thought,
                "{extra}: {choice}"
            );
            let (joined, finish) = joined(&events, index);
            assert_eq!(
                (&joined["content"], &joined["reasoning"], &finish),
                (
                    &message["content"],
                    &message["reasoning"],
                    &choice["finish_reason"]
                ),
                "{extra}"
            );
            assert_eq!(&same["choices"][index as usize], choice, "{extra}: guessed");
        }
        // They are counted, without those of its marks.
        let reasoning = |usage: &Value| {
            usage["completion_tokens_details"]["reasoning_tokens"]
                .as_u64()
                .unwrap()
        };
        let n = choices.len() as u64;
        for usage in [&whole["usage"], &events.last().unwrap()["usage"]] {
            assert_eq!(reasoning(usage), n * budget, "{extra}: {usage}");
        }
    }
    let error = client::post(
        start(&[]).address,
        CHAT,
        &ask(json!({"thinking_token_budget": 5})),
    )
    .json()["error"]
        .clone();
    assert_eq!(error["param"], "thinking_token_budget", "{error}");
}

#[test]
fn what_must_be_called_is_called_whatever_form_content_would_have() {
    let server = start(&[]);
    let schema = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}});
    let asked = json!({"tool_choice": "required", "response_format": schema, "temperature": 0});
    let choice = client::post(server.address, CHAT, &body(&server, asked)).ok()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    assert!(
        choice["message"]["content"].is_null() && choice["message"]["tool_calls"].is_array(),
        "{choice}"
    );
}

#[test]
fn what_cannot_be_called_is_refused_by_name_and_place() {
    let server = start(&[]);
    let function = |function: Value| json!({"tools": [{"type": "function", "function": function}], "tool_choice": "required"});
    let impossible = json!({"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}}});
    #[rustfmt::skip] // one case, one line
    let cases = [
        (json!({"tool_choice": "any"}), "tool_choice", "any is called required here"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "dig"}}}), "tool_choice.function.name", "paint, nap"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice.function", "an object with a name"),
        (json!({"tool_choice": {"type": "custom"}}), "tool_choice.type", "\"custom\""),
        (json!({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}), "tool_choice.allowed_tools.tools", "is empty"),
        (json!({"tools": null, "tool_choice": "required"}), "tool_choice", "needs tools"),
        (json!({"tools": [paint(), paint()]}), "tools[1].function.name", "as is [0].function.name"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type", "only \"function\" is built"),
        (function(json!({"name": "a b"})), "tools[0].function.name", "letters, digits"),
        (function(json!({"name": "f", "parameters": {"type": "array"}})), "tools[0].function.parameters.type", "must be \"object\""),
        (function(impossible), "tools[0].function.parameters", "at #/properties/a: the keywords [\"uniqueItems\"]"),
        (json!({"tool_choice": "required", "guided_json": {"type": "object"}}), "guided_json", "send one of them"),
        (json!({"functions": [{"name": "f"}]}), "functions", "older form of tools"),
        (json!({"tools": null, "functions": [{"name": "f"}], "function_call": {"name": "g"}}), "function_call.name", "\"g\""),
        (json!({"tools": null, "functions": [{"name": "f", "parameters": 7}]}), "functions[0].parameters", "JSON Schema"),
    ];
    for (extra, param, part) in cases {
        let reply = client::post(server.address, CHAT, &body(&server, extra.clone()));
        let error = &reply.json()["error"];
        assert_eq!(
            (reply.status, &error["param"]),
            (400, &json!(param)),
            "{extra}: {error}"
        );
        assert!(
            error["message"].as_str().unwrap().contains(part),
            "{extra}: {error}"
        );
    }
    // The demo model's own template knows no tools.
    let error =
        client::post(Server::shared().address, CHAT, &body(&server, json!({}))).json()["error"].clone();
    assert_eq!(error["param"], "tools", "{error}");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("--chat-template") && message.contains("--tool-call-parser"),
        "{message}"
    );
}
