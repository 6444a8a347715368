//! Words that are no commands, and what is meant by them.

use std::ffi::OsString;
use std::path::Path;

use clap::Command;
use tandem_core::suggest::closest;

use super::ConfigError;

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

/// clap suggests what is spelled alike; this is for what is meant alike.
pub(super) fn check_command(command: &Command, word: Option<&OsString>) -> Result<(), ConfigError> {
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
