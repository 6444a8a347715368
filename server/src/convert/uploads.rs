//! Uploads in parts, from the wire and to it.

use tandem_openapi::uploads::{CreateUpload, Upload, UploadPart};
use tandem_router::uploads::{PartInfo, UploadInfo, UploadRequest};

use super::{batches, files, integer};
use crate::error::ApiError;

pub fn request(body: CreateUpload) -> Result<UploadRequest, ApiError> {
    let CreateUpload {
        filename,
        purpose,
        bytes,
        // What a file is, its purpose says.
        mime_type: _,
        expires_after,
    } = body;
    Ok(UploadRequest {
        filename: files::filename(Some(&filename)),
        purpose: files::purpose(Some(purpose))?,
        bytes: integer("bytes", bytes, 1, i64::MAX)?.cast_unsigned(),
        expires_after_seconds: expires_after
            .map(|after| batches::expiry("expires_after", after))
            .transpose()?,
    })
}

pub fn upload(info: UploadInfo) -> Upload {
    let UploadInfo {
        id,
        created_at,
        expires_at,
        status,
        filename,
        purpose,
        bytes,
        file,
    } = info;
    Upload {
        id,
        object: "upload",
        bytes,
        created_at,
        expires_at,
        filename,
        purpose,
        status,
        file: file.map(files::file),
    }
}

pub fn part(info: PartInfo) -> UploadPart {
    let PartInfo {
        id,
        created_at,
        upload,
    } = info;
    UploadPart {
        id,
        object: "upload.part",
        created_at,
        upload_id: upload,
    }
}
