//! Where in a schema that does not compile the reason is: the deepest part that fails for the same reason by itself.

use serde_json::{Map, Value};

use super::BadGrammar;

/// Parts that are compiled to find a place, at most.
const TRIES: usize = 400;
/// What parts may refer to.
const SHARED: [&str; 4] = ["$defs", "definitions", "$schema", super::OPTIONS];

/// The refusal, with the JSON pointer of what it is about. `refusal` compiles a part.
pub fn located(
    root: &Value,
    error: BadGrammar,
    refusal: impl Fn(&Value) -> Option<BadGrammar>,
) -> BadGrammar {
    let mut tries = 0;
    let mut pointer = String::new();
    // References may go round.
    let mut seen = vec![String::new()];
    'deeper: loop {
        let here = root.pointer(&pointer).expect("made of keys that were there");
        for child in children(here, &pointer) {
            tries += 1;
            if tries > TRIES {
                break 'deeper;
            }
            let fails = |part: &Value| {
                refusal(&standalone(root, part)).is_some_and(|other| reason(&other.0) == reason(&error.0))
            };
            if !seen.contains(&child) && root.pointer(&child).is_some_and(fails) {
                seen.push(child.clone());
                pointer = child;
                continue 'deeper;
            }
        }
        break;
    }
    BadGrammar(format!("at #{pointer}: {}", said(&error.0)))
}

/// The first line: the others say by way of which references.
fn reason(message: &str) -> &str {
    message.lines().next().unwrap_or_default()
}

/// In words that do not name options of the library.
fn said(message: &str) -> String {
    let first = reason(message);
    if let Some(keys) = first.strip_prefix("Unimplemented keys: ") {
        return format!("the keywords {keys} cannot be honoured");
    }
    if first.starts_with("oneOf constraints are not supported") {
        return "oneOf can only be honoured where no value can be valid by two of its schemas at once, by their types or \
                constant properties; anyOf always can"
            .to_owned();
    }
    first.to_owned()
}

fn standalone(root: &Value, part: &Value) -> Value {
    let Value::Object(part) = part else {
        return part.clone();
    };
    let shared = SHARED.iter().filter(|key| !part.contains_key(**key));
    let shared = shared.filter_map(|key| Some(((*key).to_owned(), root.get(key)?.clone())));
    let part = part.iter().map(|(key, value)| (key.clone(), value.clone()));
    Value::Object(part.chain(shared).collect::<Map<_, _>>())
}

/// Pointers of the schemas in a schema, and of what it refers to.
fn children(schema: &Value, at: &str) -> Vec<String> {
    let mut children = Vec::new();
    let Value::Object(schema) = schema else {
        return children;
    };
    let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
    for (key, value) in schema {
        match (key.as_str(), value) {
            ("properties" | "patternProperties", Value::Object(parts)) => {
                children.extend(parts.keys().map(|name| format!("{at}/{key}/{}", escaped(name))));
            }
            ("items" | "prefixItems" | "anyOf" | "oneOf" | "allOf", Value::Array(parts)) => {
                children.extend((0..parts.len()).map(|i| format!("{at}/{key}/{i}")));
            }
            ("items" | "additionalProperties" | "additionalItems", Value::Object(_)) => {
                children.push(format!("{at}/{key}"));
            }
            ("$ref", Value::String(to)) => {
                children.extend(to.strip_prefix('#').map(str::to_owned));
            }
            _ => {}
        }
    }
    children
}
