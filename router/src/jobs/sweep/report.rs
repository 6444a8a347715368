//! What a sweep says of its trials: a record of each, and events where something changed.

use serde_json::{Value, json};
use tandem_core::job::sweep::{Call, Decision, Rung, Sweep};
use tandem_store::{JobRow, NewEvent};

use super::followed::Followed;
use super::trials::shown;
use crate::api::{JobRequest, JobStatus, Level, RouterError, TrialRecord, TrialStatus};
use crate::jobs::{metrics, record};

pub(super) fn records(
    followed: &[Followed],
    trials: &[JobRow],
    before: &[TrialRecord],
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
                JobStatus::ValidatingFiles | JobStatus::Queued | JobStatus::Sweeping | JobStatus::Paused => {
                    TrialStatus::Queued
                }
            },
            rung: decision
                .rungs
                .iter()
                .filter(is_ranked)
                .map(|rung| rung.number)
                .max()
                .unwrap_or(0),
            step: followed[i].course.step(),
            total_steps: followed[i].course.total_steps,
            value: decision.values[i].filter(|value| value.is_finite()),
            train_loss: followed[i].train_loss,
            valid_loss: followed[i].valid_loss,
            model: trial.fine_tuned_model.clone(),
        })
    };
    trials.iter().enumerate().map(record).collect()
}

/// What the sweep's events say of a change.
pub(super) fn news(
    sweep: &Sweep,
    before: &[TrialRecord],
    now: &[TrialRecord],
    decision: &Decision,
) -> Vec<NewEvent> {
    let mut news = vec![];
    let of = now.len();
    let told = before.iter().map(|trial| trial.rung).max().unwrap_or(0);
    for rung in decision.rungs.iter().filter(|rung| rung.number > told) {
        news.push(of_rung(sweep, rung, now));
    }
    for (i, trial) in now.iter().enumerate() {
        let was = before.get(i).map(|before| before.status);
        if was == Some(trial.status) {
            continue;
        }
        let of_which = format!("Trial {} of {of} ({})", trial.number, shown(&trial.varied));
        let value = trial.value.map_or_else(String::new, |value| {
            format!(" with a {} of {value:.4}", sweep.shown_metric())
        });
        let step = trial.step;
        let (level, message) = match trial.status {
            TrialStatus::Queued => continue,
            TrialStatus::Running => (Level::Info, format!("{of_which} is training: {}", trial.job)),
            TrialStatus::Stopped => (Level::Info, format!("{of_which} is stopped after step {step}")),
            TrialStatus::Succeeded => (Level::Info, format!("{of_which} came to its end{value}")),
            TrialStatus::Failed => (Level::Warn, format!("{of_which} failed after step {step}")),
            TrialStatus::Cancelled => (Level::Info, format!("{of_which} was cancelled after step {step}")),
        };
        let data = json!({"trial": trial.number, "job": trial.job});
        news.push(metrics(level, message, data));
    }
    news
}

fn of_rung(sweep: &Sweep, rung: &Rung, trials: &[TrialRecord]) -> NewEvent {
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
    let (number, rungs, kept) = (rung.number, sweep.rungs(), rung.kept);
    metrics(
        Level::Info,
        format!(
            "Rung {number}/{rungs}, {:.0} % of the run: {kept} of {} trials go on, by their {}: {}",
            100.0 * rung.part,
            rung.ranking.len(),
            sweep.shown_metric(),
            values.join(", ")
        ),
        json!({"rung": number, "metric": sweep.metric, "trials": ranking}),
    )
}
