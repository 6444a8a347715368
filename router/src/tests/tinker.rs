//! Training clients, with the test in the engine's place.

use tandem_core::learner::{Adam, Batch, Datum, Learn, Loss, Pass, Scores, Stepped};
use tandem_core::message::Fault;
use tandem_core::replica::Command;

use super::*;
use crate::tinker::{By, Call, Failure, NewModel, Outcome, Reach, Retrieved};

fn new_model() -> NewModel {
    NewModel {
        base_model: BASE.to_owned(),
        reach: Reach {
            rank: 4,
            train_attn: true,
            train_mlp: true,
            train_unembed: false,
        },
        seed: Some(1),
        user_metadata: None,
    }
}

fn batch(token: u32) -> Call {
    let datum = Datum {
        tokens: vec![token],
        columns: 1,
        targets: vec![token],
        ..Datum::default()
    };
    Call::Accumulate {
        batch: Batch {
            loss: Loss::CrossEntropy,
            data: vec![datum],
            pass: Pass::ForwardBackward,
            trace: None,
        },
        shapes: vec![None],
    }
}

fn step(learning_rate: f64) -> Call {
    Call::Step(Adam {
        learning_rate,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-12,
        weight_decay: 0.0,
        grad_clip_norm: 0.0,
    })
}

/// Answers like an engine, and writes down what it was asked.
async fn engine(mut replica: Engine) -> Vec<String> {
    let mut asked = vec![];
    while let Some(command) = replica.commands.recv().await {
        let Command::Learn(id, learn) = command else {
            continue;
        };
        let id = id.0;
        match learn {
            Learn::Create(_, reply) => {
                asked.push(format!("{id} create"));
                drop(reply.send(Ok(())));
            }
            Learn::Accumulate(batch, reply) => {
                let token = batch.data[0].tokens[0];
                asked.push(format!("{id} accumulate {token}"));
                let answer = match token {
                    13 => Err(Fault::Refused("an unlucky token".to_owned())),
                    _ => Ok(Scores {
                        loss: f64::from(token),
                        logprobs: vec![vec![-1.0]],
                    }),
                };
                drop(reply.send(answer));
            }
            Learn::Step(adam, reply) => {
                asked.push(format!("{id} step {}", adam.learning_rate));
                drop(reply.send(Ok(Stepped {
                    step: 1,
                    grad_norm: 1.0,
                })));
            }
            Learn::Clear(reply) => {
                asked.push(format!("{id} clear"));
                drop(reply.send(Ok(())));
            }
            Learn::Drop => {
                asked.push(format!("{id} drop"));
                return asked;
            }
            other => other.refuse(Fault::Refused("not in this test".to_owned())),
        }
    }
    asked
}

async fn outcome(view: &View, id: &str) -> std::sync::Arc<Outcome> {
    match view.retrieve(id).await.unwrap() {
        Retrieved::Done(outcome) => outcome,
        Retrieved::NotYet => panic!("{id} is not done"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_done_in_the_order_of_their_numbers_and_once() {
    let house = House::new();
    let (router, replica) = house.open().await;
    let engine = tokio::spawn(engine(replica));
    let own = router.own();
    let session = own.open_session().unwrap();
    let created = own.create_model(&session, 0, new_model()).unwrap();
    assert_eq!(
        own.create_model(&session, 0, new_model()).unwrap(),
        created,
        "sent again"
    );
    let model = format!("{session}:train:0");
    // A call of several parts: the first part comes last.
    let second = own.submit(&model, 2, Ok(batch(22))).unwrap();
    let third = own.submit(&model, 3, Ok(batch(23))).unwrap();
    let first = own.submit(&model, 1, Ok(batch(21))).unwrap();
    assert_eq!(
        own.submit(&model, 2, Ok(batch(22))).unwrap(),
        second,
        "sent again"
    );
    for (id, loss) in [(&first, 21.0), (&second, 22.0), (&third, 23.0)] {
        assert!(
            matches!(&*outcome(&own, id).await, Outcome::Scored { scores, .. } if scores.loss == loss),
            "{id}"
        );
    }
    // One that is wrong takes its number, and with it the step behind.
    let wrong = own.submit(&model, 4, Err("nonsense".to_owned())).unwrap();
    let stepped = own.submit(&model, 5, Ok(step(0.5))).unwrap();
    for (id, words) in [(&wrong, "nonsense"), (&stepped, "no step was made")] {
        match &*outcome(&own, id).await {
            Outcome::Failed(Failure { message, by }) => {
                assert!(message.contains(words), "{message}");
                assert_eq!(*by, By::User);
            }
            other => panic!("{other:?}"),
        }
    }
    for (seq, call) in [(6, batch(13)), (7, step(1.0)), (8, batch(24)), (9, step(2.0))] {
        own.submit(&model, seq, Ok(call)).unwrap();
    }
    let last = own.submit(&model, 10, Ok(step(3.0))).unwrap();
    assert!(matches!(&*outcome(&own, &last).await, Outcome::Stepped(_)));
    assert!(own.submit("tnk-other:train:0", 1, Ok(step(1.0))).is_err());
    own.finish_session(&session).unwrap();
    assert!(matches!(own.hear_session(&session), Err(RouterError::Gone(_))));
    let asked = engine.await.unwrap();
    assert_eq!(
        asked,
        [
            "0 create",
            "0 accumulate 21",
            "0 accumulate 22",
            "0 accumulate 23",
            "0 clear",
            "0 accumulate 13",
            "0 clear",
            "0 accumulate 24",
            "0 step 2",
            "0 step 3",
            "0 drop",
        ]
    );
}

#[tokio::test]
async fn one_tenant_leaves_places_for_others() {
    let house = House::new();
    let (router, _engine) = house.open().await;
    let [greedy, modest] = ["greedy", "modest"].map(|tenant| {
        router.of(&Client {
            tenant: tenant.parse().unwrap(),
            ..Client::default()
        })
    });
    let mut opened = 0;
    let refused = loop {
        match greedy.open_session() {
            Ok(_) => opened += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(opened, 128);
    assert!(
        matches!(
            refused,
            RouterError::NoShare {
                own: 128,
                places: 256,
                ..
            }
        ),
        "{refused}"
    );
    let session = modest.open_session().unwrap();
    // A sampler keeps what it is, not all that was said of it.
    let sampler = modest
        .create_sampler(&session, 1, Some(BASE), None)
        .await
        .unwrap();
    let ask = || Err("it is refused".to_owned());
    let (id, names) = modest.sample(&sampler, 1, 3, ask()).await.unwrap();
    assert_eq!(names, [format!("{id}-0"), format!("{id}-1"), format!("{id}-2")]);
    assert_eq!(
        modest.sample(&sampler, 1, 3, ask()).await.unwrap(),
        (id, names),
        "sent again"
    );
}
