//! How often a sequence holds which token: what penalties ask for, counted as tokens come instead of anew for each.

use std::collections::BTreeMap;

use crate::TokenId;

/// Every token of a sequence once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Uses {
    /// How often it was generated. 0: it is in the prompt only.
    generated: BTreeMap<TokenId, u32>,
}

impl Uses {
    pub fn of(prompt: &[TokenId]) -> Uses {
        Uses {
            generated: prompt.iter().map(|&token| (token, 0)).collect(),
        }
    }

    pub fn generated(&mut self, token: TokenId) {
        *self.generated.entry(token).or_default() += 1;
    }

    pub fn iter(&self) -> impl Iterator<Item = (TokenId, u32)> {
        self.generated.iter().map(|(&token, &n)| (token, n))
    }
}
