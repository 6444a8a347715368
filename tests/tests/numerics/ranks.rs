//! Several ranks against one: log-probabilities, adapters, whole training runs and the engine itself. Models are drawn
//! here, with more heads than the fixtures: 8 query heads over 4 KV heads, and over 2, which four ranks share; a ragged
//! vocabulary; biases everywhere, or a tied head.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tandem_backend::family::{DecoderSpec, ParamId, read_spec};
use tandem_backend::lora::adapter::Adapter;
use tandem_backend::lora::params::{AdapterParams, AdapterShape};
use tandem_backend::lora::peft::{self, PeftConfig};
use tandem_backend::model::full::{FullParams, FullShape};
use tandem_backend::model::{Decoder, WeightOptions};
use tandem_backend::ranks::Team;
use tandem_backend::train::{Inputs, Trainer};
use tandem_backend::weights::Checkpoint;
use tandem_backend::{Dtype, Options, start};
use tandem_core::TokenId;
use tandem_core::dataset::Example;
use tandem_core::id::{AdapterRef, RequestId};
use tandem_core::job::{EMBED_TOKENS, Hyper, JobEvent, JobSpec, LM_HEAD, Lora, Method, StepReport, files};
use tandem_core::message::{Event, Generate, Scored};
use tandem_core::replica::{Command, JOB_EVENT_QUEUE, ReplicaHandle};
use tandem_core::sampling::{RawSampling, Sampling};
use tandem_kernels::comm::Comm;
use tandem_kernels::pool;
use tandem_kernels::weight::Precision;
use tch::{Device, Kind, Tensor};
use tokio::sync::{mpsc, oneshot};

use crate::fixture::{Table, max_difference};
use crate::run::{Sequence, base, logprobs, packed, paged};
use crate::training::{Job, hyper, tensors};

const CLOSE: f64 = 1e-4;
/// Of numbers behind ten steps of AdamW, which divides by a root of second moments.
const ADAPTER: f64 = 1e-3;
pub const WORLDS: [usize; 2] = [2, 4];
const VOCAB: i64 = 101;

/// A checkpoint that is drawn, not trained: sharp enough that a wrong head or row is seen in every number.
pub struct Model {
    pub name: &'static str,
    folder: tempfile::TempDir,
    spec: DecoderSpec,
}

pub fn models() -> [Model; 2] {
    [("kv 4, biases", 4, true), ("kv 2, tied", 2, false)].map(|(name, kv_heads, biases)| {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
            "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": kv_heads, "head_dim": 16, "hidden_act": "silu",
            "max_position_embeddings": 128, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "eos_token_id": 0,
            "attention_bias": biases, "mlp_bias": biases, "tie_word_embeddings": !biases,
        });
        Model::draw(name, &config)
    })
}

/// Numbers of both signs below one.
fn waves(size: &[i64], seed: f64) -> Tensor {
    let index = Tensor::arange(size.iter().product::<i64>(), (Kind::Double, Device::Cpu));
    (index * 12.9898 + seed).sin().to_kind(Kind::Float).view(size)
}

pub fn prompt(tokens: usize, seed: usize) -> Vec<TokenId> {
    (0..tokens)
        .map(|i| ((i * i * 31 + i * 7 + seed * 13) % VOCAB as usize) as TokenId)
        .collect()
}

impl Model {
    pub fn draw(name: &'static str, config: &Value) -> Model {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("config.json"), config.to_string()).expect("it is written");
        let spec = read_spec(folder.path()).expect("a config we wrote");
        let params = FullParams::init(FullShape::new(&spec), &spec, 11);
        for (id, _) in params.shape.ranges() {
            let mut view = params.whole(id);
            match id {
                ParamId::Embed | ParamId::Linear(_) | ParamId::Head => drop(view.g_mul_scalar_(6.0)),
                ParamId::Bias(_) | ParamId::Norm(_) | ParamId::NormBias(_) | ParamId::Sinks(_) => {
                    drop(view.g_add_(&(waves(&view.size(), 0.7) * 0.2)));
                }
            }
        }
        let weights = params.serialise(Kind::Float).expect("one rank has all");
        std::fs::write(folder.path().join("model.safetensors"), weights).expect("it is written");
        Model { name, folder, spec }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    pub fn on_ranks<T: Send>(&self, world: usize, run: impl Fn(Decoder) -> T + Sync) -> Vec<T> {
        on_ranks(&self.path(), &self.spec, world, run)
    }

    /// Two adapters: every module with ranks that differ, and few modules of one layer.
    fn adapters(&self) -> [AdapterParams; 2] {
        let ragged = AdapterShape::build(&self.spec, |path, name| {
            let rank = 1 + (path.len() * 5 + name.len()) as i64 % 7;
            Some((rank, 2.0 / rank as f64))
        });
        let few = AdapterShape::build(&self.spec, |path, name| {
            (path.contains("layers.1") && ["k_proj", "o_proj", "up_proj"].contains(&name)).then_some((3, 0.5))
        });
        [ragged, few].map(|shape| AdapterParams {
            flat: waves(&[shape.len()], 0.3) * 0.25,
            shape,
        })
    }
}

/// What `run` makes of each rank's part of the model in `folder`, in rank order.
pub fn on_ranks<T: Send>(
    folder: &Path,
    spec: &DecoderSpec,
    world: usize,
    run: impl Fn(Decoder) -> T + Sync,
) -> Vec<T> {
    let run = &run;
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Comm::threads(world)
            .into_iter()
            .map(|comm| {
                let spec = spec.clone();
                scope.spawn(move || {
                    let _no_grad = tch::no_grad_guard();
                    pool::take_share(comm.rank(), world);
                    let checkpoint = Checkpoint::open(folder).expect("a checkpoint");
                    let end = comm.clone();
                    let options = WeightOptions::new(Precision::F32, Device::Cpu);
                    let decoder = Decoder::from_checkpoint(spec, &checkpoint, options, comm);
                    let result = run(decoder.expect("it can be divided so"));
                    // Who leaves earlier is lost to the others.
                    end.meet();
                    result
                })
            })
            .collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().expect("a rank ends well"))
            .collect()
    })
}

#[test]
fn ranks_answer_as_one() {
    let mut table = Table::default();
    for model in models() {
        let run = |decoder: Decoder| {
            let adapters = model.adapters();
            let adapters = adapters.each_ref().map(|params| {
                Adapter::new(params, decoder.layout(), Precision::F32, Device::Cpu).expect("it packs")
            });
            let (long, short) = (prompt(50, 1), prompt(9, 2));
            let mixed = [
                base(&long),
                Sequence {
                    tokens: &long,
                    adapter: Some(&adapters[0]),
                },
                Sequence {
                    tokens: &short,
                    adapter: Some(&adapters[1]),
                },
                Sequence {
                    tokens: &long,
                    adapter: Some(&adapters[1]),
                },
            ];
            let score = |logits: Vec<Tensor>| -> Vec<Tensor> {
                logits
                    .iter()
                    .zip(&mixed)
                    .map(|(logits, of)| logprobs(logits, of.tokens))
                    .collect()
            };
            let held = decoder.weight_bytes();
            [
                score(packed(&decoder, &mixed)),
                score(paged(&decoder, &mixed, 16)),
            ]
            .map(|way| (way, held))
        };
        let alone = model.on_ranks(1, run).remove(0);
        let effect = max_difference(&alone[0].0[1], &alone[0].0[0]);
        assert!(
            effect > 0.1,
            "the adapter changes log-probabilities by {effect} only"
        );
        for world in WORLDS {
            let ranks = model.on_ranks(world, run);
            for (way, name) in ["packed", "paged"].into_iter().enumerate() {
                for (i, who) in ["base", "adapter", "short", "few"].into_iter().enumerate() {
                    let what = format!("{world} ranks {name} {who}");
                    let ours = &ranks[0][way].0[i];
                    table.add(model.name, &what, max_difference(ours, &alone[way].0[i]), CLOSE);
                    for rank in &ranks {
                        assert_eq!(&rank[way].0[i], ours, "{what}: the same bits on every rank");
                    }
                }
            }
            let share = ranks[0][0].1 as f64 / alone[0].1 as f64;
            assert!(
                share < 1.6 / world as f64,
                "{}: a rank of {world} holds {share} of the model",
                model.name
            );
        }
    }
    table.judge("ranks against one (log-probabilities)");
}

fn lora() -> Lora {
    Lora {
        r: 4,
        alpha: 8.0,
        dropout: 0.1,
        target_modules: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            LM_HEAD,
            EMBED_TOKENS,
        ]
        .map(str::to_owned)
        .to_vec(),
        use_rslora: false,
        use_dora: false,
    }
}

/// Ten steps with dropout, validation and a checkpoint.
fn job() -> Job {
    let examples: Vec<Example> = (0..20)
        .map(|i| {
            let tokens = prompt(6 + i % 9, i);
            let weights = (0..tokens.len()).map(|i| [1.0, 0.0, 0.5][i % 3]).collect();
            Example { tokens, weights }
        })
        .collect();
    let hyper = Hyper {
        save_steps: 6,
        ..hyper(Method::Lora(lora()))
    };
    let job = Job::new(&examples, hyper);
    let train = job.spec.folder.join(files::TRAIN);
    std::fs::copy(train, job.spec.folder.join(files::VALID)).expect("it is copied");
    job
}

/// In the order of their names.
fn adapter_of(spec: &JobSpec) -> Vec<(String, Tensor)> {
    let mut tensors = tensors(&spec.folder.join(files::ADAPTER).join(peft::TENSORS));
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    tensors
}

/// Runs a job over ranks until it has made `steps`, rank 0 writing; then writes its state, unless it is over.
fn train(model: &Model, world: usize, spec: &JobSpec, steps: u64) -> (Vec<StepReport>, Vec<f64>) {
    let inputs = Inputs::read(&spec.folder).expect("the job's folder");
    let run = |decoder: Decoder| {
        let is_first = decoder.comm().rank() == 0;
        let mut trainer = Trainer::start_with(spec.clone(), &inputs, decoder.fit()).expect("it starts");
        let (mut reports, mut validations) = (vec![], vec![]);
        loop {
            let mut quantum = trainer.quantum(Some(&decoder)).expect("a quantum runs");
            if is_first {
                quantum = quantum.write().expect("it is written");
            }
            for event in quantum.events {
                match event {
                    JobEvent::Step(report) => reports.push(report),
                    JobEvent::Validated { loss, .. } => validations.push(loss),
                    _ => {}
                }
            }
            if quantum.finished {
                break;
            }
            if trainer.step() == steps {
                if is_first {
                    trainer.snapshot().write().expect("the state is written");
                }
                break;
            }
        }
        (reports, validations)
    };
    let mut ranks = model.on_ranks(world, run);
    let losses = |reports: &[StepReport]| -> Vec<f64> { reports.iter().map(|report| report.loss).collect() };
    let first = ranks.remove(0);
    for other in &ranks {
        assert_eq!(
            losses(&other.0),
            losses(&first.0),
            "the same numbers on every rank"
        );
    }
    first
}

#[test]
fn ranks_train_as_one() {
    let mut table = Table::default();
    for model in models() {
        let alone = job();
        let (expected, validated) = train(&model, 1, &alone.spec, u64::MAX);
        assert!(expected.len() == 10 && validated.len() == 1);
        let drop = expected[0].loss - expected[9].loss;
        assert!(drop.abs() > 0.01, "ten steps changed the loss by {drop} only");
        let before = adapter_of(&alone.spec);
        let mut compare = |what: &str, spec: &JobSpec, reports: &[StepReport], validations: &[f64]| {
            let pairs = || reports.iter().zip(&expected[10 - reports.len()..]);
            let worst = |of: &dyn Fn(&StepReport) -> f64| {
                pairs()
                    .map(|(ours, theirs)| (of(ours) - of(theirs)).abs())
                    .fold(0.0, f64::max)
            };
            table.add(
                model.name,
                &format!("{what} losses"),
                worst(&|report| report.loss),
                CLOSE,
            );
            table.add(
                model.name,
                &format!("{what} gradient norms"),
                worst(&|report| report.grad_norm),
                CLOSE,
            );
            let validation = (validations[0] - validated[0]).abs();
            table.add(model.name, &format!("{what} validation"), validation, CLOSE);
            let worst = adapter_of(spec)
                .iter()
                .zip(&before)
                .map(|((name, ours), (expected_name, expected))| {
                    assert_eq!(name, expected_name);
                    max_difference(ours, expected)
                })
                .fold(0.0, f64::max);
            table.add(model.name, &format!("{what} finished adapter"), worst, ADAPTER);
        };
        for world in WORLDS {
            let job = job();
            let (reports, validations) = train(&model, world, &job.spec, u64::MAX);
            assert_eq!(reports.len(), 10);
            compare(&format!("{world} ranks"), &job.spec, &reports, &validations);
        }
        // A job's folder says nothing of ranks: it goes on under another number of them.
        let job = job();
        let (first, _) = train(&model, 4, &job.spec, 5);
        let (second, validations) = train(&model, 2, &job.spec, u64::MAX);
        assert_eq!((first.len(), second.len()), (5, 5));
        compare("5 steps of 4, 5 of 2", &job.spec, &second, &validations);
    }
    table.judge("training over ranks against one");
}

/// What a client got: the prompt's and the answer's tokens with their log-probabilities.
type Answer = Vec<Scored>;

fn ask(replica: &ReplicaHandle, requests: &[(Vec<TokenId>, Option<AdapterRef>)]) -> Vec<Answer> {
    let request = |(prompt, adapter): &(Vec<TokenId>, Option<AdapterRef>)| Generate {
        adapter: adapter.clone(),
        ..scored(prompt, 12)
    };
    answers(replica, requests.iter().map(request).collect())
}

/// The prompt's log-probabilities and those of the best `max_tokens` behind it.
pub fn scored(prompt: &[TokenId], max_tokens: u32) -> Generate {
    let raw = RawSampling {
        temperature: Some(0.0),
        logprobs: Some(0),
        prompt_logprobs: Some(0),
        ..RawSampling::default()
    };
    let sampling = Sampling::new(raw, VOCAB as u32).expect("plain sampling");
    Generate::new(RequestId(0), prompt.into(), sampling, max_tokens)
}

/// What each is answered, all asked at once.
pub fn answers(replica: &ReplicaHandle, requests: Vec<Generate>) -> Vec<Answer> {
    let mut streams = vec![];
    for (i, request) in requests.into_iter().enumerate() {
        // Room for all of it: who is read last does not wait.
        let (events, stream) = mpsc::channel(1024);
        let request = Generate {
            id: RequestId(i as u64),
            ..request
        };
        let sent = replica.commands.blocking_send(Command::Generate(request, events));
        assert!(sent.is_ok(), "the engine lives");
        streams.push(stream);
    }
    let answer = |mut stream: mpsc::Receiver<Event>| {
        let mut answer = vec![];
        while let Some(event) = stream.blocking_recv() {
            match event {
                Event::Prompt(prompt) => answer.extend(prompt.into_iter().flatten()),
                Event::Token { token, .. } => answer.push(token),
                Event::Pooled(_) => panic!("nothing was to be pooled"),
                Event::Finished { .. } => return answer,
                Event::Failed(fault) => panic!("{fault}"),
            }
        }
        panic!("the stream ended without an end")
    };
    streams.into_iter().map(answer).collect()
}

fn options(model: &Model, team: Team) -> Options {
    Options {
        dtype: Dtype::F32,
        kv_cache_bytes: Some(4 << 20),
        max_loras: 1,
        team,
        ..Options::new(model.path())
    }
}

/// Through the engine: batches, cached prefixes, adapters that take turns in one slot, a job and its adapter.
#[test]
fn an_engine_of_ranks_serves_and_trains_as_one() {
    let mut table = Table::default();
    let [model, _] = models();
    let folder = tempfile::tempdir().expect("a folder");
    let adapter = |name: &str, rank: u32, seed: f64| {
        let place = folder.path().join(name);
        std::fs::create_dir(&place).expect("it is made");
        let lora = Lora { r: rank, ..lora() };
        let shape = AdapterShape::new(&model.spec, &lora);
        let flat = waves(&[shape.len()], seed) * 0.25;
        let config = PeftConfig {
            base_model: "drawn",
            lora: &lora,
        };
        peft::write(&place, &AdapterParams { flat, shape }, &config).expect("it is written");
        let digest = peft::digest(&place).expect("a digest");
        AdapterRef {
            digest,
            folder: place,
        }
    };
    let (one, other) = (adapter("one", 3, 0.1), adapter("other", 5, 0.9));
    let requests: Vec<(Vec<TokenId>, Option<AdapterRef>)> =
        [None, Some(&one), Some(&one), None, Some(&other), Some(&one)]
            .into_iter()
            .enumerate()
            .map(|(i, adapter)| (prompt(40 + i, i), adapter.cloned()))
            .collect();
    let run = |team: Team| {
        let replica = start(options(&model, team)).expect("it starts");
        let mut answers = ask(&replica, &requests);
        let job = job();
        let (events, mut heard) = mpsc::channel(JOB_EVENT_QUEUE);
        let sent = replica
            .commands
            .blocking_send(Command::StartJob(Box::new(job.spec.clone()), events));
        assert!(sent.is_ok(), "the engine lives");
        // Beside the job; prompts that were computed before are found in the cache or not, the answers are the same.
        answers.extend(ask(&replica, &requests));
        let (mut losses, mut made) = (vec![], None);
        while let Some(event) = heard.blocking_recv() {
            match event {
                JobEvent::Step(report) => losses.push(report.loss),
                JobEvent::Finished { adapter, .. } => made = Some(adapter),
                JobEvent::Failed { message } => panic!("{message}"),
                _ => {}
            }
        }
        // Published from memory; asked again it comes from disk, for another took its slot.
        let made = made.expect("the job finished");
        answers.extend(ask(&replica, &[(prompt(30, 7), Some(made.clone()))]));
        answers.extend(ask(
            &replica,
            &[(prompt(30, 8), Some(other.clone())), (prompt(30, 7), Some(made))],
        ));
        let (reply, told) = oneshot::channel();
        let load = Command::LoadAdapter(one.clone(), reply);
        assert!(replica.commands.blocking_send(load).is_ok());
        let info = told.blocking_recv().expect("an answer").expect("it loads");
        assert!(replica.commands.blocking_send(Command::Stop).is_ok());
        (answers, losses, info.bytes, replica.info)
    };
    let (expected, losses, bytes, info) = run(Team::Threads(1));
    for world in WORLDS {
        let (answers, ours, share, shared) = run(Team::Threads(world));
        assert_eq!(shared.tensor_parallel_size as usize, world);
        assert!(shared.base_digest == info.base_digest && share < bytes);
        let mut worst = 0f64;
        for (i, (answer, expected)) in answers.iter().zip(&expected).enumerate() {
            let ids = |answer: &Answer| answer.iter().map(|scored| scored.token).collect::<Vec<_>>();
            assert_eq!(ids(answer), ids(expected), "{world} ranks, answer {i}");
            for (ours, theirs) in answer.iter().zip(expected) {
                worst = worst.max(f64::from((ours.logprob - theirs.logprob).abs()));
            }
        }
        table.add(
            "engine",
            &format!("{world} ranks {} answers", answers.len()),
            worst,
            CLOSE,
        );
        let losses = ours.iter().zip(&losses).map(|(a, b)| (a - b).abs());
        assert_eq!(ours.len(), 10);
        table.add(
            "engine",
            &format!("{world} ranks losses"),
            losses.fold(0.0, f64::max),
            CLOSE,
        );
    }
    table.judge("an engine of ranks against one rank");
    // What cannot be divided is refused before anybody is started.
    let refused = start(options(&model, Team::Threads(3)))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("tensor-parallel size 3: the 8 attention heads"),
        "{refused}"
    );
}
