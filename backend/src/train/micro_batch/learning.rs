//! A bundle that is learned from: its slices go forward, one after the other; all are weighed; they go back, the last first.

use tandem_kernels::loss::LogProbs;

use super::weighing::Weighing;
use crate::train::objective::Scores;
use crate::train::pass::{Advanced, Context, Pass, Scored};
use crate::train::slice::{Bundle, Slice};

pub(super) struct Forward {
    /// With the slices that are to go; the next is the first.
    bundle: Bundle,
    reference: Vec<LogProbs>,
    pass: Option<Box<Pass>>,
    scored: Vec<Scored>,
    pub keep_bytes: i64,
}

pub(super) struct Backward {
    /// Still to go, the next at the end, each with the derivative of its labels.
    scored: Vec<(Scored, Vec<f32>)>,
    pass: Option<Box<Pass>>,
    pub keep_bytes: i64,
}

impl Forward {
    /// `reference`: what it says of each slice, where the objective has one.
    pub fn new(bundle: Bundle, reference: Vec<LogProbs>, keep_bytes: i64) -> Forward {
        Forward {
            bundle,
            reference,
            pass: None,
            scored: vec![],
            keep_bytes,
        }
    }

    pub fn is_scored(&self) -> bool {
        self.pass.is_none() && self.bundle.slices.is_empty()
    }

    /// A quantum further, unless all are scored. `rows_before`: the step's tokens before the next slice.
    pub fn advance(&mut self, context: &Context, rows_before: &mut u64) {
        self.pass = match self.pass.take() {
            Some(pass) => match pass.advance(context) {
                Advanced::On(pass) => Some(Box::new(pass)),
                Advanced::Scored(done) => {
                    self.scored.push(done);
                    None
                }
                Advanced::Through(..) => unreachable!("it is to be weighed"),
            },
            None => {
                let slice = self.bundle.slices.remove(0);
                let pass = Pass::enter_to_be_weighed((&slice, *rows_before), context);
                if !slice.is_idle() {
                    *rows_before += slice.tokens.len() as u64;
                }
                Some(Box::new(pass))
            }
        };
    }

    /// When all are scored.
    pub fn weighed(self, weighing: &Weighing, scores: &mut Scores) -> Backward {
        let Forward {
            bundle,
            reference,
            pass: _,
            scored,
            keep_bytes,
        } = self;
        let slices: Vec<&Slice> = scored.iter().map(Scored::slice).collect();
        let found: Vec<&LogProbs> = scored.iter().map(Scored::found).collect();
        let dlogp = weighing.weigh(&slices, &found, &reference, &bundle.values, scores);
        Backward {
            scored: scored.into_iter().zip(dlogp).collect(),
            pass: None,
            keep_bytes,
        }
    }
}

impl Backward {
    /// A quantum further. `None` when it is through.
    pub fn advance(self, context: &Context) -> Option<Backward> {
        let Backward {
            mut scored,
            pass,
            keep_bytes,
        } = self;
        let pass = match pass.map(|pass| pass.advance(context)) {
            Some(Advanced::On(pass)) => pass,
            Some(Advanced::Scored(_)) => unreachable!("it is weighed"),
            Some(Advanced::Through(..)) | None => {
                let (next, dlogp) = scored.pop()?;
                next.weighed(&dlogp)
            }
        };
        Some(Backward {
            scored,
            pass: Some(Box::new(pass)),
            keep_bytes,
        })
    }
}
