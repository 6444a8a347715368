//! What a disk did to uploaded bytes is found before they are used.

use super::batches::{batch_of, until};
use super::jobs::{create_job, request, wait};
use super::uploads::{asked, part};
use super::*;

/// Another letter where `what` begins, or at the end.
fn flip(path: &Path, what: &str) {
    let mut bytes = std::fs::read(path).unwrap();
    let place = bytes
        .windows(what.len())
        .position(|found| found == what.as_bytes());
    let place = place.unwrap_or(bytes.len() - 1);
    bytes[place] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn says(error: &str, id: &str, content: &str) {
    let digest = Digest::of(content.as_bytes()).to_string();
    assert!(
        error.contains(id) && error.contains(&digest) && error.contains("upload it again"),
        "{error}"
    );
}

#[tokio::test]
async fn a_flipped_byte_is_found_wherever_a_file_is_read() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let path = |id: &str| house.data().join("files").join(id);

    // A download: of one chunk nothing comes, of a longer file never the end.
    for (size, given) in [(0, 0), (9, 0), (3 << 20, 2 << 20)] {
        let text = "x".repeat(size);
        let id = upload(&router, "x", "user_data", &text).await.unwrap();
        assert!(content(&router, &id).await.unwrap().1 == text);
        match size {
            0 => std::fs::write(path(&id), "x").unwrap(),
            _ => flip(&path(&id), "none"),
        }
        let mut content = router.own().file_content(&id).await.unwrap();
        let mut came = 0;
        let error = loop {
            match content.next().await {
                Ok(chunk) => came += chunk.expect("not the end").len(),
                Err(error) => break error,
            }
        };
        assert_eq!(came, given);
        says(&error.to_string(), &id, &text);
    }

    // A job. The row is as well formed as before.
    let rows = chat_rows(3);
    let file = upload(&router, "rows.jsonl", "fine-tune", &rows).await.unwrap();
    flip(&path(&file), "hi");
    let id = create_job(&router, request(&file)).await;
    let job = wait(&router, &id, |job| job.status.ended()).await;
    let error = job.error.expect("it failed");
    assert_eq!(error.code, "invalid_training_file");
    says(&error.message, &file, &rows);

    // A batch.
    let line = json!({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "hi"}});
    let text = line.to_string();
    let batch = batch_of(&router, &text).await;
    flip(&path(&batch.request.input_file), "hi");
    router.answer_batches(std::sync::Arc::new(|_| panic!("no line is asked")));
    let batch = until(&router, &batch.id, |batch| batch.finished_at.is_some()).await;
    assert_eq!(batch.status, "failed");
    says(&batch.errors[0].message, &batch.request.input_file, &text);

    // A part of an upload, before it becomes a file.
    let upload = router.own().create_upload(asked("user_data", 4)).await.unwrap();
    let id = part(&router, &upload.id, "part").await.unwrap();
    let rows = router.0.store.parts(&upload.id).await.unwrap();
    flip(&path(&rows[0].file), "part");
    let error = router
        .own()
        .complete_upload(&upload.id, std::slice::from_ref(&id), None)
        .await;
    says(&error.unwrap_err().to_string(), &id, "part");
}
