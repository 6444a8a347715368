//! Requests of text-generation-inference become completion requests, which have the checks. What the two call differently is
//! named here, so that a refusal speaks of the field that was sent ([`WORDS`]). The answer is shaped in http/generate.rs.

use serde_json::Value;
use tandem_openapi::common::Strings;
use tandem_openapi::completions::{CompletionPrompt, CompletionRequest};
use tandem_openapi::generate::{GenerateGrammar, GenerateParameters, GenerateRequest};

use super::natural;
use super::sampling::Limits;
use crate::error::{ApiError, invalid};

/// A field of a completion's, and what it is here.
pub const WORDS: &[(&str, &str)] = &[
    ("max_tokens", "max_new_tokens"),
    ("prompt_logprobs", "decoder_input_details"),
    ("logprobs", "top_n_tokens"),
    ("guided_json", "grammar.value"),
    ("guided_regex", "grammar.value"),
];

/// Of requests that do not say.
const DEFAULT_MAX_TOKENS: u32 = 1024;

/// What was asked beside the text.
#[derive(Clone, Debug, Default)]
pub struct Show {
    pub details: bool,
    pub prefill: bool,
    pub top_n_tokens: u32,
    /// The inputs, where they come back.
    pub before: String,
    pub seed: Option<i64>,
}

/// How many of the inputs' tokens are kept.
pub type Truncate = Option<usize>;

/// `base`: the model that answers where none is named.
pub fn completion(
    request: GenerateRequest,
    base: &str,
    limits: Limits,
) -> Result<(CompletionRequest, Truncate, Show), ApiError> {
    let GenerateRequest {
        inputs,
        parameters,
        stream,
    } = request;
    let GenerateParameters {
        adapter_id,
        best_of,
        do_sample,
        temperature,
        top_k,
        top_p,
        typical_p,
        repetition_penalty,
        frequency_penalty,
        seed,
        max_new_tokens,
        stop,
        stop_sequences,
        return_full_text,
        truncate,
        watermark,
        details,
        decoder_input_details,
        top_n_tokens,
        grammar,
    } = parameters.unwrap_or_default();
    let not_built = |param: &str, hint: &str| {
        Err(ApiError::NotBuilt {
            param: param.to_owned(),
            hint: hint.to_owned(),
        })
    };
    if best_of.is_some_and(|best| best != 1) {
        return not_built("best_of", ", unless it is 1: POST /v1/completions has n");
    }
    if typical_p.is_some_and(|p| p != 1.0) {
        return not_built("typical_p", ": use top_p");
    }
    if watermark == Some(true) {
        return not_built("watermark", "");
    }
    let stream = stream.unwrap_or(false);
    let details = details.unwrap_or(false);
    let prefill = decoder_input_details.unwrap_or(false);
    if prefill && (stream || !details) {
        let text = "decoder_input_details needs details, and an answer that is not a stream";
        return Err(invalid("decoder_input_details", text));
    }
    if top_n_tokens.is_some_and(|n| n > 0) && !details && !stream {
        return Err(invalid("top_n_tokens", "top_n_tokens needs details"));
    }
    let stop = match (stop, stop_sequences) {
        (Some(_), Some(_)) => {
            return Err(invalid(
                "stop_sequences",
                "stop_sequences is the older name of stop: send one of them",
            ));
        }
        (stop, older) => stop.or(older),
    };
    // Whatever only a draw needs asks for one.
    let draws = do_sample.unwrap_or(false)
        || temperature.is_some_and(|t| t != 1.0)
        || top_k.is_some_and(|k| k != 0)
        || top_p.is_some_and(|p| p != 1.0);
    let truncate = truncate
        .map(|n| natural("truncate", n, 1, u32::MAX))
        .transpose()?;
    let (guided_json, guided_regex) = grammar.map_or(Ok((None, None)), guided)?;
    let max_tokens = max_new_tokens.unwrap_or(i64::from(DEFAULT_MAX_TOKENS.min(limits.max_model_len)));
    let before = match return_full_text {
        Some(true) => inputs.clone(),
        Some(false) | None => String::new(),
    };
    let request = CompletionRequest {
        model: adapter_id
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| base.to_owned()),
        prompt: CompletionPrompt::Text(inputs),
        max_tokens: Some(max_tokens),
        temperature: if draws {
            temperature.or(Some(1.0))
        } else {
            Some(0.0)
        },
        top_k,
        top_p,
        repetition_penalty,
        frequency_penalty,
        seed,
        stop: stop.filter(|stop| *stop != Strings::Many(Vec::new())),
        include_stop_str_in_output: Some(true),
        stream: Some(stream),
        logprobs: Some(top_n_tokens.unwrap_or(0)),
        prompt_logprobs: prefill.then_some(0),
        guided_json,
        guided_regex,
        ..CompletionRequest::default()
    };
    let show = Show {
        details,
        prefill,
        top_n_tokens: top_n_tokens.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        before,
        seed,
    };
    Ok((request, truncate.map(|n| n as usize), show))
}

/// A schema, or a regular expression.
fn guided(grammar: GenerateGrammar) -> Result<(Option<Value>, Option<String>), ApiError> {
    let GenerateGrammar { kind, mut value } = grammar;
    match (kind.as_str(), &value) {
        ("json", _) => Ok((Some(value), None)),
        ("json_schema", Value::Object(named)) if named.contains_key("schema") => {
            Ok((Some(value["schema"].take()), None))
        }
        ("json_schema", _) => Err(invalid(
            "grammar.value",
            "grammar.value of the type json_schema needs a schema",
        )),
        ("regex", Value::String(pattern)) => Ok((None, Some(pattern.clone()))),
        ("regex", _) => Err(invalid(
            "grammar.value",
            "grammar.value of the type regex must be a text",
        )),
        _ => {
            let text = format!("grammar.type must be json, json_schema or regex, got {kind:?}");
            Err(invalid("grammar.type", text))
        }
    }
}
