//! Answers bound to grammars, over a vocabulary that was made up: the engine knows no other text than this.

use std::sync::Arc;

use serde_json::json;
use tandem_core::grammar::{Grammar, Vocabulary, Whitespace};

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
