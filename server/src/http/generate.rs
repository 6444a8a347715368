//! POST /generate, /generate_stream and /, and GET /info: text-generation-inference's API over completions' requests and
//! answers.

use axum::Json as Answer;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use tandem_core::TokenId;
use tandem_openapi::completions::CompletionPrompt;
use tandem_openapi::error::GenerateErrors;
use tandem_openapi::generate::{
    GenerateDetails, GenerateInfo, GenerateRequest, GenerateToken, Generated, PrefillToken, StreamDetails,
    StreamedToken,
};
use tandem_openapi::usage::Usage;
use tandem_router::View;
use tandem_router::api::{Client, Finish, Piece, TokenText, What};
use tandem_text::{SpecialTokens, Tokenizer};

use super::feed::{self, Admitted, Gathered, Placed};
use super::stream::{self, Writer};
use crate::app::App;
use crate::convert::completions::{self, Completions};
use crate::convert::generate::{self, Show, Truncate, WORDS};
use crate::convert::sampling::{Delivery, MAX_STOP_STRINGS};
use crate::convert::tokens;
use crate::dialect::Dialect;
use crate::error::{ApiError, invalid};
use crate::extract::Json;
use crate::keys::Asker;
use crate::sse;

/// Go on with a text.
#[utoipa::path(
    post, path = "/generate", tag = "text-generation-inference", request_body = GenerateRequest,
    responses((status = 200, body = Generated), GenerateErrors)
)]
pub async fn whole(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<GenerateRequest>,
) -> Result<Response, ApiError> {
    let answer = answered(&app, client, with_stream(request, false)?).await?;
    Ok(answer.respond(Answer))
}

/// Go on with a text, token by token.
#[utoipa::path(
    post, path = "/generate_stream", tag = "text-generation-inference", request_body = GenerateRequest,
    responses((status = 200, body = StreamedToken, content_type = "text/event-stream"), GenerateErrors)
)]
pub async fn streamed(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<GenerateRequest>,
) -> Result<Response, ApiError> {
    let answer = answered(&app, client, with_stream(request, true)?).await?;
    Ok(answer.respond(Answer))
}

/// Either, by `stream`; a whole answer is a list of one.
#[utoipa::path(
    post, path = "/", tag = "text-generation-inference", request_body = GenerateRequest,
    responses(
        (status = 200, content((Vec<Generated> = "application/json"), (StreamedToken = "text/event-stream"))),
        GenerateErrors,
    )
)]
pub async fn either(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<GenerateRequest>,
) -> Result<Response, ApiError> {
    let answer = answered(&app, client, request).await?;
    Ok(answer.respond(|generated| Answer([generated])))
}

/// What is served.
#[utoipa::path(
    get, path = "/info", tag = "text-generation-inference",
    responses((status = 200, body = GenerateInfo), GenerateErrors)
)]
pub async fn info(State(app): State<App>) -> Answer<GenerateInfo> {
    let info = app.router.info();
    Answer(GenerateInfo {
        model_id: app.router.config().served_model_name.clone(),
        model_sha: info.base_digest.to_string(),
        model_pipeline_tag: "text-generation",
        max_best_of: 1,
        max_stop_sequences: MAX_STOP_STRINGS,
        max_input_tokens: info.max_model_len.saturating_sub(1),
        max_total_tokens: info.max_model_len,
        max_client_batch_size: 1,
        router: "tandem",
        version: env!("CARGO_PKG_VERSION"),
    })
}

/// The route says it; a request that says otherwise is at the wrong one.
fn with_stream(request: GenerateRequest, stream: bool) -> Result<GenerateRequest, ApiError> {
    if request.stream.is_some_and(|asked| asked != stream) {
        let text = "stream contradicts the route: POST /generate_stream streams, POST /generate does not, and POST / does \
                    either";
        return Err(invalid("stream", text));
    }
    Ok(GenerateRequest {
        stream: Some(stream),
        ..request
    })
}

enum Answered {
    Whole(Generated, feed::Identity),
    Stream(Response),
}

impl Answered {
    /// `shape`: of a whole one.
    fn respond<R: IntoResponse>(self, shape: impl FnOnce(Generated) -> R) -> Response {
        match self {
            Answered::Stream(response) => response,
            Answered::Whole(generated, identity) => {
                let mut response = shape(generated).into_response();
                identity.write(response.headers_mut());
                response
            }
        }
    }
}

async fn answered(app: &App, client: Client, request: GenerateRequest) -> Result<Answered, ApiError> {
    let in_words = |error: ApiError| error.in_words(WORDS);
    let base = &app.router.config().served_model_name;
    let (mut request, truncate, show) = generate::completion(request, base, app.limits())?;
    cut(&app.router.of(&client), &mut request.prompt, truncate).await?;
    let Completions { calls, delivery, .. } = completions::calls(request, app.limits()).map_err(in_words)?;
    let admitted = feed::admit(app, client, calls, "inputs")
        .await
        .map_err(in_words)?;
    match delivery {
        Delivery::Whole => {
            let Admitted {
                identity,
                prompts,
                mut feed,
            } = admitted;
            let mut gathered = feed::gather(&mut feed, 1).await?;
            let one = gathered
                .pop()
                .ok_or_else(|| ApiError::Internal("no answer".to_owned()))?;
            let generated = generated(one, &prompts.concat(), show, app.router.tokenizer());
            Ok(Answered::Whole(generated, identity))
        }
        Delivery::Stream(_) => {
            let tokens = Tokens {
                text: show.before.clone(),
                show,
                last: None,
                ending: None,
                index: 0,
            };
            stream::run(admitted, tokens).await.map(Answered::Stream)
        }
    }
}

/// The end of the inputs. What a prompt begins with stays: models are lost without it.
async fn cut(own: &View, prompt: &mut CompletionPrompt, truncate: Truncate) -> Result<(), ApiError> {
    let (Some(limit), CompletionPrompt::Text(text)) = (truncate, &*prompt) else {
        return Ok(());
    };
    let given = tandem_router::api::Prompt::Text(text.clone());
    let mut tokens = own.tokenize(given, SpecialTokens::Add).await?;
    if tokens.len() <= limit {
        return Ok(());
    }
    let bos = own.tokenizer().bos().map(|(id, _)| id);
    let begins = usize::from(limit > 1 && tokens.first().copied() == bos && bos.is_some());
    tokens.drain(begins..tokens.len() - (limit - begins));
    *prompt = CompletionPrompt::Tokens(tokens.into_iter().map(i64::from).collect());
    Ok(())
}

fn finish_reason(reason: Finish, stop_string: Option<&String>) -> &'static str {
    match (reason, stop_string) {
        (Finish::Length, _) => "length",
        (_, Some(_)) => "stop_sequence",
        (_, None) => "eos_token",
    }
}

fn generated(one: Gathered, prompt: &[TokenId], show: Show, tokenizer: &Tokenizer) -> Generated {
    let reason = finish_reason(one.finish.unwrap_or(Finish::Stop), one.stop_string.as_ref());
    let details = show.details.then(|| GenerateDetails {
        finish_reason: reason,
        generated_tokens: u64::from(one.completion_tokens),
        seed: show.seed,
        prefill: match (show.prefill, one.prompt) {
            (true, Some(scored)) => prefill(prompt, scored, tokenizer),
            _ => Vec::new(),
        },
        top_tokens: match show.top_n_tokens {
            0 => Vec::new(),
            n => one.tokens.iter().map(|token| alternatives(token, n)).collect(),
        },
        tokens: one
            .tokens
            .iter()
            .map(|one| token(one, one.text.clone()))
            .collect(),
    });
    Generated {
        generated_text: show.before + &one.text,
        details,
    }
}

fn prefill(prompt: &[TokenId], scored: Vec<Option<TokenText>>, tokenizer: &Tokenizer) -> Vec<PrefillToken> {
    let one = |(&id, scored): (&TokenId, Option<TokenText>)| PrefillToken {
        id,
        logprob: scored.as_ref().map(|token| tokens::json_safe(token.logprob)),
        text: scored.map_or_else(|| tokenizer.token_text(id), |token| token.text),
    };
    prompt.iter().zip(scored).map(one).collect()
}

fn token(one: &TokenText, text: String) -> GenerateToken {
    GenerateToken {
        id: one.id,
        text,
        logprob: tokens::json_safe(one.logprob),
        special: one.is_hidden,
    }
}

fn alternatives(one: &TokenText, n: u32) -> Vec<GenerateToken> {
    let top = one.top.iter().take(n as usize);
    let one = |(id, text, _, logprob): &(TokenId, String, Vec<u8>, f32)| GenerateToken {
        id: *id,
        text: text.clone(),
        logprob: tokens::json_safe(*logprob),
        special: false,
    };
    top.map(one).collect()
}

/// An event for each token, as it comes. The last one brings the whole text and how it ended.
struct Tokens {
    show: Show,
    text: String,
    /// The last token and what it adds: the end comes right behind it.
    last: Option<(TokenText, String)>,
    ending: Option<(Finish, Option<String>)>,
    index: u64,
}

impl Tokens {
    fn event(&mut self, one: &TokenText, text: String, end: Option<StreamDetails>, out: &mut Vec<u8>) {
        self.index += 1;
        let event = StreamedToken {
            index: self.index,
            token: token(one, text),
            top_tokens: alternatives(one, self.show.top_n_tokens),
            generated_text: end.is_some().then(|| std::mem::take(&mut self.text)),
            details: end,
        };
        sse::event(out, &event);
    }
}

impl Writer for Tokens {
    fn show(&mut self, (_, Piece { what, .. }): Placed, _usage: Usage, out: &mut Vec<u8>) {
        match what {
            What::Text {
                text,
                mut tokens,
                is_last,
                ..
            } => {
                self.text.push_str(&text.content);
                // Those that came together say together what they say.
                let Some(last) = tokens.pop() else { return };
                for token in tokens {
                    self.event(&token, String::new(), None, out);
                }
                match is_last {
                    true => self.last = Some((last, text.content)),
                    false => self.event(&last, text.content, None, out),
                }
            }
            What::Finished {
                reason, stop_string, ..
            } => self.ending = Some((reason, stop_string)),
            What::Prompt(_) | What::Pooled(_) | What::Failed(_) => {}
        }
    }

    async fn end(&mut self, usage: Usage, out: &mut Vec<u8>) {
        let (reason, stop_string) = self.ending.take().unwrap_or((Finish::Stop, None));
        let details = StreamDetails {
            finish_reason: finish_reason(reason, stop_string.as_ref()),
            generated_tokens: usage.completion_tokens,
            seed: self.show.seed,
            input_length: usage.prompt_tokens,
        };
        if let Some((last, text)) = self.last.take() {
            self.event(&last, text, Some(details), out);
        }
    }

    fn fail(&mut self, error: &ApiError, _usage: Usage, out: &mut Vec<u8>) {
        sse::event(out, &Dialect::Generate.last_words(error, ""));
    }
}

#[cfg(test)]
mod tests {
    use tandem_router::api::Delta;

    use super::*;

    fn piece(content: &str, ids: &[TokenId], is_last: bool) -> Placed {
        let token = |&id: &TokenId| TokenText {
            id,
            text: String::new(),
            is_hidden: false,
            bytes: vec![],
            logprob: -1.0,
            top: vec![],
        };
        let what = What::Text {
            text: Delta {
                content: content.to_owned(),
                ..Delta::default()
            },
            tokens: ids.iter().map(token).collect(),
            reasoning_tokens: 0,
            is_last,
        };
        (0, Piece { choice: 0, what })
    }

    /// Ids, text and whether it is the end, of each event.
    fn events(out: &mut Vec<u8>) -> Vec<(u64, String, Option<String>)> {
        let text = String::from_utf8(std::mem::take(out)).unwrap();
        let events = text.lines().filter_map(|line| line.strip_prefix("data:"));
        let read = |event: &str| {
            let event: serde_json::Value = serde_json::from_str(event).unwrap();
            assert_eq!(event["details"].is_null(), event["generated_text"].is_null());
            let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
            (
                event["token"]["id"].as_u64().unwrap(),
                text(&event["token"]["text"]).unwrap(),
                text(&event["generated_text"]),
            )
        };
        events.map(read).collect()
    }

    #[tokio::test]
    async fn a_token_is_shown_when_it_comes_and_the_last_with_the_end() {
        let mut tokens = Tokens {
            show: Show::default(),
            text: String::new(),
            last: None,
            ending: None,
            index: 0,
        };
        let (mut out, usage) = (vec![], Usage::new(1, 5, 0));
        let plain = |id, text: &str| (id, text.to_owned(), None);
        tokens.show(piece("He", &[1], false), usage, &mut out);
        assert_eq!(events(&mut out), [plain(1, "He")]);
        tokens.show(piece("llo", &[2, 3], false), usage, &mut out);
        assert_eq!(events(&mut out), [plain(2, ""), plain(3, "llo")]);
        tokens.show(piece("!", &[4, 5], true), usage, &mut out);
        assert_eq!(events(&mut out), [plain(4, "")]);
        tokens.end(usage, &mut out).await;
        assert_eq!(events(&mut out), [(5, "!".to_owned(), Some("Hello!".to_owned()))]);
    }
}
