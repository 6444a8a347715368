//! Every format: texts as models write them, read whole and in pieces; and what is bound to a format is read by it.

mod bound;
mod templates;
mod texts;
mod thoughts;

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::*;
use crate::fixture::Random;

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
}

fn tool(name: &str, parameters: Json) -> Tool {
    let given = json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    Tool {
        name: name.to_owned(),
        description: None,
        parameters: Some(parameters),
        strict: false,
        given,
    }
}

fn tools() -> Arc<[Tool]> {
    Arc::new([
        tool(
            "get_weather",
            json!({"type": "object", "required": ["city"], "additionalProperties": false, "properties": {
                "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}}}),
        ),
        tool(
            "set",
            json!({"type": "object", "required": ["on", "tags"], "additionalProperties": false, "properties": {
                "name": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "on": {"type": "boolean"},
                "tags": {"type": "array", "items": {"type": "string"}}, "at": {"$ref": "#/$defs/point"}},
                "$defs": {"point": {"type": "object", "required": ["x"], "additionalProperties": false,
                    "properties": {"x": {"type": "number"}, "label": {"type": "string"}}}}}),
        ),
        tool(
            "now",
            json!({"type": "object", "properties": {}, "additionalProperties": false}),
        ),
    ])
}

fn read(reading: Reading, tools: &Arc<[Tool]>, pieces: &[&str]) -> Answer {
    let mut reader = Reader::new(reading, tools.clone());
    let mut answer = Answer::default();
    let mut add = |delta: Delta| {
        answer.reasoning.push_str(&delta.reasoning);
        answer.content.push_str(&delta.content);
        for CallDelta {
            index,
            name,
            arguments,
        } in delta.calls
        {
            match name {
                Some(name) => {
                    assert_eq!(index, answer.calls.len(), "calls begin one after the other");
                    answer.calls.push((name, arguments));
                }
                None => {
                    assert_eq!(index + 1, answer.calls.len(), "only the last call goes on");
                    assert!(!arguments.is_empty(), "a delta says something");
                    answer.calls[index].1.push_str(&arguments);
                }
            }
        }
    };
    for piece in pieces {
        reader.push(piece).into_iter().for_each(&mut add);
    }
    reader.finish().into_iter().for_each(&mut add);
    answer
}

/// Whole, character by character, and in pieces of random lengths.
fn read_in_all_ways(reading: Reading, tools: &Arc<[Tool]>, text: &str) -> Answer {
    let whole = read(reading, tools, &[text]);
    let characters: Vec<&str> = text.split("").filter(|piece| !piece.is_empty()).collect();
    assert_eq!(read(reading, tools, &characters), whole, "{text}");
    let mut random = Random(text.len() as u64);
    for longest in [2, 5, 12, 40] {
        let (mut pieces, mut rest) = (vec![], characters.as_slice());
        while !rest.is_empty() {
            let (piece, others) = rest.split_at((1 + random.below(longest)).min(rest.len()));
            pieces.push(piece.concat());
            rest = others;
        }
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        assert_eq!(read(reading, tools, &pieces), whole, "{pieces:?}");
    }
    whole
}

fn formats(name: &str) -> Vec<&'static ToolFormat> {
    let formats: Vec<_> = FORMATS
        .iter()
        .filter(|format| format.names.contains(&name))
        .collect();
    assert!(!formats.is_empty(), "{name}");
    formats
}

#[test]
fn names_are_found() {
    for name in ToolFormat::all_names() {
        assert!(ToolFormat::named(name).is_some_and(|format| format.names.contains(&name)));
    }
    assert!(ToolFormat::named("other").is_none());
    let newer = ToolFormat::named("mistral")
        .expect("mistral")
        .shown_in("[TOOL_CALLS]name[ARGS]");
    assert_eq!(newer.layouts()[0].call.len(), 3);
    for name in ReasoningFormat::all_names() {
        assert!(ReasoningFormat::named(name).is_some_and(|format| format.names.contains(&name)));
    }
    let r1 = ReasoningFormat::named("deepseek_r1").expect("deepseek_r1");
    let qwen = ReasoningFormat::named("qwen3").expect("qwen3");
    for (prompt, always, marked) in [
        ("<|im_start|>assistant\n", true, false),
        ("<|im_start|>assistant\n<think>\n", true, true),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", false, false),
    ] {
        assert_eq!(
            (r1.is_opened_by(prompt), qwen.is_opened_by(prompt)),
            (always, marked),
            "{prompt}"
        );
    }
}
