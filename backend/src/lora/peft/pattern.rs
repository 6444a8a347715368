//! Regular expressions of adapter_config.json, as Python's `re` reads them. What the two engines may read differently is
//! refused rather than guessed at.

use regex::Regex;

/// Possessive repeats and set operations: text that both engines take, each in its own way.
const DIFFERENT: [&str; 8] = ["++", "*+", "?+", "}+", "&&", "~~", "--", "[["];

/// `re.fullmatch(pattern, text)`.
pub(super) fn whole(pattern: &str) -> Result<Regex, String> {
    compile(pattern, &format!("^(?:{pattern})$"))
}

/// How peft's get_pattern_key finds the key of a module: `re.match(rf"(.*\.)?({key})$", path)`.
pub(super) fn ending(key: &str) -> Result<Regex, String> {
    compile(key, &format!(r"^(?:.*\.)?(?:{key})$"))
}

/// `re.match(pattern, text)`.
pub(super) fn beginning(pattern: &str) -> Result<Regex, String> {
    compile(pattern, &format!("^(?:{pattern})"))
}

fn compile(shown: &str, pattern: &str) -> Result<Regex, String> {
    if let Some(found) = DIFFERENT.iter().find(|found| shown.contains(**found)) {
        return Err(format!(
            "the regular expression {shown:?} has {found:?}, which is not supported"
        ));
    }
    Regex::new(pattern).map_err(|error| {
        let why = match error {
            regex::Error::CompiledTooBig(_) => "it is too large".to_owned(),
            // The last line is the reason; those before it draw the place.
            other => other
                .to_string()
                .lines()
                .last()
                .unwrap_or_default()
                .trim()
                .to_owned(),
        };
        format!("the regular expression {shown:?} is not supported: {why}")
    })
}
