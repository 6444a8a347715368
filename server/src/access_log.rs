//! One line of the log for each request, when its answer has left or its client has gone: what was asked, who answered,
//! how many tokens and how long. Target `access`. Not here: what changed something (audit).

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use tandem_core::id::AdapterDigest;
use tandem_core::trace::{TARGET, TraceContext, Unread};
use tandem_router::api::{Piece, What};
use tracing::field::Empty;
use tracing::{Span, info, trace_span, warn};

use crate::otlp;

tokio::task_local! {
    /// The exchange that the task is at.
    static EXCHANGE: Arc<Exchange>;
}

/// Of whom a line is written.
#[derive(Clone, Debug, Default)]
pub struct AccessLog {
    pub off: bool,
    /// Paths of which none is.
    pub silent: Vec<String>,
}

/// A request and its answer. Its line is written when the last who has it lets go.
pub struct Exchange {
    began: Instant,
    method: Method,
    /// With ids in it, cut.
    path: String,
    request_id: String,
    is_logged: bool,
    traced: Option<Traced>,
    seen: Mutex<Seen>,
}

/// Its span in a trace.
struct Traced {
    context: TraceContext,
    span: Span,
}

#[derive(Default)]
struct Seen {
    /// `None`: its client left before.
    status: Option<StatusCode>,
    model: Option<String>,
    adapter: Option<AdapterDigest>,
    prompt_tokens: u64,
    cached_tokens: u64,
    generated_tokens: u64,
    first_token: Option<Duration>,
}

/// Of a path in the log.
const PATH_CHARS: usize = 200;

impl AccessLog {
    /// The answer, and with it its line.
    pub async fn around(&self, request_id: &str, request: Request, next: Next) -> Response {
        let path = request.uri().path();
        let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        let is_silent = |silent: &String| silent == path || Some(silent.as_str()) == route;
        let exchange = Arc::new(Exchange {
            began: Instant::now(),
            method: request.method().clone(),
            path: path.chars().take(PATH_CHARS).collect(),
            request_id: request_id.to_owned(),
            is_logged: !self.off && !self.silent.iter().any(is_silent),
            traced: Traced::begin(&request, request_id),
            seen: Mutex::default(),
        });
        let response = EXCHANGE.scope(exchange.clone(), next.run(request)).await;
        exchange.seen().status = Some(response.status());
        response.map(|body| Body::new(Held { body, exchange }))
    }
}

impl Exchange {
    /// `None`: what is asked comes from within.
    pub fn current() -> Option<Arc<Exchange>> {
        EXCHANGE.try_with(Arc::clone).ok()
    }

    pub fn trace(&self) -> Option<TraceContext> {
        Some(self.traced.as_ref()?.context)
    }

    pub fn asks(&self, model: &str, adapter: Option<AdapterDigest>, prompt_tokens: usize) {
        let mut seen = self.seen();
        seen.model.get_or_insert_with(|| model.to_owned());
        seen.adapter = adapter;
        seen.prompt_tokens += prompt_tokens as u64;
    }

    pub fn see(&self, piece: &Piece) {
        match &piece.what {
            What::Text { tokens, .. } if !tokens.is_empty() => {
                let elapsed = self.began.elapsed();
                let mut seen = self.seen();
                seen.first_token.get_or_insert(elapsed);
                seen.generated_tokens += tokens.len() as u64;
            }
            What::Finished {
                cached_tokens,
                completion_tokens: _,
                ..
            } if piece.choice == 0 => self.seen().cached_tokens += u64::from(*cached_tokens),
            _ => {}
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Traced {
    /// `None` where no traces are sent, and where whoever asks keeps nothing of its own.
    fn begin(request: &Request, request_id: &str) -> Option<Traced> {
        if !otlp::is_on() {
            return None;
        }
        let given = request
            .headers()
            .get("traceparent")
            .and_then(|header| header.to_str().ok());
        let parent = match given.map(str::parse::<TraceContext>) {
            Some(Ok(parent)) => Some(parent),
            Some(Err(Unread::NotSampled)) => return None,
            // As the standard wants it: what cannot be read is as if it were not there.
            Some(Err(Unread::Malformed)) | None => None,
        };
        let context = parent.map_or_else(TraceContext::new, TraceContext::child);
        let method = request.method().as_str();
        let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        let name = format!("{method} {}", route.unwrap_or_default());
        let span = trace_span!(
            target: TARGET, "request", otel.name = name.trim(), otel.kind = "server", otel.id = %context,
            otel.parent = parent.map(tracing::field::display), http.request.method = method, http.route = route,
            url.path = request.uri().path(), tandem.request_id = request_id, http.response.status_code = Empty,
            error.type = Empty,
        );
        Some(Traced { context, span })
    }

    fn end(&self, status: Option<StatusCode>) {
        let Some(status) = status else { return };
        self.span.record("http.response.status_code", status.as_u16());
        if status.is_server_error() {
            self.span.record("error.type", status.as_str());
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(traced) = &self.traced {
            let seen = self.seen.get_mut().unwrap_or_else(PoisonError::into_inner);
            traced.end(seen.status);
        }
        if !self.is_logged {
            return;
        }
        let Exchange {
            began,
            method,
            path,
            request_id,
            is_logged: _,
            traced: _,
            seen,
        } = self;
        let Seen {
            status,
            model,
            adapter,
            prompt_tokens,
            cached_tokens,
            generated_tokens,
            first_token,
        } = std::mem::take(seen.get_mut().unwrap_or_else(PoisonError::into_inner));
        let ms = |time: Duration| (time.as_secs_f64() * 10_000.0).round() / 10.0;
        let adapter = adapter.map(|digest| digest.short());
        let asked = model.is_some();
        let (model, adapter) = (model.as_deref(), adapter.as_deref());
        let count = |n: u64| asked.then_some(n);
        let (prompt_tokens, cached_tokens) = (count(prompt_tokens), count(cached_tokens));
        let generated_tokens = count(generated_tokens);
        let (ttft_ms, total_ms) = (first_token.map(ms), ms(began.elapsed()));
        match status {
            Some(status) if status.is_server_error() => warn!(
                target: "access", %method, path, status = status.as_u16(), model, adapter, prompt_tokens, cached_tokens,
                generated_tokens, ttft_ms, total_ms, request_id, "answered"
            ),
            Some(status) => info!(
                target: "access", %method, path, status = status.as_u16(), model, adapter, prompt_tokens, cached_tokens,
                generated_tokens, ttft_ms, total_ms, request_id, "answered"
            ),
            None => info!(
                target: "access", %method, path, model, adapter, prompt_tokens, cached_tokens, generated_tokens, ttft_ms,
                total_ms, request_id, "its client left before it was answered"
            ),
        }
    }
}

/// An answer's body, which keeps its exchange open.
struct Held {
    body: Body,
    #[expect(dead_code, reason = "it is there to be dropped with the body")]
    exchange: Arc<Exchange>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
