//! What a run minimises, with its numbers. Names and meanings are TRL's; the formulas are the backend's
//! (`train/objective`).

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The negative log-likelihood of the labels.
    #[default]
    Sft,
    /// The same, rows weighed by exp(reward / beta): reward-weighted regression (Peters and Schaal, 2007).
    RewardWeighted { beta: f64 },
    /// Direct preference optimisation (arXiv 2305.18290) and the losses that TRL's DPOTrainer has beside it.
    Dpo {
        loss: DpoLoss,
        beta: f64,
        label_smoothing: f64,
    },
    /// arXiv 2402.01306
    Kto {
        beta: f64,
        desirable_weight: f64,
        undesirable_weight: f64,
    },
    /// arXiv 2403.07691
    Orpo { beta: f64 },
    /// arXiv 2401.08417, and SimPO (2405.14734).
    Cpo {
        loss: CpoLoss,
        beta: f64,
        label_smoothing: f64,
        simpo_gamma: f64,
        /// Of the chosen answers' negative log-likelihood.
        cpo_alpha: f64,
    },
}

/// What a row must be for an objective.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rows {
    /// An example to learn.
    #[default]
    Examples,
    /// A prompt with an answer that is preferred and one that is not.
    Pairs,
    /// An example that is desirable or not.
    Judged,
    /// An example with a number.
    Rewarded,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($variant,)* }

        impl $name {
            pub const NAMES: &[&str] = &[$($word),*];

            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $word,)* }
            }

            pub fn named(name: &str) -> Option<$name> {
                match name { $($word => Some($name::$variant),)* _ => None }
            }
        }
    };
}

words! {
    /// `loss_type` of TRL's DPOTrainer.
    DpoLoss {
        Sigmoid = "sigmoid",
        Hinge = "hinge",
        Ipo = "ipo",
        Robust = "robust",
        ExoPair = "exo_pair",
        NcaPair = "nca_pair",
        BcoPair = "bco_pair",
        SppoHard = "sppo_hard",
        ApoZero = "apo_zero",
        ApoDown = "apo_down",
        SigmoidNorm = "sigmoid_norm",
    }
}

words! {
    /// `loss_type` of TRL's CPOTrainer.
    CpoLoss {
        Sigmoid = "sigmoid",
        Hinge = "hinge",
        Ipo = "ipo",
        Simpo = "simpo",
    }
}

impl Objective {
    pub fn name(&self) -> &'static str {
        match self {
            Objective::Sft => "sft",
            Objective::RewardWeighted { .. } => "reward_weighted",
            Objective::Dpo { .. } => "dpo",
            Objective::Kto { .. } => "kto",
            Objective::Orpo { .. } => "orpo",
            Objective::Cpo { .. } => "cpo",
        }
    }

    pub fn rows(&self) -> Rows {
        match self {
            Objective::Sft => Rows::Examples,
            Objective::RewardWeighted { .. } => Rows::Rewarded,
            Objective::Dpo { .. } | Objective::Orpo { .. } | Objective::Cpo { .. } => Rows::Pairs,
            Objective::Kto { .. } => Rows::Judged,
        }
    }

    /// Whether it asks what the model said before it was trained.
    pub fn has_reference(&self) -> bool {
        matches!(self, Objective::Dpo { .. } | Objective::Kto { .. })
    }

    /// Every number by the name of its setting, in its order.
    pub fn numbers(&self) -> Vec<(&'static str, f64)> {
        match *self {
            Objective::Sft => vec![],
            Objective::RewardWeighted { beta } | Objective::Orpo { beta } => vec![("beta", beta)],
            Objective::Dpo {
                loss: _,
                beta,
                label_smoothing,
            } => vec![("beta", beta), ("label_smoothing", label_smoothing)],
            Objective::Kto {
                beta,
                desirable_weight,
                undesirable_weight,
            } => vec![
                ("beta", beta),
                ("desirable_weight", desirable_weight),
                ("undesirable_weight", undesirable_weight),
            ],
            Objective::Cpo {
                loss: _,
                beta,
                label_smoothing,
                simpo_gamma,
                cpo_alpha,
            } => vec![
                ("beta", beta),
                ("label_smoothing", label_smoothing),
                ("simpo_gamma", simpo_gamma),
                ("cpo_alpha", cpo_alpha),
            ],
        }
    }

    /// `loss_type`, where there is a choice.
    pub fn loss_type(&self) -> Option<&'static str> {
        match self {
            Objective::Dpo { loss, .. } => Some(loss.name()),
            Objective::Cpo { loss, .. } => Some(loss.name()),
            _ => None,
        }
    }

    /// Whether its numbers mean anything.
    pub(super) fn check(&self) -> Result<(), String> {
        let range = |name: &str| -> RangeInclusive<f64> {
            match name {
                "beta" => f64::MIN_POSITIVE..=1e6,
                "label_smoothing" => 0.0..=0.5 - f64::EPSILON,
                _ => 0.0..=1e6,
            }
        };
        // NaN is in no range.
        let wrong = self
            .numbers()
            .into_iter()
            .find(|&(name, value)| !range(name).contains(&value));
        match wrong {
            None => Ok(()),
            Some((name, value)) => {
                let (low, high) = range(name).into_inner();
                Err(format!(
                    "{name} must be between {low:e} and {high:e}, got {value}"
                ))
            }
        }
    }
}
