//! The thread that reads and writes the files of jobs, so that no stream waits for a disk. It does one thing at a time,
//! in the order it was asked: what a job wrote is there when the job is begun again. What finds the disk full is written
//! again until there is room. Not here: what is written (train).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tandem_core::id::JobId;
use tandem_core::job::JobSpec;
use tandem_core::learner::{NewLearner, Saved};
use tandem_kernels::pool;
use tokio::sync::mpsc;

use crate::guard;
use crate::lora::fit::Fit;
use crate::train::driven::{self, Copy, Driven};
use crate::train::snapshot::{Occasion, Snapshot, Written};
use crate::train::{Inputs, TrainError, Trainer};

/// Names an order and what comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

pub struct Files {
    orders: mpsc::UnboundedSender<(Ticket, Order)>,
    done: mpsc::UnboundedReceiver<Done>,
    tickets: u64,
    /// Snapshots ordered and not yet durable.
    writing: usize,
}

enum Order {
    Begin(Box<JobSpec>),
    /// Whether it is to wait for room where the disk is full, until somebody says otherwise.
    Write(Box<Snapshot>, Arc<AtomicBool>),
    MakeLearner(Box<NewLearner>),
    SaveLearner(Box<Copy>),
}

pub enum Done {
    /// The job can train; or why not.
    Begun(Ticket, Result<Begun, TrainError>),
    Written(Ticket, JobId, Occasion, Result<Written, TrainError>),
    LearnerMade(Ticket, Result<Box<Made>, TrainError>),
    LearnerSaved(Ticket, Result<Saved, TrainError>),
    /// It waits for room on the disk; said once.
    NoRoom(Ticket, String),
}

/// How often what found the disk full is tried again, and how soon it gives up when nobody waits for it any more.
const ROOM_RETRY: Duration = Duration::from_secs(2);
const GIVE_UP: Duration = Duration::from_millis(50);

pub struct Begun {
    pub trainer: Box<Trainer>,
    /// What other ranks begin from.
    pub inputs: Inputs,
}

pub struct Made {
    pub driven: Box<Driven>,
    /// What other ranks make it from.
    pub new: NewLearner,
    pub inputs: driven::Inputs,
}

impl Files {
    pub fn new(fit: Fit) -> Files {
        let (orders, ordered) = mpsc::unbounded_channel();
        let (report, done) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new().name("tandem-files".to_owned());
        let desk = Desk { report };
        thread
            .spawn(move || obey_all(ordered, &desk, &fit))
            .expect("the system starts a thread");
        Files {
            orders,
            done,
            tickets: 0,
            writing: 0,
        }
    }

    pub fn begin(&mut self, spec: JobSpec) -> Ticket {
        self.order(Order::Begin(Box::new(spec)))
    }

    /// Without `patience`, what finds no room fails.
    pub fn write(&mut self, snapshot: Snapshot, patience: Arc<AtomicBool>) -> Ticket {
        self.writing += 1;
        self.order(Order::Write(Box::new(snapshot), patience))
    }

    /// Draws or reads the numbers of one.
    pub fn make_learner(&mut self, new: NewLearner) -> Ticket {
        self.order(Order::MakeLearner(Box::new(new)))
    }

    pub fn save_learner(&mut self, copy: Copy) -> Ticket {
        self.order(Order::SaveLearner(Box::new(copy)))
    }

    pub fn poll_done(&mut self, context: &mut Context) -> Poll<Done> {
        match self.done.poll_recv(context) {
            Poll::Ready(Some(done)) => Poll::Ready(self.count(done)),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    /// Waits for what is being written, at the engine's end. `None`: all is.
    pub fn wait(&mut self) -> Option<Done> {
        match self.writing > 0 {
            true => self.done.blocking_recv().map(|done| self.count(done)),
            false => None,
        }
    }

    fn count(&mut self, done: Done) -> Done {
        if let Done::Written(..) = done {
            self.writing -= 1;
        }
        done
    }

    fn order(&mut self, order: Order) -> Ticket {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.orders
            .send((ticket, order))
            .expect("the thread lives as long as its orders can come");
        ticket
    }
}

/// The thread's way back.
struct Desk {
    report: mpsc::UnboundedSender<Done>,
}

impl Desk {
    fn write(
        &self,
        ticket: Ticket,
        snapshot: &Snapshot,
        patience: &AtomicBool,
    ) -> Result<Written, TrainError> {
        let mut told = false;
        loop {
            let written = guard::torch(|| snapshot.write());
            let written = written.unwrap_or_else(|fault| Err(TrainError::Fault(fault)));
            match &written {
                // Who stops goes on from the state before.
                Err(error) if error.is_no_room() && snapshot.occasion() != Occasion::Stop => {
                    if !std::mem::replace(&mut told, true) {
                        // An engine that is gone hears nothing.
                        let _ = self.report.send(Done::NoRoom(ticket, error.to_string()));
                    }
                }
                _ => return written,
            }
            let tried = Instant::now();
            while tried.elapsed() < ROOM_RETRY {
                if !patience.load(Ordering::Acquire) {
                    return written;
                }
                std::thread::sleep(GIVE_UP);
            }
        }
    }
}

fn obey_all(mut orders: mpsc::UnboundedReceiver<(Ticket, Order)>, desk: &Desk, fit: &Fit) {
    pool::stand_aside();
    while let Some((ticket, order)) = orders.blocking_recv() {
        let done = match order {
            Order::Begin(spec) => {
                let begun = guard::torch(|| begin(*spec, fit));
                Done::Begun(
                    ticket,
                    begun.unwrap_or_else(|fault| Err(TrainError::Fault(fault))),
                )
            }
            Order::Write(snapshot, patience) => {
                let written = desk.write(ticket, &snapshot, &patience);
                Done::Written(ticket, snapshot.job().clone(), snapshot.occasion(), written)
            }
            Order::MakeLearner(new) => {
                let made = guard::torch(|| make(*new, fit).map(Box::new));
                Done::LearnerMade(ticket, made.unwrap_or_else(|fault| Err(TrainError::Fault(fault))))
            }
            Order::SaveLearner(copy) => {
                let saved = guard::torch(|| copy.write());
                Done::LearnerSaved(
                    ticket,
                    saved.unwrap_or_else(|fault| Err(TrainError::Fault(fault))),
                )
            }
        };
        if desk.report.send(done).is_err() {
            return;
        }
    }
}

fn begin(spec: JobSpec, fit: &Fit) -> Result<Begun, TrainError> {
    let inputs = Inputs::read(&spec.folder)?;
    let trainer = Box::new(Trainer::start_with(spec, &inputs, fit.clone())?);
    Ok(Begun { trainer, inputs })
}

fn make(new: NewLearner, fit: &Fit) -> Result<Made, TrainError> {
    let inputs = driven::Inputs::read(&new)?;
    let driven = Box::new(Driven::make(&new, &inputs, fit.clone())?);
    Ok(Made { driven, new, inputs })
}
