//! A model that a client trains, over the wire.

use tandem_core::learner::{
    Batch, Datum, Learn, LearnerId, Loss, Moments, NewLearner, Pass, Reply, Save, Saving, Scores, Source,
};

use super::*;
use crate::learn::is_below;

const MODEL: LearnerId = LearnerId(5);

async fn learn<T>(
    remote: &Remote,
    what: impl FnOnce(Reply<T>) -> Learn,
) -> oneshot::Receiver<Result<T, Fault>> {
    let (reply, answer) = oneshot::channel();
    let sent = remote
        .replica
        .commands
        .send(Command::Learn(MODEL, what(reply)))
        .await;
    assert!(sent.is_ok(), "the session is open");
    answer
}

async fn heard(backend: &mut Backend) -> (LearnerId, Learn) {
    match backend.next().await {
        Command::Learn(id, learn) => (id, learn),
        _ => panic!("a word to a learner was expected"),
    }
}

#[tokio::test]
async fn a_clients_model_travels_whole_and_ends_with_its_session() {
    let mut backend = Backend::start().await;
    let remote = backend.connect().await;
    let state = |root: &str| Source::State {
        file: Path::new(root).join("tinker/run/state/name/state.safetensors"),
        moments: Moments::Restored,
    };
    let new = |from| NewLearner {
        lora: Lora {
            r: 4,
            alpha: 6.5,
            dropout: 0.0,
            target_modules: vec!["q_proj".to_owned()],
            use_rslora: true,
            use_dora: false,
        },
        seed: u64::MAX,
        tenant: "acme".to_owned(),
        from: Some(from),
    };
    // Nothing is made before it was looked at.
    let mut huge = new(state("/here"));
    huge.lora.r = u32::MAX;
    let refused = learn(&remote, |reply| Learn::Create(Box::new(huge), reply)).await;
    let refused = soon(refused).await.unwrap().unwrap_err().to_string();
    assert!(refused.contains("a rank must be between 1 and"), "{refused}");
    let created = learn(&remote, |reply| {
        Learn::Create(Box::new(new(state("/here"))), reply)
    })
    .await;
    let (id, Learn::Create(heard_of, reply)) = heard(&mut backend).await else {
        panic!("a Create was expected")
    };
    assert_eq!(*heard_of, new(state("/elsewhere")));
    reply.send(Ok(())).unwrap();
    assert_eq!(soon(created).await.unwrap(), Ok(()));

    let batch = Batch {
        loss: Loss::Dro { beta: 0.1 },
        data: vec![Datum {
            tokens: vec![7, 8],
            columns: 1,
            targets: vec![8, 9],
            weights: vec![0.1, -1e-30],
            sampled: vec![-0.3, f32::MIN_POSITIVE],
            advantages: vec![1.0 / 3.0, -2.0],
            ratio_mask: vec![],
        }],
        pass: Pass::ForwardBackward,
        trace: None,
    };
    let scored = learn(&remote, |reply| Learn::Accumulate(Box::new(batch.clone()), reply)).await;
    let (same, Learn::Accumulate(heard_of, reply)) = heard(&mut backend).await else {
        panic!("an Accumulate was expected")
    };
    assert_eq!((same, *heard_of), (id, batch));
    let scores = Scores {
        loss: 0.1 + 0.2,
        logprobs: vec![vec![-0.1, -12.3]],
    };
    reply.send(Ok(scores.clone())).unwrap();
    assert_eq!(soon(scored).await.unwrap(), Ok(scores));

    // A file elsewhere than in the data folder is of this machine alone.
    let save = |folder: &str| Save {
        folder: folder.into(),
        what: Saving::Adapter {
            base_model: "base".to_owned(),
        },
    };
    let refused = learn(&remote, |reply| Learn::Save(save("/tmp/x"), reply)).await;
    assert!(matches!(soon(refused).await.unwrap(), Err(Fault::Step(why)) if why.contains("/tmp/x")));
    let saved = learn(&remote, |reply| Learn::Save(save("/here/staging/1"), reply)).await;
    let (_, Learn::Save(heard_of, reply)) = heard(&mut backend).await else {
        panic!("a Save was expected")
    };
    assert_eq!(heard_of, save("/elsewhere/staging/1"));
    let adapter = |root: &str| {
        let folder = Path::new(root).join("staging/1/adapter");
        let digest = Digest([3; 32]);
        Saved {
            adapter: Some(AdapterRef { digest, folder }),
        }
    };
    reply.send(Ok(adapter("/elsewhere"))).unwrap();
    assert_eq!(soon(saved).await.unwrap(), Ok(adapter("/here")));

    // A snapshot lies in no folder.
    let snapshot = learn(&remote, Learn::Snapshot).await;
    let (_, Learn::Snapshot(reply)) = heard(&mut backend).await else {
        panic!("a Snapshot was expected")
    };
    reply.send(Ok(UNKNOWN)).unwrap();
    assert_eq!(soon(snapshot).await.unwrap(), Ok(UNKNOWN));
    let adapter = Some(AdapterRef {
        digest: UNKNOWN,
        folder: PathBuf::new(),
    });
    let sampled = Generate {
        adapter: adapter.clone(),
        ..request(1)
    };
    let mut events = ask(&remote, sampled).await;
    let (generate, sender) = backend.generate().await;
    assert_eq!(generate.adapter, adapter);
    sender.send(token(7)).await.unwrap();
    assert_eq!(soon(events.recv()).await, Some(token(7)));

    // An engine that gives no answer, and a router that leaves.
    let lost = learn(&remote, Learn::Clear).await;
    drop(heard(&mut backend).await);
    assert!(soon(lost).await.is_err(), "nobody answers");
    drop((remote, events));
    let (mut dropped, mut unloaded) = (false, false);
    while !(dropped && unloaded) {
        match backend.next().await {
            Command::Learn(gone, Learn::Drop) => dropped = gone == id,
            Command::UnloadAdapter(digest) => unloaded = digest == UNKNOWN,
            _ => {}
        }
    }
}

#[test]
fn a_path_that_comes_leads_below_the_data_folder() {
    for (path, expected) in [
        ("tinker/a/b", true),
        ("../b", false),
        ("a/../../b", false),
        ("/etc/b", false),
    ] {
        assert_eq!(is_below(Path::new(path)), expected, "{path}");
    }
}
