//! The loss of the validation set, on its way.

use tandem_core::dataset::Group;

use super::{Stage, Trainer};
use crate::model::Decoder;
use crate::train::micro_batch::MicroBatch;
use crate::train::objective::{self, Scores};
use crate::train::pass::Look;
use crate::train::slice::Slice;

pub(super) struct Validation {
    work: Looking,
    scores: Scores,
}

enum Looking {
    /// `round`: so many slices of the validation set each rank went through; `look` goes through the next.
    Slices {
        round: usize,
        look: Option<Look>,
    },
    MicroBatches(Vec<MicroBatch>),
}

impl Trainer {
    /// A quantum of a validation further. Its scores when it is through.
    pub(super) fn validate(
        &self,
        base: Option<&Decoder>,
        validation: Validation,
    ) -> Result<Validation, Scores> {
        let (decoder, adapter) = self.learner.parts(base);
        let Validation { work, mut scores } = validation;
        let work = match work {
            Looking::Slices { round, .. } if round == self.mates.rounds_of(self.valid_slices.len()) => {
                return Err(scores);
            }
            Looking::Slices { round, look } => {
                let idle;
                let slice = match self.valid_slices.get(self.mates.own(round)) {
                    Some(slice) => slice,
                    None => {
                        idle = Slice::idle();
                        &idle
                    }
                };
                let look = look.unwrap_or_else(|| Look::enter(slice, decoder, adapter));
                match look.advance(slice, decoder, adapter) {
                    Err(look) => Looking::Slices {
                        round,
                        look: Some(look),
                    },
                    Ok(found) => {
                        scores.add(&slice.labels, &found);
                        Looking::Slices {
                            round: round + 1,
                            look: None,
                        }
                    }
                }
            }
            Looking::MicroBatches(mut micro_batches) => {
                let models = self.models(base, None);
                match micro_batches.pop() {
                    Some(now) => micro_batches.extend(now.advance(&models, None, &mut scores)),
                    None => return Err(scores),
                }
                Looking::MicroBatches(micro_batches)
            }
        };
        Ok(Validation { work, scores })
    }

    pub(super) fn begin_validation(&self) -> Stage {
        let work = if objective::is_known(&self.spec.hyper.objective) {
            Looking::Slices { round: 0, look: None }
        } else {
            // Numbered behind those that are trained.
            let groups: Vec<(usize, &Group)> = (self.train.len()..).zip(&self.valid).collect();
            let batch_size = self.spec.hyper.batch_size.max(1) as usize;
            // Each as heavy as its groups, so that the result is their mean.
            let micro_batches = groups.chunks(batch_size);
            let micro_batches =
                micro_batches.map(|groups| self.micro_batch(groups, 1, 0).times_as_heavy(groups.len()));
            Looking::MicroBatches(self.own(micro_batches.collect()))
        };
        Stage::Validate(Box::new(Validation {
            work,
            scores: Scores::default(),
        }))
    }
}
