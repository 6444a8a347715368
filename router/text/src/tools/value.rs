//! Values of formats that do not write JSON: which kind of JSON a parameter takes, and a text as that.

use serde_json::Value as Json;

use super::Tool;
use super::json::quoted;
use super::literal::python_to_json;

/// References of a schema that are followed one behind the other.
const MAX_REFERENCES: usize = 16;

/// What a tool says of its parameters.
pub(super) struct Parameters<'a>(Option<&'a Json>);

/// The kinds of JSON that a schema takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Kinds {
    pub string: bool,
    pub null: bool,
    pub integer: bool,
    pub number: bool,
    pub boolean: bool,
    pub object: bool,
    pub array: bool,
}

impl<'a> Parameters<'a> {
    pub fn new(tool: Option<&'a Tool>) -> Parameters<'a> {
        Parameters(tool.and_then(|tool| tool.parameters.as_ref()))
    }

    pub fn kinds(&self, name: &str) -> Kinds {
        let mut kinds = Kinds::default();
        if let Some(root) = self.0
            && let Some(schema) = root["properties"].get(name)
        {
            kinds.add_schema(schema, root, MAX_REFERENCES);
        }
        kinds
    }
}

/// What a schema refers to.
fn referred<'a>(schema: &Json, root: &'a Json) -> Option<&'a Json> {
    let path = schema["$ref"].as_str()?.strip_prefix('#')?;
    root.pointer(path)
}

/// The schema, or what it refers to.
pub(super) fn resolved<'a>(mut schema: &'a Json, root: &'a Json) -> &'a Json {
    for _ in 0..MAX_REFERENCES {
        schema = referred(schema, root).unwrap_or(schema);
    }
    schema
}

impl Kinds {
    /// Of `schema`, which stands in `root`.
    pub fn of(schema: &Json, root: &Json) -> Kinds {
        let mut kinds = Kinds::default();
        kinds.add_schema(schema, root, MAX_REFERENCES);
        kinds
    }

    /// Text stands as it is: nothing else is taken, or nothing is known.
    pub fn is_text(self) -> bool {
        let text = Kinds {
            string: true,
            ..Kinds::default()
        };
        self == text || self == Kinds::default()
    }

    fn add_schema(&mut self, schema: &Json, root: &Json, references: usize) {
        match &schema["type"] {
            Json::String(name) => self.add_name(name),
            Json::Array(names) => names
                .iter()
                .filter_map(Json::as_str)
                .for_each(|name| self.add_name(name)),
            _ => {}
        }
        let values = schema["enum"].as_array().into_iter().flatten();
        if schema["type"].is_null() {
            values
                .chain(schema.get("const"))
                .for_each(|value| self.add_value(value));
            self.object |= schema.get("properties").is_some();
            self.array |= schema.get("items").is_some();
        }
        for key in ["anyOf", "oneOf", "allOf"] {
            let parts = schema[key].as_array().into_iter().flatten();
            parts.for_each(|part| self.add_schema(part, root, references));
        }
        if let Some(part) = referred(schema, root).filter(|_| references > 0) {
            self.add_schema(part, root, references - 1);
        }
    }

    fn add_name(&mut self, name: &str) {
        match name {
            "string" => self.string = true,
            "null" => self.null = true,
            "integer" => self.integer = true,
            "number" => self.number = true,
            "boolean" => self.boolean = true,
            "object" => self.object = true,
            "array" => self.array = true,
            _ => {}
        }
    }

    fn add_value(&mut self, value: &Json) {
        self.add_name(match value {
            Json::Null => "null",
            Json::Bool(_) => "boolean",
            Json::Number(_) => "number",
            Json::String(_) => "string",
            Json::Array(_) => "array",
            Json::Object(_) => "object",
        });
    }

    /// The text as JSON of one of the kinds; as a string where it is none of them.
    pub fn convert(self, text: &str) -> String {
        let bare = text.trim();
        let parsed = || serde_json::from_str::<Json>(bare).ok();
        let lower = bare.to_ascii_lowercase();
        if self.is_text() {
            return quoted(text);
        }
        if self.null && matches!(lower.as_str(), "null" | "none") {
            return "null".to_owned();
        }
        if self.integer
            && bare
                .strip_prefix('-')
                .unwrap_or(bare)
                .bytes()
                .all(|b| b.is_ascii_digit())
            && parsed().is_some()
        {
            return bare.to_owned();
        }
        if (self.integer || self.number) && parsed().is_some_and(|value| value.is_number()) {
            // A whole number may be written with a point.
            let whole = bare
                .split_once('.')
                .filter(|(_, rest)| rest.bytes().all(|b| b == b'0'));
            return match whole {
                Some((whole, _)) if self.integer => whole.to_owned(),
                _ => bare.to_owned(),
            };
        }
        if self.boolean && matches!(lower.as_str(), "true" | "false") {
            return lower;
        }
        let fits = |value: &Json| self.object && value.is_object() || self.array && value.is_array();
        if parsed().is_some_and(|value| fits(&value)) {
            return bare.to_owned();
        }
        if let Some(json) = python_to_json(bare)
            && serde_json::from_str(&json).is_ok_and(|value| fits(&value))
        {
            return json;
        }
        match !self.string && matches!(lower.as_str(), "null" | "none") {
            true => "null".to_owned(),
            false => quoted(text),
        }
    }
}
