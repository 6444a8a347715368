//! Who waits for what in a session, and how much may be sent to whom. A listener that does not read stops its own
//! stream: credit is given back as it reads. Not here: the wire's order (`outgoing`), the connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tandem_core::id::RequestId;
use tandem_core::job::JobEvent;
use tandem_core::message::{Event, Fault, Generate, Scored};
use tandem_core::replica::AdapterInfo;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use crate::codec::{self, Damaged};
use crate::learn::Waiting;
use crate::wire::up::Say;
use crate::wire::{AdapterAnswer, Credit, Events, JobEvents, LearnAnswer, Up};

type Reply = oneshot::Sender<Result<AdapterInfo, Fault>>;
type Control = mpsc::UnboundedSender<Up>;

pub struct Table(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    state: State,
    /// Of the model.
    hidden_size: u32,
    next: u64,
    requests: HashMap<u64, (Listener<Event>, Asked)>,
    jobs: HashMap<u64, Listener<JobEvent>>,
    adapters: HashMap<u64, Reply>,
    learners: HashMap<u64, Waiting>,
    /// By the id that `Abort` names.
    streams: HashMap<RequestId, u64>,
}

#[derive(Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The session is over: nobody would answer.
    Closed,
}

struct Listener<T> {
    events: mpsc::Sender<T>,
    /// Events that may still come without a new credit. Never more than the channel has room for.
    outstanding: usize,
}

/// What a request may be told: a backend that says more would fill the memory of its router.
struct Asked {
    id: RequestId,
    /// Tokens to score; none any more once they were told.
    prompt: usize,
    /// Alternatives to a token.
    top: usize,
    /// Numbers of a vector, likewise.
    pooled: usize,
}

impl Asked {
    fn of(generate: &Generate, hidden_size: u32) -> Asked {
        let sampling = &generate.sampling;
        let prompt_top = sampling.prompt_logprobs();
        Asked {
            id: generate.id,
            prompt: prompt_top.map_or(0, |_| generate.prompt.len()),
            top: sampling.logprobs().max(prompt_top).unwrap_or(0) as usize,
            pooled: generate.pooling.map_or(0, |_| hidden_size as usize),
        }
    }

    fn judge(&mut self, event: &Event) -> Result<(), Damaged> {
        let within = |said: usize, asked: usize, what: &str| match said <= asked {
            true => Ok(()),
            false => Err(Damaged(format!("{said} {what} where {asked} were asked for"))),
        };
        let of_token = |token: &Scored| within(token.top.len(), self.top, "alternatives to a token");
        match event {
            Event::Prompt(tokens) => {
                tokens.iter().flatten().try_for_each(of_token)?;
                within(
                    tokens.len(),
                    std::mem::take(&mut self.prompt),
                    "scores of a prompt",
                )
            }
            Event::Token { token, .. } => of_token(token),
            Event::Pooled(vector) => within(
                vector.len(),
                std::mem::take(&mut self.pooled),
                "numbers of a vector",
            ),
            Event::Finished { .. } | Event::Failed(_) => Ok(()),
        }
    }
}

/// What a job may say at once.
const JOB_EVENT_BYTES: usize = 256 << 10;

fn read_job_event(text: &[u8]) -> Result<JobEvent, Damaged> {
    match text.len() <= JOB_EVENT_BYTES {
        true => codec::from_json(text),
        false => Err(Damaged(format!(
            "{} bytes about a job at once, at most {JOB_EVENT_BYTES} are expected",
            text.len()
        ))),
    }
}

/// What became of a batch.
enum Given {
    Taken,
    /// The listener has room again.
    Credit(usize),
    /// The listener reads slowly; when it has read, credit is due.
    Starved,
    Left,
}

impl<T> Listener<T> {
    fn new(events: mpsc::Sender<T>) -> Listener<T> {
        Listener {
            outstanding: events.max_capacity(),
            events,
        }
    }

    fn give(&mut self, batch: impl Iterator<Item = Result<T, Damaged>>) -> Result<Given, Damaged> {
        for event in batch {
            match self.events.try_send(event?) {
                Ok(()) => self.outstanding = self.outstanding.saturating_sub(1),
                Err(TrySendError::Closed(_)) => return Ok(Given::Left),
                Err(TrySendError::Full(_)) => {
                    return Err(Damaged("more events than there was credit for".to_owned()));
                }
            }
        }
        Ok(match self.credit() {
            credit if credit >= self.step() => Given::Credit(self.grant(credit)),
            _ if self.outstanding == 0 => Given::Starved,
            _ => Given::Taken,
        })
    }

    /// Half a channel at a time: one message for many events, sent long before the credit is used up.
    fn step(&self) -> usize {
        self.events.max_capacity().div_ceil(2)
    }

    fn credit(&self) -> usize {
        self.events.capacity().saturating_sub(self.outstanding)
    }

    fn grant(&mut self, credit: usize) -> usize {
        self.outstanding += credit;
        credit
    }
}

impl Table {
    pub fn new(hidden_size: u32) -> Table {
        Table(Mutex::new(Inner {
            hidden_size,
            ..Inner::default()
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stream and first credit. `None`: the session is over, and dropping the sender says so.
    pub fn request(&self, generate: &Generate, events: mpsc::Sender<Event>) -> Option<(u64, u32)> {
        let mut inner = self.lock();
        let stream = inner.stream()?;
        let listener = Listener::new(events);
        let credit = listener.outstanding as u32;
        let asked = Asked::of(generate, inner.hidden_size);
        inner.streams.insert(asked.id, stream);
        inner.requests.insert(stream, (listener, asked));
        Some((stream, credit))
    }

    pub fn job(&self, events: mpsc::Sender<JobEvent>) -> Option<(u64, u32)> {
        let mut inner = self.lock();
        let stream = inner.stream()?;
        let listener = Listener::new(events);
        let credit = listener.outstanding as u32;
        inner.jobs.insert(stream, listener);
        Some((stream, credit))
    }

    pub fn adapter(&self, reply: Reply) -> Option<u64> {
        let mut inner = self.lock();
        let stream = inner.stream()?;
        inner.adapters.insert(stream, reply);
        Some(stream)
    }

    pub fn learn(&self, waiting: Option<Waiting>) -> Option<u64> {
        let mut inner = self.lock();
        let stream = inner.stream()?;
        inner.learners.extend(waiting.map(|waiting| (stream, waiting)));
        Some(stream)
    }

    pub fn learned(&self, answers: Vec<LearnAnswer>) -> Result<(), Damaged> {
        let mut inner = self.lock();
        for answer in answers {
            if let Some(waiting) = inner.learners.remove(&answer.stream) {
                waiting.answer(answer)?;
            }
        }
        Ok(())
    }

    /// The stream of a request that nobody waits for any more; `None` when it has ended.
    pub fn forget(&self, id: RequestId) -> Option<u64> {
        let mut inner = self.lock();
        let stream = inner.streams.remove(&id)?;
        inner.requests.remove(&stream);
        Some(stream)
    }

    /// Whether a request waits for the engine, rather than the engine for its reader.
    pub fn awaits_events(&self) -> bool {
        let inner = self.lock();
        inner
            .requests
            .values()
            .any(|(listener, _)| listener.outstanding > 0)
    }

    /// One message's news, each to its listener.
    pub fn deliver(
        self: &Arc<Table>,
        events: Vec<Events>,
        job_events: Vec<JobEvents>,
        adapters: Vec<AdapterAnswer>,
        closed: Vec<u64>,
        control: &Control,
    ) -> Result<(), Damaged> {
        let mut inner = self.lock();
        for Events { stream, events } in events {
            // Not there: it left, and its goodbye is under way.
            let Some((listener, asked)) = inner.requests.get_mut(&stream) else {
                continue;
            };
            let mut ended = false;
            let read = events.into_iter().map(|event| {
                let event = codec::read_event(event)?;
                asked.judge(&event)?;
                ended = matches!(event, Event::Finished { .. } | Event::Failed(_));
                Ok(event)
            });
            let given = listener.give(read)?;
            if ended {
                inner.end(stream);
                continue;
            }
            match given {
                Given::Taken => {}
                Given::Credit(events) => credit(control, stream, events),
                Given::Starved => self.refill(stream, listener.events.clone(), control),
                Given::Left => {
                    inner.end(stream);
                    send(control, Say::HangUp(stream));
                }
            }
        }
        for JobEvents { stream, events_json } in job_events {
            let Some(listener) = inner.jobs.get_mut(&stream) else {
                continue;
            };
            let read = events_json.iter().map(|text| read_job_event(text));
            match listener.give(read)? {
                Given::Taken => {}
                Given::Credit(events) => credit(control, stream, events),
                Given::Starved => self.refill(stream, listener.events.clone(), control),
                Given::Left => {
                    inner.end(stream);
                    send(control, Say::HangUp(stream));
                }
            }
        }
        for AdapterAnswer { stream, result_json } in adapters {
            if let Some(reply) = inner.adapters.remove(&stream) {
                // Whoever asked may be gone.
                drop(reply.send(codec::from_json(&result_json)?));
            }
        }
        for stream in closed {
            inner.end(stream);
        }
        Ok(())
    }

    /// The session is over. Who waits hears why; a job's supervisor sees its channel close.
    pub fn close(&self, why: &Fault) {
        let mut inner = self.lock();
        inner.state = State::Closed;
        inner.streams.clear();
        inner.jobs.clear();
        // Who trains knows what was lost.
        inner.learners.clear();
        for (_, (listener, _)) in inner.requests.drain() {
            // A full channel is closed without a last word, which means the same.
            let _ = listener.events.try_send(Event::Failed(why.clone()));
        }
        for (_, reply) in inner.adapters.drain() {
            let _ = reply.send(Err(why.clone()));
        }
    }

    /// Gives credit once a slow listener has read half of what it holds.
    fn refill<T: Send + 'static>(self: &Arc<Table>, stream: u64, events: mpsc::Sender<T>, control: &Control) {
        // A session that ends must not wait for slow readers.
        let (table, control) = (self.clone(), control.downgrade());
        tokio::spawn(async move {
            let step = events.max_capacity().div_ceil(2);
            // Closed: the next event, or the request's end, finds out.
            drop(events.reserve_many(step).await);
            drop(events);
            let Some(control) = control.upgrade() else { return };
            let mut guard = table.lock();
            let inner = &mut *guard;
            let granted = match (inner.requests.get_mut(&stream), inner.jobs.get_mut(&stream)) {
                (Some((listener, _)), _) => listener.grant_all(),
                (None, Some(listener)) => listener.grant_all(),
                (None, None) => return,
            };
            credit(&control, stream, granted);
        });
    }
}

impl<T> Listener<T> {
    fn grant_all(&mut self) -> usize {
        let credit = self.credit();
        self.grant(credit)
    }
}

impl Inner {
    fn stream(&mut self) -> Option<u64> {
        if self.state == State::Closed {
            return None;
        }
        self.next += 1;
        Some(self.next)
    }

    fn end(&mut self, stream: u64) {
        if let Some((_, asked)) = self.requests.remove(&stream) {
            self.streams.remove(&asked.id);
        }
        self.jobs.remove(&stream);
        self.adapters.remove(&stream);
        self.learners.remove(&stream);
    }
}

fn credit(control: &Control, stream: u64, events: usize) {
    let events = events as u32;
    send(control, Say::Credit(Credit { stream, events }));
}

/// An outgoing stream that is gone sends nothing; the session ends by itself.
pub fn send(control: &Control, say: Say) {
    drop(control.send(Up { say: Some(say) }));
}
