//! Binds what a model writes to calls: its own format, with the tools' schemas inside. Made of the same table as reading.

use serde_json::{Value as Json, json};
use tandem_core::grammar::{Format, Tag};

use super::{Layout, Piece, Reading, Syntax, Tool, ToolFormat};

/// Which calls an answer must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice<'a> {
    /// One or more.
    Required,
    Named(&'a str),
}

/// What an answer of calls is. `reading` says what comes before: reasoning may.
pub fn bind(reading: Reading, tools: &[Tool], choice: Choice, parallel: bool) -> Option<Format> {
    let format: &ToolFormat = reading.tools?;
    let Syntax::Layouts(layouts) = &format.syntax;
    let layout = layouts.first()?;
    let chosen = tools.iter().filter(|tool| match choice {
        Choice::Required => true,
        Choice::Named(name) => tool.name == name,
    });
    let calls: Vec<Tag> = chosen.map(|tool| call(layout, tool)).collect();
    let stop_after_first = !parallel || choice != Choice::Required;
    let calls = match layout.separator {
        Some(separator) => Format::Sequence(vec![
            Format::Text(layout.open.to_owned() + layout.begin),
            Format::Separated {
                tags: calls,
                separator: separator.to_owned(),
                at_least_one: true,
                stop_after_first,
            },
            Format::Text(layout.end.to_owned()),
        ]),
        None => Format::Separated {
            tags: calls
                .into_iter()
                .map(|tag| Tag {
                    begin: format!("{}{}{}", layout.open, layout.begin, tag.begin),
                    end: tag.end + layout.end,
                    ..tag
                })
                .collect(),
            separator: "\n".to_owned(),
            at_least_one: true,
            stop_after_first,
        },
    };
    Some(match reading.reasoning {
        None => calls,
        Some(reasoning) => {
            let close = Tag {
                begin: String::new(),
                content: Format::AnyText,
                end: reasoning.close.to_owned(),
            };
            let behind = Format::Regex(r"\s{0,4}".to_owned());
            let thought = match reading.is_opened {
                true => Format::Sequence(vec![Format::Tag(Box::new(close)), behind]),
                false => Format::Or(vec![
                    Format::Text(String::new()),
                    Format::Sequence(vec![
                        Format::Text(reasoning.open.to_owned()),
                        Format::Tag(Box::new(close)),
                        behind,
                    ]),
                ]),
            };
            Format::Sequence(vec![thought, calls])
        }
    })
}

fn parameters(tool: &Tool) -> Json {
    tool.parameters
        .clone()
        .unwrap_or_else(|| json!({"type": "object"}))
}

fn call(layout: &Layout, tool: &Tool) -> Tag {
    let mut tag = Tag {
        begin: String::new(),
        content: Format::Text(String::new()),
        end: String::new(),
    };
    let mut parts = vec![];
    for piece in layout.call {
        match piece {
            Piece::Text(text) => parts.push(Format::Text((*text).to_owned())),
            Piece::Name => parts.push(Format::Text(tool.name.clone())),
            Piece::Arguments => parts.push(Format::Schema(parameters(tool))),
            Piece::Object { name, arguments } => parts.extend([
                Format::Text(format!(
                    "{{\"{}\": {}, \"{}\": ",
                    name[0],
                    Json::from(tool.name.as_str()),
                    arguments[0]
                )),
                Format::Schema(parameters(tool)),
                Format::Text("}".to_owned()),
            ]),
        }
    }
    tag.content = Format::Sequence(parts);
    tag
}
