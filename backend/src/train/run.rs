//! `tandem train`: a job driven without an engine or a server, quantum by quantum. The same trainer, the same files.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tandem_core::job::{JobEvent, JobSpec, Method, files};
use tch::Kind;
use tracing::warn;

use super::{TrainError, Trainer, state};
use crate::model::{Decoder, WeightOptions};
use crate::start;
use crate::weights::{CONFIG, WEIGHTS, gguf};

pub struct RunOptions {
    /// `spec.folder` holds the datasets and receives the results.
    pub spec: JobSpec,
    pub model_folder: PathBuf,
    /// The frozen base's, for LoRA; full training is float32.
    pub weights: WeightOptions,
    /// What full training stores.
    pub save_kind: Kind,
}

pub struct Run {
    trainer: Trainer,
    /// `None`: every parameter is trained, in a decoder of the trainer's own.
    base: Option<Decoder>,
    model_folder: PathBuf,
    save_kind: Kind,
    is_finished: bool,
}

impl Run {
    pub fn start(options: RunOptions) -> Result<Run, TrainError> {
        let RunOptions {
            spec,
            model_folder,
            weights,
            save_kind,
        } = options;
        start::set_threads(weights.device, None);
        let base = match spec.hyper.method {
            Method::Lora(_) => Some(Decoder::open(&model_folder, weights)?),
            Method::Full => None,
        };
        let trainer = match &base {
            Some(base) => Trainer::start(spec, base)?,
            None => Trainer::start_full(spec, &model_folder)?,
        };
        for note in trainer.notes(base.as_ref()) {
            warn!(model = %model_folder.display(), "{note}");
        }
        Ok(Run {
            trainer,
            base,
            model_folder,
            save_kind,
            is_finished: false,
        })
    }

    /// Of the base that is not trained.
    pub fn frozen_parameters(&self) -> u64 {
        self.base.as_ref().map_or(0, Decoder::parameters)
    }

    /// What the next quantum has to say; `None` after the last.
    pub fn advance(&mut self) -> Result<Option<Vec<JobEvent>>, TrainError> {
        if self.is_finished {
            return Ok(None);
        }
        let quantum = self.trainer.quantum(self.base.as_ref())?.write()?;
        if quantum.finished {
            self.write_model()?;
            self.is_finished = true;
        }
        Ok(Some(quantum.events))
    }

    pub fn is_between_steps(&self) -> bool {
        self.trainer.is_between_steps()
    }

    /// Writes the state, from which a run in the same folder goes on. Returns the optimizer steps done.
    pub fn keep(&self) -> Result<u64, TrainError> {
        self.trainer.snapshot().write()?;
        Ok(self.trainer.step())
    }

    /// What there is at the end: a PEFT folder, or the model's.
    pub fn result(&self) -> PathBuf {
        let folder = &self.trainer.spec().folder;
        match self.base {
            Some(_) => folder.join(files::ADAPTER),
            None => folder.clone(),
        }
    }

    /// After full training: the weights, and beside them what else the model's folder has.
    fn write_model(&self) -> Result<(), TrainError> {
        let Some(weights) = self.trainer.full_weights(self.save_kind) else {
            return Ok(());
        };
        let folder = &self.trainer.spec().folder;
        state::replace(folder, WEIGHTS, &weights)?;
        match *folder == self.model_folder {
            true => Ok(()),
            false => copy_configuration(&self.model_folder, folder),
        }
    }
}

fn copy_configuration(from: &Path, to: &Path) -> Result<(), TrainError> {
    let copied = |error, file: &str| TrainError::File {
        file: file.to_owned(),
        error,
    };
    if gguf::is_gguf(from) {
        // The tokenizer's files are the caller's to make: text is not known here.
        let config = Value::Object(gguf::Model::open(from)?.config()?);
        return std::fs::write(to.join(CONFIG), config.to_string()).map_err(|error| copied(error, CONFIG));
    }
    let entries = std::fs::read_dir(from).map_err(|error| copied(error, "the model folder"))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_configuration = name.ends_with(".json") || name.ends_with(".jinja");
        if is_configuration && !name.ends_with(".index.json") {
            std::fs::copy(entry.path(), to.join(&name)).map_err(|error| copied(error, &name))?;
        }
    }
    Ok(())
}
