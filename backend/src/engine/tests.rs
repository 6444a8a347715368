//! Through the channel seam, with a real little model: what a client gets, whatever happens around its request.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tandem_core::TokenId;
use tandem_core::dataset::{self, Example, Group};
use tandem_core::id::{AdapterDigest, AdapterRef, RequestId};
use tandem_core::job::{
    DpoLoss, Hyper, JobEvent, JobSpec, Life, Lora, Method, Objective, SaveStrategy, Schedule, files,
};
use tandem_core::message::{Event, Fault, FinishReason, Generate, Scored};
use tandem_core::pooling::Pooling;
use tandem_core::replica::{Command, EVENT_QUEUE, JOB_EVENT_QUEUE, ReplicaHandle};
use tandem_core::sampling::{RawSampling, Sampling};
use tandem_core::stats::Stats;
use tandem_kernels::machine;
use tokio::sync::{mpsc, oneshot};

use crate::family::read_spec;
use crate::lora::params::{AdapterParams, AdapterShape};
use crate::lora::peft::{self, PeftConfig};
use crate::ranks::Team;
use crate::start::{Dtype, Options, start};

mod adapters;
mod answers;
mod clients;
mod grammars;
mod jobs;
mod learners;

/// The trained model in the repository.
fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/demo")
}

/// Its end of text.
const EOS: TokenId = 1;

fn options(folder: &Path) -> Options {
    Options {
        dtype: Dtype::F32,
        threads: Some(2),
        kv_cache_bytes: Some(64 << 20),
        ..Options::new(folder.to_owned())
    }
}

struct Case {
    prompt: Vec<TokenId>,
    prompt_logprobs: Vec<f64>,
    greedy: Vec<TokenId>,
    pooled: Vec<(Pooling, Vec<f32>)>,
}

/// What transformers says of the demo model (scripts/fixtures).
fn cases() -> Vec<Case> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/numerics/fixtures/demo.json");
    let bytes = std::fs::read(file).unwrap();
    let expected: Value = serde_json::from_slice(&bytes).unwrap();
    let ids = |value: &Value| -> Vec<TokenId> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as TokenId)
            .collect()
    };
    let floats = |value: &Value| -> Vec<f32> {
        let numbers = value.as_array().unwrap().iter();
        numbers.map(|x| x.as_f64().unwrap() as f32).collect()
    };
    let case = |case: &Value| Case {
        prompt: ids(&case["prompt_ids"]),
        prompt_logprobs: case["prompt_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_f64)
            .collect(),
        greedy: ids(&case["greedy_ids"]),
        pooled: Pooling::ALL
            .map(|pooling| (pooling, floats(&case["pooled"][pooling.name()])))
            .to_vec(),
    };
    expected["cases"].as_array().unwrap().iter().map(case).collect()
}

/// One engine and the numbers of its requests.
struct Rig {
    handle: ReplicaHandle,
    next_id: u64,
}

/// All a client heard.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    prompt: Option<Vec<Option<Scored>>>,
    vector: Option<Vec<f32>>,
    tokens: Vec<Scored>,
    /// The last of them said that it is.
    has_last: bool,
    end: Option<Result<(FinishReason, u32), Fault>>,
}

impl Answer {
    fn ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|scored| scored.token).collect()
    }

    /// The same answer, but for how much of it was found in the cache. To the bit where our kernels run: they promise
    /// it. (Results of ATen, their reference, change with the rows beside.)
    fn assert_same(&self, expected: &Answer, what: &str) {
        let end = |answer: &Answer| answer.end.clone().map(|end| end.map(|(reason, _cached)| reason));
        assert_eq!((end(self), self.ids()), (end(expected), expected.ids()), "{what}");
        assert!(matches!(self.end, Some(Ok(_))), "{what}: {:?}", self.end);
        if *machine::features() != machine::Features::default() {
            assert_eq!(
                (&self.prompt, &self.tokens),
                (&expected.prompt, &expected.tokens),
                "{what}"
            );
        }
        for (ours, theirs) in self.scores().zip(expected.scores()) {
            assert!(
                (ours.logprob - theirs.logprob).abs() < 1e-4,
                "{what}: {ours:?} is not {theirs:?}"
            );
        }
    }

    fn scores(&self) -> impl Iterator<Item = &Scored> {
        self.prompt.iter().flatten().flatten().chain(&self.tokens)
    }
}

fn read(events: &mut mpsc::Receiver<Event>) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = events.blocking_recv() {
        assert!(answer.end.is_none(), "{event:?} after the end");
        match event {
            Event::Prompt(prompt) => {
                assert!(answer.prompt.replace(prompt).is_none() && answer.tokens.is_empty());
            }
            Event::Pooled(vector) => assert!(answer.vector.replace(vector).is_none()),
            Event::Token { token, is_last } => {
                assert!(!answer.has_last, "{token:?} after the last");
                answer.has_last = is_last;
                answer.tokens.push(token);
            }
            Event::Finished {
                reason,
                cached_tokens,
                ..
            } => {
                assert_eq!(answer.has_last, !answer.tokens.is_empty());
                answer.end = Some(Ok((reason, cached_tokens)));
            }
            Event::Failed(fault) => answer.end = Some(Err(fault)),
        }
    }
    answer
}

impl Rig {
    fn new(options: Options) -> Rig {
        Rig {
            handle: start(options).unwrap(),
            next_id: 0,
        }
    }

    fn send(&mut self, request: Generate) -> mpsc::Receiver<Event> {
        self.send_with_queue(request, EVENT_QUEUE)
    }

    fn send_with_queue(&mut self, request: Generate, queue: usize) -> mpsc::Receiver<Event> {
        let (events, receiver) = mpsc::channel(queue);
        self.next_id += 1;
        let request = Generate {
            id: RequestId(self.next_id),
            ..request
        };
        self.command(Command::Generate(request, events));
        receiver
    }

    fn command(&self, command: Command) {
        assert!(
            self.handle.commands.blocking_send(command).is_ok(),
            "the engine lives"
        );
    }

    fn ask(&mut self, request: Generate) -> Answer {
        read(&mut self.send(request))
    }

    /// All at once.
    fn ask_all(&mut self, requests: &[Generate]) -> Vec<Answer> {
        let mut receivers: Vec<_> = requests
            .iter()
            .map(|request| self.send_with_queue(request.clone(), 4096))
            .collect();
        receivers.iter_mut().map(read).collect()
    }

    fn stats(&self) -> Stats {
        self.handle.stats.borrow().clone()
    }

    fn wait_until(&self, what: &str, holds: impl Fn(&Stats) -> bool) {
        let began = Instant::now();
        while !holds(&self.stats()) {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "never {what}: {:?}",
                self.stats()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn request(prompt: &[TokenId], max_tokens: u32, raw: RawSampling) -> Generate {
    let sampling = Sampling::new(raw, 2048).unwrap();
    Generate {
        stop_tokens: vec![EOS],
        ..Generate::new(RequestId(0), prompt.into(), sampling, max_tokens)
    }
}

fn greedy() -> RawSampling {
    RawSampling {
        temperature: Some(0.0),
        ..RawSampling::default()
    }
}

fn lora(rank: u32) -> Lora {
    let target_modules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
        .map(str::to_owned)
        .to_vec();
    Lora {
        r: rank,
        alpha: 16.0,
        dropout: 0.0,
        target_modules,
        use_rslora: false,
        use_dora: false,
    }
}
