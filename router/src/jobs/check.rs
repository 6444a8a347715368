//! What a job may ask for beyond core's table of settings: names, and the limits of this replica. Whether files exist is
//! the caller's question; what is not asked is `hyper`'s.

use tandem_core::job::TABLES;
use tandem_core::settings::{ALL_LINEAR, Settings};
use tandem_text::dataset::Reading;

use crate::api::{JobRequest, RouterError};
use crate::jobs::hyper::Bounds;
use crate::jobs::{name, record};

const MAX_SUFFIX_CHARS: usize = 64;
const MAX_LEGACY_SUFFIX_CHARS: usize = 40;
/// Of rows of one kind.
const MAX_FILES: usize = 100;
/// Of a job's settings as JSON: they stand in its row, and in every list.
const MAX_SETTINGS_BYTES: usize = 128 << 10;
/// Of those of all trials of a sweep.
const MAX_TRIALS_BYTES: usize = 256 << 10;
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY_CHARS: usize = 64;
const MAX_METADATA_VALUE_CHARS: usize = 512;

pub(crate) fn request<'a>(request: &JobRequest, bounds: impl Into<Bounds<'a>>) -> Result<(), RouterError> {
    let JobRequest {
        model: _,
        training_file,
        validation_file,
        suffix,
        metadata,
        settings,
        trials,
        place: _,
        legacy,
        start: _,
    } = request;
    let bounds = bounds.into();
    for (what, bytes, most) in [
        ("settings", record::to_json(settings).len(), MAX_SETTINGS_BYTES),
        ("trials", record::to_json(trials).len(), MAX_TRIALS_BYTES),
    ] {
        if bytes > most {
            let message =
                format!("the {what} of a job have at most {most} bytes as JSON, these have {bytes}");
            return Err(RouterError::invalid("hyperparameters", message));
        }
    }
    fits(settings, bounds)?;
    trials
        .iter()
        .try_for_each(|trial| fits(&trial.settings, bounds))?;
    for (param, files) in [
        ("training_file", Some(training_file)),
        ("validation_file", validation_file.as_ref()),
    ] {
        let n = files.map_or(1, |files| files.0.len());
        if !(1..=MAX_FILES).contains(&n) {
            let message = format!("{param} must be a file or a list of 1 to {MAX_FILES} files, got {n}");
            return Err(RouterError::invalid(param, message));
        }
        let ids = files.map_or(&[][..], |files| &files.0);
        if let Some((_, id)) = ids.iter().enumerate().find(|(i, id)| ids[..*i].contains(id)) {
            let message = format!("{param}: {id} is there twice; n_epochs says how often a file is seen");
            return Err(RouterError::invalid(param, message));
        }
    }
    if let Some(suffix) = suffix {
        let most = if *legacy {
            MAX_LEGACY_SUFFIX_CHARS
        } else {
            MAX_SUFFIX_CHARS
        };
        self::suffix(suffix, most)?;
    }
    if metadata.len() > MAX_METADATA {
        let message = format!(
            "metadata can have at most {MAX_METADATA} pairs, got {}",
            metadata.len()
        );
        return Err(RouterError::invalid("metadata", message));
    }
    for (key, value) in metadata {
        let (key_chars, value_chars) = (key.chars().count(), value.chars().count());
        if key_chars > MAX_METADATA_KEY_CHARS || value_chars > MAX_METADATA_VALUE_CHARS {
            let message = format!(
                "metadata keys can have at most {MAX_METADATA_KEY_CHARS} characters and values \
                 {MAX_METADATA_VALUE_CHARS}, got {key_chars} and {value_chars}"
            );
            return Err(RouterError::invalid("metadata", message));
        }
        // Postgres takes none.
        if key.contains('\0') || value.contains('\0') {
            return Err(RouterError::invalid(
                "metadata",
                "metadata has a NUL character".to_owned(),
            ));
        }
    }
    Ok(())
}

/// Does this model have what is asked?
pub fn fits(settings: &Settings, bounds: Bounds) -> Result<(), RouterError> {
    Reading::new(settings).map_err(|(param, message)| RouterError::invalid(param, message))?;
    let limits = [
        ("max_seq_length", settings.max_seq_length, bounds.max_model_len),
        ("lora_r", settings.lora_r, bounds.max_lora_rank),
    ];
    for (param, value, most) in limits {
        if let Some(value) = value.filter(|&value| value > most) {
            let message = format!("{param} can be at most {most} here, got {value}");
            return Err(RouterError::invalid(param, message));
        }
    }
    let param = "lora_target_modules";
    let asked = settings.lora_target_modules.as_deref().unwrap_or_default();
    for (i, name) in asked.iter().enumerate() {
        let is_table = TABLES.contains(&name.as_str());
        if name != ALL_LINEAR && !is_table && !bounds.lora_targets.contains(name) {
            let known = bounds.lora_targets.join(", ");
            let message = format!(
                "{param}: this model has no '{name}'; use {ALL_LINEAR}, or some of {known}, {}",
                TABLES.join(", ")
            );
            return Err(RouterError::invalid(param, message));
        }
        if asked[..i].contains(name) {
            return Err(RouterError::invalid(
                param,
                format!("{param}: '{name}' is there twice"),
            ));
        }
    }
    Ok(())
}

/// It becomes a part of a model's name.
fn suffix(suffix: &str, most: usize) -> Result<(), RouterError> {
    let chars = suffix.chars().count();
    if !(1..=most).contains(&chars) {
        let message = format!("suffix must have between 1 and {most} characters, got {chars}");
        return Err(RouterError::invalid("suffix", message));
    }
    if name::hyphened(suffix).is_empty() {
        return Err(RouterError::invalid("suffix", "suffix is blank".to_owned()));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ' ');
    match suffix.chars().find(|&c| !plain(c)) {
        Some(c) => Err(RouterError::invalid(
            "suffix",
            format!(
                "suffix can have letters, digits, '-', '_', '.' and spaces, got '{}'",
                c.escape_debug()
            ),
        )),
        None => Ok(()),
    }
}
