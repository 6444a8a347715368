//! The loss of a model, or of an adapter on it, over examples: what a validation of a run computes, without a run. Not here: rows
//! to tokens (text).

use std::path::Path;

use tandem_core::dataset::Group;
use tandem_core::job::Objective;

use super::TrainError;
use super::inputs::groups;
use super::objective::Scores;
use super::pass::Look;
use super::slice::{self, Slice};
use crate::guard;
use crate::lora::adapter::Adapter;
use crate::lora::peft;
use crate::model::{Decoder, WeightOptions};
use crate::start;

pub struct Evaluation {
    decoder: Decoder,
    adapter: Option<Adapter>,
    slices: Vec<Slice>,
    /// Slices that are scored.
    done: usize,
    scores: Scores,
    /// Of the model and of the adapter, for people.
    pub notes: Vec<String>,
}

/// Means over the labels, by their weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluated {
    pub loss: f64,
    /// Share of labels that were the most likely tokens.
    pub token_accuracy: f64,
    pub labels: u64,
}

impl Evaluation {
    /// `data`: [`tandem_core::dataset`] bytes, called `name`. `adapter`: a PEFT folder.
    pub fn open(
        model_folder: &Path,
        weights: WeightOptions,
        adapter: Option<&Path>,
        data: &[u8],
        name: &str,
    ) -> Result<Evaluation, TrainError> {
        start::set_threads(weights.device, None);
        let decoder = Decoder::open(model_folder, weights)?;
        let mut notes = decoder.spec.notes.clone();
        let adapter = match adapter {
            None => None,
            Some(folder) => {
                let read = peft::read(folder, &decoder.spec, u32::MAX)?;
                peft::check_copies(folder, model_folder, &decoder.spec)?;
                notes.extend(read.notes);
                Some(decoder.fit().pack(&read.params)?)
            }
        };
        let groups: Vec<Group> = groups(data, name, &decoder.spec, &Objective::Sft)?;
        let examples = groups.iter().flat_map(|group| &group.examples);
        Ok(Evaluation {
            slices: slice::slices(examples, decoder.device()),
            decoder,
            adapter,
            done: 0,
            scores: Scores::default(),
            notes,
        })
    }

    /// Slices that are scored, and all.
    pub fn progress(&self) -> (usize, usize) {
        (self.done, self.slices.len())
    }

    /// A slice further. What came out when all are scored.
    pub fn advance(&mut self) -> Result<Option<Evaluated>, TrainError> {
        let Some(slice) = self.slices.get(self.done) else {
            return Ok(Some(Evaluated {
                loss: self.scores.loss(),
                token_accuracy: self.scores.accuracy(),
                labels: self.scores.labels(),
            }));
        };
        let (decoder, adapter) = (&self.decoder, self.adapter.as_ref());
        let through = || {
            let _no_grad = tch::no_grad_guard();
            let mut look = Look::enter(slice, decoder, adapter);
            loop {
                match look.advance(slice, decoder, adapter) {
                    Ok(found) => return found,
                    Err(next) => look = next,
                }
            }
        };
        let found = guard::torch(through).map_err(TrainError::Fault)?;
        self.scores.add(&slice.labels, &found);
        self.done += 1;
        Ok(None)
    }
}
