//! A trained model: log-probabilities and greedy texts of transformers. The model is not in the repository; without it
//! these tests say so and pass. TANDEM_STORY_MODEL names its folder.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tandem_backend::model::Decoder;
use tandem_core::TokenId;
use tandem_kernels::weight::Precision;
use tch::Device;

use crate::fixture::{fixtures_folder, token};
use crate::run::{Pages, Sequence, base, logprobs, packed, paged};

struct Case {
    prompt: Vec<TokenId>,
    /// Of every prompt token but the first.
    logprobs: Vec<f64>,
    greedy: Vec<TokenId>,
}

fn open() -> Option<(PathBuf, Vec<Case>)> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/models/story");
    let folder = std::env::var_os("TANDEM_STORY_MODEL").map_or(beside, PathBuf::from);
    let Ok(bytes) = std::fs::read(folder.join("expected.json")) else {
        println!("skipped: no story model (set TANDEM_STORY_MODEL to its folder)");
        return None;
    };
    let expected: Value = serde_json::from_slice(&bytes).expect("expected.json is JSON");
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let case = |case: &Value| Case {
        prompt: list(&case["prompt_ids"]).iter().map(token).collect(),
        logprobs: list(&case["prompt_logprobs"])
            .iter()
            .skip(1)
            .map(|x| x.as_f64().expect("a number"))
            .collect(),
        greedy: list(&case["greedy_ids"]).iter().map(token).collect(),
    };
    Some((folder, list(&expected["cases"]).iter().map(case).collect()))
}

fn worst_error(decoder: &Decoder, cases: &[Case]) -> f64 {
    let sequences: Vec<Sequence> = cases.iter().map(|case| base(&case.prompt)).collect();
    let ways = [packed(decoder, &sequences), paged(decoder, &sequences, 3)];
    let errors = ways
        .iter()
        .flat_map(|logits| logits.iter().zip(cases))
        .flat_map(|(logits, case)| {
            let ours = Vec::<f64>::try_from(logprobs(logits, &case.prompt)).expect("doubles");
            assert_eq!(ours.len(), case.logprobs.len());
            ours.into_iter()
                .zip(&case.logprobs)
                .map(|(ours, expected)| (ours - expected).abs())
                .collect::<Vec<_>>()
        });
    errors.fold(0.0, f64::max)
}

#[test]
fn log_probabilities_are_transformers() {
    let Some((folder, cases)) = open() else { return };
    let load = |precision| Decoder::load(&folder, precision, Device::Cpu).expect("the story model loads");
    let float32 = worst_error(&load(Precision::F32), &cases);
    let bfloat16 = worst_error(&load(Precision::Bf16), &cases);
    let yardstick = std::fs::read(fixtures_folder().join("story.json")).expect("the fixture is committed");
    let yardstick: Value = serde_json::from_slice(&yardstick).expect("the fixture is JSON");
    let theirs = yardstick["bf16_max_abs_error"].as_f64().expect("a number");
    println!(
        "story: float32 error {float32:.1e}, bfloat16 {bfloat16:.4} (transformers' bfloat16: {theirs:.4})"
    );
    assert!(float32 <= 1e-3, "float32 is {float32} off");
    assert!(
        bfloat16 <= 2.0 * theirs,
        "bfloat16 is {bfloat16} off, transformers' own is {theirs}"
    );
}

#[test]
fn greedy_texts_are_transformers() {
    let Some((folder, cases)) = open() else { return };
    let decoder = Decoder::load(&folder, Precision::F32, Device::Cpu).expect("the story model loads");
    for Case { prompt, greedy, .. } in &cases {
        let mut pages = Pages::new(&decoder, 1, prompt.len() + greedy.len());
        let mut next = |tokens: &[TokenId], done| {
            let logits = pages.append(&decoder, &[(0, base(tokens))], done).remove(0);
            logits.select(0, -1).argmax(-1, false).int64_value(&[]) as TokenId
        };
        let mut ours = vec![next(prompt, 0)];
        while ours.len() < greedy.len() {
            let last = ours[ours.len() - 1];
            ours.push(next(&[last], prompt.len() + ours.len() - 1));
        }
        assert_eq!(&ours, greedy, "after {prompt:?}");
    }
}
