//! A sweep's trials as they begin: the jobs they are, and what is known of them then.

use serde_json::{Map, Value};
use tandem_core::replica::ReplicaInfo;
use tandem_core::settings::Trial;
use tandem_store::{NewJob, ids};

use crate::api::{Client, JobRequest, Level, Place, TrialRecord, TrialStatus};
use crate::jobs::{VALIDATING, event, hyper, record};

/// The jobs that a sweep's trials are.
pub(in crate::jobs) fn trials(
    request: &JobRequest,
    sweep: &str,
    info: &ReplicaInfo,
    client: &Client,
) -> Vec<NewJob> {
    let of = request.trials.len();
    let trial = |(number, trial): (usize, &Trial)| {
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
pub(in crate::jobs) fn at_first(request: &JobRequest, trials: &[NewJob]) -> Vec<TrialRecord> {
    let record = |(number, (asked, job)): (usize, (&Trial, &NewJob))| TrialRecord {
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
pub(in crate::jobs) fn begins(request: &JobRequest) -> String {
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
pub(super) fn shown(varied: &Map<String, Value>) -> String {
    let pairs: Vec<String> = varied
        .iter()
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    pairs.join(", ")
}
