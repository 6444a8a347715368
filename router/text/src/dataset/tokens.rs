//! A whole data set as tokens, with what is to be known of it. Not here: one row (`label`), where the result is kept.

use tandem_core::dataset::{Example, Group};

use super::{BadLine, Options, Place, Sample, group};
use crate::error::TextError;
use crate::label::Labelled;
use crate::tokenizer::Tokenizer;

/// What can be learned of some files, in the order of their rows.
#[derive(Debug)]
pub struct Dataset {
    pub groups: Vec<Group>,
    pub statistics: Statistics,
}

/// Of the files, as they are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub rows: u64,
    /// Rows that were left out, because nothing to learn is within `max_seq_length`.
    pub dropped: u64,
    /// Rows that are longer than `max_seq_length` and lost their end.
    pub cut: u64,
    /// Examples: rows that are left, or blocks of them.
    pub examples: u64,
    pub tokens: u64,
    /// Those with loss.
    pub trained_tokens: u64,
    /// Tokens of the longest row before it was cut.
    pub longest: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    #[error(transparent)]
    Row(#[from] BadLine),
    #[error("{place}: {source}")]
    Tokens { place: Place, source: TextError },
    /// Nobody waits for it.
    #[error("given up")]
    GivenUp,
}

/// `each`: shown every row that is trained, with its tokens; false gives up.
pub fn tokenise(
    rows: impl Iterator<Item = Result<(Place, Sample), BadLine>>,
    tokenizer: &Tokenizer,
    options: &Options,
    mut each: impl FnMut(&Sample, &Group) -> bool,
) -> Result<Dataset, Unfit> {
    let (mut groups, mut statistics) = (Vec::new(), Statistics::default());
    for row in rows {
        let (place, sample) = row?;
        statistics.rows += 1;
        match group(&sample, tokenizer, options) {
            Ok(Labelled { group, whole_tokens }) => {
                statistics.cut += u64::from(whole_tokens > options.row_limit());
                statistics.longest = statistics.longest.max(whole_tokens as u64);
                if !each(&sample, &group) {
                    return Err(Unfit::GivenUp);
                }
                groups.push(group);
            }
            Err(TextError::NoLabels { tokens, .. }) => {
                statistics.dropped += 1;
                statistics.longest = statistics.longest.max(tokens as u64);
            }
            Err(source) => return Err(Unfit::Tokens { place, source }),
        }
    }
    if options.wraps {
        groups = blocks(groups, options.max_seq_length as usize);
    }
    statistics.examples = groups.len() as u64;
    statistics.tokens = groups.iter().map(|group| group.tokens() as u64).sum();
    statistics.trained_tokens = groups.iter().map(|group| group.label_tokens() as u64).sum();
    Ok(Dataset { groups, statistics })
}

/// All examples as one text, cut every `length` tokens, as TRL's `wrapped` and llama-recipes' `packing` do. A last block of
/// fewer is kept. The first token of a block is never predicted.
fn blocks(groups: Vec<Group>, length: usize) -> Vec<Group> {
    let examples = groups.into_iter().flat_map(|group| group.examples);
    let mut tokens = Vec::new();
    let mut weights = Vec::new();
    for example in examples {
        tokens.extend(example.tokens);
        weights.extend(example.weights);
    }
    let cut = tokens.chunks(length).zip(weights.chunks(length));
    cut.map(|(tokens, weights)| Example {
        tokens: tokens.to_vec(),
        weights: weights.to_vec(),
    })
    .filter(|example| example.label_tokens() > 0)
    .map(Group::from)
    .collect()
}
