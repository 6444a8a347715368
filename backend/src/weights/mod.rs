//! A checkpoint in Hugging Face layout: `model.safetensors`, or shards with `model.safetensors.index.json`. Files are
//! memory-mapped and a tensor is read when it is asked for. Not here: what the tensors mean.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tandem_core::id::Digest;
use tandem_kernels::finite;
use tandem_kernels::mapped::{Block, MappedFile};
use tch::{Kind, Tensor};

use crate::family::Head;

mod folder;

pub use folder::check_folder;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read {file}: {error}")]
    Read { file: String, error: std::io::Error },
    #[error("{file}: {message}")]
    Config { file: String, message: String },
    /// Not a model's folder.
    #[error("{0}")]
    Folder(String),
    /// A damaged or inconsistent weight file or tensor.
    #[error("{file}: {message}")]
    Weights { file: String, message: String },
    #[error("{0}")]
    Option(String),
    /// A rank went away, or never came.
    #[error("{0}")]
    Lost(String),
    #[error(transparent)]
    Kernel(#[from] tandem_kernels::KernelError),
}

/// The single weight file's name.
pub const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The embedding table and the output head as checkpoints name them.
pub const EMBED: &str = "model.embed_tokens.weight";
pub const HEAD: &str = "lm_head.weight";
/// Does the folder hold weights at all? (A model to be made has only its config.json and tokenizer.)
pub fn has_weights(folder: &Path) -> bool {
    [WEIGHTS, INDEX].iter().any(|file| folder.join(file).exists())
}

pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<(String, MappedFile)>,
    tensors: HashMap<String, Entry>,
    notes: Vec<String>,
}

#[derive(Clone)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    /// Bytes inside the file.
    start: usize,
    end: usize,
}

impl Checkpoint {
    /// As transformers: one whole file goes before shards, and of a tensor in two shards the last one is taken.
    pub fn open(folder: &Path) -> Result<Checkpoint, LoadError> {
        let mut checkpoint = Checkpoint {
            folder: folder.to_owned(),
            files: vec![],
            tensors: HashMap::new(),
            notes: vec![],
        };
        let exists = |file: &str| folder.join(file).exists();
        let names = match (exists(WEIGHTS), exists(INDEX)) {
            (true, false) => vec![WEIGHTS.to_owned()],
            (true, true) => {
                let whole = vec![WEIGHTS.to_owned()];
                if !indexed_files(folder).is_ok_and(|files| files == whole) {
                    let note = format!("{WEIGHTS} is taken; {INDEX} and the shards it names are not");
                    checkpoint.notes.push(note);
                }
                whole
            }
            (false, true) => indexed_files(folder)?,
            (false, false) => return Err(LoadError::Folder(folder::without_weights(folder))),
        };
        for name in names {
            checkpoint.add(name)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, name: String) -> Result<(), LoadError> {
        let path = self.folder.join(&name);
        let mapped = MappedFile::open(&path).map_err(|error| LoadError::Read {
            file: path.display().to_string(),
            error,
        })?;
        let damaged = |message: String| LoadError::Weights {
            file: name.clone(),
            message,
        };
        let bytes = mapped.bytes();
        let parsed = SafeTensors::deserialize(bytes).map_err(|error| {
            damaged(format!(
                "not a whole safetensors file ({} bytes): {error}",
                bytes.len()
            ))
        })?;
        for (tensor, view) in parsed.iter() {
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            let entry = Entry {
                file: self.files.len(),
                dtype: view.dtype(),
                shape: view.shape().iter().map(|&n| n as i64).collect(),
                start,
                end: start + view.data().len(),
            };
            let earlier = self.tensors.insert(tensor.to_owned(), entry);
            if let Some(earlier) = earlier.filter(|earlier| earlier.file != self.files.len()) {
                let (file, mapped) = &self.files[earlier.file];
                if &mapped.bytes()[earlier.start..earlier.end] != view.data() {
                    let note = format!(
                        "`{tensor}` is in {file} and, with other numbers, in {name}: the latter is taken"
                    );
                    self.notes.push(note);
                }
            }
        }
        // safetensors' save_model writes a shared tensor (a tied head) once, and says under which name the other is.
        let header = SafeTensors::read_metadata(bytes)
            .map_err(|error| damaged(error.to_string()))?
            .1;
        let aliases: Vec<(String, Entry)> = header
            .metadata()
            .iter()
            .flatten()
            .filter_map(|(alias, stored)| Some((alias.clone(), self.tensors.get(stored)?.clone())))
            .collect();
        for (alias, entry) in aliases {
            self.tensors.entry(alias).or_insert(entry);
        }
        self.files.push((name, mapped));
        Ok(())
    }

    /// For the log: what is there and not taken.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// In order, so that messages are the same each time.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names.into_iter()
    }

    /// The file of a tensor that is there.
    pub fn file_of(&self, name: &str) -> &str {
        &self.files[self.tensors[name].file].0
    }

    /// Are both there, with different numbers?
    pub fn differ(&self, one: &str, other: &str) -> bool {
        let bytes = |name| {
            let entry: &Entry = self.tensors.get(name)?;
            let bytes = &self.files[entry.file].1.bytes()[entry.start..entry.end];
            Some((entry.dtype, bytes))
        };
        match (bytes(one), bytes(other)) {
            (Some(one), Some(other)) => one != other,
            _ => false,
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Where a parameter stands. Of a tied table, saved once, some savers kept the head's name (safetensors allows one
    /// name for one memory, and `lm_head` sorts first).
    pub fn stored_name<'a>(&self, name: &'a str, head: Head) -> &'a str {
        match head {
            Head::Tied if name == EMBED && !self.has(EMBED) => HEAD,
            _ => name,
        }
    }

    /// The tensor as stored (bf16, f16 or f32): convert or pack it, do not keep it.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let (entry, mapped, kind) = self.find(name, shape)?;
        let tensor = mapped.tensor(entry.start..entry.end, kind, shape)?;
        self.check_finite(name, &tensor)?;
        Ok(tensor)
    }

    /// Some rows of a vector, or some rows and columns of a matrix, whose whole shape is `shape`; nothing else is read.
    pub fn part(
        &self,
        name: &str,
        shape: &[i64],
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Tensor, LoadError> {
        let (entry, mapped, kind) = self.find(name, shape)?;
        let width = shape[1..].iter().product::<i64>();
        let columns = if shape.len() == 1 { 0..1 } else { columns };
        let block = Block {
            rows: rows.start as usize..rows.end as usize,
            columns: columns.start as usize..columns.end as usize,
        };
        let part = mapped.block(entry.start, kind, width as usize, block)?;
        self.check_finite(name, &part)?;
        Ok(if shape.len() == 1 { part.view([-1]) } else { part })
    }

    /// One number that is none makes every answer none.
    fn check_finite(&self, name: &str, tensor: &Tensor) -> Result<(), LoadError> {
        if finite::all(tensor) {
            return Ok(());
        }
        let count = tensor.isfinite().logical_not().sum(Kind::Int64).int64_value(&[]);
        Err(LoadError::Weights {
            file: self.file_of(name).to_owned(),
            message: format!(
                "tensor `{name}` holds {count} numbers that are infinite or not a number (NaN), so no answer could be computed: \
                 the file is damaged, or its training diverged"
            ),
        })
    }

    fn find(&self, name: &str, shape: &[i64]) -> Result<(&Entry, &MappedFile, Kind), LoadError> {
        let Some(entry) = self.tensors.get(name) else {
            let file = self
                .files
                .iter()
                .map(|(file, _)| file.as_str())
                .collect::<Vec<_>>()
                .join(", ");
            let message = format!(
                "tensor `{name}` of shape {shape:?} is missing ({} tensors are there)",
                self.tensors.len()
            );
            return Err(LoadError::Weights { file, message });
        };
        let (file, mapped) = &self.files[entry.file];
        let wrong = |message: String| LoadError::Weights {
            file: file.clone(),
            message,
        };
        if entry.shape != shape {
            let message = format!(
                "tensor `{name}` has shape {:?}, config.json makes it {shape:?}",
                entry.shape
            );
            return Err(wrong(message));
        }
        let kind = kind(entry.dtype).ok_or_else(|| {
            wrong(format!(
                "tensor `{name}` is {:?}; BF16, F16 and F32 are supported",
                entry.dtype
            ))
        })?;
        Ok((entry, mapped, kind))
    }

    /// The dtype most bytes are stored in.
    pub fn main_kind(&self) -> Kind {
        let mut bytes: BTreeMap<&str, (usize, Kind)> = BTreeMap::new();
        for entry in self.tensors.values() {
            let Some(kind) = kind(entry.dtype) else { continue };
            let name = match kind {
                Kind::BFloat16 => "bf16",
                Kind::Half => "f16",
                _ => "f32",
            };
            bytes.entry(name).or_insert((0, kind)).0 += entry.end - entry.start;
        }
        bytes
            .into_values()
            .max_by_key(|(bytes, _)| *bytes)
            .map_or(Kind::Float, |(_, kind)| kind)
    }

    /// SHA-256 over config.json and the weight files, each behind its length. The identity of the base.
    pub fn digest(&self) -> Result<Digest, LoadError> {
        let config = std::fs::read(self.folder.join("config.json")).map_err(|error| LoadError::Read {
            file: "config.json".to_owned(),
            error,
        })?;
        let mut hasher = Sha256::new();
        for bytes in std::iter::once(config.as_slice()).chain(self.files.iter().map(|(_, file)| file.bytes()))
        {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
        Ok(Digest(hasher.finalize().into()))
    }
}

/// What a safetensors dtype is in torch, if a decoder can be made of it.
pub fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F16 => Some(Kind::Half),
        Dtype::F32 => Some(Kind::Float),
        _ => None,
    }
}

fn indexed_files(folder: &Path) -> Result<Vec<String>, LoadError> {
    let path = folder.join(INDEX);
    let bytes = std::fs::read(&path).map_err(|error| LoadError::Read {
        file: path.display().to_string(),
        error,
    })?;
    let wrong = |message: &str| LoadError::Config {
        file: INDEX.to_owned(),
        message: message.to_owned(),
    };
    let index: Value =
        serde_json::from_slice(&bytes).map_err(|error| wrong(&format!("is not JSON: {error}")))?;
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| wrong("`weight_map` is missing"))?;
    let mut names: Vec<String> = map
        .values()
        .map(|file| {
            file.as_str()
                .map(str::to_owned)
                .ok_or_else(|| wrong("`weight_map` holds what is not a file name"))
        })
        .collect::<Result<_, _>>()?;
    names.sort();
    names.dedup();
    match names
        .iter()
        .find(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        Some(name) => Err(wrong(&format!("{name:?} is not a file name in this folder"))),
        None => Ok(names),
    }
}
