//! POST /v1/chat/completions.

use axum::Json as Answer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use tandem_openapi::chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatRequest,
};
use tandem_openapi::error::Errors;
use tandem_openapi::tools::{FunctionCall, FunctionDelta, ToolCall, ToolCallDelta};
use tandem_router::api::{CallDelta, Delta, Finish, Piece, What};
use tandem_text::chat::CallIds;

use super::feed::{self, Admitted, Called, Gathered, Placed, finish_reason};
use super::stream::{self, Choices, Sink};
use crate::app::{App, now};
use crate::convert::chat::Chat;
use crate::convert::sampling::Delivery;
use crate::convert::tools::Form;
use crate::convert::{self, tokens};
use crate::error::ApiError;
use crate::extract::Json;
use crate::id;
use crate::keys::Asker;

/// Continue a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "inference", request_body = ChatRequest,
    responses(
        (status = 200, content((ChatCompletion = "application/json"), (String = "text/event-stream"))),
        Errors,
    )
)]
pub async fn create(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<ChatRequest>,
) -> Result<Response, ApiError> {
    let Chat {
        call,
        delivery,
        top_logprobs,
        prompt_logprobs,
        return_token_ids,
        form,
        is_named,
        shows_reasoning,
    } = convert::chat::call(request, app.limits())?;
    let may_call_or_think = call
        .answer
        .as_ref()
        .is_some_and(|answer| !answer.tools.is_empty() || app.router.config().reasoning_format.is_some());
    let (n, model) = (call.n, call.model.clone());
    let admitted = feed::admit(&app, client, vec![call], "messages").await?;
    let show = Show {
        top_logprobs,
        return_token_ids,
        form,
        is_named,
        shows_reasoning,
        call_ids: app.router.call_ids(),
    };
    match delivery {
        Delivery::Whole => whole(admitted, n, model, prompt_logprobs, show).await,
        Delivery::Stream(usage) => {
            let chunk = ChatChunk {
                id: id::fresh("chatcmpl-"),
                object: "chat.completion.chunk",
                created: now(),
                model,
                system_fingerprint: admitted.identity.fingerprint(),
                choices: Vec::new(),
                usage: None,
            };
            let chunks = Chunks {
                show,
                opening: (!may_call_or_think).then(String::new),
                begun: vec![Begun::No; n as usize],
            };
            stream::respond(admitted, &chunk, usage, chunks).await
        }
    }
}

/// What was asked beside the text.
#[derive(Clone, Copy)]
struct Show {
    top_logprobs: Option<u32>,
    return_token_ids: bool,
    form: Form,
    is_named: bool,
    shows_reasoning: bool,
    call_ids: CallIds,
}

impl Show {
    fn call_id(self) -> String {
        id::of_call("call_", self.call_ids)
    }

    /// A call of the function that was named ends with `stop`, as OpenAI's and vLLM's do.
    fn finish_reason(self, reason: Finish) -> &'static str {
        match (reason, self.form) {
            (Finish::Calls, _) if self.is_named => finish_reason(Finish::Stop),
            (Finish::Calls, Form::Functions) => "function_call",
            (reason, _) => finish_reason(reason),
        }
    }
}

async fn whole(
    admitted: Admitted,
    n: u32,
    model: String,
    prompt_logprobs: Option<u32>,
    show: Show,
) -> Result<Response, ApiError> {
    let Admitted {
        identity,
        mut prompts,
        mut feed,
    } = admitted;
    let gathered = feed::gather(&mut feed, n).await?;
    let usage = feed::usage(&prompts, &gathered, n);
    let scored = gathered.first().and_then(|first| first.prompt.as_ref());
    let completion = ChatCompletion {
        id: id::fresh("chatcmpl-"),
        object: "chat.completion",
        created: now(),
        model,
        system_fingerprint: identity.fingerprint(),
        prompt_logprobs: prompt_logprobs
            .zip(scored)
            .map(|(top, tokens)| tokens::prompt(tokens, top)),
        prompt_token_ids: show.return_token_ids.then(|| prompts.pop().unwrap_or_default()),
        choices: gathered
            .into_iter()
            .zip(0..)
            .map(|(one, index)| choice(index, one, show))
            .collect(),
        usage,
    };
    let mut response = Answer(completion).into_response();
    identity.write(response.headers_mut());
    Ok(response)
}

fn choice(index: u32, one: Gathered, show: Show) -> ChatChoice {
    ChatChoice {
        index,
        logprobs: show.top_logprobs.map(|top| tokens::chat(&one.tokens, top)),
        token_ids: show.return_token_ids.then(|| one.token_ids()),
        finish_reason: show.finish_reason(one.finish.unwrap_or(Finish::Stop)),
        message: message(one, show),
    }
}

fn message(one: Gathered, show: Show) -> AssistantMessage {
    let Gathered {
        text,
        reasoning,
        calls,
        ..
    } = one;
    let is_silent = text.is_empty() && !(calls.is_empty() && reasoning.is_empty());
    let reasoning = Some(reasoning).filter(|text| show.shows_reasoning && !text.is_empty());
    let mut functions = calls
        .into_iter()
        .map(|Called { name, arguments }| FunctionCall { name, arguments });
    let (tool_calls, function_call) = match show.form {
        Form::Functions => (vec![], functions.next()),
        Form::Tools => {
            let call = |function| ToolCall {
                id: show.call_id(),
                kind: "function",
                function,
            };
            (functions.map(call).collect(), None)
        }
    };
    AssistantMessage {
        role: "assistant",
        content: (!is_silent).then_some(text),
        refusal: None,
        annotations: Vec::new(),
        reasoning_content: reasoning.clone(),
        reasoning,
        tool_calls: Some(tool_calls).filter(|calls| !calls.is_empty()),
        function_call,
    }
}

impl Show {
    /// `None`: there is nothing to show.
    fn delta(self, text: Delta) -> Option<ChatDelta> {
        let Delta {
            reasoning,
            content,
            calls,
        } = text;
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let reasoning = given(reasoning).filter(|_| self.shows_reasoning);
        let mut delta = ChatDelta {
            content: given(content).map(Some),
            reasoning_content: reasoning.clone(),
            reasoning,
            ..ChatDelta::default()
        };
        for CallDelta {
            index,
            name,
            arguments,
        } in calls
        {
            let id = name.is_some().then(|| self.call_id());
            let function = FunctionDelta { name, arguments };
            match self.form {
                Form::Functions => delta.function_call = Some(function),
                Form::Tools => delta.tool_calls.push(ToolCallDelta {
                    index,
                    kind: id.is_some().then_some("function"),
                    id,
                    function,
                }),
            }
        }
        let is_empty = delta.content.is_none()
            && delta.reasoning.is_none()
            && delta.tool_calls.is_empty()
            && delta.function_call.is_none();
        (!is_empty).then_some(delta)
    }
}

struct Chunks {
    show: Show,
    /// Content of the first delta, with the role. `None`: null, because there may be none.
    opening: Option<String>,
    begun: Vec<Begun>,
}

/// How far a choice is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begun {
    No,
    /// The first delta was sent.
    Role,
    /// Something was said.
    Said,
}

impl Choices for Chunks {
    fn show(&mut self, (_, Piece { choice: index, what }): Placed, sink: &mut Sink<'_>) {
        let Show {
            top_logprobs,
            return_token_ids,
            ..
        } = self.show;
        let chunk = |delta| ChatChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            token_ids: None,
        };
        let Some(begun) = self.begun.get_mut(index as usize) else {
            return;
        };
        if *begun == Begun::No {
            *begun = Begun::Role;
            sink.choice(&chunk(ChatDelta {
                role: Some("assistant"),
                content: Some(self.opening.clone()),
                ..ChatDelta::default()
            }));
        }
        match what {
            What::Text { text, tokens, .. } => {
                let with_tokens = !tokens.is_empty() && (top_logprobs.is_some() || return_token_ids);
                if !text.is_empty() {
                    *begun = Begun::Said;
                }
                let delta = self.show.delta(text);
                if delta.is_none() && !with_tokens {
                    return;
                }
                sink.choice(&ChatChunkChoice {
                    logprobs: top_logprobs.map(|top| tokens::chat(&tokens, top)),
                    token_ids: return_token_ids.then(|| tokens.iter().map(|token| token.id).collect()),
                    ..chunk(delta.unwrap_or_default())
                });
            }
            What::Finished { reason, .. } => {
                // An answer of nothing is an empty text, as in a whole one.
                let content = (*begun == Begun::Role && self.opening.is_none()).then(String::new);
                sink.choice(&ChatChunkChoice {
                    finish_reason: Some(self.show.finish_reason(reason)),
                    ..chunk(ChatDelta {
                        content: content.map(Some),
                        ..ChatDelta::default()
                    })
                });
            }
            What::Prompt(_) | What::Pooled(_) | What::Failed(_) => {}
        }
    }
}
