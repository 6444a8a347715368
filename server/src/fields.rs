//! Fields of a request that the API document does not have: each is known to be harmless, or refused with what to use
//! instead, or probably misspelt, or new to us and then logged. Which is which stands in convert/refuse.rs. Not here:
//! fields that are known, and bodies that take their fields apart themselves (fine-tuning).

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{LazyLock, Mutex, PoisonError};

use prometheus::IntCounter;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tandem_core::suggest::closest;
use tracing::warn;

use crate::error::ApiError;

/// Names that are remembered as logged; a client can make up any number of them.
const MAX_LOGGED: usize = 1000;
/// Each is held against all that are known, to say which was meant.
const MAX_STRAYS: usize = 200;
/// Of a field's name in the log.
const NAME_CHARS: usize = 80;

/// What is known of a field that the document does not have. Null is no value, whatever the field.
#[derive(Clone, Copy)]
pub struct Rule {
    /// The path without positions: `messages[].audio`.
    pub field: &'static str,
    pub kind: Kind,
}

#[derive(Clone, Copy)]
pub enum Kind {
    /// Whatever it says, the answer is the same.
    Harmless,
    /// Unless its value changes nothing.
    Refused {
        neutral: fn(&Given) -> bool,
        /// What to use in its place; may be empty.
        instead: &'static str,
    },
}

/// A value, as far as a rule looks at it.
#[derive(Clone, Debug, PartialEq)]
pub enum Given {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    /// `[]` or `{}`
    Empty,
    /// A list or an object with something in it.
    Filled,
    /// An object whose `type` is this text.
    Tagged(String),
}

/// A field without a place in the document.
#[derive(Debug, PartialEq)]
pub struct Stray {
    /// As the client finds it: `messages[3].audio`
    pub path: String,
    /// Without positions, as rules name it.
    pub pattern: String,
    /// Its own name, the last part of both.
    pub name: String,
    pub value: Given,
    /// Names that would have had a place there.
    pub siblings: Vec<&'static str>,
}

/// Decides about strays, and counts those that are ignored.
pub struct Strays {
    /// Refuse also what nothing is known of.
    strict: bool,
    ignored: IntCounter,
    logged: Mutex<BTreeSet<String>>,
}

impl Strays {
    pub fn new(strict: bool, ignored: IntCounter) -> Strays {
        Strays {
            strict,
            ignored,
            logged: Mutex::default(),
        }
    }

    pub fn judge_all(&self, strays: Vec<Stray>, rules: &[&[Rule]]) -> Result<(), ApiError> {
        if let (Some(first), true) = (strays.first(), strays.len() > MAX_STRAYS) {
            return Err(ApiError::Invalid {
                param: Some(first.path.clone()),
                code: Some("unknown_parameter"),
                message: format!(
                    "{} fields are unknown here, '{}' first: at most {MAX_STRAYS} are looked at",
                    strays.len(),
                    first.path
                ),
            });
        }
        let mut ignored = Vec::new();
        for stray in &strays {
            ignored.extend(self.judge(stray, rules)?);
        }
        // Only what is not refused for another of its fields.
        ignored.into_iter().for_each(|pattern| self.ignore(pattern));
        Ok(())
    }

    /// What becomes of one; `Some`: it is ignored.
    fn judge<'s>(&self, stray: &'s Stray, rules: &[&[Rule]]) -> Result<Option<&'s str>, ApiError> {
        let Stray {
            path,
            pattern,
            name,
            value,
            siblings,
        } = stray;
        if *value == Given::Null {
            return Ok(None);
        }
        let rule = rules.iter().copied().flatten().find(|rule| rule.field == pattern);
        if let Some(Rule { kind, .. }) = rule {
            return match kind {
                Kind::Harmless => Ok(None),
                Kind::Refused { neutral, .. } if neutral(value) => Ok(None),
                Kind::Refused { instead, .. } => Err(ApiError::NotBuilt {
                    param: path.clone(),
                    hint: match *instead {
                        "" => String::new(),
                        instead => format!(": {instead}"),
                    },
                }),
            };
        }
        let refused = |hint: &str| ApiError::Invalid {
            param: Some(path.clone()),
            code: Some("unknown_parameter"),
            message: format!("Unknown parameter: '{path}'{hint}"),
        };
        if let Some(meant) = closest(name, siblings.iter().copied()) {
            return Err(refused(&format!("; did you mean '{meant}'?")));
        }
        if self.strict {
            return Err(refused(
                ", and this server refuses what it does not know (--strict-fields).",
            ));
        }
        Ok(Some(pattern))
    }

    fn ignore(&self, pattern: &str) {
        self.ignored.inc();
        let shown: String = pattern.chars().take(NAME_CHARS).collect();
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.len() < MAX_LOGGED && logged.insert(shown.clone()) {
            warn!(field = ?shown, "requests have a field that this server does not know; it is ignored");
        }
    }
}

/// openapi.json, which tests hold against the types that the server reads.
static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(tandem_openapi::COMMITTED).expect("openapi.json is JSON"));

/// Fields of a body that its schema does not have, in the body's order. What is not JSON has none: who reads the body
/// says so.
pub fn strays(schema: &str, body: &[u8]) -> Vec<Stray> {
    let mut found = Vec::new();
    let place = Place {
        schemas: basic(known(schema)),
        path: String::new(),
        pattern: String::new(),
    };
    let _ = Skim {
        place,
        found: &mut found,
    }
    .deserialize(&mut serde_json::Deserializer::from_slice(body));
    found
}

/// # Panics
/// When the committed document does not have the schema: then nothing would be found in a body, ever.
fn known(schema: &str) -> &'static Value {
    let schemas = &DOCUMENT["components"]["schemas"];
    let found = schemas.get(schema);
    found.unwrap_or_else(|| panic!("openapi.json has no {schema}: `tandem openapi` writes it"))
}

/// Of a form, whose fields are flat.
pub fn stray_field(schema: &str, name: &str) -> Option<Stray> {
    let place = Place {
        schemas: basic(known(schema)),
        path: String::new(),
        pattern: String::new(),
    };
    let stray = place.stray(name, Given::Filled);
    (!stray.siblings.contains(&name)).then_some(stray)
}

/// A name in the query of a documented operation; `path` is the route as the document spells it. `None`: it is known
/// there, or the route is none of the document's.
pub fn stray_in_query(method: &str, path: &str, name: &str, value: &str) -> Option<Stray> {
    let item = DOCUMENT["paths"].get(path)?;
    let parameters = item[method]["parameters"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    let in_query = parameters.iter().filter(|parameter| parameter["in"] == "query");
    let siblings: Vec<&str> = in_query
        .filter_map(|parameter| parameter["name"].as_str())
        .collect();
    // `metadata[key]` is a part of `metadata`.
    let name = name.split('[').next().unwrap_or(name);
    (!siblings.contains(&name)).then(|| Stray {
        path: name.to_owned(),
        pattern: name.to_owned(),
        name: name.to_owned(),
        value: Given::Text(value.to_owned()),
        siblings,
    })
}

/// A schema without references and alternatives: all that it may be.
fn basic(schema: &'static Value) -> Vec<&'static Value> {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap_or(reference);
        return basic(&DOCUMENT["components"]["schemas"][name]);
    }
    let alternatives = ["oneOf", "anyOf", "allOf"]
        .iter()
        .filter_map(|key| schema[*key].as_array())
        .flatten();
    [schema].into_iter().chain(alternatives.flat_map(basic)).collect()
}

/// Is there an object in it, at any depth? Lists of numbers and texts are long, and need no look.
fn has_names(schemas: &[&'static Value]) -> bool {
    let items = schemas.iter().filter_map(|schema| schema.get("items"));
    let items: Vec<_> = items.flat_map(basic).collect();
    schemas.iter().any(|schema| schema.get("properties").is_some()) || !items.is_empty() && has_names(&items)
}

/// Somewhere in a body, and in the document.
struct Place {
    schemas: Vec<&'static Value>,
    path: String,
    pattern: String,
}

impl Place {
    /// `None`: an object with any names.
    fn properties(&self) -> Option<impl Iterator<Item = (&'static str, &'static Value)>> {
        let is_free = |schema: &&Value| schema.get("additionalProperties").is_some();
        let objects: Vec<_> = self
            .schemas
            .iter()
            .filter_map(|schema| schema.get("properties")?.as_object())
            .collect();
        if objects.is_empty() || self.schemas.iter().any(is_free) {
            return None;
        }
        let pairs = objects.into_iter().flatten();
        Some(pairs.map(|(name, schema)| (name.as_str(), schema)))
    }

    fn property(&self, name: &str) -> Option<Place> {
        let mut properties = self.properties()?;
        let (_, schema) = properties.find(|(known, _)| *known == name)?;
        Some(Place {
            schemas: basic(schema),
            path: join(&self.path, name),
            pattern: join(&self.pattern, name),
        })
    }

    fn item(&self, index: usize) -> Place {
        let items = self.schemas.iter().filter_map(|schema| schema.get("items"));
        Place {
            schemas: items.flat_map(basic).collect(),
            path: format!("{}[{index}]", self.path),
            pattern: format!("{}[]", self.pattern),
        }
    }

    fn stray(&self, name: &str, value: Given) -> Stray {
        let siblings = self.properties().into_iter().flatten();
        Stray {
            path: join(&self.path, name),
            pattern: join(&self.pattern, name),
            name: name.to_owned(),
            value,
            siblings: siblings.map(|(name, _)| name).collect(),
        }
    }
}

fn join(path: &str, name: &str) -> String {
    match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    }
}

/// Reads over a value and finds what has no place. Nothing of what is known is kept.
struct Skim<'a> {
    place: Place,
    found: &'a mut Vec<Stray>,
}

impl<'de> DeserializeSeed<'de> for Skim<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

macro_rules! nothing {
    ($($visit:ident($value:ty))*) => {
        $(fn $visit<E>(self, _: $value) -> Result<(), E> {
            Ok(())
        })*
    };
}

impl<'de> Visitor<'de> for Skim<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("any value")
    }

    nothing! { visit_bool(bool) visit_i64(i64) visit_u64(u64) visit_f64(f64) visit_str(&str) }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if !has_names(&self.place.item(0).schemas) {
            while list.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        }
        for index in 0.. {
            let place = self.place.item(index);
            let found = &mut *self.found;
            if list.next_element_seed(Skim { place, found })?.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Skim { place, found } = self;
        let is_free = place.properties().is_none();
        while let Some(name) = map.next_key::<String>()? {
            match place.property(&name) {
                Some(place) => map.next_value_seed(Skim {
                    place,
                    found: &mut *found,
                })?,
                None if is_free => drop(map.next_value::<IgnoredAny>()?),
                None => {
                    let value = map.next_value_seed(Glance)?;
                    found.push(place.stray(&name, value));
                }
            }
        }
        Ok(())
    }
}

/// Reads a value as far as rules look at it.
struct Glance;

impl<'de> DeserializeSeed<'de> for Glance {
    type Value = Given;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Given, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Glance {
    type Value = Given;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("any value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Given, E> {
        Ok(Given::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Given, E> {
        Ok(Given::Number(value as f64))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Given, E> {
        Ok(Given::Number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Given, E> {
        Ok(Given::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Given, E> {
        Ok(Given::Text(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Given, E> {
        Ok(Given::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Given, A::Error> {
        let mut given = Given::Empty;
        while list.next_element::<IgnoredAny>()?.is_some() {
            given = Given::Filled;
        }
        Ok(given)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Given, A::Error> {
        let mut given = Given::Empty;
        while let Some(name) = map.next_key::<String>()? {
            let value = map.next_value_seed(Glance)?;
            match (name.as_str(), value, &given) {
                ("type", Given::Text(kind), _) => given = Given::Tagged(kind),
                (.., Given::Tagged(_)) => {}
                _ => given = Given::Filled,
            }
        }
        Ok(given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strays_are_found_at_any_depth_with_their_values() {
        let body = br#"{"model": "m", "mdoel": "x", "logit_bias": {"5": 1}, "chat_template_kwargs": {"any": {"thing": 1}},
            "stream_options": {"include_usage": true, "include_usge": true}, "stop": ["a", "b"],
            "messages": [{"role": "user", "content": "a"},
                {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"x": 1}}], "extra": []}],
            "top_a": 0.5, "tools": null, "ebnf": "root ::= x"}"#;
        let found: Vec<(String, String, Given)> = strays("ChatRequest", body)
            .into_iter()
            .filter(|stray| stray.name != "tools")
            .map(|stray| (stray.path, stray.pattern, stray.value))
            .collect();
        let stray = |path: &str, pattern: &str, value| (path.to_owned(), pattern.to_owned(), value);
        assert_eq!(
            found,
            [
                stray("mdoel", "mdoel", Given::Text("x".to_owned())),
                stray(
                    "stream_options.include_usge",
                    "stream_options.include_usge",
                    Given::Bool(true)
                ),
                stray(
                    "messages[1].content[0].cache_control",
                    "messages[].content[].cache_control",
                    Given::Filled
                ),
                stray("messages[1].extra", "messages[].extra", Given::Empty),
                stray("top_a", "top_a", Given::Number(0.5)),
                stray("ebnf", "ebnf", Given::Text("root ::= x".to_owned())),
            ]
        );
        // Who reads the body says what is wrong with it.
        assert!(strays("ChatRequest", b"{\"model\": ").is_empty());
    }

    #[test]
    fn queries_and_forms_have_their_names_in_the_document() {
        for (method, path, name, siblings) in [
            ("get", "/v1/files", "limit", None),
            ("get", "/v1/fine_tuning/jobs", "metadata[k]", None),
            ("get", "/docs", "x", None),
            ("get", "/v1/files", "limits", Some("limit")),
            ("post", "/v1/chat/completions", "model", None),
        ] {
            let stray = stray_in_query(method, path, name, "1");
            assert_eq!(
                stray.and_then(|stray| closest(&stray.name, stray.siblings)),
                siblings.map(str::to_owned),
                "{path}?{name}"
            );
        }
        assert!(stray_in_query("post", "/v1/chat/completions", "model", "1").is_some());
        assert!(stray_field("UploadForm", "expires_after[seconds]").is_none());
        assert!(stray_field("UploadForm", "porpose").is_some());
    }
}
