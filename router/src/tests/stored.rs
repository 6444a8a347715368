//! What a tenant stores within its key's limit: uploads, jobs and batches that come near it.

use tandem_core::job::{JobEvent, files};
use tandem_store::{Limits, NewKey, Role, StorageExceeded, StoreError, Tenant};

use super::jobs::{pauses, request, started, step, wait};
use super::*;
use crate::api::{JobStatus, Meter};

/// Of the default tenant, with a key in the database.
async fn limited(router: &Router, stored_bytes: u64) -> View {
    let limits = Limits {
        stored_bytes: Some(stored_bytes),
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
    router.of(&Client {
        meter: Meter::new(&key.id, limits),
        ..Client::default()
    })
}

fn exceeded(error: RouterError) -> StorageExceeded {
    match error {
        RouterError::Store(StoreError::OverLimit(exceeded)) => exceeded,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn bytes_are_refused_while_they_come() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let view = limited(&router, 100).await;
    upload_by(view.clone(), "x", "user_data", &"x".repeat(60))
        .await
        .unwrap();
    let (one, two) = (view.incoming().await.unwrap(), view.incoming().await.unwrap());
    one.reach(30).unwrap();
    let refused = exceeded(two.reach(11).unwrap_err());
    assert_eq!(
        (refused.storage.stored, refused.wanted),
        (60, 41),
        "both together"
    );
    drop(one);
    two.reach(40).unwrap();
    let refused = upload_by(view.clone(), "x", "user_data", &"x".repeat(41)).await;
    assert_eq!(
        exceeded(refused.unwrap_err()).to_string(),
        "this key lets its tenant store 100 bytes, 60 are stored, and this would add 41: delete files, models or checkpoints, or \
         cancel uploads"
    );
    upload_by(view.clone(), "x", "user_data", &"x".repeat(40))
        .await
        .unwrap();
    let nothing_left = |error: RouterError| assert_eq!(exceeded(error).wanted, 0);
    nothing_left(view.incoming().await.err().unwrap());
    nothing_left(
        view.clone()
            .create_job(request("file-x"))
            .await
            .map(drop)
            .unwrap_err(),
    );
    let folder = house.adapter("a", "numbers");
    nothing_left(
        view.clone()
            .load_adapter("a", &folder, crate::LoadMode::New)
            .await
            .map(drop)
            .unwrap_err(),
    );
    // Who has a key without a limit goes on.
    router.own().incoming().await.unwrap().reach(u64::MAX).unwrap();
}

#[tokio::test]
async fn a_job_is_prepared_and_trained_within_what_is_left() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let rows = chat_rows(100);
    let file = upload(&router, "t.jsonl", "fine-tune", &rows).await.unwrap();
    let stored = async || router.0.store.keys().stored(&Tenant::default()).await.unwrap();
    // Rank 16 of two modules, and what files say of them.
    let kept = 16 * 16 * (128 + 100) + (128 << 10);
    let none = limited(&router, rows.len() as u64 + kept - 1).await;
    let refused = exceeded(none.create_job(request(&file)).await.map(drop).unwrap_err());
    assert_eq!(
        (refused.storage.stored, refused.wanted),
        (rows.len() as u64, kept)
    );
    // A hundred rows of about thirteen tokens, each of eight bytes and four for their number.
    let small = limited(&router, rows.len() as u64 + kept + 5_000).await;
    let id = small.create_job(request(&file)).await.unwrap().id.to_string();
    let failed = wait(&router, &id, |job| job.status.ended()).await;
    let error = failed.error.expect("it failed");
    assert_eq!(error.code, "storage_limit_exceeded");
    let said = format!(
        "bytes, {} are stored, and this would add",
        rows.len() as u64 + kept
    );
    assert!(error.message.contains(&said), "{error:?}");
    let folder = house.data().join("jobs").join(&id);
    assert!(!folder.join("train.partial").exists() && !folder.join(files::TRAIN).exists());

    let large = limited(&router, 1 << 20).await;
    let id = large
        .clone()
        .create_job(request(&file))
        .await
        .unwrap()
        .id
        .to_string();
    let (spec, events) = engine.started().await;
    let tokens = std::fs::metadata(spec.folder.join(files::TRAIN)).unwrap().len();
    assert_eq!(stored().await, rows.len() as u64 + tokens + kept);
    for event in [started(None), step(1, 3.0)] {
        events.send(event).await.unwrap();
    }
    wait(&router, &id, |job| job.status == JobStatus::Running).await;
    let kept = 16 * 1000 + (128 << 10);
    assert_eq!(stored().await, rows.len() as u64 + tokens + kept, "as it is");
    let left = (1 << 20) - stored().await as usize;
    upload(&router, "x", "user_data", &"x".repeat(left - 2))
        .await
        .unwrap();
    let adapter = house.trained(&spec, "checkpoint-1", "one");
    let checkpoint = JobEvent::Checkpoint {
        step: 1,
        adapter,
        best: None,
    };
    events.send(checkpoint).await.unwrap();
    pauses(&mut engine, &spec, &events, 1).await;
    drop(events);
    wait(&router, &id, |job| job.status == JobStatus::Paused).await;
    let refused = exceeded(large.clone().resume_job(&id).await.map(drop).unwrap_err());
    assert!(refused.storage.stored > 1 << 20, "it keeps room for the next one");
    large.cancel_job(&id).await.unwrap();
    assert!(stored().await < (1 << 20) - kept);
}

#[tokio::test]
async fn a_batch_ends_when_its_answers_take_no_more() {
    use super::batches::{Edge, line, lines, request, until};
    let house = House::new();
    let (router, _engine) = house.open().await;
    let text: String = (0..300)
        .map(|i| line(&format!("r{i}"), &json!({"i": i})))
        .collect();
    let view = limited(&router, text.len() as u64 + 2_000).await;
    let file = upload(&router, "in.jsonl", "batch", &text).await.unwrap();
    let edge = Edge::new(1000);
    router.answer_batches(edge.answers());
    let id = view.create_batch(request(&file)).await.unwrap().id;
    let done = until(&router, &id, |batch| batch.finished_at.is_some()).await;
    assert_eq!(done.status, "completed");
    let answered = lines(&router, done.output_file.as_deref()).await.len();
    let refused = lines(&router, done.error_file.as_deref()).await;
    assert!((1..300).contains(&answered), "{answered}");
    assert_eq!(answered + refused.len(), 300);
    let error = &refused[0]["error"];
    assert_eq!(error["code"], "storage_limit_exceeded");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("are stored: delete files"), "{message}");
}
