//! Examples as they go through the layers: sequences packed side by side, with the labels that are predicted behind their rows. Not
//! here: which examples (plan).

use std::ops::Range;

use tandem_core::TokenId;
use tandem_core::dataset::{Example, Group};
use tch::Device;

/// Tokens of one slice at most, unless a single example is longer. Slices bound the memory of activations and the
/// length of a quantum; gradients add up over slices, so only float rounding depends on it. Never tuned to timing: the
/// same job must give the same bytes on every run. A GPU wants many rows.
pub fn slice_tokens(device: Device) -> usize {
    match device {
        Device::Cpu => 256,
        _ => 2048,
    }
}

/// Sequences that go through the layers together, packed side by side.
#[derive(Clone, Default)]
pub struct Slice {
    /// Inputs of all sequences.
    pub tokens: Vec<TokenId>,
    /// Within each sequence.
    pub positions: Vec<i64>,
    /// Where sequences begin, and the end of the last.
    pub cu_seqlens: Vec<usize>,
    /// Of all sequences, in order of their rows.
    pub labels: Vec<Label>,
    /// The labels of each sequence: a range of `labels`.
    pub sequences: Vec<Range<usize>>,
}

/// A row of the slice, a token whose log-probability behind that row is wanted, its weight. A row may have several.
pub type Label = (i64, TokenId, f32);

impl Slice {
    /// Whether a sequence of so many inputs may join: as many as fit [`slice_tokens`], or one that is longer.
    pub fn has_room(&self, inputs: usize, device: Device) -> bool {
        self.tokens.is_empty() || self.tokens.len() + inputs <= slice_tokens(device)
    }

    /// Of nobody, and with nothing to learn: what a rank goes through when only others have slices left.
    pub fn idle() -> Slice {
        let mut slice = Slice::default();
        slice.push(&[0], []);
        slice
    }

    pub fn is_idle(&self) -> bool {
        self.labels.is_empty()
    }

    /// The sequences of `other` as well, behind its own.
    pub fn append(&mut self, other: &Slice) {
        let (row, label) = (self.tokens.len(), self.labels.len());
        self.tokens.extend(&other.tokens);
        self.positions.extend(&other.positions);
        let ends = other.cu_seqlens.iter().skip(usize::from(row > 0));
        self.cu_seqlens.extend(ends.map(|end| row + end));
        let labels = other.labels.iter();
        self.labels
            .extend(labels.map(|&(at, token, weight)| (row as i64 + at, token, weight)));
        let sequences = other.sequences.iter();
        self.sequences
            .extend(sequences.map(|labels| label + labels.start..label + labels.end));
    }

    /// `inputs` has a token; labels have their row within the sequence, in ascending order.
    pub fn push(&mut self, inputs: &[TokenId], labels: impl IntoIterator<Item = Label>) {
        let (start, first) = (self.tokens.len(), self.labels.len());
        self.tokens.extend(inputs);
        self.positions.extend(0..inputs.len() as i64);
        if start == 0 {
            self.cu_seqlens.push(0);
        }
        self.cu_seqlens.push(start + inputs.len());
        let placed = labels
            .into_iter()
            .map(|(row, token, weight)| (start as i64 + row, token, weight));
        self.labels.extend(placed);
        self.sequences.push(first..self.labels.len());
    }
}

/// Cuts examples into slices of at most [`slice_tokens`], in order. The last token of an example is never an input:
/// nothing is predicted after it.
pub fn slices<'a>(examples: impl Iterator<Item = &'a Example>, device: Device) -> Vec<Slice> {
    let mut slices = vec![];
    for example in examples {
        place(example, Labelled::Weighted, device, &mut slices);
    }
    slices
}

/// Into the last slice, or a new one.
fn place(example: &Example, labelled: Labelled, device: Device, slices: &mut Vec<Slice>) {
    let Example { tokens, weights } = example;
    let inputs = tokens.len().saturating_sub(1);
    if inputs == 0 {
        return;
    }
    if !slices.last().is_some_and(|slice| slice.has_room(inputs, device)) {
        slices.push(Slice::default());
    }
    let predicted = tokens.iter().zip(weights).skip(1);
    let labels = (0..)
        .zip(predicted)
        .filter(|(_, (_, weight))| labelled == Labelled::All || **weight != 0.0)
        .map(|(row, (&token, &weight))| (row, token, weight));
    let slice = slices.last_mut().expect("there is one now");
    slice.push(&tokens[..inputs], labels);
}

/// Which tokens of an example are labels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Labelled {
    /// Those with a weight.
    Weighted,
    All,
}

/// Slices whose sequences are weighed together: several groups that fit one slice, or one group.
#[derive(Default)]
pub struct Bundle {
    /// The sequences of all groups, in order.
    pub slices: Vec<Slice>,
    /// Of each group.
    pub values: Vec<f32>,
    /// Of each group, where it has one.
    pub numbers: Vec<usize>,
}

/// Groups in order, whole. All have as many examples, each of two tokens at least; `labelled`: by its number in the group.
pub fn bundles(groups: &[&Group], labelled: impl Fn(usize) -> Labelled, device: Device) -> Vec<Bundle> {
    let mut bundles: Vec<Bundle> = vec![];
    for Group { examples, value } in groups {
        let inputs = examples.iter().map(|example| example.tokens.len() - 1).sum();
        let fits = bundles
            .last()
            .is_some_and(|bundle| bundle.slices.len() == 1 && bundle.slices[0].has_room(inputs, device));
        if !fits {
            bundles.push(Bundle::default());
        }
        let bundle = bundles.last_mut().expect("there is one now");
        for (i, example) in examples.iter().enumerate() {
            place(example, labelled(i), device, &mut bundle.slices);
        }
        bundle.values.push(*value);
    }
    bundles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundles_hold_whole_groups() {
        let example = |tokens: usize| Example {
            tokens: vec![1; tokens],
            weights: vec![1.0; tokens],
        };
        let group = |lengths: [usize; 2]| Group {
            examples: lengths.map(example).into(),
            value: lengths[0] as f32,
        };
        let groups = [[50, 70], [60, 60], [60, 100], [200, 90], [20, 10]].map(group);
        let groups: Vec<&Group> = groups.iter().collect();
        let bundles = bundles(&groups, |_| Labelled::Weighted, Device::Cpu);
        let got: Vec<_> = bundles
            .iter()
            .map(|Bundle { slices, values, .. }| {
                let rows = slices.iter().map(|slice| slice.tokens.len());
                (rows.collect::<Vec<_>>(), values.as_slice())
            })
            .collect();
        let expected: [(Vec<usize>, &[f32]); 4] = [
            (vec![236], &[50.0, 60.0]),
            (vec![158], &[60.0]),
            (vec![199, 89], &[200.0]),
            (vec![28], &[20.0]),
        ];
        assert_eq!(got, expected);
    }

    #[test]
    fn slices_hold_whole_examples_and_label_the_row_before() {
        let examples = [
            Example {
                tokens: vec![5, 6, 7],
                weights: vec![1.0, 0.0, 0.5],
            },
            Example {
                tokens: vec![9; 300],
                weights: vec![1.0; 300],
            },
            Example {
                tokens: vec![8],
                weights: vec![1.0],
            },
            Example {
                tokens: vec![3, 4],
                weights: vec![0.0, 1.0],
            },
        ];
        let slices = slices(examples.iter(), Device::Cpu);
        let lengths: Vec<_> = slices.iter().map(|slice| slice.tokens.len()).collect();
        assert_eq!(lengths, [2, 299, 1]);
        assert_eq!(slices[0].labels, [(1, 7, 0.5)]);
        assert_eq!(slices[1].labels.len(), 299);
        assert_eq!(slices[2].labels, [(0, 4, 1.0)]);
    }
}
