//! POST /v1/chat/completions.

use axum::Json as Answer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use tandem_openapi::chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatRequest,
};
use tandem_openapi::error::Errors;
use tandem_router::api::{Piece, What};

use super::feed::{self, Admitted, Gathered, Placed, finish_reason};
use super::stream::{self, Choices, Sink};
use crate::app::{App, now};
use crate::convert::chat::Chat;
use crate::convert::sampling::Delivery;
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
    } = convert::chat::call(request, app.limits())?;
    let (n, model) = (call.n, call.model.clone());
    let admitted = feed::admit(&app, client, vec![call], "messages").await?;
    let show = Show {
        top_logprobs,
        return_token_ids,
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
                begun: vec![false; n as usize],
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
        finish_reason: one.finish_reason,
        message: AssistantMessage {
            role: "assistant",
            content: one.text,
            refusal: None,
            annotations: Vec::new(),
        },
    }
}

struct Chunks {
    show: Show,
    /// The choice's first delta, with the role, was sent.
    begun: Vec<bool>,
}

impl Choices for Chunks {
    fn show(&mut self, (_, Piece { choice: index, what }): Placed, sink: &mut Sink<'_>) {
        let Show {
            top_logprobs,
            return_token_ids,
        } = self.show;
        let chunk = |delta| ChatChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            token_ids: None,
        };
        if let Some(begun @ false) = self.begun.get_mut(index as usize) {
            *begun = true;
            sink.choice(&chunk(ChatDelta {
                role: Some("assistant"),
                content: Some(String::new()),
            }));
        }
        match what {
            What::Text { text, tokens } => {
                let with_tokens = !tokens.is_empty() && (top_logprobs.is_some() || return_token_ids);
                if text.is_empty() && !with_tokens {
                    return;
                }
                sink.choice(&ChatChunkChoice {
                    logprobs: top_logprobs.map(|top| tokens::chat(&tokens, top)),
                    token_ids: return_token_ids.then(|| tokens.iter().map(|token| token.id).collect()),
                    ..chunk(ChatDelta {
                        role: None,
                        content: Some(text),
                    })
                });
            }
            What::Finished { reason, .. } => sink.choice(&ChatChunkChoice {
                finish_reason: Some(finish_reason(reason)),
                ..chunk(ChatDelta::default())
            }),
            What::Prompt(_) | What::Failed(_) => {}
        }
    }
}
