//! Layers that see different windows, through the engine: what a window leaves behind goes to others, and no answer
//! changes. Judged by the forward of whole sequences, which has no cache.

use serde_json::json;
use tandem_backend::family::LayerGroups;
use tandem_backend::model::Decoder;
use tandem_backend::ranks::Team;
use tandem_backend::{Dtype, ModelLen, Options, start};
use tandem_core::TokenId;
use tandem_core::message::{Generate, Scored};
use tandem_core::sampling::{RawSampling, Sampling};
use tandem_core::sched::Lookup;
use tandem_kernels::attention::CacheDtype;
use tandem_kernels::machine;
use tandem_kernels::weight::Precision;
use tch::Device;

use crate::ranks::{Model, answers, prompt, scored};
use crate::run::{base, logprobs, packed};

const WINDOW: usize = 40;
const LAYERS: usize = 17;
const CLOSE: f64 = 1e-3;

/// Gemma 3's layers: one of six sees everything. 15 with a window and 2 without are by twos, with room for one more.
fn model() -> Model {
    let config = json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "torch_dtype": "float32",
        "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "rope_local_base_freq": 100.0, "sliding_window": WINDOW,
        "sliding_window_pattern": 6, "eos_token_id": 0, "tie_word_embeddings": true,
    });
    Model::draw("windows", &config)
}

/// Prompts that share beginnings, long and short, some of which are scored; answers that leave many windows behind.
fn requests() -> Vec<Generate> {
    let long = prompt(150, 1);
    let other = [&long[..100], &prompt(30, 5)[..]].concat();
    let plain = |prompt: &[TokenId], max_tokens| {
        let raw = RawSampling {
            temperature: Some(0.0),
            logprobs: Some(0),
            ..RawSampling::default()
        };
        Generate {
            sampling: Sampling::new(raw, 101).expect("plain sampling"),
            ..scored(prompt, max_tokens)
        }
    };
    // Short ones come in together, and then grow.
    let short = [3, 6, 7, 8].map(|seed| plain(&prompt(9, seed), 150));
    let long = [
        plain(&long, 200),
        plain(&other, 160),
        scored(&long, 40),
        plain(&long[..64], 100),
        // Behind what the first leaves.
        plain(&[&long[..], &other[..]].concat(), 60),
    ];
    short.into_iter().chain(long).collect()
}

fn check(answers: &[Vec<Scored>], expected: &[Vec<Scored>], what: &str) {
    let ids = |answer: &[Scored]| answer.iter().map(|scored| scored.token).collect::<Vec<_>>();
    for (i, (answer, expected)) in answers.iter().zip(expected).enumerate() {
        assert_eq!(ids(answer), ids(expected), "request {i}, {what}");
        match *machine::features() != machine::Features::default() {
            // Our kernels promise the same bits.
            true => assert_eq!(answer, expected, "request {i}, {what}"),
            false => answer.iter().zip(expected).for_each(|(ours, theirs)| {
                let off = f64::from((ours.logprob - theirs.logprob).abs());
                assert!(off < CLOSE, "request {i}, {what}: {ours:?} is not {theirs:?}");
            }),
        }
    }
}

#[test]
fn no_answer_depends_on_what_windows_left_behind() {
    let model = model();
    let requests = requests();
    let options = Options {
        dtype: Dtype::F32,
        kv_cache_bytes: Some(16 << 20),
        threads: Some(2),
        ..Options::new(model.path())
    };
    // Each alone, with an empty cache.
    let alone = |dtype| -> Vec<Vec<Scored>> {
        let one = |request: &Generate| {
            let replica = start(Options {
                kv_cache_dtype: dtype,
                ..options.clone()
            });
            answers(&replica.expect("it starts"), vec![request.clone()]).remove(0)
        };
        requests.iter().map(one).collect()
    };
    let expected = alone(None);
    let decoder = Decoder::load(&model.path(), Precision::F32, Device::Cpu).expect("the model loads");
    for (request, answer) in requests.iter().zip(&expected) {
        let n = request.max_tokens as usize;
        let generated = answer[answer.len() - n..].iter().map(|scored| scored.token);
        let whole: Vec<TokenId> = request.prompt.iter().copied().chain(generated).collect();
        let logits = packed(&decoder, &[base(&whole)]).remove(0);
        let best = Vec::<i64>::try_from(logits.argmax(-1, false)).expect("a token for each row");
        let scores = Vec::<f64>::try_from(logprobs(&logits, &whole)).expect("float64");
        for (place, scored) in (1..whole.len()).rev().zip(answer.iter().rev()) {
            assert_eq!(scored.token, whole[place], "token {place}");
            let off = (f64::from(scored.logprob) - scores[place - 1]).abs();
            assert!(
                off < CLOSE,
                "token {place}: {} is not {}",
                scored.logprob,
                scores[place - 1]
            );
            let is_chosen = place >= request.prompt.len();
            assert!(
                !is_chosen || best[place - 1] == i64::from(scored.token),
                "token {place}"
            );
        }
    }
    let layers = LayerGroups::of(&decoder.spec);
    assert_eq!((layers.layers, layers.windows.len()), (2, 9));
    // Blocks for one sequence of 350 tokens in steps of 7: 11 of the layers that see everything, 3 of each other group.
    let blocks = layers.blocks(7).most(350);
    assert_eq!(blocks, 11 + 8 * 3);
    let block_bytes = decoder
        .layout()
        .cache_shape(&decoder.spec, 1)
        .block_bytes(Precision::F32) as u64;
    let whole = 11 * (block_bytes / 2 * LAYERS as u64);
    assert!(
        2 * blocks as u64 * block_bytes < whole,
        "less than half of what all layers would keep"
    );
    let few = |blocks: usize, options: Options| Options {
        kv_cache_bytes: Some(blocks as u64 * block_bytes),
        max_model_len: Some(ModelLen::Asked(350)),
        max_num_batched_tokens: 7,
        ..options
    };
    let lookup = Some(Lookup {
        tokens: 5,
        min: 1,
        max: 4,
        max_sequences: 64,
    });
    let team = |world| Options {
        team: Team::Threads(world),
        ..options.clone()
    };
    let guessing = Options {
        lookup,
        ..options.clone()
    };
    let chunked = Options {
        max_num_batched_tokens: 7,
        ..options.clone()
    };
    let single = Options {
        max_num_batched_tokens: 1,
        ..options.clone()
    };
    for (world, options) in [
        ("together", options.clone()),
        ("chunked", chunked),
        ("one by one token", single),
        ("blocks for one", few(blocks, options.clone())),
        ("few blocks", few(2 * blocks, options.clone())),
        ("guessing", guessing.clone()),
        ("guessing in few blocks", few(2 * blocks, guessing)),
    ] {
        let replica = start(options).expect("it starts");
        for round in ["cold", "cached"] {
            check(
                &answers(&replica, requests.clone()),
                &expected,
                &format!("{world}, {round}"),
            );
        }
        let stats = replica.stats.borrow().clone();
        assert!(
            world == "blocks for one" || stats.prefix_hit_tokens > 0,
            "{world}: {stats:?}"
        );
        assert!(
            !world.ends_with("few blocks") || stats.preemptions > 0,
            "{world}: {stats:?}"
        );
        assert!(
            !world.starts_with("guessing") || stats.accepted_tokens > 0,
            "{world}: {stats:?}"
        );
    }
    // Two ranks sum in another order, so their bits are theirs.
    let replica = start(team(2)).expect("it starts");
    for round in ["cold", "cached"] {
        let ours = answers(&replica, requests.clone());
        for (answer, expected) in ours.iter().zip(&expected) {
            assert_eq!(answer.len(), expected.len());
            for (ours, theirs) in answer.iter().zip(expected) {
                let is_close = (ours.logprob - theirs.logprob).abs() < CLOSE as f32;
                assert!(
                    ours.token == theirs.token && is_close,
                    "two ranks, {round}: {ours:?} is not {theirs:?}"
                );
            }
        }
    }
    for dtype in [CacheDtype::Bf16, CacheDtype::Int8] {
        let expected = alone(Some(dtype));
        let replica = start(Options {
            kv_cache_dtype: Some(dtype),
            max_num_batched_tokens: 7,
            ..options.clone()
        });
        let replica = replica.expect("it starts");
        for round in ["cold", "cached"] {
            check(
                &answers(&replica, requests.clone()),
                &expected,
                &format!("{dtype:?}, {round}"),
            );
        }
    }
}
