//! An adapter added into its base (`W + scale B A` in float32, rounded once to what W is stored in): the base's files, byte
//! for byte but for what the adapter changes, or one GGUF file. Bytes are computed as they are read, one tensor at a time, so
//! that who asks may write them to a disk or send them on.

mod untied;

use std::collections::HashMap;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use tandem_core::gguf::{Value, aligned};
use tandem_core::job::LM_HEAD;
use tandem_kernels::finite;
use tch::{Kind, Tensor};

use super::export::{begin, cannot, others};
use super::gguf::write::{Conversion, Plan, Planned, plan};
use super::{Checkpoint, EMBED_PATH, INDEX, LoadError, WEIGHTS, kind, text_name};
use crate::family::{self, DecoderSpec, Head, LinearId};
use crate::lora::params::{AdapterParams, LinearShape, PartShape};
use crate::lora::peft::{self, PeftError};
use untied::Untied;

#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    #[error(transparent)]
    Base(#[from] LoadError),
    #[error(transparent)]
    Adapter(#[from] PeftError),
    #[error("{0}")]
    Cannot(String),
}

/// What was written.
pub struct Merged {
    pub bytes: u64,
    /// Matrices that the adapter changed.
    pub changed: usize,
    /// What has no effect, or is not as its writer may think.
    pub notes: Vec<String>,
}

/// A base and an adapter that can be one.
pub struct Merge {
    base: PathBuf,
    /// Of the merged model.
    spec: DecoderSpec,
    /// The base ties its head to the embedding, and the adapter changes it.
    untied: Option<Untied>,
    checkpoint: Checkpoint,
    params: AdapterParams,
    /// By the module's path: which part of which linear.
    parts: HashMap<String, (LinearId, usize)>,
    notes: Vec<String>,
}

/// A file that a merge makes.
pub struct File {
    pub name: String,
    pub bytes: u64,
    pieces: Vec<Piece>,
}

enum Piece {
    Made(Vec<u8>),
    /// Of the base's weight file of this number.
    Stored(usize, Range<usize>),
    /// A whole file.
    Copied(PathBuf),
    /// With what the adapter changes of it.
    Tensor {
        name: String,
        shape: Vec<i64>,
        kind: Kind,
        conversion: Option<Conversion>,
    },
}

/// Writes the model in the folder `base` with the PEFT folder `adapter` in it to the new folder `to`.
pub fn merge(base: &Path, adapter: &Path, to: &Path) -> Result<Merged, MergeError> {
    let merge = Merge::open(base, adapter)?;
    let files = merge.folder()?;
    begin(to)?;
    merge.write(&files, to)
}

impl Merge {
    /// All that can be wrong with the two is found here.
    pub fn open(base: &Path, adapter: &Path) -> Result<Merge, MergeError> {
        if !base.is_dir() {
            let message = format!(
                "{} is no folder of safetensors: only into such a one an adapter is merged",
                base.display()
            );
            return Err(MergeError::Cannot(message));
        }
        let (mut spec, checkpoint) = family::open(base)?;
        if let Some(kind) = checkpoint.quantization() {
            let message = format!(
                "{} is quantised ({kind}): merge into the checkpoint it was made from, then `tandem quantize` that",
                base.display()
            );
            return Err(MergeError::Cannot(message));
        }
        let loaded = peft::read(adapter, &spec, u32::MAX)?;
        peft::check_copies(adapter, base, &spec)?;
        let mut parts = HashMap::new();
        for (id, linear) in loaded.params.shape.iter() {
            for (number, part) in linear.parts.iter().enumerate() {
                parts.insert(part.path.clone(), (id, number));
            }
        }
        let mut untied = None;
        // A table that is changed is no more the other one.
        if spec.head == Head::Tied && [LM_HEAD, EMBED_PATH].iter().any(|path| parts.contains_key(*path)) {
            untied = Some(Untied::of(&spec, &checkpoint, base)?);
            spec.head = Head::Own;
        }
        let stored = |path: &str| checkpoint.has(checkpoint.table_name(&format!("{path}.weight")));
        if let Some(path) = parts.keys().find(|path| !stored(path)) {
            let message = format!(
                "the adapter changes `{path}`, which {} holds inside another tensor: serve the adapter beside the base",
                base.display()
            );
            return Err(MergeError::Cannot(message));
        }
        let merge = Merge {
            base: base.to_owned(),
            spec,
            untied,
            checkpoint,
            params: loaded.params,
            parts,
            notes: loaded.notes,
        };
        for (path, (linear, part)) in merge.parts.iter().map(|(path, at)| (path, merge.part(*at))) {
            let name = format!("{path}.weight");
            let shape = match linear.is_embedding() {
                true => [linear.inputs, part.width()],
                false => [part.width(), linear.inputs],
            };
            let sum = merge.tensor(&name, &shape)?;
            if !finite::all(&sum) {
                let message = format!(
                    "`{name}` with the adapter in it holds numbers that {:?} cannot: it would answer nothing",
                    sum.kind()
                );
                return Err(MergeError::Cannot(message));
            }
        }
        Ok(merge)
    }

    /// Rows for tokens.
    pub fn vocab(&self) -> usize {
        self.spec.vocab as usize
    }

    /// The merged model as a folder like the base's: names, sizes and order are as they were.
    pub fn folder(&self) -> Result<Vec<File>, MergeError> {
        let mut files = vec![];
        for (number, (name, file)) in self.checkpoint.files.iter().enumerate() {
            let (mut pieces, mut bytes) = (self.pieces(number)?, file.bytes().len());
            if let Some(table) = self.untied.as_ref().and_then(|untied| untied.added_to(number)) {
                bytes = table.add(name, file.bytes(), &mut pieces)?;
            }
            files.push(File {
                name: name.clone(),
                bytes: bytes as u64,
                pieces,
            });
        }
        let mut rest = others(&self.base)?;
        if !self.base.join(WEIGHTS).exists() {
            rest.push((INDEX.to_owned(), self.base.join(INDEX)));
        }
        for (name, path) in rest {
            if let Some(untied) = &self.untied
                && let Some(text) = untied.said_in(&name, &path)?
            {
                files.push(File {
                    name,
                    bytes: text.len() as u64,
                    pieces: vec![Piece::Made(text)],
                });
                continue;
            }
            let bytes = std::fs::metadata(&path)
                .map_err(|error| cannot(&path, error))?
                .len();
            files.push(File {
                name,
                bytes,
                pieces: vec![Piece::Copied(path)],
            });
        }
        Ok(files)
    }

    /// The merged model as a GGUF file for a model called `model`, with the tokenizer's keys in it.
    pub fn gguf(&mut self, model: &str, tokenizer: Vec<(String, Value)>) -> Result<File, MergeError> {
        let Plan { head, tensors, notes } = plan(&self.base, &self.spec, &self.checkpoint, model, tokenizer)?;
        self.notes.extend(notes);
        let mut bytes = head.len() as u64;
        let mut pieces = vec![Piece::Made(head)];
        for tensor in tensors {
            let padded = aligned(tensor.bytes());
            let padding = padded - tensor.bytes();
            bytes += padded;
            pieces.push(match tensor {
                Planned::Numbers(numbers) => {
                    Piece::Made(numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
                }
                Planned::Stored {
                    name,
                    shape,
                    kind,
                    conversion,
                } => Piece::Tensor {
                    name,
                    shape,
                    kind,
                    conversion: Some(conversion),
                },
            });
            pieces.push(Piece::Made(vec![0; padding as usize]));
        }
        Ok(File {
            name: format!("{model}.gguf"),
            bytes,
            pieces,
        })
    }

    /// Its bytes, from the first to the last.
    pub fn read<'a>(&'a self, file: &'a File) -> impl Read + 'a {
        Reading {
            merge: self,
            pieces: file.pieces.iter(),
            now: Box::new(io::empty()),
        }
    }

    /// Into the folder `to`, which is there.
    pub fn write(&self, files: &[File], to: &Path) -> Result<Merged, MergeError> {
        let mut bytes = 0;
        for file in files {
            let path = to.join(&file.name);
            let written = std::fs::File::create_new(&path)
                .and_then(|mut out| io::copy(&mut self.read(file), &mut out))
                .map_err(|error| cannot(&path, error))?;
            bytes += written;
        }
        Ok(Merged {
            bytes,
            changed: self.parts.len(),
            notes: self.notes.clone(),
        })
    }

    /// One of the base's files: what is changed, and what is between.
    fn pieces(&self, file: usize) -> Result<Vec<Piece>, LoadError> {
        let (name, mapped) = &self.checkpoint.files[file];
        let damaged = |message: String| LoadError::Weights {
            file: name.clone(),
            message,
        };
        let (head, metadata) =
            SafeTensors::read_metadata(mapped.bytes()).map_err(|error| damaged(error.to_string()))?;
        // Before the head stands its length, in 8 bytes.
        let data = 8 + head;
        let (mut pieces, mut from) = (vec![], 0);
        for tensor in metadata.offset_keys() {
            let info = metadata.info(&tensor).expect("it is listed");
            let plain = text_name(&tensor).unwrap_or_else(|| tensor.clone());
            let module = plain.strip_suffix(".weight");
            if module.is_none_or(|module| !self.parts.contains_key(module)) {
                continue;
            }
            let kind = kind(info.dtype).ok_or_else(|| {
                damaged(format!(
                    "`{tensor}` is {:?}; BF16, F16 and F32 are merged into",
                    info.dtype
                ))
            })?;
            let (start, end) = info.data_offsets;
            pieces.push(Piece::Stored(file, from..data + start));
            pieces.push(Piece::Tensor {
                name: plain,
                shape: info.shape.iter().map(|&size| size as i64).collect(),
                kind,
                conversion: None,
            });
            from = data + end;
        }
        pieces.push(Piece::Stored(file, from..mapped.bytes().len()));
        Ok(pieces)
    }

    fn part(&self, (linear, part): (LinearId, usize)) -> (&LinearShape, &PartShape) {
        let linear = self.params.shape.linear(linear).expect("it is adapted");
        (linear, &linear.parts[part])
    }

    /// A tensor of the base as it is stored, with the adapter's product in it where there is one.
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, LoadError> {
        let stored = self.checkpoint.tensor(self.checkpoint.table_name(name), shape)?;
        let at = name
            .strip_suffix(".weight")
            .and_then(|module| self.parts.get(module));
        let Some(&at) = at else { return Ok(stored) };
        let (linear, part) = self.part(at);
        let product = self.params.b(part).matmul(&self.params.part_a(linear, part));
        let product = if linear.is_embedding() {
            product.tr()
        } else {
            product
        };
        let sum = stored.to_kind(Kind::Float) + product * part.scale;
        let sum = match self.params.magnitude(part) {
            None => sum,
            // DoRA: each row as long as its magnitude.
            Some(magnitude) => {
                let norm = sum
                    .square()
                    .sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
                    .sqrt();
                sum * (magnitude / norm).unsqueeze(1)
            }
        };
        Ok(sum.to_kind(stored.kind()))
    }
}

struct Reading<'a> {
    merge: &'a Merge,
    pieces: std::slice::Iter<'a, Piece>,
    /// Of the piece before those.
    now: Box<dyn Read + 'a>,
}

impl<'a> Reading<'a> {
    fn begin(&self, piece: &'a Piece) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match piece {
            Piece::Made(bytes) => Box::new(bytes.as_slice()),
            Piece::Stored(file, range) => {
                let (_, mapped) = &self.merge.checkpoint.files[*file];
                Box::new(&mapped.bytes()[range.clone()])
            }
            Piece::Copied(path) => Box::new(std::fs::File::open(path)?),
            Piece::Tensor {
                name,
                shape,
                kind,
                conversion,
            } => {
                let tensor = self.merge.tensor(name, shape).map_err(io::Error::other)?;
                let tensor = match conversion {
                    // In float32, so that what is added is not rounded to less.
                    Some(conversion) => conversion.of(tensor.to_kind(*kind)),
                    None => tensor,
                };
                let tensor = tensor.contiguous();
                let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
                tensor.copy_data_u8(&mut bytes, tensor.numel());
                Box::new(io::Cursor::new(bytes))
            }
        })
    }
}

impl Read for Reading<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.now.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            match self.pieces.next() {
                Some(piece) => self.now = self.begin(piece)?,
                None => return Ok(0),
            }
        }
    }
}
