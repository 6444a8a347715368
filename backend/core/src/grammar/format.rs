//! Texts of which parts are bound: what tool calls, thinking before an answer, and the structural tags of vLLM are made
//! of. The kinds are those of xgrammar's structural tags (its docs/tutorials/structural_tag.md). Not here: how the wire
//! writes them (server).

use std::fmt::Write;

use serde_json::Value;

use super::{BadGrammar, Whitespace, lark_regex, lark_text, with_options};

/// What a stretch of text must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// This text. Special tokens may be named in it, as in those of a [`Tag`].
    Text(String),
    /// JSON by this schema.
    Schema(Value),
    Regex(String),
    /// A rule `start` and what it uses, in lark.
    Lark(String),
    /// Anything. Before a tag's end: anything that does not hold it.
    AnyText,
    Sequence(Vec<Format>),
    Or(Vec<Format>),
    Tag(Box<Tag>),
    /// Free text; but what begins with a trigger must be one of the tags, each of which begins with one.
    Triggered {
        triggers: Vec<String>,
        tags: Vec<Tag>,
        at_least_one: bool,
        /// Nothing comes after the first tag.
        stop_after_first: bool,
        /// The text begins with no match of these regular expressions, white space before it not counted.
        not_first: Vec<String>,
    },
    /// Tags with this between them, and nothing else.
    Separated {
        tags: Vec<Tag>,
        separator: String,
        at_least_one: bool,
        stop_after_first: bool,
    },
    /// Those of the fields that are there, in this order, with the separator between them.
    Fields {
        fields: Vec<Field>,
        separator: String,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    pub format: Format,
    pub is_required: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Tag {
    pub begin: String,
    pub content: Format,
    pub end: String,
}

impl Tag {
    /// JSON between two texts.
    pub fn json(begin: impl Into<String>, schema: Value, end: impl Into<String>) -> Tag {
        Tag {
            begin: begin.into(),
            content: Format::Schema(schema),
            end: end.into(),
        }
    }
}

const ANY: &str = "/(?s:.*)/";

pub(super) fn to_lark(format: &Format, special: &[(String, u32)]) -> Result<String, BadGrammar> {
    let mut writer = Writer {
        special,
        rules: String::new(),
        n_rules: 0,
    };
    let start = writer.format(format)?;
    Ok(format!("start: {start}\n{}", writer.rules))
}

struct Writer<'a> {
    special: &'a [(String, u32)],
    rules: String,
    n_rules: usize,
}

impl Writer<'_> {
    /// An expression.
    fn format(&mut self, format: &Format) -> Result<String, BadGrammar> {
        Ok(match format {
            Format::Text(text) => self.text(text),
            Format::Schema(schema) => {
                let schema = with_options(schema, &Whitespace::Usual)?;
                format!("%json {schema}")
            }
            Format::Regex(pattern) => lark_regex(pattern),
            Format::Lark(text) => format!("%lark {{\n{text}\n}}"),
            Format::AnyText => ANY.to_owned(),
            Format::Sequence(parts) => {
                let parts: Vec<String> = parts
                    .iter()
                    .map(|part| self.named(part))
                    .collect::<Result<_, _>>()?;
                parts.join(" ")
            }
            Format::Or(parts) => {
                if parts.is_empty() {
                    return Err(BadGrammar("there is nothing to choose from".to_owned()));
                }
                let parts: Vec<String> = parts
                    .iter()
                    .map(|part| self.named(part))
                    .collect::<Result<_, _>>()?;
                format!("({})", parts.join(" | "))
            }
            Format::Tag(tag) => {
                let begin = self.text(&tag.begin);
                format!("{begin} {}", self.rest_of(tag)?)
            }
            Format::Triggered {
                triggers,
                tags,
                at_least_one,
                stop_after_first,
                not_first,
            } => {
                let text = match not_first.is_empty() {
                    true => ANY.to_owned(),
                    false => self.text_without(not_first),
                };
                self.triggered(&text, triggers, tags, *at_least_one, *stop_after_first)?
            }
            Format::Separated {
                tags,
                separator,
                at_least_one,
                stop_after_first,
            } => {
                let tags: Vec<Format> = tags
                    .iter()
                    .map(|tag| Format::Tag(Box::new(tag.clone())))
                    .collect();
                let tag = self.named(&Format::Or(tags))?;
                let all = match stop_after_first {
                    true => tag,
                    false => {
                        let separator = self.text(separator);
                        format!("{tag} ({separator} {tag})*")
                    }
                };
                match at_least_one {
                    true => all,
                    false => format!("({all})?"),
                }
            }
            Format::Fields { fields, separator } => self.fields(fields, separator)?,
        })
    }

    /// From the last to the first: what comes where none was written yet, and where one was. So the rules grow with the
    /// number of fields, not with that of their choices.
    fn fields(&mut self, fields: &[Field], separator: &str) -> Result<String, BadGrammar> {
        let separator = self.text(separator);
        let (mut first, mut behind) = ("\"\"".to_owned(), "\"\"".to_owned());
        for Field { format, is_required } in fields.iter().rev() {
            let field = self.named(format)?;
            let begin = format!("{field} {behind}");
            (first, behind) = match is_required {
                true => (begin, format!("{separator} {field} {behind}")),
                false => (
                    format!("{begin} | {first}"),
                    format!("({separator} {field})? {behind}"),
                ),
            };
            (first, behind) = (self.rule("", &first), self.rule("", &behind));
        }
        Ok(first)
    }

    /// The name of a rule of its own.
    fn named(&mut self, format: &Format) -> Result<String, BadGrammar> {
        let expression = self.format(format)?;
        Ok(self.rule("", &expression))
    }

    fn rule(&mut self, attributes: &str, expression: &str) -> String {
        let name = format!("part{}", self.n_rules);
        self.n_rules += 1;
        writeln!(self.rules, "{name}{attributes}: {expression}").expect("a String takes everything");
        name
    }

    /// A text, with the special tokens that it names.
    fn text(&self, mut text: &str) -> String {
        let mut parts = vec![];
        while !text.is_empty() {
            let found = self.special.iter().filter_map(|(name, id)| {
                let at = text.find(name.as_str())?;
                // The first, and of those that begin there the longest.
                Some((at, std::cmp::Reverse(name.len()), *id))
            });
            match found.min() {
                Some((at, std::cmp::Reverse(length), id)) => {
                    if at > 0 {
                        parts.push(lark_text(&text[..at]));
                    }
                    parts.push(format!("<[{id}]>"));
                    text = &text[at + length..];
                }
                None => {
                    parts.push(lark_text(text));
                    break;
                }
            }
        }
        match parts.is_empty() {
            true => "\"\"".to_owned(),
            false => parts.join(" "),
        }
    }

    /// The name of a terminal: text that begins with none of these. Only terminals know a complement.
    fn text_without(&mut self, beginnings: &[String]) -> String {
        let name = format!("TEXT{}", self.n_rules);
        self.n_rules += 1;
        let begun = lark_regex(&format!(r"\s*({})(?s:.*)", beginnings.join("|")));
        writeln!(self.rules, "{name}: {ANY} & ~{begun}").expect("a String takes everything");
        name
    }

    /// Content and end of a tag.
    fn rest_of(&mut self, tag: &Tag) -> Result<String, BadGrammar> {
        let Tag { content, end, .. } = tag;
        match content {
            Format::AnyText if !end.is_empty() => Ok(self.text_up_to(ANY, end)),
            content => {
                let content = self.named(content)?;
                Ok(format!("{content} {}", self.text(end)))
            }
        }
    }

    /// Text of this regular expression up to the first `end`, and that.
    fn text_up_to(&mut self, text: &str, end: &str) -> String {
        let last = self.text(end);
        match last.starts_with('"') && !last.contains("<[") {
            true => {
                let lazy = format!("{text} {last}");
                self.rule("[lazy]", &lazy)
            }
            // Free text never holds a special token, so it ends there by itself.
            false => format!("{text} {last}"),
        }
    }

    /// `first`: the regular expression of the text before the first tag, or of all text where there is none.
    fn triggered(
        &mut self,
        first: &str,
        triggers: &[String],
        tags: &[Tag],
        at_least_one: bool,
        stop_after_first: bool,
    ) -> Result<String, BadGrammar> {
        if triggers.iter().any(String::is_empty) {
            return Err(BadGrammar(
                "a trigger must be a text that is not empty".to_owned(),
            ));
        }
        let led = |tag: &Tag| {
            triggers
                .iter()
                .any(|trigger| tag.begin.starts_with(trigger.as_str()))
        };
        if let Some(tag) = tags.iter().find(|tag| !led(tag)) {
            return Err(BadGrammar(format!(
                "the tag that begins with {:?} begins with no trigger",
                tag.begin
            )));
        }
        let mut rests = vec![];
        for trigger in triggers {
            let mut of_trigger = vec![];
            for tag in tags {
                if let Some(begin) = tag.begin.strip_prefix(trigger.as_str()) {
                    let (begin, rest) = (self.text(begin), self.rest_of(tag)?);
                    of_trigger.push(self.rule("", &format!("{begin} {rest}")));
                }
            }
            if of_trigger.is_empty() {
                return Err(BadGrammar(format!("no tag begins with the trigger {trigger:?}")));
            }
            rests.push((trigger, self.rule("", &of_trigger.join(" | "))));
        }
        let text = self.rule("", first);
        if rests.is_empty() {
            return match at_least_one {
                true => Err(BadGrammar("there is no tag and no trigger".to_owned())),
                false => Ok(text),
            };
        }
        let mut behind = |text: &str| {
            let ways = rests.iter().map(|(trigger, rest)| {
                let text = self.text_up_to(text, trigger);
                format!("{text} {rest}")
            });
            let ways: Vec<String> = ways.collect();
            self.rule("", &ways.join(" | "))
        };
        let tag = behind(first);
        let more = match stop_after_first {
            true => "\"\"".to_owned(),
            false if first == ANY => format!("{tag}* {text}"),
            false => format!("{}* {ANY}", behind(ANY)),
        };
        Ok(match at_least_one {
            true => format!("{tag} {more}"),
            false if first == ANY && !stop_after_first => more,
            false => format!("({tag} {more} | {text})"),
        })
    }
}
