//! Is this a model? Says what it is instead, and what to do with that.

use std::path::Path;

use super::LoadError;
use super::gguf::is_gguf;

/// How a model is written in the layout that is read here.
const CONVERT: &str = "transformers writes that layout: AutoModelForCausalLM.from_pretrained(..).save_pretrained(FOLDER), and AutoTokenizer likewise";
const GGUF: &str =
    "it holds GGUF files: name the one that is wanted (of several parts the first) with --model";

/// A folder with a config.json or a GGUF file, or an error that says what was found.
pub fn check_folder(folder: &Path) -> Result<(), LoadError> {
    let why = match folder {
        _ if folder.join("config.json").exists() => return Ok(()),
        _ if !folder.exists() => "there is no such folder, and a name on the hub is ORG/NAME".to_owned(),
        _ if is_gguf(folder) => return Ok(()),
        _ if folder.is_file() => {
            "it is a file: a folder with config.json, tokenizer.json and model.safetensors is wanted, or a file that is \
             called *.gguf"
                .to_owned()
        }
        _ if folder.join("adapter_config.json").exists() => {
            "it is an adapter's folder: serve its base model with --model, \
             and it with --lora-modules NAME=FOLDER"
                .to_owned()
        }
        _ if holds(folder, is_gguf) => GGUF.to_owned(),
        _ if folder.join("params.json").exists() => {
            "it has no config.json but Meta's params.json; convert_llama_weights_to_hf.py of transformers converts it"
                .to_owned()
        }
        _ => format!("it has no config.json; {CONVERT}"),
    };
    Err(LoadError::Folder(format!(
        "{} is no model: {why}",
        folder.display()
    )))
}

/// Why a model's folder cannot be opened that has neither model.safetensors nor its index.
pub(super) fn without_weights(folder: &Path) -> String {
    let pickled = |path: &Path| {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        name.ends_with(".bin") || name.ends_with(".pth") || name.ends_with(".pt")
    };
    let why = match folder {
        _ if holds(folder, pickled) => {
            format!(
                "its weights are pickled (.bin, .pt or .pth), which is not read: a pickle may run any code. {CONVERT}"
            )
        }
        _ if holds(folder, is_gguf) => GGUF.to_owned(),
        _ => CONVERT.to_owned(),
    };
    format!(
        "{} has neither model.safetensors nor model.safetensors.index.json: {why}",
        folder.display()
    )
}

fn holds(folder: &Path, wanted: impl Fn(&Path) -> bool) -> bool {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .any(|path| path.is_file() && wanted(&path))
}
