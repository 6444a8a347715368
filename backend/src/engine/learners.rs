//! Learners that clients drive, as the engine's tenants: each does what it is asked in order, a quantum at a time, in turns
//! with the others and with the job. Not here: what a quantum computes (train), the order of a client's calls (router).

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::time::Instant;

use tandem_core::id::{AdapterDigest, Digest};
use tandem_core::learner::{Batch, Learn, LearnerId, NewLearner, Pass, Reply, Saved, Scores};
use tandem_core::message::Fault;
use tandem_core::rng;
use tandem_core::trace::{TARGET, TraceContext};
use tracing::{Span, trace_span, warn};

use super::Engine;
use super::files::Ticket;
use crate::guard::{self, TorchFault};
use crate::pace::Load;
use crate::train::TrainError;
use crate::train::driven::{Driven, Progress};

/// Learners of a replica at most.
const MAX_LEARNERS: usize = 128;
/// Stream of [`rng`] that keeps snapshots of one engine apart from another's.
const SNAPSHOTS: u64 = 2;

#[derive(Default)]
pub struct Learners {
    all: BTreeMap<LearnerId, Place>,
    /// Whose turn was last.
    last: Option<LearnerId>,
    /// Snapshots made.
    snapshots: u64,
    /// Being written, and who waits for it.
    saving: Vec<(Ticket, Reply<Saved>)>,
}

struct Place {
    stage: Stage,
    queue: VecDeque<Learn>,
    /// Of the numbers as they are now.
    snapshot: Option<AdapterDigest>,
}

enum Stage {
    /// Its numbers are drawn or read; meanwhile it may have others, which stay if that fails.
    Made(Ticket, Reply<()>, Option<Box<Driven>>),
    Here(Box<Driven>),
    /// In the midst of a call, how many tokens that is, and the call's span.
    Busy(Box<Driven>, Reply<Scores>, u64, Option<TraceContext>),
    /// It could not be made.
    Lost(String),
}

impl Place {
    fn can_go_on(&self) -> bool {
        match &self.stage {
            Stage::Made(..) => false,
            Stage::Busy(..) => true,
            Stage::Here(_) | Stage::Lost(_) => !self.queue.is_empty(),
        }
    }

    /// Of the next quantum, in that of its call; to be held as long as it takes.
    fn quantum_span(&self) -> Span {
        match &self.stage {
            Stage::Busy(_, _, _, Some(call)) => {
                trace_span!(target: TARGET, "training quantum", otel.parent = %call)
            }
            _ => Span::none(),
        }
    }
}

impl Learners {
    pub fn can_go_on(&self) -> bool {
        self.all.values().any(Place::can_go_on)
    }

    /// The next that has something to do, after the one whose turn was last.
    fn next(&mut self) -> Option<LearnerId> {
        let ready = || {
            self.all
                .iter()
                .filter(|(_, place)| place.can_go_on())
                .map(|(id, _)| *id)
        };
        let next = ready().find(|id| self.last.is_none_or(|last| *id > last));
        self.last = next.or_else(|| ready().next());
        self.last
    }

    /// Everybody hears why it ends.
    pub fn shut_down(&mut self, farewell: &Fault) {
        for (_, place) in std::mem::take(&mut self.all) {
            match place.stage {
                Stage::Made(_, reply, _) => drop(reply.send(Err(farewell.clone()))),
                Stage::Busy(_, reply, ..) => drop(reply.send(Err(farewell.clone()))),
                Stage::Here(_) | Stage::Lost(_) => {}
            }
            place
                .queue
                .into_iter()
                .for_each(|learn| learn.refuse(farewell.clone()));
        }
        for (_, reply) in self.saving.drain(..) {
            drop(reply.send(Err(farewell.clone())));
        }
    }
}

impl Engine {
    pub(super) fn learn(&mut self, id: LearnerId, learn: Learn) {
        match (learn, self.learners.all.get_mut(&id)) {
            (Learn::Drop, _) => drop(self.learners.all.remove(&id)),
            (Learn::Create(new, reply), None) => self.make_learner(id, &new, reply),
            (learn @ Learn::Create(..), Some(_)) => {
                learn.refuse(Fault::Refused(format!("learner {} is there already", id.0)));
            }
            (learn, Some(place)) => place.queue.push_back(learn),
            (learn, None) => {
                let why = "the engine was started since and does not have this model: load what was saved as a new one";
                learn.refuse(Fault::ReplicaLost(why.to_owned()));
            }
        }
    }

    fn make_learner(&mut self, id: LearnerId, new: &NewLearner, reply: Reply<()>) {
        let refusal = if self.ranks.are_many() {
            Some(
                "a model that a client trains is of one rank: start the server without --tensor-parallel-size"
                    .to_owned(),
            )
        } else if self.learners.all.len() >= MAX_LEARNERS {
            Some(format!(
                "{MAX_LEARNERS} models are trained by clients already: end one of them"
            ))
        } else {
            None
        };
        if let Some(why) = refusal {
            return drop(reply.send(Err(Fault::Refused(why))));
        }
        let ticket = self.files.make_learner(new.clone());
        let place = Place {
            stage: Stage::Made(ticket, reply, None),
            queue: VecDeque::new(),
            snapshot: None,
        };
        self.learners.all.insert(id, place);
    }

    /// The thread for files has made one.
    pub(super) fn learner_made(&mut self, ticket: Ticket, made: Result<Box<Driven>, TrainError>) {
        let awaits =
            |place: &&mut Place| matches!(place.stage, Stage::Made(awaited, ..) if awaited == ticket);
        // It may have been dropped meanwhile.
        let Some(place) = self.learners.all.values_mut().find(awaits) else {
            return;
        };
        let nothing = Stage::Lost(String::new());
        let Stage::Made(_, reply, before) = std::mem::replace(&mut place.stage, nothing) else {
            unreachable!("it awaits this ticket")
        };
        let answer;
        (place.stage, answer) = match (made, before) {
            (Ok(driven), _) => {
                place.snapshot = None;
                (Stage::Here(driven), Ok(()))
            }
            (Err(error), Some(before)) => (Stage::Here(before), Err(error.to_string())),
            (Err(error), None) => (Stage::Lost(error.to_string()), Err(error.to_string())),
        };
        // Whoever asked may be gone.
        let _ = reply.send(answer.map_err(Fault::Refused));
    }

    pub(super) fn learner_saved(&mut self, ticket: Ticket, saved: Result<Saved, TrainError>) {
        if let Some(at) = self
            .learners
            .saving
            .iter()
            .position(|(awaited, _)| *awaited == ticket)
        {
            let (_, reply) = self.learners.saving.remove(at);
            let saved = saved.map_err(|error| Fault::Step(format!("it was not saved: {error}")));
            let _ = reply.send(saved);
        }
    }

    /// One quantum of the learner whose turn it is. `Continue(false)`: none has anything to do.
    pub(super) fn learner_quantum(&mut self, load: Load) -> ControlFlow<(), bool> {
        let Some(id) = self.learners.next() else {
            return ControlFlow::Continue(false);
        };
        let span = self.learners.all.get(&id).map(Place::quantum_span);
        let began = Instant::now();
        let done = guard::torch(|| self.advance_learner(id));
        let took = began.elapsed();
        drop(span);
        self.pace.trained(took, load);
        self.counters.train_seconds += took.as_secs_f64();
        match done {
            Ok(()) => {}
            Err(fault) if self.is_fatal(&fault) => {
                self.lose(fault)?;
            }
            Err(fault) => self.learner_fell(id, &fault),
        }
        ControlFlow::Continue(true)
    }

    fn advance_learner(&mut self, id: LearnerId) {
        let place = self.learners.all.get_mut(&id).expect("it is its turn");
        if let Stage::Busy(driven, ..) = &mut place.stage {
            match driven.advance(&self.decoder) {
                Ok(Progress::On) => {}
                Ok(Progress::Done(scores)) => self.answer_call(id, Ok(scores)),
                Err(fault) => self.answer_call(id, Err(fault)),
            }
            return;
        }
        let learn = place.queue.pop_front().expect("only such can go on");
        let driven = match &mut place.stage {
            Stage::Here(driven) => driven,
            Stage::Lost(why) => return learn.refuse(Fault::Refused(why.clone())),
            Stage::Made(..) | Stage::Busy(..) => unreachable!("such have no turn here"),
        };
        match learn {
            Learn::Accumulate(batch, reply) => self.begin_call(id, *batch, reply),
            Learn::Step(adam, reply) => {
                place.snapshot = None;
                let stepped = driven.step(&self.decoder, &adam);
                self.counters.train_steps += u64::from(stepped.is_ok());
                let _ = reply.send(stepped);
            }
            Learn::Clear(reply) => {
                driven.clear();
                let _ = reply.send(Ok(()));
            }
            Learn::Snapshot(reply) => {
                let snapshot = match place.snapshot {
                    Some(digest) if self.bank.is_kept(digest) => Ok(digest),
                    _ => driven.packed().map(|adapter| {
                        self.learners.snapshots += 1;
                        // Of no content, because that would have to be read whole: nobody else has it.
                        let engine = rng::bits(self.nonce, SNAPSHOTS, self.learners.snapshots);
                        let name = format!("snapshot {} of {} in {engine:x}", self.learners.snapshots, id.0);
                        let digest = Digest::of(name.as_bytes());
                        self.bank.keep(digest, adapter);
                        place.snapshot = Some(digest);
                        digest
                    }),
                };
                let _ = reply.send(snapshot);
            }
            Learn::Save(save, reply) => {
                let ticket = self.files.save_learner(driven.copy(save));
                self.learners.saving.push((ticket, reply));
            }
            Learn::Load(source, reply) => {
                let new = NewLearner {
                    lora: driven.lora().clone(),
                    seed: 0,
                    from: Some(source),
                };
                let ticket = self.files.make_learner(new);
                let nothing = Stage::Lost(String::new());
                if let Stage::Here(before) = std::mem::replace(&mut place.stage, nothing) {
                    place.stage = Stage::Made(ticket, reply, Some(before));
                }
            }
            Learn::Create(..) | Learn::Drop => unreachable!("these are done when they come"),
        }
    }

    fn begin_call(&mut self, id: LearnerId, batch: Batch, reply: Reply<Scores>) {
        let spec = &self.decoder.spec;
        let most = self.scheduler.max_model_len() as u32;
        if let Err(fault) = batch.check(spec.vocab as u32, most) {
            return drop(reply.send(Err(fault)));
        }
        let learned = match batch.pass {
            Pass::Forward => 0,
            Pass::ForwardBackward => batch.data.iter().map(|datum| datum.tokens.len() as u64).sum(),
        };
        let place = self.learners.all.get_mut(&id).expect("it is its turn");
        let nothing = Stage::Lost(String::new());
        match std::mem::replace(&mut place.stage, nothing) {
            Stage::Here(mut driven) => {
                let trace = batch.trace;
                driven.begin(batch);
                place.stage = Stage::Busy(driven, reply, learned, trace);
            }
            other => place.stage = other,
        }
    }

    fn answer_call(&mut self, id: LearnerId, answer: Result<Scores, Fault>) {
        let place = self.learners.all.get_mut(&id).expect("it is its turn");
        let nothing = Stage::Lost(String::new());
        match std::mem::replace(&mut place.stage, nothing) {
            Stage::Busy(mut driven, reply, learned, _) => {
                driven.give_up();
                if answer.is_ok() {
                    self.counters.trained_tokens += learned;
                }
                let _ = reply.send(answer);
                place.stage = Stage::Here(driven);
            }
            other => place.stage = other,
        }
    }

    /// A quantum panicked: the call fails, gradients are not to be used any more, the numbers are as they were.
    fn learner_fell(&mut self, id: LearnerId, fault: &TorchFault) {
        warn!(learner = id.0, %fault, "a client's training quantum failed");
        self.answer_call(id, Err(Fault::Step(fault.message.clone())));
    }
}
