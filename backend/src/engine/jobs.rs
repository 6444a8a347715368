//! Fine-tuning jobs as the engine's tenants: whether one is begun beside others, what becomes of what it did, what a failure
//! costs. Not here: whose turn it is (training), one job (job).

use std::time::Duration;

use tandem_core::id::JobId;
use tandem_core::job::{JobEvent, JobSpec};
use tokio::sync::mpsc;
use tracing::{Span, info, warn};

use super::Engine;
use super::clients::Delivery;
use super::files::{Begun, Done, Ticket};
use super::job::{Fall, Job, Stage, Supervisor};
use crate::guard::{self, TorchFault};
use crate::ranks::Order;
use crate::start::memory::Free;
use crate::train::joint::{Member, Who};
use crate::train::memory::Memory;
use crate::train::snapshot::{Occasion, Published, Written};
use crate::train::turns::Turn;
use crate::train::{Quantum, TrainError, Trainer};

pub struct Jobs {
    all: Vec<Job>,
    /// That train at once.
    most: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    GoesOn,
    Over,
}

impl Jobs {
    pub fn new(most: usize) -> Jobs {
        Jobs { all: vec![], most }
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

    fn job(&self, id: &JobId) -> Option<&Job> {
        self.all.iter().find(|job| job.spec.id == *id)
    }

    fn job_mut(&mut self, id: &JobId) -> Option<&mut Job> {
        self.all.iter_mut().find(|job| job.spec.id == *id)
    }

    pub fn trainer(&mut self, id: &JobId) -> Option<&mut Trainer> {
        self.job_mut(id)?.trainer()
    }

    /// Those that have begun.
    pub fn members(&mut self) -> impl Iterator<Item = (Who, &mut dyn Member)> {
        self.all.iter_mut().filter_map(|job| {
            let who = Who::Job(job.spec.id.clone());
            Some((who, job.trainer()? as &mut dyn Member))
        })
    }

    pub fn turns(&self) -> impl Iterator<Item = (Who, Turn)> {
        let turn = |job: &Job| (Who::Job(job.spec.id.clone()), job.turn());
        self.all.iter().map(turn)
    }

    /// Those that cannot go on now have been given as much as everybody.
    pub fn do_not_catch_up(&mut self, given: Duration) {
        for job in self.all.iter_mut().filter(|job| !job.can_go_on()) {
            job.given = job.given.max(given);
        }
    }

    pub fn holds_activations(&self, id: &JobId) -> bool {
        self.job(id).is_some_and(Job::holds_activations)
    }

    pub fn given(&mut self, id: &JobId) -> Option<&mut Duration> {
        self.job_mut(id).map(|job| &mut job.given)
    }

    pub fn tenant(&self, id: &JobId) -> Option<&str> {
        self.job(id).map(|job| job.spec.tenant.as_str())
    }

    /// How many of a tenant's go on.
    pub fn going_on(&self, tenant: &str) -> usize {
        let of_tenant = |job: &&Job| job.can_go_on() && job.spec.tenant == tenant;
        self.all.iter().filter(of_tenant).count()
    }

    pub fn quantum_span(&mut self, id: &JobId) -> Span {
        self.job_mut(id).map_or(Span::none(), Job::quantum_span)
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
        let job = Job::new(spec, ticket, events, memory, self.turns.given());
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

    pub(super) fn let_unsupervised_jobs_go(&mut self) {
        let left = |job: &mut Job| job.supervisor.deliver() == Delivery::Left;
        while let Some(i) = self.jobs.all.iter_mut().position(left) {
            warn!(job = %self.jobs.all[i].spec.id, "nobody supervises the job any more");
            self.keep_job(i);
        }
    }

    /// What came of a quantum of a job alone.
    pub(super) fn job_trained(&mut self, who: &Who, quantum: Result<Quantum, TrainError>) {
        let Who::Job(id) = who else { return };
        let Some(i) = self.jobs.find(id) else { return };
        match quantum {
            Ok(quantum) => match self.trained(i, quantum) {
                Fate::GoesOn => {}
                Fate::Over => self.end_job(i, None),
            },
            Err(error) => {
                let job = &self.jobs.all[i];
                warn!(job = %job.spec.id, step = job.step(), %error, "training failed");
                let message = error.to_string();
                self.end_job(i, Some(JobEvent::Failed { message }));
            }
        }
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
    pub(super) fn job_fell(&mut self, id: &JobId, fault: TorchFault) {
        let Some(i) = self.jobs.find(id) else { return };
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
            mut supervisor,
            spec,
            stage,
            ..
        } = self.jobs.all.remove(i);
        if let Stage::Trains(trainer) = stage {
            self.turns.leave(&Who::Job(spec.id.clone()), trainer);
        }
        self.ranks.order(|| Order::EndJob(spec.id));
        last.into_iter().for_each(|event| supervisor.tell(event));
        if supervisor.is_to_hear_more() {
            self.farewells.push(supervisor);
        }
    }
}
