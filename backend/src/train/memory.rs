//! What training takes of the memory: numbers for as long as a job is there, activations while a slice of it is on its way.

use tandem_core::job::{Hyper, Method, Optimizer};

use super::objective;
use super::pass::KEEP_BYTES;
use super::slice::slice_tokens;
use crate::lora::params::AdapterShape;
use crate::model::Decoder;
use crate::start::memory::{Free, size};

/// Of a number that is trained: itself and its gradient, in float32.
const TRAINED: u64 = 4 * 2;
/// What the forward reads of it, and its copy that is written, at their most.
const COPIED: u64 = 4 * 2;
const FLOAT: u64 = 4;
/// Of the best model's numbers: those that are kept, and those that take their place.
const BEST: u64 = 4 * 2;
/// Of what is free, the most that a job beside others takes: requests and the system want some.
const SHARE: f64 = 0.8;

/// Of a number, what the optimizer remembers, at most.
fn remembered(optimizer: Optimizer) -> u64 {
    match optimizer {
        Optimizer::AdamW => 8,
        // Two codes, and two scales for 256 of them.
        Optimizer::AdamW8bit => 3,
        Optimizer::Sgd { momentum: 0.0, .. } => 0,
        Optimizer::Sgd { .. } | Optimizer::Lion => 4,
        // Of its row and its column.
        Optimizer::Adafactor { .. } => 1,
    }
}

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub numbers: u64,
    pub activations: u64,
}

impl Memory {
    /// Of an adapter of so many numbers that AdamW steps.
    pub fn of_numbers(decoder: &Decoder, numbers: u64) -> Memory {
        let slice = slice_tokens(decoder.device()) as u64;
        let saved = FLOAT * slice * decoder.saved_numbers() as u64;
        // Beyond that every other sublayer's input alone is kept.
        let inputs = FLOAT * slice * (decoder.n_sublayers() / 2) as u64 * decoder.spec.hidden as u64;
        Memory {
            numbers: (TRAINED + remembered(Optimizer::AdamW)) * numbers,
            activations: if saved <= KEEP_BYTES as u64 { saved } else { inputs },
        }
    }

    pub fn of(decoder: &Decoder, hyper: &Hyper) -> Memory {
        let numbers = match &hyper.method {
            Method::Lora(lora) => AdapterShape::new(&decoder.spec, lora).len() as u64,
            Method::Full => decoder.parameters(),
        };
        let Memory { activations, .. } = Memory::of_numbers(decoder, numbers);
        let best = match &hyper.selection {
            Some(selection) if selection.load_best => BEST,
            _ => 0,
        };
        Memory {
            // What the optimizer remembers is written, too.
            numbers: (TRAINED + COPIED + 2 * remembered(hyper.optimizer) + best) * numbers,
            activations: match objective::is_known(&hyper.objective) {
                true => activations,
                // Those of a pair are on their way together.
                false => 2 * activations,
            },
        }
    }

    /// Why there is no room for it beside `n_jobs` others, of which those that begin were promised `promised` bytes, and
    /// of which the largest slice takes `activations`.
    pub fn beside(self, n_jobs: usize, promised: u64, activations: u64, free: Free) -> Option<String> {
        let (Free::Host(left) | Free::Gpu(left)) = free else {
            return None;
        };
        let activations = activations.max(self.activations);
        let room = (left as f64 * SHARE) as u64;
        (self.numbers + promised + activations > room).then(|| {
            format!(
                "it takes {} for its numbers, gradients, moments and their copies, a slice on its way up to {}, and {} of \
                 {} that are free may be taken beside {n_jobs} that train{}: it waits until one of them has ended",
                size(self.numbers),
                size(activations),
                size(room),
                size(left),
                match promised {
                    0 => String::new(),
                    promised => format!(", who begin with {}", size(promised)),
                },
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_beside_others_fits_what_is_free() {
        let job = Memory {
            numbers: 100 << 20,
            activations: 300 << 20,
        };
        for (promised, activations, free, expected) in [
            (0, 0, Free::Unknown, None),
            (0, 0, Free::Host(500 << 20), None),
            (0, 0, Free::Gpu(500 << 20), None),
            (0, 0, Free::Host(499 << 20), Some("it takes 100 MiB")),
            (0, 400 << 20, Free::Host(500 << 20), Some("up to 400 MiB")),
            (1 << 20, 0, Free::Host(500 << 20), Some("who begin with 1.00 MiB")),
            (0, 0, Free::Host(0), Some("beside 3 that train")),
        ] {
            match (job.beside(3, promised, activations, free), expected) {
                (None, None) => {}
                (Some(why), Some(part)) => assert!(why.contains(part), "{why}"),
                other => panic!("{other:?}"),
            }
        }
    }
}
