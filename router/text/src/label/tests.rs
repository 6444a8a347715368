//! Which tokens of a row carry loss.

use super::*;
use crate::dataset::parse_line;
use crate::fixture;
use crate::tokenizer::Skip;

const OPTIONS: Options = Options {
    max_seq_length: 512,
    wraps: false,
    prompt_loss_weight: 0.0,
    train_on_input: false,
    rows: Rows::Examples,
};
const LLAMA2: &str = include_str!("../fixture/llama2.jinja");
const LLAMA3: &str = include_str!("../fixture/llama3.jinja");
const CHATML: &str = include_str!("../fixture/chatml.jinja");
const ZEPHYR: &str = include_str!("../fixture/zephyr.jinja");
const TOOLS: &str = include_str!("../fixture/tools.jinja");
const THINKING: &str = include_str!("../fixture/thinking.jinja");
/// Writes no end of turn at all.
const OPEN: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";

fn tokens_of(row: &Row, tokenizer: &Tokenizer, options: &Options) -> Result<Example, TextError> {
    cut(whole(row, tokenizer, options)?, options)
}

fn row(json: &str) -> Row {
    match parse_line(1, json).unwrap() {
        Sample::Example(row) => row,
        other => panic!("{other:?} is more than an example"),
    }
}

/// The text of each run of tokens with weight 1.
fn learned(example: &Example, tokenizer: &Tokenizer) -> Vec<String> {
    let pairs: Vec<(u32, bool)> = example
        .tokens
        .iter()
        .zip(&example.weights)
        .map(|(&token, &weight)| (token, weight == 1.0))
        .collect();
    let runs = pairs.chunk_by(|a, b| a.1 == b.1).filter(|run| run[0].1);
    runs.map(|run| {
        let bytes: Vec<u8> = run
            .iter()
            .flat_map(|(token, _)| tokenizer.token_bytes(*token))
            .collect();
        String::from_utf8(bytes).expect("whole characters")
    })
    .collect()
}

#[test]
fn loss_is_on_assistant_turns_with_their_end() {
    let chat = r#"{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"2+2?"},
        {"role":"assistant","content":"It is 4."},{"role":"user","content":"Größe"},
        {"role":"assistant","content":"the 👋🏽"},{"role":"user","content":"Hello!"}]}"#;
    let weightless = chat.replacen("It is 4.\"", "It is 4.\",\"weight\":0", 1);
    let cases = [
        (CHATML, chat, vec!["It is 4.<|im_end|>", "the 👋🏽<|im_end|>"]),
        (CHATML, &weightless, vec!["the 👋🏽<|im_end|>"]),
        (LLAMA2, chat, vec![" It is 4. </s>", " the 👋🏽 </s>"]),
        (ZEPHYR, chat, vec!["It is 4.</s>", "the 👋🏽</s>"]),
    ];
    for (template, json, expected) in cases {
        let tokenizer = fixture::byte_level(template);
        let example = tokens_of(&row(json), &tokenizer, &OPTIONS).unwrap();
        assert_eq!(learned(&example, &tokenizer), expected);
        assert_eq!(
            example.weights.last(),
            Some(&1.0),
            "nothing is kept after the last label"
        );
    }
}

/// Before each learned turn stand exactly the tokens that a chat request gets as its prompt.
#[test]
fn the_prompt_is_what_serving_sends() {
    let Row::Chat { messages, .. } = row(
        r#"{"messages":[{"role":"user","content":"What is 2+2?"},{"role":"assistant","content":"It is 4."},
            {"role":"user","content":"And the fox?"},{"role":"assistant","content":"The fox laughs"}]}"#,
    ) else {
        panic!("a chat row")
    };
    for template in [CHATML, LLAMA2, ZEPHYR] {
        let tokenizer = fixture::byte_level(template);
        let Example { tokens, weights } = tokens_of(
            &Row::Chat {
                messages: messages.clone(),
                tools: vec![],
            },
            &tokenizer,
            &OPTIONS,
        )
        .unwrap();
        // What is too long is not tokenized, whatever made it so.
        let closed = |most| tokenizer.encode_chat(&messages, Ending::Closed, &Kwargs::new(), most);
        assert!(matches!(closed(9), Err(TextError::Refused(_))) && closed(999).is_ok());
        for (i, turn) in [(1, 0), (3, 1)] {
            let prompt = tokenizer
                .encode_chat(
                    &messages[..i],
                    Ending::GenerationPrompt,
                    &Kwargs::new(),
                    usize::MAX,
                )
                .unwrap();
            assert_eq!(tokens[..prompt.len()], prompt, "turn {turn}");
            assert_eq!(
                (weights[prompt.len() - 1], weights[prompt.len()]),
                (0.0, 1.0),
                "turn {turn}"
            );
        }
    }
}

/// The loss is on what the model writes: calls as the template writes them, reasoning before them.
#[test]
fn calls_and_reasoning_are_learned() {
    let tool = r#"{"type":"function","function":{"name":"look","parameters":{"type":"object","properties":{"at":{"type":"string"}}}}}"#;
    let call = |n: u32| {
        format!(
            r#"{{"id":"c{n}","type":"function","function":{{"name":"look","arguments":"{{\"at\":\"fox {n}\"}}"}}}}"#
        )
    };
    let json = format!(
        r#"{{"tools":[{tool}],"messages":[{{"role":"user","content":"Look!"}},
        {{"role":"assistant","content":null,"reasoning_content":"hm","tool_calls":[{},{}]}},
        {{"role":"tool","tool_call_id":"c1","content":"a fox"}},{{"role":"tool","tool_call_id":"c2","content":"no"}},
        {{"role":"assistant","content":"One fox."}}]}}"#,
        call(1),
        call(2)
    );
    let tokenizer = fixture::byte_level(TOOLS);
    let example = tokens_of(&row(&json), &tokenizer, &OPTIONS).unwrap();
    let expected = [
        "<think>hm</think>\n<call look>\n  at=fox 1</call>\n<call look>\n  at=fox 2</call></assistant>\n",
        "One fox.</assistant>\n</s>",
    ];
    assert_eq!(learned(&example, &tokenizer), expected);
    let text = tokenizer.decode(&example.tokens, Skip::Nothing).unwrap();
    assert!(text.starts_with("<system>\n<tool name=\"look\">"), "{text}");
    // What the template cannot write would be left out in silence.
    let refused =
        |template: &str, row: &Row| tokens_of(row, &fixture::byte_level(template), &OPTIONS).unwrap_err();
    assert_eq!(refused(CHATML, &row(&json)), TextError::NoTools);
    let thought = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","reasoning_content":"hm"}]}"#;
    assert_eq!(
        refused(CHATML, &row(thought)),
        TextError::UnreadReasoning { message: 2 }
    );
    let called = format!(
        r#"{{"messages":[{{"role":"user","content":"a"}},{{"role":"assistant","tool_calls":[{}]}}]}}"#,
        call(1)
    );
    let error = refused(ZEPHYR, &row(&called)).to_string();
    assert!(
        error.contains("does not write tool calls: start the server"),
        "{error}"
    );
}

/// Templates that look at the first message cannot render a conversation without one.
#[test]
fn a_conversation_may_begin_with_the_assistant() {
    let json = r#"{"messages":[{"role":"assistant","content":"It is 4."},{"role":"user","content":"Hello!"},
        {"role":"assistant","content":"the fox"}]}"#;
    let cases = [
        (CHATML, ["It is 4.<|im_end|>", "the fox<|im_end|>"]),
        (LLAMA3, ["It is 4.<|eot_id|>", "the fox<|eot_id|>"]),
        (ZEPHYR, ["It is 4.</s>", "the fox</s>"]),
        (OPEN, [" It is 4.\n", " the fox\n</s>"]),
    ];
    for (template, expected) in cases {
        let tokenizer = fixture::byte_level(template);
        let example = tokens_of(&row(json), &tokenizer, &OPTIONS).unwrap();
        assert_eq!(learned(&example, &tokenizer), expected, "{template}");
    }
}

#[test]
fn an_open_last_turn_gets_eos() {
    let tokenizer = fixture::byte_level(OPEN);
    let json = r#"{"messages":[{"role":"user","content":"Hello!"},{"role":"assistant","content":"It is"}]}"#;
    let example = tokens_of(&row(json), &tokenizer, &OPTIONS).unwrap();
    assert_eq!(
        learned(&example, &tokenizer),
        [" It is\n</s>"],
        "the token over the seam counts"
    );
}

#[test]
fn a_template_that_rewrites_history_is_refused() {
    let tokenizer = fixture::byte_level(THINKING);
    let json = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"<think>h</think>b"WEIGHT},
        {"role":"user","content":"c"},{"role":"assistant","content":"d"}]}"#;
    let refused = tokens_of(&row(&json.replace("WEIGHT", "")), &tokenizer, &OPTIONS);
    assert_eq!(refused, Err(TextError::UnstableTemplate { message: 2 }));
    let example = tokens_of(
        &row(&json.replace("WEIGHT", ",\"weight\":0")),
        &tokenizer,
        &OPTIONS,
    )
    .unwrap();
    assert_eq!(learned(&example, &tokenizer), ["d</assistant></s>"]);
}

/// Alternating after a system message, or not, with turns left out, doubled, empty and unanswered.
fn conversation(random: &mut fixture::Random, strict: bool) -> Vec<Message> {
    let texts = ["", "the fox", " spaced ", "Größe 👋🏽\n", "<|im_end|>", "user: a"];
    let mut messages = vec![];
    if random.below(2) == 0 {
        messages.push(Message::new("system", texts[1 + random.below(5)]));
    }
    for turn in 0..random.below(9) {
        let role = match strict || random.below(4) > 0 {
            true => ["user", "assistant"][turn % 2],
            false => ["user", "assistant"][random.below(2)],
        };
        let weight = [None, None, Some(1.0), Some(0.0)][random.below(4)].filter(|_| role == "assistant");
        messages.push(Message {
            weight,
            ..Message::new(role, texts[random.below(6)])
        });
    }
    messages
}

#[test]
fn turns_are_found_in_linear_time_where_the_slow_way_finds_the_same() {
    let mut random = fixture::Random(7);
    for (template, strict) in [
        (CHATML, false),
        (LLAMA2, true),
        (LLAMA3, false),
        (ZEPHYR, false),
        (THINKING, false),
        (OPEN, false),
    ] {
        let tokenizer = fixture::byte_level(template);
        let kwargs = &Kwargs::new();
        let template = tokenizer.chat_template(kwargs).unwrap();
        let (mut found, mut both) = (0, 0);
        for _ in 0..300 {
            let messages = conversation(&mut random, strict);
            let Ok(text) = template.render(&messages, Ending::Closed, kwargs) else {
                continue;
            };
            let slow = turns_behind_all(&messages, template, kwargs, &text);
            let fast = turns_behind_a_stub(&messages, template, kwargs, &text);
            found += usize::from(slow.as_ref().is_ok_and(|turns| !turns.is_empty()));
            if let Some(fast) = fast {
                both += usize::from(!fast.is_empty());
                assert_eq!(Ok(fast), slow, "{messages:?}");
            }
        }
        assert!(found > 50 && both * 10 >= found * 9, "{both} of {found} rows");
    }
}

#[test]
fn thousands_of_turns_are_no_trouble_and_where_they_would_be_it_is_said() {
    let conversation = |n: usize| -> Vec<Message> {
        let pair = ["user", "assistant"].map(|role| Message::new(role, "It is 4."));
        std::iter::repeat_n(pair, n).flatten().collect()
    };
    let options = Options {
        max_seq_length: u32::MAX,
        ..OPTIONS
    };
    let learn = |template: &str| {
        let tokenizer = fixture::byte_level(template);
        let row = Row::Chat {
            messages: conversation(4000),
            tools: vec![],
        };
        tokens_of(&row, &tokenizer, &options).map(|example| learned(&example, &tokenizer))
    };
    // Each way would refuse so many, if it were the slow one.
    let turns = learn(CHATML).unwrap();
    assert_eq!(turns.len(), 4000);
    assert!(turns.iter().all(|turn| turn == "It is 4.<|im_end|>"));
    // Each message knows how many come before it.
    let numbered = "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}{{ messages|length + 1 }} assistant: {% endif %}";
    assert_eq!(learn(numbered), Err(TextError::TooManyTurns { turns: 4000 }));
}

#[test]
fn completions_and_texts() {
    let byte_level = fixture::byte_level("");
    let pieces = fixture::pieces("");
    let options = Options {
        prompt_loss_weight: 0.25,
        ..OPTIONS
    };
    // What is learned of both as one text, and of each by itself.
    let cases = [
        (
            &byte_level,
            "What is 2+2?",
            " It is 4.",
            " It is 4.</s>",
            " It is 4.</s>",
        ),
        (
            &byte_level,
            "The qu",
            "ick brown",
            "ick brown</s>",
            "ick brown</s>",
        ),
        (&pieces, "in the", " the in", " the in</s>", " the in</s>"),
        (&pieces, "in t", "he", " the</s>", "he</s>"), // "▁the" is one token
        (&pieces, "in\n", "the", "the</s>", "the</s>"),
        (&pieces, "", "the", " the</s>", " the</s>"),
    ];
    for (tokenizer, prompt, completion, together, apart) in cases {
        let sent = tokenizer.encode(prompt, SpecialTokens::Add).unwrap();
        for (seam, expected) in [(Seam::Together, together), (Seam::Apart, apart)] {
            let row = Row::Completion {
                prompt: prompt.to_owned(),
                completion: completion.to_owned(),
                seam,
            };
            let example = tokens_of(&row, tokenizer, &options).unwrap();
            assert_eq!(learned(&example, tokenizer), [expected]);
            let diverges = group(&Sample::Example(row), tokenizer, &options)
                .unwrap()
                .diverges;
            assert_eq!(diverges, seam == Seam::Together && together != apart);
            if !diverges {
                assert_eq!(example.tokens[..sent.len()], sent, "{prompt:?}");
                assert!(example.weights[..sent.len()].iter().all(|&weight| weight == 0.25));
            }
        }
    }
    let chat = row(r#"{"messages":[{"role":"assistant","content":"a"}]}"#);
    let weighed = tokens_of(&chat, &byte_level, &options).unwrap_err().to_string();
    assert!(
        weighed.contains("the file has {\"messages\": [...]}"),
        "{weighed}"
    );
    let text = tokens_of(
        &Row::Text {
            text: "the".to_owned(),
        },
        &pieces,
        &OPTIONS,
    )
    .unwrap();
    assert_eq!(pieces.decode(&text.tokens, Skip::Nothing).unwrap(), "<s> the</s>");
    assert_eq!(text.weights, vec![1.0; text.tokens.len()]);
}

#[test]
fn long_rows_are_cut_and_empty_ones_counted() {
    let tokenizer = fixture::pieces("");
    let completion = Row::Completion {
        prompt: "abcd".to_owned(),
        completion: "efgh".to_owned(),
        seam: Seam::Together,
    };
    let whole = tokens_of(&completion, &tokenizer, &OPTIONS).unwrap();
    assert_eq!(whole.tokens.len(), 11); // <s> ▁ a b c d e f g h </s>
    for (max_seq_length, label_tokens) in [(11, Some(5)), (10, Some(4)), (7, Some(1)), (6, None), (0, None)] {
        let cut = tokens_of(
            &completion,
            &tokenizer,
            &Options {
                max_seq_length,
                ..OPTIONS
            },
        );
        match label_tokens {
            Some(expected) => {
                let cut = cut.unwrap();
                assert_eq!(
                    (cut.tokens.len(), cut.label_tokens()),
                    (max_seq_length as usize, expected)
                );
                assert_eq!(cut.tokens, whole.tokens[..max_seq_length as usize]);
            }
            None => {
                let max_seq_length = max_seq_length as usize;
                assert_eq!(
                    cut,
                    Err(TextError::NoLabels {
                        tokens: 11,
                        max_seq_length
                    })
                );
            }
        }
    }
}

#[test]
fn rows_are_what_the_objective_learns_from() {
    let tokenizer = fixture::byte_level(CHATML);
    let lines = [
        r#"{"prompt": "a", "completion": "b"}"#,
        r#"{"prompt": "a", "chosen": "b", "rejected": "cd"}"#,
        r#"{"prompt": "a", "completion": "b", "label": false}"#,
        r#"{"prompt": "a", "completion": "b", "reward": 2}"#,
    ];
    let all = [Rows::Examples, Rows::Pairs, Rows::Judged, Rows::Rewarded];
    for (i, rows) in all.into_iter().enumerate() {
        for (j, line) in lines.iter().enumerate() {
            let options = Options { rows, ..OPTIONS };
            let labelled = group(&parse_line(1, line).unwrap(), &tokenizer, &options);
            match labelled.map(|labelled| labelled.group) {
                Ok(Group { examples, value }) => {
                    assert_eq!(i, j, "{line}");
                    assert_eq!(
                        (examples.len(), value),
                        [(1, 0.0), (2, 0.0), (1, 0.0), (1, 2.0)][i]
                    );
                    assert!(examples.iter().all(|example| example.label_tokens() > 0));
                }
                Err(error) => {
                    let message = error.to_string();
                    assert!(i != j && message.contains("or another file"), "{line}: {message}");
                }
            }
        }
    }
}

/// Of TRL's SFTTrainer and DPOTrainer (tests/text/make_prompts.py): tokens over the seam, templates that write a prompt that waits
/// otherwise than one that is answered, and what stands behind the end of turn.
#[test]
fn prompts_and_completions_are_tokenised_as_trl_does() {
    let fixture: Json = serde_json::from_str(include_str!("../fixture/prompts.json")).unwrap();
    let demo = |file: &str| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../server/demo");
        std::fs::read_to_string(folder.join(file)).unwrap()
    };
    let mut config: Json = serde_json::from_str(&demo("tokenizer_config.json")).unwrap();
    let own = config["chat_template"].clone();
    let mut diverging = 0;
    for case in fixture["cases"].as_array().unwrap() {
        config["chat_template"] = match &case["template"] {
            Json::Null => own.clone(),
            template => template.clone(),
        };
        let files = [
            ("tokenizer.json", demo("tokenizer.json")),
            ("tokenizer_config.json", config.to_string()),
        ];
        let tokenizer = fixture::load(&files).unwrap();
        let rows = match case["objective"].as_str() {
            Some("dpo") => Rows::Pairs,
            _ => Rows::Examples,
        };
        let options = Options { rows, ..OPTIONS };
        let both = case["rows"]
            .as_array()
            .unwrap()
            .iter()
            .zip(case["examples"].as_array().unwrap());
        for (row, expected) in both {
            let name = format!("{}: {row}", case["name"]);
            let sample = parse_line(1, &row.to_string()).unwrap();
            let labelled = group(&sample, &tokenizer, &options).unwrap();
            diverging += u32::from(labelled.diverges);
            let found: Vec<Json> = labelled.group.examples.iter().map(shown).collect();
            assert_eq!(&Json::from(found), expected, "{name}");
        }
    }
    assert!(diverging > 10, "{diverging}");
}

/// As the fixture has it.
fn shown(example: &Example) -> Json {
    let mask: Vec<u8> = example
        .weights
        .iter()
        .map(|&weight| u8::from(weight == 1.0))
        .collect();
    serde_json::json!({"tokens": example.tokens, "mask": mask})
}
