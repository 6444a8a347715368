//! Where an option's value comes from: the command line, else the environment, else the TOML file, else the default.
//! A name that does not exist is an error that says what was probably meant. Not here: the options (cli.rs), those of
//! other servers (foreign.rs).

mod commands;
mod file;
mod variables;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches};

use crate::cli::Cli;
use crate::foreign::{self, Verdict};
use commands::check_command;
use file::read_file;
pub use variables::LOG_VARIABLE;
use variables::{ENV_PREFIX, check_variables, set_variables, with_variable};

/// The commands whose options also come from the environment and a file.
const CONFIGURED: [&str; 3] = ["serve", "backend", "router"];
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// clap's own message, colours and exit code (0 for --help).
    #[error(transparent)]
    Usage(#[from] clap::Error),
    #[error("cannot read {}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} is not TOML (lines such as max-model-len = 4096; a YAML file of vLLM must be rewritten)", path.display())]
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
    #[error("{}: {name} must be a string, a number, true or false, or an array or a table of them", path.display())]
    WrongShape { path: PathBuf, name: String },
    #[error("unknown environment variable {name}{}", meant(suggestion))]
    UnknownVariable {
        name: String,
        suggestion: Option<String>,
    },
    #[error("{0} and {1} say the same; give one of them")]
    Twice(String, String),
    #[error(
        "{0:?} would be the model's folder: a switch such as --enable-lora takes no word behind it, write --enable-lora={0} or leave the word out"
    )]
    Switch(String),
    /// All that other servers take and this one does not.
    #[error("{}", refused.join("\n        "))]
    Foreign { refused: Vec<String> },
    #[error("there is no `tandem {name}`{}", suggestion.as_ref().map_or_else(String::new, |s| format!(": {s}")))]
    UnknownCommand {
        name: String,
        suggestion: Option<String>,
    },
}

fn meant(suggestion: &Option<String>) -> String {
    suggestion
        .as_ref()
        .map_or_else(String::new, |name| format!("; did you mean {name}?"))
}

/// An option of a command that was given, for the start-up lines.
pub struct Chosen {
    pub name: String,
    pub value: String,
    pub source: Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Flag,
    Environment,
    File,
}

/// What a command was given, beside the options themselves.
#[derive(Default)]
pub struct Given {
    pub options: Vec<Chosen>,
    /// Another server's options that change nothing here: name and reason.
    pub harmless: Vec<(String, &'static str)>,
    /// Variables that another server, or an older compose file, would read: name and what to use.
    pub unread: Vec<(String, &'static str)>,
}

pub struct Parsed {
    pub cli: Cli,
    /// Empty unless the command is one of [`CONFIGURED`].
    pub given: Given,
}

/// `variables` are the names of the environment's variables; clap reads their values itself.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    variables: impl IntoIterator<Item = String>,
) -> Result<Parsed, ConfigError> {
    let args: Vec<OsString> = args.into_iter().collect();
    let variables: Vec<String> = variables.into_iter().collect();
    let unread = foreign::unread(&variables);
    let variables: Vec<String> = variables
        .into_iter()
        .filter(|name| name.starts_with(ENV_PREFIX))
        .collect();
    let mut command = Cli::command();
    check_command(&command, args.get(1))?;
    for name in CONFIGURED {
        command = command.mut_subcommand(name, foreign::known_to);
    }
    let args = spelled_out(args);
    let Some(name) = CONFIGURED
        .into_iter()
        .find(|name| args.get(1).is_some_and(|arg| arg == name))
    else {
        let matches = command.try_get_matches_from(&args)?;
        return Ok(Parsed {
            cli: Cli::from_arg_matches(&matches)?,
            given: Given::default(),
        });
    };
    // One environment may serve a whole fleet: an option of another command is no mistake.
    check_variables(
        CONFIGURED.iter().flat_map(|name| options(&command, name)),
        &variables,
    )?;
    for option in options(&command, name) {
        if let [one, other, ..] = &set_variables(option, &variables)[..] {
            return Err(ConfigError::Twice(one.clone(), other.clone()));
        }
    }
    let command = command.mut_subcommand(name, |command| {
        command.mut_args(|arg| with_variable(arg, &variables))
    });
    let first = command.clone().try_get_matches_from(&args)?;
    let (_, given) = first.subcommand().expect("it is one of CONFIGURED");
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
    check_model(given)?;
    let given = Given {
        unread,
        ..sort(&options, given, &file, &variables)?
    };
    Ok(Parsed {
        cli: Cli::from_arg_matches(&matches)?,
        given,
    })
}

/// Of the commands that other servers have, too. What comes behind `--` stays as it is.
fn spelled_out(args: Vec<OsString>) -> Vec<OsString> {
    let is_configured = args
        .get(1)
        .is_some_and(|arg| CONFIGURED.iter().any(|name| arg == name));
    let mut is_option = is_configured;
    let spell = |arg: OsString| {
        is_option &= arg != "--";
        match arg.to_str() {
            Some(text) if is_option => OsString::from(foreign::spelled_out(text)),
            _ => arg,
        }
    };
    args.into_iter().map(spell).collect()
}

/// A model on the command line wins over one of the environment or the file, whichever way it is said.
fn check_model(given: &ArgMatches) -> Result<(), ConfigError> {
    let by_flag = |id: &str| {
        let is_known = given.ids().any(|known| known == id);
        (is_known && given.value_source(id) == Some(ValueSource::CommandLine))
            .then(|| given.get_one::<PathBuf>(id))
            .flatten()
    };
    if let Some(word) = by_flag("model_folder").filter(|word| is_switched(word)) {
        return Err(ConfigError::Switch(word.display().to_string()));
    }
    match (by_flag("model_folder"), by_flag("model")) {
        (Some(folder), Some(model)) => Err(ConfigError::Twice(
            folder.display().to_string(),
            format!("--model {}", model.display()),
        )),
        _ => Ok(()),
    }
}

/// `--enable-lora true`: the switch takes no word, so that the model would be called `true`.
fn is_switched(word: &Path) -> bool {
    let words = [
        "true", "false", "True", "False", "on", "off", "yes", "no", "1", "0",
    ];
    words.iter().any(|known| word == Path::new(known)) && !word.exists()
}

/// Of a command, without those of clap.
fn options<'a>(command: &'a Command, name: &str) -> impl Iterator<Item = &'a Arg> + use<'a> {
    let command = command.find_subcommand(name).expect("cli.rs declares it");
    command.get_arguments().filter(|arg| arg.get_id() != "help")
}

/// What was given: options of ours, and those of other servers, which are harmless or refused.
fn sort(
    options: &[Arg],
    matches: &ArgMatches,
    file: &BTreeMap<String, Vec<String>>,
    variables: &[String],
) -> Result<Given, ConfigError> {
    let (mut given, mut refused) = (Given::default(), Vec::new());
    for arg in options {
        let id = arg.get_id().as_str();
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => Source::Flag,
            Some(ValueSource::EnvVariable) => Source::Environment,
            Some(_) if file.contains_key(id) => Source::File,
            _ => continue,
        };
        let texts = matches.get_raw(id).into_iter().flatten();
        let texts: Vec<String> = texts.map(|text| text.to_string_lossy().into_owned()).collect();
        let long = arg.get_long().unwrap_or("model");
        let name = match source {
            Source::Flag => format!("--{long}"),
            Source::Environment => set_variables(arg, variables).swap_remove(0),
            Source::File => format!("{long} in the file of --config"),
        };
        match foreign::judge(long, &texts) {
            None => given.options.push(chosen(id, long, source, &texts)),
            Some(Verdict::Taken(why)) => given.harmless.push((name, why)),
            Some(Verdict::Refused(instead)) => refused.push(format!("{name} is not taken: {instead}")),
        }
    }
    match refused.is_empty() {
        true => Ok(given),
        false => Err(ConfigError::Foreign { refused }),
    }
}

fn chosen(id: &str, long: &str, source: Source, texts: &[String]) -> Chosen {
    let value = match id {
        "api_key" | "backend_token" | "database_url" => "(hidden)".to_owned(),
        _ => texts.join(" "),
    };
    Chosen {
        name: long.to_owned(),
        value,
        source,
    }
}

#[cfg(test)]
mod tests;
