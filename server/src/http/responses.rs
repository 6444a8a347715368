//! /v1/responses: OpenAI's newer API over chat's requests and answers, and the responses that are kept. Not here: the events
//! of a stream (responses_stream.rs).

use axum::Json as Answer;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tandem_openapi::common::{CursorList, Deleted};
use tandem_openapi::error::Errors;
use tandem_openapi::responses::{
    IncompleteDetails, InputItem, InputTokens, InputTokensDetails, InputTokensRequest, KeptItem, OutputItem,
    OutputPart, OutputTokensDetails, ResponsesRequest, ResponsesResponse, ResponsesToolChoice,
    ResponsesUsage,
};
use tandem_openapi::usage::Usage;
use tandem_router::api::{Finish, KeptResponse, RouterError};
use tandem_router::{Order, View};
use tandem_text::SpecialTokens;
use tandem_text::chat::CallIds;
use tracing::warn;

use super::feed;
use super::parts::{self, Ending, Kind, Part, Parts};
use super::responses_stream::Events;
use super::{stream, to_the_end};
use crate::app::{App, now};
use crate::convert::chat::{self, Chat};
use crate::convert::responses::{self, WORDS};
use crate::convert::sampling::Delivery;
use crate::convert::tokens;
use crate::error::{ApiError, invalid};
use crate::extract::{Json, Pairs, Segment};
use crate::id;
use crate::keys::{Asker, Own};

/// Answer, and keep the answer.
#[utoipa::path(
    post, path = "/v1/responses", tag = "responses", request_body = ResponsesRequest,
    responses(
        (status = 200, content((ResponsesResponse = "application/json"), (String = "text/event-stream"))),
        Errors,
    )
)]
pub async fn create(
    State(app): State<App>,
    Asker(client): Asker,
    Json(request): Json<ResponsesRequest>,
) -> Result<Response, ApiError> {
    let view = app.router.of(&client);
    let items = responses::items(request.input.clone())?;
    let keeper = Keeper::new(view.clone(), &request, &items)?;
    let earlier = conversation(view, request.previous_response_id.as_deref()).await?;
    let in_words = |error: ApiError| error.in_words(WORDS);
    let request_of_chat = responses::chat(&request, earlier, items)?;
    let Chat {
        call,
        delivery,
        top_logprobs,
        ..
    } = chat::call(request_of_chat, app.limits()).map_err(in_words)?;
    let admitted = feed::admit(&app, client, vec![call], "input")
        .await
        .map_err(in_words)?;
    let (identity, show) = (
        admitted.identity,
        Show {
            top_logprobs,
            call_ids: app.router.call_ids(),
        },
    );
    let response = opened(request, &keeper);
    match delivery {
        Delivery::Stream(_) => stream::run(admitted, Events::new(response, show, keeper)).await,
        Delivery::Whole => {
            let (parts, ending, used) = parts::gather(admitted, Parts::new(true)).await?;
            let n = parts.len();
            let shown = |(i, part): (usize, &Part)| {
                let ids = ItemIds::new(&part.kind, show);
                item(part, &ids, status(i + 1 == n, ending.reason), show)
            };
            let output = parts.iter().enumerate().map(shown).collect();
            let response = keeper.keep(closed(response, output, &ending, used)).await?;
            let mut response = Answer(response).into_response();
            identity.write(response.headers_mut());
            Ok(response)
        }
    }
}

/// A response that was kept.
#[utoipa::path(
    get, path = "/v1/responses/{id}", tag = "responses", params(("id" = String, Path)),
    responses((status = 200, body = ResponsesResponse), Errors)
)]
pub async fn retrieve(Own(own): Own, Segment(id): Segment) -> Result<Response, ApiError> {
    let KeptResponse { response, .. } = own.response(&id).await?;
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], response).into_response())
}

/// Forget a response. Those that go on with it cannot be gone on with any more.
#[utoipa::path(
    delete, path = "/v1/responses/{id}", tag = "responses", params(("id" = String, Path)),
    responses((status = 200, body = Deleted), Errors)
)]
pub async fn delete(Own(own): Own, Segment(id): Segment) -> Result<Answer<Deleted>, ApiError> {
    let name = id.clone();
    to_the_end(async move { own.delete_response(&name).await }).await?;
    Ok(Answer(Deleted {
        id,
        object: "response",
        deleted: true,
    }))
}

/// Nothing runs in the background here, so nothing can be cancelled: a stream ends when its connection is closed.
#[utoipa::path(
    post, path = "/v1/responses/{id}/cancel", tag = "responses", params(("id" = String, Path)),
    responses((status = 200, body = ResponsesResponse), Errors)
)]
pub async fn cancel(Own(own): Own, Segment(id): Segment) -> Result<Response, ApiError> {
    own.response(&id).await?;
    let text = "Only a response that was made with background=true can be cancelled, and this one was not. To end a stream, \
                close its connection.";
    Err(invalid("id", text))
}

/// The items that a response was asked with, newest first. Those of the response it goes on with are that one's.
#[utoipa::path(
    get, path = "/v1/responses/{id}/input_items", tag = "responses",
    params(
        ("id" = String, Path),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 100, description = "At most so many (20)"),
        ("order" = Option<String>, Query, description = "`desc` (the default) or `asc`"),
        ("after" = Option<String>, Query, description = "The item after which the page begins"),
        ("include" = Option<Vec<String>>, Query, description = "Nothing more can be included"),
    ),
    responses((status = 200, body = CursorList<KeptItem>), Errors)
)]
pub async fn input_items(
    Own(own): Own,
    Segment(id): Segment,
    query: Pairs,
) -> Result<Answer<CursorList<KeptItem>>, ApiError> {
    let limit = query.integer("limit", 1..=100, 20)? as usize;
    let order = query.order()?;
    let KeptResponse { input, .. } = own.response(&id).await?;
    let mut items: Vec<Value> = read(&input)?;
    if order == Order::Newest {
        items.reverse();
    }
    let id_of = |item: &Value| item["id"].as_str().map(str::to_owned);
    if let Some(after) = query.text("after") {
        let Some(at) = items.iter().position(|item| item["id"] == after) else {
            return Err(invalid(
                "after",
                format!("after is {after:?}, which is no item of the response"),
            ));
        };
        items.drain(..=at);
    }
    let has_more = items.len() > limit;
    items.truncate(limit);
    Ok(Answer(CursorList {
        object: "list",
        first_id: items.first().and_then(id_of),
        last_id: items.last().and_then(id_of),
        has_more,
        data: items.into_iter().map(KeptItem).collect(),
    }))
}

/// The tokens of the prompt that POST /v1/responses would send to the model.
#[utoipa::path(
    post, path = "/v1/responses/input_tokens", tag = "responses", request_body = InputTokensRequest,
    responses((status = 200, body = InputTokens), Errors)
)]
pub async fn input_tokens(
    State(app): State<App>,
    Own(own): Own,
    Json(request): Json<InputTokensRequest>,
) -> Result<Answer<InputTokens>, ApiError> {
    own.clone().model(&request.model)?;
    let items = responses::items(request.input.clone())?;
    let earlier = conversation(own.clone(), request.previous_response_id.as_deref()).await?;
    let in_words = |error: ApiError| error.in_words(WORDS);
    let request = responses::prompt_of(request, earlier, items)?;
    let Chat { call, .. } = chat::call(request, app.limits()).map_err(in_words)?;
    let tokens = own.tokenize(call.prompt, SpecialTokens::Add).await;
    let tokens = tokens.map_err(|error| in_words(ApiError::from(error)))?;
    Ok(Answer(InputTokens {
        object: "response.input_tokens",
        input_tokens: tokens.len(),
    }))
}

/// Inputs and outputs of the responses before, the oldest first.
async fn conversation(view: View, previous: Option<&str>) -> Result<Vec<InputItem>, ApiError> {
    let Some(previous) = previous else {
        return Ok(Vec::new());
    };
    let kept = match view.conversation(previous).await {
        Ok(kept) => kept,
        Err(RouterError::UnknownResponse(id)) => {
            return Err(ApiError::Invalid {
                param: Some("previous_response_id".to_owned()),
                code: Some("previous_response_not_found"),
                message: format!("Previous response with id '{id}' not found."),
            });
        }
        Err(error) => return Err(error.into()),
    };
    let mut items = Vec::new();
    for KeptResponse { input, response, .. } in kept {
        items.extend(read::<Vec<InputItem>>(&input)?);
        let mut response: Value = read(&response)?;
        let output = serde_json::from_value::<Vec<InputItem>>(response["output"].take());
        items.extend(output.map_err(unreadable)?);
    }
    Ok(items)
}

/// What was kept here.
fn read<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, ApiError> {
    serde_json::from_str(text).map_err(unreadable)
}

fn unreadable(error: serde_json::Error) -> ApiError {
    ApiError::Internal(format!("a kept response cannot be read: {error}"))
}

/// Keeps a response, or knows that it is not to be kept.
pub struct Keeper {
    view: View,
    /// The request's input, as it is kept. `None`: nothing is.
    input: Option<String>,
    previous: Option<String>,
    /// The request asked for it by name.
    must: bool,
}

impl Keeper {
    fn new(view: View, request: &ResponsesRequest, items: &[InputItem]) -> Result<Keeper, ApiError> {
        let must = request.store == Some(true);
        let limit = view.max_kept_bytes();
        let input = (request.store != Some(false) && limit > 0).then(|| {
            let items: Value = items.iter().map(responses::kept).collect();
            items.to_string()
        });
        let bytes = input.as_ref().map_or(0, String::len) as u64;
        if must && (limit == 0 || bytes > limit) {
            let text = format!(
                "store: this response cannot be kept: its input has {bytes} bytes, and of all responses together {limit} bytes \
                 are kept (--response-store-bytes)"
            );
            return Err(invalid("store", text));
        }
        Ok(Keeper {
            view,
            input,
            previous: request.previous_response_id.clone(),
            must,
        })
    }

    pub fn keeps(&self) -> bool {
        self.input.is_some()
    }

    /// The response, which says whether it was kept. Where that was not asked by name, an answer is worth more than its copy.
    pub async fn keep(self, mut response: ResponsesResponse) -> Result<ResponsesResponse, ApiError> {
        let Some(input) = self.input else {
            return Ok(response);
        };
        let text = serde_json::to_string(&response).expect("a response has string keys only");
        let kept = KeptResponse {
            id: response.id.clone(),
            created_at: response.created_at,
            previous: self.previous,
            input,
            response: text,
        };
        let view = self.view;
        let kept = to_the_end(async move { view.keep_response(kept).await }).await;
        match kept {
            Ok(kept) => response.store = kept,
            Err(error) if self.must => return Err(error.into()),
            Err(error) => {
                warn!(%error, id = %response.id, "a response was not kept");
                response.store = false;
            }
        }
        Ok(response)
    }
}

/// As it begins.
fn opened(request: ResponsesRequest, keeper: &Keeper) -> ResponsesResponse {
    ResponsesResponse {
        id: id::fresh("resp_"),
        object: "response",
        created_at: now(),
        completed_at: None,
        status: "in_progress",
        background: false,
        error: None,
        incomplete_details: None,
        instructions: request.instructions,
        max_output_tokens: request.max_output_tokens,
        model: request.model,
        output: Vec::new(),
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        previous_response_id: request.previous_response_id,
        reasoning: request.reasoning.unwrap_or_default(),
        service_tier: "default",
        store: keeper.keeps(),
        temperature: request.temperature,
        top_p: request.top_p,
        text: request.text.unwrap_or_default(),
        tool_choice: request
            .tool_choice
            .unwrap_or(ResponsesToolChoice::Mode("auto".to_owned())),
        tools: request.tools.unwrap_or_default(),
        top_logprobs: request.top_logprobs.unwrap_or(0),
        truncation: "disabled",
        usage: None,
        user: request.user,
        safety_identifier: request.safety_identifier,
        prompt_cache_key: request.prompt_cache_key,
        metadata: request.metadata.unwrap_or_default(),
    }
}

/// As it ends.
pub fn closed(
    response: ResponsesResponse,
    output: Vec<OutputItem>,
    ending: &Ending,
    used: Usage,
) -> ResponsesResponse {
    let is_cut = ending.reason == Finish::Length;
    ResponsesResponse {
        completed_at: (!is_cut).then(now),
        status: if is_cut { "incomplete" } else { "completed" },
        incomplete_details: is_cut.then_some(IncompleteDetails {
            reason: "max_output_tokens",
        }),
        output,
        usage: Some(usage(used)),
        ..response
    }
}

pub fn usage(used: Usage) -> ResponsesUsage {
    ResponsesUsage {
        input_tokens: used.prompt_tokens,
        input_tokens_details: InputTokensDetails {
            cached_tokens: used.prompt_tokens_details.cached_tokens,
            cache_write_tokens: 0,
        },
        output_tokens: used.completion_tokens,
        output_tokens_details: OutputTokensDetails {
            reasoning_tokens: used.completion_tokens_details.reasoning_tokens,
        },
        total_tokens: used.total_tokens,
    }
}

/// What was asked beside the text.
#[derive(Clone, Copy)]
pub struct Show {
    pub top_logprobs: Option<u32>,
    pub call_ids: CallIds,
}

/// What an item is known by.
pub struct ItemIds {
    pub item: String,
    /// Of a call: what its output names.
    call: String,
}

impl ItemIds {
    pub fn new(kind: &Kind, show: Show) -> ItemIds {
        let prefix = match kind {
            Kind::Reasoning => "rs_",
            Kind::Text => "msg_",
            Kind::Call { .. } => "fc_",
        };
        ItemIds {
            item: id::fresh(prefix),
            call: id::of_call("call_", show.call_ids),
        }
    }
}

/// Only what the limit cut is not whole: the last item. Everything before it is.
pub fn status(is_last: bool, reason: Finish) -> &'static str {
    match is_last && reason == Finish::Length {
        true => "incomplete",
        false => "completed",
    }
}

/// The part of content that an item has; a call has none.
pub fn content(part: &Part, show: Show) -> Option<OutputPart> {
    let text = part.text.clone();
    match part.kind {
        Kind::Reasoning => Some(OutputPart::ReasoningText { text }),
        Kind::Text => Some(OutputPart::OutputText {
            text,
            annotations: Vec::new(),
            logprobs: show
                .top_logprobs
                .map_or_else(Vec::new, |top| tokens::chat(&part.tokens, top).content),
        }),
        Kind::Call { .. } => None,
    }
}

pub fn item(part: &Part, ids: &ItemIds, status: &'static str, show: Show) -> OutputItem {
    let id = ids.item.clone();
    let content = content(part, show).into_iter().collect();
    match &part.kind {
        Kind::Reasoning => OutputItem::Reasoning {
            id,
            summary: Vec::new(),
            content,
            encrypted_content: None,
            status,
        },
        Kind::Text => OutputItem::Message {
            id,
            role: "assistant",
            content,
            status,
        },
        Kind::Call { name } => OutputItem::FunctionCall {
            id,
            call_id: ids.call.clone(),
            name: name.clone(),
            arguments: part.text.clone(),
            status,
        },
    }
}
