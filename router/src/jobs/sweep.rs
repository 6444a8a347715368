//! A sweep is a job whose trials are jobs like any other, which train together as jobs do, rest and go on, and change hands. Who
//! holds a sweep's lease looks after it: compares its trials at the rungs (`core::job::sweep`), lets losers rest, and gives the
//! winner's adapter the sweep's name. What is done next is read off the rows each time, so nothing is lost with a holder.

use std::time::Duration;

use serde_json::{Map, Value, json};
use tandem_core::job::Hyper;
use tandem_core::job::sweep::{Call, Course, Decision, End, Rung, Sweep};
use tandem_core::replica::ReplicaInfo;
use tandem_store::{Asked, JobChange, JobRow, Lease, NewEvent, NewJob, ids};
use tokio::sync::watch;

use crate::Router;
use crate::api::{
    Client, JobError, JobRequest, JobStatus, Level, Place, RouterError, TrialRecord, TrialStatus,
};
use crate::jobs::keeper::Keeper;
use crate::jobs::{Made, PAUSED, QUEUED, SWEEPING, VALIDATING, event, hyper, metrics, record, result};

/// Between two looks: what many jobs say in a moment is read once.
const PAUSE: Duration = Duration::from_millis(50);
const PAGE: u32 = 1000;
/// Of a trial that nobody trains now.
const RESTING: &[&str] = &[VALIDATING, QUEUED, PAUSED];

/// The jobs that a sweep's trials are.
pub(super) fn trials(request: &JobRequest, sweep: &str, info: &ReplicaInfo, client: &Client) -> Vec<NewJob> {
    let of = request.trials.len();
    let trial = |(number, trial): (usize, &tandem_core::settings::Trial)| {
        let of_trial = JobRequest {
            settings: trial.settings.clone(),
            trials: vec![],
            place: Some(Place {
                number,
                of,
                varied: trial.varied.clone(),
            }),
            ..request.clone()
        };
        let message = format!(
            "Created trial {number} of {of} of {sweep}: {}",
            shown(&trial.varied)
        );
        NewJob {
            id: ids::job(),
            base: info.base_digest,
            tenant: client.tenant.clone(),
            key_id: client.quota_key().map(str::to_owned),
            kept_bytes: hyper::kept_bytes(&trial.settings, info),
            status: VALIDATING.to_owned(),
            request: record::to_json(&of_trial),
            metadata: request.metadata.clone(),
            model_names: vec![format!(":trial-{number}")],
            events: vec![event(Level::Info, message)],
        }
    };
    (1..).zip(&request.trials).map(trial).collect()
}

/// What is known of the trials before anybody looked after them.
pub(super) fn at_first(request: &JobRequest, trials: &[NewJob]) -> Vec<TrialRecord> {
    let record = |(number, (asked, job)): (usize, (&tandem_core::settings::Trial, &NewJob))| TrialRecord {
        number,
        job: job.id.clone(),
        varied: asked.varied.clone(),
        status: TrialStatus::Queued,
        rung: 0,
        step: 0,
        total_steps: None,
        value: None,
        train_loss: None,
        valid_loss: None,
        model: None,
    };
    (1..).zip(request.trials.iter().zip(trials)).map(record).collect()
}

/// What a sweep's first event says of it.
pub(super) fn begins(request: &JobRequest) -> String {
    let of = request.trials.len();
    let sweep = request.sweep().expect("it has trials");
    let halving = match sweep.rungs() {
        0 => "all train to their ends".to_owned(),
        rungs => format!("at {rungs} rungs 1 of {} goes on", sweep.factor),
    };
    format!(
        "A sweep of {of} trials, compared by their {}: {halving}",
        sweep.shown_metric()
    )
}

/// `learning_rate 0.0001, lora_r 8`
fn shown(varied: &Map<String, Value>) -> String {
    let pairs: Vec<String> = varied
        .iter()
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    pairs.join(", ")
}

/// Looks after a sweep as long as the lease is held and it is not over.
pub(super) async fn look_after(
    router: &Router,
    row: &JobRow,
    lease: Lease,
    stopped: &mut watch::Receiver<()>,
) -> Result<(), RouterError> {
    let request: JobRequest = record::from_json(&row.request)?;
    let sweep = request.sweep().ok_or_else(|| {
        RouterError::Store(tandem_store::StoreError::Damaged(format!(
            "{} has no trials",
            row.id
        )))
    })?;
    let mut keeper = Keeper::new(router, &row.id, lease, None);
    let (mut changed, mut asked) = (router.0.desk.changed.subscribe(), router.0.desk.asked.subscribe());
    let mut watched = Watched {
        router,
        id: &row.id,
        model: &row.model_name,
        lease,
        courses: vec![Followed::default(); request.trials.len()],
        sweep,
    };
    loop {
        changed.mark_unchanged();
        asked.mark_unchanged();
        if watched.look().await? == Look::Over {
            return Ok(());
        }
        tokio::select! {
            () = keeper.lost() => return Ok(()),
            _ = stopped.changed() => return Ok(router.0.store.release_lease(&row.id, lease).await?),
            _ = changed.changed() => {}
            _ = asked.changed() => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[derive(PartialEq, Eq)]
enum Look {
    GoesOn,
    Over,
}

struct Watched<'a> {
    router: &'a Router,
    id: &'a str,
    model: &'a str,
    lease: Lease,
    sweep: Sweep,
    courses: Vec<Followed>,
}

/// A trial's course, as far as its events were read.
#[derive(Clone, Default)]
struct Followed {
    course: Course,
    train_loss: Option<f64>,
    valid_loss: Option<f64>,
    seq: i64,
}

impl Watched<'_> {
    async fn look(&mut self) -> Result<Look, RouterError> {
        let store = &self.router.0.store;
        let Some(row) = store.job(self.id).await? else {
            return Ok(Look::Over);
        };
        // Before their events: those of an end are there when its status is.
        let trials = store.trials(self.id).await?;
        for (followed, trial) in self.courses.iter_mut().zip(&trials) {
            followed.read(self.router, trial, &self.sweep).await?;
        }
        let courses: Vec<Course> = self
            .courses
            .iter()
            .map(|followed| followed.course.clone())
            .collect();
        let decision = self.sweep.decide(&courses);
        let before: Vec<TrialRecord> = record::job(row.clone())?.trials;
        let records = self.records(&trials, &before, &courses, &decision)?;
        let news = self.news(&before, &records, &decision);
        if !news.is_empty() || before.is_empty() {
            let change = JobChange {
                trials: Some(record::to_json(&records)),
                events: news,
                ..self.change()
            };
            if !self.router.change_job(self.id, change).await? {
                return Ok(Look::Over);
            }
        }
        match (row.asked, decision.winner) {
            (Asked::Cancel, _) => self.cancel(&trials).await,
            (Asked::Nothing | Asked::Pause, Some(winner)) => self.conclude(&trials, winner).await,
            (Asked::Pause, None) => self.pause(&trials).await,
            (Asked::Nothing, None) => self.obey(&trials, &decision.calls).await,
        }
    }

    fn change(&self) -> JobChange {
        JobChange {
            from: &[SWEEPING],
            holder: Some(self.lease),
            ..JobChange::default()
        }
    }

    /// Lets each trial train or rest, as was decided.
    async fn obey(&self, trials: &[JobRow], calls: &[Call]) -> Result<Look, RouterError> {
        let waits_for_room = |(trial, call): (&JobRow, &Call)| {
            *call == Call::GoesOn && [VALIDATING, QUEUED].contains(&trial.status.as_str())
        };
        let is_crowded = trials.iter().zip(calls).any(waits_for_room);
        for (trial, call) in trials.iter().zip(calls) {
            let is_resting = trial.status == PAUSED || trial.asked == Asked::Pause;
            match call {
                Call::GoesOn if is_resting => drop(self.router.let_go_on(&trial.id).await?),
                Call::Lost if !is_resting => drop(self.router.let_rest(&trial.id).await?),
                // It makes room for those that it waits for.
                Call::Waits if !is_resting && is_crowded => drop(self.router.let_rest(&trial.id).await?),
                Call::GoesOn | Call::Lost | Call::Waits | Call::Over => {}
            }
        }
        Ok(Look::GoesOn)
    }

    async fn pause(&self, trials: &[JobRow]) -> Result<Look, RouterError> {
        let mut all_rest = true;
        for trial in trials.iter().filter(|trial| trial.finished_at.is_none()) {
            all_rest &= trial.status == PAUSED;
            if trial.asked != Asked::Pause {
                self.router.let_rest(&trial.id).await?;
            }
        }
        let rests = all_rest
            && self
                .router
                .pause_at_once(self.id, &[SWEEPING], Some(self.lease))
                .await?;
        Ok(if rests { Look::Over } else { Look::GoesOn })
    }

    /// Ends what has not ended. Whether there was nothing to end: what became of the trials is told first.
    async fn end(&self, trials: &[JobRow]) -> Result<bool, RouterError> {
        let mut is_over = true;
        for (number, trial) in (1..).zip(trials).filter(|(_, trial)| trial.finished_at.is_none()) {
            is_over = false;
            if trial.asked != Asked::Cancel {
                self.router.0.store.ask(&trial.id, Asked::Cancel).await?;
            }
            let step = self.courses[number - 1].course.step();
            let over = JobChange {
                from: RESTING,
                status: Some("cancelled"),
                ends: true,
                events: vec![event(
                    Level::Info,
                    format!(
                        "Trial {number} was stopped after step {step} by its sweep {}.",
                        self.id
                    ),
                )],
                ..JobChange::default()
            };
            if self.router.change_job(&trial.id, over).await? {
                self.router.0.store.remove_job_folder(&trial.id).await?;
            }
        }
        self.router.0.desk.wake_keepers();
        Ok(is_over)
    }

    async fn cancel(&self, trials: &[JobRow]) -> Result<Look, RouterError> {
        if !self.end(trials).await? {
            return Ok(Look::GoesOn);
        }
        self.router
            .cancel_at_once(self.id, &[SWEEPING], Some(self.lease))
            .await?;
        Ok(Look::Over)
    }

    /// The winner's adapter gets the sweep's name.
    async fn conclude(&self, trials: &[JobRow], winner: Option<usize>) -> Result<Look, RouterError> {
        if !self.end(trials).await? {
            return Ok(Look::GoesOn);
        }
        let Some(winner) = winner else {
            let error = no_winner(trials)?;
            return self.fail(error).await;
        };
        let (number, trial) = (winner + 1, &trials[winner]);
        let result_files = result::publish(self.router, &trial.id).await?;
        let _one_at_a_time = self.router.0.changes.lock().await;
        let name = trial.fine_tuned_model.as_ref();
        let Some(made) = name.and_then(|name| self.router.0.catalog.row(name)) else {
            result::discard(self.router, &result_files).await?;
            let message = format!(
                "The model of trial {number}, which is the best, was deleted before the sweep ended."
            );
            return self.fail(server_error(message)).await;
        };
        let made = Made {
            digest: made.digest,
            rank: made.rank,
        };
        let name = self.router.job_name(self.id, self.model.to_owned(), None, made);
        let hyper: Option<Hyper> = trial.hyper.as_deref().map(record::from_json).transpose()?;
        let change = JobChange {
            status: Some("succeeded"),
            ends: true,
            hyper: hyper.as_ref().map(record::to_json),
            trained_tokens: Some(trials.iter().filter_map(|trial| trial.trained_tokens).sum()),
            fine_tuned_model: Some(self.model.to_owned()),
            events: vec![
                event(
                    Level::Info,
                    format!(
                        "New fine-tuned model created: {}, that of trial {number}",
                        self.model
                    ),
                ),
                event(Level::Info, "Fine tuning job successfully completed".to_owned()),
            ],
            name: Some(name),
            result_files: result_files.clone(),
            ..self.change()
        };
        if !self.router.change_job(self.id, change).await? {
            result::discard(self.router, &result_files).await?;
        }
        Ok(Look::Over)
    }

    async fn fail(&self, error: JobError) -> Result<Look, RouterError> {
        let failed = JobChange {
            status: Some("failed"),
            ends: true,
            events: vec![event(Level::Error, error.message.clone())],
            error: Some(record::to_json(&error)),
            ..self.change()
        };
        self.router.change_job(self.id, failed).await?;
        Ok(Look::Over)
    }

    fn records(
        &self,
        trials: &[JobRow],
        before: &[TrialRecord],
        courses: &[Course],
        decision: &Decision,
    ) -> Result<Vec<TrialRecord>, RouterError> {
        let record = |(i, trial): (usize, &JobRow)| {
            let is_ranked = |rung: &&Rung| rung.ranking.iter().any(|(ranked, _)| *ranked == i);
            let had_stopped = || {
                before
                    .get(i)
                    .is_some_and(|before| before.status == TrialStatus::Stopped)
            };
            let request: JobRequest = record::from_json(&trial.request)?;
            Ok(TrialRecord {
                number: i + 1,
                job: trial.id.clone(),
                varied: request.place.map(|place| place.varied).unwrap_or_default(),
                status: match record::job(trial.clone())?.status {
                    JobStatus::Succeeded => TrialStatus::Succeeded,
                    JobStatus::Failed => TrialStatus::Failed,
                    JobStatus::Cancelled if had_stopped() => TrialStatus::Stopped,
                    JobStatus::Cancelled => TrialStatus::Cancelled,
                    _ if decision.calls[i] == Call::Lost => TrialStatus::Stopped,
                    JobStatus::Running => TrialStatus::Running,
                    JobStatus::ValidatingFiles
                    | JobStatus::Queued
                    | JobStatus::Sweeping
                    | JobStatus::Paused => TrialStatus::Queued,
                },
                rung: decision
                    .rungs
                    .iter()
                    .filter(is_ranked)
                    .map(|rung| rung.number)
                    .max()
                    .unwrap_or(0),
                step: courses[i].step(),
                total_steps: courses[i].total_steps,
                value: decision.values[i].filter(|value| value.is_finite()),
                train_loss: self.courses[i].train_loss,
                valid_loss: self.courses[i].valid_loss,
                model: trial.fine_tuned_model.clone(),
            })
        };
        trials.iter().enumerate().map(record).collect()
    }

    /// What the sweep's events say of a change.
    fn news(&self, before: &[TrialRecord], now: &[TrialRecord], decision: &Decision) -> Vec<NewEvent> {
        let mut news = vec![];
        let of = now.len();
        let told = before.iter().map(|trial| trial.rung).max().unwrap_or(0);
        for rung in decision.rungs.iter().filter(|rung| rung.number > told) {
            news.push(self.of_rung(rung, now));
        }
        for (i, trial) in now.iter().enumerate() {
            let was = before.get(i).map(|before| before.status);
            if was == Some(trial.status) {
                continue;
            }
            let of_which = format!("Trial {} of {of} ({})", trial.number, shown(&trial.varied));
            let value = trial.value.map_or_else(String::new, |value| {
                format!(" with a {} of {value:.4}", self.sweep.shown_metric())
            });
            let step = trial.step;
            let (level, message) = match trial.status {
                TrialStatus::Queued => continue,
                TrialStatus::Running => (Level::Info, format!("{of_which} is training: {}", trial.job)),
                TrialStatus::Stopped => (Level::Info, format!("{of_which} is stopped after step {step}")),
                TrialStatus::Succeeded => (Level::Info, format!("{of_which} came to its end{value}")),
                TrialStatus::Failed => (Level::Warn, format!("{of_which} failed after step {step}")),
                TrialStatus::Cancelled => {
                    (Level::Info, format!("{of_which} was cancelled after step {step}"))
                }
            };
            let data = json!({"trial": trial.number, "job": trial.job});
            news.push(metrics(level, message, data));
        }
        news
    }

    fn of_rung(&self, rung: &Rung, trials: &[TrialRecord]) -> NewEvent {
        let values: Vec<String> = rung
            .ranking
            .iter()
            .map(|(i, value)| format!("trial {} {value:.4}", i + 1))
            .collect();
        let goes_on = |place: usize| place < rung.kept;
        let ranking: Vec<Value> = (0..)
            .zip(&rung.ranking)
            .map(|(place, (i, value))| {
                json!({"trial": i + 1, "job": trials[*i].job, "value": value, "goes_on": goes_on(place)})
            })
            .collect();
        let (number, rungs, kept) = (rung.number, self.sweep.rungs(), rung.kept);
        metrics(
            Level::Info,
            format!(
                "Rung {number}/{rungs}, {:.0} % of the run: {kept} of {} trials go on, by their {}: {}",
                100.0 * rung.part,
                rung.ranking.len(),
                self.sweep.shown_metric(),
                values.join(", ")
            ),
            json!({"rung": number, "metric": self.sweep.metric, "trials": ranking}),
        )
    }
}

impl Followed {
    async fn read(&mut self, router: &Router, trial: &JobRow, sweep: &Sweep) -> Result<(), RouterError> {
        loop {
            let events = router.0.store.job_events_since(&trial.id, self.seq, PAGE).await?;
            for event in &events {
                self.seq = event.seq;
                self.take(&record::from_json(&event.data)?, &sweep.metric);
            }
            if events.len() < PAGE as usize {
                break;
            }
        }
        self.course.end = match record::job(trial.clone())?.status {
            JobStatus::Succeeded => Some(End::Succeeded),
            status if status.ended() => Some(End::Failed),
            _ => None,
        };
        Ok(())
    }

    /// What an event's data say of the metric.
    fn take(&mut self, data: &Value, metric: &str) {
        if let Some(total) = data["total_steps"].as_u64() {
            self.course.total_steps = Some(total);
        }
        let Some(step) = data["step"].as_u64() else { return };
        // Null is what JSON has for NaN.
        let number = |key: &str| Some(data.get(key)?.as_f64().unwrap_or(f64::NAN));
        let of = |phase: &str| number(&format!("{phase}_{metric}"));
        self.train_loss = data["train_loss"].as_f64().or(self.train_loss);
        self.valid_loss = data["valid_loss"].as_f64().or(self.valid_loss);
        if data.get("train_loss").is_some()
            && let Some(value) = of("train").or_else(|| number(metric))
        {
            self.course.trained(step, value);
        }
        if data.get("valid_loss").is_some()
            && let Some(value) = of("valid")
        {
            self.course.validated(step, value);
        }
    }
}

/// Why a sweep fails: what its trials failed by.
fn no_winner(trials: &[JobRow]) -> Result<JobError, RouterError> {
    let errors = trials.iter().filter_map(|trial| trial.error.as_deref());
    let errors: Vec<JobError> = errors.map(record::from_json).collect::<Result<_, _>>()?;
    let n = trials.len();
    Ok(match errors.into_iter().next() {
        Some(first) => JobError {
            message: format!("None of {n} trials came to a good end. {}", first.message),
            ..first
        },
        None => server_error(format!("All {n} trials were cancelled.")),
    })
}

fn server_error(message: String) -> JobError {
    JobError {
        code: "server_error".to_owned(),
        param: None,
        message,
    }
}
