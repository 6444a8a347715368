//! What can be asked on the command line, by environment and in the configuration file: each option is declared once,
//! here. Not here: where a value comes from (config.rs), what is done with it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::extract::{FILE_LIMIT_BYTES, JSON_LIMIT_BYTES};

/// Serves a language model and fine-tunes it in tandem: one process, one copy of the base weights.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, about)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the OpenAI API, inference and fine-tuning: all in one process
    #[command(after_help = limits())]
    Serve(Box<Serve>),
    /// Run one replica for routers: the model without the API, over gRPC
    Backend(Box<Backend>),
    /// Serve the OpenAI API in front of backends
    #[command(after_help = limits())]
    Router(Box<Router>),
    /// Fine-tune without a server, from a YAML file and key=value overrides
    Train(Train),
    /// Say what this machine offers and what is missing
    Doctor,
    /// Ask a running server, router or backend how it is; the exit code answers
    Health(Health),
    /// Print the OpenAPI document
    #[command(hide = true)]
    Openapi,
    /// One rank of a replica: rank 0 starts it
    #[command(hide = true)]
    Rank(Rank),
}

/// Also by environment (TANDEM_MODEL, TANDEM_PORT, ...) and in the TOML file of --config (same names). A flag wins over
/// the environment, the environment over the file.
#[derive(Clone, Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub edge: EdgeOptions,
    #[command(flatten)]
    pub state: StateOptions,
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// Also by environment (TANDEM_LISTEN, TANDEM_MODEL, ...) and in the TOML file of --config (same names). A flag wins over
/// the environment, the environment over the file.
#[derive(Clone, Debug, Args)]
pub struct Backend {
    /// gRPC for routers, and GET /health, /ready and /metrics. There is no key: only routers should reach it. Port 0: any
    /// free one; the line "listening" says which
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub artifacts: ArtifactOptions,
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// Also by environment (TANDEM_BACKEND, TANDEM_PORT, ...) and in the TOML file of --config (same names). A flag wins over
/// the environment, the environment over the file.
#[derive(Clone, Debug, Args)]
pub struct Router {
    /// A backend's address, e.g. http://10.0.0.7:8001; repeat it, or separate by commas
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub backend: Vec<String>,
    /// Name of the base model in the API [default: what the first backend calls it]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    #[command(flatten)]
    pub edge: EdgeOptions,
    #[command(flatten)]
    pub state: StateOptions,
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// A replica: the model and how it runs.
#[derive(Clone, Debug, Args)]
pub struct ModelOptions {
    /// Folder with config.json, *.safetensors and tokenizer.json [default: the embedded demo model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Name of the base model in the API [default: the folder's name]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// auto, cpu or cuda:N; with several ranks on GPUs, each takes its own
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Ranks that divide the model [default: 1, or WORLD_SIZE where torchrun, Slurm or Kubernetes start the ranks]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub tensor_parallel_size: Option<u32>,
    /// What ranks are that nobody else starts: thread (of this process) or mp (processes of their own) [default: thread
    /// on the CPU, mp on GPUs]
    #[arg(long, value_name = "KIND", value_parser = ["thread", "mp"])]
    pub distributed_executor_backend: Option<String>,
    /// auto, bfloat16 or float32
    #[arg(long, default_value = "auto")]
    pub dtype: String,
    /// Tokens of prompt and answer together [default: what the model allows]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_model_len: Option<u32>,
    /// Sequences that run at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_num_seqs: Option<u32>,
    /// Tokens of one step, prompts and answers together
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_batched_tokens: Option<u32>,
    /// Bytes of the KV cache on each rank, e.g. 4G or 512M [default: a part of the free memory]
    #[arg(long, alias = "kv-cache-memory", value_name = "BYTES", value_parser = bytes)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Adapters that are resident at once; others wait on disk
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_loras: Option<u32>,
    /// Largest rank of an adapter
    #[arg(long, value_name = "RANK", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_lora_rank: Option<u32>,
    /// Seconds a fine-tuning job may take for each second of serving, while there are requests: with 1 streams
    /// are half as fast beside a job. Without requests it has the machine [default: 0.25]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub training_share: Option<f64>,
    /// Compute threads [default: one per physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
}

/// The HTTP side.
#[derive(Clone, Debug, Args)]
pub struct EdgeOptions {
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub host: IpAddr,
    /// 0: any free port; the line "listening" says which
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Every route but /health, /ready and the two pages then wants one of them, as a bearer token or x-api-key; repeat
    /// it, or separate by commas. Clients are told apart by their keys when places are few
    #[arg(long, value_name = "KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_key: Vec<String>,
    /// Web pages that may use the server beside its own and those of localhost: a JSON list such as
    /// '["https://chat.example.com"]', or '["*"]' for all
    #[arg(long, value_name = "ORIGINS")]
    pub allowed_origins: Vec<String>,
    /// Sampling parameters of a request that does not say: auto (the model's generation_config.json), vllm (none), or a
    /// folder with a generation_config.json
    #[arg(long, default_value = "auto", value_name = "auto|vllm|DIR")]
    pub generation_config: String,
    /// Refuse a request that has a field of which nothing is known, instead of logging the field's name once
    #[arg(long)]
    pub strict_fields: bool,
    /// Adapters to serve from the start: PEFT folders
    #[arg(long, value_name = "NAME=DIR", num_args = 1.., value_delimiter = ',', value_parser = lora_module)]
    pub lora_modules: Vec<(String, PathBuf)>,
    /// Requests that may wait for a place among the running; more are answered 429
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_waiting: u32,
    /// Seconds that a request waits for a replica while none answers; then it is answered 503
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub replica_wait: u64,
}

/// Where bytes are kept.
#[derive(Clone, Debug, Args)]
pub struct ArtifactOptions {
    /// Files, jobs and adapters live here
    #[arg(long, value_name = "DIR", default_value = "./tandem-data")]
    pub data_dir: PathBuf,
    /// s3://BUCKET/PREFIX (and the usual AWS_* variables) or file:///DIR: bytes that others see too, of which --data-dir
    /// is then a cache [default: --data-dir]
    #[arg(long, value_name = "URL")]
    pub artifact_url: Option<String>,
}

/// What is kept.
#[derive(Clone, Debug, Args)]
pub struct StateOptions {
    #[command(flatten)]
    pub artifacts: ArtifactOptions,
    /// postgres://USER:PASSWORD@HOST/NAME: files, jobs and names of several routers; wants an --artifact-url that all of
    /// them see [default: SQLite in --data-dir]
    #[arg(long, value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

/// The process.
#[derive(Clone, Debug, Args)]
pub struct ProcessOptions {
    /// Seconds that running streams are given at shutdown
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub shutdown_grace: u64,
    /// TOML file with any of these options
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct Train {
    /// YAML file; `tandem train help` lists its keys
    #[arg(value_name = "FILE.yaml | key=value", required = true)]
    pub settings: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub struct Rank {
    /// cpu or cuda
    #[arg(long)]
    pub device: String,
    /// Of all ranks together
    #[arg(long)]
    pub threads: Option<u32>,
}

#[derive(Clone, Debug, Args)]
pub struct Health {
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Ask whether it takes requests, not only whether it is well
    #[arg(long)]
    pub ready: bool,
}

fn limits() -> String {
    format!(
        "Limits of a request: JSON body {} MiB, uploaded file {} MiB, {} choices, {} stop strings.",
        JSON_LIMIT_BYTES >> 20,
        FILE_LIMIT_BYTES >> 20,
        crate::convert::sampling::MAX_CHOICES,
        crate::convert::sampling::MAX_STOP_STRINGS,
    )
}

/// `NAME=DIR`, as vLLM.
fn lora_module(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(folder)))
        }
        _ => Err("an adapter is given as NAME=DIR".to_owned()),
    }
}

/// `4294967296`, `4G`, `4GiB`, `512m`: powers of 1024.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.01..=100.0).contains(&share) => Ok(share),
        _ => Err(format!("{text:?} is not a number from 0.01 to 100")),
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let refused = || format!("{text:?} is not a number of bytes such as 2147483648, 2G or 512M");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..]
        .to_ascii_lowercase()
        .trim_end_matches("ib")
        .trim_end_matches('b')
    {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(refused()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| refused())?;
    let count = number * (1_u64 << shift) as f64;
    match (1.0..9e18).contains(&count) {
        true => Ok(count as u64),
        false => Err(refused()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, expected) in [
            ("2147483648", Some(2 << 30)),
            ("2G", Some(2 << 30)),
            ("1.5GiB", Some(3 << 29)),
            ("512m", Some(512 << 20)),
            ("64kb", Some(64 << 10)),
            ("", None),
            ("G", None),
            ("-1G", None),
            ("1X", None),
            ("nan", None),
        ] {
            assert_eq!(bytes(text).ok(), expected, "{text:?}");
        }
    }
}
