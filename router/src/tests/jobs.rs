//! Jobs from the request to the served model, with the test as the engine; kills and restarts between.

use std::collections::BTreeMap;

use tandem_core::dataset;
use tandem_core::job::{JobEvent, JobSpec, Method, StepReport, files};
use tandem_core::settings::Settings;
use tandem_store::{Limits, NewKey, Placement, Role, StoreError, Tenant};

use super::calls::call;
use super::*;
use crate::api::{
    AdapterSource, Call, Client, Job, JobRequest, JobStatus, MetadataFilter, Meter, ModelKind, RouterError,
};
use crate::jobs::MAX_DEATHS;

pub(super) fn request(training_file: &str) -> JobRequest {
    JobRequest {
        model: BASE.to_owned(),
        training_file: training_file.into(),
        ..JobRequest::default()
    }
}

/// The id of a new job.
pub(super) async fn create_job(router: &Router, request: JobRequest) -> String {
    router.own().create_job(request).await.unwrap().id.to_string()
}

pub(super) fn step(step: u64, loss: f64) -> JobEvent {
    JobEvent::Step(StepReport {
        step,
        epoch: 1.0,
        loss,
        token_accuracy: 0.5,
        metrics: BTreeMap::new(),
        grad_norm: 1.0,
        learning_rate: 1e-4,
        trained_tokens: 10 * step,
        tokens_per_second: 100.0,
    })
}

pub(super) fn started(resumed_from: Option<u64>) -> JobEvent {
    JobEvent::Started {
        total_steps: 4,
        resumed_from,
        notes: vec![],
        examples: 4,
        epoch_tokens: 40,
        epoch_label_tokens: 20,
        trainable_parameters: 1000,
    }
}

impl Engine {
    pub(super) async fn started(&mut self) -> (JobSpec, mpsc::Sender<JobEvent>) {
        loop {
            match self.next().await {
                Command::StartJob(spec, events) => return (*spec, events),
                // What is asked is told again until it is done.
                Command::PauseJob(_) => {}
                _ => panic!("a StartJob was expected"),
            }
        }
    }
}

impl House {
    /// An adapter in the job's folder, as the engine leaves it.
    pub(super) fn trained(&self, spec: &JobSpec, name: &str, tensors: &str) -> AdapterRef {
        let folder = spec.folder.join(name);
        std::fs::rename(self.adapter("trained", tensors), &folder).unwrap();
        let mut hasher = tandem_core::id::AdapterHasher::new(2, tensors.len() as u64);
        hasher.update(b"{}");
        hasher.update(tensors.as_bytes());
        AdapterRef {
            digest: hasher.finish(),
            folder,
        }
    }
}

pub(super) async fn wait(router: &Router, id: &str, wanted: impl Fn(&Job) -> bool) -> Job {
    let waited = async {
        let mut changed = router.0.signals.watch();
        loop {
            let job = router.own().job(id).await.unwrap();
            if wanted(&job) {
                return job;
            }
            changed.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, waited)
        .await
        .expect("the job gets there soon")
}

#[tokio::test]
async fn a_job_becomes_a_model_that_answers() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let asked = JobRequest {
        suffix: Some("pet".to_owned()),
        validation_file: Some(file.as_str().into()),
        ..request(&file)
    };
    let created = std::time::Instant::now();
    let job = router.own().create_job(asked).await.unwrap();
    assert_eq!(job.status, JobStatus::ValidatingFiles);
    let id = job.id.to_string();
    let mut followed = router.own().follow_job(&id).await.unwrap();

    let (spec, events) = engine.started().await;
    println!("from the request to StartJob: {:?}", created.elapsed());
    let examples = dataset::decode(&std::fs::read(spec.folder.join(files::TRAIN)).unwrap()).unwrap();
    assert_eq!(examples.len(), 4);
    assert_eq!(
        examples[0].examples[0].tokens[..5],
        [vec![BOS], ids("u:hi")].concat()[..5]
    );
    assert!(spec.folder.join(files::VALID).exists());
    let Method::Lora(lora) = &spec.hyper.method else {
        panic!("a served base is never changed")
    };
    assert_eq!((lora.r, lora.target_modules.len()), (16, 2));
    assert_eq!(
        router.own().job(&id).await.unwrap().hyper,
        Some(spec.hyper.clone())
    );

    let checkpoint = house.trained(&spec, "checkpoint-2", "two");
    let adapter = house.trained(&spec, "adapter", "four");
    let validated = JobEvent::Validated {
        step: 2,
        loss: 2.5,
        token_accuracy: 0.25,
        metrics: BTreeMap::new(),
    };
    let said = [
        started(None),
        step(1, 3.0),
        step(2, 2.0),
        validated,
        JobEvent::Checkpoint {
            step: 2,
            adapter: checkpoint.clone(),
            best: None,
        },
        step(3, 1.5),
        step(4, 1.0),
    ];
    for event in said {
        events.send(event).await.unwrap();
    }
    let job = wait(&router, &id, |job| job.trained_tokens == Some(40)).await;
    assert_eq!((job.status, job.fine_tuned_model), (JobStatus::Running, None));
    let short = &id["ftjob-".len()..]["".len()..8];
    let name = format!("ft:{BASE}:tandem:pet:{short}");
    // A checkpoint answers while its job still runs.
    let model = format!("{name}@step-2");
    let _generation = router.generate(Call { model, ..call("x") }).await.unwrap();
    assert_eq!(
        engine.generate().await.0.adapter.unwrap().digest,
        checkpoint.digest
    );

    events
        .send(JobEvent::Finished {
            adapter: adapter.clone(),
            trained_tokens: 40,
        })
        .await
        .unwrap();
    let job = wait(&router, &id, |job| job.status.ended()).await;
    assert_eq!(
        (job.status, job.fine_tuned_model.as_deref()),
        (JobStatus::Succeeded, Some(name.as_str()))
    );
    assert!(job.finished_at.is_some() && job.error.is_none());
    let ModelKind::Adapter {
        digest,
        source,
        rank: 16,
        ..
    } = router.own().model(&name).unwrap().kind
    else {
        panic!()
    };
    assert_eq!(
        (digest, source),
        (
            adapter.digest,
            AdapterSource::Job {
                job: job.id.to_string(),
                step: None
            }
        )
    );
    let (info, csv) = content(&router, &job.result_files[0]).await.unwrap();
    assert_eq!(
        (info.filename.as_str(), info.purpose.as_str()),
        ("step_metrics.csv", "fine-tune-results")
    );
    assert!(
        csv.lines().nth(2).unwrap().starts_with("2,2.0,0.5,2.5,0.25,1.0,"),
        "{csv}"
    );
    assert_eq!(csv.lines().count(), 5);

    let mut messages = Vec::new();
    while let Some(event) = tokio::time::timeout(PATIENCE, followed.recv())
        .await
        .expect("it ends with the job")
    {
        messages.push(event.message);
    }
    assert_eq!(messages[0], format!("Created fine-tuning job: {id}"));
    assert!(
        messages.contains(&"Step 3/4: training loss=1.50".to_owned()),
        "{messages:?}"
    );
    assert_eq!(
        messages[messages.len() - 2],
        format!("New fine-tuned model created: {name}")
    );
    assert_eq!(
        messages[messages.len() - 1],
        "Fine tuning job successfully completed"
    );
    let page = router.own().job_events(&id, None, 2).await.unwrap();
    assert!(page.has_more && page.data[0].message == messages[messages.len() - 1]);
    let rest = router
        .own()
        .job_events(&id, Some(&page.data[1].id), 100)
        .await
        .unwrap();
    assert_eq!(rest.data.len(), messages.len() - 2);
    let checkpoints = router.own().checkpoints(&id, None, 10).await.unwrap().data;
    assert_eq!(
        (checkpoints.len(), checkpoints[0].model.as_str()),
        (1, &*format!("{name}:ckpt-step-2"))
    );
    assert_eq!(
        checkpoints[0].metrics,
        value(
            r#"{"step":2,"train_loss":2.0,"train_mean_token_accuracy":0.5,"valid_loss":2.5,"valid_mean_token_accuracy":0.25}"#
        )
    );
    // With the model go its checkpoints; the job stays on record.
    assert!(router.own().model(&checkpoints[0].model).is_ok());
    router.own().delete_model(&name).await.unwrap();
    assert_eq!(router.own().models().len(), 1);
    router.own().delete_models_of(&id).await.unwrap();
    assert_eq!(router.own().job(&id).await.unwrap().fine_tuned_model, None);
    for _ in 0..400 {
        if !spec.folder.exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("an ended job keeps no folder");
}

/// What lives in it ends with it, as in a process that is killed.
pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// The process ends without a word at `after` events; the next one goes on and the job succeeds.
#[test]
fn a_killed_job_goes_on_at_the_next_start() {
    for kill_after in 0..5 {
        let house = House::new();
        let first = runtime();
        let (id, hyper) = first.block_on(async {
            let (router, mut engine) = house.open().await;
            let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
                .await
                .unwrap();
            let id = create_job(&router, request(&file)).await;
            if kill_after == 0 {
                return (id, None);
            }
            let (spec, events) = engine.started().await;
            let checkpoint = house.trained(&spec, "checkpoint-2", "two");
            let said = [
                started(None),
                step(1, 3.0),
                step(2, 2.0),
                JobEvent::Checkpoint {
                    step: 2,
                    adapter: checkpoint,
                    best: None,
                },
            ];
            for event in said.into_iter().take(kill_after) {
                events.send(event).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            (id, Some(spec.hyper))
        });
        drop(first);
        runtime().block_on(async {
            let (router, mut engine) = house.open().await;
            let (spec, events) = engine.started().await;
            assert_eq!(spec.id.as_str(), id);
            assert!(hyper.is_none_or(|hyper| hyper == spec.hyper));
            let _ = std::fs::remove_dir_all(spec.folder.join("checkpoint-2"));
            let checkpoint = house.trained(&spec, "checkpoint-2", "two");
            let adapter = house.trained(&spec, "adapter", "four");
            let said = [
                started(None),
                step(1, 3.0),
                step(2, 2.0),
                JobEvent::Checkpoint {
                    step: 2,
                    adapter: checkpoint,
                    best: None,
                },
                JobEvent::Finished {
                    adapter,
                    trained_tokens: 40,
                },
            ];
            for event in said {
                events.send(event).await.unwrap();
            }
            let job = wait(&router, &id, |job| job.status.ended()).await;
            assert_eq!(job.status, JobStatus::Succeeded, "{:?}", job.error);
            assert_eq!(
                router.own().checkpoints(&id, None, 10).await.unwrap().data.len(),
                1
            );
            let (_, csv) = content(&router, &job.result_files[0]).await.unwrap();
            assert_eq!(csv.lines().count(), 3, "each step once");
        });
    }
}

#[test]
fn a_job_that_ends_its_server_each_time_rests() {
    let house = House::new();
    let mut id = String::new();
    for life in 0..MAX_DEATHS {
        runtime().block_on(async {
            let (router, mut engine) = house.open().await;
            if life == 0 {
                let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
                    .await
                    .unwrap();
                id = create_job(&router, request(&file)).await;
            }
            // Each time as far as the first, and no further.
            let (_, events) = engine.started().await;
            events.send(started(None)).await.unwrap();
            events.send(step(1, 3.0)).await.unwrap();
            wait(&router, &id, |job| job.trained_tokens.is_some()).await;
        });
    }
    runtime().block_on(async {
        let (router, mut engine) = house.open().await;
        wait(&router, &id, |job| job.status == JobStatus::Paused).await;
        let events = router.own().job_events(&id, None, 100).await.unwrap().data;
        let said = "The job is paused: 10 times in a row the server ended while it was trained";
        assert!(
            events.iter().any(|event| event.message.starts_with(said)),
            "{events:?}"
        );
        // Who resumes it knows why.
        router.own().resume_job(&id).await.unwrap();
        let (_, events) = engine.started().await;
        events.send(started(None)).await.unwrap();
        wait(&router, &id, |job| job.status == JobStatus::Running).await;
    });
}

#[tokio::test]
async fn checkpoints_beyond_the_limit_go_and_the_best_stays() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let asked = JobRequest {
        validation_file: Some(file.as_str().into()),
        settings: Settings {
            save_total_limit: Some(1),
            load_best_model_at_end: Some(true),
            ..Settings::default()
        },
        ..request(&file)
    };
    let id = create_job(&router, asked).await;
    let (spec, events) = engine.started().await;
    assert!(spec.hyper.selection.as_ref().unwrap().load_best);
    events.send(started(None)).await.unwrap();
    for (step, best, left) in [(1, 1, &[1][..]), (2, 1, &[2, 1]), (3, 1, &[3, 1]), (4, 4, &[4])] {
        let adapter = house.trained(&spec, &format!("checkpoint-{step}"), &step.to_string());
        let best = Some(best);
        let checkpoint = JobEvent::Checkpoint { step, adapter, best };
        events.send(checkpoint).await.unwrap();
        let listed = async || router.own().checkpoints(&id, None, 10).await.unwrap().data;
        let mut changed = router.0.signals.watch();
        while listed().await.first().is_none_or(|newest| newest.step != step) {
            changed.changed().await.unwrap();
        }
        let listed = listed().await;
        let steps: Vec<u64> = listed.iter().map(|checkpoint| checkpoint.step).collect();
        assert_eq!(steps, left);
        let models = router.own().models();
        assert_eq!(
            models.len(),
            1 + left.len(),
            "the base and what is left: {models:?}"
        );
        for checkpoint in listed {
            assert!(router.own().model(&checkpoint.model).is_ok());
        }
    }
}

#[tokio::test]
async fn a_stop_leaves_the_job_for_the_next_start() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let id = create_job(&router, request(&file)).await;
    let (spec, events) = engine.started().await;
    events.send(started(None)).await.unwrap();
    let stopping = async {
        assert!(matches!(engine.next().await, Command::Stop));
        let checkpoint = house.trained(&spec, "checkpoint-1", "one");
        events
            .send(JobEvent::Checkpoint {
                step: 1,
                adapter: checkpoint,
                best: None,
            })
            .await
            .unwrap();
        events
            .send(JobEvent::Failed {
                message: "the replica is shutting down".to_owned(),
            })
            .await
            .unwrap();
        drop((engine, events));
    };
    tokio::join!(router.shutdown(), stopping);
    assert!(!router.ready());
    assert_eq!(router.own().job(&id).await.unwrap().status, JobStatus::Running);
    assert_eq!(
        router.own().checkpoints(&id, None, 10).await.unwrap().data.len(),
        1
    );
}

fn full() -> RouterError {
    let source = std::io::ErrorKind::StorageFull.into();
    let what = "writing something".to_owned();
    RouterError::Store(StoreError::Io { what, source })
}

#[tokio::test]
async fn on_a_full_disk_jobs_wait_and_what_makes_room_is_done() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let other = upload(&router, "u.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    assert!(house.data().join("reserve").exists());
    router.note(&full());
    assert_eq!(router.away(), [tandem_store::Part::Room]);
    assert!(!house.data().join("reserve").exists(), "it is the database's now");
    let refused = upload(&router, "v.jsonl", "fine-tune", &chat_rows(4)).await;
    assert_eq!(refused.unwrap_err().away(), Some(tandem_store::Part::Room));
    let waits = create_job(&router, request(&file)).await;
    let cancelled = create_job(&router, request(&file)).await;
    assert_eq!(
        router.cancel_job(&cancelled).await.unwrap().status,
        JobStatus::Cancelled
    );
    router.delete_file(&other).await.unwrap();
    assert_eq!(
        router.job(&waits).await.unwrap().status,
        JobStatus::ValidatingFiles
    );
    // There is room in fact: it is found, and the job goes on.
    let (spec, _events) = engine.started().await;
    assert_eq!(spec.id.as_str(), waits);
    assert!(router.away().is_empty() && house.data().join("reserve").exists());
    upload(&router, "v.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_task_that_panics_is_begun_again_and_it_is_said() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    for task in [crate::PREPARER, crate::SUPERVISOR] {
        router.0.to_panic.lock().unwrap().push(task);
        let id = create_job(&router, request(&file)).await;
        let down = async {
            while router.down() != [task] {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, down).await.expect("it is said");
        let (spec, events) = engine.started().await;
        assert_eq!(spec.id.as_str(), id);
        assert!(router.down().is_empty(), "it runs again");
        events.send(JobEvent::Cancelled { step: 0 }).await.unwrap();
        wait(&router, &id, |job| job.status.ended()).await;
    }
}

#[tokio::test]
async fn a_large_file_keeps_no_other_job_waiting_and_is_given_up() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let small = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    // Whoever opens it waits for a writer, as for a file that takes for ever.
    let large = upload(&router, "u.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let path = house.data().join("files").join(&large);
    std::fs::remove_file(&path).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let stuck = create_job(&router, request(&large)).await;
    let id = create_job(&router, request(&small)).await;
    let (spec, _events) = engine.started().await;
    assert_eq!(spec.id.as_str(), id);
    assert_eq!(
        router.cancel_job(&stuck).await.unwrap().status,
        JobStatus::Cancelled
    );
    // What is longer than the file was is not read to its end.
    let mut writer = std::fs::File::options().write(true).open(&path).unwrap();
    let rows = chat_rows(20_000);
    let written =
        tokio::task::spawn_blocking(move || std::io::Write::write_all(&mut writer, rows.as_bytes()));
    let error = written.await.unwrap().expect_err("the reader has gone");
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    assert!(!router.0.store.job_folder(&stuck).join(files::TRAIN).exists());
}

#[tokio::test]
async fn damaged_examples_are_prepared_again_from_the_file() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let id = create_job(&router, request(&file)).await;
    let (first, events) = engine.started().await;
    let train = router.0.store.job_folder(&id).join(files::TRAIN);
    let good = std::fs::read(&train).unwrap();
    std::fs::write(&train, "damaged").unwrap();
    let message = "train.tokens: damaged dataset".to_owned();
    events.send(JobEvent::Damaged { message }).await.unwrap();
    drop(events);
    let (again, events) = engine.started().await;
    assert_eq!((&again.id, &again.hyper), (&first.id, &first.hyper));
    assert_eq!(std::fs::read(again.folder.join(files::TRAIN)).unwrap(), good);
    let note = "state.safetensors is damaged".to_owned();
    let JobEvent::Started { total_steps, .. } = started(None) else {
        unreachable!()
    };
    let started = JobEvent::Started {
        total_steps,
        resumed_from: None,
        notes: vec![note.clone()],
        examples: 4,
        epoch_tokens: 40,
        epoch_label_tokens: 20,
        trainable_parameters: 1000,
    };
    events.send(started).await.unwrap();
    let told = async {
        loop {
            let said = router.job_events(&id, None, 100).await.unwrap().data;
            let has = |text: &str| {
                let warns = |event: &&crate::api::JobEventRecord| event.level == crate::api::Level::Warn;
                said.iter()
                    .filter(warns)
                    .any(|event| event.message.contains(text))
            };
            if has("prepared again from the job's files") && has(&note) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("both are said");
}

#[tokio::test]
async fn a_cancel_ends_a_job_wherever_it_is() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let running = create_job(&router, request(&file)).await;
    let (_, events) = engine.started().await;
    let queued = create_job(&router, request(&file)).await;
    wait(&router, &queued, |job| job.status == JobStatus::Queued).await;
    assert_eq!(
        router.own().cancel_job(&queued).await.unwrap().status,
        JobStatus::Cancelled
    );
    events.send(started(None)).await.unwrap();
    wait(&router, &running, |job| job.status == JobStatus::Running).await;
    let answer = async {
        let Command::CancelJob(id) = engine.next().await else {
            panic!("a CancelJob was expected")
        };
        assert_eq!(id.as_str(), running);
        events.send(JobEvent::Cancelled { step: 1 }).await.unwrap();
    };
    let (job, ()) = tokio::join!(router.own().cancel_job(&running), answer);
    assert_eq!(job.unwrap().status, JobStatus::Cancelled);
    let again = router.own().cancel_job(&running).await.unwrap_err();
    assert_eq!(
        again.to_string(),
        format!("Job {running} has already ended: it is cancelled.")
    );
    assert_eq!(
        kind(&router.own().cancel_job("ftjob-nobody").await.unwrap_err()),
        "UnknownJob"
    );
    let page = router.own().jobs(None, 1, MetadataFilter::Any).await.unwrap();
    assert!(page.has_more && page.data[0].id.as_str() == queued);
}

/// What the engine does when it is told to pause: the state is written, and that is said.
pub(super) async fn pauses(engine: &mut Engine, spec: &JobSpec, events: &mpsc::Sender<JobEvent>, step: u64) {
    let Command::PauseJob(id) = engine.next().await else {
        panic!("a PauseJob was expected")
    };
    assert_eq!(id, spec.id);
    std::fs::write(spec.folder.join(files::STATE), format!("after {step}")).unwrap();
    events.send(JobEvent::Kept { step }).await.unwrap();
}

#[tokio::test]
async fn a_paused_job_rests_until_it_is_resumed() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let id = create_job(&router, request(&file)).await;
    let (spec, events) = engine.started().await;
    events.send(started(None)).await.unwrap();
    events.send(step(1, 3.0)).await.unwrap();
    wait(&router, &id, |job| job.trained_tokens == Some(10)).await;
    let (job, ()) = tokio::join!(
        router.own().pause_job(&id),
        pauses(&mut engine, &spec, &events, 1)
    );
    let job = job.unwrap();
    assert_eq!((job.status, job.estimated_finish), (JobStatus::Paused, None));
    drop(events);
    let told = &router.own().job_events(&id, None, 1).await.unwrap().data[0];
    assert_eq!(told.message, "The job was paused after step 1.");
    assert_eq!(
        router.own().pause_job(&id).await.unwrap().status,
        JobStatus::Paused,
        "as it is already"
    );
    // The next has its place meanwhile, and one that waits pauses at once.
    let second = create_job(&router, request(&file)).await;
    let (second_spec, second_events) = engine.started().await;
    assert_eq!(second_spec.id.as_str(), second);
    second_events.send(started(None)).await.unwrap();
    // Nothing was learned yet: the replica closes the channel without a word.
    wait(&router, &second, |job| job.status == JobStatus::Running).await;
    let silent = async {
        assert!(matches!(engine.next().await, Command::PauseJob(_)));
        drop(second_events);
    };
    let (job, ()) = tokio::join!(router.own().pause_job(&second), silent);
    assert_eq!(job.unwrap().status, JobStatus::Paused);
    // Over a restart they rest, and a job that waits does not.
    router.shutdown().await;
    drop((router, engine));
    let (router, mut engine) = house.open().await;
    let third = create_job(&router, request(&file)).await;
    let (third_spec, third_events) = engine.started().await;
    assert_eq!(third_spec.id.as_str(), third);
    third_events.send(JobEvent::Cancelled { step: 0 }).await.unwrap();
    wait(&router, &third, |job| job.status.ended()).await;
    // It goes on from its state.
    assert_eq!(
        router.own().resume_job(&id).await.unwrap().status,
        JobStatus::Queued
    );
    let (again, events) = engine.started().await;
    assert_eq!((&again.id, again.hyper == spec.hyper), (&spec.id, true));
    assert_eq!(
        again.life.saved,
        Some(tandem_core::job::Saved {
            epoch: spec.life.epoch,
            step: 1
        })
    );
    let state = std::fs::read_to_string(again.folder.join(files::STATE)).unwrap();
    assert_eq!(state, "after 1");
    events.send(started(Some(1))).await.unwrap();
    wait(&router, &id, |job| job.status == JobStatus::Running).await;
    // A pause that the engine has not obeyed is withdrawn by a resume.
    router.0.store.ask(&id, tandem_store::Asked::Pause).await.unwrap();
    assert_eq!(
        router.own().resume_job(&id).await.unwrap().status,
        JobStatus::Running
    );
    let refused = router.own().resume_job(&id).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        format!("Job {id} is not paused: it is running.")
    );
    // A cancel ends what rests, and what has ended neither pauses nor goes on.
    assert_eq!(
        router.own().cancel_job(&second).await.unwrap().status,
        JobStatus::Cancelled
    );
    for refused in [
        router.own().pause_job(&second).await,
        router.own().resume_job(&second).await,
    ] {
        assert_eq!(
            refused.unwrap_err().to_string(),
            format!("Job {second} has already ended: it is cancelled.")
        );
    }
    assert_eq!(
        kind(&router.own().pause_job("ftjob-nobody").await.unwrap_err()),
        "UnknownJob"
    );
}

/// The process dies between a request and its effect: the next start does what was asked, in whatever state the job is.
#[test]
fn a_pause_survives_a_kill() {
    for (is_running, asked, expected) in [
        (true, tandem_store::Asked::Pause, JobStatus::Paused),
        (false, tandem_store::Asked::Pause, JobStatus::Paused),
        (true, tandem_store::Asked::Cancel, JobStatus::Cancelled),
    ] {
        let house = House::new();
        let first = runtime();
        let id = first.block_on(async {
            let (router, mut engine) = house.open().await;
            let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
                .await
                .unwrap();
            let id = create_job(&router, request(&file)).await;
            if is_running {
                let (_, events) = engine.started().await;
                events.send(started(None)).await.unwrap();
                wait(&router, &id, |job| job.status == JobStatus::Running).await;
            }
            router.0.store.ask(&id, asked).await.unwrap();
            id
        });
        drop(first);
        runtime().block_on(async {
            let (router, _engine) = house.open().await;
            let job = wait(&router, &id, |job| job.status == expected).await;
            assert_eq!(job.status, expected);
        });
    }
}

#[tokio::test]
async fn as_many_jobs_run_as_the_replica_takes_and_a_refused_one_waits() {
    let house = House::new();
    let (mut replica, mut engine) = replica();
    replica.info.max_training_jobs = 2;
    let router = house.open_with(Config::default(), replica).await.unwrap();
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let first = create_job(&router, request(&file)).await;
    let (spec, first_events) = engine.started().await;
    assert_eq!(spec.id.as_str(), first);
    first_events.send(started(None)).await.unwrap();
    // The replica has no room for the second beside it: it stays queued, and that is said once.
    let second = create_job(&router, request(&file)).await;
    for _ in 0..2 {
        let (spec, events) = engine.started().await;
        assert_eq!(spec.id.as_str(), second);
        let message = "it takes 9 GiB".to_owned();
        events.send(JobEvent::Refused { message }).await.unwrap();
    }
    let (spec, second_events) = engine.started().await;
    assert_eq!(spec.id.as_str(), second);
    let job = router.own().job(&second).await.unwrap();
    assert_eq!(job.status, JobStatus::Queued);
    second_events.send(started(None)).await.unwrap();
    wait(&router, &second, |job| job.status == JobStatus::Running).await;
    let said = router.own().job_events(&second, None, 100).await.unwrap().data;
    let waits = said
        .iter()
        .filter(|event| event.message == "The job waits for a replica: it takes 9 GiB");
    assert_eq!(waits.count(), 1);
    // A third waits for the end of one of them; another's metrics are its own.
    let third = create_job(&router, request(&file)).await;
    wait(&router, &third, |job| job.status == JobStatus::Queued).await;
    first_events.send(step(1, 3.0)).await.unwrap();
    wait(&router, &first, |job| job.trained_tokens == Some(10)).await;
    assert_eq!(router.own().job(&second).await.unwrap().trained_tokens, None);
    let message = "it broke".to_owned();
    first_events.send(JobEvent::Failed { message }).await.unwrap();
    let (spec, _third_events) = engine.started().await;
    assert_eq!(spec.id.as_str(), third);
    assert_eq!(router.own().job(&first).await.unwrap().status, JobStatus::Failed);
    assert_eq!(
        router.own().job(&second).await.unwrap().status,
        JobStatus::Running
    );
}

/// One tenant has every place: of its jobs the newest is kept and waits, and that of another takes its place.
#[tokio::test]
async fn a_tenant_that_has_every_place_gives_one_to_another() {
    let house = House::new();
    let (mut replica, mut engine) = replica();
    replica.info.max_training_jobs = 2;
    let router = house.open_with(Config::default(), replica).await.unwrap();
    let other = Client {
        tenant: "other".parse().unwrap(),
        ..Client::default()
    };
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let mut running = vec![];
    for _ in 0..2 {
        let id = create_job(&router, request(&file)).await;
        let (spec, events) = engine.started().await;
        events.send(started(None)).await.unwrap();
        events.send(step(1, 3.0)).await.unwrap();
        wait(&router, &id, |job| job.trained_tokens == Some(10)).await;
        running.push((id, spec, events));
    }
    let third = create_job(&router, request(&file)).await;
    wait(&router, &third, |job| job.status == JobStatus::Queued).await;
    let theirs = upload_by(router.of(&other), "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let theirs = router.of(&other).create_job(request(&theirs)).await.unwrap().id;
    let (newest, spec, events) = running.pop().unwrap();
    pauses(&mut engine, &spec, &events, 1).await;
    let (spec, _their_events) = engine.started().await;
    assert_eq!(spec.id, theirs, "before the third, which was there first");
    let job = router.own().job(&newest).await.unwrap();
    assert_eq!(job.status, JobStatus::Queued);
    let told = &router.own().job_events(&newest, None, 1).await.unwrap().data[0];
    assert_eq!(
        told.message,
        "The job gave its place to another tenant's after step 1, and waits for the next."
    );
    // It is the older of the two that wait now, and goes on from where it was.
    let (_, _, oldest_events) = running.pop().unwrap();
    let message = "it broke".to_owned();
    oldest_events.send(JobEvent::Failed { message }).await.unwrap();
    let (spec, _events) = engine.started().await;
    assert_eq!(
        (spec.id.as_str(), spec.life.saved.map(|saved| saved.step)),
        (newest.as_str(), Some(1))
    );
}

#[tokio::test]
async fn a_job_fails_with_the_reason() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(1))
        .await
        .unwrap();

    // Nothing to learn within 2 tokens: the label comes later.
    let cut = JobRequest {
        settings: Settings {
            max_seq_length: Some(2),
            ..Settings::default()
        },
        ..request(&file)
    };
    let id = create_job(&router, cut).await;
    let error = wait(&router, &id, |job| job.status.ended()).await.error.unwrap();
    assert_eq!(
        (error.code.as_str(), error.param.as_deref()),
        ("invalid_n_examples", Some("training_file"))
    );

    let id = create_job(&router, request(&file)).await;
    let (_, events) = engine.started().await;
    events
        .send(JobEvent::Failed {
            message: "loss is not a number at step 1".to_owned(),
        })
        .await
        .unwrap();
    let job = wait(&router, &id, |job| job.status.ended()).await;
    assert_eq!(job.status, JobStatus::Failed);
    assert_eq!(job.error.unwrap().message, "loss is not a number at step 1");
    let last = &router.own().job_events(&id, None, 1).await.unwrap().data[0];
    assert_eq!(
        (last.level, last.message.as_str()),
        (crate::api::Level::Error, "loss is not a number at step 1")
    );
}

#[tokio::test]
async fn bad_jobs_are_refused_by_name() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(1))
        .await
        .unwrap();
    let other = upload(&router, "x", "user_data", "x").await.unwrap();
    let folder = house.adapter("pet", "1");
    let (card, _) = tokio::join!(
        router.own().load_adapter("pet", &folder, crate::LoadMode::New),
        engine.answer_load(Ok(1))
    );
    card.unwrap();
    let base = || request(&file);
    let with = |settings| JobRequest { settings, ..base() };
    let cases = [
        (
            JobRequest {
                model: "nobody".to_owned(),
                ..base()
            },
            "UnknownModel",
        ),
        (
            JobRequest {
                model: "pet".to_owned(),
                ..base()
            },
            "model",
        ),
        (request("file-nobody"), "training_file"),
        (request(&other), "training_file"),
        (
            JobRequest {
                validation_file: Some(other.as_str().into()),
                ..base()
            },
            "validation_file",
        ),
        (
            with(Settings {
                max_seq_length: Some(513),
                ..Settings::default()
            }),
            "max_seq_length",
        ),
        (
            with(Settings {
                dataset_text_field: Some("x".repeat(128 << 10)),
                ..Settings::default()
            }),
            "hyperparameters",
        ),
        (
            with(Settings {
                lora_r: Some(65),
                ..Settings::default()
            }),
            "lora_r",
        ),
        (
            with(Settings {
                lora_target_modules: Some(vec!["o_proj".to_owned()]),
                ..Settings::default()
            }),
            "lora_target_modules",
        ),
        (
            with(Settings {
                lora_target_modules: Some(vec!["q_proj".to_owned(), "q_proj".to_owned()]),
                ..Settings::default()
            }),
            "lora_target_modules",
        ),
        (
            JobRequest {
                suffix: Some(String::new()),
                ..base()
            },
            "suffix",
        ),
        (
            JobRequest {
                suffix: Some("a:b".to_owned()),
                ..base()
            },
            "suffix",
        ),
        (
            JobRequest {
                suffix: Some("x".repeat(41)),
                legacy: true,
                ..base()
            },
            "suffix",
        ),
        (
            JobRequest {
                suffix: Some("  ".to_owned()),
                ..base()
            },
            "suffix",
        ),
        (
            JobRequest {
                metadata: [("k".to_owned(), "\0".to_owned())].into(),
                ..base()
            },
            "metadata",
        ),
        (
            JobRequest {
                metadata: [("k".repeat(65), String::new())].into(),
                ..base()
            },
            "metadata",
        ),
    ];
    for (request, expected) in cases {
        let error = router.own().create_job(request).await.unwrap_err();
        assert_eq!(kind(&error), expected, "{error}");
    }
    assert!(
        router
            .own()
            .jobs(None, 10, MetadataFilter::Any)
            .await
            .unwrap()
            .data
            .is_empty()
    );
    let missing = house.root.path().join("nowhere");
    let unpublished = router
        .0
        .store
        .publish_adapter(&missing, Placement::Link, u64::MAX)
        .await;
    assert!(matches!(
        unpublished,
        Err(StoreError::Adapter { missing: true, .. })
    ));
}

#[tokio::test]
async fn a_job_goes_on_from_an_adapter_and_learns_what_its_rows_say() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let folder = house.adapter("pet", "numbers");
    let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["v_proj"]}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let (card, _) = tokio::join!(
        router.own().load_adapter("pet", &folder, crate::LoadMode::New),
        engine.answer_load(Ok(1))
    );
    card.unwrap();
    let pairs = "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n".repeat(3);
    let file = upload(&router, "t.jsonl", "fine-tune", &pairs).await.unwrap();
    let asked = |settings: Settings| JobRequest {
        model: "pet".to_owned(),
        settings,
        ..request(&file)
    };
    let dpo = || Settings {
        objective: Some("dpo".to_owned()),
        ..Settings::default()
    };
    for (settings, param, text) in [
        (
            Settings {
                objective: Some("kto".to_owned()),
                ..Settings::default()
            },
            "training_file",
            "line 1: it is a row like",
        ),
        (
            Settings {
                lora_r: Some(8),
                ..dpo()
            },
            "lora_r",
            "is 8, but the adapter that the job starts from has 4",
        ),
        (
            Settings {
                from_peft_checkpoint: Some("nobody".to_owned()),
                ..dpo()
            },
            "from_peft_checkpoint",
            "no adapter named",
        ),
    ] {
        match router.own().create_job(asked(settings)).await {
            Err(RouterError::Invalid {
                param: Some(got),
                message,
                ..
            }) => assert!(got == param && message.contains(text), "{got}: {message}"),
            other => panic!("{other:?}"),
        }
    }
    create_job(&router, asked(dpo())).await;
    let (spec, _events) = engine.started().await;
    let groups = dataset::decode(&std::fs::read(spec.folder.join(files::TRAIN)).unwrap()).unwrap();
    assert!(groups.len() == 3 && groups.iter().all(|group| group.examples.len() == 2));
    assert_eq!(
        std::fs::read(spec.folder.join(files::START_TENSORS)).unwrap(),
        b"numbers"
    );
    assert!(spec.folder.join(files::START_CONFIG).exists());
    let Method::Lora(lora) = &spec.hyper.method else {
        panic!("a served base is never changed")
    };
    assert_eq!((lora.r, lora.alpha), (4, 6.0));
    assert_eq!(lora.target_modules, ["v_proj"]);
}

/// Nothing of it is in memory: it is asked of the database, as after a restart or by another router.
#[tokio::test]
async fn a_key_trains_as_much_as_it_may_in_a_day() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let limits = Limits {
        training_tokens_per_day: Some(1000),
        ..Limits::default()
    };
    let new = NewKey {
        name: String::new(),
        tenant: Tenant::default(),
        role: Role::Train,
        limits,
        expires_after_s: None,
    };
    let key = router.0.store.keys().create(new).await.unwrap().0;
    let client = Client {
        meter: Meter::new(&key.id, limits),
        ..Client::default()
    };
    let create = async |router: &Router, max_steps| {
        let file = upload(router, "t.jsonl", "fine-tune", &chat_rows(4))
            .await
            .unwrap();
        let settings = Settings {
            max_steps: Some(max_steps),
            ..Settings::default()
        };
        let request = JobRequest {
            settings,
            ..request(&file)
        };
        router.of(&client).create_job(request).await
    };
    // More than a day's worth is known when the file is read.
    let large = create(&router, 1_000_000).await.unwrap().id.to_string();
    let failed = wait(&router, &large, |job| job.status.ended()).await;
    let error = failed.error.expect("it failed");
    assert_eq!(error.code, "exceeded_quota");
    assert!(
        error.message.contains("1000 tokens a day") && error.message.contains("would train about"),
        "{error:?}"
    );

    let id = create(&router, 4).await.unwrap().id.to_string();
    let (spec, events) = engine.started().await;
    events.send(started(None)).await.unwrap();
    events.send(step(30, 3.0)).await.unwrap();
    wait(&router, &id, |job| job.trained_tokens == Some(300)).await;
    assert_eq!(
        router
            .0
            .store
            .training_quota(&key.id)
            .await
            .unwrap()
            .unwrap()
            .trained,
        300
    );
    events.send(step(101, 3.0)).await.unwrap();
    pauses(&mut engine, &spec, &events, 101).await;
    drop(events);
    wait(&router, &id, |job| job.status == JobStatus::Paused).await;
    let told = router.own().job_events(&id, None, 9).await.unwrap().data;
    assert!(
        told.iter()
            .any(|event| event.message.contains("of which 1010 are trained")),
        "{told:?}"
    );

    for refused in [create(&router, 4).await, router.of(&client).resume_job(&id).await] {
        let refused = refused.unwrap_err();
        assert!(matches!(refused, RouterError::Quota(_)), "{refused}");
        assert!(
            refused
                .to_string()
                .contains("of which 1010 are trained; try again in"),
            "{refused}"
        );
    }
    // Others are not concerned.
    assert!(
        router.own().resume_job(&id).await.is_err(),
        "whoever asks, the key's job trains no more"
    );
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    create_job(&router, request(&file)).await;
}
