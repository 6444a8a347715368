//! What is said: right, and the same bits whatever runs beside it.

use tandem_core::sched::Lookup;
use tandem_kernels::attention::CacheDtype;

use super::*;

/// The cases' prompts, alone and continued (longer than a KV block), scored or not, greedy or drawn.
fn varied(cases: &[Case]) -> Vec<Generate> {
    let drawn = |seed| RawSampling {
        seed: Some(seed),
        top_p: Some(0.9),
        logprobs: Some(2),
        ..RawSampling::default()
    };
    let scored = || RawSampling {
        logprobs: Some(3),
        prompt_logprobs: Some(2),
        ..greedy()
    };
    let mut requests = vec![];
    for (
        i,
        Case {
            prompt,
            greedy: continuation,
            ..
        },
    ) in cases.iter().enumerate()
    {
        let long = [&prompt[..], continuation].concat();
        // On past the end of the answer: only long texts fill the cache.
        requests.push(Generate {
            stop_tokens: vec![],
            ..request(
                prompt,
                40,
                RawSampling {
                    logprobs: Some(5),
                    ..greedy()
                },
            )
        });
        requests.push(Generate {
            stop_tokens: vec![],
            ..request(&long, 20, drawn(i as u64))
        });
        requests.push(request(&long, 8, scored()));
        let shorter = &long[..long.len().min(33)];
        requests.push(request(
            shorter,
            1 + i as u32,
            RawSampling {
                frequency_penalty: Some(0.5),
                ..drawn(7)
            },
        ));
        requests.push(request(&long, 0, scored()));
    }
    requests
}

#[test]
fn it_says_what_transformers_says() {
    let folder = demo();
    let mut rig = Rig::new(options(&folder));
    for Case {
        prompt,
        prompt_logprobs,
        greedy: expected,
        ..
    } in cases()
    {
        let raw = RawSampling {
            logprobs: Some(1),
            prompt_logprobs: Some(0),
            ..greedy()
        };
        let answer = rig.ask(Generate {
            stop_tokens: vec![],
            ..request(&prompt, expected.len() as u32, raw)
        });
        assert_eq!(answer.ids(), expected);
        assert_eq!(answer.end, Some(Ok((FinishReason::Length, 0))));
        let scores = answer.prompt.unwrap();
        assert_eq!((scores.len(), &scores[0]), (prompt.len(), &None));
        for ((score, &token), expected) in scores[1..]
            .iter()
            .flatten()
            .zip(&prompt[1..])
            .zip(prompt_logprobs)
        {
            assert_eq!(score.token, token);
            assert!(
                (f64::from(score.logprob) - expected).abs() < 1e-3,
                "{} is not {expected}",
                score.logprob
            );
        }
        // A generated token is the best one, by the same float.
        answer
            .tokens
            .iter()
            .for_each(|token| assert_eq!(token.top, [(token.token, token.logprob)]));
        let eos = rig.ask(Generate {
            stop_tokens: vec![expected[3]],
            ..request(&prompt, 48, greedy())
        });
        let until = expected.iter().position(|&id| id == expected[3]).unwrap();
        assert_eq!(eos.ids(), expected[..=until]);
        assert!(matches!(eos.end, Some(Ok((FinishReason::Stop(token), _))) if token == expected[3]));
    }
}

/// A cache in another dtype than the weights': the same bits in a batch, in chunks and from cached blocks as alone, and near what the weights' own gives (differences of log-probabilities that were seen: 0.030 at most, 0.0011 in the mean in
/// bfloat16; 0.072 and 0.0032 in int8).
#[test]
fn a_cache_of_its_own_dtype_answers_nearly_the_same() {
    let folder = demo();
    let requests = varied(&cases());
    let exact = Rig::new(options(&folder)).ask_all(&requests);
    for (dtype, tolerance) in [(CacheDtype::Bf16, 0.1), (CacheDtype::Int8, 0.2)] {
        let options = Options {
            kv_cache_dtype: Some(dtype),
            ..options(&folder)
        };
        let mut rig = Rig::new(options.clone());
        assert!(
            rig.handle.info.dtype.ends_with(dtype.name()),
            "{}",
            rig.handle.info.dtype
        );
        let expected: Vec<Answer> = requests.iter().map(|request| rig.ask(request.clone())).collect();
        let mut chunked = Rig::new(Options {
            max_num_batched_tokens: 7,
            ..options
        });
        for round in ["cold", "cached"] {
            for (i, answer) in chunked.ask_all(&requests).iter().enumerate() {
                answer.assert_same(&expected[i], &format!("request {i}, {dtype:?}, {round}"));
            }
        }
        let (mut worst, mut sum, mut n) = (0.0f64, 0.0, 0);
        for (answer, exact) in expected.iter().zip(&exact) {
            // Up to where an answer takes another word.
            let same = answer.scores().zip(exact.scores());
            for (ours, theirs) in same.take_while(|(ours, theirs)| ours.token == theirs.token) {
                let off = f64::from((ours.logprob - theirs.logprob).abs());
                (worst, sum, n) = (worst.max(off), sum + off, n + 1);
            }
        }
        println!(
            "{dtype:?}: {worst:.4} at most, {:.5} in the mean of {n}",
            sum / f64::from(n)
        );
        assert!(
            n > 1000 && worst > 0.0 && worst < tolerance,
            "{dtype:?}: off by {worst} over {n} tokens"
        );
    }
}

#[test]
fn answers_are_the_same_bits_whatever_runs_beside_them() {
    let folder = demo();
    let requests = varied(&cases());
    // Each request in an engine that has nothing else to do and nothing in its cache.
    let mut alone = Rig::new(options(&folder));
    let expected: Vec<_> = requests
        .iter()
        .map(|request| {
            let answer = alone.ask(request.clone());
            // An empty cache for the next one.
            alone = Rig::new(options(&folder));
            answer
        })
        .collect();
    let block_bytes = alone.handle.info.kv_bytes / u64::from(alone.handle.info.kv_blocks);
    let lookup = Lookup {
        tokens: 5,
        min: 1,
        max: 4,
        max_sequences: 64,
    };
    let worlds = [
        ("batched", options(&folder)),
        (
            "chunked",
            Options {
                max_num_batched_tokens: 7,
                ..options(&folder)
            },
        ),
        (
            "one by one token",
            Options {
                max_num_batched_tokens: 1,
                ..options(&folder)
            },
        ),
        (
            "preempted",
            Options {
                kv_cache_bytes: Some(4 * block_bytes),
                max_model_len: Some(crate::ModelLen::Asked(128)),
                ..options(&folder)
            },
        ),
        (
            "one thread",
            Options {
                threads: Some(1),
                ..options(&folder)
            },
        ),
        (
            "guessing",
            Options {
                lookup: Some(lookup),
                ..options(&folder)
            },
        ),
        (
            "guessing in few blocks",
            Options {
                lookup: Some(lookup),
                kv_cache_bytes: Some(4 * block_bytes),
                max_model_len: Some(crate::ModelLen::Asked(128)),
                ..options(&folder)
            },
        ),
    ];
    for (world, options) in worlds {
        let mut rig = Rig::new(options);
        for round in ["cold", "cached"] {
            let answers = rig.ask_all(&requests);
            for (i, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
                answer.assert_same(expected, &format!("request {i}, {world}, {round}"));
            }
        }
        let stats = rig.stats();
        assert!(world != "preempted" || stats.preemptions > 0, "{stats:?}");
        assert!(
            !world.starts_with("guessing") || (100..stats.guessed_tokens).contains(&stats.accepted_tokens),
            "{stats:?}"
        );
        assert!(stats.prefix_hit_tokens > 0, "{world}: {stats:?}");
        rig.wait_until("free again", |stats| {
            stats.kv_blocks_used == 0 && stats.running == 0
        });
    }
}

#[test]
fn seeds_decide_draws() {
    let folder = demo();
    let prompt = &cases()[0].prompt;
    let draw = |rig: &mut Rig, seed| {
        // Warm: the model is sure of its answers.
        let raw = RawSampling {
            seed,
            temperature: Some(2.0),
            ..RawSampling::default()
        };
        let asked = Generate {
            stop_tokens: vec![],
            ..request(prompt, 48, raw)
        };
        rig.ask(asked).ids()
    };
    let (mut one, mut two) = (Rig::new(options(&folder)), Rig::new(options(&folder)));
    assert_eq!(draw(&mut one, Some(5)), draw(&mut two, Some(5)));
    assert_ne!(draw(&mut one, Some(5)), draw(&mut one, Some(6)));
    assert_ne!(
        draw(&mut one, None),
        draw(&mut one, None),
        "without a seed each request draws its own"
    );
}

/// Engines of one process share the pool: that one of them changes its threads disturbs no other's step.
#[test]
fn an_engine_that_starts_with_other_threads_disturbs_nobody() {
    let folder = demo();
    let requests = varied(&cases());
    let with = |threads| Options {
        threads: Some(threads),
        ..options(&folder)
    };
    let expected = Rig::new(with(2)).ask_all(&requests);
    std::thread::scope(|scope| {
        for engine in 0..3 {
            let (requests, expected) = (&requests, &expected);
            let with = &with;
            scope.spawn(move || {
                for round in 0..4 {
                    let answers = Rig::new(with(1 + (engine + round) % 2)).ask_all(requests);
                    for (i, (answer, expected)) in answers.iter().zip(expected).enumerate() {
                        answer.assert_same(expected, &format!("request {i}, engine {engine}, round {round}"));
                    }
                }
            });
        }
    });
}

/// As transformers has them, and the same bits of a prompt that came in chunks, whose beginning was in the cache, or that
/// gave up its blocks in between.
#[test]
fn vectors_are_averages_of_the_last_hidden_states() {
    let folder = demo();
    let cases = cases();
    let asked: Vec<(Generate, &Vec<f32>)> = cases
        .iter()
        .flat_map(|case| {
            case.pooled
                .iter()
                .map(|(pooling, vector)| (&case.prompt, *pooling, vector))
        })
        .map(|(prompt, pooling, vector)| {
            let asked = Generate {
                pooling: Some(pooling),
                ..request(prompt, 0, RawSampling::default())
            };
            (asked, vector)
        })
        .collect();
    let requests: Vec<Generate> = asked.iter().map(|(request, _)| request.clone()).collect();
    let mut rig = Rig::new(options(&folder));
    let answers = rig.ask_all(&requests);
    for (answer, (request, expected)) in answers.iter().zip(&asked) {
        assert!(
            matches!(answer.end, Some(Ok((FinishReason::Length, _)))),
            "{:?}",
            answer.end
        );
        let vector = answer.vector.as_ref().unwrap();
        assert_eq!(vector.len(), expected.len());
        for (ours, theirs) in vector.iter().zip(*expected) {
            assert!(
                (ours - theirs).abs() < 1e-4,
                "{:?}: {ours} is not {theirs}",
                request.pooling
            );
        }
    }
    let small = |options: Options| Options {
        max_num_batched_tokens: 7,
        kv_cache_bytes: Some(1 << 20),
        ..options
    };
    for mut other in [rig, Rig::new(small(options(&folder)))] {
        for (again, first) in other.ask_all(&requests).iter().zip(&answers) {
            assert_eq!(again.vector, first.vector);
        }
    }
}

#[test]
fn a_prompt_is_not_pooled_and_continued() {
    let folder = demo();
    let mut rig = Rig::new(options(&folder));
    for (max_tokens, raw) in [
        (1, greedy()),
        (
            0,
            RawSampling {
                prompt_logprobs: Some(0),
                ..greedy()
            },
        ),
    ] {
        let answer = rig.ask(Generate {
            pooling: Some(Pooling::Last),
            ..request(&[1, 2], max_tokens, raw)
        });
        assert!(
            matches!(answer.end, Some(Err(Fault::Refused(_)))),
            "{:?}",
            answer.end
        );
    }
}
