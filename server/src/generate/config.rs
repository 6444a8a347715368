//! Configs of `tune run generate` as they are: what their sections say of the model, beside a prompt and how it is answered.
//! Every key is honoured, known to be harmless, or refused by its path. Formats: torchtune 0.1 to 0.6, `generation.yaml`.

use serde_json::{Map, Value, json};

use crate::train::settings::{SettingsError, wrong};
use crate::train::torchtune::{self, COMPONENT};

/// Of the recipe, as torchtune names it.
pub const NAME: &str = "generation";

pub const RECIPE: &str = include_str!("../../recipes/generation.yaml");

/// Its settings. `says_who`: words name the model or the adapter that answers.
pub fn flat(config: Map<String, Value>, says_who: bool) -> Result<Map<String, Value>, SettingsError> {
    if !torchtune::is_config(&config) {
        return Ok(config);
    }
    torchtune::is_not_of_others(&config, Some("prompt"))?;
    let mut settings = Map::new();
    for (name, value) in config {
        match (name.as_str(), value) {
            (_, Value::Null) => {}
            ("model", Value::Object(fields)) => model(fields, says_who, &mut settings)?,
            ("checkpointer", Value::Object(fields)) => checkpointer(fields, says_who, &mut settings)?,
            ("tokenizer", Value::Object(fields)) => tokenizer(fields)?,
            (_, Value::Object(fields)) if fields.contains_key(COMPONENT) => {
                let message = "an unknown section; model, checkpointer and tokenizer are read";
                return Err(wrong(&name, message.to_owned()));
            }
            (_, value) => drop(settings.insert(name, value)),
        }
    }
    Ok(settings)
}

fn model(
    fields: Map<String, Value>,
    says_who: bool,
    settings: &mut Map<String, Value>,
) -> Result<(), SettingsError> {
    let component = fields.get(COMPONENT).and_then(Value::as_str).unwrap_or_default();
    let builder = component.rsplit('.').next().unwrap_or_default();
    if builder.starts_with("qlora_") || fields.get("quantize_base") == Some(&json!(true)) {
        settings.insert("quantization".to_owned(), json!("nf4"));
    }
    match builder.starts_with("lora_") || builder.starts_with("qlora_") {
        // What else is there shapes the adapter, whose folder says it.
        true if says_who => Ok(()),
        true => {
            let message =
                format!("{component} has an adapter: give adapter=DIR, the folder that training made");
            Err(wrong("model._component_", message))
        }
        false => match fields.keys().find(|key| *key != COMPONENT) {
            None => Ok(()),
            Some(key) => Err(wrong(
                &format!("model.{key}"),
                "the model's folder says what it is: leave it out".to_owned(),
            )),
        },
    }
}

fn checkpointer(
    mut fields: Map<String, Value>,
    says_who: bool,
    settings: &mut Map<String, Value>,
) -> Result<(), SettingsError> {
    let component = fields.remove(COMPONENT).unwrap_or_default();
    if !component
        .as_str()
        .is_some_and(|component| component.ends_with(".FullModelHFCheckpointer"))
    {
        let message = format!(
            "{component} is not built: the folder must be in Hugging Face layout (config.json, *.safetensors): FullModelHFCheckpointer"
        );
        return Err(wrong("checkpointer._component_", message));
    }
    for (key, value) in fields {
        match (key.as_str(), &value) {
            (_, Value::Null) | ("output_dir" | "model_type" | "safe_serialization", _) => {}
            ("checkpoint_dir", _) => drop(settings.insert("model".to_owned(), value)),
            // What torchtune's training wrote would be passed over for the model of before.
            ("checkpoint_files", files) if !says_who && names_pickles(files) => {
                let message = format!(
                    "{files} are torchtune's own files, which are not read: give adapter=DIR (the folder that training made), or \
                     model=DIR with *.safetensors"
                );
                return Err(wrong("checkpointer.checkpoint_files", message));
            }
            ("checkpoint_files", _) => {}
            _ => {
                let message =
                    format!("{value} is not supported: adapter=DIR is the folder that training made");
                return Err(wrong(&format!("checkpointer.{key}"), message));
            }
        }
    }
    Ok(())
}

fn names_pickles(files: &Value) -> bool {
    let ends = |text: &str| [".pt", ".pth", ".bin"].iter().any(|end| text.ends_with(end));
    match files {
        Value::Array(files) => files.iter().filter_map(Value::as_str).any(ends),
        _ => false,
    }
}

fn tokenizer(fields: Map<String, Value>) -> Result<(), SettingsError> {
    let says = |key: &str| match key {
        COMPONENT | "path" | "merges_file" => None,
        "max_seq_len" => Some("a prompt is never cut: max_model_len bounds it, with its answer"),
        "prompt_template" => {
            Some("chat is rendered by the model's own template; chat_template=FILE takes another")
        }
        _ => Some("the tokenizer is the one of the model's folder"),
    };
    let given = fields.into_iter().filter(|(_, value)| !value.is_null());
    for (key, value) in given {
        if let Some(says) = says(&key) {
            let message = format!("{value} is not supported: {says}");
            return Err(wrong(&format!("tokenizer.{key}"), message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::settings::{Asked, COMPLETIONS, read};
    use super::*;

    fn asked(words: &[&str]) -> Result<Asked, SettingsError> {
        let words = [NAME].iter().chain(words);
        read(&words.map(|&word| word.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_config_is_read_as_it_is() {
        let Asked {
            serve,
            adapter,
            route,
            body,
            ..
        } = asked(&["adapter=out/adapter"]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            serve.model.folder(),
            Some(Path::new("meta-llama/Llama-3.1-8B-Instruct"))
        );
        assert_eq!(
            (serve.model.device.as_str(), serve.model.dtype.as_str()),
            ("auto", "bfloat16")
        );
        assert_eq!(
            (adapter.as_deref(), route),
            (Some(Path::new("out/adapter")), COMPLETIONS)
        );
        assert_eq!(
            Value::Object(body),
            json!({
                "prompt": "Hello, my name is", "max_tokens": 300, "temperature": 0.6, "top_k": 300, "seed": 1234,
                "stream": true,
            })
        );
        let Asked { serve, .. } = asked(&["model=m", "checkpointer.checkpoint_files=[a.pt]"]).unwrap();
        assert_eq!(serve.model.folder(), Some(Path::new("m")));
        let chat = asked(&["prompt.user=Tell me a joke.", "prompt.system=Be brief."]).unwrap();
        assert_eq!(chat.body["messages"][0]["content"], "Be brief.");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (words, expected) in [
            (
                &["checkpointer.checkpoint_files=[hf_model_0001_9.pt]"][..],
                "adapter=DIR",
            ),
            (
                &["checkpointer=torchtune.training.FullModelMetaCheckpointer"],
                "Hugging Face layout",
            ),
            (
                &["model=torchtune.models.llama3.lora_llama3_8b"],
                "give adapter=DIR",
            ),
            (
                &["instruct_template=torchtune.data.AlpacaInstructTemplate"],
                "prompt.user",
            ),
            (&["tokenizer.max_seq_len=64"], "max_model_len"),
            (&["quantizer._component_=x"], "tandem quantize"),
        ] {
            let message = asked(words).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(expected), "{words:?}: {message}");
        }
        assert!(asked(&["quantizer._component_=x", "quantizer=null"]).is_ok());
    }
}
