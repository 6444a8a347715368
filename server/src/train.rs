//! `tandem train`: fine-tuning without a server, from a YAML file and `key=value` overrides. The same tokenisation,
//! defaults and trainer as a job of the API. Not here: the training (backend), the defaults (router).

mod logs;
mod progress;
pub mod recipes;
mod record;
mod settings;
mod torchtune;

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_norway::Mapping;
use tandem_backend::ranks::Team;
use tandem_backend::train::run::{self, Run, RunOptions};
use tandem_backend::words;
use tandem_core::dataset;
use tandem_core::job::{JobEvent, JobSpec, Life, Lora, base_model, files};
use tandem_core::settings::Settings;
use tandem_router::api::RouterError;
use tandem_router::hyper::{self, Bounds, Facts, Tuning};
use tandem_text::dataset::{
    self as rows, Options, Reading, Rows, Shown, Source, Statistics, Unfit, tokenise,
};
use tandem_text::tokenizer::gguf;
use tandem_text::{TextError, Tokenizer};

use crate::hub::{self, Content, Found, HubError};
use crate::listen::{SIGINT, SIGTERM, Signals};
use crate::ranks::Started;
pub use logs::LINES;
use logs::Logs;
use progress::{Progress, thousands};
use record::{Begin, Record, RecordError};
use settings::{Files, Recipe, SettingsError};

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
    #[error("{files}")]
    Rows { files: String, source: Unfit },
    #[error("{files} has no example with something to learn within {max_seq_length} tokens")]
    Empty { files: String, max_seq_length: u32 },
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

/// `started`: the group of ranks that this process is one of.
pub fn run(args: &[String], started: Option<Started>) -> Result<Outcome, TrainError> {
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
        tuning,
        dtype,
        quantization,
        device,
        data_parallel_size,
        profile,
        preview,
        settings,
    } = settings::read(&as_settings(args))?;
    let at = |path: &Path| {
        let path = path.to_owned();
        |source| TrainError::File { path, source }
    };
    let Found { folder: model, .. } = hub::find(&model, revision.as_deref(), Content::Model)?;
    tandem_backend::weights::check_folder(&model)?;
    let model = crate::commands::replica::whole_path(&model).map_err(at(&model))?;
    if let Some(mate) = started.as_ref().filter(|started| !started.is_rank_0()) {
        return beside_rank_0(mate, preview.is_some(), &model, &device);
    }
    let team = team(data_parallel_size, started, &device)?;
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
    let mut settings = settings;
    if team.world() > 1 {
        // Rows and micro-batches are said of each rank, as everywhere.
        let each = settings.gradient_accumulation_steps.unwrap_or(1);
        settings.gradient_accumulation_steps = Some(each.saturating_mul(team.world() as u32));
    }
    hyper::fits(&settings, bounds)?;
    let save_total_limit = settings.save_total_limit;
    let start = settings.from_peft_checkpoint.clone().map(PathBuf::from);
    let start = start
        .map(|folder| Start::read(&folder, &spec.lora_targets(), &mut settings))
        .transpose()?;
    let options = Options::new(
        &settings,
        hyper::max_seq_length(&settings, bounds),
        hyper::objective(&settings).rows(),
    );
    let reading = Reading::new(&settings).map_err(|(key, message)| wrong(key, message))?;
    if let Some(rows) = preview {
        Dataset::show(&training_file, &reading, &tokenizer, &options, rows)?;
        return Ok(Outcome::Done);
    }
    let train = Dataset::read(&training_file, &reading, &tokenizer, &options)?;
    let valid = validation_file
        .map(|files| Dataset::read(&files, &reading.whole(), &tokenizer, &options))
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
        run::dismiss(&team, words::device(&device)?)?;
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
    if team.world() > 1 {
        let (ranks, all) = (team.world(), hyper.gradient_accumulation_steps);
        let each = all as usize / ranks;
        println!("  {ranks} ranks, each with {each} of a step's {all} micro-batches");
    }

    let spec = JobSpec {
        id: "train".parse().expect("a job\'s id"),
        folder: output_dir.clone(),
        tenant: String::new(),
        base_model: base_model(&model),
        hyper,
        life: Life::default(),
    };
    let mut options = RunOptions::new(
        spec,
        model.clone(),
        &dtype,
        quantization.as_deref(),
        &device,
        team,
    )?;
    options.profile = profile.map(|steps| (output_dir.join("trace.json"), steps));
    let mut run = Run::start(options)?;
    let signalled = heed_signals().map_err(TrainError::Signals)?;
    let mut progress = Progress::new(run.frozen_parameters());
    let mut logs = Logs::of(&output_dir);
    while let Some(events) = run.advance()? {
        for event in &events {
            progress.show(event);
            logs.take(event).map_err(at(&output_dir))?;
            if let (JobEvent::Checkpoint { best, .. }, Some(limit)) = (event, save_total_limit) {
                record::prune(&output_dir, *best, limit)?;
            }
        }
        if let Some(profiled) = run.profiled() {
            println!("profile: {profiled}");
        }
        if run.stops(signalled.get().is_some())? {
            let signal = signalled.get().copied().unwrap_or(SIGTERM);
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

/// Who trains the job of which this process is rank 0.
fn team(asked: Option<usize>, started: Option<Started>, device: &str) -> Result<Team, TrainError> {
    if let Some(started) = started {
        let unlike = |message| wrong("data_parallel_size", message);
        return Ok(started.team(asked).map_err(unlike)?);
    }
    let program = std::env::current_exe().map_err(|source| TrainError::File {
        path: PathBuf::from("this program's own path"),
        source,
    })?;
    // Processes also on a CPU: threads would share its compute threads, which one rank uses all of.
    Ok(words::team(
        asked.unwrap_or(1),
        Some("mp"),
        words::device(device)?,
        program,
    )?)
}

fn beside_rank_0(mate: &Started, shows: bool, model: &Path, device: &str) -> Result<Outcome, TrainError> {
    if shows {
        // Rank 0 does.
        return Ok(Outcome::Done);
    }
    let signalled = heed_signals().map_err(TrainError::Signals)?;
    mate.train(device, model, &|| signalled.get().is_some())?;
    Ok(match signalled.get() {
        Some(signal) => Outcome::Stopped(signal),
        None => Outcome::Done,
    })
}

/// TRL's command lines, too: `--learning_rate 1e-4`, `--packing`, `--config recipe.yaml`.
fn as_settings(args: &[String]) -> Vec<String> {
    let (mut settings, mut args) = (Vec::new(), args.iter().peekable());
    while let Some(arg) = args.next() {
        let Some(flag) = arg.strip_prefix("--") else {
            // Programs of torchtune, whose configs say the rest.
            match arg.as_str() {
                "lora_finetune_single_device" | "lora_finetune_distributed" | "lora_finetune_fsdp2" => {
                    settings.push("method=lora".to_owned());
                }
                "full_finetune_single_device" | "full_finetune_distributed" => {
                    settings.push("method=full".to_owned());
                }
                "lora_dpo_single_device" | "lora_dpo_distributed" => {
                    settings.extend(["method=lora".to_owned(), "objective=dpo".to_owned()]);
                }
                _ => settings.push(arg.clone()),
            }
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
            // A flag of its own in any place.
            ("preview", Some(value)) if value.parse::<usize>().is_err() => {
                settings.extend(["preview=true".to_owned(), value.to_owned()]);
            }
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

fn wrong(key: &str, message: String) -> SettingsError {
    SettingsError::Wrong {
        key: key.to_owned(),
        message,
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

/// A name on the hub is no file.
fn is_there(path: &Path) -> Result<(), TrainError> {
    let name = path.display().to_string();
    let is_name = name.split('/').count() == 2 && !name.starts_with(['.', '/']);
    match path.exists() || !is_name {
        true => Ok(()),
        false => {
            let message = format!(
                "there is no file {name}. A data set of the hub is made one by datasets.load_dataset({name:?}, \
                 split=\"train\").to_json(\"rows.jsonl\"): then give training_file=rows.jsonl"
            );
            Err(wrong("training_file", message).into())
        }
    }
}

/// Files, tokenised.
struct Dataset {
    /// As the trainer reads them.
    bytes: Vec<u8>,
    facts: Facts,
}

impl Dataset {
    fn read(
        files: &Files,
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
    ) -> Result<Dataset, TrainError> {
        let rows::Dataset { groups, statistics } = Dataset::tokens(files, reading, tokenizer, options)?;
        let facts = Facts {
            examples: statistics.examples,
            tokens: statistics.tokens,
        };
        Ok(Dataset {
            bytes: dataset::encode(&groups),
            facts,
        })
    }

    /// Prints the first examples, token for token: what is learned stands between marks.
    fn show(
        files: &Files,
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
        n: usize,
    ) -> Result<(), TrainError> {
        let dataset = Dataset::tokens(files, reading, tokenizer, options)?;
        println!(
            "{} tokens are learned, the longest row has {}",
            thousands(dataset.statistics.trained_tokens),
            thousands(dataset.statistics.longest)
        );
        for (number, group) in dataset.groups.iter().take(n).enumerate() {
            for example in Shown::of(group, tokenizer) {
                println!(
                    "\n--- {} of {} tokens, {} learned (between \u{ab} and \u{bb})",
                    number + 1,
                    example.tokens.len(),
                    example.learned_tokens()
                );
                let pieces = example.pieces.iter();
                let pieces = pieces.map(|piece| match piece.weight {
                    0.0 => piece.text.clone(),
                    _ => format!("\u{ab}{}\u{bb}", piece.text),
                });
                println!("{}", pieces.collect::<String>());
            }
        }
        Ok(())
    }

    /// Says what there is.
    fn tokens(
        files: &Files,
        reading: &Reading,
        tokenizer: &Tokenizer,
        options: &Options,
    ) -> Result<rows::Dataset, TrainError> {
        files.paths().iter().try_for_each(|path| is_there(path))?;
        let names: Vec<String> = files
            .paths()
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let names = names.join(", ");
        let unfit = |source| TrainError::Rows {
            files: names.clone(),
            source,
        };
        let sources = files
            .paths()
            .iter()
            .map(|path| Source::from(path.as_path()))
            .collect();
        let mut rows = Rows::open(sources, reading).map_err(|bad| unfit(bad.into()))?;
        let dataset = tokenise(&mut rows, tokenizer, options, |_, _| true).map_err(unfit)?;
        let Statistics {
            rows: n_rows,
            dropped,
            cut,
            examples,
            tokens,
            trained_tokens: _,
            longest: _,
        } = dataset.statistics;
        let max_seq_length = options.max_seq_length;
        if examples == 0 {
            return Err(TrainError::Empty {
                files: names,
                max_seq_length,
            });
        }
        let mut line = format!(
            "{names} ({}): {} examples, {} tokens",
            rows.formats(),
            thousands(examples),
            thousands(tokens)
        );
        if options.wraps {
            line.push_str(&format!(", blocks of {} rows", thousands(n_rows)));
        }
        if cut > 0 {
            line.push_str(&format!(", {} cut at {max_seq_length} tokens", thousands(cut)));
        }
        if dropped > 0 {
            line.push_str(&format!(
                ", {dropped} left out: nothing to learn within {max_seq_length} tokens"
            ));
        }
        println!("{line}");
        Ok(dataset)
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
                "--nproc_per_node 1 lora_finetune_distributed --config x.yaml dataset.split=train[:1%]",
                "x.yaml nproc_per_node=1 method=lora dataset.split=train[:1%]",
            ),
            ("recipe.yaml --preview", "recipe.yaml preview=true"),
            ("--preview lr=1", "preview=true lr=1"),
            ("--preview 5", "preview=5"),
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
