//! A model in one GGUF file, or in parts (`x-00001-of-00003.gguf`): memory-mapped, its tensors under their Hugging Face
//! names and in that layout's order, its metadata as a config.json; and what a file that is to be written holds (`write`).
//! Not here: the head (core::gguf), the tokenizer (text).

mod config;
mod ggml;
mod names;
#[cfg(test)]
mod tests;
pub(super) mod write;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value as Json};
use tandem_core::gguf::{self as format, Gguf, GgufError, TensorInfo};
use tandem_kernels::mapped::MappedFile;
use tandem_kernels::weight::Quantised;
use tch::{Kind, Tensor};

use super::LoadError;
use config::{Facts, LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS};
pub use ggml::GgmlType;
use ggml::Scaled;
use names::{Named, Undo, checkpoint_name};

impl From<GgufError> for LoadError {
    fn from(GgufError { file, message }: GgufError) -> LoadError {
        LoadError::Weights { file, message }
    }
}

/// What errors call the configuration that is made of the metadata.
pub const CONFIG: &str = "the GGUF's metadata as a config.json";

/// Is it a file that is called as GGUF files are, or that begins as they do (a blob of a cache has no name)? What else is
/// wrong with it is said when it is opened.
pub fn is_gguf(path: &Path) -> bool {
    let is_named = || {
        path.file_name()
            .is_some_and(|name| format::is_name(&name.to_string_lossy()))
    };
    let begins = || {
        let mut magic = [0; 4];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
        read.is_ok() && magic == format::MAGIC
    };
    path.is_file() && (is_named() || begins())
}

/// All parts, the first of which holds the metadata.
pub struct Model {
    parts: Vec<Part>,
}

struct Part {
    file: String,
    mapped: MappedFile,
    head: Gguf,
}

/// A tensor as the file has it, and how it is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub kind: GgmlType,
    undo: Undo,
}

/// A tensor under its Hugging Face name.
pub struct Found {
    pub name: String,
    /// Of [`Model::into_files`].
    pub file: usize,
    pub shape: Vec<i64>,
    pub bytes: Range<usize>,
    pub stored: Stored,
}

impl Model {
    pub fn open(path: &Path) -> Result<Model, LoadError> {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let names = format::siblings(&name).map_err(|why| LoadError::Weights {
            file: name,
            message: why,
        })?;
        let parts: Vec<Part> = names
            .into_iter()
            .map(|name| Part::open(&path.with_file_name(&name), name))
            .collect::<Result<_, _>>()?;
        let model = Model { parts };
        model.check_split()?;
        Ok(model)
    }

    fn metadata(&self) -> &format::Metadata {
        &self.parts[0].head.metadata
    }

    /// The number of parts is in the first one's metadata, too.
    fn check_split(&self) -> Result<(), LoadError> {
        let metadata = self.metadata();
        let parts = self.parts.len();
        if metadata.whole("split.count")?.unwrap_or(1).max(1) != parts as i64 {
            let why = format!("the file's name makes {parts} parts of it");
            return Err(metadata.wrong("split.count", &why).into());
        }
        let tensors: usize = self.parts.iter().map(|part| part.head.tensors.len()).sum();
        match metadata.whole("split.tensors.count")? {
            Some(declared) if declared != tensors as i64 => {
                let why = format!("the {parts} parts have {tensors} together");
                Err(metadata.wrong("split.tensors.count", &why).into())
            }
            _ => Ok(()),
        }
    }

    fn tensor(&self, name: &str) -> Option<(&Part, &TensorInfo)> {
        let of = |part: &'_ Part| part.head.tensors.iter().position(|tensor| tensor.name == name);
        self.parts
            .iter()
            .find_map(|part| Some((part, &part.head.tensors[of(part)?])))
    }

    /// As the config.json of the same model would be.
    pub fn config(&self) -> Result<Map<String, Json>, LoadError> {
        let embedding = "token_embd.weight";
        let Some((_, table)) = self.tensor(embedding) else {
            return Err(LoadError::Weights {
                file: self.parts[0].file.clone(),
                message: format!("the tensor `{embedding}` is missing"),
            });
        };
        let rope_tensor = |name: &str| {
            let Some((part, tensor)) = self.tensor(name) else {
                return Ok(None);
            };
            let (kind, bytes) = part.place(tensor)?;
            let mut numbers = vec![0.0; tensor.shape.iter().product::<i64>() as usize];
            kind.dequantise(&part.mapped.bytes()[bytes], &mut numbers);
            Ok(Some(numbers))
        };
        Ok(config::config(&Facts {
            metadata: self.metadata(),
            vocab: table.shape[0],
            has_head: self.tensor("output.weight").is_some(),
            has_biases: ["attn_q", "ffn_up"].map(|part| self.tensor(&format!("blk.0.{part}.bias")).is_some()),
            rope_tensor: &rope_tensor,
        })?)
    }

    /// Every tensor of the model. One that has no place in a checkpoint keeps its name, so that it is refused with it.
    pub fn tensors(&self) -> Result<Vec<Found>, LoadError> {
        let (wiring, heads) = config::wiring(self.metadata())?;
        let mut found: Vec<Found> = vec![];
        for (file, part) in self.parts.iter().enumerate() {
            for tensor in &part.head.tensors {
                // Part of the configuration.
                if [ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS].contains(&tensor.name.as_str()) {
                    continue;
                }
                let own = || Named {
                    name: tensor.name.clone(),
                    undo: Undo::Nothing,
                };
                let Named { name, undo } = checkpoint_name(&tensor.name, wiring, heads).unwrap_or_else(own);
                let (kind, bytes) = part.place(tensor)?;
                if let Undo::PairedRows { heads } = undo
                    && tensor.shape[0] % (heads * 2) != 0
                {
                    let why = format!("its {} rows are not {heads} heads of pairs", tensor.shape[0]);
                    return Err(part.wrong(tensor, why).into());
                }
                if found
                    .iter()
                    .any(|earlier| earlier.file != file && earlier.name == name)
                {
                    return Err(part.wrong(tensor, "another part has it, too".to_owned()).into());
                }
                found.push(Found {
                    name,
                    file,
                    shape: tensor.shape.clone(),
                    bytes,
                    stored: Stored { kind, undo },
                });
            }
        }
        Ok(found)
    }

    pub fn into_files(self) -> Vec<(String, MappedFile)> {
        self.parts
            .into_iter()
            .map(|part| (part.file, part.mapped))
            .collect()
    }
}

impl Part {
    fn open(path: &Path, file: String) -> Result<Part, LoadError> {
        let mapped = MappedFile::open(path).map_err(|error| LoadError::Read {
            file: path.display().to_string(),
            error,
        })?;
        let bytes = mapped.bytes();
        let head = Gguf::read(bytes, bytes.len() as u64, &file)?;
        Ok(Part { file, mapped, head })
    }

    fn wrong(&self, tensor: &TensorInfo, why: String) -> GgufError {
        GgufError {
            file: self.file.clone(),
            message: format!("tensor `{}`: {why}", tensor.name),
        }
    }

    /// Type and place in the file, which holds all of it.
    fn place(&self, tensor: &TensorInfo) -> Result<(GgmlType, Range<usize>), GgufError> {
        let kind = GgmlType::of(tensor.type_id).map_err(|name| {
            let read = GgmlType::names();
            self.wrong(
                tensor,
                format!("its numbers are stored as {name}; {read} are read"),
            )
        })?;
        let width = tensor.shape[tensor.shape.len() - 1];
        if width % kind.unit() as i64 != 0 {
            let (name, group) = (kind.name(), kind.unit());
            return Err(self.wrong(
                tensor,
                format!("rows of {width} numbers are not whole groups of {group}, as {name} has"),
            ));
        }
        let bytes = kind.bytes(tensor.shape.iter().product::<i64>() as usize) as u64;
        let start = self.head.data_start.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(bytes));
        match (start, end, self.mapped.bytes().len() as u64) {
            (Some(start), Some(end), file) if end <= file => Ok((kind, start as usize..end as usize)),
            (_, _, file) => Err(self.wrong(
                tensor,
                format!(
                    "its {bytes} bytes begin at byte {} of a file of {file} bytes: it is cut off, or not yet downloaded whole",
                    self.head.data_start.saturating_add(tensor.offset)
                ),
            )),
        }
    }
}

impl Stored {
    pub fn is_quantised(&self) -> bool {
        self.kind.scaled().is_some()
    }

    /// Bytes of so many numbers as [`Stored::quantised`] has them, at most.
    pub fn kept_bytes(&self, numbers: u64) -> Option<u64> {
        let Scaled {
            group,
            has_offsets,
            grid,
            ..
        } = self.kind.scaled()?;
        let of_group = if has_offsets { 8 } else { 4 };
        Some(numbers * grid.bits() as u64 / 8 + numbers / group as u64 * of_group)
    }

    /// Rows of the tensor in these bytes as the kernels keep quantised weights: the same numbers, in their bits. (A type of 5
    /// or 6 bits takes 8.) `None` for floating-point numbers, and where these are changed.
    pub fn quantised(&self, bytes: &[u8], rows: Range<usize>, width: usize) -> Option<Quantised> {
        let Stored { kind, undo } = *self;
        let Scaled {
            group,
            has_offsets,
            grid,
            shift,
            ..
        } = kind.scaled().filter(|_| undo != Undo::AddedOne)?;
        let (row_bytes, groups) = (kind.bytes(width), width / group);
        let all_rows = bytes.len() / row_bytes;
        let mut codes = vec![0; rows.len() * width];
        let mut scales = vec![0.0; rows.len() * groups];
        let mut offsets = vec![0.0; rows.len() * groups];
        for (i, row) in rows.clone().enumerate() {
            let at = undo.stored_row(row, all_rows) * row_bytes;
            kind.split(
                &bytes[at..at + row_bytes],
                &mut codes[i * width..][..width],
                &mut scales[i * groups..][..groups],
                &mut offsets[i * groups..][..groups],
            );
        }
        for (offset, scale) in offsets.iter_mut().zip(&scales) {
            *offset += f32::from(shift) * scale;
        }
        // A code of 4 bits stands for itself less 8, one of 8 bits is a signed byte.
        let lowest = if grid.bits() == 4 { 8 } else { 0 };
        let codes: Vec<u8> = codes
            .iter()
            .map(|&number| (number - shift + lowest) as u8)
            .collect();
        let matrix = |numbers: &[f32]| Tensor::from_slice(numbers).view([rows.len() as i64, groups as i64]);
        Some(Quantised {
            grid,
            codes: Tensor::from_slice(&codes).view([rows.len() as i64, width as i64]),
            group: group as i64,
            scales: matrix(&scales),
            offsets: has_offsets.then(|| matrix(&offsets)),
        })
    }

    /// Rows and columns of the tensor in these bytes, `width` numbers a row, in float32.
    pub fn read(&self, bytes: &[u8], rows: Range<usize>, columns: Range<usize>, width: usize) -> Tensor {
        let Stored { kind, undo } = *self;
        let row_bytes = kind.bytes(width);
        let all_rows = bytes.len() / row_bytes;
        let mut numbers = vec![0.0; rows.len() * columns.len()];
        let mut whole = vec![0.0; width];
        for (out, row) in numbers.chunks_exact_mut(columns.len().max(1)).zip(rows.clone()) {
            let at = undo.stored_row(row, all_rows) * row_bytes;
            kind.dequantise(&bytes[at..at + row_bytes], &mut whole);
            out.copy_from_slice(&whole[columns.clone()]);
        }
        if undo == Undo::AddedOne {
            numbers.iter_mut().for_each(|x| *x -= 1.0);
        }
        let shape = [rows.len() as i64, columns.len() as i64];
        Tensor::from_slice(&numbers).view(shape)
    }

    /// What it is nearest to in torch, for the choice of what a decoder computes in.
    pub fn torch_kind(&self) -> Kind {
        match self.kind {
            GgmlType::F32 => Kind::Float,
            GgmlType::F16 => Kind::Half,
            _ => Kind::BFloat16,
        }
    }
}

impl Undo {
    /// Where row `row` of a checkpoint's tensor is in the file.
    fn stored_row(self, row: usize, rows: usize) -> usize {
        let Undo::PairedRows { heads } = self else {
            return row;
        };
        let head = rows / heads as usize;
        let (first, inside) = (row / head * head, row % head);
        first + inside % (head / 2) * 2 + inside / (head / 2)
    }
}
