//! Jobs go from this router to replicas, as many as these take, and what a replica says of one goes to the store. The
//! router holds the job's lease meanwhile; a job whose holder or replica went is begun again and goes on from its last
//! state. A job is `running` once a replica says that it trains it.
//! Not here: files (`prepare`), training, what a job says while it is in a replica (`run`), which tenant's it is (`fairness`).

mod fairness;
mod progress;
mod run;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tandem_store::{Asked, JobChange, JobRow, Lease, StoreError};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::Router;
use crate::api::{JobError, Level, RouterError};
use crate::fleet::JobSeat;
use crate::jobs::{MAX_DEATHS, QUEUED, RUNNING, SWEEPING, event, sweep};
use crate::tasks::joined;
use fairness::{FAIR, Held, share_places};
use run::{End, Run};

/// After the store failed: it may be a full disk, which passes. The job goes on from its last state.
const RETRY: Duration = Duration::from_secs(5);
/// After a replica went, or while none has room: another may, or the same one returns.
const REPLICA_RETRY: Duration = Duration::from_millis(500);
/// After every replica that was asked had no room for it.
const REFUSED_RETRY: Duration = Duration::from_secs(2);
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
    let (over, stopped) = watch::channel(());
    let mut underway = Underway::new(router.clone(), stopped);
    let mut looked = Instant::now();
    while !router.stopping() {
        if looked.elapsed() >= FAIR {
            looked = Instant::now();
            if let Err(error) = share_places(&router, &mut underway.held).await {
                trouble(&router, &error);
            }
        }
        let pause = match next(&router, &underway.ids).await {
            Ok(Next::Job(job)) => {
                underway.train(*job);
                continue;
            }
            Ok(Next::Sweep(row, lease)) => {
                underway.look_after(*row, lease);
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
                None => router.wait_for(&router.0.signals.queued).await,
            }
        };
        tokio::select! {
            Some(done) = underway.tasks.join_next() => match joined(done) {
                Some((id, attempts)) => underway.ended(id, attempts),
                None => return,
            },
            () = woken => {}
        }
    }
    drop(over);
    // Each writes what its replica says last.
    while underway.tasks.join_next().await.is_some() {}
}

/// What this router works on, each in a task of its own, as in `prepare`.
struct Underway {
    router: Router,
    tasks: JoinSet<(String, Option<Attempts>)>,
    /// Of the jobs and sweeps of `tasks`.
    ids: Vec<String>,
    /// The jobs of `tasks`.
    held: HashMap<String, Held>,
    /// Of jobs that may be claimed again.
    attempts: HashMap<String, Attempts>,
    /// Closes when the router stops.
    stopped: watch::Receiver<()>,
}

/// What is remembered of a job between its lives.
#[derive(Default)]
struct Attempts {
    /// How often in a row it lost its replica before it made a step.
    stumbles: u32,
    /// Whether it was said why it waits for a replica.
    is_told: bool,
}

impl Underway {
    fn new(router: Router, stopped: watch::Receiver<()>) -> Underway {
        Underway {
            router,
            tasks: JoinSet::new(),
            ids: vec![],
            held: HashMap::new(),
            attempts: HashMap::new(),
            stopped,
        }
    }

    fn train(&mut self, job: Claimed) {
        let id = job.row.id.clone();
        let attempts = self.attempts.remove(&id).unwrap_or_default();
        let (held, to_give_up) = Held::new(job.row.tenant.clone());
        self.ids.push(id.clone());
        self.held.insert(id, held);
        let life = one(
            self.router.clone(),
            job,
            to_give_up,
            attempts,
            self.stopped.clone(),
        );
        self.tasks.spawn(life);
    }

    fn look_after(&mut self, row: JobRow, lease: Lease) {
        self.ids.push(row.id.clone());
        let life = sweep(self.router.clone(), row, lease, self.stopped.clone());
        self.tasks.spawn(life);
    }

    /// It may be claimed again.
    fn ended(&mut self, id: String, attempts: Option<Attempts>) {
        self.ids.retain(|other| *other != id);
        self.held.remove(&id);
        self.attempts.extend(attempts.map(|attempts| (id, attempts)));
    }
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
    if !changed && row.deaths >= MAX_DEATHS {
        rest(router, row, lease).await?;
        return Ok(Next::NoJob);
    }
    Ok(match changed {
        true => Next::Changed,
        false => Next::Job(Box::new(Claimed { row, lease, seat })),
    })
}

/// Pauses a job that may be why the server ends each time.
async fn rest(router: &Router, row: JobRow, lease: Lease) -> Result<(), RouterError> {
    let message = format!(
        "The job is paused: {} times in a row the server ended while it was trained, and it came no further. It may need more \
         memory than there is; resume it when that is mended",
        row.deaths
    );
    tracing::error!(job = row.id, "{message}");
    let told = JobChange {
        from: HERE,
        holder: Some(lease),
        events: vec![event(Level::Warn, message)],
        ..JobChange::default()
    };
    router.change_job(&row.id, told).await?;
    router.let_rest(row.parent.as_deref().unwrap_or(&row.id)).await?;
    if !router.pause_at_once(&row.id, HERE, Some(lease)).await? {
        router.0.store.release_lease(&row.id, lease).await?;
    }
    Ok(())
}

/// A life of a job. Its id, when it may be claimed again; what is to be remembered of it.
async fn one(
    router: Router,
    job: Claimed,
    to_give_up: watch::Receiver<bool>,
    mut attempts: Attempts,
    mut stopped: watch::Receiver<()>,
) -> (String, Option<Attempts>) {
    let id = job.row.id.clone();
    let pause = match train(&router, job, to_give_up, &mut attempts).await {
        Ok(None) => return (id, None),
        Ok(Some(pause)) => pause,
        Err(error) => trouble(&router, &error),
    };
    // Others have their turn meanwhile.
    let _ = tokio::time::timeout(pause, stopped.changed()).await;
    (id, Some(attempts))
}

async fn sweep(
    router: Router,
    row: JobRow,
    lease: Lease,
    mut stopped: watch::Receiver<()>,
) -> (String, Option<Attempts>) {
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
    attempts: &mut Attempts,
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
            if !std::mem::replace(&mut attempts.is_told, true) {
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
                attempts.stumbles = 0;
            }
            attempts.stumbles += 1;
            if attempts.stumbles >= MAX_STUMBLES {
                let message = format!("The engine ended the job {MAX_STUMBLES} times without saying why.");
                router.fail_job(&id, lease, JobError::of_server(message)).await?;
                return Ok(None);
            }
            Ok(Some(REPLICA_RETRY))
        }
    }
}
