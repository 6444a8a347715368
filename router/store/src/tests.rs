//! The store on a real file system: locks, versions, sweeps, and what a reopening finds.

mod full;
mod lost;
mod servers;
mod shared;
mod stored;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tandem_core::id::Digest;

use super::*;

const BASE: Digest = Digest([1; 32]);

fn adapter(root: &Path, tensors: &str) -> PathBuf {
    let folder = root.join("source");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("adapter_config.json"), "{}").unwrap();
    fs::write(folder.join("adapter_model.safetensors"), tensors).unwrap();
    folder
}

fn name(name: &str, digest: Digest) -> NewName {
    NewName {
        base: BASE,
        name: name.to_owned(),
        digest,
        rank: 8,
        source: Source::Loaded,
    }
}

/// A store of each kind that can be had here.
async fn each_kind(root: &Path) -> Vec<Store> {
    let mut places = vec![Places::local(root.join("sqlite"))];
    places.extend(servers::database().map(|url| Places {
        database_url: Some(url),
        artifact_url: Some(format!("file://{}", root.join("postgres-artifacts").display())),
        ..Places::local(root.join("postgres"))
    }));
    let mut stores = vec![];
    for places in &places {
        stores.push(Store::open(places).await.unwrap());
    }
    stores
}

#[tokio::test]
async fn responses_stay_within_their_bytes_and_age() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let keep = Keep {
            bytes: 100,
            age_s: 3600,
        };
        let row = |id: &str, tenant: &str, previous: Option<&str>, input: &str| ResponseRow {
            id: id.to_owned(),
            tenant: tenant.to_owned(),
            created_at: now(),
            previous: previous.map(str::to_owned),
            input: input.to_owned(),
            response: "{}".to_owned(),
        };
        let ids = |rows: Vec<ResponseRow>| rows.into_iter().map(|row| row.id).collect::<Vec<_>>().join(" ");
        let chain = async |id: &str, bytes| ids(store.conversation(id, bytes, keep).await.unwrap());
        for (row, is_kept) in [
            (row("a", "x", None, &"a".repeat(28)), true),
            (row("b", "x", Some("a"), &"b".repeat(28)), true),
            (row("huge", "x", None, &"c".repeat(99)), false),
            (row("c", "x", Some("b"), &"c".repeat(28)), true),
            (row("z", "y", None, &"z".repeat(98)), true),
        ] {
            assert_eq!(
                store.keep_response(&row, keep).await.unwrap(),
                is_kept,
                "{}",
                row.id
            );
            assert_eq!(
                store.response(&row.id, keep).await.unwrap(),
                Some(row).filter(|_| is_kept)
            );
        }
        assert_eq!(chain("c", 1000).await, "a b c");
        // As much as is asked for, from the newest on.
        assert_eq!(chain("c", 60).await, "b c");
        assert_eq!(chain("none", 1000).await, "");
        // One more of this tenant, and its oldest goes; the other's stays.
        store
            .keep_response(&row("d", "x", Some("c"), "d"), keep)
            .await
            .unwrap();
        store
            .keep_response(&row("e", "x", Some("d"), &"e".repeat(20)), keep)
            .await
            .unwrap();
        assert_eq!(chain("e", 1000).await, "b c d e");
        assert!(store.response("a", keep).await.unwrap().is_none());
        assert!(store.response("z", keep).await.unwrap().is_some());
        assert!(store.delete_response("d").await.unwrap());
        assert!(!store.delete_response("d").await.unwrap());
        assert_eq!(chain("e", 1000).await, "e");
        // What is too old is gone before it is removed.
        let old = ResponseRow {
            created_at: now() - 3601,
            ..row("old", "w", None, "")
        };
        store.keep_response(&old, keep).await.unwrap();
        assert!(store.response("old", keep).await.unwrap().is_none());
        assert_eq!(chain("old", 1000).await, "");
        assert_eq!(store.delete_expired_responses(keep).await.unwrap(), 1);
        assert_eq!(store.delete_expired_responses(keep).await.unwrap(), 0);
    }
}

fn new_file(
    content: &str,
    filename: &'static str,
    purpose: &'static str,
    expires_after_s: Option<u64>,
) -> NewFile<'static> {
    static TENANT: std::sync::LazyLock<Tenant> = std::sync::LazyLock::new(Tenant::default);
    NewFile {
        filename,
        purpose,
        expires_after_s,
        tenant: &TENANT,
        sha256: Digest::of(content.as_bytes()),
    }
}

fn job(id: &str, metadata: &[(&str, &str)]) -> NewJob {
    NewJob {
        id: id.to_owned(),
        base: BASE,
        tenant: Tenant::default(),
        key_id: None,
        kept_bytes: 0,
        status: "queued".to_owned(),
        request: "{}".to_owned(),
        metadata: metadata
            .iter()
            .map(|&(key, value)| (key.to_owned(), value.to_owned()))
            .collect(),
        model_names: vec![format!("m:{id}")],
        events: vec![],
    }
}

#[tokio::test]
async fn one_folder_has_one_owner_and_no_future() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&Places::local(root.path())).await.unwrap();
    let second = Store::open(&Places::local(root.path()))
        .await
        .err()
        .expect("the folder is in use");
    assert!(matches!(second, StoreError::Locked(_)), "{second}");
    // Who only looks changes nothing, not of an older version either.
    assert!(names_in(root.path()).await.is_ok());
    sqlx::query("PRAGMA user_version = 12")
        .execute(&store.db.raw_pool)
        .await
        .unwrap();
    let older = names_in(root.path()).await;
    assert!(matches!(older, Err(StoreError::Older { found: 12, .. })));
    let version: i64 = sqlx::query_scalar("PRAGMA user_version")
        .fetch_one(&store.db.raw_pool)
        .await
        .unwrap();
    assert_eq!(version, 12);
    sqlx::query("PRAGMA user_version = 99")
        .execute(&store.db.raw_pool)
        .await
        .unwrap();
    store.close().await;
    drop(store);
    let newer = Store::open(&Places::local(root.path()))
        .await
        .err()
        .expect("the tables are newer");
    assert!(
        matches!(
            newer,
            StoreError::Newer {
                found: 99,
                known: 13,
                ..
            }
        ),
        "{newer}"
    );
}

#[tokio::test]
async fn what_was_acknowledged_is_there_and_what_was_half_done_is_not() {
    let root = tempfile::tempdir().unwrap();
    let (file, digest);
    {
        let store = Store::open(&Places::local(root.path())).await.unwrap();
        let staged = store.staging();
        fs::write(&staged, "rows").unwrap();
        file = store
            .add_file(&staged, new_file("rows", "rows.jsonl", "fine-tune", None), None)
            .await
            .unwrap();
        digest = store
            .publish_adapter(&adapter(root.path(), "one"), Placement::Copy, u64::MAX)
            .await
            .unwrap();
        store
            .swap_name(&name("pet", digest), Tenant::DEFAULT, None)
            .await
            .unwrap()
            .expect("the name was free");
        // As a kill leaves them: an upload, a published file without a row, an adapter without a name, an ended job's folder.
        fs::write(store.staging(), "half").unwrap();
        let staged = store.staging();
        fs::write(&staged, "result").unwrap();
        store
            .publish_file(&staged, new_file("result", "r.csv", "fine-tune-results", None))
            .await
            .unwrap();
        store
            .publish_adapter(&adapter(root.path(), "two"), Placement::Copy, u64::MAX)
            .await
            .unwrap();
        store.insert_job(job("ftjob-ended", &[])).await.unwrap();
        fs::create_dir_all(store.job_folder("ftjob-ended")).unwrap();
        let ended = JobChange {
            from: &["queued"],
            status: Some("failed"),
            ends: true,
            ..JobChange::default()
        };
        store.change_job("ftjob-ended", ended).await.unwrap();
    }
    let store = Store::open(&Places::local(root.path())).await.unwrap();
    assert_eq!(store.file(&file.id).await.unwrap().as_ref(), Some(&file));
    assert_eq!(
        fs::read_to_string(store.file_path(&file).await.unwrap()).unwrap(),
        "rows"
    );
    assert_eq!(store.names(BASE).await.unwrap()[0].digest, digest);
    assert!(
        store.names(Digest([2; 32])).await.unwrap().is_empty(),
        "names belong to their base"
    );
    for (kind, n) in [("staging", 0), ("files", 1), ("adapters", 1), ("jobs", 0)] {
        assert_eq!(fs::read_dir(root.path().join(kind)).unwrap().count(), n, "{kind}");
    }
}

#[tokio::test]
async fn a_name_moves_only_from_where_it_is_expected() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let one = store
            .publish_adapter(&adapter(root.path(), "one"), Placement::Copy, u64::MAX)
            .await
            .unwrap();
        let two = store
            .publish_adapter(&adapter(root.path(), "two"), Placement::Link, u64::MAX)
            .await
            .unwrap();
        let again = store
            .publish_adapter(&adapter(root.path(), "one"), Placement::Copy, u64::MAX)
            .await
            .unwrap();
        assert_eq!(one, again);
        for (expected, digest, moved) in [
            (None, one, true),
            (None, two, false),
            (Some(two), two, false),
            (Some(one), two, true),
        ] {
            let row = store
                .swap_name(&name("pet", digest), Tenant::DEFAULT, expected)
                .await
                .unwrap();
            assert_eq!(row.is_some(), moved, "{expected:?} -> {digest}");
        }
        assert!(!store.remove_adapter_if_unnamed(two).await.unwrap());
        // Where others may be about to name it, it stays for a while.
        assert_eq!(
            store.remove_adapter_if_unnamed(one).await.unwrap(),
            !store.is_shared()
        );
        assert_eq!(
            store.adapter_folder(one).await.unwrap().exists(),
            store.is_shared()
        );
        assert!(store.adapter_folder(two).await.unwrap().exists());
        assert!(
            store.remove_names(BASE, ["pet"]).await.unwrap() == 1
                && store.remove_names(BASE, ["pet"]).await.unwrap() == 0
        );
    }
}

#[tokio::test]
async fn a_change_is_whole_or_not_at_all() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        store.insert_job(job("ftjob-a", &[])).await.unwrap();
        let digest = store
            .publish_adapter(&adapter(root.path(), "one"), Placement::Copy, u64::MAX)
            .await
            .unwrap();
        let success = |from| JobChange {
            from,
            status: Some("succeeded"),
            ends: true,
            events: vec![NewEvent {
                level: "info",
                message: "done".to_owned(),
                data: "null".to_owned(),
            }],
            name: Some(name("made", digest)),
            ..JobChange::default()
        };
        assert!(
            store
                .change_job("ftjob-a", success(&["running"]))
                .await
                .unwrap()
                .is_none()
        );
        assert!(store.names(BASE).await.unwrap().is_empty());
        assert!(
            store
                .job_events("ftjob-a", None, 10)
                .await
                .unwrap()
                .rows
                .is_empty()
        );
        let row = store
            .change_job("ftjob-a", success(&["running", "queued"]))
            .await
            .unwrap()
            .unwrap()
            .name
            .unwrap();
        assert_eq!(store.names(BASE).await.unwrap(), [row]);
        let job = store.job("ftjob-a").await.unwrap().unwrap();
        assert!(job.status == "succeeded" && job.finished_at.is_some());
        assert!(
            store
                .claim_job(BASE, &["queued", "running"], &[])
                .await
                .unwrap()
                .is_none()
        );
    }
}

#[tokio::test]
async fn jobs_are_found_by_their_metadata_and_paged() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        for (id, metadata) in [
            ("a", &[][..]),
            ("b", &[("k", "v"), ("x", "1")]),
            ("c", &[("k", "w")]),
            ("d", &[("k", "v")]),
        ] {
            store.insert_job(job(id, metadata)).await.unwrap();
        }
        let pairs = |pairs: &[(&str, &str)]| {
            MetadataFilter::Pairs(
                pairs
                    .iter()
                    .map(|&(key, value)| (key.to_owned(), value.to_owned()))
                    .collect(),
            )
        };
        let cases = [
            (None, 10, MetadataFilter::Any, "dcba", false),
            (None, 2, MetadataFilter::Any, "dc", true),
            (Some("c"), 2, MetadataFilter::Any, "ba", false),
            (None, 10, MetadataFilter::None, "a", false),
            (None, 10, pairs(&[("k", "v")]), "db", false),
            (None, 10, pairs(&[("k", "v"), ("x", "1")]), "b", false),
            (None, 10, pairs(&[("k", "' OR 1=1 --")]), "", false),
            (None, 10, MetadataFilter::Pairs(BTreeMap::new()), "dcba", false),
        ];
        for (after, limit, filter, expected, has_more) in cases {
            let page = store.jobs(None, after, limit, &filter).await.unwrap();
            let ids: String = page.rows.into_iter().map(|row| row.id).collect();
            assert_eq!((ids.as_str(), page.has_more), (expected, has_more), "{filter:?}");
        }
        assert_eq!(
            store
                .claim_job(BASE, &["queued"], &[])
                .await
                .unwrap()
                .unwrap()
                .0
                .id,
            "a",
            "the oldest first"
        );
        assert_eq!(store.count_stranded_jobs(Digest([2; 32])).await.unwrap(), 4);
    }
}

/// Of two tenants: the second's only one before the first's others, and where many are worked on it alone.
#[tokio::test]
async fn work_is_claimed_for_the_tenant_of_whom_least_is_held() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        for (i, tenant) in ["x", "x", "x", "y"].into_iter().enumerate() {
            let tenant: Tenant = tenant.parse().unwrap();
            let batch = NewBatch {
                base: BASE,
                tenant: tenant.clone(),
                status: "validating",
                expires_after_s: 3600,
                request: "{}".to_owned(),
                key_id: None,
            };
            store.insert_batch(batch).await.unwrap();
            let job = NewJob {
                tenant,
                ..job(&format!("{i}"), &[])
            };
            store.insert_job(job).await.unwrap();
        }
        let mut tenants = vec![];
        for is_crowded in [false, true, true, false] {
            let claimed = store.claim_batch(BASE, is_crowded).await.unwrap();
            tenants.push(claimed.map(|(row, _)| row.tenant));
        }
        let [x, y] = ["x", "y"].map(|tenant| Some(tenant.to_owned()));
        assert_eq!(tenants, [x.clone(), y, None, x]);
        let mut ids: Vec<String> = vec![];
        while let Some((row, _)) = store.claim_job(BASE, &["queued"], &ids).await.unwrap() {
            ids.push(row.id);
        }
        assert_eq!(ids, ["0", "3", "1", "2"]);
        let counted = store.jobs_of_tenants(BASE).await.unwrap();
        assert_eq!(counted, [("x".to_owned(), 3, 0), ("y".to_owned(), 1, 0)]);
    }
}

#[tokio::test]
async fn expired_files_are_not_there() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let staged = store.staging();
        fs::write(&staged, "x").unwrap();
        let row = store
            .add_file(&staged, new_file("x", "x", "user_data", Some(0)), None)
            .await
            .unwrap();
        assert_eq!(store.file(&row.id).await.unwrap(), None);
        assert!(
            store
                .files(None, None, None, 10, Order::Newest)
                .await
                .unwrap()
                .rows
                .is_empty()
        );
        assert_eq!(store.delete_expired_files().await.unwrap(), 1);
        assert!(!store.artifacts().folders().file(&row.id).exists());
    }
}

/// Whoever opens the database, as `tandem keys` does beside a server, sees and makes the same keys.
#[tokio::test]
async fn keys_are_kept_as_hashes_and_end() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let keys = store.keys();
        // Databases of tests that ran before may have some.
        let (before, changes) = (keys.list().await.unwrap().len(), keys.changes().await.unwrap());
        let limits = Limits {
            requests_per_minute: Some(60),
            tokens_per_minute: None,
            training_tokens_per_day: Some(1000),
            stored_bytes: Some(1 << 40),
        };
        let new = |name: &str, expires_after_s| NewKey {
            limits,
            name: name.to_owned(),
            tenant: "acme".parse().unwrap(),
            role: Role::Train,
            expires_after_s,
        };
        let (one, secret) = keys.create(new("ci", Some(3600))).await.unwrap();
        assert!(secret.starts_with("sk-tandem-") && secret.len() > 64, "{secret}");
        assert_eq!(one.hash, key_hash(secret.as_bytes()));
        let listed = keys.list().await.unwrap();
        assert_eq!(listed.last(), Some(&one));
        assert_eq!(
            (&listed[before].name[..], listed[before].role),
            ("ci", Role::Train)
        );
        assert!(one.opens(one.created_at) && !one.opens(one.created_at + 3600));

        // The old one goes on for a while, then not; its end is the new one's, too.
        let (two, other) = keys.rotate(&one.id, 60).await.unwrap().unwrap();
        assert_ne!(secret, other);
        assert_eq!(
            (&two.tenant, two.role, two.name.as_str()),
            (&one.tenant, one.role, "ci")
        );
        let row = |id: &str, rows: &[KeyRow]| rows.iter().find(|row| row.id == id).unwrap().clone();
        let rows = keys.list().await.unwrap();
        assert!(row(&one.id, &rows).opens(now()) && !row(&one.id, &rows).opens(now() + 61));
        let (three, _) = keys.rotate(&two.id, 0).await.unwrap().unwrap();
        assert!(!row(&two.id, &keys.list().await.unwrap()).opens(now()));
        assert!(keys.rotate(&two.id, 0).await.unwrap().is_none());
        // Of two at the same moment one finds it.
        let (four, _) = keys.create(new("race", None)).await.unwrap();
        let both = tokio::join!(keys.rotate(&four.id, 0), keys.rotate(&four.id, 0));
        let made = [both.0.unwrap(), both.1.unwrap()].into_iter().flatten();
        let made: Vec<String> = made.map(|(key, _)| key.id).collect();
        assert_eq!(made.len(), 1);
        assert!(keys.revoke(&made[0]).await.unwrap());
        assert!(keys.revoke(&three.id).await.unwrap());
        assert!(!keys.revoke(&three.id).await.unwrap(), "it was");
        assert!(!keys.revoke("key-none").await.unwrap());
        assert!(!row(&three.id, &keys.list().await.unwrap()).opens(now()));
        assert!(keys.changes().await.unwrap() > changes);
        assert_eq!(keys.list().await.unwrap().len(), before + 5);
        assert!(matches!(
            keys.create(new("a\x1b[2J", None)).await,
            Err(StoreError::Key(_))
        ));
        store.close().await;
    }
    for bad in ["", "a/b", "a b", "\0", "é", &"x".repeat(65)] {
        assert!(bad.parse::<Tenant>().is_err(), "{bad:?}");
    }
}

/// Each count of a job adds what is new in it; who went back to an earlier state pays again.
#[tokio::test]
async fn what_a_key_trains_is_counted_by_day() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let new = |training_tokens_per_day| NewKey {
            name: String::new(),
            tenant: Tenant::default(),
            role: Role::Train,
            limits: Limits {
                training_tokens_per_day,
                ..Limits::default()
            },
            expires_after_s: None,
        };
        let (key, _) = store.keys().create(new(Some(500))).await.unwrap();
        let (free, _) = store.keys().create(new(None)).await.unwrap();
        assert_eq!(store.training_quota(&free.id).await.unwrap(), None);
        let id = ids::job();
        let job = NewJob {
            key_id: Some(key.id.clone()),
            ..job(&id, &[])
        };
        assert_eq!(store.insert_job(job).await.unwrap().key_id, Some(key.id.clone()));
        for (tokens, sum) in [(100, 100), (150, 150), (150, 150), (50, 150), (120, 220)] {
            let change = JobChange {
                from: &["queued"],
                trained_tokens: Some(tokens),
                ..JobChange::default()
            };
            store
                .change_job(&id, change)
                .await
                .unwrap()
                .expect("it is queued");
            let quota = store.training_quota(&key.id).await.unwrap().unwrap();
            assert_eq!((quota.limit, quota.trained), (500, sum), "{tokens}");
            assert!((1..=24 * 3600).contains(&quota.renews_after_s));
        }
        // A key in its place goes on with its day.
        let (next, _) = store.keys().rotate(&key.id, 0).await.unwrap().unwrap();
        let quota = store.training_quota(&next.id).await.unwrap().unwrap();
        assert_eq!((quota.limit, quota.trained), (500, 220));
        store.add_trained(&key.id, 30).await.unwrap();
        assert_eq!(store.training_quota(&key.id).await.unwrap().unwrap().trained, 250);
    }
}
