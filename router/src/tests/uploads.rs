//! Uploads in parts, over a real store.

use super::*;
use crate::uploads::UploadRequest;

pub(super) fn asked(purpose: &str, bytes: u64) -> UploadRequest {
    UploadRequest {
        filename: "rows.jsonl".to_owned(),
        purpose: purpose.to_owned(),
        bytes,
        expires_after_seconds: None,
    }
}

pub(super) async fn part(router: &Router, upload: &str, text: &str) -> Result<String, RouterError> {
    let staged = router.staging();
    std::fs::write(&staged, text).unwrap();
    let sha256 = Digest::of(text.as_bytes());
    let added = router.own().add_part(upload, &staged, sha256).await;
    let added = added.map(|part| part.id);
    let _ = std::fs::remove_file(&staged);
    added
}

fn stored_files(house: &House) -> usize {
    std::fs::read_dir(house.data().join("files")).unwrap().count()
}

#[tokio::test]
async fn parts_become_one_file_in_the_order_that_is_asked() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let upload = router.own().create_upload(asked("batch", 9)).await.unwrap();
    assert_eq!(
        (upload.status.as_str(), upload.expires_at - upload.created_at),
        ("pending", 3600)
    );
    let second = part(&router, &upload.id, "56789").await.unwrap();
    let first = part(&router, &upload.id, "1234").await.unwrap();
    assert_eq!(kind(&part(&router, &upload.id, "x").await.unwrap_err()), "data");
    router.abandon();
    drop(router);

    // Parts survive a kill.
    let (router, _engine) = house.open().await;
    let complete = async |ids: &[&String], md5: Option<&str>| {
        let ids: Vec<String> = ids.iter().map(|id| (*id).clone()).collect();
        router.own().complete_upload(&upload.id, &ids, md5).await
    };
    for (ids, md5, param) in [
        (&[&first][..], None, "part_ids"),
        (&[&first, &first], None, "part_ids"),
        (&[&first, &upload.id], None, "part_ids"),
        (&[&first, &second], Some("0"), "md5"),
    ] {
        assert_eq!(kind(&complete(ids, md5).await.unwrap_err()), param);
    }
    let done = complete(&[&first, &second], Some("25F9E794323B453885F5181F1B624D0B"))
        .await
        .unwrap();
    let file = done.file.unwrap();
    assert_eq!(
        (done.status.as_str(), file.bytes, file.purpose.as_str()),
        ("completed", 9, "batch")
    );
    assert_eq!(content(&router, &file.id).await.unwrap().1, "123456789");
    assert_eq!(stored_files(&house), 1, "the parts are gone");
    for error in [
        complete(&[&first, &second], None).await.unwrap_err(),
        part(&router, &upload.id, "").await.unwrap_err(),
        router.own().cancel_upload(&upload.id).await.unwrap_err(),
    ] {
        assert!(error.to_string().contains("is completed"), "{error}");
    }
}

#[tokio::test]
async fn uploads_are_checked_cancelled_and_their_owners_own() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    for (request, param) in [
        (asked("batch", 0), "bytes"),
        (asked("batch", u64::MAX), "bytes"),
        (asked("a b", 1), "purpose"),
        (
            UploadRequest {
                filename: "..".to_owned(),
                ..asked("batch", 1)
            },
            "filename",
        ),
        (
            UploadRequest {
                expires_after_seconds: Some(1),
                ..asked("batch", 1)
            },
            "expires_after",
        ),
    ] {
        assert_eq!(
            kind(&router.own().create_upload(request).await.unwrap_err()),
            param
        );
    }
    // A training file is checked as one that comes whole.
    let upload = router.own().create_upload(asked("fine-tune", 3)).await.unwrap();
    let id = part(&router, &upload.id, "{\"\n").await.unwrap();
    let error = router
        .own()
        .complete_upload(&upload.id, &[id], None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("ine 1"), "{error}");
    let stranger = Client {
        tenant: "other".parse().unwrap(),
        ..Client::default()
    };
    assert!(matches!(
        router.of(&stranger).cancel_upload(&upload.id).await,
        Err(RouterError::Unknown { what: "upload", .. })
    ));
    let cancelled = router.own().cancel_upload(&upload.id).await.unwrap();
    assert_eq!(cancelled.status, "cancelled");
    assert_eq!(stored_files(&house), 0);
}
