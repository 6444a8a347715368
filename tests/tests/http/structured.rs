//! Answers that must be something: every spelling of it, at temperature 1, where the model itself would say anything.
//! Whether JSON is valid by its schema is judged in tests/clients, by Python's jsonschema.

use serde_json::{Value, json};

use crate::client;
use crate::server::Server;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn chat(server: &Server, extra: Value) -> Value {
    let messages = json!([{"role": "user", "content": "Where does Felix live?"}]);
    with(
        json!({"model": server.model(), "messages": messages, "max_tokens": 100, "temperature": 1, "seed": 5}),
        extra,
    )
}

fn text(server: &Server, extra: Value) -> Value {
    with(
        json!({"model": server.model(), "prompt": "Once upon", "max_tokens": 100, "temperature": 1, "seed": 5}),
        extra,
    )
}

fn with(mut body: Value, extra: Value) -> Value {
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

/// What an answer may be.
#[derive(Clone, Copy)]
enum Is {
    OneOf(&'static [&'static str]),
    /// Letters of these, so many.
    Letters(&'static str, usize),
    /// JSON with these keys, in order; each a whole number or one of the texts.
    Object(&'static [&'static str]),
}

fn check(name: &str, answer: &str, is: Is) {
    let fits = match is {
        Is::OneOf(choices) => choices.contains(&answer),
        Is::Letters(letters, n) => answer.len() == n && answer.chars().all(|c| letters.contains(c)),
        Is::Object(keys) => serde_json::from_str::<Value>(answer).is_ok_and(|value| {
            let object = value.as_object().expect("an object");
            object.keys().eq(keys)
                && object
                    .values()
                    .all(|value| value.is_i64() || value == "red" || value == "blue")
        }),
    };
    assert!(fits, "{name}: {answer:?}");
}

#[test]
fn every_spelling_is_honoured() {
    let server = Server::shared();
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["n", "color"], "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99}, "color": {"enum": ["red", "blue"]}}});
    let object = Is::Object(&["n", "color"]);
    let letters = Is::Letters("abc", 7);
    let yes_no = Is::OneOf(&["yes", "no, \u{e9}\n"]);
    let gbnf = "root ::= item{7}\nitem ::= [a-c]";
    let tag = json!({"type": "tag", "begin": "<a>", "end": "</a>",
                     "content": {"type": "or", "elements": [{"type": "const_string", "value": "x"}, {"type": "json_schema", "json_schema": {"const": 7}}]}});
    let tagged = Is::OneOf(&["<a>x</a>", "<a>7</a>"]);
    #[rustfmt::skip] // one case, one line
    let cases = [
        ("json_schema", json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": true, "schema": schema}}}), object),
        ("response_format.schema", json!({"response_format": {"type": "json_object", "schema": schema}}), object),
        ("structured_outputs.json", json!({"structured_outputs": {"json": schema}}), object),
        ("structured_outputs.json as text", json!({"structured_outputs": {"json": schema.to_string(), "disable_any_whitespace": true}}), object),
        ("guided_json", json!({"guided_json": schema, "guided_whitespace_pattern": " ?"}), object),
        ("llama.cpp's json_schema", json!({"json_schema": schema}), object),
        ("structured_outputs.regex", json!({"structured_outputs": {"regex": "^[abc]{7}$"}}), letters),
        ("guided_regex", json!({"guided_regex": "[abc]{7}"}), letters),
        ("structured_outputs.choice", json!({"structured_outputs": {"choice": ["yes", "no, \u{e9}\n"]}}), yes_no),
        ("guided_choice", json!({"guided_choice": ["yes", "no, \u{e9}\n"]}), yes_no),
        ("structured_outputs.grammar", json!({"structured_outputs": {"grammar": "start: L{7}\nL: /[abc]/"}}), letters),
        ("guided_grammar", json!({"guided_grammar": gbnf}), letters),
        ("llama.cpp's grammar", json!({"grammar": gbnf}), letters),
        ("structural_tag", json!({"structured_outputs": {"structural_tag": json!({"type": "structural_tag", "format": tag}).to_string()}}), tagged),
        ("response_format's structural_tag", json!({"response_format": {"type": "structural_tag", "format": tag}}), tagged),
        ("beside nulls", json!({"guided_choice": ["yes"], "structured_outputs": null, "json_schema": null, "grammar": ""}), yes_no),
        ("without an end of text", json!({"guided_regex": "[abc]{7}", "ignore_eos": true}), letters),
        ("and as many tokens at least", json!({"guided_regex": "[abc]{7}", "min_tokens": 50}), letters),
        ("against a bias", json!({"guided_regex": "[abc]{7}", "logit_bias": {"5": 100}, "top_k": 3, "repetition_penalty": 1.5}), letters),
        ("greedy", json!({"guided_regex": "[abc]{7}", "temperature": 0}), letters),
    ];
    for (name, asked, is) in cases {
        let body = chat(&server, asked.clone());
        let whole = client::post(server.address, CHAT, &body).ok();
        let choice = &whole["choices"][0];
        let content = choice["message"]["content"].as_str().unwrap();
        check(name, content, is);
        assert_eq!(choice["finish_reason"], "stop", "{name}");
        let streamed = client::post(server.address, CHAT, &with(body, json!({"stream": true}))).events();
        let pieces = streamed
            .iter()
            .filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        assert_eq!(pieces.collect::<String>(), content, "{name}: as a stream");
        let several = client::post(server.address, TEXT, &text(&server, with(asked, json!({"n": 3})))).ok();
        for choice in several["choices"].as_array().unwrap() {
            check(name, choice["text"].as_str().unwrap(), is);
            assert_eq!(choice["finish_reason"], "stop", "{name}");
        }
    }
}

#[test]
fn tags_within_free_text() {
    let server = Server::shared();
    let tags =
        json!({"structures": [{"begin": "the ", "schema": {"const": 7}, "end": "."}], "triggers": ["the "]});
    let format = with(json!({"type": "structural_tag"}), tags);
    for seed in 0..6 {
        let body = chat(&server, json!({"response_format": format, "seed": seed}));
        let answer = client::post(server.address, CHAT, &body).ok();
        let content = answer["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned();
        for (at, _) in content.match_indices("the ") {
            let rest = &content[at + 4..];
            assert!(rest.starts_with("7.") || "7.".starts_with(rest), "{content:?}");
        }
    }
}

#[test]
fn ends_and_numbers_of_constrained_answers() {
    let server = Server::shared();
    let ask = |extra: Value| {
        let body = chat(&server, with(json!({"guided_regex": "[abc]{30}"}), extra));
        client::post(server.address, CHAT, &body).ok()["choices"][0].clone()
    };
    let whole = ask(json!({}));
    let content = |choice: &Value| choice["message"]["content"].as_str().unwrap().to_owned();
    // Cut by its length, by a stop string; and the same again by its seed.
    let cut = ask(json!({"max_tokens": 3}));
    assert_eq!(cut["finish_reason"], "length");
    assert!(content(&whole).starts_with(&content(&cut)) && !content(&cut).is_empty());
    let stop = &content(&whole)[10..13];
    let stopped = ask(json!({"stop": stop}));
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(content(&stopped), content(&whole).split(stop).next().unwrap());
    assert_eq!(content(&ask(json!({}))), content(&whole));
    // Log-probabilities are of what is allowed: all of it together is certain.
    let choice =
        ask(json!({"guided_regex": null, "guided_choice": ["a", "b"], "logprobs": true, "top_logprobs": 20}));
    let first = &choice["logprobs"]["content"][0]["top_logprobs"];
    let all: f64 = first
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["logprob"].as_f64().unwrap().exp())
        .sum();
    assert!((all - 1.0).abs() < 1e-5, "{first}");
    // Beside others the unconstrained answer is what it is alone.
    let free = json!({"model": server.model(), "prompt": "Once upon a time", "max_tokens": 24, "temperature": 1, "seed": 9});
    let alone = client::post(server.address, TEXT, &free).ok()["choices"][0]["text"].clone();
    std::thread::scope(|scope| {
        let beside = scope.spawn(|| (0..4).map(|_| ask(json!({"max_tokens": 40}))).count());
        while !beside.is_finished() {
            assert_eq!(
                client::post(server.address, TEXT, &free).ok()["choices"][0]["text"],
                alone
            );
        }
    });
    let metrics = client::get(server.address, "/metrics").text();
    for name in [
        "grammar_requests_total",
        "grammar_compiles_total",
        "grammar_masks_total",
        "grammar_mask_seconds_total",
    ] {
        let line = metrics
            .lines()
            .find(|line| line.starts_with(&format!("tandem:{name}{{")));
        let value: f64 = line
            .and_then(|line| line.rsplit(' ').next()?.parse().ok())
            .unwrap();
        assert!(value > 0.0, "{name}");
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name_and_place() {
    let server = Server::shared();
    let named = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}});
    let schema = "response_format.json_schema.schema";
    #[rustfmt::skip] // one case, one line
    let cases = [
        (named(json!({"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": true}}})), schema, "at #/properties/tags: the keywords [\"uniqueItems\"]"),
        (named(json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"not": {"type": "string"}}}})), schema, "at #/$defs/b: the keywords [\"not\"]"),
        (named(json!({"type": "objekt"})), schema, "objekt"),
        (named(json!(7)), schema, "a JSON Schema is an object"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema", "needs json_schema"),
        (json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}), schema, "has no schema"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "\"xml\""),
        (json!({"response_format": {"type": "text", "schema": {}}}), "response_format.schema", "means nothing"),
        (json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}), "guided_regex", "response_format and guided_regex both"),
        (json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), "structured_outputs.choice", "structured_outputs.regex and structured_outputs.choice both"),
        (json!({"structured_outputs": {}}), "structured_outputs", "must have one of"),
        (json!({"structured_outputs": {"choices": ["a"]}}), "structured_outputs.choices", "did you mean 'choice'?"),
        (json!({"structured_outputs": {"regex": "(?=a)b"}}), "structured_outputs.regex", "cannot be honoured"),
        (json!({"guided_choice": []}), "guided_choice", "nothing to choose from"),
        (json!({"guided_json": "{"}), "guided_json", "not JSON"),
        (json!({"grammar": "root ::= x"}), "grammar", "the rule \"x\" is used but not defined"),
        (json!({"guided_grammar": "start: x"}), "guided_grammar", "x"),
        (json!({"structured_outputs": {"structural_tag": {"format": {"type": "sequence", "elements": [{"type": "tag", "begin": "a"}]}}}}), "structured_outputs.structural_tag.format.elements[0].content", "needs content"),
        (json!({"structured_outputs": {"grammar": "start: \"".to_owned() + &"a".repeat(600_000) + "\""}}), "structured_outputs.grammar", "bytes"),
    ];
    for (extra, param, part) in cases {
        for (path, body) in [
            (CHAT, chat(&server, extra.clone())),
            (TEXT, text(&server, extra.clone())),
        ] {
            let reply = client::post(server.address, path, &body);
            let shown: String = extra.to_string().chars().take(200).collect();
            let error = &reply.json()["error"];
            assert_eq!(reply.status, 400, "{shown}: {error}");
            assert_eq!(error["param"], param, "{shown}: {error}");
            assert!(
                error["message"].as_str().unwrap().contains(part),
                "{shown}: {error}"
            );
        }
    }
}
