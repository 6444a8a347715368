//! The binary `tandem`: which command. Not here: how anything works.

#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
mod output;

mod access;
mod access_log;
mod app;
mod audit;
mod cli;
mod commands;
mod config;
mod connection;
mod convert;
mod demo;
mod dialect;
mod doctor;
mod error;
mod exit;
mod exposure;
mod extract;
mod fields;
mod foreign;
mod generate;
mod gpu_environment;
mod gpus;
mod health;
mod http;
mod hub;
mod id;
mod keys;
mod layers;
mod listen;
mod metrics;
mod origins;
mod otlp;
mod plot;
mod process;
mod ranks;
mod roots;
mod shares;
mod sse;
mod tls;
mod train;
mod unread;
mod values;

use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::cli::Command;
use crate::config::{ConfigError, Parsed};

fn main() -> ExitCode {
    let outcome =
        process::set_environment().context("cannot start again with the environment libtorch needs");
    let outcome = outcome.and_then(|()| process::check_environment().context("the environment"));
    match outcome.and_then(|()| run()) {
        Ok(code) if code == ExitCode::SUCCESS && output::is_lost() => ExitCode::FAILURE,
        Ok(code) => code,
        Err(error) => {
            note!("tandem: {}", exit::words(&error));
            ExitCode::from(exit::code(&error))
        }
    }
}

fn run() -> Result<ExitCode> {
    let variables = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
    let Parsed { cli, given } = match config::parse(std::env::args_os(), variables) {
        Err(ConfigError::Usage(usage)) => usage.exit(),
        parsed => parsed?,
    };
    let sending = process::start_log(
        cli.command.log_format(),
        cli.command.least_log(),
        cli.command.otlp_traces_endpoint(),
    )?;
    process::raise_descriptors();
    match cli.command {
        Command::Serve(options) => commands::serve::run(*options, &given)?,
        Command::Backend(options) => commands::backend::run(*options, &given)?,
        Command::Router(options) => commands::router::run(*options, &given)?,
        Command::Train(train) => {
            let started = ranks::started()?;
            return Ok(ExitCode::from(train::run(&train.settings, started)?.code()));
        }
        Command::Eval(eval) => train::eval::run(&eval.settings)?,
        Command::Generate(options) => return generate::run(&options),
        Command::Recipes(command) => train::recipes::run(&command)?,
        Command::Adapters(command) => commands::adapters::run(&command)?,
        Command::Download(download) => commands::download::run(&download)?,
        Command::Merge(merge) => commands::merge::run(&merge)?,
        Command::Plot(options) => plot::run(&options)?,
        Command::Quantize(quantize) => commands::quantize::run(&quantize)?,
        Command::Backup(options) => commands::backup::backup(options)?,
        Command::Restore(options) => commands::backup::restore(&options)?,
        Command::Keys(options) => commands::keys::run(options)?,
        Command::Doctor => output::say(format_args!("{}", doctor::report())),
        Command::Rank(rank) => ranks::run(&rank)?,
        Command::Openapi => output::say(format_args!("{}", app::document())),
        Command::Health(health) => {
            let line =
                health::ask(&health).with_context(|| format!("nobody answers on port {}", health.port))?;
            say!("{line}");
            return Ok(if health::is_well(&line) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
    }
    drop(sending);
    Ok(ExitCode::SUCCESS)
}
