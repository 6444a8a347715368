//! Jobs of the API of 2021 to 2023: the same jobs, in its words. A job has one id; here it is shown as `ft-...`.

use std::collections::BTreeMap;

use tandem_core::settings::{self, Asked};
use tandem_openapi::files::File;
use tandem_openapi::fine_tunes::{CreateFineTune, FineTune, FineTuneEvent, HyperParams};
use tandem_router::api::{FileIds, Job, JobEventRecord, JobRequest, JobStatus, RouterError};

use super::{fine_tuning, jobs};
use crate::error::ApiError;

const PREFIX: &str = "ft-";
const JOB_PREFIX: &str = "ftjob-";

/// `default_model`: the base model's name.
pub fn request(body: CreateFineTune, default_model: &str) -> Result<JobRequest, ApiError> {
    let CreateFineTune {
        training_file,
        validation_file,
        model,
        suffix,
        settings,
    } = body;
    let Asked { settings, trials } =
        settings::read_asked([("", settings)], validation_file.is_some()).map_err(fine_tuning::refused)?;
    Ok(JobRequest {
        model: model.unwrap_or_else(|| default_model.to_owned()),
        settings,
        trials,
        place: None,
        training_file: FileIds(training_file.into()),
        validation_file: validation_file.map(|files| FileIds(files.into())),
        suffix,
        metadata: BTreeMap::new(),
        legacy: true,
        start: None,
    })
}

/// A job as a client names it: `ft-...` and `ftjob-...` are the same one.
pub struct JobName {
    asked: String,
    /// Its own id.
    pub id: String,
}

impl JobName {
    pub fn new(asked: String) -> JobName {
        let id = match asked.strip_prefix(PREFIX) {
            Some(rest) => format!("{JOB_PREFIX}{rest}"),
            None => asked.clone(),
        };
        JobName { asked, id }
    }

    /// A job that does not exist is told by the name that was asked.
    pub fn found<T>(&self, answer: Result<T, RouterError>) -> Result<T, ApiError> {
        answer.map_err(|error| match error {
            RouterError::UnknownJob(id) if id == self.id => {
                RouterError::UnknownJob(self.asked.clone()).into()
            }
            other => other.into(),
        })
    }
}

/// The file objects of a job; a deleted file is missing.
pub struct Files {
    pub training: Vec<File>,
    pub validation: Vec<File>,
    pub results: Vec<File>,
}

pub fn fine_tune(job: Job, organization: &str, files: Files, events: Option<Vec<FineTuneEvent>>) -> FineTune {
    let Job {
        id,
        created_at,
        updated_at,
        finished_at: _,
        estimated_finish: _,
        status,
        request,
        hyper,
        fine_tuned_model,
        trained_tokens: _,
        result_files: _,
        error: _,
        parent: _,
        trials,
    } = job;
    let Files {
        training,
        validation,
        results,
    } = files;
    let hyper = hyper.as_ref();
    FineTune {
        id: format!(
            "{PREFIX}{}",
            id.as_str().strip_prefix(JOB_PREFIX).unwrap_or(id.as_str())
        ),
        object: "fine-tune",
        created_at,
        updated_at,
        model: request.model,
        fine_tuned_model,
        organization_id: organization.to_owned(),
        status: match status {
            // The old API knows no pause.
            JobStatus::ValidatingFiles | JobStatus::Queued | JobStatus::Paused => "pending",
            JobStatus::Sweeping if super::jobs::waits(&trials) => "pending",
            JobStatus::Sweeping | JobStatus::Running => "running",
            JobStatus::Succeeded => "succeeded",
            JobStatus::Failed => "failed",
            JobStatus::Cancelled => "cancelled",
        },
        hyperparams: HyperParams {
            n_epochs: hyper.map(|hyper| hyper.n_epochs).or(request.settings.n_epochs),
            batch_size: hyper
                .map(|hyper| hyper.batch_size)
                .or(request.settings.batch_size),
            learning_rate_multiplier: request.settings.learning_rate_multiplier.or(hyper.map(|_| 1.0)),
            prompt_loss_weight: request.settings.prompt_loss_weight.unwrap_or(0.0),
        },
        training_files: training,
        validation_files: validation,
        result_files: results,
        events,
    }
}

pub fn event(record: JobEventRecord) -> FineTuneEvent {
    let JobEventRecord {
        id: _,
        created_at,
        level,
        message,
        data: _,
    } = record;
    FineTuneEvent {
        object: "fine-tune-event",
        created_at,
        level: jobs::level(level),
        message,
    }
}
