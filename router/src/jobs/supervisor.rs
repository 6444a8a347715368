//! Jobs go from this router to replicas, as many as these take, and what a replica says of one goes to the store. The
//! router holds the job's lease meanwhile; a job whose holder or replica went is begun again and goes on from its last
//! state. A job is `running` once a replica says that it trains it.
//! Not here: files (`prepare`), training.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tandem_core::id::{AdapterRef, JobId};
use tandem_core::job::{self, selection};
use tandem_core::job::{Hyper, JobEvent, JobSpec, Life, Method, Saved, StepReport, base_model};
use tandem_core::replica::{Command, JOB_EVENT_QUEUE};
use tandem_store::{
    Asked, CheckpointRow, JobChange, JobRow, Lease, NewCheckpoint, NewEvent, Storage, StoreError,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::Router;
use crate::api::{JobError, JobRequest, Level, RouterError};
use crate::catalog::{Hold, checkpoint_name};
use crate::fleet::JobSeat;
use crate::jobs::keeper::Keeper;
use crate::jobs::{
    Made, PAUSED, QUEUED, RUNNING, SWEEPING, VALIDATING, event, metrics, record, result, sweep,
};

/// After the store failed: it may be a full disk, which passes. The job goes on from its last state.
const RETRY: Duration = Duration::from_secs(5);
/// After a replica went, or while none has room: another may, or the same one returns.
const REPLICA_RETRY: Duration = Duration::from_millis(500);
/// After every replica that was asked had no room for it.
const REFUSED_RETRY: Duration = Duration::from_secs(2);
/// How long a tenant's last job is trained before it makes room for that of a tenant of whom none is.
const TURN: Duration = Duration::from_secs(600);
/// Between two looks whether somebody is to make room, and between two words to a replica that has not heard.
const FAIR: Duration = Duration::from_secs(2);
/// Replicas that may go under a job, one after the other and before it makes a step, until it is to blame.
const MAX_STUMBLES: u32 = 5;
/// A job that is the supervisor's.
const HERE: &[&str] = &[QUEUED, RUNNING];

/// As long as the router lives.
pub(crate) async fn run(router: Router) {
    match router
        .0
        .store
        .count_stranded_jobs(router.info().base_digest)
        .await
    {
        Ok(0) => {}
        Ok(jobs) => tracing::warn!(
            jobs,
            "unfinished jobs of another base model wait until it is served again"
        ),
        Err(error) => tracing::warn!(%error, "cannot count unfinished jobs"),
    }
    // Tasks of their own, as in `prepare`.
    let mut underway = JoinSet::new();
    let mut ids: Vec<String> = vec![];
    let mut records: HashMap<String, Record> = HashMap::new();
    let mut held: HashMap<String, Held> = HashMap::new();
    let mut looked = Instant::now();
    let (over, stopped) = watch::channel(());
    while !router.stopping() {
        if looked.elapsed() >= FAIR {
            looked = Instant::now();
            if let Err(error) = share_places(&router, &mut held).await {
                trouble(&router, &error);
            }
        }
        let pause = match next(&router, &ids).await {
            Ok(Next::Job(job)) => {
                let id = &job.row.id;
                let record = records.remove(id).unwrap_or_default();
                ids.push(id.clone());
                let (gives_up, to_give_up) = watch::channel(false);
                let tenant = job.row.tenant.clone();
                held.insert(
                    id.clone(),
                    Held {
                        tenant,
                        since: Instant::now(),
                        gives_up,
                    },
                );
                underway.spawn(one(router.clone(), *job, to_give_up, record, stopped.clone()));
                continue;
            }
            Ok(Next::Sweep(row, lease)) => {
                ids.push(row.id.clone());
                underway.spawn(sweep(router.clone(), *row, lease, stopped.clone()));
                continue;
            }
            Ok(Next::Changed) => continue,
            Ok(Next::NoJob) => None,
            Ok(Next::NoReplica) => Some(REPLICA_RETRY),
            Err(error) => Some(trouble(&router, &error)),
        };
        let woken = async {
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => router.wait_for(&router.0.desk.queued).await,
            }
        };
        tokio::select! {
            Some(done) = underway.join_next() => match done {
                Ok((id, record)) => {
                    ids.retain(|other| *other != id);
                    held.remove(&id);
                    records.extend(record.map(|record| (id, record)));
                }
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_cancelled) => return,
                },
            },
            () = woken => {}
        }
    }
    drop(over);
    // Each writes what its replica says last.
    while underway.join_next().await.is_some() {}
}

/// A job in training here.
struct Held {
    tenant: String,
    since: Instant,
    /// It is to be kept and to wait again.
    gives_up: watch::Sender<bool>,
}

/// Where every place is taken and a tenant waits who has fewer than another, the other's newest job gives up its own. Where that is
/// the other's last one, after its turn.
async fn share_places(router: &Router, held: &mut HashMap<String, Held>) -> Result<(), RouterError> {
    let is_over = held.values().any(|held| *held.gives_up.borrow());
    if held.is_empty() || is_over || router.job_seat().is_some() {
        return Ok(());
    }
    let of_tenants = router.0.store.jobs_of_tenants(router.info().base_digest).await?;
    let waiting = of_tenants.iter().filter(|(_, waiting, _)| *waiting > 0);
    let Some(fewest) = waiting.map(|(_, _, trained)| *trained).min() else {
        return Ok(());
    };
    let trained: HashMap<&str, u64> = of_tenants
        .iter()
        .map(|(tenant, _, trained)| (tenant.as_str(), *trained))
        .collect();
    let rich = held.iter().filter(|(_, held)| {
        let trained = trained.get(held.tenant.as_str()).copied().unwrap_or(0);
        trained > fewest + 1 || trained > fewest && held.since.elapsed() >= TURN
    });
    let newest = rich.max_by_key(|(_, held)| (trained.get(held.tenant.as_str()), held.since));
    if let Some((id, held)) = newest {
        tracing::info!(job = id, "the job gives up its place to another tenant's");
        held.gives_up.send_replace(true);
    }
    Ok(())
}

/// Logs it; how long to wait.
fn trouble(router: &Router, error: &RouterError) -> Duration {
    match error {
        error if router.stopping() => tracing::info!(%error, "a job waits for the next start"),
        // Who found a part of the store away, or the disk full, logged it.
        RouterError::Store(StoreError::Away { .. } | StoreError::Full(_)) => {}
        error => {
            router.note(error);
            tracing::error!(%error, "a job was interrupted; going on from its last state");
        }
    }
    RETRY
}

/// What there is to do.
enum Next {
    Job(Box<Claimed>),
    /// It takes no seat: its trials do.
    Sweep(Box<JobRow>, Lease),
    /// A job that only had to be written to.
    Changed,
    NoJob,
    NoReplica,
}

/// A job that is to be trained now.
struct Claimed {
    row: JobRow,
    lease: Lease,
    seat: JobSeat,
}

/// What is remembered of a job between its lives.
#[derive(Default)]
struct Record {
    /// How often in a row it lost its replica before it made a step.
    stumbles: u32,
    /// Whether it was said why it waits for a replica.
    is_told: bool,
}

/// `ids`: the jobs that are under way here.
async fn next(router: &Router, ids: &[String]) -> Result<Next, RouterError> {
    #[cfg(test)]
    router.panic_if_told(crate::SUPERVISOR);
    let (base, store) = (router.info().base_digest, &router.0.store);
    store.check_room()?;
    if let Some((row, lease)) = store.claim_job(base, &[SWEEPING], ids).await? {
        return Ok(Next::Sweep(Box::new(row), lease));
    }
    let Some(seat) = router.job_seat() else {
        return Ok(Next::NoReplica);
    };
    // What ran before a restart first, then in order of creation.
    let claimed = match store.claim_job(base, &[RUNNING], ids).await? {
        Some(claimed) => Some(claimed),
        None => store.claim_job(base, &[QUEUED], ids).await?,
    };
    let Some((row, lease)) = claimed else {
        return Ok(Next::NoJob);
    };
    let changed = match row.asked {
        Asked::Nothing => false,
        Asked::Cancel => router.cancel_at_once(&row.id, HERE, Some(lease)).await?,
        Asked::Pause => router.pause_at_once(&row.id, HERE, Some(lease)).await?,
    };
    Ok(match changed {
        true => Next::Changed,
        false => Next::Job(Box::new(Claimed { row, lease, seat })),
    })
}

/// A life of a job. Its id, when it may be claimed again; what is to be remembered of it.
async fn one(
    router: Router,
    job: Claimed,
    to_give_up: watch::Receiver<bool>,
    mut record: Record,
    mut stopped: watch::Receiver<()>,
) -> (String, Option<Record>) {
    let id = job.row.id.clone();
    let pause = match train(&router, job, to_give_up, &mut record).await {
        Ok(None) => return (id, None),
        Ok(Some(pause)) => pause,
        Err(error) => trouble(&router, &error),
    };
    // Others have their turn meanwhile.
    let _ = tokio::time::timeout(pause, stopped.changed()).await;
    (id, Some(record))
}

async fn sweep(
    router: Router,
    row: JobRow,
    lease: Lease,
    mut stopped: watch::Receiver<()>,
) -> (String, Option<Record>) {
    if let Err(error) = sweep::look_after(&router, &row, lease, &mut stopped).await {
        let pause = trouble(&router, &error);
        let _ = tokio::time::timeout(pause, stopped.changed()).await;
    }
    (row.id, None)
}

/// How long to wait until it is tried again. `None`: it is over, or not ours.
async fn train(
    router: &Router,
    claimed: Claimed,
    to_give_up: watch::Receiver<bool>,
    record: &mut Record,
) -> Result<Option<Duration>, RouterError> {
    let Claimed { row, lease, seat } = claimed;
    let (id, store) = (row.id.clone(), &router.0.store);
    let Some(run) = Run::start(router, row, lease, seat, to_give_up).await? else {
        store.release_lease(&id, lease).await?;
        return Ok(Some(REPLICA_RETRY));
    };
    match run.follow().await? {
        End::Told => Ok(None),
        End::Refused { message } => {
            if !std::mem::replace(&mut record.is_told, true) {
                let waits = JobChange {
                    from: HERE,
                    holder: Some(lease),
                    events: vec![event(
                        Level::Info,
                        format!("The job waits for a replica: {message}"),
                    )],
                    ..JobChange::default()
                };
                router.change_job(&id, waits).await?;
            }
            store.release_lease(&id, lease).await?;
            Ok(Some(REFUSED_RETRY))
        }
        End::Lost => {
            router.clear_if_ended(&id).await?;
            Ok(None)
        }
        End::Silent { .. } if router.stopping() => {
            // It stays `running`, for the next start or another router.
            store.release_lease(&id, lease).await?;
            Ok(None)
        }
        End::Silent { stepped } => {
            tracing::warn!(job = id, "the replica went; the job goes on from its last state");
            if stepped {
                record.stumbles = 0;
            }
            record.stumbles += 1;
            if record.stumbles >= MAX_STUMBLES {
                let message = format!("The engine ended the job {MAX_STUMBLES} times without saying why.");
                router.fail_job(&id, lease, server_error(message)).await?;
                return Ok(None);
            }
            Ok(Some(REPLICA_RETRY))
        }
    }
}

/// Returns when it is to be said that the job gives up its place: again and again.
async fn give_up(to_give_up: &mut watch::Receiver<bool>) {
    if *to_give_up.borrow_and_update() {
        tokio::time::sleep(FAIR).await;
    }
    if to_give_up.wait_for(|&gives_up| gives_up).await.is_err() {
        std::future::pending().await
    }
}

/// How a life of a job ended.
enum End {
    /// The replica said how, and it is written.
    Told,
    /// The replica trains as many as it may, or has no room for this one.
    Refused { message: String },
    /// The lease is another's.
    Lost,
    /// The replica went without a word. `stepped`: it had made a step.
    Silent { stepped: bool },
}

/// A job in a replica.
struct Run<'a> {
    router: &'a Router,
    id: JobId,
    lease: Lease,
    keeper: Keeper,
    /// Whether it is to be kept, for another tenant's.
    to_give_up: watch::Receiver<bool>,
    seat: JobSeat,
    /// It ran before a restart.
    is_restart: bool,
    /// The key that made it, where what it trains or stores is limited.
    key_id: Option<String>,
    /// Who rests where nothing is left to train: the job, or the sweep whose trial it is.
    rests: String,
    /// Its model's name, once it succeeds.
    model: String,
    /// Checkpoints that are kept; `None`: all.
    save_total_limit: Option<u32>,
    rank: u32,
    events: mpsc::Receiver<JobEvent>,
    total_steps: u64,
    /// The last state that the store names.
    saved: Option<Saved>,
    /// The last step that was reported in this life.
    step: Option<u64>,
    /// When this life of the job reported its first step, and which.
    pace: Option<(Instant, u64)>,
    /// Latest metrics, for checkpoints.
    latest: Map<String, Value>,
}

impl<'a> Run<'a> {
    /// `None`: the replica went.
    async fn start(
        router: &'a Router,
        row: JobRow,
        lease: Lease,
        seat: JobSeat,
        to_give_up: watch::Receiver<bool>,
    ) -> Result<Option<Run<'a>>, RouterError> {
        let missing = || RouterError::Store(StoreError::Damaged(format!("{} has no hyper", row.id)));
        let hyper: Hyper = record::from_json(row.hyper.as_deref().ok_or_else(missing)?)?;
        let rank = match &hyper.method {
            Method::Lora(lora) => lora.r,
            Method::Full => 0,
        };
        let is_restart = row.status == RUNNING;
        let request: JobRequest = record::from_json(&row.request)?;
        let id = record::job_id(row.id)?;
        let commands = seat.replica.commands.clone();
        let life = Life {
            epoch: lease.epoch(),
            saved: row.saved,
        };
        // From here on: fetching a state may take longer than a lease.
        let keeper = Keeper::new(router, id.as_str(), lease, Some(commands.clone()));
        let spec = JobSpec {
            id: id.clone(),
            folder: router.0.store.artifacts().pull_job(&id, life).await?,
            tenant: row.tenant,
            base_model: base_model(&router.info().model_folder),
            hyper,
            life,
        };
        let (sender, events) = mpsc::channel(JOB_EVENT_QUEUE);
        let start = Command::StartJob(Box::new(spec), sender);
        if commands.send(start).await.is_err() {
            return Ok(None);
        }
        tracing::info!(job = %id, epoch = life.epoch, "job started");
        Ok(Some(Run {
            router,
            rests: row.parent.unwrap_or_else(|| id.as_str().to_owned()),
            id,
            lease,
            keeper,
            to_give_up,
            seat,
            is_restart,
            key_id: row.key_id,
            model: row.model_name,
            save_total_limit: request.settings.save_total_limit,
            rank,
            events,
            total_steps: 0,
            saved: row.saved,
            step: None,
            pace: None,
            latest: Map::new(),
        }))
    }

    /// What ends this also lets go of the replica: a closed channel stops the job there.
    async fn follow(mut self) -> Result<End, RouterError> {
        let mut events = Vec::with_capacity(JOB_EVENT_QUEUE);
        loop {
            let heard = tokio::select! {
                biased;
                () = self.keeper.lost() => return Ok(End::Lost),
                () = give_up(&mut self.to_give_up) => {
                    // One that has not begun is told again. A replica that is gone trains nothing.
                    let pause = Command::PauseJob(self.id.clone());
                    let _ = self.seat.replica.commands.send(pause).await;
                    continue;
                }
                heard = self.events.recv_many(&mut events, JOB_EVENT_QUEUE) => heard,
            };
            if heard == 0 {
                // It may have been paused before there was anything to keep.
                let lease = Some(self.lease);
                return Ok(
                    match self.router.pause_at_once(self.id.as_str(), HERE, lease).await? {
                        true => End::Told,
                        false => self.silence(),
                    },
                );
            }
            // What is only told goes in one transaction; what changes the job has its own.
            let mut told = Told::default();
            for event in events.drain(..) {
                match self.tell(event, &mut told) {
                    None => {}
                    Some(turn) => {
                        if self.write(std::mem::take(&mut told)).await?.is_break() {
                            return Ok(End::Lost);
                        }
                        if let ControlFlow::Break(end) = self.turn(turn).await? {
                            return Ok(end);
                        }
                    }
                }
            }
            if self.write(told).await?.is_break() {
                return Ok(End::Lost);
            }
        }
    }

    /// The state that a replica wrote before it stopped is what the next life begins with.
    async fn wait_from(&mut self, step: u64) -> Result<End, RouterError> {
        let epoch = self.lease.epoch();
        self.router
            .0
            .store
            .artifacts()
            .push_job(&self.id, epoch, step)
            .await?;
        let kept = || JobChange {
            from: HERE,
            saved: Some(Saved { epoch, step }),
            ..JobChange::default()
        };
        let paused = JobChange {
            asked: Some(Asked::Pause),
            status: Some(PAUSED),
            lets_go: true,
            events: vec![metrics(
                Level::Info,
                format!("The job was paused after step {step}."),
                json!({ "step": step }),
            )],
            ..kept()
        };
        if self.change(paused).await?.is_continue() {
            return Ok(End::Told);
        }
        if *self.to_give_up.borrow() {
            let waits = JobChange {
                asked: Some(Asked::Nothing),
                status: Some(QUEUED),
                lets_go: true,
                events: vec![metrics(
                    Level::Info,
                    format!(
                        "The job gave its place to another tenant's after step {step}, and waits for the next."
                    ),
                    json!({ "step": step }),
                )],
                ..kept()
            };
            if self.change(waits).await?.is_continue() {
                return Ok(End::Told);
            }
        }
        Ok(match self.change(kept()).await? {
            ControlFlow::Continue(()) => self.silence(),
            ControlFlow::Break(()) => End::Lost,
        })
    }

    fn silence(&self) -> End {
        End::Silent {
            stepped: self.step.is_some(),
        }
    }

    /// A change by the holder. `Break`: the job is no longer ours to change.
    async fn change(&self, change: JobChange) -> Result<ControlFlow<()>, RouterError> {
        let change = JobChange {
            holder: Some(self.lease),
            ..change
        };
        Ok(match self.router.change_job(self.id.as_str(), change).await? {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        })
    }

    /// Events that only tell become records; others come back.
    fn tell(&mut self, said: JobEvent, told: &mut Told) -> Option<Turn> {
        match said {
            JobEvent::Started {
                total_steps,
                resumed_from,
                notes,
                examples,
                epoch_tokens,
                epoch_label_tokens,
                trainable_parameters,
            } => {
                for note in notes {
                    tracing::warn!(job = %self.id, "{note}");
                    told.events.push(event(Level::Warn, note));
                }
                self.total_steps = total_steps;
                let message = match self.is_restart {
                    false => "Fine-tuning job started",
                    true => "Fine-tuning job goes on after a restart",
                };
                told.is_started = true;
                told.kept_bytes = Some(job::kept_bytes(trainable_parameters));
                told.events.push(event(Level::Info, message.to_owned()));
                let from = resumed_from
                    .map(|step| format!(" from step {step}"))
                    .unwrap_or_default();
                let all = self.router.info().parameters + trainable_parameters;
                let share = 100.0 * trainable_parameters as f64 / all as f64;
                let message = format!(
                    "Training{from}: {total_steps} steps over {examples} examples ({epoch_tokens} tokens, \
                     {epoch_label_tokens} with loss); trainable params: {trainable_parameters} || all params: {all} || \
                     trainable%: {share:.4}"
                );
                let data = json!({
                    "total_steps": total_steps, "resumed_from": resumed_from, "examples": examples,
                    "epoch_tokens": epoch_tokens, "epoch_label_tokens": epoch_label_tokens,
                    "trainable_parameters": trainable_parameters,
                });
                told.events.push(metrics(Level::Info, message, data));
            }
            JobEvent::Step(report) => self.step(report, told),
            JobEvent::Validated {
                step,
                loss,
                token_accuracy,
                metrics: of_objective,
            } => {
                let mut data =
                    json!({ "step": step, "valid_loss": loss, "valid_mean_token_accuracy": token_accuracy });
                for (name, value) in of_objective {
                    data[format!("valid_{name}")] = value.into();
                }
                self.remember(&data);
                let total = self.total_steps;
                told.events.push(metrics(
                    Level::Info,
                    format!("Step {step}/{total}: validation loss={loss:.2}"),
                    data,
                ));
            }
            JobEvent::NoRoom { message } => {
                let message = format!("The job waits until it can write: {message}");
                tracing::warn!(job = %self.id, "{message}");
                told.events.push(event(Level::Warn, message));
                told.no_room = true;
            }
            JobEvent::Checkpoint { step, adapter, best } => {
                return Some(Turn::Checkpoint { step, adapter, best });
            }
            JobEvent::StoppedEarly { step, waited } => {
                let total = self.total_steps;
                let message = format!(
                    "Step {step}/{total}: training ends early, {waited} validations in a row were not better than the best"
                );
                told.events.push(event(Level::Info, message));
            }
            JobEvent::BestLoaded { step, metric, value } => {
                let message =
                    format!("The model of step {step} is the result: its {metric} of {value} is the best");
                told.events.push(event(Level::Info, message));
            }
            JobEvent::Finished {
                adapter,
                trained_tokens,
            } => {
                return Some(Turn::Finished {
                    adapter,
                    trained_tokens,
                });
            }
            JobEvent::Failed { message } => return Some(Turn::Failed { message }),
            JobEvent::Damaged { message } => return Some(Turn::Damaged { message }),
            JobEvent::Kept { step } => return Some(Turn::Kept { step }),
            JobEvent::Refused { message } => return Some(Turn::Refused { message }),
            JobEvent::Cancelled { step } => return Some(Turn::Cancelled { step }),
        }
        None
    }

    fn step(&mut self, report: StepReport, told: &mut Told) {
        let StepReport {
            step,
            epoch,
            loss,
            token_accuracy,
            metrics: of_objective,
            grad_norm,
            learning_rate,
            trained_tokens,
            tokens_per_second,
        } = report;
        let (since, first) = *self.pace.get_or_insert_with(|| (Instant::now(), step));
        if step > first {
            let step_s = since.elapsed().as_secs_f64() / (step - first) as f64;
            let left_s = step_s * self.total_steps.saturating_sub(step) as f64;
            told.estimated_finish = Some(tandem_store::now().saturating_add(left_s as i64));
        }
        self.step = Some(step);
        // A validation is of its own step.
        self.latest.remove("valid_loss");
        self.latest.remove("valid_mean_token_accuracy");
        told.trained_tokens = Some(trained_tokens);
        let mut data = json!({
            "step": step, "train_loss": loss, "train_mean_token_accuracy": token_accuracy, "epoch": epoch,
            "grad_norm": grad_norm, "learning_rate": learning_rate, "trained_tokens": trained_tokens,
            "tokens_per_second": tokens_per_second, "total_steps": self.total_steps,
        });
        for (name, value) in of_objective {
            data[name] = value.into();
        }
        self.remember(&data);
        let message = format!("Step {step}/{}: training loss={loss:.2}", self.total_steps);
        told.events.push(metrics(Level::Info, message, data));
    }

    fn remember(&mut self, data: &Value) {
        let kept = [
            "step",
            "train_loss",
            "train_mean_token_accuracy",
            "valid_loss",
            "valid_mean_token_accuracy",
        ];
        for key in kept {
            if let Some(value) = data.get(key) {
                self.latest.insert(key.to_owned(), value.clone());
            }
        }
    }

    async fn write(&mut self, told: Told) -> Result<ControlFlow<()>, RouterError> {
        let Told {
            events,
            trained_tokens,
            estimated_finish,
            no_room,
            is_started,
            kept_bytes,
        } = told;
        let trains = trained_tokens.is_some();
        if no_room {
            // It may be the disk of this data folder.
            self.router.0.store.look_for_room().await;
        }
        if events.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        let change = JobChange {
            from: HERE,
            status: is_started.then_some(RUNNING),
            trained_tokens,
            kept_bytes,
            estimated_finish,
            events,
            ..JobChange::default()
        };
        let changed = self.change(change).await?;
        if changed.is_continue() && trains {
            self.rest_if_used_up().await?;
        }
        Ok(changed)
    }

    /// Its steps are counted; where none is left today, the job is paused, and may be resumed tomorrow.
    async fn rest_if_used_up(&mut self) -> Result<(), RouterError> {
        let checked = self.router.check_quota(self.key_id.as_deref(), 0).await;
        self.rest_if_exceeded(checked).await
    }

    /// Its checkpoints are stored; where its next one has no room, or its state, the job is paused.
    async fn rest_if_full(&mut self) -> Result<(), RouterError> {
        let storage = self.router.storage_by(self.key_id.as_deref()).await?;
        let checked = storage.map_or(Ok(()), Storage::holds);
        let checked = checked.map_err(|exceeded| StoreError::from(exceeded).into());
        self.rest_if_exceeded(checked).await
    }

    async fn rest_if_exceeded(&mut self, checked: Result<(), RouterError>) -> Result<(), RouterError> {
        let exceeded = match checked {
            Err(error @ (RouterError::Quota(_) | RouterError::Store(StoreError::OverLimit(_)))) => error,
            checked => return checked,
        };
        // Once.
        self.key_id = None;
        let message = format!("The job is paused: {exceeded}, then resume it");
        tracing::warn!(job = %self.id, "{message}");
        let told = JobChange {
            from: HERE,
            events: vec![event(Level::Warn, message)],
            ..JobChange::default()
        };
        if self.change(told).await?.is_continue() {
            self.router.let_rest(&self.rests).await?;
        }
        Ok(())
    }

    async fn turn(&mut self, turn: Turn) -> Result<ControlFlow<End>, RouterError> {
        let done = match turn {
            Turn::Checkpoint { step, adapter, best } => {
                return Ok(match self.checkpoint(step, adapter, best).await? {
                    ControlFlow::Continue(()) => {
                        self.rest_if_full().await?;
                        ControlFlow::Continue(())
                    }
                    ControlFlow::Break(()) => ControlFlow::Break(End::Lost),
                });
            }
            Turn::Finished {
                adapter,
                trained_tokens,
            } => self.finish(adapter, trained_tokens).await?,
            Turn::Failed { message } if self.router.stopping() => {
                tracing::info!(job = %self.id, message, "the job waits for the next start");
                return Ok(ControlFlow::Break(self.silence()));
            }
            Turn::Failed { message } => {
                self.router
                    .fail_job(self.id.as_str(), self.lease, server_error(message))
                    .await?;
                ControlFlow::Continue(())
            }
            Turn::Damaged { message } => {
                tracing::warn!(job = %self.id, message, "the job's examples are prepared again");
                let again = JobChange {
                    from: HERE,
                    status: Some(VALIDATING),
                    lets_go: true,
                    events: vec![event(
                        Level::Warn,
                        format!("{message}: the examples are prepared again from the job's files"),
                    )],
                    ..JobChange::default()
                };
                let done = self.change(again).await?;
                self.router.0.desk.created.notify_one();
                done
            }
            Turn::Kept { step } => return Ok(ControlFlow::Break(self.wait_from(step).await?)),
            Turn::Refused { message } => {
                tracing::info!(job = %self.id, message, "the job waits for a replica");
                return Ok(ControlFlow::Break(End::Refused { message }));
            }
            Turn::Cancelled { step } => {
                let cancelled = JobChange {
                    from: HERE,
                    status: Some("cancelled"),
                    ends: true,
                    events: vec![event(
                        Level::Info,
                        format!("The job was cancelled after step {step}."),
                    )],
                    ..JobChange::default()
                };
                let done = self.change(cancelled).await?;
                if done.is_continue() {
                    self.router.0.store.remove_job_folder(self.id.as_str()).await?;
                }
                done
            }
        };
        Ok(ControlFlow::Break(match done {
            ControlFlow::Continue(()) => End::Told,
            ControlFlow::Break(()) => End::Lost,
        }))
    }

    /// The state and the adapter are in the store before the row that names them.
    async fn checkpoint(
        &mut self,
        step: u64,
        adapter: AdapterRef,
        best: Option<u64>,
    ) -> Result<ControlFlow<()>, RouterError> {
        let artifacts = self.router.0.store.artifacts();
        let saved = Saved {
            epoch: self.lease.epoch(),
            step,
        };
        artifacts.push_job(&self.id, saved.epoch, step).await?;
        let kept = self.router.keep_adapter(&adapter).await?;
        let made = self.made(&kept);
        let model = checkpoint_name(&self.model, step);
        self.latest.insert("step".to_owned(), step.into());
        let surplus = self.surplus(step, best).await?;
        let change = JobChange {
            from: HERE,
            drops: surplus.iter().map(|row| row.model.clone()).collect(),
            events: vec![metrics(
                Level::Info,
                format!("Checkpoint created at step {step}: {model}"),
                json!({ "step": step, "model": model }),
            )],
            checkpoint: Some(NewCheckpoint {
                step,
                model: model.clone(),
                metrics: record::to_json(&self.latest),
            }),
            saved: Some(saved),
            name: Some(self.router.job_name(self.id.as_str(), model, Some(step), made)),
            ..JobChange::default()
        };
        let done = self.rename(change).await?;
        if done.is_continue()
            && let Some(earlier) = self.saved.replace(saved).filter(|&earlier| earlier != saved)
        {
            artifacts.drop_state(&self.id, earlier).await?;
        }
        Ok(done)
    }

    /// Checkpoints that are one too many beside that of `step`.
    async fn surplus(&self, step: u64, best: Option<u64>) -> Result<Vec<CheckpointRow>, RouterError> {
        let Some(limit) = self.save_total_limit else {
            return Ok(vec![]);
        };
        let mut rows = self.router.0.store.all_checkpoints(self.id.as_str()).await?;
        let mut steps: Vec<u64> = rows.iter().map(|row| row.step).chain([step]).collect();
        steps.sort_unstable();
        steps.dedup();
        let surplus = selection::surplus(&steps, best, limit as usize);
        rows.retain(|row| surplus.contains(&row.step));
        Ok(rows)
    }

    /// The name, the result files and the success are one transaction: a client that reads `succeeded` can use all.
    async fn finish(
        &mut self,
        adapter: AdapterRef,
        trained_tokens: u64,
    ) -> Result<ControlFlow<()>, RouterError> {
        let result_files = result::publish(self.router, self.id.as_str()).await?;
        let kept = self.router.keep_adapter(&adapter).await?;
        let made = self.made(&kept);
        let change = JobChange {
            from: HERE,
            status: Some("succeeded"),
            ends: true,
            trained_tokens: Some(trained_tokens),
            fine_tuned_model: Some(self.model.clone()),
            events: vec![
                event(
                    Level::Info,
                    format!("New fine-tuned model created: {}", self.model),
                ),
                event(Level::Info, "Fine tuning job successfully completed".to_owned()),
            ],
            name: Some(
                self.router
                    .job_name(self.id.as_str(), self.model.clone(), None, made),
            ),
            result_files: result_files.clone(),
            ..JobChange::default()
        };
        let done = self.rename(change).await?;
        if done.is_break() {
            result::discard(self.router, &result_files).await?;
            return Ok(done);
        }
        tracing::info!(job = %self.id, model = self.model, trained_tokens, "job succeeded");
        self.router.0.store.remove_job_folder(self.id.as_str()).await?;
        Ok(done)
    }

    /// A change by the holder that gives an adapter a name.
    async fn rename(&self, change: JobChange) -> Result<ControlFlow<()>, RouterError> {
        let _one_at_a_time = self.router.0.changes.lock().await;
        self.change(change).await
    }

    fn made(&self, kept: &Hold) -> Made {
        Made {
            digest: kept.digest,
            rank: self.rank,
        }
    }
}

fn server_error(message: String) -> JobError {
    JobError {
        code: "server_error".to_owned(),
        param: None,
        message,
    }
}

/// What is written together.
#[derive(Default)]
struct Told {
    events: Vec<NewEvent>,
    trained_tokens: Option<u64>,
    kept_bytes: Option<u64>,
    estimated_finish: Option<i64>,
    /// The replica found its disk full.
    no_room: bool,
    /// The replica trains it.
    is_started: bool,
}

/// An event that changes more than the record.
enum Turn {
    Checkpoint {
        step: u64,
        adapter: AdapterRef,
        best: Option<u64>,
    },
    Finished {
        adapter: AdapterRef,
        trained_tokens: u64,
    },
    Failed {
        message: String,
    },
    Damaged {
        message: String,
    },
    Kept {
        step: u64,
    },
    Refused {
        message: String,
    },
    Cancelled {
        step: u64,
    },
}
