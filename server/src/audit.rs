//! What changed something, and by whose key: a line of the log (target `audit`), and one of JSON in the file of
//! `--audit-log`. Attempts that were refused are written down, too. Keys themselves never are. Not here: which routes
//! change something (access).

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc;

use axum::http::StatusCode;
use serde::Serialize;

use crate::app::now;
use crate::keys::Grant;

/// Beside an answer: what was made or changed, where the path does not say it.
#[derive(Clone, Debug)]
pub struct Object(pub String);

/// What is known of a request before it is answered.
pub struct Record {
    pub action: &'static str,
    pub path: String,
    pub request_id: String,
    /// `None`: no key, or none that is known.
    pub grant: Option<Grant>,
}

#[derive(Serialize)]
struct Line<'a> {
    time: i64,
    action: &'a str,
    path: &'a str,
    object: Option<&'a str>,
    status: u16,
    key: Option<&'a str>,
    name: Option<&'a str>,
    tenant: Option<&'a str>,
    role: Option<&'a str>,
    request_id: &'a str,
}

/// Cheap to clone.
#[derive(Clone, Default)]
pub struct Audit {
    /// To the thread that writes the file: requests do not wait for a disk.
    lines: Option<mpsc::Sender<Vec<u8>>>,
}

impl Audit {
    /// The file is appended to.
    pub fn open(file: Option<&Path>) -> io::Result<Audit> {
        let Some(path) = file else {
            return Ok(Audit::default());
        };
        let mut file = OpenOptions::new().append(true).create(true).open(path)?;
        let (lines, inbox) = mpsc::channel::<Vec<u8>>();
        let path = path.display().to_string();
        std::thread::Builder::new()
            .name("tandem-audit".to_owned())
            .spawn(move || {
                for line in inbox {
                    // In one write, so that several processes may append to one file.
                    if let Err(error) = file.write_all(&line) {
                        tracing::error!(path, %error, "a line of the audit log was not written; it is in this log");
                    }
                }
            })?;
        Ok(Audit { lines: Some(lines) })
    }

    pub fn note(&self, record: &Record, object: Option<&Object>, status: StatusCode) {
        let Record {
            action,
            path,
            request_id,
            grant,
        } = record;
        let line = Line {
            time: now(),
            action,
            path,
            object: object.map(|Object(object)| object.as_str()),
            status: status.as_u16(),
            key: grant.as_ref().map(|grant| grant.id.as_str()),
            name: grant.as_ref().map(|grant| grant.name.as_str()),
            tenant: grant.as_ref().map(|grant| grant.tenant.as_str()),
            role: grant.as_ref().map(|grant| grant.role.name()),
            request_id,
        };
        let Line {
            object,
            status,
            key,
            tenant,
            ..
        } = &line;
        tracing::info!(target: "audit", action, path, object, status, key, tenant, request_id, "change");
        if let Some(lines) = &self.lines {
            let mut text = serde_json::to_vec(&line).expect("plain data are JSON");
            text.push(b'\n');
            // The thread ends with the last sender.
            drop(lines.send(text));
        }
    }
}
