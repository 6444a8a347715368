//! One fine-tuning job in the engine: how far it is, and who hears of it. Not here: several beside each other (jobs),
//! training.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tandem_core::id::JobId;
use tandem_core::job::{JobEvent, JobSpec};
use tandem_core::trace::{TARGET, TraceContext};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tracing::{Level, Span, span_enabled, trace_span};

use super::clients::Delivery;
use super::files::Ticket;
use crate::guard::TorchFault;
use crate::train::Trainer;
use crate::train::memory::Memory;
use crate::train::turns::Turn;

pub struct Job {
    pub spec: JobSpec,
    pub stage: Stage,
    pub supervisor: Supervisor,
    pub memory: Memory,
    /// The time of its quanta, and what it did not get while it could not go on.
    pub given: Duration,
    /// Over all lives of the job, as last reported; unknown between going on from a state and the first step.
    pub trained_tokens: Option<u64>,
    /// When it last fell back to its state. Twice without a step in between is the end.
    pub fall: Option<Fall>,
    /// The span of the optimizer step that is on its way, and which it is.
    span: (Span, u64),
}

pub enum Stage {
    /// Its folder is being read.
    Begins(Ticket),
    Trains(Box<Trainer>),
}

pub struct Fall {
    /// Optimizer steps done.
    pub step: u64,
    pub fault: TorchFault,
}

/// Who hears a job's events, in the order of its steps.
pub struct Supervisor {
    pub job: JobId,
    /// The last that was reported.
    pub step: u64,
    events: mpsc::Sender<JobEvent>,
    unheard: VecDeque<Notice>,
    /// Whether what finds the disk full is to wait for room.
    patience: Arc<AtomicBool>,
}

enum Notice {
    Event(JobEvent),
    /// An event may come when this is written. What happened since waits behind it.
    Due(Ticket),
}

impl Notice {
    fn is_due(&self, ticket: Ticket) -> bool {
        matches!(self, Notice::Due(due) if *due == ticket)
    }
}

impl Job {
    pub fn new(
        spec: JobSpec,
        begins: Ticket,
        events: mpsc::Sender<JobEvent>,
        memory: Memory,
        given: Duration,
    ) -> Job {
        Job {
            stage: Stage::Begins(begins),
            supervisor: Supervisor::new(spec.id.clone(), events),
            spec,
            memory,
            given,
            trained_tokens: None,
            fall: None,
            span: (Span::none(), 0),
        }
    }

    /// A job waits while its supervisor does not read, and before it saves again while it is still being saved: so a slow
    /// disk holds no more than one copy of its numbers.
    pub fn is_ready(&self) -> bool {
        match &self.stage {
            Stage::Begins(_) => false,
            Stage::Trains(trainer) => {
                let waits = trainer.is_about_to_save() && self.supervisor.awaits_a_ticket();
                !waits && self.supervisor.can_hear()
            }
        }
    }

    /// Whether there is something to be done: a quantum, or to let it go.
    pub fn can_go_on(&self) -> bool {
        self.is_ready() || self.supervisor.events.is_closed()
    }

    pub fn trainer(&mut self) -> Option<&mut Trainer> {
        match &mut self.stage {
            Stage::Trains(trainer) => Some(trainer),
            Stage::Begins(_) => None,
        }
    }

    /// After a fall it goes alone for a step: what made it fall must not make others fall again.
    pub fn turn(&self) -> Turn {
        let has_fallen = self.fall.as_ref().is_some_and(|fall| fall.step >= self.step());
        let of = match &self.stage {
            Stage::Trains(trainer) => Turn::of(trainer, self.given),
            Stage::Begins(_) => Turn::default(),
        };
        Turn {
            is_ready: self.is_ready(),
            rows_to_join: of.rows_to_join.filter(|_| !has_fallen),
            ..of
        }
    }

    pub fn holds_activations(&self) -> bool {
        matches!(&self.stage, Stage::Trains(trainer) if trainer.holds_activations())
    }

    /// Of the next quantum, in that of its step, in the job's trace; to be held as long as it takes.
    pub fn quantum_span(&mut self) -> Span {
        if !span_enabled!(target: TARGET, Level::TRACE) {
            return Span::none();
        }
        let step = self.step() + 1;
        if self.span.1 != step || self.span.0.is_none() {
            let parent = TraceContext::named(&self.spec.id.to_string());
            let span = trace_span!(
                target: TARGET, "training step", otel.parent = %parent, tandem.job = %self.spec.id, tandem.step = step,
            );
            self.span = (span, step);
        }
        trace_span!(target: TARGET, parent: &self.span.0, "training quantum")
    }

    pub fn step(&self) -> u64 {
        match &self.stage {
            Stage::Begins(_) => match (&self.fall, self.spec.life.saved) {
                (Some(fall), _) => fall.step,
                (None, saved) => saved.map_or(0, |saved| saved.step),
            },
            Stage::Trains(trainer) => trainer.step(),
        }
    }
}

impl Supervisor {
    fn new(job: JobId, events: mpsc::Sender<JobEvent>) -> Supervisor {
        Supervisor {
            job,
            step: 0,
            events,
            unheard: VecDeque::new(),
            patience: Arc::new(AtomicBool::new(true)),
        }
    }

    /// For whoever writes what the job is to keep.
    pub fn patience(&self) -> Arc<AtomicBool> {
        self.patience.clone()
    }

    /// What finds no room on the disk fails.
    pub fn give_up_waiting(&self) {
        self.patience.store(false, Ordering::Release);
    }

    /// Events from now on wait for it.
    pub fn await_ticket(&mut self, ticket: Ticket) {
        self.unheard.push_back(Notice::Due(ticket));
    }

    fn awaits_a_ticket(&self) -> bool {
        self.unheard.iter().any(|notice| matches!(notice, Notice::Due(_)))
    }

    pub fn tell(&mut self, event: JobEvent) {
        if let JobEvent::Step(report) = &event {
            self.step = report.step;
        }
        self.unheard.push_back(Notice::Event(event));
    }

    /// In the place of what is due and does not come yet.
    pub fn tell_before(&mut self, ticket: Ticket, event: JobEvent) {
        if let Some(place) = self.unheard.iter().position(|notice| notice.is_due(ticket)) {
            self.unheard.insert(place, Notice::Event(event));
            self.deliver();
        }
    }

    /// Whether something was.
    pub fn forget_what_is_due(&mut self) -> bool {
        let before = self.unheard.len();
        self.unheard.retain(|notice| matches!(notice, Notice::Event(_)));
        self.unheard.len() < before
    }

    /// `Done`: all that is not behind something due.
    pub fn deliver(&mut self) -> Delivery {
        while let Some(notice) = self.unheard.pop_front() {
            let refused = match notice {
                Notice::Event(event) => match self.events.try_send(event) {
                    Ok(()) => continue,
                    Err(refused) => refused,
                },
                Notice::Due(ticket) => {
                    self.unheard.push_front(Notice::Due(ticket));
                    break;
                }
            };
            match refused {
                TrySendError::Full(event) => {
                    self.unheard.push_front(Notice::Event(event));
                    return Delivery::Parked;
                }
                TrySendError::Closed(_) => break,
            }
        }
        match self.events.is_closed() {
            true => Delivery::Left,
            false => Delivery::Done,
        }
    }

    /// Delivers what it can. Does anything remain?
    pub fn is_to_hear_more(&mut self) -> bool {
        self.deliver() != Delivery::Left && !self.unheard.is_empty()
    }

    fn can_hear(&self) -> bool {
        match self.unheard.front() {
            Some(Notice::Event(_)) => self.events.capacity() > 0,
            Some(Notice::Due(_)) | None => true,
        }
    }

    /// What was due is there, or will never be. Whether it was due here.
    pub fn settle(&mut self, ticket: Ticket, event: Option<JobEvent>) -> bool {
        let Some(place) = self.unheard.iter().position(|notice| notice.is_due(ticket)) else {
            return false;
        };
        match event {
            Some(event) => self.unheard[place] = Notice::Event(event),
            None => drop(self.unheard.remove(place)),
        }
        true
    }
}
