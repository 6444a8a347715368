//! Lines and files, good and bad.

use std::io::Write;
use std::path::Path;

use tandem_core::dataset::Group;

use super::records::MAX_ROW_BYTES;
use super::*;

/// A file of this content and name.
fn file(name: &str, bytes: &[u8]) -> (tempfile::NamedTempFile, Source) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let source = Source {
        path: file.path().to_owned(),
        name: name.to_owned(),
    };
    (file, source)
}

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
                seam: Seam::Together,
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
            r#"{"question": 1, "answer": 2}"#,
            "Line 7 has the keys [question, answer]; expected {\"messages\"",
        ),
        (r#"{"prompt": "a"}"#, "Line 7: completion is missing."),
        (
            r#"{"prompt": "a", "completion": 3}"#,
            "completion must be a string, got a number",
        ),
        (r#"{"prompt": "a", "completion": ""}"#, "empty completion"),
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
            passing: _,
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
    let chat = |answer: &str| Row::Answer {
        messages: vec![
            message("user", "a", None),
            message("assistant", "b", Some(0.0)),
            message("user", "c", None),
            message("assistant", answer, None),
        ],
        n_prompt: 3,
        tools: vec![],
    };
    let text = |prompt: &str, completion: &str| Row::Completion {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
        seam: Seam::Together,
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
    let long = format!(r#"{{"text": "{}"}}"#, "a".repeat(MAX_ROW_BYTES));
    let fits = format!(r#"{{"text": "{}"}}"#, "a".repeat(MAX_ROW_BYTES - 13));
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
            format!("{good}\n{{\"messages\": [{}[]]}}\n", "[[]],".repeat(600_000)).into(),
            Err((2, "so many values")),
        ),
        (
            [good.as_bytes(), b"\n{\"text\": \"\xFF\"}"].concat(),
            Err((2, "Line 2 is not UTF-8 text: invalid byte at column 11")),
        ),
    ];
    for (bytes, expected) in cases {
        let (_file, source) = file("rows.jsonl", &bytes);
        match (check(&source), expected) {
            (Ok(rows), Ok(expected)) => assert_eq!(rows, expected),
            (Err(BadLine { line, message, .. }), Err((expected, text))) => {
                assert_eq!(line, expected, "{message}");
                assert!(message.contains(text), "{message}");
            }
            (got, expected) => panic!("{got:?} instead of {expected:?}"),
        }
    }
    let (_file, source) = file("rows.jsonl", format!("{good}\nbad\n{good}").as_bytes());
    let rows: Vec<_> = Rows::open(vec![source], &Reading::default()).unwrap().collect();
    assert_eq!(rows.len(), 2, "nothing after the first error");
    assert_eq!(rows[0].as_ref().map(|(place, _)| place.number), Ok(1));
}

/// Settings as they are asked.
fn reading(settings: Value) -> Result<(Settings, Reading), (&'static str, String)> {
    let settings = settings.as_object().unwrap().clone();
    let settings = tandem_core::settings::read([("", settings)], false).unwrap();
    let reading = Reading::new(&settings)?;
    Ok((settings, reading))
}

fn all(name: &str, bytes: &[u8], settings: Value) -> Result<Vec<Sample>, String> {
    let (_file, source) = file(name, bytes);
    let (_, reading) = reading(settings).map_err(|(name, message)| format!("{name}: {message}"))?;
    let rows = Rows::open(vec![source], &reading).map_err(|bad| bad.message)?;
    rows.map(|row| row.map(|(_, sample)| sample).map_err(|bad| bad.message))
        .collect()
}

fn completion(prompt: &str, completion: &str) -> Sample {
    Sample::Example(Row::Completion {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
        seam: Seam::Together,
    })
}

/// What a template makes of a row.
fn filled(prompt: &str, completion: &str) -> Sample {
    Sample::Example(Row::Completion {
        prompt: prompt.to_owned(),
        completion: completion.to_owned(),
        seam: Seam::Apart,
    })
}

fn text(text: &str) -> Sample {
    Sample::Example(Row::Text {
        text: text.to_owned(),
    })
}

/// Others' trainers say what a row of each format is: torchtune its prompt, TRL its tokens and their mask, `datasets` the rows
/// of a split, Python those of a CSV file (tests/text/make_datasets.py).
#[test]
fn formats_are_what_other_trainers_make_of_them() {
    let fixture: Value = serde_json::from_str(include_str!("../fixture/datasets.json")).unwrap();
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../../server/demo");
    let tokenizer = crate::Tokenizer::open(std::path::Path::new(demo)).unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    for case in list(&fixture["cases"]) {
        let name = &case["name"];
        let (settings, reading) = reading(case["settings"].clone()).unwrap();
        let options = Options::new(
            &settings,
            settings.max_seq_length.unwrap_or(256),
            tandem_core::job::Rows::Examples,
        );
        let lines: String = list(&case["rows"]).iter().map(|row| format!("{row}\n")).collect();
        for (file_name, bytes) in [("a.jsonl", lines), ("a.json", case["rows"].to_string())] {
            let (_file, source) = file(file_name, bytes.as_bytes());
            let mut rows = Rows::open(vec![source], &reading).unwrap();
            let (mut prompts, mut groups) = (vec![], vec![]);
            let each = |sample: &Sample, _: &Group| {
                if let Sample::Example(Row::Completion {
                    prompt, completion, ..
                }) = sample
                {
                    prompts.push(json!({"prompt": prompt, "completion": completion}));
                }
                true
            };
            let keep = |group| {
                groups.push(group);
                Ok(())
            };
            tokenise(&mut rows, &tokenizer, &options, each, keep).unwrap();
            if let Some(expected) = case["pairs"].as_array() {
                assert_eq!(&prompts, expected, "{name}");
            }
            let expected = list(&case["examples"]);
            assert_eq!(groups.len(), expected.len(), "{name}");
            for (group, expected) in groups.iter().zip(&expected) {
                let example = &group.examples[0];
                // What no label follows is not kept; the first token is never predicted.
                let mask: Vec<u64> = list(&expected["mask"])
                    .iter()
                    .map(|n| n.as_u64().unwrap())
                    .collect();
                let kept = mask.iter().rposition(|&learned| learned == 1).unwrap() + 1;
                let tokens: Vec<u64> = list(&expected["tokens"])[..kept]
                    .iter()
                    .map(|n| n.as_u64().unwrap())
                    .collect();
                assert_eq!(
                    example.tokens,
                    tokens.iter().map(|&id| id as u32).collect::<Vec<_>>(),
                    "{name}"
                );
                let learned: Vec<u64> = example
                    .weights
                    .iter()
                    .map(|&weight| u64::from(weight == 1.0))
                    .collect();
                assert_eq!(learned[1..], mask[1..kept], "{name}");
            }
        }
    }
    let lines: String = list(&fixture["splits"]["rows"])
        .iter()
        .map(|row| format!("{row}\n"))
        .collect();
    for part in list(&fixture["splits"]["parts"]) {
        let rows = all("a.jsonl", lines.as_bytes(), json!({"split": part["split"]})).unwrap();
        let expected: Vec<Sample> = list(&part["rows"])
            .iter()
            .map(|row| text(row.as_str().unwrap()))
            .collect();
        assert_eq!(rows, expected, "{}", part["split"]);
    }
    for table in list(&fixture["tables"]) {
        let rows = all("a.csv", table["text"].as_str().unwrap().as_bytes(), json!({})).unwrap();
        let field = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
        let expected: Vec<Sample> = list(&table["rows"])
            .iter()
            .map(|row| completion(&field(row, "prompt"), &field(row, "completion")))
            .collect();
        assert_eq!(rows, expected);
    }
}

#[test]
fn rows_are_found_however_they_lie() {
    let ab = vec![completion("a", "b"), completion("c, d", "e")];
    let chat = Sample::Example(Row::Chat {
        messages: vec![message("user", "a", None), message("assistant", "b", None)],
        tools: vec![],
    });
    let messages = r#"[{""role"":""user"",""content"":""a""},{""role"":""assistant"",""content"":""b""}]"#;
    type Expected = Result<Vec<Sample>, &'static str>;
    let cases: Vec<(&str, String, Value, Expected)> = vec![
        (
            "a.csv",
            "prompt,completion\r\na,b\r\n\"c, d\",e\r\n".into(),
            json!({}),
            Ok(ab.clone()),
        ),
        (
            "a.tsv",
            "\u{FEFF}completion\tprompt\nb\ta\ne\tc, d".into(),
            json!({}),
            Ok(ab.clone()),
        ),
        (
            "A.CSV",
            "prompt;completion\na;b\nc, d;e\n\n".into(),
            json!({}),
            Ok(ab.clone()),
        ),
        (
            "data",
            "prompt,completion\na,b\n\"c, d\",e".into(),
            json!({"dataset_format": "csv"}),
            Ok(ab.clone()),
        ),
        (
            "a.csv",
            format!("messages,id\n\"{messages}\",7\n"),
            json!({}),
            Ok(vec![chat.clone()]),
        ),
        (
            "a.csv",
            "instruction,input,output\nSort.,\"[2, 1]\",\"[1, 2]\"\n".into(),
            json!({"template": "{instruction} {input}="}),
            Ok(vec![filled("Sort. [2, 1]=", "[1, 2]")]),
        ),
        (
            "a.csv",
            "prompt,completion,label\na,b,True\n".into(),
            json!({"objective": "kto"}),
            Ok(vec![Sample::Judged {
                row: Row::Completion {
                    prompt: "a".into(),
                    completion: "b".into(),
                    seam: Seam::Together,
                },
                is_desirable: true,
            }]),
        ),
        (
            "a.csv",
            "prompt,completion\na,b,c\n".into(),
            json!({}),
            Err("Row 1 (before line 3) has 3 fields, the header 2"),
        ),
        (
            "a.csv",
            "prompt,completion\na,\"b\n".into(),
            json!({}),
            Err("a quote of the record of line 2 is never closed"),
        ),
        (
            "a.csv",
            "prompt,completion\na,\"b\"c\n".into(),
            json!({}),
            Err("behind a closing quote comes 'c'"),
        ),
        (
            "a.csv",
            "prompt,prompt\na,b\n".into(),
            json!({}),
            Err("\"prompt\" is there twice"),
        ),
        (
            "a.csv",
            "messages,id\n\"[\",7\n".into(),
            json!({}),
            Err("the column messages holds no JSON"),
        ),
        (
            "a.txt",
            "one\n\ntwo, three\n".into(),
            json!({}),
            Ok(vec![text("one"), text("two, three")]),
        ),
        (
            "a.txt",
            "\none\ntwo\n\n\nthree".into(),
            json!({"sample_by": "paragraph"}),
            Ok(vec![text("one\ntwo"), text("three")]),
        ),
        (
            "a.txt",
            "one\n\ntwo\n".into(),
            json!({"sample_by": "document"}),
            Ok(vec![text("one\n\ntwo\n")]),
        ),
        (
            "a.txt",
            "{\"text\": \"a\"}\n".into(),
            json!({}),
            Ok(vec![text("a")]),
        ),
        (
            "a.txt",
            "{\"text\": \"a\"}\n".into(),
            json!({"dataset_format": "text"}),
            Ok(vec![text("{\"text\": \"a\"}")]),
        ),
        (
            "a.json",
            "\n [ {\"text\": \"a ] \\\" }\"} ,\n{\"text\": \"b\"}]\n".into(),
            json!({}),
            Ok(vec![text("a ] \" }"), text("b")]),
        ),
        ("a.jsonl", "[]".into(), json!({}), Ok(vec![])),
        (
            "a.json",
            "[{\"text\": \"a\"},]".into(),
            json!({}),
            Err("Row 2 is missing"),
        ),
        (
            "a.json",
            "[{\"text\": \"a\"}".into(),
            json!({}),
            Err("the file is cut off"),
        ),
        (
            "a.json",
            "[{\"text\": \"a\"}] {}".into(),
            json!({}),
            Err("more follows"),
        ),
        (
            "a.json",
            "[1]".into(),
            json!({}),
            Err("Row 1 is not a dictionary"),
        ),
        (
            "a.json",
            "[{\"text\": \"a\"}]".into(),
            json!({"dataset_format": "jsonl"}),
            Err("the file is a JSON array: leave dataset_format out"),
        ),
        (
            "a.parquet",
            "PAR1".into(),
            json!({}),
            Err("The Parquet file cannot be read"),
        ),
        (
            "a.parquet",
            "PAR1 and what is no Parquet behind it PAR1".into(),
            json!({}),
            Err("The Parquet file cannot be read"),
        ),
        (
            "a.parquet",
            "PAR1".into(),
            json!({"dataset_format": "csv"}),
            Err("the file is Parquet: leave dataset_format out"),
        ),
        (
            "a.jsonl",
            "{\"text\": \"a\"}".into(),
            json!({"dataset_format": "parquet"}),
            Err("does not begin as one"),
        ),
        ("notes", "hello".into(), json!({}), Err("JSONL format")),
    ];
    for (name, content, settings, expected) in cases {
        let got = all(name, content.as_bytes(), settings.clone());
        match expected {
            Ok(rows) => assert_eq!(got.as_ref(), Ok(&rows), "{name} {settings}: {content}"),
            Err(text) => {
                let message = got.unwrap_err();
                assert!(message.contains(text), "{name}: {message}");
            }
        }
    }
    let (_one, one) = file("one.jsonl", br#"{"text": "a"}"#);
    let (_two, two) = file("two.csv", b"text\nb\n");
    let (_bad, bad) = file("bad.jsonl", br#"{"prompt": "a", "completion": "b"}"#);
    let mut rows = Rows::open(vec![one.clone(), two.clone()], &Reading::default()).unwrap();
    let samples: Vec<Sample> = rows.by_ref().map(|row| row.unwrap().1).collect();
    assert_eq!(
        (samples, rows.formats().as_str()),
        (vec![text("a"), text("b")], "JSONL, CSV")
    );
    let rows = Rows::open(vec![one, bad], &Reading::default()).unwrap();
    let message = rows.last().unwrap().unwrap_err().message;
    assert!(
        message.starts_with("bad.jsonl: ") && message.contains("line 1 of one.jsonl the shape"),
        "{message}"
    );
}

/// Files of tests/text/make_parquet.py, and their rows as pyarrow reads them.
#[test]
fn rows_of_parquet_files_are_those_that_pyarrow_reads() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/fixture/parquet");
    let expected = std::fs::read(folder.join("rows.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    let files = expected["files"].as_object().unwrap();
    assert!(files.len() > 6);
    let records = |path: &Path| {
        let records = Records::open(&Source::from(path), None, SampleBy::default())?;
        assert_eq!(records.format, Format::Parquet);
        records
            .map(|record| record.map(|(_, row)| Value::Object(row)))
            .collect::<Result<Vec<Value>, BadLine>>()
    };
    let scratch = tempfile::tempdir().unwrap();
    for (name, rows) in files {
        let read = records(&folder.join(name)).unwrap();
        assert_eq!(&Value::Array(read), rows, "{name}");
        // Damaged anywhere, it is refused or read, and never ends the program.
        let bytes = std::fs::read(folder.join(name)).unwrap();
        let damaged = scratch.path().join(name);
        for at in (4..bytes.len()).step_by(bytes.len() / 40) {
            let mut other = bytes.clone();
            other[at] ^= 0x55;
            std::fs::write(&damaged, &other).unwrap();
            let _ = records(&damaged);
            std::fs::write(&damaged, &bytes[..at]).unwrap();
            assert!(records(&damaged).is_err(), "{name} cut at {at}");
        }
    }
    let samples = all_of(&folder.join("calls.parquet"));
    let [Sample::Example(Row::Chat { messages, .. }), _] = &samples[..] else {
        panic!("{samples:?}")
    };
    assert!(messages[1].fields.contains_key("tool_calls"));
    assert_eq!(all_of(&folder.join("datasets.parquet")).len(), 5);
}

fn all_of(path: &Path) -> Vec<Sample> {
    let rows = Rows::open(vec![Source::from(path)], &Reading::default()).unwrap();
    rows.map(|row| row.unwrap().1).collect()
}

#[test]
fn columns_are_read_by_template_and_map() {
    let row =
        |row: &str, settings: Value| all("a.jsonl", row.as_bytes(), settings).map(|mut rows| rows.remove(0));
    let chat = |first: &[Message]| {
        let turns = [message("user", "a", None), message("assistant", "b", None)];
        Sample::Example(Row::Chat {
            messages: first.iter().cloned().chain(turns).collect(),
            tools: vec![],
        })
    };
    let qa = r#"{"q": "a", "a": "b", "n": 3}"#;
    let cases: Vec<(&str, Value, Result<Sample, &str>)> = vec![
        (
            qa,
            json!({"column_map": {"prompt": "q", "completion": "a"}}),
            Ok(completion("a", "b")),
        ),
        (
            qa,
            json!({"template": "Q{{{n}}}: {q}\nA:", "column_map": {"output": "a"}}),
            Ok(filled("Q{3}: a\nA:", "b")),
        ),
        (qa, json!({"dataset_text_field": "q"}), Ok(text("a"))),
        (
            qa,
            json!({"template": "Q: {q}"}),
            Err("has no column output for the template, but [q, a, n]: say which it is with column_map"),
        ),
        (
            qa,
            json!({"column_map": {"prompt": "x", "completion": "a"}}),
            Err("has no column x, which is to be prompt"),
        ),
        (
            qa,
            json!({"template": "nothing"}),
            Err("there is no template \"nothing\": give a text with {columns} in it, or one of alpaca, "),
        ),
        (qa, json!({"template": "{}"}), Err("is no column")),
        (
            qa,
            json!({"template": "{a} }"}),
            Err("a closing brace stands alone"),
        ),
        (
            qa,
            json!({"dataset_text_field": "q", "template": "{q}"}),
            Err("leave one of them out"),
        ),
        (qa, json!({"split": "test"}), Err("a file is one split")),
        (qa, json!({"split": "train[1%"}), Err("such as train[:1%]")),
        (qa, json!({"split": "train[:200%]"}), Err("such as train[:1%]")),
        (
            r#"{"dialogue": "a", "summary": "b", "id": 1}"#,
            json!({"template": "samsum_dataset"}),
            Ok(filled("Summarize this dialog:\na\n---\nSummary:\n", "b")),
        ),
        (
            r#"{"input": "a", "target": "b"}"#,
            json!({"template": "grammar_dataset"}),
            Ok(filled(
                "Correct this to standard English: a\n---\nCorrected: ",
                "b",
            )),
        ),
        (
            r#"{"a": "b", "output": "c", "weight": 0}"#,
            json!({"template": "{a}"}),
            Err("weight: a row counts once"),
        ),
        (
            r#"{"a": null, "output": "c"}"#,
            json!({"template": "{a}"}),
            Err("has no column a"),
        ),
        (
            r#"{"a": ["x"], "output": "c"}"#,
            json!({"template": "{a}"}),
            Err("must be a string, got an array"),
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "id": "x"}"#,
            json!({}),
            Ok(chat(&[message("system", "s", None)])),
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}, {"from": "gpt", "value": "b", "train": true}]}"#,
            json!({}),
            Ok(Sample::Example(Row::Chat {
                messages: vec![
                    message("user", "a", None),
                    message("assistant", "b", Some(0.0)),
                    message("assistant", "b", None),
                ],
                tools: vec![],
            })),
        ),
        (
            r#"{"conversations": [{"from": "function_call", "value": "a"}]}"#,
            json!({}),
            Err("got \"function_call\""),
        ),
        (
            r#"{"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}"#,
            json!({}),
            Ok(chat(&[])),
        ),
        (
            r#"{"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "x": 1}"#,
            json!({"column_map": {"messages": "dialog"}}),
            Ok(chat(&[])),
        ),
        // Columns that the template reads are read, whatever they are called.
        (
            r#"{"system_prompt": "s", "question": "q", "response": "r"}"#,
            json!({"template": "{system_prompt}{question}", "column_map": {"output": "response"}}),
            Ok(filled("sq", "r")),
        ),
        (
            r#"{"system": "s", "question": "q", "response": "r"}"#,
            json!({"column_map": {"prompt": "question", "completion": "response"}}),
            Err("column_map={system: ''} leaves it out"),
        ),
        (
            r#"{"system": "s", "question": "q", "response": "r"}"#,
            json!({"column_map": {"prompt": "question", "completion": "response", "system": ""}}),
            Ok(completion("q", "r")),
        ),
        // The first turn a second time; another text beside the messages, until it is said what is read.
        (
            r#"{"prompt": "a", "prompt_id": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
            json!({}),
            Ok(chat(&[])),
        ),
        (
            r#"{"prompt": "c", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
            json!({}),
            Err("column_map={messages: messages} reads the first alone"),
        ),
        (
            r#"{"prompt": "c", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
            json!({"column_map": {"messages": "messages"}}),
            Ok(chat(&[])),
        ),
        (
            r#"{"text": "a", "label": 0}"#,
            json!({"dataset_text_field": "text"}),
            Ok(text("a")),
        ),
        (r#"{"text": ""}"#, json!({}), Ok(text(""))),
    ];
    for (line, settings, expected) in cases {
        let got = row(line, settings.clone());
        match expected {
            Ok(sample) => assert_eq!(got, Ok(sample), "{line} {settings}"),
            Err(text) => {
                let message = got.unwrap_err();
                assert!(message.contains(text), "{line} {settings}: {message}");
            }
        }
    }
    // An upload waits for what a job says of its columns; what no job could read is refused at once.
    for (line, is_taken) in [
        (r#"{"document": "a", "summary": "b", "id": 1}"#, true),
        (r#"{"prompt": "a", "answer": "b"}"#, true),
        (r#"{"text": "a", "summary": "b"}"#, true),
        (r#"{"question": "a"}"#, false),
        (
            r#"{"system_prompt": "s", "question": "q", "response": "r"}"#,
            true,
        ),
        (
            r#"{"system": "s", "question": "q", "chosen": "a", "rejected": "b"}"#,
            true,
        ),
        (
            r#"{"prompt": "c", "messages": [{"role": "user", "content": "a"}]}"#,
            true,
        ),
        (r#"{"prompt": "a", "completion": ""}"#, false),
        (
            r#"{"mesages": [{"role": "user", "content": "a"}], "x": "a", "y": "b"}"#,
            false,
        ),
    ] {
        let (_file, source) = file("a.jsonl", line.as_bytes());
        assert_eq!(check(&source).is_ok(), is_taken, "{line}");
    }
}

/// Tokens are handed on row by row, and one huge row is refused before it is tokenized.
#[test]
fn a_data_set_is_never_whole_in_memory() {
    let tokenizer = crate::fixture::demo();
    let options = Options {
        max_seq_length: 4,
        wraps: false,
        prompt_loss_weight: 0.0,
        train_on_input: false,
        rows: tandem_core::job::Rows::Examples,
    };
    let kept = std::cell::Cell::new(0);
    let text = |text: String| Ok((Place::line(kept.get() + 1), Sample::Example(Row::Text { text })));
    let keep = |_: Group| {
        kept.set(kept.get() + 1);
        Ok(())
    };
    for wraps in [false, true] {
        kept.set(0);
        let options = Options { wraps, ..options };
        let rows = (0..3u64).map(|n| {
            assert!(kept.get() >= n, "row {n} comes before the one before was kept");
            text("one two three four five six".to_owned())
        });
        let statistics = tokenise(rows, &tokenizer, &options, |_, _| true, keep).unwrap();
        assert_eq!((statistics.rows, statistics.examples), (3, kept.get()));
        assert_eq!(statistics.cut, if wraps { 0 } else { 3 });
    }
    let huge = "a ".repeat((4 << 20) / 2 + 1);
    for row in [
        Row::Text { text: huge.clone() },
        Row::Completion {
            prompt: huge.clone(),
            completion: "b".to_owned(),
            seam: Seam::Together,
        },
    ] {
        let row = std::iter::once(Ok((Place::line(7), Sample::Example(row))));
        let error = tokenise(row, &tokenizer, &options, |_, _| true, |_| Ok(())).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("Line 7: its text has 419430") && error.contains("at most 4194304"),
            "{error}"
        );
    }
}
