//! `tandem eval`: loss and perplexity of a model, or of an adapter on it, over rows: read, rendered, masked and cut as a run reads its
//! validation file. Not here: the computing (backend), how rows are read (text).

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use tandem_backend::train::evaluation::{Evaluated, Evaluation};
use tandem_backend::words;
use tandem_core::bar;
use tandem_core::job::{Objective, base_model};
use tandem_core::settings::{Group, setting};
use tandem_router::hyper;
use tandem_text::dataset::{Options, Reading};

use super::data::{Dataset, OfHub};
use super::ground::{bounds, named_split, tokenizer};
use super::progress::thousands;
use super::settings::{self, Recipe, SettingsError, wrong};
use super::{TrainError, as_settings};
use crate::hub::{self, Content, Found};
use crate::output;

/// Spellings of the adapter that is evaluated.
const ADAPTER: [&str; 4] = [
    "adapter",
    "peft_model",
    "from_peft_checkpoint",
    "adapter_name_or_path",
];
/// Of the settings that only `tandem train` has, those that say what is read and by which model.
const OWN: [&str; 12] = [
    "model",
    "revision",
    "chat_template",
    "training_file",
    "validation_file",
    "dataset_config",
    "dataset_revision",
    "dataset_test_split",
    "dtype",
    "quantization",
    "device",
    "preview",
];

const HELP: &str = "\
tandem eval MODEL DATA key=value ... or tandem eval RECIPE.yaml key=value (on its validation_file, else its training_file)

  adapter                      a PEFT folder, or its name on the hub
";

pub fn run(args: &[String]) -> Result<(), TrainError> {
    if args == ["help"] {
        output::say(format_args!("{HELP}"));
        let is_read = |key: &str| OWN.contains(&key) || is_of_data(key);
        let settings = settings::help();
        let lines = settings
            .lines()
            .filter(|line| line.split_whitespace().next().is_some_and(is_read));
        lines.for_each(|line| say!("{line}"));
        return Ok(());
    }
    let Words { words, adapter } = Words::read(&as_settings(args))?;
    let Recipe {
        model,
        revision,
        chat_template,
        training_file,
        validation_file,
        dataset_config,
        dataset_revision,
        dataset_test_split,
        dtype,
        quantization,
        device,
        preview,
        mut settings,
        ..
    } = settings::read(&words)?;
    let objective = hyper::objective(&settings);
    if objective != Objective::Sft {
        let message = format!(
            "{} compares answers; the loss of examples is computed here: give objective=sft and rows that suit it",
            objective.name()
        );
        return Err(wrong("objective", message).into());
    }
    let Found { folder, .. } = hub::find(&model, revision.as_deref(), Content::Model)?;
    tandem_backend::weights::check_folder(&folder)?;
    let (tokenizer, _) = tokenizer(&folder, chat_template)?;
    let adapter = adapter
        .map(|given| hub::find(&given, None, Content::Adapter))
        .transpose()?;
    let spec = tandem_backend::family::read_spec(&folder)?;
    let targets = spec.lora_targets();
    let bounds = bounds(&spec, &targets);
    let of_hub = OfHub {
        revision: dataset_revision,
        config: dataset_config,
    };
    let split = named_split(&training_file, &mut settings);
    hyper::fits(&settings, bounds)?;
    let max_seq_length = hyper::max_seq_length(&settings, bounds);
    let options = Options::new(&settings, max_seq_length, objective.rows());
    let reading = Reading::new(&settings).map_err(|(key, message)| wrong(key, message))?;
    let (files, reading) = match validation_file {
        None => (
            of_hub.files(&training_file, &[split.as_deref().unwrap_or("train")])?,
            reading,
        ),
        Some(files) => {
            let splits = dataset_test_split.as_deref();
            let splits = splits.map_or(vec!["validation", "test"], |split| vec![split]);
            (of_hub.files(&files, &splits)?, reading.whole())
        }
    };
    if let Some(rows) = preview {
        return Dataset::show(&files, &reading, &tokenizer, &options, rows);
    }
    let Dataset { bytes, facts } = Dataset::read(&files, &reading, &tokenizer, &options)?;
    let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
    let names = names.join(", ");

    let (weights, _) = words::weights(&folder, &dtype, quantization.as_deref(), &device)?;
    let adapter = adapter.map(|found| found.folder);
    let mut evaluation = Evaluation::open(&folder, weights, adapter.as_deref(), &bytes, &names)?;
    for note in &evaluation.notes {
        note!("{note}");
    }
    let began = Instant::now();
    let Evaluated {
        loss,
        token_accuracy,
        labels,
    } = loop {
        show(&evaluation);
        if let Some(evaluated) = evaluation.advance()? {
            break evaluated;
        }
    };
    let seconds = began.elapsed().as_secs_f64();
    let tokens_per_second = facts.tokens as f64 / seconds.max(1e-9);
    let perplexity = loss.exp();
    say!(
        "loss {loss:.4} perplexity {perplexity:.4} accuracy {token_accuracy:.3} over {} tokens that are learned ({tokens_per_second:.0} \
         tokens/s)",
        thousands(labels)
    );
    let line = json!({
        "model": base_model(&folder), "adapter": adapter, "data": names, "max_seq_length": max_seq_length,
        "loss": loss, "perplexity": perplexity, "token_accuracy": token_accuracy, "examples": facts.examples,
        "tokens": facts.tokens, "label_tokens": labels, "seconds": seconds, "tokens_per_second": tokens_per_second,
    });
    say!("{line}");
    Ok(())
}

/// A bar for who looks on.
fn show(evaluation: &Evaluation) {
    let (done, all) = evaluation.progress();
    let mut out = io::stderr().lock();
    if out.is_terminal() {
        let bar = match done == all {
            true => String::new(),
            false => format!("{} {done}/{all}", bar::drawn(done as u64, all as u64)),
        };
        let _ = write!(out, "\r\x1b[K{bar}").and_then(|()| out.flush());
    }
}

/// What was typed, as settings of a run.
struct Words {
    words: Vec<String>,
    adapter: Option<PathBuf>,
}

impl Words {
    fn read(args: &[String]) -> Result<Words, SettingsError> {
        let is_setting = |word: &String| word.contains('=') || word.starts_with('~');
        let named = args.iter().take_while(|word| !is_setting(word)).count();
        let (named, given) = args.split_at(named);
        let mut words = match named {
            [] => vec![],
            [recipe] if is_recipe(recipe) => vec![recipe.clone()],
            [model] => vec![format!("model={model}")],
            [recipe, data] if is_recipe(recipe) => vec![recipe.clone(), format!("validation_file={data}")],
            [model, data] => vec![format!("model={model}"), format!("training_file={data}")],
            [_, _, other, ..] => return Err(SettingsError::NotASetting(other.clone())),
        };
        // What stands before the settings is not said again by one.
        let [model, data] = match named {
            [_, data] if is_recipe(&named[0]) => [None, Some(data)],
            [recipe] if is_recipe(recipe) => [None, None],
            _ => [named.first(), named.get(1)],
        };
        let mut adapter = None;
        for word in given {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let before = match settings::canonical(key) {
                "model" => model,
                "data" | "training_file" | "validation_file" => data,
                _ => None,
            };
            if let Some(before) = before {
                return Err(SettingsError::Twice {
                    first: before.clone(),
                    second: key.to_owned(),
                });
            }
            match key {
                _ if ADAPTER.contains(&key) => adapter = Some(PathBuf::from(value)),
                "data" => words.push(format!("training_file={value}")),
                _ => {
                    is_read(key)?;
                    words.push(word.clone());
                }
            }
        }
        if !named.first().is_some_and(|word| is_recipe(word)) {
            // A run's, of which there is none: nothing is written.
            words.push("output_dir=.".to_owned());
        }
        Ok(Words { words, adapter })
    }
}

fn is_recipe(word: &str) -> bool {
    let end = std::path::Path::new(word).extension();
    super::recipes::named(word).is_some() || end.is_some_and(|end| end == "yaml" || end == "yml")
}

fn is_of_data(key: &str) -> bool {
    let group = setting(key).map(|setting| setting.group);
    group == Some(Group::Data) || key == "objective"
}

/// What is of training alone would change nothing here. (A recipe has such settings; they stay its own.)
fn is_read(key: &str) -> Result<(), SettingsError> {
    let name = settings::canonical(key);
    let is_of_training = setting(name).is_some() || settings::is_own(name);
    match is_of_training && !is_of_data(name) && !OWN.contains(&name) {
        true => Err(wrong(
            key,
            "is of training, and nothing is trained here: leave it out; `tandem eval help` lists what is read".to_owned(),
        )),
        false => Ok(()),
    }
}
