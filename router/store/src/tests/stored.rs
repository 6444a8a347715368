//! What tenants store and what their keys let them, and what training clients saved.

use std::slice;

use super::*;
use crate::saves;

fn tenant(name: &str) -> Tenant {
    name.parse().unwrap()
}

async fn limited_key(store: &Store, tenant: &Tenant, stored_bytes: u64) -> String {
    let key = NewKey {
        name: String::new(),
        tenant: tenant.clone(),
        role: Role::Train,
        limits: Limits {
            stored_bytes: Some(stored_bytes),
            ..Limits::default()
        },
        expires_after_s: None,
    };
    store.keys().create(key).await.unwrap().0.id
}

fn staged(store: &Store, content: &str) -> PathBuf {
    let path = store.staging();
    fs::write(&path, content).unwrap();
    path
}

async fn add_file(
    store: &Store,
    tenant: &Tenant,
    content: &str,
    limit: Option<u64>,
) -> Result<FileRow, StoreError> {
    let file = NewFile {
        tenant,
        ..new_file(content, "x", "user_data", None)
    };
    store.add_file(&staged(store, content), file, limit).await
}

async fn begin(
    store: &Store,
    tenant: &Tenant,
    bytes: u64,
    limit: Option<u64>,
) -> Result<UploadRow, StoreError> {
    let upload = NewUpload {
        filename: "x",
        purpose: "user_data",
        bytes,
        open_s: 3600,
        expires_after_s: None,
        tenant,
        limit,
    };
    store.insert_upload(upload).await
}

fn exceeded<T: std::fmt::Debug>(refused: Result<T, StoreError>) -> (u64, u64, u64) {
    match refused {
        Err(StoreError::OverLimit(StorageExceeded {
            storage: Storage { limit, stored },
            wanted,
        })) => (limit, stored, wanted),
        other => panic!("{other:?}"),
    }
}

/// All that a tenant has counts, whoever brought it, until it is gone; what is another's does not.
#[tokio::test]
async fn a_tenant_stores_what_its_key_lets_it() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        // Databases of tests that ran before may have some.
        let (acme, other) = (tenant(&ids::random()), tenant(&ids::random()));
        let limit = Some(100);
        let key = limited_key(&store, &acme, 100).await;
        let left = async || store.storage_by(&key).await.unwrap().unwrap().left();
        add_file(&store, &other, &"o".repeat(500), None).await.unwrap();
        let file = add_file(&store, &acme, &"f".repeat(60), limit).await.unwrap();
        let refused = add_file(&store, &acme, &"f".repeat(41), limit).await;
        assert_eq!(exceeded(refused), (100, 60, 41));
        let files = fs::read_dir(store.artifacts().folders().root().join("files")).unwrap();
        assert_eq!(files.count(), 2, "nothing is left of what was refused");
        // What is announced is taken, before it comes.
        let upload = begin(&store, &acme, 30, limit).await.unwrap();
        assert_eq!(exceeded(begin(&store, &acme, 11, limit).await), (100, 90, 11));
        assert_eq!(left().await, 10);
        // Parts that come at the same moment do not exceed it.
        let part = async || {
            let path = staged(&store, &"p".repeat(20));
            let added = store.add_part(&upload, &path, Digest([0; 32]), 4).await;
            let _ = fs::remove_file(path);
            added.unwrap()
        };
        let (one, two) = futures::future::join(part(), part()).await;
        let refused: Vec<NoPart> = [one, two].into_iter().filter_map(Result::err).collect();
        assert_eq!(refused, [NoPart::TooLarge { had: 20 }]);
        assert!(store.end_upload(&upload.id, "cancelled").await.unwrap());
        assert_eq!(left().await, 40);

        let batch = NewBatch {
            base: Digest(ids::secret()),
            tenant: acme.clone(),
            status: "validating",
            expires_after_s: 3600,
            request: "{}".to_owned(),
            key_id: Some(key.clone()),
        };
        let base = batch.base;
        store.insert_batch(batch).await.unwrap();
        let (batch, lease) = store.claim_batch(base, false).await.unwrap().unwrap();
        assert_eq!(batch.key_id.as_ref(), Some(&key));
        let line = BatchLine {
            line: 1,
            ok: true,
            answer: "a".repeat(7),
        };
        // Sent again, it is kept once.
        for _ in 0..2 {
            let lines = [line.clone()];
            assert!(store.keep_batch_lines(&batch.id, lease, &lines).await.unwrap());
        }
        assert_eq!(left().await, 33);
        let end = BatchEnd {
            status: "cancelled",
            errors: None,
            output: None,
            error: None,
        };
        assert!(store.end_batch(&batch.id, lease, end).await.unwrap());
        assert_eq!(left().await, 40);

        let id = ids::job();
        let job = |kept_bytes| NewJob {
            tenant: acme.clone(),
            key_id: Some(key.clone()),
            kept_bytes,
            ..job(&id, &[])
        };
        let refused = store.insert_job(job(41)).await.unwrap_err();
        assert!(refused.to_string().contains("would add 41"), "{refused}");
        store.insert_job(job(9)).await.unwrap();
        assert_eq!(left().await, 31);
        let is_known = JobChange {
            from: &["queued"],
            kept_bytes: Some(0),
            ..JobChange::default()
        };
        store.change_job(&id, is_known).await.unwrap().unwrap();
        store.publish_datasets(&id, 11).await.unwrap();
        assert_eq!(left().await, 29);

        // An adapter of two names is there once; its numbers count.
        let source = adapter(root.path(), &ids::random());
        let digest = store
            .publish_adapter(&source, Placement::Copy, u64::MAX)
            .await
            .unwrap();
        assert_eq!(left().await, 29, "it has no name");
        let names = [ids::random(), ids::random()];
        for one in &names {
            let row = store.swap_name(&name(one, digest), acme.as_str(), None).await;
            row.unwrap().unwrap();
        }
        assert_eq!(left().await, 5);
        store
            .remove_names(BASE, names.iter().map(String::as_str))
            .await
            .unwrap();

        let record = record(&acme, &ids::random());
        let folder = store.save_folder(&record.place).await.unwrap();
        fs::write(folder.join("state.safetensors"), "s".repeat(19)).unwrap();
        let kept = store
            .keep_save(record, Some(folder.join("state.safetensors")))
            .await;
        assert_eq!((kept.unwrap().bytes, left().await), (19, 10));
        assert!(store.delete_file(&file.id).await.unwrap());
        assert_eq!(left().await, 70);
        assert_eq!(store.keys().stored(&acme).await.unwrap(), 30);
        store.close().await;
    }
}

fn record(tenant: &Tenant, run: &str) -> SaveRecord {
    SaveRecord {
        place: SavePlace::new(run, SaveKind::State, "n").unwrap(),
        base: BASE,
        tenant: tenant.to_string(),
        created_at: 7,
        expires_at: None,
        bytes: 0,
        rank: 4,
        train_attn: true,
        train_mlp: true,
        train_unembed: false,
        lora: None,
        public: false,
        user_metadata: None,
        file: None,
        adapter: None,
    }
}

/// A list reads the rows of its tenant alone, and one that is damaged stops no other.
#[tokio::test]
async fn saves_are_listed_by_tenant() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let (acme, other) = (tenant(&ids::random()), tenant(&ids::random()));
        let records = [(&acme, "a"), (&acme, "b"), (&other, "c")]
            .map(|(tenant, run)| record(tenant, &format!("{run}-{tenant}")));
        for record in &records {
            store.keep_save(record.clone(), None).await.unwrap();
        }
        let [a, b, c] = &records;
        let runs = async |tenant: Option<&Tenant>, run: Option<&str>| store.saves(tenant, run).await.unwrap();
        assert_eq!(runs(Some(&acme), None).await, [a.clone(), b.clone()]);
        assert_eq!(runs(Some(&acme), Some(&c.place.run)).await, []);
        assert_eq!(runs(None, Some(&c.place.run)).await, slice::from_ref(c));
        assert!(records.iter().all(|record| record.expires_at.is_none()));
        assert!(runs(None, None).await.len() >= 3);
        if !store.is_shared() {
            let plan = format!("EXPLAIN QUERY PLAN {}", saves::OF_TENANT);
            let plan: Vec<(i64, i64, i64, String)> = sqlx::query_as(sqlx::AssertSqlSafe(plan))
                .bind(acme.as_str())
                .fetch_all(&store.db.raw_pool)
                .await
                .unwrap();
            assert!(
                plan[0].3.starts_with("SEARCH saves USING INDEX saves_by_tenant"),
                "{plan:?}"
            );
        }
        sqlx::query("UPDATE saves SET record = '{\"place\"' WHERE run = $1")
            .bind(&b.place.run)
            .execute(&store.db.raw_pool)
            .await
            .unwrap();
        assert_eq!(runs(Some(&acme), None).await, slice::from_ref(a));
        assert!(store.save(&b.place).await.unwrap().is_none());
        store.keep_save(b.clone(), None).await.unwrap();
        // What is over is found by its time; what is gone is not changed any more.
        let over = SaveRecord {
            expires_at: Some(8),
            ..a.clone()
        };
        let ends = |record: &mut SaveRecord| record.expires_at = Some(8);
        assert!(store.change_save(&a.place, ends).await.unwrap());
        let expired = store.expired_saves().await.unwrap();
        assert_eq!((expired.contains(&over), expired.contains(b)), (true, false));
        assert!(store.remove_save(&over, "a").await.unwrap());
        assert!(!store.change_save(&a.place, ends).await.unwrap());
        assert_eq!(runs(Some(&acme), None).await, slice::from_ref(b));
        store.close().await;
    }
}

/// Who removes or changes a save looks at what is there now: what was saved in its place meanwhile stays whole.
#[tokio::test]
async fn what_is_saved_again_stays() {
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let (acme, run) = (tenant(&ids::random()), ids::random());
        let source = adapter(root.path(), &run);
        let published = store.publish_adapter(&source, Placement::Copy, u64::MAX).await;
        let digest = published.unwrap();
        let keep = async |text: &str, expires_at| {
            let named = store.swap_name(&name(&run, digest), acme.as_str(), None).await;
            drop(named.unwrap());
            let folder = store.save_folder(&record(&acme, &run).place).await.unwrap();
            fs::write(folder.join("state.safetensors"), text).unwrap();
            let save = SaveRecord {
                adapter: Some(digest),
                expires_at,
                ..record(&acme, &run)
            };
            let state = folder.join("state.safetensors");
            store.keep_save(save, Some(state)).await.unwrap()
        };
        let text = async |save: &SaveRecord| {
            let state = store.state_of(save).await.unwrap().unwrap();
            fs::read_to_string(state).unwrap()
        };
        let named = async || !store.names(BASE).await.unwrap().iter().all(|row| row.name != run);

        let first = keep("one", Some(8)).await;
        let second = keep("two", None).await;
        assert!(
            !store.remove_save(&first, &run).await.unwrap(),
            "it was saved again"
        );
        let one = store
            .change_save(&first.place, |record| record.public = true)
            .await;
        assert!(one.unwrap());
        let there = store.save(&first.place).await.unwrap().unwrap();
        assert_eq!(
            there,
            SaveRecord {
                public: true,
                ..second.clone()
            }
        );
        assert_eq!((text(&there).await.as_str(), named().await), ("two", true));

        assert!(store.remove_save(&there, &run).await.unwrap());
        assert!(!named().await);
        // Before its file goes, another is saved there.
        let third = keep("three", None).await;
        store.remove_state(&there).await.unwrap();
        assert_eq!(text(&third).await, "three");
        assert!(store.state_of(&there).await.is_err(), "it is gone");
        let moved = adapter(root.path(), &ids::random());
        let published = store.publish_adapter(&moved, Placement::Copy, u64::MAX).await;
        let other = name(&run, published.unwrap());
        store
            .swap_name(&other, acme.as_str(), Some(digest))
            .await
            .unwrap()
            .unwrap();
        assert!(store.remove_save(&third, &run).await.unwrap());
        assert!(named().await, "another adapter's");
        store.close().await;
    }
}

/// A folder of before there were rows: its records become some, with their files.
#[tokio::test]
async fn saves_of_an_older_program_are_taken_in() {
    let root = tempfile::tempdir().unwrap();
    let acme = tenant("acme");
    drop(Store::open(&Places::local(root.path())).await.unwrap());
    let old = SaveRecord {
        file: Some("state-1.safetensors".to_owned()),
        bytes: 9,
        ..record(&acme, "a")
    };
    for (run, text) in [
        ("a", serde_json::to_string(&old).unwrap()),
        ("b", "{\"place\"".to_owned()),
    ] {
        let folder = root.path().join("tinker").join(run).join("state/n");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("state-1.safetensors"), "state").unwrap();
        fs::write(folder.join("save.json"), text).unwrap();
    }
    for _ in 0..2 {
        let store = reopened(root.path()).await;
        assert_eq!(
            store.saves(Some(&acme), None).await.unwrap(),
            slice::from_ref(&old)
        );
        let state = store.state_of(&old).await.unwrap().unwrap();
        assert_eq!(fs::read_to_string(state).unwrap(), "state");
        assert_eq!(store.keys().stored(&acme).await.unwrap(), 5);
        store.close().await;
    }
    assert!(!root.path().join("tinker/a/state/n/save.json").exists());
    assert!(root.path().join("tinker/b/state/n/save.json").exists(), "damaged");
}

async fn reopened(root: &Path) -> Store {
    Store::open(&Places::local(root)).await.unwrap()
}
