//! Batches: a file of requests in, files of answers out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[schema(example = json!({"input_file_id": "file-abc123", "endpoint": "/v1/chat/completions", "completion_window": "24h"}))]
pub struct CreateBatch {
    /// A file with purpose `batch`: a line of JSON for each request, with `custom_id`, `method` (POST), `url` (the endpoint) and
    /// `body`.
    pub input_file_id: String,
    /// `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` or `/v1/responses`
    pub endpoint: String,
    /// How long it may take: `24h`, or any whole number of minutes (`m`), hours (`h`) or days (`d`) up to 30 days.
    pub completion_window: String,
    pub metadata: Option<BTreeMap<String, String>>,
    /// When the files of answers go.
    pub output_expires_after: Option<ExpiresAfter>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ExpiresAfter {
    /// `created_at`
    pub anchor: String,
    /// 3600 to 2592000
    pub seconds: i64,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Batch {
    /// `batch_...`
    pub id: String,
    /// `batch`
    pub object: &'static str,
    pub endpoint: &'static str,
    /// Of a file that was refused.
    #[schema(required)]
    pub errors: Option<BatchErrors>,
    pub input_file_id: String,
    pub completion_window: String,
    /// `validating`, `failed`, `in_progress`, `finalizing`, `completed`, `expired`, `cancelling` or `cancelled`
    pub status: String,
    /// The answers, once the batch has ended. `null`: there are none.
    #[schema(required)]
    pub output_file_id: Option<String>,
    /// What was refused or not answered, once the batch has ended. `null`: nothing was.
    #[schema(required)]
    pub error_file_id: Option<String>,
    pub created_at: i64,
    #[schema(required)]
    pub in_progress_at: Option<i64>,
    pub expires_at: i64,
    #[schema(required)]
    pub finalizing_at: Option<i64>,
    #[schema(required)]
    pub completed_at: Option<i64>,
    #[schema(required)]
    pub failed_at: Option<i64>,
    #[schema(required)]
    pub expired_at: Option<i64>,
    #[schema(required)]
    pub cancelling_at: Option<i64>,
    #[schema(required)]
    pub cancelled_at: Option<i64>,
    pub request_counts: RequestCounts,
    #[schema(required)]
    pub metadata: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct RequestCounts {
    pub total: u64,
    pub completed: u64,
    pub failed: u64,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BatchErrors {
    /// `list`
    pub object: &'static str,
    pub data: Vec<BatchError>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BatchError {
    pub code: String,
    pub message: String,
    /// From 1. `null`: it is the file.
    #[schema(required)]
    pub line: Option<u64>,
    #[schema(required)]
    pub param: Option<String>,
}
