//! What the reference says of the groups of a run. It never changes, so each group is asked once, in the first epoch. Not here:
//! who the reference is, what is made of it (objective).

use std::collections::HashMap;

use tandem_kernels::loss::LogProbs;

use super::slice::Bundle;

/// Of all groups together, 64 MiB; what comes after them is asked each time.
const MAX_LABELS: usize = 16 << 20;

#[derive(Default)]
pub struct References {
    /// Of all labels of a group, in order, by its number.
    known: HashMap<usize, Vec<f32>>,
    labels: usize,
}

impl References {
    /// Of each slice, where all groups of the bundle are known.
    pub fn of(&self, bundle: &Bundle) -> Option<Vec<LogProbs>> {
        let known = bundle.numbers.iter().map(|number| self.known.get(number));
        let known: Option<Vec<&Vec<f32>>> = known.collect();
        let mut all = known?.into_iter().flatten().copied();
        let of_slice = bundle.slices.iter().map(|slice| LogProbs {
            log_probs: all.by_ref().take(slice.labels.len()).collect(),
            correct: vec![],
        });
        Some(of_slice.collect())
    }

    /// `found`: of each slice.
    pub fn keep(&mut self, bundle: &Bundle, found: &[LogProbs]) {
        let lengths: Vec<usize> = bundle
            .slices
            .iter()
            .flat_map(|slice| &slice.sequences)
            .map(ExactSizeIterator::len)
            .collect();
        let labels: usize = lengths.iter().sum();
        let Some(of_group) = lengths.len().checked_div(bundle.numbers.len()) else {
            return;
        };
        if self.labels + labels > MAX_LABELS {
            return;
        }
        let mut all = found.iter().flat_map(|found| &found.log_probs).copied();
        for (&number, lengths) in bundle.numbers.iter().zip(lengths.chunks(of_group)) {
            let labels: usize = lengths.iter().sum();
            let before = self.known.insert(number, all.by_ref().take(labels).collect());
            self.labels += labels - before.map_or(0, |before| before.len());
        }
    }
}
