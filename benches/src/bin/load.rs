//! A load generator for OpenAI-compatible servers: streams /v1/completions and says what clients feel.
//!
//! Closed loop (`--concurrency 8`): so many requests are always under way. Open loop (`--rate 2`): requests arrive by a
//! Poisson process whatever the server does. Prompts are random token ids, every one different, so that prefix caches
//! do not help; tokens are counted by the server's own usage.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use serde_json::{Value, json};
use tandem_benches::http::{Body, Server};
use tandem_benches::{machine, percentile::percentile};
use tandem_core::rng;
use tokio::sync::Semaphore;

/// Measures a server over HTTP
#[derive(Clone, Parser)]
struct Options {
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    #[arg(long)]
    api_key: Option<String>,
    /// Repeat it: requests take the names in turn (one per adapter, say)
    #[arg(long, required = true)]
    model: Vec<String>,
    /// Requests under way (closed loop)
    #[arg(long, default_value_t = 1, conflicts_with = "rate")]
    concurrency: usize,
    /// Requests per second (open loop)
    #[arg(long)]
    rate: Option<f64>,
    #[arg(long, default_value_t = 32)]
    requests: usize,
    /// Sent first and not counted
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    #[arg(long, default_value_t = 256)]
    prompt_tokens: usize,
    #[arg(long, default_value_t = 128)]
    max_tokens: u32,
    /// Prompt token ids are drawn from 3 to this
    #[arg(long, default_value_t = 500)]
    vocab: u32,
    /// Another one makes other prompts [default: the clock]
    #[arg(long)]
    seed: Option<u64>,
    /// Upload this JSONL and fine-tune the first model with it while measuring
    #[arg(long, value_name = "FILE")]
    job: Option<PathBuf>,
    /// Passed on as the job's hyperparameters
    #[arg(long, value_name = "JSON", default_value = "{}")]
    hyperparameters: String,
}

/// One answered request.
struct Sample {
    ttft_s: f64,
    itl_s: Vec<f64>,
    e2e_s: f64,
    completion_tokens: u64,
}

impl Sample {
    /// Time per output token after the first.
    fn tpot_s(&self) -> Option<f64> {
        (self.completion_tokens > 1).then(|| (self.e2e_s - self.ttft_s) / (self.completion_tokens - 1) as f64)
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> anyhow::Result<()> {
    let mut options = Options::parse();
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    options.seed.get_or_insert(clock.as_nanos() as u64);
    let server = Server::new(&options.url, options.api_key.clone())?;

    for i in 0..options.warmup {
        request(&server, &options, i as u64)
            .await
            .context("a warm-up request failed")?;
    }
    let job = match &options.job {
        Some(file) => Some(start_job(&server, &options, file).await?),
        None => None,
    };
    let cpu_before = machine::cpu_time();
    let began = Instant::now();
    let results = match options.rate {
        Some(rate) => open_loop(&server, &options, rate).await?,
        None => closed_loop(&server, &options).await?,
    };
    let wall_s = began.elapsed().as_secs_f64();
    let cpu_s = (machine::cpu_time() - cpu_before).as_secs_f64();

    let (samples, errors): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    let samples: Vec<Sample> = samples.into_iter().flatten().collect();
    let errors: Vec<String> = errors
        .into_iter()
        .filter_map(Result::err)
        .map(|error| format!("{error:#}"))
        .collect();
    let mut report = report(&samples, wall_s);
    report["errors"] = json!(errors.len());
    report["client_cpu_share"] = json!(cpu_s / wall_s);
    if let Some(job) = job {
        report["job"] = job_report(&server, &job).await?;
    }
    for error in errors.iter().take(3) {
        eprintln!("error: {error}");
    }
    println!("{report}");
    Ok(())
}

fn report(samples: &[Sample], wall_s: f64) -> Value {
    let tokens: u64 = samples.iter().map(|sample| sample.completion_tokens).sum();
    let series = [
        (
            "ttft_ms",
            samples.iter().map(|sample| sample.ttft_s).collect::<Vec<_>>(),
        ),
        ("tpot_ms", samples.iter().filter_map(Sample::tpot_s).collect()),
        (
            "itl_ms",
            samples.iter().flat_map(|sample| &sample.itl_s).copied().collect(),
        ),
        ("e2e_ms", samples.iter().map(|sample| sample.e2e_s).collect()),
    ];
    let mut report = json!({
        "requests": samples.len(), "completion_tokens": tokens, "wall_s": wall_s, "tokens_per_s": tokens as f64 / wall_s,
    });
    println!(
        "{} requests, {tokens} tokens in {wall_s:.2} s: {:.1} tokens/s",
        samples.len(),
        tokens as f64 / wall_s
    );
    for (name, seconds) in series {
        let at = |q| percentile(&seconds, q).map(|s| 1e3 * s);
        if let (Some(p50), Some(p95), Some(p99)) = (at(50.0), at(95.0), at(99.0)) {
            println!("{name:8} p50 {p50:9.2}  p95 {p95:9.2}  p99 {p99:9.2}");
        }
        report[name] = json!({"p50": at(50.0), "p95": at(95.0), "p99": at(99.0)});
    }
    report
}

async fn closed_loop(server: &Server, options: &Options) -> anyhow::Result<Vec<anyhow::Result<Sample>>> {
    let places = Arc::new(Semaphore::new(options.concurrency));
    let mut running = vec![];
    for i in 0..options.requests {
        let place = places.clone().acquire_owned().await?;
        let (server, options) = (server.clone(), options.clone());
        running.push(tokio::spawn(async move {
            let result = request(&server, &options, (options.warmup + i) as u64).await;
            drop(place);
            result
        }));
    }
    join(running).await
}

async fn open_loop(
    server: &Server,
    options: &Options,
    rate: f64,
) -> anyhow::Result<Vec<anyhow::Result<Sample>>> {
    let mut running = vec![];
    let mut due = tokio::time::Instant::now();
    for i in 0..options.requests {
        tokio::time::sleep_until(due).await;
        let gap_s = -(1.0 - rng::uniform(options.seed.unwrap_or_default(), ARRIVALS, i as u64)).ln() / rate;
        due += Duration::from_secs_f64(gap_s);
        let (server, options) = (server.clone(), options.clone());
        running.push(tokio::spawn(async move {
            request(&server, &options, (options.warmup + i) as u64).await
        }));
    }
    join(running).await
}

async fn join(
    running: Vec<tokio::task::JoinHandle<anyhow::Result<Sample>>>,
) -> anyhow::Result<Vec<anyhow::Result<Sample>>> {
    let mut results = vec![];
    for task in running {
        results.push(task.await?);
    }
    Ok(results)
}

async fn request(server: &Server, options: &Options, number: u64) -> anyhow::Result<Sample> {
    let seed = options.seed.unwrap_or_default();
    let id =
        |i: usize| 3 + rng::bits(seed, number, i as u64) % u64::from(options.vocab.saturating_sub(3).max(1));
    let prompt: Vec<u64> = (0..options.prompt_tokens).map(id).collect();
    let body = json!({
        "model": options.model[number as usize % options.model.len()],
        "prompt": prompt,
        "max_tokens": options.max_tokens,
        "temperature": 0.0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let began = Instant::now();
    let mut events = server.stream("/v1/completions", Body::json(&body)).await?;
    let (mut first, mut last, mut itl_s, mut tokens) = (None, began, vec![], None);
    while let Some(event) = events.next().await? {
        let now = Instant::now();
        if let Some(error) = event.get("error") {
            bail!("the stream carries an error: {error}");
        }
        if event["choices"]
            .as_array()
            .is_some_and(|choices| !choices.is_empty())
        {
            match first {
                None => first = Some(now),
                Some(_) => itl_s.push((now - last).as_secs_f64()),
            }
            last = now;
        }
        tokens = event["usage"]["completion_tokens"].as_u64().or(tokens);
    }
    Ok(Sample {
        ttft_s: (first.context("a stream without a token")? - began).as_secs_f64(),
        itl_s,
        e2e_s: (last - began).as_secs_f64(),
        completion_tokens: tokens.context("the stream has no usage")?,
    })
}

struct Job {
    id: String,
    began: Instant,
}

async fn start_job(server: &Server, options: &Options, file: &PathBuf) -> anyhow::Result<Job> {
    const BOUNDARY: &str = "load-generator-boundary-7c1f";
    let content = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut bytes = format!(
        "--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--{BOUNDARY}\r\n\
         content-disposition: form-data; name=\"file\"; filename=\"train.jsonl\"\r\n\
         content-type: application/jsonl\r\n\r\n"
    )
    .into_bytes();
    bytes.extend(content);
    bytes.extend(format!("\r\n--{BOUNDARY}--\r\n").into_bytes());
    let content_type = format!("multipart/form-data; boundary={BOUNDARY}");
    let uploaded = server
        .post(
            "/v1/files",
            Body {
                content_type: &content_type,
                bytes,
            },
        )
        .await?;
    let hyperparameters: Value =
        serde_json::from_str(&options.hyperparameters).context("--hyperparameters")?;
    let body = json!({
        "model": options.model[0], "training_file": uploaded["id"], "seed": 1,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    });
    let job = server.post("/v1/fine_tuning/jobs", Body::json(&body)).await?;
    let id = job["id"].as_str().context("the job has no id")?.to_owned();
    // Measure beside training, not beside the reading of its file.
    let began = Instant::now();
    loop {
        let job = server.get(&format!("/v1/fine_tuning/jobs/{id}")).await?;
        match job["status"].as_str().unwrap_or_default() {
            "validating_files" | "queued" if began.elapsed() < Duration::from_secs(60) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            "running" => {
                return Ok(Job {
                    id,
                    began: Instant::now(),
                });
            }
            status => bail!(
                "the job is {status} before it could be measured: {}",
                job["error"]
            ),
        }
    }
}

/// Where the job stands now, and the rate its last steps reported: compare it with the same job on an idle server.
async fn job_report(server: &Server, job: &Job) -> anyhow::Result<Value> {
    let state = server.get(&format!("/v1/fine_tuning/jobs/{}", job.id)).await?;
    let events = server
        .get(&format!("/v1/fine_tuning/jobs/{}/events?limit=100", job.id))
        .await?;
    let rates: Vec<f64> = events["data"]
        .as_array()
        .map(|events| {
            events
                .iter()
                .filter_map(|event| event["data"]["tokens_per_second"].as_f64())
                .collect()
        })
        .unwrap_or_default();
    let rate = percentile(&rates, 50.0);
    let (status, seconds) = (
        state["status"].as_str().unwrap_or("of unknown status"),
        job.began.elapsed().as_secs_f64(),
    );
    println!(
        "job {} is {status} after {seconds:.1} s: {:.1} tokens/s",
        job.id,
        rate.unwrap_or(0.0)
    );
    Ok(json!({"status": state["status"], "tokens_per_s": rate, "steps_seen": rates.len()}))
}

/// Keeps the draws of arrivals apart from those of prompts, whose streams are request numbers.
const ARRIVALS: u64 = u64::MAX;
