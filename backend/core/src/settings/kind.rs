//! What a setting's value may be, and how it is read.

use std::fmt;

use serde_json::{Value, json};

use crate::job::TABLES;

use super::{ALL_LINEAR, Refused, Why, refused, shown};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Integer {
        low: i64,
        high: i64,
        /// A value of other trainers that means "not given".
        unset: Option<i64>,
    },
    Real(Range),
    Flag,
    /// One of these.
    Word(&'static [&'static str]),
    /// Names of modules: a list, or one text with commas (as Together's clients send it).
    Modules,
    /// Names by names.
    Map,
    /// A name or a path.
    Text,
}

/// Of a real number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    Closed(f64, f64),
    /// Without the lower end.
    Above(f64, f64),
    /// Without the upper end.
    Below(f64, f64),
}

impl Range {
    /// NaN lies in none.
    pub fn contains(self, value: f64) -> bool {
        match self {
            Range::Closed(low, high) => low <= value && value <= high,
            Range::Above(low, high) => low < value && value <= high,
            Range::Below(low, high) => low <= value && value < high,
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Range::Closed(low, high) => write!(f, "between {low} and {high}"),
            Range::Above(low, high) => write!(f, "above {low} and at most {high}"),
            Range::Below(low, high) => write!(f, "at least {low} and below {high}"),
        }
    }
}

/// What a value must be.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Integer { low, high, .. } => write!(f, "an integer between {low} and {high}"),
            Kind::Real(range) => write!(f, "a number {range}"),
            Kind::Flag => f.write_str("true or false"),
            Kind::Word(words) => write!(f, "one of {}", words.join(", ")),
            Kind::Modules => write!(f, "a list of module names, or {ALL_LINEAR}"),
            Kind::Map => f.write_str("names by names, such as {output: summary}"),
            Kind::Text => f.write_str("a name"),
        }
    }
}

impl Kind {
    /// The value in range and in one form; `None` when it asks for nothing.
    pub(super) fn read(self, path: &str, value: &Value) -> Result<Option<Value>, Refused> {
        if value == "auto" {
            return Ok(None);
        }
        let wrong = |why| {
            refused(
                path.to_owned(),
                why,
                format!("{path} must be {self}, got {}", shown(value)),
            )
        };
        match self {
            Kind::Integer { low, high, unset } => {
                // transformers declares its epochs as a real number: 3.0 is 3.
                let whole = || value.as_f64().filter(|x| x.fract() == 0.0).map(|x| x as i64);
                let integer = value.as_i64().or_else(whole).ok_or_else(|| wrong(Why::Type))?;
                match integer {
                    _ if Some(integer) == unset => Ok(None),
                    _ if (low..=high).contains(&integer) => Ok(Some(json!(integer))),
                    _ => Err(wrong(Why::Value)),
                }
            }
            Kind::Real(range) => match value.as_f64() {
                Some(real) if range.contains(real) => Ok(Some(json!(real))),
                Some(_) => Err(wrong(Why::Value)),
                None => Err(wrong(Why::Type)),
            },
            Kind::Flag => match value {
                Value::Bool(_) => Ok(Some(value.clone())),
                _ => Err(wrong(Why::Type)),
            },
            Kind::Word(words) => match value.as_str() {
                Some(word) if words.contains(&word) => Ok(Some(value.clone())),
                Some(_) => Err(wrong(Why::Value)),
                None => Err(wrong(Why::Type)),
            },
            Kind::Text => match value {
                // As others switch it off.
                Value::Bool(false) => Ok(None),
                Value::String(text) if ["", "none", "no"].contains(&text.as_str()) => Ok(None),
                Value::String(_) => Ok(Some(value.clone())),
                _ => Err(wrong(Why::Type)),
            },
            Kind::Map => match value {
                Value::Object(names) if names.is_empty() => Ok(None),
                Value::Object(names)
                    if names
                        .iter()
                        .all(|(name, other)| !name.is_empty() && other.is_string()) =>
                {
                    Ok(Some(value.clone()))
                }
                Value::Object(_) => Err(wrong(Why::Value)),
                _ => Err(wrong(Why::Type)),
            },
            Kind::Modules => {
                let texts: Option<Vec<&str>> = match value {
                    Value::String(text) => Some(vec![text]),
                    Value::Array(texts) => texts.iter().map(Value::as_str).collect(),
                    _ => None,
                };
                let texts = texts.ok_or_else(|| wrong(Why::Type))?;
                let names: Vec<&str> = texts
                    .iter()
                    .flat_map(|text| text.split(','))
                    .map(str::trim)
                    .collect();
                match names.as_slice() {
                    [] => Err(wrong(Why::Value)),
                    names if names.contains(&"") => Err(wrong(Why::Value)),
                    names
                        if names.contains(&ALL_LINEAR)
                            && !names
                                .iter()
                                .all(|name| *name == ALL_LINEAR || TABLES.contains(name)) =>
                    {
                        let message = format!(
                            "{path}: {ALL_LINEAR} stands alone or beside {}, got {} names",
                            TABLES.join(" and "),
                            names.len()
                        );
                        Err(refused(path.to_owned(), Why::Value, message))
                    }
                    names => Ok(Some(json!(names))),
                }
            }
        }
    }
}
