//! What is minimised, as a function of log-probabilities. Not here: how these come about and what their derivative does
//! (pass), which sequences stand together (data).

use tandem_kernels::loss::LogProbs;

use super::data::{Label, Slice};

/// Sums over the labels of a step.
#[derive(Clone, Copy, Default)]
pub struct Scores {
    /// Weighted negative log-likelihood, nats.
    loss: f64,
    weight: f64,
    correct: u64,
    labels: u64,
}

impl Scores {
    /// Labels whose weights are final, and what a pass or a look found of them.
    pub fn add(&mut self, labels: &[Label], found: &LogProbs) {
        for (&(_, _, weight), &log_prob) in labels.iter().zip(&found.log_probs) {
            self.loss -= f64::from(weight) * f64::from(log_prob);
            self.weight += f64::from(weight);
        }
        self.correct += found.correct as u64;
        self.labels += labels.len() as u64;
    }

    /// Mean over the weights.
    pub fn loss(&self) -> f64 {
        self.loss / self.weight.max(f64::MIN_POSITIVE)
    }

    /// Share of labels that were the most likely tokens.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.labels.max(1) as f64
    }
}

/// Supervised training minimises the mean over all labels of an optimizer step: divides their weights by the sum.
pub fn to_mean(slices: &mut [Slice]) {
    let labels = || slices.iter().flat_map(|slice| &slice.labels);
    let total: f64 = labels().map(|&(_, _, weight)| f64::from(weight)).sum();
    for (_, _, weight) in slices.iter_mut().flat_map(|slice| &mut slice.labels) {
        *weight = (f64::from(*weight) / total) as f32;
    }
}
