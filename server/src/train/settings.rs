//! What `tandem train` is told: a YAML file and `key=value` words. The settings of the run are core's table, the same as
//! on HTTP; the few that only a run without a server has stand here. An unknown key is an error: a misspelt one must
//! not train silently.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tandem_backend::train::profile;
use tandem_core::settings::{self, Group, Kind, Refused, Setting, Settings, TABLE, Trial};
use tandem_core::suggest::closest;
use tandem_router::hyper::Tuning;

use super::placing::{Places, Placing};
use super::{recipes, torchtune};

/// As the field's examples do.
const DEFAULT_SEED: u64 = 42;
/// Of a file of settings.
const MAX_FILE_BYTES: u64 = 1 << 20;
const MAX_BRACKETS: usize = 10_000;

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot read {path}")]
    Unreadable { path: String, source: io::Error },
    #[error("{path} is not YAML of settings, key: value on each line: {why}")]
    NotYaml { path: String, why: String },
    #[error("{0:?} is neither key=value nor, as the first argument, a YAML file")]
    NotASetting(String),
    #[error("{first} and {second} are the same setting: give one of them")]
    Twice { first: String, second: String },
    #[error("{key}: {message}")]
    Wrong { key: String, message: String },
    #[error(transparent)]
    Refused(#[from] Refused),
}

pub fn wrong(key: &str, message: String) -> SettingsError {
    SettingsError::Wrong {
        key: key.to_owned(),
        message,
    }
}

/// Key, other spellings, what it says.
type Key = (&'static str, &'static [&'static str], &'static str);

/// What a job of the API has from its server, or by another name.
const KEYS: &[Key] = &[
    (
        "model",
        &["model_name_or_path", "base_model", "model_name"],
        "folder of the base model, or its name on the hub (required)",
    ),
    (
        "revision",
        &["model_revision"],
        "branch, tag or commit on the hub",
    ),
    (
        "chat_template",
        &["chat_template_path"],
        "file with a Jinja template, or itself, instead of the model's",
    ),
    (
        "training_file",
        &["train_file", "dataset_name"],
        "file of rows, a data set's name on the hub, or a list of them: JSONL, a JSON array, CSV, Parquet or plain text (required)",
    ),
    ("validation_file", &["eval_file"], "the same, to validate on"),
    (
        "dataset_config",
        &["dataset_config_name", "subset"],
        "the part of a hub's data set, where it has several",
    ),
    (
        "dataset_revision",
        &[],
        "branch, tag or commit of a hub's data set",
    ),
    (
        "dataset_test_split",
        &["dataset_eval_split"],
        "the split of validation_file where that is a hub's data set (default: validation, else test)",
    ),
    (
        "output_dir",
        &[],
        "folder for state, checkpoints and the result (required)",
    ),
    (
        "overwrite_output_dir",
        &[],
        "true: what an earlier run left in output_dir goes",
    ),
    ("method", &[], "lora (default) or full"),
    (
        "freeze_layers",
        &[],
        "true: method=full leaves the first num_freeze_layers layers as they are",
    ),
    ("num_freeze_layers", &[], "how many that are (default 1)"),
    (
        "dtype",
        &["torch_dtype"],
        "of the frozen base: auto (default), bfloat16 (which float16 becomes) or float32; of method=full what passes multiply in, float32 unless given \
         (numbers, gradient and moments are float32, the result is stored as the checkpoint is)",
    ),
    (
        "quantization",
        &[],
        "the frozen linears in int8, int4 or nf4 (QLoRA); without it as the checkpoint has them",
    ),
    (
        "device",
        &[],
        "auto (default), cpu, cuda:N, or emu (a GPU emulated on the CPU, for tests); of several ranks each takes its own GPU",
    ),
    (
        "data_parallel_size",
        &[],
        "models that train together, each on a rank or on tensor_parallel_size of them: batch_size and gradient_accumulation_steps \
         are of each (default: as many as num_processes allows)",
    ),
    (
        "tensor_parallel_size",
        &["tensor_parallel_dim", "tp_size"],
        "ranks that divide each model (default 1); LoRA",
    ),
    (
        "num_processes",
        &["nproc_per_node"],
        "all ranks: data_parallel_size times tensor_parallel_size (default: WORLD_SIZE where torchrun or Slurm start them)",
    ),
    (
        "sharding_strategy",
        &["fsdp"],
        "what models hold in equal shares: NO_SHARD (default), SHARD_GRAD_OP (with method=full what is trained, its gradient \
         and moments: ZeRO-2) or FULL_SHARD (the base too, each matrix whole only while it is multiplied with: ZeRO-3); \
         HYBRID_SHARD and HYBRID_SHARD_ZERO2 are these two within each machine, with copies between machines",
    ),
    (
        "sharding_group_size",
        &["data_parallel_shard_dim"],
        "models that share, in groups, with copies between groups (default and -1: all, with HYBRID_SHARD those of a machine)",
    ),
    (
        "replica_group_size",
        &["data_parallel_replicate_dim"],
        "groups that share; data_parallel_size is this times sharding_group_size",
    ),
    (
        "hsdp",
        &[],
        "true: sharding_strategy is of groups, as in HYBRID_SHARD",
    ),
    (
        "enable_fsdp",
        &[],
        "true is sharding_strategy FULL_SHARD, unless that says another",
    ),
    (
        "report_to",
        &["use_wandb"],
        "wandb (or true): output_dir/wandb/offline-run-* beside what is written anyway, for `wandb sync`; tensorboard, none or all",
    ),
    (
        "wandb_project",
        &["wandb_project_name"],
        "of report_to wandb (default: WANDB_PROJECT, else tandem)",
    ),
    ("run_name", &["wandb_name"], "the run's name there"),
    (
        "profile",
        &["use_profiler"],
        "true, or a number of steps: output_dir/trace.json says what took how long in these steps, for Perfetto or \
         chrome://tracing",
    ),
    (
        "preview",
        &[],
        "true, or a number of rows: shows rows as they would be trained, and trains nothing",
    ),
];

pub fn help() -> String {
    let mut text = "Settings of tandem train, in a YAML file or as key=value:\n\n".to_owned();
    let mut line = |key: &str, others: &[&str], says: &str| {
        let others = if others.is_empty() {
            String::new()
        } else {
            format!(" (or {})", others.join(", "))
        };
        text.push_str(&format!("  {key:<28} {says}{others}\n"));
    };
    for (key, others, says) in KEYS {
        line(key, others, says);
    }
    for Setting {
        name,
        aliases,
        kind,
        default,
        help,
        ..
    } in TABLE
    {
        line(name, aliases, &format!("{help}; {kind}; default: {default}"));
    }
    text
}

/// A run, as it was asked.
#[derive(Debug)]
pub struct Recipe {
    pub model: PathBuf,
    pub revision: Option<String>,
    pub chat_template: Option<String>,
    pub training_file: Files,
    pub validation_file: Option<Files>,
    pub dataset_config: Option<String>,
    pub dataset_revision: Option<String>,
    pub dataset_test_split: Option<String>,
    pub output_dir: PathBuf,
    pub overwrite_output_dir: bool,
    pub tuning: Tuning,
    /// First layers that are not trained, where all others are.
    pub frozen_layers: u32,
    pub dtype: String,
    pub quantization: Option<String>,
    pub device: String,
    pub placing: Placing,
    /// Project and name of the run, where W&B is reported to.
    pub wandb: Option<(String, Option<String>)>,
    /// Steps to trace.
    pub profile: Option<u64>,
    /// Rows to show.
    pub preview: Option<usize>,
    /// Of a sweep: those of its first trial.
    pub settings: Settings,
    pub trials: Vec<Trial>,
}

/// `KEYS`, typed.
#[derive(Deserialize)]
struct Own {
    model: PathBuf,
    revision: Option<String>,
    chat_template: Option<String>,
    training_file: Files,
    validation_file: Option<Files>,
    dataset_config: Option<String>,
    dataset_revision: Option<String>,
    dataset_test_split: Option<String>,
    output_dir: PathBuf,
    overwrite_output_dir: Option<bool>,
    method: Option<Method>,
    freeze_layers: Option<bool>,
    num_freeze_layers: Option<u32>,
    dtype: Option<String>,
    quantization: Option<String>,
    device: Option<String>,
    data_parallel_size: Option<usize>,
    tensor_parallel_size: Option<usize>,
    num_processes: Option<usize>,
    sharding_strategy: Option<String>,
    sharding_group_size: Option<i64>,
    replica_group_size: Option<usize>,
    hsdp: Option<bool>,
    enable_fsdp: Option<bool>,
    report_to: Option<Words>,
    wandb_project: Option<String>,
    run_name: Option<String>,
    profile: Option<Number>,
    preview: Option<Number>,
}

/// Whether, or how many.
#[derive(Deserialize)]
#[serde(untagged, expecting = "true, false or a number")]
enum Number {
    Flag(bool),
    Of(usize),
}

impl Number {
    fn or(self, number: usize) -> Option<usize> {
        match self {
            Number::Flag(false) => None,
            Number::Flag(true) => Some(number),
            Number::Of(number) => Some(number),
        }
    }
}

/// Without a number.
const PROFILE_STEPS: usize = 5;

const PREVIEW_ROWS: usize = 3;

/// One word, or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a word, or a list of words")]
enum Words {
    One(String),
    Several(Vec<String>),
}

impl Words {
    fn all(self) -> Vec<String> {
        match self {
            Words::One(word) => vec![word],
            Words::Several(words) => words,
        }
    }
}

/// One path, or several.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a path, or a list of paths")]
pub enum Files {
    One(PathBuf),
    Several(Vec<PathBuf>),
}

impl Files {
    pub fn paths(&self) -> &[PathBuf] {
        match self {
            Files::One(path) => std::slice::from_ref(path),
            Files::Several(paths) => paths,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Method {
    Lora,
    Full,
}

/// A value, and where it stands: `optimizer.` and `lr`.
struct Asked {
    place: String,
    name: String,
    value: Value,
}

impl Asked {
    fn spelt(&self) -> String {
        format!("{}{}", self.place, self.name)
    }
}

/// By the setting's name here.
type Given = BTreeMap<String, Asked>;

pub fn read(args: &[String]) -> Result<Recipe, SettingsError> {
    let (mut config, words) = match args.split_first() {
        Some((path, words)) if !path.contains('=') && !path.starts_with('~') => (file(path)?, words),
        _ => (Map::new(), args),
    };
    let has_sections = torchtune::is_config(&config);
    let mut own_words = Given::new();
    for word in words {
        if let Some(removed) = word.strip_prefix('~') {
            torchtune::set(&mut config, removed, None)?;
            continue;
        }
        let (key, text) = word
            .split_once('=')
            .ok_or_else(|| SettingsError::NotASetting(word.clone()))?;
        let value = of_word(key, text)?;
        let has_parts = |(root, _): (&str, &str)| {
            config.contains_key(root)
                || settings::setting(root).is_some_and(|setting| setting.kind == Kind::Map)
        };
        // torchtune's word for its own code, and ours for a folder.
        let is_folder = key == "model" && !value.as_str().is_some_and(|path| path.starts_with("torchtune."));
        let is_path = has_sections && !is_folder || key.split_once('.').is_some_and(has_parts);
        if is_path && torchtune::set(&mut config, key, Some(value.clone()))? {
            continue;
        }
        // Of one word given twice, the later counts.
        if own_words
            .get(canonical(key))
            .is_some_and(|asked| asked.name == key)
        {
            own_words.remove(canonical(key));
        }
        insert(&mut own_words, "", key, value)?;
    }
    let mut given = Given::new();
    if torchtune::is_config(&config) {
        for torchtune::Flat { place, name, value } in torchtune::flat(config)? {
            insert(&mut given, &place, &name, value)?;
        }
    } else {
        for (key, value) in config {
            insert(&mut given, "", &key, value)?;
        }
    }
    // Words win over the file.
    given.extend(own_words);
    typed(given)
}

/// Of a file that is no larger than settings are, and not deeper: its reader takes quadratic time over open brackets.
fn text(path: &str) -> io::Result<String> {
    let mut text = String::new();
    let mut file = File::open(path)?.take(MAX_FILE_BYTES + 1);
    file.read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        let why = format!(
            "it has more than {MAX_FILE_BYTES} bytes: settings are wanted, a data set is their training_file"
        );
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    let brackets = text.bytes().filter(|byte| b"[{".contains(byte)).count();
    if brackets > MAX_BRACKETS {
        let why = format!("it has {brackets} opening brackets, at most {MAX_BRACKETS} are read");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(text)
}

pub fn file(path: &str) -> Result<Map<String, Value>, SettingsError> {
    let text = match recipes::named(path) {
        Some(recipe) if !Path::new(path).exists() => recipe.text.to_owned(),
        _ => text(path).map_err(|source| SettingsError::Unreadable {
            path: path.to_owned(),
            source,
        })?,
    };
    let not_yaml = |why: String| SettingsError::NotYaml {
        path: path.to_owned(),
        why,
    };
    // It says the line, and what it was about.
    let yaml: serde_norway::Mapping =
        serde_norway::from_str(&text).map_err(|error| not_yaml(error.to_string()))?;
    let mut config = Map::new();
    for (key, value) in yaml {
        let key = key
            .as_str()
            .ok_or_else(|| not_yaml(format!("{key:?} is no name of a setting")))?;
        config.insert(key.to_owned(), json(key, value)?);
    }
    Ok(config)
}

/// A text stays one, whatever YAML would make of it: templates have colons and braces.
fn of_word(key: &str, text: &str) -> Result<Value, SettingsError> {
    let is_of = |kind| settings::setting(canonical(key)).is_some_and(|setting| setting.kind == kind);
    // Nothing is no list of modules: who writes so meant some, or none, and does not get all.
    if text.trim().is_empty() && is_of(Kind::Modules) {
        return Ok(Value::String(String::new()));
    }
    let is_text = is_of(Kind::Text);
    match serde_norway::from_str(text) {
        Ok(serde_norway::Value::Mapping(_) | serde_norway::Value::Sequence(_)) if is_text => {
            Ok(Value::String(text.to_owned()))
        }
        Ok(yaml) => json(key, yaml),
        Err(_) => Ok(Value::String(text.to_owned())),
    }
}

fn insert(given: &mut Given, place: &str, key: &str, value: Value) -> Result<(), SettingsError> {
    let asked = Asked {
        place: place.to_owned(),
        name: key.to_owned(),
        value,
    };
    if let Some(first) = given.get(canonical(key)) {
        // Sections say some things twice.
        if first.value == asked.value && !asked.place.is_empty() {
            return Ok(());
        }
        return Err(SettingsError::Twice {
            first: first.spelt(),
            second: asked.spelt(),
        });
    }
    given.insert(canonical(key).to_owned(), asked);
    Ok(())
}

/// Is it one of `KEYS`?
pub(super) fn is_own(name: &str) -> bool {
    KEYS.iter().any(|(key, ..)| *key == name)
}

/// Names that nobody knows stay as they are, until they are refused.
pub(super) fn canonical(name: &str) -> &str {
    let own = KEYS
        .iter()
        .find(|(key, others, _)| *key == name || others.contains(&name));
    let own = own.map(|(key, ..)| *key);
    own.or(settings::setting(name).map(|setting| setting.name))
        .unwrap_or(name)
}

/// JSON has no NaN and no infinity: they would become null, which asks for nothing.
pub fn json(key: &str, yaml: serde_norway::Value) -> Result<Value, SettingsError> {
    let wrong = |message: String| SettingsError::Wrong {
        key: key.to_owned(),
        message,
    };
    match yaml.as_f64().filter(|number| !number.is_finite()) {
        Some(number) => Err(wrong(format!("must be a number, got {number}"))),
        None => serde_json::to_value(yaml).map_err(|error| wrong(error.to_string())),
    }
}

fn typed(given: Given) -> Result<Recipe, SettingsError> {
    let (mut own, mut rest) = (Map::new(), BTreeMap::<String, Map<String, Value>>::new());
    for (key, Asked { place, name, value }) in given {
        match is_own(&key) {
            true => drop(own.insert(key.clone(), of_others(&key, value))),
            false if is_done_anyway(&name, &value) => {}
            // llama-recipes' data sets are known by how they are written.
            false if name == "dataset" && value.is_string() => {
                rest.entry(place)
                    .or_default()
                    .insert("template".to_owned(), value);
            }
            false => drop(rest.entry(place).or_default().insert(name, value)),
        }
    }
    let has_validation_file = own.get("validation_file").is_some_and(|value| !value.is_null());
    let places = rest
        .iter()
        .map(|(place, values)| (place.as_str(), values.clone()));
    let settings::Asked {
        mut settings,
        mut trials,
    } = settings::read_asked(places, has_validation_file).map_err(suggested)?;
    one_of_each(&own)?;
    let Own {
        model,
        revision,
        chat_template,
        training_file,
        validation_file,
        dataset_config,
        dataset_revision,
        dataset_test_split,
        output_dir,
        overwrite_output_dir,
        method,
        freeze_layers,
        num_freeze_layers,
        dtype,
        quantization,
        device,
        data_parallel_size,
        tensor_parallel_size,
        num_processes,
        sharding_strategy,
        sharding_group_size,
        replica_group_size,
        hsdp,
        enable_fsdp,
        report_to,
        wandb_project,
        run_name,
        profile,
        preview,
    } = serde_path_to_error::deserialize(Value::Object(own.clone())).map_err(|error| {
        let required = ["model", "training_file", "output_dir"];
        let absent = required
            .into_iter()
            .find(|key| own.get(*key).is_none_or(Value::is_null));
        let about = KEYS.iter().find(|(key, ..)| Some(*key) == absent);
        match about {
            Some((key, _, says)) => SettingsError::Wrong {
                key: (*key).to_owned(),
                message: format!("is missing: give {key}=..., {says}"),
            },
            None => SettingsError::Wrong {
                key: error.path().to_string(),
                message: error.inner().to_string(),
            },
        }
    })?;
    let tuning = match method {
        Some(Method::Full) => Tuning::Full,
        Some(Method::Lora) | None => Tuning::Lora,
    };
    let frozen_layers = frozen(tuning, freeze_layers, num_freeze_layers)?;
    let auto = || "auto".to_owned();
    let (dtype, mut device) = (dtype.unwrap_or_else(auto), device.unwrap_or_else(auto));
    if tuning == Tuning::Full {
        fits_full(&settings, &device)?;
        if let Some(format) = &quantization {
            return Err(SettingsError::Wrong {
                key: "quantization".to_owned(),
                message: format!(
                    "method=full changes every weight, which {format} cannot follow: leave it out, or train LoRA on it"
                ),
            });
        }
        if !trials.is_empty() {
            return Err(SettingsError::Wrong {
                key: "method".to_owned(),
                message: "the trials of a sweep train beside each other on one frozen base, which method=full has not: run one \
                          after the other, or sweep LoRA"
                    .to_owned(),
            });
        }
        device = "cpu".to_owned();
    }
    let placing = Placing::read(&Places {
        data_parallel_size,
        tensor_parallel_size,
        num_processes,
        sharding_strategy: sharding_strategy.as_deref(),
        sharding_group_size,
        replica_group_size,
        hsdp,
        enable_fsdp,
    })?;
    let wandb = wandb(report_to, wandb_project, run_name)?;
    let profile = profile.and_then(|profile| profile.or(PROFILE_STEPS));
    if let Some(steps) = profile.filter(|&steps| !(1..=profile::MAX_STEPS as usize).contains(&steps)) {
        return Err(SettingsError::Wrong {
            key: "profile".to_owned(),
            message: format!(
                "must be a number of steps between 1 and {}, got {steps}",
                profile::MAX_STEPS
            ),
        });
    }
    let of_trials = trials.iter_mut().map(|trial| &mut trial.settings);
    for settings in of_trials.chain([&mut settings]) {
        settings.seed.get_or_insert(DEFAULT_SEED);
    }
    Ok(Recipe {
        model,
        revision,
        chat_template,
        training_file,
        validation_file,
        dataset_config,
        dataset_revision,
        dataset_test_split,
        output_dir,
        overwrite_output_dir: overwrite_output_dir.unwrap_or(false),
        tuning,
        frozen_layers,
        dtype,
        quantization,
        device,
        placing,
        wandb,
        profile: profile.map(|profile| profile as u64),
        preview: preview.and_then(|preview| preview.or(PREVIEW_ROWS)),
        settings,
        trials,
    })
}

/// Files may be lists; nothing else of `KEYS` may.
fn one_of_each(own: &Map<String, Value>) -> Result<(), SettingsError> {
    let is_list = |(key, value): &(&String, &Value)| {
        value.is_array() && !["training_file", "validation_file", "report_to"].contains(&key.as_str())
    };
    match own.iter().find(is_list) {
        None => Ok(()),
        Some((key, _)) => Err(SettingsError::Wrong {
            key: key.clone(),
            message: "cannot vary among the trials of a sweep: give one value".to_owned(),
        }),
    }
}

/// A run goes on by itself from what its folder holds, and writes events and metrics into it.
fn is_done_anyway(name: &str, value: &Value) -> bool {
    match name {
        "resume_from_checkpoint" => value.is_boolean(),
        "save_metrics" => true,
        // A matrix is shared as soon as it is read.
        "low_cpu_fsdp" => true,
        _ => false,
    }
}

/// Values of `KEYS` in others' words.
pub fn of_others(key: &str, value: Value) -> Value {
    match (key, value.as_str(), value.as_bool()) {
        // There is one kind of 16 bits.
        ("dtype", Some("bf16" | "half" | "float16" | "fp16" | "f16"), _) => "bfloat16".into(),
        ("dtype", Some("torch.bfloat16" | "torch.float16" | "torch.half"), _) => "bfloat16".into(),
        ("dtype", Some("fp32" | "torch.float32"), _) => "float32".into(),
        ("quantization", _, Some(false)) => Value::Null,
        // bitsandbytes', which llama-recipes asks for.
        ("quantization", Some("8bit"), _) | ("quantization", _, Some(true)) => "int8".into(),
        ("quantization", Some("4bit"), _) => "nf4".into(),
        // transformers' list of words, of which one is about wrapping modules.
        ("sharding_strategy", Some(words), _) => {
            let words = words
                .split([' ', ','])
                .filter(|word| !word.is_empty() && *word != "auto_wrap");
            words.map(str::to_uppercase).collect::<Vec<_>>().join(" ").into()
        }
        ("report_to", _, Some(true)) => "wandb".into(),
        ("report_to", _, Some(false)) => "none".into(),
        ("sharding_strategy", _, Some(true)) => "FULL_SHARD".into(),
        ("sharding_strategy", _, Some(false)) => Value::Null,
        _ => value,
    }
}

/// Where W&B is reported to, the project and the run's name. TensorBoard's events are written anyway.
fn wandb(
    report_to: Option<Words>,
    project: Option<String>,
    name: Option<String>,
) -> Result<Option<(String, Option<String>)>, SettingsError> {
    let words = report_to.map_or(vec![], Words::all);
    let known = ["wandb", "tensorboard", "none", "all"];
    if let Some(other) = words.iter().find(|word| !known.contains(&word.as_str())) {
        return Err(wrong(
            "report_to",
            format!("must be wandb, tensorboard, none or all, got {other}"),
        ));
    }
    if !words.iter().any(|word| ["wandb", "all"].contains(&word.as_str())) {
        return match project {
            Some(project) => Err(wrong(
                "wandb_project",
                format!("{project} is nothing without report_to=wandb"),
            )),
            None => Ok(None),
        };
    }
    let of_environment = || {
        std::env::var("WANDB_PROJECT")
            .ok()
            .filter(|project| !project.is_empty())
    };
    let project = project
        .or_else(of_environment)
        .unwrap_or_else(|| "tandem".to_owned());
    Ok(Some((project, name)))
}

/// An unknown name may have been meant as one of `KEYS`.
fn suggested(refused: Refused) -> SettingsError {
    let keys = KEYS
        .iter()
        .flat_map(|(key, others, _)| others.iter().copied().chain([*key]));
    match (refused.why, closest(&refused.path, keys.chain(settings::names()))) {
        (settings::Why::Unknown, Some(name)) => SettingsError::Wrong {
            key: refused.path,
            message: format!("unknown setting; did you mean {name}?"),
        },
        _ => SettingsError::Refused(refused),
    }
}

/// llama-recipes' pair: the number says how many where the flag says that.
fn frozen(tuning: Tuning, freezes: Option<bool>, number: Option<u32>) -> Result<u32, SettingsError> {
    match (freezes, number, tuning) {
        (Some(true), _, Tuning::Lora) => Err(wrong(
            "freeze_layers",
            "an adapter leaves every layer as it is: leave it out, or give method=full".to_owned(),
        )),
        (Some(true), Some(0), Tuning::Full) => Err(wrong(
            "num_freeze_layers",
            "must be at least 1, got 0; freeze_layers=false freezes none".to_owned(),
        )),
        (Some(true), number, Tuning::Full) => Ok(number.unwrap_or(1)),
        (None, Some(number), Tuning::Full) => Err(wrong(
            "num_freeze_layers",
            format!("{number} is nothing without freeze_layers=true: give both, or leave it out"),
        )),
        (Some(false) | None, _, _) => Ok(0),
    }
}

/// Training every parameter has no adapter, and runs on the CPU.
fn fits_full(settings: &Settings, device: &str) -> Result<(), SettingsError> {
    let wrong = |key: &str, message: &str| {
        Err(SettingsError::Wrong {
            key: key.to_owned(),
            message: message.to_owned(),
        })
    };
    let given = serde_json::to_value(settings).expect("settings are plain data");
    let lora = TABLE
        .iter()
        .find(|setting| setting.group == Group::Lora && !given[setting.name].is_null());
    if let Some(Setting { name, .. }) = lora {
        return wrong(
            name,
            "method=full trains every parameter and has no adapter: leave it out",
        );
    }
    if !["auto", "cpu"].contains(&device) {
        return wrong(
            "device",
            "method=full trains on the CPU only: leave it out, or give device=cpu",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(args: &[&str]) -> Result<Recipe, SettingsError> {
        read(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>())
    }

    const NEEDED: [&str; 4] = [
        "model=m",
        "training_file=t.jsonl",
        "validation_file=v.jsonl",
        "output_dir=o",
    ];

    #[test]
    fn words_win_and_other_names_are_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "model_name_or_path: m\ntrain_file: t\noutput_dir: o\nlr: 1e-4\nper_device_train_batch_size: 4\nlora_rank: 8\n";
        std::fs::write(file.path(), text).unwrap();
        let path = file.path().display().to_string();
        let Recipe { settings, tuning, .. } = asked(&[
            &path,
            "learning_rate=1e-3",
            "learning_rate=3e-4",
            "target_modules=[q_proj, v_proj]",
        ])
        .unwrap();
        assert_eq!(settings.learning_rate, Some(3e-4));
        assert_eq!((settings.batch_size, settings.lora_r), (Some(4), Some(8)));
        assert_eq!(settings.lora_target_modules.unwrap(), ["q_proj", "v_proj"]);
        assert_eq!(settings.seed, Some(DEFAULT_SEED));
        assert_eq!(tuning, Tuning::Lora);
    }

    /// What makes the settings of one optimizer mean something.
    const OF_OPTIMIZERS: [&str; 3] = [
        "optim=sgd learning_rate=1e-3",
        "optim=sgd learning_rate=1e-3 momentum=0.5",
        "optim=adafactor learning_rate=1e-3",
    ];

    #[test]
    fn every_spelling_of_every_setting_is_read() {
        for setting in TABLE {
            for name in setting.aliases.iter().chain([&setting.name]) {
                let text = match setting.kind {
                    Kind::Integer { low, .. } => (low + 1).to_string(),
                    Kind::Real(_) => "2.5e-1".to_owned(),
                    Kind::Flag => "true".to_owned(),
                    Kind::Word(words) => words[1].to_owned(),
                    Kind::Modules => "q_proj,v_proj".to_owned(),
                    Kind::Map => "{output: summary}".to_owned(),
                    Kind::Text => "x".to_owned(),
                };
                let word = format!("{name}={text}");
                // Some are read by one objective or optimizer alone, or with one loss.
                let of_objectives =
                    settings::readers(setting.name).map(|reader| format!("objective={reader}"));
                let of_optimizers = OF_OPTIMIZERS.map(str::to_owned);
                let read = |more: &str| {
                    let more = more
                        .split(' ')
                        .filter(|more| !more.is_empty() && !more.starts_with(name));
                    let words: Vec<&str> = NEEDED.into_iter().chain([&*word]).chain(more).collect();
                    asked(&words)
                };
                let alone = [String::new()].into_iter();
                let ways = alone.chain(of_objectives).chain(of_optimizers);
                let mut reads = ways.map(|more| read(&more)).collect::<Vec<_>>();
                let found = reads.iter().position(Result::is_ok).unwrap_or(0);
                let read = reads.swap_remove(found);
                let given = serde_json::to_value(read.unwrap().settings).unwrap();
                assert!(!given[setting.name].is_null(), "{word}");
            }
        }
        let help = help();
        assert!(TABLE.iter().all(|setting| help.contains(setting.name)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, expected) in [
            (&["learning_rat=1"][..], "did you mean learning_rate?"),
            (&["training_fil=x"], "did you mean training_file?"),
            (&["method=qlora"], "method"),
            (&["n_epochs=many"], "n_epochs"),
            (
                &["n_epochs=0"],
                "n_epochs must be a number above 0 and at most 10000, got 0",
            ),
            (&["lora_dropout=1"], "below 1, got 1"),
            (&["weight_decay=-1"], "between 0 and 1, got -1"),
            (&["learning_rate=.nan"], "must be a number"),
            (&["lora_target_modules=[]"], "a list of module names"),
            (&["target_modules="], "a list of module names, or all-linear"),
            (&["lr_scheduler_type=reduce_lr_on_plateau"], "one of constant"),
            (
                &["lr_scheduler_type=cosine", "gamma=0.9"],
                "belongs to lr_scheduler_type step",
            ),
            (&["lr=1e-3", "learning_rate=1e-3"], "the same setting"),
            (&["load_in_4bit=true"], "not supported"),
            (&["nproc_per_node=0"], "between 1 and 64, got 0"),
            (&["nnodes=2"], "on each machine"),
            (&["report_to=[wandb, mlflow]"], "none or all, got mlflow"),
            (&["wandb_project=p"], "nothing without report_to=wandb"),
            (&["deepspeed=ds.json"], "FULL_SHARD"),
            (
                &["sharding_strategy=HALF_SHARD"],
                "HYBRID_SHARD_ZERO2, got HALF_SHARD",
            ),
            (
                &["fsdp=full_shard offload"],
                "HYBRID_SHARD_ZERO2, got FULL_SHARD OFFLOAD",
            ),
            (
                &["enable_fsdp=false", "sharding_strategy=FULL_SHARD"],
                "give one of them",
            ),
            (&["training_file.x=1"], "training_file"),
            (&["method=full", "lora_r=8"], "has no adapter"),
            (&["method=full", "device=cuda"], "on the CPU only"),
            (&["freeze_layers=true"], "method=full"),
            (
                &["method=full", "num_freeze_layers=2"],
                "nothing without freeze_layers=true",
            ),
            (
                &["method=full", "freeze_layers=true", "num_freeze_layers=0"],
                "at least 1, got 0",
            ),
            (&["what"], "neither key=value"),
        ] {
            let args: Vec<&str> = NEEDED.iter().chain(more).copied().collect();
            let message = asked(&args).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(expected), "{more:?}: {message}");
        }
        let recipe = asked(
            &[
                &NEEDED[..],
                &["method=full", "lr_scheduler_type=constant", "bf16=true"],
            ]
            .concat(),
        );
        let Recipe { tuning, settings, .. } = recipe.unwrap();
        assert_eq!(
            (tuning, settings.lr_scheduler_type.as_deref()),
            (Tuning::Full, Some("constant"))
        );
        let missing = asked(&["model=m"]).unwrap_err().to_string();
        assert!(missing.contains("training_file"), "{missing}");
    }

    #[test]
    fn strategies_of_fsdp_are_read() {
        use tandem_backend::train::mates::Sharding::{Gradients, None, Parameters};
        for (more, expected) in [
            (&[][..], None),
            (&["sharding_strategy=NO_SHARD"], None),
            (&["sharding_strategy=SHARD_GRAD_OP"], Gradients),
            (&["enable_fsdp=true", "low_cpu_fsdp=true"], Parameters),
            (&["enable_fsdp=true", "sharding_strategy=NO_SHARD"], None),
            (&["fsdp=full_shard auto_wrap"], Parameters),
            (&["fsdp=shard_grad_op"], Gradients),
            (&["fsdp="], None),
            (&["fsdp=true"], Parameters),
            (&["fsdp=hybrid_shard auto_wrap"], Parameters),
            (
                &["hsdp=true", "sharding_group_size=2", "replica_group_size=1"],
                Parameters,
            ),
            (
                &[
                    "data_parallel_shard_dim=-1",
                    "data_parallel_replicate_dim=1",
                    "tensor_parallel_dim=1",
                ],
                Parameters,
            ),
        ] {
            let args: Vec<&str> = NEEDED.iter().chain(more).copied().collect();
            let recipe = asked(&args).unwrap_or_else(|error| panic!("{more:?}: {error}"));
            assert_eq!(recipe.placing.sharding, expected, "{more:?}");
        }
    }

    /// As their command lines have them.
    #[test]
    fn lines_of_llama_recipes_are_read() {
        let line = "model_name=m use_peft=true peft_method=lora output_dir=o dataset=samsum_dataset training_file=t.jsonl \
                    save_model=true pure_bf16=true use_fast_kernels=true batch_size_training=1 dist_checkpoint_root_folder=x \
                    dist_checkpoint_folder=fine-tuned from_peft_checkpoint= freeze_layers=false num_freeze_layers=1 \
                    quantization=false max_train_step=0 lr=1e-4 mixed_precision=true use_fp16=false run_validation=true \
                    gradient_clipping=true gradient_clipping_threshold=1.0 flop_counter=false flop_counter_start=3";
        let Recipe {
            settings,
            quantization,
            ..
        } = asked(&line.split_whitespace().collect::<Vec<_>>()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(settings.template.as_deref(), Some("samsum_dataset"));
        assert_eq!(
            (settings.batch_size, settings.max_grad_norm),
            (Some(1), Some(1.0))
        );
        assert_eq!((settings.from_peft_checkpoint, quantization), (None, None));
        let text = [
            &NEEDED[..],
            &[
                "template=Q: {q}\nA: ",
                "column_map.output=a",
                "column_map.q=question",
            ],
        ]
        .concat();
        let settings = asked(&text).unwrap_or_else(|error| panic!("{error}")).settings;
        assert_eq!(settings.template.as_deref(), Some("Q: {q}\nA: "));
        assert_eq!(settings.column_map.unwrap().len(), 2);
    }

    #[test]
    fn recipes_are_read() {
        for recipe in recipes::RECIPES {
            let read = asked(&[recipe.name, "device=cpu"])
                .unwrap_or_else(|error| panic!("{}: {error}", recipe.name));
            assert!(
                read.model.display().to_string().starts_with("meta-llama/"),
                "{}",
                recipe.name
            );
            assert!(recipe.text.starts_with("# "), "{} says what it is", recipe.name);
        }
        // torchtune's are changed by torchtune's words, and by ours.
        let words = [
            "dataset=torchtune.datasets.instruct_dataset",
            "dataset.source=xsum.jsonl",
            "dataset.template=torchtune.data.SummarizeTemplate",
            "dataset.column_map.dialogue=document",
            "dataset.column_map.output=summary",
            "optimizer.lr=1e-4",
            "lora_rank=4",
            "model=/models/other",
        ];
        let read = asked(&[&["llama3_1/8B_lora"][..], &words].concat()).unwrap();
        assert_eq!(read.training_file, Files::One("xsum.jsonl".into()));
        assert_eq!(read.model, Path::new("/models/other"));
        let settings = read.settings;
        assert_eq!(
            (settings.learning_rate, settings.lora_r, settings.max_grad_norm),
            (Some(1e-4), Some(4), Some(0.0))
        );
        assert_eq!(
            settings.template.as_deref(),
            Some("torchtune.data.SummarizeTemplate")
        );
        assert_eq!(settings.column_map.unwrap().len(), 2);
    }

    #[test]
    fn what_is_no_file_of_settings_is_not_read() {
        let deep = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(deep.path(), format!("z: {}", "[".repeat(MAX_BRACKETS + 1))).unwrap();
        for (path, expected) in [
            (deep.path().to_str().unwrap(), "10001 opening brackets"),
            ("/dev/zero", "more than 1048576 bytes"),
        ] {
            let Err(SettingsError::Unreadable { source, .. }) = file(path) else {
                panic!("{path} is read");
            };
            assert!(source.to_string().contains(expected), "{source}");
        }
    }

    #[test]
    fn every_key_is_typed() {
        // A key without a field would be read and ignored.
        for (key, ..) in KEYS {
            let mut own: Map<String, Value> = NEEDED
                .iter()
                .map(|word| word.split_once('=').expect("they are words"))
                .map(|(key, value)| (key.to_owned(), json!(value)))
                .collect();
            own.insert((*key).to_owned(), json!({"x": [1]}));
            assert!(
                serde_json::from_value::<Own>(Value::Object(own)).is_err(),
                "{key} takes anything"
            );
        }
    }
}
