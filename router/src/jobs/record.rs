//! Rows of the store to the API's types and back.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tandem_core::id::JobId;
use tandem_store::{CheckpointRow, EventRow, JobRow, Rows, StoreError};

use crate::api::{Checkpoint, Job, JobEventRecord, JobStatus, Level, Page, RouterError};

/// The database's own.
pub(crate) fn job_id(id: String) -> Result<JobId, RouterError> {
    JobId::try_from(id).map_err(|error| RouterError::Store(StoreError::Damaged(error.to_string())))
}

pub(crate) fn job(row: JobRow) -> Result<Job, RouterError> {
    let JobRow {
        key_id: _,
        seq: _,
        tenant: _,
        id,
        created_at,
        updated_at,
        finished_at,
        estimated_finish,
        status,
        asked: _,
        saved: _,
        request,
        hyper,
        model_name: _,
        fine_tuned_model,
        trained_tokens,
        result_files,
        error,
        parent,
        trials,
        deaths: _,
    } = row;
    Ok(Job {
        created_at,
        updated_at,
        finished_at,
        estimated_finish,
        status: word(&status)?,
        request: from_json(&request)?,
        hyper: hyper.as_deref().map(from_json).transpose()?,
        fine_tuned_model,
        trained_tokens,
        result_files: from_json(&result_files)?,
        error: error.as_deref().map(from_json).transpose()?,
        parent,
        trials: trials.as_deref().map(from_json).transpose()?.unwrap_or_default(),
        id: job_id(id)?,
    })
}

pub(crate) fn event(row: EventRow) -> Result<JobEventRecord, RouterError> {
    let EventRow {
        seq: _,
        id,
        created_at,
        level,
        message,
        data,
    } = row;
    Ok(JobEventRecord {
        id,
        created_at,
        level: word(&level)?,
        message,
        data: from_json(&data)?,
    })
}

pub(crate) fn checkpoint(row: CheckpointRow) -> Result<Checkpoint, RouterError> {
    let CheckpointRow {
        id,
        created_at,
        step,
        model,
        metrics,
    } = row;
    Ok(Checkpoint {
        id,
        created_at,
        step,
        model,
        metrics: from_json(&metrics)?,
    })
}

pub(crate) fn page<R, T>(
    rows: Rows<R>,
    convert: impl Fn(R) -> Result<T, RouterError>,
) -> Result<Page<T>, RouterError> {
    let data = rows.rows.into_iter().map(convert).collect::<Result<_, _>>()?;
    Ok(Page {
        data,
        has_more: rows.has_more,
    })
}

pub(crate) fn status_name(status: JobStatus) -> &'static str {
    match status {
        JobStatus::ValidatingFiles => "validating_files",
        JobStatus::Queued => "queued",
        JobStatus::Sweeping => "sweeping",
        JobStatus::Running => "running",
        JobStatus::Paused => "paused",
        JobStatus::Succeeded => "succeeded",
        JobStatus::Failed => "failed",
        JobStatus::Cancelled => "cancelled",
    }
}

pub(crate) fn level_name(level: Level) -> &'static str {
    match level {
        Level::Info => "info",
        Level::Warn => "warn",
        Level::Error => "error",
    }
}

pub(crate) fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data with string keys is JSON")
}

pub(crate) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, RouterError> {
    serde_json::from_str(text).map_err(|error| damaged(text, &error))
}

/// A status or level by its name, which is also how serde spells it.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, RouterError> {
    serde_json::from_value(serde_json::Value::from(text)).map_err(|error| damaged(text, &error))
}

fn damaged(text: &str, error: &serde_json::Error) -> RouterError {
    let shown: String = text.chars().take(100).collect();
    RouterError::Store(StoreError::Damaged(format!("{error} in {shown:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_store_are_those_serde_reads() {
        use JobStatus::*;
        for status in [
            ValidatingFiles,
            Queued,
            Sweeping,
            Running,
            Paused,
            Succeeded,
            Failed,
            Cancelled,
        ] {
            assert_eq!(word::<JobStatus>(status_name(status)).unwrap(), status);
        }
        for level in [Level::Info, Level::Warn, Level::Error] {
            assert_eq!(word::<Level>(level_name(level)).unwrap(), level);
        }
        assert!(word::<JobStatus>("asleep").is_err());
    }
}
