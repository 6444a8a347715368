//! Several replicas behind one router: who is chosen, what a loss costs, who comes back.

use tandem_core::message::{Event, FinishReason, Generate};

use super::calls::{call, end, read, say};
use super::*;
use crate::api::{Call, Prompt, What};
use crate::fleet::Standing;

/// Two replicas, each with one life.
async fn two(house: &House) -> (Router, [Engine; 2]) {
    let ((a, first), (b, second)) = (replica(), replica());
    let members = vec![member("a", [a]), member("b", [b])];
    let router = house.open_fleet(Config::default(), members).await.unwrap();
    let both_up = |router: &Router| router.fleet().slots() == 8;
    until(&router, both_up).await;
    (router, [first, second])
}

async fn until(router: &Router, holds: impl Fn(&Router) -> bool) {
    let waiting = async {
        while !holds(router) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .expect("it holds soon");
}

/// Which engine got the next request, and the request.
async fn whose(engines: &mut [Engine; 2]) -> (usize, Generate, mpsc::Sender<Event>) {
    loop {
        let [a, b] = &mut *engines;
        let (index, command) = tokio::select! {
            command = a.next() => (0, command),
            command = b.next() => (1, command),
        };
        match command {
            Command::Generate(generate, events) => return (index, generate, events),
            // Goodbyes of requests that were dropped.
            Command::Abort(_) => {}
            _ => panic!("a Generate was expected"),
        }
    }
}

fn prompt(tokens: impl IntoIterator<Item = u32>) -> Call {
    Call {
        prompt: Prompt::Tokens(tokens.into_iter().map(|token| FIRST_BYTE + token).collect()),
        ..call("")
    }
}

fn standing(router: &Router, index: usize) -> Standing {
    router.fleet().reports()[index].standing.clone()
}

#[tokio::test]
async fn what_has_not_begun_goes_to_another_replica() {
    let house = House::new();
    let (router, mut engines) = two(&house).await;
    let mut generation = router.generate(Call { n: 2, ..call("x") }).await.unwrap();
    let (lost, first, events) = whose(&mut engines).await;
    let (same, second, more) = whose(&mut engines).await;
    assert_eq!(lost, same, "the choices of a call share their prompt");
    let [a, b] = engines;
    let (dead, mut left) = if lost == 0 { (a, b) } else { (b, a) };
    drop((dead, events, more));
    for asked in [first, second] {
        let (again, events) = left.generate().await;
        assert_eq!(again, asked);
        say(&events, "ok").await;
        end(&events, FinishReason::Length).await;
    }
    let texts: Vec<String> = read(&mut generation)
        .await
        .into_values()
        .map(|choice| choice.0)
        .collect();
    assert_eq!(texts, ["ok", "ok"]);
    assert_eq!(router.fleet().reports()[lost].ejections, 1);
    until(
        &router,
        |router| matches!(standing(router, lost), Standing::Down(why) if why == "it is dead"),
    )
    .await;
    assert!(router.ready());
}

#[tokio::test]
async fn what_has_begun_fails_and_says_so() {
    let house = House::new();
    let (router, mut engines) = two(&house).await;
    let mut generation = router.generate(call("x")).await.unwrap();
    let (lost, _, events) = whose(&mut engines).await;
    say(&events, "a").await;
    assert!(matches!(
        generation.pieces.recv().await.unwrap().what,
        What::Text { .. }
    ));
    let [a, b] = engines;
    let (dead, mut left) = if lost == 0 { (a, b) } else { (b, a) };
    drop((dead, events));
    let last = generation.pieces.recv().await.unwrap().what;
    assert!(matches!(&last, What::Failed(Fault::ReplicaLost(_))), "{last:?}");
    assert!(generation.pieces.recv().await.is_none());
    assert!(left.commands.try_recv().is_err(), "it was not asked again");
}

#[tokio::test]
async fn a_lost_replica_comes_back_and_takes_what_waited() {
    let house = House::new();
    let ((first, engine), (second, mut again)) = (replica(), replica());
    let members = vec![member("only", [first, second])];
    let router = house.open_fleet(Config::default(), members).await.unwrap();
    let stats = Stats {
        generated_tokens: 5,
        running: 1,
        ..Stats::default()
    };
    engine.stats.send_replace(stats);
    drop(engine);
    // Asked while there is none.
    let mut generation = router.generate(call("x")).await.unwrap();
    let (_, events) = again.generate().await;
    say(&events, "ok").await;
    end(&events, FinishReason::Length).await;
    assert_eq!(read(&mut generation).await[&0].0, "ok");
    let stats = router.stats();
    assert_eq!(
        (stats.generated_tokens, stats.running),
        (5, 0),
        "what was counted stays"
    );
    // Gone for good: who asks waits, then hears why.
    drop((again, events));
    let refused = router.generate(call("x")).await.err().unwrap().to_string();
    assert!(refused.contains("only: it is dead"), "{refused}");
}

#[tokio::test]
async fn a_replica_that_drains_ends_what_it_has_and_gets_nothing_new() {
    let house = House::new();
    let (router, mut engines) = two(&house).await;
    let mut running = router.generate(call("x")).await.unwrap();
    let (first, _, events) = whose(&mut engines).await;
    let draining = Stats {
        draining: true,
        ..Stats::default()
    };
    engines[first].stats.send_replace(draining);
    assert_eq!(standing(&router, first), Standing::Draining);
    for _ in 0..3 {
        let generation = router.generate(call("x")).await.unwrap();
        let (other, _, _events) = whose(&mut engines).await;
        assert_ne!(other, first);
        drop(generation);
    }
    say(&events, "to the end").await;
    end(&events, FinishReason::Length).await;
    assert_eq!(read(&mut running).await[&0].0, "to the end");
    // A request that was on its way is refused there, and begins elsewhere.
    engines[first].stats.send_replace(Stats::default());
    let _generation = router.generate(call("y")).await.unwrap();
    let (taker, asked, events) = whose(&mut engines).await;
    let draining = Stats {
        draining: true,
        ..Stats::default()
    };
    engines[taker].stats.send_replace(draining);
    events.send(Event::Failed(Fault::ShuttingDown)).await.unwrap();
    let (other, again, _events) = loop {
        // Goodbyes of the three above may still come.
        match engines[1 - taker].next().await {
            Command::Generate(again, events) => break (1 - taker, again, events),
            _ => continue,
        }
    };
    assert_eq!((other, again), (1 - taker, asked));
}

#[tokio::test]
async fn a_request_goes_where_its_beginning_or_its_adapter_is() {
    let house = House::new();
    let (router, mut engines) = two(&house).await;
    let room = Stats {
        kv_blocks_total: 1000,
        ..Stats::default()
    };
    for engine in &engines {
        engine.stats.send_replace(room.clone());
    }
    let beginning = || (0..200).map(|i| i % 250);
    let _first = router.generate(prompt(beginning())).await.unwrap();
    let (home, _, _first_events) = whose(&mut engines).await;
    let _second = router.generate(prompt(beginning().chain([7, 8]))).await.unwrap();
    let (there, _, _second_events) = whose(&mut engines).await;
    assert_eq!(there, home, "although it is busier");
    let _third = router
        .generate(prompt((0..200).map(|i| (i + 1) % 250)))
        .await
        .unwrap();
    let (there, _, _third_events) = whose(&mut engines).await;
    assert_eq!(
        there,
        1 - home,
        "another beginning goes where there is less to do"
    );

    let folder = house.adapter("one", "tensors");
    let load = router.own().load_adapter("tuned", &folder, crate::LoadMode::New);
    let loaded = async {
        let [a, b] = &mut engines;
        tokio::select! {
            adapter = a.answer_load(Ok(4)) => adapter,
            adapter = b.answer_load(Ok(4)) => adapter,
        }
    };
    let (card, adapter) = tokio::join!(load, loaded);
    card.unwrap();
    // Wherever it was checked: say that the busier one has it.
    engines[home].stats.send_replace(Stats {
        resident_adapters: vec![adapter.digest],
        ..room
    });
    let tuned = Call {
        model: "tuned".to_owned(),
        ..prompt([1, 2, 3])
    };
    let _fourth = router.generate(tuned).await.unwrap();
    let (there, asked, _) = whose(&mut engines).await;
    assert_eq!(
        (there, asked.adapter.map(|adapter| adapter.digest)),
        (home, Some(adapter.digest))
    );
}

#[tokio::test]
async fn a_job_goes_where_nobody_streams() {
    let house = House::new();
    let (router, mut engines) = two(&house).await;
    let _stream = router.generate(call("x")).await.unwrap();
    let (busy, _, _events) = whose(&mut engines).await;
    let there = router.0.fleet.job_seat().expect("both have room").replica.clone();
    assert!(there.commands.same_channel(&{
        let all = router.fleet().all();
        all[1 - busy].commands.clone()
    }));
    engines[1 - busy].stats.send_replace(Stats {
        training_jobs: 1,
        ..Stats::default()
    });
    let other = router.0.fleet.job_seat().expect("one has room");
    assert!(!other.replica.commands.same_channel(&there.commands));
    // What this router sent is counted before the replica says so.
    assert!(router.0.fleet.job_seat().is_none(), "both train one");
    drop(other);
    assert!(router.0.fleet.job_seat().is_some());
}

#[tokio::test]
async fn a_replica_that_differs_is_not_let_in() {
    let house = House::new();
    let ((good, _engine), (mut other, _other_engine)) = (replica(), replica());
    other.info.base_digest = Digest([8; 32]);
    // The first that comes decides; the other's first life waits for it.
    let router = house
        .open_fleet(
            Config::default(),
            // As long as it comes again, the same is said of it.
            vec![
                member("good", [good]),
                member("other", [(); 8].map(|()| other.clone())),
            ],
        )
        .await
        .unwrap();
    let refused = |router: &Router| {
        router
            .fleet()
            .reports()
            .into_iter()
            .find_map(|report| match report.standing {
                Standing::Down(why) if why.contains("its base model is") => Some(why),
                _ => None,
            })
    };
    until(&router, |router| refused(router).is_some()).await;
    let why = refused(&router).unwrap();
    for digest in [Digest([7; 32]), Digest([8; 32])] {
        assert!(why.contains(&digest.to_string()), "{why}");
    }
    assert_eq!(router.fleet().slots(), 4);
}
