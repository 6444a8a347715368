//! Files to the wire, and a file's name from it.

use tandem_openapi::files::File;
use tandem_router::api::FileInfo;

use super::integer;
use crate::error::{ApiError, invalid};

const NAME_CHARS: usize = 255;
/// OpenAI's list, and what a server makes itself.
const PURPOSES: [&str; 6] = ["fine-tune", "assistants", "batch", "vision", "user_data", "evals"];
const EXPIRY_SECONDS: (i64, i64) = (3600, 2_592_000);

pub fn file(info: FileInfo) -> File {
    let FileInfo {
        id,
        bytes,
        created_at,
        expires_at,
        filename,
        purpose,
    } = info;
    File {
        id,
        object: "file",
        bytes,
        created_at,
        expires_at,
        filename,
        purpose,
        status: "processed",
        status_details: None,
    }
}

/// The name is only ever shown, never a path; still, folders and control characters go.
pub fn filename(given: Option<&str>) -> String {
    let last = given
        .unwrap_or_default()
        .rsplit(['/', '\\'])
        .next()
        .unwrap_or_default();
    let name: String = last
        .chars()
        .filter(|c| !c.is_control())
        .take(NAME_CHARS)
        .collect();
    match name.trim() {
        "" | "." | ".." => "file".to_owned(),
        name => name.to_owned(),
    }
}

pub fn purpose(given: Option<String>) -> Result<String, ApiError> {
    match given {
        None => Err(missing("purpose")),
        Some(purpose) if PURPOSES.contains(&purpose.as_str()) => Ok(purpose),
        Some(purpose) => {
            let purpose: String = purpose.chars().take(40).collect();
            Err(invalid(
                "purpose",
                format!("{purpose:?} is not a purpose; these are: {}", PURPOSES.join(", ")),
            ))
        }
    }
}

pub fn missing(param: &'static str) -> ApiError {
    ApiError::Invalid {
        param: Some(param.to_owned()),
        code: Some("missing_required_parameter"),
        message: format!("Missing required parameter: '{param}'."),
    }
}

pub fn expiry_seconds(text: &str) -> Result<u64, ApiError> {
    let param = "expires_after[seconds]";
    let seconds = text
        .trim()
        .parse()
        .map_err(|_| invalid(param, format!("{param} must be an integer")))?;
    Ok(integer(param, seconds, EXPIRY_SECONDS.0, EXPIRY_SECONDS.1)?.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_no_paths() {
        for (given, expected) in [
            (Some("données été.jsonl"), "données été.jsonl"),
            (Some("../../etc/passwd"), "passwd"),
            (Some("C:\\data\\x.jsonl"), "x.jsonl"),
            (Some("a\0b\nc"), "abc"),
            (Some(".."), "file"),
            (Some("x/"), "file"),
            (None, "file"),
        ] {
            assert_eq!(filename(given), expected);
        }
        assert_eq!(filename(Some(&"é".repeat(999))).chars().count(), NAME_CHARS);
    }
}
