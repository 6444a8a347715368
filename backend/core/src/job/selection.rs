//! Which model of a run is the best by a number of its validations, when a run no longer waits for a better one, and which
//! checkpoints are one too many: as transformers' Trainer, its EarlyStoppingCallback and its rotation of checkpoints
//! (trainer.py, trainer_callback.py, trainer_utils.py). Not here: numbers of models, files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What transformers writes before the name of a validation's number.
pub const EVAL: &str = "eval_";
pub const LOSS: &str = "loss";
pub const TOKEN_ACCURACY: &str = "mean_token_accuracy";

/// How models of a run are compared, and what follows from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// [`LOSS`], [`TOKEN_ACCURACY`] or a metric of the objective.
    pub metric: String,
    pub greater_is_better: bool,
    /// The result is the best model, not the last.
    pub load_best: bool,
    /// So many validations in a row without a better one end the run.
    pub patience: Option<u32>,
    /// What is better by no more than this does not count for `patience`.
    pub threshold: f64,
}

/// How far a run has come with it. A run that goes on from a state goes on from this, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// The step of the last validation that was taken, 0 before the first: a validation that is repeated after a stop counts
    /// once.
    pub seen: u64,
    pub best: Option<Best>,
    /// Validations in a row that were not better.
    pub waited: u32,
    /// The step of the best model that has a checkpoint.
    pub saved: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub value: f64,
}

impl Standing {
    pub fn is_best_at(&self, step: u64) -> bool {
        self.best.is_some_and(|best| best.step == step)
    }

    /// After a checkpoint of the model of `step`.
    pub fn with_checkpoint(self, step: u64) -> Standing {
        match self.is_best_at(step) {
            true => Standing {
                saved: Some(step),
                ..self
            },
            false => self,
        }
    }
}

impl Selection {
    pub fn check(&self) -> Result<(), String> {
        match self.threshold.is_finite() && self.threshold >= 0.0 && self.patience != Some(0) {
            true => Ok(()),
            false => Err(format!(
                "early_stopping_threshold must be a number from 0 on and early_stopping_patience at least 1, got {} and {:?}",
                self.threshold, self.patience
            )),
        }
    }

    /// The number of a validation. `None`: the objective does not report it.
    pub fn value(&self, loss: f64, token_accuracy: f64, metrics: &BTreeMap<String, f64>) -> Option<f64> {
        match self.metric.as_str() {
            LOSS => Some(loss),
            TOKEN_ACCURACY => Some(token_accuracy),
            other => metrics.get(other).copied(),
        }
    }

    /// After the validation of `step`. Whether it counts is asked against the best before it, and any that is better is the
    /// best from then on, by however little.
    pub fn judge(&self, before: Standing, step: u64, value: f64) -> Standing {
        if step <= before.seen {
            return before;
        }
        let is_better = |than: f64| match self.greater_is_better {
            true => value > than,
            false => value < than,
        };
        let counts = match before.best {
            Some(best) => is_better(best.value) && (value - best.value).abs() > self.threshold,
            // NaN is better than nothing once.
            None => before.seen == 0 || !value.is_nan(),
        };
        let is_best = before.best.map_or(!value.is_nan(), |best| is_better(best.value));
        Standing {
            seen: step,
            best: if is_best {
                Some(Best { step, value })
            } else {
                before.best
            },
            waited: if counts { 0 } else { before.waited + 1 },
            saved: before.saved,
        }
    }

    /// Whether the run ends by it.
    pub fn ends(&self, standing: &Standing) -> bool {
        self.patience.is_some_and(|patience| standing.waited >= patience)
    }
}

/// The checkpoints that go where `limit` of them may stay: the oldest, but neither `best` nor the last, from which a run goes
/// on. `steps` in ascending order.
pub fn surplus(steps: &[u64], best: Option<u64>, limit: usize) -> Vec<u64> {
    let best = best.filter(|best| steps.contains(best));
    let is_apart = best.is_some() && best.as_ref() != steps.last();
    // With room for one, the best and the last both stay.
    let limit = if is_apart { limit.max(2) } else { limit };
    let mut going = steps.len().saturating_sub(limit);
    let mut gone = vec![];
    for &step in steps.iter().filter(|&&step| Some(step) != best) {
        if going == 0 {
            break;
        }
        gone.push(step);
        going -= 1;
    }
    gone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Fixtures {
        transformers: String,
        runs: Vec<Run>,
        rotations: Vec<Rotation>,
    }

    #[derive(Deserialize)]
    struct Run {
        greater_is_better: bool,
        patience: u32,
        threshold: f64,
        /// Of validations at steps 10, 20, ...
        values: Vec<f64>,
        stopped_at: Option<u64>,
        best_step: u64,
    }

    #[derive(Deserialize)]
    struct Rotation {
        steps: Vec<u64>,
        best: Option<u64>,
        limit: usize,
        left: Vec<u64>,
    }

    /// Made by tests/numerics/make_selection.py.
    fn fixtures() -> Fixtures {
        let text = include_str!("selection.json");
        serde_json::from_str(text).expect("it is what the script writes")
    }

    #[test]
    fn runs_stop_and_choose_as_those_of_transformers() {
        let Fixtures {
            transformers, runs, ..
        } = fixtures();
        assert!(runs.len() > 100);
        let (mut early, mut late) = (0, 0);
        for Run {
            greater_is_better,
            patience,
            threshold,
            values,
            stopped_at,
            best_step,
        } in runs
        {
            let selection = Selection {
                metric: LOSS.to_owned(),
                greater_is_better,
                load_best: true,
                patience: Some(patience),
                threshold,
            };
            let mut standing = Standing::default();
            let mut stopped = None;
            for (step, &value) in (10..).step_by(10).zip(&values) {
                standing = selection.judge(standing, step, value);
                // As when a stop repeats it.
                assert_eq!(selection.judge(standing, step, value + 1.0), standing);
                if selection.ends(&standing) {
                    stopped = Some(step);
                    break;
                }
            }
            let case = format!(
                "{values:?}, patience {patience}, threshold {threshold}, transformers {transformers}"
            );
            assert_eq!(stopped, stopped_at, "{case}");
            assert_eq!(standing.best.map(|best| best.step), Some(best_step), "{case}");
            *(if stopped.is_some() { &mut early } else { &mut late }) += 1;
        }
        assert!(early > 20 && late > 20, "{early} {late}");
    }

    #[test]
    fn checkpoints_go_as_those_of_transformers() {
        let rotations = fixtures().rotations;
        assert!(rotations.len() > 20);
        for Rotation {
            steps,
            best,
            limit,
            left,
        } in rotations
        {
            let gone = surplus(&steps, best, limit);
            let kept: Vec<u64> = steps
                .iter()
                .copied()
                .filter(|step| !gone.contains(step))
                .collect();
            assert_eq!(kept, left, "{steps:?}, best {best:?}, limit {limit}");
        }
        assert_eq!(surplus(&[], None, 1), Vec::<u64>::new());
    }

    #[test]
    fn what_is_no_number_is_never_the_best() {
        let selection = Selection {
            metric: LOSS.to_owned(),
            greater_is_better: false,
            load_best: true,
            patience: Some(2),
            threshold: 0.0,
        };
        let mut standing = Standing::default();
        for (step, value) in [(1, f64::NAN), (2, f64::NAN), (3, f64::NAN)] {
            standing = selection.judge(standing, step, value);
        }
        assert_eq!((standing.best, standing.waited), (None, 2));
        assert!(selection.ends(&standing));
        assert!(selection.judge(standing, 4, 1.0).is_best_at(4));
    }
}
