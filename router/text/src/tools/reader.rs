//! Takes an answer apart while it is written: reasoning, content, tool calls. It goes character by character, so the deltas
//! join to the same whatever the pieces were. Only what may be the beginning of a marker, or may turn out to be no call,
//! is held back.

use std::collections::VecDeque;
use std::sync::Arc;

use super::call::{Calls, Taken};
use super::channels::Channels;
use super::json::beginning;
use super::thoughts::Thoughts;
use super::{Layout, Reading, Tool, ToolFormat};

/// Of what was taken for a call and is none: calls are looked for in that much of it. Who begins a call in a call in a call
/// would have all of it read again for each.
const MAX_READ_AGAIN_BYTES: usize = 1024;

/// What a piece of text added: reasoning, then content, then calls. What stands in another order is several of these.
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
}

/// In the order of the text.
#[derive(Default)]
pub(super) struct Deltas(Vec<Delta>);

impl Deltas {
    /// The one to add to. `may_follow`: what is added may stand behind all that is in it.
    fn last(&mut self, may_follow: impl Fn(&Delta) -> bool) -> &mut Delta {
        if !self.0.last().is_some_and(may_follow) {
            self.0.push(Delta::default());
        }
        self.0.last_mut().expect("just pushed")
    }

    pub fn think(&mut self, text: &str) {
        if !text.is_empty() {
            let follows = |delta: &Delta| delta.content.is_empty() && delta.calls.is_empty();
            self.last(follows).reasoning.push_str(text);
        }
    }

    pub fn say(&mut self, text: &str) {
        if !text.is_empty() {
            self.last(|delta| delta.calls.is_empty()).content.push_str(text);
        }
    }

    pub fn begin(&mut self, index: usize, name: String) {
        self.last(|_| true).calls.push(CallDelta {
            index,
            name: Some(name),
            arguments: String::new(),
        });
    }

    pub fn argue(&mut self, index: usize, text: &str) {
        if text.is_empty() {
            return;
        }
        let calls = &mut self.last(|_| true).calls;
        match calls.last_mut().filter(|call| call.index == index) {
            Some(call) => call.arguments.push_str(text),
            None => calls.push(CallDelta {
                index,
                name: None,
                arguments: text.to_owned(),
            }),
        }
    }
}

/// Of one choice. Stands behind detokenisation and stop strings.
pub struct Reader(Kind);

enum Kind {
    Texts(Box<Texts>),
    Channels(Channels),
}

/// Content with reasoning before it and calls in it.
struct Texts {
    reading: Reading,
    tools: Arc<[Tool]>,
    state: State,
    /// To be read before what comes next.
    input: VecDeque<char>,
    /// Characters that came in, read or not.
    pushed: usize,
    thoughts: Thoughts,
    /// Not given out yet: a mark may begin in it.
    held: String,
    is_reasoning: bool,
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
    Text,
    Calls(Box<Attempt>),
}

/// To read calls.
struct Attempt {
    calls: Calls,
    /// The opening was this layout's; those behind it may have the same one.
    layout: usize,
    /// Where the opening stands, in characters.
    begin: usize,
}

impl Reader {
    pub fn new(reading: Reading, tools: Arc<[Tool]>) -> Reader {
        Reader(match reading.has_channels() {
            true => Kind::Channels(Channels::new(reading, tools)),
            false => Kind::Texts(Box::new(Texts::new(reading, tools))),
        })
    }

    /// The answer has one more token, which adds so many characters to its text. They are pushed now or later.
    pub fn token(&mut self, chars: usize) {
        self.thoughts().token(chars);
    }

    /// In the order of the text.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        let mut delta = Deltas::default();
        match &mut self.0 {
            Kind::Texts(texts) => {
                texts.input.extend(text.chars());
                texts.pushed += text.chars().count();
                texts.read(&mut delta);
                texts.thoughts.count(texts.settled());
            }
            Kind::Channels(channels) => channels.push(text, &mut delta),
        }
        delta.0
    }

    /// At the end of the answer: what was held back. Push no more.
    pub fn finish(&mut self) -> Vec<Delta> {
        let mut delta = Deltas::default();
        match &mut self.0 {
            Kind::Texts(texts) => texts.finish(&mut delta),
            Kind::Channels(channels) => channels.finish(&mut delta),
        }
        // What has no text to follow stands where the answer ends.
        self.thoughts().count(usize::MAX);
        delta.0
    }

    /// How many of the tokens are known to be reasoning.
    pub fn reasoning_tokens(&mut self) -> u32 {
        self.thoughts().tokens()
    }

    fn thoughts(&mut self) -> &mut Thoughts {
        match &mut self.0 {
            Kind::Texts(texts) => &mut texts.thoughts,
            Kind::Channels(channels) => &mut channels.thoughts,
        }
    }
}

impl Texts {
    fn new(reading: Reading, tools: Arc<[Tool]>) -> Texts {
        let is_reasoning = reading.reasoning.is_some() && reading.is_opened;
        let mut thoughts = Thoughts::default();
        if is_reasoning {
            thoughts.open(0);
        }
        Texts {
            reading,
            tools,
            state: match reading.reasoning {
                Some(_) => State::Start,
                None => State::Text,
            },
            input: VecDeque::new(),
            pushed: 0,
            thoughts,
            held: String::new(),
            is_reasoning,
            blank: String::new(),
            is_start: true,
            closing: None,
            is_behind_call: false,
            n_calls: 0,
        }
    }

    fn read(&mut self, delta: &mut Deltas) {
        while let Some(c) = self.input.pop_front() {
            match &mut self.state {
                State::Start => self.take_start(c),
                State::Text => self.take_text(c, delta),
                State::Calls(attempt) => match attempt.calls.take(c, delta) {
                    Taken::More => {}
                    Taken::Done => {
                        attempt.calls.finish(delta);
                        self.end_attempt(delta);
                        self.closing = None;
                    }
                    Taken::Before | Taken::Failed => self.end_attempt(delta),
                },
            }
        }
    }

    fn finish(&mut self, delta: &mut Deltas) {
        loop {
            match &mut self.state {
                State::Text => break,
                State::Start => self.begin_text(),
                State::Calls(attempt) => {
                    attempt.calls.finish(delta);
                    self.end_attempt(delta);
                }
            }
            self.read(delta);
        }
        let held = std::mem::take(&mut self.held);
        self.show(&held, delta);
        if !self.is_behind_call {
            delta.say(&std::mem::take(&mut self.blank));
        }
    }

    /// Characters that were read.
    fn place(&self) -> usize {
        self.pushed - self.input.len()
    }

    /// Those of which is known what they are.
    fn settled(&self) -> usize {
        match &self.state {
            State::Calls(attempt) => attempt.begin,
            State::Start | State::Text => self.place() - self.held.chars().count(),
        }
    }

    fn unread(&mut self, text: &str) {
        text.chars().rev().for_each(|c| self.input.push_front(c));
    }

    fn take_start(&mut self, c: char) {
        let open = self.reading.reasoning.map_or(&[][..], |format| format.open);
        self.held.push(c);
        let begun = self.held.trim_start();
        if open.contains(&begun) {
            self.held.clear();
            self.is_reasoning = true;
            self.thoughts.open(self.place());
            self.state = State::Text;
        } else if !open.iter().any(|open| open.starts_with(begun)) {
            self.begin_text();
        }
    }

    /// Nothing opens reasoning.
    fn begin_text(&mut self) {
        self.state = State::Text;
        let held = std::mem::take(&mut self.held);
        self.unread(&held);
    }

    fn take_text(&mut self, c: char, delta: &mut Deltas) {
        if self.is_start && !self.is_reasoning && !c.is_whitespace() {
            self.is_start = false;
            if let Some(layout) = self.layouts().iter().position(|layout| layout.open.is_empty()) {
                self.input.push_front(c);
                return self.attempt(layout, self.place());
            }
        }
        let marks = self.marks();
        self.held.push(c);
        let Some(mark) = marks.iter().find(|mark| self.held.ends_with(**mark)) else {
            let free = beginning(&self.held, &marks);
            let rest = self.held.split_off(free);
            let free = std::mem::replace(&mut self.held, rest);
            return self.show(&free, delta);
        };
        self.held.truncate(self.held.len() - mark.len());
        let before = std::mem::take(&mut self.held);
        self.show(&before, delta);
        let closes = |mark| {
            self.reading
                .reasoning
                .is_some_and(|format| format.close.contains(mark))
        };
        let begin = self.place() - mark.chars().count();
        if self.is_reasoning && closes(mark) {
            self.is_reasoning = false;
            self.thoughts.close(begin);
        } else if let Some(layout) = self.layouts().iter().position(|layout| layout.open == *mark) {
            self.attempt(layout, begin);
        } else if self.closing == Some(mark) {
            self.closing = None;
        }
    }

    /// What may end the text here.
    fn marks(&self) -> Vec<&'static str> {
        let mut marks = vec![];
        let reasoning = self.reading.reasoning.filter(|_| self.is_reasoning);
        if let Some(format) = reasoning {
            marks.extend(format.close);
        } else {
            marks.extend(self.closing);
            marks.extend(self.reading.tools.map_or(&[][..], ToolFormat::around));
        }
        if reasoning.is_none_or(|format| format.ends_with_call) {
            marks.extend(self.layouts().iter().map(|layout| layout.open));
        }
        marks.retain(|mark| !mark.is_empty());
        marks
    }

    fn layouts(&self) -> &'static [Layout] {
        self.reading.tools.map_or(&[], ToolFormat::layouts)
    }

    fn attempt(&mut self, layout: usize, begin: usize) {
        let calls = Calls::new(&self.layouts()[layout], self.tools.clone(), self.n_calls);
        self.state = State::Calls(Box::new(Attempt { calls, layout, begin }));
    }

    /// What is no call is read again: by another layout, or as text.
    fn end_attempt(&mut self, delta: &mut Deltas) {
        let State::Calls(attempt) = std::mem::replace(&mut self.state, State::Text) else {
            return;
        };
        let Attempt { calls, layout, begin } = *attempt;
        let (n_calls, pending) = (calls.n_calls(), calls.into_pending());
        let Layout { open, .. } = self.layouts()[layout];
        if n_calls > self.n_calls {
            self.n_calls = n_calls;
            self.closing = Some(self.layouts()[layout].closing());
            self.is_behind_call = true;
            self.is_reasoning = false;
            self.thoughts.close(begin);
            self.blank.clear();
            return self.unread(&pending);
        }
        let others = &self.layouts()[layout + 1..];
        match others.iter().position(|other| other.open == open) {
            Some(other) => self.attempt(layout + 1 + other, begin),
            None => {
                self.show(open, delta);
                if pending.len() > MAX_READ_AGAIN_BYTES {
                    return self.show(&pending, delta);
                }
            }
        }
        self.unread(&pending);
    }

    fn show(&mut self, text: &str, delta: &mut Deltas) {
        if self.is_reasoning {
            return delta.think(text);
        }
        let shown = match self.layouts().is_empty() {
            true => text.len(),
            false => text.trim_end().len(),
        };
        if shown > 0 {
            delta.say(&std::mem::take(&mut self.blank));
            delta.say(&text[..shown]);
            self.is_behind_call = false;
        }
        self.blank.push_str(&text[shown..]);
    }
}
