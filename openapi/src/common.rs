//! Shapes that several resources share.

use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

/// Fields this version does not know. Kept, because some of them must be refused by name.
pub type Unknown = serde_json::Map<String, serde_json::Value>;

/// One string or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub enum Strings {
    One(String),
    Many(Vec<String>),
}

impl Strings {
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Strings::One(one) => vec![one],
            Strings::Many(many) => many,
        }
    }
}

/// A file id, or a list of them: their rows are read one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a file id or a list of file ids")]
pub enum FileIds {
    One(String),
    Several(Vec<String>),
}

impl From<FileIds> for Vec<String> {
    fn from(ids: FileIds) -> Vec<String> {
        match ids {
            FileIds::One(id) => vec![id],
            FileIds::Several(ids) => ids,
        }
    }
}

impl From<Vec<String>> for FileIds {
    fn from(mut ids: Vec<String>) -> FileIds {
        match ids.len() {
            1 => FileIds::One(ids.remove(0)),
            _ => FileIds::Several(ids),
        }
    }
}

/// An integer, or `"auto"`: the server chooses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected \"auto\" or an integer")]
pub enum AutoInteger {
    Auto(Auto),
    Value(i64),
}

/// A number, or `"auto"`: the server chooses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected \"auto\" or a number")]
pub enum AutoNumber {
    Auto(Auto),
    Value(#[serde(serialize_with = "plain")] f64),
}

/// A whole number as an integer, which clients of fields that once were integers expect.
fn plain<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match *number as i64 {
        whole if whole as f64 == *number => serializer.serialize_i64(whole),
        _ => serializer.serialize_f64(*number),
    }
}

/// The same of one that may not be chosen yet.
pub(crate) fn plain_or_null<S: Serializer>(number: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match number {
        Some(number) => plain(number, serializer),
        None => serializer.serialize_none(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    Auto,
}

impl AutoInteger {
    pub const AUTO: AutoInteger = AutoInteger::Auto(Auto::Auto);

    pub fn value(self) -> Option<i64> {
        match self {
            AutoInteger::Auto(Auto::Auto) => None,
            AutoInteger::Value(value) => Some(value),
        }
    }
}

impl AutoNumber {
    pub const AUTO: AutoNumber = AutoNumber::Auto(Auto::Auto);

    pub fn value(self) -> Option<f64> {
        match self {
            AutoNumber::Auto(Auto::Auto) => None,
            AutoNumber::Value(value) => Some(value),
        }
    }
}

/// What a list of models or of legacy fine-tunes is wrapped in: everything, no pages.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct List<T> {
    /// `list`
    pub object: &'static str,
    pub data: Vec<T>,
}

impl<T> List<T> {
    pub fn new(data: Vec<T>) -> List<T> {
        List { object: "list", data }
    }
}

/// One page; the next one is asked with `after=<id of the last item>`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct PageList<T> {
    /// `list`
    pub object: &'static str,
    pub data: Vec<T>,
    pub has_more: bool,
}

/// One page that also names its ends.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CursorList<T> {
    /// `list`
    pub object: &'static str,
    pub data: Vec<T>,
    #[schema(required)]
    pub first_id: Option<String>,
    #[schema(required)]
    pub last_id: Option<String>,
    pub has_more: bool,
}

/// The answer to a DELETE.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Deleted {
    pub id: String,
    /// `model`, `file` or `fine-tune`
    pub object: &'static str,
    pub deleted: bool,
}
