//! Spans of what the router does: a call, with the attributes that vLLM gives its `llm_request` (its vllm/tracing/utils.py,
//! SpanAttributes), and work that is done later than it was asked for.

use std::time::Instant;

use tandem_core::trace::{TARGET, TraceContext};
use tracing::field::Empty;
use tracing::{Level, Span, span_enabled, trace_span};

use crate::api::{Call, What};

pub(crate) struct Traced {
    /// Of the span: its parts are its children.
    pub context: TraceContext,
    span: Span,
    began: Instant,
    is_begun: bool,
    completion_tokens: u64,
}

impl Traced {
    /// `None` where whoever asks is not traced.
    pub fn begin(call: &Call) -> Option<Traced> {
        let parent = call.client.trace?;
        let context = parent.child();
        let span = trace_span!(
            target: TARGET, "llm_request", otel.parent = %parent, otel.id = %context,
            gen_ai.operation.name = "generate", gen_ai.request.model = call.model, gen_ai.response.model = call.model,
            gen_ai.request.n = call.n, gen_ai.request.max_tokens = call.max_tokens,
            gen_ai.request.temperature = call.sampling.temperature, gen_ai.request.top_p = call.sampling.top_p,
            gen_ai.usage.num_sequences = call.n, gen_ai.usage.prompt_tokens = Empty, gen_ai.usage.completion_tokens = Empty,
            gen_ai.latency.time_to_first_token = Empty, gen_ai.latency.e2e = Empty, error.type = Empty,
        );
        Some(Traced {
            context,
            span,
            began: Instant::now(),
            is_begun: false,
            completion_tokens: 0,
        })
    }

    pub fn prompt(&self, tokens: usize) {
        self.span.record("gen_ai.usage.prompt_tokens", tokens as u64);
    }

    pub fn see(&mut self, what: &What) {
        match what {
            What::Text { tokens, .. } if !tokens.is_empty() => {
                if !self.is_begun {
                    self.is_begun = true;
                    let seconds = self.began.elapsed().as_secs_f64();
                    self.span.record("gen_ai.latency.time_to_first_token", seconds);
                }
                self.completion_tokens += tokens.len() as u64;
            }
            What::Failed(fault) => {
                self.span.record("error.type", fault.to_string());
            }
            _ => {}
        }
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        self.span
            .record("gen_ai.usage.completion_tokens", self.completion_tokens);
        self.span
            .record("gen_ai.latency.e2e", self.began.elapsed().as_secs_f64());
    }
}

/// One line of a batch, from when it is asked to its answer. A batch is one trace, as a job is. `None` where no traces are
/// sent.
pub(crate) fn batch_line(batch: &str, custom_id: &str) -> Option<(TraceContext, Span)> {
    if !span_enabled!(target: TARGET, Level::TRACE) {
        return None;
    }
    let parent = TraceContext::named(batch);
    let context = parent.child();
    let span = trace_span!(
        target: TARGET, "batch line", otel.parent = %parent, otel.id = %context, tandem.batch = batch,
        tandem.custom_id = custom_id, http.response.status_code = Empty, error.type = Empty,
    );
    Some((context, span))
}

/// A call to a model that a client trains, from its turn to its answer, in the trace of the request that brought it.
pub(crate) fn learner_call(parent: TraceContext, model: &str, call: &str) -> (TraceContext, Span) {
    let context = parent.child();
    let span = trace_span!(
        target: TARGET, "learner call", otel.parent = %parent, otel.id = %context, tandem.model = model,
        tandem.call = call, error.type = Empty,
    );
    (context, span)
}
