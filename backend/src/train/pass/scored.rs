//! Between the forward and the backward: labels have their log-probabilities, and wait for weights.

use tandem_kernels::loss::LogProbs;
use tch::Tensor;

use super::kept::KeptSublayers;
use super::packed::Packed;
use super::{At, Pass};
use crate::model::HeadHere;
use crate::train::slice::Slice;

/// A pass that went forward and waits to be weighed. Its activations are held meanwhile.
pub struct Scored {
    pub(super) packed: Packed,
    pub(super) kept: KeptSublayers,
    pub(super) found: LogProbs,
    /// Behind the last sublayer.
    pub(super) hidden: Tensor,
    pub(super) head: HeadHere,
}

impl Scored {
    pub fn slice(&self) -> &Slice {
        &self.packed.slice
    }

    /// log p of each label that is to be weighed, in order.
    pub fn found(&self) -> &LogProbs {
        &self.found
    }

    /// The same by slice, for those that are to be weighed: which, and what was found.
    pub fn by_slice(&self) -> impl Iterator<Item = (usize, &[f32])> {
        let mut before = 0;
        self.packed.to_be_weighed().map(move |(i, part)| {
            let start = before;
            before += part.labels.len();
            (i, &self.found.log_probs[start..before])
        })
    }

    /// Goes backward with `dlogp`: the derivative of what is minimised by the log-probability of each label that was to be
    /// weighed, in order.
    ///
    /// # Panics
    /// When there is not one number for each.
    pub fn weighed(self, dlogp: &[f32]) -> Pass {
        let Scored {
            mut packed,
            kept,
            found,
            hidden,
            head,
        } = self;
        assert_eq!(dlogp.len(), found.log_probs.len(), "a number for each label");
        let mut dlogp = dlogp.iter();
        for part in packed.parts.iter_mut().filter(|part| !part.is_weighed) {
            part.is_weighed = true;
            let labels = &mut packed.slice.labels[part.labels.clone()];
            labels
                .iter_mut()
                .zip(&mut dlogp)
                .for_each(|(label, dlogp)| label.2 = -dlogp);
        }
        Pass {
            packed,
            kept,
            // The head runs again, to the same bits: the gradient of logits needs all of them.
            found: LogProbs::default(),
            at: At::Loss {
                dhidden: hidden.zeros_like(),
                hidden,
                head,
            },
        }
    }
}
