//! An optimizer step: its examples, what they teach slice by slice, the update.

use std::time::Instant;

use tandem_core::dataset::Group;
use tandem_core::job::{Hyper, Method, StepReport};
use tandem_kernels::adamw::AdamW;

use super::accumulation::{Accumulation, Slices, Work};
use super::{Stage, Trainer};
use crate::model::{Decoder, Dropout};
use crate::train::learner::{Unusable, Update};
use crate::train::micro_batch::{Course, MicroBatch, Models, Place};
use crate::train::noise::Noise;
use crate::train::objective::Scores;
use crate::train::pass::{self, KEEP_BYTES};
use crate::train::slice::{self, Slice};
use crate::train::{TrainError, objective};

impl Trainer {
    /// Takes the examples of the next optimizer step.
    pub(super) fn begin(&mut self) -> Stage {
        self.step_began = Instant::now();
        self.learner.forget_gradient();
        let micro_batches = self.plan.step(self.step);
        let accumulation = match objective::is_known(&self.spec.hyper.objective) {
            true => self.slices_of(&micro_batches),
            false => self.micro_batches_of(&micro_batches),
        };
        Stage::Accumulate(Box::new(accumulation))
    }

    /// `micro_batches`: the numbers of their groups. Weights are known.
    fn slices_of(&self, micro_batches: &[Vec<usize>]) -> Accumulation {
        let device = self.learner.device();
        let (mut slices, mut micro_batch_of) = (vec![], vec![]);
        for (i, micro_batch) in micro_batches.iter().enumerate() {
            let groups = micro_batch.iter().map(|&group| &self.train[group]);
            slices.extend(slice::slices(groups.flat_map(|group| &group.examples), device));
            micro_batch_of.resize(slices.len(), i);
        }
        objective::to_mean(&mut slices);
        if let Some(factors) = &self.factors {
            let of_step = micro_batches.iter().flatten().map(|&group| factors[group]);
            objective::by_reward(&mut slices, of_step);
        }
        let (mut tokens, mut longest) = (0, 0);
        let rounds = self.mates.rounds(micro_batch_of.iter().copied());
        let placed = slices.into_iter().map(|slice| {
            let before = tokens;
            tokens += slice.tokens.len() as u64;
            longest = longest.max(slice.tokens.len());
            (slice, before)
        });
        let own = placed.zip(micro_batch_of).filter(|(_, i)| self.mates.has(*i));
        let mut slices: Vec<(Slice, u64)> = own.map(|(slice, _)| slice).collect();
        if self.mates.go_in_step() {
            slices.resize_with(rounds, || (Slice::idle(), tokens));
        }
        Accumulation {
            work: Work::Slices(Slices::new(slices)),
            longest,
            scores: Scores::default(),
            tokens,
        }
    }

    /// `micro_batches`: the numbers of their groups. They are weighed after the forward.
    fn micro_batches_of(&self, micro_batches: &[Vec<usize>]) -> Accumulation {
        let mut tokens = 0;
        let n = micro_batches.len();
        let place = |micro_batch: &Vec<usize>| {
            let groups = micro_batch.iter().map(|&group| (group, &self.train[group]));
            let groups: Vec<(usize, &Group)> = groups.collect();
            let made = self.micro_batch(&groups, n, tokens);
            tokens += made.rows();
            made
        };
        let placed = micro_batches.iter().map(place).collect();
        Accumulation {
            work: Work::MicroBatches(self.own(placed)),
            longest: 0,
            scores: Scores::default(),
            tokens,
        }
    }

    pub(super) fn micro_batch(
        &self,
        groups: &[(usize, &Group)],
        micro_batches: usize,
        rows_before: u64,
    ) -> MicroBatch {
        let Hyper {
            objective,
            max_seq_length,
            ..
        } = self.spec.hyper;
        let place = Place {
            micro_batches,
            rows_before,
            max_seq_length: max_seq_length as usize,
        };
        MicroBatch::new(groups, objective, place, self.learner.device())
    }

    /// Those of this rank, the next at the end; where ranks go in step all go through the same passes.
    pub(super) fn own(&self, all: Vec<MicroBatch>) -> Vec<MicroBatch> {
        let mut own = vec![];
        let mut all = all.into_iter();
        loop {
            let mut round: Vec<MicroBatch> = all.by_ref().take(self.mates.rows()).collect();
            if round.is_empty() {
                break;
            }
            if self.mates.go_in_step() {
                let course = round.iter().map(MicroBatch::course).reduce(Course::or);
                let course = course.expect("a round has one");
                let longest = round.iter().map(MicroBatch::longest).max().unwrap_or(0);
                round.resize_with(self.mates.rows(), || self.micro_batch(&[], 1, 0));
                let in_step = round.into_iter().map(|one| one.in_step(&course, longest));
                round = in_step.collect();
            }
            own.extend(round.into_iter().nth(self.mates.own(0)));
        }
        own.reverse();
        own
    }

    pub(super) fn accumulate(&self, base: Option<&Decoder>, step: Accumulation) -> Stage {
        let Accumulation {
            work,
            longest,
            mut scores,
            tokens,
        } = step;
        let work = match work {
            Work::Slices(slices) => {
                let (decoder, _) = self.learner.parts(base);
                let context = pass::Context {
                    decoder,
                    learns: &[self.learns()],
                    keep_bytes: match self.mates.go_in_step() {
                        // All ranks keep activations, or none: what runs again brings weights together again.
                        true => pass::all_or_nothing(longest, decoder),
                        false => KEEP_BYTES,
                    },
                };
                slices.advance(&context, &mut scores).map(Work::Slices)
            }
            Work::MicroBatches(mut left) => left.pop().map(|now| {
                let models = self.models(base, self.dropout());
                left.extend(now.advance(&models, Some(self.learner.trained()), &mut scores));
                Work::MicroBatches(left)
            }),
        };
        match work {
            None => Stage::Optimize { scores, tokens },
            Some(work) => Stage::Accumulate(Box::new(Accumulation {
                work,
                longest,
                scores,
                tokens,
            })),
        }
    }

    /// What micro-batches go through.
    pub(super) fn models<'a>(&'a self, base: Option<&'a Decoder>, dropout: Option<Dropout>) -> Models<'a> {
        let (decoder, adapter) = self.learner.parts(base);
        Models {
            decoder,
            adapter,
            reference: self.reference.as_ref(),
            references: &self.references,
            dropout,
        }
    }

    /// Who learns from its slices.
    pub(super) fn learns(&self) -> pass::Learns<'_> {
        pass::Learns {
            trained: self.learner.trained(),
            dropout: self.dropout(),
            noise: self.noise(),
        }
    }

    fn dropout(&self) -> Option<Dropout> {
        match &self.spec.hyper.method {
            Method::Lora(lora) if lora.dropout > 0.0 => Some(Dropout {
                p: lora.dropout,
                seed: self.spec.hyper.seed,
                step: self.step,
                row0: 0,
            }),
            _ => None,
        }
    }

    fn noise(&self) -> Option<Noise> {
        let &Hyper {
            neftune_noise_alpha,
            seed,
            ..
        } = &self.spec.hyper;
        neftune_noise_alpha.map(|alpha| Noise {
            alpha,
            seed,
            step: self.step,
        })
    }

    pub(super) fn optimize(
        &mut self,
        base: Option<&Decoder>,
        scores: &Scores,
        tokens: u64,
    ) -> Result<StepReport, TrainError> {
        let Hyper {
            learning_rate,
            lr_scheduler,
            warmup_steps,
            max_grad_norm,
            adam_beta1,
            adam_beta2,
            adam_epsilon,
            weight_decay,
            loraplus_lr_ratio,
            ..
        } = self.spec.hyper;
        let step = self.step + 1;
        let loss = scores.loss();
        let diverged = |what, value| TrainError::Diverged { step, what, value };
        if !loss.is_finite() {
            return Err(diverged("loss", loss));
        }
        let update = Update {
            learning_rate: learning_rate * lr_scheduler.factor(self.step, warmup_steps, self.plan.total()),
            adamw: AdamW {
                beta1: adam_beta1,
                beta2: adam_beta2,
                epsilon: adam_epsilon,
                weight_decay,
            },
            b_ratio: loraplus_lr_ratio.unwrap_or(1.0),
            max_grad_norm,
            step,
        };
        self.mates.sum(self.learner.gradient(), self.learner.is_shared());
        let grad_norm = self
            .learner
            .update(base, &update)
            .map_err(|unusable| match unusable {
                Unusable::GradNorm(norm) => diverged("gradient norm", norm),
                Unusable::Numbers => TrainError::Overflowed { step, loss },
            })?;
        self.step = step;
        self.trained_tokens += tokens;
        Ok(StepReport {
            step,
            epoch: self.plan.epoch(step),
            loss,
            token_accuracy: scores.accuracy(),
            metrics: scores.metrics(),
            grad_norm,
            learning_rate: update.learning_rate,
            trained_tokens: self.trained_tokens,
            tokens_per_second: tokens as f64 / self.step_began.elapsed().as_secs_f64().max(1e-9),
        })
    }
}
