//! Every number of a run that the request leaves open. The one place where defaults of training are chosen.
//!
//! | number | default | why |
//! |---|---|---|
//! | n_epochs | 3; up to 25 for small files, 1 for huge ones | the rule OpenAI documents for its "auto": see examples at least 100 times in all, at most 25 000 |
//! | batch_size | rows / 32, from 1 to 8 | some thirty steps an epoch where the file allows it |
//! | learning_rate | 2e-4 x learning_rate_multiplier | the LoRA default of TRL's and QLoRA's examples |
//! | lr_scheduler_type, warmup | linear, 3 % of the steps | transformers; QLoRA |
//! | weight_decay, max_grad_norm | 0, 1.0 | TRL |
//! | r, alpha, dropout | 16, 2 r, 0 | alpha = 2 r is the common choice; all linear layers matter more than r (QLoRA) |
//! | packing | when it leaves 32 rows or more | packing a small file would leave a handful of steps |
//! | save_steps | a fifth of the run | a kill costs a fifth at most |

use tandem_core::job::{Hyper, Lora, Method, Schedule};
use tandem_core::replica::ReplicaInfo;

use crate::api::JobRequest;
use crate::jobs::check::{ALL_LINEAR, SCHEDULES};

const EPOCHS: u64 = 3;
const EXAMPLES_SEEN_LOW: u64 = 100;
const EXAMPLES_SEEN_HIGH: u64 = 25_000;
const MAX_AUTO_EPOCHS: u64 = 25;
const STEPS_PER_EPOCH: u64 = 32;
const MAX_AUTO_BATCH: u64 = 8;
const LEARNING_RATE: f64 = 2e-4;
const WARMUP_RATIO: f64 = 0.03;
const LORA_R: u32 = 16;
/// Longer rows are cut unless the request says more.
const MAX_AUTO_SEQ_LENGTH: u32 = 2048;
const CHECKPOINTS: u64 = 5;

/// The part of a replica that the choice depends on. `tandem train` has no replica, only this.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    pub max_model_len: u32,
    pub max_lora_rank: u32,
    pub lora_targets: &'a [String],
}

impl<'a> From<&'a ReplicaInfo> for Bounds<'a> {
    fn from(info: &'a ReplicaInfo) -> Bounds<'a> {
        let ReplicaInfo {
            max_model_len,
            max_lora_rank,
            lora_targets,
            ..
        } = info;
        Bounds {
            max_model_len: *max_model_len,
            max_lora_rank: *max_lora_rank,
            lora_targets,
        }
    }
}

/// What the tokenised training file has.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    pub examples: u64,
    pub tokens: u64,
}

/// Decided before the file is tokenised, because rows are cut at it.
pub fn max_seq_length<'a>(request: &JobRequest, bounds: impl Into<Bounds<'a>>) -> u32 {
    request
        .max_seq_length
        .unwrap_or(bounds.into().max_model_len.min(MAX_AUTO_SEQ_LENGTH))
}

/// `request` has a seed and, from a client, has passed `check::request`.
pub fn choose<'a>(request: &JobRequest, bounds: impl Into<Bounds<'a>>, facts: Facts) -> Hyper {
    let bounds = bounds.into();
    let max_seq_length = max_seq_length(request, bounds);
    let packed_rows = facts
        .tokens
        .div_ceil(u64::from(max_seq_length))
        .min(facts.examples);
    let packing = request.packing.unwrap_or(packed_rows >= STEPS_PER_EPOCH);
    let rows = if packing { packed_rows } else { facts.examples };
    let n_epochs = u64::from(
        request
            .n_epochs
            .unwrap_or_else(|| small(auto_epochs(facts.examples))),
    );
    let batch_size = request
        .batch_size
        .unwrap_or_else(|| small((rows / STEPS_PER_EPOCH).clamp(1, MAX_AUTO_BATCH)));
    let gradient_accumulation_steps = request.gradient_accumulation_steps.unwrap_or(1);

    let step_rows = u64::from(batch_size) * u64::from(gradient_accumulation_steps);
    let all_steps = rows.div_ceil(step_rows) * n_epochs;
    let total_steps = request.max_steps.unwrap_or(all_steps).min(all_steps).max(1);
    // The first step of a warm-up learns nothing: a short run has none unless it is asked, and none is all warm-up.
    let warmup_steps = request.warmup_steps.unwrap_or(match request.warmup_ratio {
        Some(ratio) => ((total_steps as f64 * ratio).ceil() as u64).min(total_steps - 1),
        None => (total_steps as f64 * WARMUP_RATIO) as u64,
    });
    let lr_scheduler = match request.lr_scheduler_type.as_deref() {
        None => Schedule::Linear,
        Some(name) if name == SCHEDULES[0] => Schedule::Constant,
        Some(name) if name == SCHEDULES[1] => Schedule::Linear,
        Some(_) => Schedule::Cosine,
    };
    let r = request.lora_r.unwrap_or(LORA_R.min(bounds.max_lora_rank));
    let target_modules = match request.lora_target_modules.as_slice() {
        [] => bounds.lora_targets.to_vec(),
        [all] if all == ALL_LINEAR => bounds.lora_targets.to_vec(),
        some => some.to_vec(),
    };
    Hyper {
        n_epochs: small(n_epochs),
        max_steps: request.max_steps,
        batch_size,
        gradient_accumulation_steps,
        learning_rate: request
            .learning_rate
            .unwrap_or(LEARNING_RATE * request.learning_rate_multiplier.unwrap_or(1.0)),
        lr_scheduler,
        warmup_steps,
        weight_decay: request.weight_decay.unwrap_or(0.0),
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        max_grad_norm: request.max_grad_norm.unwrap_or(1.0),
        seed: request.seed.expect("chosen when the job was created"),
        max_seq_length,
        packing,
        save_steps: request.save_steps.unwrap_or(total_steps.div_ceil(CHECKPOINTS)),
        eval_steps: request.eval_steps.unwrap_or(0),
        method: Method::Lora(Lora {
            r,
            alpha: request.lora_alpha.unwrap_or(2.0 * f64::from(r)),
            dropout: request.lora_dropout.unwrap_or(0.0),
            target_modules,
            use_rslora: request.use_rslora.unwrap_or(false),
        }),
    }
}

fn auto_epochs(examples: u64) -> u64 {
    let examples = examples.max(1);
    match examples * EPOCHS {
        ..EXAMPLES_SEEN_LOW => EXAMPLES_SEEN_LOW.div_ceil(examples).min(MAX_AUTO_EPOCHS),
        EXAMPLES_SEEN_LOW..=EXAMPLES_SEEN_HIGH => EPOCHS,
        _ => (EXAMPLES_SEEN_HIGH / examples).max(1),
    }
}

fn small(n: u64) -> u32 {
    u32::try_from(n).expect("clamped far below 2^32")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::info;

    #[test]
    fn small_files_are_seen_often_and_large_ones_packed() {
        // examples, tokens -> epochs, batch, packing, save_steps
        let cases = [
            (1, 50, (25, 1, false, 5)),
            (10, 500, (10, 1, false, 20)),
            (50, 3_000, (3, 1, false, 30)),
            (100, 6_000, (3, 3, false, 21)),
            (1_000, 60_000, (3, 3, true, 24)),
            (8_000, 3_200_000, (3, 8, true, 470)),
            (100_000, 9_000_000, (1, 8, true, 440)),
        ];
        for (examples, tokens, expected) in cases {
            let request = JobRequest {
                seed: Some(1),
                ..JobRequest::default()
            };
            let hyper = choose(&request, &info(), Facts { examples, tokens });
            let chosen = (hyper.n_epochs, hyper.batch_size, hyper.packing, hyper.save_steps);
            assert_eq!(chosen, expected, "{examples} examples of {tokens} tokens");
        }
    }

    #[test]
    fn a_short_run_has_a_step_that_learns() {
        for (max_steps, ratio, expected) in [
            (1, None, 0),
            (33, None, 0),
            (34, None, 1),
            (1, Some(0.5), 0),
            (10, Some(0.11), 2),
        ] {
            let request = JobRequest {
                seed: Some(7),
                n_epochs: Some(50),
                batch_size: Some(1),
                max_steps: Some(max_steps),
                warmup_ratio: ratio,
                ..JobRequest::default()
            };
            let facts = Facts {
                examples: 100,
                tokens: 5_000,
            };
            let hyper = choose(&request, &info(), facts);
            assert_eq!(hyper.warmup_steps, expected, "{max_steps} steps, {ratio:?}");
        }
    }

    #[test]
    fn what_is_asked_is_kept() {
        let request = JobRequest {
            seed: Some(7),
            n_epochs: Some(2),
            batch_size: Some(4),
            learning_rate_multiplier: Some(0.5),
            lr_scheduler_type: Some("cosine".to_owned()),
            warmup_ratio: Some(0.1),
            max_steps: Some(20),
            lora_r: Some(8),
            lora_target_modules: vec!["q_proj".to_owned()],
            ..JobRequest::default()
        };
        let hyper = choose(
            &request,
            &info(),
            Facts {
                examples: 100,
                tokens: 5_000,
            },
        );
        assert_eq!((hyper.n_epochs, hyper.batch_size, hyper.seed), (2, 4, 7));
        assert_eq!(
            (hyper.learning_rate, hyper.lr_scheduler, hyper.warmup_steps),
            (1e-4, Schedule::Cosine, 2)
        );
        let Method::Lora(lora) = hyper.method else {
            panic!("a served base is never changed")
        };
        assert_eq!(
            (lora.r, lora.alpha, lora.target_modules),
            (8, 16.0, vec!["q_proj".to_owned()])
        );
    }
}
