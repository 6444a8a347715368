//! Wire types to domain types and back. Invalid input cannot pass: what comes out of here is in range, and what is not
//! built was refused by name. Not here: status codes, HTTP.

pub mod batches;
pub mod card;
pub mod chat;
pub mod completions;
pub mod embeddings;
pub mod files;
pub mod fine_tunes;
pub mod fine_tuning;
pub mod generate;
pub mod jobs;
pub mod messages;
pub mod models;
pub mod refuse;
pub mod responses;
pub mod sampling;
pub mod scores;
pub mod structured;
pub mod tinker;
pub mod tokens;
pub mod tools;
pub mod turns;
pub mod uploads;

use crate::error::{ApiError, invalid};

/// An integer of the wire within `low..=high`.
pub fn integer(param: &str, value: i64, low: i64, high: i64) -> Result<i64, ApiError> {
    if value < low {
        let message = format!("{param} must be at least {low}, got {value}");
        return Err(ApiError::Invalid {
            param: Some(param.into()),
            code: Some("integer_below_min_value"),
            message,
        });
    }
    if value > high {
        let message = format!("{param} must be at most {high}, got {value}");
        return Err(ApiError::Invalid {
            param: Some(param.into()),
            code: Some("integer_above_max_value"),
            message,
        });
    }
    Ok(value)
}

/// The same, as u32.
pub fn natural(param: &str, value: i64, low: u32, high: u32) -> Result<u32, ApiError> {
    let value = integer(param, value, i64::from(low), i64::from(high))?;
    Ok(u32::try_from(value).expect("low and high are u32"))
}

/// Token ids as the wire has them. Whether they are in the vocabulary is the router's question.
pub fn token_ids(param: &str, ids: Vec<i64>) -> Result<Vec<u32>, ApiError> {
    let id =
        |id: i64| u32::try_from(id).map_err(|_| invalid(param, format!("{id} in {param} is not a token id")));
    ids.into_iter().map(id).collect()
}
