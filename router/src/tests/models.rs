//! Adapters and their names: load, replace, pin, let go, restart. And files.

use std::os::unix::fs::symlink;

use tandem_core::job::JobEvent;
use tandem_core::message::FinishReason;

use super::calls::{call, end};
use super::jobs::{create_job, request, started, step, wait};
use super::*;
use crate::api::{Call, LoadMode, ModelKind, Order};

async fn gone(path: &Path) {
    for _ in 0..400 {
        if !path.exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} is still there", path.display());
}

#[tokio::test]
async fn a_request_keeps_its_version_while_the_name_moves_on() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let (old, new) = (house.adapter("old", "1"), house.adapter("new", "2"));

    let (card, first) = tokio::join!(
        router.own().load_adapter("pet", &old, LoadMode::New),
        engine.answer_load(Ok(8))
    );
    assert!(
        matches!(card.unwrap().kind, ModelKind::Adapter { rank: 8, digest, .. } if digest == first.digest)
    );
    assert!(first.folder.join("adapter_model.safetensors").exists());
    let taken = router
        .own()
        .load_adapter("pet", &new, LoadMode::New)
        .await
        .unwrap_err();
    assert_eq!(kind(&taken), "Conflict");

    let mut generation = router
        .generate(Call {
            model: "pet".to_owned(),
            ..call("x")
        })
        .await
        .unwrap();
    let (generate, events) = engine.generate().await;
    assert_eq!(generate.adapter.as_ref(), Some(&first));
    let (card, second) = tokio::join!(
        router.own().load_adapter("pet", &new, LoadMode::Replace),
        engine.answer_load(Ok(4))
    );
    card.unwrap();
    assert_ne!(first.digest, second.digest);
    assert_eq!(generation.adapter, Some(first.digest));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(first.folder.exists(), "pinned by a request");

    end(&events, FinishReason::Length).await;
    while generation.pieces.recv().await.is_some() {}
    let Command::UnloadAdapter(digest) = engine.next().await else {
        panic!("an UnloadAdapter was expected")
    };
    assert_eq!(digest, first.digest);
    gone(&first.folder).await;

    router.own().unload_adapter("pet").await.unwrap();
    assert_eq!(
        kind(
            &router
                .generate(Call {
                    model: "pet".to_owned(),
                    ..call("x")
                })
                .await
                .err()
                .unwrap()
        ),
        "UnknownModel"
    );
    gone(&second.folder).await;
    assert_eq!(
        kind(&router.own().unload_adapter("pet").await.unwrap_err()),
        "Adapter"
    );
}

/// The engine has no slot for an adapter as long as the only one is held by a client that does not read.
#[tokio::test]
async fn a_load_that_waits_for_a_slot_waits_alone() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let load = async |engine: &mut Engine, name: &str| {
        let folder = house.adapter(name, name);
        let (card, adapter) = tokio::join!(
            router.own().load_adapter(name, &folder, LoadMode::New),
            engine.answer_load(Ok(8))
        );
        card.unwrap();
        adapter
    };
    let (busy, idle) = (load(&mut engine, "busy").await, load(&mut engine, "idle").await);
    let waiting = {
        let (router, folder) = (router.clone(), house.adapter("late", "late"));
        tokio::spawn(async move { router.own().load_adapter("late", &folder, LoadMode::New).await })
    };
    let Command::LoadAdapter(late, reply) = engine.next().await else {
        panic!("a LoadAdapter was expected")
    };

    // Whatever else changes names goes on: deletes, another load, a job's checkpoint and its end.
    router.own().delete_model("idle").await.unwrap();
    assert!(matches!(engine.next().await, Command::UnloadAdapter(digest) if digest == idle.digest));
    gone(&idle.folder).await;
    load(&mut engine, "another").await;
    router.own().unload_adapter("another").await.unwrap();
    assert!(matches!(engine.next().await, Command::UnloadAdapter(_)));
    let file = upload(&router, "t.jsonl", "fine-tune", &chat_rows(4))
        .await
        .unwrap();
    let id = create_job(&router, request(&file)).await;
    let (spec, events) = engine.started().await;
    let (checkpoint, adapter) = (
        house.trained(&spec, "checkpoint-1", "one"),
        house.trained(&spec, "adapter", "two"),
    );
    for event in [
        started(None),
        step(1, 2.0),
        JobEvent::Checkpoint {
            step: 1,
            adapter: checkpoint,
            best: None,
        },
        JobEvent::Finished {
            adapter,
            trained_tokens: 10,
        },
    ] {
        events.send(event).await.unwrap();
    }
    wait(&router, &id, |job| job.status.ended()).await;

    // What it waits for is not swept away meanwhile, and goes when its client does.
    assert!(late.folder.exists() && busy.folder.exists() && !reply.is_closed());
    assert_eq!(
        router.0.catalog.used_unnamed().into_iter().collect::<Vec<_>>(),
        [late.digest]
    );
    waiting.abort();
    assert!(matches!(engine.next().await, Command::UnloadAdapter(digest) if digest == late.digest));
    gone(&late.folder).await;
    assert!(reply.is_closed() && busy.folder.exists());
}

#[tokio::test]
async fn what_the_engine_refuses_leaves_no_trace() {
    let house = House::new();
    let (router, mut engine) = house.open().await;
    let folder = house.adapter("bad", "junk");
    let fault = Fault::Adapter("rank 128 exceeds 64".to_owned());
    let (refused, _) = tokio::join!(
        router.own().load_adapter("bad", &folder, LoadMode::New),
        engine.answer_load(Err(fault))
    );
    let place = folder.display();
    assert_eq!(
        refused.unwrap_err().to_string(),
        format!("The adapter in {place} cannot be loaded: rank 128 exceeds 64")
    );
    assert_eq!(router.own().models().len(), 1);
    let Command::UnloadAdapter(_) = engine.next().await else {
        panic!("an UnloadAdapter was expected")
    };
    for _ in 0..400 {
        if house.stored_adapters() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the refused adapter is still there");
}

#[tokio::test]
async fn names_and_folders_that_cannot_be_are_refused() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let good = house.adapter("good", "1");
    let names = ["", BASE, "a\nb", " x", &"x".repeat(201)];
    for name in names {
        let error = router
            .own()
            .load_adapter(name, &good, LoadMode::Replace)
            .await
            .unwrap_err();
        assert_eq!(kind(&error), "lora_name", "{name:?}");
    }
    let half = house.root.path().join("half");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("adapter_config.json"), "{}").unwrap();
    let circle = house.root.path().join("circle");
    symlink(&circle, &circle).unwrap();
    let folder_as_file = house.root.path().join("odd");
    std::fs::create_dir_all(folder_as_file.join("adapter_config.json")).unwrap();
    for folder in [
        &house.root.path().join("nowhere"),
        &good.join("adapter_config.json"),
        &half,
        &circle,
        &folder_as_file,
    ] {
        let error = router
            .own()
            .load_adapter("x", folder, LoadMode::New)
            .await
            .unwrap_err();
        assert!(
            matches!(error, RouterError::Adapter { not_found: true, .. }),
            "{error}"
        );
        assert!(error.to_string().starts_with("No adapter found for"), "{error}");
    }
    // A file of 200 GB takes no room where it has holes, and would all the same be copied for an hour.
    let huge = house.adapter("huge", "1");
    let tensors = std::fs::File::options()
        .write(true)
        .open(huge.join("adapter_model.safetensors"))
        .unwrap();
    tensors.set_len(200 << 30).unwrap();
    let error = router
        .own()
        .load_adapter("x", &huge, LoadMode::New)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("an adapter of this model has at most"),
        "{error}"
    );
    assert_eq!(
        kind(&router.own().delete_model(BASE).await.unwrap_err()),
        "Conflict"
    );
    assert_eq!(
        kind(&router.own().delete_model("nobody").await.unwrap_err()),
        "UnknownModel"
    );
    assert_eq!(
        std::fs::read_dir(house.data().join("staging")).unwrap().count(),
        0
    );
}

#[tokio::test]
async fn names_outlive_the_process_and_flags_do_not() {
    let house = House::new();
    let (loaded, flagged) = (house.adapter("loaded", "1"), house.adapter("flagged", "2"));
    for round in 0..2 {
        let (replica, mut engine) = replica();
        let lora_modules = if round == 0 {
            vec![("flag".to_owned(), flagged.clone())]
        } else {
            vec![]
        };
        let config = Config {
            lora_modules,
            ..Config::default()
        };
        let router = if round == 0 {
            let (router, _) = tokio::join!(house.open_with(config, replica), engine.answer_load(Ok(2)));
            let router = router.unwrap();
            let (card, _) = tokio::join!(
                router.own().load_adapter("pet", &loaded, LoadMode::New),
                engine.answer_load(Ok(8))
            );
            card.unwrap();
            router
        } else {
            house.open_with(config, replica).await.unwrap()
        };
        let names: Vec<String> = router.own().models().into_iter().map(|card| card.name).collect();
        match round {
            0 => assert!(
                names == [BASE, "flag", "pet"] || names == [BASE, "pet", "flag"],
                "{names:?}"
            ),
            _ => assert_eq!(names, [BASE, "pet"]),
        }
        drop(engine);
        router.shutdown().await;
    }
}

#[tokio::test]
async fn files_are_checked_listed_and_deleted() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let bad = [
        ("a.jsonl", "fine-tune", "", ""),
        ("a.jsonl", "fine-tune", "{\"messages\"", ""),
        ("a.jsonl", "fine-tune", "[1]\n", ""),
        ("..", "fine-tune", "{}", "file"),
        ("a.jsonl", "", "{}", "purpose"),
        ("a.jsonl", "../x", "{}", "purpose"),
    ];
    for (filename, purpose, content, param) in bad {
        let error = upload(&router, filename, purpose, content).await.unwrap_err();
        assert_eq!(kind(&error), param, "{error}");
    }
    let first = upload(&router, "dir/one.jsonl", "fine-tune", &chat_rows(2))
        .await
        .unwrap();
    let second = upload(&router, "two", "user_data", "anything").await.unwrap();
    let (info, text) = content(&router, &first).await.unwrap();
    assert_eq!(
        (info.filename.as_str(), info.bytes),
        ("one.jsonl", text.len() as u64)
    );
    let ids = async |purpose, after, limit, order| {
        let page = router.own().files(purpose, after, limit, order).await.unwrap();
        (
            page.data.into_iter().map(|file| file.id).collect::<Vec<_>>(),
            page.has_more,
        )
    };
    assert_eq!(
        ids(None, None, 10, Order::Newest).await,
        (vec![second.clone(), first.clone()], false)
    );
    assert_eq!(
        ids(None, None, 1, Order::Oldest).await,
        (vec![first.clone()], true)
    );
    assert_eq!(
        ids(None, Some(&*first), 10, Order::Oldest).await,
        (vec![second.clone()], false)
    );
    assert_eq!(
        ids(Some("fine-tune"), None, 10, Order::Newest).await,
        (vec![first.clone()], false)
    );
    router.own().delete_file(&second).await.unwrap();
    for id in [second.as_str(), "file-nobody", "../tandem.db"] {
        assert_eq!(kind(&router.own().file(id).await.unwrap_err()), "UnknownFile");
        assert_eq!(
            kind(&router.own().delete_file(id).await.unwrap_err()),
            "UnknownFile"
        );
    }
}
