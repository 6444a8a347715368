//! adapter_config.json: every field is honoured, known to be without effect, or refused. Source: peft 0.21
//! tuners/lora/config.py and tuners/tuners_utils.py (check_target_module_exists).

use regex::Regex;
use serde_json::{Map, Value};
use tandem_core::job::LM_HEAD;

use super::{CONFIG, PeftError, TENSORS, pattern};
use crate::lora::params::AdapterShape;
use crate::weights::EMBED_PATH;

pub(super) struct Config {
    r: i64,
    alpha: f64,
    rslora: bool,
    pub dora: bool,
    /// In the file's order: the first that fits counts.
    rank_pattern: Vec<(Regex, f64)>,
    alpha_pattern: Vec<(Regex, f64)>,
    pub targets: Targets,
    pub notes: Vec<String>,
}

/// Which modules are adapted.
pub(super) struct Targets {
    modules: Modules,
    excluded: Option<Modules>,
    layers: Option<Layers>,
}

enum Modules {
    /// `all-linear`
    All,
    /// Paths or their endings.
    Named(Vec<String>),
    Matching(Regex),
}

/// Layers by number, and what stands before the number in a path.
struct Layers {
    numbers: Vec<i64>,
    place: Vec<Regex>,
}

/// Fields that change nothing about what a trained adapter computes.
const HARMLESS: [(&str, &[&str]); 4] = [
    (
        "where it came from",
        &[
            "auto_mapping",
            "base_model_name_or_path",
            "inference_mode",
            "peft_version",
            "revision",
        ],
    ),
    ("how it was trained", &["lora_dropout", "velora_config"]),
    // `init_lora_weights` says which of them was used, and is judged.
    (
        "how it was begun",
        &["corda_config", "eva_config", "loftq_config", "lora_ga_config"],
    ),
    (
        "only with a field that is refused",
        &["megatron_core", "qalora_group_size", "runtime_config"],
    ),
];

const SHOWN_CHARS: usize = 60;

/// peft's defaults of `r` and `lora_alpha`.
const DEFAULT: i64 = 8;

impl Config {
    pub fn of_bytes(bytes: &[u8]) -> Result<Config, PeftError> {
        let fields = serde_json::from_slice(bytes)
            .map_err(|error| PeftError::Config(format!("not a JSON object: {error}")))?;
        Config::parse(&fields)
    }

    pub fn parse(fields: &Map<String, Value>) -> Result<Config, PeftError> {
        let mut config = Config {
            r: DEFAULT,
            alpha: DEFAULT as f64,
            rslora: false,
            dora: false,
            rank_pattern: vec![],
            alpha_pattern: vec![],
            targets: Targets::parse(fields)?,
            notes: vec![],
        };
        for (field, value) in fields {
            match (field.as_str(), value) {
                (_, Value::Null) => {}
                ("peft_type", Value::String(kind)) if kind == "LORA" => {}
                ("r", _) => {
                    let rank = value.as_i64().filter(|&r| r > 0 && r <= 1 << 16);
                    config.r =
                        rank.ok_or_else(|| wrong(field, value, "a positive whole number is needed"))?;
                }
                ("lora_alpha", _) => {
                    config.alpha =
                        factor(value).ok_or_else(|| wrong(field, value, "a number that float32 holds is needed"))?;
                }
                ("use_rslora", Value::Bool(flag)) => config.rslora = *flag,
                ("use_dora", Value::Bool(flag)) => config.dora = *flag,
                ("rank_pattern", Value::Object(map)) => config.rank_pattern = patterns(field, map)?,
                ("alpha_pattern", Value::Object(map)) => config.alpha_pattern = patterns(field, map)?,
                // Read by `Targets`.
                ("target_modules" | "exclude_modules" | "layers_to_transform" | "layers_pattern", _) => {}
                ("bias", Value::String(bias)) if bias == "none" => {}
                ("bias", _) => return Err(wrong(field, value, "trained biases are not supported; \"none\" is")),
                ("task_type", Value::String(task)) if task == "CAUSAL_LM" => {}
                ("task_type", _) => {
                    return Err(wrong(field, value, "an adapter of another kind of model; \"CAUSAL_LM\" is supported"));
                }
                ("fan_in_fan_out", Value::Bool(true)) => config.notes.push(
                    "adapter_config.json: `fan_in_fan_out` is true and has no effect on this model's linears, as in peft"
                        .to_owned(),
                ),
                ("ensure_weight_tying", Value::Bool(true)) if config.targets.names_tables() => {
                    let why = "it ties the adapters of the embedding and of the output layer to each other: train them without it";
                    return Err(wrong(field, value, why));
                }
                ("ensure_weight_tying", Value::Bool(_)) => {}
                ("init_lora_weights", Value::Bool(_)) => {}
                ("init_lora_weights", Value::String(init))
                    if ["gaussian", "eva", "orthogonal"].contains(&init.as_str()) => {}
                ("init_lora_weights", Value::String(_)) => {
                    let why = "it changes the base's weights, so the adapter fits no other base; \
                        peft's save_pretrained(path_initial_model_for_weight_conversion=..) makes a plain one of it";
                    return Err(wrong(field, value, why));
                }
                (name, _) if HARMLESS.iter().any(|(_, fields)| fields.contains(&name)) => {}
                (_, Value::Bool(false)) => {}
                (_, Value::Array(items)) if items.is_empty() => {}
                (_, Value::Object(items)) if items.is_empty() => {}
                _ => return Err(wrong(field, value, "not supported")),
            }
        }
        match fields.get("peft_type") {
            None | Some(Value::Null) => Err(PeftError::Config("`peft_type` is missing".to_owned())),
            Some(_) => Ok(config),
        }
    }

    pub fn rank(&self, path: &str) -> i64 {
        find(&self.rank_pattern, path).map_or(self.r, |rank| rank as i64)
    }

    pub fn scale(&self, path: &str) -> f64 {
        let alpha = find(&self.alpha_pattern, path).unwrap_or(self.alpha);
        let rank = self.rank(path) as f64;
        if self.rslora {
            alpha / rank.sqrt()
        } else {
            alpha / rank
        }
    }
}

impl Targets {
    fn parse(fields: &Map<String, Value>) -> Result<Targets, PeftError> {
        let get = |field: &str| fields.get(field).filter(|value| !value.is_null());
        let Some(modules) = get("target_modules") else {
            let why = "`target_modules` is missing: the names of the adapted modules, such as [\"q_proj\", \"v_proj\"]";
            return Err(PeftError::Config(why.to_owned()));
        };
        let modules = Modules::parse("target_modules", modules)?;
        let excluded = match get("exclude_modules") {
            None => None,
            Some(Value::Array(names)) if names.is_empty() => None,
            Some(value) => Some(Modules::parse("exclude_modules", value)?),
        };
        let layers = Layers::parse(get("layers_to_transform"), get("layers_pattern"))?;
        if layers.is_some() && !matches!(modules, Modules::Named(_)) {
            let value = &fields["layers_to_transform"];
            let why = "only a list of target_modules goes with it, as in peft";
            return Err(wrong("layers_to_transform", value, why));
        }
        Ok(Targets {
            modules,
            excluded,
            layers,
        })
    }

    /// Is the module adapted?
    pub fn hit(&self, path: &str) -> bool {
        let excluded = self.excluded.as_ref().is_some_and(|modules| modules.have(path));
        let layer = || self.layers.as_ref().is_none_or(|layers| layers.have(path));
        !excluded && self.modules.have(path) && layer()
    }

    /// Does it adapt a table of the vocabulary?
    fn names_tables(&self) -> bool {
        [LM_HEAD, EMBED_PATH].iter().any(|path| self.hit(path))
    }

    /// As peft, a name that fits no module is left at that as long as another does. One that fits and has no tensor
    /// means that config and file are not of one adapter.
    pub fn check(
        &self,
        shape: &AdapterShape,
        known: &[String],
        notes: &mut Vec<String>,
    ) -> Result<(), PeftError> {
        let Modules::Named(names) = &self.modules else {
            return Ok(());
        };
        let paths = || {
            let parts = shape.iter().flat_map(|(_, linear)| &linear.parts);
            parts.map(|part| part.path.as_str())
        };
        for name in names {
            if paths().any(|path| is_named(path, name)) {
                continue;
            }
            let last = name.rsplit('.').next().unwrap_or(name);
            let may_be_excluded = match &self.excluded {
                None => false,
                Some(named @ Modules::Named(_)) => named.have(last) || named.have(name),
                // Of which layers it is meant is not looked at.
                Some(_) => true,
            };
            if may_be_excluded {
                continue;
            }
            if known.iter().any(|module| module == last) && self.layers.is_none() {
                return Err(PeftError::Config(format!(
                    "target module `{name}` has no tensors in {TENSORS}"
                )));
            }
            notes.push(format!(
                "{CONFIG}: no module of this model that can be adapted is called `{name}` (target_modules); {} are",
                known.join(", ")
            ));
        }
        Ok(())
    }
}

impl Modules {
    fn parse(field: &str, value: &Value) -> Result<Modules, PeftError> {
        match value {
            Value::String(word) if word == "all-linear" && field == "target_modules" => Ok(Modules::All),
            Value::String(text) => match pattern::whole(text) {
                Ok(regex) => Ok(Modules::Matching(regex)),
                Err(why) => Err(PeftError::Config(format!("`{field}`: {why}"))),
            },
            Value::Array(names) => {
                let names: Option<Vec<String>> = names
                    .iter()
                    .map(|name| name.as_str().map(str::to_owned))
                    .collect();
                match names.filter(|names| !names.is_empty()) {
                    Some(names) => Ok(Modules::Named(names)),
                    None => Err(wrong(field, value, "module names are needed")),
                }
            }
            _ => Err(wrong(
                field,
                value,
                "module names or a regular expression are needed",
            )),
        }
    }

    fn have(&self, path: &str) -> bool {
        match self {
            // As in peft, neither the output layer nor the embedding.
            Modules::All => ![LM_HEAD, EMBED_PATH].contains(&path),
            Modules::Named(names) => names.iter().any(|name| is_named(path, name)),
            Modules::Matching(regex) => regex.is_match(path),
        }
    }
}

impl Layers {
    fn parse(numbers: Option<&Value>, place: Option<&Value>) -> Result<Option<Layers>, PeftError> {
        let numbers = match numbers {
            None => vec![],
            Some(Value::Array(values)) => values
                .iter()
                .map(Value::as_i64)
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| {
                    PeftError::Config(format!(
                        "`layers_to_transform` is {values:?}: layer numbers are needed"
                    ))
                })?,
            Some(value) => vec![
                value
                    .as_i64()
                    .ok_or_else(|| wrong("layers_to_transform", value, "layer numbers are needed"))?,
            ],
        };
        let words: Vec<&str> = match place {
            None => vec![],
            Some(Value::String(word)) if word.is_empty() => vec![],
            Some(Value::String(word)) => vec![word],
            Some(Value::Array(words)) => words.iter().filter_map(Value::as_str).collect(),
            Some(value) => return Err(wrong("layers_pattern", value, "names are needed")),
        };
        if numbers.is_empty() {
            return match place.filter(|_| !words.is_empty()) {
                Some(value) => Err(wrong(
                    "layers_pattern",
                    value,
                    "`layers_to_transform` is needed beside it, as in peft",
                )),
                None => Ok(None),
            };
        }
        let regex = |text: &str| {
            pattern::beginning(text).map_err(|why| PeftError::Config(format!("`layers_pattern`: {why}")))
        };
        let place = match words.as_slice() {
            [] => vec![regex(r".*?\.[^.]*\.(?P<idx>\d+)\.")?],
            words => words
                .iter()
                .map(|word| regex(&format!(r"(?:^|.*?\.){word}\.(?P<idx>\d+)\.")))
                .collect::<Result<_, _>>()?,
        };
        Ok(Some(Layers { numbers, place }))
    }

    fn have(&self, path: &str) -> bool {
        let number = self.place.iter().find_map(|place| place.captures(path));
        // With an alternative in the pattern it may fit without a number.
        let number = number.and_then(|found| found.name("idx")?.as_str().parse().ok());
        number.is_some_and(|number: i64| self.numbers.contains(&number))
    }
}

fn wrong(field: &str, value: &Value, why: &str) -> PeftError {
    PeftError::Config(format!("`{field}` is {}: {why}", shown(value)))
}

/// As much of a value as says which one it is: it is from somebody's file.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

/// A number that is one in float32, too, which is what multiplies.
fn factor(value: &Value) -> Option<f64> {
    value.as_f64().filter(|&number| (number as f32).is_finite())
}

/// The path, or its end behind a dot.
fn is_named(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|head| head.ends_with('.'))
}

/// rank_pattern and alpha_pattern.
fn patterns(field: &str, map: &Map<String, Value>) -> Result<Vec<(Regex, f64)>, PeftError> {
    let entry = |(key, value): (&String, &Value)| {
        let regex = pattern::ending(key).map_err(|why| PeftError::Config(format!("`{field}`: {why}")))?;
        let is_rank = field == "rank_pattern";
        let fits = |&number: &f64| !is_rank || number > 0.0 && number.fract() == 0.0;
        match factor(value).filter(fits) {
            Some(number) => Ok((regex, number)),
            None => {
                let needed = if is_rank {
                    "a positive whole number"
                } else {
                    "a number that float32 holds"
                };
                Err(PeftError::Config(format!(
                    "`{field}`: {key} is {}; {needed} is needed",
                    shown(value)
                )))
            }
        }
    };
    map.iter().map(entry).collect()
}

fn find(patterns: &[(Regex, f64)], path: &str) -> Option<f64> {
    let found = patterns.iter().find(|(regex, _)| regex.is_match(path));
    found.map(|&(_, number)| number)
}
