//! The objective of a run: which settings it reads, and what it is when they are not given. A setting that the objective
//! does not read is refused, because it would change nothing.

use super::{Refused, Settings, Why, refused};
use crate::job::{CpoLoss, DpoLoss, Objective};

/// Losses that are objectives of their own, or what supervised training minimises anyway.
const NLL: [&str; 2] = ["nll", "chunked_nll"];

/// Which settings an objective reads beside `objective`. Of `objective` these are all values.
const READS: [(&str, &[&str]); 7] = [
    ("sft", &["loss_type", "neftune_noise_alpha"]),
    ("dpo", &["loss_type", "beta", "label_smoothing"]),
    (
        "kto",
        &["loss_type", "beta", "desirable_weight", "undesirable_weight"],
    ),
    ("orpo", &["beta"]),
    ("cpo", &CPO),
    ("simpo", &CPO),
    ("reward_weighted", &["beta"]),
];
const CPO: [&str; 5] = ["loss_type", "beta", "label_smoothing", "simpo_gamma", "cpo_alpha"];

/// The objectives that read a setting; none where it is not one of theirs alone.
pub fn readers(setting: &str) -> impl Iterator<Item = &'static str> {
    READS
        .iter()
        .filter(move |(_, read)| read.contains(&setting))
        .map(|(objective, _)| *objective)
}

impl Settings {
    /// What was asked, completed.
    pub fn objective(&self) -> Result<Objective, Refused> {
        let name = self.objective.as_deref().unwrap_or("sft");
        let beta = |default| self.beta.unwrap_or(default);
        let objective = match name {
            "sft" => {
                self.is_loss_one_of(name, &NLL)?;
                Objective::Sft
            }
            "reward_weighted" => Objective::RewardWeighted { beta: beta(1.0) },
            "dpo" => {
                let loss = self.loss(name, DpoLoss::Sigmoid, DpoLoss::named, DpoLoss::NAMES)?;
                use DpoLoss::{ExoPair, Robust, Sigmoid};
                let label_smoothing = match (self.label_smoothing, loss) {
                    (None, ExoPair) => 1e-3,
                    (None, _) => 0.0,
                    (Some(0.0), ExoPair) => {
                        let message = "label_smoothing: exo_pair takes its logarithm: give a number above 0, such as 0.001";
                        return Err(wrong("label_smoothing", message.to_owned()));
                    }
                    (Some(share), _) => share,
                };
                if label_smoothing != 0.0 && ![Sigmoid, Robust, ExoPair].contains(&loss) {
                    return Err(unsmoothed(loss.name()));
                }
                Objective::Dpo {
                    loss,
                    beta: beta(0.1),
                    label_smoothing,
                }
            }
            "kto" => {
                self.is_loss_one_of(name, &["kto"])?;
                Objective::Kto {
                    beta: beta(0.1),
                    desirable_weight: self.desirable_weight.unwrap_or(1.0),
                    undesirable_weight: self.undesirable_weight.unwrap_or(1.0),
                }
            }
            "orpo" => Objective::Orpo { beta: beta(0.1) },
            "cpo" | "simpo" => {
                let is_simpo = name == "simpo";
                let default = if is_simpo {
                    CpoLoss::Simpo
                } else {
                    CpoLoss::Sigmoid
                };
                let losses = if is_simpo { &["simpo"] } else { CpoLoss::NAMES };
                let loss = self.loss(name, default, CpoLoss::named, losses)?;
                let label_smoothing = self.label_smoothing.unwrap_or(0.0);
                if label_smoothing != 0.0 && [CpoLoss::Hinge, CpoLoss::Ipo].contains(&loss) {
                    return Err(unsmoothed(loss.name()));
                }
                if self.simpo_gamma.is_some() && loss != CpoLoss::Simpo {
                    let message = format!(
                        "simpo_gamma belongs to loss_type simpo, not to {}: leave it out",
                        loss.name()
                    );
                    return Err(wrong("simpo_gamma", message));
                }
                Objective::Cpo {
                    loss,
                    beta: beta(if is_simpo { 2.0 } else { 0.1 }),
                    label_smoothing,
                    simpo_gamma: self.simpo_gamma.unwrap_or(if is_simpo { 1.0 } else { 0.5 }),
                    cpo_alpha: self.cpo_alpha.unwrap_or(if is_simpo { 0.0 } else { 1.0 }),
                }
            }
            _ => unreachable!("the table has no other objective than {name}"),
        };
        let given = serde_json::to_value(self).expect("settings are plain data");
        let all = READS.iter().flat_map(|(_, read)| read.iter().copied());
        for setting in all.filter(|setting| !given[*setting].is_null()) {
            if !readers(setting).any(|reader| reader == name) {
                let readers = readers(setting).collect::<Vec<_>>().join(", ");
                let message = format!(
                    "{setting} is read by objective {readers}, not by {name}: leave it out, or give one of them"
                );
                return Err(wrong(setting, message));
            }
        }
        let is_supervised = matches!(objective, Objective::Sft | Objective::RewardWeighted { .. });
        if self.prompt_loss_weight.is_some_and(|weight| weight != 0.0) && !is_supervised {
            let message =
                format!("prompt_loss_weight: {name} compares answers, prompts carry no loss: leave it out");
            return Err(wrong("prompt_loss_weight", message));
        }
        if self.train_on_input == Some(true) && !is_supervised {
            let message =
                format!("train_on_input: {name} compares answers, prompts carry no loss: leave it out");
            return Err(wrong("train_on_input", message));
        }
        let packs = self.packing == Some(true) || self.wraps();
        if packs && objective != Objective::Sft {
            let message = format!(
                "packing fills rows of supervised examples; {name} has batch_size rows in a batch: leave it out"
            );
            return Err(wrong("packing", message));
        }
        if matches!(objective, Objective::Kto { .. }) && self.batch_size == Some(1) {
            let message = "batch_size must be at least 2 for kto, which measures the distance to the reference on the answers of \
                           other rows of a batch; got 1";
            return Err(wrong("batch_size", message.to_owned()));
        }
        Ok(objective)
    }

    fn loss<T>(
        &self,
        objective: &str,
        default: T,
        named: impl Fn(&str) -> Option<T>,
        names: &[&str],
    ) -> Result<T, Refused> {
        self.is_loss_one_of(objective, names)?;
        let loss = self.loss_type.as_deref().and_then(named);
        Ok(loss.unwrap_or(default))
    }

    fn is_loss_one_of(&self, objective: &str, names: &[&str]) -> Result<(), Refused> {
        match self.loss_type.as_deref() {
            Some(loss) if !names.contains(&loss) => {
                let names = names.join(", ");
                let message = format!("loss_type of {objective} must be one of {names}, got {loss}");
                Err(wrong("loss_type", message))
            }
            _ => Ok(()),
        }
    }
}

fn unsmoothed(loss: &str) -> Refused {
    let message = format!("label_smoothing: loss_type {loss} does not read it: leave it out");
    wrong("label_smoothing", message)
}

fn wrong(name: &str, message: String) -> Refused {
    refused(name.to_owned(), Why::Value, message)
}
