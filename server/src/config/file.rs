//! The TOML file of --config.

use std::collections::BTreeMap;
use std::path::Path;

use clap::Arg;
use tandem_core::suggest::closest;

use super::ConfigError;

/// Option id -> values as text.
pub(super) fn read_file(path: &Path, options: &[Arg]) -> Result<BTreeMap<String, Vec<String>>, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let table: toml::Table = text.parse().map_err(|source| ConfigError::NotToml {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let mut values = BTreeMap::new();
    for (name, value) in table {
        let long = name.replace('_', "-");
        let named = |arg: &&Arg| {
            let aliases = arg.get_all_aliases().unwrap_or_default();
            arg.get_long() == Some(&long) || aliases.contains(&long.as_str())
        };
        let Some(arg) = options.iter().filter(|arg| arg.get_id() != "config").find(named) else {
            let known = options
                .iter()
                .filter(|arg| !arg.is_hide_set())
                .filter_map(Arg::get_long);
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                suggestion: closest(&long, known.filter(|&known| known != "config")),
                name,
            });
        };
        let texts = as_texts(&value).ok_or_else(|| ConfigError::WrongShape {
            path: path.to_owned(),
            name,
        })?;
        if values.insert(arg.get_id().to_string(), texts).is_some() {
            let long = arg.get_long().unwrap_or_default();
            let other = format!("another spelling of it in {}", path.display());
            return Err(ConfigError::Twice(long.to_owned(), other));
        }
    }
    Ok(values)
}

/// A scalar, an array of scalars or of tables (`[[lora-modules]]`), or a table (`lora-modules = { name = "dir" }`).
fn as_texts(value: &toml::Value) -> Option<Vec<String>> {
    let scalar = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(on) => Some(on.to_string()),
        // As it would stand on a command line.
        toml::Value::Table(table) => serde_json::to_string(table).ok(),
        _ => None,
    };
    match value {
        toml::Value::Array(items) => items.iter().map(scalar).collect(),
        toml::Value::Table(pairs) => pairs
            .iter()
            .map(|(key, value)| Some(format!("{key}={}", scalar(value)?)))
            .collect(),
        value => Some(vec![scalar(value)?]),
    }
}
