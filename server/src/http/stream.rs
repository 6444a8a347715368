//! A streamed answer: pieces in, frames out. Each API has its [`Writer`]; chat and completions share one, whose chunks end with
//! usage and `[DONE]`, and what a chunk's choice looks like is the caller's [`Choices`]. Not here: admission.

use std::time::Duration;

use axum::body::Bytes;
use axum::response::Response;
use serde::Serialize;
use tandem_core::message::Guessed;
use tandem_openapi::usage::Usage;
use tandem_router::api::{Piece, RouterError, What};

use super::feed::{Admitted, Feed, Identity, Placed};
use crate::convert::sampling::StreamUsage;
use crate::error::ApiError;
use crate::sse::{self, Envelope, UsageKey};

/// How long a stream's status waits for its first piece. Clients and proxies give up on a silent connection.
const FIRST_PIECE: Duration = Duration::from_millis(500);

/// How an API writes a stream. `usage` is what has been generated so far.
pub trait Writer: Send + 'static {
    /// Before the first piece.
    fn begin(&mut self, _usage: Usage, _out: &mut Vec<u8>) {}

    /// Failures do not come here.
    fn show(&mut self, piece: Placed, usage: Usage, out: &mut Vec<u8>);

    /// Every choice has ended.
    fn end(&mut self, usage: Usage, out: &mut Vec<u8>) -> impl Future<Output = ()> + Send;

    /// In place of the end.
    fn fail(&mut self, error: &ApiError, usage: Usage, out: &mut Vec<u8>);
}

/// Chat's and completions' way to show a piece.
pub trait Choices: Send + 'static {
    /// Writes none, one or several chunks. Failures do not come here.
    fn show(&mut self, piece: Placed, sink: &mut Sink<'_>);
}

/// Where chunks go.
pub struct Sink<'a> {
    envelope: &'a Envelope,
    usage: Option<Usage>,
    out: &'a mut Vec<u8>,
}

impl Sink<'_> {
    pub fn choice(&mut self, choice: &impl Serialize) {
        self.envelope.choice(self.out, choice, self.usage);
    }
}

struct Chunks<C> {
    envelope: Envelope,
    usage: StreamUsage,
    choices: C,
}

impl<C: Choices> Writer for Chunks<C> {
    fn show(&mut self, piece: Placed, usage: Usage, out: &mut Vec<u8>) {
        let mut sink = Sink {
            envelope: &self.envelope,
            usage: (self.usage == StreamUsage::Every).then_some(usage),
            out,
        };
        self.choices.show(piece, &mut sink);
    }

    async fn end(&mut self, usage: Usage, out: &mut Vec<u8>) {
        if self.usage != StreamUsage::None {
            self.envelope.usage(out, usage);
        }
        out.extend_from_slice(sse::DONE);
    }

    fn fail(&mut self, error: &ApiError, _usage: Usage, out: &mut Vec<u8>) {
        sse::error(out, error);
        out.extend_from_slice(sse::DONE);
    }
}

/// What has been generated so far.
struct Tally {
    prompt_tokens: u64,
    completion_tokens: u64,
    cached_tokens: u64,
    reasoning_tokens: u64,
    guessed: Guessed,
}

impl Tally {
    fn count(&mut self, (_, Piece { choice, what }): &Placed) {
        match what {
            What::Text {
                tokens,
                reasoning_tokens,
                ..
            } => {
                self.completion_tokens += tokens.len() as u64;
                self.reasoning_tokens += u64::from(*reasoning_tokens);
            }
            What::Finished {
                cached_tokens,
                guessed,
                ..
            } => {
                self.guessed += *guessed;
                // A prompt's cached tokens are counted once, with its first choice.
                if *choice == 0 {
                    self.cached_tokens += u64::from(*cached_tokens);
                }
            }
            _ => {}
        }
    }

    fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.completion_tokens, self.cached_tokens)
            .guessing(self.guessed.tokens.into(), self.guessed.accepted.into())
            .reasoning(self.reasoning_tokens)
    }
}

struct Stream<W> {
    feed: Feed,
    news: Vec<Placed>,
    writer: W,
    tally: Tally,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    Starting,
    Running,
    Over,
}

/// Chunks: `chunk` is the envelope without choices.
pub async fn respond(
    admitted: Admitted,
    chunk: &impl Serialize,
    usage: StreamUsage,
    choices: impl Choices,
) -> Result<Response, ApiError> {
    let key = match usage {
        StreamUsage::None => UsageKey::Absent,
        StreamUsage::Last | StreamUsage::Every => UsageKey::Present,
    };
    let envelope = Envelope::new(chunk, key);
    let chunks = Chunks {
        envelope,
        usage,
        choices,
    };
    run(admitted, chunks).await
}

/// The status waits a moment for the first piece: what fails before it is an error like any other, with its own status.
pub async fn run(admitted: Admitted, writer: impl Writer) -> Result<Response, ApiError> {
    let Admitted {
        identity,
        prompts,
        mut feed,
    } = admitted;
    let mut news = Vec::new();
    // A request that waits in the queue is told that it does: nothing is in `news` then.
    let _ = tokio::time::timeout(FIRST_PIECE, feed.next(&mut news)).await;
    if let Some((
        _,
        Piece {
            what: What::Failed(fault),
            ..
        },
    )) = news.first()
    {
        return Err(ApiError::Router(RouterError::Engine(fault.clone())));
    }
    let tally = Tally {
        prompt_tokens: prompts.iter().map(|prompt| prompt.len() as u64).sum(),
        completion_tokens: 0,
        cached_tokens: 0,
        reasoning_tokens: 0,
        guessed: Guessed::default(),
    };
    let stream = Stream {
        feed,
        news,
        writer,
        tally,
        state: State::Starting,
    };
    let frames = futures::stream::unfold(stream, |mut stream| async move {
        Some((stream.frame().await?, stream))
    });
    let mut response = sse::response(frames);
    Identity::write(&identity, response.headers_mut());
    Ok(response)
}

impl<W: Writer> Stream<W> {
    /// All that is ready, as one write.
    async fn frame(&mut self) -> Option<Bytes> {
        let mut out = Vec::new();
        if self.state == State::Starting {
            self.state = State::Running;
            self.writer.begin(self.tally.usage(), &mut out);
            self.show_news(&mut out);
        }
        // A token whose text is still held back (half a character, a possible stop string) makes no chunk.
        while out.is_empty() && self.state == State::Running {
            match self.feed.next(&mut self.news).await {
                true => self.show_news(&mut out),
                false => {
                    self.state = State::Over;
                    self.writer.end(self.tally.usage(), &mut out).await;
                }
            }
        }
        (!out.is_empty()).then(|| Bytes::from(out))
    }

    fn show_news(&mut self, out: &mut Vec<u8>) {
        let Stream {
            news,
            writer,
            tally,
            state,
            ..
        } = self;
        for placed in news.drain(..) {
            if let What::Failed(fault) = placed.1.what {
                let error = ApiError::Router(RouterError::Engine(fault));
                writer.fail(&error, tally.usage(), out);
                *state = State::Over;
                break;
            }
            tally.count(&placed);
            writer.show(placed, tally.usage(), out);
        }
    }
}
