//! What is bound is read, and what models write is bound.

use tandem_core::grammar::{Compiler, Grammar, Next, Vocabulary};

use super::*;

const END: u32 = 256;

/// Bytes, an end, and special tokens.
struct Bound {
    compiler: Compiler,
    special: Vec<(String, u32)>,
}

impl Bound {
    fn new(special: &[&str]) -> Bound {
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|byte| vec![byte]).collect();
        tokens.push(b"<end>".to_vec());
        tokens.extend(special.iter().map(|text| text.as_bytes().to_vec()));
        let vocabulary = Vocabulary {
            special: (0..tokens.len()).map(|id| id >= END as usize).collect(),
            tokens,
            ends: vec![END],
        };
        Bound {
            compiler: Compiler::new(&vocabulary).expect("a vocabulary"),
            special: special
                .iter()
                .zip(END + 1..)
                .map(|(text, id)| ((*text).to_owned(), id))
                .collect(),
        }
    }

    fn ids(&self, mut text: &str) -> Vec<u32> {
        let mut ids = vec![];
        while let Some(first) = text.chars().next() {
            let special = self
                .special
                .iter()
                .find(|(name, _)| text.starts_with(name.as_str()));
            let length = match special {
                Some((name, id)) => {
                    ids.push(*id);
                    name.len()
                }
                None => {
                    let length = first.len_utf8();
                    ids.extend(text[..length].bytes().map(u32::from));
                    length
                }
            };
            text = &text[length..];
        }
        ids
    }

    fn grammar(&self, format: &tandem_core::grammar::Format) -> Grammar {
        Grammar::format(format, &self.special).expect("a grammar")
    }

    fn takes(&self, grammar: &Grammar, text: &str) -> bool {
        let mut guide = self
            .compiler
            .compile(grammar)
            .unwrap_or_else(|error| panic!("{error}\n{}", grammar.text()));
        let ids = self.ids(text);
        for (at, &id) in ids.iter().enumerate() {
            if !guide.mask(&[END]).expect("a mask").allows(id) {
                return false;
            }
            if guide.advance(id).expect("a token") == Next::Complete {
                return at + 1 == ids.len();
            }
        }
        guide.mask(&[END]).expect("a mask").allows(END)
    }

    /// A text that is bound, some of it by chance.
    fn writes(&self, grammar: &Grammar, ends: &[&str], random: &mut Random) -> Option<String> {
        let mut guide = self
            .compiler
            .compile(grammar)
            .unwrap_or_else(|error| panic!("{error}\n{}", grammar.text()));
        let mut text = vec![];
        let free = 10 + random.below(60);
        let mut forced: Vec<u32> = vec![];
        for n in 0.. {
            if n > 4000 {
                return None; // by chance it found no end
            }
            let mask = guide.mask(&[END]).expect("a mask");
            let allows = |id: &u32| mask.allows(*id);
            let is_over = n > free || random.below(8) == 0;
            if is_over && mask.allows(END) {
                break;
            }
            let plain: Vec<u32> = [10].into_iter().chain(32..127).filter(allows).collect();
            // Free text takes everything; only what ends it is of use.
            let is_free = [b'\n', b'~', b'<', b'q']
                .iter()
                .all(|&byte| mask.allows(byte.into()));
            forced.retain(|_| is_free);
            let id = if is_free && forced.is_empty() && is_over {
                forced = self.ids(ends[random.below(ends.len())]);
                forced.reverse();
                forced.pop()
            } else if let Some(id) = forced.pop() {
                Some(id)
            } else if is_over {
                // In a string of JSON everything but a new line may come.
                let is_quoted = mask.allows(b'~'.into()) && mask.allows(b'q'.into());
                let ends = if is_quoted { "\"" } else { "}])\"0:" };
                ends.bytes().map(u32::from).find(allows)
            } else {
                plain.get(random.below(plain.len().max(1))).copied()
            };
            let special: Vec<u32> = (END + 1..).take(self.special.len()).filter(allows).collect();
            let some = |ids: &[u32], random: &mut Random| ids.get(random.below(ids.len().max(1))).copied();
            // A special token ends more than it begins.
            let first = some(&special, random).filter(|_| is_over && !is_free && forced.is_empty());
            let any = some(&plain, random).or(some(&special, random));
            let any = any.or((0..256).find(allows)).or(Some(END).filter(allows));
            let id = first.or(id.filter(allows)).or(any).expect("some token may come");
            if id == END {
                break;
            }
            match self.special.iter().find(|(_, special)| *special == id) {
                Some((name, _)) => text.extend(name.bytes()),
                None => text.push(id as u8),
            }
            if guide.advance(id).expect("a token") == Next::Complete {
                break;
            }
        }
        Some(String::from_utf8(text).expect("plain characters and special tokens"))
    }
}

/// What ends free text in a format.
fn ends(format: &ToolFormat) -> Vec<&'static str> {
    let Syntax::Layouts { layouts, .. } = format.syntax else {
        return vec!["<|end|><|start|>assistant"];
    };
    let ends = layouts[0].call.iter().filter_map(|piece| match piece {
        Piece::Tagged { close, .. } => Some(close.trim()),
        Piece::Marked(mark) => Some(*mark),
        _ => None,
    });
    ends.chain(["</think>"]).collect()
}

/// Texts of a format that are special tokens in some models.
fn special(format: &ToolFormat) -> Vec<&'static str> {
    let mut special = match format.syntax {
        Syntax::Layouts { layouts, .. } => layouts[0].texts(),
        Syntax::Channels => channels::MARKS.to_vec(),
    };
    special.iter_mut().for_each(|text| *text = text.trim());
    special.retain(|text| {
        let inside = text.strip_prefix('<').and_then(|text| text.strip_suffix('>'));
        let inside = inside.or_else(|| text.strip_prefix('[')?.strip_suffix(']'));
        inside.is_some_and(|text| !text.is_empty() && !text.contains(['<', '>', '[', ']', '=', '\n', ' ']))
    });
    special.sort_unstable();
    special.dedup();
    special
}

#[test]
fn what_models_write_is_bound() {
    for (format, text) in texts::written() {
        let reading = Reading {
            tools: Some(format),
            ..Reading::default()
        };
        let n_calls = read(reading, &tools(), &[text]).calls.len();
        for special in [vec![], special(format)] {
            let bound = Bound::new(&special);
            let takes = |choice, parallel| {
                let format = bind(reading, &tools(), choice, parallel).expect("a format");
                bound.takes(&bound.grammar(&format), text)
            };
            let name = format.names[0];
            assert!(takes(Choice::Required, true), "{name} {special:?} {text}");
            assert_eq!(takes(Choice::Required, false), n_calls == 1, "{name} {text}");
            let is_named = n_calls == 1 && text.contains("get_weather");
            assert_eq!(
                takes(Choice::Named("get_weather"), true),
                is_named,
                "{name} {text}"
            );
            assert!(!takes(Choice::Named("now"), true), "{name} {text}");
        }
    }
}

#[test]
fn what_is_bound_is_read() {
    let mut random = Random(3);
    let mut n_texts = 0;
    for format in FORMATS {
        for (n, special) in [vec![], special(format)].into_iter().enumerate() {
            let bound = Bound::new(&special);
            let reading = Reading {
                tools: Some(format),
                reasoning: match format.syntax {
                    Syntax::Channels => ReasoningFormat::named("openai_gptoss"),
                    Syntax::Layouts { .. } => ReasoningFormat::named("qwen3").filter(|_| n == 0),
                },
                is_opened: false,
            };
            for (choice, parallel) in [
                (Choice::Required, true),
                (Choice::Required, false),
                (Choice::Named("set"), true),
            ] {
                let grammar = bound.grammar(&bind(reading, &tools(), choice, parallel).expect("a format"));
                for _ in 0..8 {
                    let text = bound.writes(&grammar, &ends(format), &mut random);
                    // JSON's grammar bounds no exponent, and no number holds such.
                    let Some(text) = text.filter(|text| !has_long_exponent(text)) else {
                        continue;
                    };
                    let answer = read(reading, &tools(), &[&text]);
                    n_texts += 1;
                    let context = format!("{} {special:?}\n{text:?}\n{answer:?}", format.names[0]);
                    assert!(!answer.calls.is_empty() && answer.content.is_empty(), "{context}");
                    assert!(
                        parallel && choice == Choice::Required || answer.calls.len() == 1,
                        "{context}"
                    );
                    for (name, arguments) in &answer.calls {
                        let tool = tools()
                            .iter()
                            .find(|tool| tool.name == *name)
                            .cloned()
                            .expect(&context);
                        assert!(choice == Choice::Required || name == "set", "{context}");
                        let arguments: Json = serde_json::from_str(arguments)
                            .unwrap_or_else(|error| panic!("{error} {context}"));
                        assert!(
                            fits(&arguments, &tool.parameters.expect("parameters")),
                            "{context}"
                        );
                    }
                }
            }
        }
    }
    assert!(n_texts > 1000, "{n_texts}");
}

fn has_long_exponent(text: &str) -> bool {
    let digits = |rest: &str| {
        let digits = rest.trim_start_matches(['+', '-']);
        digits.bytes().take_while(u8::is_ascii_digit).count()
    };
    text.split(['e', 'E']).skip(1).any(|rest| digits(rest) > 2)
}

/// Of the schemas of these tests.
fn fits(value: &Json, root: &Json) -> bool {
    fn part(value: &Json, schema: &Json, root: &Json) -> bool {
        if let Some(parts) = schema["anyOf"].as_array() {
            return parts.iter().any(|schema| part(value, schema, root));
        }
        if let Some(path) = schema["$ref"].as_str() {
            return part(value, root.pointer(&path[1..]).expect("a definition"), root);
        }
        if let Some(values) = schema["enum"].as_array() {
            return values.contains(value);
        }
        match schema["type"].as_str() {
            Some("string") => value.is_string(),
            Some("null") => value.is_null(),
            Some("boolean") => value.is_boolean(),
            Some("integer") => value.is_i64() || value.as_f64().is_some_and(|number| number.fract() == 0.0),
            Some("number") => value.is_number(),
            Some("array") => value
                .as_array()
                .is_some_and(|all| all.iter().all(|one| part(one, &schema["items"], root))),
            Some("object") => value.as_object().is_some_and(|map| {
                let required = schema["required"].as_array().into_iter().flatten();
                required
                    .into_iter()
                    .all(|name| map.contains_key(name.as_str().expect("a name")))
                    && map
                        .iter()
                        .all(|(name, value)| part(value, &schema["properties"][name], root))
            }),
            _ => false,
        }
    }
    part(value, root, root)
}

/// Text or calls: what begins as a call is one where a tool is strict.
#[test]
fn strict_tools_bind_once_they_are_called() {
    let mut strict = tools().to_vec();
    strict[0].strict = true;
    let reading = Reading {
        tools: ToolFormat::named("hermes"),
        ..Reading::default()
    };
    assert_eq!(bind(reading, &tools(), Choice::Auto, true), None);
    let bound = Bound::new(&[]);
    let takes = |parallel, text: &str| {
        let format = bind(reading, &strict, Choice::Auto, parallel).expect("a format");
        bound.takes(&bound.grammar(&format), text)
    };
    let call = |name: &str, arguments: &str| {
        format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
    };
    let paris = call("get_weather", "{\"city\": \"Paris\"}");
    assert!(takes(true, "Hello <b>."));
    assert!(takes(true, &format!("I look. {paris}\n{paris}")));
    assert!(!takes(false, &format!("I look. {paris}\n{paris}")));
    assert!(takes(true, &call("set", "{\"a\": [1]}")), "it is not strict");
    assert!(!takes(true, &call("get_weather", "{\"town\": \"Paris\"}")));
    assert!(!takes(true, "<tool_call>\nnothing"));
    // A call without its opening, which is read as one.
    assert!(takes(
        true,
        "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}"
    ));
    assert!(!takes(
        true,
        "{\"name\": \"get_weather\", \"arguments\": {\"town\": \"Paris\"}}"
    ));
    // Where other text would have to be read as arguments, all is bound by what is known of it.
    let coder = Reading {
        tools: ToolFormat::named("qwen3_coder"),
        ..Reading::default()
    };
    assert!(bind(coder, &strict, Choice::Auto, true).is_some());
    strict[1].parameters = None;
    assert_eq!(bind(coder, &strict, Choice::Auto, true), None);
}

#[test]
fn strict_calls_of_every_format_are_bound_in_free_text() {
    let strict: Arc<[Tool]> = tools()
        .iter()
        .map(|tool| Tool {
            strict: true,
            ..tool.clone()
        })
        .collect();
    let mut n_bound = 0;
    for (format, text) in texts::written() {
        let reading = Reading {
            tools: Some(format),
            ..Reading::default()
        };
        let answer = bind(reading, &strict, Choice::Auto, true).expect("all tools are strict");
        for special in [vec![], special(format)] {
            let bound = Bound::new(&special);
            let grammar = bound.grammar(&answer);
            assert!(
                bound.takes(&grammar, text),
                "{special:?} {text}\n{}",
                grammar.text()
            );
            if text.contains("city") {
                n_bound += 1;
                let wrong = text.replace("city", "town");
                assert!(!bound.takes(&grammar, &wrong), "{special:?} {wrong}");
            }
            let opens: Vec<&str> = match format.layouts() {
                [] => continue,
                layouts => layouts
                    .iter()
                    .map(|layout| layout.open)
                    .filter(|open| !open.is_empty())
                    .collect(),
            };
            assert!(
                bound.takes(&grammar, "Hello, how are you?"),
                "{}",
                format.names[0]
            );
            for open in &opens {
                assert!(!bound.takes(&grammar, &format!("Hello {open}?")), "{open}");
            }
            // By chance: whatever is read as a call fits its schema.
            let mut random = Random(text.len() as u64);
            for _ in 0..if opens.is_empty() { 0 } else { 6 } {
                let ends: Vec<&str> = opens.iter().copied().chain(ends(format)).collect();
                let written = bound.writes(&grammar, &ends, &mut random);
                let Some(written) = written.filter(|text| !has_long_exponent(text)) else {
                    continue;
                };
                for (name, arguments) in read(reading, &strict, &[&written]).calls {
                    let tool = strict.iter().find(|tool| tool.name == name).expect(&written);
                    let parameters = tool.parameters.clone().expect("parameters");
                    let arguments = serde_json::from_str(&arguments).expect(&written);
                    assert!(fits(&arguments, &parameters), "{} {written:?}", format.names[0]);
                }
            }
        }
    }
    assert!(n_bound > 20, "{n_bound}");
    // Where nothing but a name opens a call, a name may still be said.
    let glm = Reading {
        tools: ToolFormat::named("glm4"),
        ..Reading::default()
    };
    let answer = bind(glm, &strict, Choice::Auto, true).expect("all tools are strict");
    let bound = Bound::new(&[]);
    let grammar = bound.grammar(&answer);
    for (text, is_taken) in [
        ("get_weather", true),
        ("get_weather is a tool.\n{}", true),
        ("get_weather2\n{}", true),
        ("It is {}.", true),
        ("now\n{}", true),
        ("now\n{} and more", false),
        ("get_weather\n{}", false),
        ("\n get_weather {\"town\": 1}", false),
        ("get_weather{", false),
    ] {
        assert_eq!(
            bound.takes(&grammar, text),
            is_taken,
            "{text}\n{}",
            grammar.text()
        );
    }
}

#[test]
fn reasoning_comes_before_an_answer_of_a_form() {
    let schema = || tandem_core::grammar::Format::Schema(json!({"type": "integer"}));
    let bound = Bound::new(&[]);
    for (name, is_opened, yes, no) in [
        (
            "qwen3",
            false,
            vec!["3", "<think>a</think>3", "<think>\na\n</think>3"],
            vec!["a3", "<think>3", "<think>a</think>b", "<think>a</think>\n3"],
        ),
        ("qwen3", true, vec!["a</think>3"], vec!["3", "a</think>"]),
        (
            "openai_gptoss",
            false,
            vec![
                "<|channel|>final<|message|>3",
                "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>3",
            ],
            vec!["3", "<|channel|>final<|message|>a"],
        ),
    ] {
        let reading = Reading {
            tools: None,
            reasoning: ReasoningFormat::named(name),
            is_opened,
        };
        let grammar = bound.grammar(&bind_form(reading, &[], true, schema()));
        assert!(
            yes.iter().all(|text| bound.takes(&grammar, text)),
            "{name} {}",
            grammar.text()
        );
        assert!(
            !no.iter().any(|text| bound.takes(&grammar, text)),
            "{name} {}",
            grammar.text()
        );
    }
    // Beside the form, calls.
    let reading = Reading {
        tools: ToolFormat::named("hermes"),
        reasoning: ReasoningFormat::named("qwen3"),
        is_opened: true,
    };
    let grammar = bound.grammar(&bind_form(reading, &tools(), true, schema()));
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    for (text, expected) in [
        ("a</think>3".to_owned(), true),
        (format!("a</think>\n\n{call}"), true),
        (format!("a</think>\n\n3{call}"), false),
        ("a</think>\n\n3".to_owned(), false),
    ] {
        assert_eq!(bound.takes(&grammar, &text), expected, "{text}");
    }
    // A call ends reasoning that was not closed, and is bound as behind it.
    let strict: Vec<Tool> = tools()
        .iter()
        .map(|tool| Tool {
            strict: true,
            ..tool.clone()
        })
        .collect();
    let grammar = bound.grammar(&bind(reading, &strict, Choice::Auto, true).expect("a format"));
    let wrong = call.replace("{}}", "{\"a\": 1}}");
    for (text, expected) in [
        (call.to_owned(), true),
        (format!("hm {call}"), true),
        (format!("hm</think>\n\nSo {call} and"), true),
        (format!("hm</think>{call}{call}"), true),
        ("hm".to_owned(), true),
        (wrong.clone(), false),
        (format!("hm {wrong}"), false),
        (format!("hm</think>So {wrong}"), false),
    ] {
        assert_eq!(bound.takes(&grammar, &text), expected, "{text}");
    }
}
