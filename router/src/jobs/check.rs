//! What a job may ask for: ranges, and the limits of this replica. Whether files exist is the caller's question; what
//! is not asked is `hyper`'s.

use tandem_core::replica::ReplicaInfo;

use crate::api::{JobRequest, RouterError};

const MAX_SUFFIX_CHARS: usize = 64;
const MAX_LEGACY_SUFFIX_CHARS: usize = 40;
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY_CHARS: usize = 64;
const MAX_METADATA_VALUE_CHARS: usize = 512;
pub(crate) const ALL_LINEAR: &str = "all-linear";
pub(crate) const SCHEDULES: [&str; 3] = ["constant", "linear", "cosine"];

pub(crate) fn request(request: &JobRequest, info: &ReplicaInfo) -> Result<(), RouterError> {
    let JobRequest {
        model: _,
        training_file: _,
        validation_file: _,
        suffix,
        seed,
        metadata,
        n_epochs,
        max_steps,
        batch_size,
        gradient_accumulation_steps,
        learning_rate,
        learning_rate_multiplier,
        lr_scheduler_type,
        warmup_steps,
        warmup_ratio,
        weight_decay,
        max_grad_norm,
        max_seq_length,
        packing: _,
        save_steps,
        eval_steps,
        lora_r,
        lora_alpha,
        lora_dropout,
        lora_target_modules,
        use_rslora: _,
        prompt_loss_weight,
        legacy,
    } = request;

    let integers = [
        ("seed", *seed, 0, 2_147_483_647),
        ("n_epochs", n_epochs.map(u64::from), 1, 50),
        ("max_steps", *max_steps, 1, 10_000_000),
        ("batch_size", batch_size.map(u64::from), 1, 256),
        (
            "gradient_accumulation_steps",
            gradient_accumulation_steps.map(u64::from),
            1,
            1024,
        ),
        ("warmup_steps", *warmup_steps, 0, 10_000_000),
        (
            "max_seq_length",
            max_seq_length.map(u64::from),
            2,
            u64::from(info.max_model_len),
        ),
        ("save_steps", *save_steps, 0, 10_000_000),
        ("eval_steps", *eval_steps, 0, 10_000_000),
        ("lora_r", lora_r.map(u64::from), 1, u64::from(info.max_lora_rank)),
    ];
    for (param, value, low, high) in integers {
        if let Some(value) = value.filter(|value| !(low..=high).contains(value)) {
            return Err(out_of_range(param, &format!("between {low} and {high}"), value));
        }
    }
    let closed = [
        ("warmup_ratio", *warmup_ratio, 0.0, 1.0),
        ("weight_decay", *weight_decay, 0.0, 1.0),
        ("max_grad_norm", *max_grad_norm, 0.0, 1e6),
        ("prompt_loss_weight", *prompt_loss_weight, 0.0, 1.0),
    ];
    for (param, value, low, high) in closed {
        if let Some(value) = value.filter(|value| !(low..=high).contains(value)) {
            return Err(out_of_range(param, &format!("between {low} and {high}"), value));
        }
    }
    let positive = [
        ("learning_rate", *learning_rate, 1.0),
        ("learning_rate_multiplier", *learning_rate_multiplier, 1e4),
        ("lora_alpha", *lora_alpha, 1e6),
    ];
    for (param, value, high) in positive {
        if let Some(value) = value.filter(|&value| !(value > 0.0 && value <= high)) {
            return Err(out_of_range(param, &format!("above 0 and at most {high}"), value));
        }
    }
    if let Some(value) = lora_dropout.filter(|value| !(0.0..1.0).contains(value)) {
        return Err(out_of_range("lora_dropout", "at least 0 and below 1", value));
    }

    exclusive(
        "learning_rate_multiplier",
        *learning_rate_multiplier,
        "learning_rate",
        *learning_rate,
    )?;
    exclusive(
        "warmup_ratio",
        *warmup_ratio,
        "warmup_steps",
        warmup_steps.map(|steps| steps as f64),
    )?;
    if let Some(name) = lr_scheduler_type
        .as_deref()
        .filter(|name| !SCHEDULES.contains(name))
    {
        return Err(out_of_range(
            "lr_scheduler_type",
            &format!("one of {}", SCHEDULES.join(", ")),
            name,
        ));
    }
    targets(lora_target_modules, &info.lora_targets)?;
    if let Some(suffix) = suffix {
        self::suffix(
            suffix,
            if *legacy {
                MAX_LEGACY_SUFFIX_CHARS
            } else {
                MAX_SUFFIX_CHARS
            },
        )?;
    }
    if metadata.len() > MAX_METADATA {
        let message = format!(
            "metadata can have at most {MAX_METADATA} pairs, got {}",
            metadata.len()
        );
        return Err(RouterError::invalid("metadata", message));
    }
    for (key, value) in metadata {
        let (key_chars, value_chars) = (key.chars().count(), value.chars().count());
        if key_chars > MAX_METADATA_KEY_CHARS || value_chars > MAX_METADATA_VALUE_CHARS {
            let message = format!(
                "metadata keys can have at most {MAX_METADATA_KEY_CHARS} characters and values \
                 {MAX_METADATA_VALUE_CHARS}, got {key_chars} and {value_chars}"
            );
            return Err(RouterError::invalid("metadata", message));
        }
    }
    Ok(())
}

fn out_of_range(param: &str, allowed: &str, value: impl std::fmt::Display) -> RouterError {
    RouterError::invalid(param, format!("{param} must be {allowed}, got {value}"))
}

fn exclusive(
    one: &'static str,
    a: Option<f64>,
    other: &'static str,
    b: Option<f64>,
) -> Result<(), RouterError> {
    match (a, b) {
        (Some(_), Some(_)) => Err(RouterError::invalid(
            one,
            format!("{one} and {other} exclude each other"),
        )),
        _ => Ok(()),
    }
}

fn targets(asked: &[String], known: &[String]) -> Result<(), RouterError> {
    let param = "lora_target_modules";
    for (i, name) in asked.iter().enumerate() {
        if name == ALL_LINEAR && asked.len() > 1 {
            let message = format!("{param}: '{ALL_LINEAR}' stands alone, got {} names", asked.len());
            return Err(RouterError::invalid(param, message));
        }
        if name != ALL_LINEAR && !known.contains(name) {
            let known = known.join(", ");
            let message =
                format!("{param}: this model has no '{name}'; use {ALL_LINEAR}, or some of {known}");
            return Err(RouterError::invalid(param, message));
        }
        if asked[..i].contains(name) {
            return Err(RouterError::invalid(
                param,
                format!("{param}: '{name}' is there twice"),
            ));
        }
    }
    Ok(())
}

fn suffix(suffix: &str, most: usize) -> Result<(), RouterError> {
    let chars = suffix.chars().count();
    if !(1..=most).contains(&chars) {
        let message = format!("suffix must have between 1 and {most} characters, got {chars}");
        return Err(RouterError::invalid("suffix", message));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match suffix.chars().find(|&c| !plain(c)) {
        Some(c) => Err(RouterError::invalid(
            "suffix",
            format!(
                "suffix can have letters, digits, '-', '_' and '.', got '{}'",
                c.escape_debug()
            ),
        )),
        None => Ok(()),
    }
}
