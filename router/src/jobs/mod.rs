//! Jobs as clients see them: create, list, pause, cancel, read along. A job's state is its row; every change is one
//! transaction (`Store::change_job`), and whoever made it wakes the readers. Whoever works on a job holds its lease
//! (`keeper`), so any number of routers may share the rows.
//!
//! ```text
//! validating_files --prepare--> queued --supervisor--> running --engine--> succeeded
//!                 \------------------\-------------------\---------------> failed, cancelled
//!                                      queued <-> paused <- running
//! ```
//!
//! A sweep is a job of its own (`sweeping`, then an end) whose trials are jobs like any other (`sweep`).

mod check;
pub mod hyper;
pub(crate) mod keeper;
mod name;
pub(crate) mod prepare;
pub mod preview;
pub(crate) mod record;
mod result;
pub(crate) mod supervisor;
mod sweep;

use std::path::PathBuf;
use std::time::Duration;

use tandem_core::id::AdapterDigest;
use tandem_core::job::{Lora, Rows};
use tandem_core::settings::Settings;
use tandem_store::{Asked, JobChange, Lease, NewEvent, NewJob, NewName, Source, Tenant, ids};
use tandem_text::TextError;
use tandem_text::dataset::{self, Kind, Reading, suits};
use tokio::sync::{Notify, mpsc, watch};

use crate::Router;
use crate::api::{
    Checkpoint, Client, FileIds, Job, JobError, JobEventRecord, JobRequest, JobStatus, Level, MetadataFilter,
    ModelCard, ModelKind, Page, RouterError,
};

const QUEUED: &str = "queued";
const RUNNING: &str = "running";
const PAUSED: &str = "paused";
const SWEEPING: &str = "sweeping";
const VALIDATING: &str = "validating_files";
/// A cancel or a pause is answered between two quanta of the engine, seconds at most; the request stands if that takes
/// longer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// Events that are read from the store at once, and that may wait for a slow follower.
const FOLLOW_PAGE: u32 = 100;

/// Where those who work on jobs and those who watch them meet.
pub(crate) struct Desk {
    /// A job was created: for `prepare`.
    created: Notify,
    /// A job is queued: for the supervisor.
    queued: Notify,
    /// Some job changed.
    changed: watch::Sender<()>,
    /// Somebody may want a running job to end or to pause: for its keeper.
    asked: watch::Sender<()>,
}

impl Desk {
    pub fn new() -> Desk {
        Desk {
            created: Notify::new(),
            queued: Notify::new(),
            changed: watch::Sender::new(()),
            asked: watch::Sender::new(()),
        }
    }

    /// Another router changed some job: everybody looks.
    pub fn stir(&self) {
        self.created.notify_one();
        self.queued.notify_one();
        self.changed.send_replace(());
        self.asked.send_replace(());
    }

    /// Wakes after every change of any job.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Something that somebody works on may be to be cancelled.
    pub fn wake_keepers(&self) {
        self.asked.send_replace(());
    }

    pub fn wake_supervisor(&self) {
        self.queued.notify_one();
    }
}

impl Router {
    pub(crate) async fn create_job(
        &self,
        mut request: JobRequest,
        client: &Client,
    ) -> Result<Job, RouterError> {
        let config = self.config();
        self.check_quota(client.training_key(), 0).await?;
        self.check_storage(client).await?;
        self.find_start(&mut request, client).await?;
        check::request(&request, self.info())?;
        self.check_files("training_file", &request.training_file, client)
            .await?;
        if let Some(files) = &request.validation_file {
            self.check_files("validation_file", files, client).await?;
        }
        self.check_rows(&request).await?;
        // Trials have one seed, unless that is what they differ in.
        let seed = request.settings.seed.unwrap_or_else(ids::seed);
        for settings in request.all_settings() {
            settings.seed.get_or_insert(seed);
        }
        let id = ids::job();
        let from = request.start.map(|digest| {
            let name = request.start_name().expect("it starts from one");
            event(
                Level::Info,
                format!("Training starts from the adapter {name} ({digest})"),
            )
        });
        let model_names = name::candidates(&request, config, &id, tandem_store::now());
        let trials = sweep::trials(&request, &id, self.info(), client);
        let is_sweep = !trials.is_empty();
        let files = match is_sweep {
            false => format!("Validating training file: {}", request.training_file),
            true => sweep::begins(&request),
        };
        let job = NewJob {
            base: self.info().base_digest,
            tenant: client.tenant.clone(),
            key_id: client.quota_key().map(str::to_owned),
            // Of a sweep, trials keep theirs.
            kept_bytes: if is_sweep {
                0
            } else {
                hyper::kept_bytes(&request.settings, self.info())
            },
            status: if is_sweep { SWEEPING } else { VALIDATING }.to_owned(),
            request: record::to_json(&request),
            metadata: request.metadata.clone(),
            model_names,
            events: vec![
                event(Level::Info, format!("Created fine-tuning job: {id}")),
                event(Level::Info, files),
            ]
            .into_iter()
            .chain(from)
            .collect(),
            id,
        };
        let records = is_sweep.then(|| record::to_json(&sweep::at_first(&request, &trials)));
        let row = self.0.store.insert_sweep(job, trials, records).await?;
        self.0.desk.created.notify_one();
        if is_sweep {
            self.0.desk.queued.notify_one();
        }
        tracing::info!(job = %row.id, file = %request.training_file, "job created");
        record::job(row)
    }

    /// What the job starts from: the model that it names, where that is an adapter, or the one that a setting names.
    async fn find_start(&self, request: &mut JobRequest, client: &Client) -> Result<(), RouterError> {
        let find = |name: &str| self.0.catalog.find(client, name);
        let digest_of = |card: ModelCard| match card.kind {
            ModelKind::Base => None,
            ModelKind::Adapter { digest, .. } => Some(digest),
        };
        let model = find(&request.model).ok_or_else(|| RouterError::UnknownModel(request.model.clone()))?;
        let model = digest_of(model);
        let param = "from_peft_checkpoint";
        let named = match &request.settings.from_peft_checkpoint {
            None => None,
            Some(name) => Some(find(name).and_then(digest_of).ok_or_else(|| {
                let message = format!(
                    "{param}: there is no adapter named {name:?}; a folder is given a name first (/v1/load_lora_adapter)"
                );
                RouterError::invalid(param, message)
            })?),
        };
        if let (Some(model), Some(named)) = (model, named)
            && model != named
        {
            let message = format!("{param} and model name two adapters: a job starts from one");
            return Err(RouterError::invalid(param, message));
        }
        request.start = model.or(named);
        let Some(digest) = request.start else {
            return Ok(());
        };
        let (_, lora) = self.adapter_shape(digest).await?;
        let unfit =
            |why| RouterError::invalid("model", format!("a job cannot start from this adapter: {why}"));
        let lora = lora.map_err(unfit)?;
        let mut taken_over = request.all_settings().map(|settings| settings.start_from(&lora));
        let taken_over = taken_over.find(Result::is_err).unwrap_or(Ok(()));
        taken_over.map_err(|(param, message)| RouterError::invalid(param, message))
    }

    /// Where an adapter lies, and its shape; or why nothing can be trained on from it.
    pub(crate) async fn adapter_shape(
        &self,
        digest: AdapterDigest,
    ) -> Result<(PathBuf, Result<Lora, String>), RouterError> {
        let folder = self.0.store.adapter_folder(digest).await?;
        let config = tokio::fs::read(folder.join("adapter_config.json")).await;
        let config = config.map_err(|error| error.to_string());
        let config =
            config.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string()));
        let lora = config.and_then(|config| Lora::of_peft(&config, &self.info().lora_targets));
        Ok((folder, lora))
    }

    /// An objective wants files of its rows, a weight of prompts such that have some. Their first row says it; the others
    /// are checked later.
    async fn check_rows(&self, request: &JobRequest) -> Result<(), RouterError> {
        let rows = hyper::objective(&request.settings).rows();
        let weighs_prompts = request
            .settings
            .prompt_loss_weight
            .is_some_and(|weight| weight != 0.0);
        // Of a plain job no file is read before it is answered.
        if rows == Rows::Examples && !weighs_prompts {
            return Ok(());
        }
        let reading = Reading::new(&request.settings)
            .map_err(|(param, message)| RouterError::invalid(param, message))?;
        let files = [
            ("training_file", Some(&request.training_file)),
            ("validation_file", request.validation_file.as_ref()),
        ];
        for (param, files) in files
            .into_iter()
            .filter_map(|(param, files)| Some((param, files?)))
        {
            // Rows of a job have one kind.
            let Some(source) = self.sources(files).await?.into_iter().next() else {
                continue;
            };
            let reading = reading.whole();
            let first = move || Some(dataset::Rows::open(vec![source], &reading).ok()?.next()?.ok()?.1);
            // What cannot be read fails the job, with its line.
            let Some(sample) = tokio::task::spawn_blocking(first).await.ok().flatten() else {
                continue;
            };
            if let Err(error) = suits(&sample, rows) {
                return Err(RouterError::invalid(param, format!("{param}, line 1: {error}")));
            }
            let kind = sample.kind();
            if weighs_prompts && kind != Kind::Completion {
                let error = TextError::NoPrompt { shape: kind.shape() };
                return Err(RouterError::invalid("prompt_loss_weight", error.to_string()));
            }
        }
        Ok(())
    }

    pub(crate) async fn jobs(
        &self,
        tenant: Option<&Tenant>,
        after: Option<&str>,
        limit: u32,
        metadata: MetadataFilter,
    ) -> Result<Page<Job>, RouterError> {
        let rows = self.0.store.jobs(tenant, after, limit, &metadata).await?;
        record::page(rows, record::job)
    }

    pub(crate) async fn job(&self, id: &str) -> Result<Job, RouterError> {
        let row = self.0.store.job(id).await?;
        record::job(row.ok_or_else(|| RouterError::UnknownJob(id.to_owned()))?)
    }

    pub(crate) async fn cancel_job(&self, id: &str) -> Result<Job, RouterError> {
        let mut changed = self.0.desk.watch();
        let job = self.job(id).await?;
        if job.status.ended() {
            return Err(already_ended(&job));
        }
        // Before it is looked at again: whoever starts it from here on sees this.
        self.0.store.ask(id, Asked::Cancel).await?;
        let ended = match job.is_sweep() {
            false => {
                let from = &[VALIDATING, QUEUED, PAUSED];
                self.cancel_at_once(id, from, None).await?
            }
            true => {
                self.wake_sweep(id, vec![]).await?;
                false
            }
        };
        // Its keeper, here or in another router, stops who prepares it, or tells the replica.
        self.0.desk.asked.send_replace(());
        if ended {
            return self.job(id).await;
        }
        match self.settled(id, JobStatus::Cancelled, &mut changed).await? {
            job if job.status.ended() && job.status != JobStatus::Cancelled => Err(already_ended(&job)),
            job => Ok(job),
        }
    }

    pub(crate) async fn pause_job(&self, id: &str) -> Result<Job, RouterError> {
        let mut changed = self.0.desk.watch();
        let job = self.job(id).await?;
        is_no_trial(&job)?;
        match job.status {
            JobStatus::Paused => return Ok(job),
            status if status.ended() => return Err(already_ended(&job)),
            _ => {}
        }
        if self.let_rest(id).await? {
            return self.job(id).await;
        }
        match self.settled(id, JobStatus::Paused, &mut changed).await? {
            job if job.status.ended() => Err(already_ended(&job)),
            job => Ok(job),
        }
    }

    /// Asks for a pause. Whether the job rests already.
    async fn let_rest(&self, id: &str) -> Result<bool, RouterError> {
        self.0.store.ask(id, Asked::Pause).await?;
        let paused = self.pause_at_once(id, &[QUEUED], None).await?;
        self.0.desk.asked.send_replace(());
        Ok(paused)
    }

    pub(crate) async fn resume_job(&self, id: &str) -> Result<Job, RouterError> {
        let before = self.job(id).await?;
        is_no_trial(&before)?;
        let row = self.0.store.job(id).await?;
        let key = row.as_ref().and_then(|row| row.key_id.as_deref());
        self.check_quota(key, 0).await?;
        self.check_storage_by(key).await?;
        let was = row.map(|row| row.asked);
        let resumed = match before.is_sweep() {
            false => self.let_go_on(id).await?,
            true => {
                self.0.store.ask(id, Asked::Nothing).await?;
                let resumed = event(Level::Info, "Fine-tuning job resumed".to_owned());
                self.wake_sweep(id, vec![resumed]).await?
            }
        };
        let job = self.job(id).await?;
        match resumed || was == Some(Asked::Pause) && !job.status.ended() {
            true => Ok(job),
            false if job.status.ended() => Err(already_ended(&job)),
            false => {
                let state = record::status_name(job.status);
                Err(RouterError::Conflict(format!(
                    "Job {id} is not paused: it is {state}."
                )))
            }
        }
    }

    /// Withdraws a pause. Whether the job rested.
    async fn let_go_on(&self, id: &str) -> Result<bool, RouterError> {
        // A pause that has not happened yet does not happen any more.
        self.0.store.ask(id, Asked::Nothing).await?;
        let resumed = JobChange {
            from: &[PAUSED],
            status: Some(QUEUED),
            events: vec![event(
                Level::Info,
                "Fine-tuning job resumed, moving job to queued state".to_owned(),
            )],
            ..JobChange::default()
        };
        let resumed = self.change_job(id, resumed).await?;
        if resumed {
            self.0.desk.queued.notify_one();
        }
        Ok(resumed)
    }

    /// A sweep that rests is looked after again. Whether it rested.
    async fn wake_sweep(&self, id: &str, events: Vec<NewEvent>) -> Result<bool, RouterError> {
        let woken = JobChange {
            from: &[PAUSED],
            status: Some(SWEEPING),
            events,
            ..JobChange::default()
        };
        let woken = self.change_job(id, woken).await?;
        self.0.desk.asked.send_replace(());
        self.0.desk.queued.notify_one();
        Ok(woken)
    }

    /// The job once it is `wanted` or has ended, or as it is after [`ANSWER_WAIT`].
    async fn settled(
        &self,
        id: &str,
        wanted: JobStatus,
        changed: &mut watch::Receiver<()>,
    ) -> Result<Job, RouterError> {
        let settled = async {
            loop {
                let job = self.job(id).await?;
                if job.status == wanted || job.status.ended() || changed.changed().await.is_err() {
                    return Ok::<Job, RouterError>(job);
                }
            }
        };
        match tokio::time::timeout(ANSWER_WAIT, settled).await {
            Ok(job) => job,
            Err(_) => self.job(id).await,
        }
    }

    pub(crate) async fn job_events(
        &self,
        id: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Page<JobEventRecord>, RouterError> {
        self.job(id).await?;
        let rows = self.0.store.job_events(id, after, limit).await?;
        record::page(rows, record::event)
    }

    pub(crate) async fn follow_job(&self, id: &str) -> Result<mpsc::Receiver<JobEventRecord>, RouterError> {
        self.job(id).await?;
        let (sender, receiver) = mpsc::channel(FOLLOW_PAGE as usize);
        let (router, id) = (self.clone(), id.to_owned());
        tokio::spawn(async move {
            let follow = router.follow(&id, &sender);
            tokio::select! {
                () = sender.closed() => {}
                followed = follow => if let Err(error) = followed {
                    tracing::warn!(job = id, %error, "cannot go on reading a job's events");
                },
            }
        });
        Ok(receiver)
    }

    async fn follow(&self, id: &str, sender: &mpsc::Sender<JobEventRecord>) -> Result<(), RouterError> {
        let mut changed = self.0.desk.watch();
        let mut seq = 0;
        loop {
            changed.mark_unchanged();
            // The state is read first: the last events come with the end, in one transaction.
            let ended = self.job(id).await?.status.ended();
            let rows = self.0.store.job_events_since(id, seq, FOLLOW_PAGE).await?;
            let n_rows = rows.len();
            for row in rows {
                seq = row.seq;
                if sender.send(record::event(row)?).await.is_err() {
                    return Ok(());
                }
            }
            if n_rows == FOLLOW_PAGE as usize {
                continue;
            }
            if ended || changed.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    pub(crate) async fn checkpoints(
        &self,
        id: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Page<Checkpoint>, RouterError> {
        self.job(id).await?;
        let rows = self.0.store.checkpoints(id, after, limit).await?;
        record::page(rows, record::checkpoint)
    }

    async fn check_files(&self, param: &str, files: &FileIds, client: &Client) -> Result<(), RouterError> {
        for id in &files.0 {
            self.check_file(param, id, client).await?;
        }
        Ok(())
    }

    /// Where the files lie, as they were written, and what they are called.
    async fn sources(&self, files: &FileIds) -> Result<Vec<dataset::Source>, RouterError> {
        let mut sources = vec![];
        for id in &files.0 {
            let row = self.file_row(id).await?;
            let path = self.0.store.sound_file(&row).await?;
            let name = row.filename;
            sources.push(dataset::Source { path, name });
        }
        Ok(sources)
    }

    async fn check_file(&self, param: &str, id: &str, client: &Client) -> Result<(), RouterError> {
        match self.of(client).file(id).await {
            Ok(file) if file.purpose == crate::files::FINE_TUNE => Ok(()),
            Ok(file) => {
                let message = format!(
                    "{param} {id} has purpose '{}', it must have 'fine-tune'",
                    file.purpose
                );
                Err(RouterError::invalid(param, message))
            }
            Err(RouterError::UnknownFile(_)) => Err(RouterError::invalid(
                param,
                format!("{param} {id:?} does not exist"),
            )),
            Err(error) => Err(error),
        }
    }

    /// Apply a change, wake readers, serve a new name. Whether the job was in one of `change.from`.
    async fn change_job(&self, id: &str, change: JobChange) -> Result<bool, RouterError> {
        let changed = self.0.store.change_job(id, change).await?;
        let Some(changed) = changed else { return Ok(false) };
        self.0.catalog.remove(&changed.dropped);
        self.serve(changed.name);
        // Nobody may be watching.
        let _ = self.0.desk.changed.send(());
        Ok(true)
    }

    /// When there may be work: somebody says so, or another router's lease may have run out.
    async fn wait_for(&self, work: &Notify) {
        match self.0.store.is_shared() {
            false => work.notified().await,
            true => {
                let period = self.0.store.renewal_period();
                // Either is a reason to look.
                let _ = tokio::time::timeout(period, work.notified()).await;
            }
        }
    }

    /// Whether the job is paused now: it was in one of `from`, and a pause is what is asked of it.
    async fn pause_at_once(
        &self,
        id: &str,
        from: &'static [&'static str],
        holder: Option<Lease>,
    ) -> Result<bool, RouterError> {
        let paused = JobChange {
            from,
            holder,
            asked: Some(Asked::Pause),
            lets_go: true,
            status: Some(PAUSED),
            events: vec![event(Level::Info, "The job was paused.".to_owned())],
            ..JobChange::default()
        };
        self.change_job(id, paused).await
    }

    async fn cancel_at_once(
        &self,
        id: &str,
        from: &'static [&'static str],
        holder: Option<Lease>,
    ) -> Result<bool, RouterError> {
        let cancelled = JobChange {
            from,
            holder,
            status: Some("cancelled"),
            ends: true,
            events: vec![event(Level::Info, "The job was cancelled.".to_owned())],
            ..JobChange::default()
        };
        let cancelled = self.change_job(id, cancelled).await?;
        if cancelled {
            self.0.store.remove_job_folder(id).await?;
        }
        Ok(cancelled)
    }

    async fn fail_job(&self, id: &str, holder: Lease, error: JobError) -> Result<(), RouterError> {
        let failed = JobChange {
            from: &[VALIDATING, QUEUED, RUNNING],
            holder: Some(holder),
            status: Some("failed"),
            ends: true,
            events: vec![event(Level::Error, error.message.clone())],
            error: Some(record::to_json(&error)),
            ..JobChange::default()
        };
        if self.change_job(id, failed).await? {
            tracing::warn!(job = id, code = error.code, message = error.message, "job failed");
            self.0.store.remove_job_folder(id).await?;
        }
        Ok(())
    }

    /// After a holder's write was refused: the job was cancelled, or is another router's now.
    async fn clear_if_ended(&self, id: &str) -> Result<(), RouterError> {
        match self.job(id).await?.status.ended() {
            true => Ok(self.0.store.remove_job_folder(id).await?),
            false => Ok(()),
        }
    }

    fn job_name(&self, job: &str, name: String, step: Option<u64>, made: Made) -> NewName {
        let Made { digest, rank } = made;
        let source = Source::Job {
            job: job.to_owned(),
            step,
        };
        NewName {
            base: self.info().base_digest,
            name,
            digest,
            rank,
            source,
        }
    }
}

/// An adapter of a job, in the store.
#[derive(Clone, Copy)]
struct Made {
    digest: tandem_core::id::AdapterDigest,
    rank: u32,
}

fn event(level: Level, message: String) -> NewEvent {
    metrics(level, message, serde_json::Value::Null)
}

fn metrics(level: Level, message: String, data: serde_json::Value) -> NewEvent {
    NewEvent {
        level: record::level_name(level),
        message,
        data: data.to_string(),
    }
}

/// What a trial does is its sweep's to say.
fn is_no_trial(job: &Job) -> Result<(), RouterError> {
    match &job.parent {
        None => Ok(()),
        Some(sweep) => {
            let message = format!("Job {} is a trial of {sweep}: pause and resume that one.", job.id);
            Err(RouterError::Conflict(message))
        }
    }
}

fn already_ended(job: &Job) -> RouterError {
    let state = record::status_name(job.status);
    RouterError::Conflict(format!("Job {} has already ended: it is {state}.", job.id))
}

impl Job {
    fn is_sweep(&self) -> bool {
        !self.request.trials.is_empty()
    }
}

impl JobRequest {
    fn all_settings(&mut self) -> impl Iterator<Item = &mut Settings> {
        let trials = self.trials.iter_mut().map(|trial| &mut trial.settings);
        std::iter::once(&mut self.settings).chain(trials)
    }
}

impl JobStatus {
    pub fn ended(self) -> bool {
        match self {
            JobStatus::Succeeded | JobStatus::Failed | JobStatus::Cancelled => true,
            JobStatus::ValidatingFiles
            | JobStatus::Queued
            | JobStatus::Sweeping
            | JobStatus::Running
            | JobStatus::Paused => false,
        }
    }
}
