//! What models write for tool calls: each format is a row of a table (`formats`) of which reading (`reader`) and binding
//! (`grammar`) are made. Not here: requests and answers as clients write them (server), how a template shows tools (`chat`).

mod call;
mod channels;
mod formats;
mod grammar;
mod json;
mod literal;
mod object;
mod reader;
mod tagged;
#[cfg(test)]
mod tests;
mod thoughts;
mod value;

use std::collections::BTreeSet;

use serde_json::Value as Json;

use crate::reasoning::ReasoningFormat;
use crate::tokenizer::Tokenizer;

pub use formats::FORMATS;
pub use grammar::{Choice, bind, bind_form};
pub use reader::{CallDelta, Delta, Reader};

/// A function that a request offers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// A JSON Schema of an object. `None`: the function takes nothing that is known.
    pub parameters: Option<Json>,
    pub strict: bool,
    /// As the client wrote it, for the template: `{"type": "function", "function": {...}}`.
    pub given: Json,
}

/// How an answer is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// `None`: calls are content (a request without tools, or with `tool_choice: none`).
    pub tools: Option<&'static ToolFormat>,
    pub reasoning: Option<&'static ReasoningFormat>,
    /// The answer goes on with reasoning that the prompt opened.
    pub is_opened: bool,
}

/// How a family of models writes calls.
#[derive(Debug)]
pub struct ToolFormat {
    /// vLLM's `--tool-call-parser`; the first is ours.
    pub names: &'static [&'static str],
    /// Texts of a chat template that show the format: all of one of these groups.
    pub shows: &'static [&'static [&'static str]],
    pub syntax: Syntax,
}

#[derive(Debug)]
pub enum Syntax {
    /// Ways to write calls in the midst of other text. They are tried in this order; the first is how the model's template
    /// writes them, and what calls are bound to.
    Layouts {
        layouts: &'static [Layout],
        /// Texts around content that are no part of it.
        around: &'static [&'static str],
    },
    /// All of an answer is messages on channels (gpt-oss).
    Channels,
}

/// `open begin call (separator call)* end`, or `open begin call end (separator open begin call end)*`. White space between these is taken as it comes, and written as it stands here.
#[derive(Debug)]
pub struct Layout {
    /// A text that only calls begin with. Empty: the answer itself begins with the call, and it is one only if a tool has
    /// its name.
    pub open: &'static str,
    pub begin: &'static str,
    pub call: &'static [Piece],
    pub separator: Separator,
    pub end: &'static str,
}

#[derive(Clone, Copy, Debug)]
pub enum Separator {
    /// Between calls behind one opening.
    Within(&'static str),
    /// Each call has an opening and an end of its own, with this between them.
    Between(&'static str),
}

#[derive(Debug)]
pub enum Piece {
    Text(&'static str),
    /// The tool's.
    Name,
    /// What the format writes and nobody needs: letters and digits by this regular expression.
    Id(&'static str),
    /// The arguments, a JSON object.
    Arguments,
    /// A JSON object with the tool's name and the arguments under one of these keys, the first of which is the model's own.
    Object {
        name: &'static [&'static str],
        arguments: &'static [&'static str],
    },
    /// `open key middle value close` for each argument, then `end`. Strings stand there as they are.
    Tagged {
        open: &'static str,
        middle: &'static str,
        close: &'static str,
        end: &'static str,
    },
    /// `(key=value, ...)`, values as Python or JSON writes them.
    Python,
    /// `{key:value,...}`, strings between two of this mark.
    Marked(&'static str),
}

impl ToolFormat {
    /// By a name of `--tool-call-parser`. Some have several formats: `shown_in` tells which it is.
    pub fn named(name: &str) -> Option<&'static ToolFormat> {
        FORMATS.iter().find(|format| format.names.contains(&name))
    }

    /// Of the formats with the same name the one that a chat template shows, or else this one.
    pub fn shown_in(&'static self, template: &str) -> &'static ToolFormat {
        let mut same = FORMATS.iter().filter(|format| format.names[0] == self.names[0]);
        same.find(|format| format.is_shown_by(template)).unwrap_or(self)
    }

    /// The format that a chat template shows.
    pub fn of_template(template: &str) -> Option<&'static ToolFormat> {
        FORMATS.iter().find(|format| format.is_shown_by(template))
    }

    /// What `named` knows.
    pub fn all_names() -> Vec<&'static str> {
        let names = FORMATS.iter().flat_map(|format| format.names).copied();
        names.collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn is_shown_by(&self, template: &str) -> bool {
        let all = |texts: &&[&str]| texts.iter().all(|text| template.contains(text));
        self.shows.iter().any(all)
    }

    fn layouts(&self) -> &'static [Layout] {
        match self.syntax {
            Syntax::Layouts { layouts, .. } => layouts,
            Syntax::Channels => &[],
        }
    }

    fn around(&self) -> &'static [&'static str] {
        match self.syntax {
            Syntax::Layouts { around, .. } => around,
            Syntax::Channels => &[],
        }
    }
}

impl Layout {
    /// What ends calls of which something was no call.
    fn closing(&self) -> &'static str {
        match (self.end.trim(), self.call.last()) {
            ("", Some(Piece::Tagged { end, .. })) => end.trim(),
            (end, _) => end,
        }
    }

    fn texts(&self) -> Vec<&'static str> {
        let mut texts = vec![self.open, self.begin, self.end];
        if let Separator::Within(text) = self.separator {
            texts.push(text);
        }
        for piece in self.call {
            match piece {
                Piece::Text(text) | Piece::Marked(text) => texts.push(text),
                Piece::Tagged {
                    open,
                    middle,
                    close,
                    end,
                } => texts.extend([open, middle, close, end]),
                Piece::Name | Piece::Id(_) | Piece::Arguments | Piece::Object { .. } | Piece::Python => {}
            }
        }
        texts
    }
}

/// What stands around reasoning.
pub struct Marks {
    pub opens: Vec<&'static str>,
    /// The first is how the model's template writes it.
    pub ends: Vec<&'static str>,
    /// Reasoning can be anywhere in an answer, not at its beginning alone.
    pub are_anywhere: bool,
}

impl Reading {
    /// `None`: it has no reasoning.
    pub fn marks(&self) -> Option<Marks> {
        let format = self.reasoning?;
        let mut ends = format.close.to_vec();
        if format.ends_with_call {
            let layouts = self.tools.map_or(&[][..], ToolFormat::layouts);
            ends.extend(
                layouts
                    .iter()
                    .map(|layout| layout.open)
                    .filter(|open| !open.is_empty()),
            );
        }
        Some(Marks {
            opens: format.open.to_vec(),
            ends,
            are_anywhere: format.has_channels,
        })
    }

    /// Special tokens that the text must show (`TextStream::showing`), or what they mark is not seen. It looks at the whole
    /// vocabulary.
    pub fn shown(&self, tokenizer: &Tokenizer) -> BTreeSet<u32> {
        let mut marks: Vec<&str> = vec![];
        if let Some(format) = self.tools {
            marks.extend(format.layouts().iter().flat_map(Layout::texts));
            marks.extend(format.around());
        }
        if let Some(format) = self.reasoning {
            marks.extend(format.open.iter().chain(format.close));
        }
        if self.has_channels() {
            marks.extend(channels::MARKS);
        }
        let tokens = tokenizer.special_tokens().into_iter();
        let shown = tokens.filter(|(text, _)| marks.iter().any(|mark| mark.contains(text.as_str())));
        shown.map(|(_, id)| id).collect()
    }

    fn has_channels(&self) -> bool {
        let tools = self
            .tools
            .is_some_and(|format| matches!(format.syntax, Syntax::Channels));
        tools || self.reasoning.is_some_and(|format| format.has_channels)
    }
}
