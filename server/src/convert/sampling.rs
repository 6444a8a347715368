//! The sampling fields that chat and completions share. Ranges of real numbers are `tandem_core::sampling`'s.

use std::collections::BTreeMap;

use tandem_core::TokenId;
use tandem_core::sampling::{MAX_LOGPROBS, RawSampling};
use tandem_openapi::common::Strings;
use tandem_openapi::usage::StreamOptions;

use super::{integer, natural, token_ids};
use crate::error::{ApiError, invalid};

/// Choices of one request, over all its prompts.
pub const MAX_CHOICES: u32 = 1024;
/// Choices of one prompt.
const MAX_N: u32 = 128;
/// OpenAI takes 4; lm-eval sends more.
pub const MAX_STOP_STRINGS: usize = 64;

/// vLLM's limit.
const MAX_SALT_BYTES: usize = 128;
/// Tokens that have a bias: each choice has its own copy.
const MAX_BIASES: usize = 4096;

/// What a replica allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub max_model_len: u32,
}

/// As on the wire.
pub struct Fields {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub logit_bias: Option<BTreeMap<String, f64>>,
    pub seed: Option<i64>,
    pub min_tokens: Option<i64>,
    /// Checked by the caller: chat and completions name it differently.
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
}

pub fn raw_sampling(fields: Fields, max_tokens: Option<u32>) -> Result<RawSampling, ApiError> {
    let Fields {
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias,
        seed,
        min_tokens,
        logprobs,
        prompt_logprobs,
    } = fields;
    let biases = logit_bias.as_ref().map_or(0, BTreeMap::len);
    if biases > MAX_BIASES {
        return Err(invalid(
            "logit_bias",
            format!("logit_bias has {biases} tokens, at most {MAX_BIASES} are allowed"),
        ));
    }
    let bias = |(token, bias): (String, f64)| match token.parse::<TokenId>() {
        Ok(token) => Ok((token, bias)),
        Err(_) => Err(invalid(
            "logit_bias",
            format!("logit_bias has the key {token:?}, which is not a token id"),
        )),
    };
    Ok(RawSampling {
        temperature,
        top_p,
        top_k: top_k
            .map(|k| integer("top_k", k, -1, i64::from(u32::MAX)))
            .transpose()?,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias: logit_bias
            .unwrap_or_default()
            .into_iter()
            .map(bias)
            .collect::<Result<_, _>>()?,
        // -1 asks for a random one, as in most servers; any other 64 bits seed.
        seed: seed.filter(|&seed| seed != -1).map(i64::cast_unsigned),
        logprobs,
        prompt_logprobs,
        min_tokens: min_tokens
            .map(|n| natural("min_tokens", n, 0, max_tokens.unwrap_or(u32::MAX)))
            .transpose()?,
    })
}

pub fn cache_salt(salt: Option<String>) -> Result<Option<String>, ApiError> {
    match &salt {
        Some(text) if text.is_empty() || text.len() > MAX_SALT_BYTES => Err(invalid(
            "cache_salt",
            format!(
                "cache_salt must have 1 to {MAX_SALT_BYTES} bytes, got {}",
                text.len()
            ),
        )),
        _ => Ok(salt),
    }
}

pub fn n(n: Option<i64>) -> Result<u32, ApiError> {
    natural("n", n.unwrap_or(1), 1, MAX_N)
}

pub fn logprobs(param: &str, n: Option<i64>) -> Result<Option<u32>, ApiError> {
    n.map(|n| natural(param, n, 0, MAX_LOGPROBS)).transpose()
}

pub fn max_tokens(
    param: &str,
    value: Option<i64>,
    low: u32,
    limits: Limits,
) -> Result<Option<u32>, ApiError> {
    value
        .map(|n| natural(param, n, low, limits.max_model_len))
        .transpose()
}

pub fn stop(stop: Option<Strings>) -> Result<Vec<String>, ApiError> {
    let stop = stop.map_or_else(Vec::new, Strings::into_vec);
    if stop.len() > MAX_STOP_STRINGS {
        return Err(invalid(
            "stop",
            format!("stop has {} strings, {MAX_STOP_STRINGS} are allowed", stop.len()),
        ));
    }
    match stop.iter().position(String::is_empty) {
        Some(i) => Err(invalid("stop", format!("stop[{i}] is empty"))),
        None => Ok(stop),
    }
}

pub fn stop_token_ids(ids: Option<Vec<i64>>) -> Result<Vec<TokenId>, ApiError> {
    token_ids("stop_token_ids", ids.unwrap_or_default())
}

/// How an answer is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    Whole,
    Stream(StreamUsage),
}

/// Which chunks of a stream carry the usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamUsage {
    None,
    Last,
    Every,
}

pub fn delivery(stream: Option<bool>, options: Option<StreamOptions>) -> Result<Delivery, ApiError> {
    match (stream.unwrap_or(false), options) {
        (false, None) => Ok(Delivery::Whole),
        (false, Some(_)) => Err(invalid("stream_options", "stream_options needs stream: true")),
        (true, options) => {
            let StreamOptions {
                include_usage,
                continuous_usage_stats,
            } = options.unwrap_or_default();
            Ok(Delivery::Stream(match (include_usage, continuous_usage_stats) {
                (_, Some(true)) => StreamUsage::Every,
                (Some(true), _) => StreamUsage::Last,
                _ => StreamUsage::None,
            }))
        }
    }
}
