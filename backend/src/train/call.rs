//! A batch of a client on its way: cut into slices, which are scored, or learned from, one after the other, alone or in passes
//! that others share. Not here: the numbers that are trained (driven), what a loss is (objective).

use std::collections::VecDeque;
use std::ops::Range;

use tandem_core::learner::{self, Batch, Datum, Loss, Scores};
use tandem_core::message::Fault;
use tandem_kernels::loss::LogProbs;
use tch::Device;

use super::joint::Next;
use super::learner::Learner;
use super::objective::policy;
use super::pass::{Advanced, Context, KEEP_BYTES, Look, Pass};
use super::slice::Slice;
use crate::model::Decoder;

pub struct Call {
    loss: Loss,
    pass: learner::Pass,
    data: Vec<Datum>,
    /// Still to go, the first may be on its way.
    cuts: VecDeque<Cut>,
    at: At,
    scores: Scores,
    /// What was wrong, found in a pass that others share.
    wrong: Option<Fault>,
}

/// Neighbouring data that go through the layers together. Labels stand in the order of the data's targets.
struct Cut {
    slice: Slice,
    data: Range<usize>,
}

enum At {
    Next,
    Scores(Look),
    Learns(Box<Pass>),
    /// In a pass with those of others ([`super::joint::Joint`]).
    WithOthers,
}

/// What [`Call::advance`] came to.
pub enum Progress {
    On,
    Done(Scores),
}

impl Call {
    pub fn new(batch: Batch, device: Device) -> Call {
        let Batch {
            loss,
            data,
            pass,
            trace: _,
        } = batch;
        let mut cuts = cuts(&data, device);
        if loss == Loss::CrossEntropy {
            cuts.iter_mut().for_each(|cut| cut.weigh(&data));
        }
        Call {
            loss,
            pass,
            scores: Scores {
                loss: 0.0,
                logprobs: vec![vec![]; data.len()],
            },
            cuts,
            data,
            at: At::Next,
            wrong: None,
        }
    }

    /// A quantum further.
    pub fn advance(&mut self, learner: &Learner, base: &Decoder) -> Result<Progress, Fault> {
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
        }
        let Some(cut) = self.cuts.front() else {
            return Ok(Progress::Done(std::mem::take(&mut self.scores)));
        };
        let (decoder, adapter) = learner.parts(Some(base));
        let context = Context {
            decoder,
            learns: &[learner.trained().into()],
            keep_bytes: KEEP_BYTES,
        };
        let learns = |pass| At::Learns(Box::new(pass));
        self.at = match std::mem::replace(&mut self.at, At::Next) {
            At::Next => match self.pass {
                learner::Pass::Forward => At::Scores(Look::enter(&cut.slice, decoder, adapter)),
                learner::Pass::ForwardBackward => {
                    let later = (!self.is_weighed()).then_some(0);
                    learns(Pass::enter(&[(&cut.slice, 0)], &context).to_be_weighed(later))
                }
            },
            At::Scores(look) => match look.advance(&cut.slice, decoder, adapter) {
                Err(look) => At::Scores(look),
                Ok(found) => {
                    self.through(&found)?;
                    At::Next
                }
            },
            At::Learns(pass) => match pass.advance(&context) {
                Advanced::On(pass) => learns(pass),
                Advanced::Scored(scored) => {
                    let dlogp = self.weigh(&scored.found().log_probs)?;
                    learns(scored.weighed(&dlogp))
                }
                Advanced::Through(found) => {
                    self.through(&found[0])?;
                    At::Next
                }
            },
            At::WithOthers => unreachable!("its pass is advanced for all of it"),
        };
        Ok(Progress::On)
    }

    /// Whether the weights of its labels are known before the forward: then the loss and its gradient are one product of the
    /// head.
    fn is_weighed(&self) -> bool {
        self.loss == Loss::CrossEntropy
    }

    /// Whether a slice is on its way, whose activations wait for its backward.
    pub fn holds_activations(&self) -> bool {
        matches!(self.at, At::Learns(_))
    }

    /// Whether nothing is left to be done but to say what came of it.
    pub fn is_over(&self) -> bool {
        self.cuts.is_empty() || self.wrong.is_some()
    }

    /// The slice that goes into a pass with the next quantum. What is only scored goes alone.
    pub fn next_slice(&self) -> Option<Next<'_>> {
        let is_next = matches!(self.at, At::Next) && self.pass == learner::Pass::ForwardBackward;
        let cut = self.cuts.front().filter(|_| is_next && self.wrong.is_none())?;
        Some(Next {
            entry: (&cut.slice, 0),
            is_weighed: self.is_weighed(),
        })
    }

    pub fn slice_rows(&self) -> usize {
        self.cuts.front().map_or(0, |cut| cut.slice.tokens.len())
    }

    pub fn lend(&mut self) {
        self.at = At::WithOthers;
    }

    /// In a pass that others share: where something is wrong, its rows weigh nothing.
    pub fn weigh_beside(&mut self, log_probs: &[f32]) -> Vec<f32> {
        self.weigh(log_probs).unwrap_or_else(|wrong| {
            self.wrong = Some(wrong);
            vec![0.0; log_probs.len()]
        })
    }

    pub fn take_back(&mut self, found: &LogProbs) {
        self.at = At::Next;
        if self.wrong.is_none() {
            self.wrong = self.through(found).err();
        }
    }

    /// The first slice is.
    fn through(&mut self, found: &LogProbs) -> Result<(), Fault> {
        if self.is_weighed() || self.pass == learner::Pass::Forward {
            self.weigh(&found.log_probs)?;
        }
        self.cuts.pop_front();
        Ok(())
    }

    /// Log-probabilities of all targets of the first slice: kept, and their loss with its derivatives.
    fn weigh(&mut self, log_probs: &[f32]) -> Result<Vec<f32>, Fault> {
        let data = self.cuts.front().map_or(0..0, |cut| cut.data.clone());
        let mut dlogp = Vec::with_capacity(log_probs.len());
        let mut rest = log_probs;
        for n in data {
            let datum = &self.data[n];
            let (of_datum, behind) = rest.split_at(datum.targets.len());
            rest = behind;
            let weighed = policy::weigh(self.loss, datum, of_datum);
            if !weighed.loss.is_finite() || weighed.dlogp.iter().any(|number| !number.is_finite()) {
                return Err(Fault::Refused(format!(
                    "datum {n}: its {} is {}: log-probabilities of the model or of who sampled are out of range",
                    self.loss.name(),
                    weighed.loss
                )));
            }
            self.scores.loss += weighed.loss;
            self.scores.logprobs[n] = of_datum.to_vec();
            dlogp.extend(weighed.dlogp);
        }
        Ok(dlogp)
    }
}

impl Cut {
    fn weigh(&mut self, data: &[Datum]) {
        let weights = data[self.data.clone()].iter().flat_map(|datum| {
            let n = datum.targets.len();
            (0..n).map(|i| datum.weights.get(i).copied().unwrap_or(1.0))
        });
        for (label, weight) in self.slice.labels.iter_mut().zip(weights) {
            label.2 = weight;
        }
    }
}

/// The data as slices, in order.
fn cuts(data: &[Datum], device: Device) -> VecDeque<Cut> {
    let mut cuts: VecDeque<Cut> = VecDeque::new();
    for (n, datum) in data.iter().enumerate() {
        let fits = |cut: &Cut| cut.slice.has_room(datum.tokens.len(), device);
        if !cuts.back().is_some_and(fits) {
            cuts.push_back(Cut {
                slice: Slice::default(),
                data: n..n,
            });
        }
        let cut = cuts.back_mut().expect("there is one now");
        let label = |(i, &target): (usize, &u32)| ((i / datum.columns) as i64, target, 0.0);
        cut.slice
            .push(&datum.tokens, datum.targets.iter().enumerate().map(label));
        cut.data.end = n + 1;
    }
    cuts
}
