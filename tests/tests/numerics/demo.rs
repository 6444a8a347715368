//! A trained model, the one in the binary: log-probabilities and greedy texts of transformers.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tandem_backend::model::Decoder;
use tandem_core::TokenId;
use tandem_kernels::weight::Precision;

use crate::fixture::{device, fixtures_folder, token};
use crate::run::{Pages, Sequence, base, logprobs, packed, paged};

struct Case {
    prompt: Vec<TokenId>,
    /// Of every prompt token but the first.
    logprobs: Vec<f64>,
    greedy: Vec<TokenId>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo")
}

/// The cases, and how far transformers' own bfloat16 is from them.
fn expected() -> (Vec<Case>, f64) {
    let bytes = std::fs::read(fixtures_folder().join("demo.json")).expect("the fixture is committed");
    let expected: Value = serde_json::from_slice(&bytes).expect("the fixture is JSON");
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
    let cases = list(&expected["cases"]).iter().map(case).collect();
    (cases, expected["bf16_max_abs_error"].as_f64().expect("a number"))
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
    let (cases, theirs) = expected();
    let load = |precision| Decoder::load(&folder(), precision, device()).expect("the demo model loads");
    let float32 = worst_error(&load(Precision::F32), &cases);
    let bfloat16 = worst_error(&load(Precision::Bf16), &cases);
    println!(
        "demo: float32 error {float32:.1e}, bfloat16 {bfloat16:.4} (transformers' bfloat16: {theirs:.4})"
    );
    assert!(float32 <= 1e-3, "float32 is {float32} off");
    assert!(
        bfloat16 <= 2.0 * theirs,
        "bfloat16 is {bfloat16} off, transformers' own is {theirs}"
    );
}

#[test]
fn greedy_texts_are_transformers() {
    let (cases, _) = expected();
    let decoder = Decoder::load(&folder(), Precision::F32, device()).expect("the demo model loads");
    for Case { prompt, greedy, .. } in &cases {
        let mut pages = Pages::new(&decoder, 1, prompt.len() + greedy.len(), prompt.len());
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
