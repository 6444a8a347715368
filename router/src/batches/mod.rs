//! Batches of requests: a file of them in, files of answers out. A batch's state is its row, and each answer is a row from
//! the moment it is there until the batch ends; whoever works on a batch holds its lease (`jobs::keeper`), so a killed
//! router's batches are gone on with, here or elsewhere, and no line that has an answer is asked again.
//!
//! ```text
//! validating --input--> in_progress --run--> finalizing --output--> completed
//!      \                     \-------- its time is over ----------> expired
//!       \---> failed          \------- cancelling ----------------> cancelled
//! ```
//! Not here: what the answer to a line is (the edge's, by [`Answers`]).

mod input;
mod output;
mod run;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_store::{BatchRow, NewBatch, Tally, Tenant};
use tokio::sync::{Mutex, Notify, watch};

use crate::Router;
use crate::api::{Client, Meter, Page, RouterError};

pub(crate) use run::run;

/// The purpose of a file of requests, and of those of answers.
pub const PURPOSE: &str = "batch";
const OUTPUT_PURPOSE: &str = "batch_output";
const VALIDATING: &str = "validating";
const IN_PROGRESS: &str = "in_progress";
const FINALIZING: &str = "finalizing";
const CANCELLING: &str = "cancelling";
const COMPLETED: &str = "completed";
const FAILED: &str = "failed";
const EXPIRED: &str = "expired";
const CANCELLED: &str = "cancelled";
/// How long a batch may take.
const WINDOW_S: std::ops::RangeInclusive<u64> = 1..=30 * 24 * 3600;
/// The row of a batch that ended so long ago goes, once its files of answers are gone, too.
pub(crate) const KEPT_S: i64 = 30 * 24 * 3600;
const EXPIRES_AFTER_S: std::ops::RangeInclusive<u64> = 3600..=2_592_000;
const MAX_METADATA: usize = 16;
const MAX_KEY_CHARS: usize = 64;
const MAX_VALUE_CHARS: usize = 512;

/// What a batch may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Endpoint {
    #[serde(rename = "/v1/chat/completions")]
    Chat,
    #[serde(rename = "/v1/completions")]
    Completions,
    #[serde(rename = "/v1/embeddings")]
    Embeddings,
    #[serde(rename = "/v1/responses")]
    Responses,
}

impl Endpoint {
    pub const ALL: [Endpoint; 4] = [
        Endpoint::Chat,
        Endpoint::Completions,
        Endpoint::Embeddings,
        Endpoint::Responses,
    ];

    pub fn path(self) -> &'static str {
        match self {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
            Endpoint::Embeddings => "/v1/embeddings",
            Endpoint::Responses => "/v1/responses",
        }
    }
}

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchRequest {
    pub input_file: String,
    pub endpoint: Endpoint,
    /// As it was given: `24h`.
    pub window: String,
    pub window_s: u64,
    pub metadata: BTreeMap<String, String>,
    /// Of the files it makes.
    pub output_expires_after_s: Option<u64>,
}

/// A batch as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    pub id: String,
    pub request: BatchRequest,
    /// OpenAI's word.
    pub status: String,
    pub created_at: i64,
    pub expires_at: i64,
    pub in_progress_at: Option<i64>,
    pub finalizing_at: Option<i64>,
    pub cancelling_at: Option<i64>,
    /// Which end it was says `status`.
    pub finished_at: Option<i64>,
    pub tally: Tally,
    pub errors: Vec<LineError>,
    pub output_file: Option<String>,
    pub error_file: Option<String>,
}

/// What is wrong with a file of requests, or with a line of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LineError {
    pub code: String,
    pub message: String,
    /// From 1. `None`: it is the file.
    pub line: Option<u64>,
    pub param: Option<String>,
}

/// One request of a batch, as it would come over HTTP.
pub struct Line {
    pub client: Client,
    pub endpoint: Endpoint,
    /// JSON.
    pub body: Vec<u8>,
}

/// What it was answered.
pub struct LineAnswer {
    pub status: u16,
    pub request_id: String,
    /// JSON in one line.
    pub body: String,
    /// The server could not now; after this time it may.
    pub try_again: Option<Duration>,
}

/// Who answers.
pub type Answers = Arc<dyn Fn(Line) -> Pin<Box<dyn Future<Output = LineAnswer> + Send>> + Send + Sync>;

/// Where those who make batches and those who run them meet.
pub(crate) struct Counter {
    answers: watch::Sender<Option<Answers>>,
    created: Notify,
    /// One file is read at a time: a line may be long.
    reading: Mutex<()>,
    /// Batches that are worked on here.
    active: AtomicUsize,
    /// That nobody works on, when last looked.
    queued: AtomicU64,
    completed_lines: AtomicU64,
    failed_lines: AtomicU64,
}

/// What is measured of batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchNumbers {
    /// That wait for somebody to work on them; every router counts them all.
    pub queued: u64,
    /// That this router works on.
    pub running: u64,
    /// Lines that this router had answered, and those that were refused or not answered.
    pub completed_lines: u64,
    pub failed_lines: u64,
}

impl Counter {
    pub fn new() -> Counter {
        Counter {
            answers: watch::Sender::new(None),
            created: Notify::new(),
            reading: Mutex::default(),
            active: AtomicUsize::new(0),
            queued: AtomicU64::new(0),
            completed_lines: AtomicU64::new(0),
            failed_lines: AtomicU64::new(0),
        }
    }
}

impl Router {
    /// From here on batches run.
    pub fn answer_batches(&self, answers: Answers) {
        self.0.counter.answers.send_replace(Some(answers));
    }

    pub fn batch_numbers(&self) -> BatchNumbers {
        let Counter {
            answers: _,
            created: _,
            reading: _,
            active,
            queued,
            completed_lines,
            failed_lines,
        } = &self.0.counter;
        BatchNumbers {
            queued: queued.load(Ordering::Relaxed),
            running: active.load(Ordering::Relaxed) as u64,
            completed_lines: completed_lines.load(Ordering::Relaxed),
            failed_lines: failed_lines.load(Ordering::Relaxed),
        }
    }

    pub(crate) async fn create_batch(
        &self,
        request: BatchRequest,
        client: &Client,
    ) -> Result<Batch, RouterError> {
        check(&request)?;
        self.check_storage(client).await?;
        if client.meter.as_ref().is_some_and(Meter::limits_asking) {
            // Its lines are asked later, by nobody's key.
            let message = "a batch does not count for its key's limits: a key that has none makes batches";
            return Err(RouterError::Limited(message.to_owned()));
        }
        let param = "input_file_id";
        match self.of(client).file(&request.input_file).await {
            Ok(file) if file.purpose == PURPOSE => {}
            Ok(file) => {
                let message = format!(
                    "{param} {} has purpose '{}', it must have '{PURPOSE}'",
                    file.id, file.purpose
                );
                return Err(RouterError::invalid(param, message));
            }
            Err(RouterError::UnknownFile(id)) => {
                return Err(RouterError::invalid(
                    param,
                    format!("{param} {id:?} does not exist"),
                ));
            }
            Err(error) => return Err(error),
        }
        let row = self
            .0
            .store
            .insert_batch(NewBatch {
                base: self.info().base_digest,
                tenant: client.tenant.clone(),
                status: VALIDATING,
                expires_after_s: request.window_s,
                request: serde_json::to_string(&request).expect("plain data are JSON"),
                key_id: client.quota_key().map(str::to_owned),
            })
            .await?;
        self.0.counter.created.notify_one();
        tracing::info!(batch = %row.id, file = request.input_file, endpoint = request.endpoint.path(), "batch created");
        batch(row)
    }

    pub(crate) async fn batches(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Page<Batch>, RouterError> {
        let rows = self.0.store.batches(tenant, after, limit).await?;
        Ok(Page {
            data: rows.rows.into_iter().map(batch).collect::<Result<_, _>>()?,
            has_more: rows.has_more,
        })
    }

    /// Lines that one batch may ask at once: as many as run at once, divided by those that are worked on here.
    fn batch_share(&self) -> usize {
        let active = self.0.counter.active.load(Ordering::Relaxed).max(1);
        (self.0.fleet.slots() as usize).div_ceil(active).max(1)
    }

    pub(crate) async fn batch_row(&self, id: &str) -> Result<BatchRow, RouterError> {
        let row = self.0.store.batch(id).await?;
        row.ok_or_else(|| unknown(id))
    }

    pub(crate) async fn cancel_batch(&self, id: &str) -> Result<Batch, RouterError> {
        let cancelled = self
            .0
            .store
            .cancel_batch(id, &[VALIDATING, IN_PROGRESS], CANCELLING)
            .await?;
        let batch = batch(self.batch_row(id).await?)?;
        if cancelled {
            // Whoever works on it hears so by its keeper; if nobody does, somebody begins, and ends it.
            self.0.signals.wake_keepers();
            self.0.counter.created.notify_one();
            return Ok(batch);
        }
        match batch.status.as_str() {
            CANCELLING | CANCELLED => Ok(batch),
            status => Err(RouterError::Conflict(format!(
                "Cannot cancel a batch with status '{status}'."
            ))),
        }
    }
}

pub(crate) fn unknown(id: &str) -> RouterError {
    RouterError::Unknown {
        what: "batch",
        id: id.to_owned(),
    }
}

fn check(request: &BatchRequest) -> Result<(), RouterError> {
    let BatchRequest {
        input_file: _,
        endpoint: _,
        window,
        window_s,
        metadata,
        output_expires_after_s,
    } = request;
    if !WINDOW_S.contains(window_s) {
        let message = format!("completion_window must be from 1m to 30d, such as 24h, got {window:?}");
        return Err(RouterError::invalid("completion_window", message));
    }
    let is_long = |(key, value): (&String, &String)| {
        key.chars().count() > MAX_KEY_CHARS || value.chars().count() > MAX_VALUE_CHARS
    };
    if metadata.len() > MAX_METADATA || metadata.iter().any(is_long) {
        let message = format!(
            "metadata has at most {MAX_METADATA} keys of {MAX_KEY_CHARS} characters, with values of {MAX_VALUE_CHARS}"
        );
        return Err(RouterError::invalid("metadata", message));
    }
    if let Some(s) = output_expires_after_s.filter(|s| !EXPIRES_AFTER_S.contains(s)) {
        let (low, high) = (EXPIRES_AFTER_S.start(), EXPIRES_AFTER_S.end());
        let message = format!("output_expires_after.seconds must be between {low} and {high}, got {s}");
        return Err(RouterError::invalid("output_expires_after", message));
    }
    Ok(())
}

pub(crate) fn batch(row: BatchRow) -> Result<Batch, RouterError> {
    let BatchRow {
        id,
        tenant: _,
        created_at,
        expires_at,
        request,
        status,
        in_progress_at,
        finalizing_at,
        cancelling_at,
        finished_at,
        tally,
        errors,
        output_file,
        error_file,
        key_id: _,
        deaths: _,
        at_line: _,
    } = row;
    Ok(Batch {
        request: crate::jobs::record::from_json(&request)?,
        errors: errors
            .map(|errors| crate::jobs::record::from_json(&errors))
            .transpose()?
            .unwrap_or_default(),
        id,
        status,
        created_at,
        expires_at,
        in_progress_at,
        finalizing_at,
        cancelling_at,
        finished_at,
        tally,
        output_file,
        error_file,
    })
}
