//! Where an option's value comes from: the command line, else the environment, else the TOML file, else the default.
//! A name that does not exist is an error that says what was probably meant. Not here: the options (cli.rs).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches};

use crate::cli::Cli;

const ENV_PREFIX: &str = "TANDEM_";
/// The commands whose options also come from the environment and a file.
const CONFIGURED: [&str; 3] = ["serve", "backend", "router"];
/// Variables that are not options of theirs.
const OTHER_VARIABLES: [&str; 2] = [LOG_VARIABLE, "TANDEM_CPU_KERNELS"];
/// What to log, in the syntax of tracing's EnvFilter.
pub const LOG_VARIABLE: &str = "TANDEM_LOG";

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// clap's own message, colours and exit code (0 for --help).
    #[error(transparent)]
    Usage(#[from] clap::Error),
    #[error("cannot read {}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} is not TOML", path.display())]
    NotToml {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("{}: unknown option {name:?}{}", path.display(), meant(suggestion))]
    UnknownKey {
        path: PathBuf,
        name: String,
        suggestion: Option<String>,
    },
    #[error("{}: {name} must be a string, a number, or an array of them", path.display())]
    WrongShape { path: PathBuf, name: String },
    #[error("unknown environment variable {name}{}", meant(suggestion))]
    UnknownVariable {
        name: String,
        suggestion: Option<String>,
    },
}

fn meant(suggestion: &Option<String>) -> String {
    suggestion
        .as_ref()
        .map_or_else(String::new, |name| format!("; did you mean {name}?"))
}

/// The closest of `known` to `name`, if any is close.
pub fn closest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let scored = known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.8).then(|| best.1.to_owned())
}

/// One option of a command, for the start-up lines.
pub struct Chosen {
    pub name: String,
    pub value: String,
    pub source: &'static str,
}

pub struct Parsed {
    pub cli: Cli,
    /// Empty unless the command is one of [`CONFIGURED`].
    pub chosen: Vec<Chosen>,
}

/// `variables` are the names of the environment's variables; clap reads their values itself.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    variables: impl IntoIterator<Item = String>,
) -> Result<Parsed, ConfigError> {
    let args: Vec<OsString> = args.into_iter().collect();
    let command = CONFIGURED.iter().fold(Cli::command(), |command, name| {
        command.mut_subcommand(name, |command| command.mut_args(with_variable))
    });
    let first = command.clone().try_get_matches_from(&args)?;
    let Some((name, given)) = first.subcommand().filter(|(name, _)| CONFIGURED.contains(name)) else {
        return Ok(Parsed {
            cli: Cli::from_arg_matches(&first)?,
            chosen: Vec::new(),
        });
    };
    // One environment may serve a whole fleet: an option of another command is no mistake.
    check_variables(
        CONFIGURED.iter().flat_map(|name| options(&command, name)),
        variables,
    )?;
    let options: Vec<Arg> = options(&command, name).cloned().collect();
    let file = match given.get_one::<PathBuf>("config") {
        Some(path) => read_file(path, &options)?,
        None => BTreeMap::new(),
    };
    // The file's values become the defaults: what clap puts below flags and the environment, and checks alike.
    let command = command.mut_subcommand(name, |command| {
        command.mut_args(|arg| match file.get(arg.get_id().as_str()) {
            Some(values) => arg.default_values(values.iter().map(|value| &*value.clone().leak())),
            None => arg,
        })
    });
    let matches = command.try_get_matches_from(&args)?;
    let (_, given) = matches.subcommand().expect("the first pass found one");
    let chosen = options
        .iter()
        .filter_map(|arg| chosen(arg, given, &file))
        .collect();
    Ok(Parsed {
        cli: Cli::from_arg_matches(&matches)?,
        chosen,
    })
}

fn with_variable(arg: Arg) -> Arg {
    // Leaked once per option: clap without its `string` feature wants static names.
    let name: &'static str = format!("{ENV_PREFIX}{}", arg.get_id().as_str().to_uppercase()).leak();
    match arg.get_id().as_str() {
        "help" => arg,
        _ => arg.env(name).hide_env(true),
    }
}

fn options<'a>(command: &'a Command, name: &str) -> impl Iterator<Item = &'a Arg> + use<'a> {
    let command = command.find_subcommand(name).expect("cli.rs declares it");
    command.get_arguments().filter(|arg| arg.get_id() != "help")
}

fn check_variables<'a>(
    options: impl Iterator<Item = &'a Arg>,
    variables: impl IntoIterator<Item = String>,
) -> Result<(), ConfigError> {
    let known: Vec<&str> = options
        .filter_map(|arg| arg.get_env()?.to_str())
        .chain(OTHER_VARIABLES)
        .collect();
    match variables
        .into_iter()
        .find(|name| name.starts_with(ENV_PREFIX) && !known.contains(&name.as_str()))
    {
        None => Ok(()),
        Some(name) => Err(ConfigError::UnknownVariable {
            suggestion: closest(&name, known),
            name,
        }),
    }
}

/// Option id -> values as text.
fn read_file(path: &Path, options: &[Arg]) -> Result<BTreeMap<String, Vec<String>>, ConfigError> {
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
        let id = name.replace('-', "_");
        let named = |arg: &&Arg| {
            arg.get_id() == id.as_str()
                || arg
                    .get_all_aliases()
                    .unwrap_or_default()
                    .contains(&name.replace('_', "-").as_str())
        };
        let Some(arg) = options.iter().filter(|arg| arg.get_id() != "config").find(named) else {
            let known = options
                .iter()
                .map(|arg| arg.get_id().as_str())
                .filter(|&id| id != "config");
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                suggestion: closest(&id, known),
                name,
            });
        };
        let texts = as_texts(&value).ok_or_else(|| ConfigError::WrongShape {
            path: path.to_owned(),
            name,
        })?;
        values.insert(arg.get_id().to_string(), texts);
    }
    Ok(values)
}

/// A scalar, an array of scalars, or a table (`lora-modules = { name = "dir" }`).
fn as_texts(value: &toml::Value) -> Option<Vec<String>> {
    let scalar = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
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

fn chosen(arg: &Arg, given: &ArgMatches, file: &BTreeMap<String, Vec<String>>) -> Option<Chosen> {
    let id = arg.get_id().as_str();
    let source = match given.value_source(id)? {
        ValueSource::CommandLine => "flag",
        ValueSource::EnvVariable => "environment",
        _ if file.contains_key(id) => "file",
        _ => "default",
    };
    let texts: Vec<_> = given.get_raw(id)?.map(|text| text.to_string_lossy()).collect();
    let value = match id {
        "api_key" | "database_url" => "(hidden)".to_owned(),
        _ => texts.join(" "),
    };
    Some(Chosen {
        name: id.replace('_', "-"),
        value,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    fn serve(args: &str, variables: &[&str]) -> Result<(cli::Serve, Vec<Chosen>), ConfigError> {
        let args = ["tandem", "serve"]
            .into_iter()
            .chain(args.split_whitespace())
            .map(OsString::from);
        let parsed = parse(args, variables.iter().map(|&name| name.to_owned()))?;
        match parsed.cli.command {
            cli::Command::Serve(serve) => Ok((*serve, parsed.chosen)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_file_is_below_the_flags_and_above_the_defaults() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text =
            "port = 9\nmax_num_seqs = 7\nkv-cache-memory = \"1G\"\nlora-modules = { a = \"x\", b = \"y\" }\n";
        std::fs::write(file.path(), text).unwrap();
        let (serve, chosen) = serve(&format!("--config {} --port 10", file.path().display()), &[]).unwrap();
        assert_eq!((serve.edge.port, serve.model.max_num_seqs), (10, Some(7)));
        assert_eq!(serve.model.kv_cache_memory_bytes, Some(1 << 30));
        assert_eq!(
            serve.edge.lora_modules,
            [("a".to_owned(), "x".into()), ("b".to_owned(), "y".into())]
        );
        let source = |name: &str| {
            chosen
                .iter()
                .find(|chosen| chosen.name == name)
                .map(|chosen| chosen.source)
        };
        assert_eq!(source("port"), Some("flag"));
        assert_eq!(source("max-num-seqs"), Some("file"));
        assert_eq!(source("host"), Some("default"));
    }

    #[test]
    fn unknown_names_are_refused_with_a_suggestion() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let config = format!("--config {}", file.path().display());
        for (text, expected) in [
            ("prt = 9", "did you mean port?"),
            ("max-num-seq = 9", "did you mean max_num_seqs?"),
            ("zzz = 1", "unknown option \"zzz\""),
            ("config = \"x\"", "unknown option"),
            ("port = true", "must be a string"),
            ("port = ", "is not TOML"),
            ("port = \"many\"", "invalid value 'many'"),
        ] {
            std::fs::write(file.path(), text).unwrap();
            let message = serve(&config, &[]).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(expected), "{text}: {message}");
        }
        let message = serve("", &["TANDEM_PROT", "HOME"])
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(message.contains("did you mean TANDEM_PORT?"), "{message}");
        assert!(serve("", &["TANDEM_PORT", "TANDEM_LOG"]).is_ok());
        assert!(
            serve("--prot 9", &[])
                .map(|_| ())
                .unwrap_err()
                .to_string()
                .contains("--port")
        );
    }
}
