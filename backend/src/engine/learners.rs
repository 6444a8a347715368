//! Learners that clients drive, as the engine's tenants: each does what it is asked in order, a quantum at a time. Not here:
//! whose turn it is (training), what a quantum computes (train), the order of a client's calls (router).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tandem_core::id::Digest;
use tandem_core::learner::{Batch, Learn, LearnerId, MAX_LEARNERS, NewLearner, Pass, Reply, Saved, Scores};
use tandem_core::message::Fault;
use tandem_core::rng;
use tracing::{Span, warn};

use super::Engine;
use super::files::{Made, Ticket};
use super::learner::{Place, Stage, Task};
use crate::guard::TorchFault;
use crate::ranks::{LearnerOrder, Order};
use crate::train::TrainError;
use crate::train::driven::Progress;
use crate::train::joint::{Member, Who};
use crate::train::turns::Turn;

/// Stream of [`rng`] that keeps snapshots of one engine apart from another's.
const SNAPSHOTS: u64 = 2;

#[derive(Default)]
pub struct Learners {
    all: BTreeMap<LearnerId, Place>,
    /// Snapshots made.
    snapshots: u64,
    /// Being written, and who waits for it.
    saving: Vec<(Ticket, Reply<Saved>)>,
}

impl Learners {
    pub fn can_go_on(&self) -> bool {
        self.all.values().any(Place::can_go_on)
    }

    /// Those in the midst of a call.
    pub fn members(&mut self) -> impl Iterator<Item = (Who, &mut dyn Member)> {
        let places = self.all.iter_mut();
        places.filter_map(|(id, place)| Some((Who::Learner(*id), place.member()?)))
    }

    pub fn turns(&self) -> impl Iterator<Item = (Who, Turn)> {
        let turn = |(id, place): (&LearnerId, &Place)| (Who::Learner(*id), place.turn());
        self.all.iter().map(turn)
    }

    /// Those that have nothing to do now have been given as much as everybody.
    pub fn do_not_catch_up(&mut self, given: Duration) {
        for place in self.all.values_mut().filter(|place| !place.can_go_on()) {
            place.given = place.given.max(given);
        }
    }

    pub fn holds_activations(&self, id: LearnerId) -> bool {
        let turn = self.all.get(&id).map(Place::turn);
        turn.is_some_and(|turn| turn.holds_activations)
    }

    pub fn given(&mut self, id: LearnerId) -> Option<&mut Duration> {
        self.all.get_mut(&id).map(|place| &mut place.given)
    }

    pub fn tenant(&self, id: LearnerId) -> Option<&str> {
        self.all.get(&id).map(|place| place.tenant.as_str())
    }

    /// How many of a tenant's have something to do.
    pub fn going_on(&self, tenant: &str) -> usize {
        let of_tenant = |place: &&Place| place.can_go_on() && place.tenant == tenant;
        self.all.values().filter(of_tenant).count()
    }

    pub fn quantum_span(&self, id: LearnerId) -> Span {
        self.all.get(&id).map_or(Span::none(), Place::quantum_span)
    }

    /// Everybody hears why it ends.
    pub fn shut_down(&mut self, farewell: &Fault) {
        for (_, place) in std::mem::take(&mut self.all) {
            match place.stage {
                Stage::Made(_, reply, _) => drop(reply.send(Err(farewell.clone()))),
                Stage::Busy(_, task) => task.refuse(farewell.clone()),
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
            (Learn::Drop, _) => self.drop_learner(id),
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

    fn drop_learner(&mut self, id: LearnerId) {
        if let Some(Place {
            stage: Stage::Busy(driven, _),
            ..
        }) = self.learners.all.remove(&id)
        {
            self.turns.leave(&Who::Learner(id), driven);
        }
        self.ranks.order(|| Order::Learner(id, LearnerOrder::Drop));
    }

    fn make_learner(&mut self, id: LearnerId, new: &NewLearner, reply: Reply<()>) {
        if self.learners.all.len() >= MAX_LEARNERS {
            let why = format!("{MAX_LEARNERS} models are trained by clients already: end one of them");
            return drop(reply.send(Err(Fault::Refused(why))));
        }
        let ticket = self.files.make_learner(new.clone());
        let place = Place {
            stage: Stage::Made(ticket, reply, None),
            queue: VecDeque::new(),
            snapshot: None,
            tenant: new.tenant.clone(),
            given: self.turns.given(),
            has_fallen: false,
        };
        self.learners.all.insert(id, place);
    }

    /// The thread for files has made one.
    pub(super) fn learner_made(&mut self, ticket: Ticket, made: Result<Box<Made>, TrainError>) {
        let awaits = |place: &Place| matches!(place.stage, Stage::Made(awaited, ..) if awaited == ticket);
        // It may have been dropped meanwhile.
        let mut places = self.learners.all.iter_mut();
        let Some((&id, place)) = places.find(|(_, place)| awaits(place)) else {
            return;
        };
        let nothing = Stage::Lost(String::new());
        let Stage::Made(_, reply, before) = std::mem::replace(&mut place.stage, nothing) else {
            unreachable!("it awaits this ticket")
        };
        let answer;
        (place.stage, answer) = match (made, before) {
            (Ok(made), _) => {
                place.snapshot = None;
                let Made { driven, new, inputs } = *made;
                self.ranks.order(|| Order::MakeLearner(id, Box::new(new), inputs));
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

    /// One quantum of a learner alone.
    pub(super) fn advance_learner(&mut self, id: LearnerId) {
        let place = self.learners.all.get_mut(&id).expect("it is its turn");
        if let Stage::Busy(driven, _) = &mut place.stage {
            if driven.computes() {
                self.ranks.order(|| Order::Quantum(vec![Who::Learner(id)]));
                self.ranks.send();
            }
            match driven.advance(&self.decoder) {
                Ok(Progress::On) => {}
                Ok(Progress::Scored(scores)) => self.answer_call(id, Ok(scores)),
                Ok(Progress::Copied(copy)) => {
                    let ticket = self.files.save_learner(*copy);
                    if let Some(Task::Save(reply)) = self.end_task(id) {
                        self.learners.saving.push((ticket, reply));
                    }
                }
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
                self.ranks.order(|| Order::Learner(id, LearnerOrder::Step(adam)));
                self.ranks.send();
                let stepped = driven.step(&self.decoder, &adam);
                self.counters.train_steps += u64::from(stepped.is_ok());
                let _ = reply.send(stepped);
            }
            Learn::Clear(reply) => {
                self.ranks.order(|| Order::Learner(id, LearnerOrder::Clear));
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
                        self.ranks
                            .order(|| Order::Learner(id, LearnerOrder::Snapshot(digest)));
                        self.bank.keep(digest, adapter);
                        place.snapshot = Some(digest);
                        digest
                    }),
                };
                let _ = reply.send(snapshot);
            }
            Learn::Save(save, reply) => {
                driven.begin_save(save);
                self.begin_task(id, Task::Save(reply));
            }
            Learn::Load(source, reply) => {
                let new = NewLearner {
                    lora: driven.lora().clone(),
                    seed: 0,
                    tenant: place.tenant.clone(),
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
        if let Stage::Here(driven) = &mut place.stage {
            let trace = batch.trace;
            self.ranks
                .order(|| Order::Learner(id, LearnerOrder::Begin(Box::new(batch.clone()))));
            driven.begin(batch);
            self.begin_task(id, Task::Call(reply, learned, trace));
        }
    }

    fn begin_task(&mut self, id: LearnerId, task: Task) {
        let place = self.learners.all.get_mut(&id).expect("it is its turn");
        let nothing = Stage::Lost(String::new());
        place.stage = match std::mem::replace(&mut place.stage, nothing) {
            Stage::Here(driven) => Stage::Busy(driven, task),
            other => other,
        };
    }

    fn end_task(&mut self, id: LearnerId) -> Option<Task> {
        let place = self.learners.all.get_mut(&id)?;
        let nothing = Stage::Lost(String::new());
        match std::mem::replace(&mut place.stage, nothing) {
            Stage::Busy(mut driven, task) => {
                driven.give_up();
                place.stage = Stage::Here(driven);
                Some(task)
            }
            other => {
                place.stage = other;
                None
            }
        }
    }

    fn answer_call(&mut self, id: LearnerId, answer: Result<Scores, Fault>) {
        match (self.end_task(id), answer) {
            (Some(Task::Call(reply, learned, _)), answer) => {
                if answer.is_ok() {
                    self.counters.trained_tokens += learned;
                    self.learners.all.get_mut(&id).expect("it is there").has_fallen = false;
                }
                let _ = reply.send(answer);
            }
            (Some(task), Err(fault)) => task.refuse(fault),
            (Some(Task::Save(_)), Ok(_)) | (None, _) => {}
        }
    }

    /// A quantum panicked: the call fails, gradients are not to be used any more, the numbers are as they were.
    pub(super) fn learner_fell(&mut self, id: LearnerId, fault: &TorchFault) {
        warn!(learner = id.0, %fault, "a client's training quantum failed");
        if let Some(place) = self.learners.all.get_mut(&id) {
            place.has_fallen = true;
        }
        self.answer_call(id, Err(Fault::Step(fault.message.clone())));
    }
}
