//! Calls: what reaches the engine, what comes back, what is refused.

use std::collections::BTreeMap;

use tandem_core::grammar::{Compiler, Grammar, Next};
use tandem_core::id::RequestId;
use tandem_core::message::{Event, Fault, FinishReason, Generate, Guessed, Scored};
use tandem_core::replica::Command;
use tandem_core::sampling::RawSampling;
use tandem_text::reasoning::ReasoningFormat;
use tandem_text::tools::ToolFormat;
use tandem_text::{Message, SpecialTokens};
use tokio::sync::mpsc;

use super::*;
use crate::api::{
    Answer, Call, Client, Constraint, Delta, Finish, Form, Generation, Piece, Prompt, Tool, ToolChoice, What,
};

pub(super) fn call(prompt: &str) -> Call {
    Call {
        client: Client {
            key: 1,
            connection: 1,
            ..Client::default()
        },
        earlier: 0,
        model: BASE.to_owned(),
        prompt: Prompt::Text(prompt.to_owned()),
        n: 1,
        max_tokens: Some(16),
        pooling: None,
        sampling: RawSampling::default(),
        priority: 0,
        cache_salt: None,
        constraint: None,
        answer: None,
        stop: Vec::new(),
        stop_token_ids: Vec::new(),
        include_stop_str_in_output: false,
        ignore_eos: false,
        skip_special_tokens: true,
        add_special_tokens: true,
    }
}

impl Engine {
    pub(super) async fn generate(&mut self) -> (Generate, mpsc::Sender<Event>) {
        match self.next().await {
            Command::Generate(generate, events) => (generate, events),
            _ => panic!("a Generate was expected"),
        }
    }

    async fn aborted(&mut self) -> RequestId {
        match self.next().await {
            Command::Abort(id) => id,
            _ => panic!("an Abort was expected"),
        }
    }
}

fn token(token: u32) -> Event {
    Event::Token {
        token: Scored {
            token,
            logprob: -0.5,
            top: vec![(EOS, -1.0)],
        },
        is_last: false,
    }
}

pub(super) async fn say(events: &mpsc::Sender<Event>, text: &str) {
    for id in ids(text) {
        // The router may have seen a stop string.
        let _ = events.send(token(id)).await;
    }
}

pub(super) async fn end(events: &mpsc::Sender<Event>, reason: FinishReason) {
    let _ = events
        .send(Event::Finished {
            reason,
            cached_tokens: 3,
            guessed: Guessed::default(),
        })
        .await;
}

/// Text, tokens and end of each choice.
pub(super) async fn read(
    generation: &mut Generation,
) -> BTreeMap<u32, (String, usize, Option<(Finish, u32)>)> {
    let mut choices = BTreeMap::<u32, (String, usize, Option<(Finish, u32)>)>::new();
    while let Some(piece) = tokio::time::timeout(PATIENCE, generation.pieces.recv())
        .await
        .expect("pieces come soon")
    {
        let choice = choices.entry(piece.choice).or_default();
        assert!(choice.2.is_none(), "nothing follows the end");
        match piece.what {
            What::Text { text, tokens, .. } => {
                choice.0.push_str(&text.content);
                choice.1 += tokens.len();
            }
            What::Finished {
                reason,
                completion_tokens,
                ..
            } => choice.2 = Some((reason, completion_tokens)),
            What::Prompt(_) | What::Pooled(_) => {}
            What::Failed(fault) => panic!("{fault}"),
        }
    }
    choices
}

#[tokio::test]
async fn the_last_token_is_told_with_the_end() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let mut generation = router.generate(call("go")).await.unwrap();
    let (_, events) = engine.generate().await;
    let mut next = async || match generation.pieces.recv().await.unwrap().what {
        What::Text { text, is_last, .. } => Some((text.content, is_last)),
        _ => None,
    };
    say(&events, "a").await;
    assert_eq!(next().await, Some(("a".to_owned(), false)));
    let last = Event::Token {
        token: Scored {
            token: ids("b")[0],
            logprob: -0.5,
            top: vec![],
        },
        is_last: true,
    };
    events.send(last).await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(50), next()).await;
    assert!(early.is_err(), "it waits for the end");
    end(&events, FinishReason::Length).await;
    assert_eq!(next().await, Some(("b".to_owned(), true)));
    assert_eq!(next().await, None);
}

/// A replica that says tokens without end is not listened to without end.
#[tokio::test]
async fn more_tokens_than_were_asked_for_end_the_answer() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let mut generation = router.generate(call("go")).await.unwrap();
    let (_, events) = engine.generate().await;
    say(&events, &"a".repeat(17)).await;
    let (mut said, mut last) = (0, None);
    while let Some(piece) = generation.pieces.recv().await {
        match piece.what {
            What::Text { tokens, .. } => said += tokens.len(),
            other => last = Some(other),
        }
    }
    assert_eq!(said, 16);
    assert!(matches!(last, Some(What::Failed(Fault::ReplicaLost(_)))));
    engine.aborted().await;
}

#[tokio::test]
async fn text_comes_back_up_to_where_it_must_end() {
    // stop strings, shown, what the engine says, how it ends; text, tokens, finish, aborted
    let eos = FinishReason::Stop(EOS);
    let cases = [
        (
            vec![],
            false,
            "héllo",
            FinishReason::Length,
            ("héllo", 6, Finish::Length, false),
        ),
        (vec![], false, "hi\u{1}", eos, ("hi", 3, Finish::Stop, false)),
        (
            vec!["lo w"],
            false,
            "hello world",
            FinishReason::Length,
            ("hel", 7, Finish::Stop, true),
        ),
        (
            vec!["lo w"],
            true,
            "hello world",
            FinishReason::Length,
            ("hello w", 7, Finish::Stop, true),
        ),
        (
            vec!["lo x", "zz"],
            false,
            "hello w",
            FinishReason::Length,
            ("hello w", 7, Finish::Length, false),
        ),
        (
            vec!["world"],
            false,
            "hello wor",
            FinishReason::Length,
            ("hello wor", 9, Finish::Length, false),
        ),
    ];
    let house = House::new();
    let (router, mut engine) = house.open().await;
    for (stop, shown, said, reason, (text, tokens, finish, aborted)) in cases {
        let stop = stop.into_iter().map(str::to_owned).collect();
        let asked = Call {
            stop,
            include_stop_str_in_output: shown,
            ..call("go")
        };
        let mut generation = router.generate(asked).await.unwrap();
        let (generate, events) = engine.generate().await;
        assert_eq!(&generate.prompt[..], [vec![BOS], ids("go")].concat());
        assert_eq!((generate.max_tokens, &generate.stop_tokens), (16, &vec![EOS]));
        assert_eq!(generation.prompt_tokens, generate.prompt);
        match said.strip_suffix('\u{1}') {
            None => say(&events, said).await,
            Some(said) => {
                say(&events, said).await;
                events.send(token(EOS)).await.unwrap();
            }
        }
        end(&events, reason).await;
        let choices = read(&mut generation).await;
        assert_eq!(
            choices[&0],
            (text.to_owned(), tokens, Some((finish, tokens as u32))),
            "{said:?}"
        );
        if aborted {
            assert_eq!(engine.aborted().await, generate.id);
        }
    }
}

/// Of a model that calls as Hermes and reasons as Qwen 3.
fn of_hermes() -> Config {
    Config {
        tool_format: ToolFormat::named("hermes"),
        reasoning_format: ReasoningFormat::named("qwen3"),
        ..Config::default()
    }
}

/// Content, reasoning, calls and the end of an answer, however it ended.
#[tokio::test]
async fn an_answer_is_taken_apart() {
    let house = House::new();
    let (replica, mut engine) = replica();
    let router = house.open_with(of_hermes(), replica).await.unwrap();
    let call_of =
        |n: u32| format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {{\"n\": {n}}}}}\n</tool_call>\n");
    let two = format!("<think>hm</think>so {}{}", call_of(1), call_of(2));
    let (eos, length) = (FinishReason::Stop(EOS), FinishReason::Length);
    let cut = two.split("}}").next().unwrap();
    // choice, parallel, stop, said, end; content, reasoning, calls, finish
    let cases = [
        (
            ToolChoice::Auto,
            true,
            None,
            two.as_str(),
            eos,
            ("so", "hm", vec!["{\"n\": 1}", "{\"n\": 2}"], Finish::Calls),
        ),
        (
            ToolChoice::Auto,
            false,
            None,
            &two,
            eos,
            ("so", "hm", vec!["{\"n\": 1}"], Finish::Calls),
        ),
        (
            ToolChoice::Auto,
            true,
            None,
            &two,
            length,
            ("so", "hm", vec!["{\"n\": 1}", "{\"n\": 2}"], Finish::Length),
        ),
        (
            ToolChoice::Auto,
            true,
            None,
            cut,
            length,
            ("so", "hm", vec!["{\"n\": 1"], Finish::Length),
        ),
        (
            ToolChoice::Auto,
            true,
            Some("1}"),
            &two,
            eos,
            ("so", "hm", vec!["{\"n\": "], Finish::Calls),
        ),
        (
            ToolChoice::Auto,
            true,
            None,
            "no call",
            eos,
            ("no call", "", vec![], Finish::Stop),
        ),
        (
            ToolChoice::None,
            true,
            None,
            "<tool_call>",
            eos,
            ("<tool_call>", "", vec![], Finish::Stop),
        ),
    ];
    for (choice, parallel, stop, said, reason, (content, reasoning, calls, finish)) in cases {
        let answer = Answer {
            tools: [Tool {
                name: "f".to_owned(),
                ..Tool::default()
            }]
            .into(),
            choice,
            parallel,
            separate_reasoning: true,
            thinking_budget: None,
        };
        let asked = Call {
            answer: Some(answer),
            stop: stop.into_iter().map(str::to_owned).collect(),
            max_tokens: Some(256),
            ..call("go")
        };
        let mut generation = router.generate(asked).await.unwrap();
        let (_, events) = engine.generate().await;
        say(&events, said).await;
        end(&events, reason).await;
        let (mut whole, mut last) = (Delta::default(), None);
        let mut arguments: Vec<String> = vec![];
        while let Some(Piece { what, .. }) = generation.pieces.recv().await {
            match what {
                What::Text { text, .. } => {
                    whole.content.push_str(&text.content);
                    whole.reasoning.push_str(&text.reasoning);
                    for call in text.calls {
                        arguments.resize(arguments.len().max(call.index + 1), String::new());
                        arguments[call.index].push_str(&call.arguments);
                    }
                }
                What::Finished { reason, .. } => last = Some(reason),
                _ => panic!("only text and its end"),
            }
        }
        assert_eq!(
            (whole.content.trim_end(), whole.reasoning.as_str()),
            (content, reasoning),
            "{said}"
        );
        assert_eq!(
            (arguments, last),
            (calls.into_iter().map(str::to_owned).collect(), Some(finish)),
            "{said}"
        );
        if stop.is_some() || !parallel {
            engine.aborted().await;
        }
    }
}

/// A grammar begins where the model's reasoning ends, and a bound on it knows its marks.
#[tokio::test]
async fn what_binds_an_answer_knows_its_reasoning() {
    let house = House::new();
    let (replica, mut engine) = replica();
    let router = house.open_with(of_hermes(), replica).await.unwrap();
    let compiler = Compiler::new(&router.tokenizer().vocabulary().with_ends(&[EOS])).unwrap();
    let takes = |grammar: &Grammar, text: &str| {
        let mut guide = compiler.compile(grammar).unwrap();
        let said = ids(text);
        for (at, &id) in said.iter().enumerate() {
            if !guide.mask(&[EOS]).unwrap().allows(id) {
                return false;
            }
            if guide.advance(id).unwrap() == Next::Complete {
                return at + 1 == said.len();
            }
        }
        guide.mask(&[EOS]).unwrap().allows(EOS)
    };
    let form = || Constraint {
        param: "guided_choice".to_owned(),
        form: Form::Grammar(Grammar::choice(&["yes".to_owned()]).unwrap()),
    };
    let answer = |tools: Vec<Tool>, separate_reasoning| Answer {
        tools: tools.into(),
        choice: ToolChoice::Auto,
        parallel: true,
        separate_reasoning,
        thinking_budget: Some(3),
    };
    let tool = |strict| Tool {
        name: "f".to_owned(),
        parameters: Some(
            json!({"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"], "additionalProperties": false}),
        ),
        strict,
        ..Tool::default()
    };
    let call_of =
        |n: u32| format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {{\"n\": {n}}}}}\n</tool_call>");
    let (right, wrong) = (call_of(1), call_of(2));
    let (thought, called) = (format!("hm</think>\n\n{right}"), format!("So {right}"));
    // prompt, constraint, tools, separate; taken, not taken (both empty: no grammar), and what bounds reasoning
    let none: &[&str] = &[];
    type Case<'a> = (
        &'a str,
        Option<Constraint>,
        Vec<Tool>,
        bool,
        &'a [&'a str],
        &'a [&'a str],
        Option<bool>,
    );
    #[rustfmt::skip] // one case, one line
    let cases: [Case; 9] = [
        ("go", Some(form()), vec![], true, &["yes", "<think>no</think>yes"], &["no", "<think>yes"], Some(false)),
        ("go<think>\n", Some(form()), vec![], true, &["no</think>yes"], &["yes", "no</think>no"], Some(true)),
        ("go<think>", Some(form()), vec![], false, &["no</think>yes"], &["yes"], Some(true)),
        ("go<think>\n\n</think>\n\n", Some(form()), vec![], true, &["yes"], &["<think>a</think>yes", "a</think>yes"], None),
        ("go<think>", Some(form()), vec![tool(false)], true, &["a</think>yes", &thought], &["yes", &right, "a</think>\n\nno"], Some(true)),
        ("go", None, vec![tool(false)], true, none, none, Some(false)),
        ("go", None, vec![tool(true)], true, &["hello", &called], &["<tool_call>a", &wrong], Some(false)),
        ("go<think>", None, vec![tool(true)], true, &["hm", &thought, &called], &["<tool_call>a", &wrong], Some(true)),
        ("go</think>", None, vec![tool(true), tool_named("g")], true, &["hello", &right], &[&wrong], None),
    ];
    for (prompt, constraint, tools, separate, yes, no, opened) in cases {
        let asked = Call {
            constraint,
            answer: Some(answer(tools, separate)),
            ..call(prompt)
        };
        let generation = router.generate(asked).await.unwrap();
        let (generate, _events) = engine.generate().await;
        drop(generation);
        engine.aborted().await;
        assert_eq!(generate.grammar.is_some(), !yes.is_empty(), "{prompt:?}");
        if let Some(grammar) = &generate.grammar {
            for (texts, expected) in [(yes, true), (no, false)] {
                for text in texts {
                    assert_eq!(takes(grammar, text), expected, "{prompt:?} {text:?}");
                }
            }
        }
        let budget = generate.thinking.map(|budget| {
            assert_eq!((budget.tokens, &budget.end), (3, &ids("</think>")));
            budget.is_opened
        });
        assert_eq!(budget, opened, "{prompt:?}");
    }
    // A schema that cannot be honoured is named by its place, strict or not being what decides.
    let impossible = |strict| Tool {
        parameters: Some(
            json!({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}}),
        ),
        ..tool(strict)
    };
    let with = |tool: Tool| Call {
        answer: Some(answer(vec![tool], true)),
        ..call("go")
    };
    let refused = router.generate(with(impossible(true))).await.err().unwrap();
    assert_eq!(kind(&refused), "tools[0].function.parameters", "{refused}");
    router.generate(with(impossible(false))).await.unwrap();
    // And a model without reasoning has no bound on it.
    let (router, _engine) = House::new().open().await;
    let refused = router.generate(with(tool(false))).await.err().unwrap();
    assert_eq!(kind(&refused), "tools", "{refused}");
    let asked = Call {
        answer: Some(answer(vec![], true)),
        ..call("go")
    };
    let refused = router.generate(asked).await.err().unwrap();
    assert_eq!(kind(&refused), "thinking_token_budget", "{refused}");
}

fn tool_named(name: &str) -> Tool {
    Tool {
        name: name.to_owned(),
        ..Tool::default()
    }
}

#[tokio::test]
async fn choices_are_sequences_of_their_own() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let sampling = RawSampling {
        seed: Some(5),
        ..RawSampling::default()
    };
    let mut generation = router
        .generate(Call {
            n: 3,
            sampling,
            ..call("x")
        })
        .await
        .unwrap();
    let mut sequences = Vec::new();
    for seed in 5..8 {
        let (generate, events) = engine.generate().await;
        assert_eq!(generate.sampling.seed(), Some(seed));
        sequences.push((generate.id, events));
    }
    for (i, (_, events)) in sequences.iter().enumerate().rev() {
        say(events, &"abc"[..=i]).await;
        end(events, FinishReason::Length).await;
    }
    let texts: Vec<String> = read(&mut generation)
        .await
        .into_values()
        .map(|choice| choice.0)
        .collect();
    assert_eq!(texts, ["a", "ab", "abc"]);

    let generation = router.generate(Call { n: 2, ..call("x") }).await.unwrap();
    let (first, _events) = engine.generate().await;
    let (second, _more) = engine.generate().await;
    drop(generation);
    assert_eq!(
        (engine.aborted().await, engine.aborted().await),
        (first.id, second.id)
    );
}

#[tokio::test]
async fn a_full_house_refuses_until_somebody_leaves() {
    let house = House::new();
    let (replica, mut engine) = replica();
    let router = house
        .open_with(
            Config {
                max_waiting: 1,
                ..Config::default()
            },
            replica,
        )
        .await
        .unwrap();
    // 4 run, 1 waits.
    let first = router.generate(Call { n: 2, ..call("x") }).await.unwrap();
    let _others = router.generate(Call { n: 3, ..call("x") }).await.unwrap();
    let refused = router
        .generate(call("x"))
        .await
        .err()
        .expect("the sixth waits too many");
    assert!(
        matches!(refused, RouterError::Busy { waiting: 1, .. }),
        "{refused:?}"
    );
    // Another client finds its share of the places kept.
    let newcomer = Call {
        client: Client {
            key: 2,
            connection: 2,
            ..Client::default()
        },
        ..call("y")
    };
    drop(router.generate(newcomer).await.expect("within its share"));
    drop(first);
    // A channel that closes without an end would be a lost replica.
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(engine.generate().await);
    }
    for _ in 0..3 {
        engine.aborted().await;
    }
    for attempt in 0.. {
        match router.generate(call("x")).await {
            Ok(_) => break,
            Err(error) => assert!(attempt < 100, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_engine_that_dies_ends_its_calls() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let mut generation = router.generate(call("x")).await.unwrap();
    let (_, events) = engine.generate().await;
    say(&events, "a").await;
    drop((events, engine));
    let mut last = None;
    while let Some(piece) = generation.pieces.recv().await {
        last = Some(piece.what);
    }
    assert!(
        matches!(last, Some(What::Failed(Fault::ReplicaLost(_)))),
        "{last:?}"
    );
    assert!(!router.ready());
    assert_eq!(kind(&router.generate(call("x")).await.err().unwrap()), "Engine");
}

#[tokio::test]
async fn bad_calls_are_refused_by_name() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let long = "x".repeat(600);
    let cases = [
        (
            Call {
                model: "nobody".to_owned(),
                ..call("x")
            },
            "UnknownModel",
        ),
        (
            Call {
                model: "nobody@step-3".to_owned(),
                ..call("x")
            },
            "UnknownModel",
        ),
        (Call { n: 0, ..call("x") }, "n"),
        (Call { n: 1000, ..call("x") }, "n"),
        (
            Call {
                max_tokens: Some(513),
                ..call("x")
            },
            "max_tokens",
        ),
        (
            Call {
                stop: vec![String::new()],
                ..call("x")
            },
            "stop",
        ),
        (
            Call {
                stop: vec!["x".to_owned(); 65],
                ..call("x")
            },
            "stop",
        ),
        (
            Call {
                stop_token_ids: vec![258],
                ..call("x")
            },
            "stop_token_ids",
        ),
        (
            Call {
                sampling: RawSampling {
                    min_tokens: Some(17),
                    ..RawSampling::default()
                },
                ..call("x")
            },
            "min_tokens",
        ),
        (
            Call {
                sampling: RawSampling {
                    top_p: Some(2.0),
                    ..RawSampling::default()
                },
                ..call("x")
            },
            "top_p",
        ),
        (
            Call {
                prompt: Prompt::Tokens(vec![]),
                ..call("x")
            },
            "prompt",
        ),
        (
            Call {
                prompt: Prompt::Tokens(vec![5, 258]),
                ..call("x")
            },
            "prompt",
        ),
        (call(&long), "ContextLength"),
        (call(&"x".repeat(10_000_000)), "ContextLength"),
    ];
    for (call, expected) in cases {
        let shown = format!("{:.80}", format!("{call:?}"));
        let error = router
            .generate(call)
            .await
            .err()
            .unwrap_or_else(|| panic!("admitted: {shown}"));
        assert_eq!(kind(&error), expected, "{error}");
    }
    assert!(engine.commands.try_recv().is_err(), "nothing reached the engine");

    let messages = vec![Message::new("user", "hi")];
    let prompt = Prompt::Chat {
        messages,
        add_generation_prompt: true,
        continue_final_message: false,
        kwargs: BTreeMap::new(),
    };
    let _generation = router
        .generate(Call {
            prompt,
            max_tokens: None,
            ..call("")
        })
        .await
        .unwrap();
    let (generate, _events) = engine.generate().await;
    assert_eq!(&generate.prompt[..], [vec![BOS], ids("u:hi\na:")].concat());
    assert_eq!(generate.max_tokens as usize, 512 - generate.prompt.len());
}

/// Threads for work elsewhere: one, which is taken while a call is polled first. What answers nevertheless was worked on by
/// the thread of all requests.
#[test]
fn long_texts_are_worked_on_elsewhere() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    runtime.block_on(long_texts_are_worked_on_by_another_thread());
}

async fn long_texts_are_worked_on_by_another_thread() {
    async fn is_inline(call: impl Future) -> bool {
        use futures::FutureExt;
        let (release, released) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || released.recv());
        let mut call = std::pin::pin!(call);
        let is_inline = (&mut call).now_or_never().is_some();
        drop(release);
        if !is_inline {
            call.await;
        }
        is_inline
    }
    let house = House::new();
    let (router, _engine) = house.open().await;
    let text = |bytes: usize| Prompt::Text("a ".repeat(bytes / 2));
    // This template reads no documents: what comes of the chat is a refusal, made elsewhere.
    let chat = Prompt::Chat {
        messages: vec![],
        add_generation_prompt: true,
        continue_final_message: false,
        kwargs: BTreeMap::from([("documents".to_owned(), json!(["x".repeat(1 << 16)]))]),
    };
    for (prompt, expected) in [(text(1 << 10), true), (text(1 << 16), false), (chat, false)] {
        assert_eq!(
            is_inline(router.own().tokenize(prompt, SpecialTokens::Add)).await,
            expected
        );
    }
    let ids = vec![FIRST_BYTE + 97; 1 << 16];
    assert!(!is_inline(router.own().detokenize(ids.clone())).await);
    assert_eq!(
        router.own().detokenize(ids.clone()).await.unwrap().len(),
        ids.len()
    );
}
