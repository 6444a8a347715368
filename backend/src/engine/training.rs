//! Whose quantum is next, of jobs and of what clients train: they take turns by the time they were given, tenants alike,
//! however many of either they have. Slices of several that fit into one go through the layers together. What is on its way is
//! finished before another has its turn, so that the activations of one pass are held at a time, however many train. Not here:
//! what a job or a learner does with a turn of its own (jobs, learners), training.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tandem_kernels::machine;
use tracing::Span;

use super::Engine;
use crate::guard;
use crate::pace::{Budget, Load};
use crate::ranks::Order;
use crate::train::joint::{self, Joint, Member, Who};
use crate::train::slice::slice_tokens;
use crate::train::turns::{self, PassClock, Turn};
use crate::train::{Quantum, TrainError};

#[derive(Default)]
pub struct Turns {
    /// Slices of several on their way.
    joint: Option<Joint>,
    passes: PassClock,
    /// The time given to the one whose turn it was last: who could not go on meanwhile does not catch up.
    given: Duration,
}

impl Turns {
    pub fn given(&self) -> Duration {
        self.given
    }

    /// Ends; a slice of it that is on its way with others' stays with these.
    pub fn leave(&mut self, who: &Who, member: Box<dyn Member>) {
        joint::leave(&mut self.joint, who, member);
        machine::give_back_memory();
    }

    /// What is half done is given up.
    pub fn forget(&mut self) {
        self.joint = None;
    }
}

impl Engine {
    /// As many quanta as the pace allows. Alone, one a turn: a turn costs microseconds and hears what was said.
    pub(super) fn train_within(&mut self) -> ControlFlow<()> {
        loop {
            let load = self.load();
            let may = self.pace.budget(load) != Budget::Nothing;
            if !may || !self.training_quantum(load)? || load == Load::Idle || !self.inbox.is_empty() {
                return ControlFlow::Continue(());
            }
        }
    }

    /// `Continue(false)`: nobody has anything to do.
    fn training_quantum(&mut self, load: Load) -> ControlFlow<(), bool> {
        self.let_unsupervised_jobs_go();
        let members = self.next_to_train();
        if members.is_empty() {
            return ControlFlow::Continue(false);
        }
        let shares = self.shares(&members);
        if members.len() > 1 && self.turns.joint.is_none() {
            self.counters.shared_passes += 1;
            self.counters.shared_slices += members.len() as u64;
        }
        // In the trace of each.
        let spans: Vec<Span> = members.iter().map(|who| self.quantum_span(who)).collect();
        let began = Instant::now();
        let done = guard::torch(|| self.advance(&members));
        let took = began.elapsed();
        drop(spans);
        self.pace.trained(took, load);
        self.counters.train_seconds += took.as_secs_f64();
        self.ran(&members, &shares, took);
        match done {
            Ok(None) => {}
            Ok(Some(quantum)) => self.job_trained(&members[0], quantum),
            Err(fault) if self.is_fatal(&fault) => self.lose(fault)?,
            Err(fault) => {
                self.turns.forget();
                for who in members {
                    match who {
                        Who::Job(id) => self.job_fell(&id, fault.clone()),
                        Who::Learner(id) => self.learner_fell(id, &fault),
                    }
                }
            }
        }
        ControlFlow::Continue(true)
    }

    /// What a job did alone. Of a pass that several share nothing is to be told.
    fn advance(&mut self, members: &[Who]) -> Option<Result<Quantum, TrainError>> {
        let is_shared = members.len() > 1 || self.turns.joint.is_some();
        if let (false, Who::Learner(id)) = (is_shared, &members[0]) {
            self.advance_learner(*id);
            return None;
        }
        self.ranks.order_adapters(self.bank.changes());
        self.ranks.order(|| Order::Quantum(members.to_vec()));
        self.ranks.send();
        if let (false, Who::Job(id)) = (is_shared, &members[0]) {
            let trainer = self.jobs.trainer(id).expect("what is ready has begun");
            return Some(trainer.quantum(Some(&self.decoder)));
        }
        let mut all: HashMap<Who, &mut dyn Member> =
            self.jobs.members().chain(self.learners.members()).collect();
        let member = |who: &Who| (who.clone(), all.remove(who).expect("who trains is there"));
        let mut together: Vec<(Who, &mut dyn Member)> = members.iter().map(member).collect();
        joint::quantum(&mut self.turns.joint, &mut together, &self.decoder);
        None
    }

    /// Several, where they go together.
    fn next_to_train(&mut self) -> Vec<Who> {
        if let Some(joint) = &self.turns.joint {
            return joint.members().cloned().collect();
        }
        let given = self.turns.given;
        self.jobs.do_not_catch_up(given);
        self.learners.do_not_catch_up(given);
        let all = self.jobs.turns().chain(self.learners.turns());
        let (all, turns): (Vec<Who>, Vec<Turn>) = all.unzip();
        let most_rows = slice_tokens(self.decoder.device());
        let members = turns::next(&turns, most_rows, self.turns.passes.last());
        members.into_iter().map(|i| all[i].clone()).collect()
    }

    /// What each of `members` has of their next quantum; together 1.
    fn shares(&mut self, members: &[Who]) -> Vec<f64> {
        if members.len() == 1 {
            return vec![1.0];
        }
        let all = self.jobs.members().chain(self.learners.members());
        let rows: HashMap<Who, usize> = all.map(|(who, member)| (who, member.slice_rows())).collect();
        let rows = members.iter().map(|who| rows[who] as f64);
        let all: f64 = rows.clone().sum();
        rows.map(|rows| rows / all).collect()
    }

    fn ran(&mut self, members: &[Who], shares: &[f64], took: Duration) {
        let goes_on = |who: &Who| match who {
            Who::Job(id) => self.jobs.holds_activations(id),
            Who::Learner(id) => self.learners.holds_activations(*id),
        };
        let is_amid = self.turns.joint.is_some() || members.iter().any(goes_on);
        self.turns.passes.took(took, is_amid);
        for (who, share) in members.iter().zip(shares) {
            let Some(tenant) = self.tenant(who).map(str::to_owned) else {
                continue;
            };
            // Those of one tenant share its time: what one of them is given counts for each.
            let n = self.jobs.going_on(&tenant) + self.learners.going_on(&tenant);
            let given = match who {
                Who::Job(id) => self.jobs.given(id),
                Who::Learner(id) => self.learners.given(*id),
            };
            if let Some(given) = given {
                self.turns.given = self.turns.given.max(*given);
                *given += took.mul_f64(share * n.max(1) as f64);
            }
        }
    }

    fn tenant(&self, who: &Who) -> Option<&str> {
        match who {
            Who::Job(id) => self.jobs.tenant(id),
            Who::Learner(id) => self.learners.tenant(*id),
        }
    }

    fn quantum_span(&mut self, who: &Who) -> Span {
        match who {
            Who::Job(id) => self.jobs.quantum_span(id),
            Who::Learner(id) => self.learners.quantum_span(*id),
        }
    }
}
