//! Server-sent events: the envelope of a stream's chunks, written once, and the response around them. Not here: what
//! is in a chunk.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::{Stream, StreamExt};
use serde::Serialize;
use tandem_openapi::usage::Usage;

use crate::error::ApiError;

pub const DONE: &[u8] = b"data: [DONE]\n\n";
/// Load balancers cut a connection that is silent for a minute; a client skips what begins with a colon.
const SILENCE: Duration = Duration::from_secs(15);
const COMMENT: &[u8] = b": still here\n\n";

/// All chunks of a stream differ only in `choices` and `usage`. The rest is serialised once.
pub struct Envelope {
    /// `data: {...,"choices":[`
    head: Vec<u8>,
    /// Of a chunk without usage: `]}` or `],"usage":null}`, and the blank line.
    tail: &'static [u8],
}

/// Does every chunk have the key `usage`?
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum UsageKey {
    Absent,
    Present,
}

impl Envelope {
    /// `chunk` has no choices and no usage, and ends with `choices`.
    pub fn new(chunk: &impl Serialize, usage: UsageKey) -> Envelope {
        let mut head = b"data: ".to_vec();
        serde_json::to_writer(&mut head, chunk).expect("a chunk has string keys only");
        assert!(
            head.ends_with(b"\"choices\":[]}"),
            "choices is the chunk's last key"
        );
        head.truncate(head.len() - 2);
        let tail: &[u8] = match usage {
            UsageKey::Absent => b"]}\n\n",
            UsageKey::Present => b"],\"usage\":null}\n\n",
        };
        Envelope { head, tail }
    }

    pub fn choice(&self, out: &mut Vec<u8>, choice: &impl Serialize, usage: Option<Usage>) {
        out.extend_from_slice(&self.head);
        serde_json::to_writer(&mut *out, choice).expect("a choice has string keys only");
        match usage {
            None => out.extend_from_slice(self.tail),
            Some(usage) => finish(out, usage),
        }
    }

    /// The last chunk: no choices, the usage.
    pub fn usage(&self, out: &mut Vec<u8>, usage: Usage) {
        out.extend_from_slice(&self.head);
        finish(out, usage);
    }
}

fn finish(out: &mut Vec<u8>, usage: Usage) {
    out.extend_from_slice(b"],\"usage\":");
    serde_json::to_writer(&mut *out, &usage).expect("usage has string keys only");
    out.extend_from_slice(b"}\n\n");
}

/// One event of any shape.
pub fn event(out: &mut Vec<u8>, data: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, data).expect("an event has string keys only");
    out.extend_from_slice(b"\n\n");
}

/// One event with a name, as Anthropic's API and the Responses API have them.
pub fn named(out: &mut Vec<u8>, name: &str, data: &impl Serialize) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
    event(out, data);
}

/// The status is sent; all that is left is to say it in the stream, where OpenAI's clients raise it.
pub fn error(out: &mut Vec<u8>, error: &ApiError) {
    event(out, &error.body());
}

pub fn response(frames: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let frames = kept_alive(frames, SILENCE).map(Ok::<_, Infallible>);
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx buffers a proxied stream unless it is told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// With a comment wherever the stream would be silent for long.
fn kept_alive(
    frames: impl Stream<Item = Bytes> + Send + 'static,
    silence: Duration,
) -> impl Stream<Item = Bytes> + Send {
    futures::stream::unfold(Box::pin(frames), move |mut frames| async move {
        match tokio::time::timeout(silence, frames.next()).await {
            Ok(frame) => Some((frame?, frames)),
            Err(_) => Some((Bytes::from_static(COMMENT), frames)),
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_envelope_equals_the_whole() {
        let chunk = json!({"id": "x", "model": "a \"name\"", "choices": []});
        for (key, usage) in [
            (UsageKey::Absent, None),
            (UsageKey::Present, None),
            (UsageKey::Present, Some(3)),
        ] {
            let usage = usage.map(|n| Usage::new(n, n, 0));
            let mut out = Vec::new();
            Envelope::new(&chunk, key).choice(&mut out, &json!({"index": 0}), usage);
            let text = String::from_utf8(out).unwrap();
            let data = text.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
            let got: Value = serde_json::from_str(data).unwrap();
            let mut expected = json!({"id": "x", "model": "a \"name\"", "choices": [{"index": 0}]});
            if key == UsageKey::Present {
                expected["usage"] = serde_json::to_value(usage).unwrap();
            }
            assert_eq!(got, expected);
        }
    }

    #[tokio::test]
    async fn silence_is_broken_by_comments() {
        let (sender, frames) = tokio::sync::mpsc::channel(1);
        let frames = tokio_stream::wrappers::ReceiverStream::new(frames);
        let mut frames = Box::pin(kept_alive(frames, Duration::from_millis(1)));
        // However long nothing comes.
        assert_eq!(frames.next().await.as_deref(), Some(COMMENT));
        assert_eq!(frames.next().await.as_deref(), Some(COMMENT));
        sender.send(Bytes::from_static(DONE)).await.unwrap();
        drop(sender);
        let rest: Vec<Bytes> = frames.collect().await;
        assert_eq!(rest.iter().filter(|frame| &***frame == DONE).count(), 1);
        assert_eq!(rest.last().map(|frame| &**frame), Some(DONE));
    }
}
