//! A checkpoint in Hugging Face layout: `model.safetensors`, or shards with `model.safetensors.index.json`; or a GGUF file
//! that is read as if it were one (`gguf`). Files are memory-mapped and a tensor is read when it is asked for. Not here:
//! what the tensors mean.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tandem_core::lfs;
use tandem_kernels::finite;
use tandem_kernels::mapped::{Block, MappedFile};
use tandem_kernels::weight::Quantised;
use tch::{Kind, Tensor};

use crate::family::Head;

mod digest;
mod export;
mod folder;
pub mod gguf;
mod matrix;
mod merge;
mod quantised;

pub use export::{Exported, quantize};
pub use folder::check_folder;
pub use matrix::Matrix;
pub use merge::{File, Merge, MergeError, Merged, merge};
pub use quantised::QUANTIZATIONS;
use quantised::QuantisedTensors;

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

/// What a folder's model is.
pub const CONFIG: &str = "config.json";
/// The single weight file's name.
pub const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The embedding table and the output head as checkpoints name them.
pub const EMBED: &str = "model.embed_tokens.weight";
pub const EMBED_PATH: &str = "model.embed_tokens";
pub const HEAD: &str = "lm_head.weight";
/// Does the model have weights at all? (One to be made is a folder with only its config.json and tokenizer.)
pub fn has_weights(model: &Path) -> bool {
    gguf::is_gguf(model) || [WEIGHTS, INDEX].iter().any(|file| model.join(file).exists())
}

pub struct Checkpoint {
    /// A folder, or a GGUF file.
    path: PathBuf,
    files: Vec<(String, MappedFile)>,
    tensors: HashMap<String, Entry>,
    /// Which of them are parts of quantised matrices.
    quantised: Option<QuantisedTensors>,
    notes: Vec<String>,
    /// Bytes of tensors that were read so far, for who looks on.
    read_bytes: AtomicU64,
}

#[derive(Clone)]
struct Entry {
    file: usize,
    stored: Stored,
    shape: Vec<i64>,
    /// Bytes inside the file.
    start: usize,
    end: usize,
}

/// How a tensor's numbers are stored.
#[derive(Clone, PartialEq)]
enum Stored {
    Plain(Dtype),
    Gguf(gguf::Stored),
}

impl Stored {
    /// What it is nearest to in torch, if a decoder can be made of it.
    fn kind(&self) -> Option<Kind> {
        match self {
            Stored::Plain(dtype) => kind(*dtype),
            Stored::Gguf(stored) => Some(stored.torch_kind()),
        }
    }
}

impl Checkpoint {
    /// As transformers: one whole file goes before shards, and of a tensor in two shards the last one is taken.
    pub fn open(folder: &Path) -> Result<Checkpoint, LoadError> {
        if gguf::is_gguf(folder) {
            return Checkpoint::of_gguf(folder);
        }
        let mut checkpoint = Checkpoint {
            path: folder.to_owned(),
            files: vec![],
            tensors: HashMap::new(),
            quantised: None,
            notes: vec![],
            read_bytes: AtomicU64::new(0),
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
        checkpoint.take_text_part();
        let names: Vec<&str> = checkpoint.tensors.keys().map(String::as_str).collect();
        checkpoint.quantised = QuantisedTensors::find(folder, &names)?;
        let note = checkpoint.quantised.as_ref().and_then(QuantisedTensors::note);
        checkpoint.notes.extend(note);
        Ok(checkpoint)
    }

    /// Of a model of several parts: its text part, under the names that it has alone.
    fn take_text_part(&mut self) {
        if !self.tensors.keys().any(|name| text_name(name).is_some()) {
            return;
        }
        let tensors = std::mem::take(&mut self.tensors).into_iter();
        self.tensors = tensors
            .filter_map(|(name, entry)| match name.starts_with("lm_head.") {
                true => Some((name, entry)),
                false => Some((text_name(&name)?, entry)),
            })
            .collect();
    }

    fn of_gguf(path: &Path) -> Result<Checkpoint, LoadError> {
        let model = gguf::Model::open(path)?;
        let tensors = model.tensors()?.into_iter().map(|found| {
            let entry = Entry {
                file: found.file,
                stored: Stored::Gguf(found.stored),
                shape: found.shape,
                start: found.bytes.start,
                end: found.bytes.end,
            };
            (found.name, entry)
        });
        Ok(Checkpoint {
            path: path.to_owned(),
            tensors: tensors.collect(),
            quantised: None,
            notes: vec![],
            read_bytes: AtomicU64::new(0),
            files: model.into_files(),
        })
    }

    fn add(&mut self, name: String) -> Result<(), LoadError> {
        let path = self.path.join(&name);
        let mapped = MappedFile::open(&path).map_err(|error| LoadError::Read {
            file: path.display().to_string(),
            error,
        })?;
        let damaged = |message: String| LoadError::Weights {
            file: name.clone(),
            message,
        };
        let bytes = mapped.bytes();
        if let Some(pointer) = lfs::pointer(bytes) {
            return Err(damaged(pointer));
        }
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
                stored: Stored::Plain(view.dtype()),
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

    /// Of all tensors, and of those that were read so far.
    pub fn progress(&self) -> (u64, u64) {
        let bytes = self
            .tensors
            .values()
            .map(|entry| (entry.end - entry.start) as u64);
        (bytes.sum(), self.read_bytes.load(Ordering::Relaxed))
    }

    /// Asks the operating system for all files at once, each by a thread of its own, instead of page by page as tensors
    /// are reached. Returns when it was asked.
    pub fn read_ahead(&self) {
        std::thread::scope(|scope| {
            for (_, file) in &self.files {
                scope.spawn(|| file.read_ahead());
            }
        });
    }

    /// For the log: what is there and not taken.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Of the parameters that are there: tensors, and what parts of quantised matrices make. In order, so that messages are
    /// the same each time.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let mut names: Vec<&str> = match &self.quantised {
            None => self.tensors.keys().map(String::as_str).collect(),
            Some(quantised) => {
                let tensors = self.tensors.keys().map(String::as_str);
                let whole = tensors.filter(|name| !quantised.is_part(name));
                whole.chain(quantised.parameters()).collect()
            }
        };
        names.sort_unstable();
        names.into_iter()
    }

    /// The file of a parameter that is there.
    pub fn file_of(&self, name: &str) -> &str {
        let part = || {
            let mut parts = self.quantised.as_ref()?.parts_of(name)?;
            parts.find_map(|part| self.tensors.get(&part))
        };
        let entry = self.tensors.get(name).or_else(part);
        &self.files[entry.expect("it is there").file].0
    }

    fn file_names(&self) -> String {
        let files: Vec<&str> = self.files.iter().map(|(file, _)| file.as_str()).collect();
        files.join(", ")
    }

    /// How its matrices are quantised, as `--quantization` names it.
    pub fn quantization(&self) -> Option<&str> {
        let is_gguf = |entry: &Entry| matches!(&entry.stored, Stored::Gguf(stored) if stored.is_quantised());
        match &self.quantised {
            Some(quantised) => Some(quantised.kind()),
            None => self.tensors.values().any(is_gguf).then_some("gguf"),
        }
    }

    /// Bytes of a quantised parameter in memory, about.
    pub fn quantised_bytes(&self, name: &str) -> Option<u64> {
        if let Some(Stored::Gguf(stored)) = self.tensors.get(name).map(|entry| &entry.stored) {
            let numbers: i64 = self.tensors[name].shape.iter().product();
            return stored.kept_bytes(numbers as u64);
        }
        let parts = self.quantised.as_ref()?.parts_of(name)?;
        let entries = parts.filter_map(|part| self.tensors.get(&part));
        Some(entries.map(|entry| (entry.end - entry.start) as u64).sum())
    }

    /// Are both there, with different numbers?
    pub fn differ(&self, one: &str, other: &str) -> bool {
        let bytes = |name| {
            let entry: &Entry = self.tensors.get(name)?;
            let bytes = &self.files[entry.file].1.bytes()[entry.start..entry.end];
            Some((&entry.stored, bytes))
        };
        match (bytes(one), bytes(other)) {
            (Some(one), Some(other)) => one != other,
            _ => false,
        }
    }

    /// Is the one another name of the other? safetensors' `save_model` writes a tied table once, and the second name beside it.
    pub fn are_one(&self, one: &str, other: &str) -> bool {
        let place = |name| {
            self.tensors
                .get(name)
                .map(|entry: &Entry| (entry.file, entry.start))
        };
        place(one).is_some() && place(one) == place(other)
    }

    pub fn has(&self, name: &str) -> bool {
        let quantised = self
            .quantised
            .as_ref()
            .and_then(|quantised| quantised.parts_of(name));
        self.tensors.contains_key(name) || quantised.is_some()
    }

    /// Where a parameter stands. Of a tied table, saved once, some savers kept the head's name (safetensors allows one
    /// name for one memory, and `lm_head` sorts first).
    pub fn stored_name<'a>(&self, name: &'a str, head: Head) -> &'a str {
        match head {
            Head::Tied if name == EMBED && !self.has(EMBED) => HEAD,
            _ => name,
        }
    }

    /// Where a model that is to have both a head and an embedding finds them: in a tied one both are the one table.
    pub fn table_name<'a>(&self, name: &'a str) -> &'a str {
        match name {
            EMBED if !self.has(EMBED) => HEAD,
            HEAD if !self.has(HEAD) => EMBED,
            name => name,
        }
    }

    /// The tensor as stored (bf16, f16 or f32; of a GGUF in f32): convert or pack it, do not keep it.
    pub fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let (rows, columns) = (shape[0], shape[1..].iter().product());
        Ok(self.part(name, shape, 0..rows, 0..columns)?.view(shape))
    }

    /// Some rows of a vector, or some rows and columns of a matrix, whose whole shape is `shape`; nothing else is read.
    pub fn part(
        &self,
        name: &str,
        shape: &[i64],
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Tensor, LoadError> {
        let (entry, mapped) = self.find(name, shape)?;
        let width = shape[1..].iter().product::<i64>() as usize;
        let columns = if shape.len() == 1 { 0..1 } else { columns };
        let rows = rows.start as usize..rows.end as usize;
        let columns = columns.start as usize..columns.end as usize;
        let part = match &entry.stored {
            Stored::Plain(dtype) => {
                let kind = kind(*dtype).ok_or_else(|| LoadError::Weights {
                    file: self.file_of(name).to_owned(),
                    message: format!("tensor `{name}` is {dtype:?}; BF16, F16 and F32 are supported"),
                })?;
                mapped.block(entry.start, kind, width, Block { rows, columns })?
            }
            Stored::Gguf(stored) => {
                let bytes = &mapped.bytes()[entry.start..entry.end];
                stored.read(bytes, rows, columns, width)
            }
        };
        let share = part.numel() as f64 / shape.iter().product::<i64>().max(1) as f64;
        let bytes = ((entry.end - entry.start) as f64 * share) as u64;
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.check_finite(name, &part)?;
        Ok(if shape.len() == 1 { part.view([-1]) } else { part })
    }

    /// Rows of a matrix that a GGUF holds in few bits; `None` where it is stored otherwise.
    fn gguf_rows(&self, name: &str, shape: &[i64], rows: Range<i64>) -> Result<Option<Quantised>, LoadError> {
        let (Some(Stored::Gguf(stored)), &[_, width]) =
            (self.tensors.get(name).map(|entry| &entry.stored), shape)
        else {
            return Ok(None);
        };
        let (entry, mapped) = self.find(name, shape)?;
        let bytes = &mapped.bytes()[entry.start..entry.end];
        let rows = rows.start as usize..rows.end as usize;
        let Some(held) = stored.quantised(bytes, rows, width as usize) else {
            return Ok(None);
        };
        self.check_finite(name, &held.scales)?;
        held.offsets
            .iter()
            .try_for_each(|offsets| self.check_finite(name, offsets))?;
        Ok(Some(held))
    }

    /// A tensor in the dtype it is stored in, of 8-bit floats the bytes; `None` where there is none of this name.
    fn stored(&self, name: &str) -> Option<Result<Tensor, LoadError>> {
        let entry = self.tensors.get(name)?;
        let (file, mapped) = &self.files[entry.file];
        let Stored::Plain(dtype) = &entry.stored else {
            return None;
        };
        let kind = match *dtype {
            Dtype::U8 | Dtype::F8_E4M3 => Kind::Uint8,
            Dtype::I8 => Kind::Int8,
            Dtype::I32 => Kind::Int,
            Dtype::I64 => Kind::Int64,
            other => match kind(other) {
                Some(kind) => kind,
                None => {
                    return Some(Err(LoadError::Weights {
                        file: file.clone(),
                        message: format!(
                            "tensor `{name}` is {other:?}, which no quantised matrix is made of here"
                        ),
                    }));
                }
            },
        };
        self.read_bytes
            .fetch_add((entry.end - entry.start) as u64, Ordering::Relaxed);
        Some(
            mapped
                .tensor(entry.start..entry.end, kind, &entry.shape)
                .map_err(LoadError::Kernel),
        )
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

    fn find(&self, name: &str, shape: &[i64]) -> Result<(&Entry, &MappedFile), LoadError> {
        let Some(entry) = self.tensors.get(name) else {
            let file = self.file_names();
            let message = format!(
                "tensor `{name}` of shape {shape:?} is missing ({} tensors are there)",
                self.tensors.len()
            );
            return Err(LoadError::Weights { file, message });
        };
        let (file, mapped) = &self.files[entry.file];
        if entry.shape != shape {
            let described = match entry.stored {
                Stored::Plain(_) => "config.json",
                Stored::Gguf(_) => "the metadata",
            };
            return Err(LoadError::Weights {
                file: file.clone(),
                message: format!(
                    "tensor `{name}` has shape {:?}, {described} makes it {shape:?}",
                    entry.shape
                ),
            });
        }
        Ok((entry, mapped))
    }

    /// What a tensor that is there is nearest to in torch.
    fn kind_of(&self, name: &str) -> Kind {
        let entry = self.tensors.get(name);
        entry.and_then(|entry| entry.stored.kind()).unwrap_or(Kind::Float)
    }

    /// The dtype most bytes are stored in.
    pub fn main_kind(&self) -> Kind {
        let mut bytes: BTreeMap<&str, (usize, Kind)> = BTreeMap::new();
        for entry in self.tensors.values() {
            let Some(kind) = entry.stored.kind() else { continue };
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
}

/// What a tensor of a text part is called where there is no other part.
pub fn text_name(name: &str) -> Option<String> {
    let (prefix, plain) = text_prefix(name)?;
    Some(name.replacen(prefix, plain, 1))
}

/// How the name of a text part's tensor begins, and what it begins with where there is no other part: in transformers 5
/// and in 4.
pub fn text_prefix(name: &str) -> Option<(&'static str, &'static str)> {
    let prefixes = [("model.language_model.", "model."), ("language_model.", "")];
    prefixes.into_iter().find(|(prefix, _)| name.starts_with(prefix))
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
