//! How a micro-batch goes: ranks that go in step agree on it before they begin. Not here: the passes themselves (`pass`).

/// Which passes a micro-batch goes through, in order. Ranks that go in step agree on one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Course {
    /// Slices of KTO's prompts with each other's answers.
    pub(super) divergence: usize,
    /// Of each bundle.
    pub(super) slices: Vec<usize>,
}

impl Course {
    /// One that is long enough for either.
    pub fn or(self, other: Course) -> Course {
        let (mut long, short) = match self.slices.len() >= other.slices.len() {
            true => (self.slices, other.slices),
            false => (other.slices, self.slices),
        };
        for (slices, other) in long.iter_mut().zip(short) {
            *slices = (*slices).max(other);
        }
        Course {
            divergence: self.divergence.max(other.divergence),
            slices: long,
        }
    }
}
