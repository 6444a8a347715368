//! Several runs on one base without an engine: the trials of a sweep of `tandem train`. They share passes as jobs of a server do, and
//! each comes to the bytes that it has alone.

use std::path::Path;
use std::time::{Duration, Instant};

use tandem_core::job::{JobEvent, JobSpec};

use super::joint::{self, Joint, Member, Who};
use super::turns::{self, PassClock, Turn};
use super::{Quantum, TrainError, Trainer};
use crate::model::{Decoder, WeightOptions};
use crate::start;
use crate::train::slice::slice_tokens;

pub struct Together {
    base: Decoder,
    runs: Vec<Run>,
    joint: Option<Joint>,
    passes: PassClock,
    /// The time given to the run whose turn it was last: who waits meanwhile does not catch up.
    given: Duration,
}

struct Run {
    /// `None`: it has ended.
    trainer: Option<Trainer>,
    given: Duration,
}

fn who(trainer: &Trainer) -> Who {
    Who::Job(trainer.spec().id.clone())
}

/// What the run of this number has to say. An error is its end.
pub type Said = (usize, Result<Vec<JobEvent>, TrainError>);

impl Together {
    pub fn open(model_folder: &Path, weights: WeightOptions) -> Result<Together, TrainError> {
        start::set_threads(weights.device, None);
        Ok(Together {
            base: Decoder::open(model_folder, weights)?,
            runs: vec![],
            joint: None,
            passes: PassClock::default(),
            given: Duration::ZERO,
        })
    }

    pub fn frozen_parameters(&self) -> u64 {
        self.base.parameters()
    }

    /// What the model's own notes say.
    pub fn notes(&self) -> &[String] {
        &self.base.spec.notes
    }

    /// One more, which goes on from what its folder holds; its number is how many there were before. Returns the steps that it
    /// has. `is_done`: it has ended already.
    pub fn add(&mut self, spec: JobSpec, is_done: bool) -> Result<u64, TrainError> {
        let trainer = Trainer::start(spec, &self.base)?;
        let steps = trainer.total_steps();
        self.runs.push(Run {
            trainer: (!is_done).then_some(trainer),
            given: Duration::ZERO,
        });
        Ok(steps)
    }

    /// One quantum of those that go on. What is on its way is finished, whoever goes on. Nothing is said where there is nothing to do.
    pub fn advance(&mut self, goes_on: &[bool]) -> Vec<Said> {
        for (run, _) in self
            .runs
            .iter_mut()
            .zip(goes_on)
            .filter(|(_, goes_on)| !**goes_on)
        {
            run.given = run.given.max(self.given);
        }
        let members = self.next(goes_on);
        let began = Instant::now();
        let mut said = vec![];
        match members[..] {
            [] => return said,
            [i] if self.joint.is_none() => {
                let trainer = self.runs[i].trainer.as_mut().expect("what has ended has no turn");
                let quantum = trainer.quantum(Some(&self.base)).and_then(Quantum::write);
                if quantum.as_ref().map_or(true, |quantum| quantum.finished) {
                    self.runs[i].trainer = None;
                }
                said.push((i, quantum.map(|quantum| quantum.events)));
            }
            _ => {
                let mut trainers: Vec<(Who, &mut dyn Member)> = vec![];
                for (i, run) in self.runs.iter_mut().enumerate() {
                    if let (true, Some(trainer)) = (members.contains(&i), &mut run.trainer) {
                        trainers.push((who(trainer), trainer));
                    }
                }
                joint::quantum(&mut self.joint, &mut trainers, &self.base);
            }
        }
        self.ran(&members, began.elapsed());
        said
    }

    /// In ascending order, as long as a pass of them takes.
    fn next(&self, goes_on: &[bool]) -> Vec<usize> {
        let is_member = |joint: &Joint, run: &Run| {
            let trainer = run.trainer.as_ref();
            trainer.is_some_and(|trainer| joint.members().any(|member| *member == who(trainer)))
        };
        if let Some(joint) = &self.joint {
            return (0..self.runs.len())
                .filter(|&i| is_member(joint, &self.runs[i]))
                .collect();
        }
        let turn = |(run, goes_on): (&Run, &bool)| match &run.trainer {
            None => Turn::default(),
            Some(trainer) => {
                let turn = Turn::of(trainer, run.given);
                Turn {
                    is_ready: *goes_on || turn.holds_activations,
                    ..turn
                }
            }
        };
        let turns: Vec<Turn> = self.runs.iter().zip(goes_on).map(turn).collect();
        let mut members = turns::next(&turns, slice_tokens(self.base.device()), self.passes.last());
        members.sort_unstable();
        members
    }

    fn ran(&mut self, members: &[usize], took: Duration) {
        let is_amid = |&i: &usize| {
            let trainer = self.runs[i].trainer.as_ref();
            trainer.is_some_and(Trainer::holds_activations)
        };
        let is_amid = self.joint.is_some() || members.iter().any(is_amid);
        self.passes.took(took, is_amid);
        for &i in members {
            let run = &mut self.runs[i];
            self.given = self.given.max(run.given);
            run.given += took / members.len() as u32;
        }
    }

    /// Writes the states from which they go on.
    pub fn keep(&self) -> Result<(), TrainError> {
        for trainer in self.runs.iter().filter_map(|run| run.trainer.as_ref()) {
            trainer.snapshot().write()?;
        }
        Ok(())
    }
}
