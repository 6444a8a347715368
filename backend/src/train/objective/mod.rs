//! What is minimised, as a function of log-probabilities: one file an objective. Each gets the sequences of one group
//! (see [`tandem_core::dataset::Group`]) with a log-probability for every label, and gives the group's loss, its derivative by each of
//! these, and what it reports. All of it is arithmetic in float64; nothing here knows a tensor. Not here: how
//! log-probabilities come about and what their derivatives do (pass), which groups stand together (plan).

mod cpo;
mod dpo;
mod kto;
mod orpo;
pub mod policy;
mod reward_weighted;

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tandem_core::job::Objective;
use tandem_kernels::loss::LogProbs;

use super::slice::{Label, Slice};

pub use reward_weighted::factors;

/// A sequence as an objective sees it. One number for each label, in order.
#[derive(Clone, Copy)]
pub struct Sequence<'a> {
    pub labels: &'a [Label],
    /// Under what is trained.
    pub log_probs: &'a [f32],
    /// Under the reference; empty where [`Objective::has_reference`] says no.
    pub reference: &'a [f32],
}

/// What a group is beside.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside {
    /// Groups of the micro-batch.
    pub groups: usize,
    /// Labels of the micro-batch's preferred answers that carry likelihood.
    pub likelihood_labels: usize,
    /// How far what is trained is from the reference, in nats; of KTO.
    pub divergence: f64,
}

/// What an objective says of a group.
pub struct Weighed {
    pub loss: f64,
    /// By sequence, of each label: d loss / d log p.
    pub dlogp: Vec<Vec<f64>>,
    /// Under TRL's names.
    pub metrics: Vec<(&'static str, f64)>,
}

/// Of an objective whose weights depend on the forward. A micro-batch's loss is the mean over its groups.
pub fn weigh(objective: &Objective, group: &[Sequence], value: f32, beside: &Beside) -> Weighed {
    match *objective {
        Objective::Sft | Objective::RewardWeighted { .. } => {
            unreachable!("the weights of {} are known before the forward", objective.name())
        }
        Objective::Dpo {
            loss,
            beta,
            label_smoothing,
        } => dpo::weigh(group, loss, beta, label_smoothing),
        Objective::Kto {
            beta,
            desirable_weight,
            undesirable_weight,
        } => match value != 0.0 {
            true => kto::desirable(group, beta, desirable_weight, beside.divergence),
            false => kto::undesirable(group, beta, undesirable_weight, beside.divergence),
        },
        Objective::Orpo { beta } => orpo::weigh(group, beta, beside),
        Objective::Cpo {
            loss,
            beta,
            label_smoothing,
            simpo_gamma,
            cpo_alpha,
        } => {
            let margin = cpo::Margin {
                loss,
                beta,
                label_smoothing,
                simpo_gamma,
            };
            cpo::weigh(group, &margin, cpo_alpha, beside)
        }
    }
}

/// Whether weights are known before the forward, which saves a product of the head.
pub fn is_known(objective: &Objective) -> bool {
    matches!(objective, Objective::Sft | Objective::RewardWeighted { .. })
}

impl Sequence<'_> {
    /// Labels of the answer. Those of the prompt have no weight.
    pub fn answer_labels(&self) -> f64 {
        self.labels.iter().filter(|(_, _, weight)| *weight != 0.0).count() as f64
    }

    /// log p of the answer.
    pub fn log_prob(&self) -> f64 {
        self.sum(self.log_probs)
    }

    /// log p of the answer, less what the reference says.
    pub fn log_ratio(&self) -> f64 {
        self.sum(self.log_probs) - self.sum(self.reference)
    }

    fn sum(&self, log_probs: &[f32]) -> f64 {
        let weighed = self.labels.iter().zip(log_probs);
        weighed
            .filter(|((_, _, weight), _)| *weight != 0.0)
            .map(|(_, &log_prob)| f64::from(log_prob))
            .sum()
    }

    /// A derivative by [`Sequence::log_prob`], as one of each label.
    pub fn spread(&self, derivative: f64) -> Vec<f64> {
        let of = |&(_, _, weight): &Label| if weight != 0.0 { derivative } else { 0.0 };
        self.labels.iter().map(of).collect()
    }
}

/// A group of a preferred answer and another.
fn pair<'a, 'b>(group: &'b [Sequence<'a>]) -> [&'b Sequence<'a>; 2] {
    match group {
        [chosen, rejected] => [chosen, rejected],
        _ => panic!("a pair has {} sequences", group.len()),
    }
}

fn pair_metrics(rewards: [f64; 2], log_probs: [f64; 2]) -> Vec<(&'static str, f64)> {
    let [chosen, rejected] = rewards;
    vec![
        (CHOSEN, chosen),
        (REJECTED, rejected),
        ("rewards/accuracies", f64::from(u8::from(chosen > rejected))),
        (MARGINS, chosen - rejected),
        ("logps/chosen", log_probs[0]),
        ("logps/rejected", log_probs[1]),
    ]
}

const CHOSEN: &str = "rewards/chosen";
const REJECTED: &str = "rewards/rejected";
const MARGINS: &str = "rewards/margins";

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// Sums over the labels, or the groups, of a step.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Scores {
    loss: f64,
    weight: f64,
    correct: u64,
    labels: u64,
    /// Sum and number of each.
    metrics: BTreeMap<Cow<'static, str>, (f64, u64)>,
}

impl Scores {
    /// Labels whose weights are final, and what a pass or a look found of them.
    pub fn add(&mut self, labels: &[Label], found: &LogProbs) {
        for (&(_, _, weight), &log_prob) in labels.iter().zip(&found.log_probs) {
            self.loss -= f64::from(weight) * f64::from(log_prob);
            self.weight += f64::from(weight);
        }
        self.add_labels(labels.len(), found);
    }

    pub fn add_labels(&mut self, labels: usize, found: &LogProbs) {
        self.correct += found.correct.iter().filter(|&&is| is).count() as u64;
        self.labels += labels as u64;
    }

    /// A group that is `share` of the step.
    pub fn add_weighed(&mut self, weighed: &Weighed, share: f64) {
        self.loss += share * weighed.loss;
        self.weight += share;
        for &(name, value) in &weighed.metrics {
            let (sum, n) = self.metrics.entry(Cow::Borrowed(name)).or_default();
            *sum += value;
            *n += 1;
        }
    }

    /// Those of another rank of the step as well.
    pub fn merge(&mut self, other: &Scores) {
        let Scores {
            loss,
            weight,
            correct,
            labels,
            metrics,
        } = other;
        self.loss += loss;
        self.weight += weight;
        self.correct += correct;
        self.labels += labels;
        for (name, (value, groups)) in metrics {
            let (sum, n) = self.metrics.entry(name.clone()).or_default();
            *sum += value;
            *n += groups;
        }
    }

    /// Mean over the weights.
    pub fn loss(&self) -> f64 {
        self.loss / self.weight.max(f64::MIN_POSITIVE)
    }

    /// Share of labels that were the most likely tokens.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.labels.max(1) as f64
    }

    /// Labels that were scored.
    pub fn labels(&self) -> u64 {
        self.labels
    }

    /// The mean of each metric over the groups that have it.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let mean = |(name, &(sum, n)): (&Cow<str>, &(f64, u64))| (name.to_string(), sum / n as f64);
        let mut means: BTreeMap<String, f64> = self.metrics.iter().map(mean).collect();
        // Of rows that are judged alone there is no margin, only of their means.
        if let (Some(chosen), Some(rejected)) = (means.get(CHOSEN), means.get(REJECTED)) {
            let margin = chosen - rejected;
            means.entry(MARGINS.to_owned()).or_insert(margin);
        }
        means
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

/// Multiplies the weights of each sequence by the factor of its row.
pub fn by_reward(slices: &mut [Slice], factors: impl IntoIterator<Item = f64>) {
    let mut factors = factors.into_iter();
    for slice in slices {
        for (sequence, factor) in slice.sequences.iter().zip(&mut factors) {
            for (_, _, weight) in &mut slice.labels[sequence.clone()] {
                *weight = (f64::from(*weight) * factor) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests;
