//! `optim` under the names that transformers, bitsandbytes, torchao and llama-recipes give it, and the settings that belong to
//! some optimizers alone.

use serde_json::{Map, Value};

use super::{Refused, Settings, Why, refused};
use crate::job::Optimizer;

/// Of `optim`. What is fused, or paged between the memories of a GPU and its host, makes the same steps.
pub(super) const OPTIMIZERS: [&str; 19] = [
    "adamw_torch",
    "adamw",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_apex_fused",
    "adamw_anyprecision",
    "anyprecision",
    "paged_adamw",
    "paged_adamw_32bit",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "adamw_torch_8bit",
    "paged_adamw_8bit",
    "sgd",
    "lion_32bit",
    "lion",
    "paged_lion",
    "paged_lion_32bit",
    "adafactor",
];

/// What lies in transformers' `optim_args` for SGD, `momentum=0.9, nesterov=true`, are settings of their own.
pub(super) fn open(values: &mut Map<String, Value>) {
    const WITHIN: [&str; 4] = ["momentum", "dampening", "nesterov", "weight_decay"];
    for name in ["optim", "optimizer"] {
        if let Some(Value::String(text)) = values.get_mut(name) {
            *text = text.to_ascii_lowercase();
        }
    }
    let Some(Value::String(text)) = values.get("optim_args") else {
        return;
    };
    let read: Option<Vec<(&str, Value)>> = text
        .split(',')
        .map(|pair| {
            let (name, value) = pair.split_once('=')?;
            let value = serde_json::from_str(&value.trim().to_ascii_lowercase()).ok()?;
            WITHIN.contains(&name.trim()).then_some((name.trim(), value))
        })
        .collect();
    let Some(found) = read else {
        return; // refused as it is
    };
    if found.iter().all(|(name, _)| !values.contains_key(*name)) {
        let found: Vec<(String, Value)> = found
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        values.remove("optim_args");
        values.extend(found);
    }
}

impl Settings {
    pub fn optimizer(&self) -> Optimizer {
        let name = self.optim.as_deref().unwrap_or_default();
        match name {
            "sgd" => Optimizer::Sgd {
                momentum: self.momentum.unwrap_or(0.0),
                nesterov: self.nesterov.unwrap_or(false),
            },
            "adafactor" => Optimizer::Adafactor {
                scale_parameter: self.scale_parameter.unwrap_or(false),
            },
            _ if name.contains("lion") => Optimizer::Lion,
            _ if name.ends_with("8bit") => Optimizer::AdamW8bit,
            _ => Optimizer::AdamW,
        }
    }
}

pub(super) fn check(settings: &Settings) -> Result<(), Refused> {
    let optimizer = settings.optimizer();
    let name = optimizer.name();
    let wrong = |setting: &str, message| Err(refused(setting.to_owned(), Why::Value, message));
    let is_adamw = matches!(optimizer, Optimizer::AdamW | Optimizer::AdamW8bit);
    let is_lion = optimizer == Optimizer::Lion;
    let is_sgd = matches!(optimizer, Optimizer::Sgd { .. });
    let is_adafactor = matches!(optimizer, Optimizer::Adafactor { .. });
    let differs = |value: Option<f64>, default| value.is_some_and(|value| value != default);
    // transformers gives AdamW's numbers with every run: its defaults say nothing.
    let misplaced = [
        ("momentum", differs(settings.momentum, 0.0) && !is_sgd, "sgd"),
        ("nesterov", settings.nesterov == Some(true) && !is_sgd, "sgd"),
        (
            "scale_parameter",
            settings.scale_parameter == Some(true) && !is_adafactor,
            "adafactor",
        ),
        (
            "adam_beta1",
            differs(settings.adam_beta1, 0.9) && !is_adamw && !is_lion,
            "adamw_torch and lion_32bit",
        ),
        (
            "adam_beta2",
            differs(settings.adam_beta2, 0.999) && !is_adamw && !is_lion,
            "adamw_torch and lion_32bit",
        ),
        (
            "adam_epsilon",
            differs(settings.adam_epsilon, 1e-8) && !is_adamw,
            "adamw_torch",
        ),
    ];
    if let Some((setting, _, of)) = misplaced.into_iter().find(|(_, is_misplaced, _)| *is_misplaced) {
        let message =
            format!("{setting} belongs to optim {of}, not to {name}: leave it out, or give that one");
        return wrong(setting, message);
    }
    if !is_adamw && settings.learning_rate.is_none() {
        let message = format!(
            "optim {name} wants a learning_rate: the rate that is chosen where none is given was found with AdamW"
        );
        return wrong("optim", message);
    }
    optimizer.check().or_else(|message| wrong("nesterov", message))
}
