//! A head that is tied to the embedding, one of which is adapted: the merged model has two tables where the base has one. The second stands
//! behind the first's file, and the configuration says that they are two.

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use tandem_core::job::LM_HEAD;
use tch::Kind;

use super::{MergeError, Piece};
use crate::family::DecoderSpec;
use crate::weights::export::cannot;
use crate::weights::{CONFIG, Checkpoint, EMBED, HEAD, INDEX, LoadError};

pub(super) struct Untied {
    /// `None`: the base's files have both, which were the same.
    added: Option<Table>,
}

/// A table that the base does not have under this name.
pub(super) struct Table {
    name: &'static str,
    shape: [i64; 2],
    kind: Kind,
    /// What it is added to: the file of the other one.
    file: (usize, String),
}

impl Untied {
    pub fn of(spec: &DecoderSpec, checkpoint: &Checkpoint, base: &Path) -> Result<Untied, MergeError> {
        if checkpoint.has(HEAD) && checkpoint.has(EMBED) && !checkpoint.are_one(HEAD, EMBED) {
            return Ok(Untied { added: None });
        }
        for (number, (file, mapped)) in checkpoint.files.iter().enumerate() {
            let (_, metadata) = read_head(file, mapped.bytes())?;
            let found = [(HEAD, EMBED), (EMBED, HEAD)]
                .into_iter()
                .find(|(other, _)| metadata.contains_key(*other));
            if let Some((other, name)) = found {
                let table = Table {
                    name,
                    shape: [spec.vocab, spec.hidden],
                    kind: checkpoint.kind_of(other),
                    file: (number, file.clone()),
                };
                return Ok(Untied { added: Some(table) });
            }
        }
        Err(MergeError::Cannot(format!(
            "the adapter changes `{LM_HEAD}` or the embedding, which {} ties to each other in one part of several: serve the adapter \
             beside the base",
            base.display()
        )))
    }

    pub fn added_to(&self, file: usize) -> Option<&Table> {
        self.added.as_ref().filter(|table| table.file.0 == file)
    }

    /// A file beside the weights as it is then, where it is another.
    pub fn said_in(&self, name: &str, path: &Path) -> Result<Option<Vec<u8>>, LoadError> {
        if name != CONFIG && name != INDEX {
            return Ok(None);
        }
        let text = std::fs::read(path).map_err(|error| cannot(path, error))?;
        let mut said: Value = serde_json::from_slice(&text).map_err(|error| LoadError::Config {
            file: name.to_owned(),
            message: format!("is not JSON: {error}"),
        })?;
        match (name, &self.added) {
            (CONFIG, _) => said["tie_word_embeddings"] = json!(false),
            (_, None) => return Ok(None),
            (_, Some(table)) => {
                said["weight_map"][table.name] = json!(table.file.1);
                if let Some(total) = said["metadata"]["total_size"].as_u64() {
                    said["metadata"]["total_size"] = json!(total + table.bytes() as u64);
                }
            }
        }
        let text = serde_json::to_string_pretty(&said).expect("JSON");
        Ok(Some((text + "\n").into_bytes()))
    }
}

impl Table {
    /// Stands it behind what `file` holds, which `pieces` say from its head on. Returns how many bytes all of it are.
    pub fn add(&self, file: &str, bytes: &[u8], pieces: &mut Vec<Piece>) -> Result<usize, LoadError> {
        let (length, mut head) = read_head(file, bytes)?;
        let numbers = 8 + length;
        let start = bytes.len() - numbers;
        let end = start + self.bytes();
        let dtype = match self.kind {
            Kind::BFloat16 => "BF16",
            Kind::Half => "F16",
            _ => "F32",
        };
        let entry = json!({"dtype": dtype, "shape": self.shape, "data_offsets": [start, end]});
        head.insert(self.name.to_owned(), entry);
        // Where it was said to be another name of what is there.
        if let Some(Value::Object(said)) = head.get_mut("__metadata__") {
            said.remove(self.name);
        }
        let mut head = Value::Object(head).to_string().into_bytes();
        head.resize(head.len().next_multiple_of(8), b' ');
        let mut made = (head.len() as u64).to_le_bytes().to_vec();
        made.extend(head);
        let total = made.len() + end;
        let Some(Piece::Stored(_, first)) = pieces.first_mut() else {
            unreachable!("a file begins with its head")
        };
        first.start = numbers;
        pieces.insert(0, Piece::Made(made));
        pieces.push(Piece::Tensor {
            name: self.name.to_owned(),
            shape: self.shape.to_vec(),
            kind: self.kind,
            conversion: None,
        });
        Ok(total)
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }
}

/// How long a safetensors file's head is, and what it says of each tensor.
fn read_head(file: &str, bytes: &[u8]) -> Result<(usize, Map<String, Value>), LoadError> {
    let damaged = |message: String| LoadError::Weights {
        file: file.to_owned(),
        message,
    };
    let (length, _) = SafeTensors::read_metadata(bytes).map_err(|error| damaged(error.to_string()))?;
    let head = serde_json::from_slice(&bytes[8..8 + length]).map_err(|error| damaged(error.to_string()))?;
    Ok((length, head))
}
