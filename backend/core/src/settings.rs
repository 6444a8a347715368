//! The settings of a training run. Each stands here once: its name, other spellings, type, range, default and one line
//! of help. Whatever is asked by HTTP, by a YAML file or on a command line goes through [`read`]; the help of
//! `tandem train` and the API document print [`TABLE`]. Not here: what is chosen when nothing is asked, and limits that
//! depend on the model (both are the router's `hyper`).

mod foreign;
mod kind;
mod objective;
mod optimizer;
mod selection;
mod sweep;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use kind::{Kind, Range};
pub use objective::readers;
pub use sweep::{Asked, MOST_TRIALS, Trial, read_asked};

use crate::job::Schedule;
use crate::suggest::closest;

/// Stands for "all linear layers but the output layer" in `lora_target_modules`.
pub const ALL_LINEAR: &str = "all-linear";
/// Of steps, by name: far beyond any run, and safe to add and multiply.
const MOST_STEPS: i64 = 10_000_000;
/// Of passes, by the number of which a run's length is said.
pub const MOST_EPOCHS: f64 = 10_000.0;

/// One row of [`TABLE`].
#[derive(Debug)]
pub struct Setting {
    pub name: &'static str,
    /// What TRL, transformers, PEFT, torchtune, llama-recipes, axolotl or another trainer calls it.
    pub aliases: &'static [&'static str],
    pub group: Group,
    pub kind: Kind,
    /// In words, or the value itself.
    pub default: &'static str,
    pub help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    Length,
    Optimizer,
    Data,
    Saving,
    /// Each is read by some objectives.
    Objective,
    /// Means nothing when every parameter is trained.
    Lora,
}

macro_rules! settings {
    ($($group:ident { $(
        $name:ident: $field:ty, $kind:expr, [$($alias:literal),*], $default:literal, $help:literal;
    )* })*) => {
        /// What was asked of a run; `None` is left to the server. In range when it comes from [`read`].
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Settings { $($( #[doc = $help] pub $name: Option<$field>, )*)* }

        pub const TABLE: &[Setting] = &[$($( Setting {
            name: stringify!($name),
            aliases: &[$($alias),*],
            group: Group::$group,
            kind: $kind,
            default: $default,
            help: $help,
        }, )*)*];
    };
}

use Kind::{Flag, Integer, Map, Modules, Real, Text, Word};
use Range::{Above, Below, Closed};

settings! {
    Length {
        n_epochs: f64, Real(Above(0.0, MOST_EPOCHS)),
            ["num_train_epochs", "num_epochs", "epochs"],
            "3; up to 25 for small files, 1 for huge ones", "passes over the training file, also parts of one: 1.5";
        max_steps: u64, Integer { low: 1, high: MOST_STEPS, unset: Some(-1) },
            ["max_train_steps"],
            "none", "optimizer steps of the run, in place of n_epochs; -1: not given";
        max_steps_per_epoch: u64, Integer { low: 1, high: MOST_STEPS, unset: Some(-1) },
            [],
            "none", "optimizer steps of an epoch at most: the rest of its rows is left out, other rows in each where they are shuffled; -1: not given";
        batch_size: u32, Integer { low: 1, high: 1024, unset: None },
            ["per_device_train_batch_size", "batch_size_training", "micro_batch_size", "train_batch_size"],
            "rows / 128, from 1 to 8", "rows of a micro-batch";
        gradient_accumulation_steps: u32, Integer { low: 1, high: 1_000_000, unset: None },
            ["gradient_accumulation"],
            "1", "micro-batches of an optimizer step";
    }
    Optimizer {
        optim: String, Word(&optimizer::OPTIMIZERS),
            ["optimizer"],
            "adamw_torch", "what makes a step of a gradient: AdamW, also fused or paged; with moments in 8 bits (adamw_8bit); sgd; lion_32bit; adafactor";
        learning_rate: f64, Real(Above(0.0, 1.0)),
            ["lr"],
            "by the model's width", "peak of the schedule";
        learning_rate_multiplier: f64, Real(Above(0.0, 1e4)),
            [],
            "1", "factor on the default learning rate, in place of learning_rate";
        lr_scheduler_type: String, Word(&Schedule::NAMES),
            ["lr_scheduler"],
            "linear, or the one that another setting belongs to", "course of the learning rate; `constant` has no warm-up, step falls at each epoch's end";
        num_cycles: f64, Real(Above(0.0, 1000.0)),
            [],
            "1", "of cosine_with_restarts: how often it falls to zero";
        power: f64, Real(Above(0.0, 100.0)),
            [],
            "1", "of polynomial";
        lr_end: f64, Real(Closed(0.0, 1.0)),
            ["min_lr"],
            "1e-7", "of polynomial: the rate at the end";
        gamma: f64, Real(Above(0.0, 1.0)),
            ["lr_gamma"],
            "0.85", "of step: factor on the rate at each epoch's end";
        warmup_steps: u64, Integer { low: 0, high: MOST_STEPS, unset: None },
            ["num_warmup_steps"],
            "3 % of the run", "optimizer steps of linear warm-up; below 1 the part of the run that warms up";
        warmup_ratio: f64, Real(Closed(0.0, 1.0)),
            ["warmup_proportion"],
            "0.03", "part of the run that warms up, in place of warmup_steps";
        weight_decay: f64, Real(Closed(0.0, 1.0)),
            ["wd"],
            "0", "of the numbers at each step, times the learning rate (of sgd a part of the gradient)";
        max_grad_norm: f64, Real(Closed(0.0, 1e6)),
            ["clip_grad_norm", "gradient_clipping_threshold", "gradient_clip_val"],
            "1", "gradients are scaled down to this norm; 0: never";
        adam_beta1: f64, Real(Below(0.0, 1.0)),
            ["beta1"],
            "0.9", "AdamW's decay of the first moment; of lion_32bit that of the step's mean";
        adam_beta2: f64, Real(Below(0.0, 1.0)),
            ["beta2"],
            "0.999", "AdamW's decay of the second moment; of lion_32bit that of the mean that is kept";
        adam_epsilon: f64, Real(Above(0.0, 1.0)),
            ["adam_eps", "eps"],
            "1e-8", "AdamW's, beside the root of the second moment";
        momentum: f64, Real(Below(0.0, 1.0)),
            [],
            "0", "of sgd";
        nesterov: bool, Flag,
            [],
            "false", "of sgd with momentum: looks ahead along it";
        scale_parameter: bool, Flag,
            [],
            "false", "of adafactor: the learning rate is a part of each matrix's own size";
    }
    Data {
        max_seq_length: u32, Integer { low: 2, high: i32::MAX as i64, unset: None },
            ["max_seq_len", "max_length", "cutoff_len", "sequence_len", "context_length", "model_max_length"],
            "the model's, 2048 at most", "tokens of a row; longer rows are cut";
        packing: bool, Flag,
            ["packed", "sample_packing"],
            "false", "short rows share one of max_seq_length tokens, attention stays within each";
        packing_strategy: String, Word(&PACKING),
            [],
            "bfd", "bfd: whole rows side by side, with packing; wrapped: all rows one after the other, cut into blocks of max_seq_length";
        prompt_loss_weight: f64, Real(Closed(0.0, 1.0)),
            [],
            "0", "loss weight of the prompt in rows of prompt and completion";
        train_on_input: bool, Flag,
            ["train_on_inputs", "train_on_prompt"],
            "false", "every token of every row is learned, prompts like answers";
        template: String, Text,
            ["instruct_template"],
            "none", "makes prompts of columns: a text with {columns} in it, or a name: alpaca, summarize, grammar, torchtune's classes, llama-recipes' data sets; the answer is the column output";
        column_map: BTreeMap<String, String>, Map,
            [],
            "none", "what a row's columns are called: the name that is wanted here (a placeholder, output, prompt, messages, text, ...) to the file's, or to '' to leave it out";
        dataset_text_field: String, Text,
            ["text_column"],
            "text", "column of plain text";
        dataset_format: String, Word(&FORMATS),
            ["data_format"],
            "by content, then by name", "how rows lie in a file: jsonl, json (one array), csv, parquet, text";
        sample_by: String, Word(&SAMPLES),
            [],
            "line", "what a row of plain text is: a line, a paragraph or the whole document";
        split: String, Text,
            ["dataset_split", "dataset_train_split"],
            "train", "a part of training_file: train[:1%], train[100:200], train[-10%:]";
        shuffle: bool, Flag,
            [],
            "true", "every epoch has an order of its own, drawn from seed; false: rows in the order of their files";
        seed: u64, Integer { low: 0, high: i32::MAX as i64, unset: None },
            ["data_seed", "random_state"],
            "drawn by a server, 42 for `tandem train`", "of the order of rows, dropout and the adapter's first numbers";
    }
    Objective {
        objective: String, Word(&OBJECTIVES),
            ["stage", "training_method", "method_type", "rl"],
            "sft", "what is minimised, of rows that suit it: sft, reward_weighted, of pairs dpo, orpo, cpo, simpo, of judged rows kto";
        loss_type: String, Word(&LOSSES),
            ["pref_loss"],
            "sigmoid; simpo for simpo", "of dpo and cpo, TRL's names; of dpo also a method whose name it is";
        beta: f64, Real(Above(0.0, 1000.0)),
            ["dpo_beta", "kto_beta", "rl_beta", "pref_beta"],
            "0.1; 2 for simpo, 1 for reward_weighted", "how near the reference stays (dpo, kto), the margin's scale (cpo, simpo), the odds ratio's weight (orpo), the rewards' temperature (reward_weighted)";
        label_smoothing: f64, Real(Below(0.0, 0.5)),
            ["dpo_label_smoothing"],
            "0; 0.001 for exo_pair", "share of pairs that may be the wrong way round (dpo: sigmoid, robust, exo_pair; cpo, simpo: sigmoid, simpo)";
        simpo_gamma: f64, Real(Closed(0.0, 1000.0)),
            [],
            "1 for simpo, 0.5 for cpo", "the margin that simpo asks for";
        cpo_alpha: f64, Real(Closed(0.0, 1000.0)),
            [],
            "1; 0 for simpo", "weight of the preferred answers' own likelihood (cpo, simpo)";
        desirable_weight: f64, Real(Closed(0.0, 1000.0)),
            ["kto_desirable_weight", "kto_chosen_weight"],
            "1", "of kto's desirable rows";
        undesirable_weight: f64, Real(Closed(0.0, 1000.0)),
            ["kto_undesirable_weight", "kto_rejected_weight"],
            "1", "of kto's undesirable rows";
        neftune_noise_alpha: f64, Real(Closed(0.0, 1e4)),
            ["noisy_embedding_alpha"],
            "none", "uniform noise up to alpha / sqrt(tokens x width) on a row's embeddings in training (NEFTune; sft)";
    }
    Saving {
        save_steps: u64, Integer { low: 0, high: MOST_STEPS, unset: None },
            [],
            "a fifth of the run", "optimizer steps between checkpoints; 0: only at the end";
        save_strategy: String, Word(&selection::STRATEGIES),
            [],
            "steps", "when checkpoints are saved: every save_steps, at each epoch's end, after each validation that is the best so far, or only at the end";
        save_total_limit: u32, Integer { low: 1, high: 1_000_000, unset: Some(0) },
            [],
            "none: all", "checkpoints that are kept: the newest, and among them the best where one is looked for; 0: not given";
        eval_steps: u64, Integer { low: 0, high: MOST_STEPS, unset: None },
            [],
            "0", "optimizer steps between validations; 0: at each epoch's end";
        load_best_model_at_end: bool, Flag,
            [],
            "false", "the result is the model of the best validation, not of the last step";
        metric_for_best_model: String, Word(&selection::METRICS),
            ["early_stopping_metric"],
            "eval_loss", "what validations are compared by";
        greater_is_better: bool, Flag,
            [],
            "false for a loss, else true", "whether the greater metric is the better one";
        early_stopping_patience: u32, Integer { low: 1, high: 1_000_000, unset: Some(0) },
            ["early_stopping_steps"],
            "none; 1 with early_stopping_threshold", "the run ends after so many validations in a row that were not better than the best; 0: not given";
        early_stopping_threshold: f64, Real(Closed(0.0, 1e9)),
            [],
            "0", "a validation counts as better for early_stopping_patience only by more than this";
        reduction_factor: u32, Integer { low: 1, high: 64, unset: None },
            ["halving_factor"],
            "2", "of a sweep: at each rung one of so many trials goes on (successive halving); 1: all go on to their ends";
    }
    Lora {
        lora_r: u32, Integer { low: 1, high: i32::MAX as i64, unset: None },
            ["r", "lora_rank", "rank"],
            "16", "rank of the adapter";
        lora_alpha: f64, Real(Above(0.0, 1e6)),
            ["alpha"],
            "2 x lora_r", "the adapter's output is scaled by alpha / r";
        lora_dropout: f64, Real(Below(0.0, 1.0)),
            [],
            "0", "part of the adapter's inputs that is dropped";
        lora_target_modules: Vec<String>, Modules,
            ["target_modules", "lora_trainable_modules", "lora_target"],
            "all-linear", "modules that are adapted: a list of names, or all-linear; lm_head, the output layer, and embed_tokens are adapted where they are named: [all-linear, lm_head]";
        use_rslora: bool, Flag,
            ["rslora"],
            "false", "scale by alpha / sqrt(r) instead of alpha / r";
        use_dora: bool, Flag,
            [],
            "false", "learn how long each output is apart from where it points (DoRA); of one rank, not of experts";
        loraplus_lr_ratio: f64, Real(Above(0.0, 1e4)),
            [],
            "1", "B learns at so many times the learning rate of A (LoRA+)";
        from_peft_checkpoint: String, Text,
            ["from_checkpoint", "resume_from_checkpoint", "adapter_name_or_path", "lora_model_dir", "warm_start_from"],
            "none: a new adapter", "the adapter to start from, whose rank and modules are taken over: for a server the name of a model (which may also stand as the job's model), for `tandem train` a PEFT folder";
    }
}

/// Of `objective`. `simpo` is cpo with its loss of that name and without the likelihood.
const OBJECTIVES: [&str; 7] = ["sft", "dpo", "kto", "orpo", "cpo", "simpo", "reward_weighted"];
/// Of `packing_strategy`, TRL's names.
const PACKING: [&str; 2] = ["bfd", WRAPPED];
const WRAPPED: &str = "wrapped";
/// Of `dataset_format` and `sample_by`, as `datasets` calls them.
const FORMATS: [&str; 5] = ["jsonl", "json", "csv", "parquet", "text"];
const SAMPLES: [&str; 3] = ["line", "paragraph", "document"];
/// Of `loss_type`, for all objectives.
const LOSSES: [&str; 15] = [
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
    "simpo",
    "kto",
    "nll",
    "chunked_nll",
];

/// Pairs of which one makes the other meaningless.
const EXCLUSIVE: [(&str, &str); 3] = [
    ("prompt_loss_weight", "train_on_input"),
    ("learning_rate", "learning_rate_multiplier"),
    ("warmup_steps", "warmup_ratio"),
];

/// A setting that cannot be taken. The message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// As it was written, with the place: `hyperparameters.n_epoch`.
    pub path: String,
    pub why: Why,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nobody knows this name.
    Unknown,
    /// Others have it.
    NotBuilt,
    Type,
    /// Out of range, or at odds with another setting.
    Value,
}

/// What stands beside a setting and may change what it means.
pub struct Beside<'a> {
    pub settings: &'a Settings,
    pub has_validation_file: bool,
}

/// The row of a name, under any of its spellings.
pub fn setting(name: &str) -> Option<&'static Setting> {
    TABLE
        .iter()
        .find(|setting| setting.name == name || setting.aliases.contains(&name))
}

/// Every name that means something here, for suggestions.
pub fn names() -> impl Iterator<Item = &'static str> {
    let ours = TABLE
        .iter()
        .flat_map(|setting| setting.aliases.iter().copied().chain([setting.name]));
    ours.chain(foreign::names())
}

/// What was asked, from one or more places (`""`, `"hyperparameters."`). Every key is honoured, known to be harmless, or
/// refused; null and `"auto"` ask for nothing.
pub fn read<'a>(
    places: impl IntoIterator<Item = (&'a str, serde_json::Map<String, Value>)>,
    has_validation_file: bool,
) -> Result<Settings, Refused> {
    let mut given: BTreeMap<&str, (String, Option<Value>)> = BTreeMap::new();
    let mut others = Vec::new();
    for (place, values) in places {
        for (name, value) in opened(values).into_iter().filter(|(_, value)| !value.is_null()) {
            let path = format!("{place}{name}");
            let Some(setting) = meant(&name, &value) else {
                others.push((path, name, value));
                continue;
            };
            let value = setting.kind.read(&path, &value)?;
            if let Some((first, _)) = given.get(setting.name) {
                let message = format!("{first} and {path} are the same setting: give one of them");
                return Err(refused(path, Why::Value, message));
            }
            given.insert(setting.name, (path, value));
        }
    }
    let values = given
        .iter()
        .filter_map(|(name, (_, value))| Some(((*name).to_owned(), value.clone()?)));
    let settings: Settings = serde_json::from_value(Value::Object(values.collect()))
        .expect("each kind reads what its field holds: a test tries all");
    let path = |name: &str| given.get(name).filter(|(_, value)| value.is_some());
    for (one, other) in EXCLUSIVE {
        if let (Some((one, _)), Some((other, _))) = (path(one), path(other)) {
            let message = format!("{one} and {other} exclude each other: give one of them");
            return Err(refused(other.clone(), Why::Value, message));
        }
    }
    packs(&settings)?;
    settings.schedule().map(drop)?;
    optimizer::check(&settings)?;
    settings.objective()?;
    selection::check(&settings, has_validation_file)?;
    let beside = Beside {
        settings: &settings,
        has_validation_file,
    };
    for (path, name, value) in others {
        foreign::check(path, &name, &value, &beside)?;
    }
    Ok(settings)
}

/// transformers 5 takes a part of the run as warmup_steps, too.
fn meant(name: &str, value: &Value) -> Option<&'static Setting> {
    let is_part = value.as_f64().is_some_and(|part| part > 0.0 && part < 1.0);
    match setting(name) {
        Some(Setting {
            name: "warmup_steps", ..
        }) if is_part => setting("warmup_ratio"),
        setting => setting,
    }
}

/// What lies in `lr_scheduler_kwargs` are settings of their own, and some say by another name that rows keep their order, or that
/// nothing is clipped.
fn opened(mut values: serde_json::Map<String, Value>) -> serde_json::Map<String, Value> {
    let schedules = OF_SCHEDULES.iter().flat_map(|(_, settings)| settings.iter());
    if let Some(Value::Object(within)) = values.get_mut("lr_scheduler_kwargs") {
        let found: Vec<(String, Value)> = schedules
            .filter_map(|name| Some(((*name).to_owned(), within.remove(*name)?)))
            .collect();
        values.extend(found);
    }
    optimizer::open(&mut values);
    for (name, in_order) in [
        ("train_sampling_strategy", Value::from("sequential")),
        ("disable_shuffling", true.into()),
    ] {
        if values.get(name) == Some(&in_order) && !values.contains_key("shuffle") {
            values.remove(name);
            values.insert("shuffle".to_owned(), false.into());
        }
    }
    // llama-recipes': its threshold stands beside it and counts for nothing.
    let clips = values.get("gradient_clipping");
    if clips.is_some_and(|clips| *clips == false || *clips == "false")
        && !values.contains_key("max_grad_norm")
    {
        values.remove("gradient_clipping");
        values.remove("gradient_clipping_threshold");
        values.insert("max_grad_norm".to_owned(), 0.into());
    }
    values
}

/// A schedule, and the settings that belong to it alone.
const OF_SCHEDULES: [(&str, &[&str]); 3] = [
    ("cosine_with_restarts", &["num_cycles"]),
    ("polynomial", &["power", "lr_end"]),
    ("step", &["gamma"]),
];

impl Settings {
    /// What was given and changes nothing here, as where it comes from, for whoever gave it.
    pub fn notes(&self) -> Vec<String> {
        let asked = [
            ("warmup_steps", self.warmup_steps.is_some_and(|steps| steps > 0)),
            ("warmup_ratio", self.warmup_ratio.is_some_and(|ratio| ratio > 0.0)),
        ];
        let is_constant = self.lr_scheduler_type.as_deref() == Some(Schedule::Constant.name());
        let given = asked.into_iter().filter(|(_, asked)| *asked && is_constant);
        let note = |(name, _)| {
            format!(
                "{name} changes nothing, as in transformers: lr_scheduler_type constant has no warm-up, constant_with_warmup has"
            )
        };
        given.map(note).collect()
    }

    /// Its name: what was asked, or what another setting belongs to.
    pub fn schedule(&self) -> Result<&str, Refused> {
        let given = serde_json::to_value(self).expect("settings are plain data");
        let mut name = self.lr_scheduler_type.as_deref();
        for (schedule, settings) in OF_SCHEDULES {
            let Some(setting) = settings.iter().find(|setting| !given[**setting].is_null()) else {
                continue;
            };
            match name {
                Some(name) if name != schedule => {
                    let message = format!(
                        "{setting} belongs to lr_scheduler_type {schedule}, not to {name}: leave it out, or give that one"
                    );
                    return Err(refused((*setting).to_owned(), Why::Value, message));
                }
                _ => name = Some(schedule),
            }
        }
        Ok(name.unwrap_or("linear"))
    }
}

/// Blocks are a way of packing.
fn packs(settings: &Settings) -> Result<(), Refused> {
    match settings.wraps() && settings.packing == Some(false) {
        true => {
            let message = "packing_strategy: wrapped packs, and packing is false: leave one of them out";
            Err(refused(
                "packing_strategy".to_owned(),
                Why::Value,
                message.to_owned(),
            ))
        }
        false => Ok(()),
    }
}

impl Settings {
    /// Are all rows one text that is cut into blocks?
    pub fn wraps(&self) -> bool {
        self.packing_strategy.as_deref() == Some(WRAPPED)
    }
}

/// A name that nobody knows.
fn unknown(path: String, name: &str) -> Refused {
    let hint = closest(name, names()).map_or_else(String::new, |name| format!("; did you mean {name}?"));
    let shown: String = path.chars().take(SHOWN_CHARS).collect();
    let message = format!("Unknown parameter: '{shown}'{hint}");
    refused(shown, Why::Unknown, message)
}

/// Characters of a name or value that a message repeats.
const SHOWN_CHARS: usize = 80;

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn refused(path: String, why: Why, message: String) -> Refused {
    Refused { path, why, message }
}

#[cfg(test)]
mod tests;
