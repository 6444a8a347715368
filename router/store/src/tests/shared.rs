//! Several stores on one Postgres, and artifacts in a bucket that a real S3 server keeps.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use object_store::aws::AmazonS3Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tandem_core::id::JobId;
use tandem_core::job::{Life, Saved, files};
use tokio::task::{AbortHandle, JoinSet};

use super::*;
use crate::folders::{Folders, Tenancy};
use crate::remote::Remote;

/// Short, so that a test can wait for its end.
const SHORT_LEASE: Duration = Duration::from_millis(300);

fn places(root: &Path, name: &str, url: &str) -> Places {
    Places {
        database_url: Some(url.to_owned()),
        artifact_url: Some(format!("file://{}", root.join("shared").display())),
        lease: SHORT_LEASE,
        ..Places::local(root.join(name))
    }
}

#[tokio::test]
async fn a_lease_has_one_holder_and_who_slept_writes_nothing() {
    let Some(url) = servers::database() else { return };
    let root = tempfile::tempdir().unwrap();
    let open = async |name| Store::open(&places(root.path(), name, &url)).await.unwrap();
    let (a, b) = tokio::join!(open("a"), open("b"));
    a.insert_job(job("ftjob-x", &[])).await.unwrap();
    let (_, lease) = a.claim_job(BASE, &["queued"], &[]).await.unwrap().unwrap();
    assert_eq!(lease.epoch(), 1);
    assert!(b.claim_job(BASE, &["queued"], &[]).await.unwrap().is_none());
    assert_eq!(
        a.renew_lease("ftjob-x", lease).await.unwrap(),
        Renewal::Held {
            asked: Asked::Nothing
        }
    );
    let before = b.changes().await.unwrap();
    b.ask("ftjob-x", Asked::Pause).await.unwrap();
    assert!(a.changes().await.unwrap().jobs > before.jobs);
    assert_eq!(
        a.renew_lease("ftjob-x", lease).await.unwrap(),
        Renewal::Held { asked: Asked::Pause }
    );
    // A pause can be withdrawn, an end cannot.
    for (asked, expected) in [
        (Asked::Nothing, Asked::Nothing),
        (Asked::Cancel, Asked::Cancel),
        (Asked::Pause, Asked::Cancel),
        (Asked::Nothing, Asked::Cancel),
    ] {
        b.ask("ftjob-x", asked).await.unwrap();
        let held = Renewal::Held { asked: expected };
        assert_eq!(a.renew_lease("ftjob-x", lease).await.unwrap(), held);
    }
    // `a` sleeps until `b` may.
    let (row, next) = loop {
        if let Some(claimed) = b.claim_job(BASE, &["queued", "running"], &[]).await.unwrap() {
            break claimed;
        }
        tokio::time::sleep(SHORT_LEASE / 10).await;
    };
    assert_eq!((row.id.as_str(), next.epoch()), ("ftjob-x", 2));
    assert_eq!(a.renew_lease("ftjob-x", lease).await.unwrap(), Renewal::Lost);
    let digest = a
        .publish_adapter(&adapter(root.path(), "one"), Placement::Copy, u64::MAX)
        .await
        .unwrap();
    let ended = |holder, name| JobChange {
        from: &["queued"],
        holder: Some(holder),
        status: Some("succeeded"),
        ends: true,
        saved: Some(Saved { epoch: 2, step: 7 }),
        name: Some(name),
        ..JobChange::default()
    };
    let slept = a.change_job("ftjob-x", ended(lease, name("slept", digest))).await;
    assert!(slept.unwrap().is_none());
    assert!(a.names(BASE).await.unwrap().is_empty());
    let awake = b.change_job("ftjob-x", ended(next, name("awake", digest))).await;
    assert!(awake.unwrap().is_some());
    let row = a.job("ftjob-x").await.unwrap().unwrap();
    assert_eq!(row.saved, Some(Saved { epoch: 2, step: 7 }));
    assert_eq!(a.names(BASE).await.unwrap()[0].name, "awake");
    assert_eq!(
        b.renew_lease("ftjob-x", next).await.unwrap(),
        Renewal::Lost,
        "it has ended"
    );
    // A name that is gone leaves its adapter for a while: another router may be about to use it.
    a.remove_names(BASE, ["awake"]).await.unwrap();
    assert!(!b.remove_adapter_if_unnamed(digest).await.unwrap());
    // And longer, as long as one says that its requests have it.
    let age = async || {
        let aged = sqlx::query("UPDATE adapters SET created_at = 0").execute(&a.db.raw_pool);
        aged.await.unwrap();
    };
    age().await;
    a.keep_unnamed([digest]).await.unwrap();
    assert_eq!(b.delete_unnamed_adapters().await.unwrap(), 0);
    age().await;
    assert_eq!(b.delete_unnamed_adapters().await.unwrap(), 1);
}

#[tokio::test]
async fn a_batch_has_one_holder_and_each_line_one_answer() {
    let Some(url) = servers::database() else { return };
    let root = tempfile::tempdir().unwrap();
    let open = async |name| Store::open(&places(root.path(), name, &url)).await.unwrap();
    let (a, b) = tokio::join!(open("a"), open("b"));
    let made = a
        .insert_batch(NewBatch {
            base: BASE,
            tenant: Tenant::default(),
            status: "validating",
            expires_after_s: 3600,
            request: "{}".to_owned(),
            key_id: None,
        })
        .await
        .unwrap();
    let id = made.id.as_str();
    let (row, lease) = a.claim_batch(BASE, false).await.unwrap().unwrap();
    assert_eq!(row, made);
    assert!(b.claim_batch(BASE, false).await.unwrap().is_none());
    let begins = BatchChange::Begins { total: 3 };
    assert!(
        a.change_batch(id, lease, &["validating"], "in_progress", begins)
            .await
            .unwrap()
    );
    let line = |line, ok, answer: &str| BatchLine {
        line,
        ok,
        answer: answer.to_owned(),
    };
    let first = [line(1, true, "one"), line(2, false, "two")];
    assert!(a.keep_batch_lines(id, lease, &first).await.unwrap());
    // `a` sleeps until `b` may.
    let (row, next) = loop {
        if let Some(claimed) = b.claim_batch(BASE, false).await.unwrap() {
            break claimed;
        }
        tokio::time::sleep(SHORT_LEASE / 10).await;
    };
    let tally = |completed, failed| Tally {
        total: 3,
        completed,
        failed,
    };
    assert_eq!((row.tally, row.status.as_str()), (tally(1, 1), "in_progress"));
    assert!(
        !a.keep_batch_lines(id, lease, &[line(3, true, "late")])
            .await
            .unwrap()
    );
    assert_eq!(a.renew_batch(id, lease).await.unwrap(), Renewal::Lost);
    assert_eq!(b.answered_batch_lines(id).await.unwrap(), [1, 2].into());
    assert!(
        b.keep_batch_lines(id, next, &[line(2, true, "again"), line(3, true, "three")])
            .await
            .unwrap()
    );
    assert_eq!(
        b.batch(id).await.unwrap().unwrap().tally,
        tally(2, 1),
        "the first answer counts"
    );
    let kept = [line(2, false, "two"), line(3, true, "three")];
    assert_eq!(b.batch_lines(id, 1, 10).await.unwrap(), kept);
    assert!(a.cancel_batch(id, &["in_progress"], "cancelling").await.unwrap());
    assert_eq!(
        b.renew_batch(id, next).await.unwrap(),
        Renewal::Held { asked: Asked::Cancel }
    );
    let end = |status| BatchEnd {
        status,
        errors: None,
        output: None,
        error: None,
    };
    assert!(!a.end_batch(id, lease, end("completed")).await.unwrap());
    assert!(b.end_batch(id, next, end("cancelled")).await.unwrap());
    let row = a.batch(id).await.unwrap().unwrap();
    assert_eq!(
        (row.status.as_str(), row.finished_at.is_some()),
        ("cancelled", true)
    );
    assert!(a.batch_lines(id, 0, 10).await.unwrap().is_empty());
    assert!(a.claim_batch(BASE, false).await.unwrap().is_none());
    assert_eq!(a.batches(None, None, 10).await.unwrap().rows, [row]);
}

#[tokio::test]
async fn claims_at_the_same_moment_take_different_jobs() {
    let Some(url) = servers::database() else { return };
    let root = tempfile::tempdir().unwrap();
    let mut stores = vec![];
    for name in ["a", "b", "c", "d"] {
        let store = Store::open(&places(root.path(), name, &url)).await.unwrap();
        store.insert_job(job(name, &[])).await.unwrap();
        stores.push(store);
    }
    let claims = stores.iter().map(|store| async {
        store
            .claim_job(BASE, &["queued"], &[])
            .await
            .unwrap()
            .unwrap()
            .0
            .id
    });
    let mut claimed = futures::future::join_all(claims).await;
    claimed.sort();
    assert_eq!(claimed, ["a", "b", "c", "d"]);
}

#[tokio::test]
async fn a_newer_database_and_one_without_shared_artifacts_are_refused() {
    let Some(url) = servers::database() else { return };
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&places(root.path(), "a", &url)).await.unwrap();
    sqlx::query("UPDATE tandem_schema SET version = 99")
        .execute(&store.db.raw_pool)
        .await
        .unwrap();
    let alone = Places {
        artifact_url: None,
        ..places(root.path(), "b", &url)
    };
    for (places, expected) in [
        (
            places(root.path(), "b", &url),
            "version 99, this program knows versions up to 13",
        ),
        (alone, "needs an artifact store"),
        (
            places(root.path(), "b", "mysql://host/db"),
            "the database is postgres://",
        ),
    ] {
        let refused = Store::open(&places)
            .await
            .err()
            .expect("it is refused")
            .to_string();
        assert!(refused.contains(expected), "{refused}");
    }
}

/// An S3 server on a free port, which a test may stop and start again, and the caches before its one bucket.
struct Bucket {
    root: PathBuf,
    address: SocketAddr,
    caches: AtomicUsize,
    server: Mutex<Option<AbortHandle>>,
}

impl Bucket {
    async fn start(root: &Path) -> Bucket {
        fs::create_dir_all(root.join("s3/bucket")).unwrap();
        let bucket = Bucket {
            root: root.to_owned(),
            address: ([127, 0, 0, 1], 0).into(),
            caches: AtomicUsize::new(0),
            server: Mutex::new(None),
        };
        Bucket {
            address: bucket.serve().await,
            ..bucket
        }
    }

    async fn serve(&self) -> SocketAddr {
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(self.root.join("s3")).unwrap());
        service.set_auth(SimpleAuth::from_single("key", "secret"));
        let service = service.build();
        let listener = tokio::net::TcpListener::bind(self.address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            // They end with this task.
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = service.clone();
                connections.spawn(async move {
                    let connection = Builder::new(TokioExecutor::new());
                    // A client that leaves is no failure of the server's.
                    let _ = connection.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        *self.server.lock().unwrap() = Some(server.abort_handle());
        address
    }

    fn stop(&self) {
        self.server.lock().unwrap().take().unwrap().abort();
    }

    /// Another process's view of what lies under `prefix`.
    fn open(&self, prefix: &str) -> Artifacts {
        let builder = AmazonS3Builder::new()
            .with_endpoint(format!("http://{}", self.address))
            .with_allow_http(true)
            .with_region("us-east-1")
            .with_access_key_id("key")
            .with_secret_access_key("secret");
        let remote = Remote::bucket(&format!("s3://bucket/{prefix}"), builder).unwrap();
        let number = self.caches.fetch_add(1, Ordering::Relaxed);
        let cache = self.root.join(format!("cache-{number}"));
        Artifacts::with_remote(Folders::make(&cache, Tenancy::Guest).unwrap(), Some(remote))
    }
}

async fn publish(artifacts: &Artifacts, folder: &Path) -> Digest {
    let staged = artifacts
        .stage_adapter(folder, Placement::Copy, u64::MAX)
        .await
        .unwrap();
    artifacts.publish_adapter(staged).await.unwrap()
}

/// What a request may take to hear that a part is away.
const SOON: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_database_that_goes_is_said_soon_and_comes_back() {
    let Some(server) = servers::Own::new() else { return };
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&places(root.path(), "a", &server.url()))
        .await
        .unwrap();
    store.insert_job(job("ftjob-x", &[])).await.unwrap();
    server.stop();
    // Nobody has noticed yet: the one who asks finds out.
    let error = tokio::time::timeout(SOON, store.job("ftjob-x"))
        .await
        .expect("soon")
        .unwrap_err();
    assert_eq!(error.away(), Some(Part::Database), "{error}");
    // From the next probe on, nothing is tried.
    store.probe().await;
    assert_eq!(store.away(), [Part::Database]);
    for error in [
        store.job("ftjob-x").await.unwrap_err(),
        store.insert_job(job("ftjob-y", &[])).await.unwrap_err(),
    ] {
        assert!(
            matches!(
                error,
                StoreError::Away {
                    part: Part::Database,
                    ..
                }
            ),
            "{error}"
        );
    }
    // An upload leaves no bytes that no row names.
    let staged = store.staging();
    fs::write(&staged, "{}").unwrap();
    store
        .add_file(&staged, new_file("{}", "t.jsonl", "fine-tune", None), None)
        .await
        .unwrap_err();
    assert_eq!(
        fs::read_dir(root.path().join("shared/files")).map_or(0, Iterator::count),
        0
    );
    server.start();
    store.probe().await;
    assert_eq!(store.away(), []);
    assert!(store.job("ftjob-x").await.unwrap().is_some());
    store
        .add_file(&staged, new_file("{}", "t.jsonl", "fine-tune", None), None)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_bucket_that_goes_is_said_soon_and_a_job_waits_for_it() {
    let root = tempfile::tempdir().unwrap();
    let bucket = Bucket::start(root.path()).await;
    let artifacts = bucket.open("");
    let digest = publish(&artifacts, &adapter(root.path(), "one")).await;
    bucket.stop();
    let upload = async || {
        let staged = artifacts.folders().staging();
        fs::write(&staged, "{}").unwrap();
        artifacts.publish_file(&staged, "file-x").await
    };
    let error = tokio::time::timeout(SOON, upload())
        .await
        .expect("soon")
        .unwrap_err();
    assert_eq!(error.away(), Some(Part::Storage), "{error}");
    artifacts.probe().await;
    assert!(artifacts.is_away());
    let error = upload().await.unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::Away {
                part: Part::Storage,
                ..
            }
        ),
        "{error}"
    );
    // What is here is served.
    assert!(artifacts.adapter(digest).await.unwrap().exists());
    // A job's state is kept as soon as that is possible.
    let id: JobId = "ftjob-x".parse().unwrap();
    let life = artifacts.folders().life(id.as_str(), 1);
    fs::create_dir_all(&life).unwrap();
    fs::write(life.join(files::STATE), "after 5").unwrap();
    let back = async {
        bucket.serve().await;
        artifacts.probe().await;
    };
    let result = artifacts.publish_result(b"step", "file-result");
    let (pushed, result, ()) = tokio::join!(artifacts.push_job(&id, 1, 5), result, back);
    pushed.unwrap();
    assert_eq!(result.unwrap(), 4);
    assert!(!artifacts.is_away());
    upload().await.unwrap();
    let kept = root.path().join("s3/bucket/jobs/ftjob-x/1/5").join(files::STATE);
    assert_eq!(fs::read_to_string(kept).unwrap(), "after 5");
}

#[tokio::test]
async fn what_one_process_puts_into_a_bucket_another_gets() {
    let root = tempfile::tempdir().unwrap();
    let bucket = Bucket::start(root.path()).await;
    let open = |prefix| bucket.open(prefix);
    let (a, b) = (open("some/prefix"), open("some/prefix"));

    let digest = publish(&a, &adapter(root.path(), "one")).await;
    let folder = b.adapter(digest).await.unwrap();
    assert_eq!(
        fs::read_to_string(folder.join("adapter_model.safetensors")).unwrap(),
        "one"
    );
    assert_eq!(b.adapter(digest).await.unwrap(), folder);
    // What a disk has done to a cache since the last run costs a download.
    let c = open("some/prefix");
    let cached = c.folders().adapter(&digest);
    fs::create_dir_all(&cached).unwrap();
    fs::copy(
        folder.join("adapter_config.json"),
        cached.join("adapter_config.json"),
    )
    .unwrap();
    fs::write(cached.join("adapter_model.safetensors"), "onf").unwrap();
    let again = c.adapter(digest).await.unwrap().join("adapter_model.safetensors");
    assert_eq!(fs::read_to_string(&again).unwrap(), "one");
    // Who brings a sound copy mends it, too.
    fs::write(&again, "onf").unwrap();
    assert_eq!(publish(&c, &adapter(root.path(), "one")).await, digest);
    assert_eq!(fs::read_to_string(&again).unwrap(), "one");

    // Larger than a part: it goes up in pieces and is never in memory whole.
    let staged = a.folders().staging();
    let large = "0123456789abcdef".repeat((9 << 20) / 16);
    fs::write(&staged, &large).unwrap();
    assert_eq!(
        a.publish_file(&staged, "file-x").await.unwrap(),
        large.len() as u64
    );
    let path = b.file("file-x").await.unwrap();
    assert!(fs::read_to_string(path).unwrap() == large);

    // The same adapter elsewhere is not visible there, half of one nowhere, and a damaged one is refused.
    assert!(open("other").adapter(digest).await.is_err());
    let served = root
        .path()
        .join("s3/bucket/some/prefix/adapters")
        .join(digest.to_string());
    fs::write(served.join("adapter_model.safetensors"), "two").unwrap();
    let damaged = open("some/prefix").adapter(digest).await.unwrap_err();
    assert!(
        damaged.to_string().contains("is damaged: its digest is"),
        "{damaged}"
    );
    fs::remove_file(served.join("complete")).unwrap();
    let half = open("some/prefix").adapter(digest).await.unwrap_err();
    assert!(
        matches!(half, StoreError::Adapter { missing: true, .. }),
        "{half}"
    );

    a.remove_adapter(&digest).await.unwrap();
    a.remove_file("file-x").await.unwrap();
    assert!(open("some/prefix").file("file-x").await.is_err());
}

/// What a disk has done to a cached file costs a download; what it has done to the file itself is said.
#[tokio::test]
async fn a_damaged_copy_of_a_file_is_fetched_again() {
    let root = tempfile::tempdir().unwrap();
    let place = root.path().join("shared");
    let store = Store::open(&Places {
        artifact_url: Some(place.display().to_string()),
        ..Places::local(root.path().join("data"))
    })
    .await
    .unwrap();
    let staged = store.staging();
    fs::write(&staged, "rows").unwrap();
    let new = new_file("rows", "rows.jsonl", "fine-tune", None);
    let row = store.add_file(&staged, new, None).await.unwrap();
    let copy = store.file_path(&row).await.unwrap();
    fs::write(&copy, "rowt").unwrap();
    let path = store.sound_file(&row).await.unwrap();
    assert_eq!(fs::read_to_string(path).unwrap(), "rows");
    fs::write(&copy, "rowt").unwrap();
    fs::write(place.join("files").join(&row.id), "rowt").unwrap();
    let error = store.sound_file(&row).await.unwrap_err();
    assert!(matches!(error, StoreError::Altered { .. }), "{error}");
}

/// One that is older than digests gets its own when it is next read whole, if it has as many bytes as its row says.
#[tokio::test]
async fn a_file_without_a_digest_gets_one() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let staged = store.staging();
        fs::write(&staged, "rows").unwrap();
        let new = new_file("rows", "rows.jsonl", "fine-tune", None);
        let id = store.add_file(&staged, new, None).await.unwrap().id;
        let forgotten = "UPDATE files SET sha256 = NULL";
        sqlx::query(forgotten).execute(&store.db.raw_pool).await.unwrap();
        let row = async || store.file(&id).await.unwrap().unwrap();
        let old = row().await;
        let path = store.file_path(&old).await.unwrap();
        assert!(store.check_file(&old, 3, Digest::of(b"row")).await.is_err());
        assert_eq!(row().await.sha256, None);
        fs::write(&path, "rows").unwrap();
        store.sound_file(&old).await.unwrap();
        assert_eq!(row().await.sha256, Some(Digest::of(b"rows").to_string()));
    }
}

#[tokio::test]
async fn a_job_goes_on_in_another_process() {
    let root = tempfile::tempdir().unwrap();
    let bucket = Bucket::start(root.path()).await;
    let open = |prefix| bucket.open(prefix);
    let (router, first, second) = (open(""), open(""), open(""));
    let id: JobId = "ftjob-x".parse().unwrap();
    fs::create_dir_all(router.job_folder(id.as_str())).unwrap();
    fs::write(router.job_folder(id.as_str()).join(files::TRAIN), "tokens").unwrap();
    router.push_datasets(id.as_str()).await.unwrap();

    let folder = first
        .pull_job(
            &id,
            Life {
                epoch: 1,
                saved: None,
            },
        )
        .await
        .unwrap();
    assert_eq!(fs::read_to_string(folder.join(files::TRAIN)).unwrap(), "tokens");
    assert!(!folder.join(files::VALID).exists() && !folder.join(files::STATE).exists());
    fs::write(folder.join(files::STATE), "after 5").unwrap();
    first.push_job(&id, 1, 5).await.unwrap();
    fs::write(folder.join(files::STATE), "after 10").unwrap();
    first.push_job(&id, 1, 10).await.unwrap();

    // A copy that is damaged is fetched again.
    fs::write(first.job_folder(id.as_str()).join(files::TRAIN), "tokans").unwrap();
    let life = |epoch| Life { epoch, saved: None };
    let again = first.pull_job(&id, life(9)).await.unwrap();
    assert_eq!(fs::read_to_string(again.join(files::TRAIN)).unwrap(), "tokens");

    let saved = Some(Saved { epoch: 1, step: 5 });
    let folder = second.pull_job(&id, Life { epoch: 2, saved }).await.unwrap();
    let state = |folder: &Path| fs::read_to_string(folder.join(files::STATE)).unwrap();
    assert_eq!(
        state(&folder),
        "after 5",
        "the state that a row names, and no other"
    );
    second.push_job(&id, 2, 10).await.unwrap();
    second.drop_state(&id, Saved { epoch: 1, step: 5 }).await.unwrap();
    // The first wakes up: it writes into a life that nobody goes on from.
    first.push_job(&id, 1, 15).await.unwrap();
    let third = open("");
    let saved = Some(Saved { epoch: 2, step: 10 });
    assert_eq!(
        state(&third.pull_job(&id, Life { epoch: 3, saved }).await.unwrap()),
        "after 5"
    );
    router.remove_job(id.as_str()).await.unwrap();
    second.forget_job(&id).await.unwrap();
    assert!(open("").pull_job(&id, Life::default()).await.is_err() && !folder.exists());
}
