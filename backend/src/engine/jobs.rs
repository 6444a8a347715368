//! Fine-tuning jobs as the engine's tenants: whether one is begun beside others, whose quantum is next, what a failure
//! costs. Jobs take turns by the time they were given, tenants alike however many jobs they have. Slices of several that fit into one go through the layers together.
//! What is on its way is finished before another job has its turn, so that the activations of one slice are held at a
//! time, however many jobs there are. Not here: training.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tandem_core::id::JobId;
use tandem_core::job::{JobEvent, JobSpec};
use tokio::sync::mpsc;
use tracing::{Span, info, warn};

use super::Engine;
use super::clients::Delivery;
use super::files::{Begun, Done, Ticket};
use super::job::{Fall, Job, Stage, Supervisor};
use crate::guard::{self, TorchFault};
use crate::model::Decoder;
use crate::pace::{Budget, Load};
use crate::ranks::Order;
use crate::start::memory::Free;
use crate::train::data::slice_tokens;
use crate::train::joint::{self, Joint};
use crate::train::memory::Memory;
use crate::train::snapshot::{Occasion, Published, Written};
use crate::train::turns::{self, PassClock, Turn};
use crate::train::{Quantum, TrainError, Trainer};

pub struct Jobs {
    all: Vec<Job>,
    /// That train at once.
    most: usize,
    /// Slices of several of them on their way.
    joint: Option<Joint>,
    passes: PassClock,
    /// The time given to the job whose turn it was last: who could not go on meanwhile does not catch up.
    given: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    GoesOn,
    Over,
}

impl Jobs {
    pub fn new(most: usize) -> Jobs {
        Jobs {
            all: vec![],
            most,
            joint: None,
            passes: PassClock::default(),
            given: Duration::ZERO,
        }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn can_go_on(&self) -> bool {
        self.all.iter().any(Job::can_go_on)
    }

    /// What is half done is not to be kept.
    pub fn forget(&mut self) {
        self.all.clear();
        self.joint = None;
    }

    fn find(&self, id: &JobId) -> Option<usize> {
        self.all.iter().position(|job| job.spec.id == *id)
    }

    fn supervisors(&mut self) -> impl Iterator<Item = &mut Supervisor> {
        self.all.iter_mut().map(|job| &mut job.supervisor)
    }

    /// Why a job with `hyper` is not begun now.
    fn refusal(&self, spec: &JobSpec, need: Memory, free: Free) -> Option<String> {
        if self.find(&spec.id).is_some() {
            return Some(format!("{} is training here already", spec.id));
        }
        if self.all.len() >= self.most {
            let n = self.all.len();
            return Some(format!(
                "{n} jobs train already, which is the most (--max-training-jobs)"
            ));
        }
        // Those that begin have not taken theirs yet.
        let begin = self
            .all
            .iter()
            .filter(|job| matches!(job.stage, Stage::Begins(_)));
        let promised = begin.map(|job| job.memory.numbers).sum();
        let activations = self.all.iter().map(|job| job.memory.activations);
        match activations.max() {
            // Alone it is tried, whatever it takes.
            None => None,
            Some(activations) => need.beside(self.all.len(), promised, activations, free),
        }
    }

    /// Whose quantum is next: of several together, where there are several.
    fn next(&mut self, most_rows: usize) -> Vec<usize> {
        if let Some(joint) = &self.joint {
            let member = |id| self.find(id).expect("a pass is given up when a job of it ends");
            return joint.jobs().iter().map(member).collect();
        }
        for job in self.all.iter_mut().filter(|job| !job.can_go_on()) {
            job.given = job.given.max(self.given);
        }
        let turns: Vec<Turn> = self.all.iter().map(Job::turn).collect();
        turns::next(&turns, most_rows, self.passes.last())
    }

    /// What each of `members` has of their next quantum; together 1.
    fn shares(&self, members: &[usize]) -> Vec<f64> {
        let rows = members.iter().map(|&i| match &self.all[i].stage {
            Stage::Trains(trainer) => trainer.slice_rows() as f64,
            Stage::Begins(_) => 0.0,
        });
        let rows: Vec<f64> = rows.collect();
        match (members.len(), rows.iter().sum::<f64>()) {
            (1, _) => vec![1.0],
            (_, all) => rows.iter().map(|rows| rows / all).collect(),
        }
    }

    fn quantum(&mut self, members: &[usize], base: &Decoder) -> Result<Quantum, TrainError> {
        let mut all: Vec<Option<&mut Trainer>> = self.all.iter_mut().map(Job::trainer).collect();
        let trainer = |&i: &usize| all[i].take().expect("what is ready has begun");
        let mut trainers: Vec<&mut Trainer> = members.iter().map(trainer).collect();
        match &mut trainers[..] {
            [alone] => alone.quantum(Some(base)),
            several => {
                joint::quantum(&mut self.joint, several, base);
                Ok(Quantum::default())
            }
        }
    }

    fn ran(&mut self, members: &[usize], shares: &[f64], took: Duration) {
        let goes_on = |&i: &usize| self.all[i].holds_activations();
        let is_amid = self.joint.is_some() || members.iter().any(goes_on);
        self.passes.took(took, is_amid);
        for (&i, &share) in members.iter().zip(shares) {
            // Jobs of one tenant share its time: what one of them is given counts for each.
            let tenant = &self.all[i].spec.tenant;
            let of_tenant = |job: &&Job| job.can_go_on() && job.spec.tenant == *tenant;
            let n = self.all.iter().filter(of_tenant).count().max(1);
            let job = &mut self.all[i];
            self.given = self.given.max(job.given);
            job.given += took.mul_f64(share * n as f64);
        }
    }
}

impl Engine {
    pub(super) fn start_job(&mut self, spec: JobSpec, events: mpsc::Sender<JobEvent>) {
        let memory = Memory::of(&self.decoder, &spec.hyper);
        let free = Free::on(self.decoder.device());
        if let Some(message) = self.jobs.refusal(&spec, memory, free) {
            // The first word of an empty channel, unless nobody listens.
            return drop(events.try_send(JobEvent::Refused { message }));
        }
        let ticket = self.files.begin(spec.clone());
        let job = Job::new(spec, ticket, events, memory, self.jobs.given);
        self.jobs.all.push(job);
    }

    /// What the thread for files has done.
    pub(super) fn filed(&mut self, done: Done) {
        match done {
            Done::Begun(ticket, begun) => self.begun(ticket, begun),
            Done::Written(ticket, job, occasion, written) => self.written(ticket, &job, occasion, written),
            Done::LearnerMade(ticket, made) => self.learner_made(ticket, made),
            Done::LearnerSaved(ticket, saved) => self.learner_saved(ticket, saved),
            Done::NoRoom(ticket, message) => {
                warn!(message, "a job's numbers wait for room on the disk");
                for supervisor in self.jobs.supervisors().chain(&mut self.farewells) {
                    supervisor.tell_before(
                        ticket,
                        JobEvent::NoRoom {
                            message: message.clone(),
                        },
                    );
                }
            }
        }
    }

    fn begun(&mut self, ticket: Ticket, begun: Result<Begun, TrainError>) {
        let is_it = |job: &Job| matches!(job.stage, Stage::Begins(awaited) if awaited == ticket);
        // It may have been cancelled meanwhile.
        let Some(i) = self.jobs.all.iter().position(is_it) else {
            return;
        };
        let job = &mut self.jobs.all[i];
        match begun {
            Ok(Begun { trainer, inputs }) => {
                info!(job = %job.spec.id, step = trainer.step(), "training begins");
                job.stage = Stage::Trains(trainer);
                let spec = &job.spec;
                // The other ranks begin it with the same inputs, which they do not see.
                self.ranks
                    .order(|| Order::StartJob(Box::new(spec.clone()), inputs));
            }
            Err(TrainError::Damaged(message)) => self.end_job(i, Some(JobEvent::Damaged { message })),
            // It begins some other time.
            Err(error) if error.is_no_room() => {
                warn!(job = %job.spec.id, %error, "training cannot begin now");
                self.end_job(i, None);
            }
            Err(error) => {
                let message = match &job.fall {
                    None => error.to_string(),
                    Some(Fall { step, fault }) => {
                        format!("step {step}: {fault}; going back to the last state: {error}")
                    }
                };
                self.end_job(i, Some(JobEvent::Failed { message }));
            }
        }
    }

    /// The numbers are durable: from now on the adapter answers, and the supervisor hears of it.
    fn written(
        &mut self,
        ticket: Ticket,
        id: &JobId,
        occasion: Occasion,
        written: Result<Written, TrainError>,
    ) {
        let (event, error) = match written {
            Ok(Written { event, published }) => {
                if let Some(Published { version, adapter }) = published {
                    self.bank.publish(version.digest, adapter, id);
                }
                (event, None)
            }
            // Nobody waited for room: the job goes on from its last state some other time.
            Err(error) if occasion == Occasion::End && !error.is_no_room() => {
                let message = error.to_string();
                (Some(JobEvent::Failed { message }), Some(error))
            }
            Err(error) => (None, Some(error)),
        };
        if let Some(error) = &error {
            warn!(job = %id, ?occasion, %error, "a job's numbers are not written");
        }
        let settles = |job: &mut Job| job.supervisor.settle(ticket, event.clone());
        if let Some(i) = self.jobs.all.iter_mut().position(settles) {
            if let Some(error) = error {
                let message = error.to_string();
                self.end_job(i, (!error.is_no_room()).then_some(JobEvent::Failed { message }));
            } else {
                self.jobs.all[i].supervisor.deliver();
            }
            return;
        }
        for supervisor in &mut self.farewells {
            if supervisor.settle(ticket, event.clone()) {
                break;
            }
        }
        self.farewells.retain_mut(Supervisor::is_to_hear_more);
    }

    pub(super) fn cancel_job(&mut self, id: &JobId) {
        if let Some(i) = self.jobs.find(id) {
            let job = &mut self.jobs.all[i];
            let step = job.step();
            job.supervisor.forget_what_is_due();
            job.supervisor.give_up_waiting();
            self.end_job(i, Some(JobEvent::Cancelled { step }));
        }
        // One that is through may still wait for room for its result.
        for supervisor in self
            .farewells
            .iter_mut()
            .filter(|supervisor| supervisor.job == *id)
        {
            if supervisor.forget_what_is_due() {
                supervisor.give_up_waiting();
                let step = supervisor.step;
                supervisor.tell(JobEvent::Cancelled { step });
            }
        }
        self.farewells.retain_mut(Supervisor::is_to_hear_more);
    }

    /// The job goes on some other time, perhaps elsewhere.
    pub(super) fn pause_job(&mut self, id: &JobId) {
        if let Some(i) = self.jobs.find(id) {
            self.keep_job(i);
        }
    }

    pub(super) fn keep_jobs(&mut self) {
        while !self.jobs.is_empty() {
            self.keep_job(self.jobs.len() - 1);
        }
        // What waits for room would make the stop wait.
        self.farewells.iter().for_each(Supervisor::give_up_waiting);
    }

    /// As many quanta as the pace allows, of jobs and of learners in turns. Alone, one a turn: a turn costs microseconds
    /// and hears what was said.
    pub(super) fn train_within(&mut self) -> ControlFlow<()> {
        loop {
            let load = self.load();
            if self.pace.budget(load) == Budget::Nothing {
                return ControlFlow::Continue(());
            }
            self.is_turn_of_learners ^= true;
            let first = self.quantum(load)?;
            // Who has nothing to do gives its turn to the other.
            if !first {
                self.is_turn_of_learners ^= true;
                if !self.quantum(load)? {
                    return ControlFlow::Continue(());
                }
            }
            if load == Load::Idle || !self.inbox.is_empty() {
                return ControlFlow::Continue(());
            }
        }
    }

    /// `Continue(false)`: whose turn it is has nothing to do.
    fn quantum(&mut self, load: Load) -> ControlFlow<(), bool> {
        match self.is_turn_of_learners {
            true => self.learner_quantum(load),
            false => self.job_quantum(load),
        }
    }

    fn job_quantum(&mut self, load: Load) -> ControlFlow<(), bool> {
        let left = |job: &mut Job| job.supervisor.deliver() == Delivery::Left;
        while let Some(i) = self.jobs.all.iter_mut().position(left) {
            warn!(job = %self.jobs.all[i].spec.id, "nobody supervises the job any more");
            self.keep_job(i);
        }
        let members = self.jobs.next(slice_tokens(self.decoder.device()));
        let Some(&i) = members.first() else {
            return ControlFlow::Continue(false);
        };
        let id = |&i: &usize| self.jobs.all[i].spec.id.clone();
        let ids: Vec<JobId> = members.iter().map(id).collect();
        let shares = self.jobs.shares(&members);
        if members.len() > 1 && self.jobs.joint.is_none() {
            self.counters.shared_passes += 1;
            self.counters.shared_slices += members.len() as u64;
        }
        // In the trace of each.
        let spans = members.iter().map(|&i| self.jobs.all[i].quantum_span());
        let spans: Vec<Span> = spans.collect();
        let began = Instant::now();
        let result = guard::torch(|| {
            self.ranks.order_adapters(self.bank.changes());
            self.ranks.order(|| Order::Quantum(ids.clone()));
            self.ranks.send();
            self.jobs.quantum(&members, &self.decoder)
        });
        let took = began.elapsed();
        drop(spans);
        self.pace.trained(took, load);
        self.counters.train_seconds += took.as_secs_f64();
        self.jobs.ran(&members, &shares, took);
        match result {
            Ok(Ok(quantum)) => match self.trained(i, quantum) {
                Fate::GoesOn => {}
                Fate::Over => self.end_job(i, None),
            },
            // Of one alone: nothing of a pass is judged.
            Ok(Err(error)) => {
                let job = &self.jobs.all[i];
                warn!(job = %job.spec.id, step = job.step(), %error, "training failed");
                let message = error.to_string();
                self.end_job(i, Some(JobEvent::Failed { message }));
            }
            Err(fault) if self.is_fatal(&fault) => {
                self.lose(fault)?;
            }
            Err(fault) => {
                self.jobs.joint = None;
                for id in ids {
                    let i = self.jobs.find(&id).expect("it was to run");
                    self.job_fell(i, fault.clone());
                }
            }
        }
        ControlFlow::Continue(true)
    }

    fn trained(&mut self, i: usize, quantum: Quantum) -> Fate {
        let Quantum {
            events,
            snapshot,
            finished,
        } = quantum;
        let job = &mut self.jobs.all[i];
        for event in events {
            match &event {
                JobEvent::Started {
                    resumed_from: None, ..
                } => job.trained_tokens = Some(0),
                JobEvent::Step(report) => {
                    let before = job
                        .trained_tokens
                        .replace(report.trained_tokens)
                        .unwrap_or(report.trained_tokens);
                    self.counters.train_steps += 1;
                    self.counters.trained_tokens += report.trained_tokens.saturating_sub(before);
                }
                _ => {}
            }
            job.supervisor.tell(event);
        }
        if let Some(snapshot) = snapshot {
            let ticket = self.files.write(snapshot, job.supervisor.patience());
            job.supervisor.await_ticket(ticket);
        }
        job.supervisor.deliver();
        if finished { Fate::Over } else { Fate::GoesOn }
    }

    /// A quantum panicked: what it left is unknown, so the job goes on from its last state.
    fn job_fell(&mut self, i: usize, fault: TorchFault) {
        let job = &mut self.jobs.all[i];
        let step = job.step();
        warn!(job = %job.spec.id, step, %fault, "a training quantum failed");
        match job.fall.as_ref().is_none_or(|before| before.step < step) {
            true => {
                job.stage = Stage::Begins(self.files.begin(job.spec.clone()));
                job.trained_tokens = None;
                job.fall = Some(Fall { step, fault });
            }
            false => {
                let message = format!("step {step}: {fault}");
                self.end_job(i, Some(JobEvent::Failed { message }));
            }
        }
    }

    /// Has the job's state written, so that a later start goes on from here, and lets it go.
    fn keep_job(&mut self, i: usize) {
        let job = &mut self.jobs.all[i];
        // What waits for room would make the stop wait.
        job.supervisor.give_up_waiting();
        if let Stage::Trains(trainer) = &job.stage {
            match guard::torch(|| trainer.snapshot()) {
                Ok(snapshot) => {
                    info!(job = %job.spec.id, step = trainer.step(), "training stops; its state is being written");
                    let ticket = self.files.write(snapshot, job.supervisor.patience());
                    job.supervisor.await_ticket(ticket);
                }
                Err(fault) => warn!(job = %job.spec.id, %fault, "the job's state is not written"),
            }
        }
        self.end_job(i, None);
    }

    /// The job is over; its last events reach its supervisor even when the channel is full now, or they are not due.
    fn end_job(&mut self, i: usize, last: Option<JobEvent>) {
        let Job {
            mut supervisor, spec, ..
        } = self.jobs.all.remove(i);
        let others = self.jobs.all.iter_mut().filter_map(Job::trainer);
        joint::part(&mut self.jobs.joint, &spec.id, others);
        self.ranks.order(|| Order::EndJob(spec.id));
        last.into_iter().for_each(|event| supervisor.tell(event));
        if supervisor.is_to_hear_more() {
            self.farewells.push(supervisor);
        }
    }
}
