//! From files to tokens: validates a job's files and writes its datasets, while another job may be training. A job with
//! a bad file fails soon, not when its turn comes. Not here: training.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tandem_core::dataset::{self, Example};
use tandem_core::job::files;
use tandem_store::{JobChange, JobRow, StoreError};
use tandem_text::dataset::{Options, read_rows, tokenize};
use tandem_text::{TextError, Tokenizer};

use crate::Router;
use crate::api::{JobError, JobRequest, Level, RouterError};
use crate::jobs::hyper::{self, Facts, Tuning};
use crate::jobs::keeper::Keeper;
use crate::jobs::{QUEUED, VALIDATING, event, record};

/// After the store failed: it may be a full disk, which passes.
const RETRY: Duration = Duration::from_secs(5);

/// As long as the router lives.
pub(crate) async fn run(router: Router) {
    loop {
        match next(&router).await {
            Ok(true) => {}
            Ok(false) => router.wait_for(&router.0.desk.created).await,
            // The probe that found a part of the store away logged it.
            Err(RouterError::Store(StoreError::Away { .. })) => tokio::time::sleep(RETRY).await,
            Err(error) => {
                tracing::error!(%error, "a job cannot be prepared; trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Whether there was a job to prepare.
async fn next(router: &Router) -> Result<bool, RouterError> {
    let claimed = router
        .0
        .store
        .claim_job(router.info().base_digest, &[VALIDATING])
        .await?;
    let Some((row, lease)) = claimed else {
        return Ok(false);
    };
    let _keeper = Keeper::new(router, &row.id, lease, None);
    let request: JobRequest = record::from_json(&row.request)?;
    match prepare(router, &row, &request).await {
        Ok(prepared) => {
            let hyper = hyper::choose(&request.settings, Tuning::Lora, router.info(), prepared.facts);
            let mut events = prepared.notes;
            events.push("Files validated, moving job to queued state".to_owned());
            router.0.store.publish_datasets(&row.id).await?;
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
                true => router.0.desk.queued.notify_one(),
                false => router.clear_if_ended(&row.id).await?,
            }
        }
        Err(Unfit::Job(error)) => router.fail_job(&row.id, lease, error).await?,
        Err(Unfit::Router(error)) => return Err(error),
    }
    Ok(true)
}

struct Prepared {
    facts: Facts,
    /// For the job's events.
    notes: Vec<String>,
}

enum Unfit {
    /// The job fails by this.
    Job(JobError),
    Router(RouterError),
}

async fn prepare(router: &Router, row: &JobRow, request: &JobRequest) -> Result<Prepared, Unfit> {
    let training = source(router, "training_file", &request.training_file).await?;
    let validation = match &request.validation_file {
        Some(id) => Some(source(router, "validation_file", id).await?),
        None => None,
    };
    let options = Options {
        max_seq_length: hyper::max_seq_length(&request.settings, router.info()),
        prompt_loss_weight: request.settings.prompt_loss_weight.unwrap_or(0.0) as f32,
    };
    let (tokenizer, folder) = (router.tokenizer().clone(), router.0.store.job_folder(&row.id));
    let work = move || {
        let trouble = |source| Unfit::Job(server_error(format!("The datasets cannot be written: {source}")));
        fs::create_dir_all(&folder).map_err(trouble)?;
        let (facts, note) = convert(&training, &tokenizer, &options, &folder.join(files::TRAIN))?;
        let mut notes = vec![note];
        if let Some(validation) = validation {
            notes.push(convert(&validation, &tokenizer, &options, &folder.join(files::VALID))?.1);
        }
        Ok(Prepared { facts, notes })
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

/// An uploaded file of a job.
struct Upload {
    param: &'static str,
    path: PathBuf,
}

async fn source(router: &Router, param: &'static str, id: &str) -> Result<Upload, Unfit> {
    match router.file_content(id).await {
        Ok((_, path)) => Ok(Upload { param, path }),
        Err(RouterError::UnknownFile(id)) => {
            let message = format!("The job failed because its file {id} was deleted or has expired.");
            Err(Unfit::Job(invalid(param, message)))
        }
        Err(error) => Err(Unfit::Router(error)),
    }
}

/// Tokenise one file. What has nothing to learn is left out and counted.
fn convert(
    upload: &Upload,
    tokenizer: &Tokenizer,
    options: &Options,
    target: &Path,
) -> Result<(Facts, String), Unfit> {
    let Upload { param, path } = upload;
    let kind = param.replace('_', " ");
    let bad = |message: &dyn std::fmt::Display| {
        let message = format!("The job failed due to an invalid {kind}. {message}");
        Unfit::Job(invalid(param, message))
    };
    let file = File::open(path).map_err(|error| bad(&format!("It cannot be read: {error}")))?;
    let (mut examples, mut left_out) = (Vec::<Example>::new(), 0_u64);
    for row in read_rows(BufReader::new(file)) {
        let (line, row) = row.map_err(|error| bad(&error))?;
        match tokenize(&row, tokenizer, options) {
            Ok(example) => examples.push(example),
            Err(TextError::NoLabels { .. }) => left_out += 1,
            Err(error) => return Err(bad(&format!("Example {line}: {error}"))),
        }
    }
    let n = examples.len() as u64;
    if n == 0 {
        let message = format!(
            "The {kind} has 0 usable examples, but must have at least 1: {left_out} were left out because nothing to \
             learn is within the first {} tokens.",
            options.max_seq_length
        );
        let error = JobError {
            code: "invalid_n_examples".to_owned(),
            param: Some((*param).to_owned()),
            message,
        };
        return Err(Unfit::Job(error));
    }
    let tokens: u64 = examples.iter().map(|example| example.tokens.len() as u64).sum();
    let labels: u64 = examples.iter().map(|example| example.label_tokens() as u64).sum();
    write(target, &dataset::encode(&examples))
        .map_err(|error| Unfit::Job(server_error(format!("The datasets cannot be written: {error}"))))?;
    let left_out = match left_out {
        0 => String::new(),
        n => format!(
            "; {n} were left out, nothing to learn is within their first {} tokens",
            options.max_seq_length
        ),
    };
    let note = format!("The {kind} has {n} examples of {tokens} tokens, {labels} to learn from{left_out}");
    Ok((Facts { examples: n, tokens }, note))
}

/// Durable or absent.
fn write(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = target.with_extension("partial");
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, target)?;
    File::open(target.parent().expect("a dataset lies in its job's folder"))?.sync_all()
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
