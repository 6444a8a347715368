//! Where a session's events come from: one source per request, job or adapter that was asked for, and per word to a learner. A source speaks only
//! while its reader has room. Not here: how what it says travels.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, ready};

use futures::Stream;
use futures::task::AtomicWaker;
use tandem_core::message::{Event, Fault};
use tandem_core::replica::AdapterInfo;
use tokio::sync::{mpsc, oneshot};

use super::Open;
use super::learners::Answered;
use crate::wire::learn_answer::Answer;

/// Events that one source may put into one message.
const BATCH: usize = 64;

/// What the session's reader tells a source.
pub struct Link {
    credit: AtomicU32,
    hung_up: AtomicBool,
    waker: AtomicWaker,
}

impl Link {
    pub fn new(credit: u32) -> Arc<Link> {
        Arc::new(Link {
            credit: AtomicU32::new(credit),
            hung_up: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        })
    }

    pub fn grant(&self, events: u32) {
        let more = |credit: u32| Some(credit.saturating_add(events));
        let _ = self
            .credit
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        self.waker.wake();
    }

    pub fn hang_up(&self) {
        self.hung_up.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub fn is_hung_up(&self) -> bool {
        self.hung_up.load(Ordering::Acquire)
    }
}

pub(crate) struct Source {
    pub stream: u64,
    pub link: Arc<Link>,
    pub kind: Kind,
}

pub(crate) enum Kind {
    Request {
        events: mpsc::Receiver<Event>,
        _open: Open,
    },
    /// JSON of `JobEvent`s, after the hooks.
    Job(mpsc::Receiver<Vec<u8>>),
    Adapter(oneshot::Receiver<Result<AdapterInfo, Fault>>),
    Learner(Answered),
    /// Has said its last word.
    Over,
}

pub enum Said {
    Events(u64, Vec<Event>),
    Job(u64, Vec<Vec<u8>>),
    Adapter(u64, Result<AdapterInfo, Fault>),
    Learner(u64, Answer),
    /// The engine closed it without an end.
    Closed(u64),
}

impl Said {
    pub fn stream(&self) -> u64 {
        match self {
            Said::Events(stream, _)
            | Said::Job(stream, _)
            | Said::Adapter(stream, _)
            | Said::Learner(stream, _)
            | Said::Closed(stream) => *stream,
        }
    }

    /// Nothing follows.
    pub fn is_last(&self) -> bool {
        match self {
            Said::Events(_, events) => {
                matches!(events.last(), Some(Event::Finished { .. } | Event::Failed(_)))
            }
            Said::Job(..) => false,
            Said::Adapter(..) | Said::Learner(..) | Said::Closed(_) => true,
        }
    }
}

impl Stream for Source {
    type Item = Said;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Said>> {
        let Source { stream, link, kind } = self.get_mut();
        // Before the look at what it may wake for.
        link.waker.register(context.waker());
        if link.is_hung_up() {
            *kind = Kind::Over;
        }
        let room = BATCH.min(link.credit.load(Ordering::Acquire) as usize);
        let said = match kind {
            Kind::Over => return Poll::Ready(None),
            Kind::Request { .. } | Kind::Job(_) if room == 0 => return Poll::Pending,
            Kind::Request { events, .. } => {
                let mut batch = Vec::new();
                match ready!(events.poll_recv_many(context, &mut batch, room)) {
                    0 => Said::Closed(*stream),
                    _ => Said::Events(*stream, batch),
                }
            }
            Kind::Job(events) => {
                let mut batch = Vec::new();
                match ready!(events.poll_recv_many(context, &mut batch, room)) {
                    0 => Said::Closed(*stream),
                    _ => Said::Job(*stream, batch),
                }
            }
            Kind::Adapter(answer) => match ready!(Pin::new(answer).poll(context)) {
                Ok(answer) => Said::Adapter(*stream, answer),
                Err(_) => Said::Closed(*stream),
            },
            Kind::Learner(answered) => match ready!(answered.as_mut().poll(context)) {
                Some(answer) => Said::Learner(*stream, answer),
                None => Said::Closed(*stream),
            },
        };
        if let Said::Events(_, events) = &said {
            link.credit.fetch_sub(events.len() as u32, Ordering::AcqRel);
        }
        if let Said::Job(_, events) = &said {
            link.credit.fetch_sub(events.len() as u32, Ordering::AcqRel);
        }
        if said.is_last() {
            *kind = Kind::Over;
        }
        Poll::Ready(Some(said))
    }
}
