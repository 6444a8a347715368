//! The datasets of a job, row by row from its files, durable or absent. Takes a while, and a thread. Not here: how rows become
//! tokens (`tandem_text::dataset`).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tandem_core::dataset::{Encoder, Group};
use tandem_core::job::files;
use tandem_store::Storage;
use tandem_text::Tokenizer;
use tandem_text::dataset::{
    self as rows, BadLine, MERGED, Options, Reading, Rows, Sample, Source, Statistics, tokenise,
};

use super::unfit::{Unfit, invalid, too_much, unwritten};
use crate::api::JobError;
use crate::jobs::hyper::Facts;

/// What a job's folder is made of.
pub(super) struct Datasets {
    pub folder: PathBuf,
    /// The folder of the adapter that the job starts from.
    pub start: Option<PathBuf>,
    pub training: Uploads,
    pub validation: Option<Uploads>,
    pub reading: Reading,
    pub options: Options,
    pub tokenizer: Tokenizer,
    /// What the job's tenant may store.
    pub storage: Option<Storage>,
}

/// Uploaded files of a job, whose rows are one data set.
pub(super) struct Uploads {
    pub param: &'static str,
    pub sources: Vec<Source>,
}

pub(super) struct Prepared {
    pub facts: Facts,
    /// Of its datasets.
    pub bytes: u64,
    /// For the job's events.
    pub notes: Vec<String>,
}

impl Datasets {
    /// Until somebody sets `given_up`.
    pub fn write(self, given_up: &AtomicBool) -> Result<Prepared, Unfit> {
        let Datasets {
            folder,
            start,
            training,
            validation,
            reading,
            options,
            tokenizer,
            storage,
        } = self;
        fs::create_dir_all(&folder).map_err(unwritten)?;
        if let Some(start) = &start {
            for (from, to) in [
                ("adapter_config.json", files::START_CONFIG),
                ("adapter_model.safetensors", files::START_TENSORS),
            ] {
                let bytes = fs::read(start.join(from)).map_err(unwritten)?;
                write(&folder.join(to), &bytes).map_err(unwritten)?;
            }
        }
        let convert = |uploads, reading: &Reading, name, storage| {
            let target = Target {
                path: folder.join(name),
                storage,
            };
            convert(uploads, reading, &tokenizer, &options, target, given_up)
        };
        let Converted { facts, note, bytes } = convert(training, &reading, files::TRAIN, storage)?;
        let mut prepared = Prepared {
            facts,
            notes: vec![note],
            bytes,
        };
        if let Some(validation) = validation {
            let storage = storage.map(|storage| Storage {
                stored: storage.stored + bytes,
                ..storage
            });
            let Converted { note, bytes, .. } = convert(validation, &reading.whole(), files::VALID, storage)?;
            prepared.notes.push(note);
            prepared.bytes += bytes;
        }
        Ok(prepared)
    }
}

/// Where a data set is written, and what its tenant may store.
struct Target {
    path: PathBuf,
    storage: Option<Storage>,
}

/// A data set that was written.
struct Converted {
    facts: Facts,
    note: String,
    bytes: u64,
}

/// Tokenise one data set, row by row, into its file. What has nothing to learn is left out and counted.
fn convert(
    uploads: Uploads,
    reading: &Reading,
    tokenizer: &Tokenizer,
    options: &Options,
    target: Target,
    given_up: &AtomicBool,
) -> Result<Converted, Unfit> {
    let Uploads { param, sources } = uploads;
    let kind = param.replace('_', " ");
    let bad = |message: &dyn std::fmt::Display| {
        let message = format!("The job failed due to an invalid {kind}. {message}");
        Unfit::Job(invalid(param, message))
    };
    let bad_line = |error: &BadLine| match crate::files::passing(error) {
        Some(error) => Unfit::Router(error.into()),
        None => bad(error),
    };
    let mut rows = Rows::open(sources, reading).map_err(|error| bad_line(&error))?;
    let partial = Partial(target.path.with_extension("partial"));
    let mut encoder = partial.open().and_then(Encoder::new).map_err(unwritten)?;
    let mut exceeded = None;
    let keep = |group: Group| {
        encoder.push(&group)?;
        if let Some(Err(too_much)) = target.storage.map(|storage| storage.check(encoder.bytes())) {
            exceeded = Some(too_much);
            return Err(io::ErrorKind::Other.into());
        }
        Ok(())
    };
    let each = |_: &Sample, _: &Group| !given_up.load(Ordering::Acquire);
    let statistics = match tokenise(&mut rows, tokenizer, options, each, keep) {
        Ok(statistics) => statistics,
        Err(rows::Unfit::GivenUp) => return Err(Unfit::GivenUp),
        Err(rows::Unfit::Row(error)) => return Err(bad_line(&error)),
        Err(rows::Unfit::Unkept(error)) => {
            return Err(match exceeded {
                Some(exceeded) => Unfit::Job(too_much(param, exceeded)),
                None => unwritten(error),
            });
        }
        Err(error) => return Err(bad(&error)),
    };
    let Statistics {
        examples,
        tokens,
        dropped,
        ..
    } = statistics;
    if examples == 0 {
        let limit = options.max_seq_length;
        let message = format!(
            "The {kind} has 0 usable examples, but must have at least 1: {dropped} were left out because nothing to learn is \
             within the first {limit} tokens."
        );
        let error = JobError {
            code: "invalid_n_examples".to_owned(),
            param: Some(param.to_owned()),
            message,
        };
        return Err(Unfit::Job(error));
    }
    let bytes = encoder
        .finish()
        .and_then(|file| partial.publish(&file, &target.path))
        .map_err(unwritten)?;
    Ok(Converted {
        facts: Facts { examples, tokens },
        note: described(&kind, &rows.formats(), &statistics, options),
        bytes,
    })
}

/// A data set, for the job's events.
fn described(kind: &str, formats: &str, statistics: &Statistics, options: &Options) -> String {
    let Statistics {
        rows: n_rows,
        dropped,
        cut,
        merged,
        examples,
        tokens,
        trained_tokens,
        longest: _,
    } = *statistics;
    let limit = options.max_seq_length;
    let mut note = match options.wraps {
        true => format!(
            "The {kind} ({formats}) has {n_rows} rows in {examples} blocks of {tokens} tokens, {trained_tokens} to learn from"
        ),
        false => format!(
            "The {kind} ({formats}) has {examples} examples of {tokens} tokens, {trained_tokens} to learn from"
        ),
    };
    if cut > 0 {
        note.push_str(&format!("; {cut} were cut at {limit} tokens"));
    }
    if dropped > 0 {
        note.push_str(&format!(
            "; {dropped} were left out, nothing to learn is within their first {limit} tokens"
        ));
    }
    if merged > 0 {
        note.push_str(&format!("; of {merged} {MERGED}"));
    }
    note
}

/// A file that is durable in the end, or goes: it takes room that others may need.
struct Partial(PathBuf);

impl Partial {
    fn open(&self) -> io::Result<File> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        options.open(&self.0)
    }

    /// Its size.
    fn publish(&self, file: &File, target: &Path) -> io::Result<u64> {
        file.sync_all()?;
        fs::rename(&self.0, target)?;
        File::open(target.parent().expect("a dataset lies in its job's folder"))?.sync_all()?;
        Ok(file.metadata()?.len())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Moved away, where it was published.
        drop(fs::remove_file(&self.0));
    }
}

/// Durable or absent.
fn write(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = Partial(target.with_extension("partial"));
    let mut file = partial.open()?;
    file.write_all(bytes)?;
    partial.publish(&file, target).map(drop)
}
