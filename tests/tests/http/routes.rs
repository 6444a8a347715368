//! One conversation over each API that can hold it: they say the same, and each says as a stream what it says whole. What is
//! wrong is said in each API's own shape.

use serde_json::{Value, json};

use crate::client::{self, Reply};
use crate::server::Server;

/// What an answer comes to.
#[derive(Debug, Default, PartialEq)]
struct Said {
    reasoning: String,
    text: String,
    /// Names and arguments; what is no JSON stands there as it was written.
    calls: Vec<(String, Value)>,
    /// `stop`, `length` or `calls`
    end: &'static str,
    tokens: u64,
}

impl Said {
    fn call(&mut self, name: &Value, arguments: &str) {
        let arguments = serde_json::from_str(arguments).unwrap_or_else(|_| json!(arguments));
        self.calls.push((name.as_str().unwrap().to_owned(), arguments));
    }
}

struct Case {
    max_tokens: u32,
    temperature: f64,
    stop: &'static str,
    /// Offered, and one must be called.
    tools: bool,
}

/// An API: where, how a case is asked, and how answers are read.
struct Api {
    path: &'static str,
    body: fn(&str, &Case) -> Value,
    whole: fn(&Value) -> Said,
    streamed: fn(&Reply) -> Said,
    /// Of a refusal: the kind and the message.
    refusal: fn(&Value) -> (&Value, &Value),
}

const ASK: &str = "Where does Felix live?";

fn schemas() -> [(&'static str, Value); 2] {
    let object = |properties: Value, required: &str| json!({"type": "object", "additionalProperties": false, "properties": properties, "required": [required]});
    [
        (
            "paint",
            object(json!({"color": {"enum": ["red", "blue"]}}), "color"),
        ),
        ("nap", object(json!({"long": {"type": "boolean"}}), "long")),
    ]
}

const APIS: &[Api] = &[
    Api {
        path: "/v1/chat/completions",
        body: |model, case| {
            let mut body = json!({"model": model, "messages": [{"role": "user", "content": ASK}], "max_tokens": case.max_tokens,
                "temperature": case.temperature, "seed": 5, "stream_options": null});
            if !case.stop.is_empty() {
                body["stop"] = json!(case.stop);
            }
            if case.tools {
                let tools = schemas().map(|(name, schema)| {
                    json!({"type": "function", "function": {"name": name, "parameters": schema}})
                });
                body["tools"] = json!(tools);
                body["tool_choice"] = json!("required");
                body["parallel_tool_calls"] = json!(false);
            }
            body
        },
        whole: |answer| {
            let (choice, mut said) = (&answer["choices"][0], Said::default());
            let message = &choice["message"];
            said.text = text(&message["content"]);
            said.reasoning = text(&message["reasoning"]);
            for call in message["tool_calls"].as_array().into_iter().flatten() {
                said.call(
                    &call["function"]["name"],
                    call["function"]["arguments"].as_str().unwrap(),
                );
            }
            said.end = of_chat(&choice["finish_reason"]);
            said.tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
            said
        },
        streamed: |reply| {
            let (mut said, mut calls) = (Said::default(), Vec::<(Value, String)>::new());
            for event in reply.events() {
                let choice = &event["choices"][0];
                let delta = &choice["delta"];
                said.text += &text(&delta["content"]);
                said.reasoning += &text(&delta["reasoning"]);
                for call in delta["tool_calls"].as_array().into_iter().flatten() {
                    let function = &call["function"];
                    if function["name"].is_string() {
                        calls.push((function["name"].clone(), String::new()));
                    }
                    calls.last_mut().unwrap().1 += &text(&function["arguments"]);
                }
                if choice["finish_reason"].is_string() {
                    said.end = of_chat(&choice["finish_reason"]);
                }
            }
            calls
                .iter()
                .for_each(|(name, arguments)| said.call(name, arguments));
            said
        },
        refusal: |body| (&body["error"]["code"], &body["error"]["message"]),
    },
    Api {
        path: "/v1/messages",
        body: |model, case| {
            let mut body = json!({"model": model, "messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}],
                "max_tokens": case.max_tokens, "temperature": case.temperature, "seed": 5});
            if !case.stop.is_empty() {
                body["stop_sequences"] = json!([case.stop]);
            }
            if case.tools {
                let tools = schemas().map(|(name, schema)| json!({"name": name, "input_schema": schema}));
                body["tools"] = json!(tools);
                body["tool_choice"] = json!({"type": "any", "disable_parallel_tool_use": true});
            }
            body
        },
        whole: |answer| {
            let mut said = Said::default();
            for block in answer["content"].as_array().unwrap() {
                match block["type"].as_str().unwrap() {
                    "text" => said.text += &text(&block["text"]),
                    "thinking" => said.reasoning += &text(&block["thinking"]),
                    "tool_use" => match block["input"].get("INVALID_JSON") {
                        Some(cut) => said.call(&block["name"], cut.as_str().unwrap()),
                        None => said.call(&block["name"], &block["input"].to_string()),
                    },
                    other => panic!("{other}"),
                }
            }
            said.end = of_messages(&answer["stop_reason"]);
            said.tokens = answer["usage"]["output_tokens"].as_u64().unwrap();
            said
        },
        streamed: |reply| {
            let (mut said, mut open) = (Said::default(), (Value::Null, String::new()));
            for event in reply.named_events() {
                match event["type"].as_str().unwrap() {
                    "content_block_start" => open = (event["content_block"].clone(), String::new()),
                    "content_block_delta" => {
                        let delta = &event["delta"];
                        open.1 += &["text", "thinking", "partial_json"]
                            .map(|field| text(&delta[field]))
                            .concat();
                    }
                    "content_block_stop" => match open.0["type"].as_str().unwrap() {
                        "text" => said.text += &open.1,
                        "thinking" => said.reasoning += &open.1,
                        _ => said.call(&open.0["name"], &open.1),
                    },
                    "message_delta" => {
                        said.end = of_messages(&event["delta"]["stop_reason"]);
                        said.tokens = event["usage"]["output_tokens"].as_u64().unwrap();
                    }
                    "message_start" | "message_stop" | "ping" => {}
                    other => panic!("{other}"),
                }
            }
            said
        },
        refusal: |body| (&body["error"]["type"], &body["error"]["message"]),
    },
    Api {
        path: "/v1/responses",
        body: |model, case| {
            let mut body = json!({"model": model, "input": ASK, "max_output_tokens": case.max_tokens,
                "temperature": case.temperature, "seed": 5});
            if !case.stop.is_empty() {
                body["stop"] = json!(case.stop);
            }
            if case.tools {
                let tools = schemas()
                    .map(|(name, schema)| json!({"type": "function", "name": name, "parameters": schema}));
                body["tools"] = json!(tools);
                body["tool_choice"] = json!("required");
                body["parallel_tool_calls"] = json!(false);
            }
            body
        },
        whole: of_response,
        streamed: |reply| {
            let events = reply.named_events();
            let mut said = Said::default();
            for event in &events {
                match event["type"].as_str().unwrap() {
                    "response.output_text.delta" => said.text += &text(&event["delta"]),
                    "response.reasoning_text.delta" => said.reasoning += &text(&event["delta"]),
                    "response.function_call_arguments.done" => {
                        said.call(&event["name"], event["arguments"].as_str().unwrap());
                    }
                    _ => {}
                }
            }
            let last = of_response(&events.last().unwrap()["response"]);
            Said {
                end: last.end,
                tokens: last.tokens,
                ..said
            }
        },
        refusal: |body| (&body["error"]["code"], &body["error"]["message"]),
    },
];

fn of_response(answer: &Value) -> Said {
    let mut said = Said::default();
    for item in answer["output"].as_array().unwrap() {
        match item["type"].as_str().unwrap() {
            "message" => said.text += &text(&item["content"][0]["text"]),
            "reasoning" => said.reasoning += &text(&item["content"][0]["text"]),
            "function_call" => said.call(&item["name"], item["arguments"].as_str().unwrap()),
            other => panic!("{other}"),
        }
    }
    said.end = match (answer["status"].as_str().unwrap(), said.calls.is_empty()) {
        ("completed", true) => "stop",
        ("completed", false) => "calls",
        ("incomplete", _) => "length",
        other => panic!("{other:?}"),
    };
    said.tokens = answer["usage"]["output_tokens"].as_u64().unwrap();
    said
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn of_chat(reason: &Value) -> &'static str {
    match reason.as_str().unwrap() {
        "stop" => "stop",
        "length" => "length",
        "tool_calls" => "calls",
        other => panic!("{other}"),
    }
}

fn of_messages(reason: &Value) -> &'static str {
    match reason.as_str().unwrap() {
        "end_turn" | "stop_sequence" => "stop",
        "max_tokens" => "length",
        "tool_use" => "calls",
        other => panic!("{other}"),
    }
}

/// What every API says to these, whole and streamed.
fn agree(server: &Server, cases: &[Case]) {
    for (i, case) in cases.iter().enumerate() {
        let mut expected = None;
        for api in APIS {
            let mut body = (api.body)(server.model(), case);
            let whole = (api.whole)(&client::post(server.address, api.path, &body).ok());
            body["stream"] = json!(true);
            let reply = client::post(server.address, api.path, &body);
            let mut streamed = (api.streamed)(&reply);
            if streamed.tokens == 0 {
                // A stream of chat was not asked for its usage.
                streamed.tokens = whole.tokens;
            }
            assert_eq!(streamed, whole, "case {i} of {} as a stream", api.path);
            assert!(whole.tokens > 0, "case {i} of {}", api.path);
            let expected = expected.get_or_insert_with(|| {
                (api.whole)(
                    &client::post(server.address, api.path, &{
                        body["stream"] = json!(false);
                        body
                    })
                    .ok(),
                )
            });
            assert_eq!(&whole, expected, "case {i} of {}", api.path);
        }
    }
}

#[test]
fn all_apis_say_the_same_whole_and_streamed() {
    let case = |max_tokens, temperature, stop, tools| Case {
        max_tokens,
        temperature,
        stop,
        tools,
    };
    let plain = [
        case(60, 0.0, "", false),
        case(60, 1.0, "", false),
        case(60, 0.0, "e", false),
        case(3, 0.0, "", false),
    ];
    agree(&Server::shared(), &plain);
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/clients/tools.jinja");
    let tools = Server::start(&["--chat-template", template, "--tool-call-parser", "hermes"]);
    agree(&tools, &[case(260, 1.0, "", true), case(14, 1.0, "", true)]);
    let thinks = Server::start(&["--reasoning-parser", "deepseek_r1"]);
    agree(&thinks, &[case(20, 0.0, "", false)]);
}

#[test]
fn what_is_wrong_is_said_in_each_apis_shape() {
    let server = Server::start(&["--api-key", "sekret"]);
    let key = ("authorization", "Bearer sekret");
    let kind = ("content-type", "application/json");
    let models = client::send(server.address, "GET", "/v1/models", &[key], b"").ok();
    let model = models["data"][0]["id"].as_str().unwrap();
    for api in APIS {
        let case = Case {
            max_tokens: 4,
            temperature: 0.0,
            stop: "",
            tools: false,
        };
        let send = |method: &str, headers: &[(&str, &str)], body: &str| {
            client::send(server.address, method, api.path, headers, body.as_bytes())
        };
        let body = |field: &str, value: Value| {
            let mut body = (api.body)(model, &case);
            body[field] = value;
            body.to_string()
        };
        let fine = (api.body)(model, &case).to_string();
        #[rustfmt::skip] // one case, one line
        let cases = [
            (send("POST", &[kind], &fine), 401, "API key"),
            (send("POST", &[kind, ("authorization", "Bearer wrong")], &fine), 401, "Incorrect API key"),
            (send("POST", &[key], &fine), 415, "Content-Type"),
            (send("PUT", &[key, kind], &fine), 405, "Not allowed"),
            (send("POST", &[key, kind], "{"), 400, "parse"),
            (send("POST", &[key, kind, ("content-length", "99999999999")], ""), 413, "larger than"),
            (send("POST", &[key, kind], &body("model", json!("nobody"))), 404, "nobody"),
            (send("POST", &[key, kind], &body("temperature", json!(7))), 400, "temperature"),
            (send("POST", &[key, kind], &body("temprature", json!(1))), 400, "did you mean 'temperature'"),
        ];
        for (reply, status, part) in cases {
            assert_eq!(reply.status, status, "{}: {}", api.path, reply.text());
            let body = reply.json();
            let (kind, message) = (api.refusal)(&body);
            assert!(
                message.as_str().is_some_and(|text| text.contains(part)),
                "{}: {body}",
                api.path
            );
            assert!(kind.is_string() || status == 400, "{}: {body}", api.path);
            assert!(reply.header("x-request-id").is_some());
        }
        let reply = send("POST", &[("x-api-key", "sekret"), kind], &fine);
        assert_eq!(reply.status, 200, "{}: {}", api.path, reply.text());
    }
}

#[test]
fn responses_are_kept_over_a_restart_and_within_their_bytes() {
    let path = "/v1/responses";
    let ask = |server: &Server, more: Value| {
        let mut body =
            json!({"model": server.model(), "input": ASK, "max_output_tokens": 4, "temperature": 0});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        client::post(server.address, path, &body)
    };
    let flags = ["--response-store-bytes", "8k"];
    let server = Server::start(&flags);
    let first = ask(&server, json!({})).ok();
    let kept = format!("{path}/{}", first["id"].as_str().unwrap());
    let server = Server::start_in(server.kill(), &flags);
    assert_eq!(client::get(server.address, &kept).ok(), first);
    let second = ask(&server, json!({"previous_response_id": first["id"]})).ok();
    assert!(second["usage"]["input_tokens"].as_u64() > first["usage"]["input_tokens"].as_u64());
    // Each has more than a kilobyte.
    for _ in 0..8 {
        assert_eq!(ask(&server, json!({})).ok()["store"], true);
    }
    assert_eq!(client::get(server.address, &kept).status, 404);
    let long = "a ".repeat(5000);
    assert_eq!(
        ask(&server, json!({"input": long, "store": true})).json()["error"]["param"],
        "store"
    );
    let none = Server::start(&["--response-store-bytes", "0"]);
    let refused = ask(&none, json!({"store": true}));
    assert_eq!(
        (refused.status, &refused.json()["error"]["param"]),
        (400, &json!("store"))
    );
    let answer = ask(&none, json!({})).ok();
    assert_eq!(answer["store"], false);
    assert_eq!(
        client::get(
            none.address,
            &format!("{path}/{}", answer["id"].as_str().unwrap())
        )
        .status,
        404
    );
}
