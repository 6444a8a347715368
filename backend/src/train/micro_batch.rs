//! A micro-batch of an objective that weighs after the forward, on its way: what the reference says, the forward, the
//! weights, the backward, bundle by bundle. Trained, or only looked at. Not here: the objectives' arithmetic (objective), which
//! groups a micro-batch has (data).

use std::cell::RefCell;

use tandem_core::dataset::{Example, Group};
use tandem_core::job::Objective;
use tandem_kernels::loss::LogProbs;
use tch::Device;

use super::data::{self, Bundle, Labelled, Slice};
use super::objective::{self, Beside, Scores, Sequence};
use super::pass::{self, Advanced, Context, KEEP_BYTES, Learns, Look, Pass, Scored, Trained};
use super::references::References;
use crate::lora::adapter::Adapter;
use crate::model::{Decoder, Dropout};

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

/// Which passes a micro-batch goes through, in order. Ranks that go in step agree on one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Course {
    /// Slices of KTO's prompts with each other's answers.
    divergence: usize,
    /// Of each bundle.
    slices: Vec<usize>,
}

impl Course {
    /// One that is long enough for either.
    pub fn or(self, other: Course) -> Course {
        let (mut long, short) = match self.slices.len() >= other.slices.len() {
            true => (self.slices, other.slices),
            false => (other.slices, self.slices),
        };
        for (slices, other) in long.iter_mut().zip(short) {
            *slices = (*slices).max(other);
        }
        Course {
            divergence: self.divergence.max(other.divergence),
            slices: long,
        }
    }
}

pub struct MicroBatch {
    objective: Objective,
    beside: Beside,
    /// Of one group in the step's loss.
    share: f64,
    rows_before: u64,
    /// Still to go, the next at the end.
    bundles: Vec<Bundle>,
    /// Where all ranks go through the same passes: the rows that a bundle has at most, on any of them.
    in_step: Option<usize>,
    at: At,
}

enum At {
    /// KTO's prompts with each other's answers: how far what is trained is from the reference.
    Divergence {
        slices: Vec<Slice>,
        reference: Looks,
        trained: Looks,
    },
    Next,
    Reference {
        bundle: Bundle,
        looks: Looks,
    },
    /// `bundle` has the slices that are to go; the next is the first.
    Forward {
        bundle: Bundle,
        keep_bytes: i64,
        reference: Vec<LogProbs>,
        pass: Option<Box<Pass>>,
        scored: Vec<Scored>,
    },
    /// The forward where nothing is trained.
    Looking {
        bundle: Bundle,
        reference: Vec<LogProbs>,
        looks: Looks,
    },
    /// Each with the derivative of its labels.
    Backward {
        keep_bytes: i64,
        scored: Vec<(Scored, Vec<f32>)>,
        pass: Option<Box<Pass>>,
    },
}

/// Several slices, looked at one after the other.
#[derive(Default)]
struct Looks {
    found: Vec<LogProbs>,
    look: Option<Look>,
}

impl Looks {
    fn advance(&mut self, slices: &[Slice], decoder: &Decoder, adapter: Option<&Adapter>) {
        let slice = &slices[self.found.len()];
        let look = self
            .look
            .take()
            .unwrap_or_else(|| Look::enter(slice, decoder, adapter));
        match look.advance(slice, decoder, adapter) {
            Ok(found) => self.found.push(found),
            Err(look) => self.look = Some(look),
        }
    }

    fn is_through(&self, slices: &[Slice]) -> bool {
        self.found.len() == slices.len()
    }
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
        let mut bundles = data::bundles(groups, labelled, device);
        let mut numbers = numbered.iter().map(|(number, _)| *number);
        for bundle in &mut bundles {
            bundle.numbers.extend(numbers.by_ref().take(bundle.values.len()));
        }
        bundles.reverse();
        let at = match objective {
            Objective::Kto { .. } => {
                let mismatched = mismatched(groups, max_seq_length);
                At::Divergence {
                    slices: data::slices(mismatched.iter(), device),
                    reference: Looks::default(),
                    trained: Looks::default(),
                }
            }
            _ => At::Next,
        };
        let likelihood = |group: &&Group| match (objective, &group.examples[0]) {
            (Objective::Orpo { .. }, chosen) => chosen.tokens.len() - 1,
            (_, chosen) => chosen.label_tokens(),
        };
        MicroBatch {
            objective,
            beside: Beside {
                groups: groups.len(),
                likelihood_labels: groups.iter().map(likelihood).sum(),
                divergence: 0.0,
            },
            share: 1.0 / (groups.len().max(1) * micro_batches) as f64,
            rows_before,
            bundles,
            in_step: None,
            at,
        }
    }

    pub fn course(&self) -> Course {
        Course {
            divergence: match &self.at {
                At::Divergence { slices, .. } => slices.len(),
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
        if let At::Divergence { slices, .. } = &mut self.at {
            slices.resize_with(course.divergence, Slice::idle);
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
    pub fn weighing(self, times: usize) -> MicroBatch {
        MicroBatch {
            share: self.share * times as f64,
            ..self
        }
    }

    /// Tokens that are trained.
    pub fn rows(&self) -> u64 {
        self.slices().map(|slice| slice.tokens.len() as u64).sum()
    }

    /// Of the slice that has most.
    pub fn longest(&self) -> usize {
        let divergence = match &self.at {
            At::Divergence { slices, .. } => slices.as_slice(),
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
        matches!(self.at, At::Forward { .. } | At::Backward { .. })
    }

    /// A quantum further. `None` when it is through. Adds to the gradient of what is trained; it only looks where nothing is.
    pub fn advance(
        mut self,
        models: &Models,
        trained: Option<Trained>,
        scores: &mut Scores,
    ) -> Option<MicroBatch> {
        let Models {
            decoder,
            adapter,
            reference: reference_adapter,
            references,
            dropout,
        } = *models;
        let is_trained = trained.is_some();
        let learns = trained.map(|trained| Learns {
            trained,
            dropout,
            noise: None,
        });
        let context = |keep_bytes| Context {
            decoder,
            learns: learns.as_slice(),
            keep_bytes,
        };
        self.at = match std::mem::replace(&mut self.at, At::Next) {
            At::Divergence {
                slices,
                mut reference,
                mut trained,
            } => {
                match (reference.is_through(&slices), trained.is_through(&slices)) {
                    (false, _) => reference.advance(&slices, decoder, reference_adapter),
                    (true, false) => trained.advance(&slices, decoder, adapter),
                    (true, true) => {
                        let sum = |looks: &Looks| -> f64 {
                            let found = looks.found.iter().flat_map(|found| &found.log_probs);
                            found.map(|&log_prob| f64::from(log_prob)).sum()
                        };
                        let busy = slices.iter().filter(|slice| !slice.is_idle());
                        let sequences: usize = busy.map(|slice| slice.sequences.len()).sum();
                        let mean = (sum(&trained) - sum(&reference)) / sequences.max(1) as f64;
                        self.beside.divergence = mean.max(0.0);
                        return Some(self);
                    }
                }
                At::Divergence {
                    slices,
                    reference,
                    trained,
                }
            }
            At::Next => {
                let bundle = self.bundles.pop()?;
                // Ranks that go in step have unlike groups, of which some may be known and others not.
                let known = match (self.objective.has_reference(), self.in_step) {
                    (false, _) => Some(vec![]),
                    (true, None) => references.borrow().of(&bundle),
                    (true, Some(_)) => None,
                };
                match known {
                    Some(known) => self.forward(bundle, known, is_trained, decoder),
                    None => At::Reference {
                        bundle,
                        looks: Looks::default(),
                    },
                }
            }
            At::Reference { bundle, looks } if looks.is_through(&bundle.slices) => {
                if self.in_step.is_none() {
                    references.borrow_mut().keep(&bundle, &looks.found);
                }
                self.forward(bundle, looks.found, is_trained, decoder)
            }
            At::Reference { bundle, mut looks } => {
                looks.advance(&bundle.slices, decoder, reference_adapter);
                At::Reference { bundle, looks }
            }
            At::Looking {
                bundle,
                reference,
                looks,
            } if looks.is_through(&bundle.slices) => {
                let slices: Vec<&Slice> = bundle.slices.iter().collect();
                let found: Vec<&LogProbs> = looks.found.iter().collect();
                self.weigh(&slices, &found, &reference, &bundle.values, scores);
                At::Next
            }
            At::Looking {
                bundle,
                reference,
                mut looks,
            } => {
                looks.advance(&bundle.slices, decoder, adapter);
                At::Looking {
                    bundle,
                    reference,
                    looks,
                }
            }
            At::Forward {
                mut bundle,
                keep_bytes,
                reference,
                pass,
                mut scored,
            } => {
                let context = context(keep_bytes);
                let pass = match pass {
                    Some(pass) => match pass.advance(&context) {
                        Advanced::On(pass) => Some(Box::new(pass)),
                        Advanced::Scored(done) => {
                            scored.push(done);
                            None
                        }
                        Advanced::Through(..) => unreachable!("it is to be weighed"),
                    },
                    None if bundle.slices.is_empty() => {
                        let slices: Vec<&Slice> = scored.iter().map(Scored::slice).collect();
                        let found: Vec<&LogProbs> = scored.iter().map(Scored::found).collect();
                        let dlogp = self.weigh(&slices, &found, &reference, &bundle.values, scores);
                        self.at = At::Backward {
                            keep_bytes,
                            scored: scored.into_iter().zip(dlogp).collect(),
                            pass: None,
                        };
                        return Some(self);
                    }
                    None => {
                        let slice = bundle.slices.remove(0);
                        let rows_before = self.rows_before;
                        if !slice.is_idle() {
                            self.rows_before += slice.tokens.len() as u64;
                        }
                        let entry = (&slice, rows_before);
                        Some(Box::new(Pass::enter_to_be_weighed(entry, &context)))
                    }
                };
                At::Forward {
                    bundle,
                    keep_bytes,
                    reference,
                    pass,
                    scored,
                }
            }
            At::Backward {
                keep_bytes,
                mut scored,
                pass,
            } => {
                let context = context(keep_bytes);
                let pass = match pass.map(|pass| pass.advance(&context)) {
                    Some(Advanced::On(pass)) => Some(Box::new(pass)),
                    Some(Advanced::Scored(_)) => unreachable!("it is weighed"),
                    Some(Advanced::Through(..)) | None => match scored.pop() {
                        Some((scored, dlogp)) => Some(Box::new(scored.weighed(&dlogp))),
                        None => return Some(self),
                    },
                };
                At::Backward {
                    keep_bytes,
                    scored,
                    pass,
                }
            }
        };
        Some(self)
    }

    /// The derivative of the step's loss by each label, by slice.
    fn weigh(
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

    fn forward(&self, bundle: Bundle, reference: Vec<LogProbs>, is_trained: bool, decoder: &Decoder) -> At {
        match is_trained {
            true => At::Forward {
                keep_bytes: match self.in_step {
                    Some(rows) => pass::all_or_nothing(rows, decoder),
                    None => KEEP_BYTES / bundle.slices.len() as i64,
                },
                bundle,
                reference,
                pass: None,
                scored: vec![],
            },
            false => At::Looking {
                bundle,
                reference,
                looks: Looks::default(),
            },
        }
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
