//! What the engine says becomes text for the client: one task per call, for all its choices. Detokenisation, stop
//! strings, the end of what nobody reads any more, and another replica for what was lost before it began. Not here:
//! admission, JSON.

use std::sync::Arc;
use std::task::Poll;

use tandem_core::TokenId;
use tandem_core::id::{AdapterRef, Digest, RequestId};
use tandem_core::message::{Event, Fault, FinishReason, Generate, Guessed, Scored};
use tandem_core::pooling::Pooling;
use tandem_core::replica::{Command, EVENT_QUEUE};
use tandem_core::sampling::Sampling;
use tandem_core::trace::TraceContext;
use tandem_text::stop::{Matched, Passed, StopStrings};
use tandem_text::stream::TextStream;
use tandem_text::tools::Reader;
use tandem_text::{Skip, Tokenizer};
use tokio::sync::mpsc;

use crate::answer::Bounds;
use crate::api::{Delta, Finish, Piece, TokenText, What};
use crate::catalog::Lease;
use crate::fleet::{Ask, Fleet, Seat};
use crate::traced::Traced;

/// Replicas that one choice may lose before it begins; a request that kills them must not kill all.
const MAX_PLACES: u32 = 3;

/// What the choices of a call share.
pub(crate) struct Relay {
    pub fleet: Fleet,
    pub tokenizer: Tokenizer,
    pub order: Order,
    pub traced: Option<Traced>,
    pub skip: Skip,
    pub matched: Matched,
    /// An answer ends before its second call (`parallel_tool_calls: false`).
    pub one_call: bool,
    /// Held to the end: the sequences are live and their adapter is pinned.
    pub lease: Lease,
}

/// What each choice asks of an engine, whichever that is.
pub(crate) struct Order {
    pub prompt: Arc<[TokenId]>,
    pub adapter: Option<AdapterRef>,
    /// The one replica that has it.
    pub at: Option<mpsc::Sender<Command>>,
    pub sampling: Sampling,
    pub bounds: Bounds,
    pub priority: i32,
    pub key: u64,
    pub salt: Option<Digest>,
    pub max_tokens: u32,
    pub pooling: Option<Pooling>,
    pub stop_tokens: Vec<TokenId>,
    pub trace: Option<TraceContext>,
}

/// One sequence that has not ended.
pub(crate) struct Choice {
    index: u32,
    id: RequestId,
    seat: Seat,
    events: mpsc::Receiver<Event>,
    /// Replicas it was given to.
    places: u32,
    life: Life,
    path: Path,
    has_calls: bool,
    completion_tokens: u32,
    /// Those that were told of.
    reasoning_tokens: u32,
}

/// What tokens go through on their way to the client, in this order.
pub(crate) struct Path {
    pub text: TextStream,
    pub stops: StopStrings,
    /// Of a chat.
    pub reader: Option<Reader>,
}

/// Whether the engine has said anything: what has begun cannot begin again elsewhere.
#[derive(PartialEq, Eq)]
enum Life {
    Placed,
    Begun,
}

/// Whether a choice has more to say, and how it ended: on its own, or while the engine still runs it. A choice that was
/// lost before it began can begin elsewhere.
enum State {
    Running,
    Ended,
    Cut,
    Lost(Fault),
}

impl Choice {
    pub fn new(index: u32, id: RequestId, seat: Seat, events: mpsc::Receiver<Event>, path: Path) -> Choice {
        Choice {
            index,
            id,
            seat,
            events,
            places: 1,
            life: Life::Placed,
            path,
            has_calls: false,
            completion_tokens: 0,
            reasoning_tokens: 0,
        }
    }

    /// One seat for each of `n` choices.
    pub fn seats(mut seat: Seat, n: u32) -> impl Iterator<Item = Seat> {
        (0..n).map(move |_| seat.split(1))
    }

    /// Turn events into pieces.
    fn take(&mut self, relay: &Relay, events: &mut Vec<Event>, pieces: &mut Vec<What>) -> State {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let mut end = None;
        for event in events.drain(..) {
            match (&event, &self.life) {
                (Event::Failed(fault @ (Fault::ReplicaLost(_) | Fault::ShuttingDown)), Life::Placed)
                    if self.places < MAX_PLACES =>
                {
                    return State::Lost(fault.clone());
                }
                _ => self.life = Life::Begun,
            }
            match event {
                Event::Prompt(scored) => {
                    let named = |scored: Option<Scored>| scored.map(|scored| relay.name(scored));
                    pieces.push(What::Prompt(scored.into_iter().map(named).collect()));
                }
                Event::Token { .. } if self.completion_tokens == relay.order.max_tokens => {
                    // A router does not trust what its backends say: this one would be charged, and have no end.
                    let more = "it made more tokens than it was asked for".to_owned();
                    end = Some((State::Cut, What::Failed(Fault::ReplicaLost(more))));
                    break;
                }
                Event::Token { token, is_last: _ } => {
                    let ends =
                        relay.order.stop_tokens.contains(&token.token) && relay.matched == Matched::Hidden;
                    let new = if ends {
                        String::new()
                    } else {
                        self.path.text.push(token.token)
                    };
                    self.completion_tokens += 1;
                    relay.lease.client().took(1);
                    tokens.push(relay.name(token));
                    if let Some(reader) = &mut self.path.reader {
                        reader.token(new.chars().count());
                    }
                    if let Some(stop) = self.pass(relay, &new, &mut text) {
                        end = Some((
                            State::Cut,
                            What::Finished {
                                reason: Finish::Stop,
                                stop_string: Some(stop),
                                completion_tokens: self.completion_tokens,
                                // Only the end of a sequence says these, and this one is cut before its end.
                                cached_tokens: 0,
                                guessed: Guessed::default(),
                            },
                        ));
                        break;
                    }
                }
                Event::Pooled(vector) => pieces.push(What::Pooled(vector)),
                Event::Finished {
                    reason,
                    cached_tokens,
                    guessed,
                } => {
                    let rest = self.path.text.flush();
                    let stopped = self.pass(relay, &rest, &mut text);
                    if stopped.is_none() {
                        text.push_str(&self.path.stops.flush());
                    }
                    let reason = match reason {
                        FinishReason::Stop(_) | FinishReason::Complete => Finish::Stop,
                        FinishReason::Length if stopped.is_some() => Finish::Stop,
                        FinishReason::Length => Finish::Length,
                    };
                    let completion_tokens = self.completion_tokens;
                    end = Some((
                        State::Ended,
                        What::Finished {
                            reason,
                            stop_string: stopped,
                            completion_tokens,
                            cached_tokens,
                            guessed,
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
        let mut deltas = self.read(&text, end.is_some());
        let second = |delta: &Delta| delta.calls.iter().any(|call| call.index > 0);
        if let Some(last) = deltas.iter().position(second).filter(|_| relay.one_call) {
            deltas.truncate(last + 1);
            deltas[last].calls.retain(|call| call.index == 0);
            end.get_or_insert_with(|| {
                let last = What::Finished {
                    reason: Finish::Calls,
                    stop_string: None,
                    completion_tokens: self.completion_tokens,
                    cached_tokens: 0,
                    guessed: Guessed::default(),
                };
                (State::Cut, last)
            });
        }
        self.has_calls |= deltas.iter().any(|delta| !delta.calls.is_empty());
        // The tokens go with the last of what they say.
        let last = deltas.pop().unwrap_or_default();
        pieces.extend(deltas.into_iter().map(|text| What::Text {
            text,
            tokens: vec![],
            reasoning_tokens: 0,
            is_last: false,
        }));
        let thought = self.path.reader.as_mut().map_or(0, Reader::reasoning_tokens);
        let reasoning_tokens = thought - std::mem::replace(&mut self.reasoning_tokens, thought);
        if !last.is_empty() || !tokens.is_empty() || reasoning_tokens > 0 {
            pieces.push(What::Text {
                text: last,
                tokens,
                reasoning_tokens,
                is_last: matches!(end, Some((_, What::Finished { .. }))),
            });
        }
        match end {
            None => State::Running,
            Some((state, mut last)) => {
                if let What::Finished { reason, .. } = &mut last
                    && *reason == Finish::Stop
                    && self.has_calls
                {
                    *reason = Finish::Calls;
                }
                pieces.push(last);
                state
            }
        }
    }

    /// `is_over`: no more comes.
    fn read(&mut self, text: &str, is_over: bool) -> Vec<Delta> {
        let Some(reader) = &mut self.path.reader else {
            return vec![Delta {
                content: text.to_owned(),
                ..Delta::default()
            }];
        };
        let mut deltas = reader.push(text);
        if is_over {
            deltas.extend(reader.finish());
        }
        deltas
    }

    /// Move what may be shown to `out`. The stop string that ended it.
    fn pass(&mut self, relay: &Relay, new: &str, out: &mut String) -> Option<String> {
        if self.completion_tokens < relay.order.sampling.min_tokens() {
            out.push_str(new);
            return None;
        }
        match self.path.stops.push(new) {
            Passed::Text(text) => {
                out.push_str(&text);
                None
            }
            Passed::Stopped { text, stop } => {
                out.push_str(&text);
                Some(stop)
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
            is_hidden: self.skip == Skip::Special && self.tokenizer.is_special(token),
            bytes,
            logprob,
            top: top.into_iter().map(alternative).collect(),
        }
    }

    /// All choices at one replica, or none.
    pub async fn place_all(&self, n: u32) -> Result<(Seat, Vec<mpsc::Receiver<Event>>), Fault> {
        let mut places = 0;
        loop {
            let seat = self.fleet.seat(self.order.ask(n)).await?;
            let commands = seat.commands.clone();
            // The queue empties at every turn of the engine, and admission bounds who stands in it.
            let lost = match commands.reserve_many(n as usize).await {
                Ok(permits) => {
                    let send = |((id, index), permit): ((RequestId, u64), mpsc::Permit<'_, Command>)| {
                        let (sender, events) = mpsc::channel(EVENT_QUEUE);
                        permit.send(Command::Generate(self.order.generate(id, index), sender));
                        events
                    };
                    let events = self.lease.ids().zip(0..).zip(permits).map(send).collect();
                    return Ok((seat, events));
                }
                Err(mpsc::error::SendError(())) => "it went away".to_owned(),
            };
            places += 1;
            if places == MAX_PLACES {
                return Err(Fault::ReplicaLost(lost));
            }
        }
    }

    /// The choice begins again, at another replica or at one that has come back.
    async fn place_again(&self, choice: &mut Choice) -> Result<(), Fault> {
        let seat = self.fleet.seat(self.order.ask(1)).await?;
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        let generate = self.order.generate(choice.id, u64::from(choice.index));
        // One that went away just now drops the sender, and the choice is lost once more.
        let _ = seat.commands.send(Command::Generate(generate, sender)).await;
        (choice.seat, choice.events) = (seat, events);
        choice.places += 1;
        Ok(())
    }
}

impl Order {
    fn ask(&self, n: u32) -> Ask<'_> {
        Ask {
            prompt: &self.prompt,
            adapter: self.adapter.as_ref().map(|adapter| adapter.digest),
            max_tokens: self.max_tokens,
            n,
            at: self.at.as_ref(),
        }
    }

    fn generate(&self, id: RequestId, index: u64) -> Generate {
        Generate {
            id,
            prompt: self.prompt.clone(),
            adapter: self.adapter.clone(),
            sampling: self.sampling.for_choice(index),
            grammar: self.bounds.grammar.clone(),
            thinking: self.bounds.thinking.clone().map(Box::new),
            priority: self.priority,
            key: self.key,
            salt: self.salt,
            max_tokens: self.max_tokens,
            pooling: self.pooling,
            stop_tokens: self.stop_tokens.clone(),
            trace: self.trace.map(Box::new),
        }
    }
}

async fn abort(choice: Choice) {
    let Choice { id, seat, events, .. } = choice;
    // A closed channel stops a sequence too, should the abort wait in a full queue.
    drop(events);
    // An engine that is gone runs nothing.
    let _ = seat.commands.send(Command::Abort(id)).await;
}

/// Until every choice has ended or nobody reads.
pub(crate) async fn run(mut relay: Relay, mut choices: Vec<Choice>, out: mpsc::Sender<Piece>) {
    let (mut events, mut pieces) = (Vec::with_capacity(EVENT_QUEUE), Vec::new());
    let mut crowded_out = false;
    'calls: while !choices.is_empty() {
        let slot = tokio::select! {
            biased;
            () = out.closed() => break,
            slot = next(&mut choices, &mut events) => slot,
        };
        let lost = || Event::Failed(Fault::ReplicaLost("it went away without a word".to_owned()));
        if events.is_empty() {
            events.push(lost());
        }
        // The last token and the end are told together.
        while let Some(Event::Token { is_last: true, .. }) = events.last() {
            events.push(choices[slot].events.recv().await.unwrap_or_else(lost));
        }
        let mut state = choices[slot].take(&relay, &mut events, &mut pieces);
        if let State::Lost(fault) = state {
            tracing::debug!(%fault, "a request that had not begun goes to another replica");
            if fault == Fault::ShuttingDown {
                relay.fleet.stops(&choices[slot].seat);
            }
            let placed = tokio::select! {
                biased;
                () = out.closed() => break,
                placed = relay.place_again(&mut choices[slot]) => placed,
            };
            state = match placed {
                Ok(()) => State::Running,
                Err(fault) => {
                    pieces.push(What::Failed(fault));
                    State::Ended
                }
            };
        }
        let choice = choices[slot].index;
        for what in pieces.drain(..) {
            if let Some(traced) = &mut relay.traced {
                traced.see(&what);
            }
            match send(&relay.lease, &out, Piece { choice, what }).await {
                Sent::Done => {}
                Sent::Nobody => break, // seen by `closed` next
                Sent::CrowdedOut => {
                    crowded_out = true;
                    break 'calls;
                }
            }
        }
        match state {
            State::Running | State::Lost(_) => choices[slot..].rotate_left(1), // so that a fast choice starves none
            State::Ended => drop(choices.remove(slot)),
            State::Cut => abort(choices.remove(slot)).await,
        }
    }
    let left: Vec<u32> = choices.iter().map(|choice| choice.index).collect();
    for choice in choices {
        abort(choice).await;
    }
    drop(relay);
    if crowded_out {
        // Whoever reads after all is told. This holds nothing but the call's own queue.
        for choice in left {
            let what = What::Failed(Fault::Unread);
            let _ = out.send(Piece { choice, what }).await;
        }
    }
}

enum Sent {
    Done,
    /// Nobody reads any more.
    Nobody,
    /// The client reads nothing, and too many others do so, too.
    CrowdedOut,
}

/// While the client does not read, its sequences keep no place from others.
async fn send(lease: &Lease, out: &mpsc::Sender<Piece>, piece: Piece) -> Sent {
    let piece = match out.try_send(piece) {
        Ok(()) => return Sent::Done,
        Err(mpsc::error::TrySendError::Closed(_)) => return Sent::Nobody,
        Err(mpsc::error::TrySendError::Full(piece)) => piece,
    };
    let mut parked = lease.park();
    tokio::select! {
        biased;
        sent = out.send(piece) => match sent {
            Ok(()) => Sent::Done,
            Err(_) => Sent::Nobody,
        },
        () = parked.crowded_out() => Sent::CrowdedOut,
    }
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
