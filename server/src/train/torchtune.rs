//! torchtune's configs as they are: sections with a `_component_` become the settings of core's table, under the path that
//! they have in the file. What a component does when nothing is said (torch's AdamW decays by 0.01, nothing clips) is done here,
//! too. Every key is honoured, known to be harmless, or refused by its path. Formats: torchtune 0.1 to 0.6,
//! `recipes/configs/*.yaml` and the signatures of what they name.

use serde_json::{Map, Value, json};
use tandem_core::job::LM_HEAD;
use tandem_core::suggest::closest;

use super::settings::{SettingsError, wrong};

pub const COMPONENT: &str = "_component_";

/// A setting, and where in the file it stands: `optimizer.` and `lr`.
#[derive(Debug, PartialEq)]
pub struct Flat {
    pub place: String,
    pub name: String,
    pub value: Value,
}

/// What a key of a section is.
enum Means {
    /// The setting of its own name.
    Itself,
    /// A setting of another name.
    Setting(&'static str),
    /// Nothing that changes what is learned.
    Harmless,
    /// Read with its section.
    Read,
    /// Nothing when it is null, false or empty; else this is what to do.
    Off(&'static str),
}
use Means::{Harmless, Itself, Off, Read, Setting};

type Section = (&'static str, &'static [(&'static str, Means)]);

const TOKENIZER: &str = "the tokenizer is the one of the model's folder";
const TEMPLATE: &str = "chat is rendered by the model's own template; chat_template=FILE takes another";
const CONTINUE: &str = "the same command goes on by itself from what output_dir holds; from_peft_checkpoint=FOLDER starts from an adapter";

const SECTIONS: &[Section] = &[
    (
        "tokenizer",
        &[
            ("path", Harmless),
            ("merges_file", Harmless),
            ("special_tokens_path", Off(TOKENIZER)),
            ("max_seq_len", Itself),
            ("prompt_template", Off(TEMPLATE)),
            ("truncation_type", Off("a long row loses its end")),
        ],
    ),
    (
        "model",
        &[
            ("lora_attn_modules", Read),
            ("apply_lora_to_mlp", Read),
            ("apply_lora_to_output", Read),
            ("lora_rank", Itself),
            ("lora_alpha", Itself),
            ("lora_dropout", Itself),
            ("quantize_base", Read),
            ("use_dora", Itself),
        ],
    ),
    (
        "checkpointer",
        &[
            ("checkpoint_dir", Setting("model")),
            ("checkpoint_files", Harmless),
            ("adapter_checkpoint", Off(CONTINUE)),
            ("recipe_checkpoint", Off(CONTINUE)),
            ("output_dir", Read),
            ("model_type", Harmless),
            ("safe_serialization", Harmless),
            ("should_load_recipe_state", Off(CONTINUE)),
            ("keep_last_n_checkpoints", Setting("save_total_limit")),
            ("enable_async_checkpointing", Harmless),
        ],
    ),
    ("dataset", DATASET),
    ("dataset_val", DATASET),
    (
        "optimizer",
        &[
            ("lr", Itself),
            ("weight_decay", Itself),
            ("betas", Read),
            ("eps", Itself),
            ("fused", Harmless),
            ("foreach", Harmless),
            ("capturable", Harmless),
            ("momentum", Itself),
            ("nesterov", Itself),
            ("dampening", Itself),
            ("is_paged", Harmless),
            ("block_size", Off("moments in 8 bits have blocks of 256")),
            ("amsgrad", Off("AdamW is plain: leave it out")),
            ("maximize", Off("the loss is minimised: leave it out")),
        ],
    ),
    (
        "lr_scheduler",
        &[("num_warmup_steps", Itself), ("num_cycles", Read)],
    ),
    (
        "loss",
        &[
            ("beta", Itself),
            ("label_smoothing", Itself),
            ("loss_type", Itself),
            ("num_output_chunks", Harmless),
            ("ignore_index", Harmless),
        ],
    ),
    (
        "metric_logger",
        &[
            ("log_dir", Harmless),
            ("filename", Harmless),
            ("output_dir", Harmless),
            ("organize_logs", Harmless),
            ("project", Setting("wandb_project")),
            ("name", Setting("run_name")),
            (
                "entity",
                Off("`wandb sync --entity` says it when the run is sent: leave it out"),
            ),
            ("group", Off("runs are not grouped: leave it out")),
        ],
    ),
];

const DATASET: &[(&str, Means)] = &[
    ("source", Read),
    ("data_files", Read),
    ("split", Read),
    ("max_seq_len", Itself),
    ("template", Itself),
    ("column_map", Read),
    ("column", Setting("dataset_text_field")),
    ("train_on_input", Itself),
    ("masking_strategy", Off("give train_on_input true or false")),
    ("packed", Itself),
    ("split_across_pack", Read),
    ("conversation_style", Itself),
    ("conversation_column", Read),
    ("chat_format", Harmless),
    ("add_eos", Itself),
    ("new_system_prompt", Itself),
    ("trust_remote_code", Itself),
    ("name", Setting("dataset_config")),
    ("data_dir", Off("give the file as training_file")),
    ("filter_fn", Off("no code is run: filter the file")),
];

/// The end of a component's path, and the settings that it stands for where nothing else is said.
type Component = (&'static str, &'static [(&'static str, &'static str)]);

const DATASETS: &[Component] = &[
    (
        "alpaca_dataset",
        &[
            ("template", "torchtune.data.AlpacaInstructTemplate"),
            ("train_on_input", "true"),
            ("max_seq_len", "512"),
            ("training_file", "tatsu-lab/alpaca"),
        ],
    ),
    (
        "alpaca_cleaned_dataset",
        &[
            ("template", "torchtune.data.AlpacaInstructTemplate"),
            ("train_on_input", "true"),
            ("max_seq_len", "512"),
            ("training_file", "yahma/alpaca-cleaned"),
        ],
    ),
    ("instruct_dataset", &[]),
    (
        "samsum_dataset",
        &[
            ("template", "torchtune.data.SummarizeTemplate"),
            ("training_file", "Samsung/samsum"),
        ],
    ),
    (
        "grammar_dataset",
        &[
            ("template", "torchtune.data.GrammarErrorCorrectionTemplate"),
            ("training_file", "liweili/c4_200m"),
        ],
    ),
    ("chat_dataset", &[]),
    (
        "slimorca_dataset",
        &[
            ("max_seq_len", "1024"),
            ("training_file", "Open-Orca/SlimOrca-Dedup"),
        ],
    ),
    ("text_completion_dataset", &[]),
    ("wikitext_dataset", &[("dataset_text_field", "page")]),
    (
        "cnn_dailymail_articles_dataset",
        &[("dataset_text_field", "article")],
    ),
    ("preference_dataset", &[]),
];

const LOSSES: &[Component] = &[
    ("CrossEntropyLoss", &[]),
    ("CEWithChunkedOutputLoss", &[]),
    ("LinearCrossEntropyLoss", &[]),
    ("DPOLoss", &[("objective", "dpo")]),
];

const LOGGERS: &[Component] = &[
    ("DiskLogger", &[]),
    ("StdoutLogger", &[]),
    ("TensorBoardLogger", &[]),
    ("WandBLogger", &[("report_to", "wandb")]),
];
const CHECKPOINTERS: &[Component] = &[("FullModelHFCheckpointer", &[])];
const SCHEDULES: &[Component] = &[(
    "get_cosine_schedule_with_warmup",
    &[("lr_scheduler_type", "cosine")],
)];
/// Of torch, bitsandbytes and torchao, with their own defaults.
const OPTIMIZERS: &[Component] = &[
    ("AdamW", ADAMW),
    ("AdamW32bit", ADAMW),
    ("PagedAdamW", ADAMW),
    ("PagedAdamW32bit", ADAMW),
    ("AdamW8bit", ADAMW_8BIT),
    ("PagedAdamW8bit", ADAMW_8BIT),
    ("SGD", &[("optim", "sgd"), ("lr", "0.001")]),
    ("Lion", LION),
    ("Lion32bit", LION),
    ("PagedLion", LION),
    ("PagedLion32bit", LION),
];
const ADAMW: &[(&str, &str)] = &[("lr", "0.001"), ("weight_decay", "0.01")];
const ADAMW_8BIT: &[(&str, &str)] = &[("optim", "adamw_8bit"), ("lr", "0.001"), ("weight_decay", "0.01")];
const LION: &[(&str, &str)] = &[("optim", "lion_32bit"), ("lr", "0.0001"), ("adam_beta2", "0.99")];

/// Where a component of others is said instead.
const INSTEAD: &[(&str, &str)] = &[
    (
        "dataset",
        "give the rows as training_file (a local file), with template or column_map where they are columns",
    ),
    (
        "loss",
        "objective=sft, dpo, kto, orpo, cpo or simpo says what is minimised",
    ),
    (
        "metric_logger",
        "every step is printed, and lies in output_dir as lines and as TensorBoard's events; WandBLogger adds an offline W&B run: leave it out",
    ),
    (
        "checkpointer",
        "the folder must be in Hugging Face layout (config.json, *.safetensors): FullModelHFCheckpointer",
    ),
    ("lr_scheduler", "lr_scheduler_type names a schedule"),
    (
        "optimizer",
        "torch.optim.AdamW and SGD are, and of bitsandbytes AdamW8bit, PagedAdamW8bit and Lion; optim=adafactor is transformers'",
    ),
];

/// Linear layers, torchtune's name and the one of Hugging Face.
const OUTPUT_PROJ: (&str, &str) = ("output_proj", "o_proj");
const MLP: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Has it sections?
pub fn is_config(config: &Map<String, Value>) -> bool {
    config.values().any(|value| value.get(COMPONENT).is_some())
}

/// `dataset.split=train[:1%]`, `dataset=torchtune.datasets.chat_dataset` or `~dataset.packed` on its config. False: the word
/// is none of these.
pub fn set(config: &mut Map<String, Value>, key: &str, value: Option<Value>) -> Result<bool, SettingsError> {
    let mut path: Vec<&str> = key.split('.').collect();
    let has_component = |value: &Value| value.get(COMPONENT).is_some();
    if path.len() == 1 && value.is_some() {
        match config.get_mut(path[0]) {
            // The section is taken away.
            Some(section) if has_component(section) && value == Some(Value::Null) => {
                *section = Value::Null;
                return Ok(true);
            }
            Some(section) if has_component(section) => path.push(COMPONENT),
            _ => return Ok(false),
        }
    }
    let (last, sections) = path.split_last().expect("a path has a part");
    let mut place = config;
    for section in sections {
        let next = place.entry((*section).to_owned()).or_insert_with(|| json!({}));
        if next.is_null() {
            *next = json!({});
        }
        place = next
            .as_object_mut()
            .ok_or_else(|| wrong(key, format!("{section} is no section")))?;
    }
    match value {
        Some(value) => drop(place.insert((*last).to_owned(), value)),
        None if place.remove(*last).is_some() => {}
        None => return Err(wrong(key, "there is no such key to remove".to_owned())),
    }
    Ok(true)
}

/// Its settings.
pub fn flat(config: Map<String, Value>) -> Result<Vec<Flat>, SettingsError> {
    is_not_of_others(&config, None)?;
    let whole = Value::Object(config.clone());
    let mut settings = Settings::default();
    let top_output = config.get("output_dir").is_some_and(|value| !value.is_null());
    for (name, value) in config {
        let value = resolved(&value, &whole, &name)?;
        let Some((section, keys)) = SECTIONS.iter().find(|(section, _)| *section == name) else {
            settings.top(name, value)?;
            continue;
        };
        match value {
            Value::Null => {}
            Value::Object(fields) => settings.section(section, keys, fields, top_output)?,
            Value::Array(_) if section.starts_with("dataset") => {
                return Err(wrong(
                    &name,
                    "one data set is read: give its files as a list, training_file=[a.jsonl, b.jsonl]"
                        .to_owned(),
                ));
            }
            other => {
                return Err(wrong(
                    &name,
                    format!("must be a section with {COMPONENT}, got {other}"),
                ));
            }
        }
    }
    // torchtune clips only where it is told to, and keeps the rate where there is no schedule.
    settings.unless_given("", "max_grad_norm", json!(0.0));
    settings.unless_given("", "lr_scheduler_type", json!("constant"));
    Ok(settings.0)
}

/// Other programs of torchtune have configs of the same look. `own`: the key by which those of the program that reads this are known.
pub fn is_not_of_others(config: &Map<String, Value>, own: Option<&str>) -> Result<(), SettingsError> {
    let programs = [
        (
            "prompt",
            "it is a config of `tune run generate`: `tandem generate FILE adapter=DIR` takes it",
        ),
        (
            "tasks",
            "it is a config of `tune run eleuther_eval`: lm-eval's own model local-completions asks `tandem serve MODEL`; `tandem \
             eval MODEL DATA` says loss and perplexity",
        ),
        (
            "quantizer",
            "it is a config of `tune run quantize`: `tandem quantize MODEL OUT --format int4` writes fewer bits",
        ),
        (
            "reward_and_value_model",
            "PPO is not built here: a client of /api/v1 (Tinker) drives it call by call",
        ),
        ("teacher_model", "distillation is not built"),
    ];
    let is_given = |key: &str| Some(key) != own && config.get(key).is_some_and(|value| !value.is_null());
    match programs.iter().find(|(key, _)| is_given(key)) {
        Some((key, says)) => Err(wrong(key, (*says).to_owned())),
        None => Ok(()),
    }
}

#[derive(Default)]
struct Settings(Vec<Flat>);

impl Settings {
    fn put(&mut self, place: &str, name: &str, value: Value) {
        self.0.push(Flat {
            place: place.to_owned(),
            name: name.to_owned(),
            value,
        });
    }

    fn unless_given(&mut self, place: &str, name: &str, value: Value) {
        let given = |flat: &Flat| super::settings::canonical(&flat.name) == super::settings::canonical(name);
        if !self.0.iter().any(given) {
            self.put(place, name, value);
        }
    }

    /// A key beside the sections.
    fn top(&mut self, name: String, value: Value) -> Result<(), SettingsError> {
        match (name.as_str(), &value) {
            // torchtune's null is a word: nothing is clipped.
            ("clip_grad_norm", Value::Null) => {}
            ("profiler", Value::Object(fields)) => match fields.get("enabled") {
                None | Some(Value::Bool(false)) => {}
                // Of its schedule, the steps that it records; when these are, and what of torch is recorded, is ours to say.
                Some(_) => self.put(
                    "",
                    "profile",
                    fields.get("active_steps").cloned().unwrap_or(json!(true)),
                ),
            },
            ("run_val_every_n_steps", _) => self.put("", "eval_steps", value),
            (_, Value::Object(fields)) if fields.contains_key(COMPONENT) => {
                let known: Vec<&str> = SECTIONS.iter().map(|(section, _)| *section).collect();
                return Err(wrong(
                    &name,
                    format!("an unknown section; {} are read", known.join(", ")),
                ));
            }
            _ => self.put("", &name, value),
        }
        Ok(())
    }

    fn section(
        &mut self,
        section: &str,
        keys: &[(&str, Means)],
        mut fields: Map<String, Value>,
        top_output: bool,
    ) -> Result<(), SettingsError> {
        let place = format!("{section}.");
        let component = match fields.remove(COMPONENT) {
            Some(Value::String(component)) => component,
            // A word that takes the section away.
            Some(Value::Null) => return Ok(()),
            None => String::new(),
            Some(other) => {
                return Err(wrong(
                    &format!("{place}{COMPONENT}"),
                    format!("must be a path, got {other}"),
                ));
            }
        };
        for name in fields.keys() {
            if !keys.iter().any(|(key, _)| key == name) {
                let known = keys.iter().map(|(key, _)| *key);
                let hint = match closest(name, known.clone()) {
                    Some(meant) => format!("did you mean {place}{meant}?"),
                    None => format!("of {section}, {} are read", known.collect::<Vec<_>>().join(", ")),
                };
                return Err(wrong(
                    &format!("{place}{name}"),
                    format!("an unknown key; {hint}"),
                ));
            }
        }
        if section == "dataset_val" {
            return self.validation(&place, &fields);
        }
        for (key, means) in keys {
            let Some(value) = fields.get(*key).filter(|value| !value.is_null()) else {
                continue;
            };
            match means {
                Itself => self.put(&place, key, value.clone()),
                Setting(name) => self.put(&place, name, value.clone()),
                Harmless | Read => {}
                Off(_) if is_off(value) => {}
                Off(says) => {
                    return Err(wrong(
                        &format!("{place}{key}"),
                        format!("{value} is not supported: {says}"),
                    ));
                }
            }
        }
        match section {
            "model" => self.model(&place, &component, &fields)?,
            "dataset" => self.dataset(&place, &component, &fields)?,
            "checkpointer" => {
                self.component(&place, &component, CHECKPOINTERS)?;
                let output = fields
                    .get("output_dir")
                    .filter(|value| !top_output && !value.is_null());
                output
                    .cloned()
                    .into_iter()
                    .for_each(|output| self.put(&place, "output_dir", output));
            }
            "optimizer" => {
                if let Some(Value::Array(betas)) = fields.get("betas") {
                    for (name, beta) in ["adam_beta1", "adam_beta2"].into_iter().zip(betas) {
                        self.put(&place, name, beta.clone());
                    }
                }
                self.component(&place, &component, OPTIMIZERS)?;
            }
            "lr_scheduler" => {
                self.component(&place, &component, SCHEDULES)?;
                if let Some(cycles) = fields
                    .get("num_cycles")
                    .filter(|cycles| cycles.as_f64() != Some(0.5))
                {
                    let message =
                        format!("{cycles} is not supported: cosine falls once to zero, num_cycles 0.5");
                    return Err(wrong("lr_scheduler.num_cycles", message));
                }
            }
            "loss" => self.component(&place, &component, LOSSES)?,
            "metric_logger" => self.component(&place, &component, LOGGERS)?,
            _ => {}
        }
        Ok(())
    }

    /// What a component stands for.
    fn component(&mut self, place: &str, component: &str, known: &[Component]) -> Result<(), SettingsError> {
        let last = component.rsplit('.').next().unwrap_or_default();
        let Some((_, defaults)) = known.iter().find(|(name, _)| *name == last) else {
            let section = place.trim_end_matches('.');
            let instead = INSTEAD
                .iter()
                .find(|(of, _)| *of == section)
                .map_or("leave it out", |(_, says)| says);
            return Err(wrong(
                &format!("{place}{COMPONENT}"),
                format!("{component} is not built: {instead}"),
            ));
        };
        for (name, value) in *defaults {
            let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
            self.unless_given(place, name, value);
        }
        Ok(())
    }

    fn model(
        &mut self,
        place: &str,
        component: &str,
        fields: &Map<String, Value>,
    ) -> Result<(), SettingsError> {
        let path = component.strip_prefix("torchtune.models.");
        let Some(builder) = path.and_then(|path| path.rsplit('.').next()) else {
            let message = format!(
                "{component} is not known: torchtune.models.FAMILY.lora_..., qlora_... or a whole model; the weights are those of \
                 checkpointer.checkpoint_dir"
            );
            return Err(wrong("model._component_", message));
        };
        let is_quantised = fields.get("quantize_base") == Some(&json!(true));
        if builder.starts_with("qlora_") || is_quantised {
            self.put(place, "quantization", json!("nf4"));
        }
        if !builder.starts_with("lora_") && !builder.starts_with("qlora_") {
            self.put(place, "method", json!("full"));
            return Ok(());
        }
        self.put(place, "method", json!("lora"));
        let mut modules: Vec<Value> = match fields.get("lora_attn_modules") {
            None | Some(Value::Null) => vec![],
            Some(Value::Array(modules)) => modules.clone(),
            Some(other) => {
                return Err(wrong(
                    "model.lora_attn_modules",
                    format!("must be a list, got {other}"),
                ));
            }
        };
        for module in &mut modules {
            if module == OUTPUT_PROJ.0 {
                *module = json!(OUTPUT_PROJ.1);
            }
        }
        if fields.get("apply_lora_to_mlp") == Some(&json!(true)) {
            modules.extend(MLP.map(Value::from));
        }
        if fields.get("apply_lora_to_output") == Some(&json!(true)) {
            modules.push(Value::from(LM_HEAD));
        }
        if !modules.is_empty() {
            self.put(place, "lora_target_modules", Value::Array(modules));
        }
        Ok(())
    }

    fn dataset(
        &mut self,
        place: &str,
        component: &str,
        fields: &Map<String, Value>,
    ) -> Result<(), SettingsError> {
        self.files(place, "training_file", fields);
        self.component(place, component, DATASETS)?;
        let text = |key: &str| fields.get(key).and_then(Value::as_str);
        if let Some(split) = fields.get("split") {
            self.put(place, "split", split.clone());
        }
        let mut columns = fields.get("column_map").cloned().unwrap_or(Value::Null);
        // Without a template, torchtune 0.3 and later takes the column input as the prompt.
        let has_template = self
            .0
            .iter()
            .any(|flat| flat.name == "template" && !flat.value.is_null());
        if component.ends_with(".instruct_dataset") && !has_template {
            let name = |key: &str| columns.get(key).cloned().unwrap_or_else(|| json!(key));
            columns = json!({"prompt": name("input"), "completion": name("output")});
        }
        if let Some(column) = text("conversation_column") {
            columns = json!({"messages": column});
        }
        if !columns.is_null() {
            self.put(place, "column_map", columns);
        }
        if text("split_across_pack") == Some("true") || fields.get("split_across_pack") == Some(&json!(true))
        {
            self.put(place, "packing_strategy", json!("wrapped"));
        }
        Ok(())
    }

    /// Of validation, what differs from the training data: its file.
    fn validation(&mut self, place: &str, fields: &Map<String, Value>) -> Result<(), SettingsError> {
        self.files(place, "validation_file", fields);
        if let Some(split) = fields.get("split").filter(|split| *split != "train") {
            self.put(place, "dataset_test_split", split.clone());
        }
        Ok(())
    }

    /// `source` is a path, a name on the hub, or how `data_files` are read.
    fn files(&mut self, place: &str, name: &str, fields: &Map<String, Value>) {
        let given = |key: &str| fields.get(key).filter(|value| !value.is_null());
        match (given("data_files"), given("source")) {
            (Some(files), source) => {
                self.put(place, name, files.clone());
                if let Some(format @ ("csv" | "text")) = source.and_then(Value::as_str) {
                    self.put(place, "dataset_format", json!(format));
                }
            }
            (None, Some(source)) => self.put(place, name, source.clone()),
            (None, None) => {}
        }
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Parts of a value that are references at most: a chain that is longer goes in a circle.
const MOST_REFERENCES: usize = 16;

/// `${output_dir}` in texts is what stands there.
fn resolved(value: &Value, whole: &Value, path: &str) -> Result<Value, SettingsError> {
    Ok(match value {
        Value::String(text) => {
            let mut text = text.clone();
            for turn in 0.. {
                let Some((before, rest)) = text.split_once("${") else {
                    break;
                };
                let Some((name, after)) = rest.split_once('}') else {
                    break;
                };
                let pointer = format!("/{}", name.trim().replace('.', "/"));
                let target = whole.pointer(&pointer).filter(|_| turn < MOST_REFERENCES);
                let target = match target {
                    Some(Value::String(target)) => target.clone(),
                    Some(Value::Number(target)) => target.to_string(),
                    _ => {
                        return Err(wrong(
                            path,
                            format!("${{{name}}} refers to nothing that has a text"),
                        ));
                    }
                };
                text = format!("{before}{target}{after}");
            }
            Value::String(text)
        }
        Value::Object(fields) => {
            let fields = fields.iter();
            let fields: Result<Map<_, _>, _> = fields
                .map(|(name, value)| Ok((name.clone(), resolved(value, whole, &format!("{path}.{name}"))?)))
                .collect::<Result<_, SettingsError>>();
            Value::Object(fields?)
        }
        other => other.clone(),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tandem_router::hyper::Tuning;

    use super::super::settings::{Files, Recipe, read};
    use super::*;

    /// In the form of torchtune 0.2's `llama3_1/8B_lora`.
    const CONFIG: &str = "
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /models/tiny/original/tokenizer.model
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: False
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
checkpointer:
  _component_: torchtune.utils.FullModelHFCheckpointer
  checkpoint_dir: /models/tiny/
  checkpoint_files: [a.safetensors, b.safetensors]
  recipe_checkpoint: null
  output_dir: /models/tiny/
  model_type: LLAMA3
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.instruct_dataset
  column_map:
    dialogue: document
    output: summary
  source: xsum.jsonl
  split: train[:2000]
  max_seq_len: 256
  template: torchtune.data.SummarizeTemplate
  train_on_input: false
  trust_remote_code: true
seed: null
shuffle: True
batch_size: 2
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.modules.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torch.nn.CrossEntropyLoss
epochs: 10
max_steps_per_epoch: null
gradient_accumulation_steps: 32
output_dir: /tmp/lora_finetune_output
metric_logger:
  _component_: torchtune.utils.metric_logging.DiskLogger
  log_dir: ${output_dir}
log_every_n_steps: 1
log_peak_memory_stats: False
device: cuda
dtype: bf16
enable_activation_checkpointing: False
profiler:
  _component_: torchtune.utils.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiling_outputs
";

    fn asked(config: &str, words: &[&str]) -> Result<Recipe, SettingsError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config).unwrap();
        let words = words.iter().map(|&word| word.to_owned());
        read(
            &std::iter::once(file.path().display().to_string())
                .chain(words)
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn a_config_is_read_as_it_is() {
        let Recipe {
            model,
            training_file,
            output_dir,
            tuning,
            dtype,
            device,
            settings,
            ..
        } = asked(CONFIG, &[]).unwrap();
        assert_eq!(model, Path::new("/models/tiny/"));
        assert_eq!(training_file, Files::One("xsum.jsonl".into()));
        assert_eq!(output_dir, Path::new("/tmp/lora_finetune_output"));
        assert_eq!((dtype.as_str(), device.as_str()), ("bfloat16", "cuda"));
        assert_eq!(tuning, Tuning::Lora);
        let given = serde_json::to_value(&settings).unwrap();
        let given: Map<String, Value> = given
            .as_object()
            .unwrap()
            .clone()
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .collect();
        let expected = json!({
            "n_epochs": 10.0, "batch_size": 2, "gradient_accumulation_steps": 32, "learning_rate": 3e-4,
            // torch's own: nothing is said of decay and clipping.
            "weight_decay": 0.01, "max_grad_norm": 0.0,
            "lr_scheduler_type": "cosine", "warmup_steps": 100, "max_seq_length": 256, "seed": 42,
            "shuffle": true,
            "train_on_input": false, "template": "torchtune.data.SummarizeTemplate", "split": "train[:2000]",
            "column_map": {"dialogue": "document", "output": "summary"},
            "lora_r": 8, "lora_alpha": 16.0, "lora_target_modules": ["q_proj", "v_proj", "o_proj"],
        });
        assert_eq!(Value::Object(given), expected);
    }

    #[test]
    fn words_change_what_they_name() {
        let words = [
            "dataset=torchtune.datasets.alpaca_dataset",
            "~dataset.template",
            "~dataset.column_map",
            "~dataset.train_on_input",
            "dataset.packed=True",
            "optimizer.lr=1e-3",
            "optimizer.weight_decay=0.2",
            "optimizer.betas=[0.8, 0.9]",
            "model=torchtune.models.llama2.qlora_llama2_7b",
            "model.apply_lora_to_mlp=True",
            "model.apply_lora_to_output=True",
            "tokenizer.max_seq_len=256",
            "lr_scheduler=null",
            "clip_grad_norm=0.5",
            "epochs=1",
            "output_dir=here",
        ];
        let Recipe {
            output_dir,
            quantization,
            settings,
            ..
        } = asked(CONFIG, &words).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(output_dir, Path::new("here"));
        assert_eq!(quantization.as_deref(), Some("nf4"));
        assert_eq!(
            settings.template.as_deref(),
            Some("torchtune.data.AlpacaInstructTemplate")
        );
        assert_eq!(
            (settings.train_on_input, settings.packing),
            (Some(true), Some(true))
        );
        assert_eq!(
            (settings.learning_rate, settings.weight_decay),
            (Some(1e-3), Some(0.2))
        );
        assert_eq!((settings.adam_beta1, settings.adam_beta2), (Some(0.8), Some(0.9)));
        assert_eq!(
            (settings.max_grad_norm, settings.n_epochs),
            (Some(0.5), Some(1.0))
        );
        let modules = settings.lora_target_modules.unwrap();
        assert_eq!((modules.len(), modules[6].as_str()), (7, LM_HEAD));
        assert_eq!(settings.lr_scheduler_type.as_deref(), Some("constant"));
    }

    #[test]
    fn every_other_key_is_refused_by_its_path() {
        for (words, expected) in [
            (
                &["optimizer.weight_decai=1"][..],
                "optimizer.weight_decai: an unknown key; did you mean optimizer.weight_decay?",
            ),
            (
                &["model._component_=my.models.tiny"],
                "model._component_: my.models.tiny is not known",
            ),
            (
                &["optimizer=torch.optim.Adagrad"],
                "optimizer._component_: torch.optim.Adagrad is not built: torch.optim.AdamW and SGD",
            ),
            (&["loss=torchtune.rlhf.loss.SimPOLoss"], "objective=sft"),
            (
                &["checkpointer=torchtune.utils.FullModelMetaCheckpointer"],
                "Hugging Face layout",
            ),
            (
                &["checkpointer.recipe_checkpoint=recipe_state.pt"],
                "the same command goes on",
            ),
            (
                &["dataset=torchtune.datasets.stack_exchanged_paired_dataset"],
                "training_file",
            ),
            (
                &["metric_logger=torchtune.utils.metric_logging.CometLogger"],
                "every step is printed",
            ),
            (&["lr_scheduler.num_cycles=2"], "num_cycles 0.5"),
            (
                &["profiler.enabled=True", "profiler.active_steps=0"],
                "between 1 and 1000, got 0",
            ),
            (
                &["output_dir=${nowhere}", "metric_logger.log_dir=${nowhere}"],
                "refers to nothing",
            ),
            (&["tokenizer.max_seq_len=64"], "dataset.max_seq_len"),
            (&["epoch=3"], "did you mean epochs?"),
            (&["~dataset.nothing"], "there is no such key"),
        ] {
            let message = asked(CONFIG, words).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(expected), "{words:?}: {message}");
        }
        let generation = format!("{CONFIG}\nprompt: Hello\nmax_new_tokens: 300\n");
        let message = asked(&generation, &[]).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("tune run generate"), "{message}");
    }
}
