//! Batches from the wire and to it. What a batch may ask is the router's.

use tandem_openapi::batches::{Batch, BatchError, BatchErrors, CreateBatch, ExpiresAfter, RequestCounts};
use tandem_router::batches::{self, BatchRequest, Endpoint, LineError};

use crate::error::{ApiError, invalid};

pub fn request(body: CreateBatch) -> Result<BatchRequest, ApiError> {
    let CreateBatch {
        input_file_id,
        endpoint,
        completion_window,
        metadata,
        output_expires_after,
    } = body;
    let known = Endpoint::ALL.into_iter().find(|known| known.path() == endpoint);
    let endpoint = known.ok_or_else(|| {
        let paths = Endpoint::ALL.map(Endpoint::path).join(", ");
        invalid(
            "endpoint",
            format!("endpoint must be one of {paths}, got {endpoint:?}"),
        )
    })?;
    let window_s = window_s(&completion_window).ok_or_else(|| {
        let message = format!(
            "completion_window must be a whole number of minutes, hours or days such as 24h, got {completion_window:?}"
        );
        invalid("completion_window", message)
    })?;
    Ok(BatchRequest {
        input_file: input_file_id,
        endpoint,
        window: completion_window,
        window_s,
        metadata: metadata.unwrap_or_default(),
        output_expires_after_s: output_expires_after
            .map(|after| expiry("output_expires_after", after))
            .transpose()?,
    })
}

fn window_s(text: &str) -> Option<u64> {
    let unit = match text.chars().last()? {
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        _ => return None,
    };
    let number = &text[..text.len() - 1];
    // A sign is none of it.
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    number
        .parse::<u64>()
        .ok()
        .filter(|_| is_number)?
        .checked_mul(unit)
}

/// Seconds; how many there may be is the router's.
pub fn expiry(param: &str, after: ExpiresAfter) -> Result<u64, ApiError> {
    let ExpiresAfter { anchor, seconds } = after;
    if anchor != "created_at" {
        return Err(invalid(
            format!("{param}.anchor"),
            format!("{param}.anchor must be \"created_at\", got {anchor:?}"),
        ));
    }
    u64::try_from(seconds).map_err(|_| {
        let param = format!("{param}.seconds");
        let message = format!("{param} must not be negative, got {seconds}");
        invalid(param, message)
    })
}

pub fn batch(batch: batches::Batch) -> Batch {
    let batches::Batch {
        id,
        request,
        status,
        created_at,
        expires_at,
        in_progress_at,
        finalizing_at,
        cancelling_at,
        finished_at,
        tally,
        errors,
        output_file,
        error_file,
    } = batch;
    let ended = |end: &str| finished_at.filter(|_| status == end);
    let error = |error: LineError| {
        let LineError {
            code,
            message,
            line,
            param,
        } = error;
        BatchError {
            code,
            message,
            line,
            param,
        }
    };
    Batch {
        id,
        object: "batch",
        endpoint: request.endpoint.path(),
        errors: (!errors.is_empty()).then(|| BatchErrors {
            object: "list",
            data: errors.into_iter().map(error).collect(),
        }),
        input_file_id: request.input_file,
        completion_window: request.window,
        output_file_id: output_file,
        error_file_id: error_file,
        created_at,
        in_progress_at,
        expires_at,
        finalizing_at,
        completed_at: ended("completed"),
        failed_at: ended("failed"),
        expired_at: ended("expired"),
        cancelling_at,
        cancelled_at: ended("cancelled"),
        request_counts: RequestCounts {
            total: tally.total,
            completed: tally.completed,
            failed: tally.failed,
        },
        metadata: (!request.metadata.is_empty()).then_some(request.metadata),
        status,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn windows_are_whole_numbers_with_a_unit() {
        for (text, expected) in [
            ("24h", Some(86_400)),
            ("5m", Some(300)),
            ("2d", Some(172_800)),
            ("", None),
            ("h", None),
            ("+1h", None),
            ("1.5h", None),
            ("24", None),
            ("24 h", None),
            ("99999999999999999999d", None),
            ("1é", None),
        ] {
            assert_eq!(super::window_s(text), expected, "{text:?}");
        }
    }
}
