//! Lines and files, good and bad.

use super::*;

fn message(role: &str, content: &str, weight: Option<f32>) -> Message {
    Message {
        weight,
        ..Message::new(role, content)
    }
}

fn called(id: &str, more: Value) -> Message {
    let call = json!([{"id": id, "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]);
    let mut fields = more.as_object().unwrap().clone();
    fields.insert("tool_calls".to_owned(), call);
    Message {
        content: None,
        fields,
        ..message("assistant", "", None)
    }
}

fn answered(id: &str, more: Value) -> Message {
    let mut fields = more.as_object().unwrap().clone();
    fields.insert("tool_call_id".to_owned(), json!(id));
    Message {
        fields,
        ..message("tool", "7", None)
    }
}

#[test]
fn rows_of_each_shape() {
    let cases = [
        (
            r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},{"role":"assistant","content":"c","weight":0},{"role":"assistant","content":"d","weight":1}], "tools": null, "id": 7}"#,
            Row::Chat {
                messages: vec![
                    message("system", "s", None),
                    Message {
                        content: Some(Content::Parts(vec!["a".to_owned(), "b".to_owned()])),
                        ..message("user", "", None)
                    },
                    message("assistant", "c", Some(0.0)),
                    message("assistant", "d", Some(1.0)),
                ],
                tools: vec![],
            },
        ),
        (
            r#"{"tools": [{"type": "function", "function": {"name": "f", "strict": true}}], "parallel_tool_calls": false, "messages": [{"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "7"}]}"#,
            Row::Chat {
                messages: vec![
                    called("1", json!({"reasoning_content": "hm"})),
                    answered("1", json!({})),
                ],
                tools: vec![json!({"type": "function", "function": {"name": "f"}})],
            },
        ),
        (
            r#"{"functions": [{"name": "f"}], "messages": [{"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{\"a\":1}"}}, {"role": "function", "name": "f", "content": "7"}]}"#,
            Row::Chat {
                messages: vec![
                    called("call00000", json!({})),
                    answered("call00000", json!({"name": "f"})),
                ],
                tools: vec![json!({"type": "function", "function": {"name": "f"}})],
            },
        ),
        (
            r#"{"prompt": "", "completion": " c\n"}"#,
            Row::Completion {
                prompt: String::new(),
                completion: " c\n".to_owned(),
            },
        ),
        (
            r#" {"text": "\u00e9"} "#,
            Row::Text {
                text: "é".to_owned()
            },
        ),
    ];
    for (line, row) in cases {
        assert_eq!(parse_line(1, line), Ok(Sample::Example(row)));
    }
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let cases = [
        (
            "hello",
            "Line 7 is not a dictionary (HINT: line starts with: \"hello...\"). Error: line contains invalid json",
        ),
        ("[{\"text\": 1}]", "It is a JSON array"),
        ("{", "JSON spread over lines"),
        (
            "3",
            "Line 7 is not a dictionary (HINT: line starts with: \"3...\").",
        ),
        (r#"{"text": "a" "b"}"#, "expected `,` or `}` at line 1 column 14"),
        (
            r#"{"instruction": 1, "output": 2}"#,
            "Line 7 has the keys [instruction, output]; expected {\"messages\"",
        ),
        (r#"{"prompt": "a"}"#, "Line 7: completion is missing."),
        (
            r#"{"prompt": "a", "completion": 3}"#,
            "completion must be a string, got a number",
        ),
        (r#"{"prompt": "a", "completion": ""}"#, "empty completion"),
        (r#"{"text": ""}"#, "empty text"),
        (r#"{"text": "a", "prompt": "b"}"#, "mixes shapes"),
        (
            r#"{"input": {}, "preferred_output": []}"#,
            "Line 7: non_preferred_output is missing.",
        ),
        (
            r#"{"input": {"messages": [{"role":"user","content":"a"}]}, "preferred_output": [{"role":"user","content":"a"}], "non_preferred_output": []}"#,
            "Line 7, preferred_output: an answer must have a message from the assistant",
        ),
        (r#"{"chosen": "a", "prompt": "b"}"#, "one of them is missing"),
        (
            r#"{"chosen": "a", "rejected": [], "prompt": "b"}"#,
            "got a string, a string and an array",
        ),
        (
            r#"{"chosen": [{"role":"assistant","content":"a"}], "rejected": [{"role":"assistant","content":"b"}]}"#,
            "there is no prompt",
        ),
        (
            r#"{"prompt": "a", "chosen": "", "rejected": "b"}"#,
            "chosen is empty",
        ),
        (
            r#"{"prompt": "a", "chosen": "c", "rejected": "b", "label": true}"#,
            "label",
        ),
        (
            r#"{"prompt": "a", "completion": "c", "label": 3}"#,
            "true or false, got 3",
        ),
        (
            r#"{"prompt": "a", "completion": "c", "reward": "good"}"#,
            "must be a number",
        ),
        (
            r#"{"prompt": "a", "completion": [{"role":"assistant","content":"a"}]}"#,
            "prompt must be a list of messages",
        ),
        (
            r#"{"messages": [{"role": "assistant", "content": "a"}], "tools": [{}]}"#,
            "Line 7: tools[0].function is missing.",
        ),
        (r#"{"messages": "hi"}"#, "messages must be an array, got a string"),
        (r#"{"messages": []}"#, "at least one from the assistant"),
        (
            r#"{"messages": [{"role":"assistant","content":"a","weight":0}]}"#,
            "at least one from the assistant",
        ),
        (
            r#"{"messages": [{"role":"user","content":"a"}, 3]}"#,
            "Line 7, message 2: a message must be a dictionary",
        ),
        (
            r#"{"messages": [{"content":"a"}]}"#,
            "Line 7, message 1: Discriminator 'role' is missing in value.",
        ),
        (
            r#"{"messages": [{"role":"bot","content":"a"}]}"#,
            "role must be one of system, developer, user, assistant, tool, function, got \"bot\"",
        ),
        (r#"{"messages": [{"role":"assistant"}]}"#, "content is missing"),
        (
            r#"{"messages": [{"role":"assistant","content":null}]}"#,
            "array of text parts, got null",
        ),
        (
            r#"{"messages": [{"role":"assistant","tool_calls":[{}]}]}"#,
            "message 1: tool_calls[0].function.name is missing.",
        ),
        (
            r#"{"messages": [{"role":"user","content":[{"type":"image_url"}]}]}"#,
            "parts of type image_url",
        ),
        (
            r#"{"messages": [{"role":"user","content":"a","weight":1}]}"#,
            "weight is for assistant messages",
        ),
        (
            r#"{"messages": [{"role":"assistant","content":"a","weight":0.5}]}"#,
            "weight must be 0 or 1, got 0.5",
        ),
    ];
    for (line, expected) in cases {
        let BadLine {
            line: number,
            message,
        } = parse_line(7, line).unwrap_err();
        assert_eq!(number, 7);
        assert!(message.contains(expected), "{line}: {message}");
        assert!(message.contains("ine 7"), "{message}");
    }
}

/// What asks for what is done anyway, or says nothing of it, passes; what means something else is named.
#[test]
fn every_key_is_honoured_harmless_or_refused() {
    let row = |key: &str| format!(r#"{{"prompt": "a", "completion": "b", {key}}}"#);
    let turn = |key: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b", {key}}},
                {{"role": "assistant", "content": "c"}}]}}"#
        )
    };
    let asked = |key: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "a", {key}}}, {{"role": "assistant", "content": "b"}}]}}"#
        )
    };
    let part = |key: &str| {
        format!(
            r#"{{"messages": [{{"role": "assistant", "content": [{{"type": "text", "text": "b", {key}}}]}}]}}"#
        )
    };
    let good = [
        row(r#""id": 7, "source": "x", "metadata": {"a": 1}"#),
        row(r#""label": true"#),
        row(r#""weight": 1, "train": true, "masked": false"#),
        row(r#""tools": [], "images": [], "chat_template_kwargs": {}, "system": """#),
        row(r#""rejected": null, "zzz": null"#),
        turn(r#""train": true, "masked": false, "loss": 1"#),
        turn(r#""weight": 0, "train": false"#),
        turn(r#""tool_calls": [], "refusal": null, "function_call": null, "audio": null"#),
        turn(r#""reasoning_content": "", "id": "m1""#),
        asked(r#""weight": 0, "train": false, "name": "ada""#),
        part(r#""cache_control": {"type": "ephemeral"}"#),
    ];
    for line in good {
        assert!(parse_line(1, &line).is_ok(), "{line}: {:?}", parse_line(1, &line));
    }
    let bad = [
        (row(r#""rejected": "c""#), "one of them is missing"),
        (
            row(r#""chosen_messages": []"#),
            "a preference is written as prompt",
        ),
        (row(r#""score": 3"#), "written as reward"),
        (
            row(r#""weight": 0"#),
            "weight: a row counts once and whole: leave the line out",
        ),
        (row(r#""weight": 0.5"#), "weight: a row counts once"),
        (row(r#""train": false"#), "train: a row counts once"),
        (row(r#""masked": true"#), "masked: a row counts once"),
        (row(r#""system": "Be brief.""#), "system: write it as a message"),
        (row(r#""images": ["x.png"]"#), "only text"),
        (row(r#""chat_template_kwargs": {"a": 1}"#), "without variables"),
        (row(r#""labels": [1]"#), "tokens and their weights are made here"),
        (
            row(r#""message": []"#),
            "nothing reads the key \"message\"; did you mean messages?",
        ),
        (row(r#""zzz": 1"#), "Rename or remove it."),
        (
            turn(r#""train": false"#),
            "Line 7, message 2: train: this turn is learned; \"weight\": 0",
        ),
        (turn(r#""loss": false"#), "loss: this turn is learned"),
        (turn(r#""masked": true"#), "masked: this turn is learned"),
        (
            turn(r#""weight": 0, "train": true"#),
            "train: this turn is not learned",
        ),
        (turn(r#""weigth": 0"#), "did you mean weight?"),
        (
            turn(r#""tool_calls": [{}]"#),
            "tool_calls[0].function.name is missing",
        ),
        (
            turn(r#""tool_calls": [{"function": {"name": "f"}}], "function_call": {"name": "f"}"#),
            "one of them is allowed",
        ),
        (
            turn(r#""function_call": {"name": "f", "arguments": "{"}"#),
            "function_call.arguments is not JSON",
        ),
        (
            turn(r#""reasoning_content": 7"#),
            "reasoning_content must be a string",
        ),
        (
            turn(r#""tool_call_id": "x""#),
            "tool_call_id is for tool messages, not for assistant",
        ),
        (
            row(r#""tool_choice": "required""#),
            "tool_choice: it binds the answer to a request",
        ),
        (
            row(r#""tools": [], "functions": {}"#),
            "functions must be an array",
        ),
        (
            row(r#""tools": [{"function": {"name": "f"}}], "functions": [{"name": "f"}]"#),
            "only one of them is allowed",
        ),
        (turn(r#""refusal": "no""#), "refusal: only text"),
        (
            asked(r#""train": true"#),
            "message 1: train: this turn is not learned",
        ),
        (
            asked(r#""tool_calls": [{"function": {"name": "f"}}]"#),
            "tool_calls is for assistant messages, not for user",
        ),
        (
            asked(r#""reasoning_content": "x""#),
            "reasoning_content is for assistant messages, not for user",
        ),
        (
            part(r#""weight": 0"#),
            "in a text part, nothing reads the key \"weight\"",
        ),
    ];
    for (line, expected) in bad {
        let message = parse_line(7, &line).unwrap_err().message;
        assert!(
            message.contains(expected) && message.contains("ine 7"),
            "{line}: {message}"
        );
    }
}

#[test]
fn preferences_are_read_in_every_form() {
    let chat = |answer: &str| Row::Chat {
        messages: vec![
            message("user", "a", None),
            message("assistant", "b", Some(0.0)),
            message("user", "c", None),
            message("assistant", answer, None),
        ],
        tools: vec![],
    };
    let text = |prompt: &str, completion: &str| Row::Completion {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
    };
    let pair = |chosen, rejected| Sample::Pair { chosen, rejected };
    let prompt =
        r#"{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}"#;
    let [good, bad] = ["good", "bad"].map(|text| format!(r#"{{"role":"assistant","content":"{text}"}}"#));
    let cases = [
        (
            format!(
                r#"{{"input":{{"messages":[{prompt}],"tools":[],"parallel_tool_calls":true}},"preferred_output":[{good}],"non_preferred_output":[{bad}]}}"#
            ),
            pair(chat("good"), chat("bad")),
        ),
        (
            format!(
                r#"{{"input":{{"messages":[{prompt}]}},"preferred_completion":[{good}],"non_preferred_completion":[{bad}]}}"#
            ),
            pair(chat("good"), chat("bad")),
        ),
        (
            format!(r#"{{"prompt":[{prompt}],"chosen":[{good}],"rejected":[{bad}],"id":3}}"#),
            pair(chat("good"), chat("bad")),
        ),
        (
            format!(
                r#"{{"prompt":"c","chosen":[{prompt},{good}],"rejected":[{prompt},{bad}],"messages":[],"score_chosen":9}}"#
            ),
            pair(chat("good"), chat("bad")),
        ),
        (
            r#"{"prompt":"Q: ","chosen":"yes","rejected":"no"}"#.to_owned(),
            pair(text("Q: ", "yes"), text("Q: ", "no")),
        ),
        (
            r#"{"chosen":"Human: hi Assistant: yes","rejected":"Human: hi Assistant: no"}"#.to_owned(),
            pair(
                text("Human: hi Assistant:", " yes"),
                text("Human: hi Assistant:", " no"),
            ),
        ),
        (
            r#"{"prompt":"Q: ","completion":"yes","label":false}"#.to_owned(),
            Sample::Judged {
                row: text("Q: ", "yes"),
                is_desirable: false,
            },
        ),
        (
            format!(r#"{{"prompt":[{prompt}],"completion":[{good}],"label":1}}"#),
            Sample::Judged {
                row: chat("good"),
                is_desirable: true,
            },
        ),
        (
            format!(r#"{{"messages":[{prompt},{good}],"reward":-0.5}}"#),
            Sample::Rewarded {
                row: Row::Chat {
                    messages: vec![
                        message("user", "a", None),
                        message("assistant", "b", None),
                        message("user", "c", None),
                        message("assistant", "good", None),
                    ],
                    tools: vec![],
                },
                reward: -0.5,
            },
        ),
        (
            format!(r#"{{"prompt":[{prompt}],"completion":[{good}]}}"#),
            Sample::Example(chat("good")),
        ),
    ];
    for (line, sample) in cases {
        assert_eq!(parse_line(1, &line), Ok(sample), "{line}");
    }
}

#[test]
fn files_are_checked_line_by_line() {
    let good = r#"{"text": "a"}"#;
    let pair = r#"{"prompt": "a", "completion": "b"}"#;
    let long = format!(r#"{{"text": "{}"}}"#, "a".repeat(MAX_LINE_BYTES));
    let fits = format!(r#"{{"text": "{}"}}"#, "a".repeat(MAX_LINE_BYTES - 13));
    /// Rows, or the line and a part of the message.
    type Expected = Result<u64, (u64, &'static str)>;
    let cases: Vec<(Vec<u8>, Expected)> = vec![
        (format!("{good}\n{good}").into(), Ok(2)),
        (format!("\u{FEFF}{good}\r\n{good}\r\n\r\n \n").into(), Ok(2)),
        (fits.into(), Ok(1)),
        (b"".to_vec(), Err((1, "empty"))),
        (b"\n\n".to_vec(), Err((1, "empty"))),
        (format!("{good}\n\n{good}").into(), Err((2, "Line 2 is blank"))),
        (format!("{good}\n{pair}\n").into(), Err((2, "one shape"))),
        (format!("{good}\n{long}\n").into(), Err((2, "longer than"))),
        (
            [good.as_bytes(), b"\n{\"text\": \"\xFF\"}"].concat(),
            Err((2, "Line 2 is not UTF-8 text: invalid byte at column 11")),
        ),
    ];
    for (bytes, expected) in cases {
        match (check_jsonl(bytes.as_slice()), expected) {
            (Ok(Summary { rows, kind }), Ok(expected)) => {
                assert_eq!((rows, kind), (expected, Kind::Text))
            }
            (Err(BadLine { line, message }), Err((expected, text))) => {
                assert_eq!(line, expected, "{message}");
                assert!(message.contains(text), "{message}");
            }
            (got, expected) => panic!("{got:?} instead of {expected:?}"),
        }
    }
    let rows: Vec<_> = read_rows(format!("{good}\nbad\n{good}").as_bytes()).collect();
    assert_eq!(rows.len(), 2, "nothing after the first error");
    assert_eq!(rows[0].as_ref().map(|(line, _)| *line), Ok(1));
}
