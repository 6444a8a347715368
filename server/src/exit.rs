//! With which code the process ends, so that whoever starts it again can tell what another start may mend from what it
//! cannot: 0 it was asked to end, 1 something went wrong that may pass, 2 the command line is wrong (clap's own), 78 a
//! setting, the model or a place is wrong. Not here: what went wrong.

use std::error::Error;
use std::io;

use tandem_backend::LoadError;
use tandem_router::api::RouterError;
use tandem_store::StoreError;
use tandem_text::TextError;

use crate::config::ConfigError;
use crate::hub::HubError;
use crate::keys::BadKey;
use crate::origins::BadOrigin;

/// EX_CONFIG of BSD's sysexits.h.
const WRONG_SETTING: u8 = 78;
const FAILURE: u8 = 1;

/// An option that cannot be meant.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongSetting(pub String);

pub fn code(error: &anyhow::Error) -> u8 {
    match error.chain().find_map(lasts) {
        Some(true) => WRONG_SETTING,
        Some(false) | None => FAILURE,
    }
}

/// Whether another start would fail the same way. `None`: this error does not say.
fn lasts(error: &(dyn Error + 'static)) -> Option<bool> {
    if error.is::<WrongSetting>()
        || error.is::<ConfigError>()
        || error.is::<BadKey>()
        || error.is::<BadOrigin>()
        // Of a model's tokenizer: its files do not change by themselves.
        || error.is::<TextError>()
    {
        return Some(true);
    }
    if let Some(error) = error.downcast_ref::<RouterError>() {
        return Some(match error {
            RouterError::Store(error) => store_lasts(error),
            // An adapter that --lora-modules names.
            RouterError::Invalid { .. } | RouterError::Adapter { .. } | RouterError::Conflict(_) => true,
            _ => false,
        });
    }
    if let Some(error) = error.downcast_ref::<HubError>() {
        return Some(match error {
            HubError::Disk { error, .. } => io_lasts(error),
            HubError::Damaged { .. } => false,
            error => !error.may_pass(),
        });
    }
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return Some(store_lasts(error));
    }
    if let Some(error) = error.downcast_ref::<LoadError>() {
        return Some(!matches!(error, LoadError::Lost(_)));
    }
    error.downcast_ref::<io::Error>().map(io_lasts)
}

fn store_lasts(error: &StoreError) -> bool {
    match error {
        // Who holds it may be about to end.
        StoreError::Locked(_) => false,
        StoreError::Io { source, .. } => io_lasts(source),
        _ => error.away().is_none(),
    }
}

fn io_lasts(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(
        error.kind(),
        K::NotFound
            | K::PermissionDenied
            | K::ReadOnlyFilesystem
            | K::NotADirectory
            | K::IsADirectory
            | K::InvalidInput
            // Text that is not UTF-8.
            | K::InvalidData
            | K::AddrNotAvailable
    )
}

/// An error and its causes. Some libraries write a cause into their own words too: it is said once.
pub fn words(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |said, cause| {
        let cause = cause.to_string();
        match (said.is_empty(), said.contains(&cause)) {
            (true, _) => cause,
            (false, true) => said,
            (false, false) => format!("{said}: {cause}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn what_lasts_is_told_from_what_passes() {
        let io = |kind: io::ErrorKind| anyhow::Error::from(io::Error::from(kind));
        let store = |error| Err::<(), StoreError>(error).context("the store").unwrap_err();
        for (error, expected) in [
            (anyhow!("the engine ended"), FAILURE),
            (WrongSetting("--published".to_owned()).into(), WRONG_SETTING),
            (
                io(io::ErrorKind::NotFound).context("--model /nowhere"),
                WRONG_SETTING,
            ),
            (
                io(io::ErrorKind::PermissionDenied).context("--data-dir /data"),
                WRONG_SETTING,
            ),
            (io(io::ErrorKind::AddrInUse).context("cannot listen"), FAILURE),
            (LoadError::Option("dtype".to_owned()).into(), WRONG_SETTING),
            (LoadError::Lost("rank 1".to_owned()).into(), FAILURE),
            (TextError::Unsupported("decoder".to_owned()).into(), WRONG_SETTING),
            (store(StoreError::Locked("/data".into())), FAILURE),
            (store(StoreError::Damaged("a row".to_owned())), WRONG_SETTING),
            (
                store(StoreError::Newer {
                    database: "d".to_owned(),
                    found: 9,
                    known: 2,
                }),
                WRONG_SETTING,
            ),
            (
                RouterError::Store(StoreError::Url {
                    url: "x".to_owned(),
                    why: "y".to_owned(),
                })
                .into(),
                WRONG_SETTING,
            ),
            (
                RouterError::Adapter {
                    not_found: true,
                    message: "none".to_owned(),
                }
                .into(),
                WRONG_SETTING,
            ),
        ] {
            assert_eq!(code(&error), expected, "{error:#}");
        }
    }

    #[test]
    fn a_cause_that_is_in_the_words_is_said_once() {
        let error = anyhow!("status 403")
            .context("PUT failed: status 403")
            .context("the store");
        assert_eq!(words(&error), "the store: PUT failed: status 403");
        assert_eq!(words(&anyhow!("y").context("x")), "x: y");
    }
}
