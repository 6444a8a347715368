//! From the log-probabilities of a bundle to the derivative of the step's loss by each.

use tandem_core::job::Objective;
use tandem_kernels::loss::LogProbs;

use crate::train::objective::{self, Beside, Scores, Sequence};
use crate::train::slice::Slice;

pub(super) struct Weighing {
    pub objective: Objective,
    pub beside: Beside,
    /// Of one group in the step's loss.
    pub share: f64,
}

impl Weighing {
    /// By slice, of each label. `reference`: none where the objective has none. `values`: of each group.
    pub fn weigh(
        &self,
        slices: &[&Slice],
        found: &[&LogProbs],
        reference: &[LogProbs],
        values: &[f32],
        scores: &mut Scores,
    ) -> Vec<Vec<f32>> {
        let sequences: Vec<Sequence> = (0..slices.len())
            .filter(|&i| !slices[i].is_idle())
            .flat_map(|i| {
                let reference = reference.get(i);
                slices[i].sequences.iter().map(move |labels| Sequence {
                    labels: &slices[i].labels[labels.clone()],
                    log_probs: &found[i].log_probs[labels.clone()],
                    reference: reference.map_or(&[], |reference| &reference.log_probs[labels.clone()]),
                })
            })
            .collect();
        let mut derivatives: Vec<f32> = vec![];
        let of_group = sequences.len().checked_div(values.len()).unwrap_or(1);
        for (group, &value) in sequences.chunks(of_group).zip(values) {
            let weighed = objective::weigh(&self.objective, group, value, &self.beside);
            scores.add_weighed(&weighed, self.share);
            let shares = weighed.dlogp.iter().flatten().map(|d| (self.share * d) as f32);
            derivatives.extend(shares);
        }
        let mut derivatives = derivatives.into_iter();
        let by_slice = slices.iter().zip(found).map(|(slice, found)| {
            scores.add_labels(slice.labels.len(), found);
            derivatives.by_ref().take(slice.labels.len()).collect()
        });
        by_slice.collect()
    }
}
