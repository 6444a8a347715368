//! A chat request to a call. The answer is shaped in http/chat.rs, as it arrives.

use serde_json::{Map, Value, json};
use tandem_openapi::chat::{ChatContent, ChatMessage, ChatPart, ChatRequest};
use tandem_router::api::{Answer, Call, Client, Constraint, Prompt, ToolChoice};
use tandem_text::chat::{Content, Message, calls_of, modernise};

use super::sampling::{self, Delivery, Fields, Limits};
use super::structured;
use super::tools::{self, Asked, Form, Offered};
use crate::error::{ApiError, invalid};

const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// A checked request: what to generate and how to send it.
pub struct Chat {
    pub call: Call,
    pub delivery: Delivery,
    /// Log-probabilities of the answer were asked, with this many alternatives.
    pub top_logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    pub return_token_ids: bool,
    pub form: Form,
    /// The function that is called was named in the request.
    pub is_named: bool,
    pub shows_reasoning: bool,
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
        reasoning_effort,
        documents,
        chat_template_kwargs,
        prompt_logprobs,
        return_token_ids,
        response_format,
        structured_outputs,
        guided_json,
        guided_regex,
        guided_choice,
        guided_grammar,
        guided_whitespace_pattern,
        json_schema,
        grammar,
        tools,
        tool_choice,
        parallel_tool_calls,
        functions,
        function_call,
        include_reasoning,
        separate_reasoning,
        thinking_token_budget,
        cache_salt,
        priority,
        modalities,
    } = request;
    let n = sampling::n(n)?;
    let of_content = response_format
        .as_ref()
        .is_some_and(|format| format.kind.starts_with("json"));
    let constraint = structured::constraint(structured::Asked {
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
    let Offered {
        tools,
        choice,
        parallel,
        form,
    } = tools::offered(Asked {
        tools,
        tool_choice,
        parallel_tool_calls,
        functions,
        function_call,
    })?;
    let constraint = match (&choice, constraint) {
        // As at OpenAI: an answer that must be a call has no content whose form it could be.
        (ToolChoice::Required | ToolChoice::Named(_), Some(_)) if of_content => None,
        (ToolChoice::Required | ToolChoice::Named(_), Some(Constraint { param, .. })) => {
            let text = format!("{param} and tool_choice both say what the answer must be; send one of them");
            return Err(invalid(param, text));
        }
        (_, constraint) => constraint,
    };
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
    let prompt = prompt(Conversation {
        messages,
        add_generation_prompt,
        continue_final_message,
        tools: tools.iter().map(|tool| tool.given.clone()).collect(),
        documents,
        reasoning_effort,
        chat_template_kwargs,
    })?;
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
    let is_named = matches!(choice, ToolChoice::Named(_));
    let answer = Answer {
        tools: tools.into(),
        choice,
        parallel,
        separate_reasoning: separate_reasoning.unwrap_or(true),
        thinking_budget: thinking_token_budget
            .map(|budget| super::natural("thinking_token_budget", budget, 0, u32::MAX))
            .transpose()?,
    };
    let call = Call {
        client: Client::default(),
        earlier: 0,
        model,
        prompt,
        n,
        max_tokens,
        pooling: None,
        sampling: sampling::raw_sampling(fields, max_tokens)?,
        priority: priority.unwrap_or(0),
        cache_salt: sampling::cache_salt(cache_salt)?,
        constraint,
        answer: Some(answer),
        stop: sampling::stop(stop)?,
        stop_token_ids: sampling::stop_token_ids(stop_token_ids)?,
        include_stop_str_in_output: include_stop_str_in_output.unwrap_or(false),
        ignore_eos: ignore_eos.unwrap_or(false),
        skip_special_tokens: skip_special_tokens.unwrap_or(true),
        // The template writes them.
        add_special_tokens: true,
    };
    let shows_reasoning = include_reasoning.unwrap_or(true);
    Ok(Chat {
        call,
        delivery,
        // They would show it.
        top_logprobs: top_logprobs.filter(|_| shows_reasoning),
        prompt_logprobs,
        return_token_ids: return_token_ids.unwrap_or(false) && shows_reasoning,
        form,
        is_named,
        shows_reasoning,
    })
}

/// What the chat template makes a prompt of; /tokenize takes the same.
pub struct Conversation {
    pub messages: Vec<ChatMessage>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    /// As the template gets them.
    pub tools: Vec<Value>,
    pub documents: Option<Vec<Map<String, Value>>>,
    pub reasoning_effort: Option<String>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

pub fn prompt(conversation: Conversation) -> Result<Prompt, ApiError> {
    let Conversation {
        messages,
        add_generation_prompt,
        continue_final_message,
        tools,
        documents,
        reasoning_effort,
        chat_template_kwargs,
    } = conversation;
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
    let mut messages = messages
        .into_iter()
        .enumerate()
        .map(|(i, one)| message(i, one))
        .collect::<Result<Vec<_>, _>>()?;
    modernise(&mut messages);
    if let Some(effort) = reasoning_effort
        .as_deref()
        .filter(|effort| !EFFORTS.contains(effort))
    {
        let text = format!(
            "reasoning_effort must be one of {}, got {effort:?}",
            EFFORTS.join(", ")
        );
        return Err(invalid("reasoning_effort", text));
    }
    let documents = documents.filter(|documents| !documents.is_empty());
    let fields = [
        ("tools", (!tools.is_empty()).then(|| json!(tools))),
        ("documents", documents.map(|documents| json!(documents))),
        ("reasoning_effort", reasoning_effort.map(Value::String)),
    ];
    let mut kwargs = chat_template_kwargs.unwrap_or_default();
    for (name, value) in fields {
        match (kwargs.contains_key(name), value) {
            (_, None) => {}
            (false, Some(value)) => {
                kwargs.insert(name.to_owned(), value);
            }
            (true, Some(_)) => {
                let text = format!("{name} is given twice: as a field and in chat_template_kwargs");
                return Err(invalid("chat_template_kwargs", text));
            }
        }
    }
    Ok(Prompt::Chat {
        messages,
        add_generation_prompt,
        continue_final_message,
        kwargs: kwargs.into_iter().collect(),
    })
}

fn message(i: usize, message: ChatMessage) -> Result<Message, ApiError> {
    let ChatMessage {
        role,
        content,
        name,
        reasoning_content,
        reasoning,
        thinking,
        tool_calls,
        tool_call_id,
        function_call,
    } = message;
    if !ROLES.contains(&role.as_str()) {
        let text = format!("{role:?} is not a role; the roles are {}", ROLES.join(", "));
        return Err(invalid(format!("messages[{i}].role"), text));
    }
    let content = match content {
        None => None,
        Some(ChatContent::Text(text)) => Some(Content::Text(text)),
        Some(ChatContent::Parts(parts)) => {
            let parts = parts.into_iter().enumerate().map(|(j, one)| part(i, j, one));
            Some(Content::Parts(parts.collect::<Result<_, _>>()?))
        }
    };
    let calls = calls_of(&role, tool_calls, function_call).map_err(|(field, problem)| {
        let param = format!("messages[{i}].{field}");
        invalid(param.clone(), format!("{param}{problem}"))
    })?;
    let speaks = calls.is_some()
        || [&reasoning_content, &reasoning, &thinking]
            .iter()
            .any(|text| text.is_some());
    let texts = [
        ("name", name),
        ("reasoning_content", reasoning_content),
        ("reasoning", reasoning),
        ("thinking", thinking),
        ("tool_call_id", tool_call_id),
    ];
    let texts = texts
        .into_iter()
        .filter_map(|(key, text)| Some((key, Value::String(text?))));
    let given = texts.chain(calls);
    let fields = given.map(|(key, value)| (key.to_owned(), value)).collect();
    if content.is_none() && !(role == "assistant" && speaks) {
        return Err(invalid(
            format!("messages[{i}].content"),
            format!("messages[{i}] has no content"),
        ));
    }
    Ok(Message {
        role,
        content,
        weight: None,
        fields,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(body: Value) -> Result<Prompt, ApiError> {
        let mut body = body;
        body["model"] = json!("m");
        let request: ChatRequest =
            serde_json::from_value(body).expect("the cases have the fields of a request");
        call(request, Limits { max_model_len: 64 }).map(|chat| chat.call.prompt)
    }

    #[test]
    fn all_that_a_template_may_read_reaches_it() {
        let body = json!({
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
                {"role": "assistant", "content": null, "reasoning": "hm", "refusal": null, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1e-7}"}}]},
                {"role": "tool", "content": "c", "tool_call_id": "1"},
            ],
            "reasoning_effort": "low", "documents": [{"text": "d"}], "chat_template_kwargs": {"enable_thinking": false},
        });
        let Ok(Prompt::Chat { messages, kwargs, .. }) = conversation(body) else {
            panic!("a conversation")
        };
        assert_eq!(
            messages[0].content,
            Some(Content::Parts(vec!["a".to_owned(), "b".to_owned()]))
        );
        assert_eq!(
            (&messages[0].fields["name"], &messages[1].content),
            (&json!("Ann"), &None)
        );
        assert_eq!(messages[1].fields["reasoning"], "hm");
        assert_eq!(
            messages[1].fields["tool_calls"][0]["function"]["arguments"],
            "{\"x\": 1e-7}"
        );
        assert_eq!(messages[2].fields["tool_call_id"], "1");
        let expected =
            json!({"reasoning_effort": "low", "documents": [{"text": "d"}], "enable_thinking": false});
        assert_eq!(json!(kwargs), expected);
    }

    #[test]
    fn what_no_template_can_read_is_refused_by_name() {
        let cases = [
            (
                json!({"messages": [{"role": "assistant", "content": null}]}),
                "messages[0].content",
            ),
            (
                json!({"messages": [{"role": "user", "content": null, "reasoning": "a"}]}),
                "messages[0].content",
            ),
            (
                json!({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}),
                "messages[0].tool_calls",
            ),
            (
                json!({"messages": [{"role": "assistant", "tool_calls": [{}]}]}),
                "messages[0].tool_calls",
            ),
            (
                json!({"messages": [{"role": "assistant", "content": "a", "function_call": {"arguments": "{}"}}]}),
                "messages[0].function_call",
            ),
            (
                json!({"messages": [{"role": "user", "content": "a", "function_call": {"name": "f"}}]}),
                "messages[0].function_call",
            ),
            (
                json!({"messages": [{"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [{"function": {"name": "f"}}]}]}),
                "messages[0].function_call",
            ),
            (
                json!({"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "lots"}),
                "reasoning_effort",
            ),
            (
                json!({"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "low",
                       "chat_template_kwargs": {"reasoning_effort": "high"}}),
                "chat_template_kwargs",
            ),
        ];
        for (body, expected) in cases {
            let shown = body.to_string();
            match conversation(body) {
                Err(
                    ApiError::Invalid {
                        param: Some(param), ..
                    }
                    | ApiError::NotBuilt { param, .. },
                ) => {
                    assert_eq!(param, expected, "{shown}");
                }
                other => panic!("{shown} gave {:?}", other.map(|_| "a prompt")),
            }
        }
    }
}
