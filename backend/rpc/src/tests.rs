//! A real session over loopback, with the test in the engine's place at the command channel.

use std::path::PathBuf;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tandem_core::id::{AdapterDigest, AdapterRef, Digest, JobId, RequestId};
use tandem_core::job::{Hyper, JobEvent, JobSpec, Life, Lora, Method, Schedule};
use tandem_core::message::{Event, Fault, FinishReason, Generate, Scored};
use tandem_core::replica::{AdapterInfo, COMMAND_QUEUE, Command, EVENT_QUEUE, ReplicaHandle, ReplicaInfo};
use tandem_core::sampling::{RawSampling, Sampling};
use tandem_core::stats::Stats;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{Hooks, ModelFiles, Remote, Service, connect};

/// Nothing here waits this long unless it is broken.
const PATIENCE: Duration = Duration::from_secs(20);
const UNKNOWN: Digest = Digest([0xff; 32]);

/// Folders that a machine of its own would have.
struct Machine;

impl Hooks for Machine {
    fn adapter(&self, digest: AdapterDigest) -> BoxFuture<'static, Result<AdapterRef, Fault>> {
        async move {
            // Not ready at once: as if it was fetched.
            tokio::task::yield_now().await;
            match digest == UNKNOWN {
                true => Err(Fault::Adapter("nobody has it".to_owned())),
                false => Ok(AdapterRef {
                    digest,
                    folder: local(&digest.short()),
                }),
            }
        }
        .boxed()
    }

    fn job(&self, spec: JobSpec) -> BoxFuture<'static, Result<JobSpec, String>> {
        async move {
            let folder = local(&spec.id.0);
            Ok(JobSpec { folder, ..spec })
        }
        .boxed()
    }

    fn job_event(&self, _: &JobSpec, event: JobEvent) -> BoxFuture<'static, Result<JobEvent, String>> {
        async move {
            match event {
                JobEvent::Validated { step: 13, .. } => Err("no room".to_owned()),
                event => Ok(event),
            }
        }
        .boxed()
    }
}

fn local(name: &str) -> PathBuf {
    PathBuf::from("/elsewhere").join(name)
}

struct Backend {
    commands: mpsc::Receiver<Command>,
    stats: watch::Sender<Stats>,
    service: Service,
    url: String,
}

impl Backend {
    async fn start() -> Backend {
        let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
        let (stats, published) = watch::channel(Stats::default());
        let replica = ReplicaHandle {
            info: info(),
            commands: sender,
            stats: published,
        };
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        std::fs::write(folder.path().join("model.safetensors"), "big").unwrap();
        let files = ModelFiles::read(folder.path()).unwrap();
        let service = Service::new(replica, Machine, &files, "base");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serve = crate::serve(
            listener,
            service.clone(),
            axum::Router::new(),
            std::future::pending(),
        );
        tokio::spawn(async move { serve.await.unwrap() });
        Backend {
            commands,
            stats,
            service,
            url,
        }
    }

    async fn connect(&self) -> Remote {
        connect(&self.url).await.unwrap()
    }

    async fn next(&mut self) -> Command {
        soon(self.commands.recv()).await.expect("the service lives")
    }

    async fn generate(&mut self) -> (Generate, mpsc::Sender<Event>) {
        match self.next().await {
            Command::Generate(generate, events) => (generate, events),
            _ => panic!("a Generate was expected"),
        }
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("it happens soon")
}

fn info() -> ReplicaInfo {
    ReplicaInfo {
        model_folder: "/models/base".into(),
        base_digest: Digest([7; 32]),
        vocab_size: 100,
        hidden_size: 64,
        max_model_len: 512,
        max_num_seqs: 4,
        max_num_batched_tokens: 512,
        dtype: "float32".to_owned(),
        device: "cpu".to_owned(),
        parameters: 1,
        weight_bytes: 2,
        kv_blocks: 3,
        block_size: 16,
        kv_bytes: 4,
        max_loras: 4,
        max_lora_rank: 64,
        tensor_parallel_size: 1,
        lora_targets: vec!["q_proj".to_owned()],
        eos_tokens: vec![1],
        grammars: true,
    }
}

fn request(id: u64) -> Generate {
    Generate {
        id: RequestId(id),
        prompt: vec![3, 1, 4].into(),
        adapter: None,
        sampling: Sampling::greedy(),
        grammar: None,
        max_tokens: 10,
        stop_tokens: vec![1, 2],
    }
}

fn token(token: u32) -> Event {
    Event::Token(Scored {
        token,
        logprob: 0.0,
        top: vec![],
    })
}

async fn ask(remote: &Remote, generate: Generate) -> mpsc::Receiver<Event> {
    let (sender, events) = mpsc::channel(EVENT_QUEUE);
    let sent = remote
        .replica
        .commands
        .send(Command::Generate(generate, sender))
        .await;
    assert!(sent.is_ok(), "the session is open");
    events
}

#[tokio::test]
async fn a_request_and_its_answer_travel_whole() {
    let mut backend = Backend::start().await;
    let remote = backend.connect().await;
    let expected = ReplicaInfo {
        model_folder: "base".into(),
        ..info()
    };
    assert_eq!(
        (&remote.replica.info, remote.model_name.as_str()),
        (&expected, "base")
    );
    let names: Vec<&str> = remote.files.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["tokenizer.json"], "weights stay at home");

    let raw = RawSampling {
        temperature: Some(0.1 + 0.2),
        top_k: Some(5),
        logit_bias: vec![(3, -1.5)],
        seed: Some(u64::MAX),
        logprobs: Some(2),
        prompt_logprobs: Some(1),
        ..RawSampling::default()
    };
    let digest = Digest([9; 32]);
    let asked = Generate {
        adapter: Some(AdapterRef {
            digest,
            folder: "/here/not/there".into(),
        }),
        sampling: Sampling::new(raw, 100).unwrap(),
        ..request(77)
    };
    let mut answer = ask(&remote, asked.clone()).await;
    let (heard, events) = backend.generate().await;
    let expected = Generate {
        id: heard.id,
        adapter: Some(AdapterRef {
            digest,
            folder: local(&digest.short()),
        }),
        ..asked
    };
    assert_eq!(heard, expected);
    let scored = |token| Scored {
        token,
        logprob: -0.25,
        top: vec![(token, -0.25), (5, f32::MIN)],
    };
    let said = [
        Event::Prompt(vec![None, Some(scored(1)), Some(scored(4))]),
        Event::Token(scored(8)),
        Event::Finished {
            reason: FinishReason::Stop(8),
            cached_tokens: 16,
        },
    ];
    for event in &said {
        events.send(event.clone()).await.unwrap();
    }
    for event in said {
        assert_eq!(soon(answer.recv()).await, Some(event));
    }
    assert_eq!(soon(answer.recv()).await, None);
    soon(backend.service.idle()).await;

    let unknown = Generate {
        adapter: Some(AdapterRef {
            digest: UNKNOWN,
            folder: PathBuf::new(),
        }),
        ..request(78)
    };
    let mut answer = ask(&remote, unknown).await;
    let fault = Fault::Adapter("nobody has it".to_owned());
    assert_eq!(soon(answer.recv()).await, Some(Event::Failed(fault)));
}

#[tokio::test]
async fn who_does_not_read_stops_only_itself() {
    let mut backend = Backend::start().await;
    let remote = backend.connect().await;
    let mut slow = ask(&remote, request(1)).await;
    let (_, slow_events) = backend.generate().await;
    let mut fast = ask(&remote, request(2)).await;
    let (_, fast_events) = backend.generate().await;
    // All that fits: the reader's channel, and the service's.
    let mut sent = 0;
    loop {
        match slow_events.try_send(token(sent)) {
            Ok(()) => sent += 1,
            Err(_) if sent as usize == 2 * EVENT_QUEUE => break,
            Err(_) => tokio::task::yield_now().await,
        }
    }
    // Whoever reads gets many times that.
    for i in 0..20 * EVENT_QUEUE as u32 {
        fast_events.send(token(i)).await.unwrap();
        assert_eq!(soon(fast.recv()).await, Some(token(i)));
    }
    assert!(
        slow_events.try_send(token(sent)).is_err(),
        "it waits for its reader"
    );
    let rest = tokio::spawn(async move {
        for i in sent..sent + 1000 {
            slow_events.send(token(i)).await.unwrap();
        }
    });
    for i in 0..sent + 1000 {
        assert_eq!(soon(slow.recv()).await, Some(token(i)), "in order, none lost");
    }
    rest.await.unwrap();
}

#[tokio::test]
async fn who_leaves_is_aborted() {
    let mut backend = Backend::start().await;
    let remote = backend.connect().await;
    let answer = ask(&remote, request(1)).await;
    let (heard, events) = backend.generate().await;
    drop(answer);
    // The next word finds nobody.
    events.send(token(1)).await.unwrap();
    soon(events.closed()).await;
    assert!(matches!(backend.next().await, Command::Abort(id) if id == heard.id));

    let _answer = ask(&remote, request(2)).await;
    let (heard, events) = backend.generate().await;
    drop(remote.replica.commands.send(Command::Abort(RequestId(2))).await);
    assert!(matches!(backend.next().await, Command::Abort(id) if id == heard.id));
    soon(events.closed()).await;
    soon(backend.service.idle()).await;

    // Two routers count from the same number.
    let other = backend.connect().await;
    let (_one, _two) = (ask(&remote, request(3)).await, ask(&other, request(3)).await);
    let ((one, events), (two, _)) = (backend.generate().await, backend.generate().await);
    assert_ne!(one.id, two.id);
    // A router that stops takes its requests along; the backend lives on.
    drop(remote.replica.commands.send(Command::Stop).await);
    soon(events.closed()).await;
    soon(remote.replica.commands.closed()).await;
    assert!(!other.replica.commands.is_closed());
}

#[tokio::test]
async fn what_a_lost_session_carried_is_lost() {
    let mut backend = Backend::start().await;
    let Remote { mut replica, .. } = backend.connect().await;
    let remote = backend.connect().await;
    let mut answer = ask(&remote, request(1)).await;
    let (_, events) = backend.generate().await;
    let (reply, load) = oneshot::channel();
    let adapter = AdapterRef {
        digest: Digest([9; 32]),
        folder: PathBuf::new(),
    };
    drop(
        remote
            .replica
            .commands
            .send(Command::LoadAdapter(adapter, reply))
            .await,
    );
    let Command::LoadAdapter(_, _reply) = backend.next().await else {
        panic!("a LoadAdapter was expected")
    };
    // The engine dies: its channels close, its sessions end in order.
    let Backend { commands, stats, .. } = backend;
    drop((commands, events, _reply, stats));
    assert_eq!(soon(answer.recv()).await, None, "no end was said");
    assert!(soon(load).await.is_err());
    soon(async { while replica.stats.changed().await.is_ok() {} }).await;
    soon(replica.commands.closed()).await;

    // The process dies, and with it all its connections.
    let process = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let mut backend = process.spawn(Backend::start()).await.unwrap();
    let remote = backend.connect().await;
    let mut answer = ask(&remote, request(1)).await;
    let (_, _events) = backend.generate().await;
    process.shutdown_background();
    let last = soon(answer.recv()).await;
    assert!(
        matches!(last, None | Some(Event::Failed(Fault::ReplicaLost(_)))),
        "{last:?}"
    );
    soon(remote.replica.commands.closed()).await;
    assert!(connect(&backend.url).await.is_err());
}

#[tokio::test]
async fn a_backend_that_drains_says_so_and_takes_nothing_new() {
    let mut backend = Backend::start().await;
    let mut remote = backend.connect().await;
    let published = Stats {
        running: 3,
        resident_adapters: vec![Digest([9; 32])],
        step_seconds: 0.1 + 0.2,
        ..Stats::default()
    };
    backend.stats.send_replace(published.clone());
    soon(remote.replica.stats.wait_for(|stats| *stats == published))
        .await
        .unwrap();
    let mut running = ask(&remote, request(1)).await;
    let (_, events) = backend.generate().await;
    backend.service.drain();
    soon(remote.replica.stats.wait_for(|stats| stats.draining))
        .await
        .unwrap();
    let mut late = ask(&remote, request(2)).await;
    assert_eq!(soon(late.recv()).await, Some(Event::Failed(Fault::ShuttingDown)));
    assert_eq!(backend.service.open_requests(), 1);
    let end = Event::Finished {
        reason: FinishReason::Length,
        cached_tokens: 0,
    };
    events.send(end.clone()).await.unwrap();
    assert_eq!(soon(running.recv()).await, Some(end));
    soon(backend.service.idle()).await;
}

fn job(id: &str) -> JobSpec {
    JobSpec {
        id: JobId(id.to_owned()),
        folder: "/here".into(),
        base_model: "base".to_owned(),
        hyper: Hyper {
            n_epochs: 1,
            max_steps: None,
            batch_size: 1,
            gradient_accumulation_steps: 1,
            learning_rate: 0.1 + 0.2,
            lr_scheduler: Schedule::Linear,
            warmup_steps: 0,
            weight_decay: 1e-300,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            seed: u64::MAX,
            max_seq_length: 10,
            packing: false,
            save_steps: 0,
            eval_steps: 0,
            method: Method::Lora(Lora {
                r: 4,
                alpha: 8.0,
                dropout: 0.0,
                target_modules: vec!["q_proj".to_owned()],
                use_rslora: false,
            }),
        },
        life: Life {
            epoch: 3,
            saved: None,
        },
    }
}

async fn start(remote: &Remote, spec: JobSpec) -> mpsc::Receiver<JobEvent> {
    let (sender, events) = mpsc::channel(4);
    drop(
        remote
            .replica
            .commands
            .send(Command::StartJob(Box::new(spec), sender))
            .await,
    );
    events
}

#[tokio::test]
async fn a_job_runs_in_a_folder_of_its_machine() {
    let mut backend = Backend::start().await;
    let remote = backend.connect().await;
    let mut news = start(&remote, job("one")).await;
    // Before or after the start, but it is heard after it.
    drop(
        remote
            .replica
            .commands
            .send(Command::CancelJob(JobId("one".to_owned())))
            .await,
    );
    let (spec, events) = loop {
        match backend.next().await {
            Command::StartJob(spec, events) => break (*spec, events),
            Command::CancelJob(id) => assert_eq!(id.0, "one"),
            _ => panic!("a StartJob was expected"),
        }
    };
    let expected = JobSpec {
        folder: local("one"),
        ..job("one")
    };
    assert_eq!(spec, expected, "every bit of every number");
    assert!(matches!(backend.next().await, Command::CancelJob(id) if id.0 == "one"));
    let mut second = start(&remote, job("two")).await;
    assert!(matches!(
        soon(second.recv()).await,
        Some(JobEvent::Refused { .. })
    ));

    let validated = |step| JobEvent::Validated {
        step,
        loss: 0.1 + 0.2,
        token_accuracy: 1.0,
    };
    // More than either side's queue holds, read slowly.
    let writer = tokio::spawn(async move {
        for step in 20..60 {
            events.send(validated(step)).await.unwrap();
        }
        events
    });
    for step in 20..60 {
        assert_eq!(soon(news.recv()).await, Some(validated(step)));
    }
    let events = writer.await.unwrap();
    // What cannot be kept is not told: the job goes on elsewhere.
    events.send(validated(13)).await.unwrap();
    assert_eq!(soon(news.recv()).await, None);
    soon(events.closed()).await;

    let news = start(&remote, job("three")).await;
    let events = loop {
        match backend.next().await {
            Command::StartJob(_, events) => break events,
            // The first job's, once more.
            Command::CancelJob(id) if id.0 == "one" => {}
            _ => panic!("a StartJob was expected"),
        }
    };
    drop(news);
    // The next word finds nobody.
    let _ = events.send(validated(20)).await;
    soon(events.closed()).await;
}

#[tokio::test]
async fn adapters_load_and_go() {
    let mut backend = Backend::start().await;
    let remote = backend.connect().await;
    for digest in [Digest([9; 32]), UNKNOWN] {
        let (reply, answer) = oneshot::channel();
        let adapter = AdapterRef {
            digest,
            folder: PathBuf::new(),
        };
        drop(
            remote
                .replica
                .commands
                .send(Command::LoadAdapter(adapter, reply))
                .await,
        );
        let info = AdapterInfo {
            digest,
            rank: 4,
            bytes: 5,
        };
        let expected = match digest == UNKNOWN {
            true => Err(Fault::Adapter("nobody has it".to_owned())),
            false => {
                let Command::LoadAdapter(adapter, reply) = backend.next().await else {
                    panic!("a LoadAdapter was expected")
                };
                assert_eq!(adapter.folder, local(&digest.short()));
                reply.send(Ok(info.clone())).unwrap();
                Ok(info)
            }
        };
        assert_eq!(soon(answer).await.unwrap(), expected);
    }
    drop(
        remote
            .replica
            .commands
            .send(Command::UnloadAdapter(UNKNOWN))
            .await,
    );
    assert!(matches!(backend.next().await, Command::UnloadAdapter(UNKNOWN)));
}
