//! How the hidden states of a prompt become one vector. Not here: norms of vectors, shorter ones (the edge).

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Which states, behind the final norm (sentence-transformers' `1_Pooling/config.json`, vLLM's `pooling_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The average over all tokens.
    Mean,
    /// That of the last token: in a causal model the only one that has seen the whole text.
    Last,
    /// That of the first token.
    Cls,
}

impl Pooling {
    pub const ALL: [Pooling; 3] = [Pooling::Mean, Pooling::Last, Pooling::Cls];

    pub fn name(self) -> &'static str {
        match self {
            Pooling::Mean => "mean",
            Pooling::Last => "last",
            Pooling::Cls => "cls",
        }
    }

    /// In capitals too, as vLLM writes them.
    pub fn named(name: &str) -> Option<Pooling> {
        Pooling::ALL
            .into_iter()
            .find(|pooling| name.eq_ignore_ascii_case(pooling.name()))
    }

    /// Positions that are averaged, of a prompt of `len` tokens.
    pub fn positions(self, len: usize) -> Range<usize> {
        match self {
            Pooling::Mean => 0..len,
            Pooling::Last => len.saturating_sub(1)..len,
            Pooling::Cls => 0..len.min(1),
        }
    }
}
