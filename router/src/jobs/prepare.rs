//! From files to tokens: validates a job's files and writes its datasets, while another job may be training. A job with
//! a bad file fails soon, not when its turn comes. Not here: training.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tandem_core::dataset::{Encoder, Group};
use tandem_core::job::files;
use tandem_store::{JobChange, JobRow, Lease, Part, Storage, StorageExceeded, StoreError};
use tandem_text::Tokenizer;
use tandem_text::dataset::{
    self as rows, BadLine, Options, Reading, Rows, Sample, Source, Statistics, tokenise,
};
use tokio::task::JoinSet;
use tokio::time::Sleep;

use crate::Router;
use crate::api::{FileIds, JobError, JobRequest, Level, RouterError};
use crate::jobs::hyper::{self, Facts, Tuning};
use crate::jobs::keeper::Keeper;
use crate::jobs::{QUEUED, VALIDATING, event, record};
use crate::quota::EXCEEDED_QUOTA;
use crate::storage::STORAGE_LIMIT;

/// After the store failed: it may be a full disk, which passes.
const RETRY: Duration = Duration::from_secs(5);
/// Jobs that are prepared at once: one with large files keeps no other waiting.
const AT_ONCE: usize = 2;

/// As long as the router lives.
pub(crate) async fn run(router: Router) {
    // Tasks of their own: one that holds the database's lock goes on while this one waits for it.
    let mut underway = JoinSet::new();
    let mut ids: Vec<String> = vec![];
    loop {
        let has_place = ids.len() < AT_ONCE;
        let claimed = match has_place {
            true => claim(&router, &ids).await,
            false => Ok(None),
        };
        let pause = match claimed {
            Ok(Some((row, lease))) => {
                ids.push(row.id.clone());
                underway.spawn(one(router.clone(), row, lease));
                continue;
            }
            Ok(None) => None,
            Err(error) => Some(trouble(&router, &error)),
        };
        let woken = async {
            match pause {
                Some(pause) => pause.await,
                None => router.wait_for(&router.0.desk.created).await,
            }
        };
        tokio::select! {
            Some(done) = underway.join_next() => match done {
                Ok(done) => ids.retain(|id| *id != done),
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_cancelled) => return,
                },
            },
            () = woken, if has_place => {}
        }
    }
}

fn trouble(router: &Router, error: &RouterError) -> Sleep {
    match error {
        // Who found a part of the store away, or the disk full, logged it.
        RouterError::Store(StoreError::Away { .. } | StoreError::Full(_)) => {}
        error => {
            router.note(error);
            tracing::error!(%error, "a job cannot be prepared; trying again");
        }
    }
    tokio::time::sleep(RETRY)
}

async fn claim(router: &Router, except: &[String]) -> Result<Option<(JobRow, Lease)>, RouterError> {
    #[cfg(test)]
    router.panic_if_told(crate::PREPARER);
    let store = &router.0.store;
    store.check_room()?;
    Ok(store
        .claim_job(router.info().base_digest, &[VALIDATING], except)
        .await?)
}

/// Prepares a job. Its id, when it may be claimed again.
async fn one(router: Router, row: JobRow, lease: Lease) -> String {
    if let Err(error) = queue(&router, &row, lease).await {
        trouble(&router, &error).await;
    }
    row.id
}

async fn queue(router: &Router, row: &JobRow, lease: Lease) -> Result<(), RouterError> {
    let mut keeper = Keeper::new(router, &row.id, lease, None);
    let request: JobRequest = record::from_json(&row.request)?;
    let prepared = tokio::select! {
        biased;
        // It was cancelled, or is another's.
        () = keeper.lost() => return router.clear_if_ended(&row.id).await,
        prepared = prepare(router, row, &request) => prepared,
    };
    match prepared {
        Ok(prepared) => {
            let (settings, info) = (&request.settings, router.info());
            let hyper = match request.sweep() {
                None => hyper::choose(settings, Tuning::Lora, info, prepared.facts),
                Some(sweep) => hyper::choose_of(&sweep, settings, info, prepared.facts),
            };
            let tokens = hyper::trained_tokens(&hyper, prepared.facts);
            if let Err(error) = router.check_quota(row.key_id.as_deref(), tokens).await {
                let RouterError::Quota(exceeded) = error else {
                    return Err(error);
                };
                let error = JobError {
                    code: EXCEEDED_QUOTA.to_owned(),
                    param: None,
                    message: format!("The job was not trained: {exceeded}."),
                };
                return router.fail_job(&row.id, lease, error).await;
            }
            let mut events = prepared.notes;
            events.push("Files validated, moving job to queued state".to_owned());
            router.0.store.publish_datasets(&row.id, prepared.bytes).await?;
            let queued = JobChange {
                from: &[VALIDATING],
                holder: Some(lease),
                lets_go: true,
                status: Some(QUEUED),
                hyper: Some(record::to_json(&hyper)),
                events: events
                    .into_iter()
                    .map(|message| event(Level::Info, message))
                    .collect(),
                ..JobChange::default()
            };
            match router.change_job(&row.id, queued).await? {
                // A pause that was asked for meanwhile takes effect where the job rests.
                true => {
                    if !router.pause_at_once(&row.id, &[QUEUED], None).await? {
                        router.0.desk.queued.notify_one();
                    }
                }
                false => router.clear_if_ended(&row.id).await?,
            }
        }
        Err(Unfit::Job(error)) => router.fail_job(&row.id, lease, error).await?,
        Err(Unfit::Router(error)) => {
            if error.away() == Some(Part::Room) {
                let message = format!("The job waits for room on the disk: {error}");
                let waits = JobChange {
                    from: &[VALIDATING],
                    holder: Some(lease),
                    events: vec![event(Level::Warn, message)],
                    ..JobChange::default()
                };
                router.change_job(&row.id, waits).await?;
            }
            return Err(error);
        }
        // Whoever gave up does not ask any more.
        Err(Unfit::GivenUp) => {}
    }
    Ok(())
}

struct Prepared {
    facts: Facts,
    /// Of its datasets.
    bytes: u64,
    /// For the job's events.
    notes: Vec<String>,
}

enum Unfit {
    /// The job fails by this.
    Job(JobError),
    Router(RouterError),
    /// Nobody waits for it.
    GivenUp,
}

/// Tells the thread that reads a job's files, between two rows, that nobody waits for it any more.
pub(super) struct Waiting(pub Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

async fn prepare(router: &Router, row: &JobRow, request: &JobRequest) -> Result<Prepared, Unfit> {
    let training = uploads(router, "training_file", &request.training_file).await?;
    let validation = match &request.validation_file {
        Some(files) => Some(uploads(router, "validation_file", files).await?),
        None => None,
    };
    let options = Options::new(
        &request.settings,
        hyper::max_seq_length(&request.settings, router.info()),
        hyper::objective(&request.settings).rows(),
    );
    let reading =
        Reading::new(&request.settings).map_err(|(param, message)| Unfit::Job(invalid(param, message)))?;
    let start = match request.start {
        None => None,
        Some(digest) => {
            let gone = |error: StoreError| match error.away() {
                Some(_) => Unfit::Router(error.into()),
                None => {
                    let message = format!("The adapter that the job starts from is gone: {error}");
                    Unfit::Job(invalid("model", message))
                }
            };
            Some(router.0.store.adapter_folder(digest).await.map_err(gone)?)
        }
    };
    let storage = match router.check_storage_by(row.key_id.as_deref()).await {
        Ok(storage) => storage,
        Err(RouterError::Store(StoreError::OverLimit(exceeded))) => {
            return Err(Unfit::Job(too_much("training_file", exceeded)));
        }
        Err(error) => return Err(Unfit::Router(error)),
    };
    let (tokenizer, folder) = (router.tokenizer().clone(), router.0.store.job_folder(&row.id));
    let given_up = Arc::new(AtomicBool::new(false));
    let _waiting = Waiting(given_up.clone());
    let work = move || {
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
            convert(uploads, reading, &tokenizer, &options, target, &given_up)
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
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(prepared) => prepared,
        Err(panic) => {
            tracing::error!(job = row.id, %panic, "tokenising panicked");
            Err(Unfit::Job(server_error(
                "The server failed while it read the training file.".to_owned(),
            )))
        }
    }
}

/// Uploaded files of a job, whose rows are one data set.
struct Uploads {
    param: &'static str,
    sources: Vec<Source>,
}

async fn uploads(router: &Router, param: &'static str, files: &FileIds) -> Result<Uploads, Unfit> {
    match router.sources(files).await {
        Ok(sources) => Ok(Uploads { param, sources }),
        Err(RouterError::UnknownFile(id)) => {
            let message = format!("The job failed because its file {id} was deleted or has expired.");
            Err(Unfit::Job(invalid(param, message)))
        }
        Err(RouterError::Store(error @ StoreError::Altered { .. })) => Err(Unfit::Job(invalid(
            param,
            format!("The job failed because its {error}."),
        ))),
        Err(error) => Err(Unfit::Router(error)),
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
        rows: n_rows,
        dropped,
        cut,
        examples,
        tokens,
        trained_tokens,
        longest: _,
    } = statistics;
    let limit = options.max_seq_length;
    if examples == 0 {
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
    let formats = rows.formats();
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
    Ok(Converted {
        facts: Facts { examples, tokens },
        note,
        bytes,
    })
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

/// A full disk passes; whatever else a disk says does not.
fn unwritten(source: io::Error) -> Unfit {
    let what = "writing the datasets of a job".to_owned();
    let error = StoreError::Io { what, source };
    match error.away() {
        Some(_) => Unfit::Router(error.into()),
        None => Unfit::Job(server_error(format!("The datasets cannot be written: {error}"))),
    }
}

fn too_much(param: &str, exceeded: StorageExceeded) -> JobError {
    JobError {
        code: STORAGE_LIMIT.to_owned(),
        param: Some(param.to_owned()),
        message: format!("The job was not prepared: {exceeded}."),
    }
}

fn invalid(param: &str, message: String) -> JobError {
    JobError {
        code: format!("invalid_{param}"),
        param: Some(param.to_owned()),
        message,
    }
}

fn server_error(message: String) -> JobError {
    JobError {
        code: "server_error".to_owned(),
        param: None,
        message,
    }
}
