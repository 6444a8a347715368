//! A rank that is not rank 0: it holds its part of everything and does what it is told, in the order it is told. Not
//! here: how it was started (team).

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use tandem_core::id::{AdapterDigest, JobId};
use tandem_core::learner::LearnerId;
use tandem_kernels::attention::KvCache;
use tch::Tensor;
use tracing::{error, warn};

use super::{LearnerOrder, Order, StepOrder, decode};
use crate::batch::StepInputs;
use crate::guard::{self, TorchFault};
use crate::lora::adapter::Adapter;
use crate::lora::params::AdapterParams;
use crate::model::Decoder;
use crate::train::Trainer;
use crate::train::driven::Driven;
use crate::train::joint::{self, Joint, Member, Who};

pub struct Follower {
    decoder: Decoder,
    cache: KvCache,
    adapters: HashMap<AdapterDigest, Arc<Adapter>>,
    jobs: HashMap<JobId, Trainer>,
    learners: HashMap<LearnerId, Driven>,
    joint: Option<Joint>,
    /// Packed by a job, not yet named: rank 0 names it once it is written, and before the job saves again. (One that is
    /// not written, or finds no slot, is never named.)
    made: HashMap<JobId, Arc<Adapter>>,
}

impl Follower {
    pub fn new(decoder: Decoder, cache: KvCache) -> Follower {
        Follower {
            decoder,
            cache,
            adapters: HashMap::new(),
            jobs: HashMap::new(),
            learners: HashMap::new(),
            joint: None,
            made: HashMap::new(),
        }
    }

    /// Until the replica ends in order, or a rank is lost (this one, when something fails here).
    pub fn follow(mut self) -> Result<(), TorchFault> {
        let _no_grad = tch::no_grad_guard();
        let comm = self.decoder.comm().clone();
        loop {
            let orders: Vec<Order> = guard::torch(|| decode(&comm.broadcast(vec![])))?;
            for order in orders {
                if guard::torch(|| self.obey(order))?.is_break() {
                    // So that rank 0 leaves no sooner than it was heard. If it has left, that is the end as well.
                    let _ = guard::torch(|| comm.meet());
                    return Ok(());
                }
            }
        }
    }

    fn obey(&mut self, order: Order) -> ControlFlow<()> {
        match order {
            Order::Step(step) => self.step(&step),
            Order::Admit {
                digest,
                shape,
                numbers,
            } => {
                let flat = Tensor::from_slice(&numbers);
                let adapter = self.packed(&AdapterParams { flat, shape });
                self.adapters.insert(digest, Arc::new(adapter));
            }
            Order::Publish(digest, job) => {
                let made = self.made.remove(&job).expect("the job packed what is published");
                self.adapters.insert(digest, made);
            }
            Order::Evict(digest) => drop(self.adapters.remove(&digest)),
            Order::StartJob(spec, inputs) => {
                let started = Trainer::start_with(*spec, &inputs, self.decoder.fit());
                // Rank 0 began with the same inputs.
                let trainer = started.unwrap_or_else(|error| panic!("the job does not start here: {error}"));
                let id = trainer.spec().id.clone();
                self.part(&id);
                self.jobs.insert(id, trainer);
            }
            Order::Quantum(who) => match &who[..] {
                [Who::Job(job)] if self.joint.is_none() => self.quantum(job.clone()),
                [Who::Learner(id)] if self.joint.is_none() => {
                    // What is wrong with a call rank 0 finds as well, and says it.
                    let _ = self
                        .learners
                        .get_mut(id)
                        .map(|driven| driven.advance(&self.decoder));
                }
                together => self.joint_quantum(together),
            },
            Order::EndJob(job) => self.part(&job),
            Order::MakeLearner(id, new, inputs) => {
                let made = Driven::make(&new, &inputs, self.decoder.fit());
                // Rank 0 made it from the same.
                let made = made.unwrap_or_else(|error| panic!("a learner is not made here: {error}"));
                self.learners.insert(id, made);
            }
            Order::Learner(id, order) => self.learner(id, order),
            Order::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    fn step(&self, order: &StepOrder) {
        let find = |digest| match self.adapters.get(&digest) {
            Some(adapter) => adapter.as_ref(),
            None => panic!("adapter {} is planned but not here", digest.short()),
        };
        let inputs = StepInputs::new(order.step(), &self.decoder, &self.cache, find);
        let hidden = self.decoder.forward(&inputs.batch(&self.cache));
        for rows in &order.heads {
            // Rank 0 reads the logits.
            drop(inputs.logits(&self.decoder, &hidden, rows));
        }
    }

    fn quantum(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else {
            panic!("a quantum of {id}, which is not here")
        };
        let packed = job
            .quantum(Some(&self.decoder))
            .and_then(|quantum| match quantum.snapshot {
                Some(snapshot) => snapshot.packed(),
                None => Ok(None),
            });
        match packed {
            Ok(Some(adapter)) => drop(self.made.insert(id, adapter)),
            Ok(None) => {}
            // Numbers are the same on every rank, so rank 0 fails the job for the same reason; it says so next.
            Err(error) => warn!(job = %id, %error, "training failed"),
        }
    }

    fn learner(&mut self, id: LearnerId, order: LearnerOrder) {
        // It may have been let go before it was made.
        let Some(driven) = self.learners.get_mut(&id) else {
            return;
        };
        match order {
            LearnerOrder::Begin(batch) => driven.begin(*batch),
            LearnerOrder::Step(adam) => {
                if let Err(fault) = driven.step(&self.decoder, &adam) {
                    warn!(learner = id.0, %fault, "a step was not made");
                }
            }
            LearnerOrder::Clear => driven.clear(),
            LearnerOrder::Snapshot(digest) => {
                let packed = driven.packed();
                let packed = packed.unwrap_or_else(|fault| panic!("a snapshot does not fit here: {fault}"));
                self.adapters.insert(digest, packed);
            }
            LearnerOrder::Drop => {
                if let Some(driven) = self.learners.remove(&id) {
                    joint::leave(&mut self.joint, &Who::Learner(id), Box::new(driven));
                }
            }
        }
    }

    fn joint_quantum(&mut self, together: &[Who]) {
        let jobs = self.jobs.iter_mut();
        let jobs = jobs.map(|(id, job)| (Who::Job(id.clone()), job as &mut dyn Member));
        let learners = self.learners.iter_mut();
        let learners = learners.map(|(id, driven)| (Who::Learner(*id), driven as &mut dyn Member));
        let mut all: HashMap<Who, &mut dyn Member> = jobs.chain(learners).collect();
        let member = |who: &Who| match all.remove(who) {
            Some(member) => (who.clone(), member),
            None => panic!("a quantum of {who:?}, which is not here"),
        };
        let mut members: Vec<(Who, &mut dyn Member)> = together.iter().map(member).collect();
        joint::quantum(&mut self.joint, &mut members, &self.decoder);
    }

    /// The job ends, or begins anew.
    fn part(&mut self, id: &JobId) {
        if let Some(job) = self.jobs.remove(id) {
            joint::leave(&mut self.joint, &Who::Job(id.clone()), Box::new(job));
        }
    }

    fn packed(&self, params: &AdapterParams) -> Adapter {
        self.decoder.fit().pack(params).unwrap_or_else(|error| {
            error!(%error, "an adapter does not fit here");
            panic!("an adapter does not fit here: {error}")
        })
    }
}
