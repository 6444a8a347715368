//! What an answer must be, in all its spellings: OpenAI's response_format, vLLM's structured_outputs and the guided_ fields
//! before it, llama.cpp's json_schema and grammar. Not here: whether it can be honoured (the router compiles it).

use serde_json::Value;
use tandem_core::grammar::{BadGrammar, Format, Grammar, Tag, Whitespace};
use tandem_openapi::structured::{NamedSchema, ResponseFormat, StructuredOutputs};
use tandem_router::api::{Constraint, Form};

use crate::error::{ApiError, invalid};

/// As on the wire.
#[derive(Default)]
pub struct Asked {
    pub response_format: Option<ResponseFormat>,
    pub structured_outputs: Option<StructuredOutputs>,
    pub guided_json: Option<Value>,
    pub guided_regex: Option<String>,
    pub guided_choice: Option<Vec<String>>,
    pub guided_grammar: Option<String>,
    pub guided_whitespace_pattern: Option<String>,
    pub json_schema: Option<Value>,
    pub grammar: Option<String>,
}

/// One thing an answer must be; whoever asks for two is told both.
pub fn constraint(asked: Asked) -> Result<Option<Constraint>, ApiError> {
    let Asked {
        response_format,
        structured_outputs,
        guided_json,
        guided_regex,
        guided_choice,
        guided_grammar,
        guided_whitespace_pattern,
        json_schema,
        grammar,
    } = asked;
    let whitespace = guided_whitespace_pattern.map_or(Whitespace::Usual, Whitespace::Pattern);
    let mut all = Vec::new();
    all.extend(response_format.map(of_response_format).transpose()?.flatten());
    if let Some(outputs) = structured_outputs {
        all.extend(of_structured_outputs(outputs)?);
    }
    let given = |text: &String| !text.is_empty();
    if let Some(schema) = guided_json {
        all.push(schema_text("guided_json", schema, &whitespace)?);
    }
    if let Some(pattern) = guided_regex.filter(given) {
        all.push(found("guided_regex", Ok(Grammar::regex(&pattern)))?);
    }
    if let Some(choices) = guided_choice {
        all.push(found("guided_choice", Grammar::choice(&choices))?);
    }
    if let Some(text) = guided_grammar.filter(given) {
        all.push(found("guided_grammar", Grammar::lark_or_gbnf(&text))?);
    }
    if let Some(schema) = json_schema {
        all.push(schema_text("json_schema", schema, &Whitespace::Usual)?);
    }
    if let Some(text) = grammar.filter(given) {
        all.push(found("grammar", Grammar::lark_or_gbnf(&text))?);
    }
    one_of(all)
}

fn one_of(mut all: Vec<Constraint>) -> Result<Option<Constraint>, ApiError> {
    if let [first, second, ..] = &all[..] {
        let (first, second) = (&first.param, &second.param);
        let text = format!("{first} and {second} both say what the answer must be; send one of them");
        return Err(invalid(second.clone(), text));
    }
    Ok(all.pop())
}

fn of_response_format(format: ResponseFormat) -> Result<Option<Constraint>, ApiError> {
    let ResponseFormat {
        kind,
        json_schema,
        schema,
        format,
        structures,
        triggers,
    } = format;
    let param = |field: &str| format!("response_format.{field}");
    let unread = |fields: &[(&str, bool)]| match fields.iter().find(|(_, is_given)| *is_given) {
        Some((field, _)) => {
            let text = format!("response_format.{field} means nothing where the type is {kind:?}");
            Err(invalid(param(field), text))
        }
        None => Ok(()),
    };
    let of_tags = [
        ("format", format.is_some()),
        ("structures", structures.is_some()),
        ("triggers", triggers.is_some()),
    ];
    match kind.as_str() {
        "text" => {
            unread(&[
                ("json_schema", json_schema.is_some()),
                ("schema", schema.is_some()),
            ])?;
            unread(&of_tags)?;
            Ok(None)
        }
        "json_object" => {
            unread(&[("json_schema", json_schema.is_some())])?;
            unread(&of_tags)?;
            match schema {
                None => found("response_format", Ok(Grammar::json_object(&Whitespace::Usual))).map(Some),
                Some(schema) => schema_text(&param("schema"), schema, &Whitespace::Usual).map(Some),
            }
        }
        "json_schema" => {
            unread(&of_tags)?;
            let (at, schema) = match (json_schema, schema) {
                (Some(_), Some(_)) => {
                    let text = "response_format.json_schema and response_format.schema are two places for one schema";
                    return Err(invalid(param("schema"), text));
                }
                (None, Some(schema)) => ("schema", schema),
                // Every answer is bound to it, strict or not; the others are for the sender's own books.
                (
                    Some(NamedSchema {
                        schema: Some(schema),
                        name: _,
                        description: _,
                        strict: _,
                    }),
                    None,
                ) => ("json_schema.schema", schema),
                (Some(NamedSchema { schema: None, .. }), None) => {
                    let text = "response_format.json_schema has no schema";
                    return Err(invalid(param("json_schema.schema"), text));
                }
                (None, None) => {
                    let text =
                        "response_format of the type json_schema needs json_schema, with the schema in it";
                    return Err(invalid(param("json_schema"), text));
                }
            };
            schema_text(&param(at), schema, &Whitespace::Usual).map(Some)
        }
        "structural_tag" => {
            unread(&[
                ("json_schema", json_schema.is_some()),
                ("schema", schema.is_some()),
            ])?;
            let mut tag = serde_json::Map::new();
            tag.extend(format.map(|format| ("format".to_owned(), Value::Object(format))));
            tag.extend(structures.map(|all| ("structures".to_owned(), Value::Array(all))));
            tag.extend(triggers.map(|all| ("triggers".to_owned(), Value::from(all))));
            structural_tag("response_format", &Value::Object(tag)).map(Some)
        }
        _ => {
            let text = format!(
                "response_format.type must be text, json_object, json_schema or structural_tag, got {kind:?}"
            );
            Err(invalid(param("type"), text))
        }
    }
}

fn of_structured_outputs(outputs: StructuredOutputs) -> Result<Option<Constraint>, ApiError> {
    let StructuredOutputs {
        json,
        regex,
        choice,
        grammar,
        json_object,
        structural_tag: tag,
        whitespace_pattern,
        disable_any_whitespace,
        // There is nothing to fall back to.
        disable_fallback: _,
    } = outputs;
    let param = |field: &str| format!("structured_outputs.{field}");
    let whitespace = match (whitespace_pattern, disable_any_whitespace.unwrap_or(false)) {
        (None, false) => Whitespace::Usual,
        (None, true) => Whitespace::None,
        (Some(pattern), false) => Whitespace::Pattern(pattern),
        (Some(_), true) => {
            let text =
                "structured_outputs.whitespace_pattern and disable_any_whitespace contradict each other";
            return Err(invalid(param("whitespace_pattern"), text));
        }
    };
    let mut all = Vec::new();
    if let Some(schema) = json {
        all.push(schema_text(&param("json"), schema, &whitespace)?);
    }
    if let Some(pattern) = regex {
        all.push(found(&param("regex"), Ok(Grammar::regex(&pattern)))?);
    }
    if let Some(choices) = choice {
        all.push(found(&param("choice"), Grammar::choice(&choices))?);
    }
    if let Some(text) = grammar {
        all.push(found(&param("grammar"), Grammar::lark_or_gbnf(&text))?);
    }
    if json_object.unwrap_or(false) {
        all.push(found(
            &param("json_object"),
            Ok(Grammar::json_object(&whitespace)),
        )?);
    }
    if let Some(tag) = tag {
        let param = param("structural_tag");
        all.push(structural_tag(&param, &parsed(&param, tag)?)?);
    }
    if all.is_empty() {
        let text = "structured_outputs must have one of json, regex, choice, grammar, json_object and structural_tag";
        return Err(invalid("structured_outputs", text));
    }
    one_of(all)
}

fn found(param: &str, grammar: Result<Grammar, BadGrammar>) -> Result<Constraint, ApiError> {
    match grammar {
        Ok(grammar) => Ok(Constraint {
            param: param.to_owned(),
            form: Form::Grammar(grammar),
        }),
        Err(bad) => Err(invalid(param, format!("{param} cannot be honoured: {bad}"))),
    }
}

/// JSON, or a text of it.
fn parsed(param: &str, value: Value) -> Result<Value, ApiError> {
    let Value::String(text) = value else {
        return Ok(value);
    };
    serde_json::from_str(&text)
        .map_err(|error| invalid(param, format!("{param} is a text that is not JSON: {error}")))
}

fn schema_text(param: &str, schema: Value, whitespace: &Whitespace) -> Result<Constraint, ApiError> {
    found(param, Grammar::json_schema(&parsed(param, schema)?, whitespace))
}

/// `{"format": ...}`, or the older `{"structures": [...], "triggers": [...]}`.
fn structural_tag(param: &str, tag: &Value) -> Result<Constraint, ApiError> {
    let format = match (tag.get("format"), tag.get("structures")) {
        (Some(written), None) => format(&format!("{param}.format"), written)?,
        (None, Some(Value::Array(structures))) => {
            let tags = structures.iter().enumerate().map(|(i, structure)| {
                let at = format!("{param}.structures[{i}]");
                let schema = structure.get("schema").cloned().unwrap_or(Value::Bool(true));
                Ok(Tag::json(
                    text(&at, structure, "begin")?,
                    parsed(&format!("{at}.schema"), schema)?,
                    text(&at, structure, "end")?,
                ))
            });
            Format::Triggered {
                triggers: texts(param, tag, "triggers")?,
                tags: tags.collect::<Result<_, ApiError>>()?,
                at_least_one: false,
                stop_after_first: false,
                not_first: vec![],
            }
        }
        _ => {
            let text = format!("{param} must have a format, or structures and triggers");
            return Err(invalid(param, text));
        }
    };
    Ok(Constraint {
        param: param.to_owned(),
        form: Form::Format(format),
    })
}

fn format(at: &str, written: &Value) -> Result<Format, ApiError> {
    let many = |field: &str| -> Result<Vec<Format>, ApiError> {
        let parts = list(at, written, field)?.iter().enumerate();
        parts
            .map(|(i, part)| format(&format!("{at}.{field}[{i}]"), part))
            .collect()
    };
    let tags = || -> Result<Vec<Tag>, ApiError> {
        let all = list(at, written, "tags")?.iter().enumerate();
        all.map(|(i, one)| tag(&format!("{at}.tags[{i}]"), one)).collect()
    };
    let flag = |field: &str| written.get(field).and_then(Value::as_bool).unwrap_or(false);
    let kind = text(at, written, "type")?;
    Ok(match kind.as_str() {
        "const_string" => Format::Text(text(at, written, "value")?),
        "json_schema" => {
            let schema = written.get("json_schema").cloned();
            Format::Schema(schema.ok_or_else(|| missing(at, "json_schema"))?)
        }
        "any_text" => Format::AnyText,
        "regex" => Format::Regex(text(at, written, "pattern")?),
        "sequence" => Format::Sequence(many("elements")?),
        "or" => Format::Or(many("elements")?),
        "tag" => Format::Tag(Box::new(tag(at, written)?)),
        "triggered_tags" => Format::Triggered {
            triggers: texts(at, written, "triggers")?,
            tags: tags()?,
            at_least_one: flag("at_least_one"),
            stop_after_first: flag("stop_after_first"),
            not_first: vec![],
        },
        "tags_with_separator" => Format::Separated {
            tags: tags()?,
            separator: text(at, written, "separator")?,
            at_least_one: flag("at_least_one"),
            stop_after_first: flag("stop_after_first"),
        },
        _ => {
            let text = format!(
                "{at}.type is {kind:?}; const_string, json_schema, any_text, regex, sequence, or, tag, triggered_tags and \
                 tags_with_separator are understood"
            );
            return Err(invalid(format!("{at}.type"), text));
        }
    })
}

fn tag(at: &str, written: &Value) -> Result<Tag, ApiError> {
    let content = written.get("content").ok_or_else(|| missing(at, "content"))?;
    Ok(Tag {
        begin: text(at, written, "begin")?,
        content: format(&format!("{at}.content"), content)?,
        end: text(at, written, "end")?,
    })
}

fn missing(at: &str, field: &str) -> ApiError {
    invalid(format!("{at}.{field}"), format!("{at} needs {field}"))
}

fn text(at: &str, written: &Value, field: &str) -> Result<String, ApiError> {
    match written.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(invalid(
            format!("{at}.{field}"),
            format!("{at}.{field} must be a text"),
        )),
        None => Err(missing(at, field)),
    }
}

fn list<'v>(at: &str, written: &'v Value, field: &str) -> Result<&'v Vec<Value>, ApiError> {
    match written.get(field) {
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(invalid(
            format!("{at}.{field}"),
            format!("{at}.{field} must be a list"),
        )),
        None => Err(missing(at, field)),
    }
}

fn texts(at: &str, written: &Value, field: &str) -> Result<Vec<String>, ApiError> {
    let texts = list(at, written, field)?.iter().enumerate();
    let text = |(i, text): (usize, &Value)| {
        let at = format!("{at}.{field}[{i}]");
        text.as_str()
            .map(str::to_owned)
            .ok_or_else(|| invalid(at.clone(), format!("{at} must be a text")))
    };
    texts.map(text).collect()
}
