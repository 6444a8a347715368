//! Answers that are messages on channels, as gpt-oss writes them (openai/harmony's docs/format.md):
//! `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>`.

use std::sync::Arc;

use super::json::beginning;
use super::reader::Deltas;
use super::thoughts::Thoughts;
use super::{Reading, Syntax, Tool};

pub(super) const MARKS: [&str; 7] = [
    START,
    "<|end|>",
    "<|return|>",
    "<|call|>",
    CHANNEL,
    MESSAGE,
    "<|constrain|>",
];
const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
const FUNCTIONS: &str = "functions.";
/// Of a header: role, channel, recipient, type. What is longer is none.
const MAX_HEADER_BYTES: usize = 512;

pub(super) struct Channels {
    tools: Arc<[Tool]>,
    reads_calls: bool,
    reads_reasoning: bool,
    at: At,
    /// Characters that were read.
    place: usize,
    pub thoughts: Thoughts,
    n_calls: usize,
    has_reasoning: bool,
    has_content: bool,
}

enum At {
    /// Before a message's text. The prompt ends within the first header.
    Header(String),
    Message {
        kind: Kind,
        held: String,
        is_empty: bool,
    },
}

#[derive(Clone, Copy)]
enum Kind {
    Reasoning,
    Content,
    /// The call with this index.
    Call(usize),
}

impl Channels {
    pub fn new(reading: Reading, tools: Arc<[Tool]>) -> Channels {
        let is_channels = |syntax: &Syntax| matches!(syntax, Syntax::Channels);
        Channels {
            tools,
            reads_calls: reading.tools.is_some_and(|format| is_channels(&format.syntax)),
            reads_reasoning: reading.reasoning.is_some(),
            at: At::Header(String::new()),
            place: 0,
            thoughts: Thoughts::default(),
            n_calls: 0,
            has_reasoning: false,
            has_content: false,
        }
    }

    pub fn push(&mut self, text: &str, delta: &mut Deltas) {
        for c in text.chars() {
            self.place += 1;
            self.take(c, delta);
        }
        let held = match &self.at {
            At::Header(_) => 0,
            At::Message { held, .. } => held.chars().count(),
        };
        self.thoughts.count(self.place - held);
    }

    fn take(&mut self, c: char, delta: &mut Deltas) {
        match &mut self.at {
            At::Header(text) => {
                text.push(c);
                if text.ends_with(START) {
                    text.clear();
                } else if let Some(header) = text.strip_suffix(MESSAGE) {
                    let header = header.to_owned();
                    self.begin(&header, delta);
                } else if text.len() > MAX_HEADER_BYTES {
                    let text = std::mem::take(text);
                    self.at = At::Message {
                        kind: Kind::Content,
                        held: String::new(),
                        is_empty: true,
                    };
                    self.show(&text, delta);
                } else if let Some(text) = ends(text) {
                    let text = text.to_owned();
                    self.drop_header(&text, delta);
                }
            }
            At::Message { held, .. } => {
                held.push(c);
                let mark = MARKS.iter().find(|mark| held.ends_with(**mark));
                let free = match mark {
                    Some(mark) => held.len() - mark.len(),
                    None => beginning(held, &MARKS),
                };
                let rest = held.split_off(free);
                let free = std::mem::replace(held, rest);
                self.show(&free, delta);
                match mark {
                    None => {}
                    Some(&(MESSAGE | "<|constrain|>")) => {
                        if let At::Message { held, .. } = &mut self.at {
                            held.clear();
                        }
                    }
                    Some(&mark) => {
                        self.thoughts.close(self.place - mark.chars().count());
                        self.end(delta);
                        self.at = At::Header(match mark {
                            CHANNEL => CHANNEL.to_owned(),
                            _ => String::new(),
                        });
                    }
                }
            }
        }
    }

    pub fn finish(&mut self, delta: &mut Deltas) {
        match &mut self.at {
            At::Header(text) => {
                let text = std::mem::take(text);
                self.drop_header(&text, delta);
            }
            At::Message { held, .. } => {
                let held = std::mem::take(held);
                self.show(&held, delta);
            }
        }
    }

    fn begin(&mut self, header: &str, delta: &mut Deltas) {
        let word_behind = |mark: &str| {
            let rest = header.split_once(mark)?.1.trim_start();
            let end = rest
                .find(|c: char| c.is_whitespace() || c == '<')
                .unwrap_or(rest.len());
            Some(&rest[..end])
        };
        let recipient = word_behind("to=").unwrap_or_default();
        let is_known = |name: &str| self.tools.iter().any(|tool| tool.name == name);
        let name = match recipient.strip_prefix(FUNCTIONS) {
            Some(name) => Some(name),
            None => Some(recipient).filter(|name| is_known(name)),
        };
        let kind = match name {
            Some(name) if self.reads_calls => {
                delta.begin(self.n_calls, name.to_owned());
                self.n_calls += 1;
                Kind::Call(self.n_calls - 1)
            }
            _ if self.reads_reasoning && word_behind(CHANNEL) == Some("analysis") => {
                self.thoughts.open(self.place);
                Kind::Reasoning
            }
            _ => Kind::Content,
        };
        self.at = At::Message {
            kind,
            held: String::new(),
            is_empty: true,
        };
    }

    /// A header without a message. Text without any mark is what a model says that knows of no channels.
    fn drop_header(&mut self, text: &str, delta: &mut Deltas) {
        self.at = At::Message {
            kind: Kind::Content,
            held: String::new(),
            is_empty: true,
        };
        if !MARKS.iter().any(|mark| text.contains(mark)) {
            self.show(text, delta);
        }
        self.at = At::Header(String::new());
    }

    fn end(&mut self, delta: &mut Deltas) {
        if let At::Message {
            kind: Kind::Call(index),
            is_empty: true,
            ..
        } = self.at
        {
            delta.argue(index, "{}");
        }
    }

    fn show(&mut self, text: &str, delta: &mut Deltas) {
        let At::Message { kind, is_empty, .. } = &mut self.at else {
            return;
        };
        let text = match (*kind, *is_empty) {
            (Kind::Call(_), true) => text.trim_start(),
            _ => text,
        };
        if text.is_empty() {
            return;
        }
        let is_first = std::mem::replace(is_empty, false);
        match *kind {
            Kind::Call(index) => delta.argue(index, text),
            Kind::Reasoning => {
                if is_first && std::mem::replace(&mut self.has_reasoning, true) {
                    delta.think("\n");
                }
                delta.think(text);
            }
            Kind::Content => {
                if is_first && std::mem::replace(&mut self.has_content, true) {
                    delta.say("\n");
                }
                delta.say(text);
            }
        }
    }
}

/// The text before a mark that ends a message.
fn ends(header: &str) -> Option<&str> {
    ["<|end|>", "<|return|>", "<|call|>"]
        .into_iter()
        .find_map(|mark| header.strip_suffix(mark))
}
