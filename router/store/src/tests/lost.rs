//! Data that nobody acknowledged losing: a database that is missing, older, another's or damaged removes nothing, and a
//! copy of a store that is in use is a store.

use std::collections::BTreeSet;

use tandem_core::job::{Life, files};

use super::*;
use crate::backup::{backup, restore};

/// An upload, an adapter with a name and a job with its datasets and a state.
async fn fill(store: &Store, root: &Path, content: &str) -> (FileRow, Digest) {
    let staged = store.staging();
    fs::write(&staged, content).unwrap();
    let file = store
        .add_file(&staged, new_file(content, "rows.jsonl", "fine-tune", None), None)
        .await
        .unwrap();
    let source = adapter(root, content);
    let digest = store
        .publish_adapter(&source, Placement::Copy, u64::MAX)
        .await
        .unwrap();
    store
        .swap_name(&name(content, digest), Tenant::DEFAULT, None)
        .await
        .unwrap()
        .unwrap();
    let id = format!("ftjob-{content}");
    store.insert_job(job(&id, &[])).await.unwrap();
    fs::create_dir_all(store.job_folder(&id)).unwrap();
    fs::write(store.job_folder(&id).join(files::TRAIN), content).unwrap();
    store.publish_datasets(&id, 0).await.unwrap();
    let life = Life {
        epoch: 1,
        saved: None,
    };
    let folder = store
        .artifacts()
        .pull_job(&id.parse().unwrap(), life)
        .await
        .unwrap();
    fs::write(folder.join(files::STATE), content).unwrap();
    store
        .artifacts()
        .push_job(&id.parse().unwrap(), 1, 5)
        .await
        .unwrap();
    (file, digest)
}

/// Contents of all files of the three kinds below a folder, wherever they lie in it.
fn contents(folder: &Path) -> BTreeSet<Vec<u8>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(contents(&path)),
            false if path.file_name().is_some_and(|name| name == "lock") => {}
            false => drop(found.insert(fs::read(&path).unwrap())),
        }
    }
    found
}

fn artifacts_of(root: &Path) -> BTreeSet<Vec<u8>> {
    ["files", "adapters", "jobs", "quarantine"]
        .map(|kind| root.join(kind))
        .iter()
        .filter(|folder| folder.exists())
        .flat_map(|folder| contents(folder))
        .collect()
}

fn remove_database(root: &Path) {
    for name in ["tandem.db", "tandem.db-wal", "tandem.db-shm"] {
        let _ = fs::remove_file(root.join(name));
    }
}

#[tokio::test]
async fn a_database_that_is_not_that_of_its_artifacts_removes_none() {
    type Spoil = fn(&Path, &Path);
    let cases: [(&str, &str, Spoil); 6] = [
        ("lost", "is missing, but there are artifacts in", |data, _| {
            remove_database(data)
        }),
        ("lost, its journal left", "is missing", |data, _| {
            remove_database(data);
            fs::write(data.join("tandem.db-wal"), "the last writes").unwrap();
        }),
        ("empty", "has never been used with", |data, _| {
            remove_database(data);
            fs::write(data.join("tandem.db"), "").unwrap();
        }),
        (
            "a copy without the last writes",
            "knows nothing of 3 artifacts in",
            |data, other| {
                remove_database(data);
                fs::copy(other.join("during.db"), data.join("tandem.db")).unwrap();
            },
        ),
        ("from before the last start", "is older than", |data, other| {
            remove_database(data);
            fs::copy(other.join("before.db"), data.join("tandem.db")).unwrap();
        }),
        ("of another store", "is not that of", |data, other| {
            remove_database(data);
            fs::copy(other.join("tandem.db"), data.join("tandem.db")).unwrap();
        }),
    ];
    for (what, expected, spoil) in cases {
        let root = tempfile::tempdir().unwrap();
        let (data, other) = (root.path().join("data"), root.path().join("other"));
        // Its main file is whole when it is closed.
        let elsewhere = Store::open(&Places::local(&other)).await.unwrap();
        fill(&elsewhere, root.path(), "elsewhere").await;
        elsewhere.close().await;
        let store = Store::open(&Places::local(&data)).await.unwrap();
        fill(&store, root.path(), "one").await;
        store.close().await;
        drop(store);
        fs::copy(data.join("tandem.db"), other.join("before.db")).unwrap();
        let store = Store::open(&Places::local(&data)).await.unwrap();
        let vacuum = format!("VACUUM INTO '{}'", other.join("during.db").display());
        sqlx::raw_sql(sqlx::AssertSqlSafe(vacuum))
            .execute(&store.db.raw_pool)
            .await
            .unwrap();
        fill(&store, root.path(), "two").await;
        store.close().await;
        drop(store);
        spoil(&data, &other);

        let before = contents(&data);
        let refused = Store::open(&Places::local(&data))
            .await
            .err()
            .expect(what)
            .to_string();
        assert!(refused.contains(expected), "{what}: {refused}");
        assert!(refused.contains("--quarantine-strays"), "{what}: {refused}");
        let artifacts = artifacts_of(&data);
        assert!(artifacts.is_subset(&before), "{what}");
        let going_on = Places {
            strays: Strays::Quarantine,
            ..Places::local(&data)
        };
        let store = Store::open(&going_on).await.expect(what);
        assert!(
            artifacts.is_subset(&artifacts_of(&data)),
            "{what}: nothing is lost"
        );
        store.close().await;
        drop(store);
        // From now on they belong together.
        Store::open(&Places::local(&data)).await.expect(what);
        assert!(
            artifacts.is_subset(&artifacts_of(&data)),
            "{what}: nothing is lost later either"
        );
    }
}

#[tokio::test]
async fn a_postgres_that_is_not_that_of_its_artifacts_is_refused() {
    let (Some(url), Some(fresh)) = (servers::database(), servers::database()) else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let places = |data: &str, url: &str| Places {
        database_url: Some(url.to_owned()),
        artifact_url: Some(format!("file://{}", root.path().join("shared").display())),
        ..Places::local(root.path().join(data))
    };
    let store = Store::open(&places("a", &url)).await.unwrap();
    let (file, digest) = fill(&store, root.path(), "one").await;
    let new = Store::open(&places("b", &fresh))
        .await
        .err()
        .expect("it is new")
        .to_string();
    assert!(new.contains("has never been used with"), "{new}");
    let own = Places {
        artifact_url: Some(format!("file://{}", root.path().join("empty").display())),
        ..places("c", &url)
    };
    let moved = Store::open(&own)
        .await
        .err()
        .expect("it names others")
        .to_string();
    assert!(moved.contains("was used with other artifacts than"), "{moved}");
    // A second router and a second start are neither new nor older.
    drop(Store::open(&places("d", &url)).await.unwrap());
    sqlx::query("UPDATE store SET opens = opens - 1")
        .execute(&store.db.raw_pool)
        .await
        .unwrap();
    let older = Store::open(&places("e", &url))
        .await
        .err()
        .expect("it is older")
        .to_string();
    assert!(older.contains("is older than"), "{older}");
    assert!(store.adapter_folder(digest).await.unwrap().exists() && store.file_path(&file).await.is_ok());
    // A folder that was a store of its own is no cache that may be emptied.
    let alone = Store::open(&Places::local(root.path().join("own")))
        .await
        .unwrap();
    fill(&alone, root.path(), "alone").await;
    alone.close().await;
    drop(alone);
    let kept = artifacts_of(&root.path().join("own"));
    let going_on = Places {
        strays: Strays::Quarantine,
        ..places("own", &url)
    };
    let refused = Store::open(&places("own", &url))
        .await
        .err()
        .expect("refused first")
        .to_string();
    assert!(refused.contains("is older than"), "{refused}");
    drop(Store::open(&going_on).await.unwrap());
    assert!(kept.is_subset(&artifacts_of(&root.path().join("own"))));
}

#[tokio::test]
async fn a_damaged_database_says_so_and_where() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&Places::local(root.path())).await.unwrap();
    for n in 0..50 {
        store
            .insert_job(job(&format!("ftjob-{n}"), &[("k", &"v".repeat(200))]))
            .await
            .unwrap();
    }
    store.close().await;
    drop(store);
    let path = root.path().join("tandem.db");
    let whole = fs::read(&path).unwrap();
    let spoilt = |range: std::ops::Range<usize>| {
        let mut bytes = whole.clone();
        bytes[range].fill(0x5a);
        bytes
    };
    for bytes in [
        spoilt(0..100),
        spoilt(4096..whole.len()),
        whole[..whole.len() / 2].to_vec(),
    ] {
        fs::write(&path, &bytes).unwrap();
        let said = Store::open(&Places::local(root.path()))
            .await
            .err()
            .expect("it is damaged");
        assert!(matches!(said, StoreError::Corrupt { .. }), "{said}");
        let said = said.to_string();
        assert!(
            said.contains("tandem.db is corrupt") && said.contains("tandem restore"),
            "{said}"
        );
        assert_eq!(fs::read(&path).unwrap(), bytes, "it is left as it is");
    }
}

#[tokio::test]
async fn damage_in_a_large_database_is_found_behind_the_start() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&Places::local(root.path())).await.unwrap();
    let grow = "CREATE TABLE large (bytes BLOB); INSERT INTO large VALUES (zeroblob(4000000))";
    sqlx::raw_sql(grow).execute(&store.db.raw_pool).await.unwrap();
    store.close().await;
    drop(store);
    let path = root.path().join("tandem.db");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 2_000_000..end - 1_000_000].fill(0x5a);
    fs::write(&path, &bytes).unwrap();
    // The start may be over before the damage is found.
    let began = std::time::Instant::now();
    let opened = Store::open(&Places::local(root.path())).await;
    let refused = match opened {
        Err(refused) => refused,
        Ok(store) => loop {
            match store.insert_job(job(&ids::job(), &[])).await {
                Err(refused) => break refused,
                Ok(_) => assert!(began.elapsed().as_secs() < 20, "nobody looked"),
            }
        },
    };
    assert!(matches!(refused, StoreError::Away { .. }), "{refused}");
    assert!(refused.to_string().contains("tandem.db is corrupt"), "{refused}");
}

#[tokio::test]
async fn a_copy_of_a_store_in_use_is_a_store() {
    let root = tempfile::tempdir().unwrap();
    let shared = format!("file://{}", root.path().join("shared").display());
    for (kind, artifact_url) in [("alone", None), ("cached", Some(shared))] {
        let at = |name: &str| root.path().join(format!("{kind}-{name}"));
        let places = Places {
            artifact_url,
            ..Places::local(at("data"))
        };
        let store = Store::open(&places).await.unwrap();
        let (file, digest) = fill(&store, root.path(), "one").await;
        let (gone, _) = fill(&store, root.path(), "two").await;
        // While others come and go.
        let busy = async {
            for n in 0..20 {
                let staged = store.staging();
                fs::write(&staged, "x").unwrap();
                let row = store
                    .add_file(&staged, new_file("x", "x", "user_data", None), None)
                    .await
                    .unwrap();
                if n % 2 == 0 {
                    store.delete_file(&row.id).await.unwrap();
                }
            }
            store.delete_file(&gone.id).await.unwrap();
        };
        let copy = at("copy");
        let (copied, ()) = tokio::join!(backup(&places, &copy), busy);
        copied.unwrap();
        let copied = backup(&places, &copy).await.unwrap_err().to_string();
        assert!(copied.contains("is not empty"), "{copied}");
        drop(store);
        let restored = at("restored");
        restore(&copy, &restored).unwrap();
        let again = restore(&copy, &restored).unwrap_err().to_string();
        assert!(again.contains("is not empty"), "{again}");
        let store = Store::open(&Places::local(&restored)).await.unwrap();
        let path = store.file_path(&file).await.unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "one");
        assert!(store.has_adapter(digest).await.unwrap());
        assert_eq!(store.names(BASE).await.unwrap()[0].digest, digest);
        for row in store
            .files(None, None, None, 100, Order::Oldest)
            .await
            .unwrap()
            .rows
        {
            assert!(store.file_path(&row).await.unwrap().exists());
        }
        let (row, lease) = store.claim_job(BASE, &["queued"], &[]).await.unwrap().unwrap();
        assert_eq!(row.id, "ftjob-one");
        let life = Life {
            epoch: lease.epoch() + 1,
            saved: row.saved,
        };
        let folder = store
            .artifacts()
            .pull_job(&row.id.parse().unwrap(), life)
            .await
            .unwrap();
        assert_eq!(fs::read_to_string(folder.join(files::TRAIN)).unwrap(), "one");
        if kind == "alone" {
            assert_eq!(fs::read_to_string(folder.join(files::STATE)).unwrap(), "one");
        }
        // One bit, and the copy is refused; the folder stays free for another try.
        let bytes = copy
            .join("adapters")
            .join(digest.to_string())
            .join("adapter_model.safetensors");
        fs::write(bytes, "onf").unwrap();
        let damaged = restore(&copy, &at("third")).unwrap_err().to_string();
        assert!(damaged.contains("is missing or damaged"), "{damaged}");
        assert_eq!(fs::read_dir(at("third")).unwrap().count(), 0);
        fs::remove_file(copy.join("backup.json")).unwrap();
        let half = restore(&copy, &at("third")).unwrap_err().to_string();
        assert!(half.contains("is no whole backup"), "{half}");
    }
    let postgres = Places {
        database_url: Some("postgres://u:secret@h/d".to_owned()),
        ..Places::local(root.path().join("alone-data"))
    };
    let refused = backup(&postgres, &root.path().join("none"))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("pg_dump") && !refused.contains("secret"),
        "{refused}"
    );
}

/// What lies behind a link is not of this folder, though it is called staging.
#[tokio::test]
async fn a_start_empties_no_folder_elsewhere() {
    let root = tempfile::tempdir().unwrap();
    let (data, elsewhere) = (root.path().join("data"), root.path().join("elsewhere"));
    for folder in [&data, &elsewhere] {
        fs::create_dir(folder).unwrap();
    }
    fs::write(elsewhere.join("kept"), "x").unwrap();
    std::os::unix::fs::symlink(&elsewhere, data.join("staging")).unwrap();
    let refused = Store::open(&Places::local(&data))
        .await
        .err()
        .expect("it is refused");
    let refused = causes(&refused);
    assert!(
        refused.contains("staging") && refused.contains("it is a link"),
        "{refused}"
    );
    assert!(elsewhere.join("kept").exists());
}

/// An error and what caused it.
fn causes(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[test]
fn what_the_database_names_and_is_not_there_is_known() {
    let root = tempfile::tempdir().unwrap();
    let folders = crate::folders::Folders::make(root.path(), crate::folders::Tenancy::Owner).unwrap();
    fs::write(folders.file("file-there"), "x").unwrap();
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let known = |is_cache| crate::leftovers::Known {
        files: names(&["file-there", "file-gone"]),
        loose_files: names(&[]),
        adapters: names(&["aa"]),
        jobs: names(&[]),
        ended_jobs: names(&[]),
        is_cache,
    };
    let missing = folders.leftovers(&known(false)).unwrap().missing;
    let shown = crate::leftovers::Leftovers::shown(&missing, folders.root());
    assert_eq!(shown, "adapters/aa, files/file-gone");
    assert!(folders.leftovers(&known(true)).unwrap().missing.is_empty());
}
