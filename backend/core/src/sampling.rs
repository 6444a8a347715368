//! How the next token is chosen. A [`Sampling`] that exists is valid.

use serde::{Deserialize, Serialize};

use crate::TokenId;

/// Most alternatives a request may ask for with each token (vLLM's `--max-logprobs` default).
pub const MAX_LOGPROBS: u32 = 20;

/// As asked, unchecked. Fields and ranges are vLLM's `SamplingParams`; `None` is the default of each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RawSampling {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// 0 and -1 mean off.
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub logit_bias: Vec<(TokenId, f64)>,
    pub seed: Option<u64>,
    /// Log-probability of each generated token, with this many alternatives (0: the token's own only).
    pub logprobs: Option<u32>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<u32>,
    pub min_tokens: Option<u32>,
}

/// Checked sampling parameters. They travel as what was asked, and are checked again where they arrive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawSampling", into = "RawSampling")]
pub struct Sampling {
    temperature: f64,
    top_p: f64,
    top_k: Option<u32>,
    min_p: f64,
    presence_penalty: f64,
    frequency_penalty: f64,
    repetition_penalty: f64,
    logit_bias: Vec<(TokenId, f64)>,
    seed: Option<u64>,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    min_tokens: u32,
}

/// `param` is the request's field; the message carries the numbers.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct BadSampling {
    pub param: &'static str,
    pub message: String,
}

impl Sampling {
    pub fn new(raw: RawSampling, vocab_size: u32) -> Result<Sampling, BadSampling> {
        let RawSampling {
            temperature,
            top_p,
            top_k,
            min_p,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logit_bias,
            seed,
            logprobs,
            prompt_logprobs,
            min_tokens,
        } = raw;
        let top_k = match top_k.unwrap_or(0) {
            -1 | 0 => None,
            k if k < -1 => {
                return Err(bad(
                    "top_k",
                    format!("top_k must be -1 or 0 (off) or at least 1, got {k}"),
                ));
            }
            k => Some(u32::try_from(k).unwrap_or(u32::MAX)),
        };
        for &(_, bias) in &logit_bias {
            within("logit_bias", bias, -100.0, 100.0)?;
        }
        for (param, asked) in [("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)] {
            if let Some(n) = asked.filter(|&n| n > MAX_LOGPROBS) {
                return Err(bad(
                    param,
                    format!("{param} must be at most {MAX_LOGPROBS}, got {n}"),
                ));
            }
        }
        let top_p = within("top_p", top_p.unwrap_or(1.0), 0.0, 1.0)?;
        if top_p == 0.0 {
            return Err(bad(
                "top_p",
                "top_p must be above 0 and at most 1, got 0".to_owned(),
            ));
        }
        // Beyond these, logits that are multiplied and divided by it leave the range of float32.
        let repetition_penalty = within(
            "repetition_penalty",
            repetition_penalty.unwrap_or(1.0),
            0.01,
            100.0,
        )?;
        let sampling = Sampling {
            temperature: within("temperature", temperature.unwrap_or(1.0), 0.0, 2.0)?,
            top_p,
            top_k,
            min_p: within("min_p", min_p.unwrap_or(0.0), 0.0, 1.0)?,
            presence_penalty: within("presence_penalty", presence_penalty.unwrap_or(0.0), -2.0, 2.0)?,
            frequency_penalty: within("frequency_penalty", frequency_penalty.unwrap_or(0.0), -2.0, 2.0)?,
            repetition_penalty,
            logit_bias,
            seed,
            logprobs,
            prompt_logprobs,
            min_tokens: min_tokens.unwrap_or(0),
        };
        sampling.check_vocabulary(vocab_size)?;
        Ok(sampling)
    }

    /// Whether every token that is named exists: what is not said by the parameters alone.
    pub fn check_vocabulary(&self, vocab_size: u32) -> Result<(), BadSampling> {
        match self.logit_bias.iter().find(|(token, _)| *token >= vocab_size) {
            None => Ok(()),
            Some((token, _)) => {
                let message =
                    format!("logit_bias names token {token}, the vocabulary has {vocab_size} tokens");
                Err(bad("logit_bias", message))
            }
        }
    }

    /// The most likely token, always. What tests and scoring use.
    pub fn greedy() -> Sampling {
        let raw = RawSampling {
            temperature: Some(0.0),
            ..RawSampling::default()
        };
        Sampling::new(raw, u32::MAX).expect("greedy parameters are in range")
    }

    /// The same parameters for choice `index` of a call with `n` choices: each draws its own tokens.
    pub fn for_choice(&self, index: u64) -> Sampling {
        Sampling {
            seed: self.seed.map(|seed| seed.wrapping_add(index)),
            ..self.clone()
        }
    }

    /// Does a token's past use count?
    pub fn has_penalties(&self) -> bool {
        let additive = self.presence_penalty != 0.0 || self.frequency_penalty != 0.0;
        additive || self.repetition_penalty != 1.0
    }

    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
    pub fn temperature(&self) -> f64 {
        self.temperature
    }
    pub fn top_p(&self) -> f64 {
        self.top_p
    }
    pub fn top_k(&self) -> Option<u32> {
        self.top_k
    }
    pub fn min_p(&self) -> f64 {
        self.min_p
    }
    pub fn presence_penalty(&self) -> f64 {
        self.presence_penalty
    }
    pub fn frequency_penalty(&self) -> f64 {
        self.frequency_penalty
    }
    pub fn repetition_penalty(&self) -> f64 {
        self.repetition_penalty
    }
    pub fn logit_bias(&self) -> &[(TokenId, f64)] {
        &self.logit_bias
    }
    pub fn seed(&self) -> Option<u64> {
        self.seed
    }
    pub fn logprobs(&self) -> Option<u32> {
        self.logprobs
    }
    pub fn prompt_logprobs(&self) -> Option<u32> {
        self.prompt_logprobs
    }
    pub fn min_tokens(&self) -> u32 {
        self.min_tokens
    }
}

impl TryFrom<RawSampling> for Sampling {
    type Error = BadSampling;

    /// Of any vocabulary: see [`Sampling::check_vocabulary`].
    fn try_from(raw: RawSampling) -> Result<Sampling, BadSampling> {
        Sampling::new(raw, u32::MAX)
    }
}

impl From<Sampling> for RawSampling {
    fn from(sampling: Sampling) -> RawSampling {
        let Sampling {
            temperature,
            top_p,
            top_k,
            min_p,
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logit_bias,
            seed,
            logprobs,
            prompt_logprobs,
            min_tokens,
        } = sampling;
        RawSampling {
            temperature: Some(temperature),
            top_p: Some(top_p),
            top_k: top_k.map(i64::from),
            min_p: Some(min_p),
            presence_penalty: Some(presence_penalty),
            frequency_penalty: Some(frequency_penalty),
            repetition_penalty: Some(repetition_penalty),
            logit_bias,
            seed,
            logprobs,
            prompt_logprobs,
            min_tokens: Some(min_tokens),
        }
    }
}

fn bad(param: &'static str, message: String) -> BadSampling {
    BadSampling { param, message }
}

fn within(param: &'static str, value: f64, low: f64, high: f64) -> Result<f64, BadSampling> {
    match value >= low && value <= high {
        true => Ok(value),
        false => Err(bad(
            param,
            format!("{param} must be between {low} and {high}, got {value}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_named_with_its_number() {
        let base = RawSampling::default;
        let cases = [
            (
                RawSampling {
                    temperature: Some(-0.1),
                    ..base()
                },
                "temperature",
            ),
            (
                RawSampling {
                    temperature: Some(f64::NAN),
                    ..base()
                },
                "temperature",
            ),
            (
                RawSampling {
                    top_p: Some(0.0),
                    ..base()
                },
                "top_p",
            ),
            (
                RawSampling {
                    top_k: Some(-2),
                    ..base()
                },
                "top_k",
            ),
            (
                RawSampling {
                    min_p: Some(1.5),
                    ..base()
                },
                "min_p",
            ),
            (
                RawSampling {
                    presence_penalty: Some(2.1),
                    ..base()
                },
                "presence_penalty",
            ),
            (
                RawSampling {
                    frequency_penalty: Some(-3.0),
                    ..base()
                },
                "frequency_penalty",
            ),
            (
                RawSampling {
                    repetition_penalty: Some(0.0),
                    ..base()
                },
                "repetition_penalty",
            ),
            (
                RawSampling {
                    logit_bias: vec![(9, 101.0)],
                    ..base()
                },
                "logit_bias",
            ),
            (
                RawSampling {
                    logit_bias: vec![(10, 0.0)],
                    ..base()
                },
                "logit_bias",
            ),
            (
                RawSampling {
                    logprobs: Some(21),
                    ..base()
                },
                "logprobs",
            ),
        ];
        for (raw, param) in cases {
            let refused = Sampling::new(raw.clone(), 10).unwrap_err();
            assert_eq!(refused.param, param);
            // Nor can it be sent by who did not check it. (JSON has no NaN; what it is written as is no number.)
            let forged = serde_json::from_value::<Sampling>(serde_json::to_value(raw).unwrap());
            let names_a_token = refused.message.contains("vocabulary") || refused.message.contains("NaN");
            assert!(forged.is_err() || names_a_token, "{refused}");
        }
        let chosen = RawSampling {
            temperature: Some(0.1 + 0.2),
            top_k: Some(7),
            logit_bias: vec![(9, -3.5)],
            seed: Some(u64::MAX),
            min_tokens: Some(3),
            ..base()
        };
        for raw in [base(), chosen] {
            let sampling = Sampling::new(raw, 10).unwrap();
            let json = serde_json::to_string(&sampling).unwrap();
            assert_eq!(serde_json::from_str::<Sampling>(&json).unwrap(), sampling);
        }
        assert!(Sampling::new(base(), 10).is_ok());
    }
}
