//! What is made of a recipe before anything is trained: the model, the rows, the ranks. Not here: what the recipe says (settings).

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_norway::Mapping;
use tandem_backend::family::DecoderSpec;
use tandem_backend::ranks::Team;
use tandem_backend::train::mesh::Mesh;
use tandem_backend::train::run::RunOptions;
use tandem_backend::words;
use tandem_core::job::sweep::Sweep;
use tandem_core::job::{Hyper, JobSpec, Life, Lora, base_model, files};
use tandem_core::settings::Settings;
use tandem_router::hyper::{self, Bounds, Tuning};
use tandem_text::Tokenizer;
use tandem_text::dataset::{Options, Reading};

use super::data::{Dataset, OfHub, split_of_hub};
use super::placing::Placing;
use super::record::{self, Record};
use super::settings::{Files, Recipe, wrong};
use super::signals::heed_signals;
use super::{Outcome, TrainError, at, wandb};
use crate::hub::{self, Content, Found};
use crate::ranks::Started;

/// What a run learns from, and on which model; the trials of a sweep have it together.
pub(super) struct Ground {
    pub model: PathBuf,
    spec: DecoderSpec,
    /// What the model's chat template is replaced by.
    template: Option<String>,
    train: Dataset,
    pub valid: Option<Dataset>,
    start: Option<Start>,
    pub tuning: Tuning,
    frozen_layers: u32,
    dtype: String,
    quantization: Option<String>,
    pub device: String,
    pub team: Team,
    pub mesh: Mesh,
    /// Project and name at W&B.
    wandb: Option<(String, Option<String>)>,
    /// Steps to trace.
    pub profile: Option<u64>,
    pub overwrites: bool,
}

impl Ground {
    /// `Break`: rows were only to be shown, or this process trained beside another's.
    pub fn prepare(
        recipe: Recipe,
        started: Option<Started>,
    ) -> Result<ControlFlow<Outcome, Ground>, TrainError> {
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
        let layers = spec.attentions().count();
        if frozen_layers as usize > layers {
            let message = format!("must be at most {layers}, the layers of the model, got {frozen_layers}");
            return Err(wrong("num_freeze_layers", message).into());
        }
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
    pub fn choose(&self, mut settings: Settings, sweep: Option<&Sweep>) -> Result<Hyper, TrainError> {
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
    pub fn record(&self, folder: &Path, settings: Mapping) -> Result<Record, TrainError> {
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
    pub fn write(&self, folder: &Path) -> Result<(), TrainError> {
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
    pub fn tracked(&self, record: &Record, trial: Option<String>) -> Option<wandb::Asked> {
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

    pub fn job(&self, id: &str, folder: &Path, hyper: Hyper) -> JobSpec {
        JobSpec {
            id: id.parse().expect("a job's id"),
            folder: folder.to_owned(),
            tenant: String::new(),
            base_model: base_model(&self.model),
            hyper,
            life: Life::default(),
        }
    }

    pub fn options(&self, spec: JobSpec) -> Result<RunOptions, TrainError> {
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

    pub fn say_how_to_serve(&self, result: &Path) {
        say!("written to {}", result.display());
        match self.tuning {
            Tuning::Lora => say!(
                "serve it: tandem serve {} --lora-modules NAME={}",
                self.model.display(),
                result.display()
            ),
            Tuning::Full => say!("serve it: tandem serve {}", result.display()),
        }
    }
}

/// Of a model, and what its chat template is replaced by.
pub(super) fn tokenizer(
    model: &Path,
    chat_template: Option<String>,
) -> Result<(Tokenizer, Option<String>), TrainError> {
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
pub(super) fn named_split(training_file: &Files, settings: &mut Settings) -> Option<String> {
    let (name, part) = split_of_hub(training_file, settings.split.as_deref())?;
    settings.split = Some(part);
    Some(name)
}

pub(super) fn bounds<'a>(spec: &DecoderSpec, targets: &'a [String]) -> Bounds<'a> {
    Bounds {
        hidden_size: u32::try_from(spec.hidden).unwrap_or(u32::MAX),
        max_model_len: u32::try_from(spec.max_positions).unwrap_or(u32::MAX),
        max_lora_rank: u32::MAX,
        lora_targets: targets,
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
            .and_then(|config| Lora::of_start(&config, &tensors, known));
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
