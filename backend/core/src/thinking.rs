//! A bound on reasoning: when an answer has reasoned for so many tokens, what ends its reasoning is what it says next. Marks
//! are found in the text of the answer, because a model spells them as it likes. Not here: which marks a model has (router).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::TokenId;

/// Marks of one kind at most, bytes of one mark, and tokens that say one.
pub const MAX_MARKS: usize = 16;
pub const MAX_MARK_BYTES: usize = 256;
/// An answer that reasons at its beginning alone has what opens it there: no more bytes stand before it.
const MAX_BYTES_BEFORE: usize = 16;

/// As it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Tokens of reasoning at most. Those of its marks are not counted.
    pub tokens: u32,
    /// What opens reasoning: one of these.
    pub opens: Vec<String>,
    /// What ends it: one of these.
    pub ends: Vec<String>,
    /// One of the ends, as it is said when the budget is used up.
    pub end: Vec<TokenId>,
    /// The prompt opened it.
    pub is_opened: bool,
    /// Reasoning can be anywhere in an answer, not at its beginning alone.
    pub is_anywhere: bool,
}

/// Where an answer stands in its budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thinking {
    budget: Arc<Budget>,
    left: u32,
    is_open: bool,
    /// At the beginning of the answer.
    may_open: bool,
    /// Tokens of the end that were said for that reason.
    closing: usize,
    /// The last of the answer's text behind the last mark.
    text: Vec<u8>,
    /// Bytes of the answer before it.
    before: usize,
}

impl Budget {
    /// Why it is none.
    pub fn check(&self) -> Result<(), String> {
        let Budget { opens, ends, end, .. } = self;
        for marks in [opens, ends] {
            let is_text = |mark: &String| (1..=MAX_MARK_BYTES).contains(&mark.len());
            if marks.len() > MAX_MARKS || !marks.iter().all(is_text) {
                return Err(format!(
                    "marks of reasoning have 1 to {MAX_MARK_BYTES} bytes, and are {MAX_MARKS} at most"
                ));
            }
        }
        match end.len() {
            1..=MAX_MARK_BYTES => Ok(()),
            n => Err(format!(
                "what ends reasoning has 1 to {MAX_MARK_BYTES} tokens, got {n}"
            )),
        }
    }
}

impl Thinking {
    pub fn new(budget: Budget) -> Thinking {
        Thinking {
            left: budget.tokens,
            is_open: budget.is_opened,
            may_open: !budget.is_opened,
            closing: 0,
            text: vec![],
            before: 0,
            budget: Arc::new(budget),
        }
    }

    /// The token that must come next.
    pub fn forced(&self) -> Option<TokenId> {
        (self.is_open && self.left == 0).then(|| self.budget.end[self.closing])
    }

    /// The answer's next token, and its text.
    pub fn take(&mut self, token: TokenId, text: &[u8]) {
        self.closing = match self.forced() == Some(token) {
            true => self.closing + 1,
            false => 0,
        };
        let is_said = self.closing == self.budget.end.len();
        self.text.extend(text);
        let budget = self.budget.clone();
        let Budget {
            opens,
            ends,
            is_anywhere,
            ..
        } = &*budget;
        let marks = match self.is_open {
            true => ends,
            false => opens,
        };
        let found = marks.iter().filter_map(|mark| find(&self.text, mark.as_bytes()));
        match (found.min_by_key(|mark| mark.end), self.is_open) {
            (Some(mark), true) => self.pass(mark.end, false),
            (None, true) if is_said => self.pass(self.text.len(), false),
            (Some(mark), false) => {
                let is_first = self.before + mark.start <= MAX_BYTES_BEFORE;
                let opens = *is_anywhere || is_first && self.may_open;
                self.may_open &= !opens;
                self.pass(mark.end, opens);
            }
            (None, is_open) => {
                let longest = opens.iter().chain(ends).map(String::len).max().unwrap_or(0);
                self.pass(self.text.len().saturating_sub(longest), is_open);
                if is_open {
                    self.left = self.left.saturating_sub(1);
                }
            }
        }
    }

    fn pass(&mut self, bytes: usize, is_open: bool) {
        self.text.drain(..bytes);
        self.before += bytes;
        if self.is_open != is_open {
            self.closing = 0;
        }
        self.is_open = is_open;
    }
}

fn find(text: &[u8], mark: &[u8]) -> Option<std::ops::Range<usize>> {
    let start = text.windows(mark.len()).position(|window| window == mark)?;
    Some(start..start + mark.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token for each of these letters, and some of more.
    const WORDS: [&str; 8] = ["<", "/", ">", "t", "a", "b", "</t>", "t>b"];

    fn tokens_of(words: &str) -> Vec<TokenId> {
        let token = |word| WORDS.iter().position(|one| *one == word).expect("a word") as TokenId;
        words.split_whitespace().map(token).collect()
    }

    /// What an answer becomes whose model wants to say this, and then `b`.
    fn said(budget: &Budget, wants: &str, n: usize) -> String {
        let mut thinking = Thinking::new(budget.clone());
        let mut wants = tokens_of(wants).into_iter().chain(std::iter::repeat(5));
        let next = |_| {
            let token = thinking.forced().or_else(|| wants.next()).expect("there is more");
            let word = WORDS[token as usize];
            thinking.take(token, word.as_bytes());
            word
        };
        (0..n).map(next).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn reasoning_ends_with_its_budget() {
        let budget = |tokens, is_opened, is_anywhere| Budget {
            tokens,
            opens: vec!["<t>".to_owned(), "<<".to_owned()],
            ends: vec!["</t>".to_owned(), "//".to_owned()],
            end: vec![6],
            is_opened,
            is_anywhere,
        };
        let spelled = |tokens| Budget {
            end: tokens_of("< / t >"),
            ..budget(tokens, true, false)
        };
        for (budget, wants, expected) in [
            // Opened by the prompt, by several tokens, by others; and not at all.
            (budget(2, true, false), "a a a", "a a </t> a b"),
            (budget(2, false, false), "< t > a b a", "< t > a b </t> a"),
            (budget(1, false, false), "a < t > a b", "a < t > a </t> b"),
            (budget(1, false, false), "< < a a", "< < a </t> a"),
            (budget(1, false, false), "a a a", "a a a b b b"),
            (budget(0, true, false), "a", "</t> a b"),
            (spelled(1), "a a", "a < / t > a b"),
            // It ended by itself, however it was spelled, and does not open again.
            (
                budget(9, true, false),
                "a < / t>b < t > a",
                "a < / t>b < t > a b b b b b b b b b b",
            ),
            (budget(3, true, false), "a / / a a a a", "a / / a a a a b"),
            // All of what opens together.
            (
                budget(2, false, true),
                "< t > a </t> b < t > a a",
                "< t > a </t> b < t > a </t> a",
            ),
        ] {
            let n = expected.split_whitespace().count();
            assert_eq!(said(&budget, wants, n), expected, "{budget:?} {wants}");
        }
        // Too late.
        let late = "a ".repeat(MAX_BYTES_BEFORE + 1) + "< t > a a a";
        assert_eq!(said(&budget(1, false, false), &late, MAX_BYTES_BEFORE + 7), late);
        for wrong in [
            Budget {
                end: vec![],
                ..budget(1, true, true)
            },
            Budget {
                opens: vec![String::new()],
                ..budget(1, true, true)
            },
        ] {
            wrong.check().unwrap_err();
        }
        budget(1, true, true).check().unwrap();
    }
}
