//! Kahneman-Tversky optimisation (arXiv 2402.01306, equation 7, as TRL's KTOTrainer has it): single rows, each desirable or
//! not, against how far the model has gone from the reference.

use super::{CHOSEN, REJECTED, Sequence, Weighed, sigmoid};

pub(super) fn desirable(group: &[Sequence], beta: f64, weight: f64, divergence: f64) -> Weighed {
    let sequence = &group[0];
    let ratio = sequence.log_ratio();
    let value = sigmoid(beta * (ratio - divergence));
    Weighed {
        loss: weight * (1.0 - value),
        dlogp: vec![sequence.spread(-weight * beta * value * (1.0 - value))],
        metrics: vec![
            (CHOSEN, beta * ratio),
            ("logps/chosen", sequence.log_prob()),
            ("kl", divergence),
        ],
    }
}

pub(super) fn undesirable(group: &[Sequence], beta: f64, weight: f64, divergence: f64) -> Weighed {
    let sequence = &group[0];
    let ratio = sequence.log_ratio();
    let value = sigmoid(beta * (divergence - ratio));
    Weighed {
        loss: weight * (1.0 - value),
        dlogp: vec![sequence.spread(weight * beta * value * (1.0 - value))],
        metrics: vec![
            (REJECTED, beta * ratio),
            ("logps/rejected", sequence.log_prob()),
            ("kl", divergence),
        ],
    }
}
