//! Answers bound to grammars, over a vocabulary that was made up: the engine knows no other text than this.

use std::sync::Arc;

use serde_json::json;
use tandem_core::grammar::{Grammar, Vocabulary, Whitespace};
use tandem_core::sched::Lookup;
use tandem_core::thinking::Budget;

use super::*;

/// Token 2 is "a", 27 "z", 28 "a" again, and so on; 0 and 1 are special.
fn vocabulary() -> Vocabulary {
    let letter = |token: usize| vec![b'a' + ((token + 24) % 26) as u8];
    Vocabulary {
        tokens: (0..2048)
            .map(|token| match token {
                0 | 1 => format!("<{token}>").into_bytes(),
                token => letter(token),
            })
            .collect(),
        special: (0..2048).map(|token| token < 2).collect(),
        ends: vec![],
    }
}

fn with_vocabulary() -> Options {
    Options {
        vocabulary: Some(Arc::new(vocabulary())),
        ..options(&demo())
    }
}

fn bound(pattern: &str, prompt: &[TokenId], max_tokens: u32, raw: RawSampling) -> Generate {
    Generate {
        grammar: Some(Grammar::regex(pattern)),
        ..request(prompt, max_tokens, raw)
    }
}

fn drawn(seed: u64) -> RawSampling {
    RawSampling {
        seed: Some(seed),
        logprobs: Some(2),
        ..RawSampling::default()
    }
}

fn letters(answer: &Answer) -> String {
    let vocabulary = vocabulary();
    let text = |id: TokenId| String::from_utf8(vocabulary.tokens[id as usize].clone()).unwrap();
    answer.ids().into_iter().map(text).collect()
}

#[test]
fn answers_are_sentences_of_their_grammars_and_end_with_them() {
    let prompt = &cases()[0].prompt;
    let mut rig = Rig::new(with_vocabulary());
    let end = |answer: &Answer| answer.end.clone().unwrap().unwrap().0;
    for seed in 0..8 {
        // Nothing can follow the eighth letter: no token is spent on the end.
        let answer = rig.ask(bound("[b-d]{8}", prompt, 50, drawn(seed)));
        let text = letters(&answer);
        assert!(
            text.len() == 8 && text.chars().all(|c| ('b'..='d').contains(&c)),
            "{text}"
        );
        assert_eq!(end(&answer), FinishReason::Complete);
        // The end of text may come after any letter, and after nothing else.
        let answer = rig.ask(bound("([b-d]x)+", prompt, 50, drawn(seed)));
        match end(&answer) {
            FinishReason::Stop(EOS) => assert!(letters(&answer).ends_with("x<1>")),
            other => assert_eq!((other, answer.ids().len()), (FinishReason::Length, 50)),
        }
    }
    // Where it may not come yet, it does not; where nothing else is left, it does.
    let raw = |min_tokens| RawSampling {
        min_tokens: Some(min_tokens),
        ..drawn(1)
    };
    let answer = rig.ask(bound("b*", prompt, 12, raw(12)));
    assert_eq!(
        (letters(&answer).as_str(), end(&answer)),
        ("bbbbbbbbbbbb", FinishReason::Length)
    );
    let answer = rig.ask(bound("bb", prompt, 12, raw(12)));
    assert_eq!(
        (letters(&answer).as_str(), end(&answer)),
        ("bb", FinishReason::Complete)
    );
    // Log-probabilities are of what is allowed.
    let answer = rig.ask(bound(
        "q",
        prompt,
        12,
        RawSampling {
            logprobs: Some(20),
            ..greedy()
        },
    ));
    let mass: f32 = answer.tokens[0]
        .top
        .iter()
        .map(|(_, logprob)| logprob.exp())
        .sum();
    assert!(
        answer.tokens[0]
            .top
            .iter()
            .all(|(_, logprob)| logprob.is_finite())
            && mass <= 1.0 + 1e-5
    );
    assert_eq!(answer.tokens[0].logprob, answer.tokens[0].top[0].1);
    // Numbers are published behind the answers.
    rig.wait_until("19 requests of 5 grammars", |stats| {
        (stats.grammar_requests, stats.grammar_compiles) == (19, 5)
    });
}

#[test]
fn a_grammar_changes_nothing_beside_it_and_outlives_preemption() {
    let cases = cases();
    let mut requests = vec![];
    for (seed, Case { prompt, .. }) in (0..).zip(&cases) {
        requests.push(Generate {
            stop_tokens: vec![],
            ..request(prompt, 70, drawn(seed))
        });
        requests.push(bound("([b-d]{3}x)*", prompt, 70, drawn(seed)));
        requests.push(Generate {
            stop_tokens: vec![],
            ..bound("[a-m]{65}", prompt, 70, drawn(seed))
        });
    }
    let mut rig = Rig::new(with_vocabulary());
    let expected: Vec<Answer> = requests.iter().map(|request| rig.ask(request.clone())).collect();
    let info = &rig.handle.info;
    let block_bytes = info.kv_bytes / u64::from(info.kv_blocks);
    let small = Options {
        kv_cache_bytes: Some(4 * block_bytes),
        max_model_len: Some(crate::ModelLen::Asked(128)),
        ..with_vocabulary()
    };
    for (world, options) in [("crowded", with_vocabulary()), ("preempted", small)] {
        let mut rig = Rig::new(options);
        for round in ["cold", "cached"] {
            let answers = rig.ask_all(&requests);
            for (i, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
                answer.assert_same(expected, &format!("request {i}, {world}, {round}"));
            }
        }
        let stats = rig.stats();
        assert!(world != "preempted" || stats.preemptions > 0, "{stats:?}");
    }
}

#[test]
fn what_cannot_be_followed_is_said_and_leaves_nothing() {
    let prompt = &cases()[0].prompt;
    let mut rig = Rig::new(with_vocabulary());
    let schema = Grammar::json_schema(&json!({"uniqueItems": true}), &Whitespace::Usual).unwrap();
    // The vocabulary has no digits, so its integer has no first token.
    let unspelled = Grammar::json_schema(&json!({"type": "integer"}), &Whitespace::Usual).unwrap();
    for grammar in [schema, unspelled, Grammar::lark("start: x")] {
        for _ in 0..2 {
            let asked = Generate {
                grammar: Some(grammar.clone()),
                ..request(prompt, 8, greedy())
            };
            let answer = rig.ask(asked);
            assert!(matches!(answer.end, Some(Err(Fault::Grammar(_)))), "{answer:?}");
        }
    }
    // One that leaves while its grammar is compiled, and one that is asked for again.
    drop(rig.send(bound("[a-z]{7}", prompt, 8, greedy())));
    assert_eq!(rig.ask(bound("[a-z]{7}", prompt, 8, greedy())).ids().len(), 7);
    rig.wait_until("free again", |stats| {
        stats.kv_blocks_used == 0 && stats.running == 0 && stats.waiting == 0
    });
    let mut without = Rig::new(options(&demo()));
    let answer = without.ask(bound("a", prompt, 8, greedy()));
    assert!(matches!(answer.end, Some(Err(Fault::Grammar(_)))), "{answer:?}");
}

/// Token 2 is the first of these texts, 3 the second, and so on, round and round.
fn spelling(texts: &[&str]) -> Vocabulary {
    Vocabulary {
        tokens: (0..2048)
            .map(|token: usize| match token {
                0 | 1 => format!("<{token}>").into_bytes(),
                token => texts[(token - 2) % texts.len()].as_bytes().to_vec(),
            })
            .collect(),
        special: (0..2048).map(|token| token < 2).collect(),
        ends: vec![],
    }
}

const JSON: [&str; 24] = [
    "{", "}", "[", "]", "\"", ":", ",", " ", "0", "1", "2", "-", "a", "b", "ab", "a\"", "\": ", ", \"",
    "{\"", "true", "null", "]}", "c", ".",
];

/// What is guessed under a grammar changes nothing, whatever the grammar, the way tokens are drawn, and what is asked of them.
#[test]
fn guesses_under_a_grammar_are_exact() {
    let prompt = &cases()[0].prompt;
    let schemas = [
        json!({"type": "array", "items": {"enum": ["ab", 1, null]}, "minItems": 12}),
        json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "maxItems": 9}, "b": {"type": "null"}},
               "required": ["a", "b"], "additionalProperties": false}),
        json!({"type": "array", "items": {"type": "array", "items": {"const": "a"}, "maxItems": 2}, "minItems": 6, "maxItems": 8}),
        json!({"type": "string", "maxLength": 40}),
        json!({"type": "object", "additionalProperties": {"type": "integer"}}),
        json!({"anyOf": [{"const": [1, 1, 1, 1, 1, 1, 1, 2]}, {"const": [1, 1, 1, 1, 1, 1, 1, 1]}]}),
    ];
    let grammars = schemas
        .iter()
        .map(|schema| Grammar::json_schema(schema, &Whitespace::Usual).unwrap())
        .chain([Grammar::regex("(ab|a, )*0"), Grammar::regex("(a{3}b){9}")]);
    let mut requests = vec![];
    for (n, grammar) in grammars.enumerate() {
        // Its own answers, as a client sends them back: what is looked up.
        let earlier: Vec<TokenId> = prompt.iter().copied().chain((2..26).cycle().take(40)).collect();
        for seed in 0..3 {
            for raw in [
                RawSampling {
                    logprobs: Some(2),
                    ..greedy()
                },
                RawSampling {
                    temperature: Some(0.3),
                    ..drawn(seed)
                },
                RawSampling {
                    repetition_penalty: Some(1.3),
                    presence_penalty: Some(0.5),
                    ..drawn(seed)
                },
                RawSampling {
                    min_tokens: Some(9),
                    top_k: Some(3),
                    ..drawn(seed)
                },
            ] {
                requests.push(Generate {
                    grammar: Some(grammar.clone()),
                    stop_tokens: if n % 2 == 0 { vec![EOS] } else { vec![EOS, 9] },
                    ..request(&earlier, 60, raw)
                });
            }
        }
    }
    let spelled = || Options {
        vocabulary: Some(Arc::new(spelling(&JSON))),
        ..options(&demo())
    };
    let lookup = |tokens, min| Lookup {
        tokens,
        min,
        max: 4,
        max_sequences: 64,
    };
    let expected = Rig::new(spelled()).ask_all(&requests);
    let ends: Vec<_> = expected.iter().map(|answer| answer.end.clone()).collect();
    let completed = |end: &Option<Result<(FinishReason, u32), Fault>>| {
        matches!(end, Some(Ok((FinishReason::Complete, _))))
    };
    assert!(ends.iter().filter(|end| completed(end)).count() > 8, "{ends:?}");
    for (tokens, min) in [(1, 1), (5, 1), (10, 2)] {
        let mut rig = Rig::new(Options {
            lookup: Some(lookup(tokens, min)),
            ..spelled()
        });
        for (i, (answer, expected)) in rig.ask_all(&requests).iter().zip(&expected).enumerate() {
            answer.assert_same(expected, &format!("request {i}, {tokens} guesses"));
        }
        rig.wait_until("guessed", |stats| {
            (50..stats.guessed_tokens).contains(&stats.accepted_tokens)
        });
    }
}

/// Reasoning that used up its budget ends, whatever the model wants, is guessed, or must be said behind it.
#[test]
fn reasoning_ends_with_its_budget() {
    let prompt = &cases()[0].prompt;
    // The mark is said by several tokens, and no text of the model's own spells it.
    let texts = ["a", "b", "c", "d", "<", "/t", ">", "e"];
    let (open, slash, close) = (6, 7, 8);
    let spelled = |lookup| Options {
        vocabulary: Some(Arc::new(spelling(&texts))),
        lookup,
        ..options(&demo())
    };
    let budget = |tokens| Budget {
        tokens,
        opens: vec!["<t>".to_owned()],
        ends: vec!["</t>".to_owned()],
        end: vec![open, slash, close],
        is_opened: true,
        is_anywhere: false,
    };
    let free = |budget: Option<Budget>, raw| Generate {
        thinking: budget.map(Box::new),
        stop_tokens: vec![],
        ..request(prompt, 40, raw)
    };
    // Behind it a form, and before it anything but the mark.
    let formed = |budget, raw| Generate {
        grammar: Some(Grammar::lark(
            "start: thought \"abcd\"\nthought[lazy]: /(?s:.*)/ \"</t>\"",
        )),
        ..free(budget, raw)
    };
    let lookup = Lookup {
        tokens: 4,
        min: 1,
        max: 4,
        max_sequences: 64,
    };
    let text = |answer: &Answer| -> String {
        let token = |id: TokenId| texts[(id as usize - 2) % texts.len()];
        answer.ids().into_iter().map(token).collect()
    };
    let (mut plain, mut guessing) = (Rig::new(spelled(None)), Rig::new(spelled(Some(lookup))));
    for raw in [greedy(), drawn(1), drawn(2), drawn(3)] {
        let unbounded = plain.ask(free(None, raw.clone())).ids();
        for tokens in [0, 1, 7, 30] {
            let asked = [
                free(Some(budget(tokens)), raw.clone()),
                formed(Some(budget(tokens)), raw.clone()),
            ];
            for request in asked {
                let is_formed = request.grammar.is_some();
                let answer = plain.ask(request.clone());
                guessing
                    .ask(request)
                    .assert_same(&answer, &format!("{tokens} tokens, guessed"));
                let said = text(&answer);
                let thought = said.find("</t>").expect("it ends");
                // Greedy letters never spell the mark; a draw may, and is done with it before its time.
                let n_before = answer.ids().len();
                assert!(thought <= 2 * tokens as usize, "{said}");
                if is_formed {
                    assert!(said.ends_with("</t>abcd"), "{said}");
                } else {
                    assert_eq!(n_before, 40);
                    let ids = answer.ids();
                    let at = ids.windows(3).position(|three| three == [open, slash, close]);
                    // Until then it says what it would have said.
                    if let Some(at) = at {
                        assert_eq!(ids[..at], unbounded[..at], "{said}");
                    }
                }
            }
        }
    }
    let refused = plain.ask(free(
        Some(Budget {
            end: vec![],
            ..budget(1)
        }),
        greedy(),
    ));
    assert!(matches!(refused.end, Some(Err(Fault::Refused(_)))), "{refused:?}");
    // Tokens without texts.
    let without = Rig::new(options(&demo())).ask(free(Some(budget(1)), greedy()));
    assert!(matches!(without.end, Some(Err(Fault::Refused(_)))), "{without:?}");
}
