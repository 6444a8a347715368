//! A sweep is a job whose trials are jobs like any other, which train together as jobs do, rest and go on, and change hands. Who
//! holds a sweep's lease looks after it: compares its trials at the rungs (`core::job::sweep`), lets losers rest, and gives the
//! winner's adapter the sweep's name. What is done next is read off the rows each time, so nothing is lost with a holder.

mod followed;
mod report;
mod trials;

use std::time::Duration;

use tandem_core::job::Hyper;
use tandem_core::job::sweep::{Call, Course, Sweep};
use tandem_store::{Asked, JobChange, JobRow, Lease};
use tokio::sync::watch;

use crate::Router;
use crate::api::{JobError, JobRequest, Level, RouterError, TrialRecord};
use crate::jobs::keeper::Keeper;
use crate::jobs::{Made, PAUSED, QUEUED, SWEEPING, VALIDATING, event, record, result};
use followed::Followed;
pub(super) use trials::{at_first, begins, trials};

/// Between two looks: what many jobs say in a moment is read once.
const PAUSE: Duration = Duration::from_millis(50);
/// Of a trial that nobody trains now.
const RESTING: &[&str] = &[VALIDATING, QUEUED, PAUSED];

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
    let (mut changed, mut asked) = (router.0.signals.watch(), router.0.signals.watch_asked());
    let mut watched = Watched {
        router,
        id: &row.id,
        model: &row.model_name,
        lease,
        followed: vec![Followed::default(); request.trials.len()],
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
    followed: Vec<Followed>,
}

impl Watched<'_> {
    async fn look(&mut self) -> Result<Look, RouterError> {
        let store = &self.router.0.store;
        let Some(row) = store.job(self.id).await? else {
            return Ok(Look::Over);
        };
        // Before their events: those of an end are there when its status is.
        let trials = store.trials(self.id).await?;
        for (followed, trial) in self.followed.iter_mut().zip(&trials) {
            followed.read(self.router, trial, &self.sweep).await?;
        }
        let courses: Vec<Course> = self
            .followed
            .iter()
            .map(|followed| followed.course.clone())
            .collect();
        let decision = self.sweep.decide(&courses);
        let before: Vec<TrialRecord> = record::job(row.clone())?.trials;
        let records = report::records(&self.followed, &trials, &before, &decision)?;
        let news = report::news(&self.sweep, &before, &records, &decision);
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
            let step = self.followed[number - 1].course.step();
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
        self.router.0.signals.wake_keepers();
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
            return self.fail(JobError::of_server(message)).await;
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
        None => JobError::of_server(format!("All {n} trials were cancelled.")),
    })
}
