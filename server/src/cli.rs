//! What can be asked on the command line, by environment and in the configuration file: each option is declared once,
//! here. Not here: where a value comes from (config.rs), what is done with it.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use reqwest::Url;
use tandem_backend::ModelLen;
use tandem_router::tinker::Limits;
use tandem_store::{Role, Tenant};
use tandem_text::reasoning::ReasoningFormat;
use tandem_text::tools::ToolFormat;

use crate::connection::RootPath;
use crate::extract::{FILE_LIMIT_BYTES, JSON_LIMIT_BYTES};
use crate::otlp;
use crate::tls::CertReqs;
use crate::values::{
    ChatTemplate, LogFormat, LoraModule, LoraModules, Parser as Format, SchedulingPolicy, address, bytes,
    bytes_or_none, cert_reqs, chat_template, count, host, log_format, lora_modules, model_len,
    reasoning_parser, root_path, scheduling_policy, share, tool_call_parser,
};

/// Serves a language model and fine-tunes it in tandem: one process, one copy of the base weights.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, about, after_help = BEGIN)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const BEGIN: &str = "\
To begin:
  tandem serve                          the embedded demo model, with a page to chat on http://127.0.0.1:8000/
  tandem serve HuggingFaceTB/SmolLM2-135M-Instruct
                                        a model by its name on the hub, or the folder of one
  tandem train recipe.yaml              fine-tune without a server; `tandem train help` lists the settings
  tandem COMMAND --help                 every option";

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
    /// Loss and perplexity of a model, or of an adapter, over a file of rows
    Eval(Eval),
    /// Answer a prompt without a server
    Generate(Generate),
    /// List, copy and check recipes for `tandem train`
    #[command(subcommand)]
    Recipes(Recipes),
    /// Fetch a model or an adapter from the hub, and print its folder
    Download(Download),
    /// List, show and remove adapters: of folders, of a data folder, of a running server
    #[command(subcommand)]
    Adapters(Adapters),
    /// Write a model anew in fewer bits
    Quantize(Quantize),
    /// Write a model anew with an adapter in it
    Merge(Merge),
    /// Draw curves of runs as an SVG picture
    Plot(Plot),
    /// Copy what a server keeps, while it runs
    Backup(Backup),
    /// Make a data folder of such a copy
    Restore(Restore),
    /// Make, list, revoke and rotate API keys
    Keys(KeyOptions),
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

/// Linears in fewer bits; embedding, head and norms stay as they are. int8 (a scale by rows) and int4 (groups of 32) are
/// written as compressed-tensors has them, nf4 as bitsandbytes: vLLM and transformers read them, too.
#[derive(Clone, Debug, Args)]
pub struct Quantize {
    /// Folder with config.json and *.safetensors, or a name on the hub
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Folder to make
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    #[arg(long, value_name = "FORMAT", value_parser = ["int8", "int4", "nf4"])]
    pub format: String,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
}

/// The base's files under their names, each matrix that the adapter changes as W + scale B A; tokenizer and configuration are
/// copied. Or one GGUF file (OUT.gguf) with all of it. What comes out is a model like any other.
#[derive(Clone, Debug, Args)]
pub struct Merge {
    /// The base: a folder with config.json and *.safetensors, or a name on the hub
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// A PEFT folder, or a name on the hub
    #[arg(value_name = "ADAPTER")]
    pub adapter: PathBuf,
    /// Folder, or *.gguf file, to make
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// [default: gguf if OUT is so called, else safetensors]
    #[arg(long, value_name = "FORMAT", value_parser = ["safetensors", "gguf"])]
    pub format: Option<String>,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
}

/// A line for each run and, dashed, one for its validations.
#[derive(Clone, Debug, Args)]
pub struct Plot {
    /// Files that `tandem train` writes into its output_dir, or such folders
    #[arg(value_name = "METRICS.jsonl", required = true)]
    pub metrics: Vec<PathBuf>,
    /// The picture
    #[arg(long, short, value_name = "FILE.svg")]
    pub output: PathBuf,
    /// Of the numbers that a run reports
    #[arg(long, value_name = "NAME", default_value = "loss")]
    pub metric: String,
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
    /// gRPC for routers, which show a token (--backend-token), and GET /health, /ready and /metrics for everybody. Port 0:
    /// any free one; the line "listening" says which
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "ADDRESS:PORT", value_parser = address)]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub token: TokenOptions,
    #[command(flatten)]
    pub ssl: SslOptions,
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
    /// A backend's address, e.g. http://10.0.0.7:8001, or https:// (the same as grpcs://) where it serves over TLS; repeat it, or
    /// separate by commas
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub backend: Vec<String>,
    #[command(flatten)]
    pub token: TokenOptions,
    #[command(flatten)]
    pub backend_ssl: BackendSslOptions,
    /// Names of the base model in the API, the first of which answers carry [default: what the first backend calls it]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    #[command(flatten)]
    pub edge: EdgeOptions,
    #[command(flatten)]
    pub state: StateOptions,
    #[command(flatten)]
    pub process: ProcessOptions,
}

/// TLS of whoever listens.
#[derive(Clone, Debug, Args)]
pub struct SslOptions {
    /// Certificate of the server (PEM, with those between it and the root behind it): all is then served over TLS alone.
    /// SIGHUP reads the files again
    #[arg(long, value_name = "FILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// Its private key (PEM, without a password) [default: in the file of --ssl-certfile]
    #[arg(long, value_name = "FILE")]
    pub ssl_keyfile: Option<PathBuf>,
    /// Certificates (PEM) of those who sign clients' certificates
    #[arg(long, value_name = "FILE")]
    pub ssl_ca_certs: Option<PathBuf>,
    /// 0: no client's certificate is asked for, 1: one may be shown, 2: one must be
    #[arg(long, value_name = "0|1|2", default_value = "0", value_parser = cert_reqs)]
    pub ssl_cert_reqs: CertReqs,
}

/// TLS of a router to its backends.
#[derive(Clone, Debug, Args)]
pub struct BackendSslOptions {
    /// Certificates (PEM) of those who sign backends', for backends at https://
    #[arg(long, value_name = "FILE")]
    pub backend_ssl_ca_certs: Option<PathBuf>,
    /// Certificate (PEM) that the router shows to backends which want one (their --ssl-cert-reqs 2)
    #[arg(long, value_name = "FILE")]
    pub backend_ssl_certfile: Option<PathBuf>,
    /// Its private key (PEM, without a password) [default: in the file of --backend-ssl-certfile]
    #[arg(long, value_name = "FILE")]
    pub backend_ssl_keyfile: Option<PathBuf>,
}

/// What router and backend both know.
#[derive(Clone, Debug, Args)]
pub struct TokenOptions {
    /// The same for routers and backends, 16 characters or more: a backend that has one obeys nobody else, and one that
    /// listens beyond this machine needs one
    #[arg(long, value_name = "TOKEN", hide_env_values = true)]
    pub backend_token: Option<String>,
    /// The token from a file, such as a secret of Compose or Kubernetes; it wins over --backend-token
    #[arg(long, value_name = "FILE")]
    pub backend_token_file: Option<PathBuf>,
}

/// A replica: the model and how it runs.
#[derive(Clone, Debug, Args)]
pub struct ModelOptions {
    /// Folder with config.json, *.safetensors and tokenizer.json, or a name on the hub, ORG/NAME, which is looked for in its
    /// cache (HF_HOME, HF_HUB_CACHE) and downloaded (HF_TOKEN, HF_ENDPOINT), unless HF_HUB_OFFLINE is 1 [default: the
    /// embedded demo model]
    #[arg(value_name = "MODEL")]
    pub model_folder: Option<PathBuf>,
    /// The same as MODEL
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Branch, tag or commit of a model on the hub [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Names of the base model in the API, the first of which answers carry [default: the folder's name, or
    /// the hub's]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    /// auto, cpu or cuda:N; with several ranks on GPUs, each takes its own
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Ranks that divide the model [default: 1, or WORLD_SIZE where torchrun, Slurm or Kubernetes start the ranks]
    #[arg(long, value_name = "N", value_parser = count(1..=64))]
    pub tensor_parallel_size: Option<u32>,
    /// What ranks are that nobody else starts: thread (of this process) or mp (processes of their own) [default: thread
    /// on the CPU, mp on GPUs]
    #[arg(long, value_name = "KIND", value_parser = ["thread", "mp"])]
    pub distributed_executor_backend: Option<String>,
    /// Of the weights: auto (as the checkpoint is stored; float16 becomes bfloat16), bfloat16 or float32
    #[arg(long, default_value = "auto")]
    pub dtype: String,
    /// The linears in fewer bits, embedding and head as --dtype: int8 (a scale by rows), int4 (groups of 32) or nf4 (groups
    /// of 64, as bitsandbytes) [default: as the checkpoint has them, which may be quantised already]
    #[arg(long, value_name = "FORMAT")]
    pub quantization: Option<String>,
    /// Of keys and values: auto (as --dtype), bfloat16, float32, or int8, half of bfloat16's memory: twice as many tokens
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub kv_cache_dtype: String,
    /// Guess tokens by what followed the last ones before (prompt lookup); right guesses cost nothing and change no answer,
    /// e.g. '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
    #[arg(long, value_name = "JSON")]
    pub speculative_config: Option<String>,
    /// Tokens of prompt and answer together, e.g. 4096, 4K or 4k (4000); auto: as many as the memory allows [default:
    /// what the model was made for]
    #[arg(long, value_name = "TOKENS", value_parser = model_len, allow_negative_numbers = true)]
    pub max_model_len: Option<ModelLen>,
    /// Sequences that run at once, 1 to 4096 [default: 64]
    #[arg(long, value_name = "N", value_parser = count(1..=4096))]
    pub max_num_seqs: Option<u32>,
    /// Tokens of one step, prompts and answers together [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = count(1..=u32::MAX))]
    pub max_num_batched_tokens: Option<u32>,
    /// Bytes of the KV cache on each rank, e.g. 4G (of 1024) or 500m (of 1000) [default: room for --max-num-seqs whole
    /// sequences, within half of the free memory, or 80 % of a GPU's]
    #[arg(long, alias = "kv-cache-memory", value_name = "BYTES", value_parser = bytes)]
    pub kv_cache_memory_bytes: Option<u64>,
    /// Adapters that are resident at once, 1 to 4096; others wait on disk [default: 16]
    #[arg(long, value_name = "N", value_parser = count(1..=4096))]
    pub max_loras: Option<u32>,
    /// Largest rank of an adapter, 1 to 4096 [default: 64]
    #[arg(long, value_name = "RANK", value_parser = count(1..=4096))]
    pub max_lora_rank: Option<u32>,
    /// Fine-tuning jobs that train at once, 1 to 64, as far as the memory allows; others wait [default: 4]
    #[arg(long, value_name = "N", value_parser = count(1..=64))]
    pub max_training_jobs: Option<u32>,
    /// Seconds fine-tuning jobs together may take for each second of serving, while there are requests: with 1 streams
    /// are half as fast beside a job. Without requests they have the machine [default: 0.25]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub training_share: Option<f64>,
    /// Milliseconds between two tokens of a stream that are quick enough: while streams only decode, a fine-tuning job also
    /// takes what a step leaves of them. Without it, its share alone
    #[arg(long, value_name = "MS", value_parser = count(1..=60_000))]
    pub target_itl_ms: Option<u32>,
    /// Compute threads [default: one per physical core that the process may use, within its cgroup's limit]
    #[arg(long, value_name = "N", value_parser = count(1..=4096))]
    pub threads: Option<u32>,
    /// Of requests that bring no seed [default: another one at each start]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

/// The HTTP side.
#[derive(Clone, Debug, Args)]
pub struct EdgeOptions {
    /// Address or name to listen on; 0.0.0.0 is every network
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS", value_parser = host)]
    pub host: IpAddr,
    /// 0: any free port; the line "listening" says which
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Every route but /health, /ready and the two pages then wants one of them, as a bearer token or x-api-key; repeat
    /// it, or separate by commas. These open everything; `tandem keys` makes others, with roles and tenants
    #[arg(long, value_name = "KEY", value_delimiter = ',', hide_env_values = true)]
    pub api_key: Vec<String>,
    /// Keys as of --api-key, one a line, from a file such as a secret of Compose or Kubernetes. /dev/null: none
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// A file to which a line of JSON is appended for everything that changes something: who, what, and what came of it.
    /// The log has the same lines (target audit)
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Where a container's port is published, which --host does not say. Beyond 127.0.0.1 other machines come in: then
    /// keys are wanted
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub published: Option<String>,
    /// Web pages that may use the server beside its own and those of localhost: a JSON list such as
    /// '["https://chat.example.com"]', or '["*"]' for all
    #[arg(long, value_name = "ORIGINS")]
    pub allowed_origins: Vec<String>,
    /// Sampling parameters of a request that does not say: auto (the model's generation_config.json), vllm (none), or a
    /// folder with a generation_config.json
    #[arg(long, default_value = "auto", value_name = "auto|vllm|DIR")]
    pub generation_config: String,
    /// Chat template instead of the model's own: a file with Jinja, or the template itself, in which \n is a new line.
    /// Requests and fine-tuning jobs use it
    #[arg(long, value_name = "FILE", value_parser = chat_template)]
    pub chat_template: Option<ChatTemplate>,
    /// How the model writes tool calls, by vLLM's names (hermes, llama3_json, mistral, ...), or none: they stay in the text
    /// [default: what the chat template shows]
    #[arg(long, value_name = "NAME", value_parser = tool_call_parser)]
    pub tool_call_parser: Option<Format<ToolFormat>>,
    /// How the model writes its reasoning, by vLLM's names (qwen3, deepseek_r1, ...), or none: it stays in the text [default:
    /// what the chat template shows]
    #[arg(long, value_name = "NAME", value_parser = reasoning_parser)]
    pub reasoning_parser: Option<Format<ReasoningFormat>>,
    /// Refuse a request that has a field of which nothing is known, instead of logging the field's name once
    #[arg(long)]
    pub strict_fields: bool,
    /// Adapters to serve from the start: PEFT folders or names on the hub, several of them by spaces or commas; or vLLM's
    /// JSON, '{"name": "a", "path": "DIR"}'
    #[arg(long, value_name = "NAME=DIR", num_args = 1.., value_parser = lora_modules)]
    pub lora_modules: Vec<LoraModules>,
    /// Folder below which /v1/load_lora_adapter may read adapters, links resolved; repeat it, or separate by commas. Names
    /// on the hub need none [default: none but --data-dir and the folders of --lora-modules]
    #[arg(long, value_name = "DIR", value_delimiter = ',')]
    pub lora_root: Vec<PathBuf>,
    /// Bytes of responses (/v1/responses) kept of each tenant, so that clients can name them later; beyond them the oldest go. 0:
    /// none are kept
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = bytes_or_none)]
    pub response_store_bytes: u64,
    /// Days that a response is kept
    #[arg(long, value_name = "DAYS", default_value_t = 30, value_parser = count(1..=36_500))]
    pub response_store_days: u32,
    #[command(flatten)]
    pub tinker: TinkerOptions,
    #[command(flatten)]
    pub ssl: SslOptions,
    /// Path under which a proxy shows the server: requests may have it before theirs
    #[arg(long, value_name = "PATH", default_value = "/", value_parser = root_path)]
    pub root_path: RootPath,
    /// Write no line of the log for each request
    #[arg(long)]
    pub disable_uvicorn_access_log: bool,
    /// Paths of whose requests no line is written, such as /health,/metrics
    #[arg(long, value_name = "PATHS", value_delimiter = ',')]
    pub disable_access_log_for_endpoints: Vec<String>,
    /// Whether a request's `priority` may go below 0, before requests that say nothing: under `priority` every client may say
    /// so. What is above 0 goes behind them in either case
    #[arg(long, value_name = "fcfs|priority", default_value = "fcfs", value_parser = scheduling_policy)]
    pub scheduling_policy: SchedulingPolicy,
    /// Requests that may wait for a place among the running; more are answered 429
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_waiting: u32,
    /// Seconds that a request waits for a replica while none answers; then it is answered 503
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub replica_wait: u64,
    #[command(flatten)]
    pub connections: ConnectionOptions,
}

/// What clients that train call by call (Tinker's API) may have.
#[derive(Clone, Debug, Args)]
pub struct TinkerOptions {
    /// Sessions of Tinker clients at once; more are told to come back
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.sessions, value_parser = count(1..=1 << 20))]
    pub tinker_max_sessions: u32,
    /// Models that one session of a Tinker client trains at a time
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.models, value_parser = count(1..=4096))]
    pub tinker_max_models: u32,
    /// Calls of one model of a Tinker client that wait for their turn; more are told to come back
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.queued_calls, value_parser = count(1..=1 << 20))]
    pub tinker_max_queued_calls: u32,
    /// Bytes of one forward_backward of a Tinker client, which cuts its calls into parts of 5 MB where it can
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = bytes)]
    pub tinker_max_call_bytes: u64,
    /// Results of Tinker clients' calls that are kept until they are fetched; beyond, the oldest go
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.kept_results, value_parser = count(1..=100_000_000))]
    pub tinker_max_kept_results: u32,
}

impl TinkerOptions {
    pub fn limits(&self) -> Limits {
        let &TinkerOptions {
            tinker_max_sessions: sessions,
            tinker_max_models: models,
            tinker_max_queued_calls: queued_calls,
            tinker_max_call_bytes: call_bytes,
            tinker_max_kept_results: kept_results,
        } = self;
        Limits {
            sessions,
            models,
            queued_calls,
            call_bytes,
            kept_results,
        }
    }
}

/// How many connections, and how long is waited for who holds one.
#[derive(Clone, Debug, Args)]
pub struct ConnectionOptions {
    /// Connections at once, of the API; no more than open files are allowed (ulimit -Hn) less 256. Others wait
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = count(1..=1 << 20))]
    pub max_connections: u32,
    /// Connections at once from one address; more are closed. Behind a proxy all come from one
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = count(1..=1 << 20))]
    pub max_connections_per_address: u32,
    /// Seconds that a connection may be open without a request under way
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = count(1..=86_400))]
    pub idle_timeout: u32,
    /// Seconds that a new connection has for its first request's headers, and a client for the next piece of a body
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = count(1..=86_400))]
    pub read_timeout: u32,
    /// Seconds after which an answer is given up of which the client takes nothing in
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = count(1..=86_400))]
    pub write_timeout: u32,
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
    /// Start although the database is new, or older than the files and adapters beside it: what it does not know of moves to
    /// DATA_DIR/quarantine. Without this such a start is refused
    #[arg(long)]
    pub quarantine_strays: bool,
}

/// Database, files, adapters and the states of running jobs as one folder, with a list of their digests. The server that
/// uses the data folder may go on. A Postgres is copied by its own tools.
#[derive(Clone, Debug, Args)]
pub struct Backup {
    /// A folder to make
    #[arg(value_name = "DIR")]
    pub target: PathBuf,
    /// That of the server
    #[arg(
        long,
        value_name = "DIR",
        env = "TANDEM_DATA_DIR",
        default_value = "./tandem-data"
    )]
    pub data_dir: PathBuf,
    /// That of the server: what lies there is fetched into the copy
    #[arg(long, value_name = "URL", env = "TANDEM_ARTIFACT_URL")]
    pub artifact_url: Option<String>,
    /// Refused: pg_dump copies it
    #[arg(long, value_name = "URL", env = "TANDEM_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

/// Every file is held against the digest in the copy. A server started on the folder answers by the same adapters and goes
/// on with the jobs; it needs no --artifact-url.
#[derive(Clone, Debug, Args)]
pub struct Restore {
    /// A folder that `tandem backup` made
    #[arg(value_name = "DIR")]
    pub source: PathBuf,
    /// A folder to make: new, or empty
    #[arg(
        long,
        value_name = "DIR",
        env = "TANDEM_DATA_DIR",
        default_value = "./tandem-data"
    )]
    pub data_dir: PathBuf,
}

/// A running server takes changes within seconds, and once there was a key nobody comes in without one. Of a key only its
/// SHA-256 is kept.
#[derive(Clone, Debug, Args)]
pub struct KeyOptions {
    #[command(subcommand)]
    pub command: KeyCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it, this once
    Create {
        /// Whose files, jobs and models it sees: letters, digits, -, _ and .
        #[arg(long, default_value = Tenant::DEFAULT)]
        tenant: Tenant,
        /// infer (ask models), train (files, jobs and models, too) or admin (everything, of every tenant)
        #[arg(long)]
        role: Role,
        /// For people
        #[arg(long, default_value = "")]
        name: String,
        /// Days until it opens nothing any more [default: never]
        #[arg(long, value_name = "DAYS", value_parser = count(1..=36_500))]
        expires_days: Option<u32>,
        /// Requests that ask a model [default: as many as it likes]
        #[arg(long, value_name = "N", value_parser = count(1..=u32::MAX))]
        requests_per_minute: Option<u32>,
        /// Tokens of prompts and answers [default: as many as it likes]
        #[arg(long, value_name = "N", value_parser = count(1..=u32::MAX))]
        tokens_per_minute: Option<u32>,
        /// Tokens that its jobs and its calls train, in a day (UTC), on all routers of the database [default: as many as it likes]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        training_tokens_per_day: Option<u64>,
        /// Bytes that its tenant may have of files, uploads, answers of batches, data and states of jobs, adapters and checkpoints,
        /// e.g. 20G [default: as many as it likes]
        #[arg(long, value_name = "BYTES", value_parser = bytes)]
        stored_bytes: Option<u64>,
        #[command(flatten)]
        place: KeyPlace,
    },
    /// Id, state, role, tenant, name, when each was made and ends, and its limits, by tabs
    List {
        #[command(flatten)]
        place: KeyPlace,
    },
    /// A key opens nothing any more
    Revoke {
        id: String,
        #[command(flatten)]
        place: KeyPlace,
    },
    /// Make another key with the same tenant, role, name and limits in place of one
    Rotate {
        id: String,
        /// For which the old one goes on
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        overlap_seconds: u64,
        #[command(flatten)]
        place: KeyPlace,
    },
}

#[derive(Clone, Debug, Args)]
pub struct KeyPlace {
    /// That of the server
    #[arg(
        long,
        value_name = "DIR",
        env = "TANDEM_DATA_DIR",
        default_value = "./tandem-data"
    )]
    pub data_dir: PathBuf,
    /// That of the servers
    #[arg(long, value_name = "URL", env = "TANDEM_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

/// The process.
#[derive(Clone, Debug, Args)]
pub struct ProcessOptions {
    /// Seconds that running streams are given at shutdown
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub shutdown_grace: u64,
    /// How the log is written: text, or json with an object a line
    #[arg(long, value_name = "text|json", default_value = "text", value_parser = log_format)]
    pub log_format: LogFormat,
    /// Where OpenTelemetry traces are sent, in OTLP over HTTP (JSON), such as http://localhost:4318/v1/traces: from a request
    /// to the engine's steps, and of training. OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and OTEL_EXPORTER_OTLP_HEADERS are
    /// read, too
    #[arg(long, value_name = "URL", value_parser = otlp::endpoint)]
    pub otlp_traces_endpoint: Option<Url>,
    /// TOML file with any of these options
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct Train {
    /// A YAML file of settings, and settings that win over it; --key value is taken, too. `tandem train help` lists all
    #[arg(
        value_name = "FILE.yaml | key=value",
        required = true,
        allow_hyphen_values = true
    )]
    pub settings: Vec<String>,
}

/// Rows are read as `tandem train` reads a validation_file, and the loss is that of its validations.
#[derive(Clone, Debug, Args)]
pub struct Eval {
    /// A model and a file of rows (or a recipe of `tandem train`), and settings; --key value is taken, too. `tandem eval help`
    /// lists all
    #[arg(
        value_name = "MODEL DATA | FILE.yaml | key=value",
        required = true,
        allow_hyphen_values = true
    )]
    pub settings: Vec<String>,
}

/// The answer is the one that a server gives to the same request.
#[derive(Clone, Debug, Args)]
pub struct Generate {
    /// A model or a YAML file of settings, and settings that win over it; --key value is taken, too. `tandem generate help`
    /// lists all
    #[arg(
        value_name = "MODEL | FILE.yaml | key=value",
        required = true,
        allow_hyphen_values = true
    )]
    pub settings: Vec<String>,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Recipes {
    /// List the recipes that are shipped
    Ls,
    /// Copy one into a file
    Cp {
        /// As `tandem recipes ls` has it
        name: String,
        file: PathBuf,
        /// Write over a file that is there
        #[arg(long)]
        force: bool,
    },
    /// Read settings without running them
    Validate {
        /// A YAML file or a recipe's name, and settings that win over it
        #[arg(value_name = "FILE.yaml | NAME | key=value", required = true)]
        words: Vec<String>,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub enum Adapters {
    /// What each is called, its rank, base, modules, size and who made it, by tabs
    Ls {
        /// PEFT folders below it, and in data folders what has a name [default: ./tandem-data, else .]
        #[arg(value_name = "DIR")]
        folder: Option<PathBuf>,
        #[command(flatten)]
        server: AdapterServer,
    },
    /// All that is known of one
    Show {
        /// A PEFT folder, or a name of the data folder or of the server
        #[arg(value_name = "NAME | DIR")]
        adapter: String,
        /// That of the server
        #[arg(
            long,
            value_name = "DIR",
            env = "TANDEM_DATA_DIR",
            default_value = "./tandem-data"
        )]
        data_dir: PathBuf,
        #[command(flatten)]
        server: AdapterServer,
    },
    /// Remove a PEFT folder, or a name of a running server; never what a server has in its data folder
    Rm {
        #[arg(value_name = "NAME | DIR")]
        adapter: String,
        #[command(flatten)]
        server: AdapterServer,
    },
}

/// A running server.
#[derive(Clone, Debug, Args)]
pub struct AdapterServer {
    /// Ask the server there, such as http://localhost:8000
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// A key of it
    #[arg(long, value_name = "KEY", env = "TANDEM_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct Download {
    /// Of a model or an adapter on the hub (HF_ENDPOINT, HF_TOKEN). Safetensors, JSON and templates come, no pickles
    #[arg(value_name = "ORG/NAME")]
    pub name: String,
    /// Branch, tag or commit [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// A folder to put the files into, instead of the hub's cache (HF_HOME, HF_HUB_CACHE)
    #[arg(long, value_name = "DIR")]
    pub local_dir: Option<PathBuf>,
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
    /// Where it listens
    #[arg(long, default_value = "127.0.0.1", value_parser = host)]
    pub host: IpAddr,
    #[arg(long, default_value_t = 8000, env = "TANDEM_PORT")]
    pub port: u16,
    /// It serves over TLS: whatever certificate it shows is taken
    #[arg(long, value_name = "FILE", env = "TANDEM_SSL_CERTFILE")]
    pub ssl_certfile: Option<PathBuf>,
    /// Ask whether it takes requests, not only whether it is well
    #[arg(long)]
    pub ready: bool,
}

impl Command {
    /// Of those that run until a signal.
    fn process(&self) -> Option<&ProcessOptions> {
        match self {
            Command::Serve(options) => Some(&options.process),
            Command::Backend(options) => Some(&options.process),
            Command::Router(options) => Some(&options.process),
            _ => None,
        }
    }

    pub fn log_format(&self) -> LogFormat {
        self.process()
            .map_or(LogFormat::Text, |process| process.log_format)
    }

    /// What the log says at least: commands that end by themselves say what they do on their own.
    pub fn least_log(&self) -> &'static str {
        match self {
            Command::Generate(_) | Command::Eval(_) => "warn",
            _ => "info",
        }
    }

    pub fn otlp_traces_endpoint(&self) -> Option<Url> {
        self.process()?.otlp_traces_endpoint.clone()
    }
}

fn limits() -> String {
    format!(
        "Limits of a request: JSON body {} MiB, uploaded file {} MiB, {} choices, {} stop strings, text to /tokenize {} MiB.",
        JSON_LIMIT_BYTES >> 20,
        FILE_LIMIT_BYTES >> 20,
        crate::convert::sampling::MAX_CHOICES,
        crate::convert::sampling::MAX_STOP_STRINGS,
        tandem_router::MAX_TEXT_BYTES >> 20,
    )
}

impl ModelOptions {
    /// Where the model lies, by whichever of the two it was said.
    pub fn folder(&self) -> Option<&Path> {
        self.model_folder.as_deref().or(self.model.as_deref())
    }
}

impl EdgeOptions {
    /// Name and folder of each adapter, or its name on the hub.
    pub fn adapters(&self) -> impl Iterator<Item = &LoraModule> {
        self.lora_modules.iter().flat_map(|LoraModules(modules)| modules)
    }
}
