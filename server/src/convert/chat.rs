//! A chat request to a call. The answer is shaped in http/chat.rs, as it arrives.

use tandem_openapi::chat::{ChatContent, ChatMessage, ChatPart, ChatRequest};
use tandem_router::api::{Call, Client, Prompt};
use tandem_text::chat::Message;

use super::sampling::{self, Delivery, Fields, Limits};
use crate::error::{ApiError, invalid};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A checked request: what to generate and how to send it.
pub struct Chat {
    pub call: Call,
    pub delivery: Delivery,
    /// Log-probabilities of the answer were asked, with this many alternatives.
    pub top_logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    pub return_token_ids: bool,
}

pub fn call(request: ChatRequest, limits: Limits) -> Result<Chat, ApiError> {
    let ChatRequest {
        model,
        messages,
        max_completion_tokens,
        max_tokens,
        temperature,
        top_p,
        n,
        stream,
        stream_options,
        stop,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        logprobs,
        top_logprobs,
        seed,
        top_k,
        min_p,
        repetition_penalty,
        min_tokens,
        stop_token_ids,
        include_stop_str_in_output,
        ignore_eos,
        skip_special_tokens,
        add_generation_prompt,
        continue_final_message,
        chat_template_kwargs,
        prompt_logprobs,
        return_token_ids,
        response_format,
        modalities,
    } = request;
    let n = sampling::n(n)?;
    sampling::response_format(response_format)?;
    if let Some(other) = modalities.unwrap_or_default().iter().find(|one| *one != "text") {
        let hint = format!(": {other:?} is none of it, only \"text\" is built");
        return Err(ApiError::NotBuilt {
            param: "modalities".to_owned(),
            hint,
        });
    }
    let max_tokens = match max_completion_tokens {
        Some(_) => sampling::max_tokens("max_completion_tokens", max_completion_tokens, 1, limits)?,
        None => sampling::max_tokens("max_tokens", max_tokens, 1, limits)?,
    };
    let delivery = sampling::delivery(stream, stream_options)?;
    let top_logprobs = match (
        logprobs.unwrap_or(false),
        sampling::logprobs("top_logprobs", top_logprobs)?,
    ) {
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(invalid("top_logprobs", "top_logprobs needs logprobs: true")),
        (true, top) => Some(top.unwrap_or(0)),
    };
    let prompt_logprobs = sampling::logprobs("prompt_logprobs", prompt_logprobs)?;
    if prompt_logprobs.is_some() && delivery != Delivery::Whole {
        return Err(invalid("prompt_logprobs", "prompt_logprobs cannot be streamed"));
    }
    let prompt = prompt(
        messages,
        add_generation_prompt,
        continue_final_message,
        chat_template_kwargs,
    )?;
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
        logprobs: top_logprobs,
        prompt_logprobs,
    };
    let call = Call {
        client: Client::default(),
        model,
        prompt,
        n,
        max_tokens,
        sampling: sampling::raw_sampling(fields, max_tokens)?,
        stop: sampling::stop(stop)?,
        stop_token_ids: sampling::stop_token_ids(stop_token_ids)?,
        include_stop_str_in_output: include_stop_str_in_output.unwrap_or(false),
        ignore_eos: ignore_eos.unwrap_or(false),
        skip_special_tokens: skip_special_tokens.unwrap_or(true),
    };
    let return_token_ids = return_token_ids.unwrap_or(false);
    Ok(Chat {
        call,
        delivery,
        top_logprobs,
        prompt_logprobs,
        return_token_ids,
    })
}

/// Also what /tokenize takes.
pub fn prompt(
    messages: Vec<ChatMessage>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    kwargs: Option<serde_json::Map<String, serde_json::Value>>,
) -> Result<Prompt, ApiError> {
    if messages.is_empty() {
        let message = "messages is empty; at least one message is needed".to_owned();
        return Err(ApiError::Invalid {
            param: Some("messages".to_owned()),
            code: Some("empty_array"),
            message,
        });
    }
    let continue_final_message = continue_final_message.unwrap_or(false);
    // Continuing an answer and opening a new one exclude each other; only the default gives way.
    let add_generation_prompt = match (add_generation_prompt, continue_final_message) {
        (Some(true), true) => {
            let text = "add_generation_prompt and continue_final_message cannot both be true";
            return Err(invalid("continue_final_message", text));
        }
        (asked, continued) => asked.unwrap_or(!continued),
    };
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(i, one)| message(i, one))
        .collect::<Result<_, _>>()?;
    let kwargs = kwargs.unwrap_or_default().into_iter().collect();
    Ok(Prompt::Chat {
        messages,
        add_generation_prompt,
        continue_final_message,
        kwargs,
    })
}

fn message(i: usize, message: ChatMessage) -> Result<Message, ApiError> {
    let ChatMessage {
        role,
        content,
        name,
        tool_calls,
        function_call,
    } = message;
    if !ROLES.contains(&role.as_str()) {
        let text = format!("{role:?} is not a role; the roles are {}", ROLES.join(", "));
        return Err(invalid(format!("messages[{i}].role"), text));
    }
    let none = |value: &serde_json::Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    for (field, value) in [("tool_calls", tool_calls), ("function_call", function_call)] {
        if value.is_some_and(|value| !none(&value)) {
            let param = format!("messages[{i}].{field}");
            return Err(ApiError::NotBuilt {
                param,
                hint: String::new(),
            });
        }
    }
    let content = match content {
        None => {
            return Err(invalid(
                format!("messages[{i}].content"),
                format!("messages[{i}] has no content"),
            ));
        }
        Some(ChatContent::Text(text)) => text,
        Some(ChatContent::Parts(parts)) => parts
            .into_iter()
            .enumerate()
            .map(|(j, one)| part(i, j, one))
            .collect::<Result<Vec<_>, _>>()?
            .concat(),
    };
    Ok(Message {
        role,
        content,
        weight: None,
        name,
    })
}

fn part(i: usize, j: usize, ChatPart { kind, text }: ChatPart) -> Result<String, ApiError> {
    let param = || format!("messages[{i}].content[{j}]");
    match (kind.as_str(), text) {
        ("text", Some(text)) => Ok(text),
        ("text", None) => Err(invalid(param(), "a text part has the field text")),
        (other, _) => {
            let kind: String = other.chars().take(40).collect();
            Err(ApiError::NotBuilt {
                param: param(),
                hint: format!(": its type is {kind:?}, only \"text\" is built"),
            })
        }
    }
}
