//! Slices of several jobs in one pass: the base's products read its weights once for all of them, forward and back. Each
//! job's rows have their own adapter, dropout and gradient, and a row's numbers do not depend on the rows beside it, so a
//! job comes to the same bytes alone and with others. Not here: which jobs go together (engine).

use tandem_core::id::JobId;
use tandem_kernels::loss::LogProbs;

use super::pass::{Advanced, Context, Entry, KEEP_BYTES, Learns, Pass};
use super::{OnItsWay, Stage, Trainer, Work, through};
use crate::model::Decoder;

pub struct Joint {
    jobs: Vec<JobId>,
    pass: Pass,
}

/// One quantum of `trainers` together: a sublayer, or some labels, further; without `joint` the next slice of each
/// ([`Trainer::next_rows`]) goes in. `joint` is gone when they are through.
pub fn quantum(joint: &mut Option<Joint>, trainers: &mut [&mut Trainer], base: &Decoder) {
    let _no_grad = tch::no_grad_guard();
    *joint = match joint.take() {
        Some(joint) => joint.advance(trainers, base),
        None => Some(Joint::begin(trainers, base)),
    };
}

impl Joint {
    fn begin(trainers: &mut [&mut Trainer], base: &Decoder) -> Joint {
        let slices = trainers.iter().map(|trainer| trainer.next_slice());
        let slices: Vec<Entry> = slices
            .map(|slice| slice.expect("who joins has a slice"))
            .collect();
        let pass = Pass::enter(&slices, &context(&learns(trainers), base));
        trainers.iter_mut().for_each(|trainer| trainer.lend());
        Joint {
            jobs: trainers.iter().map(|trainer| trainer.spec().id.clone()).collect(),
            pass,
        }
    }

    fn advance(self, trainers: &mut [&mut Trainer], base: &Decoder) -> Option<Joint> {
        let Joint { jobs, pass } = self;
        assert!(
            trainers.iter().map(|trainer| &trainer.spec().id).eq(&jobs),
            "a pass ends with those it began with"
        );
        match pass.advance(&context(&learns(trainers), base)) {
            Advanced::On(pass) => Some(Joint { jobs, pass }),
            Advanced::Through(found) => {
                for (trainer, found) in trainers.iter_mut().zip(found) {
                    trainer.take_back(&found);
                }
                None
            }
            Advanced::Scored(_) => unreachable!("its weights are known"),
        }
    }

    pub fn jobs(&self) -> &[JobId] {
        &self.jobs
    }
}

/// `job` leaves: where it is of `joint`, that is given up, and those of `trainers` who were of it begin their step again.
pub fn part<'a>(joint: &mut Option<Joint>, job: &JobId, trainers: impl Iterator<Item = &'a mut Trainer>) {
    if joint.as_ref().is_some_and(|joint| joint.jobs.contains(job)) {
        *joint = None;
        trainers.for_each(Trainer::begin_again);
    }
}

fn learns<'a>(trainers: &'a [&mut Trainer]) -> Vec<Learns<'a>> {
    trainers.iter().map(|trainer| trainer.learns()).collect()
}

fn context<'a>(learns: &'a [Learns<'a>], decoder: &'a Decoder) -> Context<'a> {
    Context {
        decoder,
        learns,
        keep_bytes: KEEP_BYTES,
    }
}

impl Trainer {
    /// Rows of the slice that goes into a pass with the next quantum, alone or with those of other jobs. None where
    /// something else is next. Slices that are weighed after their forward go alone.
    pub fn next_rows(&self) -> Option<usize> {
        self.next_slice().map(|(slice, _)| slice.tokens.len())
    }

    fn next_slice(&self) -> Option<Entry<'_>> {
        match self.slice()? {
            (slice, None) => Some(slice),
            (_, Some(_)) => None,
        }
    }

    /// Rows of the slice that is next or on its way.
    pub fn slice_rows(&self) -> usize {
        self.slice().map_or(0, |((slice, _), _)| slice.tokens.len())
    }

    /// The slice that is next or on its way.
    fn slice(&self) -> Option<(Entry<'_>, Option<&OnItsWay>)> {
        let Stage::Accumulate(step) = &self.stage else {
            return None;
        };
        let Work::Slices { slices, pass } = &step.work else {
            return None;
        };
        let (slice, before) = slices.last()?;
        Some(((slice, *before), pass.as_ref()))
    }

    /// Its next slice goes with others.
    fn lend(&mut self) {
        if let Stage::Accumulate(step) = &mut self.stage
            && let Work::Slices { pass, .. } = &mut step.work
        {
            *pass = Some(OnItsWay::WithOthers);
        }
    }

    /// Its slice went forward and back with others.
    fn take_back(&mut self, found: &LogProbs) {
        if let Stage::Accumulate(step) = &mut self.stage
            && let Work::Slices { slices, pass } = &mut step.work
        {
            *pass = None;
            through(slices, &mut step.scores, found);
        }
    }

    /// The pass that its slice went into is given up: what it added to the gradient is unknown.
    fn begin_again(&mut self) {
        if matches!(self.slice(), Some((_, Some(OnItsWay::WithOthers)))) {
            self.stage = Stage::Begin;
        }
    }
}
