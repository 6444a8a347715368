//! `tandem train`: a job driven to its end without an engine or a server. The same trainer, the same files.

use std::path::PathBuf;

use tandem_core::job::{JobEvent, JobSpec, Method, files};
use tandem_kernels::weight::Precision;
use tch::{Device, Kind};

use super::{TrainError, Trainer, state};
use crate::model::Decoder;
use crate::start;
use crate::weights::WEIGHTS;

pub struct RunOptions {
    /// `spec.folder` holds the datasets and receives the results.
    pub spec: JobSpec,
    pub model_folder: PathBuf,
    /// The frozen base's, for LoRA; full training is float32.
    pub precision: Precision,
    pub device: Device,
    /// What full training stores.
    pub save_kind: Kind,
}

/// The folder of the result: a PEFT folder, or the model's.
pub fn run(options: RunOptions, mut on_event: impl FnMut(&JobEvent)) -> Result<PathBuf, TrainError> {
    let RunOptions {
        spec,
        model_folder,
        precision,
        device,
        save_kind,
    } = options;
    start::set_threads(device, None);
    let folder = spec.folder.clone();
    let base = match spec.hyper.method {
        Method::Lora(_) => Some(Decoder::load(&model_folder, precision, device)?),
        Method::Full => None,
    };
    let mut trainer = match &base {
        Some(base) => Trainer::start(spec, base)?,
        None => Trainer::start_full(spec, &model_folder)?,
    };
    loop {
        let quantum = trainer.quantum(base.as_ref())?;
        quantum.events.iter().for_each(&mut on_event);
        if quantum.finished {
            break;
        }
    }
    let Some(weights) = trainer.full_weights(save_kind) else {
        return Ok(folder.join(files::ADAPTER));
    };
    let copied = |error, file: &str| TrainError::File {
        file: file.to_owned(),
        error,
    };
    state::replace(&folder, WEIGHTS, &weights)?;
    for entry in std::fs::read_dir(&model_folder)
        .map_err(|error| copied(error, "the model folder"))?
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if (name.ends_with(".json") || name.ends_with(".jinja"))
            && !name.ends_with(".index.json")
            && folder != model_folder
        {
            std::fs::copy(entry.path(), folder.join(&name)).map_err(|error| copied(error, &name))?;
        }
    }
    Ok(folder)
}
