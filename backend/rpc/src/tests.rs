//! A real session over loopback, with the test in the engine's place at the command channel.

mod learners;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use tandem_core::id::{AdapterDigest, AdapterRef, Digest, RequestId};
use tandem_core::job::{Hyper, JobEvent, JobSpec, Life, Lora, Method, Objective, SaveStrategy, Schedule};
use tandem_core::learner::Saved;
use tandem_core::message::{Event, Fault, FinishReason, Generate, Guessed, Scored};
use tandem_core::pooling::Pooling;
use tandem_core::replica::{AdapterInfo, COMMAND_QUEUE, Command, EVENT_QUEUE, ReplicaHandle, ReplicaInfo};
use tandem_core::sampling::{RawSampling, Sampling};
use tandem_core::stats::Stats;
use tandem_core::trace::TraceContext;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};

use crate::wire::replica_client::ReplicaClient;
use crate::wire::up::Say;
use crate::wire::{self, Up};
use crate::{Acceptor, BadToken, ClientTls, Hooks, ModelFiles, Remote, Service, Token, connect};

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

    fn file(&self, path: &Path) -> BoxFuture<'static, Result<PathBuf, Fault>> {
        let found = Path::new("/elsewhere").join(path);
        async move { Ok(found) }.boxed()
    }

    fn folder(&self, path: &Path) -> BoxFuture<'static, Result<PathBuf, Fault>> {
        self.file(path)
    }

    fn saved(&self, folder: &Path, saved: &Saved) -> BoxFuture<'static, Result<(), Fault>> {
        let is_there = saved
            .adapter
            .as_ref()
            .is_none_or(|adapter| adapter.folder.ends_with(folder.join("adapter")));
        async move {
            match is_there {
                true => Ok(()),
                false => Err(Fault::Step("it was saved elsewhere".to_owned())),
            }
        }
        .boxed()
    }

    fn job(&self, spec: JobSpec) -> BoxFuture<'static, Result<JobSpec, String>> {
        async move {
            let folder = local(spec.id.as_str());
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
        Backend::with(None, None).await
    }

    async fn with(token: Option<Token>, tls: Option<Acceptor>) -> Backend {
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
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let serve = crate::serve(
            listener,
            service.clone(),
            token,
            tls,
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
        connect(&self.url, None, None, Path::new("/here")).await.unwrap()
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
        kv_tokens: 40,
        kv_bytes: 4,
        max_loras: 4,
        max_training_jobs: 1,
        max_lora_rank: 64,
        tensor_parallel_size: 1,
        lora_targets: vec!["q_proj".to_owned()],
        lora_sizes: [("q_proj".to_owned(), 128)].into(),
        eos_tokens: vec![1],
        grammars: true,
    }
}

fn request(id: u64) -> Generate {
    Generate {
        stop_tokens: vec![1, 2],
        ..Generate::new(RequestId(id), vec![3, 1, 4].into(), Sampling::greedy(), 10)
    }
}

fn token(token: u32) -> Event {
    let token = Scored {
        token,
        logprob: 0.0,
        top: vec![],
    };
    Event::Token {
        token,
        is_last: false,
    }
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
        salt: Some(Digest([8; 32])),
        trace: Some(Box::new(TraceContext { trace: 7, span: 9 })),
        priority: -5,
        key: 1 << 63 | 5,
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
        Event::Token {
            token: scored(3),
            is_last: false,
        },
        Event::Token {
            token: scored(8),
            is_last: true,
        },
        Event::Finished {
            reason: FinishReason::Stop(8),
            cached_tokens: 16,
            guessed: Guessed {
                tokens: 5,
                accepted: 3,
            },
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

    let pooled = Generate {
        max_tokens: 0,
        pooling: Some(Pooling::Mean),
        ..request(79)
    };
    let mut answer = ask(&remote, pooled.clone()).await;
    let (heard, events) = backend.generate().await;
    assert_eq!(
        heard,
        Generate {
            id: heard.id,
            ..pooled
        }
    );
    let vector = Event::Pooled(vec![0.5, f32::MIN_POSITIVE]);
    events.send(vector.clone()).await.unwrap();
    assert_eq!(soon(answer.recv()).await, Some(vector));

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
async fn a_backend_says_no_more_than_it_was_asked() {
    let scored = |alternatives| Scored {
        token: 3,
        logprob: -0.25,
        top: vec![(5, -1.0); alternatives],
    };
    let prompt = |tokens| Event::Prompt(vec![Some(scored(1)); tokens]);
    let token = Event::Token {
        token: scored(3),
        is_last: false,
    };
    let vector = Event::Pooled(vec![0.5; info().hidden_size as usize + 1]);
    let raw = RawSampling {
        logprobs: Some(2),
        prompt_logprobs: Some(1),
        ..RawSampling::default()
    };
    let answer = Generate {
        sampling: Sampling::new(raw, 100).unwrap(),
        ..request(80)
    };
    let pooled = Generate {
        max_tokens: 0,
        pooling: Some(Pooling::Mean),
        ..request(81)
    };
    let cases = [
        (
            &answer,
            vec![token],
            "3 alternatives to a token where 2 were asked for",
        ),
        (
            &answer,
            vec![prompt(4)],
            "5 scores of a prompt where 3 were asked for",
        ),
        (
            &answer,
            vec![prompt(2); 2],
            "3 scores of a prompt where 0 were asked for",
        ),
        (
            &pooled,
            vec![vector],
            "65 numbers of a vector where 64 were asked for",
        ),
    ];
    for (asked, said, why) in cases {
        let mut backend = Backend::start().await;
        let remote = backend.connect().await;
        let mut answer = ask(&remote, asked.clone()).await;
        let (_, events) = backend.generate().await;
        for event in said {
            events.send(event).await.unwrap();
        }
        let end = loop {
            match soon(answer.recv()).await {
                Some(Event::Failed(Fault::ReplicaLost(end))) => break end,
                Some(_) => {}
                None => panic!("the answer ends without a word"),
            }
        };
        assert!(end.contains(why), "{end}");
    }
}

#[tokio::test]
async fn an_engine_that_hangs_loses_its_requests() {
    let mut backend = Backend::start().await;
    let remote = backend.connect().await;
    // With nothing to do it may be silent for as long as it likes; at work it says something after each turn.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut answer = ask(&remote, request(1)).await;
    let (_, _events) = backend.generate().await;
    for steps in 0..4 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        backend.stats.send_replace(Stats {
            steps,
            ..Stats::default()
        });
    }
    assert!(answer.try_recv().is_err(), "it is at work");
    let end = soon(answer.recv()).await;
    let why = Fault::ReplicaLost("its engine has taken no turn for 3s".to_owned());
    assert_eq!(end, Some(Event::Failed(why)));
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
    assert!(
        connect(&backend.url, None, None, Path::new("/here"))
            .await
            .is_err()
    );
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
        guessed: Guessed::default(),
    };
    events.send(end.clone()).await.unwrap();
    assert_eq!(soon(running.recv()).await, Some(end));
    soon(backend.service.idle()).await;
}

fn job(id: &str) -> JobSpec {
    JobSpec {
        id: id.parse().unwrap(),
        folder: "/here".into(),
        tenant: String::new(),
        base_model: "base".to_owned(),
        hyper: Hyper {
            n_epochs: 1.0,
            max_steps: None,
            max_steps_per_epoch: Some(7),
            batch_size: 1,
            gradient_accumulation_steps: 1,
            learning_rate: 0.1 + 0.2,
            lr_scheduler: Schedule::Linear,
            warmup_steps: 0,
            weight_decay: 1e-300,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            optimizer: Default::default(),
            max_grad_norm: 1.0,
            loraplus_lr_ratio: None,
            neftune_noise_alpha: None,
            seed: u64::MAX,
            max_seq_length: 10,
            packing: false,
            shuffle: true,
            save_strategy: SaveStrategy::Steps,
            save_steps: 0,
            eval_steps: 0,
            selection: None,
            objective: Objective::default(),
            frozen_layers: 0,
            method: Method::Lora(Lora {
                r: 4,
                alpha: 8.0,
                dropout: 0.0,
                target_modules: vec!["q_proj".to_owned()],
                use_rslora: false,
                use_dora: false,
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
            .send(Command::CancelJob("one".parse().unwrap()))
            .await,
    );
    let (spec, events) = loop {
        match backend.next().await {
            Command::StartJob(spec, events) => break (*spec, events),
            Command::CancelJob(id) => assert_eq!(id.as_str(), "one"),
            _ => panic!("a StartJob was expected"),
        }
    };
    let expected = JobSpec {
        folder: local("one"),
        ..job("one")
    };
    assert_eq!(spec, expected, "every bit of every number");
    assert!(matches!(backend.next().await, Command::CancelJob(id) if id.as_str() == "one"));
    let mut second = start(&remote, job("two")).await;
    assert!(matches!(
        soon(second.recv()).await,
        Some(JobEvent::Refused { .. })
    ));

    let validated = |step| JobEvent::Validated {
        step,
        loss: 0.1 + 0.2,
        token_accuracy: 1.0,
        metrics: BTreeMap::new(),
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
            Command::CancelJob(id) if id.as_str() == "one" => {}
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

/// What a client says that is not a router of ours.
async fn say(url: &str, ups: Vec<Say>) -> Result<Vec<wire::Down>, tonic::Status> {
    let endpoint = tonic::transport::Endpoint::from_shared(url.to_owned()).unwrap();
    let mut client = ReplicaClient::new(soon(endpoint.connect()).await.unwrap());
    let ups: Vec<Up> = ups.into_iter().map(|say| Up { say: Some(say) }).collect();
    // The session stays open until it is answered.
    let ups = futures::stream::iter(ups).chain(futures::stream::pending());
    let mut inbound = soon(client.session(ups)).await?.into_inner();
    let mut downs = Vec::new();
    loop {
        match soon(inbound.message()).await? {
            Some(down)
                if down.stats_json.is_some() && down.events.is_empty() && down.job_events.is_empty() => {}
            Some(down) => {
                downs.push(down);
                return Ok(downs);
            }
            None => return Ok(downs),
        }
    }
}

fn generate() -> wire::Generate {
    wire::Generate {
        stream: 1,
        credit: 8,
        prompt: vec![3, 1, 4],
        adapter: None,
        sampling_json: b"{\"logit_bias\": []}".to_vec(),
        max_tokens: 10,
        stop_tokens: vec![1, 2],
        grammar_json: None,
        salt: None,
        traceparent: None,
        pooling_json: None,
        priority: 0,
        key: 0,
        thinking_json: None,
    }
}

fn start_job(change: impl FnOnce(&mut serde_json::Value)) -> Say {
    let mut spec = serde_json::to_value(job("ftjob-one")).unwrap();
    change(&mut spec);
    Say::StartJob(wire::StartJob {
        stream: 1,
        credit: 8,
        spec_json: serde_json::to_vec(&spec).unwrap(),
    })
}

/// Whoever reaches the port may say anything: each is refused, with a reason, and costs nobody else anything.
#[tokio::test]
async fn what_no_router_says_is_refused() {
    let sampling = |json: &str| wire::Generate {
        sampling_json: json.as_bytes().to_vec(),
        ..generate()
    };
    let hyper = |name: &'static str, value: serde_json::Value| start_job(|spec| spec["hyper"][name] = value);
    let lora = |name: &'static str, value: serde_json::Value| {
        start_job(|spec| spec["hyper"]["method"]["Lora"][name] = value)
    };
    let named = |id: &str| start_job(|spec| spec["id"] = id.into());
    let many = 4_000_000_000_u32;
    // Cannot be read: the session ends.
    let ids = "is no job's id";
    let unreadable = [
        ("a job that is a path", named("../../x"), ids),
        ("a job that is a whole path", named("/etc"), ids),
        ("a job with a NUL", named("ftjob-\0"), ids),
        ("a job without a name", named(""), ids),
        ("a cancel of a path", Say::CancelJob("../x".to_owned()), ids),
        ("a pause of a path", Say::PauseJob("../x".to_owned()), ids),
        ("a long name", Say::CancelJob("x".repeat(1 << 20)), ids),
        ("no JSON", Say::Generate(sampling("{")), "cannot read"),
        (
            "a number that is none",
            Say::Generate(sampling(r#"{"logprobs": -1, "logit_bias": []}"#)),
            "cannot read",
        ),
        (
            "a job that is a list",
            Say::StartJob(wire::StartJob {
                stream: 1,
                credit: 1,
                spec_json: b"[]".to_vec(),
            }),
            "cannot read",
        ),
        (
            "half a digest",
            Say::UnloadAdapter(vec![9; 16]),
            "a digest of 16 bytes",
        ),
        (
            "a path for a digest",
            Say::LoadAdapter(wire::LoadAdapter {
                stream: 1,
                adapter: b"../../x".to_vec(),
            }),
            "a digest of 7 bytes",
        ),
        (
            "an adapter that is a path",
            Say::Generate(wire::Generate {
                adapter: Some(b"/etc".to_vec()),
                ..generate()
            }),
            "a digest of 4 bytes",
        ),
        (
            "a grammar of an unknown kind",
            Say::Generate(wire::Generate {
                grammar_json: Some(b"{\"kind\": \"x\", \"text\": \"\"}".to_vec()),
                ..generate()
            }),
            "cannot read",
        ),
        (
            "more than a message holds",
            Say::Generate(wire::Generate {
                prompt: vec![u32::MAX; 4 << 20],
                ..generate()
            }),
            "message",
        ),
    ];
    // Can be read and not be done: one stream fails.
    let refused = [
        (
            "logprobs",
            Say::Generate(sampling(&format!(r#"{{"logprobs": {many}, "logit_bias": []}}"#))),
            "logprobs must be at most 20",
        ),
        (
            "prompt_logprobs",
            Say::Generate(sampling(&format!(
                r#"{{"prompt_logprobs": {many}, "logit_bias": []}}"#
            ))),
            "prompt_logprobs must be",
        ),
        (
            "temperature",
            Say::Generate(sampling(r#"{"temperature": 1e300, "logit_bias": []}"#)),
            "temperature must be",
        ),
        (
            "repetition_penalty",
            Say::Generate(sampling(r#"{"repetition_penalty": 1e-308, "logit_bias": []}"#)),
            "repetition_penalty must be",
        ),
        (
            "logit_bias",
            Say::Generate(sampling(r#"{"logit_bias": [[100, 0.0]]}"#)),
            "token 100",
        ),
        (
            "an empty prompt",
            Say::Generate(wire::Generate {
                prompt: vec![],
                ..generate()
            }),
            "0 tokens",
        ),
        (
            "a token that is none",
            Say::Generate(wire::Generate {
                prompt: vec![3, many],
                ..generate()
            }),
            "vocabulary of 100",
        ),
        (
            "a stop token that is none",
            Say::Generate(wire::Generate {
                stop_tokens: vec![100],
                ..generate()
            }),
            "vocabulary of 100",
        ),
        (
            "stop tokens",
            Say::Generate(wire::Generate {
                stop_tokens: vec![1; 1 << 20],
                ..generate()
            }),
            "stop tokens",
        ),
        (
            "max_tokens",
            Say::Generate(wire::Generate {
                max_tokens: u32::MAX,
                ..generate()
            }),
            "exceed 512",
        ),
        (
            "a prompt beyond the context",
            Say::Generate(wire::Generate {
                prompt: vec![3; 1 << 20],
                ..generate()
            }),
            "exceed 512",
        ),
        (
            "n_epochs",
            hyper("n_epochs", many.into()),
            "n_epochs must be above 0 and at most 10000",
        ),
        (
            "max_steps",
            hyper("max_steps", u64::MAX.into()),
            "max_steps must be",
        ),
        (
            "batch_size",
            hyper("batch_size", many.into()),
            "batch_size must be",
        ),
        (
            "gradient_accumulation_steps",
            hyper("gradient_accumulation_steps", many.into()),
            "gradient_accumulation_steps must be",
        ),
        (
            "warmup_steps",
            hyper("warmup_steps", u64::MAX.into()),
            "warmup_steps must be",
        ),
        (
            "save_steps",
            hyper("save_steps", u64::MAX.into()),
            "save_steps must be",
        ),
        (
            "eval_steps",
            hyper("eval_steps", u64::MAX.into()),
            "eval_steps must be",
        ),
        (
            "learning_rate",
            hyper("learning_rate", 1e300.into()),
            "learning_rate must be",
        ),
        (
            "max_seq_length",
            hyper("max_seq_length", 513.into()),
            "at most 512",
        ),
        (
            "no max_seq_length",
            hyper("max_seq_length", 0.into()),
            "max_seq_length must be",
        ),
        ("lora_r", lora("r", 65.into()), "lora_r must be at most 64"),
        ("lora_alpha", lora("alpha", 1e39.into()), "lora_alpha must be"),
        (
            "lora_target_modules",
            lora("target_modules", serde_json::json!(["q_proj", "../x"])),
            "which is none of q_proj",
        ),
        (
            "modules twice",
            lora("target_modules", serde_json::json!(["q_proj", "q_proj"])),
            "a module twice",
        ),
        (
            "every parameter",
            hyper("method", "Full".into()),
            "trains adapters only",
        ),
        (
            "a long base",
            start_job(|spec| spec["base_model"] = "x".repeat(5000).into()),
            "a base's name",
        ),
    ];
    let mut backend = Backend::start().await;
    let remote = backend.connect().await;
    for (name, evil, text) in unreadable {
        let status = say(&backend.url, vec![evil]).await.expect_err(name);
        assert!(status.message().contains(text), "{name}: {status:?}");
    }
    for (name, evil, text) in refused {
        let downs = say(&backend.url, vec![evil])
            .await
            .unwrap_or_else(|status| panic!("{name}: {status:?}"));
        let said: Vec<String> = downs
            .iter()
            .flat_map(|down| {
                let requests = down
                    .events
                    .iter()
                    .flat_map(|events| &events.events)
                    .map(|event| match &event.what {
                        Some(wire::event::What::FaultJson(fault)) => {
                            String::from_utf8_lossy(fault).into_owned()
                        }
                        other => panic!("{name}: {other:?}"),
                    });
                let jobs = down.job_events.iter().flat_map(|events| &events.events_json);
                requests
                    .chain(jobs.map(|event| String::from_utf8_lossy(event).into_owned()))
                    .collect::<Vec<_>>()
            })
            .collect();
        assert!(
            matches!(&said[..], [one] if one.contains(text)),
            "{name}: {said:?}"
        );
    }
    let twice = say(
        &backend.url,
        vec![Say::Generate(generate()), Say::Generate(generate())],
    )
    .await;
    assert!(
        twice
            .expect_err("one stream, two requests")
            .message()
            .contains("is open already")
    );
    // The one of them that came first; then nothing but what a router asks.
    backend.generate().await;
    let mut answer = ask(&remote, request(1)).await;
    let (_, events) = loop {
        match backend.next().await {
            Command::Generate(generate, events) => break (generate, events),
            Command::Abort(_) => {}
            _ => panic!("nothing evil reaches the engine"),
        }
    };
    events.send(token(7)).await.unwrap();
    assert_eq!(soon(answer.recv()).await, Some(token(7)));
}

#[tokio::test]
async fn who_does_not_know_the_token_learns_and_does_nothing() {
    let token = |text: &str| Token::new(text).unwrap();
    let mut backend = Backend::with(Some(token("0123456789abcdef\n")), None).await;
    for (shown, text) in [
        (None, "wants a token"),
        (Some("0123456789abcdeF"), "not the backend's"),
        (Some("0123456789abcdef0"), "not the backend's"),
    ] {
        let shown = shown.map(token);
        let refused = connect(&backend.url, shown.as_ref(), None, Path::new("/here"))
            .await
            .err()
            .expect("no session");
        assert!(refused.message.contains(text), "{}", refused.message);
    }
    let status = say(&backend.url, vec![Say::Generate(generate())])
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
    let remote = connect(
        &backend.url,
        Some(&token("0123456789abcdef")),
        None,
        Path::new("/here"),
    )
    .await
    .unwrap();
    let _answer = ask(&remote, request(1)).await;
    backend.generate().await;
    // A backend without one takes any.
    let open = Backend::start().await;
    let any = token("0123456789abcdef");
    assert!(
        connect(&open.url, Some(&any), None, Path::new("/here"))
            .await
            .is_ok()
    );
    for (text, expected) in [
        ("0123456789abcde", BadToken::Short(15)),
        ("", BadToken::Short(0)),
        ("0123456789 abcdef", BadToken::Unprintable),
        ("0123456789abcdef\n0123456789abcdef", BadToken::Unprintable),
        ("0123456789abcdeé", BadToken::Unprintable),
    ] {
        assert_eq!(Token::new(text).err(), Some(expected), "{text:?}");
    }
}

/// Someone who signs, and what they signed for 127.0.0.1: certificate and key, PEM.
struct Authority {
    root: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Authority {
            root: params.self_signed(&key).unwrap().pem(),
            issuer: rcgen::Issuer::new(params, key),
        }
    }

    fn signed(&self) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// Of a backend that it signed; `clients` signs those of its routers.
    fn acceptor(&self, clients: Option<&Authority>) -> Acceptor {
        use tokio_rustls::TlsAcceptor;
        use tokio_rustls::rustls::pki_types::pem::PemObject;
        use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
        use tokio_rustls::rustls::server::WebPkiClientVerifier;
        use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};

        let read = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let provider = Arc::new(crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider.clone());
        let config = config.with_safe_default_protocol_versions().unwrap();
        let config = match clients {
            None => config.with_no_client_auth(),
            Some(clients) => {
                let mut roots = RootCertStore::empty();
                roots.add(read(&clients.root)).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
                config.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let (certificate, key) = self.signed();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let mut config = config.with_single_cert(vec![read(&certificate)], key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let config = Arc::new(config);
        Arc::new(move || TlsAcceptor::from(config.clone()))
    }
}

#[tokio::test]
async fn router_and_backend_know_each_other_by_certificates() {
    let (ours, others) = (Authority::new(), Authority::new());
    let (certificate, key) = ours.signed();
    let (strange, strange_key) = others.signed();
    let roots = |authority: &Authority| ClientTls::new(authority.root.as_bytes(), None);
    let shown = |certificate: &str, key: &str| {
        ClientTls::new(
            ours.root.as_bytes(),
            Some((certificate.as_bytes(), key.as_bytes())),
        )
    };
    let server_only = Backend::with(None, Some(ours.acceptor(None))).await;
    let mutual = Backend::with(None, Some(ours.acceptor(Some(&ours)))).await;
    for (backend, tls, expected) in [
        (&server_only, roots(&ours), None),
        (&server_only, shown(&certificate, &key), None),
        (&server_only, roots(&others), Some("invalid peer certificate")),
        (&mutual, shown(&certificate, &key), None),
        (&mutual, roots(&ours), Some("")),
        (&mutual, shown(&strange, &strange_key), Some("")),
    ] {
        let connected = connect(&backend.url, None, Some(&tls), Path::new("/here")).await;
        match expected {
            None => assert_eq!(connected.unwrap().model_name, "base"),
            Some(why) => {
                let error = connected.err().expect("it is refused").to_string();
                assert!(error.contains(why), "{error}");
            }
        }
    }
    // Neither side speaks plainly to the other.
    let plain = Backend::start().await;
    let as_tls = plain.url.replace("http://", "https://");
    assert!(
        connect(&as_tls, None, Some(&roots(&ours)), Path::new("/here"))
            .await
            .is_err()
    );
    let as_plain = server_only.url.replace("https://", "http://");
    assert!(connect(&as_plain, None, None, Path::new("/here")).await.is_err());

    // What goes over it is what goes without.
    let mut backend = mutual;
    let tls = shown(&certificate, &key);
    let remote = connect(&backend.url, None, Some(&tls), Path::new("/here"))
        .await
        .unwrap();
    let mut answer = ask(&remote, request(1)).await;
    let (heard, events) = backend.generate().await;
    assert_eq!(heard.prompt, request(1).prompt);
    events.send(token(9)).await.unwrap();
    assert_eq!(soon(answer.recv()).await, Some(token(9)));
}

/// Sockets that say nothing keep nobody out, however many come, and make no router that is there go.
#[tokio::test]
async fn the_oldest_stranger_gives_way() {
    let ours = Authority::new();
    let (certificate, key) = ours.signed();
    let tls = ClientTls::new(
        ours.root.as_bytes(),
        Some((certificate.as_bytes(), key.as_bytes())),
    );
    let secret_word = Token::new("0123456789abcdef").unwrap();
    let plain = Backend::with(Some(secret_word.clone()), None).await;
    let secret = Backend::with(None, Some(ours.acceptor(Some(&ours)))).await;
    for (mut backend, shown, tls) in [(plain, Some(&secret_word), None), (secret, None, Some(&tls))] {
        let address: std::net::SocketAddr = backend.url.split("//").nth(1).unwrap().parse().unwrap();
        let here = Path::new("/here");
        let first = soon(connect(&backend.url, shown, tls, here)).await.unwrap();
        let mut silent = vec![];
        for _ in 0..300 {
            silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }
        let second = soon(connect(&backend.url, shown, tls, here)).await.unwrap();
        for remote in [&first, &second] {
            let mut answer = ask(remote, request(1)).await;
            let (_, events) = backend.generate().await;
            events.send(token(9)).await.unwrap();
            assert_eq!(soon(answer.recv()).await, Some(token(9)));
        }
        let mut open = 0;
        for socket in &silent {
            let ended = tokio::time::timeout(Duration::from_millis(20), socket.readable()).await;
            open += usize::from(ended.is_err());
        }
        assert!((32..=64).contains(&open), "{open} are open");
    }
}
