//! `tandem recipes`: settings that others publish, ready to run. `tandem train NAME key=value` takes one by its name. Each runs
//! on the demo model in tests/tests/http/{train,generate}.rs.

use std::path::Path;

use super::TrainError;
use super::settings::{self, SettingsError, wrong};
use crate::cli::Recipes;
use crate::generate::config;
use crate::generate::settings::{self as generate, Asked};

pub struct Recipe {
    /// Family and variant, as torchtune names its configs.
    pub name: &'static str,
    pub text: &'static str,
}

macro_rules! recipes {
    ($($name:literal: $file:literal,)*) => {
        pub const RECIPES: &[Recipe] = &[$(Recipe {
            name: $name,
            text: include_str!(concat!("../../recipes/", $file, ".yaml")),
        },)*];
    };
}

recipes! {
    "llama2/7B_lora_1k": "llama2_7b_lora_1k",
    "llama2/7B_full_1k": "llama2_7b_full_1k",
    "llama2/7B_lora": "llama2_7b_lora",
    "llama2/7B_qlora": "llama2_7b_qlora",
    "llama2/7B_dpo": "llama2_7b_dpo",
    "llama3/8B_samsum": "llama3_8b_samsum",
    "llama3/8B_grammar": "llama3_8b_grammar",
    "llama3/8B_alpaca": "llama3_8b_alpaca",
    "llama3_1/8B_lora": "llama3_1_8b_lora",
    "llama3_1/8B_lora_xsum": "llama3_1_8b_lora_xsum",
}

/// torchtune's names with the same settings.
const OTHERS: [(&str, &str); 5] = [
    ("llama2/7B_lora_single_device", "llama2/7B_lora"),
    ("llama2/7B_qlora_single_device", "llama2/7B_qlora"),
    ("llama2/7B_lora_dpo", "llama2/7B_dpo"),
    ("llama2/7B_lora_dpo_single_device", "llama2/7B_dpo"),
    ("llama3_1/8B_lora_single_device", "llama3_1/8B_lora"),
];

/// Also with `.yaml` behind it.
pub fn named(name: &str) -> Option<&'static Recipe> {
    let name = name.strip_suffix(".yaml").unwrap_or(name);
    let other = OTHERS.iter().find(|(theirs, _)| *theirs == name);
    let name = other.map_or(name, |(_, ours)| ours);
    all().find(|recipe| recipe.name == name)
}

fn all() -> impl Iterator<Item = &'static Recipe> {
    RECIPES.iter().chain([&GENERATION])
}

/// Of `tandem generate`.
const GENERATION: Recipe = Recipe {
    name: config::NAME,
    text: config::RECIPE,
};

pub fn run(command: &Recipes) -> Result<(), TrainError> {
    match command {
        Recipes::Ls => {
            for Recipe { name, text } in all() {
                let about = text.lines().next().unwrap_or_default().trim_start_matches("# ");
                say!("{name:<24} {about}");
            }
            say!(
                "\ntandem recipes cp NAME FILE copies one; tandem train NAME key=value (tandem generate \
                 for generation) runs one"
            );
        }
        Recipes::Cp { name, file, force } => {
            let recipe = named(name).ok_or_else(|| unknown(name))?;
            if file.exists() && !force {
                let message = format!(
                    "{} is there already: give --force, or another name",
                    file.display()
                );
                return Err(wrong("FILE", message).into());
            }
            write(file, recipe.text)?;
            say!("{} is {}", file.display(), recipe.name);
        }
        Recipes::Validate { words } if is_of_generate(words)? => {
            let Asked { route, .. } = generate::read(words)?;
            say!("{} is read: a request to {route}", words[0]);
        }
        Recipes::Validate { words } => {
            let recipe = settings::read(words)?;
            say!(
                "{} is read: {} on {}",
                words[0],
                recipe.model.display(),
                recipe
                    .training_file
                    .paths()
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            );
        }
    }
    Ok(())
}

/// Does the file ask for an answer?
fn is_of_generate(words: &[String]) -> Result<bool, TrainError> {
    match words.first().filter(|word| !word.contains('=')) {
        Some(path) => Ok(settings::file(path)?.contains_key("prompt")),
        None => Ok(false),
    }
}

fn write(file: &Path, text: &str) -> Result<(), TrainError> {
    std::fs::write(file, text).map_err(|source| TrainError::File {
        path: file.to_owned(),
        source,
    })
}

fn unknown(name: &str) -> SettingsError {
    let hint = match tandem_core::suggest::closest(name, all().map(|recipe| recipe.name)) {
        Some(meant) => format!("did you mean {meant}?"),
        None => "`tandem recipes ls` lists them".to_owned(),
    };
    wrong("NAME", format!("there is no recipe {name}; {hint}"))
}
