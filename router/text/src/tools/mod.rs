//! What models write for tool calls: each format is a row of a table (`formats`) of which reading (`reader`) and binding
//! (`grammar`) are made. Not here: requests and answers as clients write them (server), how a template shows tools (`chat`).

mod call;
mod formats;
mod grammar;
mod json;
mod reader;

use serde_json::Value as Json;

pub use formats::FORMATS;
pub use grammar::{Choice, bind};
pub use reader::{CallDelta, Delta, Reader, Reading};

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

/// How a family of models writes calls.
#[derive(Debug)]
pub struct ToolFormat {
    /// vLLM's `--tool-call-parser`; the first is ours.
    pub names: &'static [&'static str],
    /// Texts of a chat template that show the format: one of them is enough.
    pub shows: &'static [&'static str],
    pub syntax: Syntax,
}

#[derive(Debug)]
pub enum Syntax {
    /// Ways to write calls. They are tried in this order; the first is how the model's template writes them.
    Layouts(&'static [Layout]),
}

/// `open begin call (separator call)* end`, in the midst of other text. White space between these is taken as it comes, and
/// written as it stands here.
#[derive(Debug)]
pub struct Layout {
    /// A text that only calls begin with. Empty: the answer itself begins with the call, and it is one only if a tool has
    /// its name.
    pub open: &'static str,
    pub begin: &'static str,
    pub call: &'static [Piece],
    /// Between calls. `None`: there is one.
    pub separator: Option<&'static str>,
    pub end: &'static str,
}

#[derive(Debug)]
pub enum Piece {
    Text(&'static str),
    Name,
    /// The arguments as JSON.
    Arguments,
    /// A JSON object with the tool's name and the arguments under one of these keys, the first of which is the model's own.
    Object {
        name: &'static [&'static str],
        arguments: &'static [&'static str],
    },
}

impl ToolFormat {
    /// By a name of `--tool-call-parser`.
    pub fn named(name: &str) -> Option<&'static ToolFormat> {
        FORMATS.iter().find(|format| format.names.contains(&name))
    }

    /// The format that a chat template shows.
    pub fn of_template(template: &str) -> Option<&'static ToolFormat> {
        let shown = |format: &&ToolFormat| format.shows.iter().any(|text| template.contains(text));
        FORMATS.iter().find(shown)
    }

    /// What `named` knows.
    pub fn all_names() -> Vec<&'static str> {
        FORMATS.iter().flat_map(|format| format.names).copied().collect()
    }

    /// Texts that may be special tokens, which decoding hides, and that the reader must see.
    pub fn markers(&self) -> Vec<&'static str> {
        let Syntax::Layouts(layouts) = &self.syntax;
        let mut markers = vec![];
        for layout in *layouts {
            let texts = layout.call.iter().filter_map(|piece| match piece {
                Piece::Text(text) => Some(*text),
                _ => None,
            });
            let texts = texts.chain([layout.open, layout.begin, layout.end]);
            markers.extend(
                texts
                    .chain(layout.separator)
                    .filter(|text| !text.trim().is_empty()),
            );
        }
        markers
    }
}
