//! Sweeps, with the test as the engine.

use serde_json::json;
use tandem_core::job::{JobEvent, JobSpec};
use tandem_core::settings::{Asked, read_asked};

use super::jobs::{create_job, pauses, request, started, step, wait};
use super::*;
use crate::api::{AdapterSource, JobRequest, JobStatus, ModelKind, TrialStatus};

fn sweep(file: &str, settings: Value) -> JobRequest {
    let Value::Object(settings) = settings else {
        panic!("settings are an object")
    };
    let Asked { settings, trials } = read_asked([("", settings)], false).unwrap();
    JobRequest {
        settings,
        trials,
        ..request(file)
    }
}

async fn create_sweep(router: &Router, settings: Value) -> String {
    let file = upload(router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    create_job(router, sweep(&file, settings)).await
}

/// Which trial it is: files of several are read at a time, and who is through first begins.
fn number(spec: &JobSpec) -> usize {
    (spec.hyper.learning_rate * 1e4).round() as usize
}

/// One place for three trials: who is at the rung makes room for the next; who fails loses; the better of the others wins.
#[tokio::test]
async fn trials_make_room_for_each_other_at_a_rung_and_one_may_fail() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let settings = json!({"learning_rate": [1e-4, 2e-4, 3e-4], "seed": 3, "max_steps": 4});
    let id = create_sweep(&router, settings).await;
    assert_eq!(router.own().job(&id).await.unwrap().status, JobStatus::Sweeping);

    let (first, events) = engine.started().await;
    assert_eq!(first.hyper.seed, 3);
    for event in [started(None), step(1, 3.0), step(2, 2.0)] {
        events.send(event).await.unwrap();
    }
    pauses(&mut engine, &first, &events, 2).await;
    drop(events);
    let (second, events) = engine.started().await;
    events.send(started(None)).await.unwrap();
    let message = "it diverged".to_owned();
    events.send(JobEvent::Failed { message }).await.unwrap();
    let (third, events) = engine.started().await;
    for event in [
        started(None),
        step(1, 3.0),
        step(2, 2.5),
        step(3, 2.0),
        step(4, 1.0),
    ] {
        events.send(event).await.unwrap();
    }
    let adapter = house.trained(&third, "adapter", "third");
    let best = adapter.digest;
    let finished = |adapter, trained_tokens| JobEvent::Finished {
        adapter,
        trained_tokens,
    };
    events.send(finished(adapter, 40)).await.unwrap();
    // Of three, two go on at the half.
    let (again, events) = engine.started().await;
    assert_eq!(again.id, first.id);
    for event in [started(Some(2)), step(3, 2.0), step(4, 1.5)] {
        events.send(event).await.unwrap();
    }
    let adapter = house.trained(&again, "adapter", "first");
    events.send(finished(adapter, 40)).await.unwrap();

    let job = wait(&router, &id, |job| job.status.ended()).await;
    assert_eq!(job.status, JobStatus::Succeeded, "{:?}", job.error);
    let became: Vec<_> = job
        .trials
        .iter()
        .map(|trial| (trial.status, trial.rung, trial.value))
        .collect();
    let mut expected = [(TrialStatus::Failed, 0, None); 3];
    expected[number(&first) - 1] = (TrialStatus::Succeeded, 1, Some(1.5));
    expected[number(&third) - 1] = (TrialStatus::Succeeded, 1, Some(1.0));
    assert_eq!(became, expected);
    let name = job.fine_tuned_model.unwrap();
    let (best_trial, failed) = (number(&third), number(&second));
    assert_eq!(
        job.trials[best_trial - 1].model,
        Some(format!("{name}:trial-{best_trial}"))
    );
    assert_eq!(
        (job.hyper.unwrap().learning_rate, job.trained_tokens),
        (third.hyper.learning_rate, Some(80))
    );
    let ModelKind::Adapter { digest, source, .. } = router.own().model(&name).unwrap().kind else {
        panic!("{name} is an adapter")
    };
    assert_eq!(
        (digest, source),
        (
            best,
            AdapterSource::Job {
                job: id.clone(),
                step: None
            }
        )
    );
    let said = router.own().job_events(&id, None, 100).await.unwrap().data;
    let rung = said
        .iter()
        .find(|event| event.message.starts_with("Rung 1/1"))
        .unwrap();
    let places = json!([
        {"trial": number(&first), "job": first.id.as_str(), "value": 2.0, "goes_on": true},
        {"trial": best_trial, "job": third.id.as_str(), "value": 2.5, "goes_on": true},
    ]);
    assert_eq!(rung.data["trials"], places, "{}", rung.message);
    let failed = format!("Trial {failed} of 3 (learning_rate 0.000{failed}) failed after step 0");
    assert!(said.iter().any(|event| event.message == failed), "{failed}");
}

/// The winner is chosen once its losers are gone, and a sweep without one fails as its trials did.
#[tokio::test]
async fn a_sweep_fails_only_with_all_of_its_trials() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let settings = json!({"learning_rate": [1e-4, 2e-4], "reduction_factor": 1});
    let id = create_sweep(&router, settings).await;
    for _ in 0..2 {
        let (_, events) = engine.started().await;
        events.send(started(None)).await.unwrap();
        let message = "it diverged".to_owned();
        events.send(JobEvent::Failed { message }).await.unwrap();
    }
    let job = wait(&router, &id, |job| job.status.ended()).await;
    assert_eq!(job.status, JobStatus::Failed);
    let error = job.error.unwrap();
    assert_eq!(error.message, "None of 2 trials came to a good end. it diverged");
    assert!(job.trials.iter().all(|trial| trial.status == TrialStatus::Failed));
}
