//! The events of a streamed response, in the order that OpenAI documents: `response.created`, `response.in_progress`, for each
//! item of the output `response.output_item.added`, what it says, and `response.output_item.done`, at last
//! `response.completed` or `response.incomplete` (`response.failed` where it cannot go on). Their sequence numbers count from 0.

use serde::Serialize;
use tandem_openapi::chat::TokenLogprob;
use tandem_openapi::responses::{OutputItem, OutputPart, ResponsesFailure, ResponsesResponse};
use tandem_openapi::usage::Usage;
use tandem_router::api::{Finish, Piece, TokenText, What};

use super::feed::Placed;
use super::parts::{self, Ending, Kind, Part, Parts, Step};
use super::responses::{ItemIds, Keeper, Show, closed, content, item, status, usage};
use super::stream::Writer;
use crate::convert::tokens;
use crate::error::ApiError;
use crate::sse;

#[derive(Serialize)]
struct Event<'a, F> {
    #[serde(rename = "type")]
    kind: &'a str,
    sequence_number: u64,
    #[serde(flatten)]
    fields: F,
}

#[derive(Serialize)]
struct State {
    response: ResponsesResponse,
}

#[derive(Serialize)]
struct Item {
    output_index: usize,
    item: OutputItem,
}

/// What is said of an item, in the fields that its events have.
#[derive(Clone, Default, Serialize)]
struct Place {
    item_id: String,
    output_index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<TokenLogprob>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<OutputPart>,
}

pub struct Events {
    response: ResponsesResponse,
    show: Show,
    keeper: Option<Keeper>,
    taking: Parts,
    parts: Vec<Part>,
    /// Of the open part.
    ids: Option<ItemIds>,
    /// Of the text that follows.
    tokens: Vec<TokenText>,
    output: Vec<OutputItem>,
    ending: Option<Ending>,
    sequence: u64,
}

impl Events {
    pub fn new(response: ResponsesResponse, show: Show, keeper: Keeper) -> Events {
        Events {
            response,
            show,
            keeper: Some(keeper),
            taking: Parts::new(true),
            parts: Vec::new(),
            ids: None,
            tokens: Vec::new(),
            output: Vec::new(),
            ending: None,
            sequence: 0,
        }
    }

    fn event(&mut self, out: &mut Vec<u8>, kind: &str, fields: impl Serialize) {
        let event = Event {
            kind,
            sequence_number: self.sequence,
            fields,
        };
        sse::named(out, kind, &event);
        self.sequence += 1;
    }

    /// An event of the response as a whole.
    fn state(&mut self, out: &mut Vec<u8>, kind: &str) {
        let response = self.response.clone();
        self.event(out, kind, State { response });
    }

    /// Of the open part.
    fn place(&self) -> Place {
        let is_call = matches!(
            self.parts.last(),
            Some(Part {
                kind: Kind::Call { .. },
                ..
            })
        );
        Place {
            item_id: self.ids.as_ref().map_or_else(String::new, |ids| ids.item.clone()),
            output_index: self.output.len(),
            content_index: (!is_call).then_some(0),
            ..Place::default()
        }
    }

    fn write(&mut self, step: Step, out: &mut Vec<u8>) {
        parts::apply(&mut self.parts, &step);
        let (kind, delta, logprobs) = match step {
            Step::Begin(kind) => return self.begin_part(&kind, out),
            Step::End => return self.end_part(out),
            Step::Tokens(tokens) => return self.tokens.extend(tokens),
            Step::Think(text) => ("response.reasoning_text.delta", text, None),
            Step::Argue(text) => ("response.function_call_arguments.delta", text, None),
            Step::Say(text) => {
                let new = std::mem::take(&mut self.tokens);
                let logprobs = self.show.top_logprobs.map(|top| tokens::chat(&new, top).content);
                (
                    "response.output_text.delta",
                    text,
                    Some(logprobs.unwrap_or_default()),
                )
            }
        };
        let more = Place {
            delta: Some(delta),
            logprobs,
            ..self.place()
        };
        self.event(out, kind, more);
    }

    fn begin_part(&mut self, kind: &Kind, out: &mut Vec<u8>) {
        let ids = ItemIds::new(kind, self.show);
        let Some(opened) = self.parts.last() else { return };
        let (item, part) = (
            item(opened, &ids, "in_progress", self.show),
            content(opened, self.show),
        );
        self.ids = Some(ids);
        let added = Item {
            output_index: self.output.len(),
            item: item.without_content(),
        };
        self.event(out, "response.output_item.added", added);
        if part.is_some() {
            let place = self.place();
            self.event(out, "response.content_part.added", Place { part, ..place });
        }
    }

    fn end_part(&mut self, out: &mut Vec<u8>) {
        let place = self.place();
        let (Some(closed), Some(ids)) = (self.parts.last(), self.ids.take()) else {
            return;
        };
        let reason = self.ending.as_ref().map_or(Finish::Stop, |ending| ending.reason);
        let (item, part) = (
            item(closed, &ids, status(true, reason), self.show),
            content(closed, self.show),
        );
        let text = Some(closed.text.clone());
        let (kind, said) = match &closed.kind {
            Kind::Reasoning => (
                "response.reasoning_text.done",
                Place {
                    text,
                    ..place.clone()
                },
            ),
            Kind::Text => {
                let top = self.show.top_logprobs;
                let logprobs = top.map(|top| tokens::chat(&closed.tokens, top).content);
                let logprobs = Some(logprobs.unwrap_or_default());
                (
                    "response.output_text.done",
                    Place {
                        text,
                        logprobs,
                        ..place.clone()
                    },
                )
            }
            Kind::Call { name } => {
                let name = Some(name.clone());
                let arguments = text;
                (
                    "response.function_call_arguments.done",
                    Place {
                        name,
                        arguments,
                        ..place.clone()
                    },
                )
            }
        };
        self.event(out, kind, said);
        if part.is_some() {
            self.event(out, "response.content_part.done", Place { part, ..place });
        }
        let output_index = self.output.len();
        self.output.push(item.clone());
        self.event(out, "response.output_item.done", Item { output_index, item });
    }

    fn close(&mut self, error: &ApiError, used: Usage, out: &mut Vec<u8>) {
        self.response.status = "failed";
        self.response.store = false;
        self.response.usage = Some(usage(used));
        self.response.output = std::mem::take(&mut self.output);
        self.response.error = Some(ResponsesFailure {
            code: "server_error",
            message: error.body().error.message,
        });
        self.state(out, "response.failed");
    }
}

impl Writer for Events {
    fn begin(&mut self, _usage: Usage, out: &mut Vec<u8>) {
        self.state(out, "response.created");
        self.state(out, "response.in_progress");
    }

    fn show(&mut self, (_, Piece { what, .. }): Placed, _usage: Usage, out: &mut Vec<u8>) {
        let mut steps = Vec::new();
        match what {
            What::Text { text, tokens, .. } => self.taking.take(text, tokens, &mut steps),
            What::Finished {
                reason, stop_string, ..
            } => {
                self.ending = Some(Ending { reason, stop_string });
                self.taking.finish(&mut steps);
            }
            What::Prompt(_) | What::Pooled(_) | What::Failed(_) => {}
        }
        steps.into_iter().for_each(|step| self.write(step, out));
    }

    async fn end(&mut self, used: Usage, out: &mut Vec<u8>) {
        let (Some(ending), Some(keeper)) = (self.ending.take(), self.keeper.take()) else {
            let error = ApiError::Internal("an answer without an end".to_owned());
            return self.close(&error, used, out);
        };
        let output = std::mem::take(&mut self.output);
        self.response = closed(self.response.clone(), output, &ending, used);
        let kind = match ending.reason {
            Finish::Length => "response.incomplete",
            Finish::Stop | Finish::Calls => "response.completed",
        };
        match keeper.keep(self.response.clone()).await {
            Ok(kept) => {
                self.response = kept;
                self.state(out, kind);
            }
            Err(error) => {
                self.output = std::mem::take(&mut self.response.output);
                self.close(&error, used, out);
            }
        }
    }

    fn fail(&mut self, error: &ApiError, used: Usage, out: &mut Vec<u8>) {
        self.close(error, used, out);
    }
}
