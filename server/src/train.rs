//! `tandem train`: fine-tuning without a server, from a YAML file and `key=value` overrides. The same tokenisation,
//! defaults and trainer as a job of the API. Not here: the training (backend), the defaults (router).

mod arguments;
mod data;
pub mod eval;
mod ground;
mod logs;
mod placing;
mod progress;
pub mod recipes;
mod record;
pub mod settings;
mod signals;
mod sweep;
pub mod torchtune;
mod wandb;

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tandem_backend::train::run::{self, Run};
use tandem_backend::words;
use tandem_core::job::{JobEvent, files};
use tandem_core::settings::Settings;
use tandem_router::api::RouterError;
use tandem_router::hyper::Tuning;
use tandem_text::TextError;
use tandem_text::dataset::Unfit;
use tandem_text::tokenizer::gguf;

use crate::hub::HubError;
use crate::listen::SIGTERM;
use crate::output;
use crate::ranks::Started;
pub use arguments::as_settings;
use ground::Ground;
pub use logs::LINES;
use logs::Logs;
use progress::Progress;
use record::{Aside, Begin, RecordError};
use settings::SettingsError;
use signals::heed_signals;
pub use signals::signal_code;

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

/// `started`: the group of ranks that this process is one of.
pub fn run(args: &[String], started: Option<Started>) -> Result<Outcome, TrainError> {
    if args == ["help"] {
        output::say(format_args!("{}", settings::help()));
        return Ok(Outcome::Done);
    }
    let recipe = settings::read(&as_settings(args))?;
    let output_dir = recipe.output_dir.clone();
    let (settings, trials) = (recipe.settings.clone(), recipe.trials.clone());
    settings.notes().iter().for_each(|note| say!("warning: {note}"));
    let ground = match Ground::prepare(recipe, started)? {
        ControlFlow::Continue(ground) => ground,
        ControlFlow::Break(outcome) => return Ok(outcome),
    };
    match trials.is_empty() {
        true => alone(&ground, settings, &output_dir),
        false => sweep::run(&ground, &settings, trials, &output_dir),
    }
}

fn say_finished(result: &Path) {
    say!(
        "{} was made by this run: there is nothing to do (overwrite_output_dir=true does it again)",
        result.display()
    );
}

fn say_stopped(step: &str, folder: &Path) {
    say!(
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
    let aside = ground.overwrites.then(|| Aside::set(output_dir)).transpose()?;
    let result = match ground.tuning {
        Tuning::Lora => files::ADAPTER,
        Tuning::Full => record::WEIGHTS,
    };
    let begin = || {
        if record.begin(output_dir, result)? == Begin::Finished {
            return Ok(None);
        }
        ground.write(output_dir)?;
        for (key, value) in &record.settings {
            say!("  {:<28} {}", record::show(Some(key)), record::show(Some(value)));
        }
        say_ranks(ranks, models, hyper.gradient_accumulation_steps);
        let spec = ground.job("train", output_dir, hyper);
        let mut options = ground.options(spec)?;
        options.profile = ground.profile.map(|steps| (output_dir.join("trace.json"), steps));
        Ok(Some(Run::start(options)?))
    };
    let Some(mut run) = record::in_place_of(aside, begin)? else {
        say_finished(&output_dir.join(result));
        run::dismiss(&ground.team, words::device(&ground.device)?)?;
        return Ok(Outcome::Done);
    };
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
            say!("profile: {profiled}");
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

/// `micro_batches`: of a step, over all models.
fn say_ranks(ranks: usize, models: usize, micro_batches: u32) {
    if ranks <= 1 {
        return;
    }
    let each = micro_batches as usize / models;
    let who = match models {
        _ if models == ranks => format!("{ranks} ranks"),
        1 => format!("one model on {ranks} ranks"),
        _ => format!("{models} models on {ranks} ranks"),
    };
    say!("  {who}, each with {each} of a step's {micro_batches} micro-batches");
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
