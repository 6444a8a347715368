//! An adapter is tried on one example before it is published.

use super::{Stage, Trainer};
use crate::model::Decoder;
use crate::train::TrainError;
use crate::train::objective::Scores;
use crate::train::pass::Look;
use crate::train::snapshot::Occasion;

impl Trainer {
    pub(super) fn try_before(&self, occasion: Occasion) -> Stage {
        Stage::Try { occasion, look: None }
    }

    pub(super) fn try_out(
        &self,
        base: Option<&Decoder>,
        occasion: Occasion,
        look: Option<Look>,
    ) -> Result<Stage, TrainError> {
        let (decoder, adapter) = self.learner.parts(base);
        let look = look.unwrap_or_else(|| Look::enter(&self.trial, decoder, adapter));
        match look.advance(&self.trial, decoder, adapter) {
            Err(look) => Ok(Stage::Try {
                occasion,
                look: Some(look),
            }),
            Ok(found) => {
                let mut scores = Scores::default();
                scores.add(&self.trial.labels, &found);
                self.tried(occasion, &scores)
            }
        }
    }

    fn tried(&self, occasion: Occasion, scores: &Scores) -> Result<Stage, TrainError> {
        if !scores.loss().is_finite() {
            return Err(TrainError::Diverged {
                step: self.step,
                what: "loss of the adapter that it made",
                value: scores.loss(),
            });
        }
        Ok(match occasion {
            Occasion::End => Stage::Finish,
            Occasion::Checkpoint | Occasion::Stop => Stage::Save,
        })
    }
}
