//! Whose quantum is next, of runs that train beside each other on one base: they take turns by the time they were given, and
//! those whose slices fit into one go together. Not here: the quantum.

use std::time::Duration;

use super::Trainer;
use super::driven::Driven;
use super::joint::Member;

/// What of a run its turn depends on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn {
    pub is_ready: bool,
    /// A slice is on its way.
    pub holds_activations: bool,
    pub is_brief: bool,
    /// Rows of its next slice, where that may go with others'.
    pub rows_to_join: Option<usize>,
    pub given: Duration,
}

impl Turn {
    pub fn of(trainer: &Trainer, given: Duration) -> Turn {
        Turn {
            is_ready: true,
            holds_activations: trainer.holds_activations(),
            is_brief: trainer.is_brief(),
            rows_to_join: trainer.next_rows(),
            given,
        }
    }

    pub fn of_driven(driven: &Driven, given: Duration) -> Turn {
        Turn {
            is_ready: true,
            holds_activations: driven.holds_activations(),
            is_brief: driven.is_brief(),
            rows_to_join: driven.next_rows(),
            given,
        }
    }
}

/// How long passes take.
#[derive(Default)]
pub struct PassClock {
    under_way: Duration,
    last: Duration,
}

impl PassClock {
    /// A quantum took so long. `is_amid`: what it did goes on.
    pub fn took(&mut self, took: Duration, is_amid: bool) {
        if is_amid {
            self.under_way += took;
        } else if self.under_way > Duration::ZERO {
            self.last = std::mem::take(&mut self.under_way) + took;
        }
    }

    /// The last one, from its first quantum to its last.
    pub fn last(&self) -> Duration {
        self.last
    }
}

/// One, or several whose slices have `most_rows` together. `pass`: how long a pass takes.
pub fn next(all: &[Turn], most_rows: usize, pass: Duration) -> Vec<usize> {
    let ready = || (0..all.len()).filter(|&i| all[i].is_ready);
    if let Some(amid) = ready().find(|&i| all[i].holds_activations) {
        return vec![amid];
    }
    // What is brief goes first, so that more slices are there to go together.
    let Some(first) = ready().min_by_key(|&i| (!all[i].is_brief, all[i].given)) else {
        return vec![];
    };
    let mut members = vec![first];
    let mut rows = all[first].rows_to_join.unwrap_or(most_rows);
    // Who is more than a pass ahead waits for its turn, or those whose tenant has many jobs would ride along with each.
    let due = all[first].given + pass;
    let mut others: Vec<usize> = ready().filter(|&i| i != first && all[i].given <= due).collect();
    others.sort_by_key(|&i| all[i].given);
    for i in others {
        if let Some(more) = all[i].rows_to_join
            && rows + more <= most_rows
        {
            rows += more;
            members.push(i);
        }
    }
    members
}
