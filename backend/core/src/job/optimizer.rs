//! What makes a step of a gradient. Its rate, the decay and AdamW's numbers are [`super::Hyper`]'s.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Optimizer {
    #[default]
    AdamW,
    /// With moments in 8 bits, as bitsandbytes has them.
    AdamW8bit,
    Sgd {
        momentum: f64,
        nesterov: bool,
    },
    Lion,
    /// transformers', without a first moment and a rate of its own.
    Adafactor {
        scale_parameter: bool,
    },
}

impl Optimizer {
    /// transformers' name.
    pub fn name(self) -> &'static str {
        match self {
            Optimizer::AdamW => "adamw_torch",
            Optimizer::AdamW8bit => "adamw_8bit",
            Optimizer::Sgd { .. } => "sgd",
            Optimizer::Lion => "lion_32bit",
            Optimizer::Adafactor { .. } => "adafactor",
        }
    }

    /// Each number goes by itself, whatever tensor it is of.
    pub fn is_of_numbers(self) -> bool {
        !matches!(self, Optimizer::AdamW8bit | Optimizer::Adafactor { .. })
    }

    pub fn check(self) -> Result<(), String> {
        match self {
            Optimizer::Sgd { momentum, .. } if !(0.0..1.0).contains(&momentum) => {
                Err(format!("momentum must be at least 0 and below 1, got {momentum}"))
            }
            Optimizer::Sgd {
                momentum: 0.0,
                nesterov: true,
            } => Err("nesterov looks ahead along the momentum, which is 0: give momentum".to_owned()),
            _ => Ok(()),
        }
    }
}
