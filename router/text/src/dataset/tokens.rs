//! A whole data set as tokens, row by row, with what is to be known of it. Not here: one row (`label`), where its tokens are
//! kept.

use std::io;

use tandem_core::dataset::{Example, Group};

use super::{BadLine, Options, Place, Sample, group};
use crate::error::TextError;
use crate::label::Labelled;
use crate::tokenizer::Tokenizer;

/// Of the files, as they are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub rows: u64,
    /// Rows that were left out, because nothing to learn is within `max_seq_length`.
    pub dropped: u64,
    /// Rows that are longer than `max_seq_length` and lost their end.
    pub cut: u64,
    /// Rows of which the prompt by itself is not what the whole begins with, token for token: they were told apart where the
    /// two diverge.
    pub merged: u64,
    /// Examples: rows that are left, or blocks of them.
    pub examples: u64,
    pub tokens: u64,
    /// Those with loss.
    pub trained_tokens: u64,
    /// Tokens of the longest row before it was cut.
    pub longest: u64,
}

/// Of so many rows: what [`Statistics::merged`] means for who wrote them.
pub const MERGED: &str = "the prompt by itself, as a request sends it, ends in other tokens than before its completion, which is \
                          learned from where they diverge";

#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    #[error(transparent)]
    Row(#[from] BadLine),
    #[error("{place}: {source}")]
    Tokens { place: Place, source: TextError },
    /// What takes them could not.
    #[error("{0}")]
    Unkept(io::Error),
    /// Nobody waits for it.
    #[error("given up")]
    GivenUp,
}

/// `each`: shown every row that is trained, with its tokens; false gives up. `keep`: takes what can be learned, in the order of
/// the rows.
pub fn tokenise(
    rows: impl Iterator<Item = Result<(Place, Sample), BadLine>>,
    tokenizer: &Tokenizer,
    options: &Options,
    mut each: impl FnMut(&Sample, &Group) -> bool,
    mut keep: impl FnMut(Group) -> io::Result<()>,
) -> Result<Statistics, Unfit> {
    let mut statistics = Statistics::default();
    let mut counted = |group: Group, statistics: &mut Statistics| {
        statistics.examples += 1;
        statistics.tokens += group.tokens() as u64;
        statistics.trained_tokens += group.label_tokens() as u64;
        keep(group).map_err(Unfit::Unkept)
    };
    let mut blocks = options.wraps.then(|| Blocks::of(options.max_seq_length as usize));
    for row in rows {
        let (place, sample) = row?;
        statistics.rows += 1;
        match group(&sample, tokenizer, options) {
            Ok(Labelled {
                group,
                whole_tokens,
                diverges,
            }) => {
                statistics.merged += u64::from(diverges);
                statistics.cut += u64::from(whole_tokens > options.row_limit());
                statistics.longest = statistics.longest.max(whole_tokens as u64);
                if !each(&sample, &group) {
                    return Err(Unfit::GivenUp);
                }
                match &mut blocks {
                    None => counted(group, &mut statistics)?,
                    Some(blocks) => blocks.push(group, |group| counted(group, &mut statistics))?,
                }
            }
            Err(TextError::NoLabels { tokens, .. }) => {
                statistics.dropped += 1;
                statistics.longest = statistics.longest.max(tokens as u64);
            }
            Err(source) => return Err(Unfit::Tokens { place, source }),
        }
    }
    if let Some(blocks) = blocks {
        blocks.finish(|group| counted(group, &mut statistics))?;
    }
    Ok(statistics)
}

/// All examples as one text, cut every `length` tokens, as TRL's `wrapped` and llama-recipes' `packing` do. A last block of
/// fewer is kept, one without a label is not. The first token of a block is never predicted.
struct Blocks {
    length: usize,
    /// What is no whole block yet.
    rest: Example,
}

impl Blocks {
    fn of(length: usize) -> Blocks {
        let rest = Example {
            tokens: vec![],
            weights: vec![],
        };
        Blocks { length, rest }
    }

    fn push(&mut self, group: Group, mut keep: impl FnMut(Group) -> Result<(), Unfit>) -> Result<(), Unfit> {
        for example in group.examples {
            self.rest.tokens.extend(example.tokens);
            self.rest.weights.extend(example.weights);
        }
        let whole = self.rest.tokens.len() / self.length * self.length;
        let tokens: Vec<_> = self.rest.tokens.drain(..whole).collect();
        let weights: Vec<_> = self.rest.weights.drain(..whole).collect();
        let cut = tokens.chunks(self.length).zip(weights.chunks(self.length));
        for (tokens, weights) in cut {
            let block = Example {
                tokens: tokens.to_vec(),
                weights: weights.to_vec(),
            };
            if block.label_tokens() > 0 {
                keep(block.into())?;
            }
        }
        Ok(())
    }

    fn finish(self, mut keep: impl FnMut(Group) -> Result<(), Unfit>) -> Result<(), Unfit> {
        match self.rest.label_tokens() {
            0 => Ok(()),
            _ => keep(self.rest.into()),
        }
    }
}
