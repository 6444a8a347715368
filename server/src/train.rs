//! `tandem train`: fine-tuning without a server, from a YAML file and `key=value` overrides. The same tokenisation,
//! defaults and trainer as a job of the API. Not here: the training (backend), the defaults (router).

mod data;
pub mod eval;
mod logs;
mod placing;
mod progress;
pub mod recipes;
mod record;
pub mod settings;
mod sweep;
pub mod torchtune;
mod wandb;

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_norway::Mapping;
use tandem_backend::family::DecoderSpec;
use tandem_backend::ranks::Team;
use tandem_backend::train::mesh::Mesh;
use tandem_backend::train::run::{self, Run, RunOptions};
use tandem_backend::words;
use tandem_core::job::sweep::Sweep;
use tandem_core::job::{Hyper, JobEvent, JobSpec, Life, Lora, base_model, files};
use tandem_core::settings::Settings;
use tandem_router::api::RouterError;
use tandem_router::hyper::{self, Bounds, Tuning};
use tandem_text::dataset::{Options, Reading, Unfit};
use tandem_text::tokenizer::gguf;
use tandem_text::{TextError, Tokenizer};

use crate::hub::{self, Content, Found, HubError};
use crate::listen::{SIGINT, SIGTERM, Signals};
use crate::ranks::Started;
use data::{Dataset, OfHub, split_of_hub};
pub use logs::LINES;
use logs::Logs;
use placing::Placing;
use progress::Progress;
use record::{Begin, Record, RecordError};
use settings::{Files, Recipe, SettingsError, wrong};

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
    #[error("none of {trials} trials came to a good end. {first}")]
    AllFailed { trials: usize, first: String },
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

pub fn signal_code(signal: &str) -> u8 {
    if signal == SIGINT { 130 } else { 143 }
}

/// `started`: the group of ranks that this process is one of.
pub fn run(args: &[String], started: Option<Started>) -> Result<Outcome, TrainError> {
    if args == ["help"] {
        print!("{}", settings::help());
        return Ok(Outcome::Done);
    }
    let recipe = settings::read(&as_settings(args))?;
    let output_dir = recipe.output_dir.clone();
    let (settings, trials) = (recipe.settings.clone(), recipe.trials.clone());
    let ground = match Ground::prepare(recipe, started)? {
        ControlFlow::Continue(ground) => ground,
        ControlFlow::Break(outcome) => return Ok(outcome),
    };
    match trials.is_empty() {
        true => alone(&ground, settings, &output_dir),
        false => sweep::run(&ground, &settings, trials, &output_dir),
    }
}

/// What a run learns from, and on which model; the trials of a sweep have it together.
struct Ground {
    model: PathBuf,
    spec: DecoderSpec,
    /// What the model's chat template is replaced by.
    template: Option<String>,
    train: Dataset,
    valid: Option<Dataset>,
    start: Option<Start>,
    tuning: Tuning,
    frozen_layers: u32,
    dtype: String,
    quantization: Option<String>,
    device: String,
    team: Team,
    mesh: Mesh,
    /// Project and name at W&B.
    wandb: Option<(String, Option<String>)>,
    /// Steps to trace.
    profile: Option<u64>,
    overwrites: bool,
}

impl Ground {
    /// `Break`: rows were only to be shown, or this process trained beside another's.
    fn prepare(recipe: Recipe, started: Option<Started>) -> Result<ControlFlow<Outcome, Ground>, TrainError> {
        let Recipe {
            model,
            revision,
            chat_template,
            training_file,
            validation_file,
            dataset_config,
            dataset_revision,
            dataset_test_split,
            output_dir: _,
            overwrite_output_dir,
            tuning,
            frozen_layers,
            dtype,
            quantization,
            device,
            placing,
            wandb,
            profile,
            preview,
            mut settings,
            mut trials,
        } = recipe;
        if !trials.is_empty() && (started.is_some() || placing.is_of_several()) {
            let message = "the trials of a sweep train beside each other on one rank: leave it out, or train one after the other";
            return Err(wrong("data_parallel_size", message.to_owned()).into());
        }
        if !trials.is_empty() && profile.is_some() {
            let message = "a trace is of one run: leave it out, or trace one of the trials alone";
            return Err(wrong("profile", message.to_owned()).into());
        }
        let Found { folder: model, .. } = hub::find(&model, revision.as_deref(), Content::Model)?;
        tandem_backend::weights::check_folder(&model)?;
        let model = crate::commands::replica::whole_path(&model).map_err(at(&model))?;
        if let Some(mate) = started.as_ref().filter(|started| !started.is_rank_0()) {
            let outcome = beside_rank_0(mate, preview.is_some(), &model, &device)?;
            return Ok(ControlFlow::Break(outcome));
        }
        let team = team(&placing, started, &device)?;
        let mesh = placing.on(&team)?;
        let (tokenizer, template) = tokenizer(&model, chat_template)?;
        let spec = tandem_backend::family::read_spec(&model)?;
        let targets = spec.lora_targets();
        let bounds = bounds(&spec, &targets);
        let mut split = None;
        let of_trials = trials.iter_mut().map(|trial| &mut trial.settings);
        for settings in of_trials.chain([&mut settings]) {
            split = named_split(&training_file, settings).or(split);
        }
        hyper::fits(&settings, bounds)?;
        for trial in &trials {
            hyper::fits(&trial.settings, bounds)?;
        }
        let options = Options::new(
            &settings,
            hyper::max_seq_length(&settings, bounds),
            hyper::objective(&settings).rows(),
        );
        let of_hub = OfHub {
            revision: dataset_revision,
            config: dataset_config,
        };
        let reading = Reading::new(&settings).map_err(|(key, message)| wrong(key, message))?;
        let training_file = of_hub.files(&training_file, &[split.as_deref().unwrap_or("train")])?;
        if let Some(rows) = preview {
            Dataset::show(&training_file, &reading, &tokenizer, &options, rows)?;
            return Ok(ControlFlow::Break(Outcome::Done));
        }
        let start = settings.from_peft_checkpoint.as_ref();
        let start = start.map(|folder| Start::read(Path::new(folder), &targets));
        let start = start.transpose()?;
        let train = Dataset::read(&training_file, &reading, &tokenizer, &options)?;
        let valid = validation_file
            .map(|files| {
                let split = dataset_test_split.as_deref();
                let splits = split.map_or(vec!["validation", "test"], |split| vec![split]);
                let files = of_hub.files(&files, &splits)?;
                Dataset::read(&files, &reading.whole(), &tokenizer, &options)
            })
            .transpose()?;
        Ok(ControlFlow::Continue(Ground {
            model,
            spec,
            template,
            train,
            valid,
            start,
            tuning,
            frozen_layers,
            dtype,
            quantization,
            device,
            team,
            mesh,
            wandb,
            profile,
            overwrites: overwrite_output_dir,
        }))
    }

    /// The numbers of a run with these settings; of a trial in its sweep.
    fn choose(&self, mut settings: Settings, sweep: Option<&Sweep>) -> Result<Hyper, TrainError> {
        if let Some(start) = &self.start {
            let taken_over = settings.start_from(&start.lora);
            taken_over.map_err(|(key, message)| wrong(key, message))?;
        }
        let targets = self.spec.lora_targets();
        let (bounds, facts) = (bounds(&self.spec, &targets), self.train.facts);
        Ok(match sweep {
            None => Hyper {
                frozen_layers: self.frozen_layers,
                ..hyper::choose(&settings, self.tuning, bounds, facts)
            },
            Some(sweep) => hyper::choose_of(sweep, &settings, bounds, facts),
        })
    }

    /// What a folder of a run with these settings is made from.
    fn record(&self, folder: &Path, settings: Mapping) -> Result<Record, TrainError> {
        let mut all = Mapping::from_iter([("model".into(), self.model.display().to_string().into())]);
        all.insert("dtype".into(), self.dtype.as_str().into());
        if let Some(format) = &self.quantization {
            all.insert("quantization".into(), format.as_str().into());
        }
        all.extend(settings);
        let digest = |bytes: &[u8]| record::digest(bytes);
        let mut inputs = Mapping::from_iter([("training_file".into(), digest(&self.train.bytes))]);
        if let Some(template) = &self.template {
            inputs.insert("chat_template".into(), digest(template.as_bytes()));
        }
        if let Some(valid) = &self.valid {
            inputs.insert("validation_file".into(), digest(&valid.bytes));
        }
        if let Some(start) = &self.start {
            inputs.insert("from_peft_checkpoint".into(), digest(&start.tensors));
        }
        // A model that is trained in its own folder changes by it.
        if folder.canonicalize().map_err(at(folder))? != self.model {
            let model = record::model_digest(&self.model).map_err(at(&self.model))?;
            inputs.insert("model".into(), model);
        }
        Ok(Record {
            settings: all,
            inputs,
            finished: false,
        })
    }

    /// Writes what the trainer reads into a run's folder.
    fn write(&self, folder: &Path) -> Result<(), TrainError> {
        self.train.write(&folder.join(files::TRAIN))?;
        match &self.valid {
            Some(valid) => valid.write(&folder.join(files::VALID))?,
            None => forget(&folder.join(files::VALID))?,
        }
        let start = self.start.as_ref();
        for (name, bytes) in [
            (files::START_CONFIG, start.map(|start| &start.config)),
            (files::START_TENSORS, start.map(|start| &start.tensors)),
        ] {
            let path = folder.join(name);
            match bytes {
                Some(bytes) => std::fs::write(&path, bytes).map_err(at(&path))?,
                None => forget(&path)?,
            }
        }
        Ok(())
    }

    /// What W&B is told of a run, or of a trial of a sweep.
    fn tracked(&self, record: &Record, trial: Option<String>) -> Option<wandb::Asked> {
        let (project, name) = self.wandb.clone()?;
        let config = serde_json::to_value(&record.settings).expect("settings are plain data");
        let serde_json::Value::Object(config) = config else {
            unreachable!("settings have names")
        };
        Some(wandb::Asked {
            project,
            name: match (name, trial) {
                (Some(name), Some(trial)) => Some(format!("{name}-{trial}")),
                (name, trial) => name.or(trial),
            },
            config,
        })
    }

    fn job(&self, id: &str, folder: &Path, hyper: Hyper) -> JobSpec {
        JobSpec {
            id: id.parse().expect("a job's id"),
            folder: folder.to_owned(),
            tenant: String::new(),
            base_model: base_model(&self.model),
            hyper,
            life: Life::default(),
        }
    }

    fn options(&self, spec: JobSpec) -> Result<RunOptions, TrainError> {
        let quantization = self.quantization.as_deref();
        let (model, team) = (self.model.clone(), self.team.clone());
        let dtype = match (self.tuning, self.dtype.as_str()) {
            (Tuning::Full, "auto") => "float32",
            (_, dtype) => dtype,
        };
        let options = RunOptions::new(spec, model, dtype, quantization, &self.device, team)?;
        Ok(RunOptions {
            mesh: self.mesh,
            ..options
        })
    }

    fn say_how_to_serve(&self, result: &Path) {
        println!("written to {}", result.display());
        match self.tuning {
            Tuning::Lora => println!(
                "serve it: tandem serve {} --lora-modules NAME={}",
                self.model.display(),
                result.display()
            ),
            Tuning::Full => println!("serve it: tandem serve {}", result.display()),
        }
    }
}

/// Of a model, and what its chat template is replaced by.
fn tokenizer(model: &Path, chat_template: Option<String>) -> Result<(Tokenizer, Option<String>), TrainError> {
    let template = chat_template.map(|given| crate::values::chat_template(&given));
    let template = template
        .transpose()
        .map_err(|message| wrong("chat_template", message))?;
    let template = template.map(|template| template.source);
    let tokenizer = match &template {
        Some(template) => Tokenizer::with_chat_template(model, template.clone()),
        None => Tokenizer::open(model),
    };
    Ok((tokenizer.map_err(TrainError::Tokenizer)?, template))
}

/// Which split of a hub's data set is meant. What is left in the settings is a part of it.
fn named_split(training_file: &Files, settings: &mut Settings) -> Option<String> {
    let (name, part) = split_of_hub(training_file, settings.split.as_deref())?;
    settings.split = Some(part);
    Some(name)
}

fn bounds<'a>(spec: &DecoderSpec, targets: &'a [String]) -> Bounds<'a> {
    Bounds {
        hidden_size: u32::try_from(spec.hidden).unwrap_or(u32::MAX),
        max_model_len: u32::try_from(spec.max_positions).unwrap_or(u32::MAX),
        max_lora_rank: u32::MAX,
        lora_targets: targets,
    }
}

fn say_finished(result: &Path) {
    println!(
        "{} was made by this run: there is nothing to do (overwrite_output_dir=true does it again)",
        result.display()
    );
}

fn say_stopped(step: &str, folder: &Path) {
    println!(
        "stopped after step {step}; its state is in {}: the same command goes on from there",
        folder.display()
    );
}

fn alone(ground: &Ground, mut settings: Settings, output_dir: &Path) -> Result<Outcome, TrainError> {
    let ranks = ground.team.world();
    let (save_total_limit, models) = (settings.save_total_limit, ground.mesh.models(ranks));
    if models > 1 {
        // Rows and micro-batches are said of each rank, as everywhere.
        let each = settings.gradient_accumulation_steps.unwrap_or(1);
        settings.gradient_accumulation_steps = Some(each.saturating_mul(models as u32));
    }
    let hyper = ground.choose(settings, None)?;
    std::fs::create_dir_all(output_dir).map_err(at(output_dir))?;
    let mut record = ground.record(output_dir, record::settings(&hyper))?;
    if ground.overwrites {
        record::clear(output_dir)?;
    }
    let result = match ground.tuning {
        Tuning::Lora => files::ADAPTER,
        Tuning::Full => record::WEIGHTS,
    };
    if record.begin(output_dir, result)? == Begin::Finished {
        say_finished(&output_dir.join(result));
        run::dismiss(&ground.team, words::device(&ground.device)?)?;
        return Ok(Outcome::Done);
    }
    ground.write(output_dir)?;
    for (key, value) in &record.settings {
        println!("  {:<28} {}", record::show(Some(key)), record::show(Some(value)));
    }
    if ranks > 1 {
        let all = hyper.gradient_accumulation_steps;
        let each = all as usize / models;
        let who = match models {
            _ if models == ranks => format!("{ranks} ranks"),
            1 => format!("one model on {ranks} ranks"),
            _ => format!("{models} models on {ranks} ranks"),
        };
        println!("  {who}, each with {each} of a step's {all} micro-batches");
    }

    let spec = ground.job("train", output_dir, hyper);
    let mut options = ground.options(spec)?;
    options.profile = ground.profile.map(|steps| (output_dir.join("trace.json"), steps));
    let mut run = Run::start(options)?;
    let signalled = heed_signals().map_err(TrainError::Signals)?;
    let mut progress = Progress::new(run.frozen_parameters());
    let mut logs = Logs::of(output_dir, ground.tracked(&record, None));
    while let Some(events) = run.advance()? {
        for event in &events {
            progress.show(event);
            logs.take(event).map_err(at(output_dir))?;
            prune(event, save_total_limit, output_dir)?;
        }
        if let Some(profiled) = run.profiled() {
            println!("profile: {profiled}");
        }
        if run.stops(signalled.get().is_some())? {
            let signal = signalled.get().copied().unwrap_or(SIGTERM);
            let step = run.keep()?;
            logs.write_table().map_err(at(output_dir))?;
            progress.end();
            say_stopped(&step.to_string(), output_dir);
            return Ok(Outcome::Stopped(signal));
        }
    }
    if ground.tuning == Tuning::Full && ground.model.is_file() {
        // A folder's other files are copied with it; those of a GGUF are made.
        for (name, content) in gguf::files(&ground.model).map_err(TrainError::Tokenizer)? {
            let path = output_dir.join(name);
            std::fs::write(&path, content).map_err(at(&path))?;
        }
    }
    record.finish(output_dir)?;
    ground.say_how_to_serve(&run.result());
    Ok(Outcome::Done)
}

/// After a checkpoint: those that are one too many go.
fn prune(event: &JobEvent, limit: Option<u32>, folder: &Path) -> Result<(), TrainError> {
    match (event, limit) {
        (JobEvent::Checkpoint { best, .. }, Some(limit)) => Ok(record::prune(folder, *best, limit)?),
        _ => Ok(()),
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> TrainError + use<> {
    let path = path.to_owned();
    move |source| TrainError::File {
        path: path.clone(),
        source,
    }
}

/// Who trains the job of which this process is rank 0.
fn team(placing: &Placing, started: Option<Started>, device: &str) -> Result<Team, TrainError> {
    let Placing {
        ranks,
        tensor_parallel,
        ..
    } = *placing;
    if let Some(started) = started {
        let unlike = |message| wrong("num_processes", message);
        return Ok(started.team(ranks).map_err(unlike)?);
    }
    let program = std::env::current_exe().map_err(|source| TrainError::File {
        path: PathBuf::from("this program's own path"),
        source,
    })?;
    // Processes also on a CPU: threads would share its compute threads, which one rank uses all of.
    Ok(words::team(
        ranks.unwrap_or(tensor_parallel),
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
pub fn as_settings(args: &[String]) -> Vec<String> {
    let (mut settings, mut args) = (Vec::new(), args.iter().peekable());
    while let Some(arg) = args.next() {
        let Some(flag) = arg.strip_prefix("--") else {
            // Programs of torchtune, whose configs say the rest.
            match arg.as_str() {
                "lora_finetune_single_device" => settings.push("method=lora".to_owned()),
                "full_finetune_single_device" => settings.push("method=full".to_owned()),
                // These share what their ranks hold.
                "lora_finetune_distributed" | "lora_finetune_fsdp2" => {
                    settings.extend([
                        "method=lora".to_owned(),
                        "sharding_strategy=FULL_SHARD".to_owned(),
                    ]);
                }
                "full_finetune_distributed" => {
                    settings.extend([
                        "method=full".to_owned(),
                        "sharding_strategy=FULL_SHARD".to_owned(),
                    ]);
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

/// The adapter that a run starts from: the two files of its folder, and what they say.
struct Start {
    config: Vec<u8>,
    tensors: Vec<u8>,
    lora: Lora,
}

impl Start {
    fn read(folder: &Path, known: &[String]) -> Result<Start, TrainError> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).map_err(at(&path))
        };
        let (config, tensors) = (read("adapter_config.json")?, read("adapter_model.safetensors")?);
        let lora = serde_json::from_slice(&config)
            .map_err(|error| error.to_string())
            .and_then(|config| Lora::of_peft(&config, known));
        let lora = lora.map_err(|why| {
            wrong(
                "from_peft_checkpoint",
                format!("a run cannot start from it: {why}"),
            )
        })?;
        Ok(Start {
            config,
            tensors,
            lora,
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
                "x.yaml nproc_per_node=1 method=lora sharding_strategy=FULL_SHARD dataset.split=train[:1%]",
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
