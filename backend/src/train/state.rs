//! What a job must remember to go on as if it had never stopped: numbers, what the optimizer remembers of them, step. One file with a digest, replaced
//! whole, and the one before it. (The data cursor and every random draw are functions of the step, see data.rs and core's
//! rng.)

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tandem_core::id::Digest;
use tandem_core::job::selection::Standing;
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
    #[serde(default)]
    pub standing: Standing,
}

/// Of a model's parameters in the tensors: 1 since each norm stands before the linears it feeds. (That of an adapter's
/// numbers has always been the same.)
pub const ORDER: u32 = 1;

/// Flat, each.
pub struct Tensors {
    /// `[P]` float32.
    pub params: Tensor,
    /// The optimizer's, in the order of their names.
    pub memory: Vec<(String, Tensor)>,
    /// The numbers of the best model so far, where it may become the result.
    pub best: Option<Tensor>,
}

const PARAMS: &str = "params";
const BEST: &str = "best";
/// All that an optimizer may remember. A name is in no digest: another one is damage.
const MEMORY: [&str; 10] = [
    "codes1", "codes2", "columns", "moment1", "moment2", "rows", "scales1", "scales2", "squares", "velocity",
];
const METADATA: &str = "tandem";
/// Of the progress and the tensors.
const DIGEST: &str = "sha256";

/// Writes `folder`/state.safetensors, and keeps the one that was there as the earlier state. A kill leaves at least one of
/// the two.
pub fn write(folder: &Path, progress: &Progress, tensors: &Tensors) -> Result<(), TrainError> {
    let file = bytes(progress, tensors);
    let failed = |error| TrainError::File {
        file: files::STATE.to_owned(),
        error,
    };
    let partial = write_partial(folder, files::STATE, &file).map_err(failed)?;
    match fs::rename(folder.join(files::STATE), folder.join(files::EARLIER_STATE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    publish(&partial, folder, files::STATE).map_err(failed)
}

/// A file with `record`, which says what the tensors are, and a digest of all of it.
pub fn bytes(record: &impl Serialize, tensors: &Tensors) -> Vec<u8> {
    let Tensors { params, memory, best } = tensors;
    let memory = memory.iter().map(|(name, tensor)| (name.as_str(), tensor));
    let named = [(PARAMS, params)].into_iter().chain(memory);
    let named = named.chain(best.as_ref().map(|best| (BEST, best)));
    let bytes: Vec<(&str, Dtype, Vec<u8>)> = named
        .map(|(name, tensor)| match tensor.kind() {
            Kind::Uint8 => (
                name,
                Dtype::U8,
                Vec::<u8>::try_from(tensor).expect("a flat tensor of bytes"),
            ),
            _ => (name, Dtype::F32, bytes_of(tensor)),
        })
        .collect();
    let views = bytes.iter().map(|(name, dtype, bytes)| {
        let view = TensorView::new(*dtype, vec![bytes.len() * 8 / dtype.bitsize()], bytes);
        (*name, view.expect("bytes are of that type"))
    });
    let record = serde_json::to_string(record).expect("plain data serialises");
    let digest = digest(&record, bytes.iter().map(|(.., bytes)| bytes.as_slice()));
    let metadata = [(METADATA.to_owned(), record), (DIGEST.to_owned(), digest)];
    safetensors::serialize(views, Some(metadata.into())).expect("views serialise")
}

/// What [`bytes`] made, undamaged.
pub fn read_file(path: &Path) -> Result<Vec<u8>, TrainError> {
    let bytes = fs::read(path).map_err(|error| TrainError::File {
        file: path.display().to_string(),
        error,
    })?;
    verify(&bytes).map_err(|why| TrainError::State(format!("{} is damaged: {why}", path.display())))?;
    Ok(bytes)
}

/// A state that a job can go on from, and what else was found.
#[derive(Default)]
pub struct Found {
    /// The bytes of an undamaged state, for [`parse`].
    pub state: Option<Vec<u8>>,
    /// What was damaged, for the job's supervisor.
    pub notes: Vec<String>,
}

/// The last state of `folder` that is undamaged. A damaged one is removed, so that it never takes a good one's place.
pub fn read(folder: &Path) -> Result<Found, TrainError> {
    let mut found = Found::default();
    for (name, without) in [
        (files::STATE, "the job goes on from the state before it"),
        (files::EARLIER_STATE, "the job begins again"),
    ] {
        let path = folder.join(name);
        let failed = |error| TrainError::File {
            file: name.to_owned(),
            error,
        };
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            read => read.map_err(failed)?,
        };
        match verify(&bytes) {
            Ok(()) => {
                found.state = Some(bytes);
                break;
            }
            Err(why) => {
                let is_last = name == files::STATE && !folder.join(files::EARLIER_STATE).exists();
                let without = if is_last { "the job begins again" } else { without };
                found.notes.push(format!("{name} is damaged ({why}): {without}"));
                fs::remove_file(&path).map_err(failed)?;
            }
        }
    }
    Ok(found)
}

/// Whether they are the bytes that [`write`] wrote.
fn verify(bytes: &[u8]) -> Result<(), String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let said = |name| metadata.metadata().as_ref().and_then(|map| map.get(name));
    let (Some(progress), Some(expected)) = (said(METADATA), said(DIGEST)) else {
        return Err("it has no digest".to_owned());
    };
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let memory = memory_names(&tensors);
    if let Some(name) = memory.iter().find(|name| !MEMORY.contains(name)) {
        return Err(format!("it has a tensor {name:?}, which no optimizer remembers"));
    }
    let has_best = tensors.names().contains(&BEST);
    let names = [PARAMS].into_iter().chain(memory);
    let names = names.chain(has_best.then_some(BEST));
    let data: Result<Vec<&[u8]>, _> = names
        .map(|name| tensors.tensor(name).map(|view| view.data()))
        .collect();
    match digest(progress, data.map_err(|error| error.to_string())?.into_iter()) == *expected {
        true => Ok(()),
        false => Err("its content does not have its digest".to_owned()),
    }
}

/// Of what the optimizer remembers, in order.
fn memory_names<'a>(tensors: &'a SafeTensors) -> Vec<&'a str> {
    let mut names = tensors.names();
    names.retain(|name| ![PARAMS, BEST].contains(name));
    names.sort_unstable();
    names
}

fn digest<'a>(progress: &'a str, tensors: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in std::iter::once(progress.as_bytes()).chain(tensors) {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Digest(hasher.finalize().into()).to_string()
}

/// The bytes of a state.safetensors, from [`read`].
pub fn parse<R: DeserializeOwned>(bytes: &[u8]) -> Result<(R, Tensors), TrainError> {
    let damaged = |why: String| TrainError::State(format!("{}: {why}", files::STATE));
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| damaged(error.to_string()))?;
    let progress = metadata.metadata().as_ref().and_then(|map| map.get(METADATA));
    let progress = progress.ok_or_else(|| damaged("is not a job's state".to_owned()))?;
    let progress = serde_json::from_str(progress).map_err(|error| damaged(error.to_string()))?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
    let read = |name: &str| {
        let view = tensors.tensor(name).map_err(|error| damaged(error.to_string()))?;
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::U8 => Kind::Uint8,
            other => return Err(damaged(format!("{name} is {other:?}"))),
        };
        Tensor::f_from_data_size(view.data(), &shape, kind).map_err(|error| damaged(error.to_string()))
    };
    let memory = memory_names(&tensors).into_iter();
    let memory = memory.map(|name| Ok((name.to_owned(), read(name)?)));
    let memory = memory.collect::<Result<_, TrainError>>()?;
    let has_best = tensors.names().contains(&BEST);
    let best = has_best.then(|| read(BEST)).transpose()?;
    Ok((
        progress,
        Tensors {
            params: read(PARAMS)?,
            memory,
            best,
        },
    ))
}

/// Replaces `folder`/`name` whole: temporary file, sync, rename, sync of the folder.
pub fn replace(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), TrainError> {
    write_partial(folder, name, bytes)
        .and_then(|partial| publish(&partial, folder, name))
        .map_err(|error| TrainError::File {
            file: name.to_owned(),
            error,
        })
}

/// What will be `folder`/`name`, durable. Nothing is left of it when there is no room.
fn write_partial(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<PathBuf> {
    let partial = folder.join(format!(".{name}.partial"));
    let written = File::create(&partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    if written.is_err() {
        // It takes room that others may need.
        let _ = fs::remove_file(&partial);
    }
    written.map(|()| partial)
}

fn publish(partial: &Path, folder: &Path, name: &str) -> io::Result<()> {
    fs::rename(partial, folder.join(name))?;
    File::open(folder)?.sync_all()
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
    if let Err(error) = fill(&temporary) {
        // It takes room that others may need.
        let _ = fs::remove_dir_all(&temporary);
        return Err(error);
    }
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
