//! A config.json as a family reads it: typed fields with errors that name the file and the field, and an account of what
//! nobody read. Not here: what a field means to a family.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};
use tandem_kernels::activation::Activation;

use super::{Bias, Head, fields};
use crate::weights::LoadError;

/// The deepest models have some hundred.
const MAX_LAYERS: i64 = 10_000;

/// A JSON object that remembers which of its fields were asked for.
pub(super) struct Config {
    pub file: &'static str,
    /// Where the object stands in the file: empty, or `rope_parameters.`.
    inside: String,
    fields: Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
    notes: RefCell<Vec<String>>,
}

impl Config {
    pub fn read(folder: &Path, file: &'static str) -> Result<Config, LoadError> {
        let path = folder.join(file);
        let bytes = std::fs::read(&path).map_err(|error| LoadError::Read {
            file: path.display().to_string(),
            error,
        })?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => Ok(Config::new(file, "", fields)),
            Ok(_) => Err(LoadError::Config {
                file: file.to_owned(),
                message: "is not a JSON object".to_owned(),
            }),
            Err(error) => Err(LoadError::Config {
                file: file.to_owned(),
                message: format!("is not JSON: {error}"),
            }),
        }
    }

    pub fn new(file: &'static str, inside: &str, fields: Map<String, Value>) -> Config {
        Config {
            file,
            inside: inside.to_owned(),
            fields,
            read: RefCell::default(),
            notes: RefCell::default(),
        }
    }

    /// `None` for an absent field and for null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(field.to_owned());
        self.fields.get(field).filter(|value| !value.is_null())
    }

    pub fn wrong(&self, field: &str, why: &str) -> LoadError {
        let value = self
            .get(field)
            .map(|value| format!(" (it is {value})"))
            .unwrap_or_default();
        LoadError::Config {
            file: self.file.to_owned(),
            message: format!("`{}{field}`: {why}{value}", self.inside),
        }
    }

    /// Something that is taken in another way than its writer may think, for the log.
    pub fn note(&self, message: String) {
        self.notes.borrow_mut().push(format!("{}: {message}", self.file));
    }

    /// Everything was read that will be: refuses what was not and changes numbers, and gives the notes, with the names of
    /// fields that nobody knows among them.
    pub fn finish(self) -> Result<Vec<String>, LoadError> {
        let unread: Vec<&String> = self.unread().collect();
        let mut unknown = vec![];
        for field in unread {
            let value = &self.fields[field];
            match fields::judge(field, value) {
                fields::Judgement::Harmless => {}
                fields::Judgement::Noted(why) => self.note(format!("`{field}` is {value}: {why}")),
                fields::Judgement::Refused(why) => return Err(self.wrong(field, &why)),
                fields::Judgement::Unknown => unknown.push(format!("`{field}`")),
            }
        }
        if !unknown.is_empty() {
            self.note(format!("not known here and not honoured: {}", unknown.join(", ")));
        }
        Ok(self.notes.into_inner())
    }

    pub fn unread(&self) -> impl Iterator<Item = &String> {
        let read = self.read.borrow();
        let unread: Vec<&String> = self
            .fields
            .keys()
            .filter(|field| !read.contains(*field))
            .collect();
        unread.into_iter()
    }

    /// A whole number from 1 to 2^31 - 1.
    pub fn size(&self, field: &str, default: i64) -> Result<i64, LoadError> {
        Ok(self.size_or_none(field)?.unwrap_or(default))
    }

    pub fn size_or_none(&self, field: &str) -> Result<Option<i64>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_i64().filter(|&n| n > 0 && n < 1 << 31) {
                Some(n) => Ok(Some(n)),
                None => Err(self.wrong(field, "a whole number from 1 to 2147483647 is needed")),
            },
        }
    }

    /// How many layers: each is a few names and shapes before a weight is looked at.
    pub fn layers(&self, default: i64) -> Result<i64, LoadError> {
        const FIELD: &str = "num_hidden_layers";
        match self.size(FIELD, default)? {
            layers if layers <= MAX_LAYERS => Ok(layers),
            _ => Err(self.wrong(FIELD, &format!("at most {MAX_LAYERS} layers are read"))),
        }
    }

    /// A whole number from 0.
    pub fn count(&self, field: &str, default: i64) -> Result<i64, LoadError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => match value.as_i64().filter(|&n| (0..1 << 31).contains(&n)) {
                Some(n) => Ok(n),
                None => Err(self.wrong(field, "a whole number from 0 to 2147483647 is needed")),
            },
        }
    }

    pub fn number(&self, field: &str) -> Result<Option<f64>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
                Some(x) => Ok(Some(x)),
                None => Err(self.wrong(field, "a number is needed")),
            },
        }
    }

    pub fn positive(&self, field: &str) -> Result<Option<f64>, LoadError> {
        match self.number(field)? {
            Some(x) if x <= 0.0 => Err(self.wrong(field, "a number above 0 is needed")),
            other => Ok(other),
        }
    }

    /// How many of `experts` a token goes to.
    pub fn top_k(&self, field: &str, default: i64, experts: i64) -> Result<i64, LoadError> {
        let top_k = self.size(field, default)?;
        match top_k <= experts {
            true => Ok(top_k),
            false => Err(self.wrong(field, &format!("{top_k} of {experts} experts cannot be chosen"))),
        }
    }

    /// A list of layers; none where it is absent.
    pub fn layer_numbers(&self, field: &str) -> Result<Vec<i64>, LoadError> {
        let number = |value: &Value| value.as_i64().filter(|&n| n >= 0);
        let numbers = match self.get(field) {
            None => return Ok(vec![]),
            Some(value) => value
                .as_array()
                .and_then(|list| list.iter().map(number).collect()),
        };
        numbers.ok_or_else(|| self.wrong(field, "a list of layers' numbers is needed"))
    }

    /// A number above 0; null is none, absent is the default.
    pub fn positive_or(&self, field: &str, default: Option<f64>) -> Result<Option<f64>, LoadError> {
        match self.has(field) {
            true => self.positive(field),
            false => Ok(default),
        }
    }

    /// The epsilon of a norm.
    pub fn epsilon(&self, field: &str, default: f64) -> Result<f64, LoadError> {
        match self.number(field)? {
            Some(x) if x < 0.0 => Err(self.wrong(field, "a number from 0 is needed")),
            other => Ok(other.unwrap_or(default)),
        }
    }

    /// Where logits come from: `tie_word_embeddings`.
    pub fn head(&self, tied_by_default: bool) -> Result<Head, LoadError> {
        Ok(match self.flag_or("tie_word_embeddings", tied_by_default)? {
            true => Head::Tied,
            false => Head::Own,
        })
    }

    pub fn flag(&self, field: &str) -> Result<bool, LoadError> {
        match self.get(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(field, "true or false is needed")),
        }
    }

    pub fn bias(&self, field: &str) -> Result<Bias, LoadError> {
        self.bias_or(field, false)
    }

    /// Whether there are biases where the field is absent or null: `default`.
    pub fn bias_or(&self, field: &str, default: bool) -> Result<Bias, LoadError> {
        Ok(match self.flag_or(field, default)? {
            true => Bias::With,
            false => Bias::Without,
        })
    }

    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>, LoadError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(field) {
            None => Some(vec![]),
            Some(Value::Array(values)) => values.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(field, "a token id or a list of them is needed"))
    }

    /// `hidden_act` as transformers' ACT2FN names it.
    pub fn activation(&self, field: &str, default: Activation) -> Result<Activation, LoadError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => match value.as_str() {
                Some("silu" | "swish") => Ok(Activation::Silu),
                Some("gelu") => Ok(Activation::Gelu),
                Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
                Some("quick_gelu") => Ok(Activation::QuickGelu),
                Some("relu") => Ok(Activation::Relu),
                Some("relu2" | "relu_squared") => Ok(Activation::SquaredRelu),
                _ => Err(self.wrong(
                    field,
                    "silu, gelu, gelu_pytorch_tanh, quick_gelu, relu and relu2 are supported",
                )),
            },
        }
    }

    /// `true` or `false`, the default where it is absent or null.
    pub fn flag_or(&self, field: &str, default: bool) -> Result<bool, LoadError> {
        match self.get(field) {
            None => Ok(default),
            Some(_) => self.flag(field),
        }
    }

    /// A field that says what the family is anyway.
    pub fn only(&self, field: &str, value: impl Into<Value>) -> Result<(), LoadError> {
        let value = value.into();
        match self.get(field) {
            Some(other) if *other != value => {
                Err(self.wrong(field, &format!("only {value} is known of this family")))
            }
            _ => Ok(()),
        }
    }

    /// Whether it is there, be it null.
    pub fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    /// `sliding_window`: null is none, absent is the family's default.
    pub fn window(&self, default: Option<i64>) -> Result<Option<i64>, LoadError> {
        match self.has("sliding_window") {
            true => self.size_or_none("sliding_window"),
            false => Ok(default),
        }
    }

    /// Of each layer, whether it attends in a window: `layer_types`, or what the family makes of its absence.
    pub fn sliding_layers(&self, layers: i64, default: impl Fn(i64) -> bool) -> Result<Vec<bool>, LoadError> {
        let field = "layer_types";
        let types = match self.get(field) {
            None => return Ok((0..layers).map(default).collect()),
            Some(Value::Array(types)) => types,
            Some(_) => return Err(self.wrong(field, "a list is needed, a word for each layer")),
        };
        if types.len() as i64 != layers {
            let why = format!("{} words for {layers} layers (`num_hidden_layers`)", types.len());
            return Err(self.wrong(field, &why));
        }
        let sliding = |word: &Value| match word.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => {
                let why = format!("full_attention and sliding_attention are supported, not {word}");
                Err(self.wrong(field, &why))
            }
        };
        types.iter().map(sliding).collect()
    }

    /// For a family without windows: a window is refused, unless no position that is served can reach its end.
    pub fn no_window(&self, max_positions: i64) -> Result<(), LoadError> {
        self.get("max_window_layers");
        if self.get("use_sliding_window") == Some(&Value::Bool(false)) {
            self.get("sliding_window");
            return Ok(());
        }
        match self.size_or_none("sliding_window")? {
            Some(window) if window < max_positions => Err(self.wrong(
                "sliding_window",
                &format!(
                    "this family has no windows; `max_position_embeddings` {window} or less (of {max_positions}) serves \
                     this model as far as its window reaches"
                ),
            )),
            _ => Ok(()),
        }
    }
}
