//! An adapter added into its base: the base's files written anew under their names, each tensor as it was but for those
//! that the adapter changes (`W + scale B A` in float32, rounded once to what W is stored in).

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors, View};
use tandem_kernels::finite;
use tch::{Kind, Tensor};

use super::export::{begin, cannot, copy_others};
use super::{INDEX, LoadError, WEIGHTS, kind, text_name};
use crate::family;
use crate::lora::params::{AdapterParams, LinearShape, PartShape};
use crate::lora::peft::{self, PeftError};

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
    /// Of the adapter's folder: what has no effect.
    pub notes: Vec<String>,
}

/// Writes the model in the folder `base` with the PEFT folder `adapter` in it to the new folder `to`.
pub fn merge(base: &Path, adapter: &Path, to: &Path) -> Result<Merged, MergeError> {
    if !base.is_dir() {
        let message = format!(
            "{} is no folder of safetensors: only into such a one an adapter is merged",
            base.display()
        );
        return Err(MergeError::Cannot(message));
    }
    let (spec, checkpoint) = family::open(base)?;
    if let Some(kind) = checkpoint.quantization() {
        let message = format!(
            "{} is quantised ({kind}): merge into the checkpoint it was made from, then `tandem quantize` that",
            base.display()
        );
        return Err(MergeError::Cannot(message));
    }
    let loaded = peft::read(adapter, &spec, u32::MAX)?;
    let mut parts = HashMap::new();
    for (_, linear) in loaded.params.shape.iter() {
        for part in &linear.parts {
            parts.insert(part.path.as_str(), (linear, part));
        }
    }
    let stored = |path: &str| checkpoint.has(&format!("{path}.weight"));
    if let Some(path) = parts.keys().find(|path| !stored(path)) {
        let message = format!(
            "the adapter changes `{path}`, which {} holds inside another tensor: serve the adapter beside the base",
            base.display()
        );
        return Err(MergeError::Cannot(message));
    }
    let sum = Sum {
        params: &loaded.params,
        parts,
    };
    for (name, file) in &checkpoint.files {
        sum.check(name, file.bytes())?;
    }
    begin(to)?;
    let mut merged = Merged {
        bytes: 0,
        changed: sum.parts.len(),
        notes: loaded.notes,
    };
    for (name, file) in &checkpoint.files {
        merged.bytes += sum.write(name, file.bytes(), &to.join(name))?;
    }
    // Names, files and sizes are as they were.
    if !base.join(WEIGHTS).exists() {
        let (from, to) = (base.join(INDEX), to.join(INDEX));
        std::fs::copy(&from, to).map_err(|error| cannot(&from, error))?;
    }
    copy_others(base, to, None)?;
    Ok(merged)
}

/// A base's tensors with an adapter's products in them.
struct Sum<'a> {
    params: &'a AdapterParams,
    /// By the module's path.
    parts: HashMap<&'a str, (&'a LinearShape, &'a PartShape)>,
}

impl Sum<'_> {
    /// Whether all of one file of the base can be written.
    fn check(&self, file: &str, bytes: &[u8]) -> Result<(), MergeError> {
        for (name, view) in tensors(file, bytes)?.iter() {
            let Some((linear, part)) = self.part(name) else {
                continue;
            };
            let expected = [part.width() as usize, linear.inputs as usize];
            if view.shape() != expected || kind(view.dtype()).is_none() {
                let message = format!(
                    "`{name}` is stored as {:?} of {:?}, the adapter wants {expected:?} in 16 or 32 bits",
                    view.shape(),
                    view.dtype()
                );
                return Err(MergeError::Cannot(message));
            }
            if !finite::all(&self.of(&view, linear, part)) {
                let message = format!(
                    "`{name}` with the adapter in it holds numbers that {:?} cannot: it would answer nothing",
                    view.dtype()
                );
                return Err(MergeError::Cannot(message));
            }
        }
        Ok(())
    }

    /// One file of the base. Returns its bytes.
    fn write(&self, file: &str, bytes: &[u8], to: &Path) -> Result<u64, MergeError> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| damaged(file, error))?;
        let tensors = tensors(file, bytes)?;
        let entries = tensors.iter().map(|(name, view)| {
            let part = self.part(name);
            let sum = self;
            (name, Entry { sum, view, part })
        });
        safetensors::serialize_to_file(entries, metadata.metadata().clone(), to)
            .map_err(|error| damaged(file, error))?;
        let written = std::fs::metadata(to).map_err(|error| cannot(to, error))?;
        Ok(written.len())
    }

    fn part(&self, tensor: &str) -> Option<(&LinearShape, &PartShape)> {
        let plain = text_name(tensor);
        let module = plain.as_deref().unwrap_or(tensor).strip_suffix(".weight")?;
        self.parts.get(module).copied()
    }

    fn of(&self, view: &TensorView, linear: &LinearShape, part: &PartShape) -> Tensor {
        let kind = kind(view.dtype()).expect("it was checked");
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let base = Tensor::from_data_size(view.data(), &shape, kind).to_kind(Kind::Float);
        let product = self.params.b(part).matmul(&self.params.part_a(linear, part));
        let sum = base + product * part.scale;
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
        sum.to_kind(kind)
    }
}

fn tensors<'a>(file: &str, bytes: &'a [u8]) -> Result<SafeTensors<'a>, LoadError> {
    SafeTensors::deserialize(bytes).map_err(|error| damaged(file, error))
}

fn damaged(file: &str, error: SafeTensorError) -> LoadError {
    LoadError::Weights {
        file: file.to_owned(),
        message: error.to_string(),
    }
}

/// A tensor as it will be; computed when it is written, so that one at a time is in memory.
struct Entry<'a> {
    sum: &'a Sum<'a>,
    view: TensorView<'a>,
    part: Option<(&'a LinearShape, &'a PartShape)>,
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        self.view.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.view.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Some((linear, part)) = self.part else {
            return Cow::Borrowed(self.view.data());
        };
        let tensor = self.sum.of(&self.view, linear, part).contiguous();
        let mut bytes = vec![0; self.data_len()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.view.data().len()
    }
}
