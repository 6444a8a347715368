//! OpenTelemetry traces on their way to a collector: spans of the target `otlp` (core's `trace`), as they close, in OTLP over
//! HTTP as JSON. They wait in a queue with a limit and are sent by a thread of its own, so a collector that is slow or away costs
//! spans, never a request. Source: opentelemetry-proto 1.x, trace/v1 and its JSON mapping; the specification's
//! protocol/exporter.md (variables).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};
use tandem_core::trace::{TARGET, TraceContext};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Subscriber, info, warn};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, filter::FilterFn};

/// Spans that wait to be sent.
const QUEUE: usize = 8192;
/// Spans of one message.
const BATCH: usize = 512;
/// The first span of a message waits so long for others.
const PERIOD: Duration = Duration::from_secs(1);
/// What one message may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the last messages may take when the process ends.
const END: Duration = Duration::from_secs(3);
const SERVICE: &str = "tandem";

/// An http or https URL. (vLLM's default is gRPC, which is not spoken here.)
pub fn endpoint(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| url.has_host());
    let url = url.filter(|url| ["http", "https"].contains(&url.scheme()));
    url.ok_or_else(|| {
        "a URL of OTLP over HTTP is wanted, such as http://localhost:4318/v1/traces (gRPC is not spoken)"
            .to_owned()
    })
}

/// Are spans sent on? Where they are not, no request is given a trace.
pub fn is_on() -> bool {
    tracing::span_enabled!(target: TARGET, tracing::Level::TRACE)
}

/// Hands closed spans to the thread that sends them.
pub struct Traces {
    queue: SyncSender<Span>,
    lost: Arc<AtomicU64>,
}

/// The end of the thread; dropped, it waits a moment for what is left to be sent.
pub struct Sending {
    end: Option<Sender<()>>,
    ended: Receiver<()>,
}

impl Drop for Sending {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.ended.recv_timeout(END);
    }
}

/// For spans of the target alone.
pub fn filter() -> FilterFn {
    FilterFn::new(|metadata| metadata.is_span() && metadata.target() == TARGET)
}

pub fn start(endpoint: Url) -> std::io::Result<(Traces, Sending)> {
    let (queue, spans) = sync_channel(QUEUE);
    let lost = Arc::new(AtomicU64::new(0));
    let (end, wanted) = channel();
    let (over, ended) = channel();
    let sender = Collector::new(endpoint, lost.clone())?;
    std::thread::Builder::new()
        .name("tandem-otlp".to_owned())
        .spawn(move || {
            sender.run(&spans, &wanted);
            drop(over);
        })?;
    let sending = Sending {
        end: Some(end),
        ended,
    };
    Ok((Traces { queue, lost }, sending))
}

/// A span that is open, or waits to be sent.
#[derive(Clone, Debug)]
struct Span {
    name: String,
    own: TraceContext,
    parent: u64,
    is_server: bool,
    failed: bool,
    began: SystemTime,
    ended: SystemTime,
    attributes: Vec<(&'static str, Value)>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Traces {
    fn on_new_span(&self, attributes: &Attributes, id: &Id, context: Context<S>) {
        let Some(here) = context.span(id) else { return };
        let now = SystemTime::now();
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let parent = fields.parent.or_else(|| {
            let parent = here.parent()?;
            let open = parent.extensions();
            Some(open.get::<Span>()?.own)
        });
        let own = fields
            .own
            .unwrap_or_else(|| parent.map_or_else(TraceContext::new, TraceContext::child));
        let span = Span {
            name: fields
                .name
                .unwrap_or_else(|| attributes.metadata().name().to_owned()),
            own,
            parent: parent.map_or(0, |parent| parent.span),
            is_server: fields.is_server,
            failed: fields.failed,
            began: now,
            ended: now,
            attributes: fields.attributes,
        };
        here.extensions_mut().insert(span);
    }

    fn on_record(&self, id: &Id, values: &Record, context: Context<S>) {
        let Some(here) = context.span(id) else { return };
        let mut fields = Fields::default();
        values.record(&mut fields);
        if let Some(span) = here.extensions_mut().get_mut::<Span>() {
            span.failed |= fields.failed;
            span.attributes.extend(fields.attributes);
        }
    }

    fn on_close(&self, id: Id, context: Context<S>) {
        let span = context
            .span(&id)
            .and_then(|here| here.extensions_mut().remove::<Span>());
        let Some(mut span) = span else { return };
        span.ended = SystemTime::now();
        if self.queue.try_send(span).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What a span's fields say.
#[derive(Default)]
struct Fields {
    name: Option<String>,
    own: Option<TraceContext>,
    parent: Option<TraceContext>,
    is_server: bool,
    failed: bool,
    attributes: Vec<(&'static str, Value)>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "otel.name" => self.name = Some(value.to_owned()),
            "otel.id" => self.own = value.parse().ok(),
            "otel.parent" => self.parent = value.parse().ok(),
            "otel.kind" => self.is_server = value == "server",
            "error.type" => {
                self.failed = true;
                self.attributes
                    .push((field.name(), json!({"stringValue": value})));
            }
            name => self.attributes.push((name, json!({"stringValue": value}))),
        }
    }

    // 64-bit numbers are texts in protobuf's JSON.
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.attributes
            .push((field.name(), json!({"intValue": value.to_string()})));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.attributes
            .push((field.name(), json!({"intValue": value.to_string()})));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.attributes
            .push((field.name(), json!({"doubleValue": value})));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.attributes.push((field.name(), json!({"boolValue": value})));
    }
}

impl Span {
    fn message(self) -> Value {
        let nanos = |time: SystemTime| {
            let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            since.as_nanos().to_string()
        };
        let attributes = self.attributes.into_iter();
        let attributes = attributes.map(|(key, value)| json!({"key": key, "value": value}));
        let mut message = json!({
            "traceId": format!("{:032x}", self.own.trace),
            "spanId": format!("{:016x}", self.own.span),
            "name": self.name,
            // trace.proto, SpanKind: 1 is internal, 2 is server.
            "kind": if self.is_server { 2 } else { 1 },
            "startTimeUnixNano": nanos(self.began),
            "endTimeUnixNano": nanos(self.ended),
            "attributes": attributes.collect::<Vec<_>>(),
            // StatusCode: 2 is an error.
            "status": if self.failed { json!({"code": 2}) } else { json!({}) },
        });
        if self.parent != 0 {
            message["parentSpanId"] = json!(format!("{:016x}", self.parent));
        }
        message
    }
}

/// Where spans are sent.
struct Collector {
    endpoint: Url,
    http: reqwest::Client,
    runtime: tokio::runtime::Runtime,
    resource: Value,
    lost: Arc<AtomicU64>,
    /// The last message came through, or none was sent yet.
    is_well: bool,
}

impl Collector {
    fn new(endpoint: Url, lost: Arc<AtomicU64>) -> std::io::Result<Collector> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        tandem_store::use_ring();
        let http = reqwest::Client::builder()
            .default_headers(headers(variable(
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
                "OTEL_EXPORTER_OTLP_HEADERS",
            ))?)
            .timeout(PATIENCE)
            .build()
            .map_err(std::io::Error::other)?;
        Ok(Collector {
            endpoint,
            http,
            runtime,
            resource: resource(),
            lost,
            is_well: true,
        })
    }

    /// Until nobody wants it any more, and what waits then is sent.
    fn run(mut self, spans: &Receiver<Span>, wanted: &Receiver<()>) {
        loop {
            let is_last = wanted.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected);
            let mut batch = vec![];
            let due = Instant::now() + PERIOD;
            while batch.len() < BATCH {
                let left = if is_last {
                    Duration::ZERO
                } else {
                    due.saturating_duration_since(Instant::now())
                };
                match spans.recv_timeout(left.min(PERIOD / 10)) {
                    Ok(span) => batch.push(span),
                    Err(RecvTimeoutError::Timeout) if left.is_zero() => break,
                    Err(RecvTimeoutError::Timeout) => {
                        if wanted.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected) {
                            break;
                        }
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            match batch.is_empty() {
                true if is_last => return,
                true => {}
                false => self.send(batch),
            }
        }
    }

    fn send(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let spans: Vec<Value> = spans.into_iter().map(Span::message).collect();
        let scope = json!({"name": SERVICE, "version": env!("CARGO_PKG_VERSION")});
        let message = json!({"resourceSpans": [{
            "resource": self.resource, "scopeSpans": [{"scope": scope, "spans": spans}],
        }]});
        let request = self.http.post(self.endpoint.clone());
        let request = request
            .header("content-type", "application/json")
            .body(message.to_string());
        let sent = self
            .runtime
            .block_on(async { request.send().await?.error_for_status().map(drop) });
        let why = sent.err().map(|error| crate::exit::words(&error.into()));
        if why.is_some() {
            self.lost.fetch_add(count, Ordering::Relaxed);
        }
        let was_well = std::mem::replace(&mut self.is_well, why.is_none());
        match (why, was_well) {
            (Some(why), true) => warn!(
                endpoint = %self.endpoint, why,
                "the collector of traces (--otlp-traces-endpoint) does not take them: they are lost until it does"
            ),
            (None, false) => info!(
                endpoint = %self.endpoint, lost = self.lost.swap(0, Ordering::Relaxed),
                "the collector takes traces again"
            ),
            (Some(_), false) | (None, true) => {}
        }
    }
}

/// The first of the two that is set: OpenTelemetry's own names.
fn variable(first: &str, second: &str) -> String {
    std::env::var(first)
        .or_else(|_| std::env::var(second))
        .unwrap_or_default()
}

/// `key=value,key=value`, of which values are percent-encoded.
fn pairs(text: &str) -> impl Iterator<Item = (String, String)> {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| {
        let encoded = format!("v={}", value.trim().replace('+', "%2B"));
        let decoded = reqwest::Url::parse(&format!("http://x/?{encoded}")).ok();
        let decoded = decoded.and_then(|url| Some(url.query_pairs().next()?.1.into_owned()));
        (key.trim().to_owned(), decoded.unwrap_or_else(|| value.to_owned()))
    })
}

fn headers(text: String) -> std::io::Result<HeaderMap> {
    let wrong =
        |name: &str| std::io::Error::other(format!("OTEL_EXPORTER_OTLP_HEADERS: {name:?} is no header"));
    let mut headers = HeaderMap::new();
    for (name, value) in pairs(&text) {
        let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong(&name))?;
        headers.insert(header, HeaderValue::from_str(&value).map_err(|_| wrong(&name))?);
    }
    Ok(headers)
}

/// Who sends: OTEL_SERVICE_NAME, and what OTEL_RESOURCE_ATTRIBUTES adds.
fn resource() -> Value {
    let mut attributes: Vec<(String, String)> = pairs(&variable("OTEL_RESOURCE_ATTRIBUTES", "")).collect();
    let own = std::env::var("OTEL_SERVICE_NAME")
        .ok()
        .filter(|name| !name.is_empty());
    let is_named = attributes.iter().any(|(key, _)| key == "service.name");
    if own.is_some() || !is_named {
        attributes.retain(|(key, _)| key != "service.name");
        attributes.push((
            "service.name".to_owned(),
            own.unwrap_or_else(|| SERVICE.to_owned()),
        ));
    }
    attributes.push(("service.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()));
    let attributes = attributes.into_iter();
    let attributes = attributes.map(|(key, value)| json!({"key": key, "value": {"stringValue": value}}));
    json!({"attributes": attributes.collect::<Vec<_>>()})
}
