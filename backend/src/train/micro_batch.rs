//! A micro-batch of an objective that weighs after the forward, on its way: what the reference says, the forward, the
//! weights, the backward, bundle by bundle. Trained, or only looked at. Not here: the objectives' arithmetic (objective), which
//! groups a micro-batch has (plan).

mod course;
mod divergence;
mod learning;
mod looks;
mod weighing;

use std::cell::RefCell;

use tandem_core::dataset::Group;
use tandem_core::job::Objective;
use tandem_kernels::loss::LogProbs;
use tch::Device;

pub use course::Course;

use super::objective::{Beside, Scores};
use super::pass::{self, Context, KEEP_BYTES, Learns, Trained};
use super::references::References;
use super::slice::{self, Bundle, Labelled, Slice};
use crate::lora::adapter::Adapter;
use crate::model::{Decoder, Dropout};
use divergence::Divergence;
use learning::{Backward, Forward};
use looks::Looks;
use weighing::Weighing;

/// What a micro-batch goes through.
#[derive(Clone, Copy)]
pub struct Models<'a> {
    pub decoder: &'a Decoder,
    /// What is trained. `None`: all parameters are.
    pub adapter: Option<&'a Adapter>,
    /// `None`: the base.
    pub reference: Option<&'a Adapter>,
    /// What it said before.
    pub references: &'a RefCell<References>,
    pub dropout: Option<Dropout>,
}

/// Which part of a step a micro-batch is.
#[derive(Clone, Copy)]
pub struct Place {
    /// Of its groups' losses in that of the step.
    pub micro_batches: usize,
    /// The step's tokens before it: dropout's counter.
    pub rows_before: u64,
    /// Longer sequences are cut.
    pub max_seq_length: usize,
}

pub struct MicroBatch {
    weighing: Weighing,
    rows_before: u64,
    /// Still to go, the next at the end.
    bundles: Vec<Bundle>,
    /// Where all ranks go through the same passes: the rows that a bundle has at most, on any of them.
    in_step: Option<usize>,
    at: At,
}

enum At {
    /// Before the first bundle.
    Divergence(Divergence),
    Next,
    Reference {
        bundle: Bundle,
        looks: Looks,
    },
    Forward(Forward),
    /// The forward where nothing is trained.
    Looking {
        bundle: Bundle,
        reference: Vec<LogProbs>,
        looks: Looks,
    },
    Backward(Backward),
}

impl MicroBatch {
    /// Of groups with their numbers in the run.
    pub fn new(
        numbered: &[(usize, &Group)],
        objective: Objective,
        place: Place,
        device: Device,
    ) -> MicroBatch {
        let Place {
            micro_batches,
            rows_before,
            max_seq_length,
        } = place;
        // ORPO learns the preferred answer's prompt as well.
        let labelled = |example: usize| match (objective, example) {
            (Objective::Orpo { .. }, 0) => Labelled::All,
            _ => Labelled::Weighted,
        };
        let groups: Vec<&Group> = numbered.iter().map(|(_, group)| *group).collect();
        let groups = groups.as_slice();
        let mut bundles = slice::bundles(groups, labelled, device);
        let mut numbers = numbered.iter().map(|(number, _)| *number);
        for bundle in &mut bundles {
            bundle.numbers.extend(numbers.by_ref().take(bundle.values.len()));
        }
        bundles.reverse();
        let at = match objective {
            Objective::Kto { .. } => At::Divergence(Divergence::of(groups, max_seq_length, device)),
            _ => At::Next,
        };
        let likelihood = |group: &&Group| match (objective, &group.examples[0]) {
            (Objective::Orpo { .. }, chosen) => chosen.tokens.len() - 1,
            (_, chosen) => chosen.label_tokens(),
        };
        MicroBatch {
            weighing: Weighing {
                objective,
                beside: Beside {
                    groups: groups.len(),
                    likelihood_labels: groups.iter().map(likelihood).sum(),
                    divergence: 0.0,
                },
                share: 1.0 / (groups.len().max(1) * micro_batches) as f64,
            },
            rows_before,
            bundles,
            in_step: None,
            at,
        }
    }

    pub fn course(&self) -> Course {
        Course {
            divergence: match &self.at {
                At::Divergence(divergence) => divergence.slices.len(),
                _ => 0,
            },
            slices: self
                .bundles
                .iter()
                .rev()
                .map(|bundle| bundle.slices.len())
                .collect(),
        }
    }

    /// As one that goes through these passes, idle ones among them. No slice, of any rank, has more rows than `longest`.
    pub fn in_step(mut self, course: &Course, longest: usize) -> MicroBatch {
        if let At::Divergence(divergence) = &mut self.at {
            divergence.slices.resize_with(course.divergence, Slice::idle);
        }
        self.bundles.reverse();
        self.bundles.resize_with(course.slices.len(), Bundle::default);
        for (bundle, &slices) in self.bundles.iter_mut().zip(&course.slices) {
            bundle.slices.resize_with(slices, Slice::idle);
        }
        self.bundles.reverse();
        let most = course.slices.iter().max().copied().unwrap_or(0);
        self.in_step = Some(most * longest);
        self
    }

    /// So many times as heavy: for a mean over groups of several micro-batches.
    pub fn times_as_heavy(mut self, times: usize) -> MicroBatch {
        self.weighing.share *= times as f64;
        self
    }

    /// Tokens that are trained.
    pub fn rows(&self) -> u64 {
        self.slices().map(|slice| slice.tokens.len() as u64).sum()
    }

    /// Of the slice that has most.
    pub fn longest(&self) -> usize {
        let divergence = match &self.at {
            At::Divergence(divergence) => divergence.slices.as_slice(),
            _ => &[],
        };
        let slices = self.slices().chain(divergence);
        slices.map(|slice| slice.tokens.len()).max().unwrap_or(0)
    }

    fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.bundles.iter().flat_map(|bundle| &bundle.slices)
    }

    /// Whether slices are on their way, whose activations wait for their backward.
    pub fn holds_activations(&self) -> bool {
        matches!(self.at, At::Forward(_) | At::Backward(_))
    }

    /// A quantum further. `None` when it is through. Adds to the gradient of what is trained; it only looks where nothing is.
    pub fn advance(
        mut self,
        models: &Models,
        trained: Option<Trained>,
        scores: &mut Scores,
    ) -> Option<MicroBatch> {
        let decoder = models.decoder;
        let is_trained = trained.is_some();
        let learns = trained.map(|trained| Learns {
            trained,
            dropout: models.dropout,
            noise: None,
        });
        let context = |keep_bytes| Context {
            decoder,
            learns: learns.as_slice(),
            keep_bytes,
        };
        self.at = match std::mem::replace(&mut self.at, At::Next) {
            At::Divergence(mut divergence) => match divergence.advance(models) {
                None => At::Divergence(divergence),
                Some(nats) => {
                    self.weighing.beside.divergence = nats;
                    At::Next
                }
            },
            At::Next => {
                let bundle = self.bundles.pop()?;
                match self.known_reference(&bundle, models) {
                    Some(known) => self.begin(bundle, known, is_trained, decoder),
                    None => At::Reference {
                        bundle,
                        looks: Looks::default(),
                    },
                }
            }
            At::Reference { bundle, looks } if looks.is_through(&bundle.slices) => {
                if self.in_step.is_none() {
                    models.references.borrow_mut().keep(&bundle, &looks.found);
                }
                self.begin(bundle, looks.found, is_trained, decoder)
            }
            At::Reference { bundle, mut looks } => {
                looks.advance(&bundle.slices, decoder, models.reference);
                At::Reference { bundle, looks }
            }
            At::Looking {
                bundle,
                reference,
                looks,
            } if looks.is_through(&bundle.slices) => {
                let slices: Vec<&Slice> = bundle.slices.iter().collect();
                let found: Vec<&LogProbs> = looks.found.iter().collect();
                self.weighing
                    .weigh(&slices, &found, &reference, &bundle.values, scores);
                At::Next
            }
            At::Looking {
                bundle,
                reference,
                mut looks,
            } => {
                looks.advance(&bundle.slices, decoder, models.adapter);
                At::Looking {
                    bundle,
                    reference,
                    looks,
                }
            }
            At::Forward(forward) if forward.is_scored() => {
                At::Backward(forward.weighed(&self.weighing, scores))
            }
            At::Forward(mut forward) => {
                let context = context(forward.keep_bytes);
                forward.advance(&context, &mut self.rows_before);
                At::Forward(forward)
            }
            At::Backward(backward) => {
                let context = context(backward.keep_bytes);
                backward.advance(&context).map_or(At::Next, At::Backward)
            }
        };
        Some(self)
    }

    /// What the reference says of each slice, where that is known or not asked.
    fn known_reference(&self, bundle: &Bundle, models: &Models) -> Option<Vec<LogProbs>> {
        // Ranks that go in step have unlike groups, of which some may be known and others not.
        match (self.weighing.objective.has_reference(), self.in_step) {
            (false, _) => Some(vec![]),
            (true, None) => models.references.borrow().of(bundle),
            (true, Some(_)) => None,
        }
    }

    fn begin(&self, bundle: Bundle, reference: Vec<LogProbs>, is_trained: bool, decoder: &Decoder) -> At {
        match is_trained {
            true => {
                let keep_bytes = match self.in_step {
                    Some(rows) => pass::all_or_nothing(rows, decoder),
                    None => KEEP_BYTES / bundle.slices.len() as i64,
                };
                At::Forward(Forward::new(bundle, reference, keep_bytes))
            }
            false => At::Looking {
                bundle,
                reference,
                looks: Looks::default(),
            },
        }
    }
}
