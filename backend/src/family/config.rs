//! A config.json as a family reads it: typed fields with errors that name the file and the field, and an account of what
//! nobody read. Not here: what a field means to a family.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};
use tandem_kernels::activation::Activation;
use tandem_kernels::rope::{RopeLayout, RopeScaling, RopeSpec};

use super::{Bias, fields};
use crate::weights::LoadError;

/// A JSON object that remembers which of its fields were asked for.
pub(super) struct Config {
    file: &'static str,
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

    fn new(file: &'static str, inside: &str, fields: Map<String, Value>) -> Config {
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

    fn unread(&self) -> impl Iterator<Item = &String> {
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

    pub fn number(&self, field: &str) -> Result<Option<f64>, LoadError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
                Some(x) => Ok(Some(x)),
                None => Err(self.wrong(field, "a number is needed")),
            },
        }
    }

    fn positive(&self, field: &str) -> Result<Option<f64>, LoadError> {
        match self.number(field)? {
            Some(x) if x <= 0.0 => Err(self.wrong(field, "a number above 0 is needed")),
            other => Ok(other),
        }
    }

    /// The epsilon of a norm.
    pub fn epsilon(&self, field: &str, default: f64) -> Result<f64, LoadError> {
        match self.number(field)? {
            Some(x) if x < 0.0 => Err(self.wrong(field, "a number from 0 is needed")),
            other => Ok(other.unwrap_or(default)),
        }
    }

    pub fn flag(&self, field: &str) -> Result<bool, LoadError> {
        match self.get(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(field, "true or false is needed")),
        }
    }

    pub fn bias(&self, field: &str) -> Result<Bias, LoadError> {
        Ok(if self.flag(field)? {
            Bias::With
        } else {
            Bias::Without
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
                Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
                _ => Err(self.wrong(field, "silu, gelu and gelu_pytorch_tanh are supported")),
            },
        }
    }

    /// For a family without windows: a window is refused, unless no position that is served can reach its end.
    pub fn no_window(&self, max_positions: i64) -> Result<(), LoadError> {
        let switched_off = self.get("use_sliding_window") == Some(&Value::Bool(false));
        self.get("max_window_layers");
        match self.size_or_none("sliding_window")? {
            Some(window) if window < max_positions && !switched_off => Err(self.wrong(
                "sliding_window",
                &format!(
                    "windows are not supported yet; `max_position_embeddings` {window} or less (of {max_positions}) \
                     serves this model as far as its window reaches"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5), with the
    /// precedence of transformers 5. Source: transformers 5.23 modeling_rope_utils.py, convert_rope_params_to_dict and
    /// standardize_rope_params.
    pub fn rope(&self, head_dim: i64, max_positions: i64) -> Result<RopeSpec, LoadError> {
        let own_theta = self.positive("rope_theta")?;
        let filled = |field: &'static str| match self.get(field) {
            None => Ok(None),
            Some(Value::Object(fields)) if fields.is_empty() => Ok(None),
            Some(Value::Object(fields)) => Ok(Some((field, fields))),
            Some(_) => Err(self.wrong(field, "an object is needed")),
        };
        let (field, nested) = match (filled("rope_scaling")?, filled("rope_parameters")?) {
            (Some(scaling), Some(parameters)) if scaling.1 != parameters.1 => {
                self.note(
                    "`rope_scaling` is taken and `rope_parameters` beside it is not, its rope_theta included, as in \
                     transformers 5"
                        .to_owned(),
                );
                scaling
            }
            (Some(one), _) | (None, Some(one)) => one,
            (None, None) => {
                return Ok(RopeSpec {
                    theta: own_theta.unwrap_or(DEFAULT_THETA),
                    rotary_dim: head_dim,
                    layout: RopeLayout::Half,
                    scaling: RopeScaling::None,
                });
            }
        };
        let nested = Config::new(self.file, &format!("{field}."), nested.clone());
        let inner_theta = nested.positive("rope_theta")?;
        if let (Some(inner), Some(own)) = (inner_theta, own_theta)
            && inner != own
        {
            self.note(format!(
                "`rope_theta` {own} is not taken: `{field}.rope_theta` {inner} is"
            ));
        }
        let theta = inner_theta.or(own_theta).unwrap_or(DEFAULT_THETA);
        if nested
            .number("partial_rotary_factor")?
            .is_some_and(|factor| factor != 1.0)
        {
            return Err(nested.wrong(
                "partial_rotary_factor",
                "only whole heads are rotated here; 1.0 is supported",
            ));
        }
        let need = |name: &str| {
            nested
                .positive(name)?
                .ok_or_else(|| self.wrong(field, &format!("`{name}` is missing")))
        };
        let scaling = match nested.rope_type()? {
            Some("default") => RopeScaling::None,
            None if nested.unread().next().is_none() => RopeScaling::None,
            None => {
                return Err(self.wrong(
                    field,
                    "`rope_type` is missing: default, linear or llama3 (one object for all layers)",
                ));
            }
            Some("linear") => RopeScaling::Linear {
                factor: need("factor")?,
            },
            Some("llama3") => {
                let (low, high) = (need("low_freq_factor")?, need("high_freq_factor")?);
                if high <= low {
                    return Err(nested.wrong(
                        "high_freq_factor",
                        &format!("must be above low_freq_factor {low}"),
                    ));
                }
                // The one beside the object wins, and without any it is the model's own length.
                let original = "original_max_position_embeddings";
                let inner = nested.size_or_none(original)?;
                RopeScaling::Llama3 {
                    factor: need("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: self
                        .size_or_none(original)?
                        .or(inner)
                        .unwrap_or(max_positions),
                }
            }
            Some(other) => {
                let why = format!(
                    "{other} is not supported yet; default, linear and llama3 are. Without `{field}` the model \
                     is served as it was before its context was stretched"
                );
                return Err(nested.wrong("rope_type", &why));
            }
        };
        let ignored: Vec<String> = nested.unread().map(|name| format!("`{field}.{name}`")).collect();
        if !ignored.is_empty() {
            self.note(format!(
                "without effect on this kind of rope, as in transformers: {}",
                ignored.join(", ")
            ));
        }
        Ok(RopeSpec {
            theta,
            rotary_dim: head_dim,
            layout: RopeLayout::Half,
            scaling,
        })
    }

    /// transformers 4 lets `type` win, transformers 5 `rope_type`.
    fn rope_type(&self) -> Result<Option<&str>, LoadError> {
        let word = |field: &str| match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_str() {
                Some(word) => Ok(Some(word)),
                None => Err(self.wrong(field, "a word is needed")),
            },
        };
        match (word("rope_type")?, word("type")?) {
            (Some(new), Some(old)) if new != old => {
                let why =
                    format!("contradicts `rope_type` {new}, and versions of transformers differ; remove one");
                Err(self.wrong("type", &why))
            }
            (new, old) => Ok(new.or(old)),
        }
    }
}

/// transformers' RotaryEmbeddingConfigMixin.default_theta.
const DEFAULT_THETA: f64 = 10_000.0;
