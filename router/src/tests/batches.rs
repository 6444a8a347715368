//! Batches over a real store, with the test in the edge's place: it answers lines.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::batches::{Answers, Batch, BatchNumbers, BatchRequest, Endpoint, LineAnswer};
use crate::jobs::MAX_DEATHS;

/// Every body it was asked, and how many answers it gives before it waits for ever.
#[derive(Clone, Default)]
pub(super) struct Edge {
    asked: Arc<Mutex<Vec<Value>>>,
    patience: Arc<AtomicUsize>,
}

impl Edge {
    pub(super) fn new(patience: usize) -> Edge {
        Edge {
            asked: Arc::default(),
            patience: Arc::new(AtomicUsize::new(patience)),
        }
    }

    pub(super) fn answers(&self) -> Answers {
        let edge = self.clone();
        Arc::new(move |line| {
            let edge = edge.clone();
            Box::pin(async move {
                let body: Value = serde_json::from_slice(&line.body).unwrap();
                edge.asked.lock().unwrap().push(body.clone());
                let left = edge
                    .patience
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
                if left.is_err() {
                    std::future::pending::<()>().await;
                }
                let status = body["status"].as_u64().unwrap_or(200) as u16;
                LineAnswer {
                    status,
                    request_id: "req_1".to_owned(),
                    body: json!({"echo": body}).to_string(),
                    try_again: None,
                }
            })
        })
    }

    fn asked(&self) -> Vec<Value> {
        self.asked.lock().unwrap().clone()
    }
}

pub(super) fn line(id: &str, body: &Value) -> String {
    json!({"custom_id": id, "method": "POST", "url": "/v1/embeddings", "body": body}).to_string() + "\n"
}

pub(super) fn request(file: &str) -> BatchRequest {
    BatchRequest {
        input_file: file.to_owned(),
        endpoint: Endpoint::Embeddings,
        window: "24h".to_owned(),
        window_s: 24 * 3600,
        metadata: BTreeMap::new(),
        output_expires_after_s: None,
    }
}

pub(super) async fn batch_of(router: &Router, text: &str) -> Batch {
    let file = upload(router, "in.jsonl", "batch", text).await.unwrap();
    router.own().create_batch(request(&file)).await.unwrap()
}

pub(super) async fn until(router: &Router, id: &str, is_there: impl Fn(&Batch) -> bool) -> Batch {
    for _ in 0..2000 {
        let batch = router.own().batch(id).await.unwrap();
        if is_there(&batch) {
            return batch;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{:?}", router.own().batch(id).await.unwrap());
}

/// The lines of a file.
pub(super) async fn lines(router: &Router, file: Option<&str>) -> Vec<Value> {
    let Some(file) = file else { return vec![] };
    let (info, text) = content(router, file).await.unwrap();
    assert_eq!(info.purpose, "batch_output");
    text.lines().map(value).collect()
}

#[tokio::test]
async fn each_line_is_answered_once_whoever_is_killed() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let mut text: String = (0..30)
        .map(|i| line(&format!("r{i}"), &json!({"i": i})))
        .collect();
    text += "no JSON\n\n";
    text += &line("bad", &json!({"status": 400}));
    text += &line("r0", &json!({}));
    let edge = Edge::new(7);
    router.answer_batches(edge.answers());
    let batch = batch_of(&router, &text).await;
    assert_eq!((batch.status.as_str(), batch.tally.total), ("validating", 0));
    let id = batch.id;
    // Seven answers, and two lines that cannot be asked.
    let batch = until(&router, &id, |batch| batch.tally.completed == 7).await;
    assert_eq!(
        (batch.status.as_str(), batch.tally.total, batch.tally.failed),
        ("in_progress", 33, 2)
    );
    assert_eq!(router.store_lines(&id).await, 9);
    let first = edge.asked();
    router.abandon();
    drop(router);

    let (router, _engine) = house.open().await;
    let edge = Edge::new(usize::MAX);
    router.answer_batches(edge.answers());
    let batch = until(&router, &id, |batch| batch.finished_at.is_some()).await;
    assert_eq!(batch.status, "completed");
    let tally = batch.tally;
    assert_eq!((tally.total, tally.completed, tally.failed), (33, 30, 3));
    assert_eq!(router.store_lines(&id).await, 0, "they are files now");
    let asked = edge.asked();
    assert_eq!(asked.len(), 24, "what has an answer is not asked again");
    assert!(first.len() >= 7);
    let output = lines(&router, batch.output_file.as_deref()).await;
    let ids: Vec<String> = (0..30).map(|i| format!("r{i}")).collect();
    let found: Vec<&str> = output
        .iter()
        .map(|line| line["custom_id"].as_str().unwrap())
        .collect();
    assert_eq!(found, ids, "each once, in the order of the file");
    assert_eq!(output[3]["response"]["body"]["echo"], json!({"i": 3}));
    assert_eq!(output[3]["response"]["status_code"], 200);
    assert_eq!(output[3]["error"], Value::Null);
    let errors = lines(&router, batch.error_file.as_deref()).await;
    let errors: Vec<(&Value, &Value, &Value, &Value)> = errors
        .iter()
        .map(|line| {
            let response = &line["response"]["status_code"];
            (
                &line["custom_id"],
                response,
                &line["error"]["code"],
                &line["error"]["line"],
            )
        })
        .collect();
    let null = Value::Null;
    assert_eq!(
        errors,
        [
            (&null, &null, &json!("invalid_json_line"), &json!(31)),
            (&json!("bad"), &json!(400), &null, &null),
            (&json!("r0"), &null, &json!("duplicate_custom_id"), &json!(34)),
        ]
    );
}

#[test]
fn a_line_that_ends_its_server_each_time_is_given_up() {
    let house = House::new();
    let mut id = String::new();
    let asked_first = |asked: &Edge| asked.asked().first().map(|body| body["i"].clone());
    for life in 0..MAX_DEATHS {
        super::jobs::runtime().block_on(async {
            let (router, _engine) = house.open().await;
            let edge = Edge::new(0);
            router.answer_batches(edge.answers());
            if life == 0 {
                let text: String = (0..3).map(|i| line(&format!("r{i}"), &json!({"i": i}))).collect();
                id = batch_of(&router, &text).await.id;
            }
            while edge.asked().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            // Others may be asked beside it at first.
            tokio::time::sleep(Duration::from_millis(if life < 3 { 0 } else { 20 })).await;
            assert!(life < 3 || edge.asked().len() == 1, "{life}: {:?}", edge.asked());
            assert!(life < 3 || asked_first(&edge) == Some(json!(0)));
        });
    }
    super::jobs::runtime().block_on(async {
        let (router, _engine) = house.open().await;
        let edge = Edge::new(usize::MAX);
        router.answer_batches(edge.answers());
        let batch = until(&router, &id, |batch| batch.finished_at.is_some()).await;
        assert_eq!((batch.tally.completed, batch.tally.failed), (2, 1));
        let errors = lines(&router, batch.error_file.as_deref()).await;
        assert_eq!(errors[0]["custom_id"], "r0");
        assert_eq!(errors[0]["error"]["code"], "server_ended");
    });
}

#[tokio::test]
async fn a_batch_ends_in_each_of_its_ways() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let edge = Edge::new(2);
    router.answer_batches(edge.answers());

    let batch = batch_of(&router, "no\nrequests\n").await;
    let batch = until(&router, &batch.id, |batch| batch.finished_at.is_some()).await;
    assert_eq!((batch.status.as_str(), batch.errors.len()), ("failed", 2));
    assert_eq!((batch.output_file, batch.error_file), (None, None));
    let error = router.own().cancel_batch(&batch.id).await.unwrap_err();
    assert_eq!(error.to_string(), "Cannot cancel a batch with status 'failed'.");

    let text: String = (0..9).map(|i| line(&i.to_string(), &json!({"i": i}))).collect();
    let batch = batch_of(&router, &text).await;
    until(&router, &batch.id, |batch| batch.tally.completed == 2).await;
    let cancelled = router.own().cancel_batch(&batch.id).await.unwrap();
    assert_eq!(cancelled.status, "cancelling");
    let batch = until(&router, &batch.id, |batch| batch.finished_at.is_some()).await;
    assert_eq!(batch.status, "cancelled");
    assert_eq!(lines(&router, batch.output_file.as_deref()).await.len(), 2);
    assert_eq!(batch.error_file, None);

    edge.patience.store(1, Ordering::SeqCst);
    let file = upload(&router, "in.jsonl", "batch", &text).await.unwrap();
    let short = BatchRequest {
        window_s: 1,
        ..request(&file)
    };
    let batch = router.own().create_batch(short).await.unwrap();
    let batch = until(&router, &batch.id, |batch| batch.finished_at.is_some()).await;
    assert_eq!(batch.status, "expired");
    let output = lines(&router, batch.output_file.as_deref()).await;
    let errors = lines(&router, batch.error_file.as_deref()).await;
    assert_eq!((output.len() + errors.len(), output.len() <= 1), (9, true));
    assert!(errors.iter().all(|line| line["error"]["code"] == "batch_expired"));
    let page = router.own().batches(None, 2).await.unwrap();
    assert_eq!(
        (page.data[0].id.as_str(), page.has_more),
        (batch.id.as_str(), true)
    );
    let BatchNumbers {
        queued,
        running,
        completed_lines,
        failed_lines,
    } = router.batch_numbers();
    assert!(queued == 0 && running <= 1, "{queued} {running}");
    assert_eq!(completed_lines + failed_lines, 2 + 9);
    assert!((2..=3).contains(&completed_lines));

    // A row goes some time after its batch ended, once no file of answers is left.
    let store = &router.0.store;
    assert_eq!(store.delete_old_batches(3600).await.unwrap(), 0);
    assert_eq!(
        store.delete_old_batches(0).await.unwrap(),
        1,
        "the one without files"
    );
    for file in [&batch.output_file, &batch.error_file].into_iter().flatten() {
        router.own().delete_file(file).await.unwrap();
    }
    assert_eq!(store.delete_old_batches(0).await.unwrap(), 1);
    assert!(router.own().batch(&batch.id).await.is_err());
    assert_eq!(router.own().batches(None, 9).await.unwrap().data.len(), 1);
}

#[tokio::test]
async fn what_no_batch_can_be_is_refused() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let batch = upload(&router, "a.jsonl", "batch", "{}").await.unwrap();
    let other = upload(&router, "a.txt", "assistants", "{}").await.unwrap();
    let long = BTreeMap::from([("k".repeat(65), String::new())]);
    for (request, param) in [
        (request("file-none"), "input_file_id"),
        (request(&other), "input_file_id"),
        (
            BatchRequest {
                window_s: 0,
                ..request(&batch)
            },
            "completion_window",
        ),
        (
            BatchRequest {
                metadata: long,
                ..request(&batch)
            },
            "metadata",
        ),
        (
            BatchRequest {
                output_expires_after_s: Some(1),
                ..request(&batch)
            },
            "output_expires_after",
        ),
    ] {
        let error = router.own().create_batch(request).await.unwrap_err();
        assert_eq!(kind(&error), param, "{error}");
    }
    let stranger = Client {
        tenant: "other".parse().unwrap(),
        ..Client::default()
    };
    let made = router.own().create_batch(request(&batch)).await.unwrap();
    let error = router
        .of(&stranger)
        .create_batch(request(&batch))
        .await
        .unwrap_err();
    assert_eq!(kind(&error), "input_file_id");
    assert!(matches!(
        router.of(&stranger).batch(&made.id).await,
        Err(RouterError::Unknown { what: "batch", .. })
    ));
    assert!(
        router
            .of(&stranger)
            .batches(None, 10)
            .await
            .unwrap()
            .data
            .is_empty()
    );
}
