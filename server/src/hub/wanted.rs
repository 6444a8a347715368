//! Which files of a repository are wanted: safetensors, JSON, templates and tokenizers; never what runs code when it is
//! read. Not here: how they come.

use std::path::Path;

use super::HubError;

const MODEL: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const ADAPTER: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// The one folder of a repository that transformers reads as well.
const MORE_TEMPLATES: &str = "additional_chat_templates/";

/// What a repository should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Model,
    Adapter,
    /// Whichever of them it is.
    Either,
}

impl Content {
    /// The small ones, by which the large ones are known.
    pub fn small_files(self, name: &str, files: &[String]) -> Result<Vec<String>, HubError> {
        let has = |file: &str| files.iter().any(|known| known == file);
        let is_there = match self {
            Content::Model => has(MODEL),
            Content::Adapter => has(ADAPTER),
            Content::Either => has(MODEL) || has(ADAPTER),
        };
        let why = match self {
            _ if is_there => {
                let mut wanted: Vec<String> = files.iter().filter(|file| is_small(file)).cloned().collect();
                wanted.sort();
                return Ok(wanted);
            }
            Content::Model if has(ADAPTER) => {
                "it is an adapter: serve its base model, and it with --lora-modules NAME=ORG/ADAPTER".to_owned()
            }
            Content::Adapter if has(MODEL) => "it is a model: serve it with --model".to_owned(),
            _ if files.iter().any(|file| file.ends_with(".gguf")) => {
                "it holds GGUF files, and no config.json: `hf download ORG/NAME FILE.gguf` fetches one, which --model takes; or take \
                 the repository they were made from"
                    .to_owned()
            }
            Content::Adapter => format!("it has no {ADAPTER}{}", listed(files)),
            _ => format!("it has no {MODEL}{}", listed(files)),
        };
        Err(HubError::Unfit {
            name: name.to_owned(),
            why,
        })
    }

    /// The weights, once `folder` holds the small files.
    pub fn weight_files(self, name: &str, files: &[String], folder: &Path) -> Result<Vec<String>, HubError> {
        let has = |file: &str| files.iter().any(|known| known == file);
        let top_level = || {
            let own = |file: &&String| file.ends_with(".safetensors") && !file.contains('/');
            files.iter().filter(own).cloned().collect::<Vec<_>>()
        };
        let is_adapter = self == Content::Adapter || (self == Content::Either && !has(MODEL));
        let weights = match is_adapter {
            true if has(ADAPTER_WEIGHTS) => vec![ADAPTER_WEIGHTS.to_owned()],
            true => vec![],
            // One whole file goes before shards, as everywhere.
            false if has(WEIGHTS) => vec![WEIGHTS.to_owned()],
            false if has(INDEX) => indexed(&folder.join(INDEX))?,
            false => top_level(),
        };
        match weights.is_empty() {
            false => Ok(weights),
            true => Err(HubError::Unfit {
                name: name.to_owned(),
                why: format!(
                    "it has no weights in safetensors, which alone are read (a pickle may run any code){}. \
                     transformers writes them: from_pretrained(..).save_pretrained(FOLDER)",
                    listed(files)
                ),
            }),
        }
    }

    /// Is what a start needs in a folder of the cache? Else what is missing.
    pub fn check_folder(self, folder: &Path) -> Result<(), String> {
        let has = |file: &str| folder.join(file).exists();
        let is_adapter = self == Content::Adapter || (self == Content::Either && !has(MODEL));
        let mut needed = match is_adapter {
            true => vec![ADAPTER.to_owned(), ADAPTER_WEIGHTS.to_owned()],
            false => vec![MODEL.to_owned()],
        };
        if !is_adapter && !has(WEIGHTS) {
            match has(INDEX) {
                true => needed.extend(indexed(&folder.join(INDEX)).map_err(|error| error.to_string())?),
                false => needed.push(WEIGHTS.to_owned()),
            }
        }
        match needed.into_iter().find(|file| !has(file)) {
            Some(file) => Err(format!("{} has no {file}", folder.display())),
            None => Ok(()),
        }
    }
}

fn is_small(file: &str) -> bool {
    let known = |ends: &[&str]| ends.iter().any(|end| file.ends_with(end));
    match file.strip_prefix(MORE_TEMPLATES) {
        Some(template) => !template.contains('/') && known(&[".jinja"]),
        None => !file.contains('/') && known(&[".json", ".jinja", ".model"]),
    }
}

/// Some of what is there instead.
fn listed(files: &[String]) -> String {
    const SHOWN: usize = 5;
    let known = files
        .iter()
        .map(String::as_str)
        .filter(|file| !file.starts_with('.') && !file.ends_with(".md"));
    // What could have been meant first.
    let (json, other): (Vec<&str>, Vec<&str>) = known.partition(|file| file.ends_with(".json"));
    let names: Vec<&str> = other.into_iter().chain(json).take(SHOWN).collect();
    match names.is_empty() {
        true => ", and no other file".to_owned(),
        false => format!("; it has {}", names.join(", ")),
    }
}

/// The files that an index names, each once.
fn indexed(path: &Path) -> Result<Vec<String>, HubError> {
    let wrong = |why: String| HubError::Unfit {
        name: path.display().to_string(),
        why,
    };
    let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let index: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    let map = index["weight_map"].as_object().into_iter().flatten();
    let mut names: Vec<String> = map
        .filter_map(|(_, file)| Some(file.as_str()?.to_owned()))
        .collect();
    names.sort();
    names.dedup();
    match names
        .iter()
        .find(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        Some(name) => Err(wrong(format!("{name:?} is no file of this folder"))),
        None => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_read_comes() {
        let folder = tempfile::tempdir().unwrap();
        let index = r#"{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}}"#;
        std::fs::write(folder.path().join(INDEX), index).unwrap();
        let around = "config.json tokenizer.json chat_template.jinja tokenizer.model README.md .gitattributes \
                      additional_chat_templates/tool_use.jinja pytorch_model.bin original/params.json onnx/model.onnx \
                      consolidated.safetensors original/consolidated.00.pth";
        let small = "additional_chat_templates/tool_use.jinja chat_template.jinja config.json tokenizer.json tokenizer.model";
        for (content, more, expected) in [
            (Content::Model, "model.safetensors", Ok("model.safetensors")),
            (
                Content::Model,
                "model.safetensors.index.json model-1.safetensors model-2.safetensors",
                Ok("model-1.safetensors model-2.safetensors"),
            ),
            (Content::Model, "", Ok("consolidated.safetensors")),
            (Content::Either, "model.safetensors", Ok("model.safetensors")),
            (Content::Adapter, "", Err("it is a model")),
        ] {
            let files: Vec<String> = around
                .split_whitespace()
                .chain(more.split_whitespace())
                .map(str::to_owned)
                .collect();
            let got = content.small_files("o/n", &files).and_then(|found| {
                let found = found
                    .iter()
                    .filter(|file| *file != INDEX)
                    .cloned()
                    .collect::<Vec<_>>();
                assert_eq!(found.join(" "), small);
                content.weight_files("o/n", &files, folder.path())
            });
            match (got, expected) {
                (Ok(got), Ok(expected)) => assert_eq!(got.join(" "), expected),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (got, expected) => panic!("{got:?} instead of {expected:?}"),
            }
        }
        for (content, files, expected) in [
            (
                Content::Model,
                "adapter_config.json adapter_model.safetensors",
                "it is an adapter",
            ),
            (Content::Model, "a.gguf b.gguf README.md", "GGUF"),
            (Content::Model, "README.md", "no config.json, and no other file"),
            (Content::Either, "x.bin", "no config.json; it has x.bin"),
            (
                Content::Model,
                "config.json pytorch_model.bin",
                "no weights in safetensors",
            ),
            (
                Content::Adapter,
                "adapter_config.json adapter_model.bin",
                "no weights in safetensors",
            ),
        ] {
            let files: Vec<String> = files.split_whitespace().map(str::to_owned).collect();
            let error = content
                .small_files("o/n", &files)
                .and_then(|_| content.weight_files("o/n", &files, folder.path()))
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
