//! One learner in the engine: what it is at, and what waits for it. Not here: several beside each other (learners), training.

use std::collections::VecDeque;
use std::time::Duration;

use tandem_core::id::AdapterDigest;
use tandem_core::learner::{Learn, Reply, Saved, Scores};
use tandem_core::message::Fault;
use tandem_core::trace::{TARGET, TraceContext};
use tracing::{Span, trace_span};

use super::files::Ticket;
use crate::train::driven::Driven;
use crate::train::joint::Member;
use crate::train::turns::Turn;

pub struct Place {
    pub stage: Stage,
    pub queue: VecDeque<Learn>,
    /// Of the numbers as they are now.
    pub snapshot: Option<AdapterDigest>,
    pub tenant: String,
    /// The time of its quanta, and what it did not get while it had nothing to do.
    pub given: Duration,
    /// Its last call ended by a fault: what made it fall must not make others fall, so its slices go alone.
    pub has_fallen: bool,
}

pub enum Stage {
    /// Its numbers are drawn or read; meanwhile it may have others, which stay if that fails.
    Made(Ticket, Reply<()>, Option<Box<Driven>>),
    Here(Box<Driven>),
    Busy(Box<Driven>, Task),
    /// It could not be made.
    Lost(String),
}

/// What a learner is in the midst of, and who waits for it.
pub enum Task {
    /// How many tokens it learns from, and the call's span.
    Call(Reply<Scores>, u64, Option<TraceContext>),
    /// Its numbers are being copied.
    Save(Reply<Saved>),
}

impl Task {
    pub fn refuse(self, fault: Fault) {
        // Whoever asked may be gone.
        match self {
            Task::Call(reply, ..) => drop(reply.send(Err(fault))),
            Task::Save(reply) => drop(reply.send(Err(fault))),
        }
    }
}

impl Place {
    pub fn can_go_on(&self) -> bool {
        match &self.stage {
            Stage::Made(..) => false,
            Stage::Busy(..) => true,
            Stage::Here(_) | Stage::Lost(_) => !self.queue.is_empty(),
        }
    }

    pub fn turn(&self) -> Turn {
        let turn = match &self.stage {
            Stage::Busy(driven, _) => Turn::of_driven(driven, self.given),
            Stage::Made(..) | Stage::Here(_) | Stage::Lost(_) => Turn {
                is_brief: true,
                given: self.given,
                ..Turn::default()
            },
        };
        Turn {
            is_ready: self.can_go_on(),
            rows_to_join: turn.rows_to_join.filter(|_| !self.has_fallen),
            ..turn
        }
    }

    pub fn member(&mut self) -> Option<&mut dyn Member> {
        match &mut self.stage {
            Stage::Busy(driven, _) => Some(driven.as_mut()),
            Stage::Made(..) | Stage::Here(_) | Stage::Lost(_) => None,
        }
    }

    /// Of the next quantum, in that of its call; to be held as long as it takes.
    pub fn quantum_span(&self) -> Span {
        match &self.stage {
            Stage::Busy(_, Task::Call(_, _, Some(call))) => {
                trace_span!(target: TARGET, "training quantum", otel.parent = %call)
            }
            _ => Span::none(),
        }
    }
}
