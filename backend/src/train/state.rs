//! What a job must remember to go on as if it had never stopped: numbers, moments, step. One file, replaced whole.
//! (The data cursor and every random draw are functions of the step, see data.rs and core's rng.)

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use tandem_core::id::Digest;
use tandem_core::job::{Hyper, files};
use tch::{Kind, Tensor};

use super::TrainError;

/// Everything but the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: u64,
    pub trained_tokens: u64,
    /// Of the run this state belongs to: another run's state is refused.
    pub hyper: Hyper,
    pub data: Digest,
    /// It stopped after the step, before the validation and the checkpoint that are due then.
    #[serde(default)]
    pub is_rest_due: bool,
    /// [`ORDER`] of the program that wrote it.
    #[serde(default)]
    pub order: u32,
}

/// Of a model's parameters in the tensors: 1 since each norm stands before the linears it feeds. (That of an adapter's
/// numbers has always been the same.)
pub const ORDER: u32 = 1;

/// `[P]` float32 each.
pub struct Tensors {
    pub params: Tensor,
    pub moment1: Tensor,
    pub moment2: Tensor,
}

const TENSORS: [&str; 3] = ["params", "moment1", "moment2"];
const METADATA: &str = "tandem";

/// Writes `folder`/state.safetensors so that a kill leaves either the old file or the new one.
pub fn write(folder: &Path, progress: &Progress, tensors: &Tensors) -> Result<(), TrainError> {
    let Tensors {
        params,
        moment1,
        moment2,
    } = tensors;
    let bytes: Vec<(&str, Vec<u8>)> = TENSORS
        .into_iter()
        .zip([params, moment1, moment2].map(bytes_of))
        .collect();
    let views = bytes.iter().map(|(name, bytes)| {
        let view = TensorView::new(safetensors::Dtype::F32, vec![bytes.len() / 4], bytes);
        (*name, view.expect("bytes are float32"))
    });
    let progress = serde_json::to_string(progress).expect("plain data serialises");
    let file = safetensors::serialize(views, Some([(METADATA.to_owned(), progress)].into()))
        .expect("float32 views serialise");
    replace(folder, files::STATE, &file)
}

/// The bytes of a state.safetensors.
pub fn parse(bytes: &[u8]) -> Result<(Progress, Tensors), TrainError> {
    let damaged = |why: String| TrainError::State(format!("{}: {why}", files::STATE));
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| damaged(error.to_string()))?;
    let progress = metadata.metadata().as_ref().and_then(|map| map.get(METADATA));
    let progress = progress.ok_or_else(|| damaged("is not a job's state".to_owned()))?;
    let progress = serde_json::from_str(progress).map_err(|error| damaged(error.to_string()))?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
    let [params, moment1, moment2] = TENSORS.map(|name| {
        let view = tensors.tensor(name).map_err(|error| damaged(error.to_string()))?;
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Tensor::f_from_data_size(view.data(), &shape, Kind::Float).map_err(|error| damaged(error.to_string()))
    });
    Ok((
        progress,
        Tensors {
            params: params?,
            moment1: moment1?,
            moment2: moment2?,
        },
    ))
}

/// Replaces `folder`/`name` whole: temporary file, sync, rename, sync of the folder.
pub fn replace(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), TrainError> {
    let temporary = folder.join(format!(".{name}.partial"));
    let written = File::create(&temporary)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, folder.join(name)))
        .and_then(|()| File::open(folder)?.sync_all());
    written.map_err(|error| TrainError::File {
        file: name.to_owned(),
        error,
    })
}

/// Replaces the folder `parent`/`name` by what `fill` writes (and syncs) into a temporary one. A kill leaves the old
/// folder, none, or the new one; never half of one.
pub fn replace_folder(
    parent: &Path,
    name: &str,
    fill: impl FnOnce(&Path) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let temporary = parent.join(format!(".{name}.partial"));
    let target = parent.join(name);
    let failed = |error| TrainError::File {
        file: name.to_owned(),
        error,
    };
    let clear = |folder: &Path| {
        if folder.exists() {
            fs::remove_dir_all(folder)
        } else {
            Ok(())
        }
    };
    clear(&temporary)
        .and_then(|()| fs::create_dir(&temporary))
        .map_err(failed)?;
    fill(&temporary)?;
    File::open(&temporary)
        .and_then(|folder| folder.sync_all())
        .and_then(|()| clear(&target))
        .and_then(|()| fs::rename(&temporary, &target))
        .and_then(|()| File::open(parent)?.sync_all())
        .map_err(failed)
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    let numbers = Vec::<f32>::try_from(tensor).expect("a flat float32 tensor");
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}
