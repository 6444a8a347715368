//! Takes an answer apart while it is written: reasoning, content, tool calls. It goes character by character, so the deltas
//! join to the same whatever the pieces were. Only what may be the beginning of a marker, or may turn out to be no call,
//! is held back.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use super::call::{Calls, Taken};
use super::{Layout, Syntax, Tool, ToolFormat};
use crate::reasoning::ReasoningFormat;
use crate::tokenizer::Tokenizer;

/// How an answer is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// `None`: calls are content (a request without tools, or with `tool_choice: none`).
    pub tools: Option<&'static ToolFormat>,
    pub reasoning: Option<&'static ReasoningFormat>,
    /// The prompt ended within reasoning.
    pub is_opened: bool,
}

impl Reading {
    /// Special tokens that the text must show (`TextStream::showing`), or what they mark is not seen.
    pub fn shown(&self, tokenizer: &Tokenizer) -> BTreeSet<u32> {
        let mut markers = self.tools.map(ToolFormat::markers).unwrap_or_default();
        markers.extend(
            self.reasoning
                .into_iter()
                .flat_map(|format| [format.open, format.close]),
        );
        let tokens = tokenizer.special_tokens().into_iter();
        let marks = tokens.filter(|(text, _)| markers.iter().any(|marker| marker.contains(text.as_str())));
        marks.map(|(_, id)| id).collect()
    }
}

/// What a piece of text added.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    pub reasoning: String,
    pub content: String,
    pub calls: Vec<CallDelta>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct CallDelta {
    /// Of the call among all of the answer.
    pub index: usize,
    /// At the beginning of a call, and only there.
    pub name: Option<String>,
    /// What follows of the arguments, which are JSON where the model writes what it should.
    pub arguments: String,
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty() && self.calls.is_empty()
    }

    pub(super) fn begin(&mut self, index: usize, name: String) {
        self.calls.push(CallDelta {
            index,
            name: Some(name),
            arguments: String::new(),
        });
    }

    pub(super) fn argue(&mut self, index: usize, text: &str) {
        match self.calls.last_mut().filter(|call| call.index == index) {
            _ if text.is_empty() => {}
            Some(call) => call.arguments.push_str(text),
            None => self.calls.push(CallDelta {
                index,
                name: None,
                arguments: text.to_owned(),
            }),
        }
    }
}

/// Of one choice. Stands behind detokenisation and stop strings.
pub struct Reader {
    reading: Reading,
    tools: Arc<[Tool]>,
    state: State,
    /// To be read before what comes next.
    input: VecDeque<char>,
    /// Not given out yet: a marker may begin in it.
    held: String,
    /// White space behind content. Before a call it is the format's, not the content's.
    blank: String,
    /// Calls without an opening can begin here: nothing but white space stood before.
    is_start: bool,
    /// Ends calls of which something was no call.
    closing: Option<&'static str>,
    /// What was last given out is a call.
    is_behind_call: bool,
    n_calls: usize,
}

enum State {
    /// Where reasoning may open.
    Start,
    Reasoning,
    Content,
    Calls(Box<Attempt>),
}

/// To read calls.
struct Attempt {
    calls: Calls,
    /// The opening was this layout's; those behind it may have the same one.
    layout: usize,
}

impl Reader {
    pub fn new(reading: Reading, tools: Arc<[Tool]>) -> Reader {
        let state = match reading.reasoning {
            Some(format) if reading.is_opened || format.always => State::Reasoning,
            Some(_) => State::Start,
            None => State::Content,
        };
        Reader {
            reading,
            tools,
            state,
            input: VecDeque::new(),
            held: String::new(),
            blank: String::new(),
            is_start: true,
            closing: None,
            is_behind_call: false,
            n_calls: 0,
        }
    }

    pub fn push(&mut self, text: &str) -> Delta {
        let mut delta = Delta::default();
        self.input.extend(text.chars());
        self.read(&mut delta);
        delta
    }

    /// At the end of the answer: what was held back. Push no more.
    pub fn finish(&mut self) -> Delta {
        let mut delta = Delta::default();
        while let State::Calls(attempt) = &mut self.state {
            attempt.calls.finish();
            self.end_attempt(&mut delta);
            self.read(&mut delta);
        }
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Reasoning => delta.reasoning.push_str(&held),
            _ => self.show(&held, &mut delta),
        }
        if !self.is_behind_call {
            delta.content.push_str(&std::mem::take(&mut self.blank));
        }
        delta
    }

    fn read(&mut self, delta: &mut Delta) {
        while let Some(c) = self.input.pop_front() {
            match &mut self.state {
                State::Start => self.take_start(c),
                State::Reasoning => self.take_reasoning(c, delta),
                State::Content => self.take_content(c, delta),
                State::Calls(_) => self.take_call(c, delta),
            }
        }
    }

    fn unread(&mut self, text: &str) {
        for c in text.chars().rev() {
            self.input.push_front(c);
        }
    }

    fn take_start(&mut self, c: char) {
        let open = self.reading.reasoning.map_or("", |format| format.open);
        self.held.push(c);
        let begun = self.held.trim_start();
        if begun == open {
            self.held.clear();
            self.state = State::Reasoning;
        } else if !open.starts_with(begun) {
            self.state = State::Content;
            let held = std::mem::take(&mut self.held);
            self.unread(&held);
        }
    }

    fn take_reasoning(&mut self, c: char, delta: &mut Delta) {
        let close = self.reading.reasoning.map_or("", |format| format.close);
        self.held.push(c);
        if self.held.ends_with(close) {
            self.held.truncate(self.held.len() - close.len());
            self.state = State::Content;
        }
        delta.reasoning.push_str(&self.free(&[close]));
    }

    fn take_content(&mut self, c: char, delta: &mut Delta) {
        if self.is_start && !c.is_whitespace() {
            self.is_start = false;
            if let Some(layout) = self.layouts().iter().position(|layout| layout.open.is_empty()) {
                self.attempt(layout);
                return self.input.push_front(c);
            }
        }
        self.held.push(c);
        let layouts = self.layouts().iter().map(|layout| layout.open);
        let markers: Vec<&str> = layouts
            .chain(self.closing)
            .filter(|marker| !marker.is_empty())
            .collect();
        let Some(marker) = markers.iter().find(|marker| self.held.ends_with(**marker)) else {
            let free = self.free(&markers);
            return self.show(&free, delta);
        };
        let before = self.held[..self.held.len() - marker.len()].to_owned();
        self.held.clear();
        self.show(&before, delta);
        match self.layouts().iter().position(|layout| layout.open == *marker) {
            Some(layout) => self.attempt(layout),
            None => self.closing = None,
        }
    }

    fn take_call(&mut self, c: char, delta: &mut Delta) {
        let State::Calls(attempt) = &mut self.state else {
            return;
        };
        let calls = &mut attempt.calls;
        match calls.take(c, delta) {
            Taken::More => {}
            Taken::Done => {
                calls.finish();
                self.end_attempt(delta);
                self.closing = None;
            }
            Taken::Before | Taken::Failed => self.end_attempt(delta),
        }
    }

    fn layouts(&self) -> &'static [Layout] {
        match self.reading.tools.map(|format| &format.syntax) {
            Some(Syntax::Layouts(layouts)) => layouts,
            None => &[],
        }
    }

    fn attempt(&mut self, layout: usize) {
        let calls = Calls::new(&self.layouts()[layout], self.tools.clone(), self.n_calls);
        self.state = State::Calls(Box::new(Attempt { calls, layout }));
    }

    /// What is no call is read again: by another layout, or as content.
    fn end_attempt(&mut self, delta: &mut Delta) {
        let State::Calls(attempt) = std::mem::replace(&mut self.state, State::Content) else {
            return;
        };
        let Attempt { calls, layout } = *attempt;
        let (n_calls, end) = (calls.n_calls(), calls.end());
        self.unread(&calls.into_pending());
        if n_calls > self.n_calls {
            self.n_calls = n_calls;
            self.closing = Some(end);
            self.is_behind_call = true;
            self.blank.clear();
            return;
        }
        let open = self.layouts()[layout].open;
        let others = &self.layouts()[layout + 1..];
        match others.iter().position(|other| other.open == open) {
            Some(other) => self.attempt(layout + 1 + other),
            None => self.show(open, delta),
        }
    }

    /// Takes from what is held what no marker begins in.
    fn free(&mut self, markers: &[&str]) -> String {
        let begins =
            |&(at, _): &(usize, char)| markers.iter().any(|marker| marker.starts_with(&self.held[at..]));
        let at = self
            .held
            .char_indices()
            .find(begins)
            .map_or(self.held.len(), |(at, _)| at);
        let rest = self.held.split_off(at);
        std::mem::replace(&mut self.held, rest)
    }

    fn show(&mut self, text: &str, delta: &mut Delta) {
        let shown = match self.layouts().is_empty() {
            true => text.len(),
            false => text.trim_end().len(),
        };
        if shown > 0 {
            delta.content.push_str(&std::mem::take(&mut self.blank));
            delta.content.push_str(&text[..shown]);
            self.is_behind_call = false;
        }
        self.blank.push_str(&text[shown..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_apart() {
        let reading = Reading {
            tools: ToolFormat::named("hermes"),
            reasoning: ReasoningFormat::named("qwen3"),
            is_opened: false,
        };
        let text = "<think>\nhm</think>Look:\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"</tool_call>\"}}\n\
                    </tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
        let mut reader = Reader::new(reading, Arc::new([]));
        let all = reader.push(text);
        assert_eq!(reader.finish(), Delta::default());
        assert_eq!((all.reasoning.as_str(), all.content.as_str()), ("\nhm", "Look:"));
        let call = |index, name: &str, arguments: &str| CallDelta {
            index,
            name: Some(name.to_owned()),
            arguments: arguments.to_owned(),
        };
        assert_eq!(
            all.calls,
            [call(0, "f", r#"{"a": "</tool_call>"}"#), call(1, "g", "{}")]
        );
    }
}
