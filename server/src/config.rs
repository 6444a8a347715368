//! Where an option's value comes from: the command line, else the environment, else the TOML file, else the default.
//! A name that does not exist is an error that says what was probably meant. Not here: the options (cli.rs), those of
//! other servers (foreign.rs).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory, FromArgMatches};
use tandem_core::suggest::closest;

use crate::cli::Cli;
use crate::foreign::{self, Verdict};

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

/// What people type who come from elsewhere, and what they mean.
const OTHER_COMMANDS: &[(&[&str], &str)] = &[
    (
        &["run", "start", "server", "up", "launch", "api"],
        "`tandem serve` serves the API and a page to chat on",
    ),
    (
        &["chat", "complete", "prompt", "ask"],
        "`tandem generate MODEL user=TEXT` answers once; `tandem serve` has a page to chat on, and POST /v1/chat/completions",
    ),
    (
        &["finetune", "fine-tune", "fine_tune", "tune", "sft", "lora", "fit"],
        "`tandem train recipe.yaml` fine-tunes without a server, POST /v1/fine_tuning/jobs with one",
    ),
    (
        &["pull", "fetch", "install", "add"],
        "`tandem download ORG/NAME` fetches a model from the hub, and so does `tandem serve ORG/NAME`",
    ),
    (
        &["list", "ls", "ps", "models", "show", "status"],
        "a running server lists its models at GET /v1/models; `tandem health` asks how it is",
    ),
    (
        &["replica", "worker", "engine"],
        "`tandem backend` is one replica for routers",
    ),
    (
        &["proxy", "gateway", "lb"],
        "`tandem router` serves the API in front of backends",
    ),
    (
        &["info", "check", "env", "collect-env"],
        "`tandem doctor` says what this machine offers",
    ),
    (
        &["bench", "benchmark"],
        "the repository's benches/ measure; /metrics has a running server's times",
    ),
];

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

/// clap suggests what is spelled alike; this is for what is meant alike.
fn check_command(command: &Command, word: Option<&OsString>) -> Result<(), ConfigError> {
    let Some(word) = word
        .map(|word| word.to_string_lossy())
        .filter(|word| !word.starts_with('-'))
    else {
        return Ok(());
    };
    if word == "help" || command.find_subcommand(&*word).is_some() {
        return Ok(());
    }
    let meant = OTHER_COMMANDS.iter().find(|(words, _)| words.contains(&&*word));
    let alike = || {
        let visible = command.get_subcommands().filter(|command| !command.is_hide_set());
        let name = closest(&word, visible.map(Command::get_name))?;
        Some(format!("did you mean `tandem {name}`?"))
    };
    let suggestion = match meant {
        Some((_, meant)) => Some((*meant).to_owned()),
        None if Path::new(&*word).exists() || word.contains('/') => {
            Some(format!("did you mean `tandem serve {word}`?"))
        }
        None => alike().or_else(|| Some("`tandem --help` lists the commands".to_owned())),
    };
    let name = word.into_owned();
    Err(ConfigError::UnknownCommand { name, suggestion })
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

/// `--max-loras` -> `TANDEM_MAX_LORAS`
fn variable(option: &str) -> String {
    format!("{ENV_PREFIX}{}", option.replace('-', "_").to_uppercase())
}

/// An option's own variable, then those of its other spellings.
fn variables_of(arg: &Arg) -> impl Iterator<Item = String> {
    let names = arg
        .get_long()
        .into_iter()
        .chain(arg.get_all_aliases().unwrap_or_default());
    names.map(variable)
}

fn set_variables(arg: &Arg, variables: &[String]) -> Vec<String> {
    variables_of(arg)
        .filter(|name| variables.contains(name))
        .collect()
}

fn with_variable(arg: Arg, variables: &[String]) -> Arg {
    let set = set_variables(&arg, variables).into_iter().next();
    match set.or_else(|| variables_of(&arg).next()) {
        // Leaked once per option: clap without its `string` feature wants static names.
        Some(name) => arg.env(&*name.leak()).hide_env(true),
        None => arg,
    }
}

/// Of a command, without those of clap.
fn options<'a>(command: &'a Command, name: &str) -> impl Iterator<Item = &'a Arg> + use<'a> {
    let command = command.find_subcommand(name).expect("cli.rs declares it");
    command.get_arguments().filter(|arg| arg.get_id() != "help")
}

fn check_variables<'a>(
    options: impl Iterator<Item = &'a Arg>,
    variables: &[String],
) -> Result<(), ConfigError> {
    let known: Vec<String> = options
        .flat_map(variables_of)
        .chain(OTHER_VARIABLES.map(str::to_owned))
        .collect();
    match variables.iter().find(|name| !known.contains(name)) {
        None => Ok(()),
        Some(name) => Err(ConfigError::UnknownVariable {
            suggestion: closest(name, known.iter().map(String::as_str)),
            name: name.clone(),
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
mod tests {
    use super::*;
    use crate::cli;

    fn serve(args: &str, variables: &[&str]) -> Result<(cli::Serve, Given), ConfigError> {
        let args = ["tandem", "serve"]
            .into_iter()
            .chain(args.split_whitespace())
            .map(OsString::from);
        let parsed = parse(args, variables.iter().map(|&name| name.to_owned()))?;
        match parsed.cli.command {
            cli::Command::Serve(serve) => Ok((*serve, parsed.given)),
            other => panic!("{other:?}"),
        }
    }

    fn refusal(args: &str, variables: &[&str]) -> String {
        serve(args, variables).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn the_file_is_below_the_flags_and_above_the_defaults() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "port = 9\nmax_num_seqs = 7\nkv-cache-memory = \"1G\"\nserved-model-name = [\"m\", \"n\"]\n\
                    enable-lora = true\nlora-modules = { a = \"x\", b = \"y\" }\n";
        std::fs::write(file.path(), text).unwrap();
        let (serve, given) = serve(&format!("--config {} --port 10", file.path().display()), &[]).unwrap();
        assert_eq!((serve.edge.port, serve.model.max_num_seqs), (10, Some(7)));
        assert_eq!(serve.model.kv_cache_memory_bytes, Some(1 << 30));
        assert_eq!(serve.model.served_model_name, ["m", "n"]);
        let adapters: Vec<_> = serve
            .edge
            .adapters()
            .map(|module| (&*module.name, module.path.as_path()))
            .collect();
        assert_eq!(adapters, [("a", Path::new("x")), ("b", Path::new("y"))]);
        let source = |name: &str| {
            let mut options = given.options.iter();
            options
                .find(|option| option.name == name)
                .map(|option| option.source)
        };
        assert_eq!(source("port"), Some(Source::Flag));
        assert_eq!(source("max-num-seqs"), Some(Source::File));
        assert_eq!(source("host"), None);
        assert_eq!(given.harmless.len(), 1);
    }

    #[test]
    fn unknown_names_are_refused_with_a_suggestion() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let config = format!("--config {}", file.path().display());
        for (text, expected) in [
            ("prt = 9", "did you mean port?"),
            ("max-num-seq = 9", "did you mean max-num-seqs?"),
            ("zzz = 1", "unknown option \"zzz\""),
            ("config = \"x\"", "unknown option"),
            ("port = true", "invalid value 'true'"),
            ("port = 1\nPORT = 2", "unknown option \"PORT\""),
            ("max-num-seqs = 1\nmax_num_seqs = 2", "say the same"),
            ("port = 1979-05-27", "must be a string"),
            ("port = ", "is not TOML"),
            ("port = \"many\"", "invalid value 'many'"),
            ("gpu-memory-utilization = 0.9", "use --kv-cache-memory-bytes"),
        ] {
            std::fs::write(file.path(), text).unwrap();
            let message = refusal(&config, &[]);
            assert!(message.contains(expected), "{text}: {message}");
        }
        for (variable, expected) in [
            ("TANDEM_PROT", "did you mean TANDEM_PORT?"),
            (
                "TANDEM_GPU_MEMORY_UTILISATION",
                "did you mean TANDEM_GPU_MEMORY_UTILIZATION?",
            ),
        ] {
            let message = refusal("", &[variable, "HOME"]);
            assert!(message.contains(expected), "{message}");
        }
        assert!(refusal("", &["TANDEM_MAX_MODEL_LEN", "TANDEM_CONTEXT_LENGTH"]).contains("say the same"));
        assert!(serve("", &["TANDEM_PORT", "TANDEM_LOG"]).is_ok());
        assert!(refusal("--prot 9", &[]).contains("--port"));
    }

    #[test]
    fn command_lines_of_other_servers_are_understood() {
        let line = "./m --enable-lora --served-model-name a b --max_model_len 32k --dtype half -tp 1 --seed 7 \
                    --host localhost --gpu-layers=3";
        let message = refusal(line, &[]);
        assert!(message.contains("--gpu-layers is not taken"), "{message}");
        let (serve, given) =
            serve(&line.replace("--gpu-layers=3", "--no-enable-prefix-caching"), &[]).unwrap();
        let cli::ModelOptions {
            served_model_name,
            max_model_len,
            tensor_parallel_size,
            seed,
            ..
        } = &serve.model;
        assert_eq!(serve.model.folder(), Some(Path::new("./m")));
        assert_eq!(served_model_name[..], ["a", "b"]);
        assert_eq!(*max_model_len, Some(tandem_backend::ModelLen::Asked(32_000)));
        assert_eq!((*tensor_parallel_size, *seed), (Some(1), Some(7)));
        assert!(serve.edge.host.is_loopback());
        let harmless: Vec<&str> = given.harmless.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(harmless, ["--enable-prefix-caching", "--enable-lora"]);
    }

    #[test]
    fn each_foreign_option_gets_its_word() {
        // None: it is taken.
        for (line, expected) in [
            ("--gpu-memory-utilization 0.9", Some("--kv-cache-memory-bytes")),
            ("--tool-call-parser hermes --reasoning-parser none", None),
            ("--tool-parser-plugin x.py", Some("--tool-call-parser")),
            ("-q int8", None),
            ("--no-enable-auto-tool-choice", None),
            ("--enable-auto-tool-choice", None),
            ("--pipeline-parallel-size 1 --data-parallel-size=1", None),
            ("-pp 2", Some("--tensor-parallel-size")),
            (
                "--load-format auto --kv-cache-dtype auto --tokenizer-mode auto",
                None,
            ),
            (
                "--trust-remote-code --enforce-eager --disable-log-requests --swap-space 4",
                None,
            ),
            ("--model m ./m", Some("say the same")),
            (
                "--model-path m --tp-size 1 --context-length 4K --max-running-requests 8",
                None,
            ),
            ("-hf org/name --code-revision x", None),
            ("--enable-lora true", Some("takes no word")),
            ("--enable-lora=true", None),
            ("--workers 4", Some("tandem backend")),
            ("--hf-token x", Some("HF_TOKEN")),
            ("--download-dir x", Some("HF_HUB_CACHE")),
            ("--max-model-len -1", None),
            ("--max-model-len 0", Some("4k (4000)")),
        ] {
            match (serve(line, &[]), expected) {
                (Ok(_), None) => {}
                (Err(error), Some(part)) => assert!(error.to_string().contains(part), "{line}: {error}"),
                (Err(error), None) => panic!("{line}: {error}"),
                (Ok(_), Some(part)) => panic!("{line} is taken, not refused with {part}"),
            }
        }
    }

    #[test]
    fn variables_of_other_servers_are_named() {
        let variables = [
            "VLLM_API_KEY",
            "VLLM_FLASH_ATTN_VERSION",
            "DATABASE_URL",
            "HOME",
            "TANDEM_PORT",
        ];
        let (_, given) = serve("", &variables).unwrap();
        let unread: Vec<&str> = given.unread.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            unread,
            ["VLLM_API_KEY", "VLLM_FLASH_ATTN_VERSION", "DATABASE_URL"]
        );
        assert!(given.unread[0].1.contains("TANDEM_API_KEY"));
    }

    #[test]
    fn other_commands_are_told_what_to_use() {
        for (word, expected) in [
            ("chat", "`tandem generate MODEL user=TEXT`"),
            ("run", "`tandem serve`"),
            ("sevre", "did you mean `tandem serve`?"),
            ("finetune", "`tandem train"),
            ("/tmp", "did you mean `tandem serve /tmp`?"),
            ("org/name", "did you mean `tandem serve org/name`?"),
            ("pull", "`tandem download"),
            ("zzz", "`tandem --help`"),
        ] {
            let args = ["tandem", word].map(OsString::from);
            let message = parse(args, []).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(expected), "{word}: {message}");
        }
    }
}
