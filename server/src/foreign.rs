//! Options of vLLM, SGLang, TGI and llama.cpp's server: command lines, variables and files that work there are taken
//! here where they mean the same, logged where they change nothing, and else refused with what to use. One table (`table`) for
//! all three sources. Not here: our own options (cli.rs); where values come from (config.rs).

mod table;

use clap::{Arg, ArgAction, Command};

use table::Says::{Harmless, HarmlessIf, Refused, SameAs};
use table::{Foreign, SHORT, TABLE, Takes, VARIABLES};

/// Those of `variables` that somebody may believe to be read here, with what to use.
pub fn unread(variables: &[String]) -> Vec<(String, &'static str)> {
    let known = |variable: &str| {
        let meant = |(name, _): &&(&str, &str)| {
            *name == variable || name.ends_with('_') && variable.starts_with(*name)
        };
        VARIABLES.iter().find(meant)
    };
    let found = variables
        .iter()
        .filter_map(|variable| Some((variable.clone(), known(variable)?.1)));
    found.collect()
}

/// An argument in our spelling: `-tp` is --tensor-parallel-size, `--max_model_len` --max-model-len, and a switch of the
/// table is off as `--no-x`.
pub fn spelled_out(arg: &str) -> String {
    let (name, value) = arg.split_at(arg.find('=').unwrap_or(arg.len()));
    if let Some((_, long)) = SHORT.iter().find(|(short, _)| *short == name) {
        return format!("--{long}{value}");
    }
    let Some(long) = name.strip_prefix("--") else {
        return arg.to_owned();
    };
    let long = long.replace('_', "-");
    let is_switch = |name: &str| find(name).is_some_and(|foreign| foreign.takes == Takes::Nothing);
    match long.strip_prefix("no-") {
        Some(off) if is_switch(off) && !is_switch(&long) => format!("--{off}=false"),
        _ => format!("--{long}{value}"),
    }
}

fn find(name: &str) -> Option<&'static Foreign> {
    TABLE.iter().find(|foreign| foreign.names.contains(&name))
}

/// The command, with the table's options beside its own: aliases where they are the same, hidden arguments else.
pub fn known_to(mut command: Command) -> Command {
    for Foreign { names, takes, says } in TABLE {
        match says {
            SameAs(ours) => {
                if command.get_arguments().any(|arg| arg.get_long() == Some(ours)) {
                    command =
                        command.mut_arg(ours.replace('-', "_"), |arg| arg.aliases(names.iter().copied()));
                }
            }
            _ => command = command.args(names.iter().map(|name| hidden(name, *takes))),
        }
    }
    command
}

fn hidden(name: &'static str, takes: Takes) -> Arg {
    let arg = Arg::new(name).long(name).hide(true).action(ArgAction::Append);
    match takes {
        Takes::Value => arg.allow_hyphen_values(true),
        Takes::Nothing => arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true"),
    }
}

/// What a foreign option that was given comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is logged, with the reason.
    Taken(&'static str),
    Refused(&'static str),
}

/// `None`: the name is not in the table, or one of ours.
pub fn judge(name: &str, values: &[String]) -> Option<Verdict> {
    let Foreign { takes, says, .. } = find(name)?;
    let is_off = |value: &String| ["false", "0", "no", "off", ""].contains(&value.as_str());
    Some(match says {
        SameAs(_) => return None,
        Harmless(why) => Verdict::Taken(why),
        HarmlessIf(known, why, _) if values.iter().all(|value| known.contains(&value.as_str())) => {
            Verdict::Taken(why)
        }
        HarmlessIf(_, _, instead) => Verdict::Refused(instead),
        Refused(_) if *takes == Takes::Nothing && values.iter().all(is_off) => {
            Verdict::Taken("it is off anyway")
        }
        Refused(instead) => Verdict::Refused(instead),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn the_table_names_each_option_once_and_none_of_ours() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").expect("cli.rs declares it");
        let ours: BTreeSet<&str> = serve.get_arguments().filter_map(Arg::get_long).collect();
        let mut seen = BTreeSet::new();
        for Foreign { names, says, .. } in TABLE {
            for name in *names {
                assert!(seen.insert(*name), "{name} stands there twice");
                assert!(!ours.contains(name), "{name} is ours");
            }
            if let SameAs(target) = says {
                assert!(ours.contains(target), "{target} is none of ours");
            }
        }
        for (short, long) in SHORT {
            assert!(
                ours.contains(long) || seen.contains(long),
                "{short} is {long}, which nobody knows"
            );
        }
    }

    #[test]
    fn arguments_are_spelled_as_ours() {
        for (arg, expected) in [
            ("-tp", "--tensor-parallel-size"),
            ("-tp=2", "--tensor-parallel-size=2"),
            ("--max_model_len=1_0", "--max-model-len=1_0"),
            ("--no-enable-lora", "--enable-lora=false"),
            ("--no-webui", "--no-webui"),
            ("--no-such", "--no-such"),
            ("a_b=c", "a_b=c"),
            ("-1", "-1"),
        ] {
            assert_eq!(spelled_out(arg), expected);
        }
    }

    /// docs/coming-from.md: options of the first column are known here, those of the second are ours.
    #[test]
    fn the_guide_names_options_that_are() {
        let command = Cli::command();
        let commands = command.get_subcommands().flat_map(Command::get_arguments);
        let ours: BTreeSet<&str> = commands.filter_map(Arg::get_long).collect();
        let options = |cell: &'static str| {
            let words = cell.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
            words.filter_map(|word| word.strip_prefix("--"))
        };
        let guide = include_str!("../../docs/coming-from.md");
        let mut seen = 0;
        for row in guide.lines().filter(|line| line.starts_with("| ")) {
            let cells: Vec<&str> = row.split(" | ").collect();
            // torchrun and torchtune have none of a server's.
            let there = options(cells[0]).filter(|_| !row.contains("`tune ") && !row.contains("torchrun"));
            for option in there {
                assert!(
                    find(option).is_some() || ours.contains(option),
                    "--{option}: {row}"
                );
                seen += 1;
            }
            for option in options(cells[1]) {
                assert!(ours.contains(option), "--{option} is none of ours: {row}");
                seen += 1;
            }
        }
        assert!(seen > 30, "{seen} options");
    }
}
