//! A job in passes that others share.

use tandem_kernels::loss::LogProbs;

use super::accumulation::Accumulation;
use super::{Stage, Trainer};
use crate::train::joint::{Member, Next};
use crate::train::pass::Learns;

impl Member for Trainer {
    /// Slices of objectives that weigh several together go alone.
    fn next_slice(&self) -> Option<Next<'_>> {
        let entry = self.accumulation()?.waiting_slice()?;
        Some(Next {
            entry,
            is_weighed: true,
        })
    }

    fn lend(&mut self) {
        if let Stage::Accumulate(step) = &mut self.stage {
            step.lend();
        }
    }

    fn learns(&self) -> Learns<'_> {
        Trainer::learns(self)
    }

    fn weigh(&mut self, _: &[f32]) -> Vec<f32> {
        unreachable!("its weights are known")
    }

    fn take_back(&mut self, found: &LogProbs) {
        if let Stage::Accumulate(step) = &mut self.stage {
            step.take_back(found);
        }
    }

    fn slice_rows(&self) -> usize {
        let slice = self.accumulation().and_then(Accumulation::slice);
        slice.map_or(0, |(slice, _)| slice.tokens.len())
    }
}

impl Trainer {
    fn accumulation(&self) -> Option<&Accumulation> {
        match &self.stage {
            Stage::Accumulate(step) => Some(step),
            _ => None,
        }
    }
}
