//! Settings that are lists: a sweep, whose trials are all their combinations. What its trials are compared by and which go on
//! is [`crate::job::sweep`]'s.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Group, Kind, Refused, Setting, Settings, TABLE, Why, meant, read, refused};
use crate::job::selection::TOKEN_ACCURACY;

/// More is a mistake more often than a wish: each has a job's numbers and files.
pub const MOST_TRIALS: usize = 32;

/// What was asked of a run, or of several beside each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Of a sweep: those of its first trial.
    pub settings: Settings,
    /// Empty: it is one run.
    pub trials: Vec<Trial>,
}

/// One combination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What sets it apart, by the settings' names.
    pub varied: Map<String, Value>,
    pub settings: Settings,
}

/// A setting that is a list.
struct Axis {
    /// Where it stands among the places, and its name as it was written.
    place: usize,
    name: String,
    path: String,
    setting: &'static Setting,
    values: Vec<Value>,
}

/// As [`read`], where a setting may be a list of values.
pub fn read_asked<'a>(
    places: impl IntoIterator<Item = (&'a str, Map<String, Value>)>,
    has_validation_file: bool,
) -> Result<Asked, Refused> {
    let mut places: Vec<(&str, Map<String, Value>)> = places.into_iter().collect();
    let mut axes = vec![];
    for (place, (prefix, values)) in places.iter_mut().enumerate() {
        for (name, value) in values {
            let path = format!("{prefix}{name}");
            let Some((setting, items)) = list(name, value) else {
                continue;
            };
            let items = of_list(&path, setting, items)?;
            *value = items[0].clone();
            if let values @ [_, _, ..] = items.as_slice() {
                may_vary(&path, setting)?;
                axes.push(Axis {
                    place,
                    name: name.clone(),
                    path,
                    setting,
                    values: values.to_vec(),
                });
            }
        }
    }
    let first = read(places.clone(), has_validation_file)?;
    if axes.is_empty() {
        return Ok(Asked {
            settings: first,
            trials: vec![],
        });
    }
    // The order of the table, whatever was the order of a file or a body.
    axes.sort_by_key(|axis| TABLE.iter().position(|row| row.name == axis.setting.name));
    let n = axes
        .iter()
        .try_fold(1_usize, |n, axis| n.checked_mul(axis.values.len()));
    if n.is_none_or(|n| n > MOST_TRIALS) {
        let sizes: Vec<String> = axes
            .iter()
            .map(|axis| format!("{} of {}", axis.values.len(), axis.path))
            .collect();
        let product = n.map_or_else(|| "too many".to_owned(), |n| n.to_string());
        let message = format!(
            "the lists make {product} trials ({}), and a sweep has at most {MOST_TRIALS}",
            sizes.join(" x ")
        );
        return Err(refused(axes.remove(0).path, Why::Value, message));
    }
    for axis in &axes {
        are_comparable(axis, &first, has_validation_file)?;
    }
    let n = n.unwrap_or(1);
    let trials = (0..n).map(|number| {
        let mut places = places.clone();
        let mut varied = Map::new();
        // The last varies fastest.
        let mut stride = n;
        for axis in &axes {
            stride /= axis.values.len();
            let value = &axis.values[number / stride % axis.values.len()];
            places[axis.place].1.insert(axis.name.clone(), value.clone());
            varied.insert(axis.setting.name.to_owned(), value.clone());
        }
        Ok(Trial {
            varied,
            settings: read(places, has_validation_file)?,
        })
    });
    let trials: Vec<Trial> = trials.collect::<Result<_, Refused>>()?;
    Ok(Asked {
        settings: first,
        trials,
    })
}

/// A setting that stands there as a list of values. Names of modules are one value; a list with lists in it is several.
fn list<'a>(name: &str, value: &'a Value) -> Option<(&'static Setting, &'a [Value])> {
    let items = value.as_array()?;
    let setting = meant(name, items.first().unwrap_or(&Value::Null))?;
    let is_value = setting.kind == Kind::Modules && !items.iter().any(Value::is_array);
    (!is_value).then_some((setting, items))
}

/// Its values, each once.
fn of_list(path: &str, setting: &Setting, items: &[Value]) -> Result<Vec<Value>, Refused> {
    if items.is_empty() {
        let message = format!(
            "{path} must be {} or a list of such, got an empty list",
            setting.kind
        );
        return Err(refused(path.to_owned(), Why::Value, message));
    }
    let mut read = vec![];
    for item in items {
        let value = setting.kind.read(path, item)?;
        if read.contains(&value) {
            let message = format!("{path} has {item} twice: the trials of a sweep differ");
            return Err(refused(path.to_owned(), Why::Value, message));
        }
        read.push(value);
    }
    Ok(items.to_vec())
}

impl Setting {
    /// Whether trials of a sweep may differ in it.
    pub fn may_vary(&self) -> bool {
        self.why_alike().is_none()
    }

    /// Why all trials have one value of it.
    fn why_alike(&self) -> Option<&'static str> {
        match (self.group, self.name) {
            (Group::Data, "seed" | "shuffle" | "packing") => None,
            (Group::Data, _) => Some("trials learn from the same rows, read in the same way"),
            (Group::Objective, "objective") => Some("losses of different objectives do not compare"),
            (Group::Saving, _) => Some("trials are saved and compared alike"),
            (Group::Lora, "from_peft_checkpoint") => Some("trials start from the same"),
            (Group::Length | Group::Optimizer | Group::Objective | Group::Lora, _) => None,
        }
    }
}

fn may_vary(path: &str, setting: &Setting) -> Result<(), Refused> {
    let Some(why) = setting.why_alike() else {
        return Ok(());
    };
    let message = format!("{path} cannot vary among the trials of a sweep, because {why}: give one value");
    Err(refused(path.to_owned(), Why::Value, message))
}

/// Whether the trials' numbers mean the same in all of them.
fn are_comparable(axis: &Axis, first: &Settings, has_validation_file: bool) -> Result<(), Refused> {
    let metric = first.selection().map(|selection| selection.metric);
    let by_accuracy = metric.is_some_and(|metric| metric == TOKEN_ACCURACY || metric.ends_with("accuracies"));
    let path = &axis.path;
    let message = match (axis.setting.group, axis.setting.name) {
        (_, "neftune_noise_alpha" | "lora_dropout") if !has_validation_file => format!(
            "{path} is noise in training, by whose loss trials cannot be compared: give a validation_file, or one value"
        ),
        (_, "neftune_noise_alpha") => return Ok(()),
        (Group::Objective, _) if !by_accuracy => format!(
            "{path} changes the loss itself, by which trials are compared: give metric_for_best_model={TOKEN_ACCURACY} or \
             rewards/accuracies, or one value"
        ),
        _ => return Ok(()),
    };
    Err(refused(path.clone(), Why::Value, message))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(body: Value, has_validation_file: bool) -> Result<Asked, Refused> {
        let Value::Object(body) = body else {
            panic!("cases are objects")
        };
        read_asked([("", body)], has_validation_file)
    }

    #[test]
    fn lists_make_all_combinations() {
        let body = json!({
            "lora_r": [8, 16], "lr": [1e-4, 3e-4, "auto"], "n_epochs": [2], "target_modules": ["q_proj", "v_proj"],
        });
        let Asked { settings, trials } = asked(body, false).unwrap();
        assert_eq!(settings, trials[0].settings);
        let found: Vec<_> = trials
            .iter()
            .map(|trial| {
                (
                    trial.settings.learning_rate,
                    trial.settings.lora_r,
                    trial.settings.n_epochs,
                )
            })
            .collect();
        let rates = [Some(1e-4), Some(3e-4), None];
        let expected = rates
            .map(|rate| [8, 16].map(|r| (rate, Some(r), Some(2.0))))
            .concat();
        assert_eq!(found, expected);
        assert_eq!(
            Value::Object(trials[1].varied.clone()),
            json!({"learning_rate": 1e-4, "lora_r": 16})
        );
        // One value, however it is written; and several.
        for (modules, n) in [
            (json!(["q_proj", "v_proj"]), 0),
            (json!([["q_proj", "v_proj"]]), 0),
            (json!([["q_proj", "v_proj"], "all-linear"]), 2),
        ] {
            let found = asked(json!({"lora_target_modules": modules}), false).unwrap();
            assert_eq!(found.trials.len(), n, "{modules}");
        }
        // transformers 5 takes parts of the run as steps.
        let warms = asked(json!({"warmup_steps": [0.1, 0.2]}), false).unwrap();
        assert_eq!(warms.trials[1].settings.warmup_ratio, Some(0.2));
    }

    #[test]
    fn what_makes_no_sweep_is_named() {
        let many: Vec<u32> = (1..=11).collect();
        for (body, path, text) in [
            (
                json!({"lora_r": many, "seed": [1, 2, 3]}),
                "seed",
                "33 trials (3 of seed x 11 of lora_r)",
            ),
            (json!({"lora_r": []}), "lora_r", "empty list"),
            (json!({"lora_r": [8, 8.0]}), "lora_r", "twice"),
            (json!({"lora_r": [8, 0]}), "lora_r", "got 0"),
            (json!({"lora_r": [8, [16]]}), "lora_r", "an integer"),
            (
                json!({"template": ["alpaca", "grammar"]}),
                "template",
                "the same rows",
            ),
            (
                json!({"max_seq_length": [64, 128]}),
                "max_seq_length",
                "the same rows",
            ),
            (
                json!({"objective": ["sft", "dpo"]}),
                "objective",
                "do not compare",
            ),
            (json!({"save_steps": [1, 2]}), "save_steps", "alike"),
            (json!({"reduction_factor": [2, 3]}), "reduction_factor", "alike"),
            (
                json!({"lora_dropout": [0.0, 0.1]}),
                "lora_dropout",
                "a validation_file",
            ),
            (
                json!({"objective": "dpo", "beta": [0.1, 0.3]}),
                "beta",
                "changes the loss itself",
            ),
            (
                json!({"lr": [1e-4, 2e-4], "learning_rate": 1e-3}),
                "learning_rate",
                "the same setting",
            ),
            (
                json!({"lr_schduler_type": ["linear"]}),
                "lr_schduler_type",
                "did you mean",
            ),
        ] {
            let refused = asked(body.clone(), false).unwrap_err();
            assert_eq!(refused.path, path, "{body}: {}", refused.message);
            assert!(
                refused.message.contains(text),
                "{:?} lacks {text:?}",
                refused.message
            );
        }
        let by_accuracy =
            json!({"objective": "dpo", "beta": [0.1, 0.3], "metric_for_best_model": "rewards/accuracies"});
        assert_eq!(asked(by_accuracy, false).unwrap().trials.len(), 2);
        assert_eq!(
            asked(json!({"lora_dropout": [0.0, 0.1]}), true)
                .unwrap()
                .trials
                .len(),
            2
        );
    }
}
