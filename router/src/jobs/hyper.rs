//! Every number of a run that the request leaves open. The one place where defaults of training are chosen.
//!
//! | number | default | why |
//! |---|---|---|
//! | n_epochs | 3; up to 25 for small files, 1 for huge ones | the rule OpenAI documents for its "auto": see examples at least 100 times in all, at most 25 000 |
//! | batch_size | rows / 128, from 1 to 8 | a small file is learnt by many small steps: the demo's 599 rows, three times, at 4 rows a step and not at 8 |
//! | learning_rate | by the width, x learning_rate_multiplier | see `learning_rate` |
//! | the same of preferences | a twentieth (orpo: a quarter) | how much lower published recipes have it; not measured here |
//! | lr_scheduler_type, warmup | linear, 3 % of the steps | transformers; QLoRA |
//! | optim | AdamW | transformers; the rates of the rule are its, so others want one |
//! | weight_decay, max_grad_norm | 0, 1.0 | TRL |
//! | r, alpha, dropout | 16, 2 r, 0 | alpha = 2 r is the common choice; all linear layers matter more than r (QLoRA) |
//! | packing | no | TRL: a batch of 4 rows is 4 rows |
//! | save_steps | a fifth of the run; 0 with another save_strategy than steps | a kill costs a fifth at most |

use tandem_core::job::sweep::Sweep;
use tandem_core::job::{self, Hyper, Lora, Method, Objective, Schedule, steps_of};
use tandem_core::replica::ReplicaInfo;
use tandem_core::settings::{ALL_LINEAR, Settings};

pub use crate::jobs::check::fits;

const EPOCHS: u64 = 3;
const EXAMPLES_SEEN_LOW: u64 = 100;
const EXAMPLES_SEEN_HIGH: u64 = 25_000;
const MAX_AUTO_EPOCHS: u64 = 25;
const STEPS_PER_EPOCH: u64 = 128;
const MAX_AUTO_BATCH: u64 = 8;
const WARMUP_RATIO: f64 = 0.03;
const LORA_R: u32 = 16;
/// Longer rows are cut unless the request says more.
const MAX_AUTO_SEQ_LENGTH: u32 = 2048;
const CHECKPOINTS: u64 = 5;

/// The part of a replica that the choice depends on. `tandem train` has no replica, only this.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    pub hidden_size: u32,
    pub max_model_len: u32,
    pub max_lora_rank: u32,
    pub lora_targets: &'a [String],
}

impl<'a> From<&'a ReplicaInfo> for Bounds<'a> {
    fn from(info: &'a ReplicaInfo) -> Bounds<'a> {
        let ReplicaInfo {
            hidden_size,
            max_model_len,
            max_lora_rank,
            lora_targets,
            ..
        } = info;
        Bounds {
            hidden_size: *hidden_size,
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

/// About as many tokens as a run trains.
pub fn trained_tokens(hyper: &Hyper, facts: Facts) -> u64 {
    let row = match hyper.packing {
        true => u64::from(hyper.max_seq_length),
        false => facts.tokens.div_ceil(facts.examples.max(1)),
    };
    let rows = u64::from(hyper.batch_size) * u64::from(hyper.gradient_accumulation_steps);
    let of_steps = |steps: u64| steps.saturating_mul(rows).saturating_mul(row);
    let epoch = hyper
        .max_steps_per_epoch
        .map_or(u64::MAX, of_steps)
        .min(facts.tokens);
    hyper
        .max_steps
        .map_or((epoch as f64 * hyper.n_epochs).ceil() as u64, of_steps)
}

/// What is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tuning {
    #[default]
    Lora,
    /// Every parameter.
    Full,
}

/// Decided before the file is tokenised, because rows are cut at it.
pub fn max_seq_length<'a>(settings: &Settings, bounds: impl Into<Bounds<'a>>) -> u32 {
    settings
        .max_seq_length
        .unwrap_or(bounds.into().max_model_len.min(MAX_AUTO_SEQ_LENGTH))
}

/// `settings` were read, and so have one.
pub fn objective(settings: &Settings) -> Objective {
    settings
        .objective()
        .expect("settings are read with their objective")
}

/// `settings` have a seed and fit (`fits`).
pub fn choose<'a>(settings: &Settings, tuning: Tuning, bounds: impl Into<Bounds<'a>>, facts: Facts) -> Hyper {
    chosen(settings, tuning, bounds.into(), facts).0
}

/// Of a trial, which is validated where those of its sweep are compared.
pub fn choose_of<'a>(
    sweep: &Sweep,
    settings: &Settings,
    bounds: impl Into<Bounds<'a>>,
    facts: Facts,
) -> Hyper {
    let (hyper, total_steps) = chosen(settings, Tuning::Lora, bounds.into(), facts);
    Hyper {
        eval_steps: sweep.eval_steps(settings.eval_steps, settings.max_steps.is_some(), total_steps),
        ..hyper
    }
}

/// And the steps of the run; with packing at least so many.
fn chosen(settings: &Settings, tuning: Tuning, bounds: Bounds, facts: Facts) -> (Hyper, u64) {
    let max_seq_length = max_seq_length(settings, bounds);
    // Blocks are whole rows of max_seq_length already.
    let packing = settings.packing.unwrap_or(false) && !settings.wraps();
    let rows = match packing {
        // At least: rows are whole, so some room stays free.
        true => facts
            .tokens
            .div_ceil(u64::from(max_seq_length))
            .min(facts.examples),
        false => facts.examples,
    };
    let n_epochs = settings
        .n_epochs
        .unwrap_or_else(|| auto_epochs(facts.examples) as f64);
    let objective = objective(settings);
    let least_batch = match objective {
        // A row is held against another's answer.
        Objective::Kto { .. } => 2,
        _ => 1,
    };
    let gradient_accumulation_steps = settings.gradient_accumulation_steps.unwrap_or(1);
    let batch_size = settings.batch_size.unwrap_or_else(|| {
        let of_step = (rows / STEPS_PER_EPOCH).min(MAX_AUTO_BATCH);
        small((of_step / u64::from(gradient_accumulation_steps)).max(least_batch))
    });

    let step_rows = u64::from(batch_size) * u64::from(gradient_accumulation_steps);
    let most = settings.max_steps_per_epoch.unwrap_or(u64::MAX);
    let epoch_steps = rows.div_ceil(step_rows).clamp(1, most);
    let total_steps = settings
        .max_steps
        .unwrap_or_else(|| steps_of(n_epochs, epoch_steps));
    let learning_rate = settings.learning_rate.unwrap_or_else(|| {
        let multiplier = settings.learning_rate_multiplier.unwrap_or(1.0);
        multiplier * of_objective(objective) * learning_rate(tuning, bounds.hidden_size)
    });
    let lr_scheduler = schedule(settings, learning_rate, epoch_steps);
    // The first step of a warm-up learns nothing: a short run has none unless it is asked, and none is all warm-up.
    let warmup_steps = match (lr_scheduler, settings.warmup_steps, settings.warmup_ratio) {
        (Schedule::Constant, ..) => 0,
        (_, Some(steps), _) => steps,
        // torch's, which knows of none.
        (Schedule::Step { .. }, None, None) => 0,
        (_, None, Some(ratio)) => ((total_steps as f64 * ratio).ceil() as u64).min(total_steps - 1),
        (_, None, None) => (total_steps as f64 * WARMUP_RATIO) as u64,
    };
    let hyper = Hyper {
        n_epochs: match settings.max_steps {
            Some(steps) => steps.div_ceil(epoch_steps) as f64,
            None => n_epochs,
        },
        max_steps: settings.max_steps,
        max_steps_per_epoch: settings.max_steps_per_epoch,
        batch_size,
        gradient_accumulation_steps,
        learning_rate,
        lr_scheduler,
        warmup_steps,
        optimizer: settings.optimizer(),
        weight_decay: settings.weight_decay.unwrap_or(0.0),
        adam_beta1: settings.adam_beta1.unwrap_or(0.9),
        adam_beta2: settings.adam_beta2.unwrap_or(0.999),
        adam_epsilon: settings.adam_epsilon.unwrap_or(1e-8),
        max_grad_norm: settings.max_grad_norm.unwrap_or(1.0),
        loraplus_lr_ratio: settings.loraplus_lr_ratio,
        neftune_noise_alpha: settings.neftune_noise_alpha,
        seed: settings.seed.expect("chosen when the job was created"),
        max_seq_length,
        packing,
        shuffle: settings.shuffle.unwrap_or(true),
        save_strategy: settings.save_strategy(),
        save_steps: match settings.save_strategy.as_deref() {
            None | Some("steps") => settings.save_steps.unwrap_or(total_steps.div_ceil(CHECKPOINTS)),
            Some(_) => 0,
        },
        eval_steps: settings.eval_steps.unwrap_or(0),
        selection: settings.selection(),
        objective,
        frozen_layers: 0,
        method: match tuning {
            Tuning::Lora => Method::Lora(lora(settings, bounds)),
            Tuning::Full => Method::Full,
        },
    };
    (hyper, total_steps)
}

/// `settings` were read, and so have one.
fn schedule(settings: &Settings, learning_rate: f64, epoch_steps: u64) -> Schedule {
    match settings
        .schedule()
        .expect("settings are read with their schedule")
    {
        "constant" => Schedule::Constant,
        "constant_with_warmup" => Schedule::ConstantWithWarmup,
        "linear" => Schedule::Linear,
        "cosine" => Schedule::Cosine,
        "cosine_with_restarts" => Schedule::CosineWithRestarts {
            num_cycles: settings.num_cycles.unwrap_or(1.0),
        },
        "polynomial" => Schedule::Polynomial {
            power: settings.power.unwrap_or(1.0),
            end: (settings.lr_end.unwrap_or(1e-7) / learning_rate).min(1.0),
        },
        "inverse_sqrt" => Schedule::InverseSqrt,
        "step" => Schedule::Step {
            gamma: settings.gamma.unwrap_or(0.85),
            every: epoch_steps,
        },
        other => unreachable!("the table has no schedule {other}"),
    }
}

/// What a job with these settings keeps at most beside its data.
pub fn kept_bytes(settings: &Settings, info: &ReplicaInfo) -> u64 {
    job::kept_bytes(lora(settings, info.into()).numbers(&info.lora_sizes))
}

fn lora(settings: &Settings, bounds: Bounds) -> Lora {
    let r = settings.lora_r.unwrap_or(LORA_R.min(bounds.max_lora_rank));
    let target_modules = match settings.lora_target_modules.as_deref() {
        None | Some([]) => bounds.lora_targets.to_vec(),
        Some(some) => some
            .iter()
            .flat_map(|name| match name.as_str() {
                ALL_LINEAR => bounds.lora_targets,
                _ => std::slice::from_ref(name),
            })
            .cloned()
            .collect(),
    };
    Lora {
        r,
        alpha: settings.lora_alpha.unwrap_or(2.0 * f64::from(r)),
        dropout: settings.lora_dropout.unwrap_or(0.0),
        target_modules,
        use_rslora: settings.use_rslora.unwrap_or(false),
        use_dora: settings.use_dora.unwrap_or(false),
    }
}

/// As wide as the models for which the literature gives rates.
const WIDTH: f64 = 4096.0;
/// LoRA's at that width (QLoRA, arXiv 2305.14314: 2e-4 for 7B and 13B, 1e-4 for 33B and 65B).
const LEARNING_RATE: f64 = 2e-4;
/// Where the narrowest models we tried still learn well.
const MAX_LEARNING_RATE: f64 = 5e-3;
/// LoRA wants about ten times the rate of full training (Thinking Machines, "LoRA Without Regret", 2025).
const FULL_TO_LORA: f64 = 0.1;

/// Inverse to the width, as the update of a matrix must be (Yang et al., arXiv 2203.03466). ARCHITECTURE.md has the runs.
fn learning_rate(tuning: Tuning, hidden_size: u32) -> f64 {
    let lora = (LEARNING_RATE * WIDTH / f64::from(hidden_size)).min(MAX_LEARNING_RATE);
    match tuning {
        Tuning::Lora => lora,
        Tuning::Full => lora * FULL_TO_LORA,
    }
}

/// Factor on the learning rate: preferences say little of each token and are soon overdone.
fn of_objective(objective: Objective) -> f64 {
    match objective {
        Objective::Sft | Objective::RewardWeighted { .. } => 1.0,
        Objective::Orpo { .. } => 0.25,
        Objective::Dpo { .. } | Objective::Kto { .. } | Objective::Cpo { .. } => 0.05,
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
    fn small_files_are_seen_often_and_none_is_packed() {
        // examples, tokens -> epochs, batch, save_steps
        let cases = [
            (1, 50, (25.0, 1, 5)),
            (10, 500, (10.0, 1, 20)),
            (50, 3_000, (3.0, 1, 30)),
            (100, 6_000, (3.0, 1, 60)),
            (599, 6_000, (3.0, 4, 90)),
            (1_000, 60_000, (3.0, 7, 86)),
            (8_000, 3_200_000, (3.0, 8, 600)),
            (100_000, 9_000_000, (1.0, 8, 2500)),
        ];
        for (examples, tokens, expected) in cases {
            let settings = Settings {
                seed: Some(1),
                ..Settings::default()
            };
            let hyper = choose(&settings, Tuning::Lora, &info(), Facts { examples, tokens });
            let chosen = (hyper.n_epochs, hyper.batch_size, hyper.save_steps);
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
            let settings = Settings {
                seed: Some(7),
                n_epochs: Some(50.0),
                batch_size: Some(1),
                max_steps: Some(max_steps),
                warmup_ratio: ratio,
                ..Settings::default()
            };
            let facts = Facts {
                examples: 100,
                tokens: 5_000,
            };
            let hyper = choose(&settings, Tuning::Lora, &info(), facts);
            assert_eq!(hyper.warmup_steps, expected, "{max_steps} steps, {ratio:?}");
        }
    }

    #[test]
    fn what_is_asked_is_kept() {
        let settings = Settings {
            seed: Some(7),
            n_epochs: Some(2.0),
            batch_size: Some(4),
            learning_rate_multiplier: Some(0.5),
            lr_scheduler_type: Some("cosine".to_owned()),
            warmup_ratio: Some(0.1),
            max_steps: Some(20),
            lora_r: Some(8),
            lora_target_modules: Some(vec!["q_proj".to_owned()]),
            ..Settings::default()
        };
        let hyper = choose(
            &settings,
            Tuning::Lora,
            &info(),
            Facts {
                examples: 100,
                tokens: 5_000,
            },
        );
        // Of the epochs, what max_steps leaves: 25 steps are one.
        assert_eq!((hyper.n_epochs, hyper.batch_size, hyper.seed), (1.0, 4, 7));
        assert_eq!(
            (hyper.learning_rate, hyper.lr_scheduler, hyper.warmup_steps),
            (0.5 * MAX_LEARNING_RATE, Schedule::Cosine, 2)
        );
        let Method::Lora(lora) = hyper.method else {
            panic!("a served base is never changed")
        };
        assert_eq!(
            (lora.r, lora.alpha, lora.target_modules),
            (8, 16.0, vec!["q_proj".to_owned()])
        );
    }

    #[test]
    fn the_learning_rate_follows_the_width() {
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 0.05;
        for (hidden_size, lora) in [
            (64, 5e-3),
            (192, 4.27e-3),
            (576, 1.42e-3),
            (2048, 4e-4),
            (4096, 2e-4),
            (8192, 1e-4),
        ] {
            assert!(
                close(learning_rate(Tuning::Lora, hidden_size), lora),
                "{hidden_size}"
            );
            assert!(
                close(learning_rate(Tuning::Full, hidden_size), lora / 10.0),
                "{hidden_size}"
            );
        }
    }

    /// transformers: ceil(num_train_epochs x steps of an epoch).
    #[test]
    fn a_part_of_an_epoch_has_its_part_of_the_steps() {
        let facts = Facts {
            examples: 10,
            tokens: 500,
        };
        // 10 rows by 4 are 3 steps an epoch.
        for (n_epochs, steps, tokens) in [(1.5, 5, 750), (0.5, 2, 250), (0.01, 1, 5), (2.0, 6, 1000)] {
            let settings = Settings {
                seed: Some(7),
                n_epochs: Some(n_epochs),
                batch_size: Some(4),
                ..Settings::default()
            };
            let (hyper, total) = chosen(&settings, Tuning::Lora, (&info()).into(), facts);
            assert_eq!((hyper.n_epochs, total), (n_epochs, steps));
            assert_eq!(trained_tokens(&hyper, facts), tokens);
        }
    }

    #[test]
    fn max_steps_says_how_long_the_run_is() {
        let facts = Facts {
            examples: 10,
            tokens: 500,
        };
        // 10 rows by 4 are 3 steps an epoch.
        for (max_steps, n_epochs, save_steps) in [(2, 1.0, 1), (3, 1.0, 1), (4, 2.0, 1), (300, 100.0, 60)] {
            let settings = Settings {
                seed: Some(7),
                n_epochs: Some(2.0),
                batch_size: Some(4),
                max_steps: Some(max_steps),
                lr_scheduler_type: Some("constant".to_owned()),
                ..Settings::default()
            };
            let hyper = choose(&settings, Tuning::Lora, &info(), facts);
            assert_eq!(
                (hyper.n_epochs, hyper.save_steps, hyper.warmup_steps),
                (n_epochs, save_steps, 0)
            );
        }
    }
}
