//! The settings of `tandem train`: YAML and `key=value`, under our names or those of TRL, transformers and torchtune. An
//! unknown key is an error: a misspelt knob must not train silently.

use std::path::PathBuf;

use serde::Deserialize;
use serde_norway::{Mapping, Value};
use tandem_router::api::JobRequest;

use crate::config::closest;

/// As the field's examples do.
const DEFAULT_SEED: u64 = 42;

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot read {path}")]
    Unreadable { path: String, source: std::io::Error },
    #[error("{0} is not a YAML mapping of settings")]
    NotYaml(String),
    #[error("{0:?} is neither key=value nor, as the first argument, a YAML file")]
    NotASetting(String),
    #[error("unknown setting {name:?}{}", suggestion.as_ref().map_or_else(String::new, |s| format!("; did you mean {s}?")))]
    Unknown {
        name: String,
        suggestion: Option<String>,
    },
    #[error("{0} is given twice, under two names")]
    Twice(&'static str),
    #[error("{key}: {message}")]
    Wrong { key: String, message: String },
}

/// Key, other spellings, what it says.
type Key = (&'static str, &'static [&'static str], &'static str);

const KEYS: &[Key] = &[
    (
        "model",
        &["model_name_or_path"],
        "folder of the base model (required)",
    ),
    (
        "training_file",
        &["train_file"],
        "JSONL of messages, prompt/completion or text (required)",
    ),
    ("validation_file", &["eval_file"], "JSONL"),
    (
        "output_dir",
        &[],
        "folder for state, checkpoints and the result (required)",
    ),
    ("method", &[], "lora (default) or full"),
    (
        "n_epochs",
        &["num_train_epochs", "epochs"],
        "passes over the training file",
    ),
    ("max_steps", &[], "ends the run earlier"),
    (
        "batch_size",
        &["per_device_train_batch_size"],
        "examples of a micro-batch",
    ),
    (
        "gradient_accumulation_steps",
        &[],
        "micro-batches of an optimizer step",
    ),
    ("learning_rate", &["lr"], "peak"),
    (
        "lr_scheduler_type",
        &["lr_scheduler"],
        "constant, linear or cosine",
    ),
    ("warmup_steps", &["num_warmup_steps"], "optimizer steps"),
    ("warmup_ratio", &[], "part of the run, instead of warmup_steps"),
    ("weight_decay", &[], ""),
    ("max_grad_norm", &["clip_grad_norm"], "0: no clipping"),
    (
        "max_seq_length",
        &["max_seq_len", "max_length"],
        "longer examples are cut",
    ),
    ("packing", &["packed"], "several short examples in a row"),
    (
        "save_steps",
        &[],
        "optimizer steps between checkpoints; 0: only at the end",
    ),
    (
        "save_total_limit",
        &[],
        "checkpoints that are kept, the newest; all without it",
    ),
    (
        "overwrite_output_dir",
        &[],
        "true: what an earlier run left in output_dir goes",
    ),
    (
        "eval_steps",
        &[],
        "optimizer steps between validations; 0: at each epoch's end",
    ),
    ("prompt_loss_weight", &[], "of prompt/completion rows, default 0"),
    ("lora_r", &["lora_rank"], ""),
    ("lora_alpha", &[], ""),
    ("lora_dropout", &[], ""),
    ("lora_target_modules", &["target_modules"], "list, or all-linear"),
    ("use_rslora", &[], "scale alpha / sqrt(r)"),
    ("adam_beta1", &[], ""),
    ("adam_beta2", &[], ""),
    ("adam_epsilon", &[], ""),
    ("seed", &["data_seed"], "default 42"),
    (
        "dtype",
        &["torch_dtype"],
        "of the frozen base: auto, bfloat16 or float32",
    ),
    ("device", &[], "auto, cpu or cuda:N"),
];

pub fn help() -> String {
    let mut text = "Settings of tandem train, in a YAML file or as key=value:\n\n".to_owned();
    for (key, others, says) in KEYS {
        let others = if others.is_empty() {
            String::new()
        } else {
            format!(" (or {})", others.join(", "))
        };
        text.push_str(&format!("  {key:<28} {says}{others}\n"));
    }
    text
}

#[derive(Debug)]
pub struct Settings {
    pub model: PathBuf,
    pub training_file: PathBuf,
    pub validation_file: Option<PathBuf>,
    pub output_dir: PathBuf,
    pub overwrite_output_dir: bool,
    /// At least 1.
    pub save_total_limit: Option<u32>,
    pub tuning: Tuning,
    pub adam: Adam,
    pub dtype: String,
    pub device: String,
    /// The numbers, as a client of the API would ask them.
    pub request: JobRequest,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tuning {
    #[default]
    Lora,
    Full,
}

#[derive(Clone, Copy, Debug)]
pub struct Adam {
    pub beta1: Option<f64>,
    pub beta2: Option<f64>,
    pub epsilon: Option<f64>,
}

/// `KEYS`, typed.
#[derive(Deserialize)]
struct Raw {
    model: PathBuf,
    training_file: PathBuf,
    validation_file: Option<PathBuf>,
    output_dir: PathBuf,
    method: Option<Tuning>,
    n_epochs: Option<u32>,
    max_steps: Option<u64>,
    batch_size: Option<u32>,
    gradient_accumulation_steps: Option<u32>,
    learning_rate: Option<f64>,
    lr_scheduler_type: Option<Scheduler>,
    warmup_steps: Option<u64>,
    warmup_ratio: Option<f64>,
    weight_decay: Option<f64>,
    max_grad_norm: Option<f64>,
    max_seq_length: Option<u32>,
    packing: Option<bool>,
    save_steps: Option<u64>,
    save_total_limit: Option<u32>,
    overwrite_output_dir: Option<bool>,
    eval_steps: Option<u64>,
    prompt_loss_weight: Option<f64>,
    lora_r: Option<u32>,
    lora_alpha: Option<f64>,
    lora_dropout: Option<f64>,
    lora_target_modules: Option<Modules>,
    use_rslora: Option<bool>,
    adam_beta1: Option<f64>,
    adam_beta2: Option<f64>,
    adam_epsilon: Option<f64>,
    seed: Option<u64>,
    dtype: Option<String>,
    device: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Scheduler {
    Constant,
    Linear,
    Cosine,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a module name or a list of them")]
enum Modules {
    One(String),
    Many(Vec<String>),
}

pub fn read(args: &[String]) -> Result<Settings, SettingsError> {
    let mut settings = Mapping::new();
    for (i, arg) in args.iter().enumerate() {
        match arg.split_once('=') {
            Some((key, text)) => {
                let value = serde_norway::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()));
                // A later word wins over an earlier one.
                settings.insert(Value::String(canonical(key)?.to_owned()), value);
            }
            None if i == 0 => settings = file(arg)?,
            None => return Err(SettingsError::NotASetting(arg.clone())),
        }
    }
    typed(settings)
}

fn file(path: &str) -> Result<Mapping, SettingsError> {
    let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let yaml: Mapping = serde_norway::from_str(&text).map_err(|_| SettingsError::NotYaml(path.to_owned()))?;
    let mut settings = Mapping::new();
    for (key, value) in yaml {
        let key = key
            .as_str()
            .ok_or_else(|| SettingsError::NotYaml(path.to_owned()))?;
        let key = canonical(key)?;
        if settings.insert(Value::String(key.to_owned()), value).is_some() {
            return Err(SettingsError::Twice(key));
        }
    }
    Ok(settings)
}

fn canonical(name: &str) -> Result<&'static str, SettingsError> {
    let found = KEYS
        .iter()
        .find(|(key, others, _)| *key == name || others.contains(&name));
    found.map(|(key, ..)| *key).ok_or_else(|| {
        let all = KEYS
            .iter()
            .flat_map(|(key, others, _)| others.iter().copied().chain([*key]));
        SettingsError::Unknown {
            name: name.to_owned(),
            suggestion: closest(name, all),
        }
    })
}

fn typed(settings: Mapping) -> Result<Settings, SettingsError> {
    let raw: Raw =
        serde_path_to_error::deserialize(Value::Mapping(settings)).map_err(|error| SettingsError::Wrong {
            key: error.path().to_string(),
            message: error.inner().to_string(),
        })?;
    let Raw {
        model,
        training_file,
        validation_file,
        output_dir,
        method,
        n_epochs,
        max_steps,
        batch_size,
        gradient_accumulation_steps,
        learning_rate,
        lr_scheduler_type,
        warmup_steps,
        warmup_ratio,
        weight_decay,
        max_grad_norm,
        max_seq_length,
        packing,
        save_steps,
        save_total_limit,
        overwrite_output_dir,
        eval_steps,
        prompt_loss_weight,
        lora_r,
        lora_alpha,
        lora_dropout,
        lora_target_modules,
        use_rslora,
        adam_beta1,
        adam_beta2,
        adam_epsilon,
        seed,
        dtype,
        device,
    } = raw;
    positive(&[
        ("n_epochs", n_epochs.map(f64::from)),
        ("max_steps", max_steps.map(|n| n as f64)),
        ("batch_size", batch_size.map(f64::from)),
        (
            "gradient_accumulation_steps",
            gradient_accumulation_steps.map(f64::from),
        ),
        ("learning_rate", learning_rate),
        ("save_total_limit", save_total_limit.map(f64::from)),
        ("max_seq_length", max_seq_length.map(f64::from)),
        ("lora_r", lora_r.map(f64::from)),
        ("lora_alpha", lora_alpha),
        ("adam_epsilon", adam_epsilon),
    ])?;
    between(&[
        ("warmup_ratio", warmup_ratio),
        ("prompt_loss_weight", prompt_loss_weight),
        ("adam_beta1", adam_beta1),
        ("adam_beta2", adam_beta2),
    ])?;
    let drops = |value: f64| (0.0..1.0).contains(&value);
    wrong(
        &[("lora_dropout", lora_dropout)],
        drops,
        "must be at least 0 and below 1",
    )?;
    if warmup_ratio.is_some() && warmup_steps.is_some() {
        return Err(SettingsError::Wrong {
            key: "warmup_ratio".to_owned(),
            message: "warmup_steps says it already; give one of them".to_owned(),
        });
    }
    Ok(Settings {
        model,
        training_file,
        validation_file,
        output_dir,
        overwrite_output_dir: overwrite_output_dir.unwrap_or(false),
        save_total_limit,
        tuning: method.unwrap_or_default(),
        adam: Adam {
            beta1: adam_beta1,
            beta2: adam_beta2,
            epsilon: adam_epsilon,
        },
        dtype: dtype.unwrap_or_else(|| "auto".to_owned()),
        device: device.unwrap_or_else(|| "auto".to_owned()),
        request: JobRequest {
            seed: Some(seed.unwrap_or(DEFAULT_SEED)),
            n_epochs,
            max_steps,
            batch_size,
            gradient_accumulation_steps,
            learning_rate,
            lr_scheduler_type: lr_scheduler_type.map(|scheduler| {
                let name = match scheduler {
                    Scheduler::Constant => "constant",
                    Scheduler::Linear => "linear",
                    Scheduler::Cosine => "cosine",
                };
                name.to_owned()
            }),
            warmup_steps,
            warmup_ratio,
            weight_decay,
            max_grad_norm,
            max_seq_length,
            packing,
            save_steps,
            eval_steps,
            prompt_loss_weight,
            lora_r,
            lora_alpha,
            lora_dropout,
            lora_target_modules: match lora_target_modules {
                None => Vec::new(),
                Some(Modules::One(name)) => vec![name],
                Some(Modules::Many(names)) => names,
            },
            use_rslora,
            ..JobRequest::default()
        },
    })
}

fn positive(values: &[(&str, Option<f64>)]) -> Result<(), SettingsError> {
    let ok = |value: f64| value > 0.0 && value.is_finite();
    wrong(values, ok, "must be above 0")
}

fn between(values: &[(&str, Option<f64>)]) -> Result<(), SettingsError> {
    wrong(
        values,
        |value| (0.0..=1.0).contains(&value),
        "must be between 0 and 1",
    )
}

fn wrong(values: &[(&str, Option<f64>)], ok: impl Fn(f64) -> bool, rule: &str) -> Result<(), SettingsError> {
    match values
        .iter()
        .find_map(|&(key, value)| Some((key, value.filter(|&value| !ok(value))?)))
    {
        None => Ok(()),
        Some((key, value)) => Err(SettingsError::Wrong {
            key: key.to_owned(),
            message: format!("{rule}, got {value}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(args: &[&str]) -> Result<Settings, SettingsError> {
        read(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>())
    }

    const NEEDED: [&str; 3] = ["model=m", "training_file=t.jsonl", "output_dir=o"];

    #[test]
    fn overrides_win_and_other_names_are_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "model_name_or_path: m\ntrain_file: t\noutput_dir: o\nlr: 1e-4\nper_device_train_batch_size: 4\nlora_rank: 8\n";
        std::fs::write(file.path(), text).unwrap();
        let path = file.path().display().to_string();
        let settings = asked(&[
            &path,
            "learning_rate=3e-4",
            "target_modules=[q_proj, v_proj]",
            "method=full",
        ])
        .unwrap();
        assert_eq!(settings.request.learning_rate, Some(3e-4));
        assert_eq!(
            (settings.request.batch_size, settings.request.lora_r),
            (Some(4), Some(8))
        );
        assert_eq!(settings.request.lora_target_modules, ["q_proj", "v_proj"]);
        assert_eq!(settings.tuning, Tuning::Full);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, expected) in [
            (&["learning_rat=1"][..], "did you mean learning_rate?"),
            (&["method=qlora"], "method"),
            (&["n_epochs=many"], "n_epochs"),
            (&["n_epochs=0"], "n_epochs: must be above 0, got 0"),
            (&["lora_dropout=1"], "below 1, got 1"),
            (&["lr_scheduler_type=step"], "lr_scheduler_type"),
            (&["what"], "neither key=value"),
        ] {
            let args: Vec<&str> = NEEDED.iter().chain(more).copied().collect();
            let message = asked(&args).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(expected), "{more:?}: {message}");
        }
        assert!(asked(&NEEDED).is_ok());
        assert!(
            asked(&["model=m"])
                .unwrap_err()
                .to_string()
                .contains("training_file")
        );
    }

    #[test]
    fn every_key_is_typed() {
        // A key without a field would be read and ignored.
        for (key, ..) in KEYS {
            let args: Vec<String> = NEEDED
                .iter()
                .map(|arg| arg.to_string())
                .chain([format!("{key}={{x: [1]}}")])
                .collect();
            assert!(read(&args).is_err(), "{key} takes anything");
        }
    }
}
