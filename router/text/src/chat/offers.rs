//! Tools as requests and training rows offer them: OpenAI's shape, checked, and as the chat template gets it. Not here:
//! which of them an answer calls (`tools`).

use serde_json::{Map, Value as Json, json};

use crate::tools::Tool;

/// Of one request or row.
const MAX_TOOLS: usize = 512;
const MAX_NAME_CHARS: usize = 128;

/// The first thing wrong with a list of tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadTool {
    /// Within the list: `[2].function.name`
    pub place: String,
    /// Continues the sentence that begins with the place.
    pub problem: String,
}

/// The functions of `tools`, or of the older `functions`.
/// `given` is what was written, but for `strict`, which is for the server, and for what is null.
pub fn parse_tools(tools: Vec<Json>) -> Result<Vec<Tool>, BadTool> {
    if tools.len() > MAX_TOOLS {
        let problem = format!(" has {} tools, {MAX_TOOLS} are taken at most", tools.len());
        return Err(bad(String::new(), problem));
    }
    let mut offers: Vec<Tool> = Vec::with_capacity(tools.len());
    for (i, tool) in tools.into_iter().enumerate() {
        let offer =
            parse_tool(tool).map_err(|BadTool { place, problem }| bad(format!("[{i}]{place}"), problem))?;
        if let Some(first) = offers.iter().position(|other| other.name == offer.name) {
            let problem = format!(" is {:?}, as is [{first}].function.name", offer.name);
            return Err(bad(format!("[{i}].function.name"), problem));
        }
        offers.push(offer);
    }
    Ok(offers)
}

fn bad(place: impl Into<String>, problem: impl Into<String>) -> BadTool {
    BadTool {
        place: place.into(),
        problem: problem.into(),
    }
}

fn parse_tool(tool: Json) -> Result<Tool, BadTool> {
    let Json::Object(mut tool) = tool else {
        return Err(bad("", " must be an object"));
    };
    match tool.get("type") {
        None | Some(Json::Null) => {
            tool.insert("type".to_owned(), json!("function"));
        }
        Some(kind) if kind == "function" => {}
        Some(kind) => {
            return Err(bad(
                ".type",
                format!(" is {}: only \"function\" is built", excerpt(kind)),
            ));
        }
    }
    let Some(Json::Object(function)) = tool.get_mut("function") else {
        let hint = match tool.contains_key("name") {
            true => ": name, description and parameters stand in it",
            false => "",
        };
        return Err(bad(".function", format!(" is missing{hint}")));
    };
    function.retain(|_, value| !value.is_null());
    let name = match function.get("name") {
        Some(Json::String(name)) if is_name(name) => name.clone(),
        Some(name) => {
            let problem = format!(
                " must have 1 to {MAX_NAME_CHARS} letters, digits, \"_\", \"-\" and \".\", got {}",
                excerpt(name)
            );
            return Err(bad(".function.name", problem));
        }
        None => return Err(bad(".function.name", " is missing")),
    };
    let description = match function.get("description") {
        None => None,
        Some(Json::String(text)) => Some(text.clone()),
        Some(_) => return Err(bad(".function.description", " must be a text")),
    };
    let strict = match function.remove("strict") {
        None => false,
        Some(Json::Bool(strict)) => strict,
        Some(_) => return Err(bad(".function.strict", " must be true or false")),
    };
    let parameters = match function.get("parameters") {
        None => None,
        Some(Json::Object(schema)) if is_of_object(schema) => Some(json!(schema)),
        Some(Json::Object(_)) => {
            return Err(bad(
                ".function.parameters.type",
                " must be \"object\": parameters have names",
            ));
        }
        Some(_) => return Err(bad(".function.parameters", " must be a JSON Schema of an object")),
    };
    tool.retain(|_, value| !value.is_null());
    Ok(Tool {
        name,
        description,
        parameters,
        strict,
        given: Json::Object(tool),
    })
}

/// OpenAI's characters, and the point of namespaces.
fn is_name(name: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !name.is_empty() && name.len() <= MAX_NAME_CHARS && name.chars().all(is_allowed)
}

/// A schema that says nothing of the type is one of an object too.
fn is_of_object(schema: &Map<String, Json>) -> bool {
    match schema.get("type") {
        None => true,
        Some(Json::Array(types)) => types.iter().any(|kind| kind == "object"),
        Some(kind) => kind == "object",
    }
}

fn excerpt(value: &Json) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_is_given_as_it_was_written() {
        let parameters =
            json!({"properties": {"b": {"type": "string", "default": null}, "a": {}}, "type": "object"});
        let written = json!([
            {"type": "function", "function": {"name": "b-2.c", "description": null, "strict": true, "parameters": parameters}},
            {"function": {"name": "a"}},
        ]);
        let offers = parse_tools(written.as_array().unwrap().clone()).unwrap();
        let given = json!({"type": "function", "function": {"name": "b-2.c", "parameters": parameters}});
        assert_eq!(offers[0].given.to_string(), given.to_string());
        assert_eq!(
            (offers[0].strict, &offers[0].parameters),
            (true, &Some(parameters))
        );
        assert_eq!(
            offers[1].given,
            json!({"type": "function", "function": {"name": "a"}})
        );
    }

    #[test]
    fn what_is_no_tool_is_refused_with_its_place() {
        let function = |function: Json| json!([{"type": "function", "function": function}]);
        #[rustfmt::skip] // one case, one line
        let cases = [
            (json!(["x"]), "[0]", "must be an object"),
            (json!([{"type": "web_search"}]), "[0].type", "is \"web_search\": only \"function\" is built"),
            (json!([{"type": "function", "name": "f"}]), "[0].function", "is missing: name, description"),
            (function(json!({})), "[0].function.name", "is missing"),
            (function(json!({"name": "a b"})), "[0].function.name", "got \"a b\""),
            (function(json!({"name": ""})), "[0].function.name", "1 to 128"),
            (function(json!({"name": "f", "description": 1})), "[0].function.description", "must be a text"),
            (function(json!({"name": "f", "strict": "yes"})), "[0].function.strict", "true or false"),
            (function(json!({"name": "f", "parameters": []})), "[0].function.parameters", "JSON Schema of an object"),
            (function(json!({"name": "f", "parameters": {"type": "string"}})), "[0].function.parameters.type", "must be \"object\""),
            (json!([{"function": {"name": "f"}}, {"function": {"name": "f"}}]), "[1].function.name", "as is [0].function.name"),
        ];
        for (tools, place, part) in cases {
            let BadTool {
                place: found,
                problem,
            } = parse_tools(tools.as_array().unwrap().clone()).unwrap_err();
            assert_eq!(found, place, "{tools}");
            assert!(problem.contains(part), "{tools}: {problem}");
        }
    }
}
