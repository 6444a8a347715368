//! Names to adapters, text to tokens and back, admission, choice of replica, files and jobs. The edge calls [`Router`];
//! engines sit behind `tandem_core::replica::ReplicaHandle`s, which a [`Fleet`] keeps. Not here: HTTP, tensors, SQL.

mod answer;
pub mod api;
pub mod batches;
mod catalog;
mod content;
mod defaults;
mod files;
pub mod fleet;
mod generate;
mod grammars;
mod jobs;
mod meter;
mod models;
mod quota;
mod relay;
mod responses;
pub mod shares;
mod storage;
mod tasks;
#[cfg(test)]
mod tests;
mod texts;
pub mod time;
pub mod tinker;
mod traced;
mod turns;
pub mod uploads;
mod view;
mod watch;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tandem_core::histogram::{Counted, Histogram};
use tandem_core::replica::{Command, ReplicaInfo};
use tandem_core::stats::Stats;
use tandem_store::Store;
use tandem_text::reasoning::ReasoningFormat;
use tandem_text::tools::ToolFormat;
use tandem_text::{TextError, Tokenizer};
use tokio::task::JoinHandle;

pub use api::{Keep, LoadMode, MetadataFilter, Order, Part};
pub use content::Content;
pub use defaults::Defaults;
pub use fleet::Fleet;
use fleet::JobSeat;
pub use jobs::{hyper, preview};
pub use texts::MAX_TEXT_BYTES;
pub use view::View;

/// Data sets that are read at once for uploads and previews: a row may take a hundred times its bytes meanwhile.
const READERS: usize = 2;

use answer::Formats;
use api::RouterError;
use batches::Counter;
use catalog::Catalog;
use grammars::Grammars;
use jobs::Signals;
use shares::Shares;
use tasks::Down;
use texts::Texts;
use turns::Turns;

#[derive(Clone, Debug)]
pub struct Config {
    /// The base model's name, which answers, cards of adapters and fine-tuned models carry.
    pub served_model_name: String,
    /// More names of the base model.
    pub other_model_names: Vec<String>,
    /// Part of the names of fine-tuned models.
    pub organization: String,
    /// Sequences that may wait for the engine before calls are refused as [`RouterError::Busy`].
    pub max_waiting: u32,
    /// Choices (`n`) of one call at most.
    pub max_choices: u32,
    /// Name and PEFT folder of adapters to serve from the start.
    pub lora_modules: Vec<(String, PathBuf)>,
    /// For requests that do not say.
    pub defaults: Defaults,
    /// What the model writes for calls and for reasoning. `None`: it is content.
    pub tool_format: Option<&'static ToolFormat>,
    pub reasoning_format: Option<&'static ReasoningFormat>,
    /// Tools are offered though no format reads calls.
    pub calls_as_content: bool,
    /// What is kept of responses.
    pub keep_responses: Keep,
    /// A call may say that it goes before others. That it goes behind them may always be said.
    pub overtaking: bool,
    /// Of training clients.
    pub tinker: tinker::Limits,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            served_model_name: "tandem".to_owned(),
            other_model_names: Vec::new(),
            organization: "tandem".to_owned(),
            max_waiting: 1024,
            max_choices: 128,
            lora_modules: Vec::new(),
            defaults: Defaults::default(),
            tool_format: None,
            reasoning_format: None,
            calls_as_content: false,
            keep_responses: Keep {
                bytes: 256 << 20,
                age_s: 30 * 24 * 3600,
            },
            overtaking: false,
            tinker: tinker::Limits::DEFAULT,
        }
    }
}

/// One base model, its adapters, files and jobs. Cheap to clone.
#[derive(Clone)]
pub struct Router(Arc<Shared>);

struct Shared {
    store: Store,
    texts: Texts,
    /// For data sets that are read while somebody waits.
    readers: Arc<Turns>,
    grammars: Grammars,
    formats: Formats,
    /// Bytes of the longest token: no text has fewer tokens than its bytes over this.
    longest_token_bytes: usize,
    fleet: Fleet,
    config: Config,
    catalog: Arc<Catalog>,
    /// Held while a name is written or read again: memory changes in the order of the store. Over that one query and
    /// nothing that waits for anybody else.
    changes: tokio::sync::Mutex<()>,
    signals: Signals,
    counter: Counter,
    /// From a call to the commands it became.
    admission: Histogram,
    tinker: tinker::Tinker,
    /// Bytes of uploads on their way.
    incoming: Arc<Shares>,
    /// Bytes of lines of batches that are asked.
    lines: Arc<Shares>,
    stopping: AtomicBool,
    tasks: Mutex<Option<Tasks>>,
    down: Down,
    /// Tasks that are to panic at their next turn.
    #[cfg(test)]
    to_panic: Mutex<Vec<&'static str>>,
}

const SUPERVISOR: &str = "jobs";
const PREPARER: &str = "preparation of jobs";
const HOUSEKEEPING: &str = "housekeeping";
const WATCH: &str = "watch";
const BATCHES: &str = "batches";
const TINKER: &str = "sessions of training clients";

struct Tasks {
    supervisor: JoinHandle<()>,
    preparer: JoinHandle<()>,
    housekeeping: JoinHandle<()>,
    batches: JoinHandle<()>,
    /// Of the disk, of training clients; of a database that others write to, and of parts of the store that are elsewhere.
    watches: Vec<JoinHandle<()>>,
}

/// What the supervisor may take to write down the engine's last words.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

impl Router {
    /// Restores the names, loads `config.lora_modules`, and goes on with the jobs of the last run.
    pub async fn open(
        store: Store,
        tokenizer: Tokenizer,
        fleet: Fleet,
        config: Config,
    ) -> Result<Router, RouterError> {
        // Whoever asks at once hears what is away.
        store.probe().await;
        let names = store.names(fleet.info().base_digest).await?;
        let vocabulary = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let longest_token_bytes = vocabulary
            .map(|id| tokenizer.token_bytes(id).len())
            .max()
            .unwrap_or(1)
            .max(1);
        let catalog = Arc::new(Catalog::new(&config, fleet.info(), names));
        let router = Router(Arc::new(Shared {
            store,
            grammars: Grammars::new(&tokenizer, fleet.info()),
            formats: Formats::new(config.tool_format, config.reasoning_format, &tokenizer),
            texts: Texts::new(tokenizer),
            readers: Turns::new(READERS),
            longest_token_bytes,
            fleet,
            config,
            catalog,
            changes: tokio::sync::Mutex::new(()),
            signals: Signals::new(),
            counter: Counter::new(),
            admission: Histogram::default(),
            tinker: tinker::Tinker::default(),
            incoming: Arc::default(),
            lines: Arc::default(),
            stopping: AtomicBool::new(false),
            tasks: Mutex::new(None),
            down: Down::default(),
            #[cfg(test)]
            to_panic: Mutex::default(),
        }));
        router.restore_flags().await?;
        let tasks = Tasks {
            supervisor: router.task(SUPERVISOR, jobs::supervisor::run),
            preparer: router.task(PREPARER, jobs::prepare::run),
            housekeeping: router.task(HOUSEKEEPING, models::housekeeping),
            batches: router.task(BATCHES, batches::run),
            watches: router.watches(),
        };
        *router.tasks() = Some(tasks);
        Ok(router)
    }

    /// Refuse what comes, stop the fleet (backends elsewhere live on), and wait for the router's own tasks. A running job
    /// stays `running`: the next start goes on from the checkpoint that the engine writes now.
    pub async fn shutdown(&self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.fleet.shutdown().await;
        let tasks = self.tasks().take();
        if let Some(Tasks {
            mut supervisor,
            preparer,
            housekeeping,
            batches,
            watches,
        }) = tasks
        {
            self.0.signals.wake_supervisor();
            if tokio::time::timeout(SHUTDOWN_GRACE, &mut supervisor)
                .await
                .is_err()
            {
                tracing::warn!("the job supervisor did not end in {SHUTDOWN_GRACE:?}");
                supervisor.abort();
            }
            // What these do can be cut anywhere.
            for task in [preparer, housekeeping, batches].into_iter().chain(watches) {
                task.abort();
                let _ = task.await;
            }
        }
    }

    /// End without a word, as a killed process does: nothing is renewed, written or heard any more.
    #[cfg(test)]
    fn abandon(&self) {
        if let Some(Tasks {
            supervisor,
            preparer,
            housekeeping,
            batches,
            watches,
        }) = self.tasks().take()
        {
            for task in [supervisor, preparer, housekeeping, batches]
                .into_iter()
                .chain(watches)
            {
                task.abort();
            }
        }
    }

    pub fn config(&self) -> &Config {
        &self.0.config
    }

    pub fn info(&self) -> &ReplicaInfo {
        self.0.fleet.info()
    }

    pub fn fleet(&self) -> &Fleet {
        &self.0.fleet
    }

    pub fn stats(&self) -> Stats {
        self.0.fleet.stats()
    }

    /// Whether calls are taken: a replica answers and nobody asked to stop.
    pub fn ready(&self) -> bool {
        !self.stopping() && self.0.fleet.is_ready()
    }

    /// Parts of the store that do not answer now: what needs one is refused, everything else goes on.
    pub fn away(&self) -> Vec<Part> {
        self.0.store.away()
    }

    /// Before something large is taken in: an error while the disk is full.
    pub fn check_room(&self) -> Result<(), RouterError> {
        Ok(self.0.store.check_room()?)
    }

    /// A disk that somebody found full.
    pub fn note(&self, error: &RouterError) {
        if let RouterError::Store(error) = error {
            self.0.store.note(error);
        }
    }

    fn watches(&self) -> Vec<JoinHandle<()>> {
        let store = &self.0.store;
        let room = self.task(WATCH, watch::room);
        let others = store.is_shared().then(|| self.task(WATCH, watch::run));
        let parts = store.is_remote().then(|| self.task(WATCH, watch::probe));
        let sessions = self.task(TINKER, tinker::housekeeping);
        [room, sessions].into_iter().chain(others).chain(parts).collect()
    }

    /// Tasks of the router that panicked and are to be begun again.
    pub fn down(&self) -> Vec<&'static str> {
        self.0.down.names()
    }

    fn task<F>(&self, name: &'static str, run: fn(Router) -> F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let router = self.clone();
        self.0.down.supervise(name, move || run(router.clone()))
    }

    /// A fault of a task's own, once, where a test asked for it.
    #[cfg(test)]
    fn panic_if_told(&self, task: &'static str) {
        let mut to_panic = self.0.to_panic.lock().unwrap();
        if let Some(place) = to_panic.iter().position(|told| *told == task) {
            to_panic.remove(place);
            drop(to_panic);
            panic!("a test told {task} to");
        }
    }

    /// Where a job should train now. `None`: none has room.
    pub(crate) fn job_seat(&self) -> Option<JobSeat> {
        self.0.fleet.job_seat()
    }

    /// What calls took from their arrival to their replica's queue, template and tokens included.
    pub fn admissions(&self) -> Counted {
        self.0.admission.counted()
    }

    fn tasks(&self) -> MutexGuard<'_, Option<Tasks>> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.0.stopping.load(Ordering::Acquire)
    }

    /// Tells every replica. One that is gone needs no telling.
    async fn tell_all(&self, command: impl Fn() -> Command) {
        for replica in self.0.fleet.all() {
            let _ = replica.commands.send(command()).await;
        }
    }
}

fn text_error(param: &str, error: TextError) -> RouterError {
    RouterError::invalid(param, error.to_string())
}
