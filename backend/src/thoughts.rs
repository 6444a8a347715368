//! The running answers whose reasoning is bounded. Not here: how a bound is followed (core), how its end is said (sample).

use std::collections::HashMap;
use std::sync::Arc;

use tandem_core::TokenId;
use tandem_core::grammar::Vocabulary;
use tandem_core::id::RequestId;
use tandem_core::message::Fault;
use tandem_core::thinking::{Budget, Thinking};

pub struct Thoughts {
    vocabulary: Option<Arc<Vocabulary>>,
    answers: HashMap<RequestId, Thinking>,
}

impl Thoughts {
    pub fn new(vocabulary: Option<Arc<Vocabulary>>) -> Thoughts {
        Thoughts {
            vocabulary,
            answers: HashMap::new(),
        }
    }

    pub fn admit(&mut self, id: RequestId, budget: Budget) -> Result<(), Fault> {
        if self.vocabulary.is_none() {
            let message = "this replica does not know its tokens' texts, and bounds no reasoning".to_owned();
            return Err(Fault::Refused(message));
        }
        self.answers.insert(id, Thinking::new(budget));
        Ok(())
    }

    /// The sequence is over.
    pub fn dismiss(&mut self, id: RequestId) {
        self.answers.remove(&id);
    }

    pub fn take(&mut self, id: RequestId, tokens: impl Iterator<Item = TokenId>) {
        if let Some(thinking) = self.answers.get_mut(&id) {
            for token in tokens {
                thinking.take(token, text_of(&self.vocabulary, token));
            }
        }
    }

    /// What must come next, and after each of the guesses.
    pub fn forced(&self, id: RequestId, guesses: &[TokenId]) -> Vec<Option<TokenId>> {
        let Some(thinking) = self.answers.get(&id) else {
            return vec![None; 1 + guesses.len()];
        };
        let mut thinking = thinking.clone();
        let mut forced = vec![thinking.forced()];
        for &guess in guesses {
            thinking.take(guess, text_of(&self.vocabulary, guess));
            forced.push(thinking.forced());
        }
        forced
    }
}

/// A padded model can say tokens without any.
fn text_of(vocabulary: &Option<Arc<Vocabulary>>, token: TokenId) -> &[u8] {
    let known = vocabulary
        .as_ref()
        .and_then(|known| known.tokens.get(token as usize));
    known.map_or(&[], Vec::as_slice)
}
