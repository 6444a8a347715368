//! A full disk, and connections that it left within a transaction.

use super::*;

#[tokio::test]
async fn room_is_kept_given_and_made_again() {
    let root = tempfile::tempdir().unwrap();
    let reserve = root.path().join("reserve");
    // Where it is to be written lies a device that is always full.
    std::os::unix::fs::symlink("/dev/full", &reserve).unwrap();
    let store = Store::open(&Places::local(root.path())).await.unwrap();
    assert_eq!(store.away(), [Part::Room]);
    let staged = store.staging();
    fs::write(&staged, "rows").unwrap();
    let refused = store
        .add_file(&staged, new_file("rows", "rows.jsonl", "fine-tune", None), None)
        .await;
    assert_eq!(refused.unwrap_err().away(), Some(Part::Room));
    let folder = adapter(root.path(), "one");
    let refused = store.publish_adapter(&folder, Placement::Copy, u64::MAX).await;
    assert_eq!(refused.unwrap_err().away(), Some(Part::Room));

    store.look_for_room().await;
    assert_eq!(store.away(), []);
    assert!(fs::metadata(&reserve).unwrap().len() > 1 << 20);
    store
        .add_file(&staged, new_file("rows", "rows.jsonl", "fine-tune", None), None)
        .await
        .unwrap();
    store
        .publish_adapter(&folder, Placement::Copy, u64::MAX)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_full_database_is_told_apart_and_its_connections_are_well_again() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&Places::local(root.path())).await.unwrap();
    let pages: i64 = sqlx::query_scalar("PRAGMA page_count")
        .fetch_one(&store.db.raw_pool)
        .await
        .unwrap();
    let limit = |most: i64| {
        let store = &store;
        async move {
            let mut all = vec![];
            for _ in 0..store.db.raw_pool.options().get_max_connections() {
                all.push(store.db.raw_pool.acquire().await.unwrap());
            }
            for connection in &mut all {
                let sql = format!("PRAGMA max_page_count = {most}");
                sqlx::query(sqlx::AssertSqlSafe(sql))
                    .execute(&mut **connection)
                    .await
                    .unwrap();
            }
        }
    };
    limit(pages).await;
    let large = |n: usize| NewJob {
        request: "x".repeat(100_000),
        ..job(&format!("ftjob-{n}"), &[])
    };
    // A connection that found no room may be dropped with its limit: the others find none, too.
    let mut refused = 0;
    for n in 0..8 {
        if let Err(error) = store.insert_job(large(n)).await {
            assert_eq!(error.away(), Some(Part::Room), "{error}");
            refused += 1;
        }
    }
    assert!(refused > 0, "there is no room");
    limit(1 << 30).await;
    for n in 8..28 {
        store.insert_job(large(n)).await.unwrap();
    }
}

/// What the end of a transaction leaves when it fails on a full disk.
#[tokio::test]
async fn connections_left_within_a_transaction_are_dropped() {
    use sqlx::Connection;
    let root = tempfile::tempdir().unwrap();
    for store in each_kind(root.path()).await {
        let pool = &store.db.raw_pool;
        let mut all = vec![];
        for _ in 0..pool.options().get_max_connections() {
            all.push(pool.acquire().await.unwrap());
        }
        for connection in &mut all {
            std::mem::forget(connection.begin().await.unwrap());
        }
        drop(all);
        for n in 0..20 {
            let id = format!("ftjob-{}-{n}", ids::random());
            store.insert_job(job(&id, &[])).await.unwrap();
            assert!(store.job(&id).await.unwrap().is_some());
        }
    }
}
