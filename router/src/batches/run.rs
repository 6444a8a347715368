//! Works through batches: claims one, asks its lines beside each other, keeps each answer before it counts, and ends it. A
//! batch that a router left goes on with the lines that have no answer. Not here: how a line is answered.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tandem_store::{BatchChange, BatchEnd, BatchLine, BatchRow, Lease, StorageExceeded, StoreError, Tenant};
use tokio::task::JoinSet;

use super::input::{Input, What};
use super::output::{self, Files};
use super::{
    Answers, BatchRequest, CANCELLED, CANCELLING, COMPLETED, EXPIRED, FAILED, FINALIZING, IN_PROGRESS, Line,
    LineAnswer, LineError, VALIDATING,
};
use crate::Router;
use crate::api::{Client, Reach, RouterError, Work};
use crate::jobs::MAX_DEATHS;
use crate::jobs::keeper::Keeper;
use crate::jobs::record;
use crate::shares::as_much_as_it_leaves;
use crate::storage::STORAGE_LIMIT;
use crate::traced;

/// Batches at a time, whose lines share the places.
const MAX_ACTIVE: usize = 8;
/// With those of tenants of whom no other is worked on: nobody waits for the end of another's.
const MAX_OF_MORE_TENANTS: usize = 64;
/// After the store failed: it may be a full disk, which passes.
const RETRY: Duration = Duration::from_secs(5);
/// Answers that are kept in one transaction.
const MAX_KEPT_AT_ONCE: usize = 256;
/// How often a line is asked again whose answer was a fault of the server.
const MAX_FAULTS: u32 = 3;
/// Deaths of who worked on a batch, in a row and before another line was kept, after which lines are asked one by one.
const MAX_DEATHS_TOGETHER: u64 = 3;
/// Of an error.
const ENDED: &str = "server_ended";
/// After a fault, before the line is asked again.
const FAULT_PAUSE: Duration = Duration::from_secs(1);
/// Of lines that are asked now, of all batches.
const LINES_BYTES: u64 = 256 << 20;
/// The line, its body, and the body once more while it is asked.
const LINE_COPIES: u64 = 3;
/// While other lines have the memory.
const MEMORY_PAUSE: Duration = Duration::from_millis(100);

/// As long as the router lives.
pub(crate) async fn run(router: Router) {
    let mut answers = router.0.counter.answers.subscribe();
    let Ok(answers) = answers
        .wait_for(Option::is_some)
        .await
        .map(|answers| answers.clone())
    else {
        return;
    };
    let answers = answers.expect("it was waited for");
    let mut active = JoinSet::new();
    while !router.stopping() {
        while active.len() < MAX_OF_MORE_TENANTS {
            let is_crowded = active.len() >= MAX_ACTIVE;
            match router
                .0
                .store
                .claim_batch(router.info().base_digest, is_crowded)
                .await
            {
                Ok(Some((row, lease))) => {
                    let work = attend(router.clone(), answers.clone(), row, lease);
                    active.spawn(work);
                }
                Ok(None) => break,
                // Who found it away, or the disk full, logged it.
                Err(StoreError::Away { .. } | StoreError::Full(_)) => break,
                Err(error) => {
                    tracing::warn!(%error, "cannot look for batches");
                    break;
                }
            }
        }
        router.0.counter.active.store(active.len(), Ordering::Relaxed);
        // Where it cannot be counted, whoever looked for batches has logged why.
        if let Ok(queued) = router.0.store.queued_batches().await {
            router.0.counter.queued.store(queued, Ordering::Relaxed);
        }
        tokio::select! {
            () = router.0.counter.created.notified() => {}
            Some(ended) = active.join_next(), if !active.is_empty() => if let Err(error) = ended {
                tracing::error!(%error, "work on a batch panicked; somebody goes on with it when its lease has run out");
            },
            // A lease may have run out, or a batch's time.
            () = tokio::time::sleep(router.0.store.renewal_period()) => {}
        }
    }
}

/// One batch, as long as it is ours.
async fn attend(router: Router, answers: Answers, row: BatchRow, lease: Lease) {
    let id = row.id.clone();
    let holder = Holder {
        keeper: Keeper::of_batch(&router, &id, lease),
        key_id: row.key_id.clone(),
        router: router.clone(),
        answers,
        id: id.clone(),
        lease,
    };
    if let Err(error) = holder.work(row).await {
        router.note(&error);
        if !router.stopping() {
            tracing::warn!(batch = id, %error, "a batch was interrupted; it goes on in a moment");
            tokio::time::sleep(RETRY).await;
        }
    }
    // Where it has ended, or is another's, this does nothing.
    if let Err(error) = router.0.store.release_batch(&id, lease).await {
        tracing::debug!(batch = id, %error, "a lease was not released");
    }
}

struct Holder {
    router: Router,
    answers: Answers,
    id: String,
    lease: Lease,
    keeper: Keeper,
    /// The key that made it, where what it stores is limited.
    key_id: Option<String>,
}

/// Why no more lines are asked.
enum Stop {
    Done,
    Cancelled,
    Expired,
    /// Its tenant stores as much as it may.
    Full(StorageExceeded),
    /// The batch is another's.
    Lost,
}

impl Holder {
    async fn work(mut self, row: BatchRow) -> Result<(), RouterError> {
        let request: BatchRequest = record::from_json(&row.request)?;
        let tenant: Tenant = row
            .tenant
            .parse()
            .map_err(|error| StoreError::Damaged(format!("the tenant of {}: {error}", self.id)))?;
        let ending = Ending {
            tenant: &tenant,
            output_expires_after_s: request.output_expires_after_s,
        };
        if row.status == CANCELLING {
            return self.end(CANCELLED, None, ending).await;
        }
        if row.status == FINALIZING {
            return self.end(COMPLETED, None, ending).await;
        }
        if row.deaths >= MAX_DEATHS && row.at_line.is_none() {
            let message = format!(
                "{} times in a row the server ended while the input file was read. It may need more memory than there is.",
                row.deaths
            );
            let error = LineError {
                code: ENDED.to_owned(),
                message,
                line: None,
                param: Some("input_file_id".to_owned()),
            };
            return self.end(FAILED, Some(vec![error]), ending).await;
        }
        let input = match self.read(&request).await? {
            Ok(input) => input,
            Err(errors) => return self.end(FAILED, Some(errors), ending).await,
        };
        let store = &self.router.0.store;
        if row.status == VALIDATING {
            let total = input.lines.len() as u64;
            let begins = BatchChange::Begins { total };
            if !store
                .change_batch(&self.id, self.lease, &[VALIDATING], IN_PROGRESS, begins)
                .await?
            {
                return self.end(CANCELLED, None, ending).await;
            }
        }
        match self.ask_all(&input, &request, &tenant, &row).await? {
            Stop::Lost => Ok(()),
            Stop::Cancelled => self.end(CANCELLED, None, ending).await,
            Stop::Expired => {
                let over = "This request could not be executed before the completion window expired.";
                self.refuse_the_rest(&input, "batch_expired", over).await?;
                self.end(EXPIRED, None, ending).await
            }
            Stop::Full(exceeded) => {
                let message = format!("This request was not executed: {exceeded}.");
                self.refuse_the_rest(&input, STORAGE_LIMIT, &message).await?;
                self.complete(ending).await
            }
            Stop::Done => self.complete(ending).await,
        }
    }

    async fn complete(&self, ending: Ending<'_>) -> Result<(), RouterError> {
        let finalizes = BatchChange::Finalizes;
        let store = &self.router.0.store;
        match store
            .change_batch(&self.id, self.lease, &[IN_PROGRESS], FINALIZING, finalizes)
            .await?
        {
            true => self.end(COMPLETED, None, ending).await,
            // Somebody wanted it cancelled a moment ago.
            false => self.end(CANCELLED, None, ending).await,
        }
    }

    /// Its file, or why nothing of it can be asked.
    async fn read(&self, request: &BatchRequest) -> Result<Result<Input, Vec<LineError>>, RouterError> {
        let store = &self.router.0.store;
        let unfit = |message| {
            Ok(Err(vec![LineError {
                code: "invalid_input_file".to_owned(),
                message,
                line: None,
                param: Some("input_file_id".to_owned()),
            }]))
        };
        let Some(row) = store.file(&request.input_file).await? else {
            let id = &request.input_file;
            return unfit(format!("the input file {id} was deleted, or has expired"));
        };
        let path = match store.sound_file(&row).await {
            Err(error @ StoreError::Altered { .. }) => return unfit(format!("the input {error}")),
            path => path?,
        };
        let endpoint = request.endpoint;
        let what = format!("reading {}", path.display());
        let _turn = self.router.0.counter.reading.lock().await;
        let read = tokio::task::spawn_blocking(move || Input::read(&path, endpoint)).await;
        match read {
            Ok(read) => Ok(read.map_err(|source| StoreError::Io { what, source })?),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    async fn ask_all(
        &mut self,
        input: &Input,
        request: &BatchRequest,
        tenant: &Tenant,
        row: &BatchRow,
    ) -> Result<Stop, RouterError> {
        let mut answered = self.router.0.store.answered_batch_lines(&self.id).await?;
        let mut unkept: Vec<BatchLine> = wrong(input, &answered).collect();
        let fatal = fatal(input, row).filter(|line| !answered.contains(&line.line));
        if let Some(line) = fatal {
            tracing::error!(
                batch = self.id,
                line = line.line,
                deaths = row.deaths,
                "a line is given up: the server ended while it was asked"
            );
            answered.insert(line.line);
            unkept.push(line);
        }
        let one_by_one = (MAX_DEATHS_TOGETHER..MAX_DEATHS).contains(&row.deaths);
        if let Some(exceeded) = self.full().await? {
            return Ok(Stop::Full(exceeded));
        }
        let mut waiting = input
            .lines
            .iter()
            .filter(|line| !answered.contains(&line.line))
            .filter_map(|line| match (&line.what, &line.custom_id) {
                (What::Asked(place), Some(custom_id)) => Some((line.line, custom_id, place)),
                _ => None,
            });
        let client = Client {
            tenant: tenant.clone(),
            reach: Reach::Own,
            work: Work::Batch,
            ..Client::default()
        };
        let mut asked = JoinSet::new();
        let left = Duration::from_secs(u64::try_from(row.expires_at - tandem_store::now()).unwrap_or(0));
        let mut expiry = std::pin::pin!(tokio::time::sleep(left));
        loop {
            // New ones run while answers are kept.
            let places = match one_by_one {
                true => 1,
                false => self.router.batch_share(),
            };
            while asked.len() < places
                && let Some((number, custom_id, place)) = waiting.next()
            {
                if one_by_one
                    && !self
                        .router
                        .0
                        .store
                        .ask_batch_line(&self.id, self.lease, number)
                        .await?
                {
                    return Ok(Stop::Lost);
                }
                let (answers, client, endpoint) = (self.answers.clone(), client.clone(), request.endpoint);
                let (read, custom_id, batch) = (input.body(place), custom_id.clone(), self.id.clone());
                let memory = self.router.0.lines.of(tenant.clone());
                let bytes = LINE_COPIES * (place.end - place.start);
                asked.spawn(async move {
                    // Other batches' lines have theirs in memory.
                    while memory
                        .reach(bytes, |others| as_much_as_it_leaves(LINES_BYTES, others))
                        .is_err()
                    {
                        tokio::time::sleep(MEMORY_PAUSE).await;
                    }
                    let body = tokio::task::spawn_blocking(read).await;
                    let body = body.expect("reading a file does not panic")?;
                    let traced = traced::batch_line(&batch, &custom_id);
                    let (trace, span) = traced.unzip();
                    let line = || Line {
                        client: Client {
                            trace,
                            ..client.clone()
                        },
                        endpoint,
                        body: body.clone(),
                    };
                    let answer = ask(&answers, line).await;
                    if let Some(span) = span {
                        span.record("http.response.status_code", answer.status);
                        if answer.status >= 500 {
                            span.record("error.type", answer.status.to_string());
                        }
                    }
                    drop(memory);
                    Ok(output::answered(number, &custom_id, &answer))
                });
            }
            if !unkept.is_empty() {
                let kept = std::mem::take(&mut unkept);
                if !self.keep(&kept).await? {
                    return Ok(Stop::Lost);
                }
                if let Some(exceeded) = self.full().await? {
                    return Ok(Stop::Full(exceeded));
                }
                continue;
            }
            if asked.is_empty() {
                return Ok(Stop::Done);
            }
            let stop = tokio::select! {
                biased;
                () = self.keeper.cancelled() => match self.keeper.is_lost() {
                    true => return Ok(Stop::Lost),
                    false => Some(Stop::Cancelled),
                },
                () = &mut expiry => Some(Stop::Expired),
                Some(done) = asked.join_next() => {
                    unkept.push(joined(done)?);
                    None
                }
            };
            while unkept.len() < MAX_KEPT_AT_ONCE
                && let Some(done) = asked.try_join_next()
            {
                unkept.push(joined(done)?);
            }
            if let Some(stop) = stop {
                return Ok(match self.keep(&unkept).await? {
                    true => stop,
                    false => Stop::Lost,
                });
            }
        }
    }

    /// Whether no more answers may be stored.
    async fn full(&self) -> Result<Option<StorageExceeded>, RouterError> {
        match self.router.check_storage_by(self.key_id.as_deref()).await {
            Err(RouterError::Store(StoreError::OverLimit(exceeded))) => Ok(Some(exceeded)),
            checked => checked.map(|_| None),
        }
    }

    /// Lines without an answer, of a batch that ends before.
    async fn refuse_the_rest(&self, input: &Input, code: &str, message: &str) -> Result<(), RouterError> {
        let answered = self.router.0.store.answered_batch_lines(&self.id).await?;
        let over = |line: u64| LineError {
            code: code.to_owned(),
            message: message.to_owned(),
            line: Some(line),
            param: None,
        };
        let left = input.lines.iter().filter(|line| !answered.contains(&line.line));
        let left: Vec<BatchLine> = left
            .map(|line| output::refused(line.line, line.custom_id.as_deref(), &over(line.line)))
            .collect();
        for lines in left.chunks(MAX_KEPT_AT_ONCE) {
            self.keep(lines).await?;
        }
        Ok(())
    }

    /// Whether the batch is ours.
    async fn keep(&self, lines: &[BatchLine]) -> Result<bool, RouterError> {
        if lines.is_empty() {
            return Ok(true);
        }
        let store = &self.router.0.store;
        let kept = store.keep_batch_lines(&self.id, self.lease, lines).await?;
        if kept {
            let completed = lines.iter().filter(|line| line.ok).count() as u64;
            let counter = &self.router.0.counter;
            counter.completed_lines.fetch_add(completed, Ordering::Relaxed);
            let failed = lines.len() as u64 - completed;
            counter.failed_lines.fetch_add(failed, Ordering::Relaxed);
        }
        Ok(kept)
    }

    async fn end(
        &self,
        status: &'static str,
        errors: Option<Vec<LineError>>,
        ending: Ending<'_>,
    ) -> Result<(), RouterError> {
        let Ending {
            tenant,
            output_expires_after_s,
        } = ending;
        let files = Files::publish(&self.router, &self.id, tenant, output_expires_after_s).await?;
        let end = BatchEnd {
            status,
            errors: errors.map(|errors| record::to_json(&errors)),
            output: files.output.clone(),
            error: files.error.clone(),
        };
        match self.router.0.store.end_batch(&self.id, self.lease, end).await? {
            true => tracing::info!(batch = self.id, status, "batch ended"),
            false => files.discard(&self.router).await?,
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Ending<'a> {
    tenant: &'a Tenant,
    output_expires_after_s: Option<u64>,
}

/// The line that was asked by itself each time that who worked on the batch went without a word.
fn fatal(input: &Input, row: &BatchRow) -> Option<BatchLine> {
    let at = row.at_line.filter(|_| row.deaths >= MAX_DEATHS)?;
    let line = input.lines.iter().find(|line| line.line == at)?;
    let error = LineError {
        code: ENDED.to_owned(),
        message: format!(
            "This request was given up: {} times in a row the server ended, at last while it was the only one of its batch.",
            row.deaths
        ),
        line: Some(at),
        param: None,
    };
    Some(output::refused(at, line.custom_id.as_deref(), &error))
}

/// Lines that cannot be asked.
fn wrong<'a>(input: &'a Input, answered: &'a HashSet<u64>) -> impl Iterator<Item = BatchLine> + 'a {
    input.lines.iter().filter_map(|line| match &line.what {
        What::Wrong(error) if !answered.contains(&line.line) => {
            Some(output::refused(line.line, line.custom_id.as_deref(), error))
        }
        _ => None,
    })
}

/// Until there is an answer that is the line's own: not while the server is away or busy, and not a fault of the server's
/// at the first time.
async fn ask(answers: &Answers, line: impl Fn() -> Line) -> LineAnswer {
    let mut faults = 0;
    loop {
        let answer = answers(line()).await;
        if let Some(pause) = answer.try_again {
            tokio::time::sleep(pause).await;
        } else if answer.status >= 500 && faults < MAX_FAULTS {
            faults += 1;
            tokio::time::sleep(FAULT_PAUSE).await;
        } else {
            return answer;
        }
    }
}

fn joined(
    done: Result<Result<BatchLine, std::io::Error>, tokio::task::JoinError>,
) -> Result<BatchLine, RouterError> {
    match done {
        Ok(Ok(line)) => Ok(line),
        Ok(Err(source)) => {
            let what = "reading a batch's file".to_owned();
            Err(RouterError::Store(StoreError::Io { what, source }))
        }
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
