//! What the engine says becomes text for the client: one task per call, for all its choices. Detokenisation, stop
//! strings, and the end of what nobody reads any more. Not here: admission, JSON.

use std::task::Poll;

use tandem_core::TokenId;
use tandem_core::id::RequestId;
use tandem_core::message::{Event, Fault, FinishReason, Scored};
use tandem_core::replica::{Command, EVENT_QUEUE};
use tandem_text::stop::{Matched, Passed, StopStrings};
use tandem_text::stream::TextStream;
use tandem_text::{Skip, Tokenizer};
use tokio::sync::mpsc;

use crate::api::{Finish, Piece, TokenText, What};
use crate::catalog::Lease;

/// What the choices of a call share.
pub(crate) struct Relay {
    pub tokenizer: Tokenizer,
    pub commands: mpsc::Sender<Command>,
    pub stop_tokens: Vec<TokenId>,
    pub matched: Matched,
    /// Before this many tokens a stop string does not end a choice.
    pub min_tokens: u32,
    /// Held to the end: the sequences are live and their adapter is pinned.
    pub lease: Lease,
}

/// One sequence that has not ended.
pub(crate) struct Choice {
    index: u32,
    id: RequestId,
    events: mpsc::Receiver<Event>,
    text: TextStream,
    stops: StopStrings,
    completion_tokens: u32,
}

/// Whether a choice has more to say, and how it ended: on its own, or while the engine still runs it.
enum State {
    Running,
    Ended,
    Cut,
}

impl Choice {
    #[expect(
        clippy::too_many_arguments,
        reason = "all of it is one call's, destructured once by its only caller"
    )]
    pub fn new(
        index: u32,
        id: RequestId,
        events: mpsc::Receiver<Event>,
        tokenizer: &Tokenizer,
        prompt: &[TokenId],
        skip: Skip,
        stops: &[String],
        matched: Matched,
    ) -> Choice {
        let text = TextStream::after(tokenizer.clone(), prompt, skip);
        let stops = StopStrings::new(stops.iter().cloned(), matched);
        Choice {
            index,
            id,
            events,
            text,
            stops,
            completion_tokens: 0,
        }
    }

    /// Turn events into pieces.
    fn take(&mut self, relay: &Relay, events: &mut Vec<Event>, pieces: &mut Vec<What>) -> State {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let mut end = None;
        for event in events.drain(..) {
            match event {
                Event::Prompt(scored) => {
                    let named = |scored: Option<Scored>| scored.map(|scored| relay.name(scored));
                    pieces.push(What::Prompt(scored.into_iter().map(named).collect()));
                }
                Event::Token(scored) => {
                    let ends = relay.stop_tokens.contains(&scored.token) && relay.matched == Matched::Hidden;
                    let new = if ends {
                        String::new()
                    } else {
                        self.text.push(scored.token)
                    };
                    self.completion_tokens += 1;
                    tokens.push(relay.name(scored));
                    if self.pass(relay, &new, &mut text) {
                        end = Some((
                            State::Cut,
                            What::Finished {
                                reason: Finish::Stop,
                                completion_tokens: self.completion_tokens,
                                // Only the end of a sequence says it, and this one is cut before its end.
                                cached_tokens: 0,
                            },
                        ));
                        break;
                    }
                }
                Event::Finished {
                    reason,
                    cached_tokens,
                } => {
                    let rest = self.text.flush();
                    let stopped = self.pass(relay, &rest, &mut text);
                    if !stopped {
                        text.push_str(&self.stops.flush());
                    }
                    let reason = match reason {
                        FinishReason::Stop(_) => Finish::Stop,
                        FinishReason::Length if stopped => Finish::Stop,
                        FinishReason::Length => Finish::Length,
                    };
                    let completion_tokens = self.completion_tokens;
                    end = Some((
                        State::Ended,
                        What::Finished {
                            reason,
                            completion_tokens,
                            cached_tokens,
                        },
                    ));
                    break;
                }
                Event::Failed(fault) => {
                    end = Some((State::Ended, What::Failed(fault)));
                    break;
                }
            }
        }
        if !text.is_empty() || !tokens.is_empty() {
            pieces.push(What::Text { text, tokens });
        }
        match end {
            None => State::Running,
            Some((state, last)) => {
                pieces.push(last);
                state
            }
        }
    }

    /// Move what may be shown to `out`. Whether a stop string ended it.
    fn pass(&mut self, relay: &Relay, new: &str, out: &mut String) -> bool {
        if self.completion_tokens < relay.min_tokens {
            out.push_str(new);
            return false;
        }
        match self.stops.push(new) {
            Passed::Text(text) => {
                out.push_str(&text);
                false
            }
            Passed::Stopped { text, .. } => {
                out.push_str(&text);
                true
            }
        }
    }
}

impl Relay {
    fn name(&self, scored: Scored) -> TokenText {
        let Scored { token, logprob, top } = scored;
        let spelled = |id: TokenId| (self.tokenizer.token_text(id), self.tokenizer.token_bytes(id));
        let alternative = |(id, logprob): (TokenId, f32)| {
            let (text, bytes) = spelled(id);
            (id, text, bytes, logprob)
        };
        let (text, bytes) = spelled(token);
        TokenText {
            id: token,
            text,
            bytes,
            logprob,
            top: top.into_iter().map(alternative).collect(),
        }
    }

    async fn abort(&self, ids: impl Iterator<Item = RequestId>) {
        for id in ids {
            // An engine that is gone runs nothing.
            let _ = self.commands.send(Command::Abort(id)).await;
        }
    }
}

/// Until every choice has ended or nobody reads.
pub(crate) async fn run(relay: Relay, mut choices: Vec<Choice>, out: mpsc::Sender<Piece>) {
    let (mut events, mut pieces) = (Vec::with_capacity(EVENT_QUEUE), Vec::new());
    while !choices.is_empty() {
        let slot = tokio::select! {
            biased;
            () = out.closed() => break,
            slot = next(&mut choices, &mut events) => slot,
        };
        if events.is_empty() {
            // The engine dropped the channel without an end: its thread is gone.
            events.push(Event::Failed(Fault::ShuttingDown));
        }
        let state = choices[slot].take(&relay, &mut events, &mut pieces);
        let choice = choices[slot].index;
        for what in pieces.drain(..) {
            if out.send(Piece { choice, what }).await.is_err() {
                break; // seen by `closed` next
            }
        }
        match state {
            State::Running => choices[slot..].rotate_left(1), // so that a fast choice starves none
            State::Ended => drop(choices.remove(slot)),
            State::Cut => relay.abort([choices.remove(slot).id].into_iter()).await,
        }
    }
    let left: Vec<RequestId> = choices.iter().map(|choice| choice.id).collect();
    // Closed channels stop a sequence too, should the abort wait in a full queue.
    drop(choices);
    relay.abort(left.into_iter()).await;
    drop(relay.lease);
}

/// Wait until one of the choices has events and take what is there. Empty: its channel is closed.
async fn next(choices: &mut [Choice], events: &mut Vec<Event>) -> usize {
    std::future::poll_fn(|context| {
        for (slot, choice) in choices.iter_mut().enumerate() {
            if choice
                .events
                .poll_recv_many(context, events, EVENT_QUEUE)
                .is_ready()
            {
                return Poll::Ready(slot);
            }
        }
        Poll::Pending
    })
    .await
}
