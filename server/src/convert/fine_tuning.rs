//! Requests for jobs, in the API of today. Ranges that depend on the model (rank, context, modules) are the router's;
//! how a job looks is jobs.rs.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tandem_openapi::common::{AutoInteger, AutoNumber, Strings, Unknown};
use tandem_openapi::fine_tuning::{CreateJob, Hyperparameters, Knobs, Method, Supervised};
use tandem_router::api::JobRequest;

use super::natural;
use crate::config::closest;
use crate::error::{ApiError, invalid};
use crate::extract::from_value;

const MAX_EPOCHS: u32 = 50;
const MAX_BATCH: u32 = 256;
const MAX_SEED: i64 = i32::MAX as i64;
const SUFFIX_CHARS: usize = 64;
const METADATA: Limits = Limits {
    keys: 16,
    key_chars: 64,
    value_chars: 512,
};

struct Limits {
    keys: usize,
    key_chars: usize,
    value_chars: usize,
}

pub fn request(body: CreateJob) -> Result<JobRequest, ApiError> {
    let CreateJob {
        model,
        training_file,
        validation_file,
        suffix,
        seed,
        metadata,
        method,
        hyperparameters,
        n_epochs,
        batch_size,
        learning_rate_multiplier,
        integrations,
        knobs: rest,
    } = body;
    let older = Hyperparameters {
        n_epochs,
        batch_size,
        learning_rate_multiplier,
        ..Hyperparameters::default()
    };
    if integrations.is_some_and(|value| !value.is_null() && value != json!([])) {
        return Err(ApiError::NotBuilt {
            param: "integrations".to_owned(),
            hint: String::new(),
        });
    }
    let hyperparameters = match (method, hyperparameters) {
        (Some(method), older) => self::method(method)?.or(older),
        (None, older) => older,
    };
    let Hyperparameters {
        n_epochs,
        batch_size,
        learning_rate_multiplier,
        unknown,
    } = hyperparameters.unwrap_or_default();
    no_unknown(
        "hyperparameters",
        &unknown,
        &names(&Hyperparameters::default()),
        &names(&Knobs::default()),
    )?;
    let learning_rate_multiplier = learning_rate_multiplier.or(older.learning_rate_multiplier);
    Ok(JobRequest {
        n_epochs: epochs(n_epochs.or(older.n_epochs))?,
        batch_size: batch(batch_size.or(older.batch_size))?,
        learning_rate_multiplier: multiplier(learning_rate_multiplier.and_then(AutoNumber::value))?,
        model,
        training_file,
        validation_file,
        suffix: self::suffix(suffix, SUFFIX_CHARS)?,
        seed: self::seed(seed)?,
        metadata: self::metadata(metadata)?,
        ..knobs(rest)?
    })
}

fn method(method: Method) -> Result<Option<Hyperparameters>, ApiError> {
    let Method {
        kind,
        supervised,
        unknown,
    } = method;
    match kind.as_str() {
        "supervised" => {}
        "dpo" | "reinforcement" => {
            let hint = format!(": {kind} is not built, supervised is");
            return Err(ApiError::NotBuilt {
                param: "method.type".to_owned(),
                hint,
            });
        }
        _ => return Err(invalid("method.type", "method.type must be \"supervised\"")),
    }
    no_unknown(
        "method",
        &unknown,
        &["type".to_owned(), "supervised".to_owned()],
        &[],
    )?;
    let Some(Supervised {
        hyperparameters,
        unknown,
    }) = supervised
    else {
        return Ok(None);
    };
    no_unknown(
        "method.supervised",
        &unknown,
        &["hyperparameters".to_owned()],
        &[],
    )?;
    Ok(hyperparameters)
}

/// The names of a struct's fields, from the struct.
fn names(value: &impl serde::Serialize) -> Vec<String> {
    let value = serde_json::to_value(value).expect("a default has string keys only");
    value
        .as_object()
        .into_iter()
        .flat_map(|fields| fields.keys().cloned())
        .collect()
}

/// A misspelt knob must not train silently.
fn no_unknown(
    place: &str,
    unknown: &Unknown,
    known: &[String],
    top_level: &[String],
) -> Result<(), ApiError> {
    let Some(name) = unknown
        .iter()
        .find(|(_, value)| !value.is_null())
        .map(|(name, _)| name)
    else {
        return Ok(());
    };
    let hint = if top_level.contains(name) {
        format!("; {name} is a field of the request itself")
    } else {
        let candidates = known.iter().map(String::as_str);
        closest(name, candidates).map_or_else(String::new, |name| format!("; did you mean {name}?"))
    };
    let name: String = name.chars().take(80).collect();
    Err(ApiError::Invalid {
        param: Some(format!("{place}.{name}")),
        code: Some("unknown_parameter"),
        message: format!("Unknown parameter: '{place}.{name}'{hint}"),
    })
}

/// What else a top-level field may have been meant to be.
const OTHERS: [&str; 6] = [
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "training_file",
    "validation_file",
    "hyperparameters",
];

/// The top-level fields that OpenAI's API lacks. `rest` also holds what no one knows; of that, only what looks like one
/// of ours matters.
pub fn knobs(rest: Unknown) -> Result<JobRequest, ApiError> {
    let Knobs {
        lora_r,
        lora_alpha,
        lora_dropout,
        lora_target_modules,
        use_rslora,
        learning_rate,
        lr_scheduler_type,
        warmup_steps,
        warmup_ratio,
        weight_decay,
        max_grad_norm,
        max_seq_length,
        packing,
        max_steps,
        gradient_accumulation_steps,
        save_steps,
        eval_steps,
        unknown,
    } = from_value(Value::Object(rest))?;
    let known = names(&Knobs::default());
    let like = |name: &str| closest(name, known.iter().map(String::as_str).chain(OTHERS));
    if let Some((name, _)) = unknown
        .iter()
        .find(|(name, value)| !value.is_null() && (name.starts_with("lora_") || like(name).is_some()))
    {
        let hint = like(name);
        let hint = hint.map_or_else(String::new, |name| format!("; did you mean {name}?"));
        let name: String = name.chars().take(80).collect();
        let message = format!("Unknown parameter: '{name}'{hint}");
        return Err(ApiError::Invalid {
            param: Some(name),
            code: Some("unknown_parameter"),
            message,
        });
    }
    let natural = |param: &str, value: Option<i64>, low: u32| {
        value
            .map(|value| self::natural(param, value, low, u32::MAX))
            .transpose()
    };
    let steps = |param: &str, value: Option<i64>, low: u32| {
        Ok::<_, ApiError>(natural(param, value, low)?.map(u64::from))
    };
    Ok(JobRequest {
        lora_r: natural("lora_r", lora_r, 1)?,
        lora_alpha: real("lora_alpha", lora_alpha, 0.0, 1e6)?,
        lora_dropout: real("lora_dropout", lora_dropout, 0.0, 1.0)?,
        lora_target_modules: modules(lora_target_modules),
        use_rslora,
        learning_rate: real("learning_rate", learning_rate, 0.0, 10.0)?,
        lr_scheduler_type,
        warmup_steps: steps("warmup_steps", warmup_steps, 0)?,
        warmup_ratio: real("warmup_ratio", warmup_ratio, 0.0, 1.0)?,
        weight_decay: real("weight_decay", weight_decay, 0.0, 10.0)?,
        max_grad_norm: real("max_grad_norm", max_grad_norm, 0.0, 1e6)?,
        max_seq_length: natural("max_seq_length", max_seq_length, 2)?,
        packing,
        max_steps: steps("max_steps", max_steps, 1)?,
        gradient_accumulation_steps: natural("gradient_accumulation_steps", gradient_accumulation_steps, 1)?,
        save_steps: steps("save_steps", save_steps, 0)?,
        eval_steps: steps("eval_steps", eval_steps, 0)?,
        ..JobRequest::default()
    })
}

/// A list, or one string with commas, as Together's clients send it.
fn modules(modules: Option<Strings>) -> Vec<String> {
    let split = |text: String| {
        text.split(',')
            .map(|name| name.trim().to_owned())
            .collect::<Vec<_>>()
    };
    modules
        .map_or_else(Vec::new, Strings::into_vec)
        .into_iter()
        .flat_map(split)
        .collect()
}

/// JSON has no NaN and no infinity; the comparison would refuse them anyway.
pub fn real(param: &str, value: Option<f64>, low: f64, high: f64) -> Result<Option<f64>, ApiError> {
    match value {
        Some(value) if !(low..=high).contains(&value) => Err(invalid(
            param,
            format!("{param} must be between {low} and {high}, got {value}"),
        )),
        value => Ok(value),
    }
}

pub fn epochs(value: Option<AutoInteger>) -> Result<Option<u32>, ApiError> {
    value
        .and_then(AutoInteger::value)
        .map(|n| natural("n_epochs", n, 1, MAX_EPOCHS))
        .transpose()
}

pub fn batch(value: Option<AutoInteger>) -> Result<Option<u32>, ApiError> {
    value
        .and_then(AutoInteger::value)
        .map(|n| natural("batch_size", n, 1, MAX_BATCH))
        .transpose()
}

pub fn multiplier(value: Option<f64>) -> Result<Option<f64>, ApiError> {
    match value {
        Some(x) if !(x > 0.0 && x <= 1e6) => {
            let text = format!("learning_rate_multiplier must be above 0 and at most 1000000, got {x}");
            Err(invalid("learning_rate_multiplier", text))
        }
        value => Ok(value),
    }
}

pub fn seed(value: Option<i64>) -> Result<Option<u64>, ApiError> {
    value
        .map(|seed| Ok(super::integer("seed", seed, 0, MAX_SEED)?.cast_unsigned()))
        .transpose()
}

pub fn suffix(value: Option<String>, limit: usize) -> Result<Option<String>, ApiError> {
    let Some(suffix) = value else { return Ok(None) };
    let count = suffix.chars().count();
    match (1..=limit).contains(&count) && !suffix.chars().any(char::is_control) {
        true => Ok(Some(suffix)),
        false => Err(invalid(
            "suffix",
            format!("suffix must have 1 to {limit} printable characters, got {count}"),
        )),
    }
}

fn metadata(metadata: Option<BTreeMap<String, String>>) -> Result<BTreeMap<String, String>, ApiError> {
    let metadata = metadata.unwrap_or_default();
    let Limits {
        keys,
        key_chars,
        value_chars,
    } = METADATA;
    let long = |text: &str, limit: usize| text.chars().count() > limit;
    if metadata.len() > keys {
        return Err(invalid(
            "metadata",
            format!("metadata has {} keys, {keys} are allowed", metadata.len()),
        ));
    }
    match metadata
        .iter()
        .any(|(key, value)| long(key, key_chars) || long(value, value_chars))
    {
        true => Err(invalid(
            "metadata",
            format!("metadata keys have at most {key_chars} characters, values {value_chars}"),
        )),
        false
            if metadata
                .iter()
                .flat_map(|(key, value)| [key, value])
                .any(|text| text.contains('\0')) =>
        {
            Err(invalid("metadata", "metadata has a NUL character"))
        }
        false => Ok(metadata),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(body: Value) -> Result<JobRequest, ApiError> {
        let mut whole = json!({"model": "m", "training_file": "file-1"});
        whole
            .as_object_mut()
            .unwrap()
            .extend(body.as_object().unwrap().clone());
        request(crate::extract::from_json(&serde_json::to_vec(&whole).unwrap())?)
    }

    #[test]
    fn every_place_of_a_knob_is_read() {
        for body in [
            json!({"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}),
            json!({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}}),
        ] {
            assert_eq!(asked(body).unwrap().n_epochs, Some(2));
        }
        let request =
            asked(json!({"lora_r": 8, "lora_trainable_modules": "q_proj, v_proj", "packing": false}))
                .unwrap();
        assert_eq!((request.lora_r, request.packing), (Some(8), Some(false)));
        assert_eq!(request.lora_target_modules, ["q_proj", "v_proj"]);
        assert!(asked(json!({"lora_r": null, "something_else": 1, "hyperparameters": null})).is_ok());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param, text) in [
            (
                json!({"hyperparameters": {"n_epoch": 2}}),
                "hyperparameters.n_epoch",
                "did you mean n_epochs?",
            ),
            (
                json!({"hyperparameters": {"lora_r": 2}}),
                "hyperparameters.lora_r",
                "field of the request itself",
            ),
            (
                json!({"hyperparameters": {"n_epochs": 51}}),
                "n_epochs",
                "at most 50, got 51",
            ),
            (
                json!({"hyperparameters": {"n_epochs": "x"}}),
                "hyperparameters.n_epochs",
                "auto",
            ),
            (json!({"method": {"type": "dpo"}}), "method.type", "not built"),
            (
                json!({"method": {"type": "supervised", "x": 1}}),
                "method.x",
                "Unknown",
            ),
            (json!({"lora_rank": 2}), "lora_rank", "did you mean lora_r"),
            (json!({"lora_r": 0}), "lora_r", "at least 1, got 0"),
            (json!({"lora_r": "many"}), "lora_r", "invalid type"),
            (json!({"learning_rate": -1}), "learning_rate", "between 0 and 10"),
            (json!({"suffix": ""}), "suffix", "1 to 64"),
            (json!({"seed": -1}), "seed", "at least 0"),
            (
                json!({"integrations": [{"type": "wandb"}]}),
                "integrations",
                "not supported",
            ),
        ] {
            let error = asked(body.clone()).unwrap_err().body().error;
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {}", error.message);
            assert!(error.message.contains(text), "{:?} lacks {text:?}", error.message);
        }
    }
}
