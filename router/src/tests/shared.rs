//! Two routers, each with its own engine, on one Postgres and one artifact folder.

#[path = "../../store/src/tests/servers.rs"]
mod servers;

use tandem_core::job::{JobEvent, JobSpec, Saved, files};
use tandem_core::message::FinishReason;

use super::calls::{call, end};
use super::jobs::{create_job, request, started, step, wait};
use super::*;
use crate::api::{Call, JobStatus, LoadMode, ModelKind, Part};

/// Short, so that a test can wait for its end.
const SHORT_LEASE: Duration = Duration::from_millis(600);

struct Street {
    house: House,
    url: String,
}

impl Street {
    /// `None`: there is no Postgres here.
    fn new() -> Option<Street> {
        servers::database().map(|url| Street {
            house: House::new(),
            url,
        })
    }

    /// On a Postgres of its own.
    fn on(server: &servers::Own) -> Street {
        Street {
            house: House::new(),
            url: server.url(),
        }
    }

    async fn open(&self, name: &str) -> (Router, Engine) {
        let root = self.house.root.path();
        let places = Places {
            database_url: Some(self.url.clone()),
            artifact_url: Some(format!("file://{}", root.join("shared").display())),
            lease: SHORT_LEASE,
            ..Places::local(root.join(name))
        };
        let store = Store::open(&places).await.unwrap();
        let (replica, engine) = replica();
        let config = Config {
            served_model_name: BASE.to_owned(),
            ..Config::default()
        };
        let fleet = Fleet::open(vec![member("only", [replica])], SEAT_PATIENCE).await;
        let router = Router::open(store, self.house.tokenizer.clone(), fleet, config);
        (router.await.unwrap(), engine)
    }
}

/// Whichever of two engines is told to train.
async fn either(a: &mut Engine, b: &mut Engine) -> (bool, JobSpec, mpsc::Sender<JobEvent>) {
    tokio::select! {
        (spec, events) = begun(a) => (true, spec, events),
        (spec, events) = begun(b) => (false, spec, events),
    }
}

/// The next job; adapters that are let go meanwhile do not matter.
async fn begun(engine: &mut Engine) -> (JobSpec, mpsc::Sender<JobEvent>) {
    loop {
        if let Command::StartJob(spec, events) = engine.next().await {
            return (*spec, events);
        }
    }
}

fn state(spec: &JobSpec, text: &str) {
    std::fs::write(spec.folder.join(files::STATE), text).unwrap();
}

#[tokio::test]
async fn a_job_whose_router_dies_ends_once_on_the_other() {
    let Some(street) = Street::new() else { return };
    let (first_router, mut first) = street.open("first").await;
    let (second_router, mut second) = street.open("second").await;
    let file = upload(&first_router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let id = create_job(&first_router, request(&file)).await;
    let (was_first, spec, events) = either(&mut first, &mut second).await;
    let (holder, other, mut heir) = match was_first {
        true => (first_router, second_router, second),
        false => (second_router, first_router, first),
    };
    assert_eq!((spec.life.epoch > 0, spec.life.saved), (true, None));
    state(&spec, "after 2");
    let checkpoint = street.house.trained(&spec, "checkpoint-2", "two");
    for event in [
        started(None),
        step(1, 3.0),
        step(2, 2.0),
        JobEvent::Checkpoint {
            step: 2,
            adapter: checkpoint,
            best: None,
        },
    ] {
        events.send(event).await.unwrap();
    }
    // The other sees the job, and the checkpoint's name answers there although nobody told it.
    let job = wait(&other, &id, |job| job.trained_tokens == Some(20)).await;
    assert_eq!(job.status, JobStatus::Running);
    wait_for_checkpoint(&other, &id).await;
    let checkpoint_model = other.own().checkpoints(&id, None, 1).await.unwrap().data[0]
        .model
        .clone();
    let generation = other.generate(Call {
        model: checkpoint_model,
        ..call("x")
    });
    let mut generation = generation.await.unwrap();
    let (generate, said) = heir.generate().await;
    let adapter = generate.adapter.unwrap();
    assert_eq!(
        std::fs::read_to_string(adapter.folder.join("adapter_model.safetensors")).unwrap(),
        "two"
    );
    end(&said, FinishReason::Length).await;
    while generation.pieces.recv().await.is_some() {}

    // The holder dies without a word: as a stopped process, it renews nothing and hears nothing.
    let old = (spec, events);
    holder.abandon();
    let (spec, events) = begun(&mut heir).await;
    assert!(spec.life.epoch > old.0.life.epoch);
    let saved = Saved {
        epoch: old.0.life.epoch,
        step: 2,
    };
    assert_eq!(spec.life.saved, Some(saved));
    assert_eq!(
        std::fs::read_to_string(spec.folder.join(files::STATE)).unwrap(),
        "after 2"
    );
    let adapter = street.house.trained(&spec, "adapter", "four");
    for event in [
        started(Some(2)),
        step(3, 1.5),
        step(4, 1.0),
        JobEvent::Finished {
            adapter,
            trained_tokens: 40,
        },
    ] {
        events.send(event).await.unwrap();
    }
    let job = wait(&other, &id, |job| job.status.ended()).await;
    assert_eq!(job.status, JobStatus::Succeeded, "{:?}", job.error);
    let page = other.own().job_events(&id, None, 100).await.unwrap().data;
    let ends = page
        .iter()
        .filter(|event| event.message.contains("successfully"))
        .count();
    assert_eq!(ends, 1);
    let (_, csv) = content(&other, &job.result_files[0]).await.unwrap();
    assert_eq!(csv.lines().count(), 5, "each step once");
}

async fn wait_for_checkpoint(router: &Router, id: &str) {
    let waited = async {
        let mut changed = router.0.signals.watch();
        while router
            .own()
            .checkpoints(id, None, 1)
            .await
            .unwrap()
            .data
            .is_empty()
        {
            changed.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, waited)
        .await
        .expect("it comes soon");
}

#[tokio::test]
async fn names_files_and_cancels_cross_from_router_to_router() {
    let Some(street) = Street::new() else { return };
    let (first, mut first_engine) = street.open("first").await;
    let (second, mut second_engine) = street.open("second").await;
    let folder = street.house.adapter("pet", "1");
    let (card, loaded) = tokio::join!(
        first.own().load_adapter("pet", &folder, LoadMode::New),
        first_engine.answer_load(Ok(8))
    );
    card.unwrap();
    let answered = second.generate(Call {
        model: "pet".to_owned(),
        ..call("x")
    });
    let generation = answered.await.unwrap();
    assert_eq!(generation.adapter, Some(loaded.digest));
    let (generate, _) = second_engine.generate().await;
    assert!(
        generate
            .adapter
            .unwrap()
            .folder
            .join("adapter_config.json")
            .exists()
    );
    assert!(matches!(
        second.own().model("pet").unwrap().kind,
        ModelKind::Adapter { rank: 8, .. }
    ));
    let taken = second
        .own()
        .load_adapter("pet", &folder, LoadMode::New)
        .await
        .unwrap_err();
    assert_eq!(kind(&taken), "Conflict");
    second.own().unload_adapter("pet").await.unwrap();
    let gone = tokio::time::timeout(PATIENCE, async {
        while first.own().model("pet").is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    gone.await.expect("the first router sees it soon");

    let file = upload(&first, "t.jsonl", "fine-tune", &chat_rows(2))
        .await
        .unwrap();
    assert_eq!(content(&second, &file).await.unwrap().1, chat_rows(2));
    let id = create_job(&second, request(&file)).await;
    let (on_first, _, events) = either(&mut first_engine, &mut second_engine).await;
    events.send(started(None)).await.unwrap();
    let (elsewhere, engine) = match on_first {
        true => (&second, &mut first_engine),
        false => (&first, &mut second_engine),
    };
    // Until then it would be cancelled without its engine.
    wait(elsewhere, &id, |job| job.status == JobStatus::Running).await;
    let answer = async {
        loop {
            if let Command::CancelJob(cancelled) = engine.next().await {
                assert_eq!(cancelled.as_str(), id);
                break;
            }
        }
        events.send(JobEvent::Cancelled { step: 1 }).await.unwrap();
    };
    let (job, ()) = tokio::join!(elsewhere.cancel_job(&id), answer);
    assert_eq!(job.unwrap().status, JobStatus::Cancelled);
}

#[tokio::test]
async fn what_needs_no_database_goes_on_without_it() {
    let Some(server) = servers::Own::new() else { return };
    let street = Street::on(&server);
    let (router, mut engine) = street.open("only").await;
    let folder = street.house.adapter("pet", "1");
    let (card, _) = tokio::join!(
        router.own().load_adapter("pet", &folder, LoadMode::New),
        engine.answer_load(Ok(8))
    );
    card.unwrap();
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(2))
        .await
        .unwrap();
    server.stop();
    let noticed = async {
        while router.away() != [Part::Database] {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, noticed)
        .await
        .expect("the next probe sees it");
    assert!(router.ready(), "replicas answer");
    // The base, an adapter that is known, and the names.
    for model in [BASE, "pet"] {
        let call = Call {
            model: model.to_owned(),
            ..call("x")
        };
        let mut generation = router.generate(call).await.unwrap();
        let (_, said) = engine.generate().await;
        end(&said, FinishReason::Length).await;
        while generation.pieces.recv().await.is_some() {}
    }
    assert_eq!(router.own().models().len(), 2);
    // What needs it is refused by name: another router may know the model.
    let unknown = Call {
        model: "other".to_owned(),
        ..call("x")
    };
    for error in [
        router.generate(unknown).await.err().expect("nobody can say"),
        router.own().file(&file).await.unwrap_err(),
        router.own().create_job(request(&file)).await.unwrap_err(),
        router.own().unload_adapter("pet").await.unwrap_err(),
        upload(&router, "u.jsonl", "fine-tune", &chat_rows(2))
            .await
            .unwrap_err(),
    ] {
        assert_eq!(error.away(), Some(Part::Database), "{error}");
    }
    server.start();
    let back = async {
        while !router.away().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, back)
        .await
        .expect("the next probe sees it");
    // And the job loops are alive.
    let id = create_job(&router, request(&file)).await;
    let (spec, _) = begun(&mut engine).await;
    assert_eq!(spec.id.as_str(), id);
}
