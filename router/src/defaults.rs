//! What a request that does not say gets: the sampling parameters that a model's generation_config.json recommends, as
//! vLLM applies them. Not here: end-of-sequence tokens, which the replica tells.

use std::fmt;

use serde::Deserialize;
use tandem_core::sampling::{RawSampling, Sampling};

/// `None`: the parameter's own default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    /// Of a conversation's answer; a plain completion has 16, as at OpenAI.
    pub max_tokens: Option<u32>,
}

/// The keys that are applied; the file has many more, of other libraries.
#[derive(Deserialize)]
struct File {
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    max_new_tokens: Option<u32>,
}

/// transformers' parameters that have no counterpart in a default here, each with the number that switches it off.
const NOT_APPLIED: [(&str, f64); 22] = [
    ("min_new_tokens", 0.0),
    ("min_length", 0.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("top_h", 0.0),
    ("penalty_alpha", 0.0),
    ("num_beams", 1.0),
    ("num_beam_groups", 1.0),
    ("diversity_penalty", 0.0),
    ("length_penalty", 1.0),
    ("early_stopping", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("bad_words_ids", 0.0),
    ("sequence_bias", 0.0),
    ("suppress_tokens", -1.0),
    ("begin_suppress_tokens", -1.0),
    ("forced_bos_token_id", -1.0),
    ("forced_eos_token_id", -1.0),
    ("guidance_scale", 1.0),
    ("stop_strings", 0.0),
];

impl Defaults {
    /// The content of a generation_config.json; an error says what is wrong with it.
    pub fn read(content: &[u8]) -> Result<Defaults, String> {
        let File {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            max_new_tokens,
        } = serde_json::from_slice(content).map_err(|error| error.to_string())?;
        let defaults = Defaults {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            max_tokens: max_new_tokens,
        };
        if max_new_tokens == Some(0) {
            return Err("max_new_tokens must be at least 1, got 0".to_owned());
        }
        match Sampling::new(defaults.fill(RawSampling::default()), u32::MAX) {
            Ok(_) => Ok(defaults),
            Err(bad) => Err(bad.message),
        }
    }

    /// Keys of a generation_config.json that would change answers, with values that do so, and are not applied.
    pub fn not_applied(content: &[u8]) -> Vec<&'static str> {
        let file: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(content).unwrap_or_default();
        let changes = |&(key, neutral): &(&str, f64)| match file.get(key) {
            None | Some(serde_json::Value::Null | serde_json::Value::Bool(false)) => false,
            Some(serde_json::Value::Number(number)) => number.as_f64() != Some(neutral),
            Some(serde_json::Value::Array(items)) => !items.is_empty(),
            Some(_) => true,
        };
        NOT_APPLIED
            .iter()
            .filter(|row| changes(row))
            .map(|(key, _)| *key)
            .collect()
    }

    pub(crate) fn fill(&self, asked: RawSampling) -> RawSampling {
        RawSampling {
            temperature: asked.temperature.or(self.temperature),
            top_p: asked.top_p.or(self.top_p),
            top_k: asked.top_k.or(self.top_k),
            min_p: asked.min_p.or(self.min_p),
            repetition_penalty: asked.repetition_penalty.or(self.repetition_penalty),
            ..asked
        }
    }
}

/// `temperature 0.6, top_p 0.9`; nothing where none differs.
impl fmt::Display for Defaults {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let Defaults {
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            max_tokens,
        } = self;
        let one = |name: &str, value: Option<String>| value.map(|value| format!("{name} {value}"));
        let all = [
            one("temperature", temperature.map(|n| n.to_string())),
            one("top_p", top_p.map(|n| n.to_string())),
            one("top_k", top_k.map(|n| n.to_string())),
            one("min_p", min_p.map(|n| n.to_string())),
            one("repetition_penalty", repetition_penalty.map(|n| n.to_string())),
            one("max_tokens", max_tokens.map(|n| n.to_string())),
        ];
        formatter.write_str(&all.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_recommends_and_a_request_decides() {
        let text = r#"{"bos_token_id": 0, "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": null,
            "max_new_tokens": 64, "transformers_version": "5.0"}"#;
        let defaults = Defaults::read(text.as_bytes()).unwrap();
        assert_eq!(defaults.to_string(), "temperature 0.6, top_p 0.9, max_tokens 64");
        let asked = RawSampling {
            temperature: Some(0.0),
            seed: Some(7),
            ..RawSampling::default()
        };
        let filled = defaults.fill(asked);
        assert_eq!(
            (filled.temperature, filled.top_p, filled.top_k, filled.seed),
            (Some(0.0), Some(0.9), None, Some(7))
        );
        assert_eq!(Defaults::read(b"{}").unwrap().to_string(), "");
    }

    #[test]
    fn what_is_not_applied_is_named() {
        let text = br#"{"temperature": 0.6, "num_beams": 1, "length_penalty": 1.0, "typical_p": 0.9, "suppress_tokens": [],
            "bad_words_ids": [[1]], "no_repeat_ngram_size": null, "early_stopping": false, "stop_strings": "x"}"#;
        assert_eq!(
            Defaults::not_applied(text),
            ["typical_p", "bad_words_ids", "stop_strings"]
        );
    }

    #[test]
    fn what_no_request_may_ask_no_file_may_recommend() {
        for (text, expected) in [
            (
                "{\"temperature\": 3}",
                "temperature must be between 0 and 2, got 3",
            ),
            ("{\"top_p\": 0}", "top_p"),
            ("{\"max_new_tokens\": 0}", "max_new_tokens"),
            ("{\"top_k\": \"many\"}", "invalid type"),
            ("[", "EOF"),
        ] {
            let error = Defaults::read(text.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
