//! A completion request to one call per prompt. The answer is shaped in http/completions.rs, as it arrives.

use std::vec;

use tandem_openapi::completions::{CompletionPrompt, CompletionRequest};
use tandem_router::api::{Call, Client, Prompt};

use super::sampling::{self, Delivery, Fields, Limits, MAX_CHOICES};
use super::structured::{self, Asked};
use super::{integer, token_ids};
use crate::error::{ApiError, invalid};

const DEFAULT_MAX_TOKENS: u32 = 16;

/// Calls that differ in their prompts, made one by one: what all have is copied only when those before were not refused, so
/// that a thousand prompts are no way to have a large field a thousand times.
pub struct Calls {
    template: Call,
    prompts: vec::IntoIter<Prompt>,
}

impl Calls {
    pub fn new(template: Call, prompts: Vec<Prompt>) -> Calls {
        Calls {
            template,
            prompts: prompts.into_iter(),
        }
    }

    pub fn prompts(&self) -> &[Prompt] {
        self.prompts.as_slice()
    }
}

impl Iterator for Calls {
    type Item = Call;

    fn next(&mut self) -> Option<Call> {
        self.prompts.next().map(|prompt| Call {
            prompt,
            ..self.template.clone()
        })
    }
}

pub struct Completions {
    pub calls: Calls,
    pub n: u32,
    pub delivery: Delivery,
    pub echo: bool,
    /// Log-probabilities were asked, with this many alternatives; with `echo`, of the prompt too.
    pub logprobs: Option<u32>,
    /// vLLM's own field, apart from `echo`.
    pub prompt_logprobs: Option<u32>,
    pub return_token_ids: bool,
}

pub fn calls(request: CompletionRequest, limits: Limits) -> Result<Completions, ApiError> {
    let CompletionRequest {
        model,
        prompt,
        max_tokens,
        temperature,
        top_p,
        n,
        stream,
        stream_options,
        logprobs,
        echo,
        stop,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
        top_k,
        min_p,
        repetition_penalty,
        min_tokens,
        stop_token_ids,
        include_stop_str_in_output,
        ignore_eos,
        skip_special_tokens,
        add_special_tokens,
        prompt_logprobs,
        return_token_ids,
        best_of,
        response_format,
        structured_outputs,
        guided_json,
        guided_regex,
        guided_choice,
        guided_grammar,
        guided_whitespace_pattern,
        json_schema,
        grammar,
        cache_salt,
        priority,
    } = request;
    let n = sampling::n(n)?;
    if best_of.is_some_and(|best| best != i64::from(n)) {
        return Err(ApiError::NotBuilt {
            param: "best_of".to_owned(),
            hint: format!(", unless it equals n, which is {n}"),
        });
    }
    let constraint = structured::constraint(Asked {
        response_format,
        structured_outputs,
        guided_json,
        guided_regex,
        guided_choice,
        guided_grammar,
        guided_whitespace_pattern,
        json_schema,
        grammar,
    })?;
    let echo = echo.unwrap_or(false);
    // 0 tokens are an answer only where the prompt comes back.
    let max_tokens = sampling::max_tokens("max_tokens", max_tokens, u32::from(!echo), limits)?;
    let max_tokens = Some(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS));
    let delivery = sampling::delivery(stream, stream_options)?;
    let logprobs = sampling::logprobs("logprobs", logprobs)?;
    let prompt_logprobs = sampling::logprobs("prompt_logprobs", prompt_logprobs)?;
    if prompt_logprobs.is_some() && delivery != Delivery::Whole {
        return Err(invalid("prompt_logprobs", "prompt_logprobs cannot be streamed"));
    }
    let echoed = logprobs.filter(|_| echo);
    let fields = Fields {
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
        prompt_logprobs: prompt_logprobs.max(echoed),
    };
    let prompts = prompts("prompt", prompt)?;
    let choices = integer("prompt", prompts.len() as i64, 1, i64::from(MAX_CHOICES / n));
    choices.map_err(|_| {
        invalid(
            "prompt",
            format!(
                "{} prompts with n = {n} exceed {MAX_CHOICES} choices",
                prompts.len()
            ),
        )
    })?;
    let template = Call {
        client: Client::default(),
        earlier: 0,
        model,
        prompt: Prompt::Tokens(Vec::new()),
        n,
        max_tokens,
        pooling: None,
        sampling: sampling::raw_sampling(fields, max_tokens)?,
        priority: priority.unwrap_or(0),
        cache_salt: sampling::cache_salt(cache_salt)?,
        constraint,
        answer: None,
        stop: sampling::stop(stop)?,
        stop_token_ids: sampling::stop_token_ids(stop_token_ids)?,
        include_stop_str_in_output: include_stop_str_in_output.unwrap_or(false),
        ignore_eos: ignore_eos.unwrap_or(false),
        skip_special_tokens: skip_special_tokens.unwrap_or(true),
        add_special_tokens: add_special_tokens.unwrap_or(true),
    };
    Ok(Completions {
        calls: Calls::new(template, prompts),
        n,
        delivery,
        echo,
        logprobs,
        prompt_logprobs,
        return_token_ids: return_token_ids.unwrap_or(false),
    })
}

/// One or more, of the field `param`.
pub fn prompts(param: &str, prompt: CompletionPrompt) -> Result<Vec<Prompt>, ApiError> {
    let prompts: Vec<Prompt> = match prompt {
        CompletionPrompt::Text(text) => vec![Prompt::Text(text)],
        // An empty list is a list of texts to serde.
        CompletionPrompt::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
        CompletionPrompt::Tokens(ids) => vec![Prompt::Tokens(token_ids(param, ids)?)],
        CompletionPrompt::ManyTokens(lists) => lists
            .into_iter()
            .map(|ids| Ok(Prompt::Tokens(token_ids(param, ids)?)))
            .collect::<Result<_, ApiError>>()?,
    };
    match prompts.is_empty() {
        true => Err(invalid(
            param,
            format!("{param} is an empty list; at least one text is needed"),
        )),
        false => Ok(prompts),
    }
}
