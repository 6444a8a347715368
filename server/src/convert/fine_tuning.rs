//! Requests for jobs, in the API of today. The settings of a run and their ranges are core's table, what depends on the
//! model (rank, context, modules), suffix and metadata are the router's; how a job looks is jobs.rs.

use serde_json::{Map, Value, json};
use tandem_core::settings::{self, Kind, Range, Refused, Setting, Why};
use tandem_openapi::common::Unknown;
use tandem_openapi::fine_tuning::{CreateJob, Method, MethodSettings};
use tandem_router::api::{FileIds, JobRequest};
use utoipa::openapi::{RefOr, Schema};

use crate::error::{ApiError, invalid};

pub fn request(body: CreateJob) -> Result<JobRequest, ApiError> {
    let CreateJob {
        model,
        training_file,
        validation_file,
        suffix,
        metadata,
        method,
        hyperparameters,
        settings,
    } = body;
    let method = method.map(self::method).transpose()?;
    let mut places = vec![(String::new(), settings)];
    places.extend(hyperparameters.map(|values| ("hyperparameters.".to_owned(), values)));
    let kind = method.as_ref().map(|method| method.kind.clone());
    places.extend(method.map(|Asked { kind, values }| (format!("method.{kind}.hyperparameters."), values)));
    let places = places
        .iter()
        .map(|(place, values)| (place.as_str(), values.clone()));
    let read = settings::read_asked(places, validation_file.is_some()).map_err(refused)?;
    let settings::Asked { settings, trials } = read;
    if let (Some("supervised"), Some(objective)) = (kind.as_deref(), settings.objective.as_deref())
        && !["sft", "reward_weighted"].contains(&objective)
    {
        let message = format!(
            "objective {objective} and method.type supervised contradict each other: leave method out, or give its type \
             {objective}"
        );
        return Err(invalid("objective", message));
    }
    Ok(JobRequest {
        settings,
        trials,
        place: None,
        model,
        training_file: FileIds(training_file.into()),
        validation_file: validation_file.map(|files| FileIds(files.into())),
        suffix,
        metadata: metadata.unwrap_or_default(),
        legacy: false,
        start: None,
    })
}

/// A method's name, and the settings in it.
struct Asked {
    kind: String,
    values: Unknown,
}

fn method(method: Method) -> Result<Asked, ApiError> {
    let Method {
        kind,
        supervised,
        dpo,
        kto,
        orpo,
        cpo,
        simpo,
        reward_weighted,
        unknown,
    } = method;
    if kind == "reinforcement" {
        return Err(ApiError::NotBuilt {
            param: "method.type".to_owned(),
            hint: ": reinforcement is not built; supervised, dpo and the others that learn from rows are"
                .to_owned(),
        });
    }
    if kind == "full" {
        return Err(ApiError::NotBuilt {
            param: "method".to_owned(),
            hint: ": a job trains LoRA on the base that is served; `tandem train method=full` trains every parameter"
                .to_owned(),
        });
    }
    let methods = [
        ("supervised", supervised),
        ("dpo", dpo),
        ("kto", kto),
        ("orpo", orpo),
        ("cpo", cpo),
        ("simpo", simpo),
        ("reward_weighted", reward_weighted),
    ];
    let names = methods
        .iter()
        .map(|(name, _)| *name)
        .collect::<Vec<_>>()
        .join(", ");
    if !methods.iter().any(|(name, _)| *name == kind) {
        let message = format!("method.type must be one of {names}, got {kind:?}");
        return Err(invalid("method.type", message));
    }
    no_unknown("method", &unknown, &format!("type and {names}"))?;
    let mut values = Unknown::default();
    for (name, settings) in methods {
        let Some(MethodSettings {
            hyperparameters,
            unknown,
        }) = settings
        else {
            continue;
        };
        if name != kind {
            let message = format!("method.{name} is given, but method.type is {kind}: give one of them");
            return Err(invalid(format!("method.{name}"), message));
        }
        no_unknown(&format!("method.{name}"), &unknown, "hyperparameters")?;
        values = hyperparameters.unwrap_or_default();
    }
    if kind != "supervised" {
        if let Some(objective) = values.get("objective").filter(|objective| **objective != kind) {
            let message = format!(
                "method.{kind}.hyperparameters.objective is {objective}, but method.type says it: leave it out"
            );
            return Err(invalid("method.type", message));
        }
        values.insert("objective".to_owned(), kind.as_str().into());
    }
    Ok(Asked { kind, values })
}

fn no_unknown(place: &str, unknown: &Unknown, known: &str) -> Result<(), ApiError> {
    let Some((name, _)) = unknown.iter().find(|(_, value)| !value.is_null()) else {
        return Ok(());
    };
    let name: String = name.chars().take(80).collect();
    Err(ApiError::Invalid {
        param: Some(format!("{place}.{name}")),
        code: Some("unknown_parameter"),
        message: format!("Unknown parameter: '{place}.{name}'; {place} has {known}"),
    })
}

/// In OpenAI's words.
pub fn refused(refused: Refused) -> ApiError {
    let Refused { path, why, message } = refused;
    ApiError::Invalid {
        param: Some(path),
        code: Some(match why {
            Why::Unknown => "unknown_parameter",
            Why::NotBuilt => "unsupported_parameter",
            Why::Type => "invalid_type",
            Why::Value => "invalid_value",
        }),
        message,
    }
}

/// The table of settings, for the API document.
pub fn schema() -> RefOr<Schema> {
    let properties: Map<String, Value> = settings::TABLE
        .iter()
        .map(|setting| (setting.name.to_owned(), property(setting)))
        .collect();
    let description = "Settings of a run. Absent, null or \"auto\": the server chooses, and the job says what. Any other key \
                       is refused, with what was probably meant.";
    let schema = json!({"type": "object", "description": description, "properties": properties});
    serde_json::from_value(schema).expect("it is a schema")
}

fn property(setting: &Setting) -> Value {
    let Setting {
        name: _,
        aliases,
        group: _,
        kind,
        default,
        help,
    } = setting;
    let text = json!({"type": "string"});
    let auto = json!({"type": "string", "enum": ["auto"]});
    let value = match *kind {
        Kind::Integer { low, high, .. } => json!({"type": "integer", "minimum": low, "maximum": high}),
        Kind::Real(Range::Closed(low, high)) => json!({"type": "number", "minimum": low, "maximum": high}),
        Kind::Real(Range::Above(low, high)) => {
            json!({"type": "number", "exclusiveMinimum": low, "maximum": high})
        }
        Kind::Real(Range::Below(low, high)) => {
            json!({"type": "number", "minimum": low, "exclusiveMaximum": high})
        }
        Kind::Flag => json!({"type": "boolean"}),
        Kind::Word(words) => json!({"type": "string", "enum": words}),
        Kind::Modules => json!({"type": "array", "items": text, "minItems": 1}),
        Kind::Map => json!({"type": "object", "additionalProperties": text}),
        Kind::Text => text.clone(),
    };
    // Of modules a list is one value, and one with lists in it several.
    let several = match kind {
        Kind::Modules => json!({"type": "array", "items": {"type": "array", "items": text}, "minItems": 1}),
        _ => json!({"type": "array", "items": value, "minItems": 1}),
    };
    let mut forms = vec![
        value,
        if *kind == Kind::Modules { text } else { auto },
        json!({"type": "null"}),
    ];
    if setting.may_vary() {
        forms.push(several);
    }
    let others = match aliases {
        [] => String::new(),
        aliases => format!(" Other names: {}.", aliases.join(", ")),
    };
    json!({
        "description": format!("{help}. Default: {default}.{others}"),
        "oneOf": forms,
    })
}

#[cfg(test)]
mod tests {
    use tandem_core::settings::Settings;

    use super::*;
    use crate::convert::fine_tunes;
    use crate::extract::from_json;

    fn bytes(body: &Value) -> Vec<u8> {
        let mut whole = json!({"model": "m", "training_file": "file-1", "validation_file": "file-2"});
        whole
            .as_object_mut()
            .unwrap()
            .extend(body.as_object().unwrap().clone());
        serde_json::to_vec(&whole).unwrap()
    }

    fn asked(body: &Value) -> Result<JobRequest, ApiError> {
        request(from_json(&bytes(body))?)
    }

    /// The route of 2021 to 2023.
    fn asked_of_old(body: &Value) -> Result<JobRequest, ApiError> {
        fine_tunes::request(from_json(&bytes(body))?, "m")
    }

    #[test]
    fn a_setting_is_read_at_every_place_of_every_route_under_every_name() {
        for setting in settings::TABLE {
            for name in setting.aliases.iter().chain([&setting.name]) {
                let value = match setting.kind {
                    settings::Kind::Integer { low, .. } => json!(low + 1),
                    settings::Kind::Real(_) => json!(0.25),
                    settings::Kind::Flag => json!(true),
                    settings::Kind::Word(words) => json!(words[1]),
                    settings::Kind::Modules => json!("q_proj, v_proj"),
                    settings::Kind::Map => json!({"output": "summary"}),
                    settings::Kind::Text => json!("x"),
                };
                let alone = json!({*name: value});
                let read =
                    |settings: &Value| settings::read([("", settings.as_object().unwrap().clone())], true);
                // Some are read by one objective or optimizer alone, or with one loss.
                let of_readers =
                    settings::readers(setting.name).map(|reader| json!({*name: value, "objective": reader}));
                let of_optimizers = [
                    json!({"optim": "sgd", "learning_rate": 1e-3}),
                    json!({"optim": "sgd", "learning_rate": 1e-3, "momentum": 0.5}),
                    json!({"optim": "adafactor", "learning_rate": 1e-3}),
                ];
                let of_optimizers = of_optimizers.into_iter().map(|mut more| {
                    more[*name] = value.clone();
                    more
                });
                let settings = std::iter::once(alone.clone())
                    .chain(of_readers)
                    .chain(of_optimizers)
                    .find(|settings| read(settings).is_ok())
                    .unwrap_or(alone);
                let expected = read(&settings).unwrap();
                assert_ne!(expected, Settings::default(), "{name}");
                let method = expected.objective.as_deref().unwrap_or("supervised");
                let mut bodies = vec![settings.clone(), json!({"hyperparameters": settings})];
                // The method's type says the objective.
                if setting.name != "objective" {
                    let mut of_method = settings.clone();
                    of_method.as_object_mut().unwrap().remove("objective");
                    bodies.push(json!({"method": {"type": method, method: {"hyperparameters": of_method}}}));
                }
                for body in bodies {
                    assert_eq!(asked(&body).unwrap().settings, expected, "{body}");
                }
                assert_eq!(asked_of_old(&settings).unwrap().settings, expected, "{settings}");
            }
        }
        let nothing =
            json!({"lora_r": null, "something_else": null, "hyperparameters": null, "n_epochs": "auto"});
        assert_eq!(asked(&nothing).unwrap().settings, Settings::default());
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
                json!({"hyperparameters": {"n_epochs": 10001}}),
                "hyperparameters.n_epochs",
                "a number above 0 and at most 10000, got 10001",
            ),
            (
                json!({"hyperparameters": {"n_epochs": 2}, "num_train_epochs": 3}),
                "hyperparameters.n_epochs",
                "the same setting",
            ),
            (
                json!({"method": {"type": "reinforcement"}}),
                "method.type",
                "not built",
            ),
            (json!({"method": "full"}), "method", "tandem train method=full"),
            (
                json!({"method": {"type": "dpo", "kto": {}}}),
                "method.kto",
                "method.type is dpo",
            ),
            (
                json!({"method": {"type": "dpo"}, "objective": "kto"}),
                "method.dpo.hyperparameters.objective",
                "the same setting",
            ),
            (
                json!({"method": {"type": "supervised"}, "objective": "kto"}),
                "objective",
                "contradict",
            ),
            (
                json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"simpo_gamma": 1}}}}),
                "simpo_gamma",
                "not by dpo",
            ),
            (
                json!({"method": {"type": "ppo"}}),
                "method.type",
                "one of supervised",
            ),
            (
                json!({"method": {"type": "supervised", "x": 1}}),
                "method.x",
                "Unknown",
            ),
            (json!({"something_else": 1}), "something_else", "Unknown"),
        ] {
            let error = asked(&body).unwrap_err().body().error;
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {}", error.message);
            assert!(error.message.contains(text), "{:?} lacks {text:?}", error.message);
        }
        for (body, param, text) in [
            (json!({"lora_ran": 2}), "lora_ran", "did you mean lora_rank"),
            (json!({"lora_r": 0}), "lora_r", "got 0"),
            (json!({"lora_r": "many"}), "lora_r", "an integer"),
            (
                json!({"learning_rate": -1}),
                "learning_rate",
                "above 0 and at most 1",
            ),
            (json!({"seed": -1}), "seed", "between 0"),
            (json!({"load_in_4bit": true}), "load_in_4bit", "not supported"),
            (
                json!({"integrations": [{"type": "wandb"}]}),
                "integrations",
                "not supported",
            ),
            (
                json!({"compute_classification_metrics": true}),
                "compute_classification_metrics",
                "not computed",
            ),
        ] {
            for error in [asked(&body), asked_of_old(&body)] {
                let error = error.unwrap_err().body().error;
                assert_eq!(error.param.as_deref(), Some(param), "{body}: {}", error.message);
                assert!(error.message.contains(text), "{:?} lacks {text:?}", error.message);
            }
        }
        let of_today = json!({"method": {"type": "supervised"}});
        let error = asked_of_old(&of_today).unwrap_err().body().error;
        assert!(
            error.message.contains("/v1/fine_tuning/jobs"),
            "{}",
            error.message
        );
    }
}
