//! The fine-tuning job as the engine's tenant: when it runs, what it tells, what a failure costs. Not here: training.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::Instant;

use tandem_core::id::JobId;
use tandem_core::job::{JobEvent, JobSpec};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tracing::{info, warn};

use super::Engine;
use super::clients::Delivery;
use super::files::{Begun, Done, Files, Ticket};
use crate::guard::{self, TorchFault};
use crate::pace::{Budget, Load};
use crate::ranks::Order;
use crate::train::snapshot::{Occasion, Published, Written};
use crate::train::{Quantum, TrainError, Trainer};

pub struct Job {
    spec: JobSpec,
    stage: Stage,
    supervisor: Supervisor,
    /// Over all lives of the job, as last reported; unknown between going on from a state and the first step.
    trained_tokens: Option<u64>,
    /// When it last fell back to its state. Twice without a step in between is the end.
    fall: Option<Fall>,
}

enum Stage {
    /// Its folder is being read.
    Begins(Ticket),
    Trains(Box<Trainer>),
}

struct Fall {
    /// Optimizer steps done.
    step: u64,
    fault: TorchFault,
}

/// Who hears a job's events, in the order of its steps.
pub struct Supervisor {
    job: JobId,
    /// The last that was reported.
    step: u64,
    events: mpsc::Sender<JobEvent>,
    unheard: VecDeque<Notice>,
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    GoesOn,
    Over,
}

impl Job {
    /// A job pauses while its supervisor does not read, and before it saves again while it is still being saved.
    pub fn can_go_on(&self, files: &Files) -> bool {
        let goes_on = match &self.stage {
            Stage::Begins(_) => false,
            Stage::Trains(trainer) => {
                let waits = trainer.is_about_to_save() && files.is_writing();
                !waits && self.supervisor.can_hear()
            }
        };
        goes_on || self.supervisor.events.is_closed()
    }

    fn step(&self) -> u64 {
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
        }
    }

    fn tell(&mut self, event: JobEvent) {
        if let JobEvent::Step(report) = &event {
            self.step = report.step;
        }
        self.unheard.push_back(Notice::Event(event));
    }

    /// In the place of what is due and does not come yet.
    fn tell_before(&mut self, ticket: Ticket, event: JobEvent) {
        if let Some(place) = self.unheard.iter().position(|notice| notice.is_due(ticket)) {
            self.unheard.insert(place, Notice::Event(event));
            self.deliver();
        }
    }

    /// Whether something was.
    fn forget_what_is_due(&mut self) -> bool {
        let before = self.unheard.len();
        self.unheard.retain(|notice| matches!(notice, Notice::Event(_)));
        self.unheard.len() < before
    }

    /// `Done`: all that is not behind something due.
    fn deliver(&mut self) -> Delivery {
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
    fn settle(&mut self, ticket: Ticket, event: Option<JobEvent>) -> bool {
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

impl Engine {
    pub(super) fn start_job(&mut self, spec: JobSpec, events: mpsc::Sender<JobEvent>) {
        if let Some(job) = &self.job {
            let message = format!("{} is training; one job trains at a time", job.spec.id);
            // The first word of an empty channel, unless nobody listens.
            return drop(events.try_send(JobEvent::Refused { message }));
        }
        self.job = Some(Job {
            stage: Stage::Begins(self.files.begin(spec.clone())),
            supervisor: Supervisor::new(spec.id.clone(), events),
            spec,
            trained_tokens: None,
            fall: None,
        });
    }

    /// What the thread for files has done.
    pub(super) fn filed(&mut self, done: Done) {
        match done {
            Done::Begun(ticket, begun) => self.begun(ticket, begun),
            Done::Written(ticket, occasion, written) => self.written(ticket, occasion, written),
            Done::LearnerMade(ticket, made) => self.learner_made(ticket, made),
            Done::LearnerSaved(ticket, saved) => self.learner_saved(ticket, saved),
            Done::NoRoom(ticket, message) => {
                warn!(message, "a job's numbers wait for room on the disk");
                let supervisors = self.job.iter_mut().map(|job| &mut job.supervisor);
                for supervisor in supervisors.chain(&mut self.farewells) {
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
        let is_it = |job: &&mut Job| matches!(job.stage, Stage::Begins(awaited) if awaited == ticket);
        // It may have been cancelled meanwhile.
        let Some(job) = self.job.as_mut().filter(is_it) else {
            return;
        };
        match begun {
            Ok(Begun { trainer, inputs }) => {
                info!(job = %job.spec.id, step = trainer.step(), "training begins");
                job.stage = Stage::Trains(trainer);
                let spec = &job.spec;
                // The other ranks begin it with the same inputs, which they do not see.
                self.ranks
                    .order(|| Order::StartJob(Box::new(spec.clone()), inputs));
            }
            Err(TrainError::Damaged(message)) => self.end_job(Some(JobEvent::Damaged { message })),
            Err(error) => {
                let message = match &job.fall {
                    None => error.to_string(),
                    Some(Fall { step, fault }) => {
                        format!("step {step}: {fault}; going back to the last state: {error}")
                    }
                };
                self.end_job(Some(JobEvent::Failed { message }));
            }
        }
    }

    /// The numbers are durable: from now on the adapter answers, and the supervisor hears of it.
    fn written(&mut self, ticket: Ticket, occasion: Occasion, written: Result<Written, TrainError>) {
        let (event, error) = match written {
            Ok(Written { event, published }) => {
                if let Some(Published { version, adapter }) = published {
                    self.bank.publish(version.digest, adapter);
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
            warn!(?occasion, %error, "a job's numbers are not written");
        }
        if let Some(job) = &mut self.job
            && job.supervisor.settle(ticket, event.clone())
        {
            if let Some(error) = error {
                let message = error.to_string();
                self.end_job((!error.is_no_room()).then_some(JobEvent::Failed { message }));
            } else {
                job.supervisor.deliver();
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
        if let Some(job) = self.job.as_mut().filter(|job| job.spec.id == *id) {
            let step = job.step();
            job.supervisor.forget_what_is_due();
            self.files.give_up_waiting();
            self.end_job(Some(JobEvent::Cancelled { step }));
        }
        // One that is through may still wait for room for its result.
        for supervisor in self
            .farewells
            .iter_mut()
            .filter(|supervisor| supervisor.job == *id)
        {
            if supervisor.forget_what_is_due() {
                self.files.give_up_waiting();
                let step = supervisor.step;
                supervisor.tell(JobEvent::Cancelled { step });
            }
        }
        self.farewells.retain_mut(Supervisor::is_to_hear_more);
    }

    /// The job goes on some other time, perhaps elsewhere.
    pub(super) fn pause_job(&mut self, id: &JobId) {
        if self.job.as_ref().is_some_and(|job| job.spec.id == *id) {
            self.keep_job();
        }
    }

    /// As many quanta as the pace allows, of the job and of learners in turns. Alone, one a turn: a turn costs microseconds
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
        let Some(job) = &mut self.job else {
            return ControlFlow::Continue(false);
        };
        if job.supervisor.deliver() == Delivery::Left {
            warn!(job = %job.spec.id, "nobody supervises the job any more");
            self.keep_job();
            return ControlFlow::Continue(false);
        }
        let goes_on = job.can_go_on(&self.files);
        let (Stage::Trains(trainer), true) = (&mut job.stage, goes_on) else {
            return ControlFlow::Continue(false);
        };
        let began = Instant::now();
        let result = guard::torch(|| {
            self.ranks.order_adapters(self.bank.changes());
            self.ranks.order(|| Order::Quantum);
            self.ranks.send();
            trainer.quantum(Some(&self.decoder))
        });
        let took = began.elapsed();
        self.pace.trained(took, load);
        self.counters.train_seconds += took.as_secs_f64();
        match result {
            Ok(Ok(quantum)) => match self.trained(quantum) {
                Fate::GoesOn => {}
                Fate::Over => self.end_job(None),
            },
            Ok(Err(error)) => {
                warn!(job = %job.spec.id, step = job.step(), %error, "training failed");
                let message = error.to_string();
                self.end_job(Some(JobEvent::Failed { message }));
            }
            Err(fault) if self.is_fatal(&fault) => {
                self.lose(fault)?;
            }
            Err(fault) => self.job_fell(fault),
        }
        ControlFlow::Continue(true)
    }

    fn trained(&mut self, quantum: Quantum) -> Fate {
        let Quantum {
            events,
            snapshot,
            finished,
        } = quantum;
        let Some(job) = &mut self.job else {
            return Fate::Over;
        };
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
            let due = Notice::Due(self.files.write(snapshot));
            job.supervisor.unheard.push_back(due);
        }
        job.supervisor.deliver();
        if finished { Fate::Over } else { Fate::GoesOn }
    }

    /// A quantum panicked: what it left is unknown, so the job goes on from its last state.
    fn job_fell(&mut self, fault: TorchFault) {
        let Some(job) = &mut self.job else { return };
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
                self.end_job(Some(JobEvent::Failed { message }));
            }
        }
    }

    /// Has the job's state written, so that a later start goes on from here, and lets it go.
    pub(super) fn keep_job(&mut self) {
        // What waits for room would make the stop wait.
        self.files.give_up_waiting();
        let Some(job) = &mut self.job else { return };
        if let Stage::Trains(trainer) = &job.stage {
            match guard::torch(|| trainer.snapshot()) {
                Ok(snapshot) => {
                    info!(job = %job.spec.id, step = trainer.step(), "training stops; its state is being written");
                    let due = Notice::Due(self.files.write(snapshot));
                    job.supervisor.unheard.push_back(due);
                }
                Err(fault) => warn!(job = %job.spec.id, %fault, "the job's state is not written"),
            }
        }
        self.end_job(None);
    }

    /// The job is over; its last events reach its supervisor even when the channel is full now, or they are not due.
    fn end_job(&mut self, last: Option<JobEvent>) {
        let Some(Job { mut supervisor, .. }) = self.job.take() else {
            return;
        };
        self.ranks.order(|| Order::EndJob);
        last.into_iter().for_each(|event| supervisor.tell(event));
        if supervisor.is_to_hear_more() {
            self.farewells.push(supervisor);
        }
    }
}
