//! `tandem train`: fine-tuning without a server, from a YAML file and `key=value` overrides. The same tokenisation,
//! defaults and trainer as a job of the API. Not here: the training (backend), the defaults (router).

mod logs;
mod progress;
mod record;
mod settings;

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_norway::Mapping;
use tandem_backend::train::run::{Run, RunOptions};
use tandem_core::dataset::{self, Group};
use tandem_core::job::{JobEvent, JobSpec, Life, Lora, base_model, files};
use tandem_core::settings::Settings;
use tandem_router::api::RouterError;
use tandem_router::hyper::{self, Bounds, Facts, Tuning};
use tandem_text::dataset::{BadLine, Options, group, read_rows};
use tandem_text::tokenizer::gguf;
use tandem_text::{TextError, Tokenizer};

use crate::hub::{self, Content, Found, HubError};
use crate::listen::{SIGINT, Signals};
use logs::Logs;
use progress::{Progress, thousands};
use record::{Begin, Record, RecordError};
use settings::{Recipe, SettingsError};

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Model(#[from] RouterError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("{}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}", path.display())]
    Row { path: PathBuf, source: BadLine },
    #[error("{}, line {line}", path.display())]
    Tokens {
        path: PathBuf,
        line: u64,
        source: TextError,
    },
    #[error("{} has no example with something to learn within {max_seq_length} tokens", path.display())]
    Empty { path: PathBuf, max_seq_length: u32 },
    #[error(transparent)]
    Tokenizer(TextError),
    #[error("signals")]
    Signals(#[source] io::Error),
    #[error(transparent)]
    Load(#[from] tandem_backend::LoadError),
    #[error(transparent)]
    Train(#[from] tandem_backend::train::TrainError),
}

/// How it ended.
pub enum Outcome {
    Done,
    /// By a signal, of this name. The state is kept.
    Stopped(&'static str),
}

impl Outcome {
    /// Of a process that a signal ended, as shells have it.
    pub fn code(&self) -> u8 {
        match self {
            Outcome::Done => 0,
            Outcome::Stopped(signal) => signal_code(signal),
        }
    }
}

fn signal_code(signal: &str) -> u8 {
    if signal == SIGINT { 130 } else { 143 }
}

pub fn run(args: &[String]) -> Result<Outcome, TrainError> {
    if args == ["help"] {
        print!("{}", settings::help());
        return Ok(Outcome::Done);
    }
    let Recipe {
        model,
        revision,
        chat_template,
        training_file,
        validation_file,
        output_dir,
        overwrite_output_dir,
        save_total_limit,
        tuning,
        dtype,
        quantization,
        device,
        settings,
    } = settings::read(&as_settings(args))?;
    let at = |path: &Path| {
        let path = path.to_owned();
        |source| TrainError::File { path, source }
    };
    let Found { folder: model, .. } = hub::find(&model, revision.as_deref(), Content::Model)?;
    tandem_backend::weights::check_folder(&model)?;
    let model = crate::commands::replica::whole_path(&model).map_err(at(&model))?;
    let template = chat_template
        .map(|given| crate::values::chat_template(&given))
        .transpose();
    let template = template.map_err(|message| SettingsError::Wrong {
        key: "chat_template".to_owned(),
        message,
    })?;
    let tokenizer = match &template {
        Some(template) => Tokenizer::with_chat_template(&model, template.source.clone()),
        None => Tokenizer::open(&model),
    };
    let tokenizer = tokenizer.map_err(TrainError::Tokenizer)?;
    let spec = tandem_backend::family::read_spec(&model)?;
    let bounds = Bounds {
        hidden_size: u32::try_from(spec.hidden).unwrap_or(u32::MAX),
        max_model_len: u32::try_from(spec.max_positions).unwrap_or(u32::MAX),
        max_lora_rank: u32::MAX,
        lora_targets: &spec.lora_targets(),
    };
    hyper::fits(&settings, bounds)?;
    let start = settings.from_peft_checkpoint.clone().map(PathBuf::from);
    let mut settings = settings;
    let start = start
        .map(|folder| Start::read(&folder, &spec.lora_targets(), &mut settings))
        .transpose()?;
    let options = Options {
        max_seq_length: hyper::max_seq_length(&settings, bounds),
        prompt_loss_weight: settings.prompt_loss_weight.unwrap_or(0.0) as f32,
        rows: hyper::objective(&settings).rows(),
    };
    let train = Dataset::read(&training_file, &tokenizer, &options)?;
    let valid = validation_file
        .map(|path| Dataset::read(&path, &tokenizer, &options))
        .transpose()?;
    let hyper = hyper::choose(&settings, tuning, bounds, train.facts);

    std::fs::create_dir_all(&output_dir).map_err(at(&output_dir))?;
    let mut settings = Mapping::from_iter([("model".into(), model.display().to_string().into())]);
    settings.insert("dtype".into(), dtype.as_str().into());
    if let Some(format) = &quantization {
        settings.insert("quantization".into(), format.as_str().into());
    }
    settings.extend(record::settings(&hyper));
    let mut inputs = Mapping::from_iter([("training_file".into(), record::digest(&train.bytes))]);
    if let Some(template) = &template {
        inputs.insert("chat_template".into(), record::digest(template.source.as_bytes()));
    }
    if let Some(valid) = &valid {
        inputs.insert("validation_file".into(), record::digest(&valid.bytes));
    }
    if let Some(start) = &start {
        inputs.insert("from_peft_checkpoint".into(), record::digest(&start.tensors));
    }
    // A model that is trained in its own folder changes by it.
    if output_dir.canonicalize().map_err(at(&output_dir))? != model {
        inputs.insert("model".into(), record::model_digest(&model).map_err(at(&model))?);
    }
    let mut record = Record {
        settings,
        inputs,
        finished: false,
    };
    if overwrite_output_dir {
        record::clear(&output_dir)?;
    }
    let result = match tuning {
        Tuning::Lora => files::ADAPTER,
        Tuning::Full => record::WEIGHTS,
    };
    if record.begin(&output_dir, result)? == Begin::Finished {
        println!(
            "{} was made by this run: there is nothing to do (overwrite_output_dir=true does it again)",
            output_dir.join(result).display()
        );
        return Ok(Outcome::Done);
    }
    train.write(&output_dir.join(files::TRAIN))?;
    match valid {
        Some(valid) => valid.write(&output_dir.join(files::VALID))?,
        None => forget(&output_dir.join(files::VALID))?,
    }
    for (name, bytes) in [
        (files::START_CONFIG, start.as_ref().map(|start| &start.config)),
        (files::START_TENSORS, start.as_ref().map(|start| &start.tensors)),
    ] {
        let path = output_dir.join(name);
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes).map_err(at(&path))?,
            None => forget(&path)?,
        }
    }
    for (key, value) in &record.settings {
        println!("  {:<28} {}", record::show(Some(key)), record::show(Some(value)));
    }

    let spec = JobSpec {
        id: "train".parse().expect("a job\'s id"),
        folder: output_dir.clone(),
        base_model: base_model(&model),
        hyper,
        life: Life::default(),
    };
    let mut run = Run::start(RunOptions::new(
        spec,
        model.clone(),
        &dtype,
        quantization.as_deref(),
        &device,
    )?)?;
    let signalled = heed_signals().map_err(TrainError::Signals)?;
    let mut progress = Progress::new(run.frozen_parameters());
    let mut logs = Logs::of(&output_dir);
    while let Some(events) = run.advance()? {
        for event in &events {
            progress.show(event);
            logs.take(event).map_err(at(&output_dir))?;
            if let (JobEvent::Checkpoint { .. }, Some(limit)) = (event, save_total_limit) {
                record::prune(&output_dir, limit.get())?;
            }
        }
        if let Some(signal) = signalled.get().filter(|_| run.is_between_steps()) {
            let step = run.keep()?;
            logs.write_table().map_err(at(&output_dir))?;
            progress.end();
            println!(
                "stopped after step {step}; its state is in {}: the same command goes on from there",
                output_dir.display()
            );
            return Ok(Outcome::Stopped(signal));
        }
    }
    if tuning == Tuning::Full && model.is_file() {
        // A folder's other files are copied with it; those of a GGUF are made.
        for (name, content) in gguf::files(&model).map_err(TrainError::Tokenizer)? {
            let path = output_dir.join(name);
            std::fs::write(&path, content).map_err(at(&path))?;
        }
    }
    record.finish(&output_dir)?;
    println!("written to {}", run.result().display());
    match tuning {
        Tuning::Lora => println!(
            "serve it: tandem serve {} --lora-modules NAME={}",
            model.display(),
            run.result().display()
        ),
        Tuning::Full => println!("serve it: tandem serve {}", run.result().display()),
    }
    Ok(Outcome::Done)
}

/// TRL's command lines, too: `--learning_rate 1e-4`, `--packing`, `--config recipe.yaml`.
fn as_settings(args: &[String]) -> Vec<String> {
    let (mut settings, mut args) = (Vec::new(), args.iter().peekable());
    while let Some(arg) = args.next() {
        let Some(flag) = arg.strip_prefix("--") else {
            settings.push(arg.clone());
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (
                flag,
                args.next_if(|next| !next.starts_with("--")).map(String::as_str),
            ),
        };
        match (name, value) {
            ("config", Some(file)) => settings.insert(0, file.to_owned()),
            _ => settings.push(format!("{}={}", name.replace('-', "_"), value.unwrap_or("true"))),
        }
    }
    settings
}

/// Set by the first SIGINT or SIGTERM, with its name; the second ends the process.
fn heed_signals() -> io::Result<Arc<OnceLock<&'static str>>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut signals = {
        let _entered = runtime.enter();
        Signals::new()?
    };
    let heard = Arc::new(OnceLock::new());
    let ours = heard.clone();
    let thread = std::thread::Builder::new().name("tandem-signals".to_owned());
    thread.spawn(move || {
        runtime.block_on(async {
            let _ = ours.set(signals.next().await);
            eprintln!("\nstopping when this step is done; once more stops at once");
            let second = signals.next().await;
            tandem_backend::exit_at_once(signal_code(second).into())
        })
    })?;
    Ok(heard)
}

fn forget(path: &Path) -> Result<(), TrainError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(TrainError::File {
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// The adapter that a run starts from: the two files of its folder.
struct Start {
    config: Vec<u8>,
    tensors: Vec<u8>,
}

impl Start {
    /// Takes over into `settings` what it says.
    fn read(folder: &Path, known: &[String], settings: &mut Settings) -> Result<Start, TrainError> {
        let wrong = |key: &str, message: String| SettingsError::Wrong {
            key: key.to_owned(),
            message,
        };
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).map_err(|source| TrainError::File { path, source })
        };
        let (config, tensors) = (read("adapter_config.json")?, read("adapter_model.safetensors")?);
        let lora = serde_json::from_slice(&config)
            .map_err(|error| error.to_string())
            .and_then(|config| Lora::of_peft(&config, known))
            .map_err(|why| {
                wrong(
                    "from_peft_checkpoint",
                    format!("a run cannot start from it: {why}"),
                )
            })?;
        settings
            .start_from(&lora)
            .map_err(|(key, message)| wrong(key, message))?;
        Ok(Start { config, tensors })
    }
}

/// A JSONL file, tokenised.
struct Dataset {
    /// As the trainer reads them.
    bytes: Vec<u8>,
    facts: Facts,
}

impl Dataset {
    fn read(source: &Path, tokenizer: &Tokenizer, options: &Options) -> Result<Dataset, TrainError> {
        let path = || source.to_owned();
        let file = File::open(source).map_err(|source| TrainError::File { path: path(), source })?;
        let (mut examples, mut left_out) = (Vec::<Group>::new(), 0_u64);
        for row in read_rows(BufReader::new(file)) {
            let (line, row) = row.map_err(|source| TrainError::Row { path: path(), source })?;
            match group(&row, tokenizer, options) {
                Ok(example) => examples.push(example),
                Err(TextError::NoLabels { .. }) => left_out += 1,
                Err(source) => {
                    return Err(TrainError::Tokens {
                        path: path(),
                        line,
                        source,
                    });
                }
            }
        }
        if examples.is_empty() {
            return Err(TrainError::Empty {
                path: path(),
                max_seq_length: options.max_seq_length,
            });
        }
        let facts = Facts {
            examples: examples.len() as u64,
            tokens: examples.iter().map(|group| group.tokens() as u64).sum(),
        };
        let left_out = match left_out {
            0 => String::new(),
            n => format!(
                ", {n} left out: nothing to learn within {} tokens",
                options.max_seq_length
            ),
        };
        println!(
            "{}: {} examples, {} tokens{left_out}",
            source.display(),
            thousands(facts.examples),
            thousands(facts.tokens)
        );
        Ok(Dataset {
            bytes: dataset::encode(&examples),
            facts,
        })
    }

    fn write(&self, target: &Path) -> Result<(), TrainError> {
        let write = || -> io::Result<()> {
            let mut file = File::create(target)?;
            file.write_all(&self.bytes)?;
            file.sync_all()
        };
        write().map_err(|source| TrainError::File {
            path: target.to_owned(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn flags_are_settings_as_well() {
        for (line, expected) in [
            ("recipe.yaml lr=1e-4", "recipe.yaml lr=1e-4"),
            (
                "--learning-rate 1e-4 --packing --config recipe.yaml --seed=3",
                "recipe.yaml learning_rate=1e-4 packing=true seed=3",
            ),
            ("--lr -1", "lr=-1"),
        ] {
            let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
            assert_eq!(super::as_settings(&args).join(" "), expected);
        }
    }
}
