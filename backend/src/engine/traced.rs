//! A request that is traced (core's `trace`): a span while it waits, one while its prompt is read, one while it is continued, and
//! one for each step that it is the first traced part of. Nothing is done where nobody listens.

use tandem_core::sched::{StepPlan, View};
use tandem_core::trace::{TARGET, TraceContext};
use tracing::{Level, Span, span_enabled, trace_span};

use super::Engine;

/// Where a request is.
pub struct Traced {
    parent: TraceContext,
    stage: Stage,
    span: Span,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Queued,
    Prefill,
    Decode,
}

impl Traced {
    pub fn new(parent: TraceContext) -> Traced {
        Traced {
            parent,
            stage: Stage::Queued,
            span: Stage::Queued.span(parent),
        }
    }

    fn enter(&mut self, stage: Stage) {
        if self.stage != stage {
            self.stage = stage;
            self.span = stage.span(self.parent);
        }
    }
}

impl Stage {
    fn of(view: &View) -> Stage {
        match view.generated {
            0 => Stage::Prefill,
            _ => Stage::Decode,
        }
    }

    fn span(self, parent: TraceContext) -> Span {
        match self {
            Stage::Queued => trace_span!(target: TARGET, "queued", otel.parent = %parent),
            Stage::Prefill => trace_span!(target: TARGET, "prefill", otel.parent = %parent),
            Stage::Decode => trace_span!(target: TARGET, "decode", otel.parent = %parent),
        }
    }
}

impl Engine {
    /// A step's span, to be held as long as it takes.
    pub(super) fn traced_step(&mut self, plan: &StepPlan) -> Span {
        let mut span = Span::none();
        if !span_enabled!(target: TARGET, Level::TRACE) {
            return span;
        }
        for row in &plan.rows {
            let (Some(traced), Some(view)) = (self.clients.traced(row.id), self.scheduler.view(row)) else {
                continue;
            };
            traced.enter(Stage::of(&view));
            if span.is_none() {
                span = trace_span!(
                    target: TARGET, parent: &traced.span, "engine step",
                    tandem.sequences = plan.rows.len() as u64, tandem.tokens = plan.tokens.len() as u64,
                );
            }
        }
        span
    }
}
