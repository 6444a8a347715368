//! Binds what a model writes to calls: its own format, with the tools' schemas inside. Made of the same table as reading.

use serde_json::{Value as Json, json};
use tandem_core::grammar::{Field, Format, Tag};

use super::value::{Kinds, resolved};
use super::{Layout, Piece, Reading, Separator, Syntax, Tool};

/// Schemas in schemas that are written as their own format writes them.
const MAX_DEPTH: usize = 8;

/// Which calls an answer must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice<'a> {
    /// Text or calls. Where a tool is strict, what begins as a call is one, and bound.
    Auto,
    /// One or more.
    Required,
    Named(&'a str),
}

/// What an answer is. Reasoning may come before. `None`: nothing is bound; with `Required` or `Named` that is because
/// there is no format.
pub fn bind(reading: Reading, tools: &[Tool], choice: Choice, parallel: bool) -> Option<Format> {
    let calls = calls_of(reading, tools, choice, parallel)?;
    let is_ended_by_call = reading.reasoning.is_some_and(|format| format.ends_with_call);
    Some(match choice {
        // What is reasoning for the model may be the beginning of a call.
        Choice::Auto if reading.is_opened && is_ended_by_call => {
            Format::Or(vec![calls.clone(), behind_reasoning(reading, blank(), calls)])
        }
        _ => behind_reasoning(reading, blank(), calls),
    })
}

/// An answer of a form, or calls where there are tools. Reasoning may come before; what stands behind it is the form from
/// its first character on.
pub fn bind_form(reading: Reading, tools: &[Tool], parallel: bool, form: Format) -> Format {
    let form = match reading.has_channels() {
        true => Format::Sequence(vec![text("<|channel|>final<|message|>"), form]),
        false => form,
    };
    let answer = match calls_of(reading, tools, Choice::Required, parallel) {
        None => form,
        Some(calls) => {
            let calls = match reading.reasoning {
                Some(_) => Format::Sequence(vec![blank(), calls]),
                None => calls,
            };
            Format::Or(vec![form, calls])
        }
    };
    behind_reasoning(reading, text(""), answer)
}

fn calls_of(reading: Reading, tools: &[Tool], choice: Choice, parallel: bool) -> Option<Format> {
    let format = reading.tools?;
    let chosen: Vec<&Tool> = tools
        .iter()
        .filter(|tool| match choice {
            Choice::Auto | Choice::Required => true,
            Choice::Named(name) => tool.name == name,
        })
        .collect();
    let one = !parallel || matches!(choice, Choice::Named(_));
    match (format.first_layout(), choice) {
        (_, Choice::Auto) if !chosen.iter().any(|tool| tool.strict) => None,
        (None, Choice::Auto) => {
            let said = tag("<|channel|>final<|message|>", Format::AnyText, "");
            let calls = chosen.into_iter().map(|tool| message(tool, Schemas::Strict));
            Some(Format::Or([said].into_iter().chain(calls).collect()))
        }
        (None, _) => {
            let calls = chosen.into_iter().map(|tool| message(tool, Schemas::All));
            Some(Format::Or(calls.collect()))
        }
        (Some(_), Choice::Auto) => free_or_calls(format.layouts(), &chosen, one),
        (Some(layout), _) => Some(required(layout, &chosen, Schemas::All, one)),
    }
}

fn behind_reasoning(reading: Reading, blank: Format, answer: Format) -> Format {
    let thought = |begin: &str, end: &str| tag(begin, Format::AnyText, end);
    let thought = match reading.reasoning {
        _ if reading.has_channels() => thought("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        None => return answer,
        Some(format) if reading.is_opened => {
            return Format::Sequence(vec![thought("", format.close[0]), blank, answer]);
        }
        Some(format) => Format::Sequence(vec![thought(format.open[0], format.close[0]), blank]),
    };
    Format::Sequence(vec![Format::Or(vec![text(""), thought]), answer])
}

/// What models write between their reasoning and calls.
fn blank() -> Format {
    Format::Regex(r"\s{0,4}".to_owned())
}

impl super::ToolFormat {
    /// How the model's template writes calls. `None`: on channels.
    fn first_layout(&self) -> Option<&'static Layout> {
        match self.syntax {
            Syntax::Layouts { layouts, .. } => layouts.first(),
            Syntax::Channels => None,
        }
    }
}

fn required(layout: &'static Layout, tools: &[&Tool], schemas: Schemas, one: bool) -> Format {
    match layout.separator {
        Separator::Within(separator) => Format::Sequence(vec![
            text(format!("{}{}", layout.open, layout.begin)),
            separated(calls(layout, tools, schemas), separator, one),
            text(layout.end),
        ]),
        Separator::Between(separator) => {
            // Only the answer's beginning opens a call that has no opening.
            let one = one || layout.open.is_empty();
            separated(sections(layout, tools, schemas), separator, one)
        }
    }
}

/// Text, in which a call is bound once it was opened, in whichever of the layouts. `None`: what is not strict would have no
/// arguments.
fn free_or_calls(layouts: &'static [Layout], tools: &[&Tool], one: bool) -> Option<Format> {
    let is_json = |piece: &Piece| !matches!(piece, Piece::Tagged { .. } | Piece::Python | Piece::Marked(_));
    let mut first_of_opening: Vec<&Layout> = vec![];
    for layout in layouts {
        // As the template writes them; the others are read alone.
        if !first_of_opening.iter().any(|known| known.open == layout.open) {
            first_of_opening.push(layout);
        }
    }
    let all_json = first_of_opening
        .iter()
        .all(|layout| layout.call.iter().all(is_json));
    let schemas = match all_json {
        true => Schemas::Strict,
        // Other formats than JSON have no arguments without a schema, so they are bound by those that are there.
        false if tools.iter().all(|tool| tool.strict || tool.parameters.is_some()) => Schemas::All,
        false => return None,
    };
    let (bare, opened): (Vec<&Layout>, Vec<&Layout>) = first_of_opening
        .into_iter()
        .partition(|layout| layout.open.is_empty());
    let (mut ways, mut not_first) = (vec![], vec![]);
    for layout in bare {
        not_first.extend(layout.beginnings(tools));
        ways.push(required(layout, tools, schemas, one));
    }
    let tags = |layout: &&'static Layout| match layout.separator {
        Separator::Within(separator) => vec![Tag {
            begin: format!("{}{}", layout.open, layout.begin),
            content: separated(calls(layout, tools, schemas), separator, one),
            end: layout.end.to_owned(),
        }],
        Separator::Between(_) => sections(layout, tools, schemas),
    };
    ways.push(Format::Triggered {
        triggers: opened.iter().map(|layout| layout.open.to_owned()).collect(),
        tags: opened.iter().flat_map(tags).collect(),
        at_least_one: false,
        stop_after_first: one,
        not_first,
    });
    Some(Format::Or(ways))
}

impl Layout {
    /// What calls without an opening begin with, as regular expressions; no other text of an answer does.
    fn beginnings(&self, tools: &[&Tool]) -> Vec<String> {
        let escaped = |text: &str| -> String {
            text.chars()
                .map(|c| format!(r"\x{{{:x}}}", u32::from(c)))
                .collect()
        };
        match (self.begin.chars().next(), self.call.first()) {
            (Some(first), _) => vec![escaped(first.encode_utf8(&mut [0; 4]))],
            // A name alone may be said; with arguments behind it, it is called.
            (None, Some(Piece::Name)) => tools.iter().map(|tool| escaped(&tool.name) + r"\s*\{").collect(),
            (None, _) => vec![escaped("{")],
        }
    }
}

/// Whose schemas bind.
#[derive(Clone, Copy, PartialEq)]
enum Schemas {
    All,
    Strict,
}

impl Schemas {
    fn bind(self, tool: &Tool) -> bool {
        self == Schemas::All || tool.strict
    }
}

/// Each call with an opening and an end of its own.
fn sections(layout: &'static Layout, tools: &[&Tool], schemas: Schemas) -> Vec<Tag> {
    let section = |tag: Tag| Tag {
        begin: format!("{}{}", layout.open, layout.begin),
        content: tag.content,
        end: layout.end.to_owned(),
    };
    calls(layout, tools, schemas).into_iter().map(section).collect()
}

fn calls(layout: &'static Layout, tools: &[&Tool], schemas: Schemas) -> Vec<Tag> {
    let call = |tool: &&Tool| Tag {
        begin: String::new(),
        content: call(layout, tool, schemas),
        end: String::new(),
    };
    tools.iter().map(call).collect()
}

fn call(layout: &'static Layout, tool: &Tool, schemas: Schemas) -> Format {
    let parameters = parameters(tool, schemas);
    let mut parts = vec![];
    for piece in layout.call {
        match *piece {
            Piece::Text(part) => say(&mut parts, part),
            Piece::Name => say(&mut parts, &tool.name),
            Piece::Id(pattern) => parts.push(Format::Regex(pattern.to_owned())),
            Piece::Arguments => parts.push(Format::Schema(parameters.clone())),
            Piece::Object { name, arguments } => {
                let (key, said) = (Json::from(name[0]), Json::from(tool.name.as_str()));
                parts.push(text(format!("{{{key}: {said}, {}: ", Json::from(arguments[0]))));
                parts.push(Format::Schema(parameters.clone()));
                parts.push(text("}"));
            }
            Piece::Python => {
                let value = |name: &str, schema: &Json| {
                    Format::Sequence(vec![
                        text(format!("{name}=")),
                        Format::Schema(whole(schema, &parameters)),
                    ])
                };
                parts.extend([text("("), fields(&parameters, ", ", value), text(")")]);
            }
            Piece::Marked(mark) => {
                parts.extend([
                    text("{"),
                    marked_fields(&parameters, &parameters, mark, 0),
                    text("}"),
                ]);
            }
            Piece::Tagged {
                open,
                middle,
                close,
                end,
            } => {
                let value = |name: &str, schema: &Json| {
                    let begin = format!("{open}{name}{middle}");
                    // Free text ends with the first mark, whether or not a line ends before it.
                    let (mark, behind) = (close.trim(), &close[close.trim_end().len()..]);
                    let words = words(resolved(schema, &parameters));
                    let kinds = Kinds::of(schema, &parameters);
                    match (words, kinds.is_text() || kinds.string) {
                        (Some(words), _) => {
                            tag(&begin, Format::Or(words.into_iter().map(text).collect()), close)
                        }
                        (None, true) => {
                            Format::Sequence(vec![tag(&begin, Format::AnyText, mark), text(behind)])
                        }
                        (None, false) => tag(&begin, Format::Schema(whole(schema, &parameters)), close),
                    }
                };
                parts.extend([fields(&parameters, "", value), text(end)]);
            }
        }
    }
    Format::Sequence(parts)
}

/// Goes on with the text before it: where free text may begin alike, one text is told from it at its end, and the first of
/// two would be taken for free text.
fn say(parts: &mut Vec<Format>, more: &str) {
    match parts.last_mut() {
        Some(Format::Text(said)) => said.push_str(more),
        _ => parts.push(text(more)),
    }
}

/// As gpt-oss writes a call. What ends it, `<|call|>`, is an end of the text.
fn message(tool: &Tool, schemas: Schemas) -> Format {
    let begin = format!(
        "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>",
        tool.name
    );
    tag(&begin, Format::Schema(parameters(tool, schemas)), "")
}

fn parameters(tool: &Tool, schemas: Schemas) -> Json {
    match &tool.parameters {
        Some(Json::Object(schema)) if schemas.bind(tool) => {
            let mut schema = schema.clone();
            schema.entry("type").or_insert(json!("object"));
            Json::Object(schema)
        }
        _ => json!({"type": "object"}),
    }
}

/// The properties of an object in their order, those that are not required or not.
fn fields(schema: &Json, separator: &str, value: impl Fn(&str, &Json) -> Format) -> Format {
    let required = schema["required"].as_array();
    let is_required = |name: &str| required.is_some_and(|names| names.iter().any(|one| one == name));
    let properties = schema["properties"].as_object().into_iter().flatten();
    Format::Fields {
        fields: properties
            .map(|(name, schema)| Field {
                format: value(name, schema),
                is_required: is_required(name),
            })
            .collect(),
        separator: separator.to_owned(),
    }
}

fn marked_fields(schema: &Json, root: &Json, mark: &str, depth: usize) -> Format {
    fields(schema, ",", |name, schema| {
        Format::Sequence(vec![text(format!("{name}:")), marked(schema, root, mark, depth)])
    })
}

/// A value between marks, or with marks in it.
fn marked(schema: &Json, root: &Json, mark: &str, depth: usize) -> Format {
    let schema = resolved(schema, root);
    let kinds = Kinds::of(schema, root);
    let has_parts = schema["properties"].is_object() || schema["items"].is_object();
    if let Some(words) = words(schema) {
        let word = |word: String| text(format!("{mark}{word}{mark}"));
        return Format::Or(words.into_iter().map(word).collect());
    }
    if kinds.is_text() || kinds.string {
        return tag(mark, Format::AnyText, mark);
    }
    if depth < MAX_DEPTH && kinds.object && schema["properties"].is_object() {
        return Format::Sequence(vec![
            text("{"),
            marked_fields(schema, root, mark, depth + 1),
            text("}"),
        ]);
    }
    if depth < MAX_DEPTH && kinds.array && schema["items"].is_object() {
        let items = Format::Separated {
            tags: vec![Tag {
                begin: String::new(),
                content: marked(&schema["items"], root, mark, depth + 1),
                end: String::new(),
            }],
            separator: ",".to_owned(),
            at_least_one: false,
            stop_after_first: false,
        };
        return Format::Sequence(vec![text("["), items, text("]")]);
    }
    let json = Format::Schema(whole(schema, root));
    match has_parts || kinds.object || kinds.array {
        // JSON's strings would end at no mark.
        true => Format::Sequence(vec![text(mark), json, text(mark)]),
        false => json,
    }
}

/// A part of a schema with what it may refer to.
fn whole(schema: &Json, root: &Json) -> Json {
    let mut schema = schema.clone();
    if let Some(schema) = schema.as_object_mut() {
        for key in ["$defs", "definitions"] {
            if let Some(shared) = root.get(key) {
                schema.entry(key).or_insert_with(|| shared.clone());
            }
        }
    }
    schema
}

/// The strings that a schema lists, if it lists strings alone.
fn words(schema: &Json) -> Option<Vec<String>> {
    let one = schema.get("const").map(std::slice::from_ref);
    let values = schema["enum"].as_array().map(Vec::as_slice).or(one)?;
    values
        .iter()
        .map(|value| value.as_str().map(str::to_owned))
        .collect()
}

fn text(text: impl Into<String>) -> Format {
    Format::Text(text.into())
}

fn tag(begin: &str, content: Format, end: &str) -> Format {
    Format::Tag(Box::new(Tag {
        begin: begin.to_owned(),
        content,
        end: end.to_owned(),
    }))
}

fn separated(tags: Vec<Tag>, separator: &str, one: bool) -> Format {
    Format::Separated {
        tags,
        separator: separator.to_owned(),
        at_least_one: true,
        stop_after_first: one,
    }
}
