//! Models that clients train, beside jobs and requests.

use tandem_core::learner::{
    self, Adam, Batch, Clip, Datum, Learn, LearnerId, Loss, Moments, NewLearner, Pass, Reply, Save, Saving,
    Scores, Source, Stepped,
};

use super::jobs::{finished, job, to_the_end, train};
use super::*;

/// One client's side.
#[derive(Clone)]
struct Client {
    handle: ReplicaHandle,
    id: LearnerId,
}

impl Client {
    fn new(rig: &Rig, id: u64, rank: u32) -> Client {
        let client = Client {
            handle: rig.handle.clone(),
            id: LearnerId(id),
        };
        let new = NewLearner {
            lora: lora(rank),
            seed: u64::from(rank),
            tenant: format!("client {rank}"),
            from: None,
        };
        client.ask(|reply| Learn::Create(Box::new(new), reply)).unwrap();
        client
    }

    fn send<T>(&self, learn: impl FnOnce(Reply<T>) -> Learn) -> oneshot::Receiver<Result<T, Fault>> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Learn(self.id, learn(reply));
        assert!(self.handle.commands.blocking_send(command).is_ok());
        answer
    }

    fn ask<T>(&self, learn: impl FnOnce(Reply<T>) -> Learn) -> Result<T, Fault> {
        self.send(learn).blocking_recv().expect("the engine lives")
    }

    fn step(&self, learning_rate: f64) -> Stepped {
        let adam = Adam {
            learning_rate,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.0,
            grad_clip_norm: 1.0,
        };
        self.ask(|reply| Learn::Step(adam, reply)).unwrap()
    }

    fn learn(&self, batch: Batch) -> Result<Scores, Fault> {
        self.ask(|reply| Learn::Accumulate(Box::new(batch), reply))
    }

    fn save(&self, folder: &Path) -> AdapterRef {
        let save = Save {
            folder: folder.to_owned(),
            what: Saving::Adapter {
                base_model: "demo".to_owned(),
            },
        };
        let saved = self.ask(|reply| Learn::Save(save, reply)).unwrap();
        saved.adapter.expect("an adapter was asked")
    }
}

/// What the model says by itself, with the loss of each client's own kind.
fn batch(cases: &[Case], loss: Loss) -> Batch {
    let datum = |case: &Case| {
        let tokens = [&case.prompt[..], &case.greedy].concat();
        let n = tokens.len() - 1;
        let plain = Datum {
            tokens: tokens[..n].to_vec(),
            columns: 1,
            targets: tokens[1..].to_vec(),
            ..Datum::default()
        };
        match loss {
            Loss::CrossEntropy => plain,
            _ => Datum {
                sampled: vec![-1.0; n],
                advantages: (0..n).map(|i| if i % 2 == 0 { 1.0 } else { -0.5 }).collect(),
                ..plain
            },
        }
    };
    Batch {
        loss,
        data: cases.iter().map(datum).collect(),
        pass: Pass::ForwardBackward,
        trace: None,
    }
}

const CLIENTS: [(u32, Loss); 3] = [
    (4, Loss::CrossEntropy),
    (8, Loss::Ppo(Clip { low: 0.8, high: 1.2 })),
    (2, Loss::ImportanceSampling),
];

/// A client's training to its end: what it was told, and the adapter.
fn trained(
    client: &Client,
    loss: Loss,
    cases: &[Case],
    folder: &Path,
) -> (Vec<(Scores, Stepped)>, AdapterDigest) {
    let call = |n: usize| {
        let scores = client.learn(batch(&cases[..2 + n % 2], loss)).unwrap();
        (scores, client.step(1e-3))
    };
    let told = (0..8).map(call).collect();
    std::fs::create_dir_all(folder).unwrap();
    (told, client.save(folder).digest)
}

/// Three clients and a job, each alone, then all at once beside requests; on one rank and on two.
#[test]
fn clients_beside_a_job_and_requests_come_to_what_each_comes_to_alone() {
    let (folder, cases) = (demo(), cases());
    let mut losses: Vec<Vec<f64>> = vec![];
    for (dtype, ranks) in [(Dtype::Bf16, 1), (Dtype::F32, 1), (Dtype::F32, 2)] {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut rig = Rig::new(Options {
            dtype,
            team: Team::Threads(ranks),
            ..options(&folder)
        });
        let alone = CLIENTS.map(|(rank, loss)| {
            let client = Client::new(&rig, u64::from(rank), rank);
            trained(&client, loss, &cases, &path(&format!("alone-{rank}")))
        });
        let alone_job = finished(&to_the_end(&mut train(&rig, job(&path("job-alone"), &cases, 30))));
        let asked = Generate {
            stop_tokens: vec![],
            ..request(&cases[0].prompt, 40, greedy())
        };
        let expected = rig.ask(asked.clone());
        let before = rig.stats();
        assert_eq!((before.shared_passes, before.shared_slices), (0, 0));

        let mut job_events = train(&rig, job(&path("job-beside"), &cases, 30));
        let clients = CLIENTS.map(|(rank, _)| Client::new(&rig, 100 + u64::from(rank), rank));
        let beside = std::thread::scope(|scope| {
            let (cases, path) = (&cases, &path);
            let threads = [0, 1, 2].map(|i| {
                let ((rank, loss), client) = (CLIENTS[i], clients[i].clone());
                scope.spawn(move || trained(&client, loss, cases, &path(&format!("beside-{rank}"))))
            });
            for _ in 0..4 {
                rig.ask(asked.clone()).assert_same(&expected, "beside training");
            }
            threads.map(|thread| thread.join().unwrap())
        });
        assert_eq!(beside, alone, "{ranks} ranks");
        assert_eq!(finished(&to_the_end(&mut job_events)), alone_job);
        let stats = rig.stats();
        let (passes, slices) = (stats.shared_passes, stats.shared_slices);
        println!("{slices} slices in {passes} passes");
        assert!(
            passes > 0 && slices >= 2 * passes,
            "{slices} slices in {passes} passes"
        );
        if dtype == Dtype::F32 {
            let of = |(told, _): &(Vec<(Scores, Stepped)>, AdapterDigest)| {
                told.iter().map(|(scores, _)| scores.loss).collect::<Vec<_>>()
            };
            losses.push(alone.iter().flat_map(of).collect());
        }
    }
    let [one, two] = &losses[..] else {
        panic!("one rank and two")
    };
    for (one, two) in one.iter().zip(two) {
        assert!(
            (one - two).abs() < 1e-4 * one.abs().max(1.0),
            "{two} on two ranks, {one} on one"
        );
    }
}

/// What is kept in memory or in files is the same numbers, on one rank and on two.
#[test]
fn a_snapshot_answers_and_a_state_is_gone_on_from() {
    let (folder, cases) = (demo(), cases());
    let mut answers = vec![];
    for ranks in [1, 2] {
        let directory = tempfile::tempdir().unwrap();
        let mut rig = Rig::new(Options {
            team: Team::Threads(ranks),
            ..options(&folder)
        });
        let client = Client::new(&rig, 1, 8);
        let learn = |client: &Client| {
            let scores = client.learn(batch(&cases, Loss::CrossEntropy)).unwrap();
            (scores, client.step(5e-3))
        };
        (0..3).for_each(|_| drop(learn(&client)));
        let state = directory.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let save = Save {
            folder: state.clone(),
            what: Saving::State,
        };
        client.ask(|reply| Learn::Save(save, reply)).unwrap();
        let kept = directory.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        let kept = client.save(&kept);
        let snapshot = AdapterRef {
            digest: client.ask(Learn::Snapshot).unwrap(),
            folder: PathBuf::new(),
        };
        let with = |adapter: AdapterRef| Generate {
            adapter: Some(adapter),
            stop_tokens: vec![],
            ..request(&cases[1].prompt, 12, greedy())
        };
        let answer = rig.ask(with(snapshot.clone()));
        let expected: Vec<_> = (0..2).map(|_| learn(&client)).collect();
        // It does not change, and says what the file says.
        rig.ask(with(snapshot.clone()))
            .assert_same(&answer, "after two steps");
        rig.ask(with(kept)).assert_same(&answer, "from a file");
        let source = Source::State {
            file: state.join(learner::STATE),
            moments: Moments::Restored,
        };
        client.ask(|reply| Learn::Load(source, reply)).unwrap();
        let again: Vec<_> = (0..2).map(|_| learn(&client)).collect();
        assert_eq!(again, expected, "{ranks} ranks");
        rig.command(Command::UnloadAdapter(snapshot.digest));
        let gone = rig.ask(with(snapshot));
        assert!(matches!(gone.end, Some(Err(_))), "{:?}", gone.end);
        answers.push(answer);
    }
    assert_eq!(answers[0].ids(), answers[1].ids());
}

/// One that is let go in the midst, and one whose call is wrong, leave the others as they were.
#[test]
fn clients_that_leave_or_fail_leave_the_others() {
    let (folder, cases) = (demo(), cases());
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let rig = Rig::new(options(&folder));
    let (rank, loss) = CLIENTS[1];
    let alone = trained(&Client::new(&rig, 0, rank), loss, &cases, &path("alone"));
    let alone_job = finished(&to_the_end(&mut train(&rig, job(&path("job-alone"), &cases, 12))));

    let mut job_events = train(&rig, job(&path("job-beside"), &cases, 12));
    let stays = Client::new(&rig, 1, rank);
    let beside = std::thread::scope(|scope| {
        let (cases, path) = (&cases, &path);
        let thread = scope.spawn(move || trained(&stays, loss, cases, &path("beside")));
        for id in 2.. {
            if thread.is_finished() {
                break;
            }
            let leaves = Client::new(&rig, id, 3);
            let mut wrong = batch(cases, Loss::ImportanceSampling);
            wrong.data[1].sampled[0] = -1e30;
            match leaves.learn(wrong) {
                Err(Fault::Refused(why)) => {
                    assert!(why.starts_with("datum 1: its importance_sampling is"), "{why}")
                }
                other => panic!("{other:?}"),
            }
            let answer =
                leaves.send(|reply| Learn::Accumulate(Box::new(batch(cases, Loss::CrossEntropy)), reply));
            rig.command(Command::Learn(LearnerId(id), Learn::Drop));
            assert!(
                answer.blocking_recv().is_err(),
                "nobody answers for one that was let go"
            );
        }
        thread.join().unwrap()
    });
    assert_eq!(beside, alone);
    assert_eq!(finished(&to_the_end(&mut job_events)), alone_job);
    let stats = rig.stats();
    assert!(stats.shared_slices >= 2 * stats.shared_passes && stats.shared_passes > 0);
}
