//! The variable of each option: its name, which of them are set, and what no option has.

use clap::Arg;
use tandem_core::suggest::closest;

use super::ConfigError;

pub(super) const ENV_PREFIX: &str = "TANDEM_";
/// Variables that are not options of theirs.
const OTHER_VARIABLES: [&str; 3] = [LOG_VARIABLE, "TANDEM_CPU_KERNELS", "TANDEM_GPU_KERNELS"];
/// What to log, in the syntax of tracing's EnvFilter.
pub const LOG_VARIABLE: &str = "TANDEM_LOG";

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

pub(super) fn set_variables(arg: &Arg, variables: &[String]) -> Vec<String> {
    variables_of(arg)
        .filter(|name| variables.contains(name))
        .collect()
}

pub(super) fn with_variable(arg: Arg, variables: &[String]) -> Arg {
    let set = set_variables(&arg, variables).into_iter().next();
    match set.or_else(|| variables_of(&arg).next()) {
        // Leaked once per option: clap without its `string` feature wants static names.
        Some(name) => arg.env(&*name.leak()).hide_env(true),
        None => arg,
    }
}

pub(super) fn check_variables<'a>(
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
