//! The engine without HTTP: prefill, decode, mixed adapters, LoRA training and several jobs at once on one model folder,
//! through the same channel the router uses. The last line is JSON with the keys that benches/peers prints.
//!
//!   target/release/engine --model DIR [--device cuda:0] [prefill] [decode] [adapters] [train] [jobs]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Map, Value, json};
use tandem_backend::Dtype;
use tandem_backend::family::read_spec;
use tandem_backend::lora::params::{AdapterParams, AdapterShape};
use tandem_backend::lora::peft::{self, PeftConfig};
use tandem_backend::model::{Decoder, WeightOptions};
use tandem_backend::start;
use tandem_backend::train::Trainer;
use tandem_backend::words;
use tandem_benches::machine;
use tandem_benches::percentile::median;
use tandem_core::dataset::{self, Example, Group};
use tandem_core::id::{AdapterDigest, AdapterRef, RequestId};
use tandem_core::job::{
    Hyper, JobEvent, JobSpec, Life, Lora, Method, Objective, SaveStrategy, Schedule, files,
};
use tandem_core::message::{Event, Generate};
use tandem_core::replica::{Command, EVENT_QUEUE, JOB_EVENT_QUEUE, ReplicaHandle};
use tandem_core::sampling::Sampling;
use tandem_core::{TokenId, rng};
use tandem_kernels::weight::{Precision, Recipe};
use tokio::sync::mpsc;

/// At once, in the part of that name.
const JOBS: usize = 8;
const JOB_STEPS: u64 = 12;
/// Tokens of prompts that a step reads beside streams, at least.
const LEAST_CHUNK: usize = 32;

/// Measures the engine without HTTP
#[derive(Parser)]
struct Options {
    /// A checkpoint, e.g. of benches/peers/make_shape.py
    #[arg(long)]
    model: PathBuf,
    /// cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long, value_enum, default_value = "bfloat16")]
    dtype: DtypeName,
    /// int8, int4 or nf4: the linears
    #[arg(long)]
    quantization: Option<String>,
    /// Tokens of each stream's prompt, of which each stream has its own
    #[arg(long, default_value_t = 256)]
    prompt_tokens: usize,
    /// Tokens each stream generates
    #[arg(long, default_value_t = 64)]
    new_tokens: u32,
    #[arg(long, value_delimiter = ',', default_value = "1,8,16")]
    streams: Vec<usize>,
    /// Tokens of each row of the small jobs
    #[arg(long, default_value_t = 64)]
    job_tokens: usize,
    /// Rank of the small jobs
    #[arg(long, default_value_t = 8)]
    job_rank: u32,
    /// Optimizer steps of 4 x 512 tokens that are measured, after one that is not
    #[arg(long, default_value_t = 2)]
    train_steps: u64,
    #[arg(value_enum, required = true)]
    parts: Vec<Part>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Part {
    /// 512 tokens
    Prefill,
    /// Streams, once all of them have read their prompts
    Decode,
    /// 8 streams over 4 adapters of rank 16 on all linear layers
    Adapters,
    /// LoRA r 16 on all linear layers, 4 x 512 tokens a step
    Train,
    /// 8 small LoRA jobs, one row a step: one after the other, then at once
    Jobs,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeName {
    Bfloat16,
    Float32,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let mut report = Map::new();
    // Training first and without an engine: its peak memory is then its own.
    if options.parts.contains(&Part::Train) {
        train(&options, &mut report)?;
    }
    if options.parts.iter().any(|&part| part != Part::Train) {
        let mut engine = Engine::start(&options)?;
        let info = &engine.replica.info;
        report.insert("weight_bytes".to_owned(), json!(info.weight_bytes));
        report.insert("parameters".to_owned(), json!(info.parameters));
        for part in &options.parts {
            match part {
                Part::Prefill => engine.prefill(&mut report).await?,
                Part::Decode => engine.decode(&options, &mut report).await?,
                Part::Adapters => engine.adapters(&options, &mut report).await?,
                Part::Train => {}
                Part::Jobs => engine.jobs(&options, &mut report).await?,
            }
        }
        engine
            .replica
            .commands
            .send(Command::Stop)
            .await
            .context("the engine ended early")?;
    }
    println!("{}", Value::Object(report));
    Ok(())
}

struct Engine {
    replica: ReplicaHandle,
    requests: u64,
}

impl Engine {
    fn start(options: &Options) -> anyhow::Result<Engine> {
        let dtype = match options.dtype {
            DtypeName::Bfloat16 => Dtype::Bf16,
            DtypeName::Float32 => Dtype::F32,
        };
        let began = Instant::now();
        let replica = tandem_backend::start(tandem_backend::Options {
            device: words::device(&options.device)?,
            dtype,
            quantization: options.quantization.as_deref().map(str::parse).transpose()?,
            max_model_len: Some(tandem_backend::ModelLen::Asked(
                1024.max(options.prompt_tokens as u32 + options.new_tokens),
            )),
            max_num_seqs: options.streams.iter().copied().max().unwrap_or(1).max(16) as u32,
            max_training_jobs: JOBS as u32,
            ..tandem_backend::Options::new(options.model.clone())
        })?;
        println!(
            "ready after {:.2} s, {} MB of weights",
            began.elapsed().as_secs_f64(),
            replica.info.weight_bytes >> 20
        );
        Ok(Engine { replica, requests: 0 })
    }

    async fn prefill(&mut self, report: &mut Map<String, Value>) -> anyhow::Result<()> {
        let (mut rates, mut cpu_rates) = (vec![], vec![]);
        for _ in 0..6 {
            let (began, cpu) = (Instant::now(), machine::cpu_time());
            let stream = self.stream(512, 1, None).await?;
            rates.push(512.0 / (stream[0] - began).as_secs_f64());
            cpu_rates.push(512.0 / (machine::cpu_time() - cpu).as_secs_f64());
        }
        // The first warms caches and pages up.
        say(
            report,
            "prefill_512",
            "tokens/s",
            rates[1..].iter().copied().fold(0.0, f64::max),
        );
        // Of the processor's time, which another load stretches less.
        let best = cpu_rates[1..].iter().copied().fold(0.0, f64::max);
        say(report, "prefill_512_cpu", "tokens/CPU-s", best);
        Ok(())
    }

    async fn decode(&mut self, options: &Options, report: &mut Map<String, Value>) -> anyhow::Result<()> {
        for &streams in &options.streams {
            let rate = self
                .rate(&vec![None; streams], options.prompt_tokens, options.new_tokens)
                .await?;
            say(report, &format!("decode_{streams}"), "tokens/s", rate);
        }
        Ok(())
    }

    async fn adapters(&mut self, options: &Options, report: &mut Map<String, Value>) -> anyhow::Result<()> {
        const STREAMS: usize = 8;
        const ADAPTERS: u64 = 4;
        let folder = tempfile::tempdir()?;
        let adapters: Vec<AdapterRef> = (0..ADAPTERS)
            .map(|seed| write_adapter(&options.model, &folder.path().join(seed.to_string()), seed))
            .collect::<anyhow::Result<_>>()?;
        let turns: Vec<_> = (0..STREAMS)
            .map(|i| Some(adapters[i % adapters.len()].clone()))
            .collect();
        // Loads them.
        self.rate(&turns, options.prompt_tokens, 2).await?;
        let base = self
            .rate(&vec![None; STREAMS], options.prompt_tokens, options.new_tokens)
            .await?;
        let mixed = self
            .rate(&turns, options.prompt_tokens, options.new_tokens)
            .await?;
        say(report, "decode_8_base", "tokens/s", base);
        say(report, "decode_8_of_4_adapters", "tokens/s", mixed);
        say(report, "adapters_over_base", "", mixed / base);
        Ok(())
    }

    async fn jobs(&mut self, options: &Options, report: &mut Map<String, Value>) -> anyhow::Result<()> {
        let targets = read_spec(&options.model)?.lora_targets();
        let folder = tempfile::tempdir()?;
        let spec = |round: &str, number: usize| -> anyhow::Result<JobSpec> {
            let folder = folder.path().join(format!("{round}-{number}"));
            std::fs::create_dir(&folder)?;
            let vocab = u64::from(self.replica.info.vocab_size);
            let row = |row: u64| {
                let token = |i: usize| (rng::bits(11 + row, number as u64, i as u64) % vocab) as TokenId;
                Group::from(Example {
                    tokens: (0..options.job_tokens).map(token).collect(),
                    weights: vec![1.0; options.job_tokens],
                })
            };
            let rows: Vec<Group> = (0..JOB_STEPS).map(row).collect();
            std::fs::write(folder.join(files::TRAIN), dataset::encode(&rows))?;
            let lora = Lora {
                r: options.job_rank,
                ..lora(targets.clone())
            };
            Ok(JobSpec {
                id: format!("ftjob-{round}-{number}").parse().expect("a job\'s id"),
                folder,
                tenant: String::new(),
                base_model: "bench".to_owned(),
                hyper: hyper(1, lora),
                life: Life::default(),
            })
        };
        let mut rates = vec![];
        let mut made = vec![];
        for round in ["warm", "turn", "once"] {
            let specs = (0..JOBS).map(|number| spec(round, number));
            let specs = specs.collect::<anyhow::Result<Vec<_>>>()?;
            let began = Instant::now();
            let mut adapters = vec![];
            let mut waiting = vec![];
            for spec in specs {
                let (events, inbox) = mpsc::channel(JOB_EVENT_QUEUE);
                let start = Command::StartJob(Box::new(spec), events);
                self.replica
                    .commands
                    .send(start)
                    .await
                    .context("the engine ended")?;
                match round {
                    "once" => waiting.push(inbox),
                    _ => adapters.push(result(inbox).await?),
                }
            }
            for inbox in waiting {
                adapters.push(result(inbox).await?);
            }
            let tokens = JOBS * JOB_STEPS as usize * (options.job_tokens - 1);
            rates.push(tokens as f64 / began.elapsed().as_secs_f64());
            made.push(adapters);
        }
        if made[1] != made[2] {
            bail!("jobs at once made other adapters than one after the other");
        }
        say(report, "jobs_in_turn", "tokens/s", rates[1]);
        say(report, "jobs_at_once", "tokens/s", rates[2]);
        say(report, "at_once_over_in_turn", "", rates[2] / rates[1]);
        Ok(())
    }

    /// Tokens per second over all streams while every one of them decodes.
    /// Tokens a second while all `streams` decode: each generates `new_tokens`, and before that as many as it may while the
    /// others' prompts are read.
    async fn rate(
        &mut self,
        streams: &[Option<AdapterRef>],
        prompt_tokens: usize,
        new_tokens: u32,
    ) -> anyhow::Result<f64> {
        let lead = (streams.len() * prompt_tokens).div_ceil(LEAST_CHUNK) as u32;
        let running: Vec<_> = streams
            .iter()
            .map(|adapter| self.send(prompt_tokens, lead + new_tokens, adapter.clone()))
            .collect();
        let mut times = vec![];
        for stream in running {
            times.push(tokio::spawn(stream));
        }
        let mut streams = vec![];
        for stream in times {
            streams.push(stream.await??);
        }
        let begin = streams
            .iter()
            .filter_map(|times| times.first())
            .max()
            .context("no stream")?;
        let end = streams
            .iter()
            .filter_map(|times| times.last())
            .min()
            .context("no stream")?;
        ensure!(
            begin < end,
            "{} streams never decode at the same time: the first ends before the last begins",
            streams.len()
        );
        let tokens = streams
            .iter()
            .flatten()
            .filter(|time| (begin..=end).contains(time))
            .count();
        Ok((tokens - streams.len().min(tokens)) as f64 / (*end - *begin).as_secs_f64())
    }

    async fn stream(
        &mut self,
        prompt_tokens: usize,
        max_tokens: u32,
        adapter: Option<AdapterRef>,
    ) -> anyhow::Result<Vec<Instant>> {
        self.send(prompt_tokens, max_tokens, adapter).await
    }

    /// A request with a prompt of its own; its tokens' times.
    fn send(
        &mut self,
        prompt_tokens: usize,
        max_tokens: u32,
        adapter: Option<AdapterRef>,
    ) -> impl Future<Output = anyhow::Result<Vec<Instant>>> + use<> {
        self.requests += 1;
        let id = RequestId(self.requests);
        let vocab = u64::from(self.replica.info.vocab_size);
        let token = |i: usize| (rng::bits(7, id.0, i as u64) % vocab) as TokenId;
        let prompt = (0..prompt_tokens).map(token).collect();
        let generate = Generate {
            adapter,
            ..Generate::new(id, prompt, Sampling::greedy(), max_tokens)
        };
        let commands = self.replica.commands.clone();
        async move {
            let (events, mut inbox) = mpsc::channel(EVENT_QUEUE);
            commands
                .send(Command::Generate(generate, events))
                .await
                .context("the engine ended")?;
            let mut times = vec![];
            loop {
                match inbox.recv().await.context("the engine dropped a request")? {
                    Event::Token { .. } => times.push(Instant::now()),
                    Event::Finished { .. } => return Ok(times),
                    Event::Failed(fault) => bail!("a request failed: {fault}"),
                    Event::Prompt(_) | Event::Pooled(_) => {}
                }
            }
        }
    }
}

/// The digest of the adapter that a job makes.
async fn result(mut events: mpsc::Receiver<JobEvent>) -> anyhow::Result<AdapterDigest> {
    loop {
        match events.recv().await.context("the engine dropped a job")? {
            JobEvent::Finished { adapter, .. } => return Ok(adapter.digest),
            JobEvent::Failed { message } | JobEvent::Refused { message } => bail!("a job failed: {message}"),
            _ => {}
        }
    }
}

fn train(options: &Options, report: &mut Map<String, Value>) -> anyhow::Result<()> {
    const EXAMPLES: usize = 4;
    /// 512 inputs, 512 labels.
    const EXAMPLE_TOKENS: usize = 513;
    let folder = tempfile::tempdir()?;
    let precision = match options.dtype {
        DtypeName::Bfloat16 => Precision::Bf16,
        DtypeName::Float32 => Precision::F32,
    };
    let device = words::device(&options.device)?;
    start::set_threads(device, None);
    let named = |recipe: &Recipe| Some(recipe.name()) == options.quantization.as_deref();
    let weights = WeightOptions {
        precision,
        recipe: Recipe::ALL.into_iter().find(named),
        device,
    };
    let base = Decoder::open(&options.model, weights)?;
    let vocab = base.spec.vocab as u64;
    let example = |number: u64| Example {
        tokens: (0..EXAMPLE_TOKENS)
            .map(|i| (rng::bits(9, number, i as u64) % vocab) as TokenId)
            .collect(),
        weights: vec![1.0; EXAMPLE_TOKENS],
    };
    let steps = options.train_steps + 1;
    let examples: Vec<Group> = (0..steps * EXAMPLES as u64)
        .map(example)
        .map(Group::from)
        .collect();
    std::fs::write(folder.path().join(files::TRAIN), dataset::encode(&examples))?;
    let hyper = hyper(EXAMPLES as u32, lora(base.spec.lora_targets()));
    let spec = JobSpec {
        id: "ftjob-bench".parse().expect("a job\'s id"),
        folder: folder.path().to_owned(),
        tenant: String::new(),
        base_model: "bench".to_owned(),
        hyper,
        life: Life::default(),
    };
    let mut trainer = Trainer::start(spec, &base)?;
    let (mut rates, mut quanta_s): (Vec<f64>, Vec<f64>) = (vec![], vec![]);
    let (mut cpu_rates, mut cpu) = (vec![], machine::cpu_time());
    loop {
        let began = Instant::now();
        let quantum = trainer.quantum(Some(&base))?;
        quanta_s.push(began.elapsed().as_secs_f64());
        for event in &quantum.events {
            if let JobEvent::Step(step) = event {
                rates.push(step.tokens_per_second);
                let used = machine::cpu_time() - cpu;
                cpu += used;
                cpu_rates.push((EXAMPLES * (EXAMPLE_TOKENS - 1)) as f64 / used.as_secs_f64());
            }
        }
        if quantum.finished {
            break;
        }
    }
    let peak_mb = machine::peak_rss_bytes().unwrap_or(0) as f64 / f64::from(1 << 20);
    say(
        report,
        "train_tok_s",
        "tokens/s",
        rates[1..].iter().copied().fold(0.0, f64::max),
    );
    let best = cpu_rates[1..].iter().copied().fold(0.0, f64::max);
    say(report, "train_tok_cpu_s", "tokens/CPU-s", best);
    say(report, "train_peak_rss_mb", "MB", peak_mb);
    let longest = quanta_s.iter().copied().fold(0.0, f64::max);
    println!(
        "quanta: median {:.1?}, longest {:.1?}",
        Duration::from_secs_f64(median(&quanta_s).unwrap_or(0.0)),
        Duration::from_secs_f64(longest)
    );
    Ok(())
}

fn lora(target_modules: Vec<String>) -> Lora {
    Lora {
        r: 16,
        alpha: 32.0,
        dropout: 0.0,
        target_modules,
        use_rslora: false,
        use_dora: false,
    }
}

fn hyper(batch_size: u32, lora: Lora) -> Hyper {
    Hyper {
        n_epochs: 1.0,
        max_steps: None,
        max_steps_per_epoch: None,
        batch_size,
        gradient_accumulation_steps: 1,
        learning_rate: 1e-4,
        lr_scheduler: Schedule::Linear,
        warmup_steps: 0,
        weight_decay: 0.01,
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        optimizer: Default::default(),
        max_grad_norm: 1.0,
        loraplus_lr_ratio: None,
        neftune_noise_alpha: None,
        seed: 1,
        max_seq_length: 1024,
        packing: false,
        shuffle: true,
        save_strategy: SaveStrategy::Steps,
        save_steps: 0,
        eval_steps: 0,
        selection: None,
        objective: Objective::default(),
        frozen_layers: 0,
        method: Method::Lora(lora),
    }
}

/// An untrained adapter: speed does not depend on its numbers, and each seed is another adapter.
fn write_adapter(model: &Path, folder: &Path, seed: u64) -> anyhow::Result<AdapterRef> {
    let spec = read_spec(model)?;
    let lora = lora(spec.lora_targets());
    let params = AdapterParams::init(AdapterShape::new(&spec, &lora), seed);
    std::fs::create_dir(folder)?;
    peft::write(
        folder,
        &params,
        &PeftConfig {
            base_model: "bench",
            lora: &lora,
        },
    )?;
    Ok(AdapterRef {
        digest: peft::digest(folder)?,
        folder: folder.to_owned(),
    })
}

fn say(report: &mut Map<String, Value>, key: &str, unit: &str, value: f64) {
    println!("{key:24} {value:10.2} {unit}");
    report.insert(key.to_owned(), json!(value));
}
