//! The head of a GGUF file: its metadata and its table of tensors. Format: ggml's docs/gguf.md, versions 2 and 3; 3 is
//! written. Not here: what the keys mean (crates text and backend), the tensors' numbers, files (any reader will do).

mod head;
#[cfg(test)]
mod tests;
mod write;

use std::collections::BTreeMap;

pub use head::{Gguf, MAGIC, TensorInfo, is_name, siblings};
pub use write::{aligned, head};

/// What is wrong with a file, with its name, the key or tensor, and numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {message}")]
pub struct GgufError {
    pub file: String,
    pub message: String,
}

/// Keys and values, with getters that name the file and the key where a value is of another type than is needed.
#[derive(Clone, Debug)]
pub struct Metadata {
    file: String,
    values: BTreeMap<String, Value>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Of any width and sign.
    Whole(i128),
    Float(f64),
    Flag(bool),
    Text(String),
    Wholes(Vec<i64>),
    Floats(Vec<f32>),
    Flags(Vec<bool>),
    Texts(Vec<String>),
}

impl Value {
    fn describe(&self) -> String {
        match self {
            Value::Whole(n) => format!("it is {n}"),
            Value::Float(x) => format!("it is {x}"),
            Value::Flag(flag) => format!("it is {flag}"),
            Value::Text(text) if text.len() <= 60 => format!("it is {text:?}"),
            Value::Text(text) => format!("it is a text of {} bytes", text.len()),
            Value::Wholes(list) => format!("it is a list of {} whole numbers", list.len()),
            Value::Floats(list) => format!("it is a list of {} numbers", list.len()),
            Value::Flags(list) => format!("it is a list of {} flags", list.len()),
            Value::Texts(list) => format!("it is a list of {} texts", list.len()),
        }
    }
}

impl Metadata {
    /// Of a file that is to be written.
    pub fn new(file: &str, values: &[(String, Value)]) -> Metadata {
        Metadata {
            file: file.to_owned(),
            values: values.iter().cloned().collect(),
        }
    }

    pub fn file(&self) -> &str {
        &self.file
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// An error about a key, with the value that it has.
    pub fn wrong(&self, key: &str, why: &str) -> GgufError {
        let found = match self.get(key) {
            Some(value) => format!(" ({})", value.describe()),
            None => String::new(),
        };
        GgufError {
            file: self.file.clone(),
            message: format!("`{key}`: {why}{found}"),
        }
    }

    pub fn missing(&self, key: &str, what: &str) -> GgufError {
        GgufError {
            file: self.file.clone(),
            message: format!("the key `{key}` is missing: {what}"),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a text is needed")),
        }
    }

    /// From 0 to 2^31 - 1: a size, a count or an id.
    pub fn whole(&self, key: &str) -> Result<Option<i64>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Whole(n)) if (0..1 << 31).contains(&n) => Ok(Some(n as i64)),
            Some(_) => Err(self.wrong(key, "a whole number from 0 to 2147483647 is needed")),
        }
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Float(x)) if x.is_finite() => Ok(Some(x)),
            Some(&Value::Whole(n)) => Ok(Some(n as f64)),
            Some(_) => Err(self.wrong(key, "a number is needed")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Flag(flag)) => Ok(Some(flag)),
            Some(_) => Err(self.wrong(key, "true or false is needed")),
        }
    }

    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(_) => Err(self.wrong(key, "a list of texts is needed")),
        }
    }

    pub fn wholes(&self, key: &str) -> Result<Option<&[i64]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Wholes(list)) => Ok(Some(list)),
            Some(_) => Err(self.wrong(key, "a list of whole numbers is needed")),
        }
    }

    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Floats(list)) => Ok(Some(list)),
            Some(_) => Err(self.wrong(key, "a list of numbers is needed")),
        }
    }

    /// The token ids of a vocabulary of `tokens` that these keys name, in order and each once.
    pub fn token_ids(&self, keys: &[&str], tokens: usize) -> Result<Vec<u32>, GgufError> {
        let mut ids = vec![];
        for key in keys {
            let Some(id) = self.whole(key)? else { continue };
            if id as usize >= tokens {
                return Err(self.wrong(key, &format!("the vocabulary has {tokens} tokens")));
            }
            if !ids.contains(&(id as u32)) {
                ids.push(id as u32);
            }
        }
        Ok(ids)
    }
}
