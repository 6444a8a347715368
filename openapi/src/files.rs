//! Uploaded files and result files.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct File {
    pub id: String,
    /// `file`
    pub object: &'static str,
    pub bytes: u64,
    pub created_at: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<i64>,
    pub filename: String,
    pub purpose: String,
    /// `processed`: a file is checked before the upload is answered. Deprecated at OpenAI, polled by every client.
    pub status: &'static str,
    #[schema(required)]
    pub status_details: Option<String>,
}

/// The multipart form of an upload, for the document only: the body is streamed to disk part by part.
#[derive(ToSchema)]
pub struct UploadForm {
    #[schema(value_type = String, format = Binary)]
    pub file: String,
    /// `fine-tune` files are JSONL; other purposes are stored as they are.
    pub purpose: String,
    /// `created_at`
    #[schema(rename = "expires_after[anchor]")]
    pub expires_after_anchor: Option<String>,
    /// 3600 to 2592000
    #[schema(rename = "expires_after[seconds]")]
    pub expires_after_seconds: Option<u64>,
}
