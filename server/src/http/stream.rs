//! A streamed answer: pieces in, chunks out, then usage and `[DONE]`. What a chunk's choice looks like is the caller's
//! [`Choices`]. Not here: admission.

use std::time::Duration;

use axum::body::Bytes;
use axum::response::Response;
use serde::Serialize;
use tandem_openapi::usage::Usage;
use tandem_router::api::{Piece, RouterError, What};

use super::feed::{Admitted, Feed, Identity, Placed};
use crate::convert::sampling::StreamUsage;
use crate::error::ApiError;
use crate::sse::{self, Envelope, UsageKey};

/// How long a stream's status waits for its first piece. Clients and proxies give up on a silent connection.
const FIRST_PIECE: Duration = Duration::from_millis(500);

/// Chat's and completions' way to show a piece.
pub trait Choices: Send + 'static {
    /// Writes none, one or several chunks. Failures do not come here.
    fn show(&mut self, piece: Placed, sink: &mut Sink<'_>);
}

/// Where chunks go.
pub struct Sink<'a> {
    envelope: &'a Envelope,
    usage: Option<Usage>,
    out: Vec<u8>,
}

impl Sink<'_> {
    pub fn choice(&mut self, choice: &impl Serialize) {
        self.envelope.choice(&mut self.out, choice, self.usage);
    }
}

/// What has been generated so far.
struct Tally {
    prompt_tokens: u64,
    completion_tokens: u64,
    cached_tokens: u64,
}

impl Tally {
    fn count(&mut self, what: &What, first_choice: FirstChoice) {
        match what {
            What::Text { tokens, .. } => self.completion_tokens += tokens.len() as u64,
            What::Finished { cached_tokens, .. } if first_choice == FirstChoice::Yes => {
                self.cached_tokens += u64::from(*cached_tokens);
            }
            _ => {}
        }
    }

    fn usage(&self) -> Usage {
        Usage::new(self.prompt_tokens, self.completion_tokens, self.cached_tokens)
    }
}

/// A prompt's cached tokens are counted once, with its first choice.
#[derive(PartialEq, Eq)]
enum FirstChoice {
    Yes,
    No,
}

struct Stream<C> {
    feed: Feed,
    news: Vec<Placed>,
    choices: C,
    envelope: Envelope,
    usage: StreamUsage,
    tally: Tally,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    Running,
    Over,
}

/// `chunk` is the envelope without choices. The status waits a moment for the first piece: what fails before it is an
/// error like any other, with its own status.
pub async fn respond(
    admitted: Admitted,
    chunk: &impl Serialize,
    usage: StreamUsage,
    choices: impl Choices,
) -> Result<Response, ApiError> {
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
    let key = match usage {
        StreamUsage::None => UsageKey::Absent,
        StreamUsage::Last | StreamUsage::Every => UsageKey::Present,
    };
    let tally = Tally {
        prompt_tokens: prompts.iter().map(|prompt| prompt.len() as u64).sum(),
        completion_tokens: 0,
        cached_tokens: 0,
    };
    let envelope = Envelope::new(chunk, key);
    let stream = Stream {
        feed,
        news,
        choices,
        envelope,
        usage,
        tally,
        state: State::Running,
    };
    let frames = futures::stream::unfold(stream, |mut stream| async move {
        Some((stream.frame().await?, stream))
    });
    let mut response = sse::response(frames);
    Identity::write(&identity, response.headers_mut());
    Ok(response)
}

impl<C: Choices> Stream<C> {
    /// All that is ready, as one write.
    async fn frame(&mut self) -> Option<Bytes> {
        while self.state == State::Running {
            if self.news.is_empty() && !self.feed.next(&mut self.news).await {
                self.state = State::Over;
                return Some(self.end());
            }
            let frame = self.show_news();
            // A token whose text is still held back (half a character, a possible stop string) makes no chunk.
            if !frame.is_empty() {
                return Some(Bytes::from(frame));
            }
        }
        None
    }

    fn show_news(&mut self) -> Vec<u8> {
        let Stream {
            news,
            choices,
            envelope,
            usage,
            tally,
            state,
            ..
        } = self;
        let mut sink = Sink {
            envelope,
            usage: None,
            out: Vec::new(),
        };
        for (prompt, piece) in news.drain(..) {
            if let What::Failed(fault) = piece.what {
                sse::error(&mut sink.out, &ApiError::Router(RouterError::Engine(fault)));
                sink.out.extend_from_slice(sse::DONE);
                *state = State::Over;
                break;
            }
            let first_choice = if piece.choice == 0 {
                FirstChoice::Yes
            } else {
                FirstChoice::No
            };
            tally.count(&piece.what, first_choice);
            sink.usage = (*usage == StreamUsage::Every).then(|| tally.usage());
            choices.show((prompt, piece), &mut sink);
        }
        sink.out
    }

    fn end(&self) -> Bytes {
        let mut out = Vec::new();
        if self.usage != StreamUsage::None {
            self.envelope.usage(&mut out, self.tally.usage());
        }
        out.extend_from_slice(sse::DONE);
        Bytes::from(out)
    }
}
