//! POST /v1/completions.

use axum::Json as Answer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use tandem_core::TokenId;
use tandem_openapi::completions::{Completion, CompletionChoice, CompletionLogprobs, CompletionRequest};
use tandem_openapi::error::Errors;
use tandem_router::View;
use tandem_router::api::{Piece, Prompt, TokenText, What};

use super::feed::{self, Admitted, Gathered, Placed, finish_reason};
use super::stream::{self, Choices, Sink};
use crate::app::{App, now};
use crate::convert;
use crate::convert::completions::Completions;
use crate::convert::sampling::Delivery;
use crate::convert::tokens::{self, Entry, Offsets};
use crate::error::ApiError;
use crate::extract::Json;
use crate::id;
use crate::keys::Asker;

/// Continue prompts.
#[utoipa::path(
    post, path = "/v1/completions", tag = "inference", request_body = CompletionRequest,
    responses(
        (status = 200, content((Completion = "application/json"), (String = "text/event-stream"))),
        Errors,
    )
)]
pub async fn create(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<CompletionRequest>,
) -> Result<Response, ApiError> {
    let model = request.model.clone();
    let Completions {
        calls,
        n,
        delivery,
        echo,
        logprobs,
        prompt_logprobs,
        return_token_ids,
    } = convert::completions::calls(request, app.limits())?;
    let texts: Vec<Option<String>> = calls
        .prompts()
        .iter()
        .map(|prompt| given_text(prompt, echo))
        .collect();
    let own = app.router.of(&client);
    let admitted = feed::admit(&app, client, calls, "prompt").await?;
    let mut echoes = Vec::new();
    if echo {
        for (text, ids) in texts.into_iter().zip(&admitted.prompts) {
            echoes.push(Echo::new(&own, text, ids).await?);
        }
    }
    let show = Show {
        logprobs,
        prompt_logprobs,
        return_token_ids,
        echoes,
        n,
    };
    match delivery {
        Delivery::Whole => whole(admitted, model, show).await,
        Delivery::Stream(usage) => {
            let chunk = envelope(&admitted, model);
            let choices = admitted.prompts.len() * n as usize;
            let states = (0..choices).map(|_| ChoiceState::default()).collect();
            stream::respond(admitted, &chunk, usage, Chunks { show, states }).await
        }
    }
}

fn given_text(prompt: &Prompt, echo: bool) -> Option<String> {
    match prompt {
        Prompt::Text(text) if echo => Some(text.clone()),
        _ => None,
    }
}

fn envelope(admitted: &Admitted, model: String) -> Completion {
    Completion {
        id: id::fresh("cmpl-"),
        object: "text_completion",
        created: now(),
        model,
        system_fingerprint: admitted.identity.fingerprint(),
        choices: Vec::new(),
        usage: None,
    }
}

/// What was asked beside the text.
struct Show {
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    return_token_ids: bool,
    /// One for each prompt, or none at all.
    echoes: Vec<Echo>,
    n: u32,
}

/// A prompt that comes back.
struct Echo {
    text: String,
    /// It has no log-probability, so the engine does not name it.
    first_token: String,
    /// It was put before the text that was given.
    is_first_hidden: bool,
}

impl Echo {
    async fn new(own: &View, text: Option<String>, ids: &[TokenId]) -> Result<Echo, ApiError> {
        let (first, tokenizer) = (ids.first().copied(), own.tokenizer());
        let first_token = first.map_or_else(String::new, |id| tokenizer.token_text(id));
        let is_first_hidden = first.is_some_and(|id| tokenizer.is_special(id))
            && text.as_ref().is_some_and(|text| !text.starts_with(&first_token));
        let text = match text {
            Some(text) => text,
            None => own.detokenize(ids.to_vec()).await?,
        };
        Ok(Echo {
            text,
            first_token,
            is_first_hidden,
        })
    }

    fn entries(&self, prompt: Vec<Option<TokenText>>) -> impl Iterator<Item = Entry> {
        prompt.into_iter().map(|token| match token {
            // What was given is all there.
            Some(token) => Entry::Scored(TokenText {
                is_hidden: false,
                ..token
            }),
            None => Entry::First {
                text: self.first_token.clone(),
                is_hidden: self.is_first_hidden,
            },
        })
    }
}

async fn whole(admitted: Admitted, model: String, show: Show) -> Result<Response, ApiError> {
    let completion = envelope(&admitted, model);
    let Admitted {
        identity,
        prompts,
        mut feed,
    } = admitted;
    let gathered = feed::gather(&mut feed, show.n).await?;
    let usage = Some(feed::usage(&prompts, &gathered, show.n));
    let choices = gathered
        .into_iter()
        .enumerate()
        .map(|(i, one)| choice(i, one, &prompts, &show))
        .collect();
    let mut response = Answer(Completion {
        choices,
        usage,
        ..completion
    })
    .into_response();
    identity.write(response.headers_mut());
    Ok(response)
}

fn choice(index: usize, one: Gathered, prompts: &[Vec<TokenId>], show: &Show) -> CompletionChoice {
    let prompt = index / show.n as usize;
    let echo = show.echoes.get(prompt);
    let token_ids = show.return_token_ids.then(|| one.token_ids());
    let scored = one.prompt.unwrap_or_default();
    let prompt_logprobs = show.prompt_logprobs.map(|top| tokens::prompt(&scored, top));
    let logprobs = show.logprobs.map(|top| {
        let mut lists = CompletionLogprobs::default();
        let mut offsets = Offsets::default();
        if let Some(echo) = echo {
            offsets = Offsets::of_echo(&echo.text);
            offsets.completion(&mut lists, echo.entries(scored), top);
        }
        offsets.completion(&mut lists, one.tokens.into_iter().map(Entry::Scored), top);
        lists
    });
    CompletionChoice {
        index: index as u32,
        text: echo.map_or_else(String::new, |echo| echo.text.clone()) + &one.text,
        logprobs,
        finish_reason: one.finish.map(finish_reason),
        prompt_logprobs,
        token_ids,
        prompt_token_ids: show.return_token_ids.then(|| prompts[prompt].clone()),
    }
}

struct Chunks {
    show: Show,
    states: Vec<ChoiceState>,
}

#[derive(Default)]
struct ChoiceState {
    offsets: Offsets,
    /// The prompt, if it was to come back, has.
    begun: bool,
}

impl Choices for Chunks {
    fn show(&mut self, (prompt, Piece { choice, what }): Placed, sink: &mut Sink<'_>) {
        let Chunks { show, states } = self;
        let index = prompt * show.n as usize + choice as usize;
        let Some(state) = states.get_mut(index) else {
            return;
        };
        let chunk = CompletionChoice {
            index: index as u32,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
            prompt_logprobs: None,
            token_ids: None,
            prompt_token_ids: None,
        };
        let lists = |state: &mut ChoiceState, entries: &mut dyn Iterator<Item = Entry>| {
            show.logprobs.map(|top| {
                let mut lists = CompletionLogprobs::default();
                state.offsets.completion(&mut lists, entries, top);
                lists
            })
        };
        if let Some(echo) = show.echoes.get(prompt).filter(|_| !state.begun) {
            state.begun = true;
            state.offsets = Offsets::of_echo(&echo.text);
            let scored = match &what {
                What::Prompt(tokens) => tokens.clone(),
                _ => Vec::new(),
            };
            let logprobs = lists(state, &mut echo.entries(scored));
            sink.choice(&CompletionChoice {
                text: echo.text.clone(),
                logprobs,
                ..chunk.clone()
            });
        }
        match what {
            What::Text { text, tokens, .. } => {
                let text = text.content;
                let with_tokens = !tokens.is_empty() && (show.logprobs.is_some() || show.return_token_ids);
                if text.is_empty() && !with_tokens {
                    return;
                }
                let ids = || tokens.iter().map(|token| token.id).collect();
                let token_ids = show.return_token_ids.then(ids);
                let logprobs = lists(state, &mut tokens.into_iter().map(Entry::Scored));
                sink.choice(&CompletionChoice {
                    text,
                    logprobs,
                    token_ids,
                    ..chunk
                });
            }
            What::Finished { reason, .. } => {
                sink.choice(&CompletionChoice {
                    finish_reason: Some(finish_reason(reason)),
                    ..chunk
                });
            }
            What::Prompt(_) | What::Pooled(_) | What::Failed(_) => {}
        }
    }
}
