//! Files that come in parts.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::batches::ExpiresAfter;
use crate::files::File;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"filename": "rows.jsonl", "purpose": "fine-tune", "bytes": 2048, "mime_type": "text/jsonl"}))]
pub struct CreateUpload {
    pub filename: String,
    pub purpose: String,
    /// Of the whole file.
    #[schema(minimum = 1)]
    pub bytes: i64,
    /// Not looked at: what the file is, its purpose says.
    pub mime_type: String,
    /// When the file goes.
    pub expires_after: Option<ExpiresAfter>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"part_ids": ["part_abc123", "part_def456"]}))]
pub struct CompleteUpload {
    /// In the order of the file.
    pub part_ids: Vec<String>,
    /// Of the whole file, in hexadecimal digits.
    pub md5: Option<String>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Upload {
    /// `upload_...`
    pub id: String,
    /// `upload`
    pub object: &'static str,
    pub bytes: u64,
    pub created_at: i64,
    /// Parts may come until then.
    pub expires_at: i64,
    pub filename: String,
    pub purpose: String,
    /// `pending`, `completed`, `cancelled` or `expired`
    pub status: String,
    /// Once it is completed.
    #[schema(required)]
    pub file: Option<File>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct UploadPart {
    /// `part_...`
    pub id: String,
    /// `upload.part`
    pub object: &'static str,
    pub created_at: i64,
    pub upload_id: String,
}

/// The multipart form of a part, for the document only: the body is streamed to disk.
#[derive(ToSchema)]
pub struct PartForm {
    /// At most 64 MB.
    #[schema(value_type = String, format = Binary)]
    pub data: String,
}
