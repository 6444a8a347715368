//! Counts the tokens of an answer that are reasoning, as vLLM does (its parsers' `count_reasoning_tokens`): those between the
//! marks of reasoning, and not the marks' own. Tokens and what is read of their text are told apart, so the count is the same
//! whatever the pieces were. Not here: where reasoning begins and ends (`reader`, `channels`).

use std::collections::VecDeque;
use std::ops::Range;

/// Places are characters from the answer's beginning.
#[derive(Debug, Default)]
pub(super) struct Thoughts {
    /// Reasoning that may still have tokens to count.
    spans: VecDeque<Range<usize>>,
    /// Where reasoning began that goes on.
    open: Option<usize>,
    /// Where each of the tokens ends that were not judged yet, and where the first of them begins.
    ends: VecDeque<usize>,
    begin: usize,
    /// Where the last token ends.
    end: usize,
    tokens: u32,
}

impl Thoughts {
    pub fn open(&mut self, at: usize) {
        self.open = Some(at);
    }

    pub fn close(&mut self, at: usize) {
        let span = self.open.take().map(|begin| begin..at);
        self.spans.extend(span.filter(|span| !span.is_empty()));
    }

    /// The answer's next token adds so many characters to its text.
    pub fn token(&mut self, chars: usize) {
        self.end += chars;
        self.ends.push_back(self.end);
    }

    /// Judges the tokens before `settled`: of what stands there it is known whether it is reasoning. A token with a part of
    /// it is; one without a character (a part of one, what is not shown) is what the next character is.
    pub fn count(&mut self, settled: usize) {
        while let Some(&end) = self.ends.front() {
            let token = self.begin..end.max(self.begin + 1);
            if token.end > settled {
                return;
            }
            while self.spans.front().is_some_and(|span| span.end <= token.start) {
                self.spans.pop_front();
            }
            let is_in_span = self.spans.front().is_some_and(|span| span.start < token.end);
            let is_in_open = self.open.is_some_and(|begin| begin < token.end);
            self.tokens += u32::from(is_in_span || is_in_open);
            self.ends.pop_front();
            self.begin = end;
        }
    }

    pub fn tokens(&self) -> u32 {
        self.tokens
    }
}
