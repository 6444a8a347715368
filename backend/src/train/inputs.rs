//! What a job starts from, and whether its examples are of the model. Not here: how they are written (core's dataset).

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tandem_core::dataset::{self, Example, Group};
use tandem_core::id::Digest;
use tandem_core::job::{Objective, Rows, files};

use super::{TrainError, state};
use crate::family::DecoderSpec;

/// What a job starts from: the contents of its folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    pub(super) train: Vec<u8>,
    pub(super) valid: Option<Vec<u8>>,
    /// The adapter that the job starts from: its configuration and its tensors.
    pub(super) start: Option<(Vec<u8>, Vec<u8>)>,
    pub(super) state: Option<Vec<u8>>,
    /// What was damaged.
    pub(super) notes: Vec<String>,
}

impl Inputs {
    pub fn read(folder: &Path) -> Result<Inputs, TrainError> {
        let read = |file: &str| {
            std::fs::read(folder.join(file)).map_err(|error| TrainError::File {
                file: file.to_owned(),
                error,
            })
        };
        let read_if_there = |file: &str| folder.join(file).exists().then(|| read(file)).transpose();
        let state::Found { state, notes } = state::read(folder)?;
        Ok(Inputs {
            train: read(files::TRAIN)?,
            valid: read_if_there(files::VALID)?,
            start: read_if_there(files::START_CONFIG)?.zip(read_if_there(files::START_TENSORS)?),
            state,
            notes,
        })
    }

    /// Of the examples: a state goes on with those it was written for.
    pub(super) fn data(&self) -> Digest {
        let mut hasher = Sha256::new();
        let start = self.start.iter().flat_map(|(config, tensors)| [config, tensors]);
        for part in [Some(&self.train), self.valid.as_ref()]
            .into_iter()
            .flatten()
            .chain(start)
        {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Digest(hasher.finalize().into())
    }
}

/// The groups of dataset bytes, which are called `file`.
pub(super) fn groups(
    bytes: &[u8],
    file: &str,
    spec: &DecoderSpec,
    objective: &Objective,
) -> Result<Vec<Group>, TrainError> {
    let groups = dataset::decode(bytes).map_err(|error| TrainError::Damaged(format!("{file}: {error}")))?;
    let size = match objective.rows() {
        Rows::Pairs => 2,
        Rows::Examples | Rows::Judged | Rows::Rewarded => 1,
    };
    for (number, group) in groups.iter().enumerate() {
        if group.examples.len() != size {
            let (n, name) = (group.examples.len(), objective.name());
            return Err(TrainError::Data(format!(
                "{file}: row {number} has {n} sequences, {name} takes {size}"
            )));
        }
        let is_learned = |example: &Example| example.label_tokens() > 0;
        if *objective != Objective::Sft && !group.examples.iter().all(is_learned) {
            return Err(TrainError::Data(format!(
                "{file}: row {number} has a sequence without a token to learn"
            )));
        }
        for example in &group.examples {
            if let Some(token) = example
                .tokens
                .iter()
                .find(|&&token| i64::from(token) >= spec.vocab)
            {
                let vocab = spec.vocab;
                return Err(TrainError::Data(format!(
                    "{file}: example {number} has token {token}, the model has {vocab}"
                )));
            }
            if example.tokens.len() as i64 > spec.max_positions {
                let (n, most) = (example.tokens.len(), spec.max_positions);
                return Err(TrainError::Data(format!(
                    "{file}: example {number} has {n} tokens, the model takes {most}"
                )));
            }
        }
    }
    Ok(groups)
}
