//! From files to tokens: validates a job's files and writes its datasets, while another job may be training. A job with
//! a bad file fails soon, not when its turn comes. Not here: training.

mod dataset;
mod unfit;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tandem_store::{JobChange, JobRow, Lease, Part, StoreError};
use tandem_text::dataset::{Options, Reading};
use tokio::task::JoinSet;
use tokio::time::Sleep;

use crate::Router;
use crate::api::{FileIds, JobError, JobRequest, Level, RouterError};
use crate::jobs::hyper::{self, Tuning};
use crate::jobs::keeper::Keeper;
use crate::jobs::{MAX_DEATHS, QUEUED, VALIDATING, event, record};
use crate::quota::EXCEEDED_QUOTA;
use crate::tasks::joined;
use dataset::{Datasets, Prepared, Uploads};
use unfit::{Unfit, invalid, too_much};

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
                None => router.wait_for(&router.0.signals.created).await,
            }
        };
        tokio::select! {
            Some(done) = underway.join_next() => match joined(done) {
                Some(done) => ids.retain(|id| *id != done),
                None => return,
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
    if row.deaths >= MAX_DEATHS {
        let message = format!(
            "The job failed: {} times in a row the server ended while its files were read. They may need more memory than there is.",
            row.deaths
        );
        return router
            .fail_job(&row.id, lease, JobError::of_server(message))
            .await;
    }
    let mut keeper = Keeper::new(router, &row.id, lease, None);
    let request: JobRequest = record::from_json(&row.request)?;
    let prepared = tokio::select! {
        biased;
        // It was cancelled, or is another's.
        () = keeper.lost() => return router.clear_if_ended(&row.id).await,
        prepared = prepare(router, row, &request) => prepared,
    };
    match prepared {
        Ok(prepared) => enqueue(router, row, lease, &request, prepared).await?,
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

/// What was left open is chosen; the job waits for its turn, unless it would train more than its key may.
async fn enqueue(
    router: &Router,
    row: &JobRow,
    lease: Lease,
    request: &JobRequest,
    prepared: Prepared,
) -> Result<(), RouterError> {
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
    let mut events = settings.notes();
    events.extend(prepared.notes);
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
                router.0.signals.wake_supervisor();
            }
        }
        false => router.clear_if_ended(&row.id).await?,
    }
    Ok(())
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
    let datasets = Datasets {
        folder,
        start,
        training,
        validation,
        reading,
        options,
        tokenizer,
        storage,
    };
    let work = move || datasets.write(&given_up);
    match tokio::task::spawn_blocking(work).await {
        Ok(prepared) => prepared,
        Err(panic) => {
            tracing::error!(job = row.id, %panic, "tokenising panicked");
            Err(Unfit::Job(JobError::of_server(
                "The server failed while it read the training file.".to_owned(),
            )))
        }
    }
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
