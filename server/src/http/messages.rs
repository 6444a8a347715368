//! POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over chat's requests and answers.

use axum::Json as Answer;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use tandem_openapi::error::AnthropicErrors;
use tandem_openapi::messages::{
    ContentBlock, CountTokensRequest, MessagesRequest, MessagesResponse, MessagesUsage, TokensCount,
};
use tandem_openapi::usage::Usage;
use tandem_router::api::{Finish, Piece, What};
use tandem_text::SpecialTokens;
use tandem_text::chat::CallIds;

use super::feed::{self, Admitted, Placed};
use super::parts::{self, Ending, Kind, Part, Parts, Step};
use super::stream::{self, Writer};
use crate::app::App;
use crate::convert::chat::{self, Chat};
use crate::convert::messages::{self, WORDS};
use crate::convert::sampling::Delivery;
use crate::dialect::Dialect;
use crate::error::ApiError;
use crate::extract::Json;
use crate::id;
use crate::keys::{Asker, Own};
use crate::layers::REQUEST_ID;
use crate::sse;

/// Answer a conversation, as Anthropic's API does.
#[utoipa::path(
    post, path = "/v1/messages", tag = "inference", request_body = MessagesRequest,
    responses(
        (status = 200, content((MessagesResponse = "application/json"), (String = "text/event-stream"))),
        AnthropicErrors,
    )
)]
pub async fn create(
    State(app): State<App>,
    Asker(client): Asker,
    headers: HeaderMap,
    Json(request): Json<MessagesRequest>,
) -> Result<Response, ApiError> {
    let request = messages::chat(request, app.router.reasoning())?;
    let in_words = |error: ApiError| error.in_words(WORDS);
    let Chat {
        call,
        delivery,
        shows_reasoning,
        ..
    } = chat::call(request, app.limits()).map_err(in_words)?;
    let model = call.model.clone();
    let admitted = feed::admit(&app, client, vec![call], "messages")
        .await
        .map_err(in_words)?;
    let parts = Parts::new(shows_reasoning);
    let call_ids = app.router.call_ids();
    let message = MessagesResponse {
        id: id::fresh("msg_"),
        kind: "message",
        role: "assistant",
        model,
        content: Vec::new(),
        stop_reason: None,
        stop_sequence: None,
        usage: usage(Usage::default()),
    };
    match delivery {
        Delivery::Whole => whole(admitted, parts, message, call_ids).await,
        Delivery::Stream(_) => {
            let request_id = headers.get(&REQUEST_ID).map(HeaderValue::as_bytes);
            let events = Events {
                message,
                parts,
                call_ids,
                index: 0,
                ending: None,
                request_id: String::from_utf8_lossy(request_id.unwrap_or_default()).into_owned(),
            };
            stream::run(admitted, events).await
        }
    }
}

/// The tokens of a conversation's prompt, as POST /v1/messages would send it to the model.
#[utoipa::path(
    post, path = "/v1/messages/count_tokens", tag = "inference", request_body = CountTokensRequest,
    responses((status = 200, body = TokensCount), AnthropicErrors)
)]
pub async fn count_tokens(
    State(app): State<App>,
    Own(own): Own,
    Json(request): Json<CountTokensRequest>,
) -> Result<Answer<TokensCount>, ApiError> {
    own.clone().model(&request.model)?;
    let request = messages::prompt_of(request, app.router.reasoning())?;
    let in_words = |error: ApiError| error.in_words(WORDS);
    let Chat { call, .. } = chat::call(request, app.limits()).map_err(in_words)?;
    let tokens = own.tokenize(call.prompt, SpecialTokens::Add).await;
    let tokens = tokens.map_err(|error| ApiError::from(error).in_words(WORDS))?;
    Ok(Answer(TokensCount {
        input_tokens: tokens.len(),
    }))
}

/// What is read from the cache is counted apart.
fn usage(usage: Usage) -> MessagesUsage {
    let cached = usage.prompt_tokens_details.cached_tokens;
    MessagesUsage {
        input_tokens: usage.prompt_tokens.saturating_sub(cached),
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: cached,
        output_tokens: usage.completion_tokens,
    }
}

fn stop_reason(ending: &Ending) -> &'static str {
    match (ending.reason, &ending.stop_string) {
        (Finish::Calls, _) => "tool_use",
        (Finish::Length, _) => "max_tokens",
        (Finish::Stop, Some(_)) => "stop_sequence",
        (Finish::Stop, None) => "end_turn",
    }
}

/// As it begins: of a call the id and the name.
fn block(kind: &Kind, call_ids: CallIds) -> ContentBlock {
    match kind {
        Kind::Text => ContentBlock::Text { text: String::new() },
        Kind::Reasoning => ContentBlock::Thinking {
            thinking: String::new(),
            signature: "",
        },
        Kind::Call { name } => ContentBlock::ToolUse {
            id: id::of_call("toolu_", call_ids),
            name: name.clone(),
            input: Map::new(),
        },
    }
}

fn filled(part: Part, call_ids: CallIds) -> ContentBlock {
    let mut block = block(&part.kind, call_ids);
    match &mut block {
        ContentBlock::Text { text } => *text = part.text,
        ContentBlock::Thinking { thinking, .. } => *thinking = part.text,
        ContentBlock::ToolUse { input, .. } => *input = arguments(part.text),
    }
    block
}

/// Where a call is not bound, or cut short, what the model wrote may be no JSON object.
fn arguments(text: String) -> Map<String, Value> {
    serde_json::from_str(&text)
        .unwrap_or_else(|_| Map::from_iter([("INVALID_JSON".to_owned(), Value::String(text))]))
}

async fn whole(
    admitted: Admitted,
    parts: Parts,
    message: MessagesResponse,
    call_ids: CallIds,
) -> Result<Response, ApiError> {
    let identity = admitted.identity;
    let (parts, ending, used) = parts::gather(admitted, parts).await?;
    let message = MessagesResponse {
        content: parts.into_iter().map(|part| filled(part, call_ids)).collect(),
        stop_reason: Some(stop_reason(&ending)),
        usage: usage(used),
        stop_sequence: ending.stop_string,
        ..message
    };
    let mut response = Answer(message).into_response();
    identity.write(response.headers_mut());
    Ok(response)
}

/// message_start, ping, for each block content_block_start, deltas and content_block_stop, then message_delta and message_stop.
struct Events {
    message: MessagesResponse,
    parts: Parts,
    call_ids: CallIds,
    /// Of the open block, or of the next.
    index: usize,
    ending: Option<Ending>,
    request_id: String,
}

impl Events {
    fn write(&mut self, step: Step, out: &mut Vec<u8>) {
        let index = self.index;
        let delta = match step {
            Step::Begin(kind) => {
                let block = block(&kind, self.call_ids);
                let event = json!({"type": "content_block_start", "index": index, "content_block": block});
                return sse::named(out, "content_block_start", &event);
            }
            Step::End => {
                self.index += 1;
                let event = json!({"type": "content_block_stop", "index": index});
                return sse::named(out, "content_block_stop", &event);
            }
            Step::Tokens(_) => return,
            Step::Think(text) => json!({"type": "thinking_delta", "thinking": text}),
            Step::Say(text) => json!({"type": "text_delta", "text": text}),
            Step::Argue(text) => json!({"type": "input_json_delta", "partial_json": text}),
        };
        let event = json!({"type": "content_block_delta", "index": index, "delta": delta});
        sse::named(out, "content_block_delta", &event);
    }
}

impl Writer for Events {
    fn begin(&mut self, so_far: Usage, out: &mut Vec<u8>) {
        self.message.usage = usage(so_far);
        let event = json!({"type": "message_start", "message": self.message});
        sse::named(out, "message_start", &event);
        sse::named(out, "ping", &json!({"type": "ping"}));
    }

    fn show(&mut self, (_, Piece { what, .. }): Placed, _so_far: Usage, out: &mut Vec<u8>) {
        let mut steps = Vec::new();
        match what {
            What::Text { text, tokens, .. } => self.parts.take(text, tokens, &mut steps),
            What::Finished {
                reason, stop_string, ..
            } => {
                self.parts.finish(&mut steps);
                self.ending = Some(Ending { reason, stop_string });
            }
            What::Prompt(_) | What::Pooled(_) | What::Failed(_) => {}
        }
        steps.into_iter().for_each(|step| self.write(step, out));
    }

    async fn end(&mut self, so_far: Usage, out: &mut Vec<u8>) {
        let ending = self.ending.take();
        let delta = json!({
            "stop_reason": ending.as_ref().map(stop_reason),
            "stop_sequence": ending.and_then(|ending| ending.stop_string),
        });
        let event = json!({"type": "message_delta", "delta": delta, "usage": usage(so_far)});
        sse::named(out, "message_delta", &event);
        sse::named(out, "message_stop", &json!({"type": "message_stop"}));
    }

    fn fail(&mut self, error: &ApiError, _so_far: Usage, out: &mut Vec<u8>) {
        sse::named(
            out,
            "error",
            &Dialect::Anthropic.last_words(error, &self.request_id),
        );
    }
}
