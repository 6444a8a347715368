//! The best model of a run, by its validations: its numbers are kept beside those that train on, in the state as well, and are the
//! result where that is asked. What is better, and when a run ends by it, is core's to say.

use tandem_core::job::JobEvent;
use tandem_core::job::selection::{Selection, Standing};
use tch::Tensor;

use super::TrainError;
use super::learner::Learner;
use super::objective::Scores;
use super::snapshot::Copying;

pub(super) struct Best {
    selection: Option<Selection>,
    standing: Standing,
    /// `[P]`, never written to. There where the best model may become the result, after the first validation.
    numbers: Option<Tensor>,
}

/// What a validation came to.
pub(super) enum Judged {
    Done,
    /// It is the best so far: its numbers are to be kept before anything else happens.
    Keeps(Keeping),
}

/// Numbers on their way into a copy, and what holds when it is there: a stop before that repeats the validation.
pub(super) struct Keeping {
    copying: Copying,
    standing: Standing,
}

pub(super) struct Kept {
    numbers: Tensor,
    standing: Standing,
}

impl Best {
    pub fn new(selection: Option<Selection>) -> Best {
        Best {
            selection,
            standing: Standing::default(),
            numbers: None,
        }
    }

    pub fn resume(&mut self, standing: Standing, numbers: Option<Tensor>) {
        self.standing = standing;
        self.numbers = numbers;
    }

    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Shared storage.
    pub fn numbers(&self) -> Option<Tensor> {
        self.numbers.as_ref().map(Tensor::shallow_clone)
    }

    pub fn is_at(&self, step: u64) -> bool {
        self.standing.is_best_at(step)
    }

    pub fn has_checkpoint(&mut self, step: u64) {
        self.standing = self.standing.with_checkpoint(step);
    }

    /// Whether the run ends before its last step.
    pub fn ends(&self) -> bool {
        let selection = self.selection.as_ref();
        selection.is_some_and(|selection| selection.ends(&self.standing))
    }

    /// Takes the validation of `step`, whose numbers `learner` has.
    pub fn judge(&mut self, step: u64, scores: &Scores, learner: &Learner) -> Result<Judged, TrainError> {
        let Some(selection) = &self.selection else {
            return Ok(Judged::Done);
        };
        let value = selection.value(scores.loss(), scores.accuracy(), &scores.metrics());
        let value = value.ok_or_else(|| {
            let metric = &selection.metric;
            TrainError::Data(format!("a validation of this objective reports no {metric}"))
        })?;
        let standing = selection.judge(self.standing, step, value);
        if selection.load_best && standing != self.standing && standing.is_best_at(step) {
            let copying = Copying::of(vec![learner.flat()]);
            return Ok(Judged::Keeps(Keeping { copying, standing }));
        }
        self.standing = standing;
        Ok(Judged::Done)
    }

    pub fn keep(&mut self, kept: Kept) {
        let Kept { numbers, standing } = kept;
        self.resume(standing, Some(numbers));
    }

    /// Why the run ends after `step`.
    pub fn stopped(&self, step: u64) -> JobEvent {
        JobEvent::StoppedEarly {
            step,
            waited: self.standing.waited,
        }
    }

    /// Gives the learner the numbers of the best model, where they are the result.
    pub fn load(&self, learner: &mut Learner) -> Option<JobEvent> {
        let selection = self.selection.as_ref()?;
        let (numbers, best) = (self.numbers.as_ref()?, self.standing.best?);
        learner.load(numbers);
        Some(JobEvent::BestLoaded {
            step: best.step,
            metric: selection.metric.clone(),
            value: best.value,
        })
    }
}

impl Keeping {
    /// Copies the next numbers.
    pub fn advance(self) -> Result<Kept, Keeping> {
        let Keeping { copying, standing } = self;
        match copying.advance() {
            Err(copying) => Err(Keeping { copying, standing }),
            Ok(mut copies) => Ok(Kept {
                numbers: copies.pop().expect("one tensor was copied"),
                standing,
            }),
        }
    }
}
