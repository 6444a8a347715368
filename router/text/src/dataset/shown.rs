//! Examples as a person reads them: what the model reads, and which of it is learned.

use tandem_core::dataset::{Example, Group};

use crate::tokenizer::{Skip, Tokenizer};

/// One example.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    pub tokens: Vec<u32>,
    /// The loss weight of each token; the first is never predicted.
    pub weights: Vec<f32>,
    /// The text, in pieces of one weight.
    pub pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub text: String,
    pub weight: f32,
}

impl Shown {
    pub fn of(group: &Group, tokenizer: &Tokenizer) -> Vec<Shown> {
        group
            .examples
            .iter()
            .map(|Example { tokens, weights }| Shown {
                pieces: pieces(tokens, weights, tokenizer),
                tokens: tokens.clone(),
                weights: weights.clone(),
            })
            .collect()
    }

    pub fn text(&self) -> String {
        self.pieces.iter().map(|piece| piece.text.as_str()).collect()
    }

    pub fn learned_tokens(&self) -> usize {
        self.weights
            .iter()
            .skip(1)
            .filter(|&&weight| weight != 0.0)
            .count()
    }
}

/// Each is what its tokens add to the text of those before: a character may be written by several.
fn pieces(tokens: &[u32], weights: &[f32], tokenizer: &Tokenizer) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let (mut end, mut before) = (0, String::new());
    for run in weights.chunk_by(|a, b| a == b) {
        end += run.len();
        let whole = tokenizer
            .decode(&tokens[..end], Skip::Nothing)
            .unwrap_or_default();
        let common = before
            .char_indices()
            .zip(whole.chars())
            .find(|((_, a), b)| a != b)
            .map_or(before.len().min(whole.len()), |((at, _), _)| at);
        let text = whole.get(common..).unwrap_or_default().to_owned();
        pieces.push(Piece { text, weight: run[0] });
        before = whole;
    }
    pieces
}
