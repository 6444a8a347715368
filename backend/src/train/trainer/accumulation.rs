//! What one optimizer step learns, on its way through the layers.

use tandem_kernels::loss::LogProbs;

use crate::train::micro_batch::MicroBatch;
use crate::train::objective::Scores;
use crate::train::pass::{Advanced, Context, Entry, Pass};
use crate::train::profile::Doing;
use crate::train::slice::Slice;

pub(super) struct Accumulation {
    pub work: Work,
    /// Tokens of the longest slice, of any rank.
    pub longest: usize,
    pub scores: Scores,
    /// That are trained.
    pub tokens: u64,
}

pub(super) enum Work {
    /// Weights are known.
    Slices(Slices),
    /// Still to go, the next at the end.
    MicroBatches(Vec<MicroBatch>),
}

pub(super) struct Slices {
    /// Still to go, the next at the end, each with the tokens of the step before it.
    left: Vec<(Slice, u64)>,
    /// The next is on its way.
    pass: Option<OnItsWay>,
}

enum OnItsWay {
    Alone(Box<Pass>),
    /// In a pass with those of others ([`crate::train::joint::Joint`]).
    WithOthers,
}

impl Accumulation {
    /// Whether a slice is on its way, whose activations wait for its backward.
    pub fn holds_activations(&self) -> bool {
        match &self.work {
            Work::Slices(slices) => matches!(slices.pass, Some(OnItsWay::Alone(_))),
            Work::MicroBatches(left) => left.last().is_some_and(MicroBatch::holds_activations),
        }
    }

    /// Whether nothing is left to go.
    pub fn is_done(&self) -> bool {
        match &self.work {
            Work::Slices(slices) => slices.left.is_empty(),
            Work::MicroBatches(left) => left.is_empty(),
        }
    }

    pub fn doing(&self) -> Doing {
        match &self.work {
            Work::Slices(slices) => match &slices.pass {
                Some(OnItsWay::Alone(pass)) => pass.doing(),
                Some(OnItsWay::WithOthers) | None => Doing("embedding", None),
            },
            Work::MicroBatches(_) => Doing("preferences", None),
        }
    }

    /// The slice that is next or on its way. None of objectives that weigh several together.
    pub fn slice(&self) -> Option<Entry<'_>> {
        match &self.work {
            Work::Slices(slices) => slices.next(),
            Work::MicroBatches(_) => None,
        }
    }

    /// The same, where it is not on its way.
    pub fn waiting_slice(&self) -> Option<Entry<'_>> {
        match &self.work {
            Work::Slices(slices) if slices.pass.is_none() => slices.next(),
            Work::Slices(_) | Work::MicroBatches(_) => None,
        }
    }

    /// The next slice goes with others.
    pub fn lend(&mut self) {
        if let Work::Slices(slices) = &mut self.work {
            slices.pass = Some(OnItsWay::WithOthers);
        }
    }

    /// It went forward and back with others.
    pub fn take_back(&mut self, found: &LogProbs) {
        if let Work::Slices(slices) = &mut self.work {
            slices.pass = None;
            slices.through(&mut self.scores, found);
        }
    }
}

impl Slices {
    /// In their order, each with the tokens of the step before it.
    pub fn new(mut slices: Vec<(Slice, u64)>) -> Slices {
        slices.reverse(); // taken from the end
        Slices {
            left: slices,
            pass: None,
        }
    }

    fn next(&self) -> Option<Entry<'_>> {
        self.left.last().map(|(slice, before)| (slice, *before))
    }

    /// A quantum further. `None` when all are through.
    pub fn advance(mut self, context: &Context, scores: &mut Scores) -> Option<Slices> {
        self.pass = match self.pass.take() {
            Some(OnItsWay::Alone(pass)) => match pass.advance(context) {
                Advanced::On(pass) => Some(pass),
                Advanced::Through(found) => {
                    self.through(scores, &found[0]);
                    None
                }
                Advanced::Scored(_) => unreachable!("its weights are known"),
            },
            Some(OnItsWay::WithOthers) => unreachable!("its pass is advanced for all of it"),
            None => Some(Pass::enter(&[self.next()?], context)),
        }
        .map(|pass| OnItsWay::Alone(Box::new(pass)));
        Some(self)
    }

    /// The next slice went forward and back.
    fn through(&mut self, scores: &mut Scores, found: &LogProbs) {
        let (slice, _) = self.left.pop().expect("it was on its way");
        scores.add(&slice.labels, found);
    }
}
