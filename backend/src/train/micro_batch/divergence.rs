//! How far what is trained is from the reference, over prompts with each other's answers; of KTO.

use tandem_core::dataset::{Example, Group};
use tch::Device;

use super::Models;
use super::looks::Looks;
use crate::train::slice::{self, Slice};

pub(super) struct Divergence {
    pub slices: Vec<Slice>,
    reference: Looks,
    trained: Looks,
}

impl Divergence {
    pub fn of(groups: &[&Group], max_seq_length: usize, device: Device) -> Divergence {
        Divergence {
            slices: slice::slices(mismatched(groups, max_seq_length).iter(), device),
            reference: Looks::default(),
            trained: Looks::default(),
        }
    }

    /// A quantum further. In nats, when it is through.
    pub fn advance(&mut self, models: &Models) -> Option<f64> {
        let (slices, decoder) = (&self.slices, models.decoder);
        match (self.reference.is_through(slices), self.trained.is_through(slices)) {
            (false, _) => self.reference.advance(slices, decoder, models.reference),
            (true, false) => self.trained.advance(slices, decoder, models.adapter),
            (true, true) => return Some(self.found()),
        }
        None
    }

    fn found(&self) -> f64 {
        let sum = |looks: &Looks| -> f64 {
            let found = looks.found.iter().flat_map(|found| &found.log_probs);
            found.map(|&log_prob| f64::from(log_prob)).sum()
        };
        let busy = self.slices.iter().filter(|slice| !slice.is_idle());
        let sequences: usize = busy.map(|slice| slice.sequences.len()).sum();
        let mean = (sum(&self.trained) - sum(&self.reference)) / sequences.max(1) as f64;
        mean.max(0.0)
    }
}

/// Each prompt with the answer of the row before it, the first with that of the last, as TRL's KTOTrainer pairs them.
fn mismatched(groups: &[&Group], max_seq_length: usize) -> Vec<Example> {
    let example = |i: usize| &groups[i].examples[0];
    let prompt = |example: &Example| {
        let answer = example.weights.iter().skip(1).position(|&weight| weight != 0.0);
        answer.map_or(example.tokens.len(), |first| first + 1)
    };
    (0..groups.len())
        .map(|i| {
            let (own, other) = (example(i), example((i + groups.len() - 1) % groups.len()));
            let (end, start) = (prompt(own), prompt(other));
            let mut tokens = [&own.tokens[..end], &other.tokens[start..]].concat();
            let mut weights = [&vec![0.0; end][..], &other.weights[start..]].concat();
            tokens.truncate(max_seq_length);
            weights.truncate(max_seq_length);
            Example { tokens, weights }
        })
        .collect()
}
